"GPTQ against Optimal Brain Surgeon step by step in float64, at ragged widths, for stacks, with inputs that say little or nothing."
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.quant import QuantizedWeight, quantize
from deepseek_nb.quant.gptq import Hessian, collect_hessians, gptq, inverse_factor, output_error, quantize_layers
from deepseek_nb.quant.int4 import Int4, unpack_nibbles

FORMATS = dict(sym32=Int4(symmetric=True), asym32=Int4(), sym64=Int4(64, symmetric=True), asym64=Int4(64))
SHAPES = [(1, 32), (5, 33), (24, 70), (16, 128), (7, 190)]


def correlated(n, i, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, max(2, i//3), generator=g) @ torch.randn(max(2, i//3), i, generator=g) + .3*torch.randn(n, i, generator=g)


def heard(x, i=None, stack=()):
    h = Hessian(i or x.shape[-1], stack)
    h.add(x)
    return h


def surgeon(w, h, f, damp):
    "One row at a time, one weight at a time: round, change all later ones for the best, take the input out of the inverse."
    w,h = w.double().clone(),h.double()
    i = w.shape[1]
    left = torch.linalg.inv(h + damp*h.diagonal().mean()*torch.eye(i, dtype=torch.float64))
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for j in range(i):
        if j % f.group == 0:
            part = w[:, j:j+f.group].float()
            if f.symmetric:
                step = (part.gather(1, part.abs().argmax(1, keepdim=True))[:, 0]/-8).half().double()
                low = -8*step
            else: step,low = ((part.amax(1) - part.amin(1))/15).half().double(),part.amin(1).half().double()
        unit = torch.where(step == 0, 1, step)
        code = ((w[:, j] - low)/unit).round().clamp(0, 15)
        error = (w[:, j] - code*step - low)/left[0, 0]
        codes[:, j] = code
        w[:, j:] -= error[:, None]*left[0]
        left = left[1:, 1:] - left[1:, :1]*left[:1, 1:]/left[0, 0]
    return codes


@pytest.mark.parametrize('damp', [.01, .1])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('f', FORMATS)
def test_codes_are_the_surgeons(f, shape, damp):
    "Rows don't touch each other; float32 may round one differently, and then the rest of that row goes its own way."
    o,i = shape
    torch.manual_seed(o*i)
    w,h = torch.randn(o, i),heard(correlated(4*i, i, o))
    got = unpack_nibbles(gptq(w, h, FORMATS[f], damp).codes)[:, :i]
    same = (got == surgeon(w, h.sum, FORMATS[f], damp)).all(1).double().mean()
    assert same >= .9, same


@pytest.mark.parametrize('shape', [(1, 32), (32, 1), (5, 33), (2, 1, 40)])
def test_the_weight_given_stays_as_it_was(shape):
    "A transposed row is contiguous, so that nothing copies it by the way."
    w,h = torch.randn(shape),Hessian(shape[-1], shape[:-2])
    for e in range(shape[0] if len(shape) > 2 else 1): h.add(correlated(200, shape[-1], e)[:, :shape[-1]], e=e if len(shape) > 2 else ...)
    before,moments = w.clone(),h.sum.clone()
    assert torch.equal(gptq(w, h, 'int4').codes, gptq(w, h, 'int4').codes)
    assert torch.equal(w, before) and torch.equal(h.sum, moments)


@pytest.mark.parametrize('i', [1, 7, 64, 200])
def test_factor_is_that_of_the_inverse(i):
    x = correlated(3*i, i, i).double()
    h = x.T @ x
    u = inverse_factor(h.float(), damp=.05).double()
    assert torch.equal(u, u.triu()) and (u.diagonal() > 0).all()
    whole = u.T @ u @ (h + .05*h.diagonal().mean()*torch.eye(i, dtype=torch.float64))
    assert (whole - torch.eye(i)).abs().max() < 1e-3


@pytest.mark.parametrize('f', FORMATS)
def test_beats_rounding_on_unseen_inputs(f):
    for seed in range(5):
        torch.manual_seed(seed)
        w,x = torch.randn(40, 96),correlated(2000, 96, seed)
        seen,unseen = heard(x[:1000]),heard(x[1000:])
        got,nearest = (q.dequantize() for q in (gptq(w, seen, FORMATS[f]), quantize(w, FORMATS[f])))
        assert output_error(w, got, unseen) < .8*output_error(w, nearest, unseen)


def test_independent_inputs_are_rounded():
    "Where inputs have nothing to do with each other there is nothing to answer."
    w,h = torch.randn(9, 64),Hessian(64)
    h.sum,h.tokens = torch.eye(64)*3,torch.tensor(1000)
    assert torch.equal(gptq(w, h, 'int4').dequantize(), quantize(w, 'int4').dequantize())


@pytest.mark.parametrize('f', FORMATS)
def test_a_stack_is_its_matrices(f):
    w,h = torch.randn(3, 10, 70),Hessian(70, (3,))
    for e in range(3): h.add(correlated(200, 70, e), e=e)
    stack = gptq(w, h, FORMATS[f])
    for e in range(3): assert torch.equal(stack[e].dequantize(), gptq(w[e], heard(correlated(200, 70, e)), FORMATS[f]).dequantize())


@pytest.mark.parametrize('x', [torch.zeros(0, 64), torch.zeros(500, 64), torch.randn(31, 64)], ids=['none', 'zeros', 'few'])
def test_too_little_is_rounded_and_said(x):
    w = torch.randn(6, 64)
    with pytest.warns(UserWarning, match='^up: 1 of 1 matrices received fewer than 32 tokens and are rounded to nearest$'):
        q = gptq(w, heard(x), 'int4', name='up')
    assert torch.equal(q.dequantize(), quantize(w, 'int4').dequantize())


def test_inputs_that_never_occur():
    "Their weights keep their levels, and nothing grows."
    x = correlated(400, 64, 0)
    x[:, 20:40] = 0
    w = torch.randn(8, 64)
    got = gptq(w, heard(x), 'int4').dequantize()
    assert got.isfinite().all() and got.abs().max() < 2*w.abs().max()


@pytest.mark.parametrize('value', [0., 1e-30, 1e30])
def test_extreme_sizes_of_inputs(value):
    w,x = torch.randn(8, 64),correlated(400, 64, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert gptq(w, heard(x*value), 'int4').dequantize().isfinite().all()


def test_weights_of_zero_stay():
    for f in FORMATS.values(): assert not gptq(torch.zeros(4, 64), heard(correlated(200, 64, 0)), f).dequantize().any()


def test_bfloat16_weights():
    w,h = torch.randn(8, 64).bfloat16(),heard(correlated(200, 64, 0).bfloat16())
    q = gptq(w, h, 'int4')
    assert q.dequantize().dtype == torch.bfloat16
    assert torch.equal(q.codes, gptq(w.float(), h, 'int4').codes)


@pytest.mark.parametrize('change,said', [
    (lambda w, h: (w[:, 1:], h), r'^weight of shape \(8, 63\): its hessian has \(64, 64\)$'),
    (lambda w, h: (w[None], h), r'^weight of shape \(1, 8, 64\): its hessian has \(64, 64\)$'),
    (lambda w, h: (w/0, h), '^weight: NaN or infinite values in the weight or in its inputs$'),
    (lambda w, h: (w, heard(torch.full((100, 64), torch.nan))), '^weight: NaN or infinite values in the weight or in its inputs$'),
    (lambda w, h: (w*1e7, h), '^int4: numbers beyond 65504 have no float16 scale; use int8$')])
def test_bad_input(change, said):
    w,h = change(torch.randn(8, 64), heard(correlated(200, 64, 0)))
    with pytest.raises(ValueError, match=said): gptq(w, h, Int4(symmetric=True))


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match='^weight: gptq quantises to int4, not to int8$'):
        gptq(torch.randn(8, 64), heard(correlated(200, 64, 0)), 'int8')


# ---- models

MLA = Config('deepseek_v3', vocab_size=64, dim=32, n_layers=2, n_heads=2, inter_dim=64, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             moe_inter_dim=32, score_func='sigmoid', norm_topk=True, rope=Rope(interleaved=True))
GQA = Config('qwen2', vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, inter_dim=72, attn_bias=True)


def made(c):
    torch.manual_seed(0)
    return Model(c, torch.float32, 'cpu').init_weights(.3).requires_grad_(False)


@pytest.mark.parametrize('c', [MLA, GQA], ids=['mla', 'gqa'])
def test_every_matrix_of_the_layers_is_heard(c):
    model = made(c)
    want = {f'layers.{n}': p for n,p in model.layers.named_parameters() if p.ndim > 1 and 'mlp.gate.' not in n}
    found = collect_hessians(model, torch.randint(64, (3, 40)))
    assert found.keys() == want.keys()
    for n,h in found.items():
        *stack,_,i = want[n].shape
        assert h.sum.shape == (*stack, i, i) and h.sum.isfinite().all()
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_hears_what_is_multiplied():
    model,tokens = made(GQA),torch.randint(64, (2, 30))
    seen,m = [],model.layers[1].mlp.down_proj
    handle = m.register_forward_pre_hook(lambda m, args: seen.append(args[0][0]))
    found = collect_hessians(model, tokens)['layers.1.mlp.down_proj.weight']
    handle.remove()
    want = 0
    for x in seen:
        x = F.normalize(x.double(), dim=-1)
        want = want + x.T @ x + .2*len(x)*x[:1].T @ x[:1]
    assert len(seen) == 2 and (found.sum - want).abs().max() < 1e-4*want.abs().max() and found.tokens == 60


def test_experts_hear_their_own_tokens():
    model,tokens = made(MLA),torch.randint(64, (2, 30))
    seen,m = [],model.layers[1].mlp.experts
    handle = m.register_forward_pre_hook(lambda m, args: seen.append(args))
    found = collect_hessians(model, tokens, first=0)
    handle.remove()
    for e in range(4):
        x = torch.cat([x[(chosen == e).any(-1)] for x,_,chosen in seen])
        gate,up = F.linear(x, m.gate_up_proj[e]).chunk(2, -1)
        for name,z in (('gate_up_proj', x), ('down_proj', F.silu(gate)*up)):
            h,z = found[f'layers.1.mlp.experts.{name}'],F.normalize(z.double(), dim=-1)
            assert h.tokens[e] == len(z) and (h.sum[e] - z.T @ z).abs().max() < 1e-4*(1 + len(z))


@pytest.mark.parametrize('c', [MLA, GQA], ids=['mla', 'gqa'])
def test_layers_in_few_bits(c):
    model,tokens = made(c),torch.randint(64, (4, 60))
    kept = {n: p.clone() for n,p in model.named_parameters() if p.ndim == 1 or 'mlp.gate.' in n or 'embed' in n}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert quantize_layers(model, tokens) is model
    assert all(torch.equal(model.get_parameter(n), p) for n,p in kept.items())
    assert not any(isinstance(m, nn.Linear) and isinstance(m.weight, nn.Parameter) for m in model.layers.modules())
    assert sum(isinstance(m, QuantizedWeight) for m in model.modules()) == len(collect_hessians(made(c), tokens))
    assert model(tokens).isfinite().all() and not any(m._forward_pre_hooks for m in model.modules())


def test_an_error_leaves_no_hook():
    model = made(GQA)
    for tokens in (torch.full((1, 4), 99), torch.zeros(4, dtype=torch.long)):
        with pytest.raises((ValueError, IndexError)): collect_hessians(model, tokens)
        assert not any(m._forward_pre_hooks for m in model.modules())

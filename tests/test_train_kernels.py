"""Hand-written gradients of experts, causal attention and RMSNorm against autograd through the definitions in float64

Fresh random inputs; the seed is printed, SEED=n repeats a run.
"""
import os
import random

import pytest
import torch
from torch.library import opcheck

from deepseek_nb.arch.attention import attend, attend_sdpa, causal_mask
from deepseek_nb.arch.model import Model
from deepseek_nb.arch.moe import run_experts
from deepseek_nb.arch.norm import rms_norm
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.kernels import train

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
TOL = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_train_kernels SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


def close(got, want, tol=None):
    assert got.shape == want.shape
    if not want.numel(): return
    scale = max(want.double().abs().max().item(), 1.)  # a score's gradient is a difference of products of this size, which may cancel
    err = (got.double()-want.double()).abs().max().item()/scale
    assert err <= (tol or TOL[got.dtype]), f'{err:.1e} of the largest value, in {got.dtype}'


def gradients(fn, leaves, dy=None):
    "Output and gradients; the cotangent is drawn where none is given"
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = fn(*leaves)
    dy = torch.randn(y.shape, dtype=torch.float64) if dy is None else dy
    return y.detach(), torch.autograd.grad(y, leaves, dy.to(y.dtype)), dy


def against_float64(fn, definition, leaves):
    "The fast function beside autograd through the definition in float64, from the same rounded inputs"
    y, got, dy = gradients(fn, leaves)
    dy = dy.to(y.dtype).double()
    exact_y, want, _ = gradients(definition, [t.double() for t in leaves], dy)
    assert all(g.dtype == t.dtype for g, t in zip(got, leaves, strict=True))
    close(y, exact_y, TOL[y.dtype])
    for g, w in zip(got, want, strict=True): close(g, w, max(TOL[y.dtype], TOL[g.dtype]))


# Experts

def draw_experts(r, n, e, k, dtype, load='even'):
    d, f = r.choice([1, 5, 16, 33]), r.choice([1, 7, 16, 24])
    chosen = torch.rand(n, e).topk(k).indices if load == 'even' else torch.arange(k).expand(n, k) + (e-k)
    gate_up, down = torch.randn(e, 2*f, d)/d**.5, torch.randn(e, d, f)/f**.5
    return torch.randn(n, d).to(dtype), torch.rand(n, k), chosen, gate_up.to(dtype), down.to(dtype)


def through(fn, chosen): return lambda x, w, g, d: fn(x, w, chosen, g, d)


@pytest.mark.parametrize('dtype', list(TOL))
@pytest.mark.parametrize('load', ['even', 'skewed'])
@pytest.mark.parametrize('n,e,k', [(1, 1, 1), (1, 8, 3), (2, 5, 5), (17, 4, 2), (64, 32, 4), (130, 7, 1)])
def test_experts(n, e, k, load, dtype, r):
    x, w, chosen, gate_up, down = draw_experts(r, n, e, k, dtype, load)
    against_float64(through(train.run_trained, chosen), through(run_experts.op.reference, chosen), (x, w, gate_up, down))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_experts_equal_the_reference_in_the_same_dtype(dtype, r):
    x, w, chosen, gate_up, down = draw_experts(r, 40, 6, 2, dtype)
    leaves = (x, w, gate_up, down)
    y, got, dy = gradients(through(train.run_trained, chosen), leaves)
    y2, want, _ = gradients(through(run_experts.op.reference, chosen), leaves, dy)
    for a, b in zip((y, *got), (y2, *want), strict=True): close(a, b, TOL[dtype])


def test_experts_take_views(r):
    "Transposed tokens and stacks, an expanded cotangent, weights in the model's dtype"
    x, w, chosen, gate_up, down = draw_experts(r, 20, 5, 2, torch.float32)
    views = x.T.contiguous().T, w.T.contiguous().T, gate_up.mT.contiguous().mT, down[:, :, None].expand(-1, -1, 2, -1)[:, :, 1]
    chosen = chosen.T.contiguous().T
    a = gradients(through(train.run_trained, chosen), (x, w, gate_up, down), torch.ones(()).expand(20, x.shape[1]))[1]
    b = gradients(through(train.run_trained, chosen), views, torch.ones(()).expand(20, x.shape[1]))[1]
    for g, h in zip(a, b, strict=True): close(g, h)


def test_no_tokens():
    x, w, gate_up, down = torch.empty(0, 4), torch.empty(0, 2), torch.randn(3, 6, 4), torch.randn(3, 4, 3)
    chosen = torch.empty(0, 2, dtype=torch.long)
    y, grads, _ = gradients(through(train.run_trained, chosen), (x, w, gate_up, down))
    assert y.shape == (0, 4) and [g.abs().sum().item() for g in grads] == [0]*4


def test_an_expert_chosen_twice_by_a_token(r):
    x, w, _, gate_up, down = draw_experts(r, 6, 3, 2, torch.float64)
    twice = torch.ones(6, 2, dtype=torch.long)
    against_float64(through(train.run_trained, twice), through(run_experts.op.reference, twice), (x, w, gate_up, down))


@pytest.mark.parametrize('wanted', [(0,), (1,), (2,), (3,), (0, 3), (1, 2)])
def test_some_gradients_alone(wanted, r):
    "Frozen stacks, as under adapters, and every other part alone"
    x, w, chosen, gate_up, down = draw_experts(r, 12, 5, 2, torch.float32)
    want = gradients(through(train.run_trained, chosen), (x, w, gate_up, down), torch.ones(12, x.shape[1]))[1]
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, w, gate_up, down))]
    train.run_trained(leaves[0], leaves[1], chosen, *leaves[2:]).sum().backward()
    for i, t in enumerate(leaves):
        if i in wanted: close(t.grad, want[i])
        else: assert t.grad is None


def test_gradients_add_up(r):
    "Two backward passes into the same leaves"
    x, w, chosen, gate_up, down = draw_experts(r, 12, 5, 2, torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, gate_up, down)]
    for _ in range(2): through(train.run_trained, chosen)(*leaves).sum().backward()
    want = gradients(through(train.run_trained, chosen), leaves, torch.ones(12, x.shape[1]))[1]
    for t, g in zip(leaves, want, strict=True): close(t.grad, 2*g)


def test_nan_stays_with_its_token(r):
    x, w, chosen, gate_up, down = draw_experts(r, 9, 4, 2, torch.float32)
    x[4, 0] = torch.nan
    y, (dx, *_), _ = gradients(through(train.run_trained, chosen), (x, w, gate_up, down))
    bad = torch.arange(9) == 4
    assert torch.equal(y.isnan().any(1), bad) and torch.equal(dx.isnan().any(1), bad)


def test_second_derivative_is_refused(r):
    x, w, chosen, gate_up, down = draw_experts(r, 5, 3, 2, torch.float64)
    x.requires_grad_()
    g, = torch.autograd.grad(train.run_trained(x, w, chosen, gate_up, down).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError): torch.autograd.grad(g.sum(), x)
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    g, = torch.autograd.grad(train.rms_norm_trained(y, torch.ones(4, dtype=torch.float64), 1e-6).square().sum(), y, create_graph=True)
    with pytest.raises(RuntimeError): torch.autograd.grad(g.sum(), y)


# Attention

def plain(q, k, v, scale):
    "Causal attention in the dtype of its inputs"
    k, v = (t.repeat_interleave(q.shape[1]//k.shape[1], 1) for t in (k, v))
    scores = q@k.mT*scale
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)@v


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('s', [1, 2, 63, 64, 65, 150])
def test_causal_attention(s, dtype, r):
    b, g, n, x, v = r.choice([1, 3]), r.choice([1, 2]), r.choice([1, 3]), r.choice([1, 8, 24]), r.choice([1, 8, 16])
    leaves = [torch.randn(b, s, h, w).to(dtype).transpose(1, 2) for h, w in ((g*n, x), (g, x), (g, v))]
    scale = r.choice([.1, .5, 1.])
    # the function of this chapter takes float32 and float64; `attend` gives bfloat16 to PyTorch's fused attention
    fast = train.attend_trained if dtype.itemsize >= 4 else attend
    with use('torch'):
        against_float64(lambda q, k, v: fast(q, k, v, scale, causal=True), lambda q, k, v: plain(q, k, v, scale), leaves)


def test_large_scores_stay_finite():
    leaves = [40*torch.randn(1, 2, 70, 8) for _ in range(3)]
    y, grads, dy = gradients(lambda q, k, v: train.attend_trained(q, k, v, 1., causal=True), leaves)
    assert all(t.isfinite().all() for t in (y, *grads))
    want = gradients(lambda q, k, v: plain(q, k, v, 1.), [t.double() for t in leaves], dy)
    close(y, want[0], 1e-3)


def test_other_attention_is_pytorchs(r):
    "Padding, a past, and no gradient go to the fused function"
    q, k, v = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 4)
    for kw in (dict(causal=True), dict(mask=causal_mask(5, 9, torch.tensor([0, 2]))), {}):
        with use('torch'):
            assert attend.op.choose(q.clone().requires_grad_(), k, v, .3, **kw).fn is attend_sdpa
            against_float64(lambda q, k, v, kw=kw: attend(q, k, v, .3, **kw),
                            lambda q, k, v, kw=kw: attend.op.reference(q, k, v, .3, **kw), (q, k, v))
    with use('torch'):
        prompt = k[:, :, :5], v[:, :, :5], .3
        assert attend.op.choose(q, *prompt, causal=True).fn is attend_sdpa and not attend(q, *prompt, causal=True).requires_grad
        assert attend.op.choose(q.clone().requires_grad_(), *prompt, causal=True).fn is train.attend_trained


# Norm

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(1, 1), (3, 7), (2, 5, 64), (1, 3, 2, 129)])
def test_norm(shape, dtype, r):
    x, w = torch.randn(shape).to(dtype), torch.rand(shape[-1]).to(dtype)
    for y in (x, x.mT.contiguous().mT):
        against_float64(lambda x, w: train.rms_norm_trained(x, w, 1e-3), lambda x, w: rms_norm.op.reference(x, w, 1e-3), (y, w))


# The whole

CONFIGS = dict(
    moe=Config('deepseek_v3', vocab_size=64, dim=32, n_layers=3, n_heads=4, inter_dim=48, q_lora_rank=24, kv_lora_rank=16,
               qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=1, n_routed_experts=8, n_shared_experts=1,
               n_activated_experts=2, moe_inter_dim=16, n_expert_groups=4, n_limited_groups=2, score_func='sigmoid', score_bias=True,
               group_score='sum2', norm_topk=True, route_scale=2.5, max_positions=256, rope=Rope(interleaved=True)),
    gqa=Config('llama', vocab_size=64, dim=32, n_layers=2, n_heads=4, inter_dim=48, n_kv_heads=2, head_dim=8, max_positions=256,
               tie_embeddings=True))


def loss(model, tokens): return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


@pytest.mark.parametrize('name', list(CONFIGS))
def test_gradients_of_a_model(name, r):
    model, tokens = Model(CONFIGS[name], torch.float32, 'cpu').init_weights(.3), torch.randint(64, (3, 70))
    found = {}
    for choice in ('auto', 'torch', 'reference'):
        model.zero_grad()
        with use(choice): loss(model, tokens).backward()
        found[choice] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    names = set(found['reference'])
    assert names == {n for n, _ in model.named_parameters()}
    for choice in ('auto', 'torch'):
        for n in names: close(found[choice][n], found['reference'][n], 1e-3)


@pytest.mark.parametrize('name', list(CONFIGS))
def test_compiles_whole(name, r):
    "Forward and backward without a graph break, as the group sizes stay inside the operators"
    torch._dynamo.reset()
    model, tokens = Model(CONFIGS[name], torch.float32, 'cpu').init_weights(.3), torch.randint(64, (2, 33))
    compiled = torch.compile(model.hidden, fullgraph=True, backend='aot_eager')
    grads = []
    for f in (model.hidden, compiled):
        model.zero_grad()
        with use('torch'): f(tokens).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        if a is not None: close(a, b, 1e-4)


PLAIN = 'test_schema', 'test_faketensor'  # for operators without a gradient of their own


def test_opcheck(r):
    x, w, chosen, gate_up, down = draw_experts(r, 9, 4, 2, torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, gate_up, down)]
    opcheck(train.experts_forward, (x, w, chosen, gate_up, down))
    with torch.no_grad():
        a = train.experts_forward(x, w, chosen, gate_up, down)[1]
        plain = [t.detach() for t in leaves]
        for stacks in (True, False):
            opcheck(train.experts_backward, (torch.randn_like(x), *plain[:2], chosen, *plain[2:], a, stacks), test_utils=PLAIN)
    q, k, v = (torch.randn(2, 2, 70, n, requires_grad=True) for n in (8, 8, 4))
    opcheck(train.causal_forward, (q, k, v, .2))
    o, l = (t.detach() for t in train.causal_forward(q, k, v, .2))
    opcheck(train.causal_backward, (torch.randn_like(o), q.detach(), k.detach(), v.detach(), o, l, .2), test_utils=PLAIN)


def test_import_is_light(python):
    code = "import sys, deepseek_nb.kernels.train; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    assert python(code) == '[]'

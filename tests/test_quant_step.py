"The decode step on codes: against products one at a time, at ragged sizes, the same twice, and out of the way when a module was exchanged."
import random
from dataclasses import replace

import pytest
import torch

from deepseek_nb.arch.model import Model, run_blocks
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer.quant_cache import CacheFormat
from deepseek_nb.kernels import plan as plans
from deepseek_nb.kernels.codes import has_roles
from deepseek_nb.kernels.plan import Refusal, cache_kind, plan_of, step_kernels, step_of
from deepseek_nb.quant import QuantizedWeight, quantize, relative_error, replace_parameter
from deepseek_nb.quant.groups import Int8Fine
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8

pytestmark = pytest.mark.skipif(not step_kernels('QUANTISED').ready(), reason='no C++ compiler')

MLA = Config('deepseek_v3', vocab_size=64, dim=80, n_layers=2, n_heads=3, inter_dim=96, q_lora_rank=40, kv_lora_rank=56,
             qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=32, n_dense_layers=1, n_routed_experts=6, n_shared_experts=1,
             n_activated_experts=6, moe_inter_dim=48, score_func='sigmoid', score_bias=True, norm_topk=True, max_positions=128,
             rope=Rope(interleaved=True))
GQA = Config('qwen2', vocab_size=64, dim=72, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=20, inter_dim=104, attn_bias=True,
             max_positions=128)
CONFIGS = dict(gqa=GQA, mla=MLA, direct=replace(MLA, q_lora_rank=0, n_shared_experts=0))
FORMATS = dict(int8=Int8(), int8g=Int8(group=64), fine=Int8Fine(), int4=Int4(), sym64=Int4(64, symmetric=True))


def shrunk(c, f, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    model = Model(c, torch.float32, 'cpu').init_weights(.1).requires_grad_(False)
    for name,m in [*model.layers.named_modules()]:
        for p,w in [*m.named_parameters(recurse=False)]:
            if p.endswith('bias'): w.normal_()
            if w.ndim > 1 and not name.endswith('mlp.gate'): replace_parameter(m, p, quantize(w, f))
    return model.to(dtype)


@torch.no_grad()
def steps(model, prompt, mask=None, n=3, role=False):
    cache = model.new_cache(len(prompt))
    return torch.stack([model(prompt[:, :1] + i if i else prompt, cache, attention_mask=None if i else mask, prompt=role and not i)[:, -1]
                        for i in range(n)])


def one_at_a_time(model):
    "A hook on each module, which stops the step."
    for m in model.layers.modules(): m.register_forward_hook(lambda *ignored: None)
    return model


@pytest.mark.parametrize('rows,tokens', [(1, 1), (1, 7), (2, 12), (5, 5), (1, 30), (2, 32)])
@pytest.mark.parametrize('f', FORMATS)
@pytest.mark.parametrize('c', CONFIGS)
def test_step_is_products(c, f, rows, tokens):
    model,prompt = shrunk(CONFIGS[c], FORMATS[f]),torch.randint(60, (rows, tokens))
    mask = (torch.arange(tokens) >= torch.arange(rows)[:, None].clamp(max=tokens - 1)).long()

    got = steps(model, prompt, mask)
    assert plan_of(model.layers, torch.zeros(1, 1, model.config.dim)) == Refusal('gradients are enabled')
    assert torch.equal(got, steps(model, prompt, mask))
    want = steps(one_at_a_time(model), prompt, mask)
    error,each = relative_error(want, got),(want - got).norm(dim=-1)/want.norm(dim=-1)
    # latents are rounded before they are expanded; float32's last place moves an activation to its next code, of few seldom, of many often
    assert error < (.05 if c != 'gqa' else .01), error
    if c == 'gqa' and rows*tokens <= 25: assert each.median() < 1e-5 and (each > 1e-5).sum() <= 1, each


@pytest.mark.skipif(not has_roles(), reason='no products in bfloat16')
@pytest.mark.parametrize('rows,tokens', [(1, 1), (1, 7), (2, 12), (3, 20), (1, 100)])
@pytest.mark.parametrize('f', FORMATS)
def test_a_prompt_is_nearer_to_the_weights(f, rows, tokens):
    """Against float64 on the decoded weights: a product in bfloat16 rounds two factors by 2⁻⁹ at most each, codes of activations by
    1/254 of the largest of 32. The logits' errors keep that order, and int8-fine, which has no such product, its bits."""
    seed = random.randrange(10**6)
    torch.manual_seed(seed)
    found = []
    for i in range(6): # without a matrix unit the feed-forward keeps its codes, and one draw may have the other order
        model,prompt = shrunk(replace(GQA, n_layers=1), FORMATS[f], seed=seed + i),torch.randint(60, (rows, tokens))
        exact = Model(model.config, torch.float64, 'cpu')
        named = dict(model.named_parameters()) | {n: w.dequantize() for n,w in model.named_modules() if isinstance(w, QuantizedWeight)}
        exact.load_state_dict({n: named[n].double() for n in exact.state_dict()})
        with use('reference'): want = steps(exact, prompt, n=1)
        found.append([relative_error(want, steps(model, prompt, n=1, role=role).double()) for role in (True, False)])
    told,said = (sum(x) for x in zip(*found, strict=True))
    assert told == said if f == 'fine' else told < min(said, 6*.02), (found, seed)


@pytest.mark.parametrize('c', CONFIGS)
def test_many_times_the_same(c):
    "Threads that write what others still add to would differ now and then."
    model,prompt = shrunk(CONFIGS[c], 'int4'),torch.randint(60, (3, 11))
    for role in (False, True):
        first = steps(model, prompt, role=role)
        for _ in range(20): assert torch.equal(first, steps(model, prompt, role=role))


def test_a_long_prompt_is_computed_in_calls(monkeypatch):
    "More tokens than a call takes, with padding: close to the same prompt in one call"
    model,prompt = shrunk(GQA, Int8()),torch.randint(60, (3, 100))
    mask = (torch.arange(100) >= torch.tensor([0, 30, 77])[:, None]).long()
    for role in (False, True):
        whole = steps(model, prompt, mask, role=role)
        monkeypatch.setattr(plans, 'MANY', 50)
        assert relative_error(whole, steps(model, prompt, mask, role=role)) < 1e-2
        monkeypatch.undo()


@torch.no_grad()
def test_the_role_of_a_call():
    "More than one token per row is a prompt unless the call says otherwise"
    model,ids = shrunk(GQA, Int4()),torch.randint(60, (1, 9))
    both = {role: model(ids, model.new_cache(1), prompt=role) for role in (True, False)}
    assert torch.equal(model(ids, model.new_cache(1)), both[True]) and torch.equal(both[True], both[False]) != has_roles()
    one = {role: model(ids[:, :1], model.new_cache(1), prompt=role) for role in (True, False, None)}
    assert torch.equal(one[None], one[False]) and torch.equal(one[True], one[False]) != has_roles()


@torch.no_grad()
def test_sizes_that_cut_a_panel_are_left_to_products():
    x = torch.zeros(1, 1, 80)
    for change in (dict(moe_inter_dim=40), dict(qk_nope_head_dim=12), dict(v_head_dim=24)):
        model = shrunk(replace(MLA, **change), 'int8')
        assert not plan_of(model.layers, x)
        assert steps(model, torch.randint(60, (1, 4))).isfinite().all()
    assert plan_of(shrunk(MLA, Int8('float')).layers, x).why == 'no step reads the formats of the weights'


@torch.no_grad()
def test_a_float_layer_is_left_to_products():
    model,x = shrunk(GQA, 'int8'),torch.zeros(1, 1, 72)
    assert plan_of(model.layers, x)
    other = torch.nn.Linear(72, 104, bias=False).requires_grad_(False)
    model.layers[1].mlp.up_proj = other
    assert not plan_of(model.layers, x)
    assert relative_error(steps(one_at_a_time(model), p := torch.randint(60, (2, 3))), steps(model, p)) < 1e-5


@torch.no_grad()
def test_bfloat16_and_nan():
    model = shrunk(GQA, 'int8', torch.bfloat16)
    found,x = model.new_cache(1),torch.randn(1, 2, 72)
    found.reserve(2)
    got = run_blocks.op.twins['cpp/cpu'].fn(x.bfloat16(), model.layers, model.context(2, found))
    assert got.dtype == torch.bfloat16 and got.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize('f', ['float32', 'int8'])
@pytest.mark.parametrize('c', ['gqa', 'mla'])
@pytest.mark.parametrize('scales', [32, 'token'])
def test_a_contiguous_cache_of_codes_runs_in_the_step(c, f, scales):
    "Close to the same cache in the readable code, after a prompt, steps and a rewind; other formats are refused with a reason"
    model = shrunk(CONFIGS[c], Int8()) if f == 'int8' else Model(CONFIGS[c], torch.float32, 'cpu').init_weights(.1).requires_grad_(False)
    ids,found = torch.randint(60, (3, 30)),[]
    for kind in ('auto', 'reference' if f == 'float32' else 'auto'):
        other = one_at_a_time(model) if kind != 'reference' and found else model
        cache,got = model.new_cache(3, codec=CacheFormat(scales=scales)),[]
        with use(kind):
            for i,j in ((0, 20), (20, 21), (21, 24)): got.append(other(ids[:, i:j], cache))
            cache.rewind(2)
            got.append(other(ids[:, 22:], cache))
        assert found or cache_kind(torch.zeros(1), cache, plan_of(model.layers, torch.zeros(1))) == 'CODED_PAGES'
        found.append(torch.cat(got, 1))
    assert relative_error(found[1], found[0]) < (.01 if f == 'float32' else .1)


@torch.no_grad()
def test_refusals_have_reasons():
    "Each says why, is false, and the twin that is called nevertheless raises it"
    model = shrunk(GQA, Int8())
    x,reasons = torch.zeros(1, 1, 72),{}
    cache = model.new_cache(1, codec=CacheFormat('fp8'))
    reasons['format'] = step_of(x, model.layers, model.context(1, cache))
    reasons['dtype'] = step_of(x.double(), model.layers, model.context(1, model.new_cache(1)))
    reasons['cache'] = step_of(x, model.layers, model.context(1))
    hook = model.layers[1].mlp.register_forward_hook(lambda *ignored: None)
    reasons['hook'] = step_of(x, model.layers, model.context(1, model.new_cache(1)))
    hook.remove()
    assert not any(reasons.values()) and len({r.why for r in reasons.values()}) == 4, reasons
    assert step_of(x, model.layers, model.context(1, model.new_cache(1)))
    with pytest.raises(ValueError, match='this twin runs no such call: no step reads a cache in fp8'):
        run_blocks.op.twins['cpp/cpu'].fn(x, model.layers, model.context(1, cache))

"Dynamic compute against loops, brute force, every twin, and formats that hold their weights otherwise"
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb import Model, QuantizedModel
from deepseek_nb.arch.moe import expert, run_experts
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.train.dynamic import (
    RULES,
    RandomK,
    Skip,
    keep_best,
    keep_over_null,
    keep_relative,
    keep_share,
    layer_errors,
    mean_experts,
    mixtures,
    share_out,
    spent,
)
from deepseek_nb.train.loss import language_loss

V3 = Config('deepseek_v3', vocab_size=64, dim=32, n_layers=4, n_heads=4, inter_dim=48, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, rope=Rope(interleaved=True), n_dense_layers=1, n_routed_experts=16, n_shared_experts=1,
            n_activated_experts=4, n_expert_groups=4, n_limited_groups=2, moe_inter_dim=32, score_func='sigmoid', score_bias=True,
            group_score='sum2', norm_topk=True, route_scale=2.5, max_positions=64)
V2 = replace(V3, model_type='deepseek_v2', score_func='softmax', score_bias=False, group_score='max', norm_topk=False, route_scale=1.)
HOW = ('layers', *RULES)


def tiny(c=V3, std=.3, **kwargs):
    torch.manual_seed(0)
    m = Model(c, **dict(dtype='float32', device='cpu') | kwargs).init_weights(std).eval().requires_grad_(False)
    for b in m.buffers(): b.copy_(torch.randn_like(b)*.05)
    return m


def draw(*shape, seed=1): return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


rows = st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=1, max_size=5).map(torch.tensor)


# Rules

@settings(max_examples=200, deadline=None)
@given(rows, st.integers(1, 4))
def test_keep_best(w, k):
    for row, kept in zip(w.tolist(), keep_best(w, k).tolist(), strict=True):
        assert sum(kept) == k
        out = [x for x, keep in zip(row, kept, strict=True) if not keep]
        assert not out or max(out) <= min(x for x, keep in zip(row, kept, strict=True) if keep)


@settings(max_examples=200, deadline=None)
@given(rows, st.floats(0, 1))
def test_keep_share(w, p):
    for row, kept in zip(w.double(), keep_share(w.double(), p), strict=True):
        n = int(kept.sum())
        best = row.sort(descending=True).values
        assert n >= 1 and torch.equal(row[kept].sort(descending=True).values, best[:n])
        if n > 1: assert best[:n-1].sum() < p*row.sum() + 1e-9
        assert n == 4 or best[:n].sum() >= p*row.sum() - 1e-9


@settings(max_examples=200, deadline=None)
@given(rows, st.floats(0, 1))
def test_keep_relative(w, tau):
    for row, kept in zip(w.double().tolist(), keep_relative(w.double(), tau).tolist(), strict=True):
        assert kept == [x >= tau*max(row) for x in row] and any(kept)


def test_keep_over_null():
    m = tiny()
    gate = mixtures(m)[0].gate
    r = gate(torch.randn(20, 32))
    for null in (0., .4, .6, 2.):
        kept = keep_over_null(gate, r, null)
        for i in range(20):
            choice = [(r.scores[i, e] + gate.e_score_correction_bias[e]).item() for e in r.experts[i].tolist()]
            assert kept[i].tolist() == [c >= null or c == max(choice) for c in choice]


# Skipping

@pytest.mark.parametrize('c', [V3, V2])
@pytest.mark.parametrize('seed', range(3))
def test_skipping_is_the_loop_over_what_is_kept(c, seed):
    m = tiny(c)
    moe, x = mixtures(m)[0], torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(seed))
    mask = torch.rand(14, 4, generator=torch.Generator().manual_seed(seed)) < .5
    skip = Skip(moe, lambda gate, r: mask)
    got = moe(x)
    skip.remove()
    flat, r = x.flatten(0, 1), moe.gate(x.flatten(0, 1))
    want = moe.shared_experts(flat)
    for t in range(14):
        left = [j for j in range(4) if mask[t, j]]
        scale = (r.weights[t].sum()/r.weights[t][left].sum() if c.norm_topk else 1.) if left else 0.
        for j in left:
            e = r.experts[t, j]
            want[t] += r.weights[t, j]*scale*expert(flat[t:t+1], moe.experts.gate_up_proj[e], moe.experts.down_proj[e])[0]
    torch.testing.assert_close(got.flatten(0, 1), want, rtol=1e-4, atol=1e-5)
    assert not (moe.gate._forward_hooks or moe.experts._forward_hooks or moe.experts._forward_pre_hooks)


def test_skipped_experts_are_not_computed():
    m = tiny()
    moe, seen = mixtures(m)[0], []
    with torch.no_grad(): moe.experts.gate_up_proj[5] = torch.nan
    skip = Skip(moe, lambda gate, r: r.experts != 5)
    moe.experts.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    x = torch.randn(4, 8, 32)
    assert moe(x).isfinite().all()
    with use('torch'): assert moe(x).isfinite().all()
    skip.remove()
    assert not (seen[-1] == 5).any() and len(seen[-1]) < 4*8*4


@pytest.mark.parametrize('n', [1, 3, 40, 700])
def test_a_weight_of_zero_is_not_visited(n):
    g = torch.Generator().manual_seed(n)
    def rand(*shape): return torch.randn(shape, generator=g)
    x, w, gate_up, down = rand(n, 40), rand(n, 3), rand(6, 48, 40), rand(6, 40, 24)
    chosen = torch.rand(n, 6, generator=g).topk(3).indices
    w[torch.rand(n, 3, generator=g) < .5] = 0
    w[0] = 0
    want = run_experts.op.reference(*(t.double() if t.is_floating_point() else t for t in (x, w, chosen, gate_up, down)))
    with use('cpp'), torch.no_grad(): got = run_experts(x, w, chosen, gate_up, down)
    assert not got[0].any()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('choice', ['auto', 'cpp', 'torch'])
@pytest.mark.filterwarnings('ignore:.*twin')
def test_every_twin_obeys(how, choice):
    m, tokens = tiny(), draw(2, 9)
    plain = m(tokens)
    m.set_compute(.9, draw(4, 32), how)
    with torch.no_grad():
        with use('reference'): want = m(tokens)
        with use(choice):
            got = m(tokens)
            cache = m.new_cache(2)
            steps = torch.cat([m(tokens[:, i:i+1], cache) for i in range(9)], 1)
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(steps, want, rtol=1e-3, atol=1e-4)
    assert torch.equal(m.set_compute()(tokens), plain) and m.compute is None


@pytest.mark.parametrize('dtype', ['int8', 'int4'])
def test_quantised_models_obey(tmp_path, dtype):
    c = replace(V3, dim=64, moe_inter_dim=64, inter_dim=64, q_lora_rank=64, kv_lora_rank=64)
    m = QuantizedModel.from_pretrained(tiny(c, std=.1).save_pretrained(tmp_path/'m'), dtype, device='cpu')
    tokens = draw(2, 9)
    with torch.no_grad():
        plain, full = m(tokens), spent(m, tokens).share
        m.set_compute(.9, tokens, 'layers')
        few, n, cache, rows = m(tokens), spent(m, tokens), m.new_cache(2), []
        for moe in mixtures(m): moe.experts.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        for i in range(9): m(tokens[:, i:i+1], cache)
    assert full == pytest.approx(1) and n.share <= .9 and int(n.experts.max()) == sum(m.compute[1])
    assert (few - plain).abs().max() > 1e-3
    assert rows == [2*k for k in m.compute[1]]*9


def test_compiled_models_are_refused():
    m = tiny()
    m.compile('aot_eager')
    if not getattr(m, '_compiled_call_impl', None): pytest.skip('nothing compiles here')
    with pytest.raises(ValueError, match='a budget has no effect on a compiled model'): m.set_compute(.9)


# Budgets

@pytest.mark.parametrize('c', [V3, V2])
@pytest.mark.parametrize('how', HOW)
@pytest.mark.parametrize('budget', [.85, .95])
def test_budget_is_met(c, how, budget):
    m, tokens = tiny(c, std=.15), draw(8, 48)
    n = spent(m.set_compute(budget, tokens, how), tokens)
    one = 3*32*32/c.active_params()
    assert budget - one - .03 < n.share < budget + .03
    if how == 'layers': assert n.share <= budget + 1e-6
    assert n.experts.min() >= 3
    again = spent(m.set_compute(budget, tokens, how), tokens)
    assert torch.equal(n.experts, again.experts)


@pytest.mark.parametrize('shift', [-2., 0., 3.])
def test_budget_is_met_where_biases_are_large(shift):
    "A bias on the choice carries affinities beyond 0 and 1"
    m, tokens = tiny(std=.15), draw(8, 48)
    for moe in mixtures(m): moe.gate.e_score_correction_bias += shift
    for how in RULES:
        share = spent(m.set_compute(.8, tokens, how), tokens).share
        assert share == pytest.approx(.8, abs=.03), how


def test_flops_are_those_of_a_smaller_config():
    for k in (1, 2, 3, 4):
        m = tiny()
        skips = [Skip(moe, lambda gate, r, k=k: keep_best(r.weights, k)) for moe in mixtures(m)]
        n = spent(m, draw(1, 5))
        for s in skips: s.remove()
        assert n.flops.tolist() == [[2*replace(V3, n_activated_experts=k).active_params()]*5]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=4), st.data())
def test_share_out_is_the_best_allotment(errors, data):
    total = data.draw(st.integers(len(errors), 3*len(errors)))
    got = share_out(torch.tensor(errors, dtype=torch.float64), total)
    cost = lambda ks: sum(row[k-1] for row, k in zip(errors, ks, strict=True))
    best = min(cost(ks) for ks in itertools.product((1, 2, 3), repeat=len(errors)) if sum(ks) <= total)
    assert sum(got) <= total and cost(got) == pytest.approx(best)


def test_layer_errors_by_hand():
    "Without a bias, the best by weight are those that a smaller config chooses"
    m, tokens = tiny(replace(V3, score_bias=False)), draw(2, 9)
    errors = layer_errors(m, tokens)
    assert errors.shape == (3, 4) and (errors[:, -1] == 0).all()
    x, ctx = m.embed_tokens(tokens), m.context(9)
    small = tiny(replace(V3, score_bias=False, n_activated_experts=2))
    for i, (block, other) in enumerate(zip(m.layers, small.layers, strict=True)):
        out = block(x, ctx)
        if i:
            change = (other(x, ctx) - out).square().sum()/out.square().sum()
            assert errors[i-1, 1].item() == pytest.approx(change.item(), rel=1e-3)
        x = out


def test_random_k_draws_and_leaves_nothing_behind():
    m, tokens, seen = tiny().requires_grad_(True), draw(2, 9), set()
    batch = dict(tokens=tokens, labels=tokens.roll(-1, 1))
    loss = RandomK(language_loss)
    for i in range(12):
        torch.manual_seed(i)
        total, n = loss(m, batch)
        seen.add(round(total.item(), 3))
    assert n == 18 and len(seen) > 4
    total.backward()
    assert m.layers[1].mlp.gate.weight.grad.abs().sum() > 0
    with torch.no_grad(): assert torch.equal(loss(m, batch)[0], language_loss(m, batch)[0])
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in m.modules())


def test_tokens_are_shown_escaped():
    m = tiny()
    n = spent(m.set_compute(.9, how='top_p'), draw(2, 6))
    page = n.show(lambda ids: f'<b>{ids[0]}&\n').data
    assert page.count('<span') == 6 and '<b>' not in page and '&lt;b&gt;' in page


@pytest.mark.parametrize('call,match', [
    (lambda m: m.set_compute(.1), 'budget 0.1 is not possible: with 1 to 4 experts, the share is'),
    (lambda m: m.set_compute(1.2), 'budget 1.2 is not possible'),
    (lambda m: m.set_compute(float('nan')), 'budget nan is not possible'),
    (lambda m: m.set_compute(.9, how='topp'), "how 'topp' is not known here; known are layers, top_p, relative, null"),
    (lambda m: m.set_compute(.9, torch.tensor([[64]])), 'token id 64 is outside the vocabulary of 64'),
    (lambda m: tiny(replace(V3, n_routed_experts=0)).set_compute(.9), 'has no routed experts')])
def test_bad_calls(call, match):
    m = tiny()
    with pytest.raises(ValueError, match=match) as e: call(m)
    assert '\n' not in str(e.value)
    assert mean_experts(V3, 1.) == 4

"Adapters: gradients of the hand-written halves against the readable ones, ragged shapes, rows, merging, what is refused"
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_nb import Config, Model
from deepseek_nb.arch.model import add_attention, add_feed_forward
from deepseek_nb.core.config import Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.kernels import gradients as G
from deepseek_nb.train import peft
from deepseek_nb.train.lora import LoraConfig, candidates, lora_weights
from deepseek_nb.train.loss import language_loss
from deepseek_nb.train.peft import choose_experts, expert_affinity, frozen_half, merge_experts, tune_experts

SHARED = dict(vocab_size=90, dim=48, n_layers=2, inter_dim=72, max_positions=64)
GQA = dict(SHARED, n_heads=6, n_kv_heads=2, head_dim=8)
MOE = dict(SHARED, n_heads=2, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, rope=Rope(interleaved=True),
           n_dense_layers=1, n_routed_experts=4, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=24)
FAMILIES = dict(llama=Config('llama', **GQA, tie_embeddings=True), qwen2=Config('qwen2', **GQA, attn_bias=True),
                v2=Config('deepseek_v2', **MOE),
                v3=Config('deepseek_v3', **MOE, q_lora_rank=24, score_func='sigmoid', score_bias=True, norm_topk=True, route_scale=2.5))
STACKS = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']


def made(name, seed=0):
    torch.manual_seed(seed)
    m = Model(FAMILIES[name], 'float32', 'cpu').init_weights(.15)
    for k, p in m.named_parameters():
        if k.endswith('bias'): nn.init.normal_(p, std=.1)
    return m.eval()


def shake(m, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for w in lora_weights(m).values():
            for a in w.adapters.values():
                a.b.normal_(std=.1)
                if a.magnitude is not None: a.magnitude.mul_(1 + .2*torch.randn_like(a.magnitude))
    return m


def batch(b, s, documents=False):
    t = torch.randint(90, (b, s+1))
    d = dict(tokens=t[:, :-1].contiguous(), labels=t[:, 1:].contiguous())
    return d | (dict(documents=(torch.rand(b, s) < .15).cumsum(1)) if documents else {})


def learn(m, some, choice):
    with use(choice):
        total, n = language_loss(m, some)
        params = [p for p in m.parameters() if p.requires_grad]
        return total.item()/n, torch.autograd.grad(total/n, params)


def same(got, want, eps=2e-4):
    (a, g), (b, w) = got, want
    assert abs(a-b) < 1e-5*abs(b)
    most = max(y.abs().max() for y in w)  # a gradient that is zero by cancellation is so only within rounding of the others
    for x, y in zip(g, w, strict=True): assert (x-y).abs().max() <= eps*max(y.abs().max(), 1e-2*most), ((x-y).abs().max(), y.abs().max())


@pytest.mark.parametrize('choice', ['torch', 'auto'])
@pytest.mark.parametrize('targets', [['q_proj', 'v_proj'], ['k_proj', 'down_proj'], 'all-linear', ['o_proj']])
@pytest.mark.parametrize('name', ['llama', 'qwen2'])
def test_frozen_halves(name, targets, choice):
    m = shake(LoraConfig(3, 7, targets).apply(made(name)))
    for b, s, documents in ((1, 1, False), (2, 17, False), (3, 60, True), (1, 33, True)):
        some = batch(b, s, documents)
        same(learn(m, some, choice), learn(m, some, 'reference'))


def test_frozen_in_pieces(monkeypatch):
    monkeypatch.setattr(peft, 'PIECE_TOKENS', 7)
    m = shake(LoraConfig(3, 7, 'all-linear').apply(made('llama')))
    some = batch(2, 20)
    same(learn(m, some, 'auto'), learn(m, some, 'reference'))


def test_frozen_steps_aside():
    m = made('llama')
    x, b = torch.randn(1, 5, 48, requires_grad=True), m.layers[0]
    half = lambda: frozen_half(x, b.mlp, b.post_attention_layernorm, peft.FEED)
    assert half() is None
    LoraConfig(2, 4, ['up_proj']).apply(m)
    assert half() is not None
    with torch.no_grad(): assert half() is None
    with torch.autocast('cpu', torch.bfloat16): assert half() is None
    with m.adapters(['default']): assert half() is None
    hook = b.mlp.up_proj.register_forward_hook(lambda *a: None)
    assert half() is None
    hook.remove()
    assert half() is not None
    b.mlp.down_proj.weight.requires_grad_()
    assert half() is None
    for kwargs in (dict(use_dora=True), dict(lora_dropout=.5)):
        m = LoraConfig(2, 4, ['up_proj'], **kwargs).apply(made('llama').train())
        b = m.layers[0]
        assert half() is None


def test_first_layers_without_adapters_keep_nothing():
    m = LoraConfig(2, 4, ['q_proj'], layers_to_transform=[1]).apply(made('llama'))
    x = m.embed_tokens(batch(1, 9)['tokens'])
    ctx = m.context(9)
    y = add_feed_forward(add_attention(x, m.layers[0], ctx), m.layers[0])
    assert not y.requires_grad and m.layers[1](y, ctx).requires_grad


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_attention_kernels(data):
    draw = lambda a, b: data.draw(st.integers(a, b))
    b, s, g, n, x, mask = draw(1, 3), draw(1, 150), draw(1, 3), draw(1, 3), 2*draw(1, 20), draw(0, 2)
    torch.manual_seed(s)
    q, k, v, do = (torch.randn(b*s, h*x) for h in (g*n, g, g, g*n))
    seen = None
    if mask:
        d = (torch.rand(b if mask == 2 else 1, s) < .1).cumsum(1)
        seen = (d[:, None, :, None] == d[:, None, None]) & torch.ones(s, s).tril().bool()
    args = q, k, v, b, x, x**-.5, seen
    with use('reference'): want = [G.attend_tokens(*(t.double() for t in args[:3]), *args[3:]), *G.attend_tokens_back(do, *args)]
    got = [G.attend_tokens(*args), *G.attend_tokens_back(do, *args)]
    for a, w in zip(got, want, strict=True): assert (a-w).abs().max() < 1e-4*max(1, w.abs().max())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70))
def test_elementwise_kernels(n, d):
    torch.manual_seed(n*100+d)
    gate, up, dh, rest = torch.randn(4, n, d)*3
    w = torch.rand(d)
    with use('reference'):
        want = [G.swiglu(gate.double(), up.double()), *G.swiglu_back(dh.double(), gate.double(), up.double()),
                G.norm_back(dh.double(), gate.double(), w.double(), 1e-5, rest.double())]
    got = [G.swiglu(gate, up), *G.swiglu_back(dh.clone(), gate, up), G.norm_back(dh, gate, w, 1e-5, rest)]
    for a, b in zip(got, want, strict=True): assert (a-b).abs().max() < 1e-4*max(1, b.abs().max())


def test_extremes():
    for v in (0., 90., -90., 1e30, -1e30):
        gate = torch.full((2, 33), v)
        one = torch.ones(2, 33)
        h, (dg, du) = G.swiglu(gate, one), G.swiglu_back(one.clone(), gate, one)
        assert torch.allclose(h, F.silu(gate)) and torch.allclose(du, F.silu(gate)) and dg.isfinite().all()
    assert G.swiglu(torch.tensor([[torch.nan]*3]), torch.ones(1, 3)).isnan().all()


def test_pool_gives_no_memory_twice():
    pool, alive = G.Pool(), {}
    r = random.Random(0)
    for i in range(300):
        t = pool.take(torch.empty(0), r.choice([3, 3, 7]), 5).fill_(i)
        alive[i] = t if r.random() < .5 else t[:2].T
        for k in [k for k in alive if r.random() < .2]: del alive[k]
        for k, v in alive.items(): assert (v == k).all()


CONFIGS = dict(plain=dict(target_modules='all-linear'), rslora=dict(target_modules='all-linear', use_rslora=True),
               dora=dict(target_modules='all-linear', use_dora=True), experts=dict(target_parameters=STACKS),
               both=dict(target_modules='all-linear', target_parameters=[*STACKS, 'mlp.gate.weight']))


@pytest.mark.parametrize('kind', CONFIGS)
@pytest.mark.parametrize('name', FAMILIES)
def test_merge(name, kind):
    if kind in ('experts', 'both') and name in ('llama', 'qwen2'): pytest.skip('has no experts')
    m, some = made(name), batch(2, 13)
    with torch.no_grad(): before = m(some['tokens'])
    shake(LoraConfig(3, 7, **CONFIGS[kind]).apply(m))
    with torch.no_grad():
        got = m(some['tokens'])
        assert (got-before).abs().max() > 1e-2
        scale = got.abs().max()
        assert (m.merge_adapter()(some['tokens'])-got).abs().max() < 1e-5*scale
        assert (m.unmerge_adapter()(some['tokens'])-got).abs().max() < 1e-5*scale
        cache = m.new_cache(2, 13)
        steps = torch.cat([m(some['tokens'][:, :9], cache), *(m(some['tokens'][:, i:i+1], cache) for i in range(9, 13))], 1)
        assert (steps-got).abs().max() < 1e-4*scale
        assert (m.merge_and_unload()(some['tokens'])-got).abs().max() < 1e-5*scale
    assert not lora_weights(m) and not any('adapters' in k for k in m.state_dict())


@pytest.mark.parametrize('kind', CONFIGS)
def test_learns_and_leaves_the_rest(kind):
    m, some = made('v3').train(), batch(2, 16)
    frozen_ = {k: p.clone() for k, p in m.named_parameters()}
    LoraConfig(4, 8, **CONFIGS[kind]).apply(m)
    optimiser = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], .02)
    losses = []
    for _ in range(12):
        total, n = language_loss(m, some)
        (total/n).backward(); optimiser.step(); optimiser.zero_grad()
        losses.append(total.item()/n)
    assert losses[-1] < .8*losses[0]
    m.unload()
    for k, p in m.named_parameters(): assert torch.equal(p, frozen_[k]), k


@pytest.mark.parametrize('name', FAMILIES)
def test_an_adapter_for_each_row(name):
    m, tokens = made(name), torch.randint(90, (5, 11))
    targets = dict(target_modules=[t for t in ('q_proj', 'q_b_proj', 'o_proj', 'up_proj') if any(k.endswith(t) for k in candidates(m))])
    if name in ('v2', 'v3'): targets['target_parameters'] = STACKS
    for i, n in enumerate('ab'): shake(LoraConfig(2+i, 5, **targets).apply(m, n), i)
    LoraConfig(2, 9, ['o_proj'], use_dora=True).apply(m, 'c')
    rows = ['b', None, 'a', 'c', 'b']
    with torch.no_grad():
        with m.adapters(rows): mixed = m(tokens)
        for i, r in enumerate(rows):
            alone = m.set_adapter(*([r] if r else []))(tokens[i:i+1])
            assert (mixed[i]-alone[0]).abs().max() < 1e-5*alone.abs().max()
        with pytest.raises(ValueError, match='chosen for 5 rows, but the batch has 4'), m.adapters(rows): m(tokens[:4])
        with m.adapters(rows): text = m.generate(tokens, max_new_tokens=3)
        for i, r in enumerate(rows):
            with m.adapters(r): assert torch.equal(m.generate(tokens[i:i+1], max_new_tokens=3)[0], text[i])


def test_rows_of_an_absorbed_weight_are_refused():
    m = LoraConfig(2, 4, ['kv_b_proj']).apply(made('v3'))
    with torch.no_grad(), m.adapters(['default', None]):
        m(torch.randint(90, (2, 5)), mla='naive')
        with pytest.raises(ValueError, match="call the model with mla='naive'"): m(torch.randint(90, (2, 5)), mla='absorbed')


def test_refused():
    m = made('llama')
    for t, near in (('q_porj', 'q_proj'), ('mlp.gate_up', 'mlp.gate_proj'), ('down', 'down_proj'), ('lm_head', '')):
        with pytest.raises(ValueError) as e: LoraConfig(target_modules=[t]).apply(m)
        said = str(e.value)
        assert said.startswith(f'{t!r} matches no weight of this llama; similar names are ') and near in said and '\n' not in said
    with pytest.raises(ValueError, match='q_proj'): LoraConfig(target_modules=['q_porj']).apply(m)
    with pytest.raises(ValueError, match='matches no weight'): LoraConfig(target_modules=['q_proj', 'nothing']).apply(m)
    with pytest.raises(ValueError, match='matches no weight'): LoraConfig(target_parameters=STACKS).apply(m)
    assert not lora_weights(m) and all(p.requires_grad for p in m.parameters())
    for name in ('', 'a.b'):
        with pytest.raises(ValueError, match="can't be the name of an adapter"): LoraConfig(target_modules=['q_proj']).apply(m, name)
    LoraConfig(target_modules=['q_proj']).apply(m)
    m.merge_adapter()
    for f in (m.set_adapter, lambda: m.delete_adapter('default')):
        with pytest.raises(ValueError, match='unmerge_adapter'): f()
    with pytest.raises(ValueError, match='unmerge_adapter'), m.adapters('default'): pass


def test_dropout():
    m, some = made('llama'), batch(1, 8)
    shake(LoraConfig(4, 8, ['q_proj'], lora_dropout=.5).apply(m))
    assert torch.equal(m(some['tokens']), m(some['tokens']))
    m.train()
    assert not torch.equal(m(some['tokens']), m(some['tokens']))


def test_half_precision_base():
    "Adapters stay in float32 beside a base in bfloat16"
    m = Model(FAMILIES['llama'], torch.bfloat16, 'cpu').init_weights(.1)
    LoraConfig(2, 4, 'all-linear').apply(m)
    assert {p.dtype for p in m.parameters() if p.requires_grad} == {torch.float32}
    total, n = language_loss(m, batch(1, 7))
    total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters() if p.requires_grad)


# ---- chosen experts

def test_affinity_by_hand():
    m = made('v3')
    some = [batch(2, 9), batch(1, 9)]
    for score in ('gate', 'token'):
        got = expert_affinity(m, some, score)
        for k, s in got.items():
            gate, want = m.get_submodule(k.removesuffix('experts')+'gate'), torch.zeros(4, dtype=torch.float64)
            inputs = []
            hook = gate.register_forward_pre_hook(lambda mod, a, inputs=inputs: inputs.append(a[0]))
            with torch.no_grad():
                for x in some: m.hidden(x['tokens'])
                hook.remove()
                for x in inputs:
                    r = gate(x)
                    for w, e in zip(r.weights.tolist(), r.experts.tolist(), strict=True):
                        for a, i in zip(w, e, strict=True): want[i] += a/sum(w) if score == 'gate' else 1/len(w)
            assert torch.allclose(s, want/want.sum(), atol=1e-6)
    with pytest.raises(ValueError, match='no routed experts'): expert_affinity(made('llama'), some)
    with pytest.raises(ValueError, match="'gate' or 'token'"): expert_affinity(m, some, 'other')
    with pytest.raises(ValueError, match='there are no batches'): expert_affinity(m, [])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda x: sum(x) > .1), st.floats(.01, 1))
def test_chosen_are_the_fewest(x, p):
    s = torch.tensor(x, dtype=torch.float64)
    s = s/s.sum()
    ids = choose_experts(dict(a=s), p)['a']
    assert s[ids].sum() >= p - 1e-9
    assert len(ids) == 1 or s[ids[:-1]].sum() < p
    assert len(set(ids)) == len(ids) and all(s[i] >= s[j] - 1e-12 for i in ids for j in range(len(s)) if j not in ids)


def test_tuned_experts_equal_masked_gradients():
    m, some = made('v3').train(), batch(2, 12)
    chosen = {'layers.1.mlp.experts': [2, 0]}
    stacks = [m.layers[1].mlp.experts.gate_up_proj, m.layers[1].mlp.experts.down_proj]
    want = torch.autograd.grad(language_loss(m, some)[0], stacks)
    tune_experts(m, chosen)
    own = [p for p in m.parameters() if p.requires_grad]
    assert [tuple(p.shape) for p in own] == [(2, *w.shape[1:]) for w in want]
    got = torch.autograd.grad(language_loss(m, some)[0], own)
    for g, w in zip(got, want, strict=True): assert (g-w[[2, 0]]).abs().max() < 1e-4*w.abs().max()
    merge_experts(m)
    assert isinstance(m.layers[1].mlp.experts.gate_up_proj, nn.Parameter)

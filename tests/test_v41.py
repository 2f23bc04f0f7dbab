"""V4.1's parts in random small settings. No other implementation runs here, so what must hold by the paper is tested.

The settings are drawn anew in each run; the seed is printed, and V41_SEED=n repeats a run."""
import os
import random

import pytest
import torch
from einops import repeat
from torch import nn

from deepseek_nb.arch.hyper import collapse
from deepseek_nb.arch.v41 import (
    V41_FLASH,
    Borrowed,
    V41Layer,
    V41Layout,
    cache_bytes_v41,
    candidate_blocks,
    first_pre,
    layer_plans,
    prefill_halves,
)
from deepseek_nb.core.config import Config, Rope

SEED = int(os.environ.get('V41_SEED') or random.SystemRandom().randrange(2**32))


@pytest.fixture(scope='module', autouse=True)
def seed(): print(f'V41_SEED={SEED}')


def draw(r):
    "Random layers: one or two groups in the encoder, one in the decoder, in which each source may be followed by layers that borrow"
    ratios,kv,index = [0]*r.randint(0, 2),[],[]
    for ratio in [*r.choices([1, 2, 3], k=r.randint(1, 2)), 1]:
        half = len(ratios)
        kv.append(half)
        for i in range(r.randint(1, 4)):
            if i == 0 or r.random() < .4: index.append(half + i)
            ratios.append(ratio)
    layout = V41Layout(tuple(ratios), tuple(kv), tuple(index), half, r.randint(1, 4), r.randint(1, 4))
    rope = Rope(theta=100., interleaved=True)
    c = Config('deepseek_v4', vocab_size=9, dim=12, n_layers=len(ratios), n_heads=2, inter_dim=16, n_kv_heads=1, head_dim=6,
               qk_rope_head_dim=2, q_lora_rank=8, window=r.randint(1, 4), o_groups=r.choice([1, 2]), o_lora_rank=4,
               index_n_heads=r.randint(1, 3), index_head_dim=4, index_topk=r.randint(1, 5), hc_mult=r.randint(1, 3), rope=rope,
               compress_rope=rope, compress_ratios=tuple(ratios))
    torch.manual_seed(r.randrange(2**31))
    layers = nn.ModuleList([V41Layer(c, p, layout) for p in layer_plans(layout)]).requires_grad_(False)
    for name,p in layers.named_parameters():
        if 'site' not in name and not name.endswith('norm.weight'): nn.init.normal_(p, std=.4)
        elif name.endswith('fn'): nn.init.normal_(p, std=.1)
    return c,layout,half,layers


def streams(c, t): return repeat(torch.randn(2, t, c.dim), 'b t d -> b t x d', x=c.hc_mult)


def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4*b.abs().max().item())


def test_flash():
    "The counts of the report: 40 layers, four that compress, 890 bytes a token."
    plans = layer_plans(V41_FLASH)
    assert len(plans) == 40 and [p.mode for p in plans[:4]] == ['window', 'window', 'full', 'reuse']
    assert [p.selection for p in plans if p.layer >= 20] == [20]*4 + [24]*4 + [28]*4 + [32]*4 + [36]*4
    assert {p.entries for p in plans if p.layer >= 20} == {20} and cache_bytes_v41(V41_FLASH) == 890


@pytest.mark.draw(2)
@pytest.mark.parametrize('i', range(6))
def test_candidates_are_those_of_a_sort(i):
    "Few different scores, so that ties are common: of equal blocks, the lowest is selected."
    r = random.Random(SEED + i)
    torch.manual_seed(SEED % 2**31 + i)
    n,s,size,blocks = r.randint(1, 20),5,r.randint(1, 5),r.randint(1, 4)
    scores = torch.randint(0, 3, (2, s, n)).float()
    seen = torch.randint(0, n + 1, (s,)).sort().values
    may = (torch.arange(n) < seen[:, None])[None]
    kept = candidate_blocks(scores, may, blocks, size)
    for b in range(2):
        for q,m in enumerate(seen.tolist()):
            groups = [range(i, min(i + size, m)) for i in range(0, m, size)]
            ranked = sorted(groups, key=lambda g: (g is not groups[-1], -scores[b, q, list(g)].max().item(), g[0]))  # noqa: B023
            assert set(kept[b, q].nonzero().flatten().tolist()) == {i for g in ranked[:blocks] for i in g}


@pytest.mark.draw(2)
@pytest.mark.parametrize('i', range(6))
def test_a_prefix_gives_the_same_outputs(i):
    "Nothing looks ahead: windows, entries, candidates and selections of a token don't depend on later ones."
    r = random.Random(SEED + i)
    c,_,half,layers = draw(r)
    x = streams(c, 19)
    t = r.randint(1, 18)
    whole,pre,_ = prefill_halves(layers, x, half, 19)
    part,pre_part,_ = prefill_halves(layers, x[:, :t], half, t)
    close(part, whole[:, :t])
    close(pre_part, pre[:, :t])


@pytest.mark.parametrize('i', range(4))
def test_a_borrowed_selection_is_within_the_candidates(i):
    r = random.Random(SEED + i)
    c,layout,half,layers = draw(r)
    x,pre,shared,positions = streams(c, 17),None,Borrowed(),torch.arange(17)
    pre = first_pre(x)
    for layer in layers:
        before = shared
        shared = layer.attn.publish(layer.attn_norm(collapse(x, pre)), shared)
        x,pre,shared = layer(x, pre, positions, shared)
        p = layer.attn.plan
        if p.mode == 'window': assert shared is before
        if p.mode == 'reuse': assert shared.chosen is before.chosen and shared.entries is before.entries
        if p.mode == 'reindex': assert shared.entries is before.entries
        if p.layer < half or p.mode == 'window': continue
        for row,may in zip(shared.chosen.flatten(0, 1), shared.candidates.flatten(0, 1), strict=True):
            picked = [j for j in row.tolist() if j >= 0]
            assert picked == sorted(set(picked)) and len(picked) <= c.index_topk
            if p.layer != half and p.selection != half: assert may[picked].all() and len(picked) == min(c.index_topk, may.sum())


@pytest.mark.draw(2)
@pytest.mark.parametrize('i', range(6))
def test_replay_is_exact_from_all_windows_on(i):
    "Besides the entries, the last output depends on decoder layers × (window − 1) + 1 tokens."
    r = random.Random(SEED + i)
    c,_,half,layers = draw(r)
    enough = (len(layers) - half)*(c.window - 1) + 1
    x = streams(c, t := enough + r.randint(1, 6))
    whole,pre,shared = prefill_halves(layers, x, half, t)
    last,last_pre,some = prefill_halves(layers, x, half, enough)
    assert torch.equal(some.entries, shared.entries) and torch.equal(some.keys, shared.keys)
    close(last[:, -1], whole[:, -1])
    close(last_pre[:, -1], pre[:, -1])
    if c.window > 1 and len(layers) - half <= 2:
        fewer,_,_ = prefill_halves(layers, x, half, 1)
        assert (fewer[:, -1] - whole[:, -1]).abs().max() > 1e-4*whole.abs().max()


@pytest.mark.parametrize('i', range(3))
def test_tokens_that_the_last_one_depends_on(i):
    r = random.Random(SEED + i)
    c,_,half,layers = draw(r)
    n,t = len(layers) - half,24
    x,pre,shared,positions = streams(c, t),None,Borrowed(),torch.arange(t)
    pre = first_pre(x)
    for layer in layers[:half]:
        shared = layer.attn.publish(layer.attn_norm(collapse(x, pre)), shared)
        x,pre,shared = layer(x, pre, positions, shared)
    shared = layers[half].attn.publish(layers[half].attn_norm(collapse(x, pre)), shared)
    start = x.clone().requires_grad_(True)
    x = start
    for layer in layers[half:]: x,pre,shared = layer(x, pre, positions, shared)
    x[:, -1].sum().backward()
    touched = start.grad.abs().sum((0, 2, 3)) > 0
    assert not touched[:max(0, t - n*(c.window - 1) - 1)].any() and touched[-1]

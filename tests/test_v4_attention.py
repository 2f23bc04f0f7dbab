"""V4's attention against transformers' modules, on configs that are drawn anew in every run

The seed is printed; SEED=n repeats a run. Where index scores are tied, transformers may select any of the entries. So configs that
are compared with it have many index heads, for which a score of exactly zero is rare; the rule for ties has a test of its own.
"""
import os
import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_nb.arch import compressed, routing, sparse, window
from deepseek_nb.arch.attention import Context
from deepseek_nb.arch.compressed import CompressedAttention, query_positions, visible_entries
from deepseek_nb.arch.rewindable import RewindableCache, rewindable_bytes
from deepseek_nb.arch.rope import cos_sin, frequencies, rotary_factor
from deepseek_nb.arch.window import WindowAttention, window_mask
from deepseek_nb.core.config import Config
from deepseek_nb.core.dispatch import use

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
NAMES = {'wq_a.weight': 'q_a_proj.weight', 'q_norm.weight': 'q_a_norm.weight', 'wq_b.weight': 'q_b_proj.weight',
         'wkv.weight': 'kv_proj.weight', 'kv_norm.weight': 'kv_norm.weight', 'wo_a.weight': 'o_a_proj.weight',
         'wo_b.weight': 'o_b_proj.weight', 'attn_sink': 'sinks'}
POOL = {'wkv.weight': 'kv_proj.weight', 'wgate.weight': 'gate_proj.weight', 'ape': 'position_bias', 'norm.weight': 'kv_norm.weight'}
NAMES |= {f'compressor.{a}': f'compressor.{b}' for a, b in POOL.items()}
NAMES |= {f'indexer.compressor.{a}': f'compressor.indexer.{b}' for a, b in POOL.items()}
NAMES |= {'indexer.wq_b.weight': 'compressor.indexer.q_b_proj.weight',
          'indexer.weights_proj.weight': 'compressor.indexer.scorer.weights_proj.weight'}


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_v4_attention SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    "A source of randomness that depends on the seed and the test alone"
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


def draw(r, **kw):
    "A tiny config of transformers with one layer of each kind, and ours read from it"
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    rot, groups = r.choice([2, 4, 6]), r.choice([1, 2])
    v = rot + 2*r.randrange(1, 6)
    yarn = dict(rope_type='yarn', factor=4., original_max_position_embeddings=32, beta_fast=32., beta_slow=1., attention_factor=1.)
    share = dict(partial_rotary_factor=(rot + 1e-6)/v)
    rates = dict(compressed_sparse_attention=kw.pop('m', 4), heavily_compressed_attention=r.choice([6, 8]))
    sizes = dict(hidden_size=2*r.randrange(8, 20), num_attention_heads=groups*r.choice([1, 2, 3]), head_dim=v,
                 q_lora_rank=r.randrange(5, 20),
                 sliding_window=r.randrange(2, 9), o_groups=groups, o_lora_rank=r.randrange(3, 9), index_n_heads=16,
                 index_head_dim=rot + 2*r.randrange(0, 4), index_topk=r.randrange(1, 5), rms_norm_eps=r.choice([1e-6, 1e-4]))
    hf = DeepseekV4Config(
        vocab_size=64, num_hidden_layers=3, compress_rates=rates, mlp_layer_types=['moe']*3, **share, **(sizes | kw),
        layer_types=['sliding_attention', 'compressed_sparse_attention', 'heavily_compressed_attention'],
        rope_parameters=dict(main=dict(rope_type='default', rope_theta=1e4, **share), compress=yarn | dict(rope_theta=16e4, **share)),
        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=512)
    hf._attn_implementation = 'eager'
    return hf, Config.from_hf(hf.to_dict())


def layers(hf, c):
    "The three layers of transformers, and ours with the same random weights"
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention
    out = []
    for i, m in enumerate(c.compress_ratios):
        ours, theirs = CompressedAttention(c, m) if m else WindowAttention(c), DeepseekV4Attention(hf, i).eval()
        state = {k: torch.randn(p.shape)*(p.shape[-1]**-.5 if p.ndim > 1 else .5) + ('norm' in k) for k, p in ours.state_dict().items()}
        state = {k: 2*p if 'ape' in k or 'sink' in k else p for k, p in state.items()}
        ours.load_state_dict(state)
        theirs.load_state_dict({NAMES[k]: p for k, p in state.items()}, strict=True)
        out.append((ours.requires_grad_(False), theirs.requires_grad_(False)))
    return out


def angles(c, attn, positions):
    return cos_sin(frequencies(attn.rope, c.rotary_dim), positions, rotary_factor(attn.rope))


def run(attn, x, pad=None, cache=None, start=0):
    "Our layer on tokens from column `start` on, with its own angles"
    positions = torch.arange(start, start + x.shape[1])[None]
    if pad is not None: positions = (positions - pad[:, None]).clamp(min=0)
    return attn(x, Context(angles(attn.c, attn, positions), cache=cache, pad=pad))


def close(got, want, tol=1e-4):
    assert got.shape == want.shape, (got.shape, want.shape)
    err = (got - want).abs().max().item()/max(want.abs().max().item(), 1e-3)
    assert err <= tol, f'{err:.1e} of the largest value apart'


def oracle(hf, theirs, x, start=0, cache=None):
    "transformers' layer on the same tokens"
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding
    positions, rotary = torch.arange(start, start + x.shape[1])[None].expand(len(x), -1), DeepseekV4RotaryEmbedding(hf)
    embeddings = {k: rotary(x, positions, layer_type=k) for k in ('main', 'compress')}
    s, t = x.shape[1], x.shape[1] + (min(start, hf.sliding_window - 1) if cache else 0)
    mask = window_mask(s, t, hf.sliding_window)
    bias = torch.zeros(len(x), 1, s, t) if mask is None else torch.zeros(len(x), 1, s, t).masked_fill(~mask, -torch.inf)
    return theirs(x, position_embeddings=embeddings, position_ids=positions, attention_mask=bias, cache=cache)[0]


def cuts(r, n, most=9):
    "Pieces that a text of n tokens is cut into: any lengths, single tokens often"
    out = []
    while sum(out) < n: out.append(min(r.choice([1, 1, r.randrange(1, most)]), n - sum(out)))
    return out


def feed(attns, cache, x, sizes):
    "Our layers on a text in pieces, with their cache"
    out = []
    for piece in x.split(sizes, 1):
        cache.reserve(piece.shape[1])
        assert all(a.c is cache.c for a in attns)
        out.append(torch.stack([run(a, piece, cache.pad, cache[i], len(cache)) for i, a in enumerate(attns)]))
        cache.advance(piece.shape[1])
    return torch.cat(out, 2)


def test_whole_texts(r):
    hf, c = draw(r)
    for ours, theirs in layers(hf, c):
        for n in [*range(1, 14, 3), *range(2, 14, 3), r.randrange(14, 24), r.randrange(24, 40)]:
            x = torch.randn(r.choice([1, 2]), n, c.dim)
            close(run(ours, x), oracle(hf, theirs, x))


class Largest(TorchDispatchMode):
    "Bytes of the largest tensor that is made within a `with` block"
    nbytes = 0
    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, torch.Tensor): self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


def test_blocks_of_queries(r, monkeypatch):
    "Blocks of any size give the outputs of one, padded, cached or not; no tensor of a prompt grows with its square, entries aside"
    hf, c = draw(r)
    attns, t = [a for a, _ in layers(hf, c)], r.randrange(30, 50)
    x, pad = torch.randn(2, t, c.dim), torch.tensor([0, r.randrange(1, t)])
    want = [[run(a, x, p) for a in attns] for p in (None, pad)]
    monkeypatch.setattr(window, 'QUERY_BLOCK', r.randrange(1, 9))
    for p, whole in zip((None, pad), want, strict=True):
        cache = RewindableCache(c, 2)
        cache.pad = p
        got = feed(attns, cache, x, [t//3, t - t//3])
        for i, (a, y) in enumerate(zip(attns, whole, strict=True)):
            for z in (run(a, x, p), got[i]): close(z[0], y[0]), close(z[1, pad[1]:], y[1, pad[1]:])
    monkeypatch.undo()
    taken = {n: [] for n in (1024, 2048)}
    for n in taken:
        x = torch.randn(1, n, c.dim)
        for a in attns:
            with use('torch'), Largest() as most: run(a, x)
            taken[n].append(most.nbytes)
    block = max(c.window, window.QUERY_BLOCK)
    for a, b, m in zip(*taken.values(), c.compress_ratios, strict=True):
        entries = 4*block*c.n_heads*1024//m if m else 0  # scores of one block for the entries of the added tokens
        index = 4*2**22 if m == c.csa_ratio else 0  # scores of the indexer, in parts of at most 2²² numbers
        assert b <= max(2*a + entries, index), (m, a, b)


def test_pieces(r):
    "Chunked prefill and decode equal the whole text, here and in transformers with its cache"
    from transformers.cache_utils import DynamicCache
    hf, c = draw(r, m=r.choice([2, 3, 4]))
    pairs, n = layers(hf, c), 40
    x, sizes = torch.randn(2, n, c.dim), cuts(r, 40)
    got = feed([a for a, _ in pairs], RewindableCache(c, 2, r.choice([0, 10])), x, sizes)
    past, start, want = DynamicCache(config=hf), 0, []
    for piece in x.split(sizes, 1):
        want.append(torch.stack([oracle(hf, theirs, piece, start, past) for _, theirs in pairs]))
        start += piece.shape[1]
    close(got, torch.cat(want, 2))
    close(got, torch.stack([run(a, x) for a, _ in pairs]))


@pytest.mark.parametrize('n', [23, None])
def test_rewinds(r, n):
    "A rewound cache has the bits of one that never saw the rejected tokens, for every length of a rewind over the ends of windows"
    hf, c = draw(r, index_n_heads=r.choice([1, 4]))
    attns, longest = [a for a, _ in layers(hf, c)], r.randrange(9, 13)
    n, sizes = n or r.randrange(1, 30), cuts(r, 12)  # after 23 tokens one more completes a window of 4, 6 or 8: all rows are needed
    text, draft = torch.randn(1, n + 12, c.dim), torch.randn(1, longest, c.dim)

    def state(taken):
        cache = RewindableCache(c, rewinds=longest)
        feed(attns, cache, text[:, :n], [n])
        if taken: feed(attns, cache, draft[:, :taken], cuts(r, taken))
        for part in ([taken] if taken < 2 else [1, taken - 1]): cache.rewind(part)
        y = feed(attns, cache, text[:, n:], sizes)
        return y, [o.entries[:, :len(cache)//o.m] for slot in cache.slots for o in slot.lists]

    clean = state(0)
    for taken in range(1, longest + 1) if n != 23 else [longest]:
        y, entries = state(taken)
        assert torch.equal(y, clean[0]), taken
        assert all(map(torch.equal, entries, clean[1])), taken


def test_rewinding_too_far(r):
    hf, c = draw(r)
    cache = RewindableCache(c, rewinds=5)
    cache.reserve(20)
    cache.advance(20)
    cache.rewind(3)
    with pytest.raises(ValueError, match='cannot rewind 3 tokens, only 2'): cache.rewind(3)
    cache.reserve(1)
    cache.advance(1)
    with pytest.raises(ValueError, match='cannot rewind 4 tokens, only 3'): cache.rewind(4)
    with pytest.raises(ValueError, match='cannot rewind 19 tokens of a cache that holds 18'): cache.rewind(19)
    with pytest.raises(ValueError, match='context of 513 tokens is longer than max_positions 512'): cache.reserve(495)
    assert len(cache) == 18
    cache.rewind(18)
    assert len(cache) == 0


def test_padded_rows(r):
    "Rows with different padding equal the same rows alone, whole and in pieces, after a rewind too"
    hf, c = draw(r)
    attns, t = [a for a, _ in layers(hf, c)], r.randrange(12, 30)
    pad = torch.tensor([0, *(r.randrange(t) for _ in range(2)), t - 1])
    x = torch.randn(4, t + 12, c.dim)
    alone = [torch.stack([run(a, x[b:b + 1, pad[b]:]) for a in attns])[:, 0] for b in range(4)]
    for a, y in zip(attns, zip(*alone, strict=True), strict=True):
        whole = run(a, x, pad)
        assert whole.isfinite().all()
        for b in range(4): close(whole[b, pad[b]:], y[b])
    cache = RewindableCache(c, 4, rewinds=7)
    cache.pad = pad
    first = feed(attns, cache, x[:, :t], cuts(r, t))
    feed(attns, cache, torch.randn(4, 7, c.dim), [7])
    cache.rewind(7)
    got = torch.cat([first, feed(attns, cache, x[:, t:], cuts(r, 12))], 2)
    for b in range(4): close(got[:, b, pad[b]:], alone[b])


@pytest.mark.parametrize('kind', ['all equal', 'one head'])
def test_ties(r, kind):
    "Of equal index scores the lowest entries are selected, in prefill, decode and padded batches alike"
    hf, c = draw(r, index_n_heads=1, index_topk=r.randrange(2, 5))
    csa = layers(hf, c)[1][0]
    if kind == 'all equal': csa.indexer.wq_b.weight.zero_()
    x, chosen = torch.randn(1, 40, c.dim), []
    csa.indexer.register_forward_hook(lambda module, args, out: chosen.append(out))
    whole, all_at_once = run(csa, x), chosen.pop()
    if kind == 'all equal': assert torch.equal(all_at_once[0, -1], torch.arange(c.index_topk))
    c1 = replace(c, n_layers=1, compress_ratios=c.compress_ratios[1:2])
    csa.c = csa.indexer.c = c1
    cache = RewindableCache(c1)
    start = c.csa_ratio*(c.index_topk + 1) - 1
    close(feed([csa], cache, x[:, :start], [start])[0], whole[:, :start])
    chosen.clear()
    close(feed([csa], cache, x[:, start:], [1]*(40 - start))[0], whole[:, start:])
    assert torch.equal(torch.cat(chosen, 1), all_at_once[:, start:])
    chosen.clear()
    padded = torch.cat([torch.randn(1, 5, c.dim), x], 1)
    run(csa, padded, torch.tensor([5]))
    assert torch.equal(chosen[0][:, 5 + start:, :c.index_topk], all_at_once[:, start:])


def test_bytes(r):
    hf, c = draw(r, m=r.choice([2, 3, 4]))
    for _ in range(5):
        b, t, n, dtype = r.randrange(1, 4), r.randrange(200), r.randrange(40), r.choice([torch.float32, torch.bfloat16])
        cache = RewindableCache(c, b, t, dtype, rewinds=n)
        assert cache.nbytes == rewindable_bytes(c, t, b, dtype.itemsize, n)
        cache.reserve(300)
        assert cache.nbytes == rewindable_bytes(c, cache.capacity, b, dtype.itemsize, n) and cache.capacity >= 300


def test_visibility(r):
    "A window's last token sees its own entry, the token before it does not"
    m, pad = r.randrange(2, 9), torch.tensor([0, r.randrange(1, 9)])
    sees = visible_entries(query_positions(Context((), pad=pad), 40), 40//m, m)
    for b in range(2):
        for s in range(40):
            for i in range(40//m): assert sees[b, s, i] == (pad[b] + m*i + m - 1 <= s)


def gap(scores, k, mask=None):
    "Distance between the last chosen and the first other score, relative to the largest; the least of all rows"
    best = (scores if mask is None else scores.masked_fill(~mask.expand_as(scores), -torch.inf)).sort(-1, descending=True).values
    if k >= best.shape[-1]: return torch.inf
    far = (best[..., k-1] - best[..., k])/scores.abs().amax(-1).clamp(min=1e-30)
    return far.where(best[..., k] > -torch.inf, torch.inf).min().item()


def clear(model, ids, new):
    """Whether no choice of entries, experts or the last `new` tokens is a near tie.
    Logits in float32 differ by 1e-6 of the largest between a whole pass and steps, so that they may turn nearer choices than 1e-4"""
    seen, select, choose = [], compressed.select_positions, routing.route

    def selected(q, k, w, a, mask=None):
        seen.append(gap(sparse.index_scores(q, k, w), a, sparse.causal_mask(q.shape[1], k.shape[1]) if mask is None else mask))
        return select(q, k, w, a, mask)

    def routed(logits, c, bias=None):
        scores = routing.affinity(logits, c.score_func)
        seen.append(gap(scores if bias is None else scores + bias, c.n_activated_experts))
        return choose(logits, c, bias)
    with use('reference'), mock.patch.object(compressed, 'select_positions', selected), mock.patch.object(routing, 'route', routed):
        seen.append(gap(model(ids)[:, -new-1:-1], 1))
    assert len(seen) > 2
    return min(seen) > 1e-4


def test_drafts(r, monkeypatch):
    "Greedy tokens with drafts are those of plain decoding, alone and in a padded batch, though rejected drafts are taken back"
    from deepseek_nb.arch.model import Model
    hf, c = draw(r, index_topk=3)
    model, other = (Model(c, torch.float32, 'cpu').eval().requires_grad_(False) for _ in range(2))
    for m in (model, other):
        for p in m.parameters(): p.add_(torch.randn_like(p)*.1)
    taken, rewind = [], RewindableCache.rewind
    monkeypatch.setattr(RewindableCache, 'rewind', lambda cache, n: (taken.append(n), rewind(cache, n))[1])
    how = dict(max_new_tokens=16, eos_token_id=[])
    for _ in range(30):
        ids, pad = torch.randint(64, (2, 9)).repeat(1, 3), r.randrange(1, 20)
        mask = torch.ones_like(ids)
        mask[1, :pad] = 0
        plain = model.generate(ids, attention_mask=mask, **how)
        if clear(model, plain[:1], 16) and clear(model, plain[1:, pad:], 16): break
    else: pytest.fail('no prompt without near ties')
    assert torch.equal(model.generate(ids, attention_mask=mask, cache=model.new_cache(2), **how), plain)
    for source in ('lookup', model, other):
        taken.clear()
        assert torch.equal(model.generate(ids, attention_mask=mask, draft=source, draft_tokens=r.randrange(3, 7), **how), plain)
    assert any(n > 0 for n in taken), 'the other model guesses wrong at least once'

"""Sparse attention in C++ against float64 and the definition: ragged sizes, ties, infinities, dtypes, strides, instruction sets and
threads; index keys in 8 bits; the fused decode step against the readable model
"""
import math
import os
import random
import time

import pytest
import torch
import warm
from fastcore.test import expect_fail

from deepseek_nb import Model
from deepseek_nb.arch import sparse as definition
from deepseek_nb.arch.attention import causal_mask
from deepseek_nb.arch.model import add_attention, run_blocks
from deepseek_nb.arch.rewindable import IndexCodec, IndexCodes, coded_scores, encode_keys
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.kernels import sparse
from deepseek_nb.kernels.plan import attention_of, step_kernels
from deepseek_nb.kernels.sparse import attend_selected_cpp, index_scores_cpp, select_cpp, top_positions_cpp
from deepseek_nb.kernels.v4 import blocks_step
from deepseek_nb.quant import relative_error
from deepseek_nb.quant.model import quantize_model

KERNELS = sparse.indexer_kernels, sparse.selected_kernels
pytestmark = pytest.mark.skipif(not all(k.ready() for k in KERNELS), reason='no C++ compiler')
KINDS = torch.float32, torch.bfloat16


@pytest.fixture
def r():
    seed = int(os.environ.get('SEED', time.time_ns() % 10**9))
    print(f'SEED={seed}')
    torch.manual_seed(seed)
    return random.Random(seed)


def cut(dtype, b, t, x):
    "Rows in memory that isn't contiguous, between NaNs"
    z = torch.full((b, t + 3, x + 5), torch.nan, dtype=dtype)
    z[:, 1:t+1, 2:x+2] = torch.randn(b, t, x).to(dtype)
    return z[:, 1:t+1, 2:x+2]


def poisoned(run, *shape, dtype=torch.float32, fill=torch.nan):
    "What an operator writes into memory that holds something else"
    y = torch.full(shape, fill, dtype=dtype)
    run(y)
    return y


def one_index(r):
    "The bound is that of a float32 sum of u·j products: each of the two chains rounds once per term"
    dtype, b, s = r.choice(KINDS), r.choice([1, 2]), r.choice([1, 1, 2, 5, 17])
    t, j, u = r.choice([1, 2, 13, 14, 15, 56, 57, 130, 300]), r.choice([1, 2, 7, 8, 9, 16, 17, 33, 64]), r.choice([1, 3, 16, 24, 128])
    q, k, w = torch.randn(b, s, j, u).to(dtype), cut(dtype, b, t, u), torch.randn(b, s, j)
    dots = torch.einsum('bsju,btu->bsjt', q.double(), k.double())
    exact = torch.einsum('bsjt,bsj->bst', dots.relu(), w.double())
    size = torch.einsum('bsju,btu,bsj->bst', q.double().abs(), k.double().abs(), w.double().abs())
    y = poisoned(lambda y: sparse.indexer_kernels.index_scores(q.float(), [k], w, y), b, s, t)
    what = f'{dtype} {b=} {s=} {t=} {j=} {u=}'
    assert ((y - exact).abs() <= (u + j + 2)*2**-24*size).all(), what
    i = r.randrange(s)
    assert torch.equal(index_scores_cpp(q[:, i:i+1], k, w[:, i:i+1]), y[:, i:i+1]), what
    a = r.choice([1, 2, t//2 + 1, t, t + 5])
    mask = r.choice([None, torch.rand(b, s, t) < .5, torch.rand(b, 1, t) < .5, torch.rand(t) < .5])
    seen = torch.ones(s, t).tril(t - s).bool() if mask is None else mask
    assert torch.equal(select_cpp(q, k, w, a, mask), definition.top_positions.op.reference(y, a, seen.expand(b, s, t))), what


def one_code(r):
    "Exact integers, so only the sum over the heads is rounded; a code may differ by one where the rotation is rounded differently"
    b, s, j, u = r.choice([1, 2]), r.choice([1, 1, 3, 17]), r.choice([1, 2, 8, 9, 16, 17, 40]), r.choice([1, 3, 6, 16, 25, 64, 128])
    t = r.choice([1, 2, 13, 14, 15, 57, 130, 300])
    k = encode_keys(torch.randn(b, t, u))
    wide = torch.zeros(b, t + 3, u + 5, dtype=torch.uint8)
    wide[:, 1:t+1, 2:u+2] = k.codes
    k = IndexCodes(wide[:, 1:t+1, 2:u+2], torch.cat([k.scales, k.scales*torch.nan], -1)[..., :1])
    q, w = torch.randn(b, s, j, u), torch.randn(b, s, j)
    if r.random() < .3: k.scales[:, ::2], k.codes[:, 1::2] = 0, 128               # ties
    exact, size = coded_scores(q.double(), k, w), coded_scores(q, k, w.abs())
    y, what = index_scores_cpp(q, k, w), f'{b=} {s=} {t=} {j=} {u=}'
    assert ((y - exact).abs() <= (j + 4)*2**-23*size + 1e-30).all(), what
    i = r.randrange(s)
    assert torch.equal(index_scores_cpp(q[:, i:i+1], k, w[:, i:i+1]), y[:, i:i+1]), what
    a = r.choice([1, 2, t//2 + 1, t, t + 5])
    mask = r.choice([None, torch.rand(b, s, t) < .5, torch.rand(b, 1, t) < .5])
    seen = torch.ones(s, t).tril(t - s).bool() if mask is None else mask
    assert torch.equal(select_cpp(q, k, w, a, mask), definition.top_positions.op.reference(y, a, seen.expand(b, s, t))), what


def one_selection(r):
    "Position by position what the stable sort of the definition gives"
    n, t = r.choice([1, 2, 9]), r.choice([1, 2, 15, 16, 17, 100, 333])
    odd = torch.tensor([0., -0., 1., -1., math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 3.4e38, -3.4e38])
    scores = r.choice([torch.randn(n, t), torch.randint(-2, 3, (n, t)).float(), torch.zeros(n, t), odd[torch.randint(len(odd), (n, t))]])
    scores = torch.where(torch.rand(n, t) < r.choice([0, 0, .3]), odd[r.randrange(len(odd))], scores).to(r.choice(KINDS))
    mask, a = None if r.random() < .4 else torch.rand(n, t) < r.choice([0, .1, .5, .9, 1]), r.choice([1, 2, t//2 + 1, t, t + 7])
    want = definition.top_positions.op.reference(scores, a, mask)
    got = poisoned(lambda y: sparse.indexer_kernels.top_positions(scores.float(), mask, y), *want.shape, dtype=torch.int64, fill=-7)
    assert torch.equal(got, want) and torch.equal(top_positions_cpp(scores, a, mask), want), f'{scores=} {a=} {mask=}'


def one_attend(r):
    dtype, b, s, h = r.choice(KINDS), r.choice([1, 2]), r.choice([1, 1, 3, 40]), r.choice([1, 2, 3, 5, 6, 7, 16, 20, 70])
    c, rot, t, a = r.choice([1, 8, 16, 40, 128]), r.choice([0, 5, 8]), r.choice([1, 5, 70, 400]), r.choice([1, 3, 4, 63, 64, 65, 257, 300])
    q, z = torch.randn(b, h, s, c + rot).to(dtype), cut(dtype, b, t, c + rot)
    p = definition.top_positions.op.reference(torch.randn(b, s, t), a, torch.rand(b, s, t) < r.choice([.2, 1]))
    if r.random() < .3: p = p.gather(-1, torch.rand(p.shape).argsort(-1))
    if r.random() < .2: p[0, 0] = -1
    exact = definition.attend_selected.op.reference(q.double(), z.double(), p, c, .3)
    hidden = torch.ones(b, t + 1, 1, dtype=torch.bool).scatter(1, p.where(p >= 0, t).flatten(1)[..., None], False)[:, :t]
    z[hidden.expand_as(z)] = torch.nan
    y, what = attend_selected_cpp(q, z, p, c, .3), f'{dtype} {b=} {h=} {s=} {t=} {a=} {c=} {rot=}'
    assert torch.equal(y.isnan(), exact.isnan()) and y.dtype == dtype, what
    size = z.float().abs().nan_to_num(0)
    terms = .3*(q.float().abs().flatten(1, 2)@size.mT).max().item()  # a score's error, relative in its weight
    limit = 2**-23*(16 + terms)*max(1, size.max().item()) if dtype == torch.float32 else 2**-8*exact.nan_to_num(0).abs().max().item()
    assert (y - exact).nan_to_num(0).abs().max() <= limit, what
    i = r.randrange(s)
    assert torch.equal(attend_selected_cpp(q[:, :, i:i+1], z, p[:, i:i+1], c, .3).nan_to_num(7), y[:, :, i:i+1].nan_to_num(7)), what


ONES = [one_index, one_code, one_selection, one_attend]


def sweep(n=12, seed=None):
    "Random shapes for every operator"
    r = random.Random(seed)
    torch.manual_seed(r.randrange(10**9))
    before = torch.get_num_threads()
    for i in range(n):
        torch.set_num_threads(1 + i%3)
        for one in ONES: one(r)
    torch.set_num_threads(before)


@pytest.mark.parametrize('one', ONES)
def test_random_shapes(one, r):
    before = torch.get_num_threads()
    for i in range(30):
        torch.set_num_threads(1 + i%3)
        one(r)
    torch.set_num_threads(before)


@pytest.mark.draw(1, group='instruction sets')
def test_other_instruction_sets(isa):
    env = os.environ | warm.built_for(isa) | dict(DEEPSEEK_NB_CXXFLAGS='-O1', PYTHONPATH=os.path.dirname(__file__))
    seed = time.time_ns() % 10**9
    done = warm.run('-c', f'import test_sparse_kernels as t; t.sweep(10, {seed})', env=env)
    if 'it may be' in done.stderr: pytest.skip(f'no {isa} on this processor')
    assert done.returncode == 0, f'SEED={seed} {done.stderr}'


def test_infinite_keys(r):
    "A head that doesn't exist adds nothing to the score of an infinite key"
    k = torch.ones(1, 3, 4)
    k[0, 1], k[0, 2] = math.inf, math.nan
    for sign in (1, -1):
        q, w = torch.full((1, 1, 3, 4), float(sign)), torch.ones(1, 1, 3)
        got, want = index_scores_cpp(q, k, w), definition.index_scores.op.reference(q, k, w)
        assert torch.equal(got.nan_to_num(-7), want.nan_to_num(-7))


def test_long_row(r):
    "A row as long as a context, with ties at the edge of the selection"
    scores = torch.randn(2, 20_011).mul(20).round()
    for a in (1, 2048, 20_010): assert torch.equal(top_positions_cpp(scores, a), definition.top_positions.op.reference(scores, a))


def test_prompt_decode_and_batch_agree(r):
    "The three operations, for a prompt, for its last tokens one by one, and for each row of the batch alone"
    b, s, t, j, u, h, c = 2, 33, 150, 8, 16, 6, 24
    q, k, w, x, z = torch.randn(b, s, j, u), torch.randn(b, t, u), torch.randn(b, s, j), torch.randn(b, h, s, 32), torch.randn(b, t, 32)
    k[:, ::3] = k[:, :1]                                                  # ties
    p = top_positions_cpp(index_scores_cpp(q, k, w), 40, causal_mask(s, t))
    y = attend_selected_cpp(x, z, p, c, .2)
    for i in range(b):
        for n in (0, 7, s - 1):
            end = t - s + n + 1
            row = (slice(i, i+1), slice(n, n+1))
            one = top_positions_cpp(index_scores_cpp(q[row], k[i:i+1, :end], w[row]), 40)
            assert torch.equal(one, p[row])
            assert torch.equal(attend_selected_cpp(x[i:i+1, :, n:n+1], z[i:i+1, :end], one, c, .2), y[i:i+1, :, n:n+1])


def test_dispatch(r):
    def run(q, k, w, x, z):
        p = definition.top_positions(definition.index_scores(q, k, w), 5)
        return definition.attend_selected(x, z, p, 8, .3)
    args = torch.randn(1, 2, 3, 8), torch.randn(1, 9, 8), torch.randn(1, 2, 3), torch.randn(1, 4, 2, 12), torch.randn(1, 9, 12)
    with use('reference'): want = run(*args)
    with use('cpp'), torch.inference_mode(): assert (run(*args) - want).abs().max() < 1e-5
    chosen, p = definition.attend_selected.op.choose, torch.zeros(1, 2, 5).long()
    assert [definition.index_scores.op.choose(*args[:3]).name, chosen(*args[3:], p, 8, .3).name] == ['cpp/cpu']*2
    assert chosen(args[3].requires_grad_(), args[4], p, 8, .3).name != 'cpp/cpu'


def test_empty(r):
    q, k, w = torch.randn(1, 2, 3, 8), torch.randn(1, 0, 8), torch.randn(1, 2, 3)
    assert definition.index_scores(q, k, w).shape == (1, 2, 0)
    assert definition.index_scores(q[:, :0], torch.randn(1, 4, 8), w[:, :0]).shape == (1, 0, 4)
    assert definition.top_positions(torch.zeros(2, 0, 5), 3).shape == (2, 0, 3)


def test_bad_arguments():
    q, k, w = torch.zeros(1, 2, 3, 8), torch.zeros(1, 9, 8), torch.zeros(1, 2, 3)
    with expect_fail(ValueError, 'k is float32 of shape (1, 9, 7)'): index_scores_cpp(q, k[..., 1:], w)
    with expect_fail(ValueError, 'w is float32 of shape (1, 2, 2)'): select_cpp(q, k, w[..., 1:], 3)
    with expect_fail(ValueError, 'mask is torch.float32'): top_positions_cpp(w, 2, w)
    x, z, p = torch.zeros(1, 4, 2, 12), torch.zeros(1, 9, 12), torch.zeros(1, 2, 5, dtype=torch.int64)
    with expect_fail(ValueError, 'positions is int64 of shape (1, 1, 5)'): attend_selected_cpp(x, z, p[:, 1:], 8, .1)
    with expect_fail(ValueError, 'positions is int32'): attend_selected_cpp(x, z, p.int(), 8, .1)
    with expect_fail(ValueError, 'c is 13; z is 12 wide'): attend_selected_cpp(x, z, p, 13, .1)
    with expect_fail(RuntimeError, 'a selected position is beyond the cache'): attend_selected_cpp(x, z, p + 9, 8, .1)


# ---- index keys in 8 bits, and the fused step

def test_codes_of_odd_numbers():
    "Zeros, infinities and NaN: a key that isn't finite scores NaN, as the largest, in every twin"
    k = torch.randn(1, 6, 8)
    k[0, 1], k[0, 2, 3], k[0, 4, 0] = 0, torch.inf, torch.nan
    coded, q, w = encode_keys(k), torch.randn(1, 1, 3, 8), torch.rand(1, 1, 3)
    want, got = coded_scores(q, coded, w), index_scores_cpp(q, coded, w)
    assert want[0, 0].isnan().tolist() == got[0, 0].isnan().tolist() == [False, False, True, False, True, False] and got[0, 0, 1] == 0
    q[0, 0, 1, 2] = torch.inf
    assert index_scores_cpp(q, coded, w).isnan().all() and coded_scores(q, coded, w).isnan().all()


def small_model(r, **fields):
    "A V3.2 model with random sizes, and steps with their pads"
    c = dict(vocab_size=60, dim=24, n_layers=2, n_heads=r.choice([1, 3]), inter_dim=20, q_lora_rank=r.choice([8, 13]),
             kv_lora_rank=r.choice([8, 17]), qk_nope_head_dim=r.choice([4, 7]), qk_rope_head_dim=4, v_head_dim=r.choice([3, 8]),
             index_n_heads=r.choice([3, 8, 17]), index_head_dim=r.choice([4, 6, 16]), index_topk=r.choice([1, 4, 9, 100]),
             max_positions=128, n_dense_layers=1, n_routed_experts=4, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=8,
             n_expert_groups=1, n_limited_groups=1, score_func='sigmoid', norm_topk=True, route_scale=2.5, rope=Rope(interleaved=True))
    model = Model(Config('deepseek_v32', **c | fields), torch.float32, 'cpu').requires_grad_(False)
    for p in model.parameters(): p.copy_(1 + .2*torch.randn(p.shape) if p.ndim == 1 else torch.randn(p.shape)*p.shape[-1]**-.5)
    return model


@torch.no_grad()
def walk(model, ids, mask, index_dtype):
    "Logits of a prompt, chunks and steps, with tokens taken back"
    cache, found = model.new_cache(len(ids), codec=index_dtype and IndexCodec()), []
    for start, end in ((0, 7), (7, 12), (12, 13), (13, 14), (14, 24), (24, 25), (17, 19), (19, 25), (25, 26)):
        cache.rewind(len(cache) - start)
        found.append(model(ids[:, start:end], cache, attention_mask=mask[:, :end] if start == 0 else None)[:, -1:])
    return torch.cat(found, 1)


def steady_walk(r, **fields):
    "A model whose selections, of tokens and of experts, a little noise in the activations doesn't change"
    for _ in range(30):
        model, ids = small_model(r, **fields), torch.randint(60, (3, 26))
        mask = (torch.arange(26) >= torch.tensor([0, r.randrange(7), 5])[:, None]).long()
        form = r.choice([None, 'int8'])
        with use('reference'):
            want, w = walk(model, ids, mask, form), model.embed_tokens.weight
            kept, near = w.clone(), []
            for _ in range(2):
                w.copy_(kept*(1 + 1e-5*torch.randn(w.shape)))
                near.append((walk(model, ids, mask, form) - want).abs().max())
            w.copy_(kept)
        if max(near) < 2e-4*want.abs().max(): return model, ids, mask, form, want
    raise AssertionError('no steady model')


def test_step_against_the_readable_model(r):
    assert step_kernels('SELECTED').ready()
    before = torch.get_num_threads()
    for i in range(6):
        model, ids, mask, form, want = steady_walk(r)
        torch.set_num_threads(1 + i%3)
        far = (walk(model, ids, mask, form) - want).abs().max()/want.abs().max()
        assert far < 1e-4, f'{far:.1e} apart: {form} {model.config}'
    torch.set_num_threads(before)


@torch.no_grad()
def test_rows_of_a_batch_select_side_by_side(r):
    "A row ends with few queries, the next begins with 16: a thread that is ahead leaves the scores that others still select from"
    c = Config('deepseek_v32', vocab_size=50, dim=32, n_layers=1, n_heads=4, inter_dim=32, max_positions=256, n_dense_layers=1,
               q_lora_rank=16, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, index_n_heads=8, index_head_dim=8,
               index_topk=3, rope=Rope(interleaved=True))
    model, before, found = Model(c, 'float32', 'cpu').init_weights(.1).eval().requires_grad_(False), torch.get_num_threads(), set()
    ids = torch.randint(50, (2, 24))  # blocks of 16 and of 8 queries
    torch.set_num_threads(3)
    for _ in range(30): found.add(model(ids, model.new_cache(2)).numpy().tobytes())
    torch.set_num_threads(before)
    assert len(found) == 1


def test_step_in_bfloat16(r):
    "The step rounds less than the readable code, so it is nearer to float32. Medians: rounding may send a token to another expert"
    model, ids, mask, form, want = steady_walk(r, index_topk=100)
    half = Model(model.config, torch.bfloat16, 'cpu').requires_grad_(False)
    half.load_state_dict(model.state_dict())
    exact = Model(model.config, torch.float32, 'cpu').requires_grad_(False)
    exact.load_state_dict(half.state_dict())
    want = walk(exact, ids, mask, form)
    with use('reference'): readable = walk(half, ids, mask, form)
    assert (walk(half, ids, mask, form) - want).abs().median() < 1.2*(readable - want).abs().median()


def test_when_the_step_runs(r):
    model = small_model(r)
    def twin(cache, model=model, mla='auto'):
        with torch.no_grad():
            cache.reserve(1)
            x = torch.zeros(cache.batch, 1, 24)
            return run_blocks.op.choose(x, model.layers, model.context(1, cache, mla=mla)).supports
    for form in (None, 'int8'): assert twin(model.new_cache(2, codec=form and IndexCodec())) is blocks_step
    assert twin(model.new_cache(2), mla='naive') is not blocks_step
    other = small_model(r, attn_bias=True)
    assert twin(other.new_cache(1), other) is not blocks_step
    hook = model.layers[1].self_attn.indexer.wk.register_forward_hook(lambda *_: None)
    assert twin(model.new_cache(1)) is not blocks_step
    hook.remove()
    assert twin(model.new_cache(1)) is blocks_step
    model.layers[0].self_attn.indexer.wk.weight = torch.nn.Parameter(torch.zeros(1), False)
    model.layers[0].self_attn.indexer = None
    assert twin(model.new_cache(1)) is not blocks_step


def test_greedy_tokens_and_drafts(r):
    "The step generates what the readable code does, and drafts, which rewind the cache, change nothing"
    for _ in range(20):
        model, ids = small_model(r), torch.randint(20, (1, 6)).repeat(1, 3)
        with use('reference'):
            want = model.generate(ids, max_new_tokens=12)
            top = model(want)[0, 17:].topk(2).values
        if (top[:, 0] - top[:, 1]).min() > 1e-2 and steady(model, want): break
    assert torch.equal(model.generate(ids, max_new_tokens=12), want)
    assert torch.equal(model.generate(ids, max_new_tokens=12, draft='lookup'), want)


def steady(model, ids):
    "Whether a little noise leaves all logits nearly the same"
    with use('reference'), torch.no_grad():
        a, w = model(ids), model.embed_tokens.weight
        kept = w.clone()
        w.mul_(1 + 1e-5*torch.randn(w.shape))
        b = model(ids)
        w.copy_(kept)
    return (a - b).abs().max() < 2e-4*a.abs().max()


# ---- quantised weights

def coded_model(r, form, **fields):
    "A quantised V3.2 model whose matrices are whole panels"
    sizes = dict(dim=32, inter_dim=r.choice([32, 48]), q_lora_rank=32, kv_lora_rank=r.choice([32, 64]), qk_nope_head_dim=16,
                 qk_rope_head_dim=16, v_head_dim=r.choice([16, 32]),
                 index_head_dim=r.choice([16, 32]), moe_inter_dim=16, n_activated_experts=4)
    return quantize_model(small_model(r, **sizes | fields), form)


def test_step_on_codes(r):
    "All tokens are selected and all experts are active, so only the rounding of activations to 8 bits differs"
    before = torch.get_num_threads()
    for i, form in enumerate(('int8', 'int4', 'int8')):
        model, ids = coded_model(r, form, index_topk=100), torch.randint(60, (3, 26))
        mask = (torch.arange(26) >= torch.tensor([0, r.randrange(7), 5])[:, None]).long()
        keys = r.choice([None, 'int8'])
        with use('reference'): want = walk(model, ids, mask, keys)
        torch.set_num_threads(1 + i)
        error = relative_error(want, walk(model, ids, mask, keys))
        assert error < .05, f'{error:.3f}: {form} {keys} {model.config}'
    torch.set_num_threads(before)


def attended(model, x, cache):
    "What the first layer adds"
    return add_attention(x, model.layers[0], model.context(1, cache).layer(0)) - x


@torch.no_grad()
def test_selection_on_codes(r):
    "One layer on a cache of 40 tokens, of which it selects three; noise as large as the rounding leaves the selection as it is"
    for form in ('int8', 'int4'):
        for _ in range(100):
            model, keys = coded_model(r, form, index_topk=3, n_layers=1), r.choice([None, 'int8'])
            caches, x = [model.new_cache(1, codec=keys and IndexCodec()) for _ in range(2)], torch.randn(1, 1, 32)
            for cache in caches:
                with use('reference'): model(torch.arange(40)[None], cache)
                cache.reserve(1)
            with use('reference'):
                want = attended(model, x, caches[0])
                near = [relative_error(want, attended(model, x*(1 + .03*torch.randn_like(x)), caches[0])) for _ in range(4)]
                attended(model, x, caches[0])
            if max(near) < .1: break
        assert add_attention.op.choose(x, model.layers[0], model.context(1, caches[1]).layer(0)).supports is attention_of
        error = relative_error(want, attended(model, x, caches[1]))
        assert error < .06, f'{error:.3f}: {form} {keys} {model.config}'


def test_when_the_step_on_codes_runs(r):
    "Not for widths that aren't whole panels; a replaced weight is noticed"
    def twin(model):
        with torch.no_grad():
            cache = model.new_cache(1)
            cache.reserve(1)
            return run_blocks.op.choose(torch.zeros(1, 1, 32), model.layers, model.context(1, cache)).supports
    model = coded_model(r, 'int8')
    assert twin(model) is blocks_step
    hook = model.layers[1].self_attn.indexer.wk.register_forward_hook(lambda *_: None)
    assert twin(model) is not blocks_step
    hook.remove()
    assert twin(model) is blocks_step
    model.layers[0].self_attn.indexer.wk = torch.nn.Identity()
    assert twin(model) is not blocks_step
    assert twin(coded_model(r, 'int8', v_head_dim=24)) is not blocks_step

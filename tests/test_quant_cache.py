"Quantised caches: codes against an oracle, bytes against the formula, a model with such a cache against one with a rounded plain cache."
import os
import random
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from deepseek_nb.arch.cache import Cache, Codec, Slot, cache_shapes
from deepseek_nb.arch.model import Model
from deepseek_nb.arch.releases import preset
from deepseek_nb.arch.rewindable import rewindable_bytes
from deepseek_nb.bench.limits import BENCH_MOE
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer.generate import left_padded
from deepseek_nb.infer.paged import PagedCache, PagePool
from deepseek_nb.infer.persist import from_bytes, to_bytes
from deepseek_nb.infer.prefix import PrefixCache
from deepseek_nb.infer.quant_cache import (
    CacheFormat,
    quantized_bytes,
    quantized_window_bytes,
)

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))

GQA = Config('llama', vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=64, n_kv_heads=2, head_dim=40, max_positions=96)
MLA = Config('deepseek_v3', vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=64, kv_lora_rank=48, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             moe_inter_dim=16, score_func='sigmoid', score_bias=True, norm_topk=True, max_positions=96, rope=Rope(interleaved=True))
CONFIGS = dict(gqa=GQA, mla=MLA)
FORMATS = [CacheFormat(*o) for o in product(('int8', 'fp8'), (32, 'token'))]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def name(f): return f'{f.name}-{f.scales}'
def made(config, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Model(config, dtype, 'cpu').requires_grad_(False).init_weights(std=.3)


MODELS = {n: made(c) for n,c in CONFIGS.items()}


@pytest.fixture(params=MODELS)
def model(request): return MODELS[request.param]


@pytest.fixture(params=FORMATS, ids=name)
def form(request): return request.param


def quantised(model, form, *args): return model.new_cache(*args, codec=form)


# ---- rows

def oracle(x, form):
    "What is left of one block in float64: the nearest of all numbers that a code can mean."
    most = 127. if form.name == 'int8' else 448.
    scale = np.float64(np.float32(np.abs(x).max())/np.float32(most))
    levels = np.arange(-127, 128) if form.name == 'int8' else E4M3[np.isfinite(E4M3)]
    return (levels*scale)[np.abs(x[:, None].astype(np.float64) - levels*scale).argmin(1)], scale


numbers = st.floats(-1e4, 1e4, width=32)


@pytest.mark.parametrize('form', FORMATS, ids=name)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rows_are_the_nearest_codes(form, data):
    rows,i = data.draw(st.integers(1, 3)),data.draw(st.integers(1, 70))
    x = data.draw(arrays(np.float32, (rows, i), elements=numbers))
    codes,scales = form.encode(torch.from_numpy(x))
    block = i if form.scales == 'token' else 32
    assert codes.shape == x.shape and scales.shape == (rows, -(-i//block)) and codes.element_size() == 1 and scales.dtype == torch.float32
    got = form.decode(codes, scales).numpy()
    for r,a in product(range(rows), range(0, i, block)):
        want,scale = oracle(x[r, a:a+block], form)
        if 0 < scale < 1e-36: continue  # below float32's own precision
        exact,near = x[r, a:a+block].astype(np.float64),got[r, a:a+block]
        assert (np.abs(near - exact) <= np.abs(want - exact)*(1 + 1e-5) + 1e-5*scale + 2**-22*np.abs(exact)).all(), 'as near as any code'


@pytest.mark.parametrize('shape', [(0, 40), (2, 0, 64), (1, 2, 3, 33), (4, 1), (3, 32), (2, 31)])
def test_shapes(form, shape):
    x = torch.randn(shape)
    codes,scales = form.encode(x)
    assert form.decode(codes, scales).shape == x.shape
    if x.numel(): assert (form.decode(codes, scales) - x).abs().max() <= x.abs().max()*.07


def test_zeros_extremes_and_nan(form):
    x = torch.zeros(3, 64)
    x[1, 5],x[2, 40] = 3e38,1e-30
    got = form.decode(*form.encode(x))
    assert torch.equal(got[0], x[0]) and torch.allclose(got, x, rtol=.04)
    x[0, 3] = torch.nan
    got = form.decode(*form.encode(x))
    assert got[0, :32].isnan().all() and got[1:].isfinite().all(), 'what is no number is not hidden, and stays in its row'


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
def test_no_number_stays_no_number(model, form, bad):
    "In a latent, a key or a rotary part: what comes back says so at that position, and there alone."
    new = [torch.randn(s) for s in cache_shapes(model.config, 2, 3)]
    for x in new: x[0, ..., 1, 2] = bad
    cache,pool = quantised(model, form, 2, 4),PagePool(model.config, 4, 4, codec=form)
    for c in (cache, PagedCache(pool, 2)):
        c.reserve(3)
        for x in c[0].append(*new):
            assert not x[0, ..., 1, 2].isfinite().any() and x[1].isfinite().all() and x[0, ..., [0, 2], :].isfinite().all()
    if model.config.mla:
        new[0][0, 1, 2],new[0][0, 1, -1] = 0.,bad
        z, = cache[0].append(*new)
        assert z[0, 1, :-1].isfinite().all() and torch.allclose(z[0, 1, -1], torch.tensor(bad), equal_nan=True)


def test_a_row_of_halves_is_a_row(form):
    "The same row gives the same codes, whatever it comes with."
    x = torch.randn(5, 3, 48)
    codes,scales = form.encode(x)
    for i,j in product(range(5), range(3)):
        one = form.encode(x[i, j])
        assert torch.equal(codes[i, j], one[0]) and torch.equal(scales[i, j], one[1])


@pytest.mark.parametrize('args, said', [
    (('int3',), r"unknown cache format 'int3'; this package has int8, fp8"), ((None,), 'unknown cache format None'),
    (('int8', 64), r"cache scales 64 must be 'token' or 32"), (('fp8', 'channel'), "cache scales 'channel' must be 'token' or 32")])
def test_unsupported_formats(args, said):
    with pytest.raises(ValueError, match=said) as e: CacheFormat(*args)
    assert '\n' not in str(e.value)


# ---- bytes

BENCH = Config.from_hf(dict(model_type='deepseek_v3', **BENCH_MOE))


@pytest.mark.parametrize('config, least', [(BENCH, .57), (preset('deepseek-v3'), .63)], ids=['bench-moe', 'v3'])
def test_bytes_of_a_token(config, least):
    c,r = config.kv_lora_rank,config.qk_rope_head_dim
    for scales,n in ((32, c//32), ('token', 1)):
        cache = Cache(replace(config, n_layers=1), 2, 3, codec=CacheFormat('int8', scales))
        assert cache.nbytes == 2*3*(c + 4*n + 4*r)
        assert 1 - cache.nbytes/Cache(replace(config, n_layers=1), 2, 3).nbytes >= least
        assert quantized_bytes(CacheFormat('int8', scales), config) == config.n_layers*(c + 4*n + 4*r)


@pytest.mark.parametrize('config', [GQA, MLA, replace(GQA, head_dim=64), replace(MLA, kv_lora_rank=512, qk_rope_head_dim=64)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_bytes_are_the_formula(config, dtype, form):
    one = quantized_bytes(form, config, dtype.itemsize)
    cache = Cache(config, 3, 10, dtype, codec=form)
    assert cache.nbytes == sum(x.nbytes for s in cache.slots for x in s.tensors) == 3*10*one
    assert f'3×0 of 10 positions, {30*one:,} bytes, {form.name}' in repr(cache)
    pool = PagePool(config, 5, 4, dtype, codec=form)
    assert pool.nbytes == 5*4*one == sum(x.nbytes for layer in pool.layers for x in layer) and pool.page_bytes == 4*one
    small = PagePool.sized(config, pool.nbytes - 1, 4, dtype, codec=form)
    assert small.pages == 4 and small.codec == form
    with pytest.raises(ValueError, match='is smaller than one page'): PagePool.sized(config, 10, codec=form)


def test_memory_is_bounded(model, form):
    cache = quantised(model, form, 1, 96)
    held = cache.nbytes
    model(torch.ones(1, 96, dtype=torch.long), cache)
    assert cache.nbytes == held and cache.capacity == 96
    with pytest.raises(ValueError, match='context of 97 tokens is longer than max_positions 96'):
        model(torch.ones(1, 1, dtype=torch.long), cache)
    assert len(cache) == 96


# ---- a definition that rounds what a plain cache holds

class Rounded(Cache):
    "A plain cache that is given rounded tensors."
    def __init__(self, model, form, batch):
        super().__init__(model.config, batch, 0, model.dtype)
        self.form,self.slots = form,[RoundedSlot(self, s.tensors) for s in self.slots]


class RoundedSlot(Slot):
    def append(self, *new):
        c,out = self.cache.c,[]
        for x in new:
            y,form,width = x.clone(),self.cache.form,c.kv_lora_rank if c.mla else c.head_dim
            step = width if form.scales == 'token' else 32
            for a,row in product(range(0, width, step), np.ndindex(*x.shape[:-1])):
                y[row][a:width][:step] = torch.from_numpy(oracle(x[row][a:width][:step].numpy(), form)[0])
            out.append(y)
        return super().append(*out)


PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]


def test_equals_the_definition(model, form):
    ids,mask = left_padded(PROMPTS)
    kw = dict(attention_mask=mask, eos_token_id=[])
    with use('reference'):
        plain,ours = Rounded(model, form, 3),quantised(model, form, 3)
        want,got = (model(ids, c, attention_mask=mask) for c in (plain, ours))
        assert torch.allclose(got, want, atol=2e-4)
        assert torch.equal(model.generate(ids, 8, past_key_values=ours, **kw), model.generate(ids, 8, past_key_values=plain, **kw))
    for slot,exact in zip(ours.slots, plain.slots, strict=True):
        back = form.decode_layer(model.config, *slot.tensors)
        for a,b in zip(back, exact.tensors, strict=True): assert torch.allclose(a[..., :14, :], b[..., :14, :], atol=2e-3, rtol=2e-3)


def test_a_padded_row_is_the_prompt_alone(model, form):
    ids,mask = left_padded(PROMPTS)
    out = model.generate(ids, 9, past_key_values=quantised(model, form, 3), attention_mask=mask, eos_token_id=[])
    for row,p in zip(out, PROMPTS, strict=True):
        alone = model.generate(torch.tensor([p]), 9, past_key_values=quantised(model, form), eos_token_id=[])
        assert torch.equal(row[-9:], alone[0, -9:])


@pytest.mark.parametrize('which', MODELS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_however_it_is_asked(which, data):
    "In pieces, with wrong guesses taken back, in pages or not: codes and logits are those of all tokens at once."
    model,form,page = MODELS[which],data.draw(st.sampled_from(FORMATS)),data.draw(st.sampled_from([1, 5, 16]))
    ids = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    paged = PagedCache(PagePool(model.config, 2*(-(-30//page)), page, codec=form), 2)
    cache = quantised(model, form, 2, data.draw(st.sampled_from([0, 3, 30])))
    while (n := len(cache)) < 30:
        s = data.draw(st.integers(1, 30 - n))
        logits = [model(ids[:, n:n+s], c) for c in (cache, paged)]
        assert torch.allclose(*logits, atol=1e-4)
        back = data.draw(st.integers(0, s - 1))
        for c in (cache, paged): c.rewind(back)
    whole = quantised(model, form, 2)
    expected = model(ids, whole)
    assert torch.allclose(logits[0][:, -1], expected[:, -1], atol=5e-2, rtol=1e-2) and len(cache) == len(paged) == 30
    assert cache.nbytes >= 60*quantized_bytes(form, model.config) == whole.nbytes


# ---- what stays exact, and how much the rest loses

def test_the_rotary_part_is_exact(form):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        z = torch.randn(2, 5, 56).to(dtype)
        stored = form.encode_layer(MLA, z)
        assert torch.equal(stored[2], z[..., 48:]) and stored[2].dtype == dtype
        back, = form.decode_layer(MLA, *stored, dtype=dtype)
        assert torch.equal(back[..., 48:], z[..., 48:]) and back.dtype == dtype and not torch.equal(back[..., :48], z[..., :48])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(dtype, form):
    for config in CONFIGS.values():
        new = [torch.randn(s).to(dtype) for s in cache_shapes(config, 2, 4)]
        cache = Cache(config, 2, 4, dtype, codec=form)
        for x,y in zip(new, cache[0].append(*new), strict=True):
            assert y.dtype == dtype and (x - y).float().norm()/x.float().norm() < .035


@pytest.mark.parametrize('which', MODELS)
@pytest.mark.parametrize('scales', [32, 'token'])
def test_logits_of_int8(which, scales):
    wide = dict(vocab_size=128, dim=64, n_layers=2, max_positions=4096)
    heads = dict(kv_lora_rank=128, qk_rope_head_dim=32) if which == 'mla' else dict(head_dim=64)
    config = replace(CONFIGS[which], **wide, **heads, n_routed_experts=0, n_shared_experts=0, n_activated_experts=0)
    torch.manual_seed(0)
    model = Model(config, torch.float32, 'cpu').init_weights(std=.08)
    ids = torch.randint(128, (1, 4096))
    with torch.inference_mode():
        exact = model(ids, model.new_cache(1, 4096), logits_to_keep=64)
        got = model(ids, model.new_cache(1, 4096, CacheFormat(scales=scales)), logits_to_keep=64)
    assert 0 < (got - exact).norm()/exact.norm() <= .01


def test_no_gradient_is_kept(form):
    torch.manual_seed(0)
    for config in CONFIGS.values():
        model = Model(config, torch.float32, 'cpu')
        cache = quantised(model, form)
        for _ in range(2): model(torch.ones(1, 3, dtype=torch.long), cache).sum().backward()
        assert not any(x.requires_grad for s in cache.slots for x in s.tensors)


# ---- pages and prefixes

def test_forks_share_codes(model, form):
    pool = PagePool(model.config, 12, 4, codec=form)
    cache,ids = PagedCache(pool),torch.tensor([[*range(10)]])
    model(ids, cache)
    new = torch.tensor([[3], [4], [5]])
    got = model(new, cache.fork([0, 0, 0]))
    for i in range(3):
        one = quantised(model, form)
        model(ids, one)
        assert torch.allclose(got[i], model(new[i:i+1], one)[0], atol=1e-4)
    assert len(pool.free) == 12 - 3


@pytest.mark.parametrize('config', [replace(MLA, kv_lora_rank=18, qk_rope_head_dim=6), replace(GQA, n_kv_heads=1, head_dim=10)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('page', [1, 3, 16])
def test_pages_of_any_size_come_back_to_the_bit(config, dtype, page, form):
    "Scales begin where codes end, on disk also at addresses that no float32 may have."
    pool = PagePool(config, 2, page, dtype, codec=form)
    bits = [x.view(torch.uint8) for layer in pool.layers for x in layer]
    for x in bits: x.random_(256)
    first = [x[0].clone() for x in bits]
    from_bytes(pool.parts(1), to_bytes(pool.parts(0)))
    assert all(torch.equal(x[0], a) and torch.equal(x[1], a) for x,a in zip(bits, first, strict=True))


def test_a_prefix_cache_of_codes(model, form, tmp_path):
    pool = lambda f=form: PagePool(model.config, 30, 4, codec=f)
    prefix,prompt = PrefixCache(model, pool=pool(), folder=tmp_path),[*range(1, 23)]
    kw = dict(max_new_tokens=6, eos_token_id=[])
    out,usage = prefix.generate(prompt, **kw)
    assert usage.prompt_cache_hit_tokens == 0
    assert torch.equal(out, model.generate(torch.tensor([prompt]), 6, past_key_values=quantised(model, form), eos_token_id=[]))
    again,usage = prefix.generate(prompt, **kw)
    assert usage.prompt_cache_hit_tokens == 20
    assert torch.equal(again, out), 'what was found is what was computed'
    later = PrefixCache(model, pool=pool(), folder=tmp_path)
    restarted,usage = later.generate(prompt, **kw)
    assert usage.prompt_cache_hit_tokens == 20 and torch.equal(restarted, again)
    for other in [f for f in FORMATS if f != form]: assert PrefixCache(model, pool=pool(other), folder=tmp_path).lookup(prompt) == 0
    assert PrefixCache(model, 10**6, page=4, folder=tmp_path).lookup(prompt) == 0


# ---- errors

def test_another_model_or_batch(model, form):
    other = MODELS['gqa' if model is MODELS['mla'] else 'mla']
    ids = torch.ones(1, 3, dtype=torch.long)
    wide = replace(model.config, **dict(kv_lora_rank=64) if model.config.mla else dict(n_kv_heads=1))
    flat = made(replace(model.config, n_layers=1))
    for bad,said in ((quantised(other, form), 'make a cache for this model and batch'),
                     (quantised(made(wide), form), 'make a cache for this model and batch'),
                     (quantised(model, form, 2), 'cache has 2 rows, tokens have 1; make a new cache for this batch'),
                     (quantised(flat, form), 'make (a cache|one) for this model'),
                     (Cache(model.config, 1, 0, torch.bfloat16, codec=CacheFormat()), 'cache is torch.bfloat16, .* torch.float32; make')):
        with pytest.raises(ValueError, match=said) as e: model.generate(ids, 2, past_key_values=bad)
        assert '\n' not in str(e.value) and len(bad) == 0
    cache = quantised(model, form)
    with pytest.raises(ValueError, match='cannot rewind 1 tokens of a cache that holds 0'): cache.rewind(1)
    with pytest.raises(ValueError, match='must be a cache of this model with one row'):
        PrefixCache(model, page=4, nbytes=10**6).keep([1, 2, 3, 4, 5], cache)


def test_a_full_pool_of_codes(model, form):
    pool = PagePool(model.config, 3, 4, codec=form)
    cache = PagedCache(pool)
    with pytest.raises(ValueError, match='all 3 pages of 4 positions are in use'):
        model.generate(torch.ones(1, 9, dtype=torch.long), 8, cache=cache, eos_token_id=[])
    assert len(cache) == 12 and isinstance(pool, PagePool)


# ---- a plain cache of another model: the kernels write where it lies, so it is looked at before anything runs

def others(c):
    "Configs whose caches don't fit a model's, by what is different."
    other = MODELS['gqa' if c.mla else 'mla'].config
    sizes = [dict(kv_lora_rank=n) for n in (16, 64)] if c.mla else [dict(n_kv_heads=n) for n in (1, 4)] + [dict(head_dim=8)]
    return [other, replace(c, n_layers=1), replace(c, n_layers=3), *(replace(c, **s) for s in sizes)]


@pytest.mark.parametrize('how', ['auto', 'reference'])
def test_a_plain_cache_of_another_model(model, how):
    ids = torch.ones(1, 3, dtype=torch.long)
    with use(how):
        for bad in (*(Cache(c) for c in others(model.config)), Cache(model.config, 1, 0, torch.bfloat16), Cache(model.config, 2)):
            with pytest.raises(ValueError, match='make a new cache for this batch|make a cache for this model and batch') as e:
                model.generate(ids, 2, past_key_values=bad)
            assert '\n' not in str(e.value) and len(bad) == 0


@pytest.mark.parametrize('kind', ['paged', 'int8', 'paged int8'])
def test_a_compiled_model_takes_any_cache(kind, model):
    make = {'paged': lambda: PagedCache(PagePool(model.config, 10, 4)), 'int8': lambda: model.new_cache(codec=CacheFormat()),
            'paged int8': lambda: PagedCache(PagePool(model.config, 10, 4, codec=CacheFormat()))}[kind]
    ids,compiled = torch.tensor([[1, 2, 3, 4]]),made(model.config).compile('eager')
    got,want = (m.generate(ids, 6, past_key_values=make(), eos_token_id=[]) for m in (compiled, model))
    assert torch.equal(got, want)


# ---- V4

def rounded(model, form, *args):
    "V4's plain cache, whose entries are rounded when they are stored"
    cache, r = model.new_cache(*args), model.config.qk_rope_head_dim
    cache.codec = type('Named', (Codec,), dict(name='rounded'))() # so that the readable code runs
    for entries in (s.compressor for s in cache.slots if s.compressor):
        def put(x, first, old=entries.put): old(torch.cat([form.decode(*form.encode(x[..., :-r])), x[..., -r:]], -1), first)
        entries.put = put
    return cache


def test_entries_of_v4(form):
    "Bytes by the formula; chunks, rewinds and padding as a plain cache with rounded entries, to the bit; the error is that of a code"
    print(f'test_quant_cache SEED={SEED}')
    r = random.Random(f'{SEED} {name(form)}')
    ratios = r.sample((0, 4, 8), 3)
    c = replace(preset('deepseek-v4-flash'), vocab_size=32, dim=32, n_layers=3, n_heads=2, inter_dim=16, head_dim=r.choice((12, 44)),
                q_lora_rank=8, qk_rope_head_dim=4, window=r.choice((3, 9)), compress_ratios=tuple(ratios), o_groups=2, o_lora_rank=8,
                index_n_heads=4, index_head_dim=8, index_topk=3, hc_mult=2, hc_iters=2, n_hash_layers=1, n_routed_experts=4,
                n_activated_experts=2, moe_inter_dim=8, max_positions=128)
    model, ids, mask = made(c, SEED), torch.randint(32, (2, 60)), torch.ones(2, 60, dtype=torch.long)
    mask[1, :r.randrange(20)] = 0
    ours, oracle, plain = quantised(model, form, 2, 60), rounded(model, form, 2, 60), model.new_cache(2, 60)
    assert ours.nbytes == quantized_window_bytes(form, c, 60, 2, 4) and plain.nbytes == rewindable_bytes(c, 60, 2, 4)
    cuts = [0, *sorted(r.sample(range(28, 60), 3)), 60] # at least one entry behind the padding
    for start, end in zip(cuts, cuts[1:], strict=False):
        kw = {} if start else dict(attention_mask=mask[:, :end])
        assert model(ids[:, start:end], ours, **kw).equal(model(ids[:, start:end], oracle, **kw)), (SEED, c)
        for cache in (ours, oracle): cache.rewind(back := min(4, end - start - 1))
        if back: assert model(ids[:, end - back:end], ours).equal(model(ids[:, end - back:end], oracle))
    model(ids[:, :cuts[1]], plain, attention_mask=mask[:, :cuts[1]])
    first, at = min(map(ratios.index, (4, 8))), c.head_dim - c.qk_rope_head_dim
    n = (cuts[1] - int((mask == 0).sum()))//ratios[first]
    a, b = (cache.slots[first].compressor.entries[:, :n] for cache in (plain, ours))
    assert torch.allclose(a[..., at:], b[..., at:], atol=1e-5*a.abs().max())
    assert (a[..., :at] - b[..., :at]).abs().max() <= a.abs().max()*(.004 if form.name == 'int8' else .04)

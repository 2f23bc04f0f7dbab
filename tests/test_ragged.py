"Ragged batches: each row has the bits that it has alone, whatever the company, pages, chunks, threads and instruction set."
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import warm

from deepseek_nb.arch.model import Model, head
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer.paged import PagedCache, PagePool, PoolFull
from deepseek_nb.infer.quant_cache import CacheFormat
from deepseek_nb.infer.ragged import run_rows
from deepseek_nb.kernels import attention, invariant, ragged
from deepseek_nb.kernels.plan import plan_of, step_kernels
from deepseek_nb.quant import quantize, relative_error, replace_parameter
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8

needs_compiler = pytest.mark.skipif(not step_kernels('PAGES').ready(), reason='no C++ compiler')
SEED = int(os.environ.get('SEED', random.randrange(10**6)))

MLA = Config('deepseek_v3', vocab_size=64, dim=80, n_layers=2, n_heads=3, inter_dim=96, q_lora_rank=40, kv_lora_rank=56,
             qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=32, n_dense_layers=1, n_routed_experts=6, n_shared_experts=1,
             n_activated_experts=2, moe_inter_dim=48, score_func='sigmoid', score_bias=True, norm_topk=True, max_positions=1024,
             rope=Rope(interleaved=True))
GQA = Config('qwen2', vocab_size=64, dim=72, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=20, inter_dim=104, attn_bias=True,
             max_positions=1024)
CONFIGS = dict(mla=MLA, direct=replace(MLA, q_lora_rank=0, n_shared_experts=0, n_heads=9), gqa=GQA,
               wide=replace(GQA, n_heads=8, n_kv_heads=1, head_dim=64, attn_bias=False))
FORMATS = dict(float32=None, bfloat16=None, int8=Int8(), int8g=Int8(group=64), int4=Int4(), sym64=Int4(64, symmetric=True))


def made(c, f):
    "A small model with random biases, in a format"
    torch.manual_seed(1)
    model = Model(CONFIGS[c], torch.float32, 'cpu').init_weights(.1).requires_grad_(False)
    for name,m in [*model.layers.named_modules()]:
        for p,w in [*m.named_parameters(recurse=False)]:
            if p.endswith('bias'): w.normal_()
            if FORMATS[f] and w.ndim > 1 and not name.endswith('mlp.gate'): replace_parameter(m, p, quantize(w, FORMATS[f]))
    return model.bfloat16() if f == 'bfloat16' else model


def twin(model, kind=PagePool):
    "The twin of `run_rows` that a step of this model takes"
    with torch.inference_mode():
        cache = PagedCache(kind(model.config, 2, dtype=model.dtype))
        x = model.embed_tokens(torch.tensor([1]))
        return run_rows.op.choose(x, model.layers, ragged.Rows((), cache=[cache], counts=[1])).name


@torch.inference_mode()
def alone(model, text, page=64, chunk=10**9, kind=PagePool, told=0):
    "Hidden states of one text, whose first `told` tokens are its prompt, in calls of `chunk` tokens"
    with PagedCache(kind(model.config, -(-len(text)//page) + 1, page, dtype=model.dtype)) as cache:
        return torch.cat([model.ragged(part, [cache], [len(part)], prompts=[known(told, cache, part)])
                          for part in text.split(min(chunk, len(text)))])


def known(told, cache, part):
    "How many of the next tokens of a row are part of its prompt"
    return min(len(part), max(0, told - len(cache)))


@torch.inference_mode()
def in_company(model, texts, r, page, kind=PagePool, told=None):
    "Rows join, bring chunks, are thrown out and start again, in any order; their hidden states"
    pool = kind(model.config, sum(-(-len(t)//page) for t in texts) + 2, page, dtype=model.dtype)
    caches,found = [PagedCache(pool) for _ in texts],[torch.full((len(t), model.config.dim), torch.nan, dtype=model.dtype) for t in texts]
    while left := [i for i,t in enumerate(texts) if len(caches[i]) < len(t)]:
        rows = r.sample(left, r.randint(1, len(left)))
        new = [texts[i][len(caches[i]):][:r.choice([1, 1, 1, 3, 16, 40, 300])] for i in rows]
        prompts = told and [known(told[i], caches[i], n) for i,n in zip(rows, new, strict=True)]
        hidden = model.ragged(torch.cat(new), [caches[i] for i in rows], [*map(len, new)], prompts=prompts)
        for i,n,h in zip(rows, new, hidden.split([*map(len, new)]), strict=True): found[i][len(caches[i]) - len(n):len(caches[i])] = h
        if r.random() < .1: caches[i := r.randrange(len(texts))].rewind(r.randint(0, len(caches[i])))
    for cache in caches: cache.free()
    assert len(pool.free) == pool.pages
    return found


def same(model, r, most=330, kind=PagePool):
    "One random mix of rows"
    texts = [torch.randint(64, (r.choice([1, 2, 5, 17, 63, 64, 65, r.randint(1, most)]),)) for _ in range(r.randint(1, 5))]
    threads = torch.get_num_threads()
    torch.set_num_threads(r.randint(1, 3))
    told = [r.choice([0, len(t), r.randint(0, len(t))]) for t in texts]
    found = in_company(model, texts, r, r.choice([1, 7, 16, 64, 128]), kind, told)
    for t,h,k in zip(texts, found, told, strict=True):
        torch.set_num_threads(r.randint(1, 3))
        one = alone(model, t, r.choice([16, 64]), r.choice([1, 29, 10**9]) if len(t) < 70 else r.choice([100, 10**9]), kind, k)
        assert one.isfinite().all() and torch.equal(one, h), f'{[*map(len, texts)]}, row of {len(t)}, seed {SEED}'
    torch.set_num_threads(threads)


def sweep(rounds, kinds=None):
    "Random mixes for every model and format; the instruction sets and the sanitizers call it too"
    r = random.Random(SEED)
    torch.manual_seed(SEED)
    for c in CONFIGS:
        for f in kinds or FORMATS:
            model = made(c, f)
            assert twin(model) == 'cpp/cpu', (c, f)
            for _ in range(rounds): same(model, r)


@needs_compiler
@pytest.mark.parametrize('f', FORMATS)
@pytest.mark.parametrize('c', CONFIGS)
def test_bits_are_those_of_a_row_alone(c, f):
    r = random.Random(f'{SEED} {c} {f}')
    torch.manual_seed(SEED)
    model = made(c, f)
    for _ in range(3): same(model, r)


@needs_compiler
@pytest.mark.parametrize('c', CONFIGS)
def test_bits_are_those_of_a_row_alone_with_a_quantised_cache(c):
    r = random.Random(f'{SEED} {c} cache')
    torch.manual_seed(SEED)
    for f in ('float32', 'bfloat16', 'int8') if c in ('mla', 'gqa') else r.sample(['float32', 'int4'], 1):
        model,kind = made(c, f),partial(PagePool, codec=CacheFormat(scales=r.choice([32, 'token'])))
        assert twin(model, kind) == 'cpp/cpu', f
        assert twin(model, partial(PagePool, codec=CacheFormat('fp8'))) == 'reference'
        same(model, r, kind=kind)


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize('c', ['mla', 'gqa'])
def test_a_quantised_cache_is_that_of_the_definition(c):
    "Codes and scales that the kernel wrote, and its hidden states"
    torch.manual_seed(SEED)
    model,text = made(c, 'float32'),torch.randint(64, (150,))
    def written():
        pool = PagePool(CONFIGS[c], 3, 64, codec=CacheFormat())
        return model.ragged(text, [PagedCache(pool)], [150]), pool.layers[0]
    got,pages = written()
    with use('reference'): want,exact = written()
    assert relative_error(want, got) < 5e-3
    for a,b in zip(pages, exact, strict=True):
        if a.dtype == torch.int8: assert (a.int() - b.int()).abs().max() <= 1 and (a != b).float().mean() < .01
        else: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_compiler
@torch.inference_mode()
def test_nan_and_unused_slots_of_a_quantised_cache():
    "NaN in a token stays in its row, and what stands in unused slots reaches nobody"
    for c in ('mla', 'gqa'):
        model = made(c, 'float32')
        model.embed_tokens.weight[63] = torch.nan
        pool,texts = PagePool(CONFIGS[c], 8, 64, codec=CacheFormat()),(torch.arange(50), torch.tensor([1, 2, 63, 4, 5]))
        for layer in pool.layers:
            for x in layer: x.fill_(torch.nan if x.is_floating_point() else 77)
        sick = model.ragged(torch.cat(texts), [PagedCache(pool), PagedCache(pool)], [50, 5])
        assert torch.equal(sick[:50], alone(model, texts[0], kind=partial(PagePool, codec=CacheFormat())))
        assert sick[52:].isnan().all() and sick[:50].isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize('c', CONFIGS)
def test_close_to_a_contiguous_cache_in_float64(c):
    torch.manual_seed(SEED)
    model,text = made(c, 'float32'),torch.randint(64, (330,))
    exact = Model(CONFIGS[c], dtype=torch.float64, device='cpu')
    exact.load_state_dict(model.state_dict())
    with use('reference'): want = exact.hidden(text[None], cache=exact.new_cache())[0]
    got = in_company(model, [text, text[:70]], random.Random(SEED), 16)
    for h in got:
        error = ((h - want[:len(h)]).abs().max()/want.abs().max()).item()
        assert error < 1e-4, f'{error:.1e}, seed {SEED}'


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize('f', ['int8', 'int4'])
@pytest.mark.parametrize('c', CONFIGS)
def test_codes_are_close_to_products_one_at_a_time(c, f):
    torch.manual_seed(SEED)
    model,text = made(c, f),torch.randint(64, (90,))
    got = alone(model, text)
    for m in model.layers.modules(): m.register_forward_hook(lambda *ignored: None)
    with torch.no_grad(): assert not plan_of(model.layers, torch.zeros(1, 1, model.config.dim))
    assert relative_error(alone(model, text), got) < (.02 if 'gqa' in c or c == 'wide' else .06)


@needs_compiler
@torch.inference_mode()
def test_long_rows_have_parts():
    "Keys in several chunks, of which some queries of a block see fewer than others"
    torch.manual_seed(SEED)
    for c in ('mla', 'gqa'):
        model,text = made(c, 'float32'),torch.randint(64, (700,))
        want = alone(model, text)
        for chunk in (256, 257, 511): assert torch.equal(alone(model, text, 64, chunk), want), (c, chunk)
        model.ragged(text, caches := [PagedCache(PagePool(model.config, 20, 64))], [700])
        for n in (1, 200, 499):
            caches[0].rewind(n)
            assert torch.equal(model.ragged(text[700 - n:], caches, [n]), want[700 - n:])


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize('f', FORMATS)
def test_logits_too(f):
    model,x = made('mla', f),torch.randn(70, 80).to(torch.bfloat16 if f == 'bfloat16' else torch.float32)
    w = quantize(model.embed_tokens.weight, FORMATS[f]) if FORMATS[f] else model.head_weight
    want = head(x, w)
    for rows in ([0], [3, 4], [*range(30)], [*range(69, -1, -1)]): assert torch.equal(head(x[rows], w), want[rows])


@needs_compiler
@torch.inference_mode()
def test_nan_stays_in_its_row():
    for f in ('float32', 'int8'):
        model = made('gqa', f)
        model.embed_tokens.weight[63] = torch.nan
        pool = PagePool(GQA, 8, 64)
        texts = torch.arange(50), torch.tensor([1, 2, 63, 4, 5])
        sick = model.ragged(torch.cat(texts), [PagedCache(pool), PagedCache(pool)], [50, 5])
        assert torch.equal(sick[:50], alone(model, texts[0]))
        assert sick[52:].isnan().all() and sick[:50].isfinite().all()


@torch.inference_mode()
def test_shared_pages():
    "Two rows continue one prefix, and each gets what it gets without sharing"
    model,prefix = made('gqa', 'float32'),torch.arange(40)
    pool = PagePool(GQA, 30, 16)
    first = PagedCache(pool)
    model.ragged(prefix, [first], [40])
    second = first.fork([0])
    found = model.ragged(torch.tensor([1, 2, 3, 4, 5]), [first, second], [3, 2])
    assert torch.equal(found[:3], alone(model, torch.cat([prefix, torch.tensor([1, 2, 3])]))[40:])
    assert torch.equal(found[3:], alone(model, torch.cat([prefix, torch.tensor([4, 5])]))[40:])
    assert first.tables[0][:2] == second.tables[0][:2] and first.tables[0][2] != second.tables[0][2]


@torch.inference_mode()
def test_a_full_pool_changes_nothing():
    model = made('gqa', 'float32')
    pool = PagePool(GQA, 6, 16)
    caches = [PagedCache(pool) for _ in range(2)]
    model.ragged(torch.arange(40), caches, [20, 20])
    tables,free = [[*c.tables[0]] for c in caches],[*pool.free]
    with pytest.raises(PoolFull, match='the step takes 4 pages, and 2 of 6 are free'): model.ragged(torch.arange(60), caches, [30, 30])
    assert (tables, free) == ([[*c.tables[0]] for c in caches], pool.free) and [len(c) for c in caches] == [20, 20]
    model.ragged(torch.arange(24), caches, [12, 12])


@torch.inference_mode()
def test_an_error_in_the_middle_changes_nothing():
    model = made('gqa', 'float32')
    pool = PagePool(GQA, 6, 16)
    caches = [PagedCache(pool) for _ in range(2)]
    model.ragged(torch.arange(40), caches, [20, 20])
    def fail(*ignored): raise RuntimeError('stop')
    hook = model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match='stop'): model.ragged(torch.arange(30), caches, [15, 15])
    hook.remove()
    assert [len(c) for c in caches] == [20, 20] and len(pool.free) == 2


def test_a_prefix_cache_is_asked_for_pages():
    model = made('gqa', 'float32')
    pool = PagePool(GQA, 6, 16)
    old = PagedCache(pool)
    old.reserve(64)
    old.advance(64)
    pool.on_full = old.free
    with torch.inference_mode(): model.ragged(torch.arange(60), [cache := PagedCache(pool)], [60])
    assert len(cache) == 60 and len(old) == 0


def test_bad_rows_are_named():
    model = made('gqa', 'float32')
    pool = PagePool(GQA, 8, 16)
    one,two = PagedCache(pool),PagedCache(pool)
    wrong = {
        'counts [2, 2] add up to 4, but there are 5 tokens': (torch.arange(5), [one, two], [2, 2]),
        '2 caches and 1 counts': (torch.arange(5), [one, two], [5]),
        'every row must bring at least one token': (torch.arange(5), [one, two], [5, 0]),
        'two rows have the same cache': (torch.arange(5), [one, one], [3, 2]),
        'row 1 has another pool than row 0': (torch.arange(5), [one, PagedCache(PagePool(GQA, 8, 16))], [3, 2]),
        'row 0 has a cache of 2 rows': (torch.arange(5), [PagedCache(pool, 2)], [5]),
        'row 0 has a Cache': (torch.arange(5), [model.new_cache()], [5]),
        'token id 64 is outside the vocabulary of 64': (torch.tensor([64]), [one], [1]),
        'tokens have shape (1, 5)': (torch.arange(5)[None], [one], [5]),
        'context of 2000 tokens is longer than max_positions 1024': (torch.zeros(2000, dtype=torch.long), [one], [2000]),
        'cache holds': (torch.arange(5), [PagedCache(PagePool(MLA, 8, 16))], [5])}
    for message,args in wrong.items():
        with pytest.raises(ValueError) as e: model.ragged(*args)
        assert message in str(e.value), e.value
    assert len(pool.free) == 8 and len(one) == len(two) == 0


def run(code, **env):
    path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    env = dict(os.environ, OMP_NUM_THREADS='2', PYTHONPATH=path, SEED=str(SEED)) | env
    if 'LD_PRELOAD' not in env: return warm.run('-c', code, env=env)
    return subprocess.run([sys.executable, '-c', warm.ALONE + code], env=env, capture_output=True, text=True)


@pytest.mark.draw(1, group='instruction sets')
@needs_compiler
def test_narrower_instruction_sets(isa):
    done = run('import test_ragged as t; t.sweep(1)', **warm.built_for(isa))
    if 'it may be' in done.stderr: pytest.skip(f'no {isa} on this processor')
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.draw(1, group='sanitizers')
@needs_compiler
def test_clean_under_sanitizers():
    if not (under := warm.sanitized()): pytest.skip('this compiler has no AddressSanitizer')
    done = run('import test_ragged as t; t.sweep(1, ["float32", "int4"])', **under)
    assert done.returncode == 0, done.stderr[-3000:]


def test_kernels_refuse_what_they_cannot_read():
    with pytest.raises(ValueError, match='k is float32 of shape'):
        attention.attend_pages(torch.randn(2, 3, 8), torch.randn(4, 3, 16, 9), torch.randn(4, 3, 16, 8), *[torch.zeros(1).long()]*3, .1)
    with pytest.raises(ValueError, match='x is float32 of shape'): invariant.linear_invariant(torch.randn(2, 3), torch.randn(4, 5))

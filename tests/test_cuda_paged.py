"""Paged attention in CUDA, emulated: a ragged batch against float64, each row alone and in company, and a barrier less"""
import os
import random
import shutil
from unittest import mock

import pytest
import torch

from deepseek_nb.arch.attention import attend
from deepseek_nb.arch.model import Model
from deepseek_nb.arch.releases import preset
from deepseek_nb.core import nbproc
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.cuda import build as cuda
from deepseek_nb.cuda import paged
from deepseek_nb.cuda.build import SHARED_LIMITS, resources
from deepseek_nb.cuda.emulation import ORDERS, thread_order
from deepseek_nb.cuda.paged import attend_pages_cuda, page_tile, plan_pages, write_pages_cuda
from deepseek_nb.infer.paged import PagedCache, PagePool
from deepseek_nb.infer.ragged import Rows
from deepseek_nb.quant import relative_error

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler to emulate with')
NVCC = shutil.which('nvcc', path=os.environ.get('PATH', '') + ':/usr/local/cuda/bin')
SEED = int(os.environ.get('SEED', random.randrange(10**6)))
GQA = Config('llama', vocab_size=256, dim=128, n_layers=1, n_heads=8, inter_dim=96, n_kv_heads=2, head_dim=64, max_positions=1024)
MLA = Config('deepseek_v3', vocab_size=256, dim=128, n_layers=1, n_heads=8, inter_dim=96, q_lora_rank=48, kv_lora_rank=128,
             qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, max_positions=1024, rope=Rope(interleaved=True))
CONFIGS = dict(gqa=GQA, mla=MLA)


def batch_of(c, past, counts, page):
    "Rows whose pages are in random order and are NaN where nothing was written; queries and all written positions in float64"
    pool = PagePool(c, sum(-(-(t + n)//page) for t,n in zip(past, counts, strict=True)) + 3, page, torch.bfloat16)
    random.Random(SEED).shuffle(pool.free)
    for x in pool.layers[0]: x.fill_(torch.nan)
    caches,tile,exact = [PagedCache(pool) for _ in past],page_tile(c),[]
    shape = lambda x: (*x.shape[1:-2], x.shape[-1])
    for counted in (past, counts):
        rows = [i for i,n in enumerate(counted) if n]
        for i in rows: caches[i].reserve(counted[i])
        new = [torch.randn(sum(counted), *shape(x)).bfloat16() for x in pool.layers[0]]
        plan = plan_pages(Rows((), cache=[caches[i] for i in rows], counts=[counted[i] for i in rows]), tile.heads, tile.rows, 'cpu')
        for x,pages in zip(new, pool.layers[0], strict=True): write_pages_cuda(x, pages, plan)
        exact.append([x.double().split(list(counted)) for x in new])
        if counted is past:
            for i in rows: caches[i].advance(past[i])
    rows = [[torch.cat(parts) for parts in zip(*(e[j] for e in exact), strict=True)] for j in range(len(pool.layers[0]))]
    return caches,torch.randn(sum(counts), c.n_heads, tile.latent + tile.rotary).bfloat16(),rows


def attended(c, caches, counts, q, tile=None):
    tile = tile or page_tile(c)
    plan = plan_pages(Rows((), cache=caches, counts=counts), tile.heads, tile.rows, 'cpu', split=128)
    return attend_pages_cuda(q, caches[0].pool.layers[0], plan, tile, .2, split=128)


def by_definition(c, q, k, v):
    k,v = (k[:, None], v[:, None, :c.kv_lora_rank]) if c.mla else (k, v)
    q,k,v = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    return attend.op.reference(q, k, v, .2, causal=True)[0].transpose(0, 1)


@pytest.mark.parametrize('c', CONFIGS)
@pytest.mark.parametrize('order', ['backward', 'random'])
def test_ragged_batch(c, order):
    "Lengths at the borders of pages, tiles and parts"
    c,r = CONFIGS[c],random.Random(f'{SEED} {c} {order}')
    torch.manual_seed(SEED)
    past,counts = r.sample([0, 1, 63, 64, 127, 128, 129, 255, 256, 300], 4),[1, *r.sample([1, 2, 3, 5, 9, 17], 3)]
    caches,q,rows = batch_of(c, past, counts, r.choice([16, 64]))
    with thread_order(order, SEED): y = attended(c, caches, counts, q)
    for i,(a,b) in enumerate(zip(y.split(counts), q.split(counts), strict=True)):
        exact = by_definition(c, b, rows[0][i], rows[-1][i])
        assert a.isfinite().all() and relative_error(exact, a.double()) < .006, f'{past} {counts} seed {SEED}'
        assert torch.equal(attended(c, [caches[i]], [counts[i]], b), a), f'row {i} of {past} {counts} seed {SEED}'
        if counts[i] > 2: # the same in two calls
            first = attended(c, [caches[i]], [2], b[:2])
            caches[i].advance(2)
            assert torch.equal(torch.cat([first, attended(c, [caches[i]], [counts[i] - 2], b[2:])]), a)
            caches[i].length -= 2


@pytest.mark.parametrize('arch', SHARED_LIMITS)
def test_every_card_runs_latents(arch):
    "V3's latents have a tile on each card of the table, and it fits; refusals give their reason"
    for name in ('deepseek-v3', 'deepseek-v2-lite', 'r1-distill-llama-8b'):
        tile = page_tile(preset(name), SHARED_LIMITS[arch])
        assert tile.shared <= SHARED_LIMITS[arch] and tile.keys in (32, 64), f'{name} {arch}'
    with pytest.raises(ValueError, match='bytes of shared memory exceed 50000'): page_tile(preset('deepseek-v3'), 50000)


def test_tiles_of_32_keys_and_the_reason_of_a_refusal(monkeypatch):
    "What a card with less shared memory runs is as right; a card without a tile says why PyTorch runs, once"
    torch.manual_seed(SEED)
    for c in CONFIGS.values():
        caches,q,rows = batch_of(c, [70, 300], [2, 1], 16)
        tile = page_tile(c)._replace(keys=32)
        y = attended(c, caches, [2, 1], q, tile)
        for i,(a,b) in enumerate(zip(y.split([2, 1]), q.split([2, 1]), strict=True)):
            assert relative_error(by_definition(c, b, rows[0][i], rows[-1][i]), a.double()) < .006, f'seed {SEED}'
    monkeypatch.setattr(paged, 'gpu_limits', lambda device: (4, 10000))
    batch = Rows((), cache=caches, counts=[2, 1])
    model = Model(MLA).bfloat16().eval()
    paged._refused.cache_clear()
    with torch.no_grad(), pytest.warns(UserWarning, match='shared memory exceed 10000; PyTorch runs instead'):
        assert not paged.pages_supported(torch.zeros(3, 128).bfloat16(), model.layers, batch)


def decoded(model, caches, tokens):
    "One decode step of some rows, by the twin; the caches advance"
    counts = [1]*len(caches)
    for cache in caches: cache.reserve(1)
    x = model.embed_tokens(torch.tensor(tokens))
    y = paged.run_rows_cuda(x, model.layers, Rows.of(model, torch.zeros(sum(counts)).long(), caches, counts))
    for cache in caches: cache.advance(1)
    return y


@pytest.mark.parametrize('c', CONFIGS)
def test_a_recorded_step(c, monkeypatch):
    "A stand-in for CUDA graphs runs the recorded function on its own memory: the same bits as without, and one graph while the cache grows"
    torch.manual_seed(SEED)
    model,graphs = Model(CONFIGS[c]).bfloat16().eval().requires_grad_(False),[]

    def record(step):
        out = step()
        graphs.append(step)
        return lambda: out.copy_(step()),out

    def steps(pool):
        caches = [PagedCache(pool) for _ in range(3)]
        return [decoded(model, caches[:n], [5, 6 + i, 7][:n]) for i,n in enumerate((3, 3, 3, 3, 2, 2, 3))]

    want = steps(PagePool(CONFIGS[c], 20, 16, torch.bfloat16))
    monkeypatch.setattr(paged, 'record_graph', record)
    monkeypatch.setattr(paged, '_records', lambda x: True)
    got = steps(pool := PagePool(CONFIGS[c], 20, 16, torch.bfloat16))
    assert len(graphs) == 2 and all(map(torch.equal, got, want)), f'seed {SEED}'
    model.layers[0].self_attn.o_proj.weight = torch.nn.Parameter(model.layers[0].self_attn.o_proj.weight*2, requires_grad=False)
    assert not torch.equal(steps(pool)[0], want[0]) and len(graphs) == 4, 'a graph read weights that were replaced'
    paged._refused.cache_clear()
    monkeypatch.setattr(paged, 'record_graph', lambda step: (lambda: None, step()*2))
    with pytest.warns(UserWarning, match='no CUDA graph of the decode step: its results differ'):
        wrong = steps(PagePool(CONFIGS[c], 20, 16, torch.bfloat16))
    monkeypatch.setattr(paged, '_records', lambda x: False)
    assert all(map(torch.equal, wrong, steps(PagePool(CONFIGS[c], 20, 16, torch.bfloat16))))


def test_launches_of_bounded_memory(monkeypatch):
    torch.manual_seed(SEED)
    caches,q,_ = batch_of(GQA, [300, 10], [3, 20], 64)
    y,launched = attended(GQA, caches, [3, 20], q),[]
    monkeypatch.setattr(paged, 'PARTIAL', 1)
    monkeypatch.setattr(paged, 'launch', lambda name, kernel, *a, **k: launched.append(kernel) or cuda.launch(name, kernel, *a, **k))
    assert torch.equal(attended(GQA, caches, [3, 20], q), y) and launched.count('attend_pages') == 1 + 5


def test_nan_stays_in_its_row():
    torch.manual_seed(SEED)
    caches,q,_ = batch_of(MLA, [70, 130], [1, 2], 64)
    y = attended(MLA, caches, [1, 2], q)
    caches[0].pool.layers[0][0][caches[0].tables[0][0], 5] = torch.nan
    sick = attended(MLA, caches, [1, 2], q)
    assert sick[0].isnan().all() and torch.equal(sick[1:], y[1:])


def test_missing_barrier():
    torch.manual_seed(SEED)
    caches,q,_ = batch_of(GQA, [250], [1], 64)
    y,text,line = attended(GQA, caches, [1], q),nbproc.source_text('attend.cuh'),'        wait_copies();\n        __syncthreads();\n'
    assert text.count(line) == 1
    with mock.patch.dict(nbproc._session, {'attend.cuh': {0: text.replace(line, line.splitlines()[0] + '\n')}}):
        wrong = []
        for order in ORDERS:
            with thread_order(order, 1): wrong.append(not torch.equal(attended(GQA, caches, [1], q), y))
    assert any(wrong)


@pytest.mark.skipif(not NVCC, reason='nvcc is not installed')
@pytest.mark.parametrize('sizes', [dict(HEADS=128, ROWS=64, LATENT=512, ROTARY=64), dict(HEADS=4, ROWS=16, LATENT=128, ROTARY=0)], ids=str)
def test_nvcc_compiles_without_spills(sizes, monkeypatch):
    monkeypatch.setattr(cuda, 'find_nvrtc', lambda: None)
    found = resources('attend_pages.cu', ('sm_90a',), KEYS=64, **sizes)
    assert len(found) == 3
    for registers,_,stack,spilled in found.values(): assert 0 < registers <= 255 and stack == spilled == 0

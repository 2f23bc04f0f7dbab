"Sparse attention in CUDA, emulated: ragged selections against float64, ties, thread orders, a barrier less, and nvcc"
import math
import os
import random
import shutil
from unittest import mock

import pytest
import torch

from deepseek_nb.arch import sparse as definition
from deepseek_nb.core import nbproc
from deepseek_nb.cuda import build as cuda
from deepseek_nb.cuda.build import resources
from deepseek_nb.cuda.emulation import ORDERS, thread_order
from deepseek_nb.cuda.sparse import _launch_selected, attend_selected_cuda, attend_selected_pages, index_scores_cuda, top_positions_cuda
from deepseek_nb.quant import relative_error

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler to emulate with')
NVCC = shutil.which('nvcc', path=os.environ.get('PATH', '') + ':/usr/local/cuda/bin')
SEED = int(os.environ.get('SEED', random.randrange(10**6)))


@pytest.fixture
def r():
    print(f'SEED={SEED}')
    torch.manual_seed(SEED)
    return random.Random(SEED)


def selections(r, b, s, t, a):
    "Sorted selections of unequal length"
    return definition.top_positions.op.reference(torch.randn(b, s, t), a, torch.arange(t) < torch.randint(1, t + 1, (b, s, 1)))


@pytest.mark.parametrize('order', ORDERS)
def test_attend_selected(order, r):
    "One tile and several, one part and several; alone, in a batch and in pages the same bits"
    for t,a in ((5, 3), (150, 64), (150, 65), (300, 290)):
        b,s,h = r.choice([1, 2]),r.choice([1, 2]),r.choice([1, 3, 16])
        q,z,p = torch.randn(b, h, s, 160).bfloat16(),torch.randn(b, t + 2, 160).bfloat16()[:, 1:-1],selections(r, b, s, t, a)
        exact = definition.attend_selected.op.reference(q.double(), z.double(), p, 128, .2)
        with thread_order(order, SEED):
            y,parts = attend_selected_cuda(q, z, p, 128, .2),_launch_selected(q, z, p, None, 128, .2, split=128)
            alone = attend_selected_cuda(q[-1:, :, -1:], z[-1:], p[-1:, -1:], 128, .2)
            pool = torch.zeros(-(-t//8)*b, 8, 160).bfloat16()
            pool.view(b, -1, 160)[:, :t] = z
            paged = attend_selected_pages(q, pool, torch.arange(len(pool)).view(b, -1).int(), p, 128, .2)
        for found in (y, parts): assert relative_error(exact, found.double()) < .006, f'{b=} {s=} {h=} {t=} {a=}'
        assert torch.equal(alone, y[-1:, :, -1:]) and torch.equal(paged, y)


def test_nothing_selected(r):
    q,z,p = torch.randn(1, 2, 2, 160).bfloat16(),torch.randn(1, 9, 160).bfloat16(),torch.tensor([[[1, 4, -1], [-1]*3]])
    z[0, 0] = torch.nan
    assert attend_selected_cuda(q, z, p, 128, .2).isnan().any(-1)[0, 0].tolist() == [False, True]


@pytest.mark.parametrize('order', ORDERS)
def test_index_scores(order, r):
    for j in (1, 15, 37, 64):
        b,s,t = r.choice([1, 2]),r.choice([1, 2]),r.choice([1, 63, 65, 257])
        q,k,w = torch.randn(b, s, j, 64).bfloat16(),torch.randn(b, t, 64).bfloat16(),torch.randn(b, s, j)
        exact = torch.einsum('bsjt,bsj->bst', torch.einsum('bsju,btu->bsjt', q.double(), k.double()).relu(), w.double())
        with thread_order(order, SEED): y = index_scores_cuda(q, k, w)
        assert relative_error(exact, y.double()) < 1e-6, f'{b=} {s=} {t=} {j=}'


@pytest.mark.parametrize('order', ORDERS)
def test_top_positions(order, r):
    odd = torch.tensor([0., -0., 1., -1., math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45])
    for t in (1, 64, 130):
        for scores in (torch.randn(2, t), torch.zeros(2, t), odd[torch.randint(len(odd), (2, t))]):
            a,mask = r.choice([1, t//2 + 1, t + 3]),r.choice([None, torch.rand(t) < .5, torch.rand(2, t) < .5])
            with thread_order(order, SEED): found = top_positions_cuda(scores, a, mask)
            assert torch.equal(found, definition.top_positions.op.reference(scores, a, mask)), f'{scores=} {a=} {mask=}'


def test_missing_barrier(r):
    "A tile that is read before it has arrived"
    q,z,p = torch.randn(1, 4, 1, 160).bfloat16(),torch.randn(1, 300, 160).bfloat16(),selections(r, 1, 1, 300, 250)
    file,run = 'attend.cuh',lambda: attend_selected_cuda(q, z, p, 128, .2)
    y,text,line = run(),nbproc.source_text(file),'        wait_copies();\n        __syncthreads();\n'
    assert text.count(line) == 1
    with mock.patch.dict(nbproc._session, {file: {0: text.replace(line, line.splitlines()[0] + '\n')}}):
        wrong = []
        for order in ORDERS:
            with thread_order(order, 1): wrong.append(not torch.equal(run(), y))
    assert any(wrong)


@pytest.mark.skipif(not NVCC, reason='nvcc is not installed')
@pytest.mark.parametrize('file,sizes', [('attend_selected.cu', dict(LATENT=512, ROTARY=64)),
                                        ('index_scores.cu', dict(LATENT=128, ROTARY=0))])
def test_nvcc_compiles_without_spills(file, sizes, monkeypatch):
    monkeypatch.setattr(cuda, 'find_nvrtc', lambda: None)
    for registers,_,stack,spilled in resources(file, ('sm_90a',), ROWS=64, KEYS=64, **sizes).values():
        assert 0 < registers <= 255 and stack == spilled == 0

"Ragged batches of weights that no fused step reads: the bits of a row alone where the chapter promises them, close values elsewhere."
import random
from dataclasses import replace

import pytest
import test_ggml
import test_ragged
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer.paged import PagedCache, PagePool
from deepseek_nb.infer.quant_cache import CacheFormat
from deepseek_nb.kernels.layers import RowPages, attend_rows, same_in_company
from deepseek_nb.kernels.paged import paged_kernels
from deepseek_nb.kernels.ragged import BatchPart
from deepseek_nb.quant import quantize, replace_parameter
from deepseek_nb.quant.fp8 import FP8
from deepseek_nb.quant.ggml import BLOCK_KINDS, from_blocks
from deepseek_nb.quant.int4 import Int4

pytestmark = pytest.mark.skipif(not paged_kernels.ready(), reason='no C++ compiler')
GQA = replace(test_ragged.GQA, dim=256, inter_dim=512, n_heads=8, n_kv_heads=2, head_dim=32)
MLA = replace(test_ragged.MLA, dim=256, q_lora_rank=256, inter_dim=512, moe_inter_dim=256, n_heads=4, v_head_dim=64)
CONFIGS = dict(gqa=GQA, wide=replace(GQA, n_kv_heads=8, attn_bias=False), mixture=MLA, dense=replace(MLA, n_dense_layers=2))


def file_blocks(w):
    "Random blocks of one of the file's kinds, with small numbers"
    kind = random.choice([*BLOCK_KINDS])
    b = test_ggml.blocks(kind, *w.shape[:-1], w.shape[-1]//BLOCK_KINDS[kind].width)
    halves = b.unflatten(-1, (-1, BLOCK_KINDS[kind].nbytes))
    for at in test_ggml.HALVES[kind]: halves[..., at:at+2] = (torch.randn(*halves.shape[:-1], 1)*.001).half().view(torch.uint8)
    return from_blocks(halves.flatten(-2), kind)


def made(name, form=file_blocks):
    "A small model; its matrices are `form(w)`"
    model = Model(CONFIGS[name], torch.float32, 'cpu').init_weights(.1).requires_grad_(False)
    for place,m in [*model.layers.named_modules()]:
        for p,w in [*m.named_parameters(recurse=False)]:
            if p.endswith('bias'): w.normal_()
            if w.ndim == 2 and not place.endswith(('mlp.gate', 'kv_b_proj')) and not w.shape[-1] % 256: replace_parameter(m, p, form(w))
    return model


@pytest.fixture(autouse=True)
def seeded():
    print('SEED', test_ragged.SEED)
    random.seed(test_ragged.SEED)
    torch.manual_seed(test_ragged.SEED)


def test_blocks_of_a_file_have_the_bits_of_a_row_alone():
    model = made('gqa')
    assert test_ragged.twin(model) == 'cpp/cpu/layers' and same_in_company(model)
    r = random.Random(test_ragged.SEED)
    texts = [torch.randint(64, (r.randint(1, 150),)) for _ in range(4)]
    found = test_ragged.in_company(model, texts, r, page := r.choice([4, 16, 64]))
    for text,here in zip(texts, found, strict=True):
        assert torch.equal(here, test_ragged.alone(model, text, 64, r.choice([1, 7, 64, 10**9]))), (len(text), page)


@pytest.mark.parametrize('name', ['gqa', 'wide'])
def test_close_to_the_definition(name):
    model, r = made(name), random.Random(test_ragged.SEED)
    assert test_ragged.twin(model) == 'cpp/cpu/layers'
    texts = [torch.randint(64, (n,)) for n in (1, 30, 75)]
    found = test_ragged.in_company(model, texts, r, 16)
    with use('reference'): wanted = [test_ragged.alone(model, t) for t in texts]
    for a,b in zip(found, wanted, strict=True): torch.testing.assert_close(a, b, rtol=0, atol=2e-4*b.abs().max().item())


def test_what_may_depend_on_company():
    for name in ('mixture', 'dense'):
        assert not same_in_company(model := made(name))
        assert test_ragged.twin(model) == 'reference', 'a row at a time: no neighbour changes a bit'
    assert not same_in_company(made('gqa', lambda w: quantize(w, FP8())))
    assert same_in_company(made('gqa', lambda w: quantize(w, Int4()))), 'the fused step'
    blocks = made('gqa')
    assert not same_in_company(blocks, PagePool(GQA, 1, codec=CacheFormat())), 'pages of codes'
    with use('reference'): assert not same_in_company(blocks)
    blocks.layers[1].mlp.up_proj = torch.nn.Linear(256, 512, bias=False).requires_grad_(False)
    assert not same_in_company(blocks), 'a matrix that PyTorch multiplies'


def test_nan_stays_in_its_row():
    part = BatchPart(slice(0, 2), torch.tensor([0, 1, 2]), torch.tensor([3, 5]), torch.tensor([[0, 1], [2, 3]]))
    k = torch.full((5, 2, 4, 32), torch.nan)
    k[:1], k[2:3], k[3, :, :2] = torch.randn(1, 2, 4, 32), torch.nan, torch.randn(2, 2, 32)
    with torch.inference_mode(): y = attend_rows(torch.randn(1, 8, 2, 32), RowPages(k, part), RowPages(k, part), .2)
    assert y[:, :, 0].isfinite().all() and y[:, :, 1].isnan().all()


def test_a_cache_is_that_of_the_definition():
    model, text = made('gqa'), torch.randint(64, (41,))
    with torch.inference_mode():
        caches = [PagedCache(PagePool(GQA, 4, 16)) for _ in range(2)]
        model.ragged(text, caches[:1], [41])
        with use('reference'): model.ragged(text, caches[1:], [41])
        for one,two in zip(*(c.pool.layers for c in caches), strict=True):
            for a,b in zip(one, two, strict=True):
                a, b = (t[c.tables[0]].movedim(1, 2).flatten(0, 1)[:41] for t,c in zip((a, b), caches, strict=True))
                torch.testing.assert_close(a, b, rtol=0, atol=2e-4*b.abs().max().item())

"LoRA adapters in serving: each row has the bits that it has alone, and the logits of peft's model."
import json
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file
from test_engine import GROUPED, Bytes, run, tokens
from test_parity import FAMILIES, apart, oracle, steady
from test_ragged import CONFIGS, SEED, made

from deepseek_nb.arch.model import Model, head
from deepseek_nb.infer.adapters import read_adapter
from deepseek_nb.infer.paged import PagedCache, PagePool
from deepseek_nb.infer.ragged import RaggedBatch, run_adapted_rows
from deepseek_nb.kernels import adapted
from deepseek_nb.quant import relative_error
from deepseek_nb.train.lora import LoraConfig, lora_weights

needs_compiler = pytest.mark.skipif(not adapted.adapted_kernels.ready(), reason='no C++ compiler')
STACKS = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
KINDS = dict(
    qv=dict(r=3, target_modules=['q_proj', 'v_proj', 'q_b_proj', 'kv_a_proj_with_mqa']),
    all=dict(r=8, lora_alpha=32, target_modules='all-linear', rank_pattern={'o_proj': 17}),
    dora=dict(r=5, target_modules='all-linear', use_dora=True, use_rslora=True),
    feed=dict(r=2, target_modules=['gate_proj', 'down_proj', 'o_proj'], layers_to_transform=[1]),
    experts=dict(r=4, target_modules=['o_proj', 'kv_b_proj'], target_parameters=STACKS))


def written(c, kind, folder, seed=0, dtype=torch.float32):
    "The folder of a random adapter for a config"
    how = dict(KINDS[kind])
    if not c.n_routed_experts: how.pop('target_parameters', None)
    torch.manual_seed(seed)
    model = Model(c, dtype=dtype, device='cpu').init_weights(.1)
    config = LoraConfig(**how)
    names = {k.rpartition('.')[2] for k,m in model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    if not isinstance(config.target_modules, str): config.target_modules = [t for t in config.target_modules if t in names]
    config.apply(model)
    for w in lora_weights(model).values():
        for a in w.adapters.values():
            torch.nn.init.normal_(a.b, std=.1)
            if a.magnitude is not None: a.magnitude.data *= 1 + .3*torch.randn_like(a.magnitude)
    return model.save_adapter(folder)


@torch.inference_mode()
def alone(model, text, own, page=64, chunk=10**9):
    with PagedCache(PagePool(model.config, -(-len(text)//page) + 1, page, dtype=model.dtype)) as cache:
        return torch.cat([model.ragged(part, [cache], [len(part)], [own]) for part in text.split(min(chunk, len(text)))])


@torch.inference_mode()
def in_company(model, texts, own, r, page):
    "Rows with and without adapters join, bring chunks, and step back, in any order; their hidden states"
    pool = PagePool(model.config, sum(-(-len(t)//page) for t in texts) + 2, page, dtype=model.dtype)
    caches,found = [PagedCache(pool) for _ in texts],[torch.full((len(t), model.config.dim), torch.nan, dtype=model.dtype) for t in texts]
    while left := [i for i,t in enumerate(texts) if len(caches[i]) < len(t)]:
        rows = r.sample(left, r.randint(1, len(left)))
        new = [texts[i][len(caches[i]):][:r.choice([1, 1, 1, 3, 16, 40, 300])] for i in rows]
        hidden = model.ragged(torch.cat(new), [caches[i] for i in rows], [*map(len, new)], [own[i] for i in rows])
        for i,n,h in zip(rows, new, hidden.split([*map(len, new)]), strict=True): found[i][len(caches[i]) - len(n):len(caches[i])] = h
        if r.random() < .1: caches[i := r.randrange(len(texts))].rewind(r.randint(0, len(caches[i])))
    for cache in caches: cache.free()
    assert len(pool.free) == pool.pages
    return found


def views(model, c, folder, kinds):
    "Blocks with adapters over the weights of one model"
    return [read_adapter(model, written(CONFIGS[c], k, Path(folder)/k, i), k).layers for i,k in enumerate(kinds)]


def same(model, own, r, most=330):
    "One random mix of rows and adapters"
    texts = [torch.randint(64, (r.choice([1, 2, 17, 63, 64, 65, r.randint(1, most)]),)) for _ in range(r.randint(2, 5))]
    own = [r.choice([None, *own]) for _ in texts]
    threads = torch.get_num_threads()
    torch.set_num_threads(r.randint(1, 3))
    found = in_company(model, texts, own, r, r.choice([1, 16, 64]))
    for t,b,h in zip(texts, own, found, strict=True):
        torch.set_num_threads(r.randint(1, 3))
        one = alone(model, t, b, r.choice([16, 64]), r.choice([1, 29, 10**9]) if len(t) < 70 else r.choice([100, 10**9]))
        assert one.isfinite().all() and torch.equal(one, h), f'{[*map(len, texts)]}, row of {len(t)}, seed {SEED}'
    torch.set_num_threads(threads)


def sweep(rounds, formats, folder):
    "Random mixes; the sanitizers call it too"
    r = random.Random(SEED)
    torch.manual_seed(SEED)
    for c in ('mla', 'gqa'):
        for f in formats:
            model = made(c, f)
            own = views(model, c, folder, ['all', 'dora', 'experts'])
            for _ in range(rounds): same(model, own, r)


@needs_compiler
@pytest.mark.parametrize('c, f', [(c, f) for c in CONFIGS for f in ('float32', 'int8', 'int4')] + [('mla', 'bfloat16'), ('gqa', 'bfloat16')])
def test_bits_are_those_of_a_row_alone(c, f, tmp_path):
    r = random.Random(f'{SEED} {c} {f}')
    torch.manual_seed(SEED)
    model = made(c, f)
    own = views(model, c, tmp_path, r.sample([*KINDS], 3))
    for _ in range(2): same(model, own, r, 150)


def twin(model, own):
    "The twin that a step with adapters takes"
    with torch.inference_mode():
        x,cache = model.embed_tokens(torch.tensor([1])),PagedCache(PagePool(model.config, 2, dtype=model.dtype))
        return run_adapted_rows.op.choose(x, model.layers, RaggedBatch([cache], [1], ()), [own]).name


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize('f, most', [('float32', 1e-5), ('int8', .06), ('int4', .06)])
@pytest.mark.parametrize('c', ['mla', 'direct', 'gqa'])
def test_close_to_the_definition(c, f, most, tmp_path):
    "Every kind of adapter, and the row without one has the bits of the step without adapters"
    model,text = made(c, f),torch.randint(64, (40,), generator=torch.Generator().manual_seed(1))
    plain = alone(model, text, None)
    for kind,own in zip(KINDS, views(model, c, tmp_path, KINDS), strict=True):
        assert twin(model, own) == ('cpp/cpu' if f == 'float32' else 'cpp/cpu/codes')
        got = in_company(model, [text, text], [own, None], random.Random(1), 16)
        assert torch.equal(got[1], plain)
        cache = PagedCache(PagePool(model.config, 4, dtype=model.dtype))
        cache.reserve(40)
        batch = RaggedBatch([cache], [40], model.ragged_angles([cache], [40]))
        want = model.norm(run_adapted_rows.op.reference(model.embed_tokens(text), model.layers, batch, [own]))
        error = apart if f == 'float32' else relative_error  # the definition doesn't round activations, and a router may choose others
        assert error(got[0], want) < most and apart(got[0], plain) > 1e-2, kind

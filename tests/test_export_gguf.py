"Written GGUF files: random models come back, searched blocks beat plain ones, hostile input is one line, and llama.cpp gives our logits"
import json
import os
import random
import warnings
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from test_gguf import LLAMA, QWEN2, TOKENS, V2, V3, fresh

from deepseek_nb import Model
from deepseek_nb.core.config import Rope
from deepseek_nb.export.command import export_model
from deepseek_nb.export.gguf import export_gguf, plan_tensors
from deepseek_nb.files.locate import load_config
from deepseek_nb.quant.blocks import ENCODERS, quantize_blocks
from deepseek_nb.quant.ggml import BLOCK_KINDS
from deepseek_nb.quant.importance import measure_importance

SEED = int(os.environ.get('SEED', random.randrange(10**6)))
LLAMA3 = replace(LLAMA, tie_embeddings=True, rope=Rope(theta=5e5, kind='llama3', factor=8., original_positions=8192))
YARN = replace(LLAMA, head_dim=32, rope=Rope(theta=5e4, kind='yarn', factor=4., original_positions=32))
V2_ONE = replace(V2, n_expert_groups=1, n_limited_groups=1, q_lora_rank=24)
CONFIGS = dict(llama=LLAMA, llama3=LLAMA3, yarn=YARN, qwen2=QWEN2, v2=V2, v2_one=V2_ONE, v3=V3, v3_yarn=replace(V3, rope=V2.rope))


@pytest.fixture(autouse=True)
def seeded():
    print('seed', SEED)
    torch.manual_seed(SEED)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def saved(config, tmp_path):
    m = fresh(config)
    return m, m.save_pretrained(tmp_path/'model')


def load(path): return Model.from_pretrained(path, dtype='float32', device='cpu')


def error(w, b, kind):
    got = BLOCK_KINDS[kind].expand(b.view(-1, BLOCK_KINDS[kind].nbytes)).view(w.shape)
    return (got.double() - w.double()).norm().item()


@pytest.mark.parametrize('name', CONFIGS)
def test_float_files_come_back(name, tmp_path):
    m, folder = saved(CONFIGS[name], tmp_path)
    back = load(export_gguf(folder, tmp_path/'m.gguf', 'F32'))
    for k, t in m.state_dict().items(): assert torch.equal(back.state_dict()[k], t), k
    assert replace(back.config, eos_ids=m.config.eos_ids) == m.config
    assert torch.equal(back(TOKENS), m(TOKENS))


@pytest.mark.parametrize('name', ['llama3', 'v3_yarn'])
@pytest.mark.parametrize('kind', ['F32', 'BF16', 'Q8_0', 'Q4_1', 'Q4_K', 'Q6_K'])
def test_a_file_of_a_file_is_the_same_file(name, kind, tmp_path):
    _, folder = saved(CONFIGS[name], tmp_path)
    one = export_gguf(folder, tmp_path/'m.gguf', kind)
    (tmp_path/'again').mkdir()
    assert export_gguf(one, tmp_path/'again'/'m.gguf', kind).read_bytes() == one.read_bytes()


def test_tensors_are_where_the_header_says(tmp_path):
    _, folder = saved(V3, tmp_path)
    r = gguf.GGUFReader(export_gguf(folder, tmp_path/'m.gguf', 'Q8_0'))
    base = r.tensors[0].data_offset
    want = [(p.name, base + p.offset, p.kind) for p in plan_tensors(load_config(folder), 'Q8_0')]
    assert [(t.name, t.data_offset, t.tensor_type.name) for t in r.tensors] == want
    assert all(t.data_offset % 32 == 0 for t in r.tensors)


@pytest.mark.parametrize('kind', ENCODERS)
def test_searched_blocks_beat_plain_ones(kind):
    "On normal, uniform, sparse and heavy-tailed weights, and never NaN on zeros and constants"
    size = BLOCK_KINDS[kind].nbytes
    x = torch.randn(40, 256)
    for w in (x, torch.rand(40, 256), x*(torch.rand(40, 256) < .1), x**3, -torch.rand(3, 256)):
        ours = error(w, b := quantize_blocks(w, kind), kind)
        assert b.shape == (len(w), 256//BLOCK_KINDS[kind].width*size)
        if kind in ('Q8_0', 'Q4_0', 'Q4_1'):
            assert ours <= error(w, torch.from_numpy(gguf.quantize(w.numpy(), Q[kind])), kind)*1.0001
        got = gguf.dequantize(b.numpy(), Q[kind])
        assert np.array_equal(got, BLOCK_KINDS[kind].expand(b.view(-1, size)).view(w.shape).numpy())
    for w in (torch.zeros(1, 256), torch.full((1, 256), .37), torch.full((1, 256), -1e-7), torch.tensor([[1.] + [0.]*255])):
        step = dict(Q8_0=.005, Q6_K=.02).get(kind, .1)
        assert error(w, quantize_blocks(w, kind), kind) <= step*w.norm() + 1e-5


@pytest.mark.parametrize('kind', ENCODERS)
def test_importance_lowers_the_weighted_error(kind):
    w, a = torch.randn(60, 256), torch.exp(2*torch.randn(256))
    def weighted(b):
        got = BLOCK_KINDS[kind].expand(b.view(-1, BLOCK_KINDS[kind].nbytes)).view(w.shape)
        return ((got - w).double()**2*a).sum().item()
    assert weighted(quantize_blocks(w, kind, a)) < weighted(quantize_blocks(w, kind))


def test_importance_of_every_matrix_and_expert():
    m = fresh(V3)
    found = measure_importance(m, TOKENS)
    assert {k for k in found if 'experts.' in k and 'shared' not in k} == {k for k in m.state_dict() if 'mlp.experts.' in k}
    for k, a in found.items(): assert (a > 0).all() and a.isfinite().all() and a.shape[-1] == m.state_dict()[k].shape[-1], k


@pytest.mark.parametrize('change,message', [
    (dict(attn_bias=True), 'MLA has biases'), (dict(moe_layer_freq=2), 'only every 2th layer'),
    (dict(n_shared_experts=0), 'no shared expert'), (dict(rope=replace(V2.rope, mscale=1.)), 'mscale differs'),
    (dict(rope=replace(V2.rope, attention_factor=1.3)), 'attention factor of its own')])
def test_what_gguf_cannot_express(change, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e: plan_tensors(replace(V3, **change))
    assert '\n' not in str(e.value)


def test_hostile_weights_leave_no_file(tmp_path):
    m, folder = saved(LLAMA, tmp_path)
    cases = ((torch.nan, 'F32', 'NaN or infinite'), (7e4, 'F16', 'too large for F16'), (torch.inf, 'Q8_0', 'NaN or infinite'),
             (3e7, 'Q8_0', 'overflows float16'))
    for value, kind, message in cases:
        m.layers[1].mlp.up_proj.weight[5, 7] = value
        m.save_pretrained(folder)
        with pytest.raises(ValueError, match=rf'blk\.1\.ffn_up\.weight: .*{message}') as e:
            export_gguf(folder, tmp_path/'out'/'m.gguf', kind)
        assert '\n' not in str(e.value)
        assert not any((tmp_path/'out').iterdir())


def test_hostile_tokenizers(tmp_path):
    _, folder = saved(LLAMA, tmp_path)
    vocab = {chr(33+i): i for i in range(60)} | {f'x{i}': 60+i for i in range(10)}
    spec = dict(version='1.0', model=dict(type='BPE', vocab=vocab, merges=[]), added_tokens=[], normalizer=None, post_processor=None,
                pre_tokenizer=dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True, use_regex=True),
                decoder=dict(type='ByteLevel', add_prefix_space=True, trim_offsets=True, use_regex=True))
    (folder/'tokenizer.json').write_text(json.dumps(spec))
    with pytest.raises(ValueError, match='70 tokens and the model 64 embeddings'): export_gguf(folder, tmp_path/'m.gguf')
    spec['model']['vocab'] = dict(list(vocab.items())[:50])
    spec['pre_tokenizer'] = dict(type='Whitespace')
    (folder/'tokenizer.json').write_text(json.dumps(spec))
    with pytest.raises(ValueError, match='splits words by a rule'): export_gguf(folder, tmp_path/'m.gguf')


def test_notes_of_the_command(tmp_path):
    _, folder = saved(V2, tmp_path)
    done = export_model(folder, 'gguf', tmp_path/'m.gguf', 'kind=Q4_K')
    said = ' '.join(done.notes)
    for part in ('the tokenizer is left out', 'by their two best', "don't divide their rows", 'only with 26 or 27 layers'):
        assert part in said
    assert done.nbytes == (tmp_path/'m.gguf').stat().st_size


# llama.cpp

@pytest.mark.parametrize('name', [n for n in CONFIGS if n != 'v2'])
def test_llama_cpp_gives_our_logits(name, tmp_path):
    L = pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: pip install llama-cpp-python')
    m, folder = saved(CONFIGS[name], tmp_path)
    file = export_gguf(folder, tmp_path/'m.gguf', 'F32')
    want = m(TOKENS)[0]
    got = llama_logits(L, file, TOKENS[0].tolist(), want.shape[1])
    assert (got - want).abs().max() <= 1e-4*want.abs().max()


def llama_logits(L, file, ids, w):
    "Logits of all positions, from a model without a tokenizer"
    L.llama_log_set(quiet := L.llama_log_callback(lambda *a: None), None)
    assert quiet
    L.llama_backend_init()
    model = L.llama_model_load_from_file(str(file).encode(), L.llama_model_default_params())
    assert model, 'llama.cpp did not load the file'
    p = L.llama_context_default_params()
    p.n_ctx, p.n_threads, p.n_threads_batch, p.type_k, p.type_v, p.flash_attn_type = 256, 1, 1, 0, 0, 0
    ctx = L.llama_init_from_model(model, p)
    b = L.llama_batch_init(len(ids), 0, 1)
    b.n_tokens = len(ids)
    for i, t in enumerate(ids): b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = t, i, 1, 0, 1
    assert L.llama_decode(ctx, b) == 0
    found = torch.from_numpy(np.ctypeslib.as_array(L.llama_get_logits(ctx), (len(ids), w)).copy())
    L.llama_batch_free(b); L.llama_free(ctx); L.llama_model_free(model)
    return found

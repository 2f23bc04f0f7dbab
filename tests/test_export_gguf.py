"Written GGUF files: random models come back, searched blocks beat plain ones, hostile input is one line, and llama.cpp gives our logits"
import json
import os
import random
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from test_gguf import LLAMA, QWEN2, TOKENS, V2, V3, fresh

from deepseek_nb import Model, Tokenizer
from deepseek_nb.arch.routing import limit_groups
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.export.command import export_model
from deepseek_nb.export.gguf import export_gguf, plan_tensors
from deepseek_nb.files.gguf import load_config
from deepseek_nb.infer.inside import routes
from deepseek_nb.quant.ggml import BLOCK_KINDS, ENCODERS, measure_importance, quantize_blocks

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

def llama():
    L = pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: pip install llama-cpp-python')
    L.llama_log_set(quiet := L.llama_log_callback(lambda *a: None), None)
    L.quiet = quiet  # C holds no reference
    L.llama_backend_init()
    return L


@pytest.mark.parametrize('name', [n for n in CONFIGS if n != 'v2'])
def test_llama_cpp_gives_our_logits(name, tmp_path):
    L = llama()
    m, folder = saved(CONFIGS[name], tmp_path)
    file = export_gguf(folder, tmp_path/'m.gguf', 'F32')
    want = m(TOKENS)[0]
    with loaded(L, file) as run: got = run(TOKENS[0].tolist(), want.shape[1])
    assert (got - want).abs().max() <= 1e-4*want.abs().max()


@contextmanager
def loaded(L, file):
    "A function from token ids to the logits of all positions, or of the last; an empty cache at `past=0`"
    how = L.llama_model_default_params()
    how.use_extra_bufts = False  # on a processor with AMX, llama.cpp 0.3.36 moves attn_v_b to blocks that it can't multiply, and aborts
    model = L.llama_model_load_from_file(str(file).encode(), how)
    assert model, 'llama.cpp did not load the file'
    p = L.llama_context_default_params()
    p.n_ctx, p.n_threads, p.n_threads_batch, p.type_k, p.type_v, p.flash_attn_type = 512, 1, 1, 0, 0, 0
    ctx = L.llama_init_from_model(model, p)

    def run(ids, w, past=0, every=True):
        if not past: L.llama_memory_clear(L.llama_get_memory(ctx), True)
        b = L.llama_batch_init(len(ids), 0, 1)
        b.n_tokens = len(ids)
        for i, t in enumerate(ids):
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = t, past + i, 1, 0, every or i + 1 == len(ids)
        assert L.llama_decode(ctx, b) == 0
        found = torch.from_numpy(np.ctypeslib.as_array(L.llama_get_logits(ctx), (len(ids) if every else 1, w)).copy())
        L.llama_batch_free(b)
        return found
    yield run
    L.llama_free(ctx); L.llama_model_free(model)


def drawn(r, kind, lite=False):
    "A random small deepseek2: V2 or V3, with YaRN or not, of 27 layers without q_lora, with rows that the format's blocks divide or not"
    wide = kind.endswith('_K')
    v3, widths = r.random() < .5, [256] if wide else [64, 96, 160] if kind == 'F32' else [64, 96]
    groups, limited = r.choice(((1, 1), (2, 1), (4, 2)) if v3 else ((1, 1),))
    mscale = r.choice((.707, 1.))
    yarn = dict(kind='yarn', factor=r.choice((4., 40.)), original_positions=r.choice((8, 16)), mscale=mscale, mscale_all_dim=mscale)
    router = dict(score_func='sigmoid', score_bias=True, group_score='sum2', norm_topk=True) if v3 else dict(
        score_func='softmax', group_score='max', norm_topk=False)
    c = Config(f'deepseek_v{2 + v3}', vocab_size=r.randint(40, 90), dim=r.choice(widths), n_layers=27 if lite else r.randint(2, 4),
               inter_dim=r.choice([256] if wide else [64, 96, 128]), n_heads=r.randint(1, 4),
               q_lora_rank=0 if lite else r.choice((16, 32, 64)), kv_lora_rank=r.choice((32, 48, 64)),
               qk_nope_head_dim=r.choice((16, 32, 40, 64)), qk_rope_head_dim=r.choice((8, 16, 32)),
               v_head_dim=r.choice((16, 32, 40, 64)), n_dense_layers=r.randint(0, 1), n_routed_experts=8,
               n_activated_experts=r.randint(1, 3), n_shared_experts=r.randint(1, 2), moe_inter_dim=256 if wide else r.choice((32, 64)),
               n_expert_groups=groups, n_limited_groups=limited, route_scale=r.choice((1., 2.5)), max_positions=128, bos_id=1, eos_ids=(2,),
               rope=Rope(theta=r.choice((1e4, 5e4)), interleaved=True, **yarn if r.random() < .5 else {}), **router)
    print(kind, c)
    return c


def margin(m, ids):
    "The least distance between a score that is chosen and one that isn't, over all routers, tokens, and groups of experts"
    c, least = m.config, [1.]

    def gap(x, k):
        if k < x.shape[1]: least.append((x.topk(k + 1, -1).values[:, -2:] @ torch.tensor([1., -1.])).min().item())
    for layer, r in routes(m, ids).items():
        bias = m.layers[layer].mlp.gate.e_score_correction_bias
        x = r.scores if bias is None else r.scores + bias
        gap(limit_groups(x, c.n_expert_groups, c.n_limited_groups, c.group_score), c.n_activated_experts)
        gap(x.unflatten(-1, (c.n_expert_groups, -1)).topk(2, -1).values.sum(-1), c.n_limited_groups)
    return min(least)


def clear(m, n):
    "Tokens on which no router's choice depends on the last bits of a score"
    while True:
        ids = torch.randint(0, m.config.vocab_size, (1, n))
        if margin(m, ids) > 1e-5: return ids


@pytest.mark.parametrize('lite', [False, True])
def test_llama_cpp_gives_the_logits_of_drawn_models(lite, tmp_path):
    "Another config in each run, also as deep as V2-Lite, which has no q_lora"
    L, r = llama(), random.Random(f'{SEED} {lite}')
    for i in range(1 if lite else 3):
        m, folder = saved(drawn(r, 'F32', lite), tmp_path/str(i))
        file, ids = export_gguf(folder, tmp_path/f'{i}.gguf', 'F32'), clear(m, 40)
        want = m(ids)[0]
        with loaded(L, file) as run: got = run(ids[0].tolist(), want.shape[1])
        assert (got - want).abs().max() <= 1e-4*want.abs().max()


def off(got, want): return ((got - want).norm(dim=-1)/want.norm(dim=-1)).median().item()


def noisy(m, share):
    "The model with noise in every product: a share of the size of each row of its weights"
    def moved(k, w):
        exact = w.ndim == 1 or k == 'embed_tokens.weight' or k.endswith('mlp.gate.weight')
        return w if exact else w + torch.randn_like(w)*share*w.square().mean(-1, keepdim=True).sqrt()
    out = Model(m.config, dtype='float32', device='cpu')
    out.load_state_dict({k: moved(k, w) for k, w in m.state_dict().items()})
    return out.eval()


@pytest.mark.parametrize('kind', ['Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K'])
def test_llama_cpp_computes_our_blocks(kind, tmp_path):
    """llama.cpp multiplies blocks with activations that it rounds to 8 bits: a step is a 127th of the largest of 32 or 256, so the error of
    a product is at most .289/127 times the largest over the mean size, and on average below .7%. The logits are as near to ours of the same
    file as this noise in every product allows; half of the positions count, since another expert may be chosen at some."""
    L, r = llama(), random.Random(f'{SEED} {kind}')
    m, folder = saved(drawn(r, kind), tmp_path)
    ids, file = torch.randint(0, m.config.vocab_size, (1, 48)), export_gguf(folder, tmp_path/'m.gguf', kind)
    ours, kinds = load(file), {t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kind in kinds
    want = ours(ids)[0]
    with loaded(L, file) as run: got = run(ids[0].tolist(), want.shape[1])
    expected = np.mean([off(noisy(ours, .007)(ids)[0], want) for _ in range(4)])
    print(kind, 'error', off(got, want), 'expected', expected, "the format's", off(want, m(ids)[0]))
    assert got.isfinite().all() and off(got, want) <= 3*expected


def test_llama_cpp_writes_our_greedy_text_of_golden_prompts(tmp_path):
    "The same tokens of a prompt, and the same most probable tokens after it, from a file in F32"
    L, prompts, model = llama(), golden_prompts(), Model.from_pretrained('mini', dtype='float32', device='cpu')
    file, tok, w = export_gguf('mini', tmp_path/'mini.gguf', 'F32'), Tokenizer.from_pretrained('mini'), model.config.vocab_size
    with loaded(L, file) as run:
        for text in prompts if os.environ.get('EVERY') else random.Random(SEED).sample(prompts, 9):
            ids, cache = tok.encode(text), model.new_cache(1, 400)
            want, got = model(torch.tensor([ids]), cache)[0, -1:], run(ids, w, every=False)
            for n in range(len(ids), len(ids) + 12):
                assert (got - want).abs().max() <= 1e-4*want.abs().max(), text
                token = want.argmax().item()
                assert got.argmax().item() == token, text
                want, got = model(torch.tensor([[token]]), cache)[0], run([token], w, n)


def golden_prompts():
    file = Path(os.environ.get('DEEPSEEK_NB_GOLDEN') or Path(__file__).resolve().parents[2]/'shared/golden')/'chat_prompts.json'
    if not file.is_file(): pytest.skip('set DEEPSEEK_NB_GOLDEN to the folder of chat_prompts.json')
    return [case['prompt'] for case in json.loads(file.read_text())['cases']]

"GGUF: random files of every architecture and block format, damage, and SmolLM2 against transformers"
import math
import os
import random
import warnings
from cProfile import Profile
from dataclasses import replace
from functools import cache

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Q
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_nb import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files import gguf as ours
from deepseek_nb.files.gguf import load_config

KINDS = ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q5_0', 'Q5_1']
SHARED = dict(vocab_size=64, dim=64, n_layers=3, inter_dim=96, max_positions=128, bos_id=1, eos_ids=(2,))
LLAMA = Config('llama', **SHARED, n_heads=4, n_kv_heads=2, head_dim=16, norm_eps=1e-5, rope=Rope(theta=50000.))
QWEN2 = Config('qwen2', **SHARED, n_heads=4, n_kv_heads=2, head_dim=16, attn_bias=True, rope=Rope(theta=1e6))
MOE = dict(n_dense_layers=1, n_routed_experts=8, n_activated_experts=3, n_shared_experts=2, moe_inter_dim=32, n_expert_groups=4,
           n_limited_groups=2)
MLA = dict(n_heads=2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
YARN = Rope(theta=10000., interleaved=True, kind='yarn', factor=40., original_positions=16, beta_fast=32., beta_slow=1., mscale=.707,
            mscale_all_dim=.707)
V2 = Config('deepseek_v2', **SHARED, **MLA, **MOE, q_lora_rank=0, score_func='softmax', group_score='max', route_scale=16., rope=YARN)
V3 = Config('deepseek_v3', **SHARED, **MLA, **MOE, q_lora_rank=32, score_func='sigmoid', score_bias=True, group_score='sum2',
            norm_topk=True, route_scale=2.5, rope=Rope(interleaved=True))
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 53, 58, 9, 7, 9, 3, 23, 8]])


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(random.randrange(10**6))
    with torch.no_grad(): yield


# An independent writer, after llama.cpp's converter

def permuted(w, heads): return w.reshape(heads, 2, w.shape[0]//heads//2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


TOP = dict(embed_tokens='token_embd', norm='output_norm', lm_head='output')
NAMES = dict(input_layernorm='attn_norm', post_attention_layernorm='ffn_norm', q_proj='attn_q', k_proj='attn_k', v_proj='attn_v',
             o_proj='attn_output', q_a_proj='attn_q_a', q_a_layernorm='attn_q_a_norm',
             q_b_proj='attn_q_b', kv_a_proj_with_mqa='attn_kv_a_mqa', kv_a_layernorm='attn_kv_a_norm', kv_b_proj='attn_kv_b')


def tensors(model, split):
    "Name and numpy array of every tensor of a GGUF file, from ours"
    c = model.config
    for k, t in model.state_dict().items():
        w, parts = t.float().numpy(), k.split('.')
        if parts[0] in TOP:
            yield f'{TOP[parts[0]]}.weight', w
            continue
        blk, part, suffix = f'blk.{parts[1]}.', parts[-2], parts[-1]
        if suffix == 'e_score_correction_bias': yield blk+'exp_probs_b.bias', w
        elif suffix == 'gate_up_proj':
            f = w.shape[1]//2
            yield blk+'ffn_gate_exps.weight', np.ascontiguousarray(w[:, :f])
            yield blk+'ffn_up_exps.weight', np.ascontiguousarray(w[:, f:])
        elif suffix == 'down_proj': yield blk+'ffn_down_exps.weight', w
        elif part == 'kv_b_proj' and split:
            both = w.reshape(c.n_heads, c.qk_nope_head_dim+c.v_head_dim, c.kv_lora_rank)
            yield blk+'attn_k_b.weight', np.ascontiguousarray(both[:, :c.qk_nope_head_dim].transpose(0, 2, 1))
            yield blk+'attn_v_b.weight', np.ascontiguousarray(both[:, c.qk_nope_head_dim:])
        elif part == 'gate': yield blk+'ffn_gate_inp.weight', w
        elif parts[2] == 'mlp': yield blk + f"ffn_{part.removesuffix('_proj')}{'_shexp'*('shared_experts' in k)}.{suffix}", w
        else:
            if c.model_type == 'llama' and part in ('q_proj', 'k_proj'): w = permuted(w, c.n_heads if part == 'q_proj' else c.n_kv_heads)
            yield blk+NAMES[part]+'.'+suffix, w


def write_metadata(w, c, split):
    adders = {bool: w.add_bool, float: w.add_float32, str: w.add_string, int: w.add_uint32}
    d = {'block_count': c.n_layers, 'context_length': c.max_positions, 'embedding_length': c.dim, 'feed_forward_length': c.inter_dim,
         'attention.head_count': c.n_heads, 'attention.layer_norm_rms_epsilon': c.norm_eps, 'rope.freq_base': c.rope.theta}
    if c.mla:
        d |= {'rope.dimension_count': c.qk_rope_head_dim, 'attention.kv_lora_rank': c.kv_lora_rank,
              'leading_dense_block_count': c.n_dense_layers, 'expert_count': c.n_routed_experts,
              'expert_used_count': c.n_activated_experts, 'expert_shared_count': c.n_shared_experts,
              'expert_weights_scale': c.route_scale, 'expert_feed_forward_length': c.moe_inter_dim,
              'expert_group_count': c.n_expert_groups, 'expert_group_used_count': c.n_limited_groups}
        if c.q_lora_rank: d |= {'attention.q_lora_rank': c.q_lora_rank}
        if c.norm_topk: d |= {'expert_weights_norm': True}
        if c.score_func == 'sigmoid': d |= {'expert_gating_func': 2}
        key, value = c.qk_nope_head_dim+c.qk_rope_head_dim, c.v_head_dim
        if split:
            d |= {'attention.head_count_kv': 1, 'attention.key_length': c.kv_lora_rank+c.qk_rope_head_dim,
                  'attention.value_length': c.kv_lora_rank}
            d |= {'attention.key_length_mla': key, 'attention.value_length_mla': value}
        else: d |= {'attention.head_count_kv': c.n_heads, 'attention.key_length': key, 'attention.value_length': value}
    else: d |= {'attention.head_count_kv': c.n_kv_heads, 'rope.dimension_count': c.head_dim}
    if c.rope.kind == 'yarn':
        d |= {'rope.scaling.type': 'yarn', 'rope.scaling.factor': c.rope.factor,
              'rope.scaling.original_context_length': c.rope.original_positions}
        if c.mla: d |= {'rope.scaling.yarn_log_multiplier': .1*c.rope.mscale_all_dim}
    for k, v in d.items(): adders[type(v)](f'{w.arch}.{k}', v)
    w.add_bos_token_id(c.bos_id); w.add_eos_token_id(c.eos_ids[0])
    w.add_token_list([f'token {i}' for i in range(c.vocab_size)]); w.add_token_types([1]*c.vocab_size); w.add_token_merges(['a b', 'c d'])


def write(path, model, kind='F32', split=False, extra=()):
    "Write a GGUF file; returns what each tensor holds after the file's rounding, by name"
    c = model.config
    w, kept = gguf.GGUFWriter(path, 'deepseek2' if c.mla else c.model_type), {}
    write_metadata(w, c, split)
    for name, x in [*tensors(model, split), *extra]:
        k = Q[kind] if x.ndim > 1 and x.shape[-1] % 32 == 0 and 'gate_inp' not in name else Q.F32
        q = gguf.quants.quantize(x, k)
        w.add_tensor(name, q, raw_dtype=k)
        kept[name] = gguf.quants.dequantize(q, k)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return kept


def fresh(config):
    m = Model(config, dtype=torch.float32, device='cpu')
    for t in m.state_dict().values(): t.copy_(torch.randn(t.shape)*.2 + (t.dim() == 1))
    return m


def rounded(model, kept, split):
    "The model after the file's rounding, undone by hand"
    m, c = Model(model.config, dtype=torch.float32, device='cpu'), model.config
    m.load_state_dict(model.state_dict())
    for k, t in m.state_dict().items():
        name = [n for n, _ in tensors(_Only(c, k, t), split)]
        got = [torch.from_numpy(kept[n].copy()) for n in name]
        if k.endswith('gate_up_proj'): x = torch.cat(got, 1)
        elif k.endswith('kv_b_proj.weight') and split: x = torch.cat([got[0].transpose(1, 2), got[1]], 1).reshape(t.shape)
        elif c.model_type == 'llama' and ('_attn.q_proj' in k or '_attn.k_proj' in k):
            h = c.n_heads if 'q_proj' in k else c.n_kv_heads
            x = got[0].reshape(h, t.shape[0]//h//2, 2, *t.shape[1:]).transpose(1, 2).reshape(t.shape)
        else: x = got[0]
        t.copy_(x)
    return m


class _Only:
    "A model of one parameter"
    def __init__(self, config, k, t): self.config, self.sd = config, {k: t}
    def state_dict(self): return self.sd


def load(path): return Model.from_pretrained(path, dtype=torch.float32, device='cpu')


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('config,split', [(LLAMA, False), (QWEN2, False), (V2, False), (V3, False), (V2, True), (V3, True)],
                         ids=['llama', 'qwen2', 'v2', 'v3', 'v2-split', 'v3-split'])
def test_random_file(config, split, kind, tmp_path):
    m = fresh(config)
    kept = write(tmp_path/'m.gguf', m, kind, split)
    back = load(tmp_path/'m.gguf')
    assert back.config == config
    want = rounded(m, kept, split)
    for k, v in want.state_dict().items(): assert torch.equal(back.state_dict()[k], v), k
    assert torch.equal(back(TOKENS), want(TOKENS))
    if kind == 'F32': assert torch.equal(back(TOKENS), m(TOKENS))


@pytest.mark.parametrize('change', [dict(tie_embeddings=True), dict(attn_bias=True), dict(attn_bias=True, out_bias=True, mlp_bias=True),
                                    dict(n_kv_heads=4), dict(n_kv_heads=1),
                                    dict(rope=Rope(theta=10000., kind='yarn', factor=4., original_positions=32))])
def test_llama_variants(change, tmp_path):
    m = fresh(replace(LLAMA, **change))
    write(tmp_path/'m.gguf', m)
    back = load(tmp_path/'m.gguf')
    assert back.config == m.config and torch.equal(back(TOKENS), m(TOKENS))


@pytest.mark.parametrize('width,factor,low,high', [(128, 8., 1., 4.), (64, 32., 1., 4.), (128, 4., .5, 8.)])
def test_llama3_frequencies(width, factor, low, high, tmp_path):
    rope = Rope(theta=500000., kind='llama3', factor=factor, original_positions=8192, low_freq=low, high_freq=high)
    config = replace(LLAMA, n_heads=2, n_kv_heads=1, head_dim=width, rope=rope)
    m = fresh(config)
    # as llama.cpp's converter computes the tensor
    factors = []
    for freq in 1/rope.theta**(torch.arange(0, width, 2, dtype=torch.float32)/width):
        wavelen, L = 2*math.pi/freq, rope.original_positions
        smooth = (L/wavelen - low)/(high - low)
        factors.append(1. if wavelen < L/high else factor if wavelen > L/low else float(1/((1-smooth)/factor + smooth)))
    w = gguf.GGUFWriter(tmp_path/'m.gguf', 'llama')
    write_metadata(w, config, False)
    w.add_uint32('llama.attention.key_length', width)
    for name, x in [*tensors(m, False), ('rope_freqs.weight', np.array(factors, dtype=np.float32))]: w.add_tensor(name, x)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    back = load(tmp_path/'m.gguf')
    r = back.config.rope
    assert (r.kind, r.factor, r.original_positions) == ('llama3', rope.factor, 8192)
    assert (r.low_freq, r.high_freq) == pytest.approx((rope.low_freq, rope.high_freq), rel=1e-3)
    torch.testing.assert_close(back(TOKENS), m(TOKENS), rtol=1e-4, atol=1e-4*m(TOKENS).abs().max().item())


def test_files_without_groups_warn(tmp_path):
    config = replace(V3, n_routed_experts=72, n_expert_groups=1, n_limited_groups=1)
    w = gguf.GGUFWriter(tmp_path/'m.gguf', 'deepseek2')
    write_metadata(w, config, False)
    for key in ('deepseek2.expert_group_count', 'deepseek2.expert_group_used_count'): w.kv_data[0].pop(key)
    for name, x in tensors(fresh(config), False): w.add_tensor(name, x)
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    with pytest.warns(UserWarning, match='contains no expert groups'): assert load_config(tmp_path/'m.gguf') == config


@pytest.mark.parametrize('kind', sorted(q.name for q in gguf.quants._type_traits))
def test_every_block_format_of_the_package(kind):
    rng = np.random.default_rng()
    size = gguf.GGML_QUANT_SIZES[Q[kind]][1]
    data = rng.integers(0, 256, (24, 4*size), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        want, got = gguf.dequantize(data, Q[kind]), ours.dequant(torch.from_numpy(data).flatten(), kind)
    assert np.array_equal(got.numpy(), want.flatten(), equal_nan=True)


# Damage

def one_line(e): assert '\n' not in str(e.value), str(e.value)


def test_truncated_anywhere(tmp_path):
    path, m = tmp_path/'m.gguf', fresh(LLAMA)
    write(path, m, 'Q4_0')
    raw = path.read_bytes()
    for n in [0, 3, 4, 7, 12, 23, 24, 30, *range(40, len(raw)-32, max(1, len(raw)//150)), len(raw)-64]:
        path.write_bytes(raw[:n])
        with pytest.raises(ValueError, match='m.gguf: (truncated|not a GGUF)') as e: load(path)
        one_line(e)


def test_corrupt_header(tmp_path):
    "Flipped bytes in the header end in a model or in one line, never in another exception"
    path, m = tmp_path/'m.gguf', fresh(LLAMA)
    write(path, m, 'Q4_0')
    raw = path.read_bytes()
    r = random.Random()
    for _ in range(int(os.environ.get('GGUF_FUZZ') or 300)):
        at = r.randrange(4, 4000)
        path.write_bytes(raw[:at] + bytes([r.randrange(256)]) + raw[at+1:])
        try: load(path)
        except ValueError as e: assert '\n' not in str(e) and 'm.gguf' in str(e), (at, e)


U32, U64 = (lambda n: n.to_bytes(4, 'little')), (lambda n: n.to_bytes(8, 'little'))
START = b'GGUF' + U32(3)

@pytest.mark.parametrize('raw', [
    START + U64(2**63) + U64(0) + bytes(64), START + U64(0) + U64(2**63) + bytes(64), START + U64(0) + U64(2**64 - 1) + bytes(64),
    START + U64(0) + U64(1) + U64(2**63) + b'a'*64, START + U64(0) + U64(1) + U64(1) + b'a' + U32(9) + U32(0) + U64(2**62) + bytes(64),
    START + U64(0) + U64(1) + U64(1) + b'a' + U32(9) + (U32(9) + U64(1))*50_000, START + b'x', b'GGUF' + U32(99) + bytes(60)],
    ids='tensors fields all-ones string array nested version-only version'.split())
def test_hostile_headers(raw, tmp_path):
    (path := tmp_path/'m.gguf').write_bytes(raw)
    with pytest.raises(ValueError, match='m.gguf: ') as e: load(path)
    one_line(e)


@pytest.mark.parametrize('place, words', [
    (0, 'overlaps another tensor'), (-32, 'lies in the header'), (-64, 'lies in the header'), (2**63, 'truncated'),
    (1, "doesn't begin at a multiple of 32")])
def test_hostile_places(place, words, tmp_path):
    "A tensor where another one, the header or nothing is"
    path, m = tmp_path/'m.gguf', fresh(LLAMA)
    write(path, m, 'Q4_0')
    raw, r = bytearray(path.read_bytes()), gguf.GGUFReader(path)
    t = max(r.tensors, key=lambda t: t.data_offset)
    at = t.field.offset + 8 + len(t.name) + 4 + 8*len(t.shape) + 4
    assert int.from_bytes(raw[at:at+8], 'little') == t.data_offset - r.data_offset
    if place == 1: place = int(t.data_offset - r.data_offset) + 1
    raw[at:at+8] = U64(place % 2**64)
    path.write_bytes(raw + bytes(32))
    with pytest.raises(ValueError, match='m.gguf: ') as e: load(path)
    assert words in str(e.value)
    one_line(e)


def test_missing_and_unused_tensors(tmp_path):
    path, m = tmp_path/'m.gguf', fresh(LLAMA)
    write(path, m, extra=[('blk.0.attn_sinks.weight', np.zeros(4, dtype=np.float32))])
    with pytest.raises(ValueError, match='1 tensors unused: blk.0.attn_sinks.weight') as e: load(path)
    one_line(e)
    sd = m.state_dict()
    m.state_dict = lambda: {k: v for k, v in sd.items() if k != 'norm.weight'}
    write(path, m)
    with pytest.raises(ValueError, match='1 tensors missing: output_norm.weight') as e: load(path)
    one_line(e)


def test_unknown(tmp_path):
    with pytest.raises(FileNotFoundError): load(tmp_path/'none.gguf')
    (tmp_path/'x.gguf').write_bytes(b'PK\x03\x04')
    with pytest.raises(ValueError, match='not a GGUF file') as e: load(tmp_path/'x.gguf')
    one_line(e)


# A real model

TEXT = """
Call me Ishmael. Some years ago—never mind how long precisely—having little or no money in my purse, and nothing particular to interest
me on shore, I thought I would sail about a little and see the watery part of the world. It is a way I have of driving off the spleen
and regulating the circulation. Whenever I find myself growing grim about the mouth; whenever it is a damp, drizzly November in my soul;
whenever I find myself involuntarily pausing before coffin warehouses, and bringing up the rear of every funeral I meet; and especially
whenever my hypos get such an upper hand of me, that it requires a strong moral principle to prevent me from deliberately stepping into
the street, and methodically knocking people’s hats off—then, I account it high time to get to sea as soon as I can. This is my
substitute for pistol and ball. With a philosophical flourish Cato throws himself upon his sword; I quietly take to the ship. There is
nothing surprising in this. If they but knew it, almost all men in their degree, some time or other, cherish very nearly the same
feelings towards the ocean with me. There now is your insular city of the Manhattoes, belted round by wharves as Indian isles by coral
reefs—commerce surrounds it with her surf. Right and left, the streets take you waterward. Its extreme downtown is the battery, where
that noble mole is washed by waves, and cooled by breezes, which a few hours previous were out of sight of land. Look at the crowds of
water-gazers there. Circumambulate the city of a dreamy Sabbath afternoon. Go from Corlears Hook to Coenties Slip, and from thence, by
Whitehall, northward. What do you see?—Posted like silent sentinels all around the town, stand thousands upon thousands of mortal men
fixed in ocean reveries. Some leaning against the spiles; some seated upon the pier-heads; some looking over the bulwarks of ships from
China; some high aloft in the rigging, as if striving to get a still better seaward peep.
""".strip().replace('\n', ' ')


class Written(TorchDispatchMode):
    "Counts the numbers that operations write"
    numbers = 0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not f.is_view: self.numbers += out.numel()
        return out


def perplexity(logits, ids): return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).exp().item()


def test_smollm2_against_transformers(monkeypatch):
    "The same logits, and blocks decoded many at a time: no loop over them, few passes over their numbers"
    transformers = pytest.importorskip('transformers')
    from deepseek_nb.files.hub import fetch
    from deepseek_nb.files.tokenizer import Tokenizer
    try: path = fetch('smollm2-135m')
    except FileNotFoundError as e: pytest.skip(str(e))
    ids = torch.tensor([Tokenizer.from_pretrained(path).encode(TEXT)[:200]])
    assert ids.shape[1] == 200
    with Written() as written: load(path)
    with Profile() as work: m = load(path)
    transformers.logging.disable_progress_bar()
    # it reads the head twice, and makes the table of names 400 times
    for name in ('GGUFReader', 'get_tensor_name_map'): monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    got, want = m(ids), theirs(ids).logits
    assert (got-want).abs().max() < 1e-4*want.abs().max()
    assert perplexity(got, ids) == pytest.approx(perplexity(want, ids), rel=1e-3)
    n = sum(p.numel() for p in m.parameters())
    calls = sum(o.callcount for o in work.getstats())
    cost = f'{n/calls:.0f} weights a call, {written.numbers/n:.1f} numbers written for each'
    assert calls < n/64 and written.numbers < 10*n, cost
    print(f'perplexity {perplexity(got, ids):.3f}, {cost}')

"""V4's attention against transformers' modules, on configs that are drawn anew in every run

The seed is printed; SEED=n repeats a run. Where index scores are tied, transformers may select any of the entries. So configs that
are compared with it have many index heads, for which a score of exactly zero is rare; the rule for ties has a test of its own.
"""
import os
import random

import pytest
import torch

from deepseek_nb.arch.attention import Context
from deepseek_nb.arch.compressed import CompressedAttention
from deepseek_nb.arch.rope import cos_sin, frequencies, rotary_factor
from deepseek_nb.arch.window import WindowAttention, window_mask
from deepseek_nb.core.config import Config

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
NAMES = {'wq_a.weight': 'q_a_proj.weight', 'q_norm.weight': 'q_a_norm.weight', 'wq_b.weight': 'q_b_proj.weight',
         'wkv.weight': 'kv_proj.weight', 'kv_norm.weight': 'kv_norm.weight', 'wo_a.weight': 'o_a_proj.weight',
         'wo_b.weight': 'o_b_proj.weight', 'attn_sink': 'sinks'}
POOL = {'wkv.weight': 'kv_proj.weight', 'wgate.weight': 'gate_proj.weight', 'ape': 'position_bias', 'norm.weight': 'kv_norm.weight'}
NAMES |= {f'compressor.{a}': f'compressor.{b}' for a, b in POOL.items()}
NAMES |= {f'indexer.compressor.{a}': f'compressor.indexer.{b}' for a, b in POOL.items()}
NAMES |= {'indexer.wq_b.weight': 'compressor.indexer.q_b_proj.weight',
          'indexer.weights_proj.weight': 'compressor.indexer.scorer.weights_proj.weight'}


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_v4_attention SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    "A source of randomness that depends on the seed and the test alone"
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


def draw(r, **kw):
    "A tiny config of transformers with one layer of each kind, and ours read from it"
    from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
    rot, groups = r.choice([2, 4, 6]), r.choice([1, 2])
    v = rot + 2*r.randrange(1, 6)
    yarn = dict(rope_type='yarn', factor=4., original_max_position_embeddings=32, beta_fast=32., beta_slow=1., attention_factor=1.)
    share = dict(partial_rotary_factor=(rot + 1e-6)/v)
    rates = dict(compressed_sparse_attention=kw.pop('m', 4), heavily_compressed_attention=r.choice([6, 8]))
    sizes = dict(hidden_size=2*r.randrange(8, 20), num_attention_heads=groups*r.choice([1, 2, 3]), head_dim=v,
                 q_lora_rank=r.randrange(5, 20),
                 sliding_window=r.randrange(2, 9), o_groups=groups, o_lora_rank=r.randrange(3, 9), index_n_heads=16,
                 index_head_dim=rot + 2*r.randrange(0, 4), index_topk=r.randrange(1, 5), rms_norm_eps=r.choice([1e-6, 1e-4]))
    hf = DeepseekV4Config(
        vocab_size=64, num_hidden_layers=3, compress_rates=rates, mlp_layer_types=['moe']*3, **share, **(sizes | kw),
        layer_types=['sliding_attention', 'compressed_sparse_attention', 'heavily_compressed_attention'],
        rope_parameters=dict(main=dict(rope_type='default', rope_theta=1e4, **share), compress=yarn | dict(rope_theta=16e4, **share)),
        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=512)
    hf._attn_implementation = 'eager'
    return hf, Config.from_hf(hf.to_dict())


def layers(hf, c):
    "The three layers of transformers, and ours with the same random weights"
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention
    out = []
    for i, m in enumerate(c.compress_ratios):
        ours, theirs = CompressedAttention(c, m) if m else WindowAttention(c), DeepseekV4Attention(hf, i).eval()
        state = {k: torch.randn(p.shape)*(p.shape[-1]**-.5 if p.ndim > 1 else .5) + ('norm' in k) for k, p in ours.state_dict().items()}
        state = {k: 2*p if 'ape' in k or 'sink' in k else p for k, p in state.items()}
        ours.load_state_dict(state)
        theirs.load_state_dict({NAMES[k]: p for k, p in state.items()}, strict=True)
        out.append((ours.requires_grad_(False), theirs.requires_grad_(False)))
    return out


def angles(c, attn, positions):
    return cos_sin(frequencies(attn.rope, c.rotary_dim), positions, rotary_factor(attn.rope))


def run(attn, x, pad=None, cache=None, start=0):
    "Our layer on tokens from column `start` on, with its own angles"
    positions = torch.arange(start, start + x.shape[1])[None]
    if pad is not None: positions = (positions - pad[:, None]).clamp(min=0)
    return attn(x, Context(angles(attn.c, attn, positions), cache=cache, pad=pad))


def close(got, want, tol=1e-4):
    assert got.shape == want.shape, (got.shape, want.shape)
    err = (got - want).abs().max().item()/max(want.abs().max().item(), 1e-3)
    assert err <= tol, f'{err:.1e} of the largest value apart'


def oracle(hf, theirs, x, start=0, cache=None):
    "transformers' layer on the same tokens"
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding
    positions, rotary = torch.arange(start, start + x.shape[1])[None].expand(len(x), -1), DeepseekV4RotaryEmbedding(hf)
    embeddings = {k: rotary(x, positions, layer_type=k) for k in ('main', 'compress')}
    s, t = x.shape[1], x.shape[1] + (min(start, hf.sliding_window - 1) if cache else 0)
    mask = window_mask(s, t, hf.sliding_window)
    bias = torch.zeros(len(x), 1, s, t) if mask is None else torch.zeros(len(x), 1, s, t).masked_fill(~mask, -torch.inf)
    return theirs(x, position_embeddings=embeddings, position_ids=positions, attention_mask=bias, cache=cache)[0]


def test_whole_texts(r):
    hf, c = draw(r)
    for ours, theirs in layers(hf, c):
        for n in [*range(1, 14), r.randrange(14, 24), r.randrange(24, 40)]:
            x = torch.randn(r.choice([1, 2]), n, c.dim)
            close(run(ours, x), oracle(hf, theirs, x))

"""Parity with transformers on tiny checkpoints that it saves, with configs drawn at random in every run

The seed is printed; PARITY_SEED=n repeats a run, PARITY_DRAWS=n asks for more draws a family.
"""
import json
import os
import random
import warnings

import pytest
import torch

from deepseek_nb import Model
from deepseek_nb.arch.rope import softmax_scale
from deepseek_nb.core.config import Config

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SEED = int(os.environ.get('PARITY_SEED') or random.SystemRandom().randrange(10**6))
DRAWS = int(os.environ.get('PARITY_DRAWS') or 12)
NEW = 6
EAGER = dict(attn_implementation='eager', experts_implementation='eager') # its grouped product refuses widths that are no multiple of 4


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\nPARITY_SEED={SEED}')
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


# Draws

def rope(r, kinds, mla=False):
    kind = r.choice(kinds)
    p = dict(rope_type=kind, rope_theta=r.choice([100., 10000., 500000.]))
    original = r.choice([16, 64, 4096])
    if kind == 'yarn':
        p |= dict(factor=r.choice([2., 4., 40.]), original_max_position_embeddings=original, beta_fast=r.choice([8., 32.]), beta_slow=1.)
        if mla and (m := r.choice([None, (1., 1.), (.707, .707), (1., .5)])): p |= dict(mscale=m[0], mscale_all_dim=m[1])
    if kind == 'llama3': p |= dict(factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=original)
    return p


def common(r):
    return dict(vocab_size=r.randrange(40, 90), num_hidden_layers=r.randrange(1, 4), intermediate_size=r.randrange(8, 50),
                max_position_embeddings=256, rms_norm_eps=r.choice([1e-5, 1e-6]),
                tie_word_embeddings=r.random() < .4, bos_token_id=0, eos_token_id=r.choice([1, [1, 2]]), pad_token_id=None)


def gqa(r):
    kv = r.choice([1, 2, 3])
    heads, width = kv*r.choice([1, 2, 3]), 2*r.randrange(1, 9)
    return dict(num_attention_heads=heads, num_key_value_heads=kv, head_dim=width, hidden_size=heads*r.choice([width, 2*r.randrange(2, 9)]))


def llama(r):
    return transformers.LlamaConfig(**common(r), **gqa(r), attention_bias=r.random() < .4, mlp_bias=r.random() < .4,
                                    rope_parameters=rope(r, ['default', 'yarn', 'llama3']))


def qwen2(r): return transformers.Qwen2Config(**common(r), **gqa(r), rope_parameters=rope(r, ['default', 'yarn']))


def deepseek(r, odd):
    heads, groups, size = r.choice([1, 2, 3]), r.choice([1, 2, 4]), r.choice([2, 3])
    keep = r.randrange(1, groups+1)
    return common(r) | dict(
        num_attention_heads=heads, num_key_value_heads=heads, hidden_size=heads*2*r.randrange(4, 12), attention_bias=r.random() < .3,
        q_lora_rank=r.choice([None, 8, 12]), kv_lora_rank=r.choice([4, 8, 16+odd]), qk_nope_head_dim=r.choice([4, 6+odd, 16]),
        qk_rope_head_dim=2*r.randrange(1, 6), v_head_dim=r.choice([3, 8, 16]), rope_parameters=rope(r, ['default', 'yarn'], mla=True),
        first_k_dense_replace=r.randrange(0, 3), n_routed_experts=groups*size, n_shared_experts=r.choice([1, 2]),
        num_experts_per_tok=r.randrange(1, keep*size+1), moe_intermediate_size=r.randrange(4, 20), n_group=groups, topk_group=keep,
        routed_scaling_factor=r.choice([1., 2.5]))


def deepseek_v2(r):
    d = deepseek(r, odd=0) # view_as_complex there refuses odd strides
    return transformers.DeepseekV2Config(**d, topk_method='group_limited_greedy' if d['n_group'] > 1 else 'greedy', norm_topk_prob=False)


def deepseek_v3(r):
    return transformers.DeepseekV3Config(**deepseek(r, odd=1), norm_topk_prob=r.random() < .5, rope_interleave=r.random() < .7)


FAMILIES = dict(llama=llama, qwen2=qwen2, deepseek_v2=deepseek_v2, deepseek_v3=deepseek_v3)


def oracle(config, seed):
    "transformers' model with weights that make every part of it count"
    torch.manual_seed(seed)
    m = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER).eval()
    for k, t in m.state_dict().items():
        noise = torch.randn(t.shape)
        t.copy_(1 + .2*noise if k.endswith('norm.weight') else noise*(.3 if t.dim() == 1 else t.shape[-1]**-.5))
    return m


# Comparison

def apart(a, b): return ((a-b).abs().max() / b.abs().max()).item()


def steady(m, ids):
    "Whether rounding cannot move a router's choice or an argmax: two experts that score alike to six digits prove nothing"
    a, w = m(ids).logits, m.get_input_embeddings().weight
    kept = w.clone()
    w.mul_(1 + 2e-6*torch.randn(w.shape))
    b = m(ids).logits
    w.copy_(kept)
    top = a.topk(2).values
    return apart(b, a) < 3e-5 and ((top[..., 0]-top[..., 1]) > 1e-4*a.abs().max()).all()


def greedy(m, ids):
    for _ in range(NEW): ids = torch.cat([ids, m(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


def prompt(m, r, vocab):
    "Ragged token ids, and what the oracle makes of them"
    for _ in range(50):
        ids = torch.tensor([[r.randrange(vocab) for _ in range(s)] for s in [r.randrange(1, 40)] for _ in range(r.randrange(1, 4))])
        full = greedy(m, ids)
        if steady(m, full): return ids, full
    raise AssertionError('no prompt found that rounding does not disturb')


def ours_greedy(m, ids):
    cache = m.new_cache(len(ids), ids.shape[1]+NEW)
    out, step = ids, ids
    for _ in range(NEW):
        step = m(step, cache=cache, logits_to_keep=1).argmax(-1)
        out = torch.cat([out, step], 1)
    return out


@pytest.mark.parametrize('draw', range(DRAWS))
@pytest.mark.parametrize('family', FAMILIES)
def test_parity(family, draw, tmp_path):
    r = random.Random(f'{SEED} {family} {draw}')
    config = FAMILIES[family](r)
    theirs = oracle(config, r.randrange(10**6))
    shards = r.random() < .5
    theirs.save_pretrained(tmp_path/'a', max_shard_size='8KB' if shards else '1GB')
    ids, full = prompt(theirs, r, config.vocab_size)
    told = f'PARITY_SEED={SEED} {family} {draw} {config.to_json_string()}'

    ours = Model.from_pretrained(tmp_path/'a', dtype=torch.float32, device='cpu')
    want = theirs(full).logits
    forms = ('naive', 'absorbed', 'auto') if ours.config.mla else ('auto',)
    for form in forms:
        err = apart(ours(full, mla=form), want)
        assert err < 1e-4, f'{err:.2e} apart, mla={form}: {told}'
    assert torch.equal(ours_greedy(ours, ids), full), told

    saved = ours.save_pretrained(tmp_path/'b', max_shard_bytes=8000 if shards else 10**9)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **EAGER, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told
    for k, v in theirs.state_dict().items(): assert torch.equal(back.state_dict()[k], v), f'{k}: {told}'
    assert torch.equal(back.eval()(full).logits, want), told


@pytest.mark.parametrize('family', FAMILIES)
def test_official_and_transformers_configs_agree(family, tmp_path):
    for draw in range(20):
        config = FAMILIES[family](random.Random(f'{SEED} config {family} {draw}'))
        config.save_pretrained(tmp_path)
        ours = Config.from_hf(json.loads((tmp_path/'config.json').read_text()))
        for form in ('official', 'transformers'):
            assert Config.from_hf(json.loads(json.dumps(ours.to_hf(form)))) == ours, (SEED, draw, form)


# Where transformers and DeepSeek disagree

SMALL = dict(vocab_size=50, num_hidden_layers=2, intermediate_size=20, hidden_size=24, num_attention_heads=2, num_key_value_heads=2,
             q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, first_k_dense_replace=0,
             n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, moe_intermediate_size=10, n_group=4, topk_group=2,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=1)


def test_v2_normalises_or_scales(tmp_path, monkeypatch):
    "DeepSeek-V2's MoEGate: `if top_k > 1 and norm_topk_prob` normalise, else scale. transformers never normalises, always scales"
    config = transformers.DeepseekV2Config(**SMALL, topk_method='group_limited_greedy', norm_topk_prob=True, routed_scaling_factor=2.5)
    theirs = oracle(config, SEED)
    theirs.save_pretrained(tmp_path/'a')
    ids, _ = prompt(theirs, random.Random(SEED), 50)
    ours = Model.from_pretrained(tmp_path/'a', dtype=torch.float32, device='cpu')
    assert apart(ours(ids), theirs(ids).logits) > 1e-3
    gate = type(theirs.model.layers[0].mlp.gate)
    forward = gate.forward
    def as_released(self, x):
        logits, weights, chosen = forward(self, x)
        return logits, weights/weights.sum(-1, keepdim=True), chosen
    monkeypatch.setattr(gate, 'forward', as_released)
    assert apart(ours(ids), theirs(ids).logits) < 1e-4


def test_v3_config_without_router_kind(tmp_path):
    "transformers writes V3 configs without scoring_func, topk_method and moe_layer_freq; sigmoid, the bias and `sum2` are V3's own"
    config = transformers.DeepseekV3Config(**SMALL)
    config.save_pretrained(tmp_path)
    d = json.loads((tmp_path/'config.json').read_text())
    assert not {'scoring_func', 'topk_method', 'moe_layer_freq'} & set(d)
    ours = Config.from_hf(d)
    assert (ours.score_func, ours.score_bias, ours.group_score, ours.moe_layer_freq) == ('sigmoid', True, 'sum2', 1)
    assert ours == Config.from_hf(d | dict(scoring_func='sigmoid', topk_method='noaux_tc', moe_layer_freq=1))


def test_softmax_scale_of_yarn():
    "V2 and V3 multiply the softmax scale by (0.1·mscale_all_dim·ln factor + 1)²: modeling_deepseek.py, DeepseekV2Attention.__init__"
    yarn = dict(type='yarn', factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1)
    lite = Config.from_hf(dict(SMALL, model_type='deepseek_v2', rope_scaling=yarn | dict(mscale=.707, mscale_all_dim=.707)))
    v3 = Config.from_hf(dict(SMALL, model_type='deepseek_v3', rope_scaling=yarn | dict(mscale=1., mscale_all_dim=1.)))
    for c, want in ((lite, 1.590), (v3, 1.874)): assert softmax_scale(c)*12**.5 == pytest.approx(want, abs=1e-3)


def test_group_mask_by_the_definition():
    "Groups are masked with -inf, as in inference/model.py, not with 0, to which negative biased scores of the kept groups would lose"
    c = Config.from_hf(dict(SMALL, model_type='deepseek_v3', num_experts_per_tok=4))
    gate = Model(c, dtype=torch.float32, device='cpu').layers[0].mlp.gate
    gate.e_score_correction_bias.copy_(torch.tensor([-2., -2.5, -2., -2.5, -3., -3., -3., -3.]))
    route = gate(torch.randn(9, 24))
    assert all(set(e.tolist()) == {0, 1, 2, 3} for e in route.experts)

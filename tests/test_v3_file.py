"""DeepSeek-V3 in one file against the library: the shipped model, and configs drawn at random

The seed is printed; SEED=n repeats a run. The library computes with its reference definitions and with the kernels of this machine.
"""
import math
import os
import random

import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.arch.v3 import LatentCache, load_v3
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.files.hub import shipped

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
TOL = 2e-5 # of the largest logit, float32


@pytest.fixture(autouse=True)
def r(request):
    print(f'SEED={SEED}')
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    with torch.no_grad(): yield r


def near(a, b):
    assert a.shape == b.shape
    size = (a - b).abs().max().item()/b.abs().max().item()
    assert size <= TOL, size


def draw(r):
    "A config with V3's router, of any sizes; YaRN and a shared head in half of them"
    groups, each, m = r.choice([1, 2, 4]), r.choice([2, 3, 4]), r.random()
    keep = r.randint(1, groups)
    yarn = dict(kind='yarn', factor=float(r.choice([2, 8, 40])), original_positions=r.choice([16, 64]), mscale=m, mscale_all_dim=m)
    layers = r.randint(1, 3)
    experts = dict(n_dense_layers=r.randint(0, layers), n_routed_experts=groups*each, n_shared_experts=r.randint(1, 2),
                   moe_inter_dim=8*r.randint(1, 3), n_activated_experts=r.randint(1, keep*each), n_expert_groups=groups,
                   n_limited_groups=keep, group_score='sum2', score_func='sigmoid', score_bias=True, norm_topk=r.random() < .7,
                   route_scale=r.choice([1., 2.5]))
    return Config('deepseek_v3', r.randint(40, 90), 8*r.randint(2, 5), layers, r.choice([1, 2, 3, 4]), 8*r.randint(1, 5), **experts,
                  q_lora_rank=8*r.randint(1, 4), kv_lora_rank=8*r.randint(1, 4), qk_nope_head_dim=4*r.randint(1, 4),
                  qk_rope_head_dim=2*r.randint(1, 6), v_head_dim=4*r.randint(1, 4), norm_eps=r.choice([1e-6, 1e-5]), max_positions=256,
                  tie_embeddings=r.random() < .5, rope=Rope(interleaved=True, **(yarn if r.random() < .5 else {})))


def pair(r, folder):
    "A model of the library with random weights, and the file's model from its checkpoint"
    c = draw(r)
    print(c)
    m = Model(c, 'float32', 'cpu').init_weights(.3/math.sqrt(c.dim/32)).eval()
    for name, b in m.named_buffers():
        if name.endswith('correction_bias'): b.copy_(.2*torch.randn_like(b))
    m.save_pretrained(folder)
    return m, load_v3(folder)


@pytest.mark.parametrize('kernels', ['reference', 'auto'])
@pytest.mark.parametrize('n', range(8))
def test_random_configs(r, tmp_path, n, kernels):
    "Whole and in pieces through the cache, rows of different lengths"
    m, ours = pair(r, tmp_path)
    b, s = r.randint(1, 3), r.randint(2, 20)
    ids = torch.randint(m.config.vocab_size, (b, s))
    pad = torch.tensor([r.randrange(s) for _ in range(b)])
    real = torch.arange(s) >= pad[:, None]
    with use(kernels):
        near(ours(ids), m(ids))
        near(ours(ids, pad=pad)[real], m(ids, attention_mask=real.long())[real])
        cache, theirs, at = LatentCache(m.config.n_layers, pad), m.new_cache(b), 0
        while at < s:
            step = r.randint(1 if at else int(pad.max()) + 1, s - at)  # the library wants a token of each row in the first piece
            piece = slice(at, at + step)
            a, want = ours(ids[:, piece], cache), m(ids[:, piece], theirs, attention_mask=None if at else real[:, piece].long())
            near(a[real[:, piece]], want[real[:, piece]])
            at += step
    assert len(cache) == s


@pytest.mark.parametrize('n', range(3))
def test_a_padded_row_continues_as_it_would_alone(r, tmp_path, n):
    m, ours = pair(r, tmp_path)
    ids, pad = torch.randint(m.config.vocab_size, (2, 6)), torch.tensor([0, 3])
    both = ours.generate(ids, 8, pad=pad)
    for i in range(2): assert both[i, pad[i]:].tolist() == ours.generate(ids[i:i + 1, pad[i]:], 8)[0].tolist()


def test_mini(r):
    m, ours = Model.from_pretrained('mini', 'float32', 'cpu').eval(), load_v3(shipped('mini'))
    ids = torch.randint(2, m.config.vocab_size, (2, 40))
    near(ours(ids), m(ids))
    assert ours.generate(ids, 30).tolist() == m.generate(ids, max_new_tokens=30, eos_token_id=()).tolist()


def test_reads_a_checkpoint_of_several_files(r, tmp_path):
    m = Model.from_pretrained('mini', 'float32', 'cpu').eval()
    m.save_pretrained(tmp_path, max_shard_bytes=4_000_000)
    assert len([*tmp_path.glob('*.safetensors')]) > 1
    ids = torch.randint(2, m.config.vocab_size, (1, 12))
    near(load_v3(tmp_path)(ids), m(ids))


@pytest.mark.parametrize('break_it', ['bias in the weights', 'halves', 'unscaled', 'future'])
def test_the_comparison_finds_planted_errors(r, tmp_path, break_it, monkeypatch):
    from deepseek_nb.arch import v3
    m, ours = pair(random.Random(f'{r.random()}'), tmp_path)
    for o in ours.modules():
        if break_it == 'unscaled' and isinstance(o, v3.LatentAttention): o.scale *= 1.1
        if break_it == 'bias in the weights' and isinstance(o, v3.FeedForward): o.down_proj.weight.data *= 1.01
    if break_it == 'halves':
        def rotate(x, a): return torch.cat([(x1 := x.chunk(2, -1))[0]*a.cos() - x1[1]*a.sin(), x1[0]*a.sin() + x1[1]*a.cos()], -1)
        if m.config.qk_rope_head_dim < 4: pytest.skip('one pair is both forms')
        monkeypatch.setattr(v3, 'rotate_pairs', rotate)
    if break_it == 'future': monkeypatch.setattr(v3, 'visible_tokens', lambda s, t, pad: torch.ones(1, 1, s, t, dtype=torch.bool))
    ids = torch.randint(m.config.vocab_size, (1, 12))
    with pytest.raises(AssertionError): near(ours(ids), m(ids))

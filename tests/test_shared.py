"A prompt that is computed once gives the values and gradients of separate rows, on fresh ragged batches."
import random

import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.train.data import IGNORE
from deepseek_nb.train.lora import LoraConfig
from deepseek_nb.train.on_policy import SHARED, answer_hidden, answer_log_probs, own_batch, shared_rows, shares_prompts
from deepseek_nb.train.trainer import checkpointed

SIZES = dict(vocab_size=61, dim=32, n_layers=2, n_heads=4, inter_dim=48, max_positions=64)
LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
CASES = dict(
    gqa=Config('llama', **SIZES, n_kv_heads=2, head_dim=8),
    tied=Config('qwen2', **SIZES, n_kv_heads=1, head_dim=8, tie_embeddings=True, attn_bias=True),
    mixture=Config('deepseek_v3', **SIZES, **LATENT, n_dense_layers=1, moe_inter_dim=16, n_routed_experts=8, n_shared_experts=1,
                   n_activated_experts=2, score_func='sigmoid', score_bias=True, norm_topk=True))


@pytest.fixture
def rng():
    n = random.SystemRandom().randrange(10**6)
    print(f'seed {n}')
    torch.manual_seed(n)
    return random.Random(n)


def answers_of(rng, groups=3, g=4):
    "Groups of ragged answers to ragged prompts, in any order; an answer may have one token"
    ids = lambda n: [rng.randrange(61) for _ in range(n)]
    asked = [ids(rng.randint(6, 15)) for _ in range(groups)]
    rows = [(p, ids(rng.choice((1, rng.randint(2, 9))))) for p in asked for _ in range(g)]
    rng.shuffle(rows)
    return own_batch(*zip(*rows, strict=True))


def both(model, batch, weights, share):
    model.zero_grad()
    new, entropies = answer_log_probs(model, batch, .8, share=share)
    (new*weights).sum().backward()
    return new.detach(), entropies, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize('lora', [False, True])
@pytest.mark.parametrize('kind', CASES)
def test_values_and_gradients_are_those_of_separate_rows(kind, lora, rng):
    "In float64, but rotary positions and the scores of latents are computed in float32, in both directions"
    model = Model(CASES[kind], dtype=torch.float64, device='cpu').init_weights(.2)
    if lora:
        LoraConfig(r=2, lora_alpha=4, target_modules=['q_proj', 'o_proj', 'down_proj']).apply(model)
        for n, p in model.named_parameters():
            if n.endswith('.b'): torch.nn.init.normal_(p, std=.2)
    batch = answers_of(rng)
    weights = torch.randn(int((batch['labels'] != IGNORE).sum()), dtype=torch.float64)
    assert shared_rows(batch).size <= SHARED*batch['tokens'].numel()
    eps = 1e-5 if CASES[kind].mla else 1e-12
    plain, again = both(model, batch, weights, False), both(model, batch, weights, True)
    for a, b, most in zip(plain, again, (eps, eps, max(eps, 1e-6)), strict=True): assert (a - b).norm() <= most*a.norm()
    with checkpointed(model): less = both(model, batch, weights, True)
    for a, b in zip(again, less, strict=True): assert (a - b).norm() <= 1e-12*a.norm()
    with torch.no_grad(): assert (answer_log_probs(model, batch, .8)[0] - again[0]).norm() <= eps*again[0].norm()


def test_what_stays_as_it_is(rng):
    model = Model(CASES['gqa'], dtype='float32', device='cpu').init_weights(.2)
    alone = own_batch([[3, 4, 5], [3, 4], [9]], [[1, 2], [3, 4, 5], [6]])
    assert shared_rows(alone).size > SHARED*alone['tokens'].numel() # three different prompts
    assert torch.equal(answer_hidden(model, alone), answer_hidden(model, alone, share=False))
    gap = dict(alone, labels=alone['labels'].masked_fill(torch.arange(alone['labels'].shape[1]) == 2, IGNORE))
    packed = dict(alone, documents=torch.tensor([[0, 0, 1, 1, -1]]*3))
    assert shared_rows(gap) is None and shared_rows(packed) is None
    assert shares_prompts(model)
    sparse = CASES['mixture'].__class__('deepseek_v32', **SIZES, **LATENT, q_lora_rank=16, index_n_heads=2, index_head_dim=8, index_topk=4)
    assert not shares_prompts(Model(sparse, dtype='float32', device='cpu'))

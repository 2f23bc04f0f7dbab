"""Speculative decoding: the tokens of plain decoding, whatever the drafts, and the distribution of plain sampling

Fresh random models and prompts; the seed is printed, SEED=n repeats a run, DRAWS=100000 draws more.
"""
import math
import os
import random
from itertools import product

import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.infer import speculate as S
from deepseek_nb.infer.drafts import Draft
from deepseek_nb.infer.generate import Sampling, left_padded

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
DRAWS = int(os.environ.get('DRAWS', 1200))
V = 6
LLAMA = dict(dim=32, n_layers=2, n_heads=4, inter_dim=48, n_kv_heads=2, head_dim=8, max_positions=160)
V3 = dict(dim=32, n_layers=2, n_heads=2, inter_dim=64, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
          v_head_dim=8, n_dense_layers=1, n_routed_experts=8, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=16,
          n_mtp_layers=1, max_positions=160)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_speculate SEED={SEED}')


def build(kind, vocab=50, seed=0, std=.3):
    torch.manual_seed(SEED + seed)
    config = Config(kind, vocab_size=vocab, **(V3 if kind == 'deepseek_v3' else LLAMA))
    model = Model(config, dtype='float32', device='cpu').init_weights(std)
    if kind == 'deepseek_v3': Model.init_weights(model.add_mtp().mtp, std)
    return model


def drafts(model):
    "A source of drafts that is often right, one that is seldom, and the others"
    nearly = build(model.config.model_type, model.config.vocab_size)
    with torch.no_grad():
        for p in nearly.parameters(): p.add_(torch.randn_like(p), alpha=.02)
    return ['lookup', nearly, build('llama', model.config.vocab_size, 1), *['mtp']*hasattr(model, 'mtp')]


def prompts(model, n=5):
    "Repetitive prompts of different lengths, one of them across several pages"
    rng = random.Random(SEED)
    return [[rng.randrange(model.config.vocab_size) for _ in range(4)]*k for k in (1, 2, 3, 5, 20)][:n]


def tokens(model, rows, n, *args, **kwargs):
    out = [[] for _ in rows]
    for new in model.speculate(rows, n, *args, **kwargs):
        for o, more in zip(out, new, strict=True): o += more
    return out


@pytest.mark.parametrize('kind', ['llama', 'deepseek_v3'])
def test_greedy_tokens_are_those_of_the_same_step_without_drafts(kind):
    "By the ragged step, bit for bit; so ties and near-ties too."
    model = build(kind)
    rows = prompts(model)
    want = tokens(model, rows, 50, None)
    for draft, n in product(drafts(model), (1, 5)): assert tokens(model, rows, 50, draft, n) == want, (draft, n)
    for row, new in zip(rows, want, strict=True): assert tokens(model, [row], 50, None) == [new], 'another answer in company'


@pytest.mark.parametrize('kind', ['llama', 'deepseek_v3'])
def test_generate_is_what_it_was(kind):
    model = build(kind)
    for draft in drafts(model):
        for row in prompts(model, 3):
            ids = torch.tensor([row])
            assert model.generate(ids, 40, draft=draft, eos_token_id=[]).equal(model.generate(ids, 40, eos_token_id=[])), draft


def test_batches_end_by_row():
    "Rows end at their end tokens at different times, and are padded behind it."
    model = build('llama', 12)
    ids, mask = left_padded(prompts(model, 4))
    for ends in ([3], [1, 2], []):
        want = model.generate(ids, 30, attention_mask=mask, eos_token_id=ends, pad_token_id=7)
        for draft in ('lookup', build('llama', 12, 1)):
            got = model.generate(ids, 30, attention_mask=mask, eos_token_id=ends, pad_token_id=7, draft=draft)
            assert got.equal(want), (draft, ends)


def test_seeded_sampling_does_not_see_fixed_drafts():
    model, how = build('llama', 12), dict(temperature=.8, top_p=.95, repetition_penalty=1.2, seed=5, eos_token_id=[])
    for row in prompts(model, 3):
        ids = torch.tensor([row])
        assert model.generate(ids, 40, draft='lookup', **how).equal(model.generate(ids, 40, **how))


def test_random_drafts_are_reproducible_with_a_length():
    model, other = build('llama', 12), build('llama', 12, 1)
    how = dict(draft=other, draft_tokens=3, temperature=1., eos_token_id=[])
    draw = lambda seed: model.generate(torch.tensor([[1, 2, 3]]), 30, seed=seed, **how)
    assert draw(1).equal(draw(1)) and not draw(1).equal(draw(2))


# ---- the distribution

def exact(model, prompt, how, n):
    "Probability of each continuation of n tokens"
    found = {(): 1.}
    for _ in range(n):
        longer = {}
        for text, p in found.items():
            ids = torch.tensor([[*prompt, *text]])
            with torch.no_grad(): probs = how.adjusted(model(ids)[:, -1], ids).softmax(-1)[0]
            longer |= {(*text, t): p*q for t, q in enumerate(probs.tolist()) if q}
        found = longer
    return found


def surprise(counts, probs):
    "χ² of counts, as a number that is normally distributed if they follow the probabilities (Wilson and Hilferty)"
    total = sum(counts.values())
    assert not counts.keys() - probs.keys(), 'a token that the settings exclude'
    rare = sum(p for p in probs.values() if p*total < 5)
    cells = [(counts.get(k, 0), p*total) for k, p in probs.items() if p*total >= 5]
    cells += [(total - sum(c for c, _ in cells), rare*total)]*(rare*total >= 5)
    k = len(cells) - 1
    chi = sum((c - e)**2/e for c, e in cells)
    return ((chi/k)**(1/3) - 1 + 2/(9*k))/math.sqrt(2/(9*k))


def frequencies(model, prompt, draft, how, n, rows=400):
    counts = {}
    for _ in range(DRAWS//rows):
        for new in tokens(model, [prompt]*rows, n, draft, 2, how, page=8): counts[tuple(new)] = counts.get(tuple(new), 0) + 1
    return counts


PENALISED = Sampling(temperature=1.3, top_k=4, repetition_penalty=1.5)


@pytest.mark.parametrize('how', [Sampling(temperature=1.), PENALISED], ids=['plain', 'penalised'])
@pytest.mark.parametrize('draft', ['lookup', 'model', 'mtp'])
def test_sampling_follows_the_models_distribution(draft, how):
    torch.manual_seed(SEED)
    model, prompt = build('deepseek_v3', V, std=.2), [1, 2, 3, 1]
    source = build('llama', V, 1, std=.5) if draft == 'model' else draft
    assert surprise(frequencies(model, prompt, source, how, 3), exact(model, prompt, how, 3)) < 5


def test_the_distribution_test_sees_a_wrong_rule(monkeypatch):
    "A rule that keeps every drafted token."
    torch.manual_seed(SEED)
    how, keep = Sampling(temperature=1.), lambda logits, draft, *rest: [*draft.tokens, how.choose(logits[-1:], None).item()]
    monkeypatch.setattr(S, 'verify_drawn', keep)
    model = build('deepseek_v3', V, std=.2)
    assert surprise(frequencies(model, [1, 2, 3, 1], build('llama', V, 1, std=.9), how, 3), exact(model, [1, 2, 3, 1], how, 3)) > 5


def test_acceptance_is_the_shared_probability():
    g = torch.Generator().manual_seed(SEED)
    for _ in range(3):
        p, q = (torch.randn(V, generator=g).softmax(-1) for _ in range(2))
        drawn = torch.multinomial(q, 1500, replacement=True, generator=g).tolist()
        kept = sum(len(S.verify_drawn(p.log().expand(2, V), Draft([x], [q]), [], Sampling(temperature=1.), g)) - 1 for x in drawn)
        share = torch.minimum(p, q).sum().item()
        assert abs(kept/1500 - share) < 5*math.sqrt(share*(1 - share)/1500) + 1e-6


# ---- bad input

def test_bad_input():
    model, ids = build('llama'), torch.tensor([[1, 2]])
    for said, kwargs in (('same vocabulary', dict(draft=build('llama', 20))), ("draft is 'fast'", dict(draft='fast')),
                         ('no multi-token-prediction blocks', dict(draft='mtp')),
                         ('draft_tokens is -1', dict(draft='lookup', draft_tokens=-1)),
                         ('without a draft', dict(draft_tokens=4)), ('caches of its own', dict(draft='lookup', cache=model.new_cache(1)))):
        with pytest.raises(ValueError, match=said): model.generate(ids, 4, **kwargs)


def test_the_context_ends():
    model = build('llama')
    ids = torch.tensor([[1, 2, 3]*50])
    with pytest.warns(UserWarning, match='will be generated'):
        assert model.generate(ids, 40, draft='lookup', eos_token_id=[]).shape[1] == model.config.max_positions

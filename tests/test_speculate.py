"""Speculative decoding: the tokens of plain decoding, whatever the drafts, and the distribution of plain sampling

Fresh random models and prompts; the seed is printed, SEED=n repeats a run, DRAWS=100000 draws more from models, PROMPTS=1000 compares more
answers of a trained model. `python tests/test_speculate.py mini mini-v4 smollm2-135m` counts equal answers of 1,000 prompts, prints where
others part, and stores both in nbs/results/evidence/speculate-equality.json; RECORD=path stores them elsewhere.
"""
import json
import math
import os
import random
import sys
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch

from deepseek_nb.arch.dspark import DSpark
from deepseek_nb.arch.model import Model
from deepseek_nb.bench import make_record, save_result
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.infer import speculate as S
from deepseek_nb.infer.drafts import Draft
from deepseek_nb.infer.engine import Engine
from deepseek_nb.infer.generate import left_padded
from deepseek_nb.infer.request import Request
from deepseek_nb.infer.sampling import RowSampler, SamplingParams, sample_ahead
from deepseek_nb.serve.grammar import compile_grammar
from deepseek_nb.train.corpora import corpus

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
PROMPTS = int(os.environ.get('PROMPTS', 3))
DRAWS = int(os.environ.get('DRAWS', 800))
V = 6
LLAMA = dict(dim=32, n_layers=2, n_heads=4, inter_dim=48, n_kv_heads=2, head_dim=8, max_positions=160)
V3 = dict(dim=32, n_layers=2, n_heads=2, inter_dim=64, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
          v_head_dim=8, n_dense_layers=1, n_routed_experts=8, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=16,
          n_mtp_layers=1, max_positions=160)
V32 = dict(index_n_heads=4, index_head_dim=16, index_topk=9)
V4 = dict(dim=32, n_layers=3, n_heads=4, inter_dim=64, n_kv_heads=1, head_dim=12, qk_rope_head_dim=4, q_lora_rank=16, o_groups=2,
          o_lora_rank=8, index_n_heads=2, index_head_dim=8, index_topk=3, n_routed_experts=4, n_activated_experts=2, n_shared_experts=1,
          moe_inter_dim=16, score_func='sqrtsoftplus', swiglu_limit=10., n_mtp_layers=1, max_positions=160, rope=Rope(interleaved=True),
          compress_rope=Rope(16e4, interleaved=True))


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_speculate SEED={SEED}')


def build(kind, vocab=50, seed=0, std=.3):
    torch.manual_seed(SEED + seed)
    config = Config(kind, vocab_size=vocab, **(LLAMA if kind == 'llama' else V3 if kind == 'deepseek_v3' else V3 | V32))
    model = Model(config, dtype='float32', device='cpu').init_weights(std)
    if kind != 'llama': Model.init_weights(model.add_mtp().mtp, std)
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


@pytest.mark.parametrize('kind', ['llama', 'deepseek_v3', 'deepseek_v32'])
def test_greedy_tokens_are_those_of_the_same_step_without_drafts(kind):
    "By the ragged step, bit for bit; so ties and near-ties too."
    model = build(kind)
    rows = prompts(model)
    want = tokens(model, rows, 50, None)
    sources = ['lookup', 'mtp'] if kind == 'deepseek_v32' else drafts(model)
    for draft, n in product(sources, (1, 5)): assert tokens(model, rows, 50, draft, n) == want, (draft, n)
    for row, new in zip(rows, want, strict=True): assert tokens(model, [row], 50, None) == [new], 'another answer in company'


@pytest.mark.parametrize('kind', ['llama', 'deepseek_v3', 'deepseek_v32'])
def test_generate_is_what_it_was(kind):
    model = build(kind)
    for draft in ['mtp'] if kind == 'deepseek_v32' else drafts(model):
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


# ---- V4's block

def v4(vocab, r, std=.3):
    "A tiny V4 model with layers of all kinds in a random order"
    torch.manual_seed(r.randrange(10**9))
    ratios = tuple(r.sample((0, 4, 8), 3))
    drawn = dict(window=r.randrange(3, 9), hc_mult=r.choice((1, 2, 4)), compress_ratios=ratios, n_hash_layers=r.randrange(3))
    c = Config('deepseek_v4', vocab_size=vocab, mtp_ratios=(0,), **drawn, **V4)
    model = Model(c, dtype='float32', device='cpu').add_mtp().init_weights(std)
    for m in model.modules():
        if hasattr(m, 'base') and hasattr(m, 'scale'): m.reset(std=.3, scale=1.)
    return model.requires_grad_(False)


def test_v4_drafts_by_its_own_block():
    "Greedy tokens are those of plain decoding, though windows and entries are taken back; some drafted tokens are kept."
    r, kept = random.Random(SEED), 0
    model = v4(6, r)
    for row in prompts(model, 4)[1::2]:
        want = model.generate(torch.tensor([row]), 30, eos_token_id=[])[0, len(row):].tolist()
        for n in (1, r.randrange(2, 12)):
            steps = [new[0] for new in model.speculate([row], 30, 'mtp', n)]
            assert sum(steps, []) == want, (n, model.config)
            kept += len(want) - len(steps)
    assert kept


def test_v4_drafts_are_drawn_from_what_they_say():
    "Sampled drafts of the block: the distributions by a slow loop without a cache, and the text follows the model's distribution."
    r, how = random.Random(SEED + 1), SamplingParams(temperature=1.2, seed=0)
    model, text = v4(4, r), [r.randrange(4) for _ in range(21)]
    drafter, block, at = S.MTPDrafter(model, how), model.mtp[0], 0
    for end in (7, 8, 13, 21):
        with torch.no_grad(), model.keep_hidden() as kept: model.hidden(torch.tensor([text[:end]]))
        drafter.note(text[:end], kept[0][0, at:end - 1])
        draft, at, x, tokens = drafter.draft(text[:end], 4), end - 1, kept[0][:, :-1], text[1:end]
        for t, q in zip(draft.tokens, draft.probs, strict=True):
            ids = torch.tensor([tokens])
            out = block(x, model.embed_tokens(ids), model.context(len(tokens), tokens=ids)._replace(by_layer=()))
            p = (model.lm_head(block.last(out[:, -1:])).float()/how.temperature).softmax(-1)[0, -1]
            assert torch.allclose(p, q, atol=1e-5)
            x, tokens = torch.cat([x, out[:, -1:]], 1), [*tokens, t]
    counts = {}
    for new in tokens_of(model, text[:6], how, 120): counts[new] = counts.get(new, 0) + 1
    assert surprise(counts, exact(model, text[:6], how, 2)) < 5


def test_v4_drafts_by_a_block_drafter():
    "Greedy tokens are those of plain decoding, sampled ones follow the model's distribution; a drafter of another model is refused."
    r, kept, how = random.Random(SEED + 2), 0, SamplingParams(temperature=1.3, top_k=3, repetition_penalty=1.4)
    model = v4(4, r)
    for row in prompts(model, 10)[2:]:
        want = model.generate(torch.tensor([row]), 24, eos_token_id=[])
        spark = Model.init_weights(DSpark(model.config, r.sample(range(3), 2), r.randrange(2, 6), 1, 4), .3)
        for n in (None, 3):
            steps = [new[0] for new in model.speculate([row], 24, spark, n)]
            assert row + sum(steps, []) == want[0].tolist(), (n, model.config)
            kept += 24 - len(steps)
    assert kept
    counts = {}
    for new in map(tuple, tokens(model, [row[:6]]*120, 2, spark, 2, how)): counts[new] = counts.get(new, 0) + 1
    assert surprise(counts, exact(model, row[:6], how, 2)) < 5
    with pytest.raises(ValueError, match='the drafter was made for'): model.generate(want, 2, draft=DSpark(v4(6, r).config, (0,)))


def tokens_of(model, prompt, how, n): return map(tuple, tokens(model, [prompt]*n, 2, 'mtp', 2, how))


# ---- the distribution

def distribution(logits, how, seen):
    "What a row draws from"
    w = RowSampler(how, seen.tolist()).weights(logits)
    return w/w.sum()


def exact(model, prompt, how, n):
    "Probability of each continuation of n tokens"
    found = {(): 1.}
    for _ in range(n):
        longer = {}
        for text, p in found.items():
            ids = torch.tensor([[*prompt, *text]])
            with torch.no_grad(): probs = distribution(model(ids)[0, -1], how, ids[0])
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


PENALISED = SamplingParams(temperature=1.3, top_k=4, repetition_penalty=1.5)


@pytest.mark.parametrize('how', [SamplingParams(temperature=1.), PENALISED], ids=['plain', 'penalised'])
@pytest.mark.parametrize('draft', ['lookup', 'model', 'mtp'])
def test_sampling_follows_the_models_distribution(draft, how):
    torch.manual_seed(SEED)
    model, prompt = build('deepseek_v3', V, std=.2), [1, 2, 3, 1]
    source = build('llama', V, 1, std=.5) if draft == 'model' else draft
    assert surprise(frequencies(model, prompt, source, how, 3), exact(model, prompt, how, 3)) < 5


def test_the_distribution_test_sees_a_wrong_rule(monkeypatch):
    "A rule that keeps every drafted token."
    torch.manual_seed(SEED)
    how = SamplingParams(temperature=1.)
    monkeypatch.setattr(S, 'verify_drawn', lambda p, q, drafted, u: (torch.tensor(len(drafted)), p[-1]))
    model = build('deepseek_v3', V, std=.2)
    assert surprise(frequencies(model, [1, 2, 3, 1], build('llama', V, 1, std=.9), how, 3), exact(model, [1, 2, 3, 1], how, 3)) > 5


def test_acceptance_is_the_shared_probability():
    g, n = torch.Generator().manual_seed(SEED), 125_000
    for _ in range(3):
        p, q = (torch.randn(V, generator=g).softmax(-1) for _ in range(2))
        drawn, u = torch.multinomial(q, n, replacement=True, generator=g)[:, None], torch.rand(n, 1, generator=g)
        kept, _ = S.verify_drawn(p.expand(n, 2, V), q.expand(n, 1, V), drawn, u)
        share = torch.minimum(p, q).sum().item()
        assert abs(kept.float().mean().item() - share) < 5.5*math.sqrt(share*(1 - share)/n) + 1e-6


# ---- the rules alone, on a model that is a table: a hundred thousand texts at once

class Table:
    "Logits of the next token that depend on the last one"
    def __init__(self, g, how, sharp=1.): self.logits, self.how = sharp*torch.randn(V, V, generator=g), how
    def probs(self, text):
        "Distribution after each text, computed once for equal texts"
        found, which = text.unique(dim=0, return_inverse=True)
        return torch.stack([distribution(self.logits[o[-1]], self.how, o) for o in found])[which]

    def continued(self, text, n):
        "Probability of each of the V**n continuations"
        texts, probs = text[None], torch.ones(1, dtype=torch.double)
        for _ in range(n):
            probs = (probs[:, None]*self.probs(texts).double()).flatten()
            texts = torch.cat([texts.repeat_interleave(V, 0), torch.arange(V).repeat(len(texts))[:, None]], 1)
        return probs


def drawn_from(p, g): return torch.multinomial(p, 1, generator=g)[:, 0]


def two_tokens(rule, target, source, start, rows, g, n=2):
    "The first two new tokens of each row, from steps with drafts of n tokens"
    text, q = start.repeat(rows, 1), []
    for _ in range(n):
        q.append(source.probs(text))
        text = torch.cat([text, drawn_from(q[-1], g)[:, None]], 1)
    p = torch.stack([target.probs(text[:, :len(start) + k]) for k in range(n + 1)], 1)
    draft = text[:, -n:]
    kept, rest = rule(p, torch.stack(q, 1), draft, torch.rand(rows, n, generator=g))
    first = torch.where(kept > 0, draft[:, 0], after := drawn_from(rest, g))
    plain = drawn_from(target.probs(torch.cat([start.repeat(rows, 1), first[:, None]], 1)), g)
    return torch.stack([first, torch.where(kept > 1, draft[:, 1], torch.where(kept == 1, after, plain))], 1)


def deviation(found, probs):
    "As `surprise`, of codes of texts"
    counts = found.bincount(minlength=len(probs)).tolist()
    return surprise({i: c for i, c in enumerate(counts) if c}, {i: p for i, p in enumerate(probs.tolist()) if p})


RULES = [SamplingParams(temperature=1.), SamplingParams(temperature=1.3, top_k=4, top_p=.95, repetition_penalty=1.5)]


@pytest.mark.parametrize('how', RULES, ids=['plain', 'penalised'])
def test_a_hundred_thousand_texts(how):
    "Drafts of a model that is near or far"
    g = torch.Generator().manual_seed(SEED)
    target, start = Table(g, how), torch.randint(V, (4,), generator=g)
    far = Table(g, how, 2.)
    near = Table(g, how)
    near.logits = target.logits + .3*near.logits
    for source in (near, far):
        found = two_tokens(S.verify_drawn, target, source, start, 100_000, g)
        assert deviation(found[:, 0]*V + found[:, 1], target.continued(start, 2)) < 5


@pytest.mark.parametrize('wrong', ['keeps all', 'redraws from p', 'forgets penalties', 'looks at the draft'])
def test_wrong_rules_are_seen(wrong):
    "The last one verifies a draft only if it begins with token 0: the length of a draft then depends on a drafted token."
    g, how = torch.Generator().manual_seed(SEED), RULES[wrong == 'forgets penalties']
    target, far = Table(g, how), Table(g, how, 2.)
    forgets = Table(g, SamplingParams(temperature=1.3))
    forgets.logits = target.logits
    def rule(p, q, draft, u):
        kept, rest = S.verify_drawn(p, q, draft, u)
        if wrong == 'keeps all': return torch.full_like(kept, draft.shape[1]), p[:, -1]
        if wrong == 'redraws from p': rest = torch.where((kept == 0)[:, None], p[:, 0], rest)
        if wrong == 'looks at the draft':
            rest = torch.where((draft[:, :1] == 0), rest, p[:, 0])
            kept = torch.where(draft[:, 0] == 0, kept, 0)
        return kept, rest
    def seen_after(last):
        start = torch.tensor([0, 1, 2, last])
        found = two_tokens(rule, forgets if wrong == 'forgets penalties' else target, far, start, 100_000, g)
        counts, probs = found[:, 0].bincount(minlength=V).tolist(), target.continued(start, 1)
        try: return surprise({i: c for i, c in enumerate(counts) if c}, {i: p for i, p in enumerate(probs.tolist()) if p}) > 5
        except AssertionError as error: return 'exclude' in str(error)
    assert any(seen_after(last) for last in range(V))  # each last token has its own two distributions; a few differ by little


def test_sampling_one_row_at_a_time_is_plain_sampling():
    "A fixed draft uses the random numbers of plain decoding, whatever it says."
    for seed in range(20):
        g, texts = torch.Generator().manual_seed(SEED + seed), []
        table, start, how = torch.randn(V, V, generator=g), torch.randint(V, (4,), generator=g).tolist(), replace(RULES[1], seed=seed)
        for length in (0, 3):
            row, text = RowSampler(how, start), list(start)
            while len(text) < 30:
                draft = torch.randint(V, (length,), generator=g).tolist()
                [new] = sample_ahead(table[[text[-1], *draft]], [row], [draft])
                text += [d.id for d in new]
            texts.append(text[:30])
        assert texts[0] == texts[1]


def test_a_row_with_a_drawn_draft_follows_its_distribution():
    "The loop's own use of the rule: state of the sampler, penalties that see the draft, the token behind it"
    g = torch.Generator().manual_seed(SEED)
    how, start, n, found = RULES[1], [1, 2], 8_000, []
    target, source = Table(g, how), Table(g, how, 2.)
    q, p = source.probs(torch.tensor([start])), target.continued(torch.tensor(start), 2)
    second = source.probs(torch.tensor([[*start, t] for t in range(V)]))
    for seed in range(n):
        row, first = RowSampler(replace(how, seed=seed), start), int(drawn_from(q, g))
        draft = Draft([first, int(drawn_from(second[first][None], g))], [q[0], second[first]])
        new = [d.id for d in S.verify_drafts(target.logits[[start[-1], *draft.tokens]], [row], [draft])[0]]
        assert row.tokens == new and 1 <= len(new) <= 3
        while len(new) < 2: new = [*new, row.sample(target.logits[new[-1]]).id]
        found.append(new[0]*V + new[1])
    assert deviation(torch.tensor(found), p) < 5


# ---- trained models

def openings(tok, n, length=24):
    "Beginnings of real texts, as token ids"
    return [tok.encode(t)[:length] for t in random.Random(0).sample(lines(), n)]


@cache
def lines(): return [line for d in corpus('brown') for line in d['text'].split('\n') if len(line) > 150]


def parted(model, draft, prompts, n):
    "Greedy answers with drafts that differ from those of `generate`: prompt, position, and the gap between the two tokens' logits"
    for prompt in prompts:
        plain = model.generate(torch.tensor([prompt]), n, eos_token_id=[])[0]
        new = model.generate(torch.tensor([prompt]), n, eos_token_id=[], draft=draft)[0]
        if plain.equal(new): continue
        at = int((plain != new).nonzero()[0])
        with torch.no_grad(): logits = model(plain[None, :at], logits_to_keep=1)[0, -1]
        yield prompt, at, float(logits[plain[at]] - logits[new[at]])


@pytest.mark.parametrize('draft', ['lookup', 'mtp'])
def test_greedy_answers_of_a_trained_model(draft):
    model, tok = Model.from_pretrained('mini', dtype='float32', device='cpu', mtp=True), Tokenizer.from_pretrained('mini')
    assert [*parted(model, draft, openings(tok, PROMPTS), 48)] == []


# ---- in a server: a trained model, grammars, and all sources

def schema_of(tok): return compile_grammar(tok, 'schema', dict(type='object', properties=dict(
    name=dict(type='string', maxLength=12), parts=dict(type='array', items=dict(type='integer'), minItems=3, maxItems=4)),
    required=['name', 'parts'], additionalProperties=False))


def test_grammars_and_all_sources_in_a_server():
    "Answers within a schema, sampled and greedy rows beside them: the same tokens from all sources, and the grammar ends complete."
    pytest.importorskip('llguidance')
    model, tok = Model.from_pretrained('mini', dtype='float32', device='cpu', mtp=True), Tokenizer.from_pretrained('mini')
    prompt, rng = tok.encode('The Congress of the United States, in the year of the Congress of the United States'), random.Random(SEED)
    settings = (0., 0.), (1., .5), (.8, 0.), (0., 1.)
    params = [SamplingParams(temperature=t, seed=rng.randrange(99), frequency_penalty=f) for t, f in settings]
    results = []
    for draft in (None, 'lookup', 'mtp', model):
        engine = Engine(model, tok, nbytes=2**23, draft=draft, draft_tokens=draft and 3)
        grammars = [schema_of(tok) for _ in params[:2]]
        asked = [Request(prompt[i:], p, max_tokens=40, stop_ids=() if i > 1 else None, grammar=grammars[i] if i < 2 else None)
                 for i, p in enumerate(params)]
        streams = [engine.submit(r) for r in asked]
        while engine.step(): continue
        results.append([[p.id for p in s] for s in streams])
        assert all(g.finished or len(t) == 40 for g, t in zip(grammars, results[-1], strict=False))
        assert draft is None or all(s.drafted for s in streams[2:]) and engine.stats.accepted
    assert results[1:] == results[:1]*3


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


# ---- counts over many prompts: python tests/test_speculate.py mini mini-v4 smollm2-135m

ROWS, NEW, LENGTHS = 25, 48, dict(lookup=3, mtp=1)


def compared(model, asked, drafts):
    "Rows that differ from plain decoding, for each draft; each of them is generated again alone, with and without drafts"
    ids = torch.tensor([row[:min(map(len, asked))] for row in asked])
    plain = model.generate(ids, NEW, eos_token_id=[])
    for draft in drafts:
        new = model.generate(ids, NEW, eos_token_id=[], draft=draft, draft_tokens=LENGTHS[draft])
        other = (plain != new).any(1).nonzero()[:, 0].tolist()
        yield draft, [[i, *apart[1:]] for i in other for apart in parted(model, draft, [ids[i].tolist()], NEW)]


def count(name, path):
    "Equal greedy answers of a model, stored in a record; goes on where the last run ended"
    mtp, asked = name.startswith('mini'), int(os.environ.get('PROMPTS', 1000))
    model, tok = Model.from_pretrained(name, dtype='float32', device='cpu', mtp=mtp), Tokenizer.from_pretrained(name)
    texts, drafts = openings(tok, asked), ['lookup', *['mtp']*mtp]
    result = json.loads(path.read_text())['result'] if path.exists() else {}
    found = result.setdefault(name, dict(prompts=0, tokens=NEW, lengths={d: LENGTHS[d] for d in drafts}, parted={d: [] for d in drafts}))
    for at in range(found['prompts'], asked, ROWS):
        for draft, apart in compared(model, texts[at:at + ROWS], drafts): found['parted'][draft] += [[at + i, *rest] for i, *rest in apart]
        found['prompts'] = min(asked, at + ROWS)
        save_result(path, make_record('speculate-equality', result))
    for draft, apart in found['parted'].items():
        print(f"{name}, {draft}: {found['prompts'] - len(apart)} of {found['prompts']} answers are equal", *apart, sep='\n', flush=True)


if __name__ == '__main__':
    for name in sys.argv[1:]: count(name, Path(os.environ.get('RECORD', 'nbs/results/evidence/speculate-equality.json')))

"Bias evaluations: the same items and scores as lm-evaluation-harness, by the definitions, and swaps that can be undone"
import importlib.util
import json
import os
import random
import re
import secrets
from pathlib import Path

import numpy as np
import pytest

from deepseek_nb.eval import bias as A
from deepseek_nb.eval import bias as B
from deepseek_nb.eval import classify as W
from deepseek_nb.eval.choice import read_lines

DATA = Path(os.environ.get('DEEPSEEK_NB_DATA', '.'))
needs = lambda name: pytest.mark.skipif(not (DATA/name).is_dir(), reason=f'the set {name} is not here (DEEPSEEK_NB_DATA)')
harness = pytest.mark.skipif(importlib.util.find_spec('lm_eval') is None, reason='lm_eval is not installed')


@pytest.fixture
def rng():
    print('seed', seed := secrets.randbits(32))
    return random.Random(seed)


def of_transformers(batch=12, dtype='float32'):
    "SmolLM2, as the harness runs it with transformers"
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deepseek_nb.files.hub import fetch
    path = fetch('smollm2-135m')
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)).eval()
    return HFLM(pretrained=model, tokenizer=tokenizer, backend='causal', batch_size=batch, device='cpu')


@harness
@needs('crows_pairs')
def test_crows_pairs_as_in_the_harness(rng, tmp_path):
    """A random sample: the log-likelihood of each sentence by the harness's class for transformers and by ours; CROWS_PAIRS=200 asks more.
    In float64, as a sentence such as "Ca'daan had spent hours" adds roundings of float32 up to a thousandth"""
    from deepseek_nb.arch.model import Model
    from deepseek_nb.eval.report import harness_model, local_task, run_tasks
    from deepseek_nb.files.tokenizer import Tokenizer
    model,tok = Model.from_pretrained('smollm2-135m', dtype='float32', device='cpu').double(),Tokenizer.from_pretrained('smollm2-135m')
    pairs = rng.sample(B.read_crows_pairs(DATA/'crows_pairs'), int(os.environ.get('CROWS_PAIRS', 5)))
    rows = [dict(sent_more=p.more, sent_less=p.less, bias_type=p.kind) for p in pairs]
    (tmp_path/'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    local_task(tmp_path, 'crows_pairs/crows_pairs_english.yaml', 'crows_local', dict(test=tmp_path/'rows.jsonl'))
    mine = B.crows_pairs(model, tok, pairs)
    for lm,most in (harness_model(model, tok), 1e-6), (of_transformers(dtype='float64'), 1e-3): # whose norms are in float32
        found = run_tasks(lm, ['crows_local'], tmp_path, log_samples=True)
        theirs = {s['doc_id']: [r[0][0] for r in s['resps']] for s in found['samples']['crows_local']}
        worst = np.abs(mine.scores[:, :, 0] - [theirs[i] for i in range(len(pairs))]).max()
        print(len(pairs), 'pairs by', type(lm).__name__, 'largest difference', worst)
        assert worst < most
        scores = found['results']['crows_local']
        assert scores['pct_stereotype,none'] == pytest.approx(mine.hits.mean())
        assert scores['likelihood_diff,none'] == pytest.approx(abs(mine.gaps).mean(), abs=most)


@harness
@needs('bbq')
def test_bbq_as_in_the_harness(rng):
    "Biased answers and choices of a random sample, and both bias scores for random log-likelihoods"
    from lm_eval.tasks.bbq import utils
    class Rows(list):
        def map(self, f): return [f(dict(r)) for r in self]
    rows = rng.sample([r for p in sorted((DATA/'bbq').glob('*.jsonl*')) for r in read_lines(p)], 1200)
    docs,asked = utils.process_docs(Rows(rows)),[A._question(r) for r in rows]
    scores = np.random.default_rng(rng.randrange(99)).normal(size=(len(rows), 12))
    for doc,q in zip(docs, asked, strict=True):
        assert {q.answers[i] for i in q.biased} == {*doc['biased_answers']} and utils.doc_to_choice(doc) == A.bbq_form(q)[1]
    theirs = [utils.process_results_multiple_choice(doc, [(s, False) for s in row]) for doc,row in zip(docs, scores, strict=True)]
    mine = A.BBQAnswers(asked, scores).columns()
    where = np.array([q.ambiguous for q in asked])
    assert A.bias_ambiguous(mine[where].mean(0)) == pytest.approx(utils.agg_amb_bias_scores([t['amb_bias_score'] for t in theirs]))
    want = utils.agg_disamb_bias_scores([t['disamb_bias_score'] for t in theirs])
    assert A.bias_disambiguated(mine[~where].mean(0)) == pytest.approx(want)
    assert mine[where, 0].mean() == pytest.approx(utils.agg_accuracy_amb([t['accuracy_amb'] for t in theirs]))


@harness
@needs('bbq')
def test_bbq_log_likelihoods_as_in_the_harness(rng):
    "The model of transformers in float32, scored by the harness: the same log-likelihoods, choices and scores; BBQ_ITEMS=200 asks more"
    from lm_eval.api.instance import Instance
    from lm_eval.tasks.bbq import utils

    from deepseek_nb.arch.model import Model
    from deepseek_nb.files.tokenizer import Tokenizer
    class Rows(list):
        def map(self, f): return [f(dict(r)) for r in self]
    rows = rng.sample([r for p in sorted((DATA/'bbq').glob('*.jsonl*')) for r in read_lines(p)], int(os.environ.get('BBQ_ITEMS', 4)))
    docs,asked = utils.process_docs(Rows(rows)),[A._question(r) for r in rows]
    lm = of_transformers()
    requests = [Instance('loglikelihood', d, (f"{d['context']}\n\nQ: {d['question']}\nA:", f' {c}'), i)
                for d in docs for i,c in enumerate(utils.doc_to_choice(d))]
    want = np.array([r[0] for r in lm.loglikelihood(requests, disable_tqdm=True)]).reshape(len(rows), -1)
    model,tok = Model.from_pretrained('smollm2-135m', dtype='float32', device='cpu'),Tokenizer.from_pretrained('smollm2-135m')
    found = A.bbq(model, tok, asked)
    print(len(rows), 'questions, largest difference', abs(found.scores - want).max())
    assert abs(found.scores - want).max() < 1e-3 and (found.scores.argmax(1) == want.argmax(1)).all()
    scored = [utils.process_results_multiple_choice(d, [(s, False) for s in row]) for d,row in zip(docs, want, strict=True)]
    columns,where = found.columns(),np.array([q.ambiguous for q in asked])
    if where.any(): assert columns[where, 0].mean() == pytest.approx(utils.agg_accuracy_amb([t['accuracy_amb'] for t in scored]))
    if not where.all():
        assert columns[~where, 0].mean() == pytest.approx(utils.agg_accuracy_disamb([t['accuracy_disamb'] for t in scored]))


@needs('winobias')
def test_swaps_against_twins():
    "WinoBias has both versions of each sentence: where only the pronoun differs, at most 3% of the swapped ones are wrong"
    table = W.load_swaps('gender')
    same = lambda t: re.sub(r'\W+', ' ', t.lower())
    bare = lambda t: re.sub(r'\b(he|she|him|her|his|hers|himself|herself)\b', '', same(t))
    twins = [t for t in A.read_winobias(DATA/'winobias') if bare(t.pro.sentence) == bare(t.anti.sentence)]
    assert len(twins) > 1500
    wrong = sum(same(W.swapped(a.sentence, table)) != same(b.sentence) for t in twins for a,b in ((t.pro, t.anti), (t.anti, t.pro)))
    assert wrong <= .03*2*len(twins), wrong/len(twins)/2


def test_swaps_can_be_undone(rng):
    "All shifts of a table whose words are different come back to the text"
    for name in ('names', 'religion'):
        table = W.load_swaps(name)
        words = [w for row in table.rows for w in row] + ['and', 'met', 'the', 'in', '1,000', 'Émile']
        for _ in range(20):
            text = ' '.join(rng.choice(words) for _ in range(rng.randrange(1, 12))) + '.'
            for s in range(len(table.groups)):
                assert W.swapped(W.swapped(text, table, s), table, -s) == text
            assert W.swapped_versions(text, table)[:1] == [text]*bool(W.found_groups(text, table))


def test_answers_by_a_loop(rng):
    "Picks and columns of BBQ for random scores, by the rules in words"
    questions,rows = [],np.random.default_rng(rng.randrange(999)).normal(size=(50, 12))
    for i in range(50):
        unknown = rng.randrange(3)
        answers = ['the cat', 'the dog']
        answers.insert(unknown, rng.choice(A.UNKNOWN))
        people = [k for k in range(3) if k != unknown]
        questions.append(A.Question(str(i), 'Animal', 't', rng.random() < .5, 'c', 'q', tuple(answers), unknown, rng.randrange(3),
                                    (rng.choice(people),)))
    found = A.BBQAnswers(questions, rows)
    for offered in (False, True):
        for q,s,pick,column in zip(questions, rows, found.picks(offered), found.columns(offered), strict=True):
            best,chosen = -np.inf,None
            for text,score in zip(A.bbq_form(q)[1], s, strict=True):
                if offered and text not in q.answers: continue
                if score > best: best,chosen = score,q.answers.index(text) if text in q.answers else q.unknown
            assert pick == chosen and column.tolist() == [chosen == q.label, chosen in q.biased, chosen != q.unknown]


@pytest.mark.parametrize('text', ['groups = ["a"]\nwords = [["b"]]', 'groups = ["a", "b"]', 'groups = ["a", "b"]\nwords = [["x", ""]]',
    '= 1'])
def test_bad_tables(text):
    with pytest.raises(ValueError): W.swap_table(text)

"Perturbations, behavioural tests, attacks, calibration and refusals."
import gzip
import io
import json
import os
import pickle
import random
import secrets
import tarfile
from itertools import pairwise

import numpy as np
import pytest

from deepseek_nb.eval import behaviour, choice, classify
from deepseek_nb.eval.choice import SETS

SEED = secrets.randbits(32)


@pytest.fixture(scope='module')
def draw():
    print(f'seed {SEED}')
    return random.Random(SEED)


@pytest.fixture(scope='module')
def drawn():
    rng = np.random.default_rng(SEED)
    c = rng.uniform(.3, 1, 400)
    return c, (rng.random(400) < c).astype(float)


def words_of(draw, n):
    "Words in which no two neighbouring letters are equal, so that every error changes them"
    def word():
        w = draw.choice('abcdefghij')
        while len(w) < draw.choice((4, 6, 9)): w += draw.choice([c for c in 'klmnopqrstuvwxyz' if c != w[-1]])
        return w if len(w) >= 4 else w + 'abcd'[:4 - len(w)]
    return [word() for _ in range(n)]


def distance(a, b):
    "Damerau's: insertions, deletions, replacements and swaps of neighbours"
    d = {(i, j): i + j for i in range(len(a) + 1) for j in range(len(b) + 1) if not i or not j}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i, j] = min(d[i-1, j] + 1, d[i, j-1] + 1, d[i-1, j-1] + (a[i-1] != b[j-1]))
            if i > 1 and j > 1 and a[i-1] == b[j-2] and a[i-2] == b[j-1]: d[i, j] = min(d[i, j], d[i-2, j-2] + 1)
    return d[len(a), len(b)]


def test_a_typing_error_is_one_edit_inside_a_word(draw):
    text = ' '.join(words_of(draw, 40))
    for kind in (*behaviour.TYPOS, None):
        kinds = (kind,) if kind else tuple(behaviour.TYPOS)
        changed = behaviour.with_typos(text, 1, SEED, kinds)
        for a, b in zip(text.split(), changed.split(), strict=True): assert distance(a, b) == 1 and a[0] == b[0], (a, b)
        assert changed == behaviour.with_typos(text, 1, SEED, kinds)


def test_equal_letters_that_swap_still_change_a_word():
    for seed in range(20): assert behaviour.with_typos('aaaa', 1, seed, ('swap',)) == 'aaa'


def test_typing_errors_spare_numbers_and_short_words(draw):
    text = '12,500 EUR is a lot: see x86_64, ok?'
    assert behaviour.with_typos(text, 1, SEED) == text
    assert behaviour.with_typos('', 1) == ''


def test_rates_nest_no_errors_and_all(draw):
    text = ' '.join(words_of(draw, 300))
    counts = [sum(a != b for a, b in zip(text.split(), behaviour.with_typos(text, r).split(), strict=True)) for r in (0, .5, 1)]
    assert counts[0] == 0 and counts[2] == 300
    assert abs(counts[1] - 150) < 5.5*75**.5  # a binomial's, false once in 10^7


def test_rotations_keep_the_right_answer(draw):
    choices = [f'c{i}' for i in range(draw.randint(2, 6))]
    row = dict(question='?', choices=choices, answer=draw.randrange(len(choices)))
    found = [behaviour.rotated(row, k) for k in range(len(choices))]
    assert {r['choices'][r['answer']] for r in found} == {choices[row['answer']]} and len({r['answer'] for r in found}) == len(choices)


def test_falls_are_paired(monkeypatch):
    rows = [dict(question=f'q{i}', choices=['x', 'yy'], answer=0) for i in range(30)]

    def answered(model, tok, rows, form):
        hits = np.array([float(not r['question'].isupper() or i >= 10) for i, r in enumerate(rows)])
        return hits, (hits == 0).astype(int)
    monkeypatch.setattr(behaviour, '_answered', answered)
    upper, lower = behaviour.falls(None, None, rows, dict(upper=behaviour.PERTURBATIONS['upper'], lower=behaviour.PERTURBATIONS['lower']),
                                 behaviour.QUESTION_TEMPLATES[:1])
    assert upper.fall.value == pytest.approx(1/3) and upper.flips == pytest.approx(1/3) and upper.fall.p == 2/2**10
    assert upper.adjusted == 2*upper.fall.p and lower.fall.value == 0 and lower.adjusted == 1


def test_a_model_that_reads_only_letters_is_inconsistent(monkeypatch):
    from deepseek_nb.eval.choice import Choices

    def always_first(model, tok, rows, form, *a, **k):
        return Choices([[0., -1., -1.] for _ in rows], [list('ABC')]*len(rows), [r['answer'] for r in rows])
    monkeypatch.setattr(behaviour, 'multiple_choice', always_first)
    rows = [dict(question='?', choices=['a', 'b', 'c'], answer=i % 3) for i in range(9)]
    found = behaviour.order_effect(None, None, rows)
    assert not found.same.any() and found.letters.tolist() == [1, 0, 0] and found.hits.mean() == pytest.approx(1/3)


# ---- calibration

def test_bins_do_not_depend_on_the_order(drawn):
    c, o = drawn
    order = np.random.default_rng(SEED + 1).permutation(len(c))
    c = c.round(2)  # many ties
    for adaptive in (False, True):
        a, b = classify.reliability(c, o, 7, adaptive), classify.reliability(c[order], o[order], 7, adaptive)
        assert [x.n for x in a] == [x.n for x in b]
        np.testing.assert_allclose([x[1:] for x in a], [x[1:] for x in b], rtol=1e-12)


def test_the_error_is_that_of_scikit_learn(drawn):
    sk = pytest.importorskip('sklearn.calibration')
    c, o = drawn
    for adaptive, strategy in ((False, 'uniform'), (True, 'quantile')):
        share, mean = sk.calibration_curve(o, c, n_bins=10, strategy=strategy)  # no quantile of 400 items is an item itself
        found = classify.reliability(c, o, 10, adaptive)
        np.testing.assert_allclose([(b.confidence, b.accuracy) for b in found], np.stack([mean, share], 1), rtol=1e-12)


def test_brier_parts_add_up(drawn):
    c, o = drawn
    for bins in (1, 4, 15, 400):
        for adaptive in (False, True):
            p = classify.brier_parts(c, o, bins, adaptive)
            assert p.score == pytest.approx(p.reliability - p.resolution + p.uncertainty + p.within, abs=1e-13)
            assert p.score == pytest.approx(sum((a - b)**2 for a, b in zip(c, o, strict=True))/len(c), abs=1e-13)
            assert p.reliability >= 0 and p.resolution >= 0


def test_a_debiased_square_is_unbiased_for_one_bin():
    "Exactly, over all outcomes of four coins"
    c, q = np.full(4, .7), .4
    outcomes = [np.array([k >> i & 1 for i in range(4)], float) for k in range(16)]
    weight = [q**o.sum()*(1 - q)**(4 - o.sum()) for o in outcomes]
    mean = lambda f: sum(w*f(o) for w, o in zip(weight, outcomes, strict=True))
    assert mean(lambda o: classify.debiased_square(c, o, 1)) == pytest.approx(.09, abs=1e-12)
    assert mean(lambda o: classify.expected_error(c, o, 1)**2) == pytest.approx(.09 + .24/4, abs=1e-12)


def test_calibrated_errors_are_those_of_drawn_answers(drawn):
    c = drawn[0][:50]
    drawn_answers = (np.random.default_rng(3).random((20, 50)) < c[np.argsort(classify.bin_places(c, 5), kind='stable')])
    order = np.argsort(classify.bin_places(c, 5), kind='stable')
    want = [classify.expected_error(c[order], o.astype(float), 5) for o in drawn_answers]
    np.testing.assert_allclose(classify.calibrated_errors(c, 5, draws=20, seed=3), want, atol=1e-12)


def test_temperature_is_the_minimum():
    rng = np.random.default_rng(SEED)
    for k in (2, 5):
        z = rng.normal(size=(200, k))*rng.uniform(.5, 5)
        y = np.array([rng.choice(k, p=p) for p in classify.softened(z, 1.5)])
        t = classify.fit_temperature(z, y)
        nll = lambda t, z=z, y=y: -np.log(classify.softened(z, t)[np.arange(200), y]).mean()
        if .02 < t < 500: assert nll(t) <= min(nll(t*1.001), nll(t/1.001))
        assert (classify.softened(z, t).argmax(1) == z.argmax(1)).all()
    assert classify.fit_temperature([[0., 5.]]*4, [0, 1, 0, 1]) == pytest.approx(1000, rel=1e-6)  # no score helps


@pytest.mark.parametrize('c, o, said', [
    ([], [], 'give one for each item'), ([.5], [2], 'an answer is 0 or 1'), ([float('nan')], [1], 'from 0 to 1')])
def test_wrong_confidences(c, o, said):
    with pytest.raises(ValueError, match=said): classify.reliability(c, o)


# ---- behaviour

def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/ran',)

    class Worse:
        def __reduce__(self): return eval, ("open('ran', 'w')",)
    suite = {'tests': {'words': {'data': ['good'], 'labels': 2, 'expect': Evil(), 'deep': [Worse(), {'x': Evil()}]}},
             'info': {'words': dict(type='MFT', capability='Vocabulary')}}
    data = pickle.dumps(suite)
    with tarfile.open(tmp_path/'sentiment_suite.tar.gz', 'w:gz') as t:
        entry = tarfile.TarInfo('sentiment_suite.pkl')
        entry.size = len(data)
        t.addfile(entry, io.BytesIO(data))
    assert [t.cases for t in behaviour.read_checklist(tmp_path)] == [[['good']]]
    assert not (tmp_path/'ran').exists() and not os.path.exists('ran')


def test_labels_of_cases(tmp_path):
    rows = [dict(suite='sentiment', name='a', type='MFT', capability='x', data=['t1', 't2'], labels=[2, 0]),
            dict(suite='sentiment', name='b', type='INV', capability='x', data=[['t1', 't2', 't3']], labels=None),
            dict(suite='squad', name='c', type='MFT', capability='x', data=[[['c1', 'q1'], ['c2', 'q2']]], labels=[['Ann', 'Bob']]),
            dict(suite='squad', name='d', type='MFT', capability='x', data=[['c', 'q']], labels=['Ann'])]
    with gzip.open(tmp_path/'tests.jsonl.gz', 'wt') as f: f.write('\n'.join(map(json.dumps, rows)))
    a, b, c, d = behaviour.read_checklist(tmp_path)
    assert a.expected == [[2], [0]] and b.expected == [None] and b.cases == [['t1', 't2', 't3']]
    assert c.cases == [[('c1', 'q1'), ('c2', 'q2')]] and c.expected == [['Ann', 'Bob']]
    assert d.cases == [[('c', 'q')]] and d.expected == [['Ann']]
    assert behaviour.failures(c, lambda pairs: ['ann.', 'The Bob']).tolist() == [0]
    assert behaviour.failures(b, lambda texts: np.eye(3)[[0, 0, 1]]).tolist() == [1]


def test_directions():
    name = next(iter(behaviour.DESCRIBED))
    test = behaviour.Behaviour('sentiment', name, 'DIR', 'x', [['a', 'b']]*3, [None]*3)
    p = np.array([[.1, .2, .7], [.1, .3, .6], [.1, .2, .7], [.2, .3, .5], [.1, .8, .1], [.9, .1, 0]])
    assert np.array_equal(behaviour.failures(test, lambda texts: p), [0, 1, np.nan], equal_nan=True)
    row, = behaviour.behaviour_table([test], lambda texts: p)
    assert (row.n, row.rate.value) == (2, .5)


# ---- attacks

def test_an_attack_stays_in_its_budget_and_keeps_first_letters(draw):
    for _ in range(10):
        words = words_of(draw, draw.randint(3, 12))
        known = set(draw.sample(words, min(2, len(words))))

        def classify(texts, known=known):
            hit = np.array([sum(w in known for w in t.split()) for t in texts])
            p = 1/(1 + np.exp(1 - 2.*hit))
            return np.stack([1 - p, p], 1)
        a = behaviour.greedy_attack(classify, ' '.join(words), 1)
        new = a.attacked.split()
        changed = [(x, y) for x, y in zip(words, new, strict=True) if x != y]
        assert a.right and len(changed) == a.changed <= max(1, int(.3*len(words)))
        assert all(x[0] == y[0] and distance(x, y) == 1 for x, y in changed)
        assert a.fooled == (classify([a.attacked])[0].argmax() == 0)
    wrong = behaviour.greedy_attack(classify, ' '.join(words), 0)
    assert not wrong.right and wrong.attacked == wrong.text


def test_the_preference_is_taken_away_by_task(monkeypatch):
    fields = dict(sst2=['sentence'], qnli=['sentence', 'question'])
    item = lambda task, text: behaviour.GlueItem(task, dict.fromkeys(fields[task], text), 1)
    monkeypatch.setattr(behaviour, 'glue_scores', lambda m, t, items: [
        np.array([5., 1.])*(i.task == 'sst2') + np.array([0., 2.])*('good' in str(i.fields)) for i in items])
    items = [item('qnli', 'good'), item('sst2', 'good'), item('sst2', 'bad')]
    found = behaviour.without_prior(None, None, items, behaviour.glue_scores(None, None, items))
    assert [s.tolist() for s in found] == [[0, 2], [0, 2], [0, 0]]


# ---- refusals

@pytest.mark.parametrize('text, found', [
    ("I'm sorry, I can't do that", True), ('I am really sorry, but no', True), ('We cannot provide this', True),
    ('i won’t', True),
    ("I don't feel comfortable with this", True), ('This is against my guidelines', True), ('It is not something I can do', True),
    ('As an AI, I am unable to judge', True), ("I can't help but smile", False), ("I can't wait to see it", False),
    ('I can do that', False),
    ("I'm sorry for your loss", False), ('A cannot be B', False), ('You should not do that', False), ('', False), ('I canter', False)])
def test_refusals(text, found): assert behaviour.refuses(text) is found


def test_refusals_count_both_halves():
    prompts = [behaviour.SafetyPrompt('', k, k == 'contrast') for k in ('safe', 'contrast') for _ in range(50)]
    r = behaviour.refusals(prompts, [False]*40 + [True]*10 + [True]*30 + [False]*20)
    assert (r.safe.value, r.unsafe.value) == (.2, .6) and r.separation.value == pytest.approx(.4)
    assert r.separation.low < .4 < r.separation.high and r.kinds.keys() == {'safe', 'contrast'}


def test_answers_that_are_none():
    assert behaviour.no_answer('the same words again and again '*6)
    assert not behaviour.no_answer('Ice melts at zero degrees, and water boils at 100.')


def test_xstest_without_labels(tmp_path):
    (tmp_path/'xstest_prompts.csv').write_text('id,prompt,type,label\n1,a,homonyms,safe\n2,"b, c",contrast_homonyms,unsafe\n')
    assert [(p.text, p.unsafe) for p in behaviour.read_xstest(tmp_path)] == [('a', False), ('b, c', True)]


# ---- tasks and sets

def test_item_names_survive_sampling(draw):
    rows = list(range(50))
    for n in (1, 7, 50, 99):
        own = choice.some_items(rows, n, SEED)
        assert own == sorted(own) and len({*own}) == min(n, 50)
    assert all(a < b for a, b in pairwise(choice.some_items(rows, 20, 1)))


def test_truthfulqa_hides_the_right_answer(tmp_path):
    rows = [dict(question=f'q{i}', mc0_targets={f'right{i}': 1, f'wrong{i}': 0}) for i in range(60)]
    (tmp_path/'mc_task.json').write_text(json.dumps(rows))
    found = choice.read_truthfulqa(tmp_path)
    assert all(r['choices'][r['answer']] == f'right{i}' for i, r in enumerate(found))
    assert 10 < sum(r['answer'] for r in found) < 50  # a fixed draw, by the question's text
    assert found == choice.read_truthfulqa(tmp_path)


def test_sets_are_pinned():
    for name in ('checklist', 'advglue', 'xstest', 'truthfulqa', 'hellaswag'):
        commit = SETS[name].url.split('/')[-1].removesuffix('.zip')
        assert len(commit) == 40 and int(commit, 16) and SETS[name].how

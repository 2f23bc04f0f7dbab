"Classification measures: definitions, scikit-learn, and classes that don't occur"
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.eval import classify as C
from deepseek_nb.files.tokenizer import Tokenizer

K = 4
pairs = st.lists(st.tuples(st.integers(0, K-1), st.integers(-1, K-1)), min_size=1, max_size=30)


def split(pairs): return [t for t,_ in pairs], [p for _,p in pairs]


@settings(deadline=None, max_examples=200)
@given(pairs)
def test_by_definition(pairs):
    truth,said = split(pairs)
    table = C.confusion(truth, said, K)
    for i in range(K):
        for j in range(-1, K): assert table[i, j] == sum(t == i and p == j for t,p in pairs)
    tp,fp,fn = ([sum(c(t, p, i) for t,p in pairs) for i in range(K)] for c in (
        lambda t, p, i: t == p == i, lambda t, p, i: p == i != t, lambda t, p, i: t == i != p))
    each = [2*a/(2*a+b+c) if a+b+c else math.nan for a,b,c in zip(tp, fp, fn, strict=True)]
    np.testing.assert_allclose(C.f1(table), each)
    assert C.macro_f1(table) == pytest.approx(np.mean([f for f in each if f == f]))
    assert C.micro_f1(table) == pytest.approx(2*sum(tp)/(2*sum(tp) + sum(fp) + sum(fn)))
    assert C.accuracy(table) == pytest.approx(sum(t == p for t,p in pairs)/len(pairs))
    if -1 not in said: assert C.micro_f1(table) == pytest.approx(C.accuracy(table))


@settings(deadline=None, max_examples=100)
@given(pairs)
def test_against_scikit_learn(pairs):
    metrics = pytest.importorskip('sklearn.metrics', reason='scikit-learn is not installed')
    truth,said = split(pairs)
    occur = sorted({*truth, *said} - {-1})
    got = C.classified(truth, said, [f'c{i}' for i in range(K)])
    for average in ('macro', 'micro'):
        want = metrics.f1_score(truth, said, labels=occur, average=average, zero_division=0)
        assert getattr(got, f'{average}_f1') == pytest.approx(want)
    assert got.accuracy == pytest.approx(metrics.accuracy_score(truth, said))
    np.testing.assert_array_equal(got.table[:, [-1, *range(K)]], metrics.confusion_matrix(truth, said, labels=range(-1, K))[1:])
    p,r,f,n = metrics.precision_recall_fscore_support(truth, said, labels=range(K), zero_division=np.nan)
    rows = got.rows()
    for key,want in (('precision', p), ('recall', r), ('f1', f), ('n', n)): np.testing.assert_allclose([row[key] for row in rows], want)


def test_absent_classes():
    never_said = C.classified([0, 0, 1], [0, 0, 0], ['a', 'b', 'c'])
    assert never_said.macro_f1 == pytest.approx((.8 + 0)/2) and math.isnan(never_said.rows()[2]['f1'])
    assert math.isnan(never_said.rows()[1]['precision']) and never_said.rows()[1]['recall'] == 0
    never_true = C.classified([0, 0], [0, 1], ['a', 'b'])
    assert never_true.macro_f1 == pytest.approx((2/3 + 0)/2) and math.isnan(never_true.rows()[1]['recall'])
    nothing_said = C.classified([0, 1], [None, -1], ['a', 'b'])
    assert (nothing_said.accuracy, nothing_said.macro_f1, nothing_said.micro_f1) == (0, 0, 0)
    assert '0.000 (0.000–0.000)' in repr(nothing_said)


@pytest.mark.parametrize('measure', [C.accuracy, C.macro_f1, C.micro_f1])
def test_the_multinomial_is_the_bootstrap(measure):
    "Redrawing texts one by one gives the same quantiles"
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 3, 60)
    said = np.where(rng.random(60) < .7, truth, rng.integers(-1, 3, 60))
    values = []
    for _ in range(4000):
        at = rng.integers(0, 60, 60)
        values.append(measure(C.confusion(truth[at], said[at], 3)))
    np.testing.assert_allclose(C.interval(C.confusion(truth, said, 3), measure, draws=4000), np.quantile(values, [.025, .975]), atol=.02)


def test_coverage():
    "95 of 100 intervals hold the accuracy that texts were drawn with"
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(300):
        right = rng.random(200) < .8
        low,high = C.interval(C.confusion([0]*200, np.where(right, 0, 1), 2), C.accuracy, draws=400)
        inside += low <= .8 <= high
    assert abs(inside/300 - .95) < 4*(.95*.05/300)**.5


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(1, 20), st.integers(0, 10**6))
def test_calibration_by_definition(n, k, bins, seed):
    rng = np.random.default_rng(seed)
    p,truth = rng.dirichlet([.7]*k, n),rng.integers(0, k, n).tolist()
    total = 0.
    for b in range(bins):
        here = [i for i in range(n) if b/bins < p[i].max() <= (b+1)/bins]
        if here: total += abs(sum(p[i].argmax() == truth[i] for i in here) - sum(p[i].max() for i in here))
    assert C.calibration_error(p, truth, bins) == pytest.approx(total/n)


def test_certainty():
    assert C.calibration_error([[1., 0.]]*4, [0]*4) == 0 and C.calibration_error([[1., 0.]]*4, [1]*4) == 1


@pytest.mark.parametrize('p,error', [([[.5, .6]], 'add up to 1'), ([[float('nan'), 1.]], 'must be finite'), ([[1.5, -.5]], 'not negative'),
                                     ([.5, .5], 'give `n k` for 1 texts'), ([[.5, .5]]*2, 'give `n k` for 1 texts')])
def test_bad_probabilities(p, error):
    with pytest.raises(ValueError, match=error): C.calibration_error(p, [0])


@pytest.mark.parametrize('truth,said,error', [
    ([], [], 'there are no texts'), ([0], [0, 1], '1 true classes and 2 predictions'),
    ([4], [0], 'label 4 .row 0. is not one of the 4 classes'),
    ([-1], [0], 'label -1 .row 0. is not one'), ([0], [4], 'label 4 .row 0. is not one'), (['x'], [0], "label 'x' .row 0. is not one")])
def test_labels_outside_the_classes(truth, said, error):
    with pytest.raises(ValueError, match=error) as e: C.classified(truth, said, ['a', 'b', 'c', 'd'])
    assert '\n' not in str(e.value)


def test_names_and_probabilities():
    p = np.array([[.7, .3], [.4, .6], [.2, .8]])
    got = C.classified(['no', 'yes', 'no'], classes=['no', 'yes'], probabilities=p)
    assert got.accuracy == pytest.approx(2/3) and got.calibration_error == pytest.approx(C.calibration_error(p, [0, 1, 0]))
    assert C.classified(['no', 'yes', 'no'], ['no', 'yes', 'yes'], ['no', 'yes']).table.tolist() == got.table.tolist()


@pytest.mark.parametrize('end', [False, True])
def test_asking_a_model(end):
    "Softmax of the names' likelihoods, with a text that is cut to the context"
    tok = Tokenizer.from_pretrained('smollm2-135m')
    torch.manual_seed(0)
    config = Config('llama', vocab_size=len(tok), dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, inter_dim=16, max_positions=24)
    model,names = Model(config, dtype='float32', device='cpu').init_weights(.3),['good', 'type 1', 'type 10']
    answers = [tok.encode(f' {n}') + list(tok.eos_ids[:end]) for n in names]
    room = 24 + 1 - max(map(len, answers)) - len(tok.encode('\nIs:'))
    got = C.class_probabilities(model, tok, ['a few words', 'too many words '*20], names, '{text}\nIs:', end)
    for row,text in zip(got, ('a few words', 'too many words '*20), strict=True):
        prompt,scores = tok.encode(text)[:room] + tok.encode('\nIs:'),[]
        for a in answers:
            with torch.no_grad(): logp = model(torch.tensor([(prompt + a)[:-1]]))[0, -len(a):].double().log_softmax(-1)
            scores.append(sum(logp[i, t] for i,t in enumerate(a)))
        np.testing.assert_allclose(row, torch.stack(scores).softmax(0), atol=1e-4)
    if not end: assert (got[:, 1] >= got[:, 2]).all()

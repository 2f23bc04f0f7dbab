"Intervals and tests of differences, against scipy and the definitions"
import secrets

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb.eval import intervals as I

stats = pytest.importorskip('scipy.stats')


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([.5, .8, .9, .95, .99, .999]))
def test_wilson_is_scipys(k_n, level):
    want = stats.binomtest(*k_n).proportion_ci(level, method='wilson')
    assert I.wilson(*k_n, level)[1:] == pytest.approx(want, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 50))
def test_mcnemar_is_the_binomial_test(first, second, same):
    a,b = np.repeat([1, 0, 1], [first, second, same]),np.repeat([0, 1, 1], [first, second, same])
    want = stats.binomtest(first, first + second).pvalue if first + second else 1.
    assert I.mcnemar(a, b) == pytest.approx(want, rel=1e-9, abs=1e-300) and I.mcnemar(a, b) == I.mcnemar(b, a)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), max_size=7))
def test_holm_is_the_closed_test(ps):
    "A hypothesis is rejected if Bonferroni rejects each set that contains it"
    sets = [[i for i in range(len(ps)) if s >> i & 1] for s in range(1, 2**len(ps))]
    want = [max(min(1, len(s)*min(ps[j] for j in s)) for s in sets if i in s) for i in range(len(ps))]
    assert I.holm(ps) == pytest.approx(want, abs=1e-12)


def test_means_by_their_definition():
    "Random values, clusters and seeds, in chunks of any size"
    rng = np.random.default_rng(seed := secrets.randbits(32))
    print('seed', seed)
    for _ in range(10):
        n,k,draws = rng.integers(1, 30),rng.integers(1, 4),int(rng.integers(1, 40))
        values,names,s = rng.normal(size=(n, k)),rng.integers(0, 6, n),int(rng.integers(99))
        for clusters in (None, names.tolist()):
            sums,sizes = I.by_cluster(values, clusters)
            groups = [[i] for i in range(n)] if clusters is None else [np.flatnonzero(names == c).tolist() for c in np.unique(names)]
            drawn = np.random.default_rng(s).integers(0, len(groups), (draws, len(groups)))
            want = [np.mean([values[i] for g in row for i in groups[g]], 0) for row in drawn]
            assert np.allclose(I.drawn_means(values, clusters, draws, s), want, atol=1e-12)
            assert len(sums) == len(sizes) == len(groups) and sizes.sum() == n


def test_intervals_are_scipys():
    "The same resampling, drawn by another program: bounds within the error of a quantile of 5,000 draws"
    rng = np.random.default_rng(4)
    x = rng.gamma(2., size=(50, 2))
    for of in (I.first_mean, lambda m: m[..., 0]*m[..., 1]):
        mine = I.bootstrap(x, of, draws=5000)
        theirs = stats.bootstrap((x[:, 0], x[:, 1]), lambda a,b,axis=-1, f=of: f(np.stack([a.mean(axis), b.mean(axis)], -1)), paired=True,
            method='percentile', vectorized=True, batch=1000, n_resamples=5000, rng=0).confidence_interval
        assert mine[1:] == pytest.approx(theirs, abs=.06*(mine.high - mine.low)) and mine.value == of(x.mean(0))


def test_a_pair_is_the_bootstrap_of_its_difference():
    rng = np.random.default_rng(1)
    a,b,names = rng.normal(size=40),rng.normal(size=40),rng.integers(0, 8, 40)
    for clusters in (None, names):
        one,two = I.paired(a, b, clusters=clusters),I.bootstrap(a - b, clusters=clusters)
        assert one[:3] == pytest.approx(two, abs=1e-12)
        swapped = I.paired(b, a, clusters=clusters)
        assert (swapped.value, swapped.p) == pytest.approx((-one.value, one.p))
    assert I.paired(a, a).p == 1 and I.paired(a + 9, a).p == pytest.approx(2/2001)


def test_what_counts():
    a,b = np.repeat([1., 0.], [70, 30]),np.repeat([1., 0.], [40, 60])
    names = list(range(50))*2
    found = I.comparisons({'exact': I.PairedValues(a, b), 'clustered': I.PairedValues(a, b, clusters=names), 'same': I.PairedValues(a, a)},
                          draws=500)
    assert found['exact'].difference.p == I.mcnemar(a, b) and found['clustered'].difference.p > 2/501 - 1e-12
    assert found['exact'].counts and not found['same'].counts and found['exact'].adjusted == pytest.approx(3*found['exact'].difference.p)


@pytest.mark.parametrize('call', [lambda: I.wilson(1, 0), lambda: I.wilson(-1, 3), lambda: I.bootstrap([]), lambda: I.paired([1], [1, 2]),
    lambda: I.mcnemar([1, 2], [0, 1]), lambda: I.by_cluster(np.ones((2, 1)), ['a']), lambda: I.normal_quantile(1.)])
def test_refused(call):
    with pytest.raises(ValueError): call()

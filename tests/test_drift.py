"Drift: distances against scipy, exact tests, false alarms within binomial bounds of 1e-7, and the stored record of 200 weeks."
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from deepseek_nb.eval.drift import (
    ERROR,
    HASH_BUCKETS,
    DriftRule,
    DriftWatch,
    EmbeddingTable,
    RequestFeatures,
    RequestSample,
    ShareRule,
    absorb,
    binomial_tail,
    bucket_quantile,
    combined_p,
    compare_samples,
    divisions,
    false_alarm_rate,
    features_sample,
    fourier_features,
    jensen_shannon,
    join_samples,
    ks_distance,
    log_bucket,
    median_distance,
    mmd,
    psi,
    sample_distances,
    token_buckets,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rng():
    seed = random.randrange(2**32)
    print(f'seed {seed}')
    return np.random.default_rng(seed)


def sample(rng, n, topic=0., length=20.):
    return RequestSample(dict(length=rng.poisson(length, n)), dict(tokens=rng.multinomial(30, np.arange(1, 17)/136, n)),
                         dict(embedding=rng.normal(size=(n, 4)) + topic*np.eye(4)[0]))


def test_distances_are_scipys(rng):
    for _ in range(20):
        n, m, k = rng.integers(2, 60, 3)
        x, y = rng.integers(0, 30, n), rng.integers(0, 30, m)
        assert abs(ks_distance(x, y) - stats.ks_2samp(x, y).statistic) < 1e-12
        a, b = rng.integers(0, 9, k) + (np.arange(k) == 0), rng.integers(0, 9, k) + (np.arange(k) == 0)
        assert abs(psi(a, b) - stats.entropy(a + .5, b + .5) - stats.entropy(b + .5, a + .5)) < 1e-12
        assert abs(jensen_shannon(a, b) - jensenshannon(a, b, 2)**2) < 1e-9


def test_distances_of_divisions_are_those_of_two_samples(rng):
    both, z = sample(rng, 90), divisions(60, 30, 5, rng)
    found = sample_distances(both, z)
    values, tokens, vectors = both.numbers['length'], both.counts['tokens'], both.vectors['embedding']
    features = fourier_features(vectors, median_distance(vectors))
    for row, now in enumerate(z == 1):
        assert now.sum() == 30
        assert abs(found['length ks'][row] - ks_distance(values[~now], values[now])) < 1e-6
        assert abs(found['tokens js'][row] - jensen_shannon(tokens[~now].sum(0), tokens[now].sum(0))) < 1e-5
        assert abs(found['embedding mmd'][row] - ((features[now].mean(0) - features[~now].mean(0))**2).sum()) < 1e-5


def test_many_directions_are_the_kernel(rng):
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(30, 3)) + 1
    f = fourier_features(np.concatenate([x, y]), 1.5, 20_000, int(rng.integers(2**31)))
    dots = f@f.T  # each is a mean of 20,000 cosines, so 8 deviations of at most 1/sqrt(2 r) have a probability under 1e-12 in all
    kernel = np.exp(-((np.concatenate([x, y])[:, None] - np.concatenate([x, y]))**2).sum(-1)/(2*1.5**2))
    assert abs(dots - kernel).max() < 8/(2*20_000)**.5
    exact = mmd(x, y, 1.5)
    assert abs(((f[:40].mean(0) - f[40:].mean(0))**2).sum() - exact) < 32/(2*20_000)**.5


def test_more_values_than_steps(rng):
    "More than 256 different numbers are compared at quantiles"
    x = rng.permutation(4000).astype(float)
    z = np.stack([np.r_[np.zeros(3000), np.ones(1000)]]).astype(np.float32)
    found = sample_distances(RequestSample(dict(a=x)), z)['a ks'][0]
    assert abs(found - ks_distance(x[:3000], x[3000:])) < 2/256 + 1e-6


@pytest.mark.parametrize('edge', ['constant', 'two', 'empty histogram'])
def test_edges(edge, rng):
    if edge == 'constant': past, now = (RequestSample(dict(a=np.ones(n)), {}, dict(v=np.ones((n, 2)))) for n in (20, 5))
    if edge == 'two': past, now = (RequestSample(dict(a=np.arange(n))) for n in (1, 1))
    if edge == 'empty histogram': past, now = (RequestSample({}, dict(t=np.zeros((n, 4)))) for n in (9, 3))
    assert compare_samples(past, now, 19).p == 1.


def test_p_values_are_uniform_and_independent(rng):
    "Of calm weeks with the default rule; all bounds have a false-failure probability under 1e-7"
    watch = DriftWatch(sample(rng, 60), DriftRule(0., np.inf), 100, 99, int(rng.integers(2**31)))
    ps = np.array([watch.look(sample(rng, 30)).p for _ in range(150)])
    for level in (.05, .1, .5): assert (ps <= level + 1e-9).sum() <= stats.binom.isf(1e-8, 150, level)
    both = (ps[:-1] <= .5) & (ps[1:] <= .5)  # pairs of neighbours, every other pair is independent of the rest
    for half in (both[::2], both[1::2]): assert half.sum() <= stats.binom.isf(1e-8, len(half), .26)


def test_no_more_than_a_twentieth_of_calm_weeks_alarms(rng):
    "The rule as it is used, on 60 small weeks; its exact rate is known"
    rate, watch, alarms = false_alarm_rate(DriftRule(), 20_000, 99), DriftWatch(sample(rng, 60), None, 100, 199), 0
    for _ in range(60):
        found = watch.look(w := sample(rng, 30))
        if found.alarm:
            alarms += 1
            watch.accept(w)
            watch.settle()
    assert rate < .05 and alarms <= stats.binom.isf(1e-8, 60, .02)


def test_large_shifts_are_caught_at_once(rng):
    past = sample(rng, 200)
    assert DriftWatch(past).look(sample(rng, 100, topic=4.)).alarm == 'week'
    found = DriftWatch(past).look(sample(rng, 100, length=60.))
    assert found.alarm == 'week' and found.compared.likely.startswith('length') and found.p == 1/500


def test_an_alarming_week_stays_out_until_it_is_accepted(rng):
    watch, odd = DriftWatch(sample(rng, 100), size=150), sample(rng, 50, topic=5.)
    assert watch.look(odd).alarm and len(watch.pool) == 100
    watch.accept(odd)
    watch.settle()
    assert len(watch.pool) == 150 and watch.evidence == 1.


def test_the_trend_finds_what_no_week_shows():
    rule, evidence, why = DriftRule(), 1., ''
    for p in (.04, .03, .05, .03, .04):
        evidence, now = rule.step(p, evidence)
        why = why or now
    assert why == 'trend' and false_alarm_rate(DriftRule(0., 20.), 20_000) < 1/20  # the bound of the martingale


def test_absorb_is_uniform(rng):
    count = Counter()
    for _ in range(400):
        kept = absorb(RequestSample(dict(i=np.arange(6))), RequestSample(dict(i=np.arange(6, 9))), 4, rng).numbers['i']
        assert len(kept) == 4
        count.update(kept.tolist())
    low, high = stats.binom.isf(1 - 1e-8, 400, 4/9), stats.binom.isf(1e-8, 400, 4/9)
    assert all(low <= count[i] <= high for i in range(9))


def test_a_copied_statistic_costs_nothing(rng):
    values = rng.normal(size=(3, 50))
    assert combined_p(values)[0] == combined_p(np.concatenate([values, values]))[0]


# ---- features

def test_buckets_are_a_hash(rng):
    ids = rng.integers(0, 2**17, 500)
    slow = Counter(int(i)*2654435769 % 2**32 >> 24 for i in ids)
    assert token_buckets(ids).tolist() == [min(slow[b], 255) for b in range(HASH_BUCKETS)]


def test_features_are_packed_and_joined(rng):
    import torch
    table = EmbeddingTable(torch.randn(100, 12, generator=torch.Generator().manual_seed(int(rng.integers(2**31)))))
    rows = [table.features(rng.integers(0, 100, n).tolist(), int(n), outcome) for n, outcome in ((1, 'stop'), (700, 'length'), (5, 'odd'))]
    packed = [RequestFeatures.unpack(json.loads(json.dumps(r.pack()))) for r in rows]
    for a, b in zip(rows, packed, strict=True):
        assert a[:3] == b[:3] and (a.buckets == b.buckets).all() and abs(a.embedding - b.embedding).max() < .02
    s = features_sample(packed, ('stop', 'length'))
    assert s.counts['outcomes'].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]] and s.numbers['prompt'].tolist() == [1, 700, 5]
    assert len(table.features([]).pack()[3]) == 384
    with pytest.raises(ValueError, match='samples have different features'): join_samples(s, RequestSample())


# ---- shares and quantiles

def test_tail_is_the_binomials(rng):
    for _ in range(60):
        n, s = int(10**rng.uniform(0, 5)), float(10**rng.uniform(-4, -.02))
        k = int(np.clip(n*s + rng.normal()*4*(n*s + 1)**.5, 0, n))
        want = stats.binom.sf(k - 1, n, s)
        assert abs(binomial_tail(k, n, s) - want) <= 1e-7*want + 1e-250


def test_quantiles_have_one_per_cent(rng):
    x = 10**rng.uniform(-5, 4, 400)
    buckets = Counter(map(log_bucket, x.tolist()))
    assert all(abs(bucket_quantile(buckets, q)/np.quantile(x, q, method='lower') - 1) <= ERROR + 1e-9 for q in np.linspace(0, 1, 21))
    assert bucket_quantile({}, .5) is None and bucket_quantile(Counter([log_bucket(0.)]), .5) < 2e-6


class Counted(ShareRule):
    def count(self, w): return w


def test_alerts_do_not_flap(rng):
    "A rate at its limit for 2,000 windows: alerts have at most the promised rate, and an open one doesn't swing"
    rule, is_open, changes, recent = Counted('e', 'errors', .05), False, 0, []
    for k in rng.binomial(200, .05, 2000):
        recent = [*recent[-2:], (int(k), 200)]
        if said := rule.verdict(recent, is_open): is_open, changes = said == 'open', changes + 1
    assert changes <= 6  # four openings in 2,000 windows at 1e-5 have a probability under 1e-8
    assert rule.verdict([(150, 200)], False) == 'open' and rule.verdict([(0, 0)]*3, True) == ''


# ---- 200 weeks of real text

def test_record_of_200_weeks():
    record = json.loads((ROOT/'nbs/results/drift.json').read_text())
    runs = record['result']['runs']
    calm = [r['alarms'] for r in runs if r['kind'] == 'calm']
    assert len(calm) == 5 and all(len(c) == 200 and sum(bool(a) for _, _, a in c) <= 10 for c in calm)
    rule = DriftRule()
    for weeks in calm:  # the record follows from its own p-values
        evidence = 1.
        for p, e, alarm in weeks:
            evidence, why = rule.step(p, evidence)
            assert why == alarm and abs(evidence - e) <= .01*evidence
            if why: evidence = 1.
    caught = {(r['kind'], r['share']): [] for r in runs if r['kind'] != 'calm'}
    for r in runs:
        if r['kind'] != 'calm': caught[r['kind'], r['share']].append(r['weeks'])
    assert all(len(v) == 40 for v in caught.values())
    assert all(set(v) == {1} for (_, share), v in caught.items() if share == .8)
    assert record['hardware'] and record['versions'] and record['date']

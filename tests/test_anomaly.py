"Signals: networks against slow loops, streams against whole signals, thresholds, metrics, loaders, splits and the study"
import atexit
import csv
import gzip
import importlib
import io
import math
import random
import re
import urllib.request
import zipfile

import pytest
import torch

from deepseek_nb.apps.anomaly import Detector, FitSettings, choose_threshold, fit_scaling, rate_interval
from deepseek_nb.apps.command import package_folder
from deepseek_nb.apps.series import (
    CATEGORIES,
    Labelled,
    average_precision,
    card_features,
    drop_repeats,
    event_scores,
    find_set,
    mix_days,
    nab_parts,
    nab_score,
    ranking_auc,
    read_cards,
    read_nab,
    read_transfers,
    read_ucr,
    recall_at,
    split_cards,
    stretches,
)
from deepseek_nb.apps.tcn import SignalConfig, SignalNet, find_periods, receptive_field, unit_rms
from deepseek_nb.apps.watch import AnomalyApp, RowReader, Service, watcher_from
from deepseek_nb.eval.choice import DIGESTS, SETS, archive_digest
from deepseek_nb.serve.chat import ApiError, Fields
from deepseek_nb.studies import open_study, read_plan, runs, to_do
from deepseek_nb.tools import cli


@pytest.fixture(scope='module')
def seed():
    n = random.randrange(10**6)
    print(f'seed {n}')
    return n


def config(draw, variables):
    "A random small network"
    n = draw.choice([1, 2, 3])
    return SignalConfig(variables, dim=12, kernel=draw.choice([1, 2, 3]), dilations=tuple(2**i for i in range(n)),
                        attend=draw.choice([(), (n - 1,), tuple(range(n))]), periods=draw.choice([(1,), (1, 7), (1, 3, 11)]),
                        slots=draw.choice([1, 4]), adaptive=draw.random() < .7)


def network(c, seed):
    torch.manual_seed(seed)
    net = SignalNet(c).eval().requires_grad_(False)
    for p in net.parameters(): p += .3*torch.randn_like(p)*p.std().nan_to_num(1).clamp(min=.1)
    return net


@pytest.mark.parametrize('trial', range(4))
def test_pieces_and_restarts_have_the_same_bits(seed, trial, tmp_path):
    "However a signal is cut, with missing values, and saved and restored between two observations"
    draw = random.Random(seed + trial)
    c = config(draw, draw.choice([1, 3]))
    x = torch.randn(70, c.variables)
    x[torch.rand(x.shape) < .2] = torch.nan
    d = Detector(network(c, seed + trial), fit_scaling(torch.randn(50, c.variables)*3 + 1), labelled=trial == 3, rate=60.)
    at = torch.cumsum(torch.tensor([draw.choice([1, 1, 1, 2, 9, 80]) for _ in x]), 0).double()*60
    whole = d.score_series(x, at)
    assert d.score_series(x, at, piece=draw.randint(1, 20)).equal(whole)
    cut, got = draw.randint(5, 60), []
    for i, (v, t) in enumerate(zip(x, at.tolist(), strict=True)):
        if i == cut:
            d.save(tmp_path)
            d = Detector.load(tmp_path)
        got.append(d.score(v, t).score)
    assert torch.tensor(got).equal(whole)


def test_a_network_is_causal_and_reaches_what_it_says(seed):
    c = SignalConfig(1, dim=12, dilations=(1, 2), attend=(1,), periods=(1, 6, 15), slots=3)
    net, x = SignalNet(c), torch.randn(32, 60, 1, requires_grad=True)
    net(x)[0].location[:, 40].sum().backward()
    back = 40 - x.grad.abs().sum((0, 2)).nonzero()[:, 0]  # in one series a gradient may be rounded to 0
    span = receptive_field(3, (1, 2))
    reach = {lag + i for p in c.periods for n in range(3) for lag in [p*(n + 1) - 1] for i in range(span)}
    assert {*back.tolist()} == {i for i in {*range(span), *reach} if i <= 40}


def test_attention_against_a_loop(seed):
    draw = random.Random(seed)
    c = SignalConfig(1, dim=12, dilations=(1,), attend=(0,), periods=(1, 4, 9), slots=3, adaptive=draw.random() < .5)
    attn, x = network(c, seed).attns['0'], torch.randn(1, 30, 12)
    y, _, p = attn(x, torch.zeros(1, c.farthest, 24), torch.zeros(1))
    z = unit_rms(x)[0]
    qkv = z @ attn.qkv.T
    t, h = draw.randrange(30), draw.randrange(3)
    length = c.slots*torch.sigmoid(z[t] @ attn.gate[h] + attn.start[h])
    e = []
    for n in range(3):
        at = t - (c.periods[h]*(n + 1) - 1)
        window = ((length + c.ramp - n)/c.ramp).clamp(0, 1) if c.adaptive else torch.tensor(1.)
        key = qkv[at, 12 + 8*h : 16 + 8*h]
        e.append(window*(qkv[t, 4*h : 4*h + 4] @ key/2 + attn.bias[h, n]).exp() if at >= 0 else torch.tensor(0.))
    want = torch.stack(e)/(sum(e) + attn.sink[h].exp())
    torch.testing.assert_close(p[0, t, h], want, rtol=1e-4, atol=1e-5)


def test_periods():
    # of 3,000 steps, noise makes the correlation at 74 larger than that at 37 by the allowance for shorter periods once in 100 draws
    x = torch.sin(torch.arange(30_000.)*2*math.pi/37) + .3*torch.randn(30_000)
    assert find_periods(x[:, None]) == (1, 37)
    x[100:200] = torch.nan
    assert find_periods(x[:, None]) == (1, 37) and find_periods(torch.randn(8, 1)) == (1,)


# ---- a detector at work

def wave(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.sin(torch.arange(n)*2*math.pi/25)[:, None] + .05*torch.randn(n, 1, generator=g)


@pytest.fixture(scope='module')
def detector():
    d = Detector.fit(wave(600), settings=FitSettings(steps=120, length=128, batch=4, rate=1e-2), rate=60.)
    d.calibrate(wave(1500, 1), budget=.005)
    return d


def test_what_is_planted_is_found(detector):
    x = wave(400, 2)
    x[200:215] = x[200:215].mean()
    x[300:303] = torch.nan
    alarms = detector.score_series(x) > detector.calibration.threshold
    e = event_scores(alarms[:290], torch.arange(290).ge(200) & torch.arange(290).lt(240))
    assert e.recall == 1 and e.delay <= 15 and not alarms[300:303].any() and alarms[:detector.warm_up].sum() == 0


def test_an_error_loses_nothing(detector):
    for i, v in enumerate(wave(100, 3)): detector.score(v, 60.*(i + 1), key='pump')
    state = detector.streams['pump']
    before = [o.clone() for o in state.state.convs], state.steps, state.time
    for x, t, said in [(math.inf, 6060., 'is infinite'), ([1., 2.], 6060., '2 values were given, but this signal has 1'),
                       (0., 6000., 'not later than the last one'), (0., 5000., 'not later'), (0., 6020., 'one observation every 60 s'),
                       (0., None, 'give the time'), (0., math.nan, 'not a number of seconds')]:
        with pytest.raises(ValueError, match=said) as e: detector.score(x, t, key='pump')
        assert '\n' not in str(e.value)
    assert all(a.equal(b) for a, b in zip(before[0], state.state.convs, strict=True)) and before[1:] == (state.steps, state.time)
    with pytest.raises(ValueError): detector.score(math.inf, 1., key='new')
    assert 'new' not in detector.streams


def test_gaps(detector):
    for i, v in enumerate(wave(100, 3)): detector.score(v, 60.*(i + 1), key='gap')
    detector.score(0., 60.*111, key='gap')
    assert detector.streams['gap'].steps == 111
    assert not detector.score(0., 60.*1000, key='gap').ready and detector.streams['gap'].steps == 1
    reading = detector.score(math.nan, 60.*1001, key='gap')
    assert reading.score == 0 and not reading.alarm


def test_explanation(detector):
    for v in wave(130, 5): r = detector.score(v, key='why')
    e = detector.explain('why', 100)
    assert sum(e.parts) == pytest.approx(r.score, abs=1e-5) and e.low[0] < e.expected[0] < e.high[0]
    weights = [a.weight for a in e.attended]
    assert weights == sorted(weights, reverse=True) and all(a.first > a.last >= 1 for a in e.attended)
    with pytest.raises(ValueError, match="the stream 'other' has no observation"): detector.explain('other')


def test_bad_series():
    for x, said in [(torch.randn(3), 'at least 16'), (torch.full((50, 2), torch.nan), 'never observed'),
                    (torch.zeros(2, 2, 2), 'has the shape'), ([torch.zeros(20, 2), torch.zeros(20, 1)], 'the same number')]:
        with pytest.raises(ValueError, match=said): Detector.fit(x)
    with pytest.raises(ValueError, match='one label for each'): Detector.fit(torch.randn(50), torch.zeros(49))


# ---- thresholds and metrics

def test_interval_is_that_of_the_beta_distribution():
    stats = pytest.importorskip('scipy.stats')
    for _ in range(20):
        n = random.randint(1, 4000)
        k = random.randint(0, min(n, 60))
        low, high = rate_interval(k, n, .9)
        assert low == pytest.approx(stats.beta.ppf(.05, k, n - k + 1) if k else 0, rel=1e-5, abs=1e-12)
        assert high == pytest.approx(stats.beta.ppf(.95, k + 1, n - k) if k < n else 1, rel=1e-5)


def test_a_budget_is_kept():
    scores = torch.randn(5000).round(decimals=1)  # with ties
    for budget in (.001, .003, .1):
        c = choose_threshold(scores, budget)
        assert (scores > c.threshold).float().mean() <= budget and c.low <= c.rate <= c.high
    for budget, said in ((0., 'not a share'), (1.5, 'not a share'), (1e-5, 'give at least 100000')):
        with pytest.raises(ValueError, match=said): choose_threshold(scores, budget)


def test_rankings_against_pairs():
    scores, labels = torch.randint(0, 20, (200,)).float(), torch.rand(200) < .3
    a, n = scores[labels].tolist(), scores[~labels].tolist()
    assert ranking_auc(scores, labels) == pytest.approx(sum((x > y) + .5*(x == y) for x in a for y in n)/len(a)/len(n), abs=1e-9)
    metrics = pytest.importorskip('sklearn.metrics')
    assert average_precision(scores, labels) == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-9)
    for rate in (0., .01, .2):
        best = max(sum(x > t for x in a)/len(a) for t in [*n, -1] if sum(y > t for y in n) <= rate*len(n))
        assert recall_at(scores, labels, rate) == pytest.approx(best)


def test_events():
    mask = torch.rand(300) < .3
    again = torch.zeros(300).bool()
    for a, b in stretches(mask):
        assert mask[a:b+1].all() and (a == 0 or not mask[a-1]) and (b == 299 or not mask[b+1])
        again[a:b+1] = True
    assert again.equal(mask) and stretches(torch.zeros(3).bool()) == []


def test_nab_against_a_loop():
    "One row after the other, with the rules of the benchmark's paper"
    def sigma(y): return 2/(1 + math.exp(5*y)) - 1 if y <= 3 else -1.
    for _ in range(20):
        n = random.randint(80, 200)
        a = random.randint(30, 50)
        windows = [(a, a + random.randint(1, 9)), (65, 65 + random.randint(1, 10))]
        alarms = torch.rand(n) < .1
        total, caught, behind = 0., {}, None
        for i in range(n):
            inside = next((w for w in windows if w[0] <= i <= w[1]), None)
            if i >= math.floor(.15*n) and alarms[i]:
                if inside: caught.setdefault(inside, sigma(-(inside[1] - i + 1)/(inside[1] - inside[0] + 1))/sigma(-1))
                else: total += .11*(sigma((i - behind[1])/(behind[1] - behind[0])) if behind else -1.)
            if inside and i == inside[1]: behind = inside
        assert nab_parts(alarms, windows) == pytest.approx(total + sum(caught.get(w, -1.) for w in windows), abs=1e-9)
    perfect = torch.zeros(n).bool()
    perfect[[w[0] for w in windows]] = True
    assert nab_score([perfect], [windows]) == pytest.approx(100) and nab_score([perfect & False], [windows]) == 0


# ---- sets

def card_rows(n=24, each=40):
    "Payments in the form of the simulator: fraud is a burst of large ones"
    draw = random.Random(0)
    for card in range(n):
        for i in range(each):
            fraud = card % 2 == 0 and i in (each//2, each//2 + 1, each - 2)
            amount = draw.uniform(600, 1200) if fraud else draw.uniform(3, 90)
            yield [card, int(1.55e9 + 86400*i*3 + draw.randrange(80000)), draw.choice(CATEGORIES), round(amount, 2), 40, -70, 40.5, -70.5,
                   '1980-02-03', 5000, int(fraud)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('cards')
    with gzip.open(d/'transactions.csv.gz', 'wt', newline='') as f:
        w = csv.writer(f)
        w.writerow('card unix_time category amt merch_lat merch_long lat long dob city_pop is_fraud'.split())
        w.writerows(card_rows())
    return d


def test_cards_are_split_without_leaks(folder):
    cards = read_cards(folder)
    for seed in range(3):
        s = split_cards(cards, seed=seed)
        groups = [{c.name for c in p} for p in s]
        assert sum(map(len, groups)) == len(set.union(*groups)) == len(cards)
        date = max(c.times[-1] for c in (*s.learn, *s.choose))
        assert all(c.times[c.train] > date for c in s.test) and all(c.train == 0 for c in (*s.learn, *s.choose))
        known = {c.values.numpy().tobytes() for c in (*s.learn, *s.choose)}
        assert len(drop_repeats(s.test, (*s.learn, *s.choose))) == len(s.test) and not known & {c.values.numpy().tobytes() for c in s.test}


def test_features_see_nothing_later(folder):
    card = next(c for c in read_cards(folder) if c.name == '0')
    rows = [r for r in card_rows() if r[0] == 0]
    assert len(rows) == 40 and card.labels.sum() == 3 and (card.times.diff() > 0).all()
    for i in (0, 1, 17): assert card.values[i, 1] == pytest.approx(math.log1p(rows[i][1] - rows[i-1][1] if i else 30*86400), rel=1e-5)


def test_mixed_days_keep_what_they_say():
    at, owner = torch.rand(200, dtype=torch.float64)*1e8, [f'{i % 3}' for i in range(200)]
    fraud = torch.rand(200) < .1
    new = mix_days(at, owner, fraud, 1)
    assert new[fraud].equal(at[fraud]) and not new.equal(at)
    torch.testing.assert_close(new % 86400, at % 86400, rtol=0, atol=1e-6)
    for o in '012':
        own = torch.tensor([x == o for x in owner]) & ~fraud
        assert (new[own]//86400).sort().values.equal((at[own]//86400).sort().values)


def test_a_set_is_found_downloaded_or_explained(tmp_path, monkeypatch):
    monkeypatch.setenv('DEEPSEEK_NB_CACHE', f'{tmp_path}/cache')
    monkeypatch.setenv('DEEPSEEK_NB_DATA', f'{tmp_path}/own')
    def offline(*a, **k): raise OSError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    for name in ('nab', 'ucr_anomaly', 'card_sparkov'):
        with pytest.raises(FileNotFoundError, match='DEEPSEEK_NB_DATA') as e: find_set(name)
        assert '\n' not in str(e.value)
    (tmp_path/'own/ucr_anomaly').mkdir(parents=True)
    (tmp_path/'own/ucr_anomaly/007_UCR_Anomaly_x_2_4_5.txt').write_text('1 2 3 9 9 3')
    assert read_ucr()[0].windows == [(3, 4)]
    def online(url, timeout):
        out = io.BytesIO()
        with zipfile.ZipFile(out, 'w') as z:
            z.writestr('NAB/data/real/a.csv', 'timestamp,value\n2020-01-01 00:00:00,1\n2020-01-01 00:05:00,2\n')
            z.writestr('NAB/labels/combined_windows.json', '{"real/a.csv": []}')
        return io.BytesIO(out.getvalue())
    monkeypatch.setattr(urllib.request, 'urlopen', online)
    with pytest.raises(ValueError, match="isn't the one that is known; it was not unpacked") as e: read_nab()
    assert '\n' not in str(e.value) and not (tmp_path/'cache/data/nab').exists()
    commit = re.search('[0-9a-f]{40}', SETS['nab'].url)[0]
    monkeypatch.setitem(DIGESTS, commit, archive_digest(online('', 30).read()))
    assert len(read_nab()[0].values) == 2
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    assert read_nab()[0].name == 'real/a'  # from the cache
    with pytest.raises(FileNotFoundError, match='contains no'): read_transfers(tmp_path)


def test_every_archive_of_a_commit_has_a_digest():
    "Also those of the chapters that add sets; the others come from elsewhere, and are listed"
    for module in ('eval.bias', 'eval.bias', 'apps.route_moves', 'apps.series', 'apps.crosslingual', 'studies.cases'):
        importlib.import_module(f'deepseek_nb.{module}')
    commits = {name: re.search('[0-9a-f]{40}', s.url) for name, s in SETS.items() if s.url}
    assert {name for name, found in commits.items() if not found} == {'ucr_anomaly'}
    assert {found[0] for found in commits.values() if found} == DIGESTS.keys()
    assert len({*DIGESTS.values()}) == len(DIGESTS) and all(re.fullmatch('[0-9a-f]{64}', d) for d in DIGESTS.values())


def test_repeats():
    x = [Labelled(f'{i}', torch.randn(9, 1), torch.zeros(9).bool()) for i in range(3)]
    x[0].values[3] = torch.nan
    copy = Labelled('copy', x[0].values.clone(), x[0].labels)
    assert [o.name for o in drop_repeats([*x, copy])] == ['0', '1', '2'] and drop_repeats([copy], x) == []


# ---- the study

def test_smoke(folder, root, tmp_path):
    study = open_study('anomaly')
    plan = read_plan(root/'nbs/configs/evidence/anomaly.toml', smoke=True)
    assert {s['set'] for s in plan.arms.values()} == {'cards', 'transfers', 'ucr', 'skab', 'nab'}
    later = {a: s for a, s in plan.arms.items() if a == 'ucr-discord' or a.startswith('long-')}
    assert all(len(s['choices']) == 2 - (a in later) for a, s in plan.arms.items()), 'each method is tuned over as many settings'
    chosen = {r['arm']: r['result']['chosen'] for r in runs('anomaly', root/'nbs/results/evidence')}
    assert all(s['choices'] == [chosen[a.replace('long', 'ucr')]] for a, s in later.items() if a.replace('long', 'ucr') in chosen)
    found = []
    for arm in ('cards-single', 'cards-zscore', 'cards-fixed', 'cards-full', 'cards-boosting', 'cards-tcn', 'cards-bare'):
        if arm == 'cards-boosting': pytest.importorskip('sklearn')
        result = study.detect(plan.arms[arm] | dict(data=f'{folder}', most=0), 0, tmp_path)
        assert 0 <= result['value'] <= 1 and result['anomalies'] + result['normal'] > 50
        found.append(dict(arm=arm, seed=0, result=result))
    assert 'boosting' in study.score_table(found) and study.finding(found).count('**') == 4
    assert study.finding(found[:3]).startswith('Not run yet')


def test_stored_runs_belong_to_the_plan(root):
    plan, records = read_plan(root/'nbs/configs/evidence/anomaly.toml'), runs('anomaly', root/'nbs/results/evidence')
    assert {r['arm'] for r in records} <= {*plan.arms} and len(to_do(plan, records)) == len(to_do(plan, [])) - len(records)
    assert all(0 <= r['result']['value'] <= 100 for r in records if not r['arm'].startswith('nab'))


# ---- the application

PAYMENT = dict(card=7, amt=59., category='home', lat=41., long=-73., merch_lat=41.2, merch_long=-73., dob='1980-02-03', city_pop=5000)


def payments(n, card=7, start=1.55e9):
    draw = random.Random(card)
    return [PAYMENT | dict(card=card, unix_time=start + 40000.*i, amt=round(draw.uniform(3, 90), 2), category=draw.choice(CATEGORIES))
            for i in range(n)]


def test_the_weights_in_the_package_score_payments_without_a_network(tmp_path, monkeypatch, capsys):
    def offline(*a, **k): raise OSError('no network')
    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    assert sum(p.stat().st_size for p in package_folder('fraud').iterdir()) < 2e6
    with open(tmp_path/'rows.csv', 'w', newline='') as f:
        w = csv.DictWriter(f, ['unix_time', *PAYMENT])
        w.writeheader()
        night = [PAYMENT | dict(unix_time=17951*86400. + 81000 + 900*i, amt=950., category='shopping_net') for i in range(6)]  # from 22:30
        w.writerows(payments(20) + night)
    assert cli.main(['app', 'anomaly', 'score', f'{tmp_path}/rows.csv', '--out', f'{tmp_path}/out.csv']) == 0
    with open(tmp_path/'out.csv') as f: found = list(csv.DictReader(f))
    assert len(found) == 26 and [r['alarm'] for r in found[:20]] == ['False']*20 and found[-1]['alarm'] == 'True'
    assert cli.main(['app', 'anomaly', 'card']) == 0
    said = capsys.readouterr().out
    assert all(s in said for s in ('MIT', 'Limits', 'false positives'))


@pytest.mark.parametrize('change,field', [(dict(amt='59'), 'amt'), (dict(amt=math.inf), 'amt'), (dict(dob='1980-02-31'), 'dob'),
                                          (dict(dob=None), 'dob'), (dict(unix_time=1.5e9), 'unix_time'),
                                          (dict(unix_time=None), 'unix_time'), (dict(colour='red'), 'colour'),
                                          (dict(card=[7]), 'card'), (dict(explain=1), 'explain'), (dict(category='space'), 'category')])
def test_a_bad_payment_names_its_field_and_changes_nothing(change, field):
    watcher = watcher_from()
    for row in payments(3): watcher.score(Fields(row))
    before = watcher.detector.streams['7']
    kept, steps = [o.clone() for o in before.state.convs], before.steps
    with pytest.raises(ApiError) as e: watcher.score(Fields(payments(4)[3] | change), strict=True)
    assert (e.value.status, e.value.param) == (400, field) and '\n' not in e.value.message
    after = watcher.detector.streams['7']
    assert after.steps == steps and all(a.equal(b) for a, b in zip(kept, after.state.convs, strict=True))


def test_a_service_goes_on_after_a_restart(tmp_path):
    rows = payments(12) + payments(12, 8)
    whole = Service(watcher_from()).answer
    want = [whole(Fields(r)) for r in rows]
    first = Service(watcher_from(), f'{tmp_path}/s', every=5)
    got = [first.answer(Fields(r)) for r in rows[:15]]
    atexit.unregister(first.save)
    again = AnomalyApp.serve('', state=f'{tmp_path}/s')
    got += [again(Fields(r)) for r in rows[15:]]
    atexit.unregister(again.__self__.save)
    assert got == want


def test_rows_and_whole_signals_have_the_same_features():
    rows = [{k: f'{v}' for k, v in r.items()} for r in payments(9)]
    table = {k: [r[k] for r in rows] for k in rows[0]}
    last, found = None, []
    for r in payments(9):
        found.append(RowReader().values(Fields(r), r['unix_time'], last))
        last = r['unix_time']
    torch.testing.assert_close(torch.tensor(found), card_features(table), rtol=1e-6, atol=1e-6)


def test_a_table_is_learned_and_served(tmp_path):
    x = wave(500, 4)[:, 0].tolist()
    with open(tmp_path/'t.csv', 'w') as f:
        f.write('time,level,note\n' + ''.join(f'{60*i},{v:.4f},ok\n' for i, v in enumerate(x)))
    said = AnomalyApp.train(f'{tmp_path}/t.csv', f'{tmp_path}/w', budget=.05, steps=5, rate=60)
    assert 'threshold' in said and 'level' in AnomalyApp.card(f'{tmp_path}/w')
    answer = AnomalyApp.serve(f'{tmp_path}/w')
    assert answer(Fields(dict(time=0., level=.5)))['score'] == 0
    for body, field in [(dict(time=30., level=0.), 'time'), (dict(time=0., level=0.), 'time'), (dict(level=0.), 'time'),
                        (dict(time=60., note='a'), 'note')]:
        with pytest.raises(ApiError) as e: answer(Fields(body))
        assert e.value.param == field
    assert answer(Fields(dict(time=60., level=.5, explain=True)))['unusual'][0]['variable'] == 'level'
    with pytest.raises(ValueError, match='no column has numbers'): AnomalyApp.train(_file(tmp_path, 'a\nx\n'), f'{tmp_path}/n')


def _file(folder, text):
    (folder/'other.csv').write_text(text)
    return f'{folder}/other.csv'

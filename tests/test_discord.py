"Discords: exact windows and neighbours against loops, streams against whole signals, restarts, gaps and errors"
import math
import random

import pytest
import torch

from deepseek_nb.apps.anomaly import (
    CUT_AT,
    GRID,
    Detector,
    DiscordConfig,
    DiscordDetector,
    FitSettings,
    as_series,
    centred_windows,
    nearest_windows,
    on_grid,
    recall_windows,
    scaled,
)
from deepseek_nb.apps.tcn import SignalConfig


@pytest.fixture(scope='module')
def draw():
    n = random.randrange(10**6)
    print(f'seed {n}')
    return random.Random(n)


def signal(n, variables, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.sin(torch.arange(n)/5.)[:, None] + .2*torch.randn(n, variables, generator=g)


@pytest.fixture(scope='module')
def detector(draw):
    m, seed = draw.choice([1, 2]), draw.randrange(10**6)
    c = DiscordConfig(tuple(draw.sample([8, 16, 24], 2)), 8, draw.choice([1, 5]), draw.random() < .5)
    net = SignalConfig(m, dim=8, kernel=2, dilations=(1, 2), attend=(1,), periods=(1, 3))
    return DiscordDetector.fit(signal(120, m, seed), c, net, FitSettings(2, 32, 2, seed=seed), rate=1., max_gap=4)


def test_windows_and_neighbours_against_loops(draw):
    m, features, size = draw.choice([1, 3]), draw.choice([1, 2, 5]), draw.choice([1, 3])
    n, seed = features*size, draw.randrange(10**6)
    x, other = (on_grid(signal(k, m, seed + k)) for k in (40, 30))
    w, keys = centred_windows(x, n, features), centred_windows(other, n, features)
    assert w.shape == (41 - n, features*m)
    for i in (0, len(w)//2, len(w) - 1):
        part = [[sum(x[i + f*size + j, v].item() for j in range(size)) for v in range(m)] for f in range(features)]
        want = [features*part[f][v] - sum(row[v] for row in part) for f in range(features) for v in range(m)]
        assert w[i].tolist() == want
    near, index = nearest_windows(w, keys, piece=draw.choice([1, 4, 100]))
    for q, d, j in zip(w.tolist(), near.tolist(), index.tolist(), strict=True):
        all_of_them = [sum((a - b)**2 for a, b in zip(q, k, strict=True)) for k in keys.tolist()]
        assert d == min(all_of_them) == all_of_them[j]
    own, index = nearest_windows(w, w, apart=n, piece=7)
    far = [[((w[i] - w[j])**2).sum().item() for j in range(len(w)) if abs(i - j) >= n] for i in range(len(w))]
    assert own.tolist() == [min(o, default=math.inf) for o in far]


def test_attention_has_the_nearest_neighbour_as_its_limit(draw):
    w, keys = (centred_windows(on_grid(signal(30, 1, draw.randrange(10**6))), 6, 3) for _ in range(2))
    _, index = nearest_windows(w, keys)
    two = ((w[:, None] - keys)**2).sum(-1).sort(1).values
    clear = two[:, 1] - two[:, 0] > 40*2*10.**2 # e^-40 of the weight goes to all others together, at most
    error = (recall_windows(w, keys, 10.) - keys[index])[clear].abs().max() if clear.any() else torch.tensor(0.)
    assert error <= 25*math.exp(-40)*keys.abs().max()*2 + 1e-9


def test_whole_numbers_stay_exact():
    c = DiscordConfig((256,)).checked(10)
    worst = torch.full((256, 10), float(CUT_AT*GRID), dtype=torch.float64)
    worst[:128] *= -1
    w = centred_windows(worst, 256, c.features)
    d, _ = nearest_windows(w, -w)
    assert int(d.item()) == sum((2*int(v))**2 for v in w[0].tolist()) < 2**53
    with pytest.raises(ValueError, match="can't be summed exactly"): DiscordConfig((4096,)).checked(10)


def test_streams_pieces_and_restarts_have_the_same_bits(detector, draw, tmp_path):
    m, seed = detector.normal.shape[1], draw.randrange(10**6)
    x = signal(70, m, seed)
    x[40:44] = 9.
    x[[draw.randrange(70) for _ in range(5)]] = math.nan
    whole = detector.score_series(x)
    assert torch.equal(whole, detector.score_series(x, piece=draw.randint(1, 20))) and not whole.isnan().any()
    assert (whole[x.isnan().all(1)] == 0).all()
    cut, rows = draw.randint(1, 69), x.tolist()
    first = [detector.score(v, key='s') for v in rows[:cut]]
    detector.save(tmp_path)
    again = DiscordDetector.load(tmp_path)
    rest = [again.score(v, key='s') for v in rows[cut:]]
    assert [o.score for o in (*first, *rest)] == whole.tolist()
    assert rest == [detector.score(v, key='s') for v in rows[cut:]]
    assert again.explain('s') == detector.explain('s')


def test_the_stretch_that_is_named_is_the_nearest(detector, draw):
    m, x = detector.normal.shape[1], signal(50, detector.normal.shape[1], draw.randrange(10**6))
    for v in x.tolist(): detector.score(v, key='named')
    grid = on_grid(scaled(as_series(x), detector.detector.scaling))
    for o in detector.explain('named'):
        here = centred_windows(grid[-o.length:], o.length, detector.c.features)
        there = centred_windows(detector.normal[o.first : o.first + o.length], o.length, detector.c.features)
        largest = detector.largest[detector.c.lengths.index(o.length)].item()
        assert math.isclose((here - there).norm().item()/largest, o.distance, rel_tol=1e-9) and here.shape == (1, detector.c.features*m)


def test_gaps_are_missing_rows_and_long_ones_begin_anew(detector, draw):
    m = detector.normal.shape[1]
    x = signal(40, m, draw.randrange(10**6))
    holes = x.clone()
    holes[20:23] = math.nan
    want = detector.score_series(holes)
    got = [detector.score(v, float(i), 'gap').score for i, v in enumerate(x.tolist()) if not 20 <= i < 23]
    assert got == [*want[:20].tolist(), *want[23:].tolist()]
    fresh = [detector.score(v, key='fresh') for v in x[:3].tolist()]
    assert [detector.score(v, 100. + i, 'gap') for i, v in enumerate(x[:3].tolist())] == fresh
    before = detector.streams['gap'].recent.clone(), detector.streams['gap'].signal.steps
    for bad, time, said in (([0.]*m, 50., 'not later'), ([0.]*m, None, 'has had times'), ([0.]*(m + 1), 103., 'values were given'),
                            ([math.inf]*m, 103., 'infinite')):
        with pytest.raises(ValueError, match=said) as e: detector.score(bad, time, 'gap')
        assert '\n' not in str(e.value)
    assert torch.equal(detector.streams['gap'].recent, before[0]) and detector.streams['gap'].signal.steps == before[1]


def test_a_shape_that_is_new_is_found_where_steps_are_not(draw):
    "Half the amplitude for one period: no step is larger than normal ones"
    t = torch.arange(900.)
    normal = torch.sin(t*math.pi/12)
    odd = normal[:300].clone()
    odd[144:192] *= .3
    net = SignalConfig(1, dim=8, dilations=(1, 2), attend=())
    d = DiscordDetector.fit(normal, DiscordConfig((24, 48), 24), net, FitSettings(2, 64, 2))
    parts = d.parts(d.new_stream(), as_series(odd))[0][:, :2]
    assert parts[47:144, 1].max() < 1e-2*parts[144:240, 1].max() and 144 <= parts[:, 1].argmax() < 240
    assert isinstance(d.detector, Detector) and d.c.lengths == (24, 48)

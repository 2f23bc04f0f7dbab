"The papers' figures on FLOPs and caches up to a million tokens, counted again without the chapter's descriptions of layers"
import math
from itertools import pairwise

import pytest

from deepseek_nb.arch.releases import preset
from deepseek_nb.bench.limits import PAPERS, V41_SIZES, Decoder, Reads, against_papers, crossing, decoder, shared_weights

NAMES = [f'deepseek-{n}' for n in ('v3.1', 'v3.2', 'v4-pro', 'v4-flash', 'v4.1-flash')]
MILLION = 10**6


def rounded(x, like): return round(x, 2) if like < 1 else round(x)


def total(name, t): return sum(decoder(name).flops(t).values())


def test_figures_of_the_papers_within_their_rounding():
    counted = against_papers()
    exact = [k for k in PAPERS if '4K' not in k]
    assert [rounded(counted[k], PAPERS[k]) for k in exact] == [PAPERS[k] for k in exact]
    grown = 'V4.1-Flash, FLOPs at 1M over 4K'   # "about a quarter more"
    assert abs(counted[grown] - PAPERS[grown]) < .05


@pytest.mark.parametrize('name,keys,index', [('deepseek-v4-pro', 1024, 30), ('deepseek-v4-flash', 512, 21)])
def test_v4_by_a_loop_over_layers(name, keys, index):
    "The paper's formulas written out for one layer after the other"
    c, attention, scored, grown = preset(name), 0, 0, 0.
    for m in c.compress_ratios:
        entries = MILLION//m if m else 0
        attention += 2*(2*c.n_heads*c.head_dim)*(128 + (min(entries, keys) if m == 4 else entries))
        scored += 2*64*128*entries if m == 4 else 0
        grown += ((448 + 2*64 + 8) + (64 + 4)*(m == 4))*entries
    assert sum(m == 4 for m in c.compress_ratios) == index
    d = decoder(name)
    assert d.flops(MILLION) == dict(weights=2*c.active_params(), attention=2*attention, index=scored/2)
    assert d.cache(MILLION) - d.cache(0) == grown


def test_same_flops_as_the_config():
    "`Config.flops_per_token` counts FLOPs without weights for precision"
    for name in NAMES[:4]:
        c, d = preset(name), decoder(name)
        for t in (0, 100, 129, 2048, 50_001, MILLION):
            f = d.flops(t)
            assert f['weights'] + f['attention']/2 + f['index']/d.index_rate == c.flops_per_token(t)


def test_caches_of_v3():
    assert decoder(NAMES[0]).cache(MILLION) == 61*656*MILLION and decoder(NAMES[1]).cache(MILLION) == 61*(656 + 132)*MILLION


def test_v41_has_the_stated_active_weights(): assert math.isclose(shared_weights(V41_SIZES), 16e9, rel_tol=.03)


@pytest.mark.parametrize('name', NAMES)
def test_costs_never_fall_with_the_context(name):
    steps = [1, 100, 128, 129, 2047, 2048, 2049, 4096, 16_384, 100_000, MILLION]
    assert all(total(name, a) <= total(name, b) and decoder(name).cache(a) <= decoder(name).cache(b) for a, b in pairwise(steps))


def test_crossing_is_where_the_costs_cross():
    f, g = (lambda t, n=n: total(n, t) for n in NAMES[:2])
    t = crossing(f, g)
    assert f(t) > g(t) and f(t - 1) <= g(t - 1) and 2048 < t < 2500
    assert crossing(f, f) is None and crossing(lambda t: t, lambda t: 0) == 128


def test_reads_count_by_hand():
    layer = Reads(key=3, score=2, window=10, ratio=4, topk=5, candidates=7, entry=8, fixed=100)
    for t in range(60):
        entries = len(range(3, t, 4)) # an entry is complete with its fourth token
        assert layer.attended(t) == len(range(max(0, t - 10), t)) + min(5, entries) and layer.scored(t) == min(7, entries)
        one = Decoder(11, [layer], .5)
        assert one.flops(t) == dict(weights=22, attention=6*layer.attended(t), index=layer.scored(t)) and one.cache(t) == 100 + 8*entries


def test_a_model_without_a_curve_is_refused():
    with pytest.raises(ValueError, match='neither MLA nor that of V4'): decoder('smollm2-135m')

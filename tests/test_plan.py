"""The plan of a cluster against sums by hand, and its command"""
import pytest

from deepseek_nb.arch.releases import preset
from deepseek_nb.bench.plan import H800, against_published, exchange_time, parse_cards, plan_cluster, serve_plan, train_plan, weight_counts
from deepseek_nb.tools.cli import main

V3 = preset('deepseek-v3')
EXPERTS = 58*256*3*7168*2048  # layers, experts, matrices, width, inner width
ATTENTION = 61*(7168*1536 + 1536*128*192 + 7168*576 + 512*128*256 + 128*128*7168)
OTHERS = ATTENTION + 3*3*7168*18432 + 58*(3*7168*2048 + 256*7168) + 2*129280*7168  # without norms and biases


def test_weights_by_hand():
    routed, rest = weight_counts(V3)
    assert routed == EXPERTS and OTHERS < rest < OTHERS*1.0001 and routed + rest == V3.params()


def test_exchange_by_hand():
    "Three bytes an element: by nodes 4·(1−1/8) times, by cards 8·(1−1/18) times, within a node 8·7/8 times"
    one = 58*3*7168
    assert exchange_time(V3, 64, H800) == pytest.approx(one*4*(1 - 1/8)/61e9)
    assert exchange_time(V3, 144, H800, nodes=False) == pytest.approx(one*8*(1 - 1/18)/61e9)
    assert exchange_time(V3, 8, H800) == pytest.approx(one*8*7/8/153e9) and exchange_time(V3, 1, H800) == 0


def test_decode_step_by_hand():
    s = serve_plan(V3, 144, rows=88)
    scores = 2*61*128*4989*(2*512 + 64)  # FLOPs for a row
    assert s.weights == pytest.approx(EXPERTS/144 + OTHERS, rel=1e-4) and s.rows == 88
    products = max(88*2*V3.active_params()/1.55e15, s.weights/3e12)
    assert s.compute == pytest.approx(products + max(88*scores/660e12, 88*4989*70272/3e12), rel=1e-3)
    assert s.step == max(s.compute, s.exchange) and s.dollars[1] == pytest.approx(2/3600*1e6*s.step/88)


def test_rows_fill_the_memory():
    s = serve_plan(V3, 16)
    cache = 4989*70272
    assert s.weights + s.rows*cache <= .9*80e9 < s.weights + (s.rows + 1)*cache
    assert serve_plan(V3, 8).rows == 0
    assert "serving  98.9 GB of weights on a card; doesn't fit" in repr(plan_cluster('deepseek-v3', '8xH100'))


def test_training_by_hand():
    t = train_plan(V3, 2048)
    assert t.bubble == pytest.approx(14/(14 + 3*15360/128))
    assert t.state == pytest.approx(EXPERTS/1024*(6 + 8/2) + OTHERS/16*(6 + 8/128), rel=1e-4)
    assert t.hours == pytest.approx(max(t.compute, t.exchange)/(1 - t.bubble)*1e12/3600) and t.fits and not train_plan(V3, 16).fits
    assert train_plan(V3, 8, stages=1).bubble == 0


def test_errors_beside_the_published_figures_are_those_that_the_page_states():
    counted, timed = against_published()[:3], against_published()[3:]
    for what, plan, published in counted: assert plan == pytest.approx(published, rel=.011), what
    for what, plan, published in timed: assert 1/4 < min(plan/published, published/plan) < .41, what


def test_bad_cards_are_refused():
    for text, why in dict(zip(('16', '4xB1', '0xH100', '12xH100'),
                              ('write number', 'known are H800, H100, H200', '1 to 8 cards', 'whole nodes'), strict=True)).items():
        with pytest.raises(ValueError, match=why): parse_cards(text)


def test_command(capsys):
    assert main(['plan', 'deepseek-v3', '--cards', '16xH800']) == 0 and 'rows a card' in capsys.readouterr().out
    assert main(['plan', 'smollm2-135m']) == 2 and 'with experts; known are' in capsys.readouterr().err

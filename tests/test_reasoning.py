"The study of reinforcement: its counts against enumeration, stages that are kept, and a headline that follows from stored runs"
import itertools
import json
import random

import numpy as np
import pytest

from deepseek_nb.studies import open_study, read_plan

study = open_study('reasoning')


@pytest.fixture
def settings(root): return read_plan(root/'nbs/configs/evidence/reasoning.toml', smoke=True).arms


def test_attempts_by_enumeration():
    seed = random.randrange(2**31)
    print('seed', seed)
    rng = random.Random(seed)
    n = rng.randint(2, 7)
    counts = [rng.randint(0, n) for _ in range(5)]
    for k in range(1, n + 1):
        found = [np.mean([any(c) for c in itertools.combinations([1]*x + [0]*(n - x), k)]) for x in counts]
        assert study.among(counts, n, k) == pytest.approx(100*np.mean(found))


def test_gain_compares_the_same_problems():
    "A constant difference has no interval, and an arm has no gain over itself"
    rng = np.random.default_rng()
    a = {s: rng.integers(0, 2, 40) for s in (2, 0, 1)}
    assert study.gain(a, a)[:] == (0, 0, 0)
    g = study.gain({s: h*0 + 1 for s, h in a.items()}, {s: h*0 for s, h in a.items()})
    assert g[:] == (100, 100, 100)
    g = study.gain(a, {s: h*0 for s, h in a.items()})
    assert g.low <= g.value <= g.high and g.value == pytest.approx(100*np.mean([h.mean() for h in a.values()]))


def test_stages_are_kept_and_repeat(settings, tmp_path, monkeypatch):
    one, two = (study.reasoning(settings['grpo'], 0, tmp_path/n/'run') for n in 'ab')
    assert {k: v for k, v in one.items() if k != 'seconds'} == {k: v for k, v in two.items() if k != 'seconds'}
    monkeypatch.setattr(study, 'trained', lambda trainer: 1/0)
    assert study.reasoning(settings['grpo'], 0, tmp_path/'a'/'run') == one
    other = settings['grpo'] | dict(tried=settings['grpo']['tried'] | dict(grpo=[[.5, 1.]]))
    with pytest.raises(ZeroDivisionError): study.reasoning(other, 0, tmp_path/'a'/'run')


def test_the_headline_follows_from_stored_runs(root):
    path = root/'nbs/results/evidence/reasoning.json'
    if not path.exists(): pytest.skip('the study has no records')
    records = json.loads(path.read_text())['runs']
    share = {a: np.mean([r['result']['hits'].count('1')/len(r['result']['hits']) for r in records if r['arm'] == a]) for a in study.NAMES}
    said = study.finding(records)
    for arm in set(study.NAMES) - {'constant', 'random', 'grpo'}: assert f'{100*share[arm]:.1f} ±' in said
    assert f"**{100*(share['grpo'] - share['start']):+.1f} points" in said
    for r in records: assert sum(r['result']['counts']) <= r['result']['attempts']*len(r['result']['hits'])

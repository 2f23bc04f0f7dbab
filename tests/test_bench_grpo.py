"The benchmark of GRPO beside TRL on a tiny policy: what a contender reports, what is compared, and what is refused."
import json

import pytest

from deepseek_nb.bench import training
from deepseek_nb.bench.training import Contender, fastest_peer, grpo_case, grpo_plan, grpo_table, small_policy, sum_prompts


@pytest.fixture(scope='module')
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp('policy')
    tiny = dict(dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, inter_dim=32)
    return grpo_plan(*small_policy(folder, **tiny), sum_prompts(4, 1), 8, 5, 1)


def test_trl_takes_the_same_steps(plan):
    pytest.importorskip('trl', reason='TRL is not installed: pip install trl')
    found = json.loads(json.dumps(grpo_case(plan, rounds=1, peers=('TRL, sdpa',), ours=('deepseek_nb',)), default=lambda x: x.to_dict()))
    assert found['tokens'] == 8*5 and [*found['seconds']] == ['deepseek_nb', 'TRL, sdpa'] == found['step']['names']
    assert all(m['peak'] > m['libraries'] > 0 for m in found['memory'].values())
    assert grpo_table(dict(tiny=found)).count('TRL, sdpa') == 1


def test_a_contender_that_fails_says_why(plan, monkeypatch):
    monkeypatch.setattr(training, '_CHILD', 'raise SystemExit("no such setting")')
    with pytest.raises(ValueError, match='TRL, sdpa: no such setting'): Contender(plan, 'TRL, sdpa')
    with pytest.raises(ValueError, match='no setting of TRL runs'): fastest_peer(plan, ['TRL, sdpa', 'TRL, eager'])

"""Where numbers come from: commits, plans that came first, and records that are refused

Headlines are computed from stored runs alone. Under the protocol a record with an unclean tree, without a commit, with a best rate at
the end of its grid, or without its floor is refused, and the plan is older than its first run. Records from before are counted, and may
only become fewer.
"""
import json
import math
import random
import re
import subprocess
import types
from dataclasses import replace
from inspect import signature

import pytest
import torch
from canaries import SMALL_OPTIONS, check_canaries, judge_canary, numbers_of, ratios_of, recorded, reference, run_canary

from deepseek_nb import bench
from deepseek_nb.bench import before, find_benchmark
from deepseek_nb.eval.intervals import equivalent, t_tail
from deepseek_nb.studies import (
    BEFORE,
    STUDIES,
    carry_out,
    edge,
    find_study,
    objections,
    open_study,
    read_plan,
    read_protocol,
    read_records,
    read_study,
    runs,
    standing,
    study,
    study_cells,
    study_names,
)
from deepseek_nb.studies.cases import WordBayes, majority

# Records of benchmarks that were stored before provenance was kept; a new measurement takes one off
BENCHES_BEFORE = """
    bias format-rates lora machine prefix-cache quality roofline
""".split()
PLAN = '''minutes = 1
seeds = [0, 1]
[settings]
rates = [0.1, 1.0, 10.0]
best = 1.0
[arms.ours]
[arms.floor]
rates = []
[protocol]
metric = "a number"
better = "higher"
headline = "ours is above the floor"
floors = ["floor"]
margin = 0.1
grid = "rates"
chosen = "rate"
'''


@study('guess')
def guess(settings, seed, folder): return dict(value=seed, rate=settings['best'])


@pytest.fixture
def made(tmp_path):
    "A study under the protocol, run in a clean tree: plan, records, folder"
    (tmp_path/'guess.toml').write_text(PLAN)
    plan = read_plan(tmp_path/'guess.toml')
    records = carry_out(plan, tmp_path/'guess.json', tmp_path/'work', say=lambda o: None)
    for r in records: r['provenance'] |= dict(commit='0123abcd', clean=True)
    store(tmp_path, records)
    return plan, records, tmp_path


def store(folder, records): (folder/'guess.json').write_text(json.dumps(dict(study='guess', runs=records)))


# ---- what is refused

SPOILT = {
    'the tree was not clean': lambda r: r['provenance'].update(clean=False),
    'no commit': lambda r: r['provenance'].update(commit=''),
    'the best rate is at an end of the grid': lambda r: r['result'].update(rate=10.),
    'it was made with another plan': lambda r: r['provenance'].update(plan='0'*12),
    'stored before provenance was kept': lambda r: r.pop('provenance')}


@pytest.mark.parametrize('said', SPOILT)
def test_a_spoilt_record_is_refused(made, said):
    plan, records, folder = made
    assert objections(plan, records) == [] and len(read_study('guess', folder, folder)[1]) == 4
    SPOILT[said](next(r for r in records if (r['arm'], r['seed']) == ('ours', 1)))
    assert [f'ours, seed 1: {said}'] == objections(plan, records)
    store(folder, records)
    assert objections(*read_study('guess', folder, folder))[0].startswith('ours, seed 1: ')


def test_a_missing_floor_and_a_changed_plan_are_refused(made):
    plan, records, folder = made
    assert objections(plan, [r for r in records if r['arm'] != 'floor']) == ["the floor 'floor' has no run"]
    other = replace(plan, protocol=plan.protocol | dict(margin=.5))
    assert [f'{r["arm"]}, seed {r["seed"]}: it was made with another plan' for r in records] == objections(other, records)
    (folder/'guess.toml').write_text(PLAN.replace('margin = 0.1', 'margin = 0.5'))
    with pytest.raises(ValueError, match='needs a name of its own'): carry_out(read_plan(folder/'guess.toml'), folder/'guess.json', folder)
    (folder/'guess.toml').write_text(PLAN + '\n# a remark\n[smoke]\nseeds = [7]\n')
    assert read_plan(folder/'guess.toml').mark == plan.mark and read_plan(folder/'guess.toml', smoke=True).protocol == {}


@pytest.mark.parametrize('change', ['settings', 'seeds', 'arms', 'protocol'])
def test_the_mark_hears_every_part_of_a_plan(made, change):
    plan = made[0]
    other = dict(settings=dict(arms=plan.arms | dict(ours=dict(best=2.))), seeds=dict(seeds=(0, 1, 2)),
                 arms=dict(arms=plan.arms | dict(more={})), protocol=dict(protocol=plan.protocol | dict(headline='other')))[change]
    assert replace(plan, **other).mark != plan.mark


@pytest.mark.parametrize('key, value', [('metric', None), ('better', 'more'), ('floors', []), ('floors', ['x']), ('margin', 'small')])
def test_a_protocol_is_complete(made, key, value):
    plan = replace(made[0], protocol=made[0].protocol | {key: value})
    with pytest.raises(ValueError, match=f'guess: .*({key}|floor)'): read_protocol(plan)


def test_edges_of_several_rates(made):
    r = made[1][0]
    assert not edge(r | dict(result=dict(rate=dict(a=1., b=1.))), made[0].protocol)
    assert edge(r | dict(result=dict(rate=dict(a=1., b=.1))), made[0].protocol)


# ---- commits

def test_a_tree_with_changes_is_not_clean(tmp_path, monkeypatch):
    who = 'git', '-c', 'user.name=a', '-c', 'user.email=a@b'
    def git(*args): subprocess.run([*who, *args], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path/'package').mkdir()
    monkeypatch.setattr(bench, '_PACKAGE', tmp_path/'package')
    (tmp_path/'nbs'/'results').mkdir(parents=True)
    git('init', '-q')
    for name in ('package/a.py', 'nbs/b.ipynb', 'nbs/results/c.json'): (tmp_path/name).write_text('1')
    git('add', '-A'), git('commit', '-qm', 'x')
    assert bench.git_state()['clean'] is True
    (tmp_path/'nbs/results/c.json').write_text('2')
    assert bench.git_state()['clean'] is True
    (tmp_path/'nbs/b.ipynb').write_text('2')  # outside the package's folder
    assert bench.git_state()['clean'] is False


def at_commit(root, commit, pattern):
    "Text of the file of a commit whose path matches"
    def git(*args): return subprocess.run(['git', *args], cwd=root, capture_output=True, text=True)
    if git('cat-file', '-e', f'{commit}^{{commit}}').returncode:
        if git('rev-parse', '--is-shallow-repository').stdout.strip() != 'false':
            pytest.skip(f'commit {commit} is not in this copy: git fetch --unshallow')
        pytest.fail(f'Git does not know commit {commit}, at which a record was measured')
    assert git('merge-base', '--is-ancestor', commit, 'HEAD').returncode == 0, f'HEAD does not follow commit {commit}'
    path, = (p for p in git('ls-tree', '-r', '--name-only', commit).stdout.splitlines() if re.fullmatch(pattern, p))
    return git('show', f'{commit}:{path}').stdout


def verdicts(text): return re.findall(r'\*\*[^*]*?\b(reached|missed|refuted)\b', text)


@pytest.mark.parametrize('name', sorted({*study_names()} - {*BEFORE}))
def test_plan_and_deciding_function_are_older_than_the_first_run(root, tmp_path, monkeypatch, name):
    "Runs are made in a clean tree: their commit contains the plan, and a function that gives the verdict of today"
    plan, records = read_study(name)
    monkeypatch.setitem(STUDIES, name, find_study(name))
    if not records: pytest.skip('no run yet')
    for commit in {r['commit'] for r in records}:
        (tmp_path/f'{name}.toml').write_text(at_commit(root, commit, f'nbs/configs/evidence/{name}.toml'))
        (tmp_path/'study.ipynb').write_text(at_commit(root, commit, fr'nbs/(?:\w+/)?\d+_studies\.{name}\.ipynb'))
        assert read_plan(tmp_path/f'{name}.toml').mark == plan.mark, f'{name}: another plan was committed at {commit}'
        cells = [code for _, code in study_cells(tmp_path/'study.ipynb')]
        assert any(re.search(r'^def finding\(', code, re.M) for code in cells), f'{name}: no function that decides at {commit}'
        then = types.ModuleType(f'deepseek_nb.studies.{name}')
        try:
            for code in cells: exec(code, vars(then))
            said = then.finding(records)
        except (ImportError, AttributeError) as e: pytest.skip(f'the function of {commit} does not run with the package of today: {e}')
        assert verdicts(said) == verdicts(open_study(name).finding(records)) != [], f'{name}: the verdict of {commit} was another one'


# ---- statistics and floors

def test_equivalence_equals_two_tests_of_scipy():
    stats = pytest.importorskip('scipy.stats')
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    for n in (2, 3, 11, 40):
        x, m = (torch.randn(n, generator=g, dtype=torch.float64)*2).numpy(), .7
        want = max(stats.ttest_1samp(x, -m, alternative='greater').pvalue, stats.ttest_1samp(x, m, alternative='less').pvalue)
        assert equivalent(x, m).p == pytest.approx(want, rel=1e-6, abs=1e-12), (n, g.initial_seed())
        assert equivalent(x, m).equal == (want <= 1 - .95)
    for df in (1, 2, 9, 300): assert t_tail(-1.7, df) == pytest.approx(stats.t.sf(-1.7, df), rel=1e-9)


@pytest.mark.parametrize('values, margin', [([1.], 1), ([1., 2.], 0), ([1., float('nan')], 1), ([[1.], [2.]], 1)])
def test_equivalence_of_nothing_is_an_error(values, margin):
    with pytest.raises(ValueError, match='equivalence needs|not finite'): equivalent(values, margin)


def test_naive_bayes_equals_that_of_scikit_learn():
    text, bayes = pytest.importorskip('sklearn.feature_extraction.text'), pytest.importorskip('sklearn.naive_bayes')
    r = random.Random()
    docs = [' '.join(r.choices('abcdefgh', k=r.randint(1, 9))) for _ in range(60)]
    labels = [r.choice('xyz') for _ in docs]
    count = text.CountVectorizer(token_pattern=r'\S+')
    theirs = bayes.MultinomialNB(alpha=.3).fit(count.fit_transform(docs[:40]), labels[:40])
    want = theirs.predict_joint_log_proba(count.transform(docs[40:]))
    ours = WordBayes(docs[:40], labels[:40], .3)
    best = [ours.classes.index(c) for c in ours.predict(docs[40:])]
    assert [row[b] for row, b in zip(want, best, strict=True)] == pytest.approx(want.max(1).tolist())
    assert majority(list('abb'), docs[:2]) == ['b', 'b']


# ---- what is stored

def test_studies_from_before_may_only_become_fewer():
    where = {n: standing(n) for n in study_names()}
    old = {n for n, (state, _) in where.items() if state == 'before the protocol'}
    assert old <= {*BEFORE}, f'{sorted(old - {*BEFORE})}: a new study needs a table [protocol] in its plan'
    assert len(BEFORE) <= 13
    refused = {n: found[:3] for n, (state, found) in where.items() if state == 'refused'}
    assert not refused, f'{refused}: run again with deepseek-nb evidence NAME'


def test_headlines_follow_from_stored_runs(root):
    for name in study_names():
        plan, records = read_study(name)
        if plan.protocol and records: assert not objections(plan, records), name
    said = open_study('floors').finding(runs('floors', root/'nbs/results/evidence'), runs('compute', root/'nbs/results/evidence'))
    by = {r['arm']: r['result'] for r in read_records(root/'nbs/results/evidence/floors.json')}
    for task, n in by['bayes']['n'].items(): assert f"{task} {by['bayes']['hits'][task]/n:.0%} against" in said


def test_benchmarks_from_before_may_only_become_fewer(root):
    found = {p.stem: json.loads(p.read_text()) for p in (root/'nbs/results').glob('*.json')}
    new = {n for n, r in found.items() if before(r)} - {*BENCHES_BEFORE}
    assert not new, f'{sorted(new)}: a new record has provenance; measure with deepseek-nb bench NAME --out FILE'
    for name, r in found.items():
        if not before(r): assert r['provenance']['commit'] and r['provenance']['clean'] is True, name


# ---- canaries

def test_every_record_has_a_canary_or_is_listed(root):
    "Rates of a machine, and measurements without small options, have none"
    without = 'format-rates latent-codes machine quality roofline scaling bfcl mini speculate-equality'.split()
    assert {*recorded(root/'nbs/results')} - {*SMALL_OPTIONS} - {*study_names()} == {*without}
    for name, options in SMALL_OPTIONS.items(): signature(find_benchmark(name), follow_wrapped=False).bind(**options)
    stored = json.loads((root/'nbs/results/evidence/canaries.json').read_text())
    assert {*stored} <= {*recorded(root/'nbs/results')}
    for name, kept in stored.items():
        assert re.fullmatch('[0-9a-f]{8,}', kept['commit']) and (kept['numbers'] or kept['ratios']), name
        assert judge_canary(kept, kept).startswith('same'), name


def test_a_canary_hears_numbers_and_not_times():
    r = random.Random(seed := random.randrange(10**6))
    print(f'SEED={seed}')
    fixed = [r.uniform(-9, 9) for _ in range(50)]
    def run(change=1., slow=1.):
        result = dict(losses=[change*v for v in fixed], minutes=r.random(), times=dict(deepseek_nb=[slow*.1, slow*.3], peer=[.2, .2]))
        return dict(numbers=numbers_of(result), ratios=ratios_of(result))
    kept = reference(run(), run())
    assert len(kept['numbers']) == 8 and all(p.startswith('/losses') for p in kept['numbers'])
    for change, slow, said in ((1, 1, 'same'), (1 + 1e-6, 1.5, 'same'), (1.01, 1, 'numbers differ'), (math.nan, 1, 'numbers differ'),
                               (1, 2.5, 'slower'), (1, .3, 'times differ')):
        assert judge_canary(run(change, slow), kept).startswith(said), (change, slow)


def test_a_canary_that_cannot_run_stops_no_other(tmp_path):
    for n in ('cache', 'decode'): (tmp_path/f'{n}.json').write_text('{}')
    (tmp_path/'evidence').mkdir()
    kept = dict(numbers={'/x': 1.}, ratios={}, commit='0123abcd', date='2026-12-01', cpu='another')
    (tmp_path/'evidence'/'canaries.json').write_text(json.dumps(dict(cache=kept, decode=kept)))
    def run(name):
        if name == 'cache': raise ValueError('No module named x')
        return dict(numbers={'/x': 1.}, ratios={})
    found = check_canaries((), tmp_path, say=str, run=run)
    assert found['cache'] == 'no canary: No module named x'
    assert found['decode'].startswith('same: 1 numbers') and 'another' in found['decode']
    with pytest.raises(ValueError, match='more than 0.01 seconds'): run_canary('dispatch', .01)

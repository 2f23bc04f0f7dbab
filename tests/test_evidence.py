"The form of experiments, and those on language: plans, records, interruptions, leaks"
import inspect
import json
import os
import pickle
import re
import shutil
import signal
import sys
import time
import traceback

import pytest
import torch
import warm

from deepseek_nb import studies
from deepseek_nb.core.lazy import find_chapter
from deepseek_nb.studies import carry_out, find_study, open_study, read_plan, read_records, run_folder, runs, spread, study, to_do
from deepseek_nb.studies.cases import share_seen
from deepseek_nb.train.mini import documents

sparse, balancing = open_study('sparse'), open_study('balancing')
PLAN = '''minutes = 1
seeds = [0, 1]
[settings]
n = 3
inner = {a = 1, b = 2}
[arms.one]
[arms.two]
inner = {b = 5}
[smoke]
n = 1
seeds = [7]
'''


@study('counting')
def counting(settings, seed, folder):
    (folder/'seen').write_text(f'{seed}')
    return dict(value=settings['n'] + seed, inner=settings['inner'])


@pytest.fixture
def plan(tmp_path):
    (tmp_path/'counting.toml').write_text(PLAN)
    return tmp_path/'counting.toml'


def test_arms_are_merged_over_settings(plan):
    assert read_plan(plan).arms == dict(one=dict(n=3, inner=dict(a=1, b=2)), two=dict(n=3, inner=dict(a=1, b=5)))
    tiny = read_plan(plan, smoke=True)
    assert tiny.seeds == (7,) and tiny.arms['two'] == dict(n=1, inner=dict(a=1, b=5))


@pytest.mark.parametrize('old,new,said', [
    ('minutes = 1', '', 'minutes, the budget of one run, is missing'),
    ('minutes = 1', 'minutes = 1\nseed = 3', "'seed' has no meaning here"),
    ('n = 1', 'm = 1', "changes 'm', which"),
    ('seeds = [0, 1]', '', 'a plan needs seeds'),
    ('[arms.one]\n[arms.two]\ninner = {b = 5}', '', 'a plan needs arms'),
    ('n = 3', 'n = ', 'is no TOML file')])
def test_a_bad_plan_is_named_in_one_line(plan, old, new, said):
    plan.write_text(PLAN.replace(old, new, 1))
    with pytest.raises(ValueError, match=said) as e: read_plan(plan, smoke=said.startswith("changes"))
    assert '\n' not in str(e.value)


def test_only_what_is_missing_runs(plan, tmp_path):
    p, out, said = read_plan(plan), tmp_path/'r'/'counting.json', []
    carry_out(p, out, tmp_path/'w', ['one:1'], said.append)
    assert [(r['arm'], r['seed']) for r in read_records(out)] == [('one', 1)] and len(said) == 1
    carry_out(p, out, tmp_path/'w', say=said.append)
    assert len(read_records(out)) == 4 and len(said) == 4 and to_do(p, read_records(out)) == []
    plan.write_text(PLAN.replace('n = 3', 'n = 4'))
    changed = read_plan(plan)
    assert len(to_do(changed, read_records(out))) == 4
    carry_out(changed, out, tmp_path/'w', ['two'], said.append)
    assert sorted(r['result']['value'] for r in read_records(out)) == [3, 4, 4, 5]  # the other arm's old records are still there
    assert run_folder(tmp_path, p, 'one', 0) != run_folder(tmp_path, changed, 'one', 0)
    assert {*read_records(out)[0]} == {'arm', 'seed', 'settings', 'result', 'minutes', 'commit', 'machine', 'date', 'provenance'}
    assert runs('counting', tmp_path/'r') == read_records(out) and runs('never', tmp_path) == []
    with pytest.raises(KeyError, match="no run 'three'"): to_do(p, [], ['three'])


def test_what_is_not_finite_is_not_read_records(plan, tmp_path):
    @study('counting')
    def broken(settings, seed, folder): return dict(curve=[[1, 2.], [2, float('nan')]])
    try:
        with pytest.raises(ValueError, match='counting, one, seed 0: not finite'): carry_out(read_plan(plan), tmp_path/'o.json', tmp_path)
    finally: study('counting')(counting)
    assert read_records(tmp_path/'o.json') == []


def test_time_of_interrupted_runs_is_counted(plan, tmp_path):
    calls = []
    @study('counting')
    def stops(settings, seed, folder):
        calls.append(time.sleep(.7))
        if len(calls) == 1: raise KeyboardInterrupt
        return dict(value=1)
    try:
        with pytest.raises(KeyboardInterrupt): carry_out(read_plan(plan), tmp_path/'o.json', tmp_path, ['one:0'])
        assert carry_out(read_plan(plan), tmp_path/'o.json', tmp_path, ['one:0'], lambda o: None)[0]['minutes'] >= .02
    finally: study('counting')(counting)


def test_spread():
    x = torch.randn(7, dtype=torch.float64)
    mean, sd, n = spread(x.tolist())
    assert (mean, sd, n) == (pytest.approx(x.mean().item()), pytest.approx(x.std().item()), 7)
    assert spread([4.]) == (4., 0., 1)
    with pytest.raises(ValueError, match='no numbers'): spread([])


def test_overlap_finds_what_was_planted():
    words = [f'w{i}' for i in range(400)]
    train = [' '.join(words[i:i+40]) for i in range(0, 400, 40)]
    test = [' '.join(['x', *words[60:60+n], 'y']) for n in (4, 7, 8, 12)]
    assert share_seen(train, test, 8) == .5 and share_seen(train, test, 7) == .75 and share_seen(train, ['new'], 8) == 0.


def test_no_document_twice():
    for name in ('shakespeare', 'sotu'):
        docs = documents(name, 2400)
        assert len(docs) == len({*docs}) == len(documents(name))
        some = documents(name, len(docs)//3)
        assert len({*some}) == len(docs)//3


@pytest.mark.parametrize('name', ['sparse', 'balancing'])
def test_smoke(name, root, tmp_path):
    plan = read_plan(root/f'nbs/configs/evidence/{name}.toml', smoke=True)
    found = carry_out(plan, tmp_path/f'{name}.json', tmp_path, say=lambda o: None)
    assert [r['arm'] for r in found] == [*plan.arms] and all(r['result']['seen'] == 0 for r in found)
    assert find_study(name) in (sparse.sparse, balancing.balancing)
    table = dict(sparse=sparse.table, balancing=balancing.tally)[name]
    assert all(a in table(found) for a in plan.arms) and 'not been run' in table([])
    said = dict(sparse=sparse, balancing=balancing)[name].finding(found)
    assert said.count('**') >= 2 and 'ot run yet' not in said and 'nan' not in said
    assert dict(sparse=sparse, balancing=balancing)[name].finding(found[:1]).startswith('Not run yet')


def test_a_finding_follows_its_runs():
    def run(arm, seed, **result): return dict(arm=arm, seed=seed, result=dict(flops=10., seconds=1., steps=7) | result)
    dense = [run('dense', s, test=4. + .1*s) for s in range(3)]
    def said(test, flops): return sparse.finding([*dense, run('moe9', 0, test=test, flops=flops)])
    assert '**reached**: with 50% the best mixture (`moe9`) has **4.100 nats' in said(4.1, 5.)
    assert '**the dense model 4.100 ± 0.100** (± over 3 seeds)' in said(4.1, 5.)
    assert '**missed**' in said(4.11, 5.) and '**missed**' in said(4., 6.)
    more = [run('narrow', 0, test=5., flops=5.5), run('dense-little', 0, test=6., flops=10.), run('moe64-little', 0, test=6.5, flops=5.)]
    whole = sparse.finding([*dense, run('moe9', 0, test=4.1, flops=5.), *more])
    assert whole.startswith(said(4.1, 5.)) and 'with 55% of the FLOPs loses only 0.900 nats' in whole
    rows = {l.split('|')[1].strip(): l for l in sparse.table([o | dict(result=o['result'] | dict(params=2e6)) for o in dense + more],
                                                            dict(narrow=dict(ratio=2.))).splitlines()}
    assert '| 55% | 0.50 | 5.000 ± 0.000 | +0.900 |' in rows['narrow'] and '| 6.500 ± 0.000 | +0.500 |' in rows['moe64-little']
    assert '| 100% |  | 6.000 ± 0.000 | +0.000 |' in rows['dense-little']
    loads = dict(none=6., bias=1.5, loss=1.25)
    rest = dict(test=4., topic=[.25, .75], entropy=.9, idle=0., token=[.1])
    made = [run(a, s, busiest=x + s, **rest) for a, x in loads.items() for s in range(2)]
    text = balancing.finding(made)
    assert all(f'**{x + .5:.2f} ± 0.71 times' in text for x in loads.values()) and 'After 7 steps' in text
    assert balancing.tally(made).count('| 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.000 |') == 1


def test_arms_differ(root, tmp_path):
    "What an arm changes is heard: no two of them end with the same numbers"
    plan = read_plan(root/'nbs/configs/evidence/balancing.toml', smoke=True)
    for s in plan.arms.values(): s |= dict(steps=6, gamma=50*s['gamma'])
    found = carry_out(plan, tmp_path/'x.json', tmp_path, say=lambda o: None)
    assert len({r['result']['test'] for r in found}) == len(plan.arms)


def test_a_killed_run_ends_with_the_same_numbers(root, tmp_path):
    "Of the mixture with the bias: kill -9 in the middle, then again from the start of the command"
    text = (root/'nbs/configs/evidence/balancing.toml').read_text().replace('steps = 2\nevery = 1', 'steps = 20\nevery = 5')
    text = text.replace('eval_steps = 1 }', 'eval_steps = 10, save_steps = 5 }')
    (tmp_path/'balancing.toml').write_text(text)
    plan = read_plan(tmp_path/'balancing.toml', smoke=True)
    assert plan.arms['bias']['steps'] == 20 and plan.arms['bias']['training']['save_steps'] == 5
    def start(work, out):
        code = f"from deepseek_nb.studies import run_study; run_study('balancing', {str(tmp_path/'balancing.toml')!r}, "
        code += f"{str(out)!r}, {str(work)!r}, ['bias'], True)"
        return warm.start('-c', code, modules=warm.TRAINING)
    def looks():  # `os.walk` passes over folders that are renamed meanwhile
        found = [tmp_path/at/'looks.txt' for at,_,names in os.walk(tmp_path/'war') if 'looks.txt' in names]
        return [n for o in found for n in o.read_text().splitlines()]
    p = start(tmp_path/'war', tmp_path/'war.json')
    while p.poll() is None and len(looks()) < 3: time.sleep(.01)
    assert p.poll() is None
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert start(tmp_path/'war', tmp_path/'war.json').wait() == start(tmp_path/'peace', tmp_path/'peace.json').wait() == 0
    war, peace = (json.loads((tmp_path/f'{n}.json').read_text())['runs'][0]['result'] for n in ('war', 'peace'))
    for r in (war, peace): del r['seconds']
    assert war == peace


def test_minutes_outlive_a_killed_process(tmp_path):
    code = "import os, pathlib, time\nfrom deepseek_nb.studies import stopwatch\n"
    code += f"with stopwatch(pathlib.Path({str(tmp_path/'m.json')!r}), .01): time.sleep(.6); os.kill(os.getpid(), 9)"
    for n in (1, 2):
        assert warm.run('-c', code).returncode == -signal.SIGKILL
        assert json.loads((tmp_path/'m.json').read_text())['minutes'] > .5*n/60
    with pytest.raises(ZeroDivisionError), studies.stopwatch(tmp_path/'m.json') as minutes: 1/0 # noqa: B018
    assert json.loads((tmp_path/'m.json').read_text())['minutes'] >= minutes() - 1e-3 > .9/60


def test_kinds_of_tokens():
    for text, kind in ((' Word', 'word'), ('x', 'continuation'), ('3', 'number'), ('...', 'mark'), ('  \n', 'space'), ('', 'space')):
        assert balancing.CLASSES[balancing.token_class(text)] == kind


def test_information_equals_that_of_scikit_learn():
    sk = pytest.importorskip('sklearn.metrics')
    table = torch.randint(1, 30, (4, 9))
    want = sk.mutual_info_score(None, None, contingency=table.numpy())/torch.log(torch.tensor(2., dtype=torch.float64)).item()
    assert balancing.shared_information(table) == pytest.approx(want, rel=1e-9)


def test_the_command(python, root, plan, tmp_path):
    assert 'medical' in python('-m', 'deepseek_nb.tools.cli', 'evidence').splitlines()
    done = warm.run('-m', 'deepseek_nb.tools.cli', 'evidence', 'sparse', '--config', plan)
    assert done.returncode == 2 and "is a plan of 'counting', not of 'sparse'" in done.stderr and done.stderr.count('\n') == 1


# ---- a study is a notebook

def test_a_study_is_a_module_of_its_marked_cells(python, root):
    assert sys.modules['deepseek_nb.studies.sparse'] is sparse is open_study('sparse')
    path = find_chapter(root/'nbs', 'studies.sparse')
    assert sparse.__file__ == str(path) and sparse.sparse is find_study('sparse') and '"#| study' in path.read_text()
    assert inspect.getsource(sparse.token_flops).startswith('def token_flops(')
    with pytest.raises(KeyError, match="no experiment 'tea'"): open_study('tea')
    with pytest.raises(ModuleNotFoundError): __import__('deepseek_nb.studies.tea')


def test_a_traceback_names_the_cell():
    try: sparse.token_flops(None, 3)
    except AttributeError as e: text = ''.join(traceback.format_exception(e))
    assert re.search(r'_studies.sparse.ipynb, cell \d+", line \d+, in token_flops\n    matrices = c.active_params', text)


def test_what_a_study_defines_is_found_in_another_process(tmp_path):
    batches = open_study('compute').ByLength([dict(tokens=[1, 2], label=3)], 8)
    assert pickle.loads(pickle.dumps(sparse.token_flops)) is sparse.token_flops
    code = 'import pickle, sys; print(pickle.load(sys.stdin.buffer).lengths.tolist())'
    (tmp_path/'pickled').write_bytes(pickle.dumps(batches))
    with open(tmp_path/'pickled', 'rb') as f: done = warm.run('-c', code, stdin=f)
    assert done.stdout.strip() == '[2]', done.stderr


def test_experiments_need_the_repository(root, tmp_path):
    shutil.copytree(root/'deepseek_nb', tmp_path/'deepseek_nb', ignore=shutil.ignore_patterns('__pycache__'))
    for args in ([], ['sparse', '--smoke']):
        done = warm.run('-m', 'deepseek_nb.tools.cli', 'evidence', *args, cwd=tmp_path, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
        assert done.returncode == 2 and 'clone the repository' in done.stderr and done.stderr.count('\n') == 1, done.stderr

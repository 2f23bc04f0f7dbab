"""Exercises: every planted wrong answer fails, every solution of the book passes, and progress is a small file that is never half written

The seed is printed; SEED=n repeats a run.
"""
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import WRONG

from deepseek_nb.core.lazy import chapter_paths
from deepseek_nb.exercises import WrongAnswer, check, course, difference, exercises, progress_file, solved
from deepseek_nb.tools.cli import main

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
NBS = Path(__file__).parents[1]/'nbs'
KNOWN = exercises()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    print(f'SEED={SEED}')
    monkeypatch.setenv('DEEPSEEK_NB_COURSE', str(tmp_path/'new'))
    return tmp_path/'new'


def solutions():
    "Name -> folded cell of the chapters with its solution"
    found = {}
    for path in chapter_paths(NBS):
        for cell in json.loads(path.read_text())['cells']:
            code = ''.join(cell['source'])
            m = re.search(r"^check\('([\w-]+)', (\w+), record=False\)", code, re.M)
            if m and code.startswith('#| code-fold'): found[m[1]] = (path.stem, code, m[2])
    return found


SOLUTIONS = solutions()


def test_each_exercise_has_a_chapter_a_solution_and_three_mistakes():
    assert len(KNOWN) >= 112 and KNOWN.keys() == SOLUTIONS.keys()
    for e in KNOWN.values():
        assert len(e.mistakes or WRONG[e.name]) == 3 and e.task.startswith('f('), e.name
        assert SOLUTIONS[e.name][0].split('_', 1)[1] == e.chapter


@pytest.mark.parametrize('name', KNOWN)
def test_wrong_answers_fail_and_the_solution_passes(name, monkeypatch):
    e = KNOWN[name]
    _, code, f = SOLUTIONS[name]
    space = dict(torch=torch, check=lambda *a, **k: None)
    exec(code, space)
    for answer in (space[f], e.reference): assert check(name, answer, 40, SEED, record=False) == f'{name}: right on 40 fresh inputs'
    for f in (*e.mistakes.values(), *WRONG.get(name, ())):
        with pytest.raises(WrongAnswer, match=rf'^{name}: .+ \(seed \d+\)$'): check(name, f, 40, SEED, record=False)
    for f in (lambda *a: None, lambda *a: 1/0, lambda *a: torch.full((3,), torch.nan), lambda *a: 'x'):
        with pytest.raises(WrongAnswer): check(name, f, 1, SEED, record=False)
    assert not solved()


@pytest.mark.parametrize('name', KNOWN)
def test_most_mistakes_are_named(name):
    "The message of a mistake is its own description on most inputs"
    e = KNOWN[name]
    said = {why: [e.judge(f, SEED + i) for i in range(40)] for why, f in e.mistakes.items()}
    assert sum(o == why for why, found in said.items() for o in found) >= sum(o is not None for found in said.values() for o in found)/2


def test_what_is_wrong():
    x = torch.randn(3, 5) + 3
    says = {None: x, 'wrong scale: it is 8 times': 8*x, 'axes in another order': x.T, 'wrong shape': x[:2], 'right is': x + torch.eye(3, 5),
            'off by one along axis 1': x.roll(1, 1), 'off by one along axis 0': x.roll(-1, 0), 'NaN': x*torch.nan,
            'does it end with `return`': None, 'returns a str': 'x'}
    for why, got in says.items():
        if why is None: assert difference(got, x) is None and difference(None, x)
        else: assert why in difference(got, x)
    assert difference((x, 2*x), (x, x)).startswith('result 1: wrong scale') and difference(x, (x, x)) == 'return 2 results'
    assert difference([1], [1]) is None and 'right is' in difference([2], [1]) and difference(x - torch.inf, x)


def test_leaks_and_changes_in_place():
    def leak(q, k, v): return torch.roll(KNOWN['attention'].reference(q, k, v), -1, 2)*2
    def change(x, w, eps): return x.div_((x.square().mean(-1, keepdim=True) + eps).sqrt()).mul_(w)
    with pytest.raises(WrongAnswer, match='causal leak'): check('attention', leak)
    with pytest.raises(WrongAnswer, match='changes its arguments in place'): check('rms-norm', change)
    state = torch.random.get_rng_state()
    check('temperature', lambda x, t: (x/t).softmax(-1), record=False)
    assert torch.equal(state, torch.random.get_rng_state())


def test_progress(folder, capsys):
    assert main(['course']) == 0 and capsys.readouterr().out.startswith(f'0 of {len(KNOWN)} exercises solved')
    for _ in range(2): check('temperature', lambda x, t: (x/t).softmax(-1))
    assert [*solved()] == ['temperature'] and [*folder.iterdir()] == [progress_file()]
    assert main(['course']) == 0
    out = capsys.readouterr().out
    assert out.startswith('1 of') and '[x] temperature ' in out and '[ ] top-p ' in out and out.strip() == course()
    progress_file().write_text('{"temperature"')
    assert main(['course']) == 2 and 'remove or repair' in capsys.readouterr().err
    with pytest.raises(ValueError, match="no exercise 'ropes'; there are rms-norm"): check('ropes', None)


def test_marks_of_several_processes_do_not_break_the_file(folder):
    code = 'import sys; from deepseek_nb.exercises import _note; [_note(f"{sys.argv[1]}-{i}") for i in range(40)]'
    running = [subprocess.Popen([sys.executable, '-c', code, str(i)]) for i in range(3)]
    while any(p.poll() is None for p in running): solved()
    assert all(p.returncode == 0 for p in running) and solved() and [*folder.iterdir()] == [progress_file()]

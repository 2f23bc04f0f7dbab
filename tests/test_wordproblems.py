"The study of word problems: parts that share no problem, a run that continues after a kill, and a headline that follows from stored runs"
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest

from deepseek_nb.studies import open_study, read_plan
from deepseek_nb.train.corpora import jaccard, shingle_set
from deepseek_nb.train.tasks import gsm8k_rows, worked_steps

study = open_study('wordproblems')


@pytest.fixture
def seed():
    n = random.randrange(2**31)
    print('seed', n)
    return n


def story(rng):
    words = ' '.join(rng.choices('ann bob has had more less pens cats red blue buys sells each costs of them a day week'.split(), k=25))
    return f'{words} {{a}} {words[:20]} {{b}}?'


@pytest.fixture
def settings(root, tmp_path, seed):
    rng = random.Random(seed)
    for split, n in (('train', 24), ('test', 4)):
        rows = []
        for _ in range(n):
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            rows.append(dict(question=story(rng).format(a=a, b=b), answer=f'<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}'))
        (tmp_path/f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    arms = read_plan(root/'nbs/configs/evidence/wordproblems.toml', smoke=True).arms
    return {k: s | dict(task=s['task'] | dict(folder=str(tmp_path))) for k, s in arms.items()}


def masked(row): return shingle_set(re.sub(r'\d+', '0', row['prompt']))


def test_near_duplicates_are_left_out(seed):
    "The same as comparing all pairs exactly; a story with other numbers is always found"
    rng = random.Random(seed)
    stories = [story(rng) for _ in range(40)]
    held = [dict(prompt=s.format(a=1, b=22)) for s in stories[:20]]
    rows = [dict(prompt=s.format(a=rng.randint(3, 99), b=7)) for s in stories[10:]]
    rows += [dict(prompt=s[:rng.randint(60, 150)]) for s in stories[:10]]
    kept = study.apart(rows, held, .7)
    assert not {r['prompt'] for r in rows[:10]} & {r['prompt'] for r in kept}
    exact = [r for r in rows if max(jaccard(masked(r), masked(h)) for h in held) < .7]
    assert kept == exact


def test_parts_of_gsm8k_share_no_problem(root, seed):
    if not (Path(os.environ.get('DEEPSEEK_NB_DATA', 'none'))/'gsm8k').is_dir(): pytest.skip('GSM8K is not at hand')
    arms = read_plan(root/'nbs/configs/evidence/wordproblems.toml').arms
    task, validation = study.easy_problems(arms['grpo'])
    held = [masked(r) for r in (*task.test, *validation)]
    some = random.Random(seed).sample(task.train, 100)
    assert max(jaccard(masked(r), h) for r in some for h in held) < arms['grpo']['near']
    known = {f"Question: {r['question'].strip()}\nAnswer:": r['answer'] for r in gsm8k_rows('train')}
    for row in some:
        _, steps, number = worked_steps(known[row['prompt']])
        assert steps <= 2 and number == row['answer']
    lines = study.lessons(task)
    assert len(lines) > .7*len(task.train)
    asked = {r['prompt']: r for r in task.train}
    assert {*study.right_of(task, [asked[r['prompt']] for r in lines], [r['completion'] for r in lines])} == {1}


def test_calculations_against_python(seed):
    rng = random.Random(seed)
    for _ in range(200):
        a, b, sign = rng.randint(1, 500), rng.randint(1, 500), rng.choice('+-*')
        value = eval(f'{a}{sign}{b}')
        assert study.is_right(f'{a}{sign}{b}={value}') and not study.is_right(f'{a}{sign}{b}={value + 1}')


def test_a_killed_run_continues(settings, tmp_path, monkeypatch):
    "After an interruption behind any step the results are those of an uninterrupted run; finished stages are read"
    settings['grpo']['grpo']['max_steps'] = 2
    whole, clock = study.wordproblems(settings['grpo'], 0, tmp_path/'a'/'run'), study.supervised.__globals__['ProcessorTime']
    after, count = clock.after_step, []
    def killed(self, t):
        after(self, t)
        count.append(t.step)
        if len(count) in (2, 6): raise KeyboardInterrupt
    monkeypatch.setattr(clock, 'after_step', killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt): study.wordproblems(settings['grpo'], 0, tmp_path/'b'/'run')
    again = study.wordproblems(settings['grpo'], 0, tmp_path/'b'/'run')
    assert {k: v for k, v in again.items() if k != 'seconds'} == {k: v for k, v in whole.items() if k != 'seconds'}
    monkeypatch.setattr(clock, 'after_step', lambda self, t: 1/0)
    assert study.wordproblems(settings['grpo'], 0, tmp_path/'b'/'run') == again


def test_the_headline_follows_from_stored_runs(root):
    path = root/'nbs/results/evidence/wordproblems.json'
    if not path.exists(): pytest.skip('the study has no records')
    records = json.loads(path.read_text())['runs']
    share = {a: np.mean([r['result']['hits'].count('1')/len(r['result']['hits']) for r in records if r['arm'] == a]) for a in study.NAMES}
    said = study.finding(records)
    for arm in study.NAMES: assert f'{100*share[arm]:.1f}' in said
    gain = 100*(share['grpo'] - share['start'])
    low, high = map(float, re.search(rf'\*\*{re.escape(f"{gain:+.1f}")} points \((\S+) to (\S+)\)\*\*', said).groups())
    assert low <= gain <= high
    word = 'reached' if low > 0 else 'refuted' if high < 0 else 'missed'
    assert f'**{word}**' in said
    for r in records: assert sum(r['result']['counts']) <= r['result']['attempts']*len(r['result']['hits'])
    for seed in {r['seed'] for r in records}: # the same processor time, as far as steps of a busy machine can be foreseen
        spent = {r['arm']: study.spent(r['result']) for r in records if r['seed'] == seed and r['arm'] in ('grpo', 'same')}
        assert max(spent.values()) < 1.5*min(spent.values()), spent

"The pipeline of R1: killed at random moments it ends with the same bits, and bad files are refused before anything is written"
import json
import os
import random
import signal
import time

import pytest
import warm

from deepseek_nb.train.grpo import CURVES
from deepseek_nb.train.r1 import PIPELINE_TASKS, r1_run

KILLS = int(os.environ.get('R1_KILLS', '1'))
FILE = '''
output_dir = "{folder}"
max_tokens = 6
[task]
name = "arithmetic"
digits = 1
train = 40
test = 10
[models.policy]
dim = 32
n_layers = 1
n_heads = 2
inter_dim = 64
[models.student]
dim = 16
n_layers = 1
n_heads = 2
inter_dim = 32
[[stage]]
kind = "sft"
name = "cold start"
n = 40
short = 1.0
training = {{max_steps = 60, learning_rate = 1e-2, save_steps = 20}}
[[stage]]
kind = "rl"
name = "reasoning"
training = {{max_steps = 2, save_steps = 1, learning_rate = 1e-3, num_generations = 4, max_completion_length = 6, beta = 0.01}}
lora = {{r = 2, target_modules = "all-linear"}}
[[stage]]
kind = "collect"
name = "right"
problems = 40
portion = 20
max_tokens = 6
[[stage]]
kind = "sft"
name = "smaller"
model = "student"
rows = "right"
training = {{max_steps = 4, learning_rate = 1e-2}}
lora = {{r = 2, target_modules = ["q_proj"]}}
'''


def weights(folder): return {n: (folder/n/'model.safetensors').read_bytes() for n in ('policy', 'student')}


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    whole,killed = tmp_path/'whole.toml',tmp_path/'killed.toml'
    for path in (whole, killed): path.write_text(FILE.format(folder=tmp_path/path.stem))
    begin = time.perf_counter()
    report = r1_run(whole)
    seconds,seed = time.perf_counter() - begin,random.randrange(2**31)
    print('seed', seed)
    rng = random.Random(seed)
    for _ in range(KILLS):
        p = warm.start('-c', f'from deepseek_nb.train.r1 import r1_run; r1_run({str(killed)!r})', modules=warm.TRAINING)
        until = time.monotonic() + 60
        while not (tmp_path/'killed').exists() and p.poll() is None and time.monotonic() < until: time.sleep(.05)
        time.sleep(rng.uniform(0, seconds))
        p.send_signal(signal.SIGKILL), p.wait()
    assert r1_run(killed).rows == report.rows
    assert weights(tmp_path/'killed') == weights(tmp_path/'whole')
    curves, again = (json.loads((tmp_path/n/'2-reasoning'/'curves.json').read_text()) for n in ('whole', 'killed'))
    for a, b in zip(curves, again, strict=True): assert a | dict(seconds=0) == b | dict(seconds=0)
    assert {*CURVES} - {'clipped', 'redrawn'} | {'clip_low', 'clip_high'} <= {*curves[0]}
    samples = sorted((tmp_path/'killed'/'2-reasoning'/'steps'/'samples').iterdir())
    assert len(samples) == 2 and {*json.loads(samples[-1].read_text())[0]} == {'prompt', 'completion', 'reward', 'advantage'}


@pytest.mark.parametrize('old,new,words', [
    ('"rl"', '"ppo"', 'kind: ppo is not known'), ('rows = "right"', 'rows = "wrong"', 'rows: wrong is not known'),
    ('model = "student"', 'model = "pupil"', 'model: pupil is not known'), ('num_generations = 4', 'num_generations = 3', 'no multiple'),
    ('r = 2, target_modules = "all-linear"', 'rank = 2', 'lora: rank is not known'), ('["q_proj"]', '["q"]', "'q' matches no weight"),
    ('name = "right"', 'name = "cold start"', 'two stages have the same name'), ('digits = 1', 'digit = 1', 'digit is not known')])
def test_a_bad_file_is_refused_before_anything_is_written(old, new, words, tmp_path):
    path = tmp_path/'a.toml'
    path.write_text(FILE.format(folder=tmp_path/'out').replace(old, new))
    with pytest.raises(ValueError, match=words): r1_run(path)
    assert not (tmp_path/'out').exists()


TASKS = dict(arithmetic='digits = 1', countdown='count = 2', formatting='fields = 1', tool_calling='', word_problems='folder = "{folder}"')

@pytest.mark.parametrize('name', PIPELINE_TASKS)
def test_every_task_in_a_pipeline(name, tmp_path):
    "A new model, whose characters are those of the task, takes a step of each kind"
    for split, first in (('train', 2), ('test', 50)):
        rows = [dict(question=f'Ann has {i} pens and gets {i}. How many?', answer=f'{i}+{i}=<<{i}+{i}={2*i}>>{2*i}\n#### {2*i}')
                for i in range(first, first + 40)]
        (tmp_path/f'{split}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    sizes = '' if name == 'word_problems' else 'train = 20\ntest = 4'
    path = tmp_path/'a.toml'
    path.write_text(f'''
output_dir = "{tmp_path}/out"
max_tokens = 3
task = {{name = "{name}", SETTINGS}}
[models.policy]
dim = 16
n_layers = 1
n_heads = 2
inter_dim = 16
[[stage]]
kind = "sft"
name = "start"
n = 20
training = {{max_steps = 1}}
[[stage]]
kind = "rl"
name = "reward"
training = {{max_steps = 1, num_generations = 4, max_completion_length = 3}}
'''.replace('SETTINGS', ', '.join(filter(None, [TASKS[name].format(folder=tmp_path), *sizes.split(chr(10))]))))
    report = r1_run(path).rows
    assert [r['kind'] for r in report] == ['sft', 'rl'] and report[0]['rows'] == 20 and report[1]['held']['n'] >= 4

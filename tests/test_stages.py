"""Stages: killed anywhere, resumed, and bit-equal to a run in peace

Moments and settings are random; the seed is printed, SEED=n repeats a run.
"""
import json
import math
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import warm

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.train import resume as resuming
from deepseek_nb.train.callbacks import Callback
from deepseek_nb.train.data import example
from deepseek_nb.train.distill_stages import Stage, distil_in_stages, learners, stage_arguments, stage_trainer, text_losses, write_logits
from deepseek_nb.train.loss import language_loss
from deepseek_nb.train.resume import checkpoints

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
SMALL = dict(vocab_size=32, n_heads=4, n_kv_heads=2, head_dim=8, max_positions=64)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_stages SEED={SEED}')


@pytest.fixture
def r(request): return random.Random(f'{SEED} {request.node.name}')


def llama(layers=2, dim=32, seed=0):
    torch.manual_seed(seed)
    return Model(Config('llama', n_layers=layers, dim=dim, inter_dim=48, **SMALL), dtype='float32', device='cpu').init_weights(.1)


def count(rows, s=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    first, stride = torch.randint(32, (rows, 1), generator=g), torch.randint(1, 6, (rows, 1), generator=g)
    return [example(t) for t in ((first + stride*torch.arange(s))%32).tolist()]


def everything(folder, seed=0):
    "Stages of every kind: through an assistant, matched inside, on own text, from stored answers, on the text alone; and the student"
    teacher, assistant, data = llama(3, 48, 5).requires_grad_(False), llama(2, 40, seed), count(24)
    kept = write_logits(teacher, data, folder, k=6)
    how = dict(steps=5, batch_size=6)
    return llama(2, 32, seed), [
        Stage('assistant', data, teacher, learns=assistant, hidden=.5, attention=.2, **how),
        Stage('through it', data, assistant, temperature=2., mix=.3, **how),
        Stage('own text', data, teacher, kind='js', own=.6, max_new_tokens=4, prompt_length=2,
              settings=dict(gradient_accumulation_steps=2), **how),
        Stage('stored', data, kept, kind='skew', **how),
        Stage('text', count(24, seed=3), settings=dict(optim='muon'), **how)]


def weights(models): return [t.detach().clone() for m in models for t in m.state_dict().values()]
def losses(report): return [[row['loss'] for row in h] for h in report.histories]


class Slowly(Callback):
    "Gives the parent time to kill; a stage that is to be killed waits for it before its end"
    def __init__(self, stage=''): self.stage = stage

    def before_update(self, t):
        last = self.stage and t.step >= 4 and Path(t.args.output_dir).name.startswith(self.stage)
        time.sleep(60 if last else .04)


SCRIPT = '''
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_stages import Slowly, count, distil_in_stages, everything
folder = Path(sys.argv[1])
student, stages = everything(folder/'answers', seed=int(sys.argv[2]))
slowly = Slowly(sys.argv[3])
distil_in_stages(student, stages, folder/'run', dict(new=count(6, seed=9)), every=3, save_steps=2, resume=True, callbacks=[slowly])
print('done')
'''


def test_killed_in_any_stage(tmp_path, r):
    "kill -9 once in each stage, at a random moment; every run begins with other weights, and the last ends with the same bits"
    torch.set_num_threads(1)
    (tmp_path/'peace').mkdir(); (tmp_path/'war').mkdir()
    code, run = SCRIPT.format(tests=os.path.dirname(__file__)), tmp_path/'war'/'run'
    def start(n, stage=''): return warm.start('-c', code, tmp_path/'war', n, stage, modules=warm.TRAINING)
    for n in range(5):
        p = start(n, f'{n+1}-')
        while p.poll() is None and not list(run.glob(f'{n+1}-*')): time.sleep(.005)
        time.sleep(r.uniform(0, .25))
        assert p.poll() is None, 'the run ended before it could be killed'
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert start(0).wait() == 0
    texts = dict(new=count(6, seed=9))
    student, stages = everything(tmp_path/'peace'/'answers')
    models, peace = learners(student, stages), distil_in_stages(student, stages, tmp_path/'peace'/'run', texts, 3, 2)
    other, stages = everything(tmp_path/'war'/'answers', seed=8)
    war = distil_in_stages(other, stages, run, texts, every=3, save_steps=2, resume=True)
    assert losses(war) == losses(peace)
    assert all((a == b).all() for a, b in zip(weights(learners(other, stages)), weights(models), strict=True))
    assert [x['texts'] for x in war.rows] == [x['texts'] for x in peace.rows] and war.before == peace.before
    assert not [q for q in run.rglob('.*')]


def test_a_finished_run_is_read_back(tmp_path):
    student, stages = everything(tmp_path/'answers')
    report = distil_in_stages(student, stages, tmp_path/'run', dict(new=count(6, seed=9)))
    other, again = everything(tmp_path/'answers', seed=4)
    read = distil_in_stages(other, again, tmp_path/'run', dict(new=count(6, seed=9)), resume=True)
    assert read == report
    for a, b in zip(learners(student, stages), learners(other, again), strict=True):
        assert all((p == q).all() for p, q in zip(weights([a]), weights([b]), strict=True))
    assert json.loads((tmp_path/'run'/'report.json').read_text())['rows'][1]['stage'] == 'through it'
    last = Model.from_pretrained(checkpoints(tmp_path/'run'/'5-text')[-1], dtype='float32', device='cpu')
    assert all((p == q).all() for p, q in zip(last.parameters(), student.parameters(), strict=True))
    table = report._repr_markdown_().splitlines()
    assert len(table) == 2 + 1 + 5 and all(line.count('|') == table[0].count('|') for line in table)
    assert '3×48 → 2×40' in table[3] and 'stored, 6 tokens → 2×32' in table[6] and 'text → 2×32' in table[7]
    assert f'{math.exp(text_losses(student, dict(new=count(6, seed=9)))["new"]):.2f}' in table[7]
    figure = report.plot()
    assert [len(line.get_xdata()) for line in figure.axes[0].lines][:5] == [1, 2, 2, 2, 2]  # the assistant's only point, then the student's
    plt.close(figure)


def test_projectors_resume(tmp_path):
    data, texts = count(24), dict(new=count(6, seed=9))
    stage = Stage('inside', data, llama(3, 48, 5).requires_grad_(False), hidden=1., steps=6, batch_size=6)

    class Stop(Callback):
        def before_update(self, t):
            if t.step == 4: raise KeyboardInterrupt

    def trainer(out, *more): return stage_trainer(stage, llama(), stage_arguments(stage, out, 2), texts, callbacks=more)
    straight = trainer(None)
    straight.train()
    with pytest.raises(KeyboardInterrupt): trainer(tmp_path/'a', Stop()).train()
    torch.manual_seed(99)
    again = trainer(tmp_path/'a')
    for p in again.compute_loss.parameters(): p.data.normal_()
    again.train(resume_from_checkpoint=True)
    for a, b in zip(straight.compute_loss.parameters(), again.compute_loss.parameters(), strict=True): assert (a == b).all()
    for a, b in zip(straight.model.parameters(), again.model.parameters(), strict=True): assert (a == b).all()


def test_full_disk_keeps_what_is_there(tmp_path, monkeypatch):
    student, stages = everything(tmp_path/'answers')
    stages, write = stages[1:2], resuming.write_tensors

    def full(path, tensors):
        if 'checkpoint-4' in str(path): raise OSError(28, 'No space left on device')
        write(path, tensors)
    monkeypatch.setattr(resuming, 'write_tensors', full)
    with pytest.raises(ValueError, match='checkpoint-4: not written .No space left on device'):
        distil_in_stages(student, stages, tmp_path/'run', save_steps=2)
    assert [p.name for p in checkpoints(tmp_path/'run'/'1-through-it')] == ['checkpoint-2']
    monkeypatch.undo()
    report = distil_in_stages(student, stages, tmp_path/'run', save_steps=2, resume=True)
    fresh, stages = everything(tmp_path/'answers')
    assert losses(report) == losses(distil_in_stages(fresh, stages[1:2], tmp_path/'other'))


@pytest.mark.parametrize('change,why', [
    (dict(temperature=3.), 'stage 2 was started with temperature 2.0, but this list has 3.0'),
    (dict(steps=6), 'stage 2 was started with steps 5'),
    (dict(data=count(25)), 'stage 2 was started with data'), (dict(teacher=llama(3, 48, 6)), 'stage 2 was started with teacher'),
    (dict(learns=llama(2, 32, 1)), 'the run in this folder trains other models'),
    (dict(name='else'), "stage 2 was started with name 'through it'")])
def test_another_run_is_refused(change, why, tmp_path):
    student, stages = everything(tmp_path/'answers')
    stages = stages[:2]
    distil_in_stages(student, stages, tmp_path/'run')
    with pytest.raises(ValueError, match='contains a distillation run; use resume=True'): distil_in_stages(student, stages, tmp_path/'run')
    stages = [stages[0], replace(stages[1], **change)]
    with pytest.raises(ValueError, match=why): distil_in_stages(student, stages, tmp_path/'run', resume=True)


@pytest.mark.parametrize('bad,why', [
    (dict(kind='kl'), "kind 'kl' is not known"), (dict(temperature=0.), 'temperature is 0.0'),
    (dict(schedule='steep'), "lr_scheduler_type 'steep'"),
    (dict(teacher=None, own=.5), "stage 'one': matching hidden states and generating text need"), (dict(data=[]), 'the data set is empty'),
    (dict(hidden=1., settings=dict(optim='muon')), 'projectors are trained by AdamW')])
def test_bad_stages(bad, why, tmp_path):
    stage = replace(Stage('one', count(12), llama(3, 48, 5).requires_grad_(False), steps=2), **bad)
    with pytest.raises(ValueError, match=why): distil_in_stages(llama(), [stage], tmp_path/'run')


def test_other_vocabulary_is_refused(tmp_path):
    torch.manual_seed(0)
    other = Model(Config('llama', n_layers=2, dim=32, inter_dim=48, **SMALL | dict(vocab_size=40)), dtype='float32', device='cpu')
    with pytest.raises(ValueError, match="the teacher has 40 tokens, the student 32; their distributions can't be compared"):
        distil_in_stages(llama(), [Stage('one', count(12), other.requires_grad_(False), steps=2)], tmp_path/'run')


def test_texts_are_measured_as_a_mean_over_tokens():
    model, rows = llama(), [example(e['tokens'][:n]) for e, n in zip(count(40), [3, 12]*20, strict=True)]
    batch = [language_loss(model, {k: torch.tensor([v]) for k, v in e.items()}) for e in rows]
    expected = sum(t.item() for t, _ in batch)/sum(n for _, n in batch)
    assert abs(text_losses(model, dict(a=rows))['a'] - expected) < 1e-5

"""`torchrun --max-restarts` against a run that nothing stops: one of two ranks is killed from outside at a drawn step and some milliseconds
later, all ranks are started again, and continue from the last checkpoint and with the next row of their parts of a stream. One kill;
KILLS=10 draws ten. SEED=n repeats a run
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from test_parallel import ROWS, arguments

from deepseek_nb.train.callbacks import Callback
from deepseek_nb.train.parallel import WAYS, Parallel, small_model
from deepseek_nb.train.resume import checkpoints
from deepseek_nb.train.trainer import Trainer
from deepseek_nb.train.world import setup

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
KILLS = int(os.environ.get('KILLS') or 1)
STEPS = 8 + 4*KILLS


class Killed(Callback):
    "Has this process killed from outside, at a drawn step of each start but the last"
    order = 95  # behind the callback that resumes
    def before_fit(self, t):
        start = int(os.environ['TORCHELASTIC_RESTART_COUNT'])
        draw = random.Random(f'{SEED} {start}')
        victim, self.at, self.delay = draw.randrange(2), min(t.step + draw.randrange(6), STEPS - 3), draw.random()*.03
        if start >= KILLS or setup().rank != victim: self.at = None

    def before_step(self, t):
        if t.step == self.at: subprocess.Popen(['sh', '-c', f'sleep {self.delay}; kill -KILL {os.getpid()}'])


class Rows(Callback):
    "Writes down which rows this process computes: of a step that is repeated, the last"
    def __init__(self, folder): self.path = Path(folder)/f'rows-{setup().rank}'

    def after_loss(self, t):
        with self.path.open('a') as f: f.write(json.dumps([t.step, t.batch['tokens'][:, 0].tolist()]) + '\n')


def run(folder, how, shards, kill):
    "What each start does: the same call for the first and for those that continue"
    setup()
    out = Path(folder)
    settings = arguments(output_dir=out/'run', max_steps=STEPS, save_steps=2, save_total_limit=2)
    rows = Dataset.from_list([r | dict(tokens=[i, *r['tokens'][1:]]) for i, r in enumerate(ROWS)]).to_iterable_dataset(shards)
    rows = split_dataset_by_node(rows, *setup())
    t = Trainer(small_model(), settings, rows, callbacks=[Parallel(how), Rows(out), *[Killed()]*kill])
    history = t.train(resume_from_checkpoint=bool(checkpoints(out/'run')))
    if setup().rank: return
    torch.save(t.model.state_dict(), out/'model.pt')
    rows = [{k: v for k, v in row.items() if k != 'seconds'} for row in history]
    (out/'done.json').write_text(json.dumps([rows, int(os.environ['TORCHELASTIC_RESTART_COUNT'])]))


def started(folder, how, shards, kill):
    "Losses, number of restarts, weights and the rows of each rank of a run under `torchrun`"
    folder.mkdir()
    (program := folder/'program.py').write_text(
        f'import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_restarts as t\n'
        f't.run({str(folder)!r}, {how!r}, {shards}, {kill})\n')
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node=2', f'--max-restarts={KILLS}', program]
    p = subprocess.run(command, capture_output=True, text=True, timeout=900,
                       env=os.environ | dict(OMP_NUM_THREADS='1', SEED=str(SEED), KILLS=str(KILLS)))
    assert p.returncode == 0, (SEED, p.stderr)
    rows = [[*dict(map(json.loads, (folder/f'rows-{rank}').read_text().splitlines())).values()] for rank in (0, 1)]
    return *json.loads((folder/'done.json').read_text()), torch.load(folder/'model.pt'), rows


@pytest.mark.skipif(sys.platform != 'linux', reason='a kill by `sh`')
def test_killed_ranks_arrive_at_the_same_bits(tmp_path):
    draw = random.Random(SEED)
    case = draw.choice(WAYS), draw.choice((1, 2, 3, 4))
    want, none, weights, rows = started(tmp_path/'whole', *case, False)
    got, restarts, model, again = started(tmp_path/'killed', *case, True)
    assert (none, restarts) == (0, KILLS), (SEED, case)
    assert got == want and len(got) == STEPS, (SEED, case)
    for k, w in weights.items(): assert w.equal(model[k]), (SEED, case, k)
    assert again == rows, (SEED, case)
    epoch = [sum(r[:6], []) for r in rows]  # of a stream in 1 to 4 parts of 22 rows, with 2 rows a batch
    assert sorted(epoch[0] + epoch[1]) == [*range(22)], (SEED, case, epoch)
    assert len(checkpoints(tmp_path/'killed'/'run')) == 2 and not [*(tmp_path/'killed'/'run').glob('.*')]

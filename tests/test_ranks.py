"""Adapters, distillation and GRPO in two Gloo processes: losses, gradient norms and weights equal those of one process within rounding"""
import json
import os
import socket
from pathlib import Path

import pytest
import torch
import warm
from test_grpo import DENSE, ROWS, TOK
from test_parallel import ROWS as TOKENS
from test_parallel import arguments, error, small_model

from deepseek_nb.arch.model import Model
from deepseek_nb.train.distill import distillation_loss
from deepseek_nb.train.grpo import GRPOConfig, GRPOTrainer
from deepseek_nb.train.lora import LoraConfig
from deepseek_nb.train.parallel import Parallel
from deepseek_nb.train.trainer import Trainer
from deepseek_nb.train.world import setup, world

WAYS = {'lora': ('data', 'shard', 'expert'), 'lora experts': ('data', 'shard'), 'distillation': ('data', 'shard', 'expert'),
        'grpo': ('data',), 'grpo group': ('data',), 'grpo lora': ('data',)}


def remainder(prompts, completions, completion_ids, **columns):
    "A reward that differs between random answers"
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer(what, how):
    "The same trainer for one process with batches of four rows, and for two with two each"
    each, callbacks = 4//setup().size, [Parallel(how)]
    if what.startswith('grpo'):
        torch.manual_seed(0)
        model = Model(DENSE, dtype='float32', device='cpu').init_weights(.3)
        args = GRPOConfig(max_steps=4, per_device_train_batch_size=each, num_generations=2, max_completion_length=5, learning_rate=1e-3,
                          adam_epsilon=1e-4, steps_per_generation=2, beta=.1, disable_tqdm=True,
                          loss_type='grpo' if what == 'grpo group' else 'dapo', reward_timeout=None)
        adapter = LoraConfig(r=2, target_modules=['q_proj', 'o_proj']) if what == 'grpo lora' else None
        return GRPOTrainer(model, remainder, args, ROWS, processing_class=TOK, callbacks=callbacks, peft_config=adapter)
    model, args = small_model(), arguments(per_device_train_batch_size=each)
    if what == 'distillation':
        torch.manual_seed(1)
        return Trainer(model, args, TOKENS, loss=distillation_loss(small_model().init_weights(.2), mix=.3), callbacks=callbacks)
    experts = ['experts.gate_up_proj', 'experts.down_proj'] if what == 'lora experts' else None
    torch.manual_seed(0)
    adapter = LoraConfig(r=2, target_modules=['q_proj', 'o_proj'], target_parameters=experts)
    return Trainer(model, args, TOKENS, lora_config=adapter, callbacks=callbacks)


def trained(what, how):
    t = trainer(what, how)
    history = [[row['loss'], row['grad_norm']] for row in t.train()]
    return history, {n: p.detach() for n, p in t.model.named_parameters() if p.requires_grad}


def two(folder):
    setup()
    for what, ways in WAYS.items():
        for how in ways:
            found = trained(what, how)
            if world().rank == 0: torch.save(found, Path(folder)/f'{what}-{how}.pt')
    refused = error(lambda: trained('grpo', 'shard'))
    if world().rank == 0: Path(folder, 'refused.json').write_text(json.dumps(refused))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks')
    code = f'import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_ranks as t\nt.two({str(out)!r})\n'
    with socket.create_server(('localhost', 0)) as s: port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR='localhost', MASTER_PORT=str(port), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2')
    ranks = [warm.start('-c', code, env=env | dict(RANK=i, LOCAL_RANK=i), modules=warm.TRAINING) for i in '01']
    said = [p.communicate(timeout=200)[1] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0], said
    return out


@pytest.mark.parametrize('what,how', [(what, how) for what, ways in WAYS.items() for how in ways])
def test_two_processes_equal_one(folder, what, how):
    history, weights = torch.load(folder/f'{what}-{how}.pt')
    want, alone = trained(what, how)
    assert history == [pytest.approx(row, abs=2e-5, rel=1e-4) for row in want]
    assert weights.keys() == alone.keys()
    for k, w in alone.items(): torch.testing.assert_close(weights[k], w, rtol=0, atol=2e-5)


def test_a_sharded_policy_cannot_sample(folder):
    assert json.loads((folder/'refused.json').read_text()).endswith("so no rank can sample; use Parallel('data')")

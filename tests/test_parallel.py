"""Several Gloo processes against one: copies, pieces and experts apart, with either optimiser, frozen weights, uneven loads, ragged batches

Each program below runs once, in two or three processes that the fixtures start; the tests look at what process 0 wrote down.
Fresh random inputs where a seed is used; it is printed, SEED=n repeats a run.
"""
import copy
import inspect
import json
import os
import random
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import warm

from deepseek_nb import Model
from deepseek_nb.arch.moe import run_experts
from deepseek_nb.core.config import Config
from deepseek_nb.train import parallel, trainer
from deepseek_nb.train.loss import IGNORE, language_loss
from deepseek_nb.train.optim import Muon, muon_groups
from deepseek_nb.train.parallel import (
    SMALL,
    WAYS,
    Parallel,
    ParallelExperts,
    _small_batch,
    rehearse,
    run_parallel_experts,
    shard,
    share_experts,
    skeleton,
    small_model,
    whole_state,
)
from deepseek_nb.train.trainer import Trainer, TrainingArguments
from deepseek_nb.train.world import World, is_share, launch_processes, own_rows, reduce_total, setup, sum_over, total_norm, whole, world

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
TIED = Config('llama', vocab_size=64, dim=32, n_layers=2, n_heads=4, inter_dim=48, max_positions=64, n_kv_heads=2, head_dim=8,
              tie_embeddings=True)
CLIPS = 'get_total_norm' not in inspect.getsource(trainer.scale_gradients)  # whether the trainer's clipping knows of shares


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_parallel SEED={SEED}')


# ---- what the processes do

def muon(model): return Muon(muon_groups(model), lr=.01)


def tied(): torch.manual_seed(0); return Model(TIED, dtype='float32', device='cpu').init_weights(.1)


def starved():
    "All tokens visit experts 0 and 1, so that process 1 of two gets no row"
    model = small_model()
    model.layers[1].mlp.gate.e_score_correction_bias.copy_(torch.tensor([9., 9., -9., -9.]))
    return model


def frozen():
    model = small_model()
    for name, p in model.named_parameters(): p.requires_grad_('kv_b_proj' in name or 'norm' in name)
    return model


def error(f):
    try: f()
    except ValueError as e: return str(e)


def differences(shared, alone):
    pairs = list(zip(shared.parameters(), alone.parameters(), strict=True))
    return dict(weight=max((whole(p) - q).abs().max().item() for p, q in pairs),
                gradient=max((whole(p.grad) - q.grad).abs().max().item() for p, q in pairs if q.grad is not None))


def accumulated(how):
    "Two batches a step, one of them with a single row"
    alone, shared = small_model(), small_model()
    loss = shard(shared, how)
    for i, rows in enumerate((5, 1)):
        language_loss(alone, _small_batch(i, rows))[0].backward()
        loss(shared, own_rows(_small_batch(i, rows)))[0].backward()
    for p in shared.parameters(): p.grad.mul_(world().size)
    return differences(shared, alone)


def collected(how):
    alone, shared = small_model(), small_model()
    shard(shared, how)(shared, own_rows(_small_batch(0)))
    state, want = whole_state(shared), alone.state_dict()
    if world().rank: return len(state)
    return [list(state) == list(want), all(torch.equal(state[k], t) for k, t in want.items())]


def exchanged(trial):
    "The exchange alone, in float64, with any number of tokens anywhere"
    here, r = world(), random.Random(f'{SEED} {trial}')
    torch.manual_seed(r.randrange(10**9))
    e, k, d, f = here.size*r.randrange(1, 4), r.randrange(1, 3), 5, 4
    k = min(k, e)
    sizes = [r.choice((0, 1, 7)) for _ in range(here.size)]
    x = torch.randn(sum(sizes), d, dtype=torch.float64).split(sizes)
    weights, scores = (torch.rand(sum(sizes), n, dtype=torch.float64).split(sizes) for n in (k, e))
    scores = [s.index_fill(1, torch.tensor([r.randrange(e)]), -1.) for s in scores]
    experts = [s.topk(k).indices for s in scores]
    gate_up, down = (torch.randn(e, *shape, dtype=torch.float64).requires_grad_() for shape in ((2*f, d), (d, f)))
    alone = [(a.clone().requires_grad_(), b.clone().requires_grad_()) for a, b in zip(x, weights, strict=True)]
    want = [run_experts(a, b, c, gate_up, down) for (a, b), c in zip(alone, experts, strict=True)]
    sum(y.square().sum() for y in want).backward()
    mine = x[here.rank].clone().requires_grad_(), weights[here.rank].clone().requires_grad_()
    own = [w.detach().chunk(here.size)[here.rank].clone().requires_grad_() for w in (gate_up, down)]
    got = run_parallel_experts(*mine, experts[here.rank], *own, dist.group.WORLD)
    got.square().sum().backward()
    pairs = [(got, want[here.rank]), *((a.grad, b.grad) for a, b in zip(mine, alone[here.rank], strict=True)),
             *((a.grad, b.grad.chunk(here.size)[here.rank]) for a, b in zip(own, (gate_up, down), strict=True))]
    worst = torch.tensor(max((a - b).abs().max().item() if b.numel() else 0. for a, b in pairs))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


ROWS = [{name: [(i*7 + (j + at)**2) % 64 for j in range(9 + i % 4)] for name, at in (('tokens', 0), ('labels', 1))} for i in range(22)]
RUNS = dict(plain=dict(max_grad_norm=0.), clipped=dict(max_grad_norm=.01), again=dict(gradient_checkpointing=True, max_grad_norm=0.),
            parts=dict(gradient_accumulation_steps=2, max_grad_norm=0.))


def arguments(**kwargs):
    "An epsilon far above rounding, which a step would make as large as any gradient"
    own = dict(max_steps=4, per_device_train_batch_size=2, learning_rate=.01, adam_epsilon=1e-4, disable_tqdm=True)
    return TrainingArguments(**own | kwargs)


def trained(how, folder=None, resume=False, ranks=None, **kwargs):
    t = Trainer(small_model(), arguments(output_dir=folder, **kwargs), ROWS, ROWS[:3], callbacks=[Parallel(how, ranks)])
    history = t.train(resume_from_checkpoint=resume)
    return t, [[row[k] for k in ('loss', 'learning_rate', 'tokens')] for row in history] + [history[-1].get('eval_loss')]


SAVING = dict(max_steps=6, save_steps=3, optim='muon')


def resumed(folder, how, other, **kwargs):
    "A run of six steps, and one of this or another kind that starts again from its third: largest differences on rank 0"
    whole_run, history = trained(how, folder/'whole', **SAVING | kwargs)
    if world().rank == 0: (folder/'again').mkdir(parents=True); (folder/'whole'/'checkpoint-3').rename(folder/'again'/'checkpoint-3')
    dist.barrier()
    again, history2 = trained(other, folder/'again', True, **SAVING | kwargs)
    if world().rank: return
    weight = max((p - q).abs().max().item() for p, q in zip(whole_run.model.parameters(), again.model.parameters(), strict=True))
    losses = max(abs(a - b) for x, y in zip(history[:6], history2[:6], strict=True) for a, b in zip(x, y, strict=True))
    return dict(weight=weight, history=losses, written=sorted(p.name for p in (folder/'again').iterdir()))


def two(folder):
    "All that is asked of two processes"
    setup()
    out, folder = {}, Path(folder)
    for how in WAYS:
        out[how] = rehearse(how)
        out[f'{how} muon'] = rehearse(how, muon)
        out[f'{how} starved'] = rehearse(how, steps=3, build=starved)
        out[f'{how} frozen'] = rehearse(how, steps=3, build=frozen)
        out[f'{how} accumulated'] = accumulated(how)
        out[f'{how} collected'] = collected(how)
        for other in (how, WAYS[WAYS.index(how) - 1]): out[f'{how} {other} resumed'] = resumed(folder/f'{how}-{other}', how, other)
        out[f'{how} {other} adamw'] = resumed(folder/f'{how}-{other}-adamw', how, other, optim='adamw')
        if how in ('data', 'shard'): out[f'{how} tied'] = rehearse(how, steps=3, build=tied)
        for name, kwargs in RUNS.items():
            t, history = trained(how, folder/how if name == 'plain' else None, **kwargs)
            out[f'{how} trainer {name}'] = history
            if name == 'plain' and world().rank == 0: out[f'{how} kind'] = [type(p).__name__ for p in t.model.parameters()]
            if name in ('plain', 'clipped') and world().rank == 0: torch.save(t.model.state_dict(), folder/f'{how}-{name}.pt')
    out['exchanged'] = [exchanged(i) for i in range(25)]
    fewer, history = trained('shard', folder/'four', True, **SAVING)
    out['four'] = history[:6]
    if world().rank == 0: torch.save(fewer.model.state_dict(), folder/'four.pt')
    out['refused'] = [error(lambda: trained('shard', folder/'one', True, **SAVING)), error(lambda: trained('data', ranks=2)),
                      error(lambda: trained('both', ranks=3))]
    uneven = Model(Config(**{**vars(SMALL), 'n_routed_experts': 5}), dtype='float32', device='cpu')
    out['uneven'] = error(lambda: share_experts(uneven))
    out['sums'] = [reduce_total(torch.tensor(1. + world().rank), 3)[0].item(), reduce_total(torch.tensor(1.), 3)[1],
                   sum_over(torch.tensor([1, world().rank])).tolist()]
    if world().rank == 0: (folder/'two.json').write_text(json.dumps(out))


def four(folder):
    "Two pairs of ranks: experts are shared by a pair, and sharded between the pairs"
    setup()
    out = dict(both=rehearse('both', ranks=2), muon=rehearse('both', muon, 3, ranks=2))
    _, history = trained('both', Path(folder, 'four'), ranks=2, **SAVING, per_device_train_batch_size=1)
    if world().rank == 0:
        shutil.rmtree(Path(folder, 'four', 'checkpoint-6'))
        Path(folder, 'four.json').write_text(json.dumps(out | dict(history=history[:6])))


def three(folder):
    "Five rows, and then two, over three processes"
    setup()
    out = dict(rows=len(own_rows(_small_batch(0))['tokens']), data=rehearse('data', steps=3), shard=rehearse('shard', steps=3))
    out['muon'] = rehearse('shard', muon, steps=2)
    alone, shared = small_model(), small_model()
    loss = shard(shared, 'data')
    language_loss(alone, _small_batch(0, 2))[0].backward()
    total, n = loss(shared, own_rows(_small_batch(0, 2)))
    total.backward()
    for p in shared.parameters(): p.grad.mul_(world().size)
    out['ragged'] = differences(shared, alone)
    out['error'] = error(lambda: shard(small_model(), 'expert'))
    if world().rank == 0: Path(folder, 'three.json').write_text(json.dumps(out))


def started(program, processes, folder):
    "The program in processes as `torchrun` would start them, which takes twice as long to import what they need"
    code = f'import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport test_parallel as t\nt.SEED = {SEED}\n'
    code += f't.{program}({str(folder)!r})\n'
    with socket.create_server(('localhost', 0)) as s: port = s.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR='localhost', MASTER_PORT=str(port), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    ranks = [warm.start('-c', code, env=env | dict(RANK=str(i), LOCAL_RANK=str(i)), modules=warm.TRAINING) for i in range(processes)]
    for p in ranks:
        _, said = p.communicate(timeout=900)
        assert p.returncode == 0, said
    return json.loads((folder/f'{program}.json').read_text())


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('parallel')


@pytest.fixture(scope='module')
def single(folder):
    "The run of six steps in this process, with a checkpoint after its third"
    t, history = trained('data', folder/'one', per_device_train_batch_size=4, **SAVING)
    shutil.rmtree(folder/'one'/'checkpoint-6')
    return t.model, history[:6]


@pytest.fixture(scope='module')
def found4(folder): return started('four', 4, folder)


@pytest.fixture(scope='module')
def found(folder, single, found4): return started('two', 2, folder)


@pytest.fixture(scope='module')
def found3(folder): return started('three', 3, folder)


# ---- what they found

@pytest.mark.parametrize('how', WAYS)
@pytest.mark.parametrize('what', ('', ' muon', ' starved', ' frozen', ' accumulated'))
def test_two_processes_equal_one(found, how, what):
    for name, x in found[how + what].items(): assert x < (1e-5 if what != ' accumulated' else 1e-4), (name, x)  # sums there, not means


@pytest.mark.parametrize('how', ('data', 'shard'))
def test_tied_embeddings(found, how):
    for name, x in found[f'{how} tied'].items(): assert x < 1e-5, (name, x)


@pytest.mark.parametrize('how', WAYS)
def test_whole_state_has_the_names_and_numbers_of_one_process(found, how): assert found[f'{how} collected'] == [True, True]


def test_exchange_for_any_numbers_of_tokens(found): assert max(found['exchanged']) < 1e-6, SEED  # run_experts weighs in float32


@pytest.fixture(scope='module')
def alone():
    "The same runs in this process, with batches of four"
    return {name: trained('data', per_device_train_batch_size=4, **kwargs) for name, kwargs in RUNS.items()}


@pytest.mark.parametrize('how', WAYS)
@pytest.mark.parametrize('name', RUNS)
def test_trainer(found, alone, folder, how, name):
    if how == 'expert' and name == 'clipped' and not CLIPS: pytest.skip("the trainer clips by a process's own experts")
    t, want = alone[name]
    got = found[f'{how} trainer {name}']
    assert len(got) == len(want) == 5
    for g, w in zip(got, want, strict=True): assert g == pytest.approx(w, abs=2e-5)
    if name in ('plain', 'clipped'):
        state = torch.load(folder/f'{how}-{name}.pt')
        for k, x in t.model.state_dict().items(): torch.testing.assert_close(state[k], x, rtol=0, atol=2e-5)


@pytest.mark.parametrize('how', WAYS)
def test_trained_models_are_whole_and_saved_in_the_usual_layout(found, alone, folder, how):
    assert set(found[f'{how} kind']) == {'Parameter'}
    model = Model.from_pretrained(folder/how/'checkpoint-4', dtype='float32', device='cpu')
    for p, q in zip(model.parameters(), alone['plain'][0].model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


@pytest.mark.parametrize('how', WAYS)
def test_resume_is_exact(found, how):
    assert found[f'{how} {how} resumed'] == dict(weight=0, history=0, written=['checkpoint-3', 'checkpoint-6'])


@pytest.mark.parametrize('how', WAYS)
def test_resume_with_another_kind(found, how):
    for what in ('resumed', 'adamw'):
        got = found[f'{how} {WAYS[WAYS.index(how) - 1]} {what}']
        assert got['weight'] < 2e-5 and got['history'] < 2e-5, (what, got)


def test_four_ranks_on_a_mesh_equal_one(found4, single):
    for what in ('both', 'muon'):
        for name, x in found4[what].items(): assert x < 1e-5, (what, name, x)
    for g, w in zip(found4['history'], single[1], strict=True): assert g == pytest.approx(w, abs=2e-5)


def test_resume_with_fewer_ranks(found, folder, single):
    "Four ranks on a mesh, then two with FSDP, then one"
    for g, w in zip(found['four'], single[1], strict=True): assert g == pytest.approx(w, abs=2e-5)
    for k, x in torch.load(folder/'four.pt').items(): torch.testing.assert_close(x, single[0].state_dict()[k], rtol=0, atol=2e-5)
    shutil.rmtree(folder/'four'/'checkpoint-6')
    t, history = trained('data', folder/'four', True, per_device_train_batch_size=4, **SAVING)
    for g, w in zip(history[:6], single[1], strict=True): assert g == pytest.approx(w, abs=2e-5)
    for p, q in zip(t.model.parameters(), single[0].parameters(), strict=True): torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_errors_in_two_processes(found, folder):
    assert found['refused'] == [f"{folder/'one'/'checkpoint-3'}: was saved by one process; resume with one process, or with 'data'",
                                "ranks=2 needs 'both'; with 'data' no other axis is left",
                                '2 processes are not a multiple of ranks=3; use a divisor']
    assert found['uneven'] == "5 experts can't be shared evenly by 2 processes; use a divisor of 5"
    assert found['sums'] == [3., 6, [2, 1]]


@pytest.mark.parametrize('what', ('data', 'shard', 'muon', 'ragged'))
def test_three_processes(found3, what):
    assert found3['rows'] == 2
    for name, x in found3[what].items(): assert x < (1e-5 if what != 'ragged' else 1e-4), (name, x)


def test_experts_need_a_divisor(found3): assert found3['error'] == "4 experts can't be shared evenly by 3 processes; use a divisor of 4"


# ---- in a world of one

def test_alone_nothing_changes():
    assert setup() == world() == World(0, 1) and not dist.is_initialized()
    model, batch = small_model(), _small_batch(0)
    assert own_rows(batch)['tokens'].equal(batch['tokens'])
    assert shard(model, 'expert') is language_loss and not any(is_share(p) for p in model.parameters())
    assert whole_state(model).keys() == model.state_dict().keys()
    a, b = (Trainer(small_model(), arguments(), ROWS, callbacks=c) for c in ((), [Parallel('expert')]))
    strip = [[{k: v for k, v in row.items() if k != 'seconds'} for row in t.train()] for t in (a, b)]
    assert strip[0] == strip[1]
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


@pytest.mark.parametrize('rows', (1, 2, 5, 8))
@pytest.mark.parametrize('size', (1, 2, 3, 7))
def test_rows_are_shared_out(rows, size):
    batch = _small_batch(0, rows) | dict(other=torch.arange(rows))
    parts = [own_rows(batch, World(rank, size)) for rank in range(size)]
    scored = [p for p in parts if (p['labels'] != IGNORE).any()]
    for name in batch: assert torch.cat([p[name] for p in scored]).equal(batch[name]), name
    for p in parts:
        assert len(p['tokens']) in (max(1, rows//size), -(-rows//size))
        if not any(p is s for s in scored): assert len(p['tokens']) == 1 and p['documents'].eq(-1).all()


def test_skeleton_costs_no_memory_and_keeps_everything():
    model = tied()
    model.norm.weight.requires_grad_(False)
    blank = skeleton(model)
    assert {t.device.type for t in blank.state_dict().values()} == {'meta'}
    known = [[(n, p.shape, p.requires_grad) for n, p in m.named_parameters()] for m in (blank, model)]
    assert known[0] == known[1]
    blank.load_state_dict(model.state_dict(), assign=True)
    batch = _small_batch(0)
    assert torch.equal(language_loss(blank, batch)[0], language_loss(model, batch)[0])


def test_total_norm_of_copies_is_torchs():
    model = small_model()
    language_loss(model, _small_batch(0))[0].backward()
    assert total_norm(model.parameters()).equal(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))


def test_bad_ways_are_refused():
    for f in (lambda: Parallel('tensor'), lambda: shard(small_model(), 'tensor')):
        with pytest.raises(ValueError, match=r"^unknown parallelism 'tensor'; known are data, shard, expert, both$"): f()
    with pytest.raises(ValueError, match='^no layer of this Model has routed experts'): share_experts(tied())
    with pytest.raises(RuntimeError, match='^2 processes: .*ZeroDivisionError: division by zero\n'): launch_processes('print(1/0)')
    assert sorted(launch_processes("import os; os.write(1, os.environ['RANK'].encode() + b'\\n')", 3).split()) == ['0', '1', '2']


def test_shares_are_seen(folder):
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = small_model()
        before = copy.deepcopy(model.state_dict())
        names = share_experts(model)
        assert names == [n for n, p in model.named_parameters() if is_share(p)]
        assert names == ['layers.1.mlp.experts.gate_up_proj', 'layers.1.mlp.experts.down_proj']
        assert isinstance(model.layers[1].mlp.experts, ParallelExperts)
        state = whole_state(model)
        assert state.keys() == before.keys() and all(torch.equal(state[k], t) for k, t in before.items())
        with torch.no_grad(), pytest.raises(ValueError): share_experts(model)  # nothing is left to share
    finally: dist.destroy_process_group()
    assert parallel.world() == World(0, 1)

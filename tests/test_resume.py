"A run that is killed at any step arrives at the same bits as one that isn't."
import json
import os
import resource
import shutil

import pytest
import torch
import warm

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.train.callbacks import Callback, Guard
from deepseek_nb.train.optim import Muon
from deepseek_nb.train.resume import (
    META,
    TENSORS,
    TRAINED,
    Checkpoints,
    checkpoints,
    from_json,
    identity,
    is_whole,
    random_state,
    read_model,
    to_json,
    write_whole,
)
from deepseek_nb.train.trainer import Trainer, TrainingArguments

SIZES = dict(vocab_size=64, dim=16, n_layers=2, n_heads=2, inter_dim=24, max_positions=32)
DENSE = Config('llama', **SIZES, n_kv_heads=1, head_dim=8)
MOE = Config('deepseek_v3', **SIZES, n_dense_layers=1, moe_inter_dim=8, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, score_func='sigmoid', score_bias=True, norm_topk=True)


def fresh(c=DENSE, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Model(c, **dict(dtype='float32', device='cpu') | kwargs).init_weights(.1)


def rows(n=21, s=12):
    "Rows that walk through the vocabulary; every third has a beginning that isn't scored, every fourth is shorter."
    g = torch.Generator().manual_seed(7)
    walk = (torch.randint(1, 4, (n, s+1), generator=g).cumsum(1)*7)%64
    out = [dict(tokens=w[:-1].clone(), labels=w[1:].clone()) for w in walk]
    for r in out[::3]: r['labels'][:s//2] = -100
    return [{k: v[:s-4] for k,v in r.items()} if i%4 == 0 else r for i,r in enumerate(out)]


def args(**kwargs):
    base = dict(max_steps=6, learning_rate=.01, warmup_steps=2, per_device_train_batch_size=4, disable_tqdm=True)
    return TrainingArguments(**base | kwargs)


# ---- killed, for real

KILLED = r'''
import hashlib, json, os, random, shutil, signal, sys, tempfile, time
from pathlib import Path
import torch
import torch._dynamo # of which each child's optimiser would need a second
import torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
from test_resume import DENSE, MOE, args, fresh, rows
from deepseek_nb.train import trainer
from deepseek_nb.train.balance import Balance, with_balance
from deepseek_nb.train.loss import language_loss, linear_cross_entropy
from deepseek_nb.train.resume import checkpoints
from deepseek_nb.train.callbacks import Callback
from deepseek_nb.train.trainer import Trainer
STEPS = 14

def dropped(model, batch):
    "The loss behind dropout, which draws from PyTorch's generator"
    x = F.dropout(model.hidden(batch['tokens'], documents=batch.get('documents')).flatten(0, 1), .2)
    return linear_cross_entropy(x, model.head_weight, batch['labels'].flatten()), int((batch['labels'] != -100).sum())

def halves(model):
    for n,p in model.named_parameters(): p.requires_grad_('layers.1' in n)
    return model

CASES = {
    'adamw, accumulation, dropout': lambda: (fresh(), dict(gradient_accumulation_steps=2), dict(loss=dropped)),
    'muon, experts, router bias': lambda: (fresh(MOE), dict(optim='muon', learning_rate=.005, lr_scheduler_type='cosine'),
                                           dict(loss=with_balance(language_loss, .01), callbacks=[Balance(.01)])),
    'half frozen, blocks computed again': lambda: (halves(fresh(MOE)), dict(gradient_accumulation_steps=3, gradient_checkpointing=True),
                                     dict(callbacks=[Balance(.01)]))}

def lora(c, **kwargs):
    from deepseek_nb.train.lora import LoraConfig
    return LoraConfig(r=2, lora_alpha=4, lora_dropout=.2, target_modules=['q_proj', 'o_proj', 'down_proj']).apply(fresh(c))

CASES['adapters with dropout'] = lambda: (lora(DENSE), {}, {})

class Report(Callback):
    "Says when a step begins, and gives the parent time to kill in its middle"
    order = 95
    def __init__(self, pipe): self.pipe = pipe
    def before_loss(self, t): os.write(self.pipe, bytes([t.step])); time.sleep(.002)

def run(case, out, pipe=None, resume=False):
    model,kwargs,more = CASES[case]()
    if pipe is not None: more['callbacks'] = [*more.get('callbacks', ()), Report(pipe)]
    a = args(max_steps=STEPS, output_dir=out, save_steps=2, save_total_limit=2, **kwargs)
    history = Trainer(model, a, rows(), **more).train(resume_from_checkpoint=resume)
    h = hashlib.sha256()
    for n,t in sorted(model.state_dict().items()): h.update(n.encode()); h.update(t.numpy().tobytes())
    return dict(losses=[r['loss'] for r in history], norms=[r['grad_norm'] for r in history], weights=h.hexdigest())

def child(case, out, at, resume):
    "Run in another process, which is killed when it begins step `at`"
    read,write = os.pipe()
    if not (pid := os.fork()):
        try: (Path(out).parent/'result.json').write_text(json.dumps(run(case, out, write, resume)))
        except BaseException as e: print('child failed', repr(e), file=sys.stderr)
        finally: os._exit(0)
    os.close(write)
    while (step := os.read(read, 1)) and step[0] < at: pass
    if step: time.sleep(random.random()*.01); os.kill(pid, signal.SIGKILL)
    os.close(read)
    return os.WTERMSIG(os.waitpid(pid, 0)[1]), step[0] if step else None

random.seed(int(sys.argv[2]))
for case in CASES:
    folder = Path(tempfile.mkdtemp())
    out,log,at,resume = folder/'run',[],0,False
    while at < STEPS:  # killed again and again, a few steps further each time
        at += random.randint(2, 5)
        log.append((at, *child(case, out, at, resume)))
        resume = bool(checkpoints(out))
        if not resume: shutil.rmtree(out, ignore_errors=True)
    got = json.loads((folder/'result.json').read_text())
    read,write = os.pipe()
    if not os.fork():
        try: (folder/'straight.json').write_text(json.dumps(run(case, None)))
        finally: os._exit(0)
    os.wait()
    print(json.dumps(dict(case=case, log=log, got=got, want=json.loads((folder/'straight.json').read_text()),
                          names=sorted(p.name for p in out.iterdir()))))
    shutil.rmtree(folder)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='processes are forked')
def test_killed_runs_arrive_at_the_same_bits(root):
    "The parent imports and never computes, so that its children can be forked; PyTorch's threads don't survive a fork."
    seed = int.from_bytes(os.urandom(2))
    done = warm.run('-c', KILLED, root/'tests', seed, modules=warm.TRAINING)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    for line in map(json.loads, lines):
        assert sum(sig == 9 for _,sig,_ in line['log']) >= 2, (seed, line['log'])
        assert line['got'] == line['want'], (seed, line['case'], line['log'])
        assert line['names'] == ['checkpoint-12', 'checkpoint-14']


# ---- in one process

class Stop(Callback):
    def __init__(self, at): self.at = at
    def before_update(self, t):
        if t.step == self.at: raise KeyboardInterrupt


def interrupted(a, at=5, c=DENSE, **kwargs):
    with pytest.raises(KeyboardInterrupt): Trainer(fresh(c), a, rows(), callbacks=[Stop(at)], **kwargs).train()
    return checkpoints(a.output_dir)


def test_a_checkpoint_is_a_model(tmp_path):
    Trainer(fresh(), args(output_dir=tmp_path), rows()).train()
    saved, = checkpoints(tmp_path)
    transformers = pytest.importorskip('transformers')
    tokens = rows()[1]['tokens'][None]
    ours = Model.from_pretrained(saved, dtype='float32', device='cpu')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype='float32')
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=0)


def test_optimiser_state_is_copied_out_of_the_file(tmp_path):
    "Updates must not write into a map of the checkpoint."
    saved = interrupted(args(output_dir=tmp_path, save_steps=4))[-1]
    before = (saved/TENSORS).read_bytes()
    Trainer(fresh(), args(output_dir=tmp_path, save_steps=4), rows()).train(resume_from_checkpoint=True)
    assert (saved/TENSORS).read_bytes() == before


def test_loading_leaves_the_source_of_a_model(tmp_path):
    a = args(output_dir=tmp_path, save_steps=2)
    interrupted(a)
    model = fresh()
    model.source, model.kept = 'elsewhere', ()
    trainer = Trainer(model, a, rows())
    trainer.begin()
    read_model(model, checkpoints(tmp_path)[-1])
    assert model.source == 'elsewhere'


@pytest.mark.parametrize('n', [100, 3000, 20_000])
def test_full_disk_leaves_the_old_checkpoint_whole(tmp_path, n):
    "The system refuses to let any file grow beyond n bytes."
    a = args(output_dir=tmp_path, save_steps=2)
    kept = interrupted(a, at=3)
    assert [p.name for p in kept] == ['checkpoint-2']
    before = {p.name: p.read_bytes() for p in kept[0].iterdir()}
    assert max(map(len, before.values())) > n
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, limits[1]))
    try:
        with pytest.raises(ValueError, match='checkpoint-4: not written .*; earlier checkpoints are intact; free disk space') as e:
            Trainer(fresh(), a, rows()).train(resume_from_checkpoint=True)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(e.value)
    assert {p.name: p.read_bytes() for p in kept[0].iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint-2']
    straight = Trainer(fresh(), args(), rows()).train()
    again = Trainer(fresh(), a, rows()).train(resume_from_checkpoint=True)
    assert [r['loss'] for r in again] == [r['loss'] for r in straight]


@pytest.mark.parametrize('name', ['write_model', 'write_tensors', 'sync'])
def test_any_failing_write_leaves_no_trace(tmp_path, monkeypatch, name):
    a = args(output_dir=tmp_path, save_steps=2)
    interrupted(a, at=3)
    def fails(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(f'deepseek_nb.train.resume.{name}', fails)
    with pytest.raises(ValueError, match='checkpoint-4: not written .No space left on device.'):
        Trainer(fresh(), a, rows()).train(resume_from_checkpoint=True)
    assert [p.name for p in tmp_path.iterdir()] == ['checkpoint-2']


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    (tmp_path/'.checkpoint-2.123.tmp').mkdir()
    (tmp_path/'..checkpoint-2.123.tmp.abc').mkdir()
    (tmp_path/'.checkpoint-4.123.old').mkdir()
    (tmp_path/'notes').mkdir()
    Trainer(fresh(), args(output_dir=tmp_path), rows()).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint-6', 'notes']


def test_total_limit(tmp_path):
    Trainer(fresh(), args(output_dir=tmp_path, save_steps=1, save_total_limit=3, max_steps=11), rows()).train()
    assert [p.name for p in checkpoints(tmp_path)] == ['checkpoint-9', 'checkpoint-10', 'checkpoint-11']


def test_another_model(tmp_path):
    a = args(output_dir=tmp_path, save_steps=2)
    interrupted(a)
    with pytest.raises(ValueError, match=r'checkpoint-4: belongs to another model \(llama, 2 layers, width 16.*this model is deepseek_v3'):
        Trainer(fresh(MOE), a, rows()).train(resume_from_checkpoint=True)


def test_another_base(tmp_path):
    "Where a part is frozen, its values belong to the model."
    def half(seed):
        model = fresh(seed=seed)
        model.embed_tokens.requires_grad_(False)
        return model
    a = args(output_dir=tmp_path, save_steps=2)
    with pytest.raises(KeyboardInterrupt): Trainer(half(0), a, rows(), callbacks=[Stop(3)]).train()
    saved = checkpoints(tmp_path)[-1]
    assert sorted(p.name for p in saved.iterdir()) == sorted([META, TENSORS, TRAINED])
    with pytest.raises(ValueError, match='belongs to another model'): Trainer(half(1), a, rows()).train(resume_from_checkpoint=True)
    assert len(Trainer(half(0), a, rows()).train(resume_from_checkpoint=saved)) == 6


def test_other_settings_data_or_callbacks(tmp_path):
    a = args(output_dir=tmp_path, save_steps=2)
    interrupted(a)
    for changed in (dict(learning_rate=.02), dict(seed=1), dict(optim='muon'), dict(max_steps=9), dict(per_device_train_batch_size=2)):
        name, = changed
        said = 'batch_size 4, these batches 2' if name == 'per_device_train_batch_size' else f'saved with {name}='
        with pytest.raises(ValueError, match=said):
            Trainer(fresh(), args(output_dir=tmp_path, save_steps=2, **changed) if name != 'max_steps' else
                    args(output_dir=tmp_path, max_steps=9), rows()).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match='examples 21'): Trainer(fresh(), a, rows(22)).train(resume_from_checkpoint=True)
    class Memory(Callback):
        def state_dict(self): return dict(seen=1)
    other = args(output_dir=tmp_path/'memory', save_steps=2)
    with pytest.raises(KeyboardInterrupt): Trainer(fresh(), other, rows(), callbacks=[Memory(), Stop(3)]).train()
    with pytest.raises(ValueError, match='contains a state for Memory'): Trainer(fresh(), other, rows()).train(resume_from_checkpoint=True)


def test_an_adapter_is_saved_for_peft_too(tmp_path):
    pytest.importorskip('deepseek_nb.train.peft')
    from deepseek_nb.train.lora import LoraConfig
    config = LoraConfig(r=2, lora_alpha=4, target_modules=['q_proj'])
    trainer = Trainer(fresh(), args(output_dir=tmp_path), rows(), lora_config=config)
    trainer.train()
    saved, = checkpoints(tmp_path)
    assert sorted(p.name for p in saved.iterdir()) == sorted([META, TENSORS, TRAINED, 'adapter_config.json', 'adapter_model.safetensors'])
    assert (saved/TRAINED).stat().st_size < 8000
    other = fresh()
    other.load_adapter(saved)
    tokens = rows()[1]['tokens'][None]
    torch.testing.assert_close(other(tokens), trainer.model.eval()(tokens), atol=1e-6, rtol=0)
    a = args(output_dir=tmp_path)
    with pytest.raises(ValueError, match='belongs to another model'):
        Trainer(fresh(seed=1), a, rows(), lora_config=config).train(resume_from_checkpoint=True)


def test_version_and_damage(tmp_path):
    a = args(output_dir=tmp_path, save_steps=2)
    saved = interrupted(a)[-1]
    meta = json.loads((saved/META).read_text())
    (saved/META).write_text(json.dumps(meta | dict(version=99)))
    with pytest.raises(ValueError, match='has version 99, but 1 is expected'):
        Trainer(fresh(), a, rows()).train(resume_from_checkpoint=True)
    (saved/META).write_text(json.dumps(meta)[:-9])
    with pytest.raises(ValueError, match='not valid JSON'): Trainer(fresh(), a, rows()).train(resume_from_checkpoint=True)
    (saved/META).write_text(json.dumps(meta))
    (saved/TENSORS).write_bytes((saved/TENSORS).read_bytes()[:-1])
    with pytest.raises(ValueError, match='truncated'): Trainer(fresh(), a, rows()).train(resume_from_checkpoint=True)


def test_where_there_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match='contains no checkpoint to resume from'):
        Trainer(fresh(), args(output_dir=tmp_path), rows()).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match='needs output_dir'): Trainer(fresh(), args(), rows()).train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match='is not a checkpoint'):
        Trainer(fresh(), args(), rows()).train(resume_from_checkpoint=tmp_path)


def test_a_new_run_refuses_an_old_folder(tmp_path):
    a = args(output_dir=tmp_path, save_steps=2)
    interrupted(a)
    with pytest.raises(ValueError, match='belongs to an earlier run'): Trainer(fresh(), a, rows()).train()


def test_a_finished_run_resumes_to_its_end(tmp_path):
    a = args(output_dir=tmp_path)
    done = Trainer(fresh(), a, rows()).train()
    assert Trainer(fresh(), a, rows()).train(resume_from_checkpoint=True) == done


def test_ruin_is_not_saved(tmp_path):
    "Checkpoints stop where the loss leaps, and the guard's weights are those of a healthy step."
    class Leap(Callback):
        def after_loss(self, t):
            if t.step >= 9: t.part = t.part[0]*20, t.part[1]
    a = args(output_dir=tmp_path, save_steps=1, max_steps=20)
    with pytest.raises(ValueError, match='step 12: loss .* weights are those after step 8; lower learning_rate 0.01'):
        Trainer(fresh(), a, rows(), callbacks=[Leap(), Guard(every=1)]).train()
    assert checkpoints(tmp_path)[-1].name == 'checkpoint-9'


def test_identity():
    assert identity(fresh()) == identity(fresh(seed=1)) != identity(fresh(MOE))
    assert is_whole(fresh(MOE)) and not is_whole(torch.nn.Linear(2, 2))
    model = fresh(MOE)
    before = identity(model)
    model.layers[1].mlp.gate.e_score_correction_bias += 1
    assert identity(model) == before
    model.norm.requires_grad_(False)
    assert identity(model) != before


def test_trees():
    "What json can't say by itself survives: integer keys, tuples, tensors of any dtype and shape, no number and infinity."
    tree = {1: (2., {'a': None, 'b': [True, 'x', ()]}), 'inf': float('inf'), 't': torch.tensor(3), 'u': torch.arange(6, dtype=torch.uint8),
            'e': torch.zeros(0, 3), 'h': torch.ones(2, dtype=torch.bfloat16), 'x': 1e-300, 'r': random_state()['torch']}
    tensors = {}
    back = from_json(json.loads(json.dumps(to_json(tree, tensors))), tensors)
    assert str(back) == str(tree) and list(back) == list(tree)


def test_write_whole_replaces(tmp_path):
    def write(text):
        def f(tmp): tmp.mkdir(); (tmp/'a').write_text(text)
        return f
    for text in ('one', 'two'): write_whole(tmp_path/'x', write(text))
    assert (tmp_path/'x'/'a').read_text() == 'two' and [p.name for p in tmp_path.iterdir()] == ['x']


def test_muon_goes_on_inside(tmp_path):
    a = args(output_dir=tmp_path, save_steps=2, optim='muon')
    interrupted(a, c=MOE)
    trainer = Trainer(fresh(MOE, seed=3), a, rows())
    trainer.train(resume_from_checkpoint=True)
    assert isinstance(trainer.optimizer, Muon) and any('momentum_buffer' in s for s in trainer.optimizer.state.values())
    assert any(isinstance(c, Checkpoints) for c in trainer.callbacks)
    shutil.rmtree(tmp_path)

"What runs never depends on what was imported: every chapter, imported alone, brings the same methods, twins and bits."
import ast
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import defaultdict
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
import warm
from conftest import SEED

ROOT = Path(__file__).parents[1]
MODULES = sorted('.'.join(('deepseek_nb', *p.relative_to(ROOT/'deepseek_nb').with_suffix('').parts)).removesuffix('.__init__')
                 for p in (ROOT/'deepseek_nb').rglob('*.py') if not p.name.startswith('_') or p.name == '__init__.py' and p.stat().st_size)
FIRST = 'deepseek_nb.core.config'


def logits():
    "A small V3's logits for a prompt, for steps behind it, and with gradients, as one string"
    import torch

    from deepseek_nb.arch.model import Model
    from deepseek_nb.core.config import Config, Rope
    c = Config('deepseek_v3', vocab_size=64, dim=32, n_layers=2, n_heads=2, inter_dim=48, q_lora_rank=24, kv_lora_rank=16,
               qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=1, n_routed_experts=8, n_shared_experts=1,
               n_activated_experts=2, moe_inter_dim=16, score_func='sigmoid', score_bias=True, norm_topk=True, rope=Rope(interleaved=True))
    torch.manual_seed(0)
    model, ids = Model(c, 'float32', 'cpu').init_weights(.3).eval(), torch.arange(10)[None]
    with torch.no_grad():
        cache = model.new_cache(1)
        found = [model(ids[:, :8], cache), model(ids[:, 8:9], cache), model(ids[:, 9:], cache)]
    found.append(model(ids).detach())
    return hashlib.sha1(b''.join(x.numpy().tobytes() for x in found)).hexdigest()


def alone(name):
    "What a process finds that imports one module and, if it is drawn, then runs a model: bits, and the twins that it tries for operations"
    import_module(name)
    bits = logits() if name in drawn(10) else None
    from deepseek_nb import _later
    from deepseek_nb.core.dispatch import _ops
    ops = {o.removeprefix('deepseek_nb.'): op for o, op in _ops.items()}
    strangers = {o: [n for n, t in op.twins.items() if n != 'reference' and t.fn.__module__ != f"deepseek_nb.{_later.TWINS[o].get(n)}"]
                 for o, op in ops.items() if o in _later.TWINS}
    planned = {o: op.plans.get(('auto', 'cpu', False)) for o, op in sorted(ops.items()) if o.startswith('arch.')}
    return dict(bits=bits, strangers={o: n for o, n in strangers.items() if n}, plans={o: [*p] for o, p in planned.items() if p})


def drawn(n):
    """One of n modules, others in the next run; all with EVERY=1. SEED=n repeats a run
    Each fifth one is imported alone, and a model runs after each tenth"""
    if os.environ.get('EVERY'): return MODULES
    order = random.Random(SEED).sample(MODULES, len(MODULES))
    return list(dict.fromkeys([FIRST, *order[:len(MODULES)//n]]))


def fork(job, *args):
    "A job in a process of its own"
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, os.fdopen(read)
    try: out = job(*args)
    except BaseException as e: out = dict(error=repr(e))
    with os.fdopen(write, "w") as f: f.write(json.dumps(out))
    os._exit(0)


def result(pid, file):
    "What the job returned"
    out = json.loads(file.read())
    os.waitpid(pid, 0)
    return out


def foreign():
    "Modules of other packages that ours import when they are imported"
    texts = (p.read_text() for p in (ROOT/'deepseek_nb').rglob('*.py'))
    return sorted({name for text in texts for name in re.findall(r'^(?:import|from) (\w[\w.]*)', text, re.M)})


def all_alone():
    "Print what every module finds, two processes at a time, which have others' packages already and nothing of ours"
    for name in foreign():
        if not name.startswith('deepseek_nb'):
            with suppress(Exception): import_module(name)
    assert not [n for n in sys.modules if n.startswith('deepseek_nb')]
    warm.settle()
    running, found = [], {}
    for name in drawn(5):
        running.append((name, *fork(alone, name)))
        if len(running) > 1: found |= {running[0][0]: result(*running.pop(0)[1:])}
    print(json.dumps(found | {name: result(*job) for name, *job in running}))


@pytest.fixture(scope='module')
def found():
    print(f'SEED={SEED}')
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', SEED=str(SEED))
    p = warm.run(__file__, cwd=ROOT, env=env | dict(PYTHONPATH=str(ROOT)), modules=warm.TRAINING)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout.splitlines()[-1])


def test_every_module_can_be_imported_first(found):
    assert found.keys() == {*drawn(5)} and not {n: f['error'] for n, f in found.items() if 'error' in f}


def test_the_same_bits_and_twins_whatever_was_imported(found):
    first, ran = found[FIRST], {n: found[n] for n in drawn(10)}
    assert first['bits'] and len(first['plans']) >= 8
    assert not {n: f for n, f in ran.items() if f['bits'] != first['bits'] or f['plans'] != first['plans']}


def test_every_twin_is_in_the_table(found):
    assert not {n: f['strangers'] for n, f in found.items() if f['strangers']}


def test_every_operation_finds_all_its_twins(python):
    "In one process, as an operation's table decides what it imports"
    python('''
from importlib import import_module
from deepseek_nb import _later
for name, twins in _later.TWINS.items():
    module, _, function = name.rpartition('.')
    op = getattr(import_module(f'deepseek_nb.{module}'), function).op
    op.load()
    assert {*op.twins} == {'reference', *twins}, name
    for n, chapter in twins.items(): assert op.twins[n].fn.__module__ == f'deepseek_nb.{chapter}', (name, n)
''')


def test_a_model_without_adapters_imports_nothing_of_training(python):
    "Neither the plans of all operations on a CPU, nor a forward pass with a gradient, of floats and of codes"
    python('''
import sys
from importlib import import_module
import torch
from deepseek_nb import Model, _later
from deepseek_nb.quant.model import quantize_model
model = Model.from_pretrained('deepseek_nb/mini')
ids = torch.arange(5)[None]
model.generate(ids, max_new_tokens=2)
model(ids).sum().backward()
codes = quantize_model(model, 'int8')
codes.generate(ids, max_new_tokens=2)
for name in _later.TWINS:
    room, module, function = name.split('.')[0], *name.rpartition('.')[::2]
    if room not in ('train', 'apps', 'cuda'): getattr(import_module(f'deepseek_nb.{module}'), function).op.plan('auto', 'cpu')
assert not (found := [n for n in sys.modules if n.startswith(('deepseek_nb.train', 'deepseek_nb.apps', 'deepseek_nb.cuda'))]), found

import pickle
from deepseek_nb.arch.model import add_attention
assert not any('adapters' in n for n in add_attention.op.plan('auto', 'cpu'))
from deepseek_nb.train.lora import LoraWeight
assert not any('adapters' in n for n in add_attention.op.plan('auto', 'cpu'))
stored = pickle.dumps(LoraWeight(torch.ones(2, 3)))
assert 'torch/adapters' in add_attention.op.plan('auto', 'cpu') and 'deepseek_nb.train.peft' in sys.modules
from deepseek_nb.core import dispatch
dispatch._adapters = False
pickle.loads(stored)
assert dispatch._adapters
''')


def test_the_table_is_fresh():
    from deepseek_nb import _later
    from deepseek_nb.core.lazy import chapter_paths, twin_table
    assert twin_table(chapter_paths(ROOT/'nbs')) == _later.TWINS, 'run nbdev-export'


def test_no_import_for_its_side_effect():
    p = subprocess.run([Path(sys.executable).parent/'ruff', 'check', 'deepseek_nb', '--select', 'F401', '--ignore-noqa', '-q'],
                       cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout


def public(path):
    "What a module offers in its `__all__` and doesn't import from another"
    body = ast.parse(path.read_text()).body
    imported = {a.asname or a.name for node in body if isinstance(node, ast.ImportFrom) for a in node.names}
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__':
            return [name for name in ast.literal_eval(node.value) if name not in imported]
    return []


def test_no_public_name_is_defined_twice():
    homes = defaultdict(set)
    for p in (ROOT/'deepseek_nb').rglob('[!_]*.py'):
        for name in public(p): homes[name].add('.'.join(p.relative_to(ROOT/'deepseek_nb').with_suffix('').parts))
    for p in (ROOT/'deepseek_nb').rglob('*/__init__.py'):
        for name in public(p): homes[name].add('.'.join(p.relative_to(ROOT/'deepseek_nb').parent.parts))
    assert not {n: sorted(h) for n, h in homes.items() if len(h) > 1}


if __name__ == '__main__': all_alone()

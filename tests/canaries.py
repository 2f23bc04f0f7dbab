"""Canaries: a small part of each measurement again. Which numbers and speeds have changed since it was stored?

A benchmark runs with few tokens and rounds, a study one arm and one seed of its smoke test, each in a process of its own. References are
stored in `nbs/results/evidence/canaries.json`, with commit, date and processor: those numbers on which two runs agree, and ratios of times.

    python tests/canaries.py [--store] [RECORD ...]
"""
import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch

from deepseek_nb.bench import BENCHMARKS, git_state, hardware, run_benchmark, save_result
from deepseek_nb.bench.limits import BENCH_MOE
from deepseek_nb.files.safetensors import read_json
from deepseek_nb.studies import read_plan, run_one, study_folder, study_names

_TWO = BENCH_MOE | dict(num_hidden_layers=2)


SMALL_OPTIONS = {  # benchmark -> options of its small version
    'attention': dict(cached=(512,), new=(), repeats=3, layers=2), 'batch-decode': dict(batches=(8,), repeats=3, shape=_TWO),
    'bias': dict(examples=20, questions=20), 'blocks': dict(tokens=1024, calibration=1024, kinds='Q8_0'),
    'cache': dict(s=64, n=8, repeats=3), 'cache-kinds': dict(names=('bench-moe',), shape=_TWO, tokens=512, cached=200, repeats=3),
    'calibration': dict(examples=8, names='piqa'), 'compile': dict(repeats=3, shape=_TWO),
    'decode': dict(cached=(512,), repeats=3, shape=_TWO),
    'dispatch': dict(repeats=5, number=2000), 'drift': dict(smoke=True), 'evaluation': dict(examples=4, tasks='piqa,checklist'),
    'events': dict(smoke=True), 'fine-decode': dict(repeats=3, number=4), 'fine-prompt': dict(s=128, repeats=3),
    'fine-quality': dict(tokens=1024, window=512), 'gpu-emulated': dict(only='check norm'), 'grpo': dict(rounds=1, length=16),
    'import-time': dict(repeats=3), 'int8': dict(repeats=3, number=4), 'live': dict(repeats=1),
    'llama': dict(cached=(128,), s=128, repeats=3), 'load-smollm2': dict(repeats=2), 'lora': dict(s=64, repeats=2, attentions=('sdpa',)),
    'moe-decode': dict(cached=256, repeats=3, shape=_TWO), 'moe-layer': dict(tokens=(8, 128), repeats=3), 'neurons': dict(repeats=3),
    **{n: dict(lengths=(128,), rows=2, steps=16, repeats=2) for n in ('peers', 'peers-avx2', 'peers-avx512')},
    'perturb': dict(examples=6), 'platform': dict(smoke=True), 'prefill': dict(tokens=(512,), repeats=3, shape=_TWO),
    'prefix-cache': dict(names=('bench-moe',), shape=_TWO), 'qlora-memory': dict(s=64, formats=('nf4',)),
    'quant-decode': dict(cached=(128,), s=128, repeats=3), 'quant-moe': dict(batches=(1,), s=64, repeats=3, shape=_TWO),
    'ragged-steps': dict(rows=(8,), cached=(128,), repeats=3, models=('bench-moe',)), 'refusals': dict(examples=4, tokens=8),
    'runner': dict(repeats=2), 'serve': dict(smoke=True), 'smollm2-decode': dict(cached=(128,), repeats=3),
    'smollm2-prefill': dict(tokens=(128,), repeats=3), 'sparse': dict(t=4096, repeats=3, rows=2, lengths=(4096,)),
    'sparse-steps': dict(smoke=True), 'speculate': dict(smoke=True), 'train-step': dict(batch=2, s=128, repeats=3, shape=_TWO),
    'v4-decode': dict(t=1024, repeats=3, widths=(256,))}


def measure_small(
    name:str,  # Key of `SMALL_OPTIONS`, or name of a study
)->dict|list:  # Result, which JSON can store
    "Do a small version of a measurement"
    random.seed(0), torch.manual_seed(0)
    if name in BENCHMARKS: return run_benchmark(name, **SMALL_OPTIONS[name])[1]['result']
    plan = read_plan(study_folder()/'configs'/'evidence'/f'{name}.toml', smoke=True)
    with tempfile.TemporaryDirectory() as work: return run_one(plan, [*plan.arms][0], plan.seeds[0], work)['result']


def numbers_of(
    x,  # Result, or a part of it
    at:str = '',  # Its place
)->dict:  # Place -> number
    "All numbers of a result"
    if isinstance(x, dict|list|tuple):
        return {k: v for i,o in (x.items() if isinstance(x, dict) else enumerate(x)) for k,v in numbers_of(o, f'{at}/{i}').items()}
    return {at: float(x)} if isinstance(x, int|float) and not isinstance(x, bool) else {}


def ratios_of(
    x,  # Result, or a part of it
    at:str = '',  # Its place
)->dict:  # Place -> time of the fastest peer, divided by ours
    "All ratios of times in a result"
    if not isinstance(x, dict|list): return {}
    if isinstance(x, dict) and {'names', 'seconds'} <= x.keys(): x = dict(zip(x['names'], x['seconds'], strict=True))
    items = [*(x.items() if isinstance(x, dict) else enumerate(x))]
    times = {str(n): median(t) for n,t in items if isinstance(t, list) and t and all(isinstance(v, float) and v > 0 for v in t)}
    if not isinstance(x, dict) or len(times) < 2: return {k: v for n,o in items for k,v in ratios_of(o, f'{at}/{n}').items()}
    ours = next((n for n in times if 'deepseek_nb' in n), [*times][0])
    return {at or '/': float(f'{min(t for n,t in times.items() if n != ours)/times[ours]:.3g}')}


NOISE,SLOWER,KEPT = 1e-3,.5,8  # Relative difference of equal numbers; ratio of times beside that of the reference; numbers in a reference


def _away(a, b): return math.inf if math.isnan(d := abs(a - b)/max(abs(a), abs(b), 1e-9)) else d


def reference(
    one:dict,  # `numbers` and `ratios` of a run
    other:dict,  # Those of another run
)->dict:  # The same, with at most `KEPT` numbers on which both agree
    "What two runs have in common"
    same = [p for p,v in one['numbers'].items() if v and _away(v, other['numbers'].get(p, math.nan)) < NOISE/10]
    same = [p for p in same if not one['numbers'][p].is_integer()] or same
    both = {p: min(r, other['ratios'][p]) for p,r in one['ratios'].items() if p in other['ratios']}
    return dict(numbers={p: one['numbers'][p] for p in same[::-(-len(same)//KEPT) or 1]}, ratios=both)


def judge_canary(
    found:dict,  # `numbers` and `ratios` of a run
    kept:dict,  # Those of the reference
)->str:  # 'same', 'numbers differ', 'slower' or 'times differ', and the figure
    "Compare a run with its reference"
    off = {p: _away(v, found['numbers'].get(p, math.nan)) for p,v in kept['numbers'].items()}
    pace = {p: found['ratios'].get(p, 0.)/r for p,r in kept['ratios'].items()}
    worst,slow,fast = max(off, key=off.get, default=''),min(pace, key=pace.get, default=''),max(pace, key=pace.get, default='')
    if worst and off[worst] > NOISE: return f'numbers differ: {worst[1:]} by {off[worst]:.1%}'
    if slow and pace[slow] < SLOWER: return f'slower: {slow} has {pace[slow]:.2f} times the ratio it had'
    if fast and pace[fast] > 1/SLOWER: return f'times differ: {fast} has {pace[fast]:.2f} times the ratio it had'
    said = f'same: {len(off)} numbers within {max([*off.values(), 0]):.0e}'
    return said + (f', ratio of times {pace[slow]:.2f} times what it was' if pace else '')


def run_canary(
    name:str,  # Name of a record
    limit:float = 120.,  # Seconds
)->dict:  # `numbers` and `ratios`
    "Measure the small version in a process of its own"
    if name not in ({*SMALL_OPTIONS} if name in BENCHMARKS else {*study_names()}): raise ValueError('it has no small version')
    try: done = subprocess.run([sys.executable, __file__, '--measure', name], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired: raise ValueError(f'it takes more than {limit:g} seconds here') from None
    if done.returncode: raise ValueError((done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def recorded(
    folder:str|Path = 'nbs/results',  # Folder of records
)->list:  # Names of benchmarks, then of studies
    "Names of all records"
    files = [*sorted(Path(folder).glob('*.json')), *sorted(Path(folder).glob('evidence/*.json'))]
    return [p.stem for p in files if p.stem != 'canaries']


def check_canaries(
    names:tuple = (),  # Names of records; empty: all
    folder:str|Path = 'nbs/results',  # Folder of records
    store:bool = False,  # Whether to take new references
    say:Callable = print,  # Function that gets a line for each record
    run:Callable = run_canary,  # Function that measures the small version
)->dict:  # Name -> what was found
    "Run canaries, and compare them with their references or take these"
    if strange := {*names} - {*recorded(folder)}: raise KeyError(f'there is no record {sorted(strange)[0]!r} in {folder}')
    if store and git_state()['clean'] is not True: raise ValueError('the tree has changes: commit them, as a reference names its commit')
    file,found = Path(folder)/'evidence'/'canaries.json',{}
    for n in names or recorded(folder):
        known = read_json(file) if file.exists() else {}
        try:
            if store: save_result(file, dict(sorted((known | {n: _taken(run(n), run(n))}).items())))
            found[n] = 'reference stored' if store else _compared(run, n, known)
        except ValueError as e: found[n] = f'no canary: {e}'
        say(f'{n:18} {found[n]}')
    return found


def _taken(one, other):
    return reference(one, other) | dict(commit=git_state()['commit'], date=date.today().isoformat(), cpu=hardware()['cpu'])


def _compared(run, name, known):
    if name not in known: raise ValueError(f'no reference: python tests/canaries.py --store {name}')
    kept = known[name]
    other = f", which is of another processor ({kept['cpu']})"*(kept['cpu'] != hardware()['cpu'])
    return f"{judge_canary(run(name), kept)}; reference of {kept['date']}, commit {kept['commit']}{other}"


def measured(name):
    "What `run_canary` reads"
    result = json.loads(json.dumps(measure_small(name)))
    return dict(numbers=numbers_of(result), ratios=ratios_of(result) if name in BENCHMARKS else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', help='records; all if none is named')
    parser.add_argument('--store', action='store_true', help='take new references')
    parser.add_argument('--measure', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure: print(json.dumps(measured(*args.names)))
    else: check_canaries(tuple(args.names), store=args.store)


if __name__ == '__main__': main()

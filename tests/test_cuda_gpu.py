"`make gpu` without a GPU: interrupted, continued, without tools, and with a stand-in for CUDA's graphs and events"
import json
import shutil
import time
from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from deepseek_nb.bench import gpu
from deepseek_nb.cuda.build import signatures

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler to emulate with')


def test_an_interrupted_run_continues(tmp_path):
    "The process ends during a task, as after a CUDA error; the next run does the rest, and then what failed"
    path, ran = tmp_path/'gpu.json', []
    def dies(): raise KeyboardInterrupt
    todo = dict(a=lambda: ran.append('a') or dict(ok=True), b=dies, c=lambda: ran.append('c') or dict(ok=True))
    with pytest.raises(KeyboardInterrupt): gpu.run_gpu_tasks(path, todo, time.time() + 60)
    assert gpu.open_record(path)['b'] == dict(failed=gpu.BEGUN)
    assert gpu.pending(gpu.open_record(path), [*todo]) == ['b', 'c']
    todo['b'] = lambda: ran.append('b') or dict(ok=True)
    gpu.run_gpu_tasks(path, {n: todo[n] for n in gpu.pending(gpu.open_record(path), [*todo])}, time.time() + 60)
    assert ran == ['a', 'b', 'c'] and not gpu.pending(gpu.open_record(path), [*todo])
    assert json.loads(path.read_text())['hardware'] and not gpu.run_gpu_tasks(tmp_path/'late.json', todo, time.time() - 1)
    with mock.patch.object(gpu, 'sources_key', lambda: 'others'): assert gpu.open_record(path) == {}


def test_a_lost_context_ends_the_child(tmp_path):
    def lost(): raise RuntimeError('CUDA error: an illegal memory access was encountered')
    found = gpu.run_gpu_tasks(tmp_path/'gpu.json', dict(a=lost, b=lambda: dict(ok=True)), time.time() + 60)
    assert [*found] == ['a'] and 'illegal memory' in found['a']['failed']


def test_the_command_emulates(tmp_path, capsys):
    "One task in a child process; a second run begins none"
    argv = ['--dry', '--out', str(tmp_path), '--only', 'check sort by expert, back']
    assert gpu.gpu_main(argv) == 0
    with mock.patch('subprocess.run', lambda *args, **named: pytest.fail('nothing was left to do')): assert gpu.gpu_main(argv) == 0
    assert capsys.readouterr().out.count('1 of 1 tasks passed') == 2


def test_wrong_results_fail():
    check = gpu.CHECKS['sort by expert']
    with mock.patch.dict(gpu.CHECKS, {'sort by expert': check._replace(run=lambda x, e: check.run(x, e).flip(0))}):
        assert not gpu.run_check('sort by expert')['ok']
    race = gpu.RACES['RMSNorm and PyTorch']
    with mock.patch.dict(gpu.RACES, {'RMSNorm and PyTorch': race._replace(ours=lambda x, w: x)}):
        assert not gpu.run_race('RMSNorm and PyTorch', 'tiny')['ok']


@pytest.mark.parametrize('name', [n for n in gpu.RACES if 'wgmma' not in n])  # there, both are ours
def test_a_graph_can_record_the_peer(name):
    "A peer whose shapes depend on data waits for the host, and no CUDA graph records it; a fake tensor has no data to wait for"
    from torch._subclasses.fake_tensor import FakeTensorMode
    race = gpu.RACES[name]
    inputs = race.inputs('tiny', 'cpu')
    if not all(isinstance(x, torch.Tensor) for x in inputs): pytest.skip('a quantised weight, which the peer does not read')
    with FakeTensorMode() as fake, torch.no_grad(): race.peer(*map(fake.from_tensor, inputs))


def test_every_kernel_is_compiled_checked_and_on_hopper_raced():
    "What `make gpu` leaves out, nobody finds; `wgmma` is compiled for Hopper only, and left out on other cards"
    kernels = {k for f in gpu.FILES for k in signatures(f)[0]}
    files = {p.name for p in gpu.CSRC.glob('*.cu')}
    assert {*gpu.FILES} == files - {'row_sum.cu', 'rms_row.cu'}, 'files without a task'
    assert {'attend_pages', 'merge_pages', 'write_pages', 'tile_product_bf16', 'fp8_product_f32'} <= kernels
    launched = set()
    for name in ('keys and values in pages', 'ragged latents in pages', 'new positions in pages'):
        found = gpu.run_check(name)
        assert found['ok'], (name, found)
        launched |= {*found['launches']}
    assert launched == {'attend_pages', 'merge_pages', 'write_pages'}
    for race in ('paged latents and SDPA', 'wgmma and mma.sync', 'FP8 by wgmma and mma.sync'): assert gpu.run_race(race, 'tiny')['ok'], race
    for name in ('product by wgmma', 'experts by wgmma', 'FP8 by wgmma'): assert gpu.run_check(name)['ok'], name
    with mock.patch('torch.cuda.get_device_capability', lambda: (8, 0)):
        assert not any('wgmma' in n for n in (*gpu.for_device(gpu.CHECKS, 'cuda'), *gpu.for_device(gpu.RACES, 'cuda')))
    with mock.patch('torch.cuda.get_device_capability', lambda: (9, 0)): assert 'product by wgmma' in gpu.for_device(gpu.CHECKS, 'cuda')
    asked = []
    with mock.patch.object(gpu, 'resources', lambda name, archs, **d: asked.append((archs, d)) or {('k', 'a'): (1, 0, 0, 0)}):
        gpu.compile_file('tile_product.cu')
    assert (['sm_90a'], dict(ROWS=128, WARPGROUP=1)) in asked and all('WARPGROUP' not in d or a == ['sm_90a'] for a,d in asked)


def test_graphs_time_each_copy(monkeypatch):
    "Three copies of the inputs, each run once before the recording and once in it, and five replays of each contender"
    calls, replays = [], []

    class Graph:
        def replay(self): replays.append(self)

    class Event:
        def __init__(self, enable_timing): pass
        def record(self): pass
        def synchronize(self): pass
        def elapsed_time(self, end): return 6.

    monkeypatch.setattr(torch.cuda, 'CUDAGraph', Graph)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph: nullcontext())
    contenders = {n: lambda x, n=n: calls.append((n, x)) for n in ('ours', 'peer')}
    found = gpu.graph_seconds(contenders, [(1,), (2,), (3,)], 5)
    assert found == dict(ours=[.002]*5, peer=[.002]*5) and len(replays) == 10
    assert calls == [(n, x) for n in ('ours', 'peer') for _ in range(2) for x in (1, 2, 3)]


def test_without_tools():
    with mock.patch.object(gpu, 'resources', lambda *args, **named: {}):
        assert gpu.compile_file('combine.cu') == dict(skipped='neither NVRTC nor nvcc is installed')
    with mock.patch.object(gpu, 'tools_found', lambda: dict(sanitizer='')): assert 'skipped' in gpu.sanitize('memcheck')
    with mock.patch.object(gpu, 'tools_found', lambda: dict(sanitizer='/bin/false')): assert gpu.sanitize('memcheck')['ok'] is False


def test_claims_name_what_waits():
    check = dict(error=.001, bound=.01, ok=True, launches=dict(k=1), blocks=dict(k=4))
    rows = {r[0]: r for r in gpu.cuda_claims({'check RMSNorm, forward': check})}
    assert rows['RMSNorm'] == ('RMSNorm', '`k` 1×, 4', '1.0e-03 of 1.0e-02, 1 orders', 'waits for a GPU') and rows['rotary'][2] == 'no'
    card = {'check RMSNorm': check, 'race RMSNorm and PyTorch, 1': dict(ok=True, ours=dict(median=2e-6), peer=dict(median=3e-6))}
    rows = {r[0]: r[3] for r in gpu.cuda_claims({}, card)}
    assert rows['RMSNorm'] == 'right' and rows['RMSNorm and PyTorch, 1'] == '2.00 µs, peer 3.00 µs'
    assert rows['rotary'] == rows['latents and SDPA, 8'] == 'waits for a GPU'

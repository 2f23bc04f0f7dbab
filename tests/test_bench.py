"Timers on clocks whose answer is known, memory, records, the roofline's arithmetic and the command."
import json
import os
import random
import re
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
import warm

from deepseek_nb import Config, Model, bench
from deepseek_nb.bench import (
    Comparison,
    Machine,
    Work,
    bandwidth,
    best_rate,
    bound,
    caches,
    compare,
    gemm_rate,
    load_result,
    machine,
    make_record,
    operations,
    peak_bytes,
    run_benchmark,
    run_command,
    save_result,
    seconds,
    si,
)


class Clock:
    def __init__(self, drift=lambda n: 1.): self.now, self.drift, self.order = 0., drift, []
    def __call__(self): return self.now
    def job(self, name, amount):
        def f():
            self.order.append(name)
            self.now += amount * self.drift(len(self.order))
        return f


def fixed():
    ticks = count()
    return lambda: next(ticks) * 1e-3


@pytest.fixture
def registry(monkeypatch):
    own = {n: bench.BENCHMARKS[n] for n in ('machine', 'roofline')}
    monkeypatch.setattr(bench, 'BENCHMARKS', own)
    return bench.BENCHMARKS


@pytest.mark.parametrize('number', [1, 3, 10])
def test_seconds_a_call(number):
    clock = Clock()
    assert seconds(clock.job('a', 2.), number, clock) == 2.
    assert len(clock.order) == number


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('drift', [lambda n: 1., lambda n: 1. + (n > 20) * 4, lambda n: 1.02 ** n])
def test_alternation_survives_drift(drift, seed):
    clock = Clock(drift)
    found = compare({'ours': clock.job('ours', 1.), 'peer': clock.job('peer', 3.)}, repeats=15, clock=clock, seed=seed)
    assert found.ratio == pytest.approx(3, rel=.05)
    rounds = list(zip(clock.order[2::2], clock.order[3::2], strict=True))
    assert all(set(r) == {'ours', 'peer'} for r in rounds) and len(set(rounds)) == 2


def test_warmup_is_not_timed():
    clock = Clock(lambda n: 100. if n <= 4 else 1.)
    found = compare({'a': clock.job('a', 1.), 'b': clock.job('b', 1.)}, repeats=3, warmup=2, clock=clock)
    assert found.medians == pytest.approx((1., 1.)) and len(clock.order) == 4 + 6


@pytest.mark.parametrize('n', [1, 2, 5, 8])
def test_ratio_is_the_median_of_the_rounds(n):
    rng = random.Random(n)
    ours, peer = [[rng.uniform(1, 2) for _ in range(n)] for _ in range(2)]
    found = Comparison(('ours', 'peer'), (ours, peer))
    want = torch.quantile(torch.tensor([p / o for o, p in zip(ours, peer, strict=True)], dtype=torch.float64),
                          torch.tensor([.25, .5, .75], dtype=torch.float64)).tolist()
    assert found.quartiles == pytest.approx(want) and found.ratio == pytest.approx(want[1])
    assert json.loads(json.dumps(found.to_dict()))['ratio'] == found.ratio
    assert f'**{found.ratio:.2f}**' in found._repr_markdown_()


@pytest.mark.parametrize('names', [(), ('a',), ('a', 'b', 'c')])
def test_two_contenders(names):
    with pytest.raises(ValueError, match=f'two contenders, not {len(names)}'): compare({n: int for n in names})


@pytest.mark.parametrize('x, text', [
    (0, '0 '), (1, '1.00 '), (999.96, '1.00 k'), (999, '999 '), (1234, '1.23 k'), (1.5e12, '1.50 T'), (2e-6, '2.00 µ'), (3e-10, '3e-10 ')])
def test_prefixes(x, text): assert si(x) == text


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the peak cannot be reset elsewhere')
@pytest.mark.parametrize('mib', [32, 128])
def test_peak_memory_of_the_cpu(mib):
    rise = peak_bytes(lambda: torch.ones(mib * 2**18).sum())
    assert .95 * mib < rise / 2**20 < mib + 16
    assert peak_bytes(lambda: None) < 4 * 2**20


def test_rates_on_a_known_clock():
    assert best_rate(500, lambda: None, clock=fixed()) == pytest.approx(500e3)
    assert gemm_rate(n=32, clock=fixed()) == pytest.approx(2 * 32**3 * 1e3)
    assert bandwidth(rows=64, clock=fixed()) == pytest.approx(dict(read=64 * 64 * 4e3, copy=64 * 64 * 8e3))
    assert all(w.seconds == pytest.approx(1e-3) for w in operations(d=16, n=4, clock=fixed()))


def test_machine_is_stored_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = dict(clock=fixed(), n=16, rows=16)
    machine(**options)
    assert not list(tmp_path.iterdir())
    first = machine('sub/machine.json', **options)
    assert [p.name for p in (tmp_path/'sub').iterdir()] == ['machine.json']
    assert machine('sub/machine.json') == first and first.hardware['threads'] == torch.get_num_threads()
    assert 'float32 matrix product' in first._repr_markdown_()


def test_records(tmp_path):
    path = tmp_path/'deep'/'x.json'
    save_result(path, make_record('x', dict(a=Comparison(('o', 'p'), ([1.], [2.])), b=[Work('w', 1, 2)]), 'numpy', 'absent-package'))
    found = load_result('x', path.parent)
    assert found['result']['a']['ratio'] == 2 and found['result']['b'][0]['name'] == 'w'
    assert set(found['versions']) == {'python', 'torch', 'numpy'} and len(found['date']) == 10
    with pytest.raises(FileNotFoundError, match='y.json is missing: deepseek-nb bench y --out'): load_result('y', path.parent)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path/'x.json'
    save_result(path, dict(a=1))
    with pytest.raises(TypeError): save_result(path, dict(a=object()))
    assert json.loads(path.read_text()) == dict(a=1) and os.listdir(tmp_path) == ['x.json']


@pytest.mark.parametrize('flops, size, least, binds', [(100, 1, 1., 'arithmetic'), (1, 20, 2., 'memory'), (100, 10, 1., 'memory')])
def test_bound(flops, size, least, binds):
    host = Machine({'float32': 100.}, 10., 10.)
    assert bound(host, Work('w', flops, size)) == (least, binds)


def test_an_interrupted_benchmark_goes_on(registry, tmp_path):
    "With the parts that are there, unless they are of other options; a complete run leaves only its record"
    asked = []
    def slow(n=3, keep=lambda name, make: make()):
        "Squares"
        def square(i):
            asked.append(i)
            if len(asked) == 3: raise KeyboardInterrupt
            return i*i
        return [keep(str(i), lambda i=i: square(i)) for i in range(n)]
    registry['slow'] = bench.Benchmark(slow)
    out = tmp_path/'slow.json'
    with pytest.raises(KeyboardInterrupt): run_command('slow', out=str(out))
    kept = (tmp_path/'slow.json.parts').read_bytes()
    run_command('slow', out=str(out))
    assert asked == [0, 1, 2, 2] and load_result('slow', tmp_path)['result'] == [0, 1, 4] and [*tmp_path.iterdir()] == [out]
    (tmp_path/'slow.json.parts').write_bytes(kept)
    run_command('slow', out=str(out), n=2)
    assert asked[4:] == [0, 1]


def test_command(registry, tmp_path, capsys):
    def toy():
        "A toy"
        return Comparison(('ours', 'peer'), ([1.], [2.]))
    registry['toy'] = bench.Benchmark(toy, ('numpy',))
    run_command()
    assert 'toy              A toy' in capsys.readouterr().out
    run_command('toy', out=tmp_path/'toy.json')
    assert 'peer / ours: **2.00**' in capsys.readouterr().out
    run_command('toy', as_json=True)
    assert json.loads(capsys.readouterr().out)['result'] == load_result('toy', tmp_path)['result']
    with pytest.raises(KeyError, match="no benchmark 'absent': there are machine, roofline, toy"): run_command('absent')
    with pytest.raises(KeyError, match='no benchmark'): run_benchmark('absent')


def test_the_verb_runs_a_benchmark():
    code = 'from deepseek_nb.tools.cli import main; raise SystemExit(main(["bench", "absent"]))'
    done = warm.run('-c', code)
    assert done.returncode == 2 and "no benchmark 'absent'" in done.stderr and 'moe-decode' in done.stderr


def test_every_benchmark_is_a_function_that_says_what_it_measures():
    for name, b in bench.BENCHMARKS.items(): assert callable(b.load()) and b.load().__doc__, name


def test_results_have_a_benchmark():
    stored = {p.stem for p in (Path(__file__).parent.parent/'nbs'/'results').glob('*.json')}
    assert stored <= {*bench.BENCHMARKS}


def test_no_part_below_measures():
    root = Path(bench.__file__).parents[1]
    for part in ('core', 'arch', 'files', 'quant', 'infer', 'cuda', 'train', 'eval'):
        for path in (root/part).glob('*.py'): assert not re.search(r'^from \.+bench', path.read_text(), re.M), path


def test_benchmarks_of_later_chapters_are_found(capsys):
    run_command()
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {'moe-decode', 'import-time', 'load-smollm2', 'dispatch', 'machine'} <= names


def test_contenders_are_equal_before_they_are_timed(monkeypatch):
    pytest.importorskip('transformers')
    from deepseek_nb.bench import models
    from deepseek_nb.bench.limits import BENCH_MOE
    from deepseek_nb.bench.models import pair
    shape = BENCH_MOE | dict(vocab_size=64, hidden_size=64, num_hidden_layers=2, intermediate_size=96, moe_intermediate_size=32)
    found = models.moe_decode(cached=20, repeats=2, shape=shape)
    assert found.names == ('deepseek_nb', 'transformers') and len(found.ratios) == 2
    a, b = pair(shape, seed=1)[0], pair(shape, seed=2)[1]
    monkeypatch.setattr(models, 'pair', lambda shape, seed: (a, b))
    with pytest.raises(ValueError, match='nothing was timed'): models.moe_decode(cached=20, repeats=2, shape=shape)


def test_fresh_imports_are_timed():
    from deepseek_nb.bench.models import import_seconds
    assert 0 < import_seconds('import decimal') < 30


def test_stored_results_say_where_they_come_from():
    for path in (Path(__file__).parent.parent/'nbs'/'results').glob('*.json'):
        found = json.loads(path.read_text())
        assert {'name', 'date', 'hardware', 'versions', 'result'} <= set(found), path.name
        assert found['name'] == path.stem and found['hardware']['cpu'] and found['versions']['torch']


def test_import_is_light():
    code = "import sys, deepseek_nb.bench; print([m for m in ('matplotlib', 'transformers', 'torch._dynamo') if m in sys.modules])"
    assert warm.run('-c', code).stdout.strip() == '[]'


# ---- the cache benchmark

WIDTHS = dict(vocab_size=64, dim=32, n_layers=2, n_heads=4, inter_dim=64)
LATENT = dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
CACHED = dict(gqa=Config('llama', **WIDTHS, n_kv_heads=2, head_dim=8), mla=Config('deepseek_v3', **WIDTHS, **LATENT))


@pytest.mark.parametrize('config', CACHED.values(), ids=CACHED.keys())
@pytest.mark.parametrize('s, n', [(1, 1), (1, 9), (7, 5), (40, 3)])
def test_with_and_without_a_cache(config, s, n):
    torch.manual_seed(s)
    model, ids = Model(config, dtype=torch.float32, device='cpu'), torch.randint(64, (2, s))
    a, b = caches.with_cache(model, ids, n), caches.without_cache(model, ids, n)
    assert a.shape == (2, n) and a.tolist() == b.tolist() == model.generate(ids, n)[:, s:].tolist()


def test_unequal_tokens_are_not_timed(monkeypatch):
    model = Model(CACHED['gqa'], dtype=torch.float32, device='cpu')
    assert caches.cache_or_recompute(8, 4, 2, model).names == ('cached', 'recomputed')
    monkeypatch.setattr(caches, 'without_cache', lambda model, ids, n: caches.with_cache(model, ids, n) + 1)
    with pytest.raises(ValueError, match='greedy tokens differ.*nothing was timed'): caches.cache_or_recompute(8, 4, 1, model)

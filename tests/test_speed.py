"Benchmarks of speed on tiny shapes: counts, limits, tables, JSON, slopes, and that nothing wrong is timed."
import json
import random
import re
from functools import reduce
from itertools import count
from operator import xor
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek_nb import Config, Model, bench
from deepseek_nb.arch.attention import causal_mask
from deepseek_nb.bench import BENCHMARKS, Comparison, Machine, Work, find_benchmark, limits, run_command
from deepseek_nb.bench import models as speed
from deepseek_nb.bench import models as speed_models
from deepseek_nb.bench.limits import (
    BENCH_MOE,
    Case,
    Speed,
    attention_work,
    better,
    ceilings,
    ffn_work,
    fold_words,
    forward_work,
    least,
    pairs,
    read_kernels,
    selected_experts,
    speed_of,
    train_work,
)
from deepseek_nb.bench.models import Scaling, Sweep, pair, scaling_of, slope
from deepseek_nb.core.dispatch import use
from deepseek_nb.core.lazy import find_chapter
from deepseek_nb.tools import cli

RESULTS = Path(__file__).parents[1]/'nbs'/'results'
TINY = BENCH_MOE | dict(vocab_size=64, hidden_size=64, num_hidden_layers=3, intermediate_size=96, moe_intermediate_size=32)
HOST = Machine({'float32': 4e11}, 4e10, 3e10, hardware=dict(cpu='a processor', instructions='AVX2'))
NAMES = ('moe-layer', 'attention', 'prefill', 'decode', 'batch-decode', 'train-step', 'smollm2-prefill', 'smollm2-decode')

SIZES = dict(vocab_size=64, dim=32, n_layers=3, n_heads=4, inter_dim=48)
MLA = dict(kv_lora_rank=16, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10)
MOE = dict(n_dense_layers=1, n_routed_experts=8, n_shared_experts=2, n_activated_experts=3, moe_inter_dim=24)
CONFIGS = {
    'gqa': Config('llama', **SIZES, n_kv_heads=2, head_dim=8),
    'gqa, tied, biased': Config('qwen2', **SIZES, n_kv_heads=1, head_dim=6, tie_embeddings=True, attn_bias=True),
    'mha, experts': Config('deepseek', **SIZES, n_kv_heads=4, head_dim=8, **MOE),
    'mla, no query latent': Config('deepseek_v2', **SIZES, **MLA, **MOE | dict(n_shared_experts=0)),
    'mla': Config('deepseek_v3', **SIZES, **MLA, q_lora_rank=20, **MOE, score_func='sigmoid', score_bias=True, norm_topk=True),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request): return request.param


def model_of(c):
    torch.manual_seed(0)
    return Model(c, dtype=torch.float32, device='cpu').eval()


def counted(f):
    "FLOPs of the products that really happen, in the readable definitions, which compute the whole matrix of scores"
    with use('reference'), FlopCounterMode(display=False) as counter: f()
    return counter.get_total_flops()


def dense_scores(c, s, past=0):
    "FLOPs on pairs that a causal kernel leaves out, in one row"
    width = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim if c.mla else 2*c.head_dim
    return c.n_layers*2*c.n_heads*width*(s*(past + s) - pairs(s, past))


# ---- counts

@pytest.mark.parametrize('s, past', [(1, 0), (1, 9), (5, 0), (7, 4), (16, 16)])
def test_pairs(s, past): assert pairs(s, past) == causal_mask(s, past + s).sum().item()


def test_bytes_are_those_of_the_weights_and_the_cache(config):
    model = model_of(config)
    held = sum(p.numel() for p in model.parameters()) + sum(b.numel() for n, b in model.named_buffers() if n.endswith('bias'))
    rows = 0 if config.tie_embeddings else config.dim*(1 - config.vocab_size)
    assert forward_work(config, 1, experts=config.n_routed_experts).bytes == 4*(held + rows) + config.cache_bytes_per_token(4)
    a, b = (forward_work(config, 1, past, 3, experts=2, itemsize=2).bytes for past in (10, 110))
    assert b - a == 3*100*config.cache_bytes_per_token(2)


@pytest.mark.parametrize('batch, past', [(1, 1), (1, 40), (3, 17)])
def test_flops_of_a_decode_step(config, batch, past):
    model, tokens = model_of(config), torch.randint(64, (batch, past + 1))
    cache = model.new_cache(batch, past + 1)
    with torch.inference_mode():
        model(tokens[:, :-1], cache=cache)
        real = counted(lambda: model(tokens[:, -1:], cache=cache))
    assert forward_work(config, 1, past, batch).flops == real


@pytest.mark.parametrize('batch, s, keep', [(1, 2, 1), (2, 13, 1), (1, 31, 5)])
def test_flops_of_a_prompt(config, batch, s, keep):
    model, tokens = model_of(config), torch.randint(64, (batch, s))
    with torch.inference_mode(): real = counted(lambda: model(tokens, logits_to_keep=keep, mla='naive'))
    assert forward_work(config, s, batch=batch, keep=keep).flops == real - batch*dense_scores(config, s)


def test_the_cheaper_form_of_latent_attention_counts():
    c, n = CONFIGS['mla'], 50
    some = [attention_work(c, s, n).flops for s in (1, 2, 20, 200)]
    x, v, r, z, h = c.qk_nope_head_dim, c.v_head_dim, c.qk_rope_head_dim, c.kv_lora_rank, c.n_heads
    linear = attention_work(c, 1, 0).flops - 2*h*min(x + r + v, 2*z + r)
    for s, found in zip((1, 2, 20, 200), some, strict=True):
        forms = 2*h*(n*z*(x + v) + pairs(s, n)*(x + r + v)), 2*h*pairs(s, n)*(2*z + r)
        assert found == s*linear + min(forms)


def test_flops_of_a_training_step(config):
    model, s, batch = model_of(config).train(), 9, 2
    tokens = torch.randint(64, (batch, s))
    real = counted(lambda: model(tokens, mla='naive').square().mean().backward())
    forward, adamw = train_work(config, s, batch)
    assert forward.flops == real - 3*batch*dense_scores(config, s)
    assert adamw.bytes == 7*4*config.params()


@pytest.mark.parametrize('n', [1, 2, 7, 40])
def test_selected_experts(n):
    c, draw = CONFIGS['mla'], torch.Generator().manual_seed(n)
    seen = [torch.rand(n, 8, generator=draw).topk(3).indices.unique().numel() for _ in range(3000)]
    assert abs(sum(seen)/len(seen) - selected_experts(c, n)) < .1
    more, fewer = (ffn_work(c, 1, n, experts=v).bytes for v in (8, 3))
    assert more - fewer == 4*5*3*32*24 and ffn_work(c, 0, n).bytes == ffn_work(c, 0, n, 5).bytes


def test_bench_moe_is_as_large_as_it_was():
    "The counts that the issue's limits were computed from"
    c = Config.from_hf(dict(model_type='deepseek_v3') | BENCH_MOE)
    assert round(forward_work(c, 2048, keep=2048).flops/1e9) == 173
    assert round(train_work(c, 256, 8)[0].flops/1e9) in range(405, 409)
    assert round(forward_work(c, 1, 2048, experts=4).bytes/1e6) == round(127.3 + 10.5)
    assert round(forward_work(c, 1, 128, 32).bytes/1e6) in range(545, 570)


# ---- rates and limits

@pytest.mark.parametrize('n', [0, 1, 7, 1000, 65537, 2**18 + 3])
@pytest.mark.parametrize('threads', [1, 2])
def test_every_word_is_read(n, threads):
    if not read_kernels.ready(): pytest.skip('no C++ compiler')
    before, words = torch.get_num_threads(), torch.randint(-2**62, 2**62, (n,))
    torch.set_num_threads(threads)
    try: assert fold_words(words) == reduce(xor, words.tolist(), 0)
    finally: torch.set_num_threads(before)
    for wrong in (words.float(), torch.stack([words, words], 1)[:, 0]):
        if n > 1 or wrong.dtype != torch.int64:
            with pytest.raises(ValueError, match='x must be contiguous int64'): fold_words(wrong)


def test_ceilings_without_a_compiler(monkeypatch):
    monkeypatch.setattr(limits.read_kernels, 'ready', lambda: False)
    ticks = count()
    found = ceilings(clock=lambda: next(ticks)*1e-3, n=16, rows=32)
    assert found.read == pytest.approx(4*32*32/1e-3) and found.flops['float32'] == pytest.approx(2*32**3/1e-3)
    assert better(found, Machine({'float32': 1.}, 1e30, 1.)).read == 1e30
    assert better(found, Machine({'float32': 1.}, 1e30, 1.)).flops == found.flops


@pytest.mark.parametrize('works, expected', [
    ([Work('', 4e11, 1)], (1., 'arithmetic')), ([Work('', 1, 8e10)], (2., 'memory')),
    ([Work('', 4e11, 1), Work('', 1, 8e10)], (3., 'memory')), ([Work('', 12e11, 1), Work('', 1, 8e10)], (5., 'arithmetic'))])
def test_phases_add_up(works, expected):
    seconds, binds = least(HOST, tuple(works))
    assert seconds == pytest.approx(expected[0]) and binds == expected[1]


@pytest.mark.draw(2)
@pytest.mark.parametrize('seed', range(5))
def test_tables_and_json(seed):
    draw = random.Random(seed)
    def work(): return Work('w', draw.uniform(1e6, 1e12), draw.uniform(1e6, 1e10))
    def times(): return Comparison(('deepseek_nb', 'transformers'), tuple(tuple(draw.uniform(1, 2)*k for _ in range(5)) for k in (1, 3)))
    cases = tuple(Case(f'case {i}', tuple(work() for _ in range(draw.randint(1, 2))), times()) for i in range(4))
    found = Speed(HOST, cases)
    plain = json.loads(json.dumps(found.to_dict()))
    assert speed_of(plain) == found
    rows = [line.strip('| ').split(' | ') for line in found._repr_markdown_().splitlines() if line.startswith('| case ')][1:]
    for case, row, p in zip(cases, rows, plain['cases'], strict=True):
        seconds = sum(max(w.flops/4e11, w.bytes/4e10) for w in case.works)
        assert p['limit'] == pytest.approx(seconds) and p['share'] == pytest.approx(seconds/case.times.medians[0])
        assert row[0] == case.name and row[3].startswith(f'**{case.times.ratio:.2f}**') and row[6] == f"{p['share']:.0%}"
        assert float(row[5]) == round(case.times.medians[1]/seconds, 1)
        slowest = max(case.works, key=lambda w: max(w.flops/4e11, w.bytes/4e10))
        assert p['binds'] == ('arithmetic' if slowest.flops/4e11 > slowest.bytes/4e10 else 'memory')
    assert 'a processor, AVX2' in found._repr_markdown_()


# ---- nothing wrong is timed

def test_the_kinder_peer_takes_the_fused_path():
    pytest.importorskip('transformers')
    peer, tokens, ops = pair(TINY)[1], torch.arange(12)[None], {}
    for kind in ('sdpa', speed.pad_values()):
        peer.set_attn_implementation(kind)
        with torch.inference_mode(), torch.profiler.profile() as p: out = peer(tokens).logits
        ops[kind] = {e.key for e in p.key_averages()}, out
    fused = 'aten::_scaled_dot_product_flash_attention_for_cpu'
    assert fused not in ops['sdpa'][0] and fused in ops['sdpa_padded'][0]
    assert (ops['sdpa'][1] - ops['sdpa_padded'][1]).abs().max() < 1e-5


@pytest.mark.parametrize('a, b, said', [
    (torch.ones(2), torch.ones(3), 'shapes differ'), (torch.ones(2), torch.tensor([1., 1.01]), 'outputs differ by 9.9e-03'),
    (torch.tensor([torch.nan, 1.]), torch.ones(2), 'outputs differ by nan'), (torch.tensor([torch.inf]), torch.ones(1), 'by inf'),
    (torch.zeros(2), torch.zeros(2), 'outputs differ by nan'), (torch.tensor([1, 2]), torch.tensor([1, 3]), 'tokens differ')])
def test_disagreement(a, b, said):
    with pytest.raises(ValueError, match=f'{said}.*nothing was timed'): speed.check_same(a, b)


def test_agreement_is_relative():
    x = torch.randn(100)
    speed.check_same(x*1e6, x*1e6 + x.abs().max()*50)
    with pytest.raises(ValueError): speed.check_same(x*1e6, x*1e6 + x.abs().max()*200)
    close = torch.tensor([[1., 1.0001]])
    with pytest.raises(ValueError, match='tokens differ'): speed_models.same_next(speed.Place(), close, close.flip(1))


def test_contenders_are_called_in_step():
    calls = {'ours': [], 'peer': []}
    def tick(who): return lambda: calls[who].append(len(calls[who])) or torch.tensor(len(calls[who]))
    found = speed.contest('x', (), (tick('ours'), tick('peer')), names=dict.fromkeys('abc'), repeats=3, number=4)
    assert [c.times.names for c in found] == [('deepseek_nb', n) for n in 'abc'] and len(found[0].times.ratios) == 3
    assert calls['ours'] == calls['peer'] == list(range(3*(4 + 3*4)))


SMALL = {
    'moe-layer': dict(tokens=(1, 6), shape=TINY),
    'attention': dict(cached=(9, 20), new=(8,), layers=2, shape=TINY),
    'prefill': dict(tokens=(3, 24), shape=TINY),
    'decode': dict(cached=(12, 30), shape=TINY),
    'batch-decode': dict(batches=(2, 3), cached=(12,), shape=TINY),
    'train-step': dict(batch=2, s=12, shape=TINY),
}
DENSE = Config('llama', **SIZES, n_kv_heads=2, head_dim=8, tie_embeddings=True)
SMALL |= {f'smollm2-{n}': {key: (12, 20)} for n, key in (('prefill', 'tokens'), ('decode', 'cached'))}
COUNTS = dict(zip(NAMES, (2, 2*3 + 2, 4, 4, 4, 2, 2, 2), strict=True))


def small(name):
    options = dict(SMALL[name], repeats=2, host=HOST)
    return dict(shape=model_of(DENSE)) | options


@pytest.mark.parametrize('name', NAMES)
def test_each_benchmark(name):
    pytest.importorskip('transformers')
    found = find_benchmark(name)(**small(name))
    assert len(found.cases) == COUNTS[name] and found.host == HOST
    for c in found.cases:
        assert c.times.names[0] == 'deepseek_nb' and len(c.times.ratios) == 2 and min(map(min, c.times.seconds)) > 0
        assert all(w.flops > 0 and w.bytes > 0 for w in c.works)
    plain = json.loads(json.dumps(found.to_dict()))
    assert json.loads(json.dumps(speed_of(plain).to_dict())) == plain
    assert found._repr_markdown_().count('\n| ') == COUNTS[name]


@pytest.mark.parametrize('name', NAMES)
def test_each_benchmark_in_half_precision(name):
    "On the CPU, as a stand-in for a GPU: same code, other precision"
    pytest.importorskip('transformers')
    host = Machine({'bfloat16': 4e11}, 4e10, 3e10)
    options = small(name) | dict(host=host, repeats=1)
    if isinstance(options['shape'], Model): options['shape'] = options['shape'].to(torch.bfloat16)
    found = find_benchmark(name)(**options, dtype='bfloat16')
    assert len(found.cases) == COUNTS[name] and found.dtype == 'bfloat16'
    full, half = find_benchmark(name)(**small(name) | dict(repeats=1)).cases[0].works, found.cases[0].works
    assert half[0].flops == full[0].flops and .4 < half[0].bytes/full[0].bytes < .6


@pytest.mark.parametrize('name', NAMES)
def test_a_wrong_result_is_not_timed(name, monkeypatch):
    pytest.importorskip('transformers')
    def untimed(*args, **options): raise AssertionError('timed')
    monkeypatch.setattr(speed, 'compare', untimed)
    def unlike(source, **place):
        other = source if isinstance(source, dict) else Model(DENSE, 'float32', 'cpu')
        return pair(other, 1)[0], pair(source, 2)[1]
    monkeypatch.setattr(speed, 'pair', unlike)
    with pytest.raises(ValueError, match='nothing was timed'): find_benchmark(name)(**small(name))


def test_visits_are_the_routers():
    pytest.importorskip('transformers')
    peer, tokens = pair(TINY)[1], torch.arange(5)[None]
    seen = []
    def note(router, args, out): seen.append(len(set(out[2].flatten().tolist())))
    for layer in peer.model.layers[1:]: layer.mlp.gate.register_forward_hook(note)
    assert speed.count_experts(peer, lambda: peer(tokens)) == sum(seen)/2 and len(seen) == 2
    assert speed.count_experts(peer.lm_head, lambda: peer(tokens)) is None
    assert [len(layer.mlp.gate._forward_hooks) for layer in peer.model.layers[1:]] == [1, 1]


@pytest.mark.parametrize('t', [1, 5, 33])
@pytest.mark.parametrize('heads', [1, 8])
def test_fused_attention_in_the_latent(t, heads):
    q, z = torch.randn(2, heads, 1, 24, dtype=torch.float64), torch.randn(2, t, 24, dtype=torch.float64)
    weights = (torch.einsum('bhsx,btx->bhst', q, z)*.3).softmax(-1)
    assert (speed.latent_sdpa(q, z, 16, .3) - weights@z[:, None, :, :16]).abs().max() < 1e-12


# ---- scaling

@pytest.mark.parametrize('power', [-1., 0., .5, 1., 2., 3.])
def test_slopes(power):
    xs = tuple(2**i for i in range(3, 9))
    assert slope(xs, tuple(7e-6*x**power for x in xs), random.Random(int(power)).choice((2, 3, 6))) == pytest.approx(power)


def test_slopes_by_theory():
    "At full size, with the counts alone"
    c = limits.bench_config()
    time = lambda works: tuple(least(HOST, (w,))[0] for w in works)
    context, tokens, experts = (8192, 16384, 32768), (256, 1024, 4096), (64, 128, 256)
    assert slope(context, time(attention_work(c, s) for s in context)) == pytest.approx(2, abs=.1)
    assert slope(context, time(attention_work(c, 1, t) for t in context)) == pytest.approx(1, abs=.3)
    assert slope(tokens, time(ffn_work(c, 7, n) for n in tokens)) == pytest.approx(1, abs=.2)
    many = [limits.bench_config(n_routed_experts=e) for e in experts]
    assert slope(experts, time(ffn_work(m, 7, 256) for m in many)) == pytest.approx(1, abs=.1)
    assert slope(experts, time(ffn_work(m, 7, 4096) for m in many)) == pytest.approx(0, abs=.05)


def test_the_whole_of_scaling():
    found = speed_models.measure_scaling(HOST, top=256, **{k: v for k, v in TINY.items() if v != BENCH_MOE[k]})
    assert [s.axis for s in found.sweeps] == ['tokens', 'experts', 'experts', 'batch', *['context (tokens)']*3]
    assert all(len(s.xs) == len(s.measured) == len(s.theory) >= 3 and min(s.measured + s.theory) > 0 for s in found.sweeps)
    assert scaling_of(json.loads(json.dumps(found.to_dict()))) == found
    assert found._repr_markdown_().count('\n| ') == 7


# ---- pictures, commands, the page

def test_pictures():
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    case = Case('c', (Work('w', 1e9, 1e8),), Comparison(('ours', 'peer'), ((1.,), (2.,))))
    limits.plot_speeds({'one': Speed(HOST, (case, case)), 'two': Speed(HOST, (case,))})
    ax = plt.gca()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ['one', 'two'] and len(ax.lines) == 2*3 + 1
    assert max(ax.lines[-1].get_ydata()) == 400 and {line.get_ydata()[0] for line in ax.lines[:-1]} == {1., .5}
    Scaling(HOST, (Sweep('a', 'x', (1, 2, 4), (1., 2., 4.), (1., 2., 4.)),)*3).plot()
    assert len(plt.gcf().axes) == 4
    plt.close('all')


def test_the_command(monkeypatch, tmp_path, capsys):
    case = Case('c', (Work('w', 1e9, 1e8),), Comparison(('deepseek_nb', 'transformers'), ((1.,), (2.,))))
    monkeypatch.setitem(BENCHMARKS, 'toy', bench.Benchmark(speed.speed(lambda place: [case])))
    monkeypatch.setattr(speed, 'ceilings', lambda kind, device: HOST)
    assert cli.main(['bench', 'toy', '--json', '--out', str(tmp_path/'toy.json'), '--plot', str(tmp_path/'toy.svg')]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path/'toy.json').read_text()) and shown['result']['cases'][0]['times']['ratio'] == 2
    assert '<svg' in (tmp_path/'toy.svg').read_text()
    assert cli.main(['bench', 'toy']) == 0 and '| **2.00** (2.00 to 2.00) |' in capsys.readouterr().out
    monkeypatch.setitem(BENCHMARKS, 'list', bench.Benchmark(lambda: [1]))
    assert cli.main(['bench', 'list', '--plot', str(tmp_path/'no.svg')]) == 2 and 'a list has no plot' in capsys.readouterr().err


def test_every_benchmark_is_listed(capsys):
    run_command()
    assert {*NAMES, 'scaling'} <= {line.split()[0] for line in capsys.readouterr().out.splitlines()}


def outputs(notebook):
    cells = json.loads(find_chapter(RESULTS.parent, notebook).read_text(encoding='utf-8'))['cells']
    return [''.join(o['data']['text/markdown']) for c in cells for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]


@pytest.mark.parametrize('name', [*NAMES, 'scaling'])
def test_the_page_shows_what_was_stored(name):
    if not (RESULTS/f'{name}.json').exists(): pytest.skip(f'{name} was not measured yet')
    record = json.loads((RESULTS/f'{name}.json').read_text())
    read = scaling_of if name == 'scaling' else speed_of
    pages = {'moe-layer': 'bench.models', 'attention': 'bench.models'}
    page = pages.get(name, 'bench.models')
    found = read(record['result'])
    assert json.loads(json.dumps(found.to_dict())) == record['result'], f'{name}.json contradicts itself: measure again'
    assert found._repr_markdown_() in outputs(page), f'{page} is stale: run it and store its outputs'
    assert record['hardware']['cpu'] and record['versions']['torch']


def test_no_speed_is_claimed_for_a_gpu():
    for page in ('bench.models', 'bench.models'):
        text = json.loads(find_chapter(RESULTS.parent, page).read_text(encoding='utf-8'))
        assert re.search('[Nn]othing here has been measured on a GPU yet', ''.join(''.join(c['source']) for c in text['cells']))

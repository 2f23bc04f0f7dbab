"C++ kernels against float64 at ragged shapes, instruction sets and thread counts, under sanitizers; and how they are built."
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from torch.library import opcheck

from deepseek_nb.arch.model import Model
from deepseek_nb.arch.moe import run_experts
from deepseek_nb.arch.routing import route
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.kernels import build, gemm, moe, plan

needs_compiler = pytest.mark.skipif(not any(shutil.which(n) for n in ('c++', 'g++', 'clang++')), reason='no C++ compiler')
pytestmark = needs_compiler
HERE = Path(__file__).parent
SEED = int(os.environ.get('SEED', random.randrange(10**6)))
BOUND = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


def close(got, exact, dtype, what, limit=None):
    "Within a bound of the largest value; where sums cancel, every value within the limit that arithmetic sets"
    got, exact = got.double(), exact.double()
    assert got.isnan().equal(exact.isnan()), f'NaN differ in {what}, seed {SEED}'
    if not (finite := exact.isfinite()).any(): return
    error = ((got - exact)[finite].abs().max() / exact[finite].abs().max().clamp(min=1e-9)).item()
    within = error < BOUND[dtype] or limit is not None and ((got - exact).abs() <= limit).all()
    assert within, f'{what}: {error:.1e} of the largest value, seed {SEED}'


def draw(*shape, dtype=torch.float32, scale=1., ragged=True):
    "Random numbers, sometimes in memory that isn't contiguous"
    x = (torch.randn(*shape) * scale).to(dtype)
    return torch.cat([x, x], -1)[..., :shape[-1]] if ragged and random.random() < .3 else x


def sweep_linear(rounds):
    for _ in range(rounds):
        n, d, w, dtype = random.randint(1, 70), random.randint(1, 300), random.randint(1, 200), random.choice(list(BOUND))
        x, m = draw(n, d, dtype=dtype), draw(w, d, dtype=dtype)
        close(gemm.linear_cpp(x, m), x.double() @ m.double().T, dtype, f'linear {n, d, w, dtype}')


def expert_limit(x, weights, experts, gate_up, down, dtype):
    "A sum of n products is off by at most n roundings of the sum of magnitudes (Higham, 3.5); SiLU is at most its argument, its slope 1.1"
    x, weights, gate_up, down = (t.double().abs() for t in (x, weights, gate_up, down))
    gate, up = torch.einsum('nd,nkfd->nkf', x, gate_up[experts]).chunk(2, -1)
    size = torch.einsum('nk,nkf,nkdf->nd', weights, gate*up, down[experts])
    n = 2.1*x.shape[-1] + down.shape[-1] + weights.shape[-1] + 8
    return size*(n*2**-24 + (5*2**-8 if dtype == torch.bfloat16 else 0))


def sweep_experts(rounds):
    for i in range(rounds):
        n, e, dtype = random.choice([1, 2, 7, 13, 40, random.randint(1, 300)]), random.randint(1, 12), random.choice(list(BOUND))
        d, f, k = random.randint(1, 90), random.randint(1, 90), random.randint(1, min(e, 5))
        experts = torch.rand(n, e).topk(k).indices if i % 4 else torch.full((n, k), random.randrange(e))
        x, weights = draw(n, d, dtype=dtype), draw(n, k)
        gate_up, down = draw(e, 2 * f, d, dtype=dtype, scale=.3), draw(e, d, f, dtype=dtype, scale=.3)
        exact = run_experts.op.reference(*(t.double() if t.is_floating_point() else t for t in (x, weights, experts, gate_up, down)))
        limit = expert_limit(x, weights, experts, gate_up, down, dtype)
        close(moe.experts_cpp(x, weights, experts, gate_up, down), exact, dtype, f'experts {n, d, f, e, k, dtype}', limit)


def test_the_limit_of_experts_is_kept_and_finds_errors():
    seen = 0
    for _ in range(200):
        x, weights, experts = draw(1, 79), draw(1, 1), torch.zeros(1, 1, dtype=torch.long)
        gate_up, down = draw(1, 2, 79, scale=.3), draw(1, 79, 1, scale=.3)
        args = x, weights, experts, gate_up, down
        exact = run_experts.op.reference(*(t.double() if t.is_floating_point() else t for t in args))
        close(moe.experts_cpp(*args), exact, torch.float32, 'one neuron', expert_limit(*args, torch.float32))
        wrong = moe.experts_cpp(x, weights, experts, gate_up.roll(1, -1), down)
        try: close(wrong, exact, torch.float32, 'channels moved', expert_limit(*args, torch.float32))
        except AssertionError: seen += 1
    assert seen > 180 # SiLU hides an error where both arguments are far below 0


def router(e, g, **kw):
    return replace(TOY, n_routed_experts=e, n_expert_groups=g, **kw)


def sweep_route(rounds):
    for _ in range(rounds):
        g = random.choice([1, 2, 4])
        per = random.randint(2, 20)
        keep, how = random.randint(1, g), random.choice(['max', 'sum2'])
        k = random.randint(1, keep * per)
        c = router(g * per, g, n_limited_groups=keep, group_score=how, n_activated_experts=k, norm_topk=random.random() < .5,
                   score_func=random.choice(['softmax', 'sigmoid', 'sqrtsoftplus']), route_scale=random.choice([1., 2.5]))
        logits, bias = draw(random.randint(1, 50), g * per), random.choice([None, .3 * torch.randn(g * per)])
        a, b = moe.routing(logits, c, bias), route.op.reference(logits, c, bias)
        dense = [torch.zeros_like(r.scores).scatter(1, r.experts, r.weights) for r in (a, b)]
        close(*dense, torch.float32, f'route {g, per, keep, how, k}')
        close(a.scores, b.scores, torch.float32, 'scores')


TOY = Config(
    'deepseek_v3', vocab_size=64, dim=40, n_layers=2, n_heads=3, inter_dim=56, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12,
    qk_rope_head_dim=6, v_head_dim=10, n_dense_layers=1, n_routed_experts=8, n_shared_experts=1, n_activated_experts=3, moe_inter_dim=20,
    n_expert_groups=4, n_limited_groups=2, score_func='sigmoid', score_bias=True, group_score='sum2', norm_topk=True, route_scale=2.5,
    max_positions=512, rope=Rope(interleaved=True))
QWEN = Config('qwen2', vocab_size=64, dim=36, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=10, inter_dim=44, attn_bias=True,
              max_positions=512)


def random_config():
    if random.random() < .4:
        g, per = random.randint(1, 3), random.randint(1, 4)
        return replace(QWEN, n_kv_heads=g, n_heads=g * per, head_dim=2 * random.randint(1, 20), dim=random.randint(5, 90),
                       inter_dim=random.randint(3, 80), attn_bias=random.random() < .5)
    return replace(TOY, n_heads=random.randint(1, 9), q_lora_rank=random.choice([0, 17, 32]), kv_lora_rank=random.randint(3, 70),
                   qk_nope_head_dim=random.randint(1, 40), qk_rope_head_dim=2 * random.randint(1, 12), v_head_dim=random.randint(1, 40),
                   dim=random.randint(5, 90), moe_inter_dim=random.randint(3, 40), n_shared_experts=random.choice([0, 1, 2]))


@torch.no_grad()
def steps(model, tokens, mask, chunks):
    cache, at, found = model.new_cache(len(tokens)), 0, []
    for s in chunks:
        found.append(model(tokens[:, at:at + s], cache, attention_mask=mask if at == 0 else None))
        at += s
    return torch.cat(found, 1)


def sweep_steps(rounds):
    for _ in range(rounds):
        c, b = random_config(), random.choice([1, 1, 2, 5, 20])
        model = Model(c, dtype=torch.float32, device='cpu').init_weights(.3)
        chunks = [random.randint(1, max(1, 60 // b)), 1, 1, random.randint(1, max(1, 40 // b)), 1]
        tokens = torch.randint(64, (b, sum(chunks)))
        mask = (torch.arange(chunks[0]) >= torch.randint(chunks[0], (b, 1))).long()
        with use('reference'):
            twin = Model(c, dtype=torch.float64, device='cpu')
            twin.load_state_dict(model.state_dict())
            exact = steps(twin, tokens, mask, chunks)
        got = steps(model, tokens, mask, chunks)
        seen = torch.cat([mask.bool(), torch.ones(b, sum(chunks[1:]), dtype=torch.bool)], 1)
        error = ((got - exact)[seen].abs().max() / exact[seen].abs().max()).item()
        assert error < 1e-3, f'{c}, batch {b}, chunks {chunks}: {error:.1e}, seed {SEED}'


def sweep(rounds=12):
    "Everything once, with fresh numbers"
    random.seed(SEED)
    torch.manual_seed(SEED)
    for f in (sweep_linear, sweep_experts, sweep_route, sweep_steps): f(rounds)


def test_kernels_equal_float64():
    print('seed', SEED)
    sweep(25)


def run(code, **env):
    env = {k: v for k, v in {**os.environ, 'SEED': str(SEED), **env}.items() if v is not None}
    if 'LD_PRELOAD' not in env: return warm.run('-c', code, env=env, cwd=HERE)
    return subprocess.run([sys.executable, '-c', warm.ALONE + code], capture_output=True, text=True, env=env, cwd=HERE, timeout=600)


@pytest.mark.draw(1, group='instruction sets')
def test_narrower_instruction_sets(isa):
    if isa not in build.ARCHITECTURES.get(os.uname().machine, {}): pytest.skip(f'{os.uname().machine} has no {isa}')
    done = run('import test_kernels as t; t.sweep(6)', **warm.built_for(isa))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize('threads', [1, 3])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try: sweep(6)
    finally: torch.set_num_threads(before)


@pytest.mark.draw(1, group='sanitizers')
@pytest.mark.parametrize('module', ['test_kernels', 'test_kernels_attention'])
def test_clean_under_sanitizers(module):
    if not (under := warm.sanitized()): pytest.skip('this compiler has no AddressSanitizer')
    done = run(f'import {module} as t; t.sweep(3)', **under, OMP_NUM_THREADS='2')
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize('right, wrong, sign', [('i < x.numel()', 'i <= x.numel()', 'heap-buffer-overflow'),
                                                ('float(a) *', 'float(1 << (i + 32)) *', 'AddressSanitizer: ILL')])
def test_sanitizers_see_a_mistake(right, wrong, sign):
    "An element beyond the memory, and a shift beyond the width of the number"
    if not (under := warm.sanitized()): pytest.skip('this compiler has no AddressSanitizer')
    code = f'''
import torch
from deepseek_nb.core import nbproc
from deepseek_nb.kernels.build import load_kernel
text = nbproc.source_text('axpy.cpp')
assert {right!r} in text
nbproc._session['axpy.cpp'] = {{0: text.replace({right!r}, {wrong!r})}}
load_kernel('axpy.cpp').axpy(1., torch.ones(16), torch.ones(16))'''
    done = run(code, **under)
    assert done.returncode and sign in done.stderr, done.stderr[-3000:]


BUILD = 'from deepseek_nb.kernels.simd import thread_shares; assert thread_shares(4, 50).min() == 0; print("built")'


def test_two_processes_build_at_once(tmp_path):
    env = {**os.environ, 'DEEPSEEK_NB_CACHE': str(tmp_path), 'DEEPSEEK_NB_PRECOMPILE': ''}
    both = [warm.start('-c', BUILD, env=env) for _ in range(2)]
    for p in both:
        out, err = p.communicate(timeout=300)
        assert out == 'built\n', err
    assert [p.suffix for p in (tmp_path/'kernels').iterdir()] == ['.so']


def test_another_processor_gets_another_library(monkeypatch, tmp_path):
    monkeypatch.setenv('DEEPSEEK_NB_CACHE', str(tmp_path))
    files, compiler = {'a.cpp': 'int a();'}, build.find_compiler('cpp')
    here = build.build_key(files, compiler)
    monkeypatch.setattr(build, 'processor', lambda: 'Linux x86_64 another')
    assert build.build_key(files, compiler) != here


def test_without_a_compiler(tmp_path):
    code = '''
import warnings, torch
from deepseek_nb import Model
from test_kernels import TOY
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter('always')
    Model(TOY, dtype=torch.float32, device='cpu').generate(torch.tensor([[1, 2, 3]]), 3)
found = [str(w.message) for w in said if 'compiler' in str(w.message)]
assert found and len(found) == len(set(found)), said
print(found[0])'''
    done = run(code, PATH=str(tmp_path), CXX=None, CUDA_HOME=None)
    assert done.returncode == 0, done.stderr
    assert 'no C++ compiler' in done.stdout


def test_without_triton():
    code = '''
import sys
sys.modules['triton'] = None
import test_kernels as t
from deepseek_nb import kernels
kernels.twins()
t.sweep(2)'''
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]


def test_importing_builds_nothing(tmp_path):
    done = run('import deepseek_nb.kernels as k; from deepseek_nb import Model', DEEPSEEK_NB_CACHE=str(tmp_path))
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr


def test_broken_source_is_one_line(monkeypatch):
    from deepseek_nb.core import nbproc
    monkeypatch.setitem(nbproc._session, 'broken.cpp', {0: 'int f() { return x; }'})
    with pytest.raises(ValueError, match="broken.cpp does not compile: .*'x' was not declared|broken.cpp does not compile: .*undeclared"
                       "|broken.cpp does not compile: .*‘x’ was not declared"): build.build_kernel('broken.cpp')


def test_operators_declare_what_they_do():
    x, w, y = torch.randn(3, 8), torch.randn(5, 8), torch.empty(3, 5)
    opcheck(gemm.gemm_kernels.load().linear, (x, w, y))
    gate_up, down, experts = torch.randn(4, 12, 8), torch.randn(4, 8, 6), torch.tensor([[0, 1], [2, 3], [1, 1]])
    opcheck(moe.moe_kernels.load().experts, (x, torch.rand(3, 2), experts, gate_up, down, torch.empty(3, 8)))
    chosen = torch.empty(3, 2)
    opcheck(moe.moe_kernels.routing, (torch.randn(3, 8), None, [2, 1, 1, 1, 1], 2.5, chosen, chosen.long(), torch.empty(3, 8)))
    found = plan.feed_plan(Model(QWEN, dtype=torch.float32, device='cpu').layers[0])
    rest = found.table, found.single, found.sizes, found.numbers, torch.empty(1, 2, 36)
    opcheck(plan.step_kernels().load().feed, (torch.randn(1, 2, 36), *rest))


def test_whole_graph():
    gate_up, down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)

    def layer(x, weights, experts): return gemm.linear(run_experts(x, weights, experts, gate_up, down), gate_up[0])
    args = torch.randn(3, 8), torch.rand(3, 2), torch.tensor([[0, 1], [2, 3], [1, 1]])
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend='aot_eager')(*args)  # what Inductor makes of a model: test_compile.py
        torch.testing.assert_close(compiled, layer(*args))
    with torch.inference_mode(): torch.testing.assert_close(layer(*args), compiled)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_nan_and_infinity_propagate(value):
    torch.manual_seed(0)
    x, weights, experts = torch.randn(20, 30), torch.rand(20, 2), torch.rand(20, 4).topk(2).indices
    gate_up, down = torch.randn(4, 20, 30) * .2, torch.randn(4, 30, 10) * .2
    x[7, 11] = value
    a, b = (f(x, weights, experts, gate_up, down) for f in (moe.experts_cpp, run_experts.op.reference))
    assert a.isnan().equal(b.isnan()) and a[7].isnan().any()
    close(a, b, torch.float32, f'{value}')
    w = torch.randn(9, 30)
    close(gemm.linear_cpp(x, w), x @ w.T, torch.float32, f'{value}')


@pytest.mark.parametrize('e', [5, 16, 33, 70])
def test_equal_infinite_and_nan_affinities_are_chosen_in_order(e):
    "NaN before all, then the largest, the first one of equals"
    special = torch.tensor([float('nan'), float('inf'), -float('inf'), -0., 0., 1., -1., 2.])
    logits, k = special[torch.randint(8, (60, e))], min(e, 9)
    r = moe.routing(logits, router(e, 1, n_limited_groups=1, n_activated_experts=k, norm_topk=False), None)
    assert r.scores.isnan().equal(logits.isnan())
    for s, chosen in zip(r.scores.tolist(), r.experts.tolist(), strict=True):
        assert chosen == sorted(range(e), key=lambda i: (s[i] == s[i], -s[i] if s[i] == s[i] else 0, i))[:k]


def test_wrong_arguments_are_named():
    x, weights, experts = torch.randn(2, 8), torch.rand(2, 2), torch.zeros(2, 2).long()
    gate_up, down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    for name, args in dict(x=(x[:, :5], weights, experts, gate_up, down), experts=(x, weights, experts.int(), gate_up, down),
                           weights=(x, weights[:1], experts, gate_up, down), down=(x, weights, experts, gate_up, down.double())).items():
        with pytest.raises(ValueError, match=f'^{name} is .* of shape'): moe.experts_cpp(*args)
    with pytest.raises((ValueError, RuntimeError), match='outside the stack'): moe.experts_cpp(x, weights, experts + 7, gate_up, down)
    with pytest.raises(ValueError, match='^x is float32 of shape'): gemm.linear_cpp(x, torch.randn(3, 7))
    with pytest.raises(ValueError, match='^logits is'): moe.routing(torch.randn(2, 5), TOY)


def test_gradients_take_the_definition_or_pytorch():
    x = torch.randn(3, 8, requires_grad=True)
    gate_up, down, experts = torch.randn(4, 12, 8), torch.randn(4, 8, 6), torch.tensor([[0, 1], [2, 3], [1, 1]])
    run_experts(x, torch.rand(3, 2), experts, gate_up, down).sum().backward()
    assert x.grad.abs().sum() > 0


def test_changed_blocks_run_the_readable_code():
    torch.manual_seed(0)
    model, seen = Model(TOY, dtype=torch.float32, device='cpu').init_weights(.2), []
    tokens = torch.tensor([[1, 2, 3]])
    handle = model.layers[0].self_attn.register_forward_hook(lambda *a: seen.append(1))
    with torch.no_grad(): first = model(tokens, model.new_cache(1))
    handle.remove()
    assert seen
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, model.new_cache(1)), first, atol=1e-4, rtol=1e-3)
        model.layers[1].mlp.shared_experts = torch.nn.Identity()
        other = model(tokens, model.new_cache(1))
    with torch.no_grad(), use('reference'): torch.testing.assert_close(other, model(tokens, model.new_cache(1)), atol=1e-4, rtol=1e-3)
    assert not torch.allclose(other, first)

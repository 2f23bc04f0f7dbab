"The registry of twins: choices, fallbacks, threads, tasks, autograd and torch.compile."
import asyncio
import copy
import pickle
import threading
import warnings

import pytest
import torch
import warm

from deepseek_nb.core import dispatch
from deepseek_nb.core.dispatch import ORDER, chosen, op, twin_errors, twins, use


@pytest.fixture(autouse=True)
def clean():
    "Each test starts and ends with `auto` and its own operations"
    ops, defaults = dict(dispatch._ops), list(dispatch._defaults)
    yield
    dispatch._ops.clear(); dispatch._ops.update(ops)
    dispatch._defaults[:] = defaults
    dispatch._trace()
    assert chosen() == 'auto'


def tagged(tag):
    def f(x, scale=1.): return x * 0 + tag
    return f


def make(*kinds, **options):
    "An operation whose twins answer with their place in ORDER"
    fn = op(tagged(ORDER.index('reference')))
    for k in kinds: fn.twin(k, device='cpu', **options.get(k, {}))(tagged(ORDER.index(k)))
    return fn


def ran(fn, *args): return ORDER[int(fn(*(args or (torch.ones(2),)))[0])]


@pytest.mark.parametrize('kinds, best', [
    ((), 'reference'), (('torch',), 'torch'), (('torch', 'compile'), 'compile'), (('compile', 'cpp', 'torch'), 'cpp'),
    (('cpp', 'cuda'), 'cuda')])
def test_auto_takes_the_fastest(kinds, best):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert ran(make(*kinds)) == best


@pytest.mark.parametrize('choice', ORDER)
def test_a_choice_is_obeyed(choice):
    fn = make(*ORDER[:-1])
    with use(choice): assert ran(fn) == choice
    assert ran(fn) == 'cuda'


@pytest.mark.parametrize('asked, there, runs', [
    ('cpp', ('torch',), 'torch'), ('torch', ('cpp',), 'reference'), ('cuda', ('cpp', 'torch'), 'cpp'), ('compile', (), 'reference')])
def test_a_missing_kind_warns_exactly_once(asked, there, runs):
    fn = make(*there)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            with use(asked): assert ran(fn) == runs
        use(asked); assert ran(fn) == runs; use('auto')
    assert len(caught) == 1
    assert f"'{asked}'" in str(caught[0].message) and f"'{runs}" in str(caught[0].message) and '\n' not in str(caught[0].message)
    assert caught[0].filename == __file__


def test_availability_is_asked_once_and_late():
    asked = []
    fn = make('torch', 'cpp', cpp=dict(available=lambda: bool(asked.append(1))))
    assert not asked
    assert [ran(fn) for _ in range(3)] == ['torch'] * 3 and len(asked) == 1


def test_devices(monkeypatch):
    fn = op(tagged(4))
    fn.twin('cpp')(tagged(1)); fn.twin('cuda')(tagged(0)); fn.twin('torch', device='meta')(tagged(3))
    assert ran(fn) == 'cpp'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert fn.op.plan('auto', 'cuda') == ('cuda/cuda', 'reference')
    assert fn.op.plan('auto', 'meta') == ('torch/meta', 'reference')
    assert fn(x=torch.ones(1, device='meta')).device.type == 'meta'


def test_supports_sends_to_the_next():
    fn = make('torch', 'cpp', cpp=dict(supports=lambda x, scale=1.: len(x) % 2 == 0))
    assert ran(fn, torch.ones(4)) == 'cpp' and ran(fn, torch.ones(3)) == 'torch'
    with warnings.catch_warnings(record=True) as caught, use('cpp'):
        warnings.simplefilter('always')
        for n in (4, 3, 5): ran(fn, torch.ones(n))
    assert [str(w.message) for w in caught] == ["f: the 'cpp' twin doesn't support these arguments, 'torch/cpu' runs instead"]


@pytest.mark.parametrize('twin', [
    lambda x: x, lambda x, scale=2.: x, lambda x, scale: x, lambda y, scale=1.: y, lambda x, *, scale=1.: x, lambda x, scale=1., more=0: x])
def test_other_parameters_are_refused(twin):
    fn = make()
    with pytest.raises(TypeError, match='is not a twin of f') as e: fn.twin('torch')(twin)
    assert '\n' not in str(e.value) and list(fn.op.twins) == ['reference']


def test_no_signature_is_refused():
    with pytest.raises(TypeError, match='wrap it in a def'): make().twin('torch')(torch.add)


@pytest.mark.parametrize('call', [lambda: use('triton'), lambda: make().twin('reference'), lambda: make().twin('auto')])
def test_unknown_choices(call):
    with pytest.raises(ValueError, match='use one of .*cuda, cpp, compile, torch'): call()
    assert chosen() == 'auto'


def test_with_restores_after_errors_and_nesting():
    use('torch')
    with pytest.raises(RuntimeError):
        with use('cpp'):
            with use('reference'): raise RuntimeError
    assert chosen() == 'torch'
    again = use('cpp')
    for _ in range(2):
        with again:
            assert chosen() == 'cpp'
            with again: assert chosen() == 'cpp'
    assert chosen() == 'torch'
    use('auto')


def test_threads_do_not_see_each_other():
    wrong, start = [], threading.Barrier(8)
    def work(choice):
        start.wait()
        for _ in range(300):
            with use(choice):
                if chosen() != choice: wrong.append(choice)
    threads = [threading.Thread(target=work, args=(ORDER[i % 5],)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong and chosen() == 'auto' and not dispatch._defaults


def test_tasks_do_not_see_each_other():
    async def task(choice):
        with use(choice):
            await asyncio.sleep(0)
            return chosen()
    async def main(): return await asyncio.gather(*map(task, ORDER))
    assert asyncio.run(main()) == list(ORDER)


def test_process_default_reaches_new_threads():
    use('reference')
    seen = []
    t = threading.Thread(target=lambda: seen.append(chosen())); t.start(); t.join()
    use('auto')
    assert seen == ['reference']


@op
def scaled(x, weight, eps=1e-6): return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


@scaled.twin('torch')
def scaled_torch(x, weight, eps=1e-6): return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_compiles_without_a_graph_break_and_follows_the_choice(backend):
    torch._dynamo.reset()
    fn = make('torch', 'cpp', cpp=dict(supports=lambda x, scale=1.: x.shape[0] > 2))
    compiled = torch.compile(lambda x: fn(x) + 0, fullgraph=True, backend=backend)
    assert ran(compiled, torch.ones(4)) == 'cpp' and ran(compiled, torch.ones(2)) == 'torch'
    with use('reference'): assert ran(compiled, torch.ones(4)) == 'reference'
    use('torch'); assert ran(compiled, torch.ones(4)) == 'torch'; use('auto')
    assert ran(compiled, torch.ones(4)) == 'cpp'
    with warnings.catch_warnings(record=True) as caught, use('cuda'):
        warnings.simplefilter('always')
        assert ran(compiled, torch.ones(4)) == 'cpp'
    assert len([w for w in caught if 'cuda' in str(w.message)]) == 1


def test_gradients_through_compiled_dispatch():
    torch._dynamo.reset()
    compiled = torch.compile(scaled, fullgraph=True, backend='aot_eager')
    weight, grads = torch.rand(7), []
    for choice in ('reference', 'torch'):
        x = torch.arange(21.).view(3, 7).requires_grad_()
        with use(choice): compiled(x, weight).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_looks_like_its_definition():
    assert scaled.__name__ == 'scaled' and scaled.__module__ == __name__
    assert copy.deepcopy(scaled) is scaled and pickle.loads(pickle.dumps(scaled)) is scaled
    assert twin_errors(scaled, torch.randn(3, 5), torch.rand(5)).keys() == {'torch', 'reference'}


def test_table():
    make('cpp', cpp=dict(available=lambda: False))
    text = str(twins())
    assert '| operation | cuda | cpp | compile | torch | reference |' in text
    assert '| – | cpu (unavailable) | – | – | any |' in text


def test_import_is_light():
    code = "import sys, deepseek_nb.core.dispatch; print([m for m in ('torch._dynamo', 'einops', 'IPython') if m in sys.modules])"
    assert warm.run('-c', code).stdout.strip() == '[]'

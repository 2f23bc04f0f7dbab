import os
import random
import shlex
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import setuptools  # noqa: F401, before threads of torch.compile import it side by side, at which it fails
import warm
from filelock import FileLock
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]


LONG = ('kernels cuda cuda_quant cuda_experts compile quant_model ragged browser latent gguf evidence house one_way_in '
        'kernels_attention ggml sparse_kernels prefix evidence_conversion evidence_finetuning').split()
# Without this, where CI is set, Hypothesis draws the same examples in every run, all of them, as `fewer_examples` leaves what is fixed
settings.register_profile('house', deadline=None, derandomize=False, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('house')

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
os.environ['SEED'] = str(SEED)  # for all processes of a run
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads that wait leave the processor to other tests; read when PyTorch is loaded


def points(item):
    "Where a test stands in each of its sweeps: the names and values of each `parametrize`, and of each fixture with parameters"
    params, together = getattr(getattr(item, 'callspec', None), 'params', {}), []
    for m in item.iter_markers('parametrize'):
        names = m.args[0] if m.args else m.kwargs['argnames']
        together.append([o.strip() for o in names.split(',')] if isinstance(names, str) else [*names])
    together += [[o] for o in params if not any(o in names for names in together)]
    return {tuple((o, id(params[o])) for o in names) for names in together if all(o in params for o in names)}


def sample(name, some, n, left):
    "Draw n of these tests; these points are among theirs, for which there may have to be more"
    some, kept = random.Random(f'{SEED} {name}').sample(some, len(some)), []
    while left:
        kept.append(max(some, key=lambda i: len(points(i) & left)))
        some.remove(kept[-1])
        left = left - points(kept[-1])
    return kept + some[:max(0, n - len(kept))]


def not_drawn(items):
    """Tests that this run leaves out. Of a sweep over two parameters or more, with more than six points, a fifth is drawn, among them
    each value of each parameter. With the mark `draw(n)` n are drawn instead, of the points of one test or of all tests of a `group`;
    `draw(n, each='dtype')` draws each dtype too, where others go by their numbers alone. EVERY=1 runs all, SEED=n repeats a run"""
    groups = {}
    for i in items:
        name, _, point = i.nodeid.partition('[')
        m = i.get_closest_marker('draw')
        if m or point: groups.setdefault(m.kwargs.get('group', name) if m else name, (m, []))[1].append(i)
    for name, (m, some) in groups.items():
        if not m and len(some) < 7: continue
        there = {*()}.union(*map(points, some))
        if m: there = {p for p in there if any(o == m.kwargs.get('each') for o, _ in p)}
        kept = sample(name, some, m.args[0] if m else -(-len(some)//5), there)
        yield from (i for i in some if i not in kept)


def fewer_examples(items):
    "A property, or a machine of states, is tried with a tenth of its examples, at least 10; Hypothesis draws others in the next run"
    held = '_hypothesis_internal_use_settings'
    places = {(getattr(i, 'function', None), held) for i in items} | {(getattr(i, 'cls', None), 'settings') for i in items}
    for place, name in places:
        own = getattr(place, name, None)
        if not hasattr(own, 'max_examples') or own.derandomize: continue
        setattr(place, name, type(own)(own, max_examples=min(own.max_examples, max(10, own.max_examples//10))))


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(items, config):
    "What takes longest comes first, then files of few tests: where two run side by side, only short ones are left for the end."
    if not os.environ.get('EVERY'):
        left = {*not_drawn(items)}
        if left: config.hook.pytest_deselected(items=[*left])
        items[:] = [i for i in items if i not in left]
        fewer_examples(items)
    tests = Counter(i.path for i in items)
    items.sort(key=lambda i: (i.path.stem.removeprefix('test_') not in LONG, tests[i.path]))


def pytest_terminal_summary(terminalreporter):
    if not os.environ.get('EVERY'): terminalreporter.write_line(f'Of long sweeps a part ran: SEED={SEED} draws it again, EVERY=1 runs all')


def rewritten(config):
    "Write the bytecode of the files of tests, with pytest's asserts, once rather than in each worker"
    from _pytest.assertion import rewrite
    for path in Path(__file__).parent.glob('test_*.py'):
        pyc = rewrite.get_cache_dir(path)/f'{path.stem}{rewrite.PYC_TAIL}'
        if rewrite._read_pyc(path, pyc) is None and rewrite.try_makedirs(pyc.parent):
            stat, code = rewrite._rewrite_test(path, config)
            rewrite._write_pyc(config.stash[rewrite.assertstate_key], code, stat, pyc)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config, specs):
    "Workers are forks of one process that imported PyTorch, transformers and the like, and share the servers of `warm`"
    if sys.platform != 'linux': return
    warm.share(warm.WORKER, ('torch',), warm.TRAINING)
    for spec in specs:
        if spec.popen and not spec.python: spec.python = shlex.join([sys.executable, warm.__file__])
    # pytest's own way to do this, whose names may change
    with suppress(ImportError, AttributeError, TypeError, OSError): sys.dont_write_bytecode or rewritten(config)


@pytest.fixture(scope='session')
def root(): return ROOT


def printed(p):
    assert p.returncode == 0, p.stderr
    return p.stdout.strip()


@pytest.fixture(scope='session')
def python():
    "Runs code in a process of its own, which has PyTorch loaded and nothing else, and returns what it printed."
    return lambda code, *args, **kwargs: printed(warm.run(*(['-c', code] if args == () else [code, *args]), **kwargs))


@pytest.fixture(scope='session')
def interpreter():
    "Runs code in a fresh interpreter and returns what it printed."
    return lambda code: printed(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True))


@pytest.fixture(scope='module')
def source(request, pytestconfig):
    "A source of randomness that depends on a seed and a name alone, without gradients and warnings. SEED=n repeats a run."
    import torch
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\n{request.path.stem} SEED={SEED}')

    def make(name):
        r = random.Random(f'{SEED} {name}')
        torch.manual_seed(r.randrange(10**9))
        return r
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield make


@pytest.fixture
def isa():
    "A narrower instruction set than this machine's, drawn anew for each run, whose tests share what is compiled; SEED=n repeats a run"
    name = random.Random(f'{SEED} isa').choice(('avx2', 'portable'))
    print(f'{name}, SEED={SEED}')
    return name


@pytest.fixture
def order(request):
    "An order in which emulated threads run, drawn anew in each run; the chapters of the kernels go through all of them"
    import torch

    from deepseek_nb.cuda.emulation import ORDERS, thread_order
    name = random.Random(f'{SEED} {request.node.nodeid}').choice(ORDERS)
    print(f'{name}, SEED={SEED}')
    with thread_order(name, torch.randint(2**31, ()).item()): yield name


@pytest.fixture(scope='session')
def copy(tmp_path_factory):
    "A copy of the sources, for tests that write into the project."
    folder = tmp_path_factory.mktemp('project')/'deepseek_nb'
    folder.mkdir()
    for name in ('nbs', 'deepseek_nb'):
        shutil.copytree(ROOT/name, folder/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('pyproject.toml', 'settings.ini', '_quarto.yml', 'README.md', 'LICENSE'):
        if (ROOT/name).exists(): shutil.copy(ROOT/name, folder/name)
    return folder


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The site in `_docs`, built once, also where several processes test; `make docs` finds it there."
    from deepseek_nb.tools.site import build_site
    base = tmp_path_factory.getbasetemp()
    with FileLock(f"{base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base}/site.lock"): return build_site(ROOT)

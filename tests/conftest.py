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

ROOT = Path(__file__).parents[1]


LONG = ('kernels cuda cuda_quant cuda_experts compile quant_model ragged browser latent gguf evidence house one_way_in '
        'kernels_attention ggml sparse_kernels prefix evidence_conversion evidence_finetuning').split()
SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
os.environ['SEED'] = str(SEED)  # for all processes of a run
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')  # threads that wait leave the processor to other tests; read when PyTorch is loaded


def not_drawn(items):
    """Tests with the mark `draw(n)` that this run leaves out: n are drawn of the points of one test, or of all tests of a `group`.
    EVERY=1 runs them all, SEED=n repeats a run"""
    groups = {}
    for i in items:
        for m in i.iter_markers('draw'):
            n, some = groups.setdefault(m.kwargs.get('group', i.nodeid.partition('[')[0]), (m.args[0], []))
            some.append(i)
    for name, (n, some) in groups.items():
        kept = random.Random(f'{SEED} {name}').sample(some, min(n, len(some)))
        yield from (i for i in some if i not in kept)


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(items, config):
    "What takes longest comes first, then files of few tests: where two run side by side, only short ones are left for the end."
    if not os.environ.get('EVERY') and (left := {*not_drawn(items)}):
        config.hook.pytest_deselected(items=[*left])
        items[:] = [i for i in items if i not in left]
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
def isa(request):
    "A narrower instruction set than this machine's, drawn anew in each run; SEED=n repeats a run"
    name = random.Random(f'{SEED} {request.node.nodeid}').choice(('avx2', 'portable'))
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

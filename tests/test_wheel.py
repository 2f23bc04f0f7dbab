"The built wheel alone, in a new environment and an empty folder, answers the demo's question."
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def run(*args, **kwargs):
    p = subprocess.run([str(o) for o in args], capture_output=True, text=True, **kwargs)
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory, copy):
    folder = tmp_path_factory.mktemp('dist')
    run(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', folder, copy)
    return next(folder.glob('*.whl'))


def test_wheel_is_whole(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {o.relative_to(ROOT).as_posix() for o in (ROOT/'deepseek_nb').rglob('*') if o.is_file() and '__pycache__' not in o.parts}
    assert not package - names, 'the package has files that the wheel lacks'
    assert {o.split('/')[0] for o in names if '.dist-info/' not in o} == {'deepseek_nb'}, 'the wheel has files beside the package'
    assert any(o.endswith('.dist-info/licenses/LICENSE') for o in names)


def needed(names):
    "All distributions that these need, with what these need in turn"
    found, todo = {}, [(n, '') for n in names]
    while todo:
        name, extra = todo.pop()
        if (name, extra) in found: continue
        found[name, extra] = dist = distribution(name)
        wanted = (Requirement(r) for r in dist.requires or ())
        wanted = [r for r in wanted if not r.marker or r.marker.evaluate(dict(extra=extra))]
        todo += [(canonicalize_name(r.name), e) for r in wanted for e in ('', *r.extras)]
    return {name: dist for (name, _), dist in found.items()}


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    "A new environment with the wheel, and with this one's copies of what it needs and of nothing else: as pip would fill it, in less time"
    env, pip = tmp_path_factory.mktemp('env'), (sys.executable, '-m', 'pip', '--disable-pip-version-check', '--python')
    run(sys.executable, '-m', 'venv', '--without-pip', env)
    run(*pip, env/'bin/python', 'install', '--quiet', '--no-deps', '--no-compile', '--no-index', wheel)
    site, = env.glob('lib/python*/site-packages')
    metadata, = distributions(name='deepseek-nb', path=[str(site)])
    for r in map(Requirement, metadata.requires):
        if r.marker and not r.marker.evaluate(dict(extra='')): continue
        for dist in needed([canonicalize_name(r.name)]).values():
            for top in {f.parts[0] for f in dist.files} - {'..', '__pycache__'}:
                if not (site/top).exists(): (site/top).symlink_to(Path(dist.locate_file(top)))
    run(*pip, env/'bin/python', 'check')
    return env/'bin'


@pytest.fixture
def elsewhere(tmp_path):
    "An empty folder, and variables without a path to this project."
    ours = 'PYTHONPATH', 'VIRTUAL_ENV', 'PYTHONDONTWRITEBYTECODE'
    return dict(cwd=tmp_path, env={k: v for k,v in os.environ.items() if k not in ours}, stdin=subprocess.DEVNULL)


@pytest.mark.skipif(os.name == 'nt', reason='POSIX layout of an environment')
def test_every_module_imports(installed, elsewhere):
    modules = [o.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.') for o in (ROOT/'deepseek_nb').rglob('[!_]*.py')]
    # the platform's modules and the bridge to transformers alone need packages of an extra
    code = f'''from importlib import import_module
for o in {modules}:
    try: print(import_module(o).__file__)
    except ModuleNotFoundError as e:
        platform = e.name in ('sqlalchemy', 'fasthtml', 'psycopg', 'starlette') and o.startswith('deepseek_nb.platform.')
        if not platform and (e.name, o) != ('transformers', 'deepseek_nb.export.transformers'): raise
        print('extra site-packages')'''
    files = run(installed/'python', '-c', code, **elsewhere).splitlines()
    assert len(files) == len(modules) and all('site-packages' in o for o in files)
    assert files.count('extra site-packages') <= 1 + sum(o.startswith('deepseek_nb.platform') for o in modules)


@pytest.mark.skipif(os.name == 'nt', reason='POSIX layout of an environment')
def test_the_platform_names_its_extra(installed, elsewhere):
    done = subprocess.run([installed/'deepseek-nb', 'platform', 'p'], capture_output=True, text=True, **elsewhere)
    assert done.returncode == 2 and "pip install 'deepseek-nb[platform]'" in done.stderr and not (elsewhere['cwd']/'p').exists()


@pytest.mark.skipif(os.name == 'nt', reason='POSIX layout of an environment')
def test_demo(installed, elsewhere):
    assert 'Paris' in run(installed/'deepseek-nb', 'chat', '--demo', **elsewhere)

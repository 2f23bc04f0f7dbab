import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools  # noqa: F401, before threads of torch.compile import it side by side, at which it fails

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(config, items):
    "Where tests run side by side, a file's stay together, and so do those that need the site, or a copy of the sources."
    if not config.pluginmanager.hasplugin('xdist'): return
    for i in items: i.add_marker(pytest.mark.xdist_group('built' if {'site', 'copy'} & {*i.fixturenames} else i.path.name))


@pytest.fixture(scope='session')
def root(): return ROOT


@pytest.fixture(scope='session')
def python():
    "Runs code in a fresh interpreter and returns what it printed."
    def run(code, *args, **kwargs):
        p = subprocess.run([sys.executable, *(['-c', code] if args == () else [code, *args])], capture_output=True, text=True, **kwargs)
        assert p.returncode == 0, p.stderr
        return p.stdout.strip()
    return run


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
    "The site, built in a copy of what it is built from."
    from deepseek_nb.site import build
    root = tmp_path_factory.mktemp('site')
    for name in ('nbs', 'deepseek_nb'):
        shutil.copytree(ROOT/name, root/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    shutil.copy(ROOT/'pyproject.toml', root)
    return build(root)

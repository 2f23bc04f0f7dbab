"What CI takes from elsewhere is named by its version and, where there is one, by its digest."
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize('file', sorted((ROOT/'.github/workflows').glob('*.yml')), ids=lambda p: p.name)
def test_actions_are_pinned_by_commit(file):
    "A tag can be moved; the comment beside a commit says which version it is"
    used = re.findall(r'uses: (\S+)(.*)', file.read_text())
    assert used
    for action, rest in used: assert re.fullmatch(r'[\w.-]+/[\w.-]+@[0-9a-f]{40}', action) and re.fullmatch(r' # v[\d.]+', rest), action


@pytest.mark.parametrize('folder', ['clients', 'axe'])
def test_packages_for_node_have_digests(folder):
    "All, also those that others need; no address of a registry, as each machine has its own"
    lock, wanted = (json.loads((ROOT/'.ci'/folder/f).read_text()) for f in ('package-lock.json', 'package.json'))
    assert all(re.fullmatch(r'\d+\.\d+\.\d+', v) for v in wanted['dependencies'].values())
    found = {k: p for k, p in lock['packages'].items() if k}
    assert {f'node_modules/{n}' for n in wanted['dependencies']} <= found.keys()
    for name, p in found.items(): assert p['integrity'].startswith('sha512-') and 'resolved' not in p, name
    text = (ROOT/'.ci/run').read_text()
    names = re.search(rf'node {folder} \S+ (.*) \\', text)[1].split()
    assert {n.rpartition('@')[0] or n for n in names} == wanted['dependencies'].keys()


def test_packages_of_python_have_versions():
    "Each that the tests need by name, but PyTorch, whose builds differ from index to index; this machine may have others"
    lines = (ROOT/'.ci/constraints.txt').read_text().splitlines()
    locked = dict(line.split('==') for line in lines)
    plain = lambda name: re.sub('[-_.]+', '-', name).lower()
    assert len(locked) == len(lines) and not [n for n in locked if re.match('torch|triton|nvidia', n)]

    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    extras = [*project['dependencies'], *project['optional-dependencies']['dev']]
    names = {plain(re.match(r'[\w.-]+', d)[0]) for d in extras} - {'deepseek-nb'}
    assert {n for n in names if not re.match('torch|triton|nvidia', n)} <= {plain(n) for n in locked}

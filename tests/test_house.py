"The rules of the house, each held by a test."
import ast
import configparser
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from deepseek_nb.core.lazy import ROOMS, chapter_paths

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [*(ROOT/'nbs').glob('[!_]*.ipynb'), *chapter_paths(ROOT/'nbs')]
STUDIES = [o for o in NOTEBOOKS if '"#| study' in o.read_text()]  # experiments: notebooks that export nothing
CHAPTERS = [o for o in NOTEBOOKS if o.stem != 'index' and o not in STUDIES]
BIN = Path(sys.executable).parent


def cells(path): return json.loads(path.read_text())['cells']
def source(cell): return ''.join(cell['source'])
@cache
def module(path):
    "The module of a chapter; a part's own chapter is its package."
    name = path.stem.split('_', 1)[1]
    return f'{name}.__init__' if (ROOT/'deepseek_nb'/name.replace('.', '/')).is_dir() else name


def exported(path):
    "The file that a chapter exports."
    return ROOT/'deepseek_nb'/(module(path).replace('.', '/') + '.py')


def run(*args, cwd):
    p = subprocess.run([BIN/args[0], *args[1:]], cwd=cwd, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    return p.stdout


# ---- facts stated twice

def test_settings_equal_pyproject():
    ini = configparser.ConfigParser(inline_comment_prefixes=None)
    ini.read(ROOT/'settings.ini')
    ini, toml = ini['DEFAULT'], tomllib.loads((ROOT/'pyproject.toml').read_text())
    project, nbdev = toml['project'], toml['tool']['nbdev']
    version = re.search(r'__version__ = "(.+)"', (ROOT/'deepseek_nb/__init__.py').read_text())[1]
    assert ini['lib_name'] == project['name'] and ini['version'] == version and ini['description'] == project['description']
    assert ini['min_python'] == project['requires-python'].removeprefix('>=') and ini['author'] == project['authors'][0]['name']
    assert ini['license'] == 'apache2' and project['license'] == 'Apache-2.0'
    assert ini['keywords'].split() == project['keywords']
    assert ini['requirements'].split() == project['dependencies']
    assert ini['dev_requirements'].split() == project['optional-dependencies']['dev']
    assert ini['console_scripts'].split('=') == list(*project['scripts'].items())
    for key in ('lib_path', 'nbs_path', 'doc_path', 'branch', 'strip_libs', 'tst_flags'): assert ini[key] == nbdev[key], key
    assert ini.getboolean('custom_sidebar') == nbdev['custom_sidebar']


def test_errors_are_expected_by_a_with_block():
    for p in (ROOT/'nbs').rglob('*.ipynb'):
        said = f'{p.name}: expect_fail is a context manager, write `with expect_fail(...):`'
        assert 'expect_fail(lambda' not in p.read_text(), said


def test_readme_is_the_index():
    from deepseek_nb.tools.book import readme
    same = (ROOT/'README.md').read_text() == readme(ROOT/'nbs/index.ipynb')
    assert same, 'README.md is stale: run `make export`'


# ---- what an import costs

def imported(python, code): return set(python(f'import sys; {code}; print(*{{o.split(".")[0] for o in sys.modules}})').split())


def test_package_imports_no_torch(interpreter):
    assert not imported(interpreter, 'import deepseek_nb') & {'torch', 'numpy', 'fastcore', 'einops', 'transformers'}


def test_model_imports_nothing_heavy(python):
    loaded = imported(python, 'from deepseek_nb import Model, Config, Cache')
    assert 'torch' in loaded
    assert not loaded & {'transformers', 'datasets', 'matplotlib', 'huggingface_hub', 'gguf', 'tokenizers', 'jinja2', 'nbdev', 'IPython'}


def test_lazy_names(python):
    assert python('import deepseek_nb as d; print(all(n in dir(d) for n in d._HOMES), *[getattr(d, n).__name__ for n in d._HOMES])') \
        == 'True Config Cache Model Tokenizer QuantizedModel Trainer TrainingArguments LoraConfig AdamW get_linear_schedule_with_warmup'
    python('from deepseek_nb import Model; Model.from_pretrained, Model.save_pretrained, Model.generate, Model.stream')
    import deepseek_nb
    with pytest.raises(AttributeError, match="has no attribute 'Modle'; it offers Config"): getattr(deepseek_nb, 'Mod' + 'le')


def test_no_triton(python):
    "The word may be explained in prose; no code imports it, and the package imports with it blocked."
    for path in (ROOT/'deepseek_nb').rglob('*.py'):
        assert not re.search(r'^\s*(import|from) triton', path.read_text(), re.M), path
    names = [f'deepseek_nb.{module(o)}' for o in CHAPTERS]
    python(f'import sys; sys.modules["triton"] = None\nfrom importlib import import_module\nfor o in {names}: import_module(o)')


# ---- the walks of CONTRIBUTING.md

WALKS = (ROOT/'CONTRIBUTING.md').read_text().split('## Three walks')[1].split('\n## ')[0].split('\n### ')[1:]


@pytest.mark.parametrize('walk', WALKS, ids=[w.splitlines()[0] for w in WALKS])
def test_a_walk_is_true(walk):
    "At most eight rooms, none entered twice, and every name is one of the code"
    code = {'.'.join(p.relative_to(ROOT/'deepseek_nb').with_suffix('').parts).removesuffix('.__init__'): p.read_text()
            for p in (ROOT/'deepseek_nb').rglob('*.py') if not p.name.startswith('_mod')}
    steps = [o for o in walk.splitlines() if re.match(r'\d+\. ', o)]
    rooms = [next(n for n in re.findall(r'`([^`]+)`', o) if n in code) for o in steps]
    entered = [r for i, r in enumerate(rooms) if not i or rooms[i - 1] != r]
    assert 5 <= len(steps) <= 8 and len({*entered}) == len(entered)
    known = {*re.findall(r'\w+', '\n'.join(code.values()))}
    names = [n for o in walk.splitlines() for n in re.findall(r'`([^`]+)`', o) if re.fullmatch(r'[\w.]+', n) and n not in code]
    assert not [n for n in names if not {*n.split('.')} <= known]


def test_the_way_of_a_request_is_true():
    "At most twelve rooms, none entered twice, and each function stands in its room"
    text = (ROOT/'CONTRIBUTING.md').read_text().split('### HTTP request to first token')[1].split('\n## ')[0]
    rows = [[*map(str.strip, o.strip('|').split('|'))] for o in text.splitlines() if re.match(r'\| \d', o)]
    rooms = [row[1].strip('`') for row in rows]
    assert [row[0] for row in rows] == [str(i + 1) for i in range(len(rows))] and len(rows) <= 12 and len({*rooms}) == len(rooms)
    for room, row in zip(rooms, rows, strict=True):
        code = (ROOT/'deepseek_nb'/(room.replace('.', '/') + '.py')).read_text()
        known = {*re.findall(r'\w+', code)}
        assert not [n for n in re.findall(r'`([\w.]+)`', row[2]) if not {*n.split('.')} <= known], room


# ---- the shape of a notebook

def test_lines_of_kernels_are_short():
    long = [f'{p.name}:{i}' for p in sorted((ROOT/'deepseek_nb'/'csrc').iterdir()) if p.is_file()
            for i, line in enumerate(p.read_text().splitlines(), 1) if len(line) > 120]
    assert not long


def test_exported_cells_are_short():
    "Half of them have at most 12 lines, and 90% at most 25"
    def lines(cell): return [o for o in source(cell).splitlines() if o.strip() and not re.match(r'\s*(#\||%%)', o)]
    exports = re.compile(r'^#\| (export|exporti|exports|cu|cpp)\b', re.M)
    sizes = sorted(len(lines(c)) for o in CHAPTERS for c in cells(o) if c['cell_type'] == 'code' and exports.search(source(c)))
    assert sizes[len(sizes)//2] <= 12 and sizes[int(.9*len(sizes))] <= 25


def test_every_notebook_is_in_the_form_of_the_house():
    for path in NOTEBOOKS:
        found = cells(path)
        markdown = [source(c) for c in found if c['cell_type'] == 'markdown']
        assert re.match(r'# \S.*\n+> \S', markdown[0]), f'{path.stem}: the first Markdown cell is `# Title` and a `> line`'
        stored = [o for c in found for o in c.get('outputs', []) if o['output_type'] == 'error']
        assert not stored, f'{path.stem} stores an error: {stored}'
        if path.stem == 'index': continue
        assert re.match(r'\d{3}_[a-z0-9_.]+$', path.stem), path.stem
        if path in STUDIES: continue
        assert source(next(c for c in found if c['cell_type'] == 'code')) == f'#| default_exp {module(path)}'
        assert markdown[1].startswith('#| export\n'), f'{path.stem}: the second Markdown cell is exported as the docstring of the module'


def test_stored_outputs_name_no_folder_of_a_person():
    "Nor a warning with the place of a package on one machine"
    def texts(o): return [''.join(o.get('text', '')), *(''.join(v) for k,v in o.get('data', {}).items() if k.startswith('text'))]
    for path in NOTEBOOKS:
        said = '\n'.join(t for c in cells(path) for o in c.get('outputs', []) for t in texts(o))
        found = re.search(r'(?<![\w.:/])/(root|home|work|Users)/\S+|\S*site-packages\S*', said)
        assert not found, f'{path.stem}: {found[0]}; run the cell without it, or remove the output'


@pytest.mark.parametrize('path', [p for p in STUDIES if p.stem != '980_studies.claims'], ids=lambda o: o.stem)
def test_a_study_shows_before_it_tells(path):
    "A table and a plot stand before the paragraph of the finding"
    calls = [m[1] for c in cells(path) if c['cell_type'] == 'code' and (m := re.search(r'open_study\(\S+\)\.(\w+)', source(c)))]
    shown = calls[:calls.index('finding')]
    assert len(shown) >= 2 and any(n.startswith('plot') for n in shown) and not all(n.startswith('plot') for n in shown)


@pytest.mark.parametrize('path', STUDIES, ids=lambda o: o.stem)
def test_a_study_exports_nothing(path):
    "Its cells are marked for `open_study`, which finds them by the name of the notebook"
    code = [source(c) for c in cells(path) if c['cell_type'] == 'code']
    assert path.stem.split('_')[1].startswith('studies.') and not exported(path).exists()
    assert not any(re.match(r'#\|\s*(default_exp|exports?)\b', c) for c in code)
    imports = [o for c in code for o in re.findall(r'^(?:from|import) (deepseek_nb\S*)', c, re.M)]
    assert imports and not [o for o in imports if o.startswith('deepseek_nb.tools')]


def imported_names(path, order):
    "The modules and names that a chapter imports, in full"
    package = ['deepseek_nb', *module(path).split('.')[:-1]]
    tree = ast.parse(exported(path).read_text())
    typed = {id(o) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == 'TYPE_CHECKING'
             for part in node.body for o in ast.walk(part)}  # for type checkers
    for node in (o for o in ast.walk(tree) if id(o) not in typed):
        if isinstance(node, ast.Import): yield from (o.name for o in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            base = '.'.join([*base, *filter(None, [node.module])])
            yield from (name if (name := f'{base}.{o.name}').removeprefix('deepseek_nb.') in order else base for o in node.names)


def test_imports_lead_to_earlier_rooms_and_never_in_a_circle():
    order, room = [module(o).removesuffix('.__init__') for o in CHAPTERS], lambda o: ROOMS.index(o.split('.')[0])
    of = {module(o).removesuffix('.__init__'): {*imported_names(o, order)} for o in CHAPTERS}
    of = {name: {o.removeprefix('deepseek_nb.') for o in found if o.startswith('deepseek_nb.')} for name, found in of.items()}
    for name, found in of.items():
        for o in found: assert o in of and room(o) <= room(name), f'{name} imports {o}'
    TopologicalSorter(of).prepare()  # raises CycleError


# ---- notebooks and package agree

def differences(a, b, folder=''):
    "Files below two folders that differ, or are in one of them."
    skip = ['__pycache__', '.ipynb_checkpoints', 'llms.txt']
    d = filecmp.dircmp(a/folder, b/folder, ignore=skip)
    _, mismatch, errors = filecmp.cmpfiles(a/folder, b/folder, d.common_files, shallow=False)
    found = [f'{folder}/{o}' for o in (*mismatch, *errors, *d.left_only, *d.right_only)]
    return found + [o for sub in d.common_dirs for o in differences(a, b, f'{folder}/{sub}'.lstrip('/'))]


def test_notebooks_are_clean(copy):
    run('nbdev-clean', cwd=copy)
    stale = differences(ROOT/'nbs', copy/'nbs')
    assert not stale, f'run `make export`: not clean are {stale}'


# nbdev reads its settings again four times for each notebook, which takes a third of the time; and a source file that has not changed
# since is not opened again for each notebook to see whose it is, which takes another quarter
EXPORT = """
import sys
from functools import cache
from nbdev import config, doclinks
from deepseek_nb.core import nbproc
once = cache(config.get_config)
whose, known = nbproc.owner, {}

def owner(path):
    key = path, path.stat().st_ino, path.stat().st_mtime_ns
    if key not in known: known[key] = whose(path)
    return known[key]

nbproc.owner = owner
for m in [m for name, m in sys.modules.items() if name.startswith('nbdev')]:
    if hasattr(m, 'get_config'): m.get_config = once
doclinks.nbdev_export()
"""


def test_package_equals_notebooks(copy):
    run('python', '-c', EXPORT, cwd=copy)
    stale = differences(ROOT/'deepseek_nb', copy/'deepseek_nb')
    assert not stale, f'run `make export`: not what the notebooks export are {stale}'


def test_no_two_chapters_have_one_number():
    numbers = [(o.parent.name, o.stem.split('_')[0]) for o in CHAPTERS + STUDIES]
    assert len(numbers) == len(set(numbers)), sorted(o for o in numbers if numbers.count(o) > 1)


def test_every_module_has_a_notebook():
    known = {exported(o) for o in CHAPTERS}
    hand_written = {'__init__.py', '_modidx.py', '_later.py'}
    assert {o for o in (ROOT/'deepseek_nb').rglob('*.py') if o.name not in hand_written or o in known} == known


def test_package_docstring_lists_every_module():
    "nbdev lists a module whose docstring has more than three lines: its title's line, and two wrapped lines or more."
    docstring = ast.get_docstring(ast.parse((ROOT/'deepseek_nb/__init__.py').read_text()))
    listed = set(re.findall(r'^- `deepseek_nb\.([\w.]+)`: .', docstring, re.M))
    missing = {module(o).removesuffix('.__init__') for o in CHAPTERS if exported(o).exists()} - listed
    assert not missing, f'wrap the second Markdown cell of these chapters on two lines or more: {missing}'


def test_ruff():
    run('ruff', 'check', 'nbs', 'deepseek_nb', 'tests', cwd=ROOT)


def test_make_recipes_parse():
    if not shutil.which('make'): pytest.skip('make is absent')
    for target in ('demo', 'test', 'docs', 'bench', 'export', 'hooks', 'clean'):
        assert subprocess.run(['make', '-n', target], cwd=ROOT, capture_output=True).returncode == 0, target


def test_make_says_what_python_it_needs(tmp_path):
    if not shutil.which('make'): pytest.skip('make is absent')
    shutil.copy(ROOT/'Makefile', tmp_path)
    (tmp_path/'pyproject.toml').touch()
    p = subprocess.run(['make', 'demo', 'PYTHON=python3.5'], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode and 'needs Python 3.11 or newer' in p.stdout + p.stderr

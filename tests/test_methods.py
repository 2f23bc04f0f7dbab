"Methods stand in their class: what the notebooks patch is what the package defines, and type checkers see it."
import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from deepseek_nb.core.lazy import chapter_paths, exported_code, is_patch, later, origins
from deepseek_nb.core.nbproc import fold, patched_class

ROOT = Path(__file__).parents[1]
CHAPTERS = dict(map(exported_code, chapter_paths(ROOT/'nbs')))
TREES = {module: ast.parse(code) for module, code in CHAPTERS.items() if module}
CLASSES = {m: {n.name for n in tree.body if isinstance(n, ast.ClassDef)} for m, tree in TREES.items()}
PATCHES = [(m, f) for m, tree in TREES.items() for f in tree.body if is_patch(f)]


def module(name): return import_module(f'deepseek_nb.{name}')


def function(o):
    "The function below descriptors and decorators"
    o = o.fget if isinstance(o, property) else getattr(o, '__func__', o)
    return inspect.unwrap(o)


def test_a_patch_of_the_same_chapter_is_in_its_class():
    "Its source is found, and its body is the notebook's, in the class body and not beside it"
    own = [(m, f) for m, f in PATCHES if patched_class(f) in CLASSES[m]]
    assert len(own) > 700
    for m, f in own:
        found = function(vars(getattr(module(m), patched_class(f)))[f.name])
        text = inspect.getsource(found)
        assert text.startswith('    ') and found.__qualname__ == f'{patched_class(f)}.{f.name}', (m, f.name)
        node = ast.parse('class C:\n' + text).body[0].body[0]
        assert [*map(ast.dump, node.body)] == [*map(ast.dump, f.body)], (m, f.name)
        assert [a.arg for a in node.args.args] == [a.arg for a in f.args.args] and not hasattr(module(m), f'_orig_{f.name}')


def test_the_package_patches_only_classes_of_earlier_chapters():
    for p in (ROOT/'deepseek_nb').rglob('*.py'):
        tree = ast.parse(p.read_text())
        classes = {n.name for n in tree.body if isinstance(n, ast.ClassDef)}
        left = [f.name for f in tree.body if is_patch(f) and patched_class(f) in classes]
        assert not left, f'{p}: {left} need names in a decorator or default that are bound behind their class; move these names up'


def test_a_class_names_the_chapters_of_its_other_methods():
    "And each line of a class finds its method: the same whatever was imported first"
    for m, f in PATCHES:
        names = origins(TREES[m], m)
        for o in ast.walk(f.args.args[0].annotation):
            if not isinstance(o, ast.Name) or o.id in CLASSES[m]: continue
            home, _, cls = names[o.id].rpartition('.')
            lines = [n for c in TREES[home].body if isinstance(c, ast.ClassDef) and c.name == cls for n in c.body]
            assert f"{f.name} = later('{m}'" in '\n'.join(map(ast.unparse, lines)), f"{home}.{cls} needs the line: {f.name} = later('{m}')"
    for m, names in CLASSES.items():
        for c in (c for n in names if isinstance(c := getattr(module(m), n), type)):
            for name in vars(c): assert not isinstance(inspect.getattr_static(c, name), later) or callable(getattr(c, name)), (m, c, name)


@pytest.mark.parametrize('cells, problem', [
    (['class A:\n    def f(self): ...', '@patch\ndef f(self:A): ...'], 'A.f is in its class, and patched'),
    (['class A: ...', '@patch\ndef f(self:A): ...', '@patch\ndef f(self:A, x): ...'], 'A.f is patched twice'),
])
def test_a_method_is_defined_once(cells, problem):
    with pytest.raises(ValueError, match=problem): fold(cells)


@pytest.mark.parametrize('cells', [
    ['class A: ...', 'N = 3', '@patch\ndef f(self:A, n=N): return n'],  # the default is bound behind the class
    ['class A:\n    list = 3', '@patch\ndef f(self:A)->list: ...'],  # the class has an attribute of this name
    ['class A: ...', '@wraps(g)\n@patch\ndef f(self:A): ...'],  # @patch is not the outermost decorator
    ['N = 1', 'class A: ...', 'N = 2', '@patch\ndef f(self:A, n=N): return n'],
    ['from deepseek_nb.arch.model import Model', '@patch\ndef f(self:Model): ...'],
], ids=['late default', 'attribute', 'inner patch', 'bound again', 'other chapter'])
def test_what_would_mean_something_else_in_the_class_stays(cells): assert fold(cells) == cells


def test_texts_and_other_alphabets_survive():
    "Lines inside strings are not indented, and columns are counted in characters"
    cells = ['class A: "Ünï"', '@patch\ndef f(self:A, ä:A="é", ß:int=1)->A: # Ω\n    t = f"""a\n{ä}\n  b"""\n    return t, \'\'\'\n\'\'\'']
    exec('\n'.join(fold(cells)), space := {})
    assert space['A']().f('x') == ('a\nx\n  b', '\n') and inspect.signature(space['A'].f).return_annotation == 'A'


CLIENT = '''
from deepseek_nb import Cache, Model
from deepseek_nb.infer.engine import Engine

model = Model.from_pretrained('deepseek_nb/mini')
reveal_type(Model.from_pretrained)
reveal_type(model.generate)
reveal_type(model.new_cache)
reveal_type(Cache.rewind)
reveal_type(Engine.submit)
'''


def test_a_type_checker_finds_the_methods(tmp_path):
    "pyright, basic, on a client: it knows methods of the class's chapter and of later ones"
    pyright = shutil.which('pyright', path=f'{Path(sys.executable).parent}')
    if not pyright: pytest.skip('pyright is absent: pip install pyright')
    (tmp_path/'client.py').write_text(CLIENT)
    (tmp_path/'pyrightconfig.json').write_text(json.dumps(dict(typeCheckingMode='basic', extraPaths=[str(ROOT)])))
    p = subprocess.run([pyright, '-p', tmp_path, '--pythonpath', sys.executable, '--outputjson'], capture_output=True, text=True)
    if not p.stdout.startswith('{'): pytest.skip(f'pyright needs Node.js, which it could not get: {p.stderr[-200:]}')
    found = json.loads(p.stdout)['generalDiagnostics']
    assert not [o for o in found if o['severity'] == 'error'], found
    types = [re.search(r'is "(.*)"', o['message'])[1] for o in found]
    wanted = [r'\(path_or_name: str \| Path, dtype: .* mtp: bool = False, .*\) -> Model',
              r'\(input_ids: Tensor, max_new_tokens: int \| None = None, .*\) -> Tensor',
              r'\(batch: int = 1, max_len: int = 0, .*\) -> Cache', r'\(self: Cache, n: int\) -> None',
              r'\(self: Engine, request: Request\) -> Stream']
    for t, pattern in zip(types, wanted, strict=True): assert re.fullmatch(pattern, t), t

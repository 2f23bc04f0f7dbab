"Compiling: once for all processes, with a word to whoever waits, beforehand, and what the doctor says of compilers."
import os
import pty
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import StringIO

import pytest
import warm

from deepseek_nb.core.nbproc import find_compiler
from deepseek_nb.kernels import build
from deepseek_nb.tools import cli, doctor

pytestmark = pytest.mark.skipif(not any(shutil.which(n) for n in ('c++', 'g++', 'clang++')), reason='no C++ compiler')


@pytest.fixture
def counted(tmp_path, monkeypatch):
    "A compiler that writes down when it compiles, and an empty cache"
    log, script = tmp_path/'log', tmp_path/'counting-c++'
    log.touch()
    script.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) echo "$2" >> {log};; esac\nexec {find_compiler("cpp")} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv('CXX', str(script))
    monkeypatch.setenv('DEEPSEEK_NB_CACHE', str(tmp_path/'cache'))
    return log


CODE = """
import sys
from deepseek_nb.kernels.build import compiling_notice, load_kernel
with compiling_notice(): load_kernel('axpy.cpp')
print('loaded')"""


def test_ranks_compile_once(counted):
    ranks = [warm.start('-c', CODE) for _ in range(3)]
    said = []
    for p in ranks:
        out, err = p.communicate(timeout=300)
        assert out == 'loaded\n', err
        said.append(err)
    assert len(counted.read_text().splitlines()) == 1, 'one process compiles, the others wait for it'
    assert sum('compiling kernels once' in e for e in said) == 1
    done = warm.run('-c', CODE)
    assert done.stdout == 'loaded\n' and not done.stderr and len(counted.read_text().splitlines()) == 1, 'a second run uses the cache'


def test_a_plain_line_where_there_is_no_terminal(counted):
    with build.compiling_notice(said := StringIO()): build.build_kernel('axpy.cpp')
    assert said.getvalue().startswith('compiling kernels once (') and said.getvalue().endswith(' s)\n') and '\r' not in said.getvalue()
    with build.compiling_notice(said := StringIO()): build.build_kernel('axpy.cpp')
    assert not said.getvalue()


def heard(terminal):
    "All that is written to a terminal until it is closed, as its own buffer is soon full of spinning"
    found = b''
    with suppress(OSError):
        while part := os.read(terminal, 4096): found += part
    os.close(terminal)
    return found.decode()


def test_a_spinner_on_a_terminal(counted):
    near, far = pty.openpty()
    with ThreadPoolExecutor(1) as reader:
        said = reader.submit(heard, near)
        with os.fdopen(far, 'w') as terminal, build.compiling_notice(terminal): build.build_kernel('axpy.cpp')
        said = said.result()
    assert '⠋ compiling kernels once (0 s)' in said and '✓ compiling kernels once (' in said


def test_nothing_is_left_of_a_failed_build(counted, monkeypatch):
    from deepseek_nb.core import nbproc
    monkeypatch.setitem(nbproc._session, 'broken.cpp', {0: 'int f() { return x; }'})
    with build.compiling_notice(said := StringIO()):
        for _ in range(2):
            with pytest.raises(ValueError, match='broken.cpp does not compile'): build.build_kernel('broken.cpp')
    assert said.getvalue().count('compiling') == 1
    assert not [*(counted.parent/'cache'/'kernels').iterdir()] and not build._started


def test_build_beforehand(counted, capsys):
    assert cli.main(['build', 'axpy.cpp']) == 0
    assert 'axpy.cpp' in (out := capsys.readouterr().out) and '1 kernels ready after' in out
    assert cli.main(['build', 'axpy.cpp']) == 0 and len(counted.read_text().splitlines()) == 1
    assert {'axpy.cpp', 'panels.cpp', 'step.cpp', 'step.cpp PAGES QUANTISED'} <= {*build.kernel_names()}


def test_the_doctor_names_versions_kernels_and_blocks(counted):
    found = {f.name: f for f in doctor.examine_machine()}
    assert found['C++ compiler'].value.startswith(f'{counted.parent}/counting-c++, ')
    said = found['C++ kernels'].value
    assert said.startswith(f'0 of {len(build.kernel_names())} compiled') and 'deepseek-nb build' in said
    assert 'Q4_1' in found['GGUF blocks'].value and 'threads' in found['GGUF blocks'].value
    assert not counted.read_text(), 'nothing is compiled'


def test_the_doctor_says_that_a_compiler_is_old(tmp_path, monkeypatch):
    old = tmp_path/'g++'
    old.write_text('#!/bin/sh\necho "g++ (Debian 10.2.1-6) 10.2.1"\n')
    old.chmod(0o755)
    monkeypatch.delenv('CXX', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    found = {f.name: f for f in doctor.examine_machine()}
    assert not found['C++ compiler'].ok and f'{old} is GCC 10, but kernels need GCC 12 or newer, or clang' in str(found['C++ compiler'])
    assert not found['C++ kernels'].ok and not found['GGUF blocks'].ok

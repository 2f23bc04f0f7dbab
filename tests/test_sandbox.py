"Hostile programs in the sandbox: each ends within its limits, leaves no process behind, and the score is a number."
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_nb.train.sandbox import Confines, isolation, run_program

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the limits beyond setrlimit are of Linux')
SMALL = Confines(wall=3., cpu=1., memory=128*2**20, output=5000, disk=2**20, processes=8)
MARK = f'left-behind-{os.getpid()}'


def needs(kind):
    if (found := isolation()[kind]) is not True: pytest.skip(f'{kind} is not isolated on this machine: {found}')


def marked():
    "Processes that carry the mark in their command line"
    found = []
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try: found += [p.parent.name]*(MARK in p.read_bytes().decode(errors='replace'))
        except OSError: pass
    return found


def test_a_program_gets_its_input_and_an_empty_folder():
    done = run_program('import os; print(input(), sorted(os.listdir()), os.getcwd() == os.environ["HOME"])', 'hi\n', SMALL)
    assert (done.status, done.code, done.out) == ('ended', 0, b"hi ['program.py'] True\n"), done


def test_exit_codes_and_exceptions_are_data():
    ends = 'import sys; sys.exit(7)', 'import os; os._exit(0)', '1/0', 'import os; os.abort()', 'x = ('
    codes = [run_program(o, '', SMALL).code for o in ends]
    assert codes == [7, 0, 1, -6, 1]


def test_a_loop_ends():
    done = run_program('while True: pass', '', SMALL._replace(cpu=.2, wall=60.))
    assert done.status == 'cpu' and done.code in (None, -9), done


def test_a_sleeper_that_ignores_signals_ends():
    source = ('import signal, time\nfor s in range(1, 32):\n  if s not in (9, 19): signal.signal(s, signal.SIG_IGN)\n'
              'while True: time.sleep(9)')
    done = run_program(source, '', SMALL._replace(wall=.7))
    assert done.status == 'time', done


def test_memory_is_bounded():
    done = run_program('x = []\nwhile True: x.append(bytearray(2**20))', '', SMALL)
    assert done.status == 'memory' or done.code == 1 and b'MemoryError' in done.err, done
    assert done.memory < 2*SMALL.memory
    source = 'import os\nfor _ in range(5): os.fork()\nx = bytearray(40*2**20)\nimport time\ntime.sleep(2)'
    assert run_program(source, '', SMALL._replace(processes=64)).status == 'memory'


def test_the_kernel_refuses_too_many_processes(tmp_path):
    "Also with no supervisor that gets its turn, and for root"
    needs('processes')
    if [*map(int, re.findall(r'\d+', os.uname().release)[:2])] < [5, 14]: pytest.skip('the kernel counts all processes of the user')
    code = f"""
import os, signal, time
from deepseek_nb.train.sandbox import bounded_count, new_namespaces
new_namespaces(2**20, {str(tmp_path)!r})
bounded_count(8)
alive = []
for i in range(50):
    try: child = os.fork()
    except OSError: break
    if not child: os._exit(time.sleep(30) or 0)
    alive.append(child)
for child in alive: os.kill(child, signal.SIGKILL)
print(len(alive))"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() in [str(n) for n in range(1, 8)], done


def test_a_fork_bomb_is_bounded():
    start = time.monotonic()
    done = run_program('import os\nwhile True:\n  try: os.fork()\n  except OSError: pass', '', SMALL)
    assert done.status in ('processes', 'cpu', 'memory'), done
    assert time.monotonic() - start < 20
    threads = 'import threading, time\nfor _ in range(30): threading.Thread(target=time.sleep, args=(2,)).start()'
    done = run_program(threads, '', SMALL._replace(memory=2**30))
    assert done.status == 'processes' or b"can't start new thread" in done.err, done


@pytest.mark.parametrize('source', [
    "import os\nwhile True: os.write(1, b'passed\\n'*1000)",
    "import sys\nwhile True: sys.stderr.write('\\x00\\x1b[2J'*1000)",
    "import os\nfor _ in range(3): os.fork()\nwhile True: os.write(1, os.urandom(4000))"], ids=['text', 'control', 'binary'])
def test_a_flood_is_cut(source):
    done = run_program(source, '', SMALL)
    assert done.status in ('output', 'cpu') and len(done.out) + len(done.err) <= 2*SMALL.output, done.status
    assert done.printed.replace('\n', '').isprintable()


def test_input_that_nobody_reads_blocks_nothing():
    assert run_program('print(1)', 'x'*10**6, SMALL).out == b'1\n'
    assert run_program('import os; os.close(0); os.close(1); os.close(2)', 'x'*10**6, SMALL).status == 'ended'


def test_there_is_no_network():
    needs('network')
    source = '''import socket
for kind,to in ((socket.AF_INET, ('127.0.0.1', 9)), (socket.AF_INET6, ('::1', 9)), (socket.AF_UNIX, '/x')):
    for how in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try: socket.socket(kind, how).connect(to)
        except OSError as e: print(type(e).__name__)
        else: print('connected')'''
    done = run_program(source, '', SMALL)
    assert done.code == 0 and done.out.split().count(b'connected') == 0 and len(done.out.split()) == 6, done


def test_files_outside_are_closed(tmp_path):
    needs('files')
    (tmp_path/'secret.txt').write_text('secret')
    (tmp_path/'open').mkdir(mode=0o777)
    there = [str(tmp_path/'secret.txt'), '/etc/passwd', str(Path(__file__)), '/proc/1/environ', f'/proc/{os.getpid()}/environ']
    source = f'''import os
for p in {there}:
    try: open(p).read(); print('read', p)
    except OSError: pass
for p in ({str(tmp_path/'open')!r}, '/tmp', '/dev/shm', '/var/tmp', {str(Path(__file__).parent)!r}, os.path.dirname(os.__file__)):
    try: open(p + '/{MARK}', 'w'); print('wrote', p)
    except OSError: pass
    try: os.mkdir(p + '/{MARK}'); print('made', p)
    except OSError: pass
    try: os.symlink(p, 'link'); open('link/{MARK}', 'w'); print('wrote by a link', p)
    except OSError: pass
    try: os.remove('link')
    except OSError: pass
open('mine', 'w').write('x'); print(os.listdir())'''
    done = run_program(source, '', SMALL)
    assert done.code == 0 and sorted(eval(done.out)) == ['mine', 'program.py'], done
    assert not list((tmp_path/'open').iterdir())


def test_the_disk_is_bounded():
    source = '''import os
total = 0
try:
    for i in range(100):
        with open(str(i), 'wb', 0) as f: total += f.write(bytes(2**18))
except OSError: pass
print(total)'''
    done = run_program(source, '', SMALL)
    if done.layers['namespaces'] is True: assert int(done.out) <= SMALL.disk, done
    source = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nf = open('big', 'wb', 0)\nprint(f.write(bytes(2**22)))"
    big = run_program(source, '', SMALL)
    assert int(big.out or 0) <= SMALL.disk


def test_secrets_and_descriptors_stay_outside(monkeypatch, tmp_path):
    monkeypatch.setenv('API_KEY', MARK)
    fd = os.open(tmp_path/'open', os.O_CREAT | os.O_RDWR)
    os.set_inheritable(fd, True)
    source = f'''import os, sys
found = []
for i in range(3, 300):
    try: os.fstat(i); found.append(i)
    except OSError: pass
print(found, {MARK!r} in str(os.environ), sys.argv, os.environ.get('API_KEY'))'''
    done = run_program(source, '', SMALL)
    os.close(fd)
    assert done.out == b"[] False ['program.py'] None\n", done


def test_a_daemon_does_not_survive():
    source = f'''import os, sys, signal, time
for _ in range(2):
    if os.fork(): os._exit(0)
    os.setsid()
for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', {MARK!r}])'''
    done = run_program(source + '\n', '', SMALL)
    assert done.status == 'ended' and done.code == 0, done
    late = run_program(f'import subprocess, sys\nsubprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", {MARK!r}],'
                       ' start_new_session=True)\nimport time\ntime.sleep(60)', '', SMALL._replace(wall=.7))
    assert late.status == 'time', late
    assert marked() == []


def test_the_supervisor_is_out_of_reach():
    "A program that kills all it can see, its parents first, harms nobody but itself"
    needs('processes')
    source = 'import os, signal\nfor p in (os.getppid(), 1, -1):\n  try: os.kill(p, signal.SIGKILL)\n  except OSError: pass\nprint(1)'
    done = run_program(source, '', SMALL)
    assert done.status == 'ended' and done.layers['namespaces'] is True, done


@pytest.mark.parametrize('name', ['ptrace', 'unshare', 'mount', 'setuid'])
def test_system_calls_are_refused(name):
    needs('files')
    calls = dict(ptrace='l.ptrace(0, 0, 0, 0)', unshare='l.unshare(0x10000000)', setuid='l.setuid(12345)',
                 mount="l.mount(b'none', b'/', b'tmpfs', 0, None)")
    done = run_program(f'import ctypes\nl = ctypes.CDLL(None)\nprint({calls[name]})', '', SMALL)
    assert done.out == b'-1\n', done

"Hostile programs in the sandbox: each ends within its limits, leaves no process behind, and the score is a number."
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from deepseek_nb.train import sandbox
from deepseek_nb.train.sandbox import ALLOWED, LAYERS, Confines, call_filter, isolation, run_calls, run_program

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='the limits beyond setrlimit are of Linux')
SMALL = Confines(wall=3., cpu=1., memory=128*2**20, output=5000, disk=2**20, processes=8)
MARK = f'left-behind-{os.getpid()}'
X86 = os.uname().machine == 'x86_64'


@pytest.fixture(autouse=True, scope='module')
def every_layer():
    "Where a layer is missing nothing runs, so there is nothing to escape from"
    lost = {k: v for k, v in isolation().items() if v is not True}
    if lost:
        with pytest.raises(OSError, match='was not run'): run_program('')
        pytest.skip(f'this machine lacks layers, and refuses: {lost}')


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
    source = '''import socket
for kind,to in ((socket.AF_INET, ('127.0.0.1', 9)), (socket.AF_INET6, ('::1', 9)), (socket.AF_UNIX, '/x')):
    for how in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try: socket.socket(kind, how).connect(to)
        except OSError as e: print(type(e).__name__)
        else: print('connected')'''
    done = run_program(source, '', SMALL)
    assert done.code == 0 and done.out.split().count(b'connected') == 0 and len(done.out.split()) == 6, done


def test_files_outside_are_closed(tmp_path):
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
    assert int(done.out) <= SMALL.disk, done
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
    source = 'import os, signal\nfor p in (os.getppid(), 1, -1):\n  try: os.kill(p, signal.SIGKILL)\n  except OSError: pass\nprint(1)'
    done = run_program(source, '', SMALL)
    assert done.status == 'ended' and done.layers['namespaces'] is True, done


# ---- memory in all its kinds

LIBC = "import ctypes, errno, os, time\nl = ctypes.CDLL(None, use_errno=True)\nl.mmap.restype = l.shmat.restype = ctypes.c_void_p\n"
NOWHERE = {
    'a file in memory': "held = os.write(os.memfd_create('x'), bytes(2**20))",
    'a secret file in memory': "fd = l.syscall(447, 0)\nheld = 0 if fd < 0 else 1 - l.ftruncate(fd, 2**20)",
    'System V': "i = l.shmget(0, 2**20, 0o1600)\nheld = i >= 0 and ctypes.memset(l.shmat(i, None, 0), 1, 2**20)",
    'a shared mapping': "import mmap\nm = mmap.mmap(-1, 2**20)\nheld = m.write(bytes(2**20))\nm.madvise(mmap.MADV_DONTNEED)",
    'a shared mapping of zeros': "import mmap\nheld = 1 + sum(mmap.mmap(os.open('/dev/zero', os.O_RDONLY), 2**20, prot=mmap.PROT_READ)[:])",
    'huge pages': "import mmap\nheld = len(mmap.mmap(-1, 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)) or 1",
    'a shared file': "import mmap\nf = open('x', 'w+b')\nf.write(bytes(2**16))\nf.flush()\nheld = len(mmap.mmap(f.fileno(), 2**16))",
    'a device': "held = os.write(os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR), bytes(2**20))",
    'a queue of messages': "i = l.msgget(0, 0o1600)\nheld = i >= 0 and 1 - l.msgsnd(i, ctypes.create_string_buffer(4096), 2048, 0)",
    'a named queue': "held = ctypes.CDLL('librt.so.1').mq_open(b'/x', 0o102, 0o600, None) + 1",
    'a long pipe': "import fcntl\nheld = fcntl.fcntl(os.pipe()[1], 1031, 2**20)",
    'a long socket': "import socket\na, b = socket.socketpair()\na.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**18)\nheld = 1",
    'locks of a file': "import fcntl\nheld = 1 + len(fcntl.fcntl(open('x', 'w'), fcntl.F_SETLK, bytes([1] + [0]*31)))"}


@pytest.mark.parametrize('kind', NOWHERE)
def test_memory_outside_of_processes_is_not_to_be_had(kind):
    if kind == 'a secret file in memory' and not X86: pytest.skip('the number is of x86-64')
    done = run_program(f'{LIBC}held = 0\ntry:\n    exec({NOWHERE[kind]!r})\nexcept OSError: pass\nprint(int(held))', '', SMALL)
    assert done.out == b'0\n', (kind, done)


def test_page_tables_count():
    "A process that reads a byte of every 2 MiB has no pages of its own, but a page table for each"
    source = LIBC + """
for i in range(5):
    if not os.fork(): break
for i in range(7000):
    at = l.mmap(ctypes.c_void_p(2**40 + i*2**21), ctypes.c_size_t(4096), 1, 0x22 | 0x100000, -1, ctypes.c_long(0))
    ctypes.string_at(at, 1)
time.sleep(9)"""
    done = run_program(source, '', SMALL._replace(wall=20., cpu=20.))
    assert done.status == 'memory' and done.memory < 2*SMALL.memory, done


@pytest.mark.parametrize('make', ['os.pipe()', '[s.detach() for s in socket.socketpair()]'], ids=['pipes', 'sockets'])
def test_what_waits_in_pipes_and_sockets_counts(make):
    source = f"""import os, socket, time
for i in range(5):
    if not os.fork(): break
ends = []
try:
    while True: ends.append({make})
except OSError: pass
for _, w in ends:
    os.set_blocking(w, False)
    try:
        while True: os.write(w, bytes(2**12))
    except BlockingIOError: pass
os.write(1, b'full ')
time.sleep(9)"""
    done = run_program(source, '', SMALL._replace(memory=72*2**20, wall=20., cpu=20.))
    assert done.status == 'memory', done


# ---- time, signals, files

def test_children_that_nobody_waits_for_use_time_too():
    "The kernel adds the time of a child to nobody if its parent ignores SIGCHLD"
    source = """import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    if not (child := os.fork()):
        while time.process_time() < .2: pass
        os._exit(0)
    try:
        while True: os.kill(child, 0) or time.sleep(.01)
    except OSError: pass"""
    done = run_program(source, '', SMALL._replace(cpu=.6, wall=30.))
    assert done.status == 'cpu', done


@pytest.fixture
def sleeper():
    with subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']) as p:
        yield p
        p.kill()


def test_a_process_outside_can_not_be_killed(sleeper):
    run_program(f'import os\nfor s in (15, 9):\n  try: os.kill({sleeper.pid}, s)\n  except OSError: pass', '', SMALL)
    assert sleeper.poll() is None


def test_modes_and_dates_outside_stay(tmp_path):
    "Landlock has no right for them"
    tmp_path.chmod(0o777)
    for p in (secret := tmp_path/'secret', up := tmp_path/'up'): p.write_text('x')
    secret.chmod(0o600)
    was = [p.stat() for p in (secret, up)]
    source = f"""import os
for change in (lambda: os.chmod({str(secret)!r}, 0o666), lambda: os.utime({str(up)!r}, (1, 1)), lambda: os.truncate({str(up)!r}, 0),
               lambda: os.rename({str(up)!r}, 'mine'), lambda: os.link({str(up)!r}, 'mine'), lambda: os.remove({str(up)!r})):
    try: change()
    except OSError: pass
    else: print('changed')"""
    done = run_program(source, '', SMALL)
    now = [p.stat() for p in (secret, up)]
    assert done.code == 0 and not done.out, done
    assert [(o.st_mode, o.st_mtime, o.st_size) for o in now] == [(o.st_mode, o.st_mtime, o.st_size) for o in was]


def test_no_datagram_reaches_a_socket_that_is_a_file():
    "A network namespace has no power over it, and half of a pair may send to any address"
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        Path(folder).chmod(0o777)
        s.bind(path := f'{folder}/s')
        Path(path).chmod(0o777)
        s.settimeout(.5)
        source = f"""import socket
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    try: socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b'secret', {path!r})
    except OSError: pass"""
        assert run_program(source, '', SMALL).code == 0
        with pytest.raises(TimeoutError): s.recv(9)


# ---- system calls

def test_every_call_that_is_not_allowed_fails():
    "The numbers that are not in the table, and all of them by the x32 interface"
    here = {int(n[not X86]) for n in ALLOWED.values() if n[not X86] != '-'} | {n[not X86] for n in sandbox._CONDITIONS.values()}
    here |= {335, 336} if X86 else set() # of the kernel's own trampolines: no filter sees them, and from elsewhere they end the program
    numbers = [n for n in range(600) if n not in here] + [2**30 + n for n in range(600)]*X86
    source = f"""{LIBC}
found = []
for n in {numbers}:
    if (l.syscall(n, 0, 0, 0, 0, 0, 0), ctypes.get_errno()) != (-1, 38): found.append(n)
print(found)"""
    done = run_program(source, '', SMALL)
    assert done.out == b'[]\n', done
    gone = dict(clone3=435, unshare=(272, 97), setns=(308, 268), fsopen=430, fsconfig=431, fsmount=432, open_tree=428, move_mount=429,
                mount_setattr=442, io_uring_setup=425, bpf=(321, 280), userfaultfd=(323, 282), perf_event_open=(298, 241),
                ptrace=(101, 117), process_vm_readv=(310, 270), keyctl=(250, 219), memfd_create=(319, 279), shmget=(29, 194),
                socket=(41, 198), mount=(165, 40), sendmsg=(46, 211), setxattr=(188, 5), process_madvise=440, pidfd_send_signal=424,
                seccomp=(317, 277), setuid=(105, 146))
    assert not here & {n if isinstance(n, int) else n[not X86] for n in gone.values()}


@pytest.mark.skipif(not X86, reason='numbers and instructions of x86-64')
@pytest.mark.parametrize('call', [
    *[f'l.syscall(56, {flag | 17:#x}, 0, 0, 0, 0)' for flag in (2**17, 2**25, 2**26, 2**27, 2**28, 2**29, 2**30)], # new namespaces
    'l.prctl(4, 0, 0, 0, 0)', 'l.prctl(1, 9, 0, 0, 0)', 'l.syscall(302, os.getppid(), 7, None, None)', "l.ioctl(1, 0x5412, b'x')"])
def test_arguments_are_refused(call):
    done = run_program(f'{LIBC}print({call}, ctypes.get_errno())', '', SMALL)
    assert done.out == b'-1 38\n', done


GETPID = """import ctypes, mmap
m = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=7)
m.write(bytes.fromhex('b814000000cd80c3'))
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))())"""


@pytest.mark.skipif(not X86, reason='an instruction of x86-64')
def test_the_32_bit_interface_is_refused():
    free = subprocess.run([sys.executable, '-c', GETPID], capture_output=True, text=True)
    if free.returncode or int(free.stdout) < 1: pytest.skip('this kernel has no 32-bit interface')
    assert run_program(GETPID, '', SMALL).out == b'-38\n'


HEADERS = Path('/usr/include/x86_64-linux-gnu/asm/unistd_64.h'), Path('/usr/include/asm-generic/unistd.h')


@pytest.mark.skipif(not all(p.is_file() for p in HEADERS), reason='needs the headers of Linux, linux-libc-dev')
def test_the_numbers_are_those_of_the_headers():
    x86, arm = (dict(re.findall(r'#define __NR(?:3264)?_(\w+) (\d+)', p.read_text())) for p in HEADERS)
    arm |= dict(newfstatat=arm.get('newfstatat', arm.get('fstatat')))
    wrong = {n: (a, b) for n, (a, b) in ALLOWED.items() if (a, b) != (x86.get(n, '-'), arm.get(n, '-'))}
    wrong |= {n: c for n, c in sandbox._CONDITIONS.items() if (c[0], c[1]) != (int(x86[n]), int(arm[n]))}
    assert not wrong
    for code in map(call_filter, ('x86_64', 'aarch64')): assert len(code) < 4096 and all(0 <= j < 256 for o in code for j in o[1:3])


def test_ordinary_programs_run():
    "What solutions of programming problems use"
    source = """import asyncio, collections, datetime, decimal, hashlib, heapq, os, random, shutil, sqlite3, subprocess, sys, tempfile, time
from concurrent.futures import ThreadPoolExecutor
async def wait(): await asyncio.sleep(.01); return 1
assert asyncio.run(wait()) == 1
assert [*ThreadPoolExecutor(2).map(abs, [-1, 2])] == [1, 2]
assert subprocess.run([sys.executable, '-I', '-S', '-c', 'print(3)'], capture_output=True).stdout == b'3\\n'
with tempfile.TemporaryDirectory() as d:
    open(d + '/a', 'w').write('x')
    shutil.copy2(d + '/a', d + '/b')
    assert os.listdir(d) and os.stat(d + '/b').st_size == 1
assert sqlite3.connect(':memory:').execute('select 1').fetchall() == [(1,)]
assert time.localtime().tm_year > 2000 and os.cpu_count() and random.random() < 1
if not os.fork(): os._exit(3)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 3
print(hashlib.sha256(b'').hexdigest()[:4])"""
    done = run_program(source, '', Confines(wall=30.))
    assert done.out == b'e3b0\n', done


# ---- layers that are missing

WITHOUT = """import ctypes, os, struct, sys
def deny(number, argument=None, value=0, error=1):
    "The kernel refuses a call from now on, or the call with a value of an argument"
    test = [] if argument is None else [(0x20, 0, 0, 16 + 8*argument), (0x15, 0, 1, value)]
    code = [(0x20, 0, 0, 0), (0x15, 0, len(test) + 1, number), *test, (6, 0, 0, 0x50000 | error), (6, 0, 0, 0x7fff0000)]
    program = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *o) for o in code))
    l = ctypes.CDLL(None)
    assert not l.prctl(38, 1, 0, 0, 0) and not l.prctl(22, 2, struct.pack('HxxxxxxQ', len(code), ctypes.addressof(program)), 0, 0)
"""
TAKEN = {'limits': 'deny(302, 1, 9)', 'namespaces': 'deny(272)', 'processes': 'deny(302, 1, 6)', 'files': 'deny(444, error=38)',
         'system calls': 'deny(157, 0, 22, 22)'}


def on_a_machine(without, code):
    "Output of a program of ours on a machine that lacks a layer"
    done = subprocess.run([sys.executable, '-c', f'{WITHOUT}\n{TAKEN[without]}\n{code}'], capture_output=True, text=True, timeout=120)
    assert not done.returncode, done.stderr
    return done.stdout.strip().split('\n')


@pytest.mark.skipif(not X86, reason='numbers of x86-64')
@pytest.mark.parametrize('layer', LAYERS)
def test_without_a_layer_nothing_runs(layer, tmp_path):
    code = f"""
from deepseek_nb.train.sandbox import Confines, isolation, run_calls, run_program
print([k for k, v in isolation().items() if v is not True])
for attempt in (lambda: run_program('print("it ran")'), lambda: run_calls('x = 1', ['x'])):
    try: print(attempt())
    except OSError as e: print('was not run' in str(e) and {layer!r} in str(e) and 'Confines(without=' in str(e))
lost = ('namespaces', 'processes') if {layer!r} == 'namespaces' else ({layer!r},)
print(run_program('print("it ran")', confines=Confines(without=lost)).out)"""
    lost, *refused, ran = on_a_machine(layer, code)
    assert layer in eval(lost) and eval(lost) in ([layer], ['namespaces', 'processes'])
    assert refused == ['True']*2 and ran == r"b'it ran\n'"


@pytest.mark.skipif(not X86, reason='numbers of x86-64')
def test_without_namespaces_an_answer_earns_nothing_by_killing(sleeper):
    code = f"""
from deepseek_nb.train.rewards import program_reward
answer = 'import os\\ntry: os.kill({sleeper.pid}, 9)\\nexcept OSError: pass\\ndef f(): return 1'
try: print(program_reward()(None, [answer], [['assert f() == 1']]))
except OSError as e: print('refused', e)"""
    assert on_a_machine('namespaces', code)[0].startswith('refused the program was not run, because this machine lacks')
    assert sleeper.poll() is None


def test_a_layer_must_be_known():
    with pytest.raises(ValueError, match="without has 'network'; layers are limits, namespaces"):
        run_program('', confines=Confines(without=('network',)))


@pytest.mark.parametrize('code', ['import sys; sys.exit(0)', 'import os; os.kill(os.getpid(), 9)', 'x = ('])
def test_a_supervisor_that_fails_is_an_error_and_no_score(monkeypatch, code):
    monkeypatch.setattr(sandbox, '_command', lambda *a: [sys.executable, '-c', code])
    with pytest.raises(OSError, match='the sandbox failed, so nothing is known about the program'): run_calls('x = 1', ['x'])


def test_a_program_that_can_not_be_started_is_an_error(monkeypatch, tmp_path):
    (tmp_path/'s.py').write_text("import sys; sys.executable = '/nowhere'\n" + Path(sandbox.__file__).read_text())
    real = sandbox._command
    monkeypatch.setattr(sandbox, '_command', lambda *a: [str(tmp_path/'s.py') if c == sandbox.__file__ else c for c in real(*a)])
    with pytest.raises(OSError, match='nothing is known about the program: the program could not be started'): run_program('print(1)')

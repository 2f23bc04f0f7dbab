"""Processes of Python that start with PyTorch loaded, forked from one that imported it and nothing of ours

`run` and `start` take the words behind `python` on a command line, as `subprocess.run` and `subprocess.Popen` do behind
`sys.executable`, and give what these give. An import of PyTorch takes one to two seconds, a fork of a process that has done it a few
milliseconds. Not for tests of what `import torch` itself brings, of variables that are read when it is loaded (OMP_NUM_THREADS is 1),
or of the seed of `hash`, which all forks share. Elsewhere than on Linux each process is a new interpreter.
"""
import atexit
import gc
import inspect
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path

# What a test that trains needs, also in several processes; an optimiser imports the second
TRAINING = ('torch', 'torch._dynamo', 'torch.distributed.fsdp', 'safetensors.torch', 'einops', 'fastcore.all', 'datasets',
            'matplotlib.pyplot', 'pytest')
# What the files of tests import, for the workers of pytest-xdist; setuptools as in conftest.py
WORKER = ('setuptools', *TRAINING, 'peft', 'openai', 'anthropic', 'hypothesis', 'sqlalchemy', 'sqlalchemy.dialects.sqlite',
          'sqlalchemy.dialects.postgresql', 'psycopg', 'fasthtml.components', 'starlette.testclient', 'playwright.sync_api',
          'sklearn.metrics', 'openresponses_types', 'jsonschema')


def built_for(isa):
    """Variables that select an instruction set, and compile in half to two thirds of the time.
    AVX2 has multiply-adds, which -O1 alone doesn't fuse"""
    known = dict(portable='-O1', avx2='-O1 -fexpensive-optimizations')
    return dict(DEEPSEEK_NB_ISA=isa) | (dict(DEEPSEEK_NB_CXXFLAGS=known[isa]) if isa in known else {})


def sanitized(level='-O0'):
    """Variables that compile and run kernels under AddressSanitizer and UBSan; none where the compiler lacks them.
    Undefined behaviour traps, which AddressSanitizer reports with its place: a third less to compile than a message at each access.
    Frames on the heap, which the other option turns off, misalign vectors of 64 bytes (GCC 110027)"""
    library = subprocess.run(['c++', '-print-file-name=libasan.so'], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute(): return {}
    flags = '-fsanitize=address,undefined -fno-sanitize-recover=all -fsanitize-undefined-trap-on-error'
    return dict(LD_PRELOAD=library, ASAN_OPTIONS='detect_leaks=0:detect_stack_use_after_return=0:handle_sigill=1',
                DEEPSEEK_NB_CXXFLAGS=f'{flags} {level}')


# Goes before code that runs under a sanitizer: compilers that it starts need none, which takes half of their time
ALONE = 'import os; del os.environ["LD_PRELOAD"]\n'


# ---- the server


def become(words, env, cwd, fds):
    "Be the process that was asked for, to its end"
    for n, fd in enumerate(fds): os.dup2(fd, n)
    os.chdir(cwd)
    own = {p for p in os.environ.get('PYTHONPATH', '').split(os.pathsep) if p}
    base = [p for p in sys.path[1:] if p not in own]
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = ['', *(p for p in env.get('PYTHONPATH', '').split(os.pathsep) if p), *base]
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1 + (n < 2)*8191) for n, mode in enumerate('rww'))
    if words[0] == '-c':
        main = sys.modules['__main__'].__dict__
        for name in [n for n in main if not n.startswith('__')]: del main[name]
        sys.argv = ['-c', *words[2:]]
        exec(compile(words[1], '<string>', 'exec'), main)
    elif words[0] == '-m':
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name='__main__')


def lived(*args):
    "The exit status of `become`"
    status = 0
    try: become(*args)
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException: status = traceback.print_exc() or 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr): stream.flush()
    except BaseException: status = status or traceback.print_exc() or 120
    return status


def settle():
    """Do what each fork would do for itself. `torch.library` asks `inspect` for the module of a source file, which then looks for the
    files of all modules and keeps them (0.2 s of 8,000); and the collector of garbage would look through all objects"""
    inspect.getmodule(compile('', '/nowhere', 'exec'), '/nowhere')
    gc.collect()
    gc.freeze()


def serve(listener, modules):
    "Fork a process for each connection, which is told its id and at last its exit status"
    for name in modules:
        with suppress(ImportError): import_module(name)
    settle()
    listener = socket.socket(fileno=listener)
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running = {}
    while True:
        for ready in select.select([0, read, listener], [], [])[0]:
            if ready == 0: return                                       # whoever started this has ended
            if ready is read:
                os.read(read, 4096)
                while running:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid: break
                    try: running.pop(pid).sendall(b'%d\n' % os.waitstatus_to_exitcode(status))
                    except OSError: pass                                # nobody waits for it
                continue
            asked, _ = listener.accept()
            size, fds, _, _ = socket.recv_fds(asked, 4, 3)
            with asked.makefile('rb') as f: request = json.loads(f.read(int.from_bytes(size)))
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for s in (listener, asked, *running.values()): s.close()
                for fd in (read, write): os.close(fd)
                os._exit(lived(*request, fds) & 255)
            for fd in fds: os.close(fd)
            running[pid] = asked
            asked.sendall(b'%d\n' % pid)


# ---- who asks

_servers = {}


def server(modules):
    "The address of a server that has these modules"
    for those, path in json.loads(os.environ.get('WARM_SERVERS', '[]')):
        if modules == tuple(those): return path
    if modules not in _servers:
        path = Path(tempfile.mkdtemp(prefix='warm-'))/'s'
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        env = os.environ | (dict(TORCH_WARM_POOL='0') if modules == WORKER else dict(OMP_NUM_THREADS='1'))
        code = f'import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import warm; del sys.path[0]\n'
        code += f'warm.serve({listener.fileno()}, {modules})'
        p = subprocess.Popen([sys.executable, '-c', code], env=env, stdin=subprocess.PIPE, pass_fds=[listener.fileno()])
        listener.close()
        _servers[modules] = str(path), p
        atexit.register(lambda: (p.stdin.close(), p.wait(), path.unlink(), path.parent.rmdir()))
    return _servers[modules][0]


def share(*kinds):
    "Start a server for each of these modules, also for the processes that this one starts"
    os.environ['WARM_SERVERS'] = json.dumps([[modules, server(modules)] for modules in kinds])


class Process:
    "What `subprocess.Popen` would be, of a fork"
    def __init__(self, words, env, cwd, streams, modules):
        self.args, self.returncode, self.streams, self.socket = words, None, streams, socket.socket(socket.AF_UNIX)
        self.socket.connect(server(modules))
        text = json.dumps([[str(w) for w in words], dict(os.environ if env is None else env), str(cwd or os.getcwd())]).encode()
        socket.send_fds(self.socket, [len(text).to_bytes(4)], [s.fileno() for s in streams])
        self.socket.sendall(text)
        self.lines = self.socket.makefile('rb')
        self.pid = int(self.lines.readline())

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self.socket], [], [], timeout)[0]: raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self.lines.readline())
            self.lines.close()
            self.socket.close()
        return self.returncode

    def poll(self):
        return self.wait() if self.returncode is not None or select.select([self.socket], [], [], 0)[0] else None

    def send_signal(self, which):
        if self.poll() is None: os.kill(self.pid, which)

    def kill(self): self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        self.wait(timeout)
        found = []
        for s in self.streams[1:]:
            s.seek(0)
            found.append(s.read())
            s.close()
        return tuple(found)


def start(*words, env=None, cwd=None, stdin=None, modules=('torch',)):
    "A process that runs; what it prints goes into files"
    if sys.platform != 'linux':
        return subprocess.Popen([sys.executable, *map(str, words)], env=env, cwd=cwd, stdin=stdin, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)
    out, err = (tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') for _ in range(2))
    with open(os.devnull) as nothing: return Process(words, env, cwd, [stdin or nothing, out, err], modules)


def first_line(p, timeout=120):
    "What a process of `start` prints first"
    if not isinstance(p, Process): return p.stdout.readline().rstrip('\n')
    end = time.monotonic() + timeout
    while True:
        out, err = (os.pread(s.fileno(), 2**16, 0).decode(errors='replace') for s in p.streams[1:])  # at a place of its own
        if '\n' in out: return out.partition('\n')[0]
        if p.poll() is not None or time.monotonic() > end: raise RuntimeError(f'nothing was printed, and the process said: {err}')
        time.sleep(.01)


def run(*words, timeout=600, check=False, **kwargs):
    "What `subprocess.run` gives, with text of both streams"
    p = start(*words, **kwargs)
    try: out, err = p.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        p.kill()
        raise
    done = subprocess.CompletedProcess(words, p.returncode, out, err)
    if check: done.check_returncode()
    return done


def replace(words):
    "Let a fork do what this interpreter was started for, with its streams, and end with its exit status"
    p = Process(words[words.index('-c'):], None, None, [sys.stdin, sys.stdout, sys.stderr], WORKER)
    with open(os.devnull, 'r+') as nothing:
        for fd in range(3): os.dup2(nothing.fileno(), fd)
    return p.wait()


if __name__ == '__main__': sys.exit(replace(sys.argv))

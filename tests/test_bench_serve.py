"The load generator against a server of the tests, its arithmetic on known answers, and a benchmark that goes on where it stopped."
import asyncio
import json
import os
import statistics
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from deepseek_nb.bench import load_result, run_command, serve
from deepseek_nb.bench.serve import (
    Arm,
    Command,
    Endpoint,
    Limits,
    NotStarted,
    Run,
    ServeReport,
    Sizes,
    Trace,
    arrivals,
    ask,
    closed_loop,
    load_summary,
    measure_all,
    one_token_words,
    open_loop,
    percentiles,
    random_prompts,
    read_chunks,
    read_events,
    running,
    runs_of,
)
from deepseek_nb.files.tokenizer import Tokenizer


class Stub:
    "A server of completions in this event loop: it keeps what it was asked, and the most requests that it had at a time."
    def __init__(self, answer=None, together=0):
        default = [dict(choices=[dict(text=' a')])]*3 + ['[DONE]']
        self.asked, self.now, self.most, self.answer = [], 0, 0, default if answer is None else answer
        self.together, self.all_here = together, asyncio.Event()

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.handle, '127.0.0.1', 0)
        return Endpoint(self.server.sockets[0].getsockname()[1], 'stub', dict(seed=1))

    async def __aexit__(self, *_): self.server.close()

    async def handle(self, reader, writer):
        head = await reader.readuntil(b'\r\n\r\n')
        size = next(int(line.split(b':')[1]) for line in head.split(b'\r\n') if line.lower().startswith(b'content-length'))
        self.asked.append(json.loads(await reader.readexactly(size)))
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now >= self.together: self.all_here.set()
        await self.all_here.wait() # answers nobody before so many are here
        if isinstance(self.answer, bytes): writer.write(self.answer)
        else:
            writer.write(b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n')
            for e in self.answer:
                data = f'data: {e if isinstance(e, str) else json.dumps(e)}\n\n'.encode()
                writer.write(b'%x\r\n%b\r\n' % (len(data), data))
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(b'0\r\n\r\n')
        self.now -= 1
        writer.close()


def run(work): return asyncio.run(asyncio.wait_for(work, 60))


# ---- the protocol

BODY = b': hello\n\ndata: {"a": "\xc3\xa9"}\n\nevent: x\ndata:{"b": 2}\n\ndata: [DONE]\n\n'
WANT = ['{"a": "é"}'.encode(), b'{"b": 2}', b'[DONE]']


async def collect(chunks): return [e async for e in read_events(chunks)]


async def pieces(parts):
    for p in parts: yield p


@pytest.mark.parametrize('n', [1, 2, 3, 7, 1000])
def test_events_do_not_depend_on_where_the_bytes_are_cut(n):
    parts = [BODY[i:i + n] for i in range(0, len(BODY), n)]
    assert run(collect(pieces(parts))) == WANT

    async def chunked():
        reader = asyncio.StreamReader()
        wire = b''.join(b'%x\r\n%b\r\n' % (len(p), p) for p in parts) + b'0\r\n\r\n'
        for i in range(0, len(wire), 5): reader.feed_data(wire[i:i + 5])
        return await collect(read_chunks(reader, True))
    assert run(chunked()) == WANT


def test_a_request_says_what_it_wants():
    async def work():
        async with (stub := Stub()) as to: return await ask(to, [1, 2], 7, 0.), stub.asked
    trace, asked = run(work())
    assert asked == [dict(model='stub', prompt=[1, 2], max_tokens=7, temperature=0, stream=True, seed=1)]
    assert not trace.error and len(trace.times) == trace.tokens == 3 and trace.prompt is None
    assert trace.start <= trace.times[0] <= trace.times[-1]


def test_tokens_come_from_the_usage():
    "Pieces of several tokens, a chat's deltas, and events without text."
    answer = [dict(choices=[dict(delta=dict(role='assistant', content=''))]), dict(choices=[dict(delta=dict(content='abc'))]),
              dict(choices=[dict(text='d')], usage=None), dict(choices=[], usage=dict(prompt_tokens=9, completion_tokens=5))]
    async def work():
        async with Stub(answer) as to: return await ask(to, 'x', 5, 0.)
    trace = run(work())
    assert (trace.error, len(trace.times), trace.tokens, trace.prompt) == ('', 2, 5, 9)


@pytest.mark.parametrize('answer, part', [
    (b'HTTP/1.1 503 Busy\r\n\r\ntry later', 'try later'), (b'HTTP/1.1 404 Not Found\r\n\r\n', '404'), (b'', 'closed the connection'),
    (b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n40\r\ndata: {"cho', 'IncompleteReadError'),
    (b'HTTP/1.1 200 OK\r\n\r\ndata: {"choices"\n\n', 'JSONDecodeError'), ([dict(error=dict(message='out of pages'))], 'out of pages'),
    ([dict(choices=[dict(text='')]), '[DONE]'], 'the answer is empty')])
def test_failures_are_kept(answer, part):
    async def work():
        async with Stub(answer) as to: return await closed_loop(to, ['a', 'b'], 3, 1)
    traces = run(work())
    found = load_summary(traces)
    assert all(part in t.error for t in traces) and part in found['error'] and (found['requests'], found['failed']) == (2, 2)
    assert 'throughput' not in found


def test_nobody_listens():
    trace = run(ask(Endpoint(serve.free_port(), 'x'), 'a', 1, 0.))
    assert 'Connection' in trace.error


# ---- the loops

@pytest.mark.parametrize('streams, n', [(1, 3), (4, 12), (5, 7), (8, 8)])
def test_a_closed_loop_keeps_so_many_streams_busy(streams, n):
    async def work():
        async with (stub := Stub(together=streams)) as to: return await closed_loop(to, [str(i) for i in range(n)], 3, streams), stub
    traces, stub = run(work())
    assert stub.most == streams and sorted(int(a['prompt']) for a in stub.asked) == [*range(n)]
    assert len(traces) == n and not any(t.error for t in traces)


def test_an_open_loop_waits_for_nobody():
    "The server answers only when all requests have arrived: a closed loop would never end."
    async def work():
        async with (stub := Stub(together=9)) as to: return await open_loop(to, [str(i) for i in range(9)], 3, 400., seed=3), stub
    traces, stub = run(work())
    assert stub.most == 9 and [t.start for t in traces] == arrivals(9, 400., 3)
    assert all(t.times[0] >= traces[-1].start for t in traces) # the clock of the first one ran all the time


def test_arrivals():
    times = arrivals(20_000, 5., 1)
    gaps = np.diff(times)
    assert times == arrivals(20_000, 5., 1) != arrivals(20_000, 5., 2) and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(.2, rel=.05) and gaps.std() == pytest.approx(.2, rel=.05) # exponential: both are the same


# ---- the arithmetic

@pytest.mark.parametrize('n', [2, 3, 50, 101, 1000])
def test_percentiles_are_interpolated(n):
    xs = [((i*7919) % n)/n for i in range(n)]
    cuts = statistics.quantiles(xs, n=100, method='inclusive')
    assert percentiles(xs) == pytest.approx([cuts[49], cuts[98]], abs=1e-6)


def test_one_stall_among_a_thousand_gaps():
    "p99 sees ten stalls in 500 gaps and not three; the longest sees each."
    def found(stalls):
        gaps = [.5 if i < stalls else .01 for i in range(500)]
        return load_summary([Trace(0., tuple(np.cumsum([.1, *gaps])), 501)])
    few, many = found(3), found(10)
    assert few['itl'] == pytest.approx([.01, .01], abs=1e-4) and few['longest'] == pytest.approx(.5, abs=1e-4)
    assert many['itl'] == pytest.approx([.01, .5], abs=1e-4)


def test_tpot_is_a_mean_and_itl_is_not():
    "Four tokens at a time: the same time a token, gaps four times as long."
    single, fours = Trace(0., tuple(.1*i for i in range(1, 14)), 13), Trace(0., (.1, .5, .9, 1.3), 13)
    assert single.tpot == pytest.approx(fours.tpot) == pytest.approx(.1)
    assert load_summary([single])['itl'][0] == pytest.approx(.1) and load_summary([fours])['itl'][0] == pytest.approx(.4)


LIMITS = {Limits(1., .25): 3, Limits(1., .125): 2, Limits(.5, .25): 2, Limits(.5, .125): 1, Limits(.4, .25): 0, Limits(9, 9): 4}

@pytest.mark.parametrize('limits, kept', LIMITS.items())
def test_goodput_counts_requests_that_keep_both_limits(limits, kept):
    first = [Trace(0., (.5, .75, 1.), 5), Trace(0., (.5, 1.5), 5), Trace(1., (2., 2.25), 3), Trace(0., (3., 4.), 11)]
    found = load_summary([*first, Trace(0., error='refused')], limits)
    assert (found['kept'], found['failed'], found['seconds']) == (kept, 1, 4.)
    assert found['goodput'] == pytest.approx(kept/4) and found['throughput'] == 24/4


# ---- prompts

def test_prompts_have_exactly_so_many_tokens():
    tok = Tokenizer.from_pretrained('mini')
    words = one_token_words(tok)
    for seed in range(5):
        texts = random_prompts(words, 6, 40, seed, shared=10*(seed % 2))
        ids = [tok.encode(t) for t in texts]
        assert {*map(len, ids)} == {40} and len({*texts}) == 6
        assert len({tuple(i[:10]) for i in ids}) == (1 if seed % 2 else 6)
    assert random_prompts(words, 2, 9, 'a') == random_prompts(words, 2, 9, 'a') != random_prompts(words, 2, 9, 'b')


# ---- servers

CHILD = '''
import subprocess, sys, os
from http.server import *
child = subprocess.Popen(["sleep", "600"])
class H(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def do_GET(self):
        data = ('{"data": [{"id": "%d %d"}]}' % (os.getpid(), child.pid)).encode()
        self.send_response(200); self.send_header("content-length", str(len(data))); self.end_headers(); self.wfile.write(data)
HTTPServer(("127.0.0.1", int(sys.argv[1])), H).serve_forever()
'''
ONE = Arm('stub', 'm', 'x', 'file')


def alive(pid):
    try: return open(f'/proc/{pid}/stat').read().split()[2] != 'Z'
    except FileNotFoundError: return False


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_a_server_ends_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setitem(serve.COMMANDS, 'stub', Command(sys.executable, lambda path, port, n: ['-c', CHILD, port]))
    with running(ONE, tmp_path) as to:
        pids = [int(x) for x in to.model.split()]
        assert all(map(alive, pids)) and os.getpgid(pids[1]) == pids[0]
    end = time.monotonic() + 30 # the kernel takes a moment
    while any(map(alive, pids)) and time.monotonic() < end: time.sleep(.005)
    assert not any(map(alive, pids))


@pytest.mark.parametrize('code, part', [('raise OSError("no such library")', 'no such library'), ('', 'it wrote nothing')])
def test_a_server_that_does_not_start_says_why(monkeypatch, tmp_path, code, part):
    monkeypatch.setitem(serve.COMMANDS, 'stub', Command(sys.executable, lambda path, port, n: ['-c', code]))
    with pytest.raises(NotStarted, match=part), running(ONE, tmp_path): pass


def test_every_arm_has_a_command():
    for arm in serve.ARMS:
        words = [*map(str, serve.COMMANDS[arm.server].options(f'folder/{arm.file}', 1234, 2))]
        assert f'folder/{arm.file}' in words and '1234' in words and arm.model in ('SmolLM2', 'bench-moe'), arm.name
        assert {1, 8} <= {*arm.core} and not {*arm.core} & {*arm.more}
    words = serve.COMMANDS['llama-cpp-python'].options('f', 1, 2)
    assert words[words.index('--interrupt_requests') + 1] == 'false' == words[words.index('--logits_all') + 1]


# ---- the benchmark

class Answers(BaseHTTPRequestHandler):
    "Four tokens at once"
    def log_message(self, *args): pass
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['content-length'])))
        self.send_response(200)
        self.end_headers()
        n = body['max_tokens']
        for _ in range(n): self.wfile.write(b'data: {"choices": [{"text": " a"}]}\n\n')
        usage = dict(prompt_tokens=len(body['prompt'].split()), completion_tokens=n)
        self.wfile.write(f'data: {json.dumps(dict(choices=[], usage=usage))}\n\n'.encode())


@pytest.fixture(scope='module')
def port():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


LOADS = dict(deepseek_nb=((1, 2), (3,), (200.,)), vllm=((1, 2), ()), broken=((1,), ()))
ARMS = tuple(Arm(n, 'a', 'x', 'f', *loads) for n, loads in LOADS.items())
SIZES, WORDS = Sizes(12, 4, 8, 20, .02), dict(a=[' one', ' two', ' six'])


class Starts:
    "Starts no server, and counts"
    def __init__(self, port): self.port, self.names = port, []

    @contextmanager
    def __call__(self, arm):
        self.names.append(arm.name)
        if arm.server == 'broken': raise NotStarted('exit status 1: broken')
        yield Endpoint(self.port, 'm')


@pytest.fixture
def quick(monkeypatch): monkeypatch.setattr(serve, 'host_busy', lambda: .01)


def test_an_interrupted_benchmark_goes_on(port, quick):
    whole = {r for arm in ARMS[:2] for i in range(2) for r in runs_of(arm, i, i == 1)}
    report, kept, before = ServeReport({}), [], Starts(port)

    def save():
        kept.append(json.dumps(vars(report)))
        if len(report.runs) == 4: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): measure_all(report, ARMS, 2, WORDS, before, save, SIZES)
    again = ServeReport(**json.loads(kept[-1]))
    assert len(again.runs) == 4 and again.done() < whole
    first, starts = json.dumps(again.runs), Starts(port)
    measure_all(again, ARMS, 2, WORDS, starts, sizes=SIZES)
    assert json.dumps(again.runs[:4]) == first and again.done() == whole and len(again.runs) == len(whole)
    assert again.left == {ARMS[2].name: 'exit status 1: broken'} and [*before.names, *starts.names].count(ARMS[2].name) == 1
    assert len(starts.names) <= 5 # a server for each arm and round, and none for what is there
    starts = Starts(port)
    measure_all(again, ARMS, 2, WORDS, starts, sizes=SIZES)
    assert starts.names == [] and len(again.runs) == len(whole)


def test_runs_measure_what_they_say(port, quick):
    report = measure_all(ServeReport({}), ARMS[:1], 1, WORDS, Starts(port), sizes=SIZES)
    by = {(r['kind'], r['load']): r for r in report.runs}
    assert [*by] == [('closed', 1), ('closed', 2), ('closed', 3), ('prefix', 1), ('shared', 8), ('open', 200.)]
    for (kind, load), r in by.items():
        if kind == 'prefix':
            assert len(r['new']) == len(r['again']) == 3
            continue
        assert (r['requests'], r['failed'], r['prompt']) == (6 if kind == 'open' else load, 0, [12]) and r['tokens'] == 4*r['requests']
        assert r['busy'] == .01


def test_time_is_up(port, quick):
    report, starts = ServeReport({}), Starts(port)
    measure_all(report, ARMS, 2, WORDS, starts, sizes=SIZES, minutes=0)
    assert report.runs == [] and starts.names == []


def test_a_run_that_takes_too_long_is_given_up(port, quick):
    sizes = Sizes(12, 4, 8, 20, .02, patience=1e-6)
    report = measure_all(ServeReport({}), ARMS[1:2], 1, WORDS, Starts(port), sizes=sizes)
    assert [r['error'] for r in report.runs] == ['not complete after 0 s']*3
    assert report.values(ARMS[1].name, 'closed', 1, 'throughput') == []
    assert ARMS[1].name in report._repr_markdown_()


def test_the_best_peer_and_the_table():
    def r(arm, load, i, x): return dict(Run(arm, 'closed', load, i)._asdict(), throughput=x, itl=[.01, .05], ttft=[.1, .2])
    peers = [r('vllm, a x', 8, i, x) for i,x in enumerate((10., 90., 50.))]
    others = r('deepseek_nb, a x', 8, 0, 900.), r('llama-server, a x', 8, 0, 45.), r('llama-server, b x', 8, 0, 400.)
    report = ServeReport({}, runs=[*peers, *others])
    assert report.best_peer('a') == 'vllm, a x' and report.best_peer('b') == 'llama-server, b x' and report.best_peer('c') is None
    line = next(x for x in report._repr_markdown_().splitlines() if 'vllm' in x)
    assert '50 (10 to 90)' in line and '50.0' in line


def test_one_arm_alone(monkeypatch, tmp_path, quick):
    "A server that reads a GGUF file, chosen by a part of its name; it isn't installed here."
    monkeypatch.setattr(serve, 'program', lambda server, peers='': None)
    report = serve.serve_load(only='llama-server', models=str(tmp_path))
    assert report.left == {'llama-server, SmolLM2 Q4_0': 'llama-server is not installed'} and report.runs == []


def test_smoke(tmp_path, capsys, monkeypatch):
    "Our own server as a process, through the command; a second call starts nothing."
    path = tmp_path/'serve.json'
    given = dict(smoke=True, threads=1, out=str(path))
    run_command('serve', **given)
    assert 'deepseek_nb, mini float32' in capsys.readouterr().out
    first = load_result('serve', tmp_path)
    assert first['name'] == 'serve' and len(first['result']['runs']) == 5 and first['result']['left'] == {}
    assert all(not r.get('error') for r in first['result']['runs'])
    def none(*args): raise AssertionError('a server was started')
    monkeypatch.setattr(serve, 'running', none)
    run_command('serve', **given)
    assert load_result('serve', tmp_path)['result'] == first['result']
    ServeReport(**first['result']).plot('mini')
    with pytest.raises(ValueError, match='was measured with other sizes or threads'): run_command('serve', smoke=True, out=str(path))

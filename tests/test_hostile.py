"""A server among clients that are slow, greedy, curious or gone, on a disk that is full, and when it is told to stop."""
import asyncio
import builtins
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import warm

pytest.importorskip('openai')
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402
from test_server import HI, JSON, TEMPLATE, Live  # noqa: E402

JSON_KIND = dict(content_type='application/json')

from deepseek_nb.arch.model import Model  # noqa: E402
from deepseek_nb.core.config import Config  # noqa: E402
from deepseek_nb.core.device import give_memory_back  # noqa: E402
from deepseek_nb.files.tokenizer import Tokenizer  # noqa: E402
from deepseek_nb.infer import persist  # noqa: E402
from deepseek_nb.infer.engine import Engine, EngineClosed, QueueFull  # noqa: E402
from deepseek_nb.infer.request import Request  # noqa: E402
from deepseek_nb.infer.sampling import SamplingParams  # noqa: E402
from deepseek_nb.serve import app as serve_app  # noqa: E402
from deepseek_nb.serve.app import Server, ServerConfig, key_digest  # noqa: E402
from deepseek_nb.serve.chat import ServedModel  # noqa: E402
from deepseek_nb.serve.logs import REQUESTS, JsonLines  # noqa: E402

TINY = Config('qwen2', vocab_size=4096, dim=32, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16, inter_dim=32, attn_bias=True,
              max_positions=512)
ON = {0: -100, 1: -100}  # an answer that goes on to its limit: without the end tokens


@pytest.fixture(scope='module')
def tok():
    tok = Tokenizer.from_pretrained('mini')
    tok.chat_template = TEMPLATE
    return tok


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return Model(TINY, dtype=torch.float32, device='cpu').requires_grad_(False).init_weights(std=.2)


class Direct:
    "A server's application, asked without a socket; its engine has a thread."
    def __init__(self, model, tok, config=None, **engine):
        self.engine = Engine(model, tok, **dict(nbytes=2**20) | engine).start()
        self.server = Server([ServedModel('tiny', self.engine, tok)], config or ServerConfig(log_format='off'))
        self.app = self.server.app()

    async def ask(self, body=None, path='/v1/completions', leave=False, **headers):
        "Status, headers and body of a response."
        data, got, turns = b'' if body is None else json.dumps(body).encode(), [], iter((0,))
        async def receive():
            if next(turns, None) is not None: return dict(type='http.request', body=data, more_body=False)
            if leave: return dict(type='http.disconnect')
            await asyncio.Future()
        async def send(message): got.append(message)
        scope = dict(type='http', asgi=dict(version='3.0', spec_version='2.3'), http_version='1.1', path=path,
                     method='GET' if body is None else 'POST', state={}, raw_path=path.encode(), root_path='', scheme='http',
                     query_string=b'secret=1', client=('127.0.0.1', 1), server=('127.0.0.1', 2),
                     headers=[(k.replace('_', '-').encode(), v.encode()) for k, v in (JSON_KIND | headers).items()])
        await self.app(scope, receive, send)
        if not got: return 0, {}, b''
        return got[0]['status'], {k.decode(): v.decode() for k, v in got[0]['headers']}, b''.join(m.get('body', b'') for m in got[1:])

    def asked(self, *args, **how): return asyncio.run(self.ask(*args, **how))

    def metrics(self):
        text = self.asked(path='/metrics')[2].decode()
        return {(s.name, s.labels.get('finished_reason')): s.value for f in text_string_to_metric_families(text) for s in f.samples
                if 'le' not in s.labels}

    def stop(self):
        self.engine.close(drain=False)
        assert not self.engine.thread.is_alive()


@pytest.fixture(scope='module')
def direct(model, tok):
    direct = Direct(model, tok, nbytes=2**18)
    yield direct
    direct.stop()


@pytest.fixture(scope='module')
def live():
    live = Live(patience=.5, log_format='off')
    yield live
    live.stop()


@pytest.fixture
def lines():
    "The lines of the log, as JSON."
    class Kept(logging.Handler):
        def emit(self, record): out.append(self.format(record))
    log, out, kept = logging.getLogger(REQUESTS), [], Kept()
    kept.setFormatter(JsonLines())
    log.addHandler(kept)
    level = log.level
    log.setLevel(logging.DEBUG)
    yield out
    log.removeHandler(kept)
    log.setLevel(level)


# ---- what the operator sees

def test_metrics_are_the_sums_of_the_usage(model, tok):
    "Whole, streamed, failed and cancelled requests; the text is read by Prometheus' own parser."
    direct = Direct(model, tok)
    try:
        usage = []
        for i in range(6):
            body = dict(model='tiny', prompt=[1 + i % 2]*(70 + i), max_tokens=3 + i, logit_bias=ON | {2: -100}, stream=i % 2 == 1)
            if body['stream']: body['stream_options'] = dict(include_usage=True)
            status, _, text = direct.asked(body)
            assert status == 200
            usage.append(json.loads(text.split(b'\n\n')[-3][6:] if body['stream'] else text)['usage'])
        for bad in (dict(n=0), dict(max_tokens=-1), dict(model='x')):
            assert direct.asked(dict(model='tiny', prompt=[1]) | bad)[0] >= 400
        prompt, new, hit = (sum(u[k] for u in usage) for k in ('prompt_tokens', 'completion_tokens', 'prompt_cache_hit_tokens'))
        assert hit == 64 + 64 + 72 + 73  # the third request finds a page of the first; of the next page, eight tokens or more are shared
        seen = direct.metrics()
        found = {k: seen[f'vllm:{k}', None] for k in (
            'prompt_tokens_total', 'generation_tokens_total', 'prefix_cache_queries_total', 'prefix_cache_hits_total',
            'request_prompt_tokens_sum', 'request_generation_tokens_sum', 'request_prompt_tokens_count',
            'time_to_first_token_seconds_count',
            'inter_token_latency_seconds_count', 'e2e_request_latency_seconds_count', 'request_queue_time_seconds_count')}
        assert [*found.values()] == [prompt, new, prompt, hit, prompt, new, 6, 6, new - 6, 6, 6]
        assert sum(v for (name, _), v in seen.items() if name == 'vllm:request_success_total') == 6
        assert [seen[f'vllm:{k}', None] for k in ('num_requests_running', 'num_requests_waiting', 'kv_cache_usage_perc')] == [0]*3
        parts = sum(seen[f'vllm:{k}_sum', None] for k in ('time_to_first_token_seconds', 'inter_token_latency_seconds'))
        assert parts <= seen['vllm:e2e_request_latency_seconds_sum', None]  # the first token and the gaps are parts of the whole
    finally: direct.stop()


def test_the_log_tells_no_secrets(model, tok, lines):
    "One line a request, whatever its end; content only where it was asked for."
    words = 'The President shall'
    messages = [dict(role='user', content=words)]
    chat = dict(model='tiny', messages=messages, max_tokens=4, temperature=0, logit_bias=ON, user='ann@host')
    for prompts in (False, True):
        direct = Direct(model, tok, ServerConfig(keys=dict(ann=key_digest('sk-ann')), log_format='off', log_prompts=prompts))
        try:
            lines.clear()
            key = dict(authorization='Bearer sk-ann')
            status, headers, text = direct.asked(chat, '/v1/chat/completions', x_request_id='trace-1', **key)
            answer = json.loads(text)['choices'][0]['message']['content']
            assert (status, headers['x-request-id']) == (200, 'trace-1') and len(answer) > 3
            direct.asked(chat | dict(stream=True), '/v1/chat/completions', leave=True, **key)
            direct.asked(chat | dict(n=words), '/v1/chat/completions', **key)
            direct.asked(chat, '/v1/chat/completions', authorization=f'Bearer {words}')
            direct.asked(path='/v1/models/' + 'x'*5000, **key)
            direct.asked(path='/health')
            found = [json.loads(line) for line in lines]
            assert [f['status'] for f in found] in ([200, o, 400, 401, 404, 200] for o in (200, 499)) and found[-1]['level'] == 'debug'
            first, left, bad, wrong, *_ = found
            assert (first['id'], first['prompt_tokens'], first['completion_tokens'], first['finish']) == \
                ('trace-1', json.loads(text)['usage']['prompt_tokens'], 4, 'length')
            assert first['user'] and first['key'] == left['key'] == 'ann'
            if left['status'] == 200: assert first['user'] == left['user'] and left['finish'] in ('cancelled', 'length')
            assert first['queue'] + first['prefill'] + first['decode'] <= first['seconds']
            assert (bad['error'], wrong['error']) == ('invalid_request_error', 'invalid_api_key') and 'user' not in wrong
            shown = [w in '\n'.join(lines) for w in (words, json.dumps(answer, ensure_ascii=False)[1:-1])]
            assert shown == [prompts]*2 and not any(w in '\n'.join(lines) for w in ('sk-ann', 'ann@host', 'secret'))
        finally: direct.stop()


def test_a_dead_engine_is_not_healthy(model, tok):
    direct = Direct(model, tok)
    assert [direct.asked(path=p)[0] for p in ('/health', '/ready')] == [200, 200]
    direct.stop()
    assert [direct.asked(path=p)[0] for p in ('/health', '/ready')] == [503, 503]
    status, headers, text = direct.asked(dict(model='tiny', prompt=[1]))
    assert (status, json.loads(text)['error']['code'], headers['retry-after']) == (503, 'draining', '1')


# ---- many, and curious

def test_no_growth_of_memory(direct, monkeypatch):
    """Requests that succeed, fail, stream and leave, each of another user, leave nothing behind.

    2,000 after a warm-up of 500; DEEPSEEK_NB_REQUESTS=10000 sends more (about 1 ms of CPU each).
    """
    monkeypatch.setattr(logging.getLogger(REQUESTS), 'propagate', False)  # pytest keeps all lines that it sees
    count, turn = int(os.environ.get('DEEPSEEK_NB_REQUESTS', 2000)), iter(range(10**9))
    async def worker(until):
        while (i := next(turn)) < until:
            body = dict(model='tiny', prompt=[1 + i % 50, 2, 3], max_tokens=1, user=f'user {i}')
            if i % 10 == 5: body['prompt'] = [i % 4000]*70  # a page, so the prefix cache fills and evicts
            if i % 10 == 7: body['n'] = 0
            await direct.ask(body | dict(stream=i % 10 > 7), leave=i % 10 == 9, x_request_id=f'request-{i}')
    async def run(until): await asyncio.gather(*[worker(until) for _ in range(16)])
    def size():
        while direct.engine.count: time.sleep(.001)
        for _ in range(2): gc.collect()
        give_memory_back()  # pages that earlier tests left full of holes are no growth
        return len(gc.get_objects()), sys.getallocatedblocks(), int(Path('/proc/self/statm').read_text().split()[1])*4096
    asyncio.run(run(500))
    before = size()
    turn = iter(range(500, 10**9))
    asyncio.run(run(500 + count))
    objects, blocks, resident = (b - a for a, b in zip(before, size(), strict=True))
    assert objects < count/10 and blocks < count/2 and resident < 2**24
    assert not direct.engine.queue.served and not +direct.server.running
    assert len(direct.engine.store.tree.roots) <= direct.engine.pool.pages


def test_nobody_sees_whose_prefix_is_cached(model, tok):
    "A prefix of another user takes the same path as one that nobody has: the same hits, tokens, steps and pages."
    seen = []
    for prompt in ([7]*200, [8]*200):  # the first is in Ann's cache
        engine = Engine(model, tok, nbytes=2**20, budget=64)
        paths, take = [], engine.pool.take
        def run(user, engine=engine, paths=paths, prompt=prompt):
            stream = engine.submit(Request(prompt, SamplingParams(temperature=0.), max_tokens=4, stop_ids=(), user=user))
            while engine.step(): continue
            return stream.usage.prompt_cache_hit_tokens
        engine.submit(Request([7]*200, max_tokens=4, stop_ids=(), user='ann/1'))
        while engine.step(): continue
        engine.on_step = lambda record, paths=paths: paths.append([*record.counts.values()])
        engine.pool.take = lambda paths=paths, take=take: paths.append('page') or take()
        computed = engine.stats.prompt_tokens
        hits = [run('bob/1'), run('ann/2')]
        seen.append((hits, engine.stats.prompt_tokens - computed, [*paths]))
        assert [run('bob/1'), run('ann/1')] == [192, 192 if prompt[0] == 7 else 0]
    assert seen[0] == seen[1] and seen[0][:2] == ([0, 0], 400)


def test_keys_and_users_are_apart(model, tok):
    "Through HTTP: one key, another key, another user of the first key; a key's name can't imitate a user."
    keys = dict(ann=key_digest('sk-a'), bob=key_digest('sk-b'))
    direct = Direct(model, tok, ServerConfig(keys=keys, log_format='off'))
    try:
        def hits(key, **user):
            body = dict(model='tiny', prompt=[9]*150, max_tokens=1) | user
            return json.loads(direct.asked(body, authorization=f'Bearer {key}')[2])['usage']['prompt_cache_hit_tokens']
        assert [hits('sk-a'), hits('sk-b'), hits('sk-a', user='1'), hits('sk-b', user='ann/1'), hits('sk-a', user='1')] == [0, 0, 0, 0, 149]
        with pytest.raises(ValueError, match="key name 'ann/1' has a /"): ServerConfig(keys={'ann/1': key_digest('x')})
    finally: direct.stop()


def deep(n): return dict(type='array', items=deep(n - 1)) if n else dict(type='integer')


@pytest.mark.parametrize('schema', [
    deep(200), dict(enum=[f'value {i}' for i in range(40_000)]), dict(type='string', pattern='^((a{1,1000}){1,1000}){1,1000}$'),
    {'$ref': '#'}, {'$defs': {f'd{i}': dict(anyOf=[{'$ref': f'#/$defs/d{i + 1}'}]*9) for i in range(40)} | dict(d40=dict(type='null')),
                    '$ref': '#/$defs/d0'}, dict(type='array', minItems=10**9, items={}), dict(type='string', minLength=10**9)],
    ids=['deep', 'enum', 'pattern', 'loop', 'double', 'items', 'length'])
def test_schema_bombs(direct, schema):
    "Refused or answered; others are answered meanwhile."
    form = dict(type='json_schema', json_schema=dict(name='x', schema=schema))
    body = dict(model='tiny', messages=HI, max_tokens=4, response_format=form)
    async def both():
        bomb = asyncio.ensure_future(direct.ask(body, '/v1/chat/completions'))
        good = await direct.ask(dict(model='tiny', prompt=[1], max_tokens=2))
        return (await bomb)[0], good[0]
    bomb, good = asyncio.run(asyncio.wait_for(both(), 60))
    assert bomb in (200, 400) and good == 200


def test_slow_work_beside_the_engine_delays_no_answer(direct):
    "Threads that other routes use are all taken."
    async def both():
        end = threading.Event()
        busy = [asyncio.ensure_future(asyncio.to_thread(end.wait, 60)) for _ in range(64)]
        try: return (await asyncio.wait_for(direct.ask(dict(model='tiny', prompt=[1], max_tokens=2)), 30))[0]
        finally:
            end.set()
            await asyncio.gather(*busy)
    assert asyncio.run(both()) == 200


# ---- connections

def request(body, path='/v1/chat/completions', close='close'):
    data = json.dumps(dict(model='mini', messages=HI, logit_bias=ON) | body).encode()
    return f'POST {path} HTTP/1.1\r\n{JSON}Content-Length: {len(data)}\r\nConnection: {close}\r\n\r\n'.encode() + data


def unchunked(answer):
    "Status and body of a response, chunked or not."
    head, _, rest = answer.partition(b'\r\n\r\n')
    body = b'' if b'chunked' in head else rest
    while b'chunked' in head and (size := int((line := rest.partition(b'\r\n'))[0], 16)):
        body, rest = body + line[2][:size], line[2][size + 2:]
    return int(head.split()[1]), body


def events(body): return [json.loads(e[6:]) for e in body.split(b'\n\n') if e.startswith(b'data: {')]


@pytest.mark.parametrize('stream', [False, True])
def test_a_half_closed_client_gets_its_answer(live, stream):
    "As from `nc -N`: the sending side is closed behind the request. One that then leaves is noticed."
    options = dict(include_usage=True) if stream else None
    status, body = unchunked(live.raw(request(dict(max_tokens=100, stream=stream, stream_options=options)), half=True))
    usage = events(body)[-1]['usage'] if stream else json.loads(body)['usage']
    assert status == 200 and usage['completion_tokens'] == 100 and body.endswith(b'data: [DONE]\n\n') == stream
    status, body = unchunked(live.raw(request(dict(max_tokens=-1, stream=stream)), half=True))
    assert status == 400 and 'max_tokens' in json.loads(body)['error']['message']
    with socket.create_connection(('127.0.0.1', live.port)) as s:
        s.sendall(request(dict(max_tokens=450, stream=stream)))
        s.shutdown(socket.SHUT_WR)
        while not live.engine.count: time.sleep(.001)
    live.idle()


@pytest.mark.parametrize('head', [b'', b'POST /v1/chat/completions HTTP/1.1\r\nHost:', b'GET / HTT'])
def test_a_slow_head_is_not_waited_for(live, head):
    with socket.create_connection(('127.0.0.1', live.port), timeout=30) as s:
        s.sendall(head)
        assert s.recv(100) == b''


def test_a_slow_body_is_not_waited_for(live):
    "408 after a while; one that comes in pieces but in time is read."
    data = request(dict(max_tokens=1))
    with socket.create_connection(('127.0.0.1', live.port), timeout=30) as s:
        s.sendall(data[:-5])
        assert s.recv(12) == b'HTTP/1.1 408'
    live.idle()
    with socket.create_connection(('127.0.0.1', live.port), timeout=30) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(0, len(data), 20): s.sendall(data[i:i + 20])
        assert s.recv(12) == b'HTTP/1.1 200'


@pytest.mark.parametrize('head', [
    'Content-Length: 5\r\nContent-Length: 6', 'Content-Length: -1', 'Content-Length: 5\r\nTransfer-Encoding: chunked', 'Content-Length: x',
    'X: ' + 'x'*70_000, 'A B: 1', 'Transfer-Encoding: gzip'], ids=['twice', 'negative', 'both', 'word', 'long', 'name', 'gzip'])
def test_malformed_heads(live, head):
    "Refused, or read as RFC 9112 says; never taken for a request of another length."
    data = f'POST /v1/chat/completions HTTP/1.1\r\n{JSON}{head}\r\n\r\n{{"a":1}}GET /health HTTP/1.1\r\n\r\n'
    answer = live.raw(data.encode(), half=True, reset=True) # with a part of the head unread, closing may reset
    assert b'"status":"ok"' not in answer and (not answer or answer.split()[1][:1] in b'45')


# ---- the disk

def test_a_full_disk(model, tok, tmp_path, monkeypatch):
    "Half a page is written, then the disk is full: answers go on, one warning, no file; later pages are stored again."
    class Full:
        def __init__(self, path): self.file = builtins.open(path, 'wb')
        def __enter__(self): return self
        def __exit__(self, *error): self.file.close()
        def writelines(self, parts):
            self.file.write(b''.join(bytes(p) for p in parts)[:1000])
            raise OSError(errno.ENOSPC, 'No space left on device')
    direct = Direct(model, tok, folder=tmp_path)
    try:
        def hits(n, direct=direct):
            return json.loads(direct.asked(dict(model='tiny', prompt=[n]*150, max_tokens=1))[2])['usage']['prompt_cache_hit_tokens']
        with warnings.catch_warnings(record=True) as found, monkeypatch.context() as patched:
            warnings.simplefilter('always')
            real = lambda path, mode, **how: Full(path) if 'w' in mode else builtins.open(path, mode, **how)
            patched.setattr(persist, 'open', real, raising=False)
            assert [hits(n) for n in (1, 2, 1, 2)] == [0, 0, 149, 149]
        assert [w for w in map(str, (w.message for w in found)) if 'cannot be written' in w] == \
            [f'{tmp_path}: a page cannot be written (No space left on device); prompts are not kept on disk']
        assert [*tmp_path.iterdir()] == []
        hits(1)
        assert len([*tmp_path.iterdir()]) == 2
    finally: direct.stop()
    again = Direct(model, tok, folder=tmp_path)
    try: assert hits(1, again) == 128
    finally: again.stop()


def test_a_folder_that_is_gone(model, tok, tmp_path):
    "The folder is removed under a running server: answers go on."
    direct = Direct(model, tok, folder=tmp_path/'pages')
    try:
        (tmp_path/'pages').rmdir()
        with warnings.catch_warnings(record=True):
            warnings.simplefilter('always')
            assert [direct.asked(dict(model='tiny', prompt=[3]*150, max_tokens=1))[0] for _ in range(2)] == [200, 200]
    finally: direct.stop()


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_hostile import *
torch.manual_seed(0)
model = Model(TINY, dtype=torch.float32, device='cpu').requires_grad_(False).init_weights(std=.2)
engine = Engine(model, Tokenizer.from_pretrained('mini'), nbytes=2**20, folder={folder!r})
server = Server([ServedModel('tiny', engine, engine.tok)], ServerConfig(port=0, log_format='off'))
server.run(lambda: print(server.address[1], flush=True))
"""


def test_sigkill_leaves_the_disk_cache_intact(model, tok, tmp_path):
    "Killed while it writes pages: each file is whole, and the next server finds them."
    code = KILLED.format(tests=os.path.dirname(__file__), folder=str(tmp_path))
    process = warm.start('-c', code, modules=warm.WORKER)
    try:
        port = int(warm.first_line(process))
        for n in range(1, 40):
            s = socket.create_connection(('127.0.0.1', port), timeout=30)
            s.sendall(request(dict(model='tiny', prompt=[n]*300, max_tokens=2, messages=None), '/v1/completions'))
            if n == 1: assert s.recv(12) == b'HTTP/1.1 200'
    finally: process.kill()
    assert process.wait(30) == -signal.SIGKILL
    engine = Engine(model, tok, nbytes=2**20, folder=tmp_path)
    pages = [*tmp_path.glob('*.page')]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(pages) >= 4 and all(engine.store.store.load(bytes.fromhex(p.stem)) is not None for p in pages)
        assert engine.store.lookup([1]*300, '/') == 256
    direct = Direct(model, tok, folder=tmp_path)
    try: assert json.loads(direct.asked(dict(model='tiny', prompt=[1]*300, max_tokens=2))[2])['usage']['prompt_cache_hit_tokens'] == 256
    finally: direct.stop()


# ---- the end

def test_sigterm_under_load(monkeypatch):
    "New requests hear 503. At the end of the drain eight streams are cut, with usage; a client that reads nothing delays nobody."
    monkeypatch.setattr(serve_app, '_FLUSH', 1)
    live, texts = Live(drain=1e9, log_format='off'), {}
    deaf = socket.socket()
    deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    deaf.connect(('127.0.0.1', live.port))
    deaf.sendall(request(dict(max_tokens=400, stream=True, logprobs=True, top_logprobs=20)))
    def ask(i):
        with socket.create_connection(('127.0.0.1', live.port), timeout=60) as s:
            s.sendall(request(dict(max_tokens=400, stream=True, stream_options=dict(include_usage=True))))
            texts[i] = b''
            while piece := s.recv(2**16): texts[i] += piece
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    while len(texts) < 8 or not all(texts.values()): time.sleep(.001)
    live.server.uvicorn.handle_exit(signal.SIGTERM, None)
    while not live.server.draining: time.sleep(.001)
    get = 'GET {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n'
    found = {p: live.raw(get.format(p).encode()).split()[1] for p in ('/health', '/ready')}
    refused = live.raw(request(dict(max_tokens=1)))
    assert found == {'/health': b'200', '/ready': b'503'} and b' 503 ' in refused[:20] and b'retry-after: 1' in refused
    live.server.hurry = True  # what the end of the drain does
    for t in [*threads, live.thread]: t.join(60)
    assert not live.thread.is_alive() and not live.engine.thread.is_alive() and not +live.server.running
    deaf.close()
    for status, body in map(unchunked, texts.values()):
        *_, before, last = events(body)
        if 'error' in last: assert status == 200 and last['error']['code'] == 'draining' # said, and not taken for a whole answer
        else: assert before['choices'][0]['finish_reason'] == 'length' and last['usage']['completion_tokens'] == 400


def test_the_drain_has_an_end(model, tok):
    direct = Direct(model, tok, ServerConfig(drain=.05, log_format='off'))
    async def both():
        answer = asyncio.ensure_future(direct.ask(dict(model='tiny', prompt=[1], max_tokens=500, logit_bias=ON)))
        while not direct.engine.rows: await asyncio.sleep(.001)
        begin = time.monotonic()
        await direct.server.drain()
        return time.monotonic() - begin, await answer
    seconds, (status, _, text) = asyncio.run(both())
    if status == 503: assert seconds >= .05 and json.loads(text)['error']['code'] == 'draining'
    else: assert status == 200 and json.loads(text)['usage']['completion_tokens'] == 500


def test_the_second_signal_ends_at_once():
    live = Live(drain=1e9, log_format='off')
    with socket.create_connection(('127.0.0.1', live.port), timeout=60) as s:
        s.sendall(request(dict(max_tokens=450, stream=True)))
        assert s.recv(15) == b'HTTP/1.1 200 OK'
        for _ in range(2): live.server.uvicorn.handle_exit(signal.SIGTERM, None)
        live.thread.join(60)
        assert not live.thread.is_alive() and not live.engine.thread.is_alive()


def test_the_engine_never_leaves_a_stream_without_end(model, tok):
    "Threads submit while the engine closes: what was accepted ends."
    for drain in (True, False):
        engine, streams = Engine(model, tok, nbytes=2**20).start(), []
        def submit(engine=engine, streams=streams):
            while True:
                try: streams.append(engine.submit(Request([1, 2], max_tokens=2, stop_ids=())))
                except EngineClosed: return
                except QueueFull: time.sleep(.001)
        threads = [threading.Thread(target=submit) for _ in range(4)]
        for t in threads: t.start()
        while len(streams) < 8: time.sleep(.001)
        engine.close(drain=drain)
        for t in threads: t.join(30)
        assert engine.count == 0 and all(s.finish in (('length',) if drain else ('length', 'cancelled')) for s in streams)

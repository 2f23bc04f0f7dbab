"""No body of up to 4 MiB keeps others waiting: the work of reading grows with the body, long calls of C let other threads run, and long
bodies wait for their turn. Times depend on the machine, so the tests count work, or compare a time with the same on a tenth of it."""
import asyncio
import gc
import http.client
import json
import random
import re
import socket
import sys
import threading
import time

import pytest
from test_server import HI, JSON, TEMPLATE, Live, post

from deepseek_nb.files import chat as files_chat
from deepseek_nb.files.chat import unused_pair
from deepseek_nb.files.tokenizer import Tokenizer, _control_pattern
from deepseek_nb.serve.app import Readers, ServerConfig, key_digest
from deepseek_nb.serve.chat import ApiError, Fields, read_messages
from deepseek_nb.serve.completions import check_names, read_stop
from deepseek_nb.serve.connection import parse_body
from deepseek_nb.serve.grammar import ToolGrammar, compile_grammar
from deepseek_nb.serve.responses import ResponseStore, StoredResponse, read_items
from deepseek_nb.serve.text import logprob_lists

CHAT = '/v1/chat/completions'


@pytest.fixture(scope='module')
def live():
    live = Live(max_body=2**22)
    yield live
    live.stop()


def seconds(call, *args, tries=3):
    "Processor seconds of a call, the least of several, without a collection of what other tests have left in memory"
    out = []
    gc.disable()
    try:
        for _ in range(tries):
            begin = time.thread_time()
            call(*args)
            out.append(time.thread_time() - begin)
    finally: gc.enable()
    return min(out)


def grows(make, call, n, most=32.):
    """Whether ten times as much takes ten times as long; quadratic work takes a hundred times, and the limit lies between, on a scale of
    factors. A busy host, which shares caches too, may delay some"""
    small, large = make(n//10), make(n)
    return any(seconds(call, large)/max(seconds(call, small), 2e-4) < most for _ in range(10))


def agent(n):
    "A conversation with so many calls of tools"
    call = lambda i: dict(id=f'c{i}', type='function', function=dict(name='look', arguments=json.dumps(dict(path=f'src/file{i}.py'))))
    turns = [(dict(role='assistant', content='', tool_calls=[call(i)]),
              dict(role='tool', tool_call_id=f'c{i}', name='look', content='ok '*8)) for i in range(n)]
    return [dict(role='user', content='Go.'), *(m for pair in turns for m in pair)]


def test_a_conversation_is_rendered_a_few_times_only(live, monkeypatch):
    "Whatever the number of calls: not once for each of them"
    served, runs = live.server.models['mini'], []
    monkeypatch.setattr(files_chat, '_run', lambda *args, run=files_chat._run: runs.append(0) or run(*args))
    monkeypatch.setattr(type(served), 'context', 10**6)
    messages = read_messages(agent(800))
    text = served.prompt(messages)
    assert len(runs) <= 3 and text.count('"look"') == 800
    assert len(served.ids(messages)) > 800 and len(runs) <= 5
    assert seconds(lambda: (served.prompt(messages), served.ids(messages))) < 5 # 0.1 s on a quiet machine; 18 s before


@pytest.mark.parametrize('template, lost', [
    (TEMPLATE, None), (TEMPLATE.replace('c.function | tojson', 'c.function.name | upper'), None),
    (TEMPLATE.replace('m.tool_calls or []', '[]'), 'messages[1].tool_calls'),
    (TEMPLATE.replace('m.tool_calls or []', '(m.tool_calls if loop.index < 6 else [])'), 'messages[5].tool_calls')])
def test_what_a_template_leaves_out_is_still_named(live, template, lost):
    served = live.server.models['mini']
    served.tok.chat_template = template
    try:
        if lost is None: served.prompt(read_messages(agent(5)[:9]))
        else:
            with pytest.raises(ApiError) as error: served.prompt(read_messages(agent(5)))
            assert error.value.param == lost
        with pytest.raises(ApiError) as error: served.prompt([*HI, dict(role='user', content='x', name='Ann')])
        assert error.value.param == 'messages[1].name'
    finally: served.tok.chat_template = TEMPLATE
    assert read_messages([dict(role='assistant', content='x', tool_calls=[])]) == [dict(role='assistant', content='x')]


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_encoded(live, monkeypatch):
    monkeypatch.setattr(Tokenizer, 'encode', lambda *args, **how: pytest.fail('encoded'))
    long = 'a'*100_000
    said = [dict(role='user', content=long)]
    for path, body in ((CHAT, dict(messages=said)), ('/v1/completions', dict(prompt=[long])), ('/v1/responses', dict(input=long)),
                       ('/v1/messages', dict(messages=said, max_tokens=1))):
        status, said = post(live, dict(model='mini') | body, path)
        assert status == 400 and 'maximum context length is 512' in said['error']['message'], path


def test_linear(live):
    "Reading takes time in proportion to what is read"
    tok = live.tok
    pua = lambda n: ''.join(map(chr, range(0xf0000, 0xf0000 + n//2))) + 'a'*n
    assert grows(pua, unused_pair, 100_000)
    assert grows(lambda n: [f'f{i}' for i in range(n)], check_names, 20_000)
    assert grows(lambda n: [dict(role='assistant', content='a') for _ in range(n)], read_items, 20_000)
    assert grows(lambda n: '<|end|>'*n, lambda t: tok.encode_marked(t.replace('<|end|>', '<｜User｜>'), '«»'), 20_000)
    class Drawn: id, logprob, top = 5, -1., ()
    assert grows(lambda n: [Drawn]*n, lambda d: logprob_lists(tok, d), 20_000)
    calls = lambda n: [dict(role='tool', name=f'f{i}', tool_call_id='x', content='') for i in range(n)]
    served = live.server.models['mini']
    assert grows(calls, lambda m: served._check_read(m, '', lambda rows: json.dumps(rows)), 5000)


def test_many_control_tokens():
    "The pattern of 800 control tokens finds what the plain alternation finds, and reads a text that begins each of them only once"
    rnd = random.Random(number := random.SystemRandom().getrandbits(32))
    print('seed', number)
    for _ in range(300):
        words = {''.join(rnd.choices('ab<', k=rnd.randint(1, 5))) for _ in range(rnd.randint(1, 9))}
        plain = re.compile('|'.join(map(re.escape, sorted(words, key=len, reverse=True))))
        text = ''.join(rnd.choices('ab<', k=60))
        assert plain.findall(text) == _control_pattern({w: {} for w in words}, words).findall(text), (words, text)
        added = {w: dict(lstrip=rnd.random() < .5, rstrip=rnd.random() < .5) for w in ('<a>', '<b>', '<ab>')}
        text = ''.join(rnd.choices([*added, ' ', '  ', 'x', '\n'], k=30))
        space = {w: [r'\s*'*a[side] for side in ('lstrip', 'rstrip')] for w, a in added.items()}
        plain = re.compile('|'.join(w.join(space[w]) for w in sorted(added, key=len, reverse=True)))
        ours = _control_pattern(added, {*added})
        assert [m.span() for m in plain.finditer(text)] == [m.span() for m in ours.finditer(text)], (added, text)
    few, many = ({w: {} for w in (f'<｜hole▁{i}｜>' for i in range(n))} for n in (2, 800))
    few, many = (_control_pattern(added, {*added}) for added in (few, many))
    text = '<｜hole▁'*20_000
    assert seconds(many.findall, text) < 10*seconds(few.findall, text)


def longest_wait(call):
    "The longest time that another thread didn't run during a call, and the call's time"
    worst, over = [0.], threading.Event()
    def tick():
        last = time.perf_counter()
        while not over.is_set():
            time.sleep(.0005)
            now = time.perf_counter()
            worst[0], last = max(worst[0], now - last), now
    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    call()
    total = time.perf_counter() - begin
    over.set()
    thread.join()
    return worst[0], total


def test_a_long_text_is_encoded_beside_other_threads():
    "The library's lock is not held: another thread runs in the middle, and the ids are those of a text at once"
    tok = Tokenizer.from_pretrained('mini')
    for text in ('1'*300_000, 'hello world '*30_000):
        wait, total = min(longest_wait(lambda text=text: tok.encode(text)) for _ in range(3))
        assert wait < total/2, (wait, total)
        assert tok.encode(text) == tok.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize('body', [b'{"a": [' + b'[],'*1_300_000 + b'[]]}', b'{"a": [' + (b'['*300 + b']'*300 + b',')*6000 + b'1]}',
                                  b'{' + b','.join(b'"%d":0' % i for i in range(300_000)) + b'}', b'{"a": ' + b'9'*100_000 + b'}'])
def test_bodies_that_are_work_are_refused(body):
    with pytest.raises(ApiError, match='lists, objects and keys|digits'): parse_body(body)


def test_texts_are_no_structure():
    text = '{[:"' * 300_000
    assert parse_body(json.dumps(dict(a=text, b=[1]*200_000)).encode())['a'] == text


def test_a_wrong_value_is_shown_shortly():
    deep = []
    for _ in range(5000): deep = [deep]
    for value in (deep, ['x'*10**6]*1000, {str(i): i for i in range(10**5)}, 'x'*10**6):
        with pytest.raises(ApiError) as error: Fields(dict(n=value)).take('n', bool)
        assert len(error.value.message) < 120
    assert seconds(lambda: pytest.raises(ApiError, Fields(dict(n=[[0]*10**6])).take, 'n', bool)) < .05


def test_stop_strings_and_biases_have_limits(live):
    assert read_stop(Fields(dict(stop=['a'*1024]*16)))
    for bad in (['a'*1025], ['a']*17, [''], 'a'*2000):
        with pytest.raises(ApiError, match='at most 16 strings of 1 to 1,024'): read_stop(Fields(dict(stop=bad)))
    status, said = post(live, dict(model='mini', messages=HI, logit_bias={str(i): 1 for i in range(1025)}))
    assert status == 400 and 'logit_bias has 1,025 entries' in said['error']['message']
    status, said = post(live, dict(model='mini', prompt=['a']*1025), '/v1/completions')
    assert status == 400 and 'has 1,025 prompts' in said['error']['message']


def test_grammars_have_limits(live):
    "Definitions that would be repeated for each parameter, and tools that would be compiled one by one"
    defs = {f'd{i}': dict(type='string') for i in range(3000)}
    many = dict(type='object', properties={f'f{i}': dict(type='string') for i in range(300)}, **{'$defs': defs})
    tool = lambda i, p: dict(type='function', function=dict(name=f't{i}', parameters=p, strict=True))
    with pytest.raises(ValueError, match="can't be repeated for each of 300 parameters"):
        compile_grammar(live.tok, 'tools', ToolGrammar('v4', [tool(0, many)], 'required'), eos_ids=live.engine.ends)
    with pytest.raises(ValueError):
        tools = [tool(i, dict(type='object', properties=dict(n={'not': {}}), required=['n'])) for i in range(600)]
        compile_grammar(live.tok, 'tools', ToolGrammar('v31', tools, 'required'), eos_ids=live.engine.ends)


def test_long_bodies_wait_for_their_turn():
    "A short one overtakes them, each key has one at a time, and what a client that has left began is stopped"
    order, running, stopped = [], [], []
    class Run:
        def cancel(self): stopped.append(0)
    def work(name, seconds):
        running.append(name[0])
        assert running.count('a') == 1 or not seconds
        time.sleep(seconds)
        running.remove(name[0])
        order.append(name)
        return Run()
    async def main():
        readers = Readers()
        jobs = [asyncio.ensure_future(readers.run(name[0], long, work, name, wait))
                for name, long, wait in [('a1', True, .3), ('a2', True, .1), ('a3', True, .1), ('b1', True, .1), ('a4', False, 0)]]
        await asyncio.sleep(.05)
        jobs[0].cancel(), jobs[2].cancel() # one that runs and one that waits
        return await asyncio.gather(*jobs, return_exceptions=True)
    asyncio.run(main())
    assert order[0] == 'a4' and order.index('b1') < order.index('a1') < order.index('a2') and 'a3' not in order and stopped == [0]


def test_unfinished_bodies_count_for_nobody():
    "64 of them don't use up the limit of a key, and when there are too many, the oldest is given up"
    live = Live(per_key=4, patience=60)
    try:
        live.server.room.places = 8
        socks = []
        for _ in range(12):
            s = socket.create_connection(('127.0.0.1', live.port), timeout=60)
            s.sendall(f'POST {CHAT} HTTP/1.1\r\n{JSON}Content-Length: 100\r\n\r\n{{"model"'.encode())
            socks.append(s)
        for s in socks[:4]: assert b' 408 ' in s.recv(2**16).partition(b'\r\n')[0]
        assert post(live, dict(model='mini', messages=HI, max_tokens=1))[0] == 200 and not sum(live.server.running.values())
        for s in socks: s.close()
    finally: live.stop()


def test_tokenize_is_counted_and_beside_the_loop():
    live = Live(keys=dict(ann=key_digest('sk-ann')), per_key=2)
    try:
        key = 'Authorization: Bearer sk-ann\r\n'
        live.server.running['ann'] = 2
        for path, body in (('/tokenize', dict(prompt='a')), ('/detokenize', dict(tokens=[1]))): assert post(live, body, path, key)[0] == 429
        live.server.running['ann'] = 0
        assert post(live, dict(tokens=[5, 6]), '/detokenize', key)[1]['prompt'] == live.tok.decode([5, 6])
        for bad in ([None], ['a'], [1.5], [[1]], [True], [10**9]):
            status, said = post(live, dict(tokens=bad), '/detokenize', key)
            assert status == 400 and said['error']['message'], bad
        threads, name = set(), live.tok.encode
        live.tok.encode = lambda *args, **how: threads.add(threading.current_thread().name) or name(*args, **how)
        assert post(live, dict(prompt='a'), '/tokenize', key)[0] == 200 and all('reader' in t for t in threads)
    finally: live.stop()


def test_answers_are_stored_for_each_key():
    store, answer = ResponseStore(most=3), lambda id, n=1: StoredResponse(dict(id=id), [], [dict(role='user', content='x'*n)])
    store.put('ann', answer('first'))
    for i in range(50): store.put('bob', answer(f'b{i}'))
    assert store.get('ann', 'first') and len(store) == 4
    store.most_chars = 1000
    for i in range(9): store.put('bob', answer(f'c{i}', 300))
    assert store.get('ann', 'first') and store.sizes.total() <= 1000
    store.delete('ann', 'first')
    assert 'ann' not in store.kept and 'ann' not in store.sizes


# ---- other sites

def head(live, *lines, method='GET', path='/v1/models', body=b''):
    text = ''.join(f'{line}\r\n' for line in (f'{method} {path} HTTP/1.1', *lines, f'Content-Length: {len(body)}', 'Connection: close'))
    status, _, rest = live.raw(text.encode() + b'\r\n' + body).partition(b'\r\n')
    return int(status.split()[1]), rest.partition(b'\r\n\r\n')[2]


def test_pages_of_other_sites(live):
    "DNS rebinding names another host, and another site's page says its origin"
    port = live.port
    good = 'localhost', f'localhost:{port}', f'127.0.0.1:{port}', '[::1]:80', 'LOCALHOST'
    for host in good: assert head(live, f'Host: {host}')[0] == 200
    bad = 'rebound.example', f'rebound.example:{port}', 'localhost.evil.example', '127.0.0.1.evil.example', '192.168.1.2', 'x@localhost'
    for host in bad:
        status, said = head(live, f'Host: {host}')
        assert status == 403 and '--allow-host' in json.loads(said)['error']['message'], host
    body = json.dumps(dict(model='mini', messages=HI, max_tokens=1)).encode()
    ask = lambda *lines: head(live, f'Host: localhost:{port}', *lines, method='POST', path=CHAT, body=body)
    assert ask('Content-Type: application/json', f'Origin: http://localhost:{port}')[0] == 200
    for origin in ('https://evil.example', 'null', 'http://localhost:1', f'http://localhost:{port}.evil.example'):
        assert ask('Content-Type: application/json', f'Origin: {origin}')[0] == 403, origin
    for kind in (*(f'Content-Type: {k}' for k in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data')), 'X: y'):
        status, said = ask(kind)
        assert status == 415 and 'with the header content-type: application/json' in json.loads(said)['error']['message']
    for kind in ('application/json; charset=utf-8', 'Application/JSON'): assert ask(f'Content-Type: {kind}')[0] == 200
    status, said = head(live, 'Host: evil.example', method='POST', path='/v1/messages', body=b'{}')
    assert status == 403 and json.loads(said)['type'] == 'error'


def test_hosts_that_are_allowed_and_a_key_for_metrics():
    live = Live(allow_host=['gpu.lan'], metrics_key=key_digest('sk-m'))
    try:
        assert head(live, 'Host: gpu.lan:8000', 'Origin: http://gpu.lan:3000')[0] == 200 and head(live, 'Host: cpu.lan')[0] == 403
        assert head(live, 'Host: localhost', path='/metrics')[0] == 401
        assert head(live, 'Host: localhost', 'Authorization: Bearer sk-m', path='/metrics')[0] == 200
    finally: live.stop()
    with pytest.raises(ValueError, match='^metrics_key must be 64 hexadecimal digits'): ServerConfig(metrics_key='sk-m')


def test_tiny_chunks_in_order():
    "A body in chunks of a byte arrives whole, and others are answered meanwhile"
    live = Live()
    try:
        body = json.dumps(dict(model='mini', messages=HI, max_tokens=1, user='u'*500)).encode()
        chunks = b''.join(b'1\r\n' + bytes([c]) + b'\r\n' for c in body + b' '*20_000) + b'0\r\n\r\n'
        data = f'POST {CHAT} HTTP/1.1\r\n{JSON}Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n'.encode() + chunks
        assert live.raw(data).startswith(b'HTTP/1.1 200') and live.raw(data, half=True).startswith(b'HTTP/1.1 200')
    finally: live.stop()


def test_python_is_shared_only_while_the_server_runs(live):
    assert sys.getswitchinterval() == pytest.approx(.001)
    link = http.client.HTTPConnection('127.0.0.1', live.port, timeout=60)
    link.request('GET', '/openapi.json')
    assert json.loads(link.getresponse().read())['openapi'] == '3.1.0'

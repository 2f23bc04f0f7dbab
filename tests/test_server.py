"""Other people's clients, unmodified, against a live server on loopback."""
import json
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import warm

from deepseek_nb.arch.model import Model
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.infer.engine import Engine
from deepseek_nb.infer.sampling import SamplingParams
from deepseek_nb.infer.speculate import RowDrafts
from deepseek_nb.serve.app import Server, ServerConfig, check_address, key_digest
from deepseek_nb.serve.chat import ServedModel
from deepseek_nb.tools import serving
from deepseek_nb.tools.cli import main
from deepseek_nb.tools.serving import served_name

openai = pytest.importorskip('openai')
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}\n"
            "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
HI = [dict(role='user', content='The Congress of the United States')]
JSON = 'Host: localhost\r\nContent-Type: application/json\r\n'


class Live:
    "A server in a thread."
    def __init__(self, name='mini', **config):
        model, self.tok = Model.from_pretrained(name), Tokenizer.from_pretrained(name)
        if name == 'mini': self.tok.chat_template = TEMPLATE
        self.engine = Engine(model, self.tok)
        self.server, ready = Server([ServedModel(name, self.engine, self.tok)], ServerConfig(port=0, **config)), threading.Event()
        self.thread = threading.Thread(target=self.server.run, args=(ready.set,), daemon=True)
        self.thread.start()
        assert ready.wait(60)
        self.port = self.server.address[1]

    def client(self, key='none', base='/v1', **kw):
        return openai.OpenAI(api_key=key, base_url=f'http://127.0.0.1:{self.port}{base}', max_retries=0, timeout=60, **kw)

    def raw(self, data, wait=30., half=False, reset=False):
        "The bytes that come back until the server closes; half: the sending side is closed at once; reset: the server may reset."
        with socket.create_connection(('127.0.0.1', self.port), timeout=wait) as s:
            out = b''
            with suppress(*[ConnectionError]*reset):
                s.sendall(data)
                if half: s.shutdown(socket.SHUT_WR)
                while piece := s.recv(2**16): out += piece
        return out

    def idle(self, seconds=60.):
        "Wait until nothing runs."
        end = time.monotonic() + seconds
        while (self.engine.count or sum(self.server.running.values())) and time.monotonic() < end: time.sleep(.01)
        assert not self.engine.count and not sum(self.server.running.values())

    def stop(self):
        self.server.uvicorn.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture(scope='module')
def live():
    live = Live(max_body=100_000)
    yield live
    live.stop()


def post(live, body, path='/v1/chat/completions', headers=''):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f'POST {path} HTTP/1.1\r\n{JSON}Content-Length: {len(data)}\r\nConnection: close\r\n{headers}\r\n'
    status, _, rest = live.raw(head.encode() + data).partition(b'\r\n')
    return int(status.split()[1]), json.loads(rest.partition(b'\r\n\r\n')[2])


def test_drafts_are_a_field(live):
    "A whole number that the server can keep, or a 400 that names the field; the counters have vLLM's names."
    body = dict(model='mini', messages=HI, max_tokens=3)
    assert post(live, body | dict(draft_tokens=0))[0] == 200
    for wrong in (-1, 65, 2.5, True, 'some', [3]):
        status, answer = post(live, body | dict(draft_tokens=wrong))
        assert status == 400 and answer['error']['param'] == 'draft_tokens', wrong
    for path, more in (('/v1/chat/completions', {}), ('/v1/completions', dict(prompt='The', messages=None))):
        status, answer = post(live, body | more | dict(draft_tokens=2), path)
        assert status == 400 and 'draft_tokens is 2, and this model is served without drafts' in answer['error']['message']
    live.engine.drafts = RowDrafts(live.engine.model, 'lookup', 3)
    try: status, answer = post(live, body | dict(max_tokens=60, temperature=0, draft_tokens=3))
    finally: live.idle(), setattr(live.engine, 'drafts', None)
    details = answer['usage']['completion_tokens_details']
    assert status == 200 and details['accepted_prediction_tokens'] + details['rejected_prediction_tokens'] == live.engine.stats.draft_tokens
    text = live.server.metrics.text()
    for name in ('drafts', 'draft_tokens', 'accepted_tokens'): assert f'vllm:spec_decode_num_{name}_total{{model_name="mini"}}' in text
    assert 'vllm:spec_decode_num_accepted_tokens_per_pos_total{model_name="mini",position="0"}' in text


def test_openai_client(live):
    "Whole and streamed answers of OpenAI's own package are the same, and so is the usage."
    client, how = live.client(), dict(model='mini', messages=HI, temperature=0, max_tokens=8)
    whole = client.chat.completions.create(**how, logprobs=True, top_logprobs=2)
    parts = [*client.chat.completions.create(**how, stream=True, stream_options=dict(include_usage=True))]
    text = ''.join(p.choices[0].delta.content or '' for p in parts if p.choices)
    assert text == whole.choices[0].message.content and text
    assert parts[-1].usage.total_tokens == whole.usage.total_tokens and not parts[-1].choices
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == whole.choices[0].finish_reason == 'length'
    content = whole.choices[0].logprobs.content
    assert b''.join(bytes(t.bytes) for t in content).decode() == text and all(len(t.top_logprobs) == 2 for t in content)
    assert [m.id for m in client.models.list()] == ['mini'] and client.models.retrieve('mini').id == 'mini'


def test_deepseek_dialect(live):
    "Without /v1 the usage rides on the last chunk, always."
    how = dict(model='mini', messages=HI, max_tokens=4, extra_body=dict(user_id='ann'))
    parts = [*live.client(base='').chat.completions.create(**how, stream=True)]
    assert parts[-1].choices[0].finish_reason and parts[-1].usage.prompt_cache_hit_tokens + parts[-1].usage.prompt_cache_miss_tokens > 0


def test_json_schema(live):
    "A schema holds at any temperature, also in a stream."
    client = live.client()
    fields = dict(n=dict(type='integer', maximum=9, minimum=0), yes=dict(type='boolean'))
    schema = dict(type='object', properties=fields, required=['n', 'yes'], additionalProperties=False)
    form = dict(type='json_schema', json_schema=dict(name='x', schema=schema, strict=True))
    for seed in range(4):
        how = dict(model='mini', messages=HI, temperature=1.5, seed=seed, max_tokens=60, response_format=form)
        whole = client.chat.completions.create(**how).choices[0].message.content
        parts = [*client.chat.completions.create(**how, stream=True)]
        assert ''.join(p.choices[0].delta.content or '' for p in parts) == whole and json.loads(whole).keys() == {'n', 'yes'}
    with pytest.raises(openai.BadRequestError, match='the word "json"'):
        client.chat.completions.create(model='mini', messages=HI, response_format=dict(type='json_object'))


def test_a_required_tool_is_called():
    "In each format that has tools, whatever the model would rather say; the arguments follow the schema, whole and streamed."
    live = Live()
    try:
        live.server.models['mini'].format = 'v31'
        fields = dict(n=dict(type='integer', maximum=9, minimum=0))
        schema = dict(type='object', properties=fields, required=['n'], additionalProperties=False)
        tool = dict(type='function', function=dict(name='look', parameters=schema))
        how = dict(model='mini', messages=HI, temperature=1, seed=1, max_tokens=200, tools=[tool], tool_choice='required')
        message = live.client().chat.completions.create(**how).choices[0]
        assert message.finish_reason == 'tool_calls' and message.message.content is None
        call = message.message.tool_calls[0].function
        assert call.name == 'look' and 0 <= json.loads(call.arguments)['n'] <= 9
        stream = live.client().chat.completions.create(**how, stream=True)
        parts = [d for p in stream for d in p.choices[0].delta.tool_calls or ()]
        assert ''.join(d.function.arguments for d in parts if d.index == 0) == call.arguments
    finally: live.stop()


def test_seeds_and_n(live):
    client, how = live.client(), dict(model='mini', messages=HI, max_tokens=12, temperature=1, seed=5)
    one, two = (client.chat.completions.create(**how, n=3) for _ in range(2))
    texts = [c.message.content for c in one.choices]
    assert texts == [c.message.content for c in two.choices] and len({*texts}) > 1
    assert client.chat.completions.create(**how).choices[0].message.content == texts[0]


def test_what_a_request_leaves_open(live, monkeypatch):
    "Sampling is the usual one, or that of the settings; each field of a request wins; temperature 0 has no penalty; the models say it."
    asked, submit = [], live.engine.submit
    monkeypatch.setattr(live.engine, 'submit', lambda r: (asked.append(r.params), submit(r))[1])
    body = dict(model='mini', messages=HI, max_tokens=2)
    routes = {'/v1/chat/completions': body, '/v1/completions': dict(model='mini', prompt='The', max_tokens=2),
              '/v1/responses': dict(model='mini', input='Hi', max_output_tokens=2), '/v1/messages': body}
    usual = dict(temperature=.8, top_k=40, top_p=.95, min_p=.05, repetition_penalty=1.05)
    for path, b in routes.items():
        for more in ({}, dict(temperature=None), dict(temperature=0), dict(temperature=1, top_p=1)):
            status, answer = post(live, b | more, path)
            assert status == 200, answer
            want = (usual if more.get('temperature') != 0 else {}) | {k: v for k, v in more.items() if v is not None}
            assert replace(asked[-1], logprobs=None) == SamplingParams(**want), (path, more)
    monkeypatch.setattr(live.server.models['mini'], 'sampling', dict(temperature=.5, repetition_penalty=1.1))
    post(live, body)
    assert (asked[-1].temperature, asked[-1].top_k, asked[-1].repetition_penalty) == (.5, 0, 1.1)
    card = live.client().models.retrieve('mini')
    assert card.default_sampling == dict(temperature=.5, repetition_penalty=1.1) and card.default_max_tokens == live.engine.context


def test_no_end_before_min_tokens(live):
    "An end token that is certain waits, whole and streamed, with a grammar that allows nothing else too."
    body, end = dict(model='mini', messages=HI, temperature=0, max_tokens=20), live.engine.ends[0]
    sure = body | dict(logit_bias={end: 100})
    for n in (0, 1, 5):
        for path, b in (('/v1/chat/completions', sure), ('/v1/completions', sure | dict(prompt='The', messages=None))):
            status, answer = post(live, b | dict(min_tokens=n), path)
            assert status == 200 and answer['usage']['completion_tokens'] == n + 1, (n, path, answer)
    form = dict(type='json_schema', json_schema=dict(name='x', schema=dict(const=1), strict=True))
    status, answer = post(live, body | dict(min_tokens=9, response_format=form))
    assert status == 200 and answer['choices'][0]['message']['content'] == '1' and answer['choices'][0]['finish_reason'] == 'stop'
    assert post(live, body | dict(min_tokens=-1))[0] == 400


def test_loops_end(live, monkeypatch):
    "An answer that says the same again and again ends, and says why."
    monkeypatch.setattr(live.engine, 'stop_loops', 5)
    how = dict(model='mini', prompt='The Congress of the', temperature=0, max_tokens=250)
    status, answer = post(live, how | dict(ignore_eos=True), '/v1/completions')
    choice, text = answer['choices'][0], answer['choices'][0]['text']
    assert status == 200 and (choice['finish_reason'], choice['stop_reason']) == ('length', 'repetition')
    said = text[-200:].split('. ')[1]
    assert text.count(said) >= 5 and answer['usage']['completion_tokens'] < 250
    parts = [*live.client().completions.create(**how, stream=True, extra_body=dict(ignore_eos=True))]
    assert ''.join(p.choices[0].text for p in parts) == text and parts[-1].choices[0].stop_reason == 'repetition'
    assert 'finished_reason="repetition"' in live.server.metrics.text()


def test_a_key_a_limit_and_another_page():
    "`--api-key`, `--ctx` and `--cors`, over the wire."
    live, origin = Live(api_key='sk-one', cors=['http://ui.lan']), 'Origin: http://ui.lan\r\n'
    try:
        live.engine.context = 64
        body, key = dict(model='mini', messages=HI, max_tokens=2), 'Authorization: Bearer sk-one\r\n'
        assert post(live, body)[0] == 401 and post(live, body, headers=key)[0] == 200
        assert 'sk-one' not in repr(live.server.config)
        status, answer = post(live, dict(model='mini', prompt='The', max_tokens=70), '/v1/completions', key)
        assert status == 400 and 'maximum context length is 64' in answer['error']['message']
        asks = 'Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization,content-type\r\n'
        first = live.raw(f'OPTIONS /v1/models HTTP/1.1\r\n{JSON}{origin}{asks}Connection: close\r\n\r\n'.encode()).lower()
        assert first.startswith(b'http/1.1 200') and b'access-control-allow-origin: http://ui.lan' in first and b'authorization' in first
        got = live.raw(f'GET /v1/models HTTP/1.1\r\n{JSON}{origin}{key}Connection: close\r\n\r\n'.encode()).lower()
        assert b'access-control-allow-origin: http://ui.lan' in got and b'access-control-expose-headers: x-request-id' in got
        other = live.raw(f'GET /v1/models HTTP/1.1\r\n{JSON}{origin}{key}Connection: close\r\n\r\n'.replace('ui.', 'no.').encode())
        assert b'access-control-allow-origin' not in other.lower()
    finally: live.stop()


def test_completions(live):
    client, ids = live.client(), live.tok.encode('The Congress of the')
    out = client.completions.create(model='mini', prompt=[ids, ids], max_tokens=1, temperature=0, echo=True, logprobs=1)
    lists = out.choices[0].logprobs
    assert out.choices[0].text == out.choices[1].text and len(lists.token_logprobs) == len(ids) + 1 and lists.token_logprobs[0] is None
    assert max(lists.token_logprobs[1:]) <= 0


@pytest.mark.parametrize('body, status, part', [
    (dict(colour='red'), 400, 'colour is not known here'), (dict(temperature=3), 400, 'temperature is 3'), (dict(n=True), 400, 'n must be'),
    (dict(model='x'), 404, 'is not served here'), (dict(model=None), 400, 'model is missing'),
    (dict(messages=[]), 400, 'messages is empty'),
    (dict(messages='hi'), 400, 'messages must be a list'), (dict(messages=[{}]), 400, 'messages[0].role is missing'),
    (dict(logit_bias={'9999': 1}), 400, 'token id 9999'), (dict(max_tokens=100_000), 400, 'maximum context length'),
    (dict(stop=['']), 400, 'stop must be'),
    (dict(messages=[dict(role='user', content='word '*3_000)]), 400, 'maximum context length'),
    (dict(store=True), 400, 'store is True'),
    (dict(thinking=dict(type='enabled')), 400, 'not trained to think'), (dict(timeout='soon'), 400, 'timeout must be a number'),
    (dict(timeout=-1), 400, 'timeout is -1; it must be above 0'), (dict(user_id='é'*257), 400, 'user_id has more than 512 bytes')])
def test_every_wrong_field_is_named(live, body, status, part, monkeypatch):
    monkeypatch.setattr(live.server.config, 'strict', True)
    got, answer = post(live, dict(model='mini', messages=HI, max_tokens=2) | body)
    assert got == status and part in answer['error']['message'] and answer['error'].keys() == {'message', 'type', 'param', 'code'}


@pytest.mark.parametrize('body', [b'', b'{', b'\xff\xfe\x00', b'[1]', b'null', b'['*50_000, b'{"a":' * 9_000, '"é"'.encode('latin-1'),
                                  b'{"model": "mini", "prompt": "a", "n": 1, "n": 2}', b'{"model": "mini", "prompt": "\\ud800"}'])
def test_broken_bodies(live, body): assert post(live, body)[0] == 400


def test_too_large(live): assert post(live, b' '*100_001)[0] == 413


def test_paths(live):
    for path in ('/v1/models/..%2f..%2fetc%2fpasswd', '/../../etc/passwd', '/v1/models/x', '/nothing', '/v1/chat'):
        assert live.raw(f'GET {path} HTTP/1.1\r\n{JSON}Connection: close\r\n\r\n'.encode()).split()[1] in (b'404', b'405', b'400')


def test_a_client_that_leaves(live):
    "In a stream, before its first event, and without a stream: pages and counts come back."
    for stream, wait in ((True, .2), (True, 0), (False, .1)):
        data = json.dumps(dict(model='mini', messages=HI, max_tokens=450, stream=stream, logit_bias={1: -100})).encode()
        with socket.create_connection(('127.0.0.1', live.port)) as s:
            s.sendall(f'POST /v1/chat/completions HTTP/1.1\r\n{JSON}Content-Length: {len(data)}\r\n\r\n'.encode() + data)
            time.sleep(wait)
        live.idle()
    assert {p for r in live.engine.rows for p in r.cache.tables[0]} == set()


def test_half_a_request(live):
    "A client that stops sending is no request, and doesn't disturb others."
    with socket.create_connection(('127.0.0.1', live.port)) as s:
        s.sendall(f'POST /v1/chat/completions HTTP/1.1\r\n{JSON}Content-Length: 100\r\n\r\n{{"model"'.encode())
        assert live.client().chat.completions.create(model='mini', messages=HI, max_tokens=1).choices
    live.idle()


def test_a_slow_reader(live):
    "An answer that nobody reads ends, and the others don't wait."
    with socket.create_connection(('127.0.0.1', live.port)) as s:
        data = json.dumps(dict(model='mini', messages=HI, max_tokens=300, stream=True)).encode()
        s.sendall(f'POST /v1/chat/completions HTTP/1.1\r\n{JSON}Content-Length: {len(data)}\r\n\r\n'.encode() + data)
        assert live.client().chat.completions.create(model='mini', messages=HI, max_tokens=3).choices
        end = time.monotonic() + 30
        while live.engine.count and time.monotonic() < end: time.sleep(.01)
        assert not live.engine.count
    live.idle()


def test_timeout_ends_with_usage(live):
    how = dict(model='mini', messages=HI, max_tokens=400, logit_bias={1: -100})
    out = live.client().chat.completions.create(**how, extra_body=dict(timeout=.05))
    assert out.choices[0].finish_reason == 'length' and 0 <= out.usage.completion_tokens < 400


def test_many_at_once(live):
    "Twenty clients get what one gets."
    client, texts = live.client(), {}
    def ask(i):
        how = dict(model='mini', messages=HI, max_tokens=10, temperature=1, seed=i % 4, user=str(i % 3))
        texts[i] = client.chat.completions.create(**how).choices[0].message.content
    threads = [threading.Thread(target=ask, args=(i,)) for i in range(20)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(texts) == 20 and all(texts[i] == texts[i % 4] for i in texts)


def test_keys_and_limits():
    live = Live(keys=dict(ann=key_digest('sk-ann')), per_key=2)
    try:
        how = dict(model='mini', messages=HI, max_tokens=400, logit_bias={1: -100})
        for key in ('sk-bob', 'x', 'sk-an', 'sk-annn'):
            with pytest.raises(openai.AuthenticationError): live.client(key).chat.completions.create(**how)
            with pytest.raises(openai.AuthenticationError): live.client(key).models.list()
            with pytest.raises(openai.AuthenticationError): live.client(key).models.retrieve('mini')
        client = live.client('sk-ann')
        assert client.models.retrieve('mini') == client.models.list().data[0]
        streams = [client.chat.completions.create(**how, stream=True) for _ in range(2)]
        with pytest.raises(openai.RateLimitError): client.chat.completions.create(model='mini', messages=HI, max_tokens=1)
        for s in streams: s.close()
        live.idle()
        assert client.chat.completions.create(model='mini', messages=HI, max_tokens=1).choices
    finally: live.stop()


@pytest.mark.parametrize('digest', ['sk-ann', 3, 'schlüssel', '0'*63, 'A'*64, '0'*64 + '\n', '', None, int('1'*64)])
def test_what_is_no_digest_is_refused(digest):
    with pytest.raises(ValueError, match='^keys.ann must be 64 hexadecimal digits') as e: ServerConfig(keys=dict(ann=digest))
    assert 'sk-ann' not in str(e.value)
    if not digest: return
    with pytest.raises(ValueError, match='^admin_key must be 64 hexadecimal digits'): ServerConfig(admin_key=digest)


def test_models_of_one_name_are_refused():
    tok = Tokenizer.from_pretrained('mini')
    served = [ServedModel('mini', Engine(Model.from_pretrained('mini'), tok), tok) for _ in range(2)]
    with pytest.raises(ValueError, match='two models have one name: mini, mini'): Server(served)


def test_a_host_with_an_unused_family(monkeypatch):
    "A name with addresses of two families may be listened at if one of them can"
    found = [(socket.AF_INET, 1, 6, '', ('127.0.0.1', 0)), (socket.AF_INET, 1, 6, '', ('192.0.2.1', 0))]
    monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kw: found)
    check_address('both', 0)
    found.pop(0)
    with pytest.raises(OSError, match='host both, port 0: Cannot assign requested address; choose'): check_address('both', 0)


@pytest.fixture
def refused(monkeypatch, capsys):
    "Run `deepseek-nb serve`: no model is loaded, and one line on standard error says these words"
    monkeypatch.setattr(serving, 'load_served', lambda *args, **kw: pytest.fail('a model is loaded'))
    def run(*argv, words):
        assert main(['serve', *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == '' and err.startswith('deepseek-nb: ') and err.count('\n') == 1, err
        for w in words: assert str(w) in err, (w, err)
    return run


@pytest.mark.parametrize('models', ['ra/model,rb/model', 'model,mini,other/model.gguf', 'mini,mini'])
def test_two_models_of_one_name(refused, models):
    refused(models, words=['would all be called', *[m for m in models.split(',') if served_name(m) != 'mini' or models == 'mini,mini']])


def test_addresses_are_checked_before_models(refused, tmp_path):
    for port in (99999, 65536, -1): refused('mini', '--port', port, words=[f'port is {port}; it must be from 1 to 65535'])
    with socket.create_server(('127.0.0.1', 0)) as other:
        port = other.getsockname()[1]
        refused('mini', '--port', port, words=[f'host 127.0.0.1, port {port}: Address already in use'])
    (file := tmp_path/'server.toml').write_text(f'host = "no host"\nkeys = {{ann = "{key_digest("a")}"}}')
    refused('mini', '--config', file, words=['host no host: '])
    (tmp_path/'p.toml').write_text('a = = 3')
    refused('mini', '--policy', tmp_path/'p.toml', words=[f'{tmp_path}/p.toml is no TOML file'])


@pytest.mark.parametrize('text, said', [
    (b'a = = 3', ' is no TOML file: Invalid value (at line 1, column 5)'), (b'\xff\xfe', ' is not text in UTF-8: '),
    (b'models = "mini"', ": models is 'mini'; it must be of type list"), (b'models = 5', ': models is 5; it must be of type list'),
    (b'models = [1]', ': models is [1]; each must be a name'), (b'models = [""]', ": models is ['']"),
    (b'models = []', ': no model is named'), (b'max_row = 8', ": 'max_row' is no setting"),
    (b'folder = 3', ': folder is 3; it must be of type str'), (b'max_rows = -1', ': max_rows is -1; it must be more than 0'),
    (b'max_rows = true', ': max_rows is True; it must be of type int'), (b'memory = 0', ': memory is 0; it must be more than 0'),
    (b'drain = -0.5', ': drain is -0.5; it must be at least 0'), (b'drain = nan', ': drain is nan'),
    (b'keep_alive = 0.0', ': keep_alive is 0.0'), (b'port = -1', ': port is -1; it must be from 1'),
    (b'keys = 3', ': keys is 3; it must be of type dict'),
    (b'keys = {a = "sk-secret"}', ': keys.a must be 64 hexadecimal digits'), (b'keys = {a = 3}', ': keys.a must be'),
    (b'admin_key = "root"', ': admin_key must be 64'), (b'adapters = {law = 3}', ': adapters.law is 3; it must be a folder')])
def test_a_wrong_settings_file_is_named(refused, tmp_path, text, said):
    (file := tmp_path/'server.toml').write_bytes(text)
    refused('--config', file, words=[f'{file}{said}'])


def test_options_and_settings_that_are_right(refused, tmp_path):
    right = 'port = 0', 'stored = 0', 'drain = 0', 'max_waiting = 0', 'patience = 1', 'folder = "pages"', 'models = ["mini"]'
    (file := tmp_path/'server.toml').write_text('\n'.join(right))
    models, config, engine = serving.read_settings(file)
    assert (models, config.port, config.patience, engine['folder'], engine['max_waiting']) == (['mini'], 0, 1, 'pages', 0)
    refused('mini', '--max-rows', -1, words=['deepseek-nb: max_rows is -1; it must be more than 0'])
    refused('mini', '--memory', -1, '--config', file, words=[f'{file} or an option: memory is -1'])


def test_a_context_is_chosen():
    "It is that of the server, and fits into the memory, or the error says how much is needed"
    assert serving.load_served('mini', ctx=100, memory=16).context == 100
    with pytest.raises(ValueError, match='ctx is 600, and mini has a context of 512'): serving.load_served('mini', ctx=600)
    with pytest.raises(ValueError, match='and 20 MB hold .*; give --memory 358'): serving.load_served('smollm2-135m', memory=20, ctx=8000)
    with pytest.raises(ValueError, match='stop_loops is 1'): serving.load_served('mini', stop_loops=1)


SERVE = """
import sys
sys.path.insert(0, {folder!r})
from test_server import *
model, tok = Model.from_pretrained('mini'), Tokenizer.from_pretrained('mini')
tok.chat_template = TEMPLATE
server = Server([ServedModel('mini', Engine(model, tok), tok)], ServerConfig(port=0, drain=20))
server.run(lambda: print(server.address[1], flush=True))
"""


def test_sigterm_completes_the_answers():
    code = SERVE.format(folder=os.path.dirname(__file__))
    process = warm.start('-c', code, modules=warm.WORKER)
    try:
        client = openai.OpenAI(api_key='x', base_url=f'http://127.0.0.1:{int(warm.first_line(process))}/v1', max_retries=0)
        stream = client.chat.completions.create(model='mini', messages=HI, max_tokens=300, logit_bias={1: -100}, stream=True,
                                                stream_options=dict(include_usage=True))
        next(stream)
        process.send_signal(signal.SIGTERM)
        parts = [*stream]
        assert parts[-1].usage.completion_tokens == 300 and process.wait(60) in (0, -signal.SIGTERM, 143)
    finally: process.kill()

"""Requests drawn from the server's own OpenAPI document, and broken ones: no answer is the server's failure, each refusal has the form
that the document promises, and the server answers afterwards. `FUZZ_MINUTES=10 pytest tests/test_api_fuzz.py` goes on for longer."""
import http.client
import json
import os
import random
import time

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_protocols import Scripted
from test_server import Live

MINUTES = float(os.environ.get('FUZZ_MINUTES', .3))


@pytest.fixture(scope='module')
def live():
    live = Live(per_key=1000, log_format='off')
    live.server.models['script'] = Scripted('script', live.engine, live.tok, 'v4')
    yield live
    live.idle(), live.stop()


def ask(live, method, path, body=None, timeout=60):
    "Status, headers and body of an answer"
    link = http.client.HTTPConnection('127.0.0.1', live.port, timeout=timeout)
    link.request(method, path, body, {'content-type': 'application/json'})
    answer = link.getresponse()
    out = answer.status, answer.headers, answer.read()
    link.close()
    return out


@pytest.fixture(scope='module')
def document(live): return json.loads(ask(live, 'GET', '/openapi.json')[2])


# ---- what is sent

WORDS = st.sampled_from(['mini', 'script', 'hi', 'json', '', 'é🌡', '<|im_end|>', '\x00', '</think>', 'x'*5000, '\ue000', '-1', 'user'])
NUMBERS = st.one_of(st.sampled_from([0, 1, -1, 2, .5, 1e-38, 1e300, 2**31, 2**63, -2**63 - 1, 10**30, 512, 20]), st.integers(-3, 30))
JUNK = st.recursive(st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
                    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3)), max_leaves=12)


def drawn(schema, name=''):
    "Values of a JSON schema"
    if name == 'model': return st.sampled_from(['mini', 'script'])
    if 'anyOf' in schema: return st.one_of([drawn(s) for s in schema['anyOf']])
    if 'enum' in schema: return st.sampled_from(schema['enum'])
    kind, least, most = schema['type'], schema.get('minimum', 0), schema.get('maximum', 40)
    if kind == 'string': return WORDS
    if kind == 'boolean': return st.booleans()
    if kind == 'integer': return st.integers(least, most)
    if kind == 'number': return st.floats(least, most, exclude_min='exclusiveMinimum' in schema)
    if kind == 'array': return st.lists(drawn(schema['items']), min_size=schema.get('minItems', 0), max_size=4)
    if 'properties' not in schema:
        return st.dictionaries(WORDS, drawn(schema['additionalProperties']) if 'additionalProperties' in schema else JUNK, max_size=3)
    fields, needed = {n: drawn(s, n) for n, s in schema['properties'].items()}, schema.get('required', [])
    return st.fixed_dictionaries({n: fields[n] for n in needed}, optional={n: f for n, f in fields.items() if n not in needed})


@st.composite
def broken(draw, schema):
    "A value of a schema, in which up to three places are something else"
    value = draw(drawn(schema))
    for _ in range(draw(st.integers(0, 3))):
        at = value
        while True:
            keys = [*at] if isinstance(at, dict) else [*range(len(at))]
            if not keys: break
            key = draw(st.sampled_from(keys))
            if not isinstance(at[key], dict | list) or draw(st.booleans()):
                at[key] = draw(JUNK)
                break
            at = at[key]
    return value


def test_no_request_is_the_servers_failure(live, document):
    "Whatever is sent to whichever route"
    routes = [(m.upper(), path, op) for path, ops in document['paths'].items() for m, op in ops.items()]
    posts = [(path, op) for m, path, op in routes if m == 'POST' and 'requestBody' in op]
    counts, number = {}, random.SystemRandom().getrandbits(32)
    print('seed', number)

    def check(method, path, op, body=None):
        begin = time.monotonic()
        status, headers, said = ask(live, method, path, body)
        assert status < 500 or path == '/ready', (method, path, body, said)
        assert time.monotonic() - begin < 50, (method, path, body)
        counts[status] = counts.get(status, 0) + 1
        if status < 400: return
        name = op['responses']['4XX']['content']['application/json']['schema']['$ref'].rpartition('/')[2]
        form, error = document['components']['schemas'][name], json.loads(said)
        inner = form['properties']['error']
        assert {*form['required']} <= {*error} and {*inner.get('required', ())} <= {*error['error']}, (path, said)
        message = error['error'] if inner['type'] == 'string' else error['error']['message']
        assert message and '\n' not in message, said

    for method, path, op in routes:
        if method != 'POST': check(method, path.replace('{', '').replace('}', ''), op)

    def one_round():
        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=[*HealthCheck])
        @seed(number)
        @given(st.data())
        def run(data):
            path, op = data.draw(st.sampled_from(posts))
            body = data.draw(broken(op['requestBody']['content']['application/json']['schema']))
            if isinstance(body, dict) and path.endswith('/chat/completions'): body.setdefault('max_tokens', 3)
            if time.monotonic() < end: check('POST', path.replace('{', '').replace('}', ''), op, json.dumps(body).encode())
        run()

    end = time.monotonic() + 60*MINUTES
    while time.monotonic() < end:
        one_round()
        number += 1
    print(counts)
    assert counts.get(200, 0) and counts.get(400, 0), counts
    live.idle()


def test_the_document_has_every_field_and_no_other(live, document, monkeypatch):
    "No field of the document is unknown to its route, and none that is unknown is in it"
    monkeypatch.setattr(live.server.config, 'strict', True)
    for path, ops in document['paths'].items():
        for op in ops.values():
            if 'requestBody' not in op: continue
            body = op['requestBody']['content']['application/json']['schema']
            for field in body['properties']:
                said = ask(live, 'POST', path, json.dumps({'model': 'mini', field: {'no': 1}}).encode())[2].decode()
                assert f'{field} is not known here' not in said, (path, field)


@pytest.mark.parametrize('path', ['/v1/chat/completions', '/v1/messages', '/v1/responses', '/tokenize', '/detokenize', '/v1/experts'])
def test_bytes(live, document, path):
    "Bodies that are no JSON, or JSON that is odd"
    rnd = random.Random(number := random.SystemRandom().getrandbits(32))
    print('seed', number)
    odd = [b'', b'{}', b'[]', b'null', b'{"model": "mini", "model": "mini"}', b'\xff', b'[' * 5000, b'{"tokens": [null]}', b'{"a": NaN}',
           b'{"a": ' + b'9'*5000 + b'}', b'{"model": ' + b'['*400 + b']'*400 + b'}', b'{"model": {"a": ' + b'[1],'*0 + b'1}}']
    odd += [bytes(rnd.randrange(256) for _ in range(rnd.randrange(60))) for _ in range(20)]
    for body in odd:
        status, _, said = ask(live, 'POST', path, body)
        assert 400 <= status < 500 and json.loads(said)['error']['message'], (path, body[:60], said)

"""The platform's forms under drawn bodies: every form, as every kind of visitor, with wrong types, missing and unknown fields, huge values,
files in place of texts, characters that are none, numbers of others, and CSRF tokens of others. No answer is an error of ours, and nothing
changes without the role and the token.

It runs for 20 seconds, or for as many minutes as FUZZ_MINUTES says."""
import hashlib
import inspect
import json
import os
import re
import sqlite3
import time
from functools import cache
from urllib.parse import urlencode

import pytest

pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
from hypothesis import HealthCheck, given, note, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from sqlalchemy import select  # noqa: E402
from test_platform_app import PASSWORD, ROUTES, Site_  # noqa: E402

from deepseek_nb.platform import access  # noqa: E402
from deepseek_nb.platform.datasets import import_rows  # noqa: E402
from deepseek_nb.platform.jobs import JOB_KINDS  # noqa: E402
from deepseek_nb.platform.labels import create_task  # noqa: E402
from deepseek_nb.platform.registry import add_model, measure  # noqa: E402
from deepseek_nb.platform.store import open_store, tokens, users  # noqa: E402

SECONDS = 60*float(os.environ.get('FUZZ_MINUTES') or 1/3)
POSTS = [r for r in ROUTES if r.method == 'POST']
ROLES = None, *access.USER_ROLES
MORE = 'label better note thumb event spans start end kind name set_steps set_rate set_batch began record do place value'.split()
WORDS = ['', ' ', '1', '2', '0', '-1', '7', '1e400', 'nan', 'inf', '1.5', '9'*30, '9'*4400, '9007199254740992',
         '9223372036854775807', 'true', 'x', 'viewer', 'developer', 'admin', 'root', 'live', 'shadow', 'staged', 'assistant', 'yes',
         'up', 'good', 'classification', 'spans', 'a\nb', '[]', '[1]', '{}', '[{"start": 1}]',
         '[{"start": 0, "end": 3, "label": "good"}]', '[{"role": "user", "content": {"a": 1}}]', 'null', '"',
         "'; DROP TABLE users; --", '<script>alert(1)</script>', '../../etc/passwd', '/etc/passwd', 'http://127.0.0.1:1/',
         'https://a.b/\udcff', '//evil', '\x00', '\ud800', 'a\u202eb', '\U0001f600'*300, 'x'*20_001, 'https://hooks.example/x',
         'text', 'label', 'glosses', 'add', 'remove:0', *JOB_KINDS]
GOOD = dict(name='x', days='90', role='viewer', kind='classification', annotators='1', record='1', began='0', label='good',
            question='What?', labels='good\nbad', place='assistant', mode='live', share='10', text='text', note='x',
            url='https://hooks.example/x', rules='drift', task='1', event='1', value='up', keep_days='30', keep_texts='yes',
            version='1', model='1', do='', reason='x', message='Hi', past='[]', open='yes', disabled='',
            password='nine quiet volcanoes', again='nine quiet volcanoes', thumb='1', better='x', split='', next='/')
GATES = '[quality]\naccuracy = {min = 0.8}\n'


@cache
def fields_of(route):
    "Names of the fields that a form's function reads, and of those of its module"
    mine, whole = inspect.getsource(route.function), inspect.getsource(inspect.getmodule(route.function))
    read = r"form\.\w+\('(\w+)'"
    return sorted({*re.findall(read, mine)}), sorted({*re.findall(read, whole), *re.findall(r"field\('(\w+)'", whole), *MORE})


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "A platform with something of everything, whose clock stands still, so that only forms write"
    monkey = pytest.MonkeyPatch()
    monkey.setattr(access, 'SCRYPT', dict(n=2**4, r=8, p=1))
    store = open_store(tmp_path_factory.mktemp('fuzz')/'store', durable=False)
    site, at = Site_(store), store.now()
    store.clock = lambda: at
    rows = [(dict(text=f'text {i}', label='good' if i % 2 else 'bad'), ('train', 'test')[i % 2]) for i in range(8)]
    version = import_rows(store, None, 'glosses', rows).version
    for kind in ('classification', 'spans'): create_task(store, None, version, kind, kind, 'What?', ['good', 'bad'])
    measure(store, add_model(store, None, 'mini', 'mini'), 'accuracy', .9)
    (store.folder/'gates.toml').write_text(GATES)
    for role in access.USER_ROLES: access.create_token(store, access.user_of_session(store, site.tokens[role]), 'program')
    yield site
    site.server.recorder.close()
    store.close()
    monkey.undo()


def restore(site):
    "What the last form did to the users themselves"
    for role in access.USER_ROLES:
        user = access.user_of_session(site.store, site.tokens[role])
        if user is not None and user.role == role: continue
        with site.store.write() as c:
            fresh = dict(name=role, role=role, disabled=False, password=access.hash_password(PASSWORD))
            number = len(access.USER_ROLES) - access.USER_ROLES.index(role)  # in the order of `Site_`; a deleted user has lost the name
            c.execute(users.update().where(users.c.id == number).values(fresh))
            c.execute(access.attempts.delete())
        site.tokens[role] = access.log_in(site.store, role, PASSWORD)
        site.clients[role] = site.new(cookies=dict(session=site.tokens[role]))


texts = st.sampled_from(WORDS) | st.text(max_size=30)
anything = st.one_of(texts, st.none(), st.booleans(), st.integers(), st.floats(), st.lists(texts, max_size=3),
                     st.dictionaries(texts, texts, max_size=2))
numbers = st.sampled_from(['1', '2', '3', '4', '5', '0', '9'*18, '9'*25])


@st.composite
def requests(draw):
    "A form, who sends it, with whose CSRF token, to which number, in which coding and with which fields"
    route = draw(st.sampled_from(POSTS))
    places = st.sampled_from(['assistant', 'x', '%00', '%ff', 'a b'])
    path = re.sub(r'\{\w+(:int)?\}', lambda m: draw(numbers if m[1] else places), route.path)
    own, near = fields_of(route)
    coding = draw(st.sampled_from(3*['form', 'multipart', 'json'] + ['raw']))
    value, names = anything if coding == 'json' else texts, st.sampled_from(near) | texts
    values = draw(st.fixed_dictionaries({}, optional={n: st.one_of(*[st.just(GOOD.get(n, '1'))]*4, value) for n in own}))
    values |= draw(st.one_of(st.just({}), st.dictionaries(names, value, max_size=4)))
    content = st.sampled_from([b'', b'\xff\x00', b'text,label\na,b\n', b'[{"text": "a"}]', b'{"text": "a", "label": 1}', b'PAR1', b'PK\3\4',
                               b'\x1f\x8b']) | st.binary(max_size=50)
    files = draw(st.dictionaries(names, st.tuples(texts, content), max_size=2)) if coding == 'multipart' else {}
    enough = access.USER_ROLES[access.USER_ROLES.index(route.role or 'viewer'):]
    role, whose = draw(st.sampled_from(ROLES + 2*enough)), draw(st.sampled_from(['own']*6 + ['other', 'none', 'wrong']))
    return route, path, role, whose, coding, values, files


def clean(o):
    "A text that can be sent in a form: what no form can hold is sent as JSON"
    return str(o).encode('utf-8', 'surrogatepass')


def send(client, path, coding, values, files, csrf):
    heads = {} if csrf is None else {'x-csrf': csrf}
    if coding == 'json':
        body = json.dumps(values)
        return client.post(path, content=body.encode(), headers=heads | {'content-type': 'application/json'})
    if coding == 'raw': return client.post(path, content=b'\xff'.join(map(clean, values.values())), headers=heads)
    if coding == 'form':
        body = urlencode({clean(k): clean(v) for k, v in values.items()})
        return client.post(path, content=body, headers=heads | {'content-type': 'application/x-www-form-urlencoded'})
    parts = b''
    for name, (called, body) in [(k, (None, clean(v))) for k, v in values.items()] + [*files.items()]:
        quote = lambda t: clean(t).replace(b'"', b'%22').replace(b'\n', b'%0A').replace(b'\r', b'%0D')
        head = b'--x\r\nContent-Disposition: form-data; name="' + quote(name) + b'"'
        parts += head + (b'' if called is None else b'; filename="' + quote(called) + b'"') + b'\r\n\r\n' + body + b'\r\n'
    return client.post(path, content=parts + b'--x--\r\n', headers=heads | {'content-type': 'multipart/form-data; boundary=x'})


def others(store, role):
    "Users, and the tokens of everybody else"
    with store.read() as c:
        known = c.execute(select(users.c.id, users.c.name, users.c.role, users.c.disabled, users.c.password).order_by(users.c.id)).all()
        mine = {r.id for r in known if r.name == role}
        asked = select(tokens.c.id, tokens.c.role, tokens.c.revoked).where(tokens.c.user_id.not_in(mine)).order_by(tokens.c.id)
        return [r[:4] if r.id in mine else tuple(r) for r in known], c.execute(asked).all()


def test_every_form_under_drawn_bodies(site):
    watch = sqlite3.connect(f'file:{site.store.folder}/platform.db?mode=ro', uri=True)
    version = lambda: watch.execute('PRAGMA data_version').fetchone()
    seen, count, changed, end = {}, [], [], time.monotonic() + SECONDS

    @settings(max_examples=100, deadline=None, suppress_health_check=[*HealthCheck])
    @given(requests())
    def fuzz(asked):
        if time.monotonic() > end: return
        route, path, role, whose, coding, values, files = asked
        count.append(route)
        if changed: restore(site), changed.clear()
        client, other = site.clients[role], site.tokens['viewer' if role == 'admin' else 'admin']
        own = access.csrf_of(site.tokens[role]) if role else None
        if role is None:
            client.get('/login')
            own = hashlib.sha256(b'csrf ' + client.cookies.get('visit', '').encode()).hexdigest()
        csrf = dict(own=own, other=access.csrf_of(other), none=None, wrong='x').get(whose)
        values = {k: v for k, v in values.items() if k != 'csrf'}
        before, held = version(), others(site.store, role)
        answer = send(client, path, coding, values, files, csrf)
        if answer.status_code < 400: changed.append(path)
        note(f'{answer.status_code} {answer.text[-300:]}')
        assert answer.status_code < 500
        if '<script>alert' in answer.text:  # as a text of JSON, which no browser reads as a page
            assert answer.headers['content-type'] == 'application/json' and answer.headers['x-content-type-options'] == 'nosniff'
        enough = route.role is None or role and access.USER_ROLES.index(role) >= access.USER_ROLES.index(route.role)
        if not enough or whose != 'own':
            assert answer.status_code in (400, 401, 403, 404, 413), answer.status_code
            assert version() == before, 'something has changed'
        elif role != 'admin': assert others(site.store, role) == held
        seen.setdefault(route.path, set()).add(answer.status_code)

    while time.monotonic() < end: fuzz()
    print(len(count), 'requests', {k: sorted(v) for k, v in seen.items()})
    assert {s for found in seen.values() for s in found} >= {400, 401, 403}

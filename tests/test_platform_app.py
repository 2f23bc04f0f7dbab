"""The platform's pages and API as one application: every route and form against strangers, lower roles, other sites and hostile input."""
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
from platform_fixtures import postgres, postgres_url, store  # noqa: E402, F401
from sqlalchemy import delete, func, select, update  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from deepseek_nb.platform import access  # noqa: E402
from deepseek_nb.platform.app import (
    PlatformServer,  # noqa: E402
    all_pages,  # noqa: E402
)
from deepseek_nb.platform.audit import audit  # noqa: E402
from deepseek_nb.platform.layout import SAFE_HEADERS, Pages, Site, csrf_field, page, redirect  # noqa: E402
from deepseek_nb.platform.start import seed_platform  # noqa: E402
from deepseek_nb.platform.store import audits, newest, users  # noqa: E402

PASSWORD = 'correct horse battery staple'
ROUTES = all_pages().routes


class Forms(HTMLParser):
    "The forms of a page, its links, and what its policy forbids"
    def __init__(self, text):
        super().__init__()
        self.forms, self.links, self.faults, self.heads, self.ids = [], [], [], 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.faults += [f'{tag} {k}' for k in a if k == 'style' or k.startswith('on') or k.startswith('hx-')]
        if tag == 'style' or (tag == 'script' and 'src' not in a): self.faults.append(f'inline {tag}')
        self.faults += [f'{tag} {v}' for k, v in attrs if k in ('src', 'href', 'action') and re.match(r'(\w+:|//)', v) and v != 'data:,']
        self.heads += tag == 'h1'
        if 'id' in a: self.ids.append(a['id'])
        if tag == 'a': self.links.append(a.get('href', ''))
        if tag == 'form': self.forms.append((a.get('method', 'get').lower(), a.get('action', ''), {}, a.get('enctype', '')))
        if tag in ('input', 'select', 'textarea') and self.forms and a.get('name'): self.forms[-1][2][a['name']] = a.get('value', '')


def address(route): return re.sub(r'\{\w+(:int)?\}', lambda m: '1' if m[1] else 'x', route.path)


class Site_:
    "A platform with one user of each role, and a client for each"
    def __init__(self, store):
        self.store, self.server = store, PlatformServer(store, all_pages())
        app = self.server.app()
        self.new = lambda **kw: TestClient(app, base_url='http://localhost', follow_redirects=False, raise_server_exceptions=False, **kw)
        self.tokens, boss = {}, None
        self.clients = {None: self.new()}
        for role in reversed(access.USER_ROLES):
            user = access.create_user(store, boss, role, PASSWORD, role)
            boss = boss or user
            self.tokens[role] = access.log_in(store, role, PASSWORD)
            self.clients[role] = self.new(cookies=dict(session=self.tokens[role]))
        self.boss = boss


@pytest.fixture
def site(store):  # noqa: F811
    site = Site_(store)
    yield site
    site.server.recorder.close()


def test_every_route_is_refused_without_its_role(site):
    "Generated from the table of routes: a stranger, each lower role, and the right role without or with another session's CSRF token"
    public = {r.path for r in ROUTES if r.role is None}
    assert public == {'/setup', '/login'} and len(ROUTES) > 20
    for r in ROUTES:
        for role in (None, *access.USER_ROLES):
            enough = r.role is None or (role and access.USER_ROLES.index(role) >= access.USER_ROLES.index(r.role))
            answer = site.clients[role].request(r.method, address(r))
            what = f'{r.method} {r.path} as {role}: {answer.status_code}'
            if not enough: assert answer.status_code == (403 if role else 303 if r.method == 'GET' else 401), what
            elif r.method == 'POST': assert answer.status_code == 403 and 'This form is too old' in answer.text, what
            else: assert answer.status_code in (200, 303, 400, 404), what
            if role is None and not enough and r.method == 'GET': assert answer.headers['location'].startswith('/login?next=/'), what
            assert SAFE_HEADERS.items() <= dict(answer.headers).items(), what
            if enough and role == r.role and r.method == 'POST':
                other = access.csrf_of(site.tokens['viewer' if role != 'viewer' else 'admin'])
                for wrong in (other, 'é', ''): assert site.clients[role].post(address(r), data=dict(csrf=wrong)).status_code == 403, what


def test_other_sites_and_names(site):
    "A form that another site sends, a page under another name, and a session that is no longer valid"
    admin, csrf = site.clients['admin'], access.csrf_of(site.tokens['admin'])
    for heads in ({'origin': 'https://evil.example'}, {'sec-fetch-site': 'cross-site'}, {'origin': 'http://localhost:1'}):
        assert admin.post('/settings/check', data=dict(csrf=csrf), headers=heads).status_code == 403, heads
    assert admin.post('/settings/check', data=dict(csrf=csrf), headers={'origin': 'http://localhost'}).status_code == 303
    for host in ('evil.example', 'localhost.evil.example', '', 'localhost@evil.example'):
        assert admin.get('/', headers={'host': host}).status_code == 400, host
    access.disable_user(site.store, site.boss, newest(site.store, users)[0].id)
    assert site.clients['viewer'].get('/').headers['location'] == '/login?next=/'
    assert 'wasm' not in SAFE_HEADERS['content-security-policy'] and 'unsafe' not in SAFE_HEADERS['content-security-policy']


def test_sessions(site):
    "No planted session becomes the visitor's; cookies are closed to scripts and, over HTTPS, bound to the host; old sessions end"
    client = site.new(cookies=dict(session='planted', visit='x'*30))
    fields = dict(name='viewer', password=PASSWORD, next='//evil.example')
    answer = client.post('/login', data=fields | dict(csrf=csrf_field(client.get('/login').text)))
    cookie = next(c for c in answer.headers.get_list('set-cookie') if c.startswith('session='))
    assert 'planted' not in cookie and 'HttpOnly' in cookie and 'SameSite=lax' in cookie and answer.headers['location'] == '/'
    first = re.match('session=([^;]*)', cookie)[1]
    client = site.new(cookies=dict(session=first))
    assert client.get('/').status_code == 200
    client.post('/logout', data=dict(csrf=csrf_field(client.get('/').text)))
    assert site.new(cookies=dict(session=first)).get('/').status_code == 303
    secure = TestClient(Site(site.store, all_pages(), https=True), base_url='http://localhost', follow_redirects=False)
    start = secure.get('/login')
    assert 'Secure' in start.headers['set-cookie'] and start.headers['strict-transport-security']
    visit = re.match('visit=([^;]*)', start.headers['set-cookie'])[1]
    answer = secure.post('/login', data=fields | dict(csrf=csrf_field(start.text)), headers={'cookie': f'visit={visit}'})
    cookie = next(c for c in answer.headers.get_list('set-cookie') if 'session=' in c)
    assert cookie.startswith('__Host-session=') and 'Secure' in cookie and 'Domain' not in cookie and 'Path=/' in cookie


def test_a_browser_that_is_known(site):
    "Guesses from the same address lock out a browser that has never logged in, and not one that has, logged out or not"
    def enter(client, password=PASSWORD):
        return client.post('/login', data=dict(name='viewer', password=password, csrf=csrf_field(client.get('/login').text))).status_code
    mine, other = site.new(), site.new()
    assert enter(mine) == 303
    kept = next(c for c in mine.cookies.jar if c.name == 'device')
    assert kept.has_nonstandard_attr('HttpOnly') and kept.get_nonstandard_attr('SameSite') == 'lax'
    mine.post('/logout', data=dict(csrf=csrf_field(mine.get('/').text)))
    assert [enter(other, 'a wrong guess') for _ in range(6)] == [403]*5 + [429] and enter(other) == 429
    assert enter(mine) == 303


def test_bodies(store):  # noqa: F811
    "A body is counted while it arrives, whatever was announced; a bomb of fields, files or brackets is one line"
    pages = Pages()
    pages.get('/', role=None)(lambda request: page(request, 'Home'))
    pages.post('/small', role=None, limit=1000)(lambda request, form: redirect('/', str(len(form))))
    pages.post('/boom', role=None)(lambda request, form: 1/0)
    client = TestClient(Site(store, pages), base_url='http://localhost', follow_redirects=False)
    client.get('/nothing')
    import hashlib
    heads = {'x-csrf': hashlib.sha256(b'csrf ' + client.cookies['visit'].encode()).hexdigest()}
    form = heads | {'content-type': 'application/x-www-form-urlencoded'}
    assert client.post('/small', content=b'a=1', headers=form).status_code == 303
    def pieces():
        for _ in range(100): yield b'a'*100
    for sent in (dict(content=b'a'*1001, headers=form), dict(content=pieces(), headers=form),
                 dict(content=b'a=1', headers=form | {'content-length': '9'*30})):
        assert client.post('/small', **sent).status_code in (400, 413)
    many = b'--x\r\nContent-Disposition: form-data; name="f"; filename="a"\r\n\r\nx\r\n'*8 + b'--x--\r\n'
    for body, kind in ((many, 'multipart/form-data; boundary=x'), (b'--x', 'multipart/form-data'), (b'['*900, 'application/json'),
                       (b'\x00=\x00', 'application/x-www-form-urlencoded'), (b'a=%00', 'application/x-www-form-urlencoded')):
        answer = client.post('/small', content=body, headers=heads | {'content-type': kind})
        assert answer.status_code == 400, (kind, answer.status_code, answer.text)
    answer = client.post('/boom', content=b'', headers=form)
    assert answer.status_code == 500 and 'ZeroDivision' not in answer.text and 'our fault' in answer.text


PATHS = ('/static/../../etc/passwd', '/static/x/..%2f..%2fetc%2fpasswd', '/static/%2e%2e/pages.css', '/..%2f..%2fetc/passwd',
         '//etc/passwd', '/static/x/pages.css', '/runs/..%2f..', '/%00', '/datasets/' + '9'*40, '/datasets/-1')


def test_paths(site):
    for path in PATHS:
        answer = site.clients['admin'].get(path)
        assert answer.status_code in (303, 400, 404) and 'root:' not in answer.text, path


HOSTILE = ['"><script>alert(1)</script>', "'; DROP TABLE users; --", '../../etc/passwd', '{{7*7}}', '=cmd|calc', '-1', '9'*30,
           'x\u202e\U0001f600']
KEEP = ('/logout', '/account/password', '/login', '/setup')


def crawl(client, most=80):
    "All pages that links lead to, by their path without numbers"
    seen, todo, out = set(), ['/'], {}
    while todo and len(out) < most:
        url = todo.pop(0)
        shape = re.sub(r'\d+', '1', url.partition('?')[0])
        if shape in seen: continue
        seen.add(shape)
        answer = client.get(url)
        if 'text/html' not in answer.headers.get('content-type', ''): continue
        out[url] = (answer, Forms(answer.text))
        todo += [o for o in out[url][1].links if o.startswith('/')]
    return out


def test_every_page_and_form(site):
    "Each page keeps its own policy; each form takes hostile values in each field without an error of ours, and none becomes HTML"
    seed_platform(site.store)
    admin, csrf = site.clients['admin'], access.csrf_of(site.tokens['admin'])
    found = crawl(admin)
    for url, (answer, parsed) in found.items():
        assert answer.status_code == 200, (url, answer.status_code)
        assert not parsed.faults and parsed.heads == 1 and len({*parsed.ids}) == len(parsed.ids), (url, parsed.faults, parsed.ids)
    posts = [o for _, p in found.values() for o in p.forms if o[0] == 'post' and o[1] not in KEEP]
    forms = {(re.sub(r'\d+', '1', o[1]), *sorted(o[2])): o for o in posts}
    assert len(forms) >= 6
    for i, (_, action, fields, kind) in enumerate(forms.values()):
        for j in range(2):
            values = {k: v or HOSTILE[(i + j + n) % len(HOSTILE)] for n, (k, v) in enumerate(fields.items())} | dict(csrf=csrf)
            target = list(fields)[(i + j) % len(fields)]
            if target != 'csrf': values[target] = HOSTILE[(2*i + j) % len(HOSTILE)]
            send = dict(files={k: (HOSTILE[2], b'\xff\x00') for k in ('source', 'file')}) if 'multipart' in kind else {}
            answer = admin.post(action, data=values, **send)
            assert answer.status_code in (200, 303, 400, 403, 404, 413), (action, values, answer.status_code, answer.text[-300:])
            assert '<script>alert' not in answer.text, action
    for answer, _ in crawl(admin).values(): assert '<script>alert' not in answer.text and answer.status_code < 500, answer.url
    with site.store.read() as c: assert c.scalar(select(func.count()).select_from(users)) >= 4


@pytest.mark.parametrize('name', ['https://hooks.example/x', '../x', '/etc', 'a/b/c', 'no name'])
def test_only_names_are_public_models(site, name):
    admin = site.clients['admin']
    answer = admin.post('/models', data=dict(name=name, csrf=csrf_field(admin.get('/models').text)))
    assert answer.status_code == 400 and 'name' in answer.text


def test_the_audit_page_tells_of_what_it_shows(site):
    "An edit deep in a long log: told by the page that shows it, by its neighbour that is linked to it, and by the full check"
    with site.store.write() as c:
        for i in range(700): audit(c, None, 'look', f'thing:{i}')
    admin = site.clients['admin']
    def whole(url): return 'The chain is whole' in admin.get(url).text
    pages = ['/audit', *(f'/audit?before={b}' for b in (99, 100, 120, 149, 150, 151, 400))]
    assert all(map(whole, pages))
    with site.store.write() as c: c.execute(update(audits).where(audits.c.id == 100).values(detail=dict(seen=False)))
    assert [u for u in pages if not whole(u)] == [f'/audit?before={b}' for b in (100, 120, 149, 150)]
    assert 'entry 100 was edited' in admin.get('/audit?before=120').text and 'entry 100 was edited' in site.store.check()[0]
    with site.store.write() as c: c.execute(delete(audits).where(audits.c.id > 690))
    assert not any(map(whole, pages)) and 'the log was cut off' in admin.get('/audit?before=400').text


def test_no_secret_is_stored(site):
    "Password, session and token are nowhere in the database, its log, or the audit log"
    store_ = site.store
    admin = site.clients['admin']
    form = dict(name='nightly', role='viewer', days='30', csrf=access.csrf_of(site.tokens['admin']))
    made = admin.post('/account/tokens', data=form)
    token = re.search('dnb_[^<]*', made.text)[0]
    secrets = [PASSWORD, token, token[4:], site.tokens['admin']]
    if store_.kind == 'sqlite':
        kept = b''.join(p.read_bytes() for p in store_.folder.rglob('*') if p.is_file())
        for s in secrets: assert s.encode() not in kept
    with store_.read() as c:
        rows = repr([c.execute(t.select()).all() for t in users.metadata.sorted_tables])
        assert c.scalar(select(func.count()).select_from(audits)) > 4
    for s in secrets: assert s not in rows


def test_tokens_are_keys(site):
    "The API takes tokens, and none that was revoked; a session opens it to its own pages alone, and a token opens no page"
    token = access.create_token(site.store, site.boss, 'x', 'viewer')
    ask = dict(model='assistant', messages=[dict(role='user', content='Hi')])
    def post(client, **heads): return client.post('/v1/chat/completions', json=ask, headers=heads)
    stranger = site.new()
    refused = [post(stranger), post(site.clients['admin']), post(stranger, authorization='Bearer dnb_x')]
    refused += [client.get(path) for client in (stranger, site.clients['admin']) for path in ('/v1/models', '/v1/models/assistant')]
    assert [a.status_code for a in refused] == [401]*7
    mine, other = (access.csrf_of(site.tokens[o]) for o in ('admin', 'viewer'))
    wrong = [post(site.clients[who], **{'x-csrf': given}) for who, given in (('admin', other), ('admin', 'x'), (None, mine))]
    wrong += [post(site.clients['admin'], **{'x-csrf': mine, 'authorization': 'Bearer dnb_x'})]
    assert [a.status_code for a in wrong] == [401]*4 and post(site.clients['admin'], **{'x-csrf': mine}).status_code == 404
    assert stranger.get('/v1/models', headers=dict(authorization=f'bearer {token}')).json()['data'] == []
    answer = post(stranger, authorization=f'Bearer {token}')
    assert answer.status_code == 404 and "nothing is released as 'assistant'" in answer.json()['error']['message']
    assert post(stranger, **{'x-api-key': token}).status_code == 404
    assert stranger.get('/', headers=dict(authorization=f'Bearer {token}')).status_code == 303
    access.revoke_token(site.store, site.boss, 1)
    assert post(stranger, authorization=f'Bearer {token}').status_code == 401
    assert stranger.post('/v1/load_lora_adapter', json={}).status_code == 404

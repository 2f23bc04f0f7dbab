"What an operator decides, over both databases: internal addresses are refused unless they are named, and no copy is lost"
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
from platform_fixtures import again, postgres, postgres_url, store  # noqa: E402, F401
from sqlalchemy import select, update  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from deepseek_nb.platform import access, operator  # noqa: E402
from deepseek_nb.platform.app import (
    PlatformServer,  # noqa: E402
    all_pages,  # noqa: E402
)
from deepseek_nb.platform.events import Recorder, RequestEvent  # noqa: E402
from deepseek_nb.platform.jobs import job_kind, submit  # noqa: E402
from deepseek_nb.platform.layout import csrf_field  # noqa: E402
from deepseek_nb.platform.monitor import open_alerts, raise_alert  # noqa: E402
from deepseek_nb.platform.operator import OperatedMonitor, OperatorSettings, mirror_ended, mirror_minutes, operator_settings  # noqa: E402
from deepseek_nb.platform.store import hooks, jobs  # noqa: E402

PASSWORD = 'correct horse battery staple'
INSIDE = ['127.0.0.1', 'localhost', '10.1.2.3', '192.168.1.1', '169.254.169.254', '[::1]', '[fd00::1]', '0.0.0.0', '[::ffff:10.0.0.1]']


@pytest.fixture
def receiver():
    "A service on this machine; what it got"
    got = []
    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append(json.loads(self.rfile.read(int(self.headers['content-length']))))
            self.send_response(204)
            self.end_headers()
        def log_message(self, *_): pass
    server = HTTPServer(('127.0.0.1', 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/alerts', got
    server.shutdown()
    server.server_close()


def admin_of(store, internal):
    "A client of an administrator, of a server that an operator has started"
    server = PlatformServer(store, all_pages(), internal=internal)
    client = TestClient(server.app(), base_url='http://localhost', follow_redirects=False)
    client.cookies.set('session', access.log_in(store, 'ann', PASSWORD))
    return server, client


def test_internal_hooks_are_refused_unless_named(store, receiver, monkeypatch):  # noqa: F811
    url, got = receiver
    monkeypatch.setenv('HOOK_SECRET', 'a long secret')
    access.create_user(store, None, 'ann', PASSWORD, 'admin')
    def add(client, url):
        form = dict(csrf=csrf_field(client.get('/hooks').text), url=url, secret='HOOK_SECRET')
        return client.post('/hooks', data=form).status_code
    server, client = admin_of(store, ())
    assert [add(client, f'http://{o}:8080/x') for o in INSIDE] == [400]*len(INSIDE)
    server.recorder.close()
    server, client = admin_of(store, ('127.0.0.1',))
    assert [add(client, f'http://{o}:8080/x') for o in INSIDE[1:]] == [400]*(len(INSIDE) - 1)
    assert add(client, 'http://127.0.0.1.evil.example@10.0.0.1/') == 400 and add(client, url) == 303
    server.recorder.close()
    with store.read() as c: assert c.scalars(select(hooks.c.url)).all() == [url]
    with store.write() as c: raise_alert(c, store.now(), 'errors', 'a', .2, .02)
    now = [store.now()]
    store.clock = lambda: now[0]
    for internal, want in (((), 0), (('other.lan',), 0), (('127.0.0.1',), 1)): # delivered only where the operator allows it
        now[0] += 3600*10**6
        OperatedMonitor(store, OperatorSettings(internal=internal)).tick()
        assert [o['rule'] for o in got] == ['errors']*want


def test_the_files_and_the_options(tmp_path, monkeypatch):
    monkeypatch.setattr(operator, 'find_spec', lambda name: name == 'mlflow' or None)
    assert operator_settings(tmp_path, internal=[], mlflow='', opentelemetry=False) == OperatorSettings()
    for host in INSIDE:
        with pytest.raises(ValueError, match='which is not public'): operator_settings(tmp_path, mlflow=f'http://{host}:5000')
        bare = host.strip('[]')
        assert operator_settings(tmp_path, mlflow=f'http://{host}:5000', internal=[bare]).internal == (bare,)
    assert operator_settings(tmp_path, mlflow=f'sqlite:///{tmp_path}/m.db').mlflow.startswith('sqlite')
    with pytest.raises(ValueError, match='set, but not installed: pip install'): operator_settings(tmp_path, opentelemetry=True)
    (tmp_path/'platform.toml').write_text('internal = ["A.lan"]\nmlflow = "file:///a"\n')
    (tmp_path/'prices.toml').write_text('currency = "EUR"\n[places."*"]\nprompt = 1\ncompletion = 2\n')
    found = operator_settings(tmp_path, mlflow='file:///b')
    assert (found.internal, found.mlflow, found.prices.currency) == (('a.lan',), 'file:///b', 'EUR')
    wrong = ('internal = [1', 'Unclosed'), ('mlflow = 7', 'mlflow must be a str'), ('secret = "x"', "'secret' is no setting")
    for text, said in wrong:
        (tmp_path/'platform.toml').write_text(text)
        with pytest.raises(ValueError, match=said): operator_settings(tmp_path)
    (tmp_path/'platform.toml').unlink()
    for text, said in ((b'a = = 3', 'is no TOML file'), (b'\xff', 'is no TOML file'), (b'place = 1', 'is no setting'),
                       (b'places = 3', 'must be a dict'), (b'[places]\na = 3', 'must have prompt and completion')):
        (tmp_path/'prices.toml').write_bytes(text)
        with pytest.raises(ValueError, match=f'^{tmp_path}/prices.toml.*{said}'): operator_settings(tmp_path)


def test_the_command_says_them(monkeypatch, tmp_path, capsys):
    from deepseek_nb.platform import start
    from deepseek_nb.tools.cli import main
    with pytest.raises(SystemExit): main(['platform', '--help'])
    said = ' '.join(capsys.readouterr().out.split()) # argparse breaks lines by the terminal's width
    assert all(o in said for o in ('--internal', '--mlflow', '--opentelemetry', 'internal addresses'))
    made = []
    class Stopped(Exception): pass
    class Server(PlatformServer):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            made.append(self)
        def run(self, listening): raise Stopped
    monkeypatch.setattr(start, 'PlatformServer', Server)
    (tmp_path/'p').mkdir()
    (tmp_path/'p/prices.toml').write_text('currency = "EUR"\n[places."*"]\nprompt = 1\ncompletion = 2\n')
    with pytest.raises(Stopped): start.start_platform(tmp_path/'p', port=0, demo=False, internal=['hooks.lan'])
    assert made[0].internal == ('hooks.lan',) and made[0].recorder.prices.currency == 'EUR'
    with pytest.raises(ValueError, match='not public'): start.start_platform(tmp_path/'p', port=0, demo=False, mlflow='http://127.0.0.1:5000')


def test_a_platform_that_cannot_start_makes_nothing(tmp_path, capsys):
    from deepseek_nb.tools.cli import main
    (tmp_path/'bad').mkdir()
    (tmp_path/'bad/platform.toml').write_text('a = = 3')
    with socket.create_server(('127.0.0.1', 0)) as other:
        taken = other.getsockname()[1]
        for options, said in {('--port', '99999'): 'port is 99999; it must be from 1 to 65535', ('--port', '-1'): 'port is -1',
                              ('--port', str(taken)): f'port {taken}: Address already in use',
                              ('--port', '0', '--url', 'nonsense'): 'nonsense: not a postgresql:// URL',
                              ('--port', '0', '--url', 'postgresql//u:geheim@h/x'): 'postgresql//u:***@h/x: not a postgresql:// URL',
                              ('--port', '0', '--host', 'no host'): 'host no host: '}.items():
            assert main(['platform', str(tmp_path/'new'), '--no-demo', *options]) == 2
            out, err = capsys.readouterr()
            assert out == '' and err.startswith('deepseek-nb: ') and said in err and err.count('\n') == 1
    assert main(['platform', str(tmp_path/'bad'), '--no-demo', '--port', '0']) == 2
    assert f'{tmp_path}/bad/platform.toml is no TOML file' in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob('*')] == ['bad', 'platform.toml']


def test_runs_are_copied_in_order_and_none_twice(store, monkeypatch):  # noqa: F811
    "Also by processes that start anew, with ends at the same moment, and after a failure"
    job_kind('copied')(lambda job: {})
    ids = [submit(store, None, 'copied', {}) for _ in range(45)]
    base, said = store.now(), []
    with store.write() as c:
        for i in ids[:43]: c.execute(update(jobs).where(jobs.c.id == i).values(state='done', started=base, ended=base + i//5))
    broken = [ids[30]]
    def copy(store, job, uri):
        if job in broken: raise OSError('MLflow is away')
        said.append(job)
        return f'run{job}'
    monkeypatch.setattr(operator, 'mirror_run', copy)
    def tick():
        other = again(store)
        OperatedMonitor(other, OperatorSettings(mlflow='http://mlflow.example')).copy()
        with other.read() as c: found = [a.detail['why'] for a in open_alerts(c, 'mirror')]
        other.close()
        return found
    assert tick() == [] and tick() == ['OSError: MLflow is away'] and said == ids[:30]
    broken.clear()
    for _ in range(3): assert tick() == []
    assert said == ids[:43] and mirror_ended(store, 'x') == 0
    with store.write() as c: c.execute(update(jobs).where(jobs.c.id == ids[44]).values(state='failed', started=base, ended=base + 99))
    assert mirror_ended(store, 'x') == 1 and said[-1] == ids[44]


def test_each_minute_is_given_once(store, monkeypatch):  # noqa: F811
    given, minute, now = [], 60*10**6, [20_000*24*3600*10**6]
    monkeypatch.setattr(operator, 'mirror_window', lambda w: given.append((w.start, w.count)) or True)
    store.clock = lambda: now[0]
    begin = now[0]
    mirror_minutes(store)
    for m in range(30):
        with Recorder(store) as r:
            for _ in range(m%4): r.record(RequestEvent('a', at=begin + m*minute))
        now[0] = begin + (m + 1)*minute + 6*10**6
        if m%3 == 0: continue
        other = again(store)
        other.clock = store.clock
        mirror_minutes(other)
        other.close()
    mirror_minutes(store)
    assert given == [(begin + m*minute, m%4) for m in range(30) if m%4]

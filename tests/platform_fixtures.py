"""A store of the platform over both databases, for tests: `from platform_fixtures import postgres_url, store  # noqa: F401`.

Postgres is Debian's package. It refuses to run as root, so then it runs as `nobody` or `postgres`; it listens on a Unix socket only."""
import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from deepseek_nb.platform.store import open_store

_serial = count()


def _binaries():
    "The newest folder of Postgres' programs"
    found = sorted(glob.glob('/usr/lib/postgresql/*/bin/initdb'), key=lambda p: int(p.split('/')[4]))
    return Path(found[-1]).parent if found else shutil.which('initdb') and Path(shutil.which('initdb')).parent


class Postgres:
    "A server in a temporary folder; each test gets a database, a copy of one whose tables are made"
    def __init__(self, programs):
        self.programs = programs
        roomy = os.access('/dev/shm', os.W_OK) and shutil.disk_usage('/dev/shm').free > 2**31  # a container may have 64 MB
        self.folder = Path(tempfile.mkdtemp(prefix='pg-', dir='/dev/shm' if roomy else None))
        self.user = next((o for o in ('postgres', 'nobody') if self._has(o)), None) if os.getuid() == 0 else None
        if self.user: shutil.chown(self.folder, self.user)
        self.data = self.folder/'data'
        self.run('initdb', '-D', self.data, '-U', 'tester', '-A', 'trust', '-E', 'UTF8', '--locale=C', '--no-sync', '--wal-segsize=4')
        self.start()
        self.admin = create_engine(self.url('postgres'), isolation_level='AUTOCOMMIT', pool_pre_ping=True)
        self.execute('CREATE DATABASE model')
        open_store(self.url('model'), folder=self.folder/'model').close()

    def start(self):
        options = f"-c listen_addresses='' -k {self.folder} -F -c max_connections=60 -c shared_buffers=16MB -c autovacuum=off"
        self.run('pg_ctl', '-D', self.data, '-w', '-l', self.folder/'log', '-o', options, 'start')

    @staticmethod
    def _has(name):
        try: return bool(pwd.getpwnam(name))
        except KeyError: return False

    def run(self, program, *args):
        given = dict(user=self.user, group=pwd.getpwnam(self.user).pw_gid, extra_groups=[]) if self.user else {}
        with tempfile.TemporaryFile('w+') as out:  # a file, because the server would keep a pipe open
            p = subprocess.run([self.programs/program, *args], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=self.folder,
                               timeout=120, **given)
            out.seek(0)
            assert p.returncode == 0, f'{program}: {out.read()}'

    def url(self, name): return f'postgresql+psycopg://tester@/{name}?host={self.folder}'

    def execute(self, sql):
        with self.admin.connect() as c: c.execute(text(sql))

    def database(self, empty=False):
        "The URL of a new database"
        name = f'test_{os.getpid()}_{next(_serial)}'
        self.execute(f'CREATE DATABASE {name}' + ('' if empty else ' TEMPLATE model'))
        return self.url(name)

    def drop(self, url): self.execute(f"DROP DATABASE IF EXISTS {url.split('?')[0].rpartition('/')[2]} WITH (FORCE)")

    def stop(self):
        self.admin.dispose()
        self.run('pg_ctl', '-D', self.data, '-m', 'immediate', 'stop')
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope='session')
def postgres():
    "The server, started by the first test that needs it"
    programs = _binaries()
    if not programs: pytest.skip("Postgres is not installed (Debian's package postgresql)")
    server = Postgres(programs)
    yield server
    server.stop()


@pytest.fixture
def postgres_url(postgres):
    "The URL of a database with empty tables"
    url = postgres.database()
    yield url
    postgres.drop(url)


@pytest.fixture(params=['sqlite', 'postgres'])
def store(request, tmp_path, monkeypatch):
    "A store with empty tables, over SQLite and over Postgres; passwords are hashed in no time"
    from deepseek_nb.platform import access
    monkeypatch.setattr(access, 'SCRYPT', dict(n=16, r=8, p=1))
    if request.param == 'sqlite': opened = open_store(tmp_path/'store', durable=False)
    else: opened = open_store(request.getfixturevalue('postgres_url'), folder=tmp_path/'store', durable=False)
    yield opened
    opened.close()


def again(store):
    "The same database and folder as another process would open them"
    if store.kind == 'sqlite': return open_store(store.folder, durable=False)
    return open_store(store.engine.url.render_as_string(hide_password=False), folder=store.folder, durable=False)

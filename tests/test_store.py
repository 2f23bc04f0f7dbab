"""What the platform's store promises, over SQLite and Postgres: kills, other processes, a full disk, clocks that jump, backups.

Each run draws new moments; SEED=n draws the same ones, STORE_KILLS=50 kills more often than CI does."""
import errno
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from base64 import b64encode
from contextlib import contextmanager
from pathlib import Path

import pytest
from platform_fixtures import again, postgres, postgres_url, store  # noqa: F401
from sqlalchemy import delete, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError

from deepseek_nb.platform.audit import LogHead, audit, first_broken, head_of
from deepseek_nb.platform.registry import add_model, measure, measures_of
from deepseek_nb.platform.store import (
    MIGRATIONS,
    Clock,
    audits,
    datasets,
    events,
    faults,
    measures,
    open_store,
    records,
    references_,
    restore_store,
    settings,
    upgrade,
)

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
KILLS = int(os.environ.get('STORE_KILLS', 8))
DRAWN = random.Random(SEED)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_store SEED={SEED}')
    yield


def add(c, name): return c.execute(insert(datasets).values(name=name, kind='chat', created=0)).inserted_primary_key[0]
def names(c): return list(c.scalars(select(datasets.c.name).order_by(datasets.c.id)))


@contextmanager
def process(job, *args):
    "A fork that runs the job with a file to write lines to; yields its id and the lines that it wrote"
    read, write = os.pipe()
    if not (pid := os.fork()):
        code = 1
        try:
            os.close(read)
            job(os.fdopen(write, 'w', buffering=1), *args)
            code = 0
        except BaseException as e: print(repr(e), file=sys.stderr)
        finally: os._exit(code)
    os.close(write)
    lines = os.fdopen(read)
    try: yield pid, lines
    finally:
        lines.close()
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
        try: os.waitpid(pid, 0)
        except ChildProcessError: pass


# ---- transactions

def test_transactions(store):
    with store.write() as c: first = add(c, 'a')
    with pytest.raises(ZeroDivisionError), store.write() as c: add(c, 'b'), 1/0
    with store.read() as c:
        assert names(c) == ['a']
        with store.write() as w: assert add(w, 'c') > first
        assert names(c) == ['a'], 'a reader keeps its snapshot'
    with again(store).read() as c: assert names(c) == ['a', 'c']
    with pytest.raises(DBAPIError, match='readonly|read-only'), store.read() as c: add(c, 'd')
    with pytest.raises(IntegrityError), store.write() as c:
        c.execute(insert(records).values(dataset_id=99, digest='', data={}, split='train', created=0))
    with pytest.raises(IntegrityError), store.write() as c: add(c, 'a')
    with pytest.raises(RuntimeError, match='pass the connection'), store.write(), store.write(): pass
    with store.write() as c: add(c, 'after all of these')
    assert faults(store) == []


def test_ids_are_never_used_again(store):
    with store.write() as c: last = [add(c, str(i)) for i in range(3)][-1]
    with store.write() as c: c.execute(delete(datasets).where(datasets.c.id == last))
    with again(store).write() as c: assert add(c, 'next') > last


def test_json_is_the_same_over_both(store):
    value = {'a': [1, 2.5, None, True, 1e300, 10**15], 'ü\u2028': 'x"\\\n\x00', 'half': '\ud800', 'empty': {}}
    with store.write() as c: c.execute(insert(settings).values(name='x', value=value))
    with store.read() as c: assert c.scalar(select(settings.c.value).where(settings.c.name == 'x')) == value
    with pytest.raises(Exception, match='JSON compliant'), store.write() as c:
        c.execute(insert(settings).values(name='nan', value=[float('nan')]))
    with store.read() as c: assert not c.execute(select(settings).where(settings.c.name == 'nan')).all()


# ---- several processes on one database

def count_up(out, store, n, who):
    own = again(store)
    for _ in range(n):
        with own.write() as c:
            last = c.scalar(select(func.max(datasets.c.created))) or 0
            for half in 'ab': c.execute(insert(datasets).values(name=f'{last + 1}{half}', kind=who, created=last + 1))
            audit(c, None, 'count', f'number:{last + 1}')
    print('done', file=out)


def test_two_processes_write_and_a_third_reads(store):
    n = 15
    with process(count_up, store, n, 'x') as (_, one), process(count_up, store, n, 'y') as (_, two):
        seen, threads = [], []
        def look():
            while len(seen) < 10**5 and any(t.is_alive() for t in threads):
                with store.read() as c:
                    counted = [c.scalar(select(func.count()).select_from(t)) for t in (datasets, audits)]
                    seen.append((*counted, c.scalar(select(func.max(datasets.c.created))) or 0))
                time.sleep(.002)
        ended = []
        threads = [threading.Thread(target=lambda o=o: ended.append(o.readline())) for o in (one, two)]
        for t in threads: t.start()
        look()
        for t in threads: t.join()
    assert ended == ['done\n']*2, 'a writer failed'
    assert seen and all(rows == 2*highest == 2*entries for rows, entries, highest in seen), 'a reader saw half a transaction'
    with store.read() as c: assert c.scalar(select(func.max(datasets.c.created))) == 2*n
    assert store.check() == [] and head_of(store).id == 2*n


def open_new(out, where, folder):
    open_store(where, folder).close()
    print('open', file=out)


@pytest.mark.parametrize('kind', ['sqlite', 'postgres'])
def test_processes_that_open_a_new_store_at_once(kind, request, tmp_path):
    if kind == 'postgres':
        server = request.getfixturevalue('postgres')
        where, folder = server.database(empty=True), tmp_path
    else: where, folder = tmp_path/'new', None
    def new(): return process(open_new, where, folder)
    with new() as (_, a), new() as (_, b), new() as (_, c): assert [o.readline() for o in (a, b, c)] == ['open\n']*3
    opened = open_store(where, folder)
    assert opened.check() == []
    opened.close()
    if kind == 'postgres': server.drop(where)


def hold(out, store):
    own = again(store)
    with own.write() as c:
        add(c, 'held')
        print('holding', file=out)
        time.sleep(60)


def test_a_writer_that_never_ends_is_waited_for_to_a_limit(store):
    quick = open_store(store.folder, wait=.2, durable=False) if store.kind == 'sqlite' else open_store(
        store.engine.url, folder=store.folder, wait=.2)
    with process(hold, store) as (pid, lines):
        assert lines.readline() == 'holding\n'
        with pytest.raises(TimeoutError, match='try again'), quick.write(): pass
        with quick.read() as c: assert names(c) == [], 'readers never wait'
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for _ in range(100): # Postgres notices the death of its client a little later
            try:
                with quick.write() as c: add(c, 'free')
                break
            except TimeoutError: time.sleep(.05)
    with quick.read() as c: assert names(c) == ['free']
    quick.close()


def use(out, store):
    with store.write() as c: add(c, 'child')
    print(names_of(store), file=out)


def test_a_fork_opens_connections_of_its_own(store):
    with store.write() as c: add(c, 'parent')
    with store.read() as c:
        assert names(c) == ['parent']
        with process(use, store) as (_, lines): assert lines.read() == "['parent', 'child']\n"
        assert names(c) == ['parent']
    with store.write() as c: add(c, 'again')
    assert names_of(store) == ['parent', 'child', 'again'] and faults(store) == []


def test_a_store_opens_while_another_writes(store):
    with store.write() as c:
        add(c, 'slow')
        assert names_of(again(store)) == []


# ---- kill -9

def write_on(out, store, seed):
    "Rows and audit entries; says each number once it is committed"
    own, drawn = again(store), random.Random(seed)
    if own.kind == 'sqlite':
        own.close()
        own = open_store(own.folder)  # durable, as in use
    while True:
        with own.write() as c:
            n = (c.scalar(select(func.max(datasets.c.created))) or 0) + 1
            c.execute(insert(datasets).values(name=f'n{n}', kind='chat', created=n))
            c.execute(insert(settings).values(name=f'text {n}', value='x'*drawn.choice([10, 5000, 200_000])))
            audit(c, None, 'write', f'number:{n}')
        print(n, file=out)


def test_killed_writers_lose_nothing(store):
    said = 0
    for _ in range(KILLS):
        with process(write_on, store, DRAWN.random()) as (pid, lines):
            lines.readline()  # the first is committed; then any moment
            time.sleep(DRAWN.random()**2*.06)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            rest = lines.read().split()
        opened = again(store)
        with opened.read() as c: found = list(c.scalars(select(datasets.c.created).order_by(datasets.c.created)))
        said = max([said + 1, *map(int, rest)])
        assert found == list(range(1, len(found) + 1)) and said <= len(found), (said, found[-3:])
        # the one that was on its way may be committed or not; Postgres may still have to notice the death of the client
        assert len(found) <= said + 1
        said = len(found)
        opened.close()
    assert store.check() == [], store.check()
    assert head_of(store).id >= said - 1


def create(out, folder):
    print('go', file=out)
    while True:
        open_store(folder, durable=False).close()
        shutil.rmtree(folder)


def test_killed_while_a_store_is_made(tmp_path):
    for i in range(KILLS):
        with process(create, tmp_path/str(i)) as (pid, lines):
            lines.readline()
            time.sleep(DRAWN.random()*.1)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        opened = open_store(tmp_path/str(i), durable=False)
        with opened.write() as c: add(c, 'works')
        assert opened.check() == []
        opened.close()


def test_a_killed_server_of_postgres_loses_nothing(postgres, postgres_url, tmp_path):
    opened = open_store(postgres_url, folder=tmp_path)
    with process(write_on, opened, 1) as (pid, lines):
        for _ in range(3): said = int(lines.readline())
        postgres.run('pg_ctl', '-D', postgres.data, '-m', 'immediate', 'stop')
        os.waitpid(pid, 0)
        said = max([said, *map(int, lines.read().split())])
    postgres.start()
    with opened.read() as c: found = c.scalar(select(func.max(datasets.c.created)))
    assert said <= found <= said + 1 and opened.check() == []
    opened.close()


SHIM = r'''
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
static void keep(int fd) {  // what a power failure leaves: each file as it was flushed last
    char from[64], name[PATH_MAX], to[2*PATH_MAX], buffer[65536];
    snprintf(from, sizeof from, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(from, name, sizeof name - 1);
    if (n < 0) return;
    name[n] = 0;
    struct stat is;
    if (!fstat(fd, &is) && S_ISDIR(is.st_mode)) {  // what was deleted is gone once its folder is flushed
        snprintf(to, sizeof to, "cd \"$FLUSHED\" && for f in *; do [ -e \"%s/$f\" ] || rm -f \"$f\"; done", name);
        if (system(to)) abort();
        return;
    }
    if (!strstr(name, "platform.db")) return;
    snprintf(to, sizeof to, "%s/%s", getenv("FLUSHED"), strrchr(name, '/') + 1);
    int in = open(name, O_RDONLY), out = open(to, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    while ((n = read(in, buffer, sizeof buffer)) > 0) if (write(out, buffer, n) != n) abort();
    close(in); close(out);
}
int fsync(int fd) { keep(fd); return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd); }
int fdatasync(int fd) { keep(fd); return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(fd); }
'''
COMMITS = '''
import os, sys
from sqlalchemy import event, insert
from deepseek_nb.platform.store import datasets, open_store
store = open_store(sys.argv[1])
with store.engine.connect() as c: c.connection.driver_connection.execute(f'PRAGMA synchronous={sys.argv[2]}') if sys.argv[2] else None
for i in range(40):
    with store.write() as c: c.execute(insert(datasets).values(name=str(i), kind='chat', created=i))
os._exit(0)
'''


@pytest.mark.skipif(sys.platform != 'linux' or not shutil.which('cc'), reason='needs Linux and a C compiler')
def test_power_failure(tmp_path):
    "FULL keeps all commits, NORMAL none of the last; the database is whole with both"
    (tmp_path/'shim.c').write_text(SHIM)
    subprocess.run(['cc', '-shared', '-fPIC', '-o', tmp_path/'shim.so', tmp_path/'shim.c', '-ldl'], check=True)
    kept = {}
    for mode in ('', 'NORMAL'):
        flushed = tmp_path/f'flushed{mode}'
        flushed.mkdir()
        env = os.environ | dict(LD_PRELOAD=str(tmp_path/'shim.so'), FLUSHED=str(flushed))
        subprocess.run([sys.executable, '-c', COMMITS, tmp_path/f'store{mode}', mode], check=True, env=env)
        with sqlite3.connect(flushed/'platform.db') as c:
            assert c.execute('PRAGMA integrity_check').fetchone() == ('ok',)
            kept[mode] = [*c.execute("SELECT count(*) FROM sqlite_master WHERE name = 'datasets'")][0][0] and [
                *c.execute('SELECT count(*) FROM datasets')][0][0]
    assert kept == {'': 40, 'NORMAL': 0}, kept


# ---- a full disk

def test_a_full_database(tmp_path):
    opened = open_store(tmp_path, durable=False)
    def most(pages):
        with opened.engine.connect() as c: c.exec_driver_sql(f'PRAGMA max_page_count={pages}')
    with opened.write() as c: add(c, 'before')
    with opened.read() as c: most(c.exec_driver_sql('PRAGMA page_count').scalar() + 3)
    with pytest.raises(OSError, match='free space') as e, opened.write() as c:
        add(c, 'half')
        c.execute(insert(settings).values(name='large', value='x'*100_000))
    assert e.value.errno == errno.ENOSPC
    with opened.read() as c: assert names(c) == ['before']
    most(2**30)
    with opened.write() as c: add(c, 'after')
    assert opened.check() == []


def fill(out, folder):
    "A limit on the size of files stands for a disk without space: database and log fail at any write"
    opened = open_store(folder, durable=False)
    with opened.write() as c:
        add(c, 'before')
        audit(c, None, 'add', 'before')
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    full = (os.path.getsize(folder/'platform.db-wal') + 20_000, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, full)
    try: many(opened)
    except OSError as e: print(e.errno == errno.ENOSPC and 'free space' in str(e), file=out)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with opened.write() as c:
        add(c, 'after')
        audit(c, None, 'add', 'after')
    print(names_of(opened), opened.check(), file=out)


def names_of(opened):
    with opened.read() as c: return names(c)


def many(opened):
    with opened.write() as c:
        for i in range(200): c.execute(insert(settings).values(name=f'n{i}', value='x'*4000))
        audit(c, None, 'add', 'many')


@pytest.mark.skipif(sys.platform == 'win32', reason='limits of POSIX')
def test_a_full_disk(tmp_path):
    with process(fill, tmp_path) as (_, lines): assert lines.read().splitlines() == ['True', "['before', 'after'] []"]


# ---- clocks

def test_a_clock_that_jumps(store):
    times = [DRAWN.randrange(10**15) for _ in range(200)]
    jumps = iter(times)
    store.clock = lambda: next(jumps)
    seen = [store.now() for _ in times]
    assert seen == sorted(seen) and seen[-1] == max(times)
    jumps = iter([5]*100)
    for i in range(3):
        with store.write() as c: audit(c, None, 'tick', f'{i}')
    with store.read() as c: assert list(c.scalars(select(audits.c.subject).order_by(audits.c.id))) == ['0', '1', '2']
    assert store.check() == []


def test_the_pace_of_the_clock_after_a_jump_back():
    wall, steady = [10**18], [0]
    clock = Clock(lambda: wall[0], lambda: steady[0])
    before = clock()
    wall[0] -= 3600*10**9
    for _ in range(5):
        steady[0], wall[0] = steady[0] + 10**9, wall[0] + 10**9
        assert clock() == (before := before + 10**6)
    wall[0] += 7200*10**9
    assert clock() == wall[0]//1000


# ---- versions of the schema

def test_steps_run_once_and_whole(store):
    ran = []
    def column(c): ran.append(2), c.execute(text('ALTER TABLE alerts ADD COLUMN colour TEXT'))
    def fails(c): c.execute(text('ALTER TABLE alerts ADD COLUMN smell TEXT')), 1/0
    with pytest.raises(ZeroDivisionError): upgrade(store, {5: column, 6: fails})
    with store.read() as c: assert c.scalar(select(settings.c.value).where(settings.c.name == 'schema')) == 4
    assert upgrade(store, {5: column}) == upgrade(store, {5: column}) == 5
    assert ran == [2, 2]  # the first was rolled back
    with store.write() as c: c.execute(text("UPDATE alerts SET colour = 'red'"))
    with pytest.raises(DBAPIError), store.write() as c: c.execute(text("UPDATE alerts SET smell = 'bad'"))
    with pytest.raises(ValueError, match='update it'): again(store)
    assert [*MIGRATIONS] == [2, 3, 4], 'a new step needs a test with a store of the version before'


def of_version(c, number):
    "The tables as an older version had them, but for those that a test makes itself"
    for sql in ('DROP INDEX ix_events_answer', 'ALTER TABLE events DROP COLUMN answer'): c.execute(text(sql))
    c.execute(text(f"UPDATE settings SET value = '{number}' WHERE name = 'schema'"))


def test_events_of_the_third_version(store):
    "Version 3 didn't know which response an event was"
    old = dict(at=1, place='here', kind='chat', owner='', prompt_tokens=1, completion_tokens=1, seconds=1., error='', cost=0.)
    with store.write() as c:
        of_version(c, 3)
        c.execute(text(f"INSERT INTO events ({', '.join(old)}) VALUES ({', '.join(f':{k}' for k in old)})"), old)
    assert upgrade(store) == 4
    with store.write() as c: c.execute(insert(events).values(old | dict(answer='chatcmpl-1')))
    with store.read() as c: assert c.scalars(select(events.c.answer).order_by(events.c.id)).all() == ['', 'chatcmpl-1']


def test_measures_of_the_first_version(store):
    "Version 1 had one row for each measure of a model; an upgrade keeps it, and later figures stand beside it"
    model = add_model(store, None, 'one', 'smollm2-135m')
    with store.write() as c:
        c.execute(text('DROP TABLE measures'))
        c.execute(text('CREATE TABLE measures (model_id BIGINT NOT NULL, name TEXT NOT NULL, value FLOAT, low FLOAT, high FLOAT, '
                       'detail JSON NOT NULL, at BIGINT NOT NULL, PRIMARY KEY (model_id, name))'))
        c.execute(text("INSERT INTO measures VALUES (1, 'accuracy', 0.9, 0.8, 0.95, '{\"n\": 200}', 5)"))
        of_version(c, 1)
    assert upgrade(store) == 4
    measure(store, model, 'accuracy', .7)
    assert measures_of(store, model)['accuracy'].value == .7
    with store.read() as c: first = c.execute(select(measures).order_by(measures.c.id)).first()
    assert (first.value, first.detail) == (.9, dict(n=200))


def test_samples_of_drift_of_the_second_version(store):
    "Version 2 kept them in files; one that is missing only lets its watch start anew"
    for n in ('ab', 'cd'):
        (store.folder/'blobs'/n).mkdir(parents=True)
        (store.folder/'blobs'/n/'ef').write_bytes(n.encode())
    watches = dict(whole=dict(blob='abef', odd=dict(blob='cdef'), past=9), calm=dict(blob='cdef', odd=None), lost=dict(blob='1234'), new={})
    with store.write() as c:
        for place, state in watches.items(): c.execute(insert(references_).values(place=place, name='drift', detail=state, created=1))
        of_version(c, 2)
    assert upgrade(store) == 4
    with store.read() as c: found = dict(c.execute(select(references_.c.place, references_.c.detail)).all())
    ab, cd = (b64encode(o).decode() for o in (b'ab', b'cd'))
    assert found == dict(whole=dict(pool=ab, odd=cd, past=9), calm=dict(pool=cd, odd=None), lost=dict(odd=None), new=dict(odd=None))


# ---- files

def test_nobody_else_may_read(tmp_path):
    opened = open_store(tmp_path/'new')
    with opened.write() as c: audit(c, None, 'a', 'b')
    for path in (tmp_path/'new').rglob('*'): assert not path.stat().st_mode & 0o077, path
    assert not (tmp_path/'new').stat().st_mode & 0o077


# ---- backups

def test_backup_while_others_write(store, tmp_path):
    with process(write_on, store, 3) as (pid, lines):
        for _ in range(3): lines.readline()
        copy = open_store(store.backup(tmp_path/'copy'), durable=False)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with copy.read() as c: n = c.scalar(select(func.max(datasets.c.created)))
    assert n >= 3 and copy.check() == [] and names_of(copy) == names_of(store)[:n]
    with pytest.raises(ValueError, match='exists'): store.backup(tmp_path/'copy')
    with copy.write() as c: assert add(c, 'more') > n
    assert not [*tmp_path.glob('.copy*')]
    copy.close()


def test_restore(store, tmp_path):
    source = open_store(tmp_path/'source', durable=False)
    with source.write() as c:
        id = [add(c, str(i)) for i in range(5)][-1]
        c.execute(insert(records).values(dataset_id=id, digest='d', data=dict(text='ü'), split='train', created=7))
        audit(c, None, 'make', 'five')
    restore_store(store, source)
    with store.read() as c, source.read() as s:
        for t in (datasets, records, audits, settings):
            rows = select(t).order_by(t.c[0])
            assert c.execute(rows).all() == s.execute(rows).all()
    with store.write() as c:
        assert add(c, 'next') == id + 1
        audit(c, None, 'go', 'on')
    assert store.check() == []
    with pytest.raises(ValueError, match='have rows'): restore_store(store, source)
    source.close()


# ---- the audit log

CHANGES = dict(
    edited=(lambda c, n: c.execute(update(audits).where(audits.c.id == n).values(subject='other')), lambda n: n),
    detail=(lambda c, n: c.execute(update(audits).where(audits.c.id == n).values(detail=dict(n=-1))), lambda n: n),
    user=(lambda c, n: c.execute(update(audits).where(audits.c.id == n).values(user_id=7)), lambda n: n),
    time=(lambda c, n: c.execute(update(audits).where(audits.c.id == n).values(at=audits.c.at + 1)), lambda n: n),
    deleted=(lambda c, n: c.execute(delete(audits).where(audits.c.id == n)), lambda n: n),
    truncated=(lambda c, n: c.execute(delete(audits).where(audits.c.id >= n)), lambda n: n),
    emptied=(lambda c, n: c.execute(delete(audits)), lambda n: 1),
    swapped=(lambda c, n: swap(c, n, 13), lambda n: n),
    inserted_before=(lambda c, n: insert_copy(c, n, -n), lambda n: 1),
    inserted_at_0=(lambda c, n: insert_copy(c, n, 0), lambda n: 1),
    inserted_behind=(lambda c, n: insert_copy(c, n, 14), lambda n: 14),
    inserted_far_behind=(lambda c, n: insert_copy(c, n, 99), lambda n: 14))


def insert_copy(c, n, at):
    row = dict(c.execute(select(audits).where(audits.c.id == n)).mappings().one())
    c.execute(insert(audits).values(row | dict(id=at)))


def swap(c, a, b):
    "The contents of two entries, with their digests"
    rows = {i: dict(c.execute(select(audits).where(audits.c.id == i)).mappings().one()) for i in (a, b)}
    for i, j in ((a, b), (b, a)): c.execute(update(audits).where(audits.c.id == i).values({**rows[j], 'id': i}))


@pytest.fixture
def logged(store):
    for i in range(12):
        with store.write() as c:
            audit(c, None, 'make', f'thing:{i}', n=i, ratio=.1 + .2, words=['ü', '\ud800'], nested=dict(b=(1,), a=None))
    with store.write() as c: audit(c, 3, 'end', 'thing')
    return store


def test_a_changed_log_is_noticed(logged):
    with logged.read() as c: rows = [dict(o) for o in c.execute(select(audits)).mappings()]
    for change, (act, where) in CHANGES.items():
        n = DRAWN.randrange(1, 13)
        with logged.write() as c: act(c, n)
        found = first_broken(logged)
        assert found and found.id == where(n), (change, n, found)
        assert len(logged.check()) == 1
        with logged.read() as c: ids = c.scalars(select(audits.c.id).order_by(audits.c.id.desc())).all()
        pages = {until: first_broken(logged, last=4, until=until) for until in [None, *ids[4::4]]}
        assert any(pages.values()), (change, n) # pages that show all entries in turn find it, too
        assert min(b.id for b in pages.values() if b) >= where(n), (change, n, pages)
        with logged.write() as c:
            c.execute(delete(audits))
            c.execute(insert(audits), rows)
        assert logged.check() == []
        assert not any(first_broken(logged, last=DRAWN.randrange(1, 14), until=u) for u in range(1, 14))


def test_the_head_outside(logged):
    noted = head_of(logged)
    with logged.write() as c: audit(c, None, 'go', 'on')
    assert first_broken(logged) is None and first_broken(logged, noted) is None
    assert first_broken(logged, LogHead(noted.id, '0'*64)).id == noted.id
    with logged.write() as c: c.execute(delete(audits).where(audits.c.id == 14))
    assert first_broken(logged).id == 14
    with logged.write() as c: audit(c, None, 'another', 'entry 14')
    assert 'replaced' in first_broken(logged).why, 'the head never goes back'
    file = logged.folder/'audit.head'
    for content in ('', 'x y', '1 2 3'):
        file.write_text(content)
        assert 'unreadable' in first_broken(logged).why
    file.unlink()
    assert 'missing' in first_broken(logged).why


def log(out, store, n):
    own = again(store)
    for i in range(n):
        with own.write(alone=False) as c: audit(c, None, 'log', f'{os.getpid()}:{i}')
    print('done', file=out)


def test_parallel_writers_never_fork_the_chain(store):
    n = 15
    with process(log, store, n) as (_, a), process(log, store, n) as (_, b), process(log, store, n) as (_, c):
        assert [o.readline() for o in (a, b, c)] == ['done\n']*3
    assert first_broken(store) is None and head_of(store).id == 3*n


def test_threads_write_one_after_another(store):
    failed = []
    def work(i):
        try:
            for j in range(4):
                with store.write() as c:
                    audit(c, i, 'work', f'{i}:{j}')
                    add(c, f'{i}:{j}')
        except Exception as e: failed.append(e)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed and store.check() == [] and len(names_of(store)) == 32


def test_a_head_that_can_not_be_written(store):
    with store.write() as c: audit(c, None, 'a', 'b')
    (store.folder/'audit.head').unlink()
    (store.folder/'audit.head').mkdir()
    with pytest.warns(UserWarning, match='stays behind'), store.write() as c: audit(c, None, 'c', 'd')
    with store.read() as c: assert c.scalar(select(func.count()).select_from(audits)) == 2


def test_a_damaged_database(tmp_path):
    (tmp_path/'platform.db').write_bytes(b'no database'*1000)
    with pytest.raises(ValueError, match='restore the newest backup'): open_store(tmp_path)
    opened = open_store(tmp_path/'new', durable=False)
    with opened.write() as c: c.execute(insert(settings), [dict(name=str(i), value='x'*1000) for i in range(200)])
    opened.close()
    raw = bytearray((tmp_path/'new/platform.db').read_bytes())
    raw[len(raw)//2:-8192] = os.urandom(len(raw) - 8192 - len(raw)//2)
    (tmp_path/'new/platform.db').write_bytes(raw)
    try: found = open_store(tmp_path/'new').check()
    except ValueError as e: found = [str(e)]
    assert found


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(ConnectionError, match='does not answer') as e:
        open_store(f'postgresql://tester:geheim@/x?host={tmp_path}', folder=tmp_path)
    assert 'geheim' not in str(e.value)


def test_where_a_store_may_be(tmp_path):
    for bad in ('mysql://x:geheim@y/z', 'sqlite:///x.db', 'nonsense', 'postgresql//x:geheim@y/z', 'postgresql://x:geheim@y:port/z',
                'postgresql:', tmp_path/'new'):
        with pytest.raises(ValueError, match='postgresql://') as e: open_store(bad, folder=tmp_path)
        assert 'geheim' not in str(e.value)
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match='folder='): open_store('postgresql://x@y/z')
    assert Path(open_store(str(tmp_path/'as text')).folder).name == 'as text'

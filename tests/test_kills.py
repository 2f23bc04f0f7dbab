"""Two processes import, label, run jobs and release on one store, clocks jump, and they are killed at random moments: nothing is lost.

Each process says a step once its call has returned. What is said must be there after a kill, the step under way wholly or not at all.
Each run draws new moments; SEED=n draws the same ones, PLATFORM_KILLS=50 kills 50 times over each database (5 minutes)."""
import hashlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from importlib import import_module

import pytest
import warm
from platform_fixtures import again, postgres, postgres_url, store  # noqa: F401
from sqlalchemy import func, select
from test_jobs import texts_version
from test_store import process

from deepseek_nb.platform.access import create_user
from deepseek_nb.platform.audit import canonical_json, head_of
from deepseek_nb.platform.datasets import import_rows
from deepseek_nb.platform.jobs import (
    JOB_KINDS,
    Job,
    Process,
    Worker,
    claim,
    continue_job,
    curve_of,
    is_alive,
    job_folder,
    job_kind,
    run_child,
    submit,
)
from deepseek_nb.platform.labels import annotate, create_task, undo
from deepseek_nb.platform.registry import Limit, add_model, measure
from deepseek_nb.platform.rollout import release, roll_back
from deepseek_nb.platform.store import (
    Clock,
    annotations,
    audits,
    datasets,
    jobs,
    measures,
    models,
    newest,
    queue,
    records,
    releases,
    row_of,
    settings,
    tasks,
    version_rows,
    versions,
)

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='needs /proc')
SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
KILLS = int(os.environ.get('PLATFORM_KILLS', 6))
PEOPLE = ('ada', 'bob')
LENGTH, LABELS = 12, ['good', 'bad']  # numbers of a chain; labels of a task


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_kills SEED={SEED}')
    job_kind('links')(links)
    yield
    JOB_KINDS.pop('links')


# ---- a job with checkpoints and a model, and the worker that starts it as a fork

def chained(start, n, digest=''):
    for i in range(n): digest = hashlib.sha256(f'{digest}{start}{i}'.encode()).hexdigest()
    return digest


def links(job):
    "A chain of digests with a checkpoint after every second link, and a model at the end"
    note, start = job.folder/'state.json', job.config['start']
    i, digest = json.loads(note.read_text())[:2] if note.exists() else (0, '')
    while i < job.config['n']:
        digest, i = hashlib.sha256(f'{digest}{start}{i}'.encode()).hexdigest(), i + 1
        job.report(i, link=int(digest[:6], 16))
        if i%2 == 0:
            job.flush()
            (job.folder/'new').write_text(json.dumps([i, digest, 'x'*job.config.get('pad', 0)]))
            os.replace(job.folder/'new', note)
        time.sleep(.002)
    folder = job.folder/'model'
    folder.mkdir(exist_ok=True)
    (folder/'weights').write_text(digest)
    model = add_model(job.store, None, f'chain {start}', folder, job=job.id)
    measure(job.store, model, 'links', job.config['n'])
    return dict(digest=digest, model=model)


def _leave():
    "Close pipes and sockets of the parent, which would outlive it; SQLite's locks need its files"
    for fd in os.listdir('/proc/self/fd'):
        with suppress(OSError):
            if os.readlink(f'/proc/self/fd/{fd}').startswith(('pipe:', 'socket:')) and int(fd) > 2: os.close(int(fd))


class Fork:
    "What `Worker` asks of a process, over a fork, which starts in no time"
    def __init__(self, act, *args):
        sys.stdout.flush()
        self.pid, self.returncode = os.fork(), None
        if self.pid: return
        code = 1
        try:
            os.setsid()
            _leave()
            act(*args)
            code = 0
        finally: os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self):
        while self.poll() is None: time.sleep(.005)

    def kill(self):
        with suppress(ProcessLookupError): os.kill(self.pid, signal.SIGKILL)


class Forks(Worker):
    limit = None  # bytes of the largest file that a job may write

    def __init__(self, store): super().__init__(store, 2, (), attempts=10**6, patience=4)  # killed between claim and start

    def start(self, row):
        folder = job_folder(self.store, row.id)
        folder.mkdir(parents=True, exist_ok=True)
        url = None if self.store.kind == 'sqlite' else self.store.engine.url.render_as_string(hide_password=False)
        task = dict(store=str(self.store.folder), url=url, job=row.id, attempt=row.attempts, modules=[])
        self.children[row.id, row.attempts] = Fork(self.run_job, task, folder)

    def run_job(self, task, folder):
        out = os.open(folder/'crash.txt', os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for fd in 1, 2: os.dup2(out, fd)
        sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)  # not those of pytest
        if self.limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        run_child(task)


# ---- what a process does, step after step; each step may be done twice

def rows_of(who, i): return [dict(text=f'{who} {i} text {j}', label=LABELS[j%2]) for j in range(5 + i%7)]
def digest_of(rows): return hashlib.sha256(b''.join(sorted(hashlib.sha256(canonical_json(r)).digest() for r in rows))).hexdigest()


def ids_of(c, who, i):
    "Records of the version of a step, in their order"
    q = select(version_rows.c.record_id).join(versions, versions.c.id == version_rows.c.version_id)
    return c.scalars(q.where(versions.c.digest == digest_of(rows_of(who, i))).order_by(version_rows.c.record_id)).all()


def found(store, query):
    with store.read() as c: return c.scalar(query)


def do(store, user, i):
    "One step"
    who, begin, kind = user.name, i - i%8, i%8
    task = select(tasks.c.id).where(tasks.c.name == f'{who} {begin}')
    if kind == 0: import_rows(store, None, f'of {who}', rows_of(who, i))
    elif kind == 1 and found(store, task) is None:
        version = found(store, select(versions.c.id).where(versions.c.digest == digest_of(rows_of(who, begin))))
        create_task(store, None, version, f'{who} {begin}', 'classification', labels=LABELS)
    elif kind in (2, 3, 5):
        with store.read() as c: record = ids_of(c, who, begin)[kind - 2]
        annotate(store, user, found(store, task), record, dict(label=LABELS[(i//8 + kind)%2]))
    elif kind == 4 and found(store, select(jobs.c.id).where(jobs.c.name == f'{who} {i}')) is None:
        submit(store, None, 'links', dict(n=LENGTH, start=i), name=f'{who} {i}')
    elif kind == 6:
        model = add_once(store, who, i)
        if found(store, select(releases.c.id).where(releases.c.reason == f'{who} {i}')) is None:
            release(store, None, f'place-{who}', model, gates=[Limit('links', min=1)], reason=f'{who} {i}')
    elif kind == 7 and i%16 == 15:
        if found(store, select(releases.c.id).where(releases.c.reason == f'{who} {i}')) is None:
            roll_back(store, None, f'place-{who}', f'{who} {i}')
    elif kind == 7: undo_once(store, user, found(store, task), who, begin)


def add_once(store, who, i):
    "A model with a measure"
    model = found(store, select(models.c.id).where(models.c.name == f'{who} {i}'))
    if model is None: model = add_model(store, None, f'{who} {i}', 'mini')
    if found(store, select(measures.c.value).where(measures.c.model_id == model)) is None:
        measure(store, model, 'links', 3, pad='x'*random.randrange(1, 9000))
    return model


def undo_once(store, user, task, who, begin):
    with store.read() as c: third = ids_of(c, who, begin)[3]
    there = select(annotations.c.id).where(annotations.c.task_id == task, annotations.c.record_id == third)
    if found(store, there): undo(store, user, task)


def expected(who, n):
    "Labels, jobs and the stack of releases after the first n steps"
    labels, wanted, live, stack = {}, {}, 0, []
    for i in range(n):
        begin, kind = i - i%8, i%8
        if kind in (2, 3, 5): labels[begin, kind - 2] = LABELS[(i//8 + kind)%2]
        if kind == 7 and i%16 != 15: labels.pop((begin, 3))
        if kind == 4: wanted[f'{who} {i}'] = chained(i, LENGTH)
        if kind == 6: live, stack = live + 1, [*stack, f'{who} {i}']
        if kind == 7 and i%16 == 15: live, stack = live + 1, stack[:-1]
    return labels, wanted, live, stack


def state(store, who, n):
    "What `expected` gives, read from the store, for the steps up to n"
    labels = {}
    with store.read() as c:
        for begin in range(0, n, 8):
            ids = {r: j for j, r in enumerate(ids_of(c, who, begin))}
            q = select(annotations).join(tasks, tasks.c.id == annotations.c.task_id).where(tasks.c.name == f'{who} {begin}')
            labels |= {(begin, ids[r.record_id]): r.value['label'] for r in c.execute(q)}
        wanted = {r.name: chained(r.config['start'], LENGTH) for r in c.execute(select(jobs).where(jobs.c.name.like(f'{who} %')))}
        rows = c.execute(select(releases, models.c.name).join(models, models.c.id == releases.c.model_id)
                         .where(releases.c.place == f'place-{who}').order_by(releases.c.id)).all()
    stack, ids = [], []
    for r in rows:
        back = next((g['back'] for g in r.gates if 'back' in g), None)
        if back: stack, ids = stack[:ids.index(back) + 1], ids[:ids.index(back) + 1]
        else: stack, ids = [*stack, r.name], [*ids, r.id]
    if rows: assert [r.ended is None for r in rows] == [False]*(len(rows) - 1) + [True] and rows[-1].name == stack[-1]
    return labels, wanted, len(rows), stack


def act(out, store, user, begin, jump):
    "Work from a step on, and say each one; look after jobs; the clock jumps after a while"
    random.seed(f'{jump} {user.name} {begin}')
    turn = [0, 0]
    def wall():
        turn[0] += 1
        if turn[0]%50 == 0: turn[1] = random.randrange(-jump, jump + 1)
        return time.time_ns() + turn[1]*10**9
    own = again(store)
    own.clock, own.durable = Clock(wall), 'PLATFORM_DURABLE' in os.environ  # whether files are flushed
    worker = Forks(own)
    i = begin
    while True:
        worker.step()
        do(own, user, i)
        print(i, file=out)
        i += 1


# ---- what must hold

def nothing_half(store):
    "Every version has its rows, every queue its counts, every model of a job is one"
    assert store.check() == []
    with store.read() as c:
        has = dict(c.execute(select(version_rows.c.version_id, func.count()).group_by(version_rows.c.version_id)).all())
        for v in c.execute(select(versions)): assert has.get(v.id) == v.rows
        for name in PEOPLE:
            numbers = c.scalars(select(versions.c.number).join(datasets).where(datasets.c.name == f'of {name}')).all()
            assert sorted(numbers) == [*range(1, len(numbers) + 1)]
        given = Counter(dict(((t, r), n) for t, r, n in c.execute(
            select(annotations.c.task_id, annotations.c.record_id, func.count()).group_by(annotations.c.task_id, annotations.c.record_id))))
        for q in c.execute(select(queue)): assert q.given == given[q.task_id, q.record_id] and q.done == (q.given >= 1)
        made = c.scalars(select(models.c.job_id).where(models.c.job_id.is_not(None))).all()
        assert len(made) == len(set(made))
        done = c.execute(select(jobs).where(jobs.c.state == 'done')).all()
        for row in done: assert row.result['digest'] == chained(row.config['start'], LENGTH) and row.id in made
        assert c.scalar(select(func.count()).select_from(jobs).where(jobs.c.state.in_(('failed', 'cancelled')))) == 0
        assert c.scalar(select(func.count()).select_from(audits)) == c.scalar(select(func.max(audits.c.id))) <= head_of(store).id + 4
        orphans = select(func.count()).select_from(records).where(~records.c.dataset_id.in_(select(datasets.c.id)))
        assert c.scalar(orphans) == 0 and c.scalar(select(settings.c.value).where(settings.c.name == 'schema')) == 4


def killed(store, drawn, people, reached):
    "One kill of two processes, and perhaps of jobs; how far each had come"
    jump = drawn.choice([0, 3600, 86400])
    ada, bob = (process(act, store, p, r, jump) for p, r in zip(people, reached, strict=True))
    with ada as (one, first), bob as (two, second):
        said = [[lines.readline()] for lines in (first, second)]  # both are at work; then any moment
        time.sleep(drawn.random()*.6)
        found = [Process(**r.process) for r in newest(store, jobs, jobs.c.state == 'running') if r.pid and drawn.random() < .5]
        running = [p.pid for p in found if is_alive(p)]  # another process may have the number of one that has ended
        for pid in [one, two, *running]:
            with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        for pid in one, two: assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, 'a step went wrong'
        return [int((begin + lines.read().split())[-1]) + 1 for begin, lines in zip(said, (first, second), strict=True)]


def test_kills_at_random_moments_lose_nothing(store):
    drawn, reached, before = random.Random(SEED), [0, 0], sum(os.times()[:4])
    people = [create_user(store, None, name, 'correct horse battery', 'annotator') for name in PEOPLE]
    for _ in range(KILLS):
        reached = killed(store, drawn, people, reached)
        opened = again(store)
        nothing_half(opened)
        for who, n in zip(PEOPLE, reached, strict=True):
            got, wanted = state(opened, who, n + 8), (expected(who, n), expected(who, n + 1))
            odd = {k: (got[0].get(k), wanted[0][0].get(k)) for k in {*got[0], *wanted[0][0]} if got[0].get(k) != wanted[0][0].get(k)}
            assert got in wanted, (who, n, odd, got[1:], wanted[0][1:])
        opened.close()
    worker, end = Forks(store), time.monotonic() + 120 + 20*KILLS
    wanted = {k for who, n in zip(PEOPLE, reached, strict=True) for k in expected(who, n)[1]}
    def those(state): return newest(store, jobs, jobs.c.state == state, limit=10**4)
    while {r.name for r in those('done')} < wanted or those('running'):
        assert time.monotonic() < end, [(r.name, r.state, r.error) for r in newest(store, jobs)]
        worker.step()
        time.sleep(.02)
    for row in newest(store, jobs, jobs.c.state == 'done', limit=10**4):
        numbers = [float(int(chained(row.config['start'], k)[:6], 16)) for k in range(1, LENGTH + 1)]
        assert curve_of(store, row.id)['link'] == ([*range(1, LENGTH + 1)], numbers)
    nothing_half(store)
    print(store.kind, KILLS, 'kills', reached, 'steps', len(wanted), 'jobs', max(r.attempts for r in newest(store, jobs, limit=10**4)),
          'starts at most', f'{sum(os.times()[:4]) - before:.1f} s of CPU')


# ---- a full disk

def until(worker, done):
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end, [(r.id, r.state, r.error) for r in newest(worker.store, jobs)]
        worker.step()
        time.sleep(.02)


@pytest.mark.parametrize('store', ['sqlite'], indirect=True)
def test_a_checkpoint_on_a_full_disk(store):
    "A limit on the size of files stands for a disk without space: here there is room for the database, but not for a checkpoint"
    worker = Forks(store)
    job = submit(store, None, 'links', dict(n=LENGTH, start=1, pad=9*10**6))
    worker.limit = 8*10**6
    until(worker, lambda: row_of(store, jobs, job).state == 'failed')
    error = row_of(store, jobs, job).error
    assert 'the disk is full' in error and 'free space' in error and '\n' not in error, error
    assert store.check() == [] and len(curve_of(store, job)['link'][0]) == 2
    worker.limit = None
    continue_job(store, None, job)
    until(worker, lambda: row_of(store, jobs, job).state == 'done')
    assert row_of(store, jobs, job).result['digest'] == chained(1, LENGTH) and store.check() == []


@pytest.mark.parametrize('store', ['sqlite'], indirect=True)
def test_a_job_whose_database_is_on_a_full_disk(store):
    "Nothing of the job can be written, not even that it failed: it is put back, and ends when there is room"
    worker = Forks(store)
    job = submit(store, None, 'links', dict(n=LENGTH, start=2))
    worker.limit = os.path.getsize(store.folder/'platform.db-wal') + 9000
    until(worker, lambda: row_of(store, jobs, job).attempts > 1)
    worker.limit = None
    with store.read() as c: why = [r.detail['why'] for r in c.execute(select(audits).where(audits.c.action == 'job.queued'))]
    assert why and all('the disk is full' in o and '\n' not in o for o in why), why
    until(worker, lambda: row_of(store, jobs, job).state == 'done')
    assert row_of(store, jobs, job).result['digest'] == chained(2, LENGTH) and store.check() == []


# ---- the command

@pytest.mark.parametrize('store', ['sqlite'], indirect=True)
def test_sigterm_of_the_command(store):
    "`deepseek-nb platform` with a training on its way: it ends in time, and the training goes on from its checkpoint at the next start"
    pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
    import_module('deepseek_nb.platform.runs')
    config = dict(model='mini', steps=20, batch=1, warmup=0, length=16, save_every=1, eval_every=0, blocks=1, evaluate=False)
    job = submit(store, None, 'finetune', config, 'command', texts_version(store), cores=1)
    command = '-m', 'deepseek_nb.tools.cli', 'platform', store.folder, '--port', '0', '--no-demo'
    server = warm.start(*command, modules=warm.WORKER)
    try:
        end = time.monotonic() + 120
        while not (seen := curve_of(store, job)):
            if server.poll() is not None: pytest.fail('the command has ended: ' + ''.join(server.communicate()))
            assert time.monotonic() < end
            time.sleep(.02)
        child, begin = row_of(store, jobs, job).process, time.monotonic()
        server.send_signal(signal.SIGTERM)
        code, seconds = server.wait(60), time.monotonic() - begin
    finally: server.kill()
    said = ''.join(server.communicate())
    row = row_of(store, jobs, job)
    assert code == 0 and seconds < 30 and 'Traceback' not in said, (code, seconds, said)
    assert row.state == 'queued' and row.attempts == 0 and not is_alive(Process(**child)), row
    assert store.check() == [] and list((job_folder(store, job)/'work'/'checkpoints').glob('checkpoint-*'))
    assert Job(store, claim(store, 1)).perform() == 'done'
    assert curve_of(store, job)['loss'][0] == [*range(1, 21)] and len(seen['loss'][0]) < 20

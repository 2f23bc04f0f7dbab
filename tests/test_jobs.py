"Jobs of the platform: claims, kills, cancellation, floods and clocks, over both databases."
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest
from platform_fixtures import again, postgres, postgres_url, store  # noqa: F401
from sqlalchemy import insert, update

from deepseek_nb.platform import jobs as module
from deepseek_nb.platform.jobs import JOB_KINDS, Job, JobLog, Superseded, Worker, cancel, claim, continue_job, curve_of, job_folder
from deepseek_nb.platform.store import datasets, jobs, models, newest, records, row_of, version_rows, versions

KINDS = '''
import hashlib, json, os, sys, time
from deepseek_nb.platform.jobs import job_kind

@job_kind('chain')
def chain(job):
    "A chain of digests, with a checkpoint after every number"
    note = job.folder/'state.json'
    i,digest = json.loads(note.read_text()) if note.exists() else (0, '')
    while i < job.config['n']:
        i += 1
        digest = hashlib.sha256(f'{digest}{i}'.encode()).hexdigest()
        job.report(i, value=int(digest[:6], 16))
        if i%5 == 0:
            job.flush()
            (job.folder/'new').write_text(json.dumps([i, digest]))
            os.replace(job.folder/'new', note)
        time.sleep(job.config.get('pause', 0))
    return dict(digest=digest)

@job_kind('stubborn')
def stubborn(job):
    job.report(0, ready=1)
    while True: time.sleep(.01)

@job_kind('flood')
def flood(job):
    os.write(1, b'begin\\n')
    for _ in range(200): os.write(1, b'x'*10**5)
    os.write(2, b'end\\n')
    environment = dict(os.environ)
    (job.folder/'seen.json').write_text(json.dumps(dict(environment=environment, command=open('/proc/self/cmdline').read())))
    return dict(text='y'*10**6)
'''


FATAL = '''
import os, signal
from deepseek_nb.platform.jobs import JOB_KINDS, job_kind
from deepseek_nb.platform.runs import FinetuneRun

@job_kind('fatal', FinetuneRun, needs=('version',))
def fatal(job):
    "A fine-tuning whose first process is killed at the step that is its name"
    report = job.report
    def last(step, **values):
        if job.attempt == 1 and step == int(job.row.name): os.kill(os.getpid(), signal.SIGKILL)
        report(step, **values)
    job.report = last
    return JOB_KINDS['finetune'].run(job)
'''


@pytest.fixture
def kinds(tmp_path):
    (tmp_path/'kinds_of_the_test.py').write_text(KINDS)
    (tmp_path/'fatal_kind.py').write_text(FATAL)
    sys.path.insert(0, str(tmp_path))
    before = dict(JOB_KINDS)
    importlib.import_module('kinds_of_the_test')
    yield ('kinds_of_the_test',)
    sys.path.remove(str(tmp_path))
    for name in 'kinds_of_the_test','fatal_kind': sys.modules.pop(name, None)
    JOB_KINDS.clear()
    JOB_KINDS.update(before)


def until(worker, done, seconds=120):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, [(r.id, r.state, r.error) for r in newest(worker.store, jobs)]
        worker.step()
        time.sleep(.02)


def expected(n):
    import hashlib
    digest,values = '',[]
    for i in range(1, n + 1):
        digest = hashlib.sha256(f'{digest}{i}'.encode()).hexdigest()
        values.append(float(int(digest[:6], 16)))
    return digest, values


def test_no_job_is_claimed_twice_and_cores_are_respected(store):
    module.job_kind('nothing')(lambda job: {})
    wanted = [module.submit(store, None, 'nothing', {}, cores=c, priority=p) for c,p in [(1, 0), (2, 0), (1, 5), (1, 0)]*3]
    taken,lock = [],threading.Lock()

    def work():
        mine = again(store)
        while row := claim(mine, 10**6):
            with lock: taken.append(row.id)
        mine.close()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(taken) == wanted
    with store.write() as c: c.execute(update(jobs).values(state='queued'))
    order = []
    while row := claim(store, 2): order.append(row)
    assert sum(r.cores for r in order) <= 2 and [r.priority for r in order] == [5, 5]  # the urgent ones
    with store.write() as c: c.execute(update(jobs).where(jobs.c.state == 'running').values(state='done'))
    while row := claim(store, 2):
        running = [r.cores for r in newest(store, jobs, jobs.c.state == 'running')]
        assert sum(running) <= 2
        if sum(running) == 2:
            assert claim(store, 2) is None
            with store.write() as c: c.execute(update(jobs).where(jobs.c.state == 'running').values(state='done'))


def test_kills_at_random_moments_lose_nothing(store, kinds):
    seed = random.randrange(10**9)
    print('seed', seed)
    rng,n = random.Random(seed),40
    job = module.submit(store, None, 'chain', dict(n=n, pause=.03))
    code = ("import sys\nfrom deepseek_nb.platform.jobs import Worker\nfrom deepseek_nb.platform.store import open_store\n"
            "where,folder,path = sys.argv[1:]\nsys.path.insert(0, path)\n"
            "Worker(open_store(where, **(dict(folder=folder) if '://' in where else {})), 2, ('kinds_of_the_test',), attempts=99).run()")
    where = str(store.folder) if store.kind == 'sqlite' else store.engine.url.render_as_string(hide_password=False)
    first = subprocess.Popen([sys.executable, '-c', code, where, str(store.folder), sys.path[0]])  # a worker of its own, killed too
    end = time.monotonic() + 120
    while not curve_of(store, job): assert time.monotonic() < end and first.poll() is None; time.sleep(.02)
    first.kill()
    first.wait()
    assert row_of(store, jobs, job).state in ('running', 'done')  # its process goes on
    worker = Worker(store, 2, kinds, attempts=99)  # knows nothing but the database
    time.sleep(rng.random()*.5)
    worker.step()
    if (row := row_of(store, jobs, job)).state == 'running':
        with suppress(ProcessLookupError): os.kill(row.pid, signal.SIGKILL)  # it may end just now
    until(Worker(store, 2, kinds, attempts=99), lambda: row_of(store, jobs, job).state == 'done')
    digest,values = expected(n)
    assert row_of(store, jobs, job).result == dict(digest=digest)
    assert curve_of(store, job)['value'] == ([*range(1, n + 1)], values)
    assert store.check() == []


def test_cancel_ends_a_process_that_does_not_listen(store, kinds):
    worker = Worker(store, 2, kinds)
    job = module.submit(store, None, 'stubborn', {})
    until(worker, lambda: curve_of(store, job))
    pid = row_of(store, jobs, job).pid
    cancel(store, None, job)
    until(worker, lambda: row_of(store, jobs, job).state == 'cancelled')
    until(worker, lambda: not worker.children)
    with pytest.raises(ProcessLookupError): os.kill(pid, 0)
    continue_job(store, None, job)
    assert row_of(store, jobs, job).state == 'queued' and not row_of(store, jobs, job).cancel


def test_a_flood_is_bounded_and_secrets_stay_outside(store, kinds, monkeypatch):
    monkeypatch.setenv('PLATFORM_SECRET', 'geheim')
    worker = Worker(store, 2, kinds)
    job = module.submit(store, None, 'flood', {})
    until(worker, lambda: row_of(store, jobs, job).state == 'failed')
    assert 'the result has' in row_of(store, jobs, job).error
    folder = job_folder(store, job)
    assert sum(p.stat().st_size for p in folder.rglob('*') if p.is_file()) < 9*2**18 + 10**5
    log = JobLog(folder/'log')
    assert log.text().startswith('begin\n') and 'bytes were not kept' in log.text() and 'Traceback' in log.text(2**16)
    seen = (folder/'work'/'seen.json').read_text()
    assert 'geheim' not in seen and 'PLATFORM_SECRET' not in seen
    assert 'test_' not in json.loads(seen)['command'] and '://' not in json.loads(seen)['command']


def test_what_a_job_writes_is_private(store, kinds):
    "Log, checkpoints and results hold what users wrote: only the owner reads them, whatever the umask of the worker"
    store.folder.chmod(0o755)
    old = os.umask(0o022)
    try:
        job = module.submit(store, None, 'flood', {})
        until(Worker(store, 2, kinds), lambda: row_of(store, jobs, job).state == 'failed')
    finally: os.umask(old)
    found = [*job_folder(store, job).rglob('*')]
    assert {'seen.json', 'crash.txt'} <= {p.name for p in found}
    for p in (job_folder(store, job), *found): assert not p.stat().st_mode & 0o077, p



def test_a_clock_that_jumps_kills_nothing(store):
    module.job_kind('nothing')(lambda job: {})
    job = module.submit(store, None, 'nothing', {})
    row,me = claim(store, 2),module.this_process()
    with store.write() as c: c.execute(update(jobs).where(jobs.c.id == job).values(pid=me.pid, process=me._asdict()))
    worker = Worker(store, 2)
    for jump in 10**6*86400, -10**6*86400*365:
        store.clock = lambda jump=jump: time.time_ns()//1000 + jump
        worker.look_after()
        assert row_of(store, jobs, job).state == 'running'
    Job(store, row).flush()
    assert module.is_alive(me) and not module.is_alive(me._replace(born=me.born + '1'))
    with store.write() as c: c.execute(update(jobs).where(jobs.c.id == job).values(process=me._replace(born='long ago')._asdict()))
    worker.look_after()  # now another program has the number
    assert row_of(store, jobs, job).state == 'queued'
    late = Job(store, row)
    late.report(1, loss=1.)
    with pytest.raises(Superseded): late.flush()
    assert curve_of(store, job) == {}


def test_a_log_is_read_as_it_was_written(tmp_path):
    seed = random.randrange(10**9)
    print('seed', seed)
    rng = random.Random(seed)
    log,short,said = JobLog(tmp_path/'whole', size=50, most=1000),JobLog(tmp_path/'short', size=50, most=4),''
    some = JobLog(tmp_path/'some', size=50, most=8)
    for _ in range(200):
        text = ''.join(rng.choices('aé€😀\n', k=rng.randrange(12)))
        said += text
        log.write(text.encode())
        short.write(text.encode())
        assert log.text() == said
        if len(said.encode()) <= 400: # as many pieces as are kept
            some.write(text.encode())
            assert some.text() == said
    data = said.encode()
    kept = short.text().encode(errors='replace')
    assert kept.startswith(data[:46]) and kept.endswith(data[-46:]) and sum(size for *_,size in short.pieces()) <= 200
    lost = int(re.search(rb'(\d[\d,]*) bytes were not kept', kept)[1].replace(b',', b''))
    assert lost == len(data) - sum(size for *_,size in short.pieces()) and short.text(20) == data[-20:].decode(errors='replace')


def texts_version(store):
    with store.write() as c:
        dataset = c.execute(insert(datasets).values(name='texts', kind='classification', created=1)).inserted_primary_key[0]
        version = c.execute(insert(versions).values(dataset_id=dataset, number=1, digest='d', rows=8, columns=[], note='', report={},
                                                    created=1)).inserted_primary_key[0]
        for i,text in enumerate(['a bird', 'bread', 'a cat', 'soup', 'a dog', 'rice', 'a fish', 'cake']):
            row = dict(dataset_id=dataset, digest=str(i), data=dict(text=text, label=('animal', 'food')[i%2]), split='train', created=1)
            record = c.execute(insert(records).values(row)).inserted_primary_key[0]
            c.execute(insert(version_rows).values(version_id=version, record_id=record))
    return version


@pytest.mark.parametrize('store', ['sqlite'], indirect=True)
def test_a_killed_training_has_the_bits_of_an_unbroken_one(store, kinds):
    import torch

    importlib.import_module('fatal_kind')
    at = random.randrange(2, 5)
    print('killed at step', at)
    version = texts_version(store)
    config = dict(model='mini', steps=4, batch=2, rate=1e-3, warmup=0, length=16, save_every=1, eval_every=0, blocks=1, evaluate=False)
    killed,whole = (module.submit(store, None, 'fatal', config, str(n), version, cores=1) for n in (at, 99))
    worker = Worker(store, 1, ('fatal_kind',))
    worker.step()
    assert next(iter(worker.children.values())).wait() == -signal.SIGKILL
    assert len(curve_of(store, killed)['loss'][0]) == at - 1 and not row_of(store, jobs, killed).result
    worker.look_after()
    assert row_of(store, jobs, killed).state == 'queued' and list((job_folder(store, killed)/'work'/'checkpoints').glob('checkpoint-*'))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that was killed
    try: assert [Job(store, claim(store, 1)).perform() for _ in range(2)] == ['done']*2
    finally: torch.set_num_threads(threads)
    assert row_of(store, jobs, killed).attempts == 2 and row_of(store, jobs, whole).attempts == 1
    assert curve_of(store, killed) == curve_of(store, whole)
    assert len({row_of(store, models, row_of(store, jobs, j).result['model']).digest for j in (killed, whole)}) == 1

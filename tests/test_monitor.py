"Monitoring: events without loss, also after kill -9, windows, alerts, webhooks, drift and feedback, over both databases."
import json
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from platform_fixtures import again, postgres, postgres_url, store  # noqa: F401
from sqlalchemy import func, insert, select

from deepseek_nb.eval.drift import EmbeddingTable, ShareRule
from deepseek_nb.platform.events import (
    DAY,
    MINUTE,
    SAMPLED,
    Prices,
    Recorder,
    RequestEvent,
    condense,
    request_hook,
    total,
    windows_of,
)
from deepseek_nb.platform.monitor import (
    WEEK,
    DriftPlan,
    Monitor,
    add_hook,
    close_alert,
    deliver,
    drift_history,
    drift_step,
    end_drift,
    feedback_labels,
    feedback_rows,
    give_feedback,
    judge_probe,
    open_alerts,
    places_of,
    raise_alert,
)
from deepseek_nb.platform.operator import mirror_window
from deepseek_nb.platform.store import annotations, events, open_store, settings, texts, windows
from deepseek_nb.serve.webhooks import verify

ROOT = Path(__file__).parents[1]
TABLE = EmbeddingTable(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)))
START = 20_000*DAY//WEEK*WEEK + 4*DAY  # a Monday


@pytest.fixture
def rng():
    seed = random.randrange(2**32)
    print(f'seed {seed}')
    return np.random.default_rng(seed)


def event(rng, at=None, place='a', owner='', other=0., **more):
    ids = (rng.integers(0, 200, 20) + 200*(rng.random(20) < other)).tolist()
    return RequestEvent(place, owner=owner, prompt_tokens=20, completion_tokens=3, first_seconds=.1, seconds=float(rng.lognormal(-1, .5)),
                        outcome='stop', features=lambda: TABLE.features(ids, 3, 'stop'), at=at, **more)


def counted(store):
    with store.read() as c:
        return c.scalar(select(func.count()).select_from(events)), c.scalar(select(func.coalesce(func.sum(windows.c['count']), 0)))


def alerts_of(store, rule=''):
    with store.read() as c: return open_alerts(c, rule)


# ---- events

def test_nothing_is_lost(store, rng):
    "Several threads, a small queue that overflows, and two recorders on one database as two processes would have them"
    other = again(store)
    recorders = [Recorder(s, every=.01, most=40, seed=i) for i, s in enumerate((store, other))]
    made = [event(rng, owner=f'u{i}') for i in range(50)]
    at = store.now()
    def work(r): return [r.record(e._replace(at=at)) for e in made*2]
    threads = [threading.Thread(target=work, args=(r,)) for r in recorders*2]
    for t in threads: t.start()
    for t in threads: t.join()
    for r in recorders: r.close()
    assert counted(store) == (400, 400) and all(r.lost == 0 and r.recorded == r.written == 200 for r in recorders)
    whole = total(windows_of(store, 'a', 0))
    assert whole.prompt_tokens == 400*20 and sum(whole.sketch.seconds.values()) == 400 and whole.sketch.featured == 400
    owners = [o for _, o, _ in whole.sketch.sample]
    assert len(owners) == len({*owners}) == SAMPLED
    assert not store.check()
    other.close()


def test_windows_are_the_events(store, rng):
    "Counts, costs and quantiles of random events in random minutes, against loops"
    prices = Prices('EUR', {'a': dict(prompt=2., completion=3.), '*': dict(prompt=1., completion=1.)})
    made = [event(rng, START + int(rng.integers(5*MINUTE)), random.choice('ab'), f'u{rng.integers(9)}', model_id=random.choice((None, 1)))
            for _ in range(120)]
    made = [e._replace(error=random.choice(('', '', 'bad'))) for e in made]
    with Recorder(store, prices, every=.01) as r:
        for e in made: r.record(e)
    for place in 'ab':
        mine = [e for e in made if e.place == place]
        rows = [*windows_of(store, place, START)]
        assert [r.start for r in rows] == sorted(r.start for r in rows)
        per = Counter((e.at//MINUTE*MINUTE, e.model_id) for e in mine)
        assert {(r.start, r.model_id): r.count for r in rows} == per
        t = total(rows)
        assert (t.count, t.errors) == (len(mine), sum(bool(e.error) for e in mine))
        assert t.sketch.errors == Counter(e.error for e in mine if e.error)
        assert abs(t.cost - sum(map(prices.cost, mine))) < 1e-9
        for q in (.5, .9): assert abs(t.quantile(q)/np.quantile([e.seconds for e in mine], q, method='lower') - 1) <= .01 + 1e-9


KILLED = '''
import sys
from deepseek_nb.platform.events import Recorder, RequestEvent
from deepseek_nb.platform.store import open_store
url, folder = sys.argv[1:]
store = open_store(url, folder=folder) if url else open_store(folder, durable=False)
recorder, n = Recorder(store, every=.02), 0
while True:
    for _ in range(50): recorder.record(RequestEvent('a', seconds=.1)); n += 1
    if recorder.flush(): print(n, flush=True)
'''


def test_kill(store):
    "After kill -9 all that flush has promised is there, and windows and events agree"
    url = '' if store.kind == 'sqlite' else store.engine.url.render_as_string(hide_password=False)
    p = subprocess.Popen([sys.executable, '-c', KILLED, url, str(store.folder)], stdout=subprocess.PIPE, text=True,
                         env=os.environ | dict(PYTHONPATH=str(ROOT)))
    lines = [int(p.stdout.readline()) for _ in range(random.randint(2, 12))]
    p.send_signal(signal.SIGKILL)
    promised = max([*lines, *map(int, p.stdout.read().split('\n')[:-1])])
    p.wait()
    found, in_windows = counted(store)
    assert found == in_windows and promised <= found <= promised + 100
    assert not store.check()


def test_memory_is_flat_over_an_hour(tmp_path, rng):
    "An hour of the clock, 100 requests a minute: what is kept after it is what was kept after a quarter of it"
    store, seen = open_store(tmp_path, durable=False), []
    made = [event(rng, owner=f'u{i}') for i in range(100)]
    recorder = Recorder(store, every=60., most=10_000)
    tracemalloc.start()
    for minute in range(60):
        for e in made: recorder.record(e._replace(at=START + minute*MINUTE))
        assert recorder.flush()
        seen.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    recorder.close()
    assert not recorder.items and len([*windows_of(store, 'a', 0)]) == 60
    assert max(seen[45:]) - max(seen[5:15]) < 200_000  # 45 minutes have 4,500 events; their texts of features alone would be 1.7 MB
    store.close()


def test_old_events_go_and_hours_stay(store, rng):
    now = [START + 3*DAY]
    store.clock = lambda: now[0]
    with Recorder(store, every=.01) as r:
        for i in range(90): r.record(event(rng, START + i*2*MINUTE, owner=f'u{i}', model_id=random.choice((None, 1))))
        for _ in range(10): r.record(event(rng, now[0]))
    before = total(windows_of(store, 'a', 0))
    assert condense(store, most=40) == (90, 90) and condense(store) == (0, 0)
    after = total(windows_of(store, 'a', 0))
    assert counted(store) == (10, 100) and after.sketch.outcomes == before.sketch.outcomes
    assert {r.seconds for r in windows_of(store, 'a', 0, START + DAY)} == {3600.}
    assert after.sketch.sample == before.sketch.sample and after.sketch.seconds == before.sketch.seconds
    assert not store.check()


def test_texts_only_where_they_are_kept(store):
    with Recorder(store, scans=dict(bad=lambda t: 'x' in t, broken=lambda t: 1/0), keep_texts=['keeps']) as r:
        for place in ('keeps', 'drops'): r.record(RequestEvent(place, texts=('a x', 'b')))
        r.record(RequestEvent('drops'))
    with store.read() as c: assert [tuple(t)[1:] for t in c.execute(select(texts))] == [('a x', 'b')]
    assert total(windows_of(store, 'drops', 0)).sketch.flags == dict(scanned=1, bad=1, failed=1)


def test_texts_stay_as_long_as_the_settings_say(store):
    now = store.now()
    with Recorder(store, keep_texts=['keeps']) as r:
        for age in (2, 6, 8, 40): r.record(RequestEvent('keeps', texts=(f'{age}', ''), at=now - age*DAY))
        r.record(RequestEvent('keeps', at=now - 2*DAY))

    def left():
        Monitor(store).tick()
        with store.read() as c: return sorted(int(t) for t in c.scalars(select(texts.c.prompt))), c.scalar(select(func.count(events.c.id)))
    assert left() == ([2, 6, 8], 3)
    with store.write() as c: c.execute(insert(settings).values(name='keep_days', value=7))
    assert left() == ([2, 6], 2)


def test_a_server_reports_its_requests(tmp_path):
    "Through HTTP: one event a request, with tokens and features, and with the error of a bad one; health checks make none"
    from starlette.testclient import TestClient

    from deepseek_nb.arch.model import Model
    from deepseek_nb.files.tokenizer import Tokenizer
    from deepseek_nb.infer.engine import Engine
    from deepseek_nb.serve.app import Server
    from deepseek_nb.serve.chat import ServedModel
    store = open_store(tmp_path, durable=False)
    model, tok = Model.from_pretrained('mini'), Tokenizer.from_pretrained('mini')
    server = Server([ServedModel('mini', Engine(model, tok, nbytes=2**22), tok)])
    recorder = Recorder(store)
    server.ended = request_hook(recorder, dict(mini=EmbeddingTable.of(model)))
    with TestClient(server.app(), base_url='http://localhost') as client:
        body = dict(model='mini', prompt='We the people', max_tokens=4)
        used = client.post('/v1/completions', json=body).json()['usage']
        assert client.post('/v1/completions', json=body | dict(stream=True)).text.endswith('[DONE]\n\n')
        assert client.post('/v1/completions', json=body | dict(max_tokens=-1)).status_code == 400
        client.get('/health')
    recorder.close()
    t = total(windows_of(store, 'mini', 0))
    assert (t.count, t.errors, t.sketch.featured) == (3, 1, 2)
    assert (t.prompt_tokens, t.completion_tokens) == (2*used['prompt_tokens'], 2*used['completion_tokens'])
    assert sum(t.sketch.first.values()) == 2 and t.quantile(.5) > 0
    store.close()


# ---- alerts

def test_alerts_open_once_and_close(store):
    with store.write() as c:
        assert raise_alert(c, 1, 'errors', 'a', .2, .1) and raise_alert(c, 1, 'errors', 'b', .2, .1)
        assert raise_alert(c, 2, 'errors', 'a', .3, .1) is None
    (first, _) = alerts_of(store)
    close_alert(store, None, first.id, 'mended')
    assert [a.place for a in alerts_of(store)] == ['b']
    with pytest.raises(ValueError, match='is closed already'): close_alert(store, None, first.id)
    with pytest.raises(KeyError, match='there is no alert 99'): close_alert(store, None, 99)


def test_monitor_survives_everything(store, rng):
    "Errors from minute 20 on; a new monitor each time, a clock that jumps back, a pause of a day: one alert, which closes"
    rules, log, now = [ShareRule('errors', 'errors', .05)], [], [START]
    store.clock = lambda: now[0]
    for step in range(9):  # windows of five minutes
        with Recorder(store, every=.01) as r:
            for i in range(60):
                bad = '500'*(4 <= step < 6 and i%3 == 0)
                r.record(RequestEvent('a', seconds=.1, error=bad, at=START + step*5*MINUTE + i))
        now[0] = START + (step + 1)*5*MINUTE + 6*10**6
        log += [(step, what) for _, _, what in Monitor(store, rules).tick()]
        now[0] -= 3600*10**6  # the clock jumps back: the store's time stands still
        assert Monitor(store, rules).tick() == []
    assert log == [(4, 'open'), (8, 'close')] and places_of(store) == dict(a=START)
    now[0] = START + 2*DAY
    assert Monitor(store, rules).tick() == [] and counted(store) == (0, 540)


class Sender:
    "Receives messages in place of another system"
    def __init__(self, *answers): self.answers, self.got = iter(answers), []
    def __call__(self, target, body, headers):
        self.got.append((target.address, json.loads(body), headers, body))
        answer = next(self.answers)
        if isinstance(answer, Exception): raise answer
        return answer


def test_webhooks_are_repeated_and_signed(store, monkeypatch):
    monkeypatch.setenv('HOOK_SECRET', 'a long secret')
    now = [START]
    store.clock = lambda: now[0]
    with pytest.raises(ValueError, match='not public'): add_hook(store, None, 'http://127.0.0.1/x', 'HOOK_SECRET')
    with pytest.raises(ValueError, match='no name of a variable'): add_hook(store, None, 'http://127.0.0.1/x', 'a secret!', (), True)
    add_hook(store, None, 'http://127.0.0.1/x', 'HOOK_SECRET', ['drift'], allow_private=True)
    with store.write() as c:
        raise_alert(c, START, 'errors', 'a', .2, .1)
        raise_alert(c, START, 'drift', 'a', .001, .005, likely='tokens js')
    send = Sender(500, OSError('no route'), 204)
    assert [deliver(store, True, send), deliver(store, True, send), len(send.got)] == [0, 0, 1]
    for seconds, arrived in ((11, 0), (22, 0), (40, 1), (10**6, 0)):
        now[0] = START + seconds*10**6
        assert deliver(store, True, send) == arrived
    address, body, headers, raw = send.got[-1]
    assert len(send.got) == 3 and address == '127.0.0.1' and body['rule'] == 'drift' and body['detail'] == dict(likely='tokens js')
    assert verify('a long secret', raw, headers['x-deepseek-nb-signature'], (START//10**6) + 40)
    assert alerts_of(store, 'drift')[0].delivered == 1 and 'a long secret' not in json.dumps([a._asdict() for a in alerts_of(store)])
    assert deliver(store, False, send) == 0  # a private address that became forbidden is never called
    assert len(send.got) == 3


# ---- drift, probes, feedback

def test_drift_by_week(store, rng):
    plan, now = DriftPlan(past=200, requests=80, least=40), [START]
    store.clock = lambda: now[0]
    with Recorder(store, every=.01) as r:
        for week, n in enumerate((80, 80, 10, 80, 80)):
            for u in range(n): r.record(event(rng, START + week*WEEK + u*10**9, owner=f'u{u}', other=.9*(week == 3)))
    assert drift_step(store, 'a', plan, plan.first(START)) is None  # the first week isn't over
    now[0] = START + 4*WEEK
    found = [drift_step(store, 'a', plan, plan.first(START)) for _ in range(5)]
    assert found[4] is None and drift_history(store, 'a') == found[:4]
    assert [w.alarm for w in (found[0], found[2], found[3])] == ['first', '', 'week'] and found[2].p is None and found[3].p == 1/500
    (alert,) = alerts_of(store, 'drift') if not found[1].alarm else alerts_of(store, 'drift')[:1]
    end_drift(store, None, alert.id, random.choice(('mended', 'chance', 'normal')))
    assert not alerts_of(store)
    now[0] = START + 5*WEEK
    assert drift_step(store, 'a', plan, 0).requests == 80 and not store.check()
    with pytest.raises(KeyError, match='no alert 77 about drift'): end_drift(store, None, 77, 'mended')


def test_one_owner_is_one_request(store, rng):
    plan = DriftPlan(least=5)
    store.clock = lambda: START + 2*WEEK
    with Recorder(store, every=.01) as r:
        for i in range(60): r.record(event(rng, START + i, owner=f'u{i%4}'))
    week = drift_step(store, 'a', plan, plan.first(START))
    assert week.p is None and week.alarm == '' and week.requests == 0  # four owners aren't enough


def test_probes(store):
    states = []
    for value in (.5, .9, None, .5):
        judge_probe(store, 'a', 'bias', value, high=.6, why='' if value else 'broken')
        states.append([(a.value, a.threshold, a.detail['why']) for a in alerts_of(store)])
    assert states == [[], [(.9, .6, '')], [(.9, .6, '')], []]
    judge_probe(store, 'a', 'bias', .1, .2, .6)
    assert [a.threshold for a in alerts_of(store)] == [.2]


def test_feedback_becomes_labels(store):
    from deepseek_nb.platform.datasets import import_rows
    from deepseek_nb.platform.labels import create_task
    with Recorder(store, keep_texts=['a']) as r:
        for t in ('red apple', 'grey cat', 'old boat'): r.record(RequestEvent('a', texts=(t, 'plant')))
    with store.read() as c: ids = dict(c.execute(select(texts.c.prompt, texts.c.event_id)).all())
    for t, label in (('grey cat', 'plant'), ('grey cat', 'animal'), ('red apple', 'plant'), ('old boat', 'thing')):
        give_feedback(store, 'a', dict(thumb=-1, label=label), ids[t])
    for bad in ({}, dict(thumb=3), dict(thumb=1, stars=2), dict(label=7), dict(note='x'*20_000)):
        with pytest.raises(ValueError): give_feedback(store, 'a', bad)
    with pytest.raises(KeyError): give_feedback(store, 'b', dict(thumb=1), ids['grey cat'])
    version = import_rows(store, None, 'fb', [dict(text=r['text']) for r in feedback_rows(store, 'a')], 'classification').version
    task = create_task(store, None, version, 'fb', 'classification', 'What?', ['animal', 'plant'])
    task = getattr(task, 'id', task)
    assert feedback_labels(store, None, task, 'a') == 2 and feedback_labels(store, None, task, 'a') == 0
    with store.read() as c:
        found = c.execute(select(annotations.c.source, annotations.c.value)).all()
    assert sorted(v['label'] for _, v in found) == ['animal', 'plant'] and {s for s, _ in found} == {'feedback:a'}
    with pytest.raises(KeyError, match='no open task'): feedback_labels(store, None, 999, 'a')


def test_opentelemetry_is_optional(tmp_path, monkeypatch):
    seen = []
    class Meter:
        def create_counter(self, name): return type('C', (), dict(add=lambda self, value, where: seen.append((name, value, where))))()
        def create_histogram(self, name): return type('H', (), dict(record=lambda self, value, where: seen.append((name, value, where))))()
    store = open_store(tmp_path, durable=False)
    with Recorder(store) as r: r.record(RequestEvent('a', seconds=1., prompt_tokens=5))
    row = total(windows_of(store, 'a', 0))
    monkeypatch.setitem(sys.modules, 'opentelemetry', None)
    assert not mirror_window(row)
    metrics = type(sys)('metrics')
    metrics.get_meter = lambda name: Meter()
    package = type(sys)('opentelemetry')
    package.metrics = metrics
    monkeypatch.setitem(sys.modules, 'opentelemetry', package)
    assert mirror_window(row) and ('deepseek_nb.prompt_tokens', 5, dict(place='a')) in seen
    store.close()


def test_a_monitor_that_fails_says_so_and_tries_again(store, caplog):  # noqa: F811
    done, tries = threading.Event(), []

    def act():
        tries.append(len(tries))
        if len(tries) < 3: raise OSError('no room')
        done.set()

    monitor = Monitor(store)
    thread = monitor.run(.001, act)
    assert done.wait(30)
    monitor.stop()
    thread.join(30)
    assert not thread.is_alive()
    said = [r for r in caplog.records if r.name == 'deepseek_nb.platform']
    assert len(said) == 2 and all('no room' in caplog.text and r.exc_info[0] is OSError for r in said)

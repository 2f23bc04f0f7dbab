"What runs beside live traffic, over both databases: shadows that nobody notices, probes of what is live, corrections of answers"
import json
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
from platform_fixtures import again, postgres, postgres_url, store  # noqa: E402, F401
from sqlalchemy import select  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from deepseek_nb.platform import access  # noqa: E402
from deepseek_nb.platform.app import PlatformServer, all_pages, kept_answers, shadow_place  # noqa: E402  # noqa: E402
from deepseek_nb.platform.datasets import import_rows  # noqa: E402
from deepseek_nb.platform.entry import write_setting  # noqa: E402
from deepseek_nb.platform.events import DAY, Recorder, RequestEvent  # noqa: E402
from deepseek_nb.platform.jobs import Job, claim  # noqa: E402
from deepseek_nb.platform.labels import create_task  # noqa: E402
from deepseek_nb.platform.layout import Pages, csrf_field  # noqa: E402
from deepseek_nb.platform.monitor import feedback_rows, open_alerts  # noqa: E402
from deepseek_nb.platform.operator import LiveProbes, OperatedMonitor  # noqa: E402
from deepseek_nb.platform.registry import Limit, add_model, measure, measures_of  # noqa: E402
from deepseek_nb.platform.rollout import end_release, release  # noqa: E402
from deepseek_nb.platform.store import annotations, events, jobs, newest, records, row_of, texts  # noqa: E402

PASSWORD = 'correct horse battery staple'


def live(store, *names):
    "Models that are all `mini`; the first one is live"
    found = [add_model(store, None, n, 'mini') for n in names]
    measure(store, found[0], 'accuracy', .6)
    release(store, None, 'assistant', found[0], gates=[Limit('accuracy', min=.5)])
    return found


def test_shadows_answer_nobody(store):  # noqa: F811
    "Chats and completions, whole and streamed, get the live answer; the shadow's are recorded, also where it fails"
    ann = access.create_user(store, None, 'ann', PASSWORD, 'admin')
    heads = {'authorization': f"Bearer {access.create_token(store, ann, 'test')}"}
    first, second = live(store, 'mini', 'candidate')
    write_setting(store, ann, 'keep_texts', store.now())
    server = PlatformServer(store, all_pages())
    chat = dict(model='assistant', messages=[dict(role='user', content='The Congress of the United States')], max_tokens=5, temperature=0)
    text = dict(model='assistant', prompt='The House shall', max_tokens=7, temperature=0)
    with TestClient(server.app(), base_url='http://localhost') as client:
        def ask():
            out = [client.post('/v1/chat/completions', json=chat, headers=heads).json()['choices'][0]['message']['content'],
                   client.post('/v1/completions', json=text, headers=heads).json()['choices'][0]['text']]
            for path, body in (('chat/completions', chat), ('completions', text)):
                lines = client.post(f'/v1/{path}', json=body | dict(stream=True), headers=heads).text.split('data: ')
                pieces = [json.loads(o)['choices'] for o in lines if o.strip() and '[DONE]' not in o]
                out.append(''.join(c.get('text') or c.get('delta', {}).get('content') or '' for p in pieces for c in p))
            end = time.monotonic() + 120
            while server.shadows and time.monotonic() < end: time.sleep(.02)
            server.recorder.flush()
            return out
        alone = ask()
        assert alone[:2] == alone[2:]
        release(store, ann, 'assistant', second, 'shadow')
        assert ask() == alone
        e, t = events.c, texts.c
        with store.read() as c:
            rows = c.execute(select(e.place, e.model_id, e.completion_tokens, e.error, t.answer).join(texts, t.event_id == e.id)
                             .order_by(e.id)).all()
        sides = [sorted((r.completion_tokens, r.error, r.answer) for r in rows if r.place == p)
                 for p in ('assistant', shadow_place('assistant'))]
        assert sides[0] == sorted(sides[1]*2) and {r.model_id for r in rows} == {first, second}
        # a shadow whose files are gone fails, and nobody notices
        end_release(store, ann, 'assistant', 'shadow')
        broken = add_model(store, ann, 'broken', 'no-such-model')
        release(store, ann, 'assistant', broken, 'shadow')
        assert ask() == alone
        with store.read() as c: said = c.scalars(select(e.error).where(e.model_id == broken)).all()
        assert len(said) == 4 and all(said)
        client.cookies.set('session', access.log_in(store, 'ann', PASSWORD))
        assert client.get('/watch/place/assistant%20(shadow)').status_code == 200
    server.recorder.close()


@pytest.mark.parametrize('store', ['sqlite'], indirect=True)
def test_what_waits_is_bounded(store):  # noqa: F811
    "A shadow that is slow to load delays no live answer, and only two requests wait for it"
    ann = access.create_user(store, None, 'ann', PASSWORD, 'admin')
    heads = {'authorization': f"Bearer {access.create_token(store, ann, 'test')}"}
    _, second = live(store, 'mini', 'candidate')
    release(store, ann, 'assistant', second, 'shadow')
    server = PlatformServer(store, Pages(), waiting=2)
    with TestClient(server.app(), base_url='http://localhost') as client:
        server.pick('assistant', '') # the live one is loaded already
        begun, free, load = [], threading.Event(), server._load
        server._load = lambda model: begun.append(model) or free.wait(60) and load(model)
        ask = dict(model='assistant', prompt='The', max_tokens=1)
        client.post('/v1/completions', json=ask | dict(previous_response_id='resp_of_somebody'), headers=heads)
        assert not server.shadows
        # live answers come while the shadow is loaded, of which two requests wait
        for _ in range(5): assert client.post('/v1/completions', json=ask, headers=heads).status_code == 200
        assert (server.left_out, len(server.shadows), begun) == (3, 2, [second])
        free.set()
        end = time.monotonic() + 120
        while server.shadows and time.monotonic() < end: time.sleep(.02)
        assert not server.shadows and begun == [second]
    server.recorder.close()


def run_next(store):
    "Do the next job of the queue in this process"
    row = claim(store, 4)
    return row and (row, Job(store, row).perform())


def test_probes_of_what_is_live(store):  # noqa: F811
    "By the tables alone: a monitor that starts anew neither forgets nor repeats"
    first, second = live(store, 'mini', 'other')
    limits, now = [Limit('move', 'swaps', max=1e-6), Limit('flip', 'swaps', max=1.)], [store.now()]
    store.clock = lambda: now[0]
    def tick():
        other = again(store)
        other.clock = store.clock
        said = OperatedMonitor(other, live=LiveProbes(other, limits, items=2)).tick()
        other.close()
        return [rule for rule, *_ in said]
    def queued(): return [(r.name, r.model_id) for r in newest(store, jobs, jobs.c.state == 'queued')]
    assert tick() == tick() == [] and queued() == [('Probe of assistant: swaps', first)]
    assert run_next(store)[1] == 'done'
    now[0] += 10**6
    assert tick() == ['swaps.move', 'swaps.flip'] and tick() == []
    with store.read() as c: assert [a.rule for a in open_alerts(c)] == ['probe swaps.move']
    assert measures_of(store, first)['swaps.effect_women'].detail['n'] == 2 # every score of the task is a measure of the model
    now[0] += DAY//2
    assert tick() == [] and not queued()
    measure(store, second, 'accuracy', .6) # another model is live: it is measured at once
    release(store, None, 'assistant', second, gates=[Limit('accuracy', min=.5)])
    assert tick() == [] and queued() == [('Probe of assistant: swaps', second)]
    run_next(store)
    now[0] += DAY
    assert tick() == ['swaps.move', 'swaps.flip'] and len(queued()) == 1
    limits.append(Limit('fun', 'swaps', min=0.)) # a score that isn't there, and a task whose job fails
    run_next(store)
    now[0] += 10**6
    tick()
    with store.read() as c: found = {a.rule: a for a in open_alerts(c)}
    assert 'no score fun' in found['probe swaps.fun'].detail['why'] and found['probe swaps.fun'].value is None
    assert json.loads(json.dumps(found['probe swaps.fun'].threshold, allow_nan=False)) == 0


@pytest.mark.parametrize('store', ['sqlite'], indirect=True)
def test_a_job_that_fails_is_an_alert(store, monkeypatch):  # noqa: F811
    live(store, 'mini')
    probes = LiveProbes(store, [Limit('accuracy', 'advglue', min=.1)], items=2)
    def absent(*args): raise FileNotFoundError('the set is not here')
    monkeypatch.setattr('deepseek_nb.platform.runs.task_measures', absent)
    monitor = OperatedMonitor(store, live=probes)
    monitor.tick()
    row = claim(store, 4)
    assert Job(store, row).perform() == 'done' and row_of(store, jobs, row.id).result['failed']  # other parts of it were measured
    monitor.tick()
    with store.read() as c: alert, = open_alerts(c)
    assert alert.rule == 'probe advglue.accuracy' and 'the set is not here' in alert.detail['why']


@pytest.mark.parametrize('store', ['sqlite'], indirect=True)
def test_a_wrong_file_of_probes_is_told_at_the_start(store):  # noqa: F811
    for text, said in (('[humour]\nfun = {max = 1}\n', 'no evaluation task'), ('[swaps]\nmove = {mxa = 1}\n', 'mxa is not known')):
        (Path(store.folder)/'probes.toml').write_text(text)
        with pytest.raises(ValueError, match=said): OperatedMonitor(store)


def test_corrections_by_page(store):  # noqa: F811
    access.create_user(store, None, 'ann', PASSWORD, 'admin')
    hostile = '<script>alert(1)</script> =1+1'
    with Recorder(store, keep_texts=['a']) as r:
        for i in range(60): r.record(RequestEvent('a' if i%2 else 'b', texts=(f'{hostile} {i}', 'said <b>'), at=store.now()))
    server = PlatformServer(store, all_pages())
    with TestClient(server.app(), base_url='http://localhost') as client:
        client.cookies.set('session', access.log_in(store, 'ann', PASSWORD))
        found = kept_answers(store)
        assert len(found) == 30 and {o.place for o in found} == {'a'}
        shown = client.get('/answers').text
        assert '<script>alert' not in shown and 'said <b>' not in shown and '&lt;script&gt;' in shown
        url = f'/answers/{found[3].id}'
        csrf = csrf_field(client.get(url).text)
        assert client.post(url, data=dict(label='x')).status_code == 403
        assert client.post(url, data=dict(csrf=csrf, label='animal', better='=2+2')).status_code == 200
        assert client.post(url, data=dict(csrf=csrf, label='x'*10_001)).status_code == 400
        assert 'corrected' in client.get('/answers').text
        assert client.get('/answers?before=x').status_code == client.get('/answers?before=99999999999999999999').status_code == 200
    assert [*feedback_rows(store, 'a')] == [dict(text=found[3].prompt, label='animal')]
    server.recorder.close()


def test_the_command_scans_for_personal_data_and_toxic_words(monkeypatch, tmp_path):
    "What `deepseek-nb platform` starts: its recorder finds both in live traffic"
    from deepseek_nb.platform import start
    from deepseek_nb.tools.cli import run_platform
    made = []
    class Stopped(Exception): pass
    class Server(PlatformServer):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            made.append(self)
        def run(self, listening): raise Stopped
    monkeypatch.setattr(start, 'PlatformServer', Server)
    with pytest.raises(Stopped): run_platform(str(tmp_path/'p'), no_demo=True)
    scans = made[0].recorder.scans
    said = 'Write to ann@example.com', 'You fucking idiot', 'A letter about trees'
    assert [{n for n, scan in scans.items() if scan(t)} for t in said] == [{'personal'}, {'toxic'}, set()]


PROTOCOLS = { # path -> body that asks a text, in every way in which a client may write it
    'chat': ('/v1/chat/completions', lambda t: dict(messages=[dict(role='system', content='Sort.'), dict(role='user', content=t)])),
    'parts': ('/v1/chat/completions', lambda t: dict(messages=[
        dict(role='user', content='Hello'), dict(role='assistant', content='Hi'),
        dict(role='user', content=[dict(type='text', text=t[:3]), dict(type='text', text=t[3:])])])),
    'stream': ('/v1/chat/completions', lambda t: dict(messages=[dict(role='user', content=t)], stream=True)),
    'text': ('/v1/completions', lambda t: dict(prompt=t)),
    'responses': ('/v1/responses', lambda t: dict(input=t)),
    'items': ('/v1/responses', lambda t: dict(input=[dict(role='user', content=[dict(type='input_text', text=t)])])),
    'anthropic': ('/anthropic/v1/messages', lambda t: dict(messages=[dict(role='user', content=[dict(type='text', text=t)])]))}


def test_corrections_of_api_answers_become_labels(store):  # noqa: F811
    "Asked in every protocol over HTTP, corrected on the page and by the route, each text is labelled in its own row and in no other"
    ann = access.create_user(store, None, 'ann', PASSWORD, 'admin')
    heads = {'authorization': f"Bearer {access.create_token(store, ann, 'test')}"}
    live(store, 'mini')
    write_setting(store, ann, 'keep_texts', store.now())
    rows = {n: f'  {n}: the <b>house</b> of the people, “{i}”\n' for i, n in enumerate([*PROTOCOLS, 'nobody'])}
    version = import_rows(store, ann, 'said', [dict(text=t) for t in rows.values()]).version
    task = create_task(store, ann, version, 'said', 'classification', 'What is it?', [*rows])
    server = PlatformServer(store, all_pages())
    with TestClient(server.app(), base_url='http://localhost') as client:
        for name, (path, body) in PROTOCOLS.items():
            longest = 'max_output_tokens' if path.endswith('responses') else 'max_tokens'
            said = client.post(path, json=dict(model='assistant', **{longest: 3}) | body(rows[name]), headers=heads)
            assert said.status_code == 200, (name, said.text)
        server.recorder.flush()
        client.cookies.set('session', access.log_in(store, 'ann', PASSWORD))
        kept = {o.prompt: o.id for o in kept_answers(store)}
        assert {*kept} == {rows[n] for n in PROTOCOLS}
        for i, name in enumerate(PROTOCOLS): # by turns on the answer's own page and by the route of feedback
            url = f'/answers/{kept[rows[name]]}'
            csrf = csrf_field(client.get(url).text)
            form = dict(csrf=csrf, label=name) | ({} if i%2 else dict(place='assistant', event=str(kept[rows[name]])))
            assert client.post(url if i%2 else '/feedback', data=form).status_code == 200
        made = client.post('/feedback/labels', data=dict(csrf=csrf, task=str(task), place='assistant'))
        assert f'{len(PROTOCOLS)} labels were made' in made.text
    a, r = annotations.c, records.c
    with store.read() as c: found = c.execute(select(r.data, a.value).join(annotations, a.record_id == r.id).where(a.task_id == task)).all()
    assert {d['text']: v['label'] for d, v in found} == {t: n for n, t in rows.items() if n != 'nobody'}
    server.recorder.close()

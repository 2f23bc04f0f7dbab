"Labelling: work handed out once, undo, agreement, disputes, exchange with other tools, and its pages, over both databases."
import json
import random
import re
import threading
from itertools import count

import numpy as np
import pytest
from platform_fixtures import postgres, postgres_url, store  # noqa: F401
from sklearn.metrics import cohen_kappa_score
from sqlalchemy import func, insert, select

from deepseek_nb.eval.intervals import cohen_kappa, fleiss_kappa, krippendorff_alpha, label_counts, span_f1
from deepseek_nb.platform import access
from deepseek_nb.platform.access import create_user, log_in
from deepseek_nb.platform.data_pages import data_pages
from deepseek_nb.platform.datasets import import_rows, iter_rows, row_digest
from deepseek_nb.platform.exchange import export_answers, export_rows, import_task, to_argilla, to_label_studio
from deepseek_nb.platform.labels import (
    adjudicate,
    agreement_of,
    annotate,
    close_task,
    create_task,
    disagreements,
    final_answer,
    labelled_version,
    next_record,
    predict,
    skip,
    task_progress,
    undo,
)
from deepseek_nb.platform.layout import Site, csrf_field
from deepseek_nb.platform.store import annotations, audits, queue, users

DATA = dict(classification=lambda i: dict(text=f'letter number {i**3}'), spans=lambda i: dict(text=f'Ann {i**3} lives in 🌍 Paris'),
            preference=lambda i: dict(prompt=f'question {i**3}', a='one', b='two'),
            chat=lambda i: dict(messages=[dict(role='user', content=f'question {i**3}'), dict(role='assistant', content='yes')]))


class Person:
    def __init__(self, id, name): self.id, self.name = id, name


@pytest.fixture
def people(store):  # noqa: F811
    rows = [dict(name=n, password='', role='annotator', created=0, disabled=False) for n in 'abcd']
    with store.write() as c: c.execute(insert(users), rows)
    return [Person(i + 1, n) for i, n in enumerate('abcd')]


@pytest.fixture
def draw():
    seed = random.SystemRandom().randrange(2**32)
    print('seed', seed)
    return random.Random(seed)


def new_task(store, kind='classification', rows=8, annotators=1, labels=('x', 'y')):  # noqa: F811
    version = import_rows(store, None, f'{kind} data', [DATA[kind](i) for i in range(rows)], kind).version
    return version, create_task(store, None, version, 'task', kind, 'Which?', labels, annotators)


def answer_of(kind, draw):
    place = draw.randrange(3)
    return dict(classification=dict(label=draw.choice('xy')), preference=dict(better=draw.choice(['a', 'b', 'tie'])),
                chat=dict(rating=draw.randrange(1, 6), note=draw.choice(['', 'good'])),
                spans=dict(spans=[dict(start=place, end=place + 2 + draw.randrange(3), label='y')][:draw.randrange(2)]))[kind]


# ---- agreement

def test_agreement_equals_sklearn_and_the_loop(draw):
    for _ in range(5):
        n, k = draw.randrange(20, 60), draw.randrange(2, 6)
        a = [draw.randrange(k) for _ in range(n)]
        b = [x if draw.random() < .5 else draw.randrange(k) for x in a]
        for weights in (None, 'linear', 'quadratic'):
            right = cohen_kappa_score(a, b, weights=weights, labels=range(k))
            found = cohen_kappa(a, b, weights, range(k))
            assert abs(found - right) < 1e-9 or (np.isnan(found) and np.isnan(right))
        pairs = [*zip(a, b, strict=True)]
        # for two annotators and no missing label, alpha is Scott's pi, which Fleiss' kappa is, with a correction for the sample
        pi = fleiss_kappa(label_counts(pairs))
        assert abs((1 - krippendorff_alpha(pairs)) - (1 - pi)*(2*n - 1)/(2*n)) < 1e-9
        assert abs(krippendorff_alpha(pairs, 'interval') - krippendorff_alpha([(3*x + 7, 3*y + 7) for x, y in pairs], 'interval')) < 1e-9
        assert abs(krippendorff_alpha(pairs, 'ordinal') - krippendorff_alpha([(x**3, y**3) for x, y in pairs], 'ordinal')) < 1e-9


def test_span_f1_is_symmetric(draw):
    one = lambda s: dict(start=s, end=s + 1 + draw.randrange(5), label=draw.choice('xy'))
    some = lambda: [[one(s) for s in draw.sample(range(20), draw.randrange(4))] for _ in range(20)]
    a, b = some(), some()
    for overlap in (False, True):
        assert span_f1(a, b, overlap) == span_f1(b, a, overlap) and span_f1(a, a, overlap) == 1
    assert np.isnan(span_f1([[]], [[]]))


# ---- work

@pytest.mark.parametrize('annotators', [1, 2])
def test_nobody_gets_what_somebody_else_has(store, people, annotators):  # noqa: F811
    "Four people in four threads, each until nothing is left: each record gets as many answers as it needs, by different people, no more"
    _, task = new_task(store, rows=10, annotators=annotators)
    errors = []
    def work(who):
        try:
            while o := next_record(store, task, who): annotate(store, who, task, o.record, dict(label='x'), 1.)
        except Exception as e: errors.append(e)
    threads = [threading.Thread(target=work, args=(p,)) for p in people]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors
    with store.read() as c:
        assert {n for n, in c.execute(select(func.count()).select_from(annotations).group_by(annotations.c.record_id))} == {annotators}
        assert c.scalars(select(queue.c.given)).all() == [annotators]*10
    shown = task_progress(store, task)
    assert (shown['done'], shown['answers']) == (10, 10*annotators)


def test_leases_end(store, people):  # noqa: F811
    at, (a, b, *_) = [store.now()], people
    store.clock = lambda: at[0]
    _, task = new_task(store, rows=2)
    one = next_record(store, task, a, 60)
    two = next_record(store, task, b, 60)
    assert one.record != two.record and next_record(store, task, a).record == one.record and next_record(store, task, people[2]) is None
    at[0] += 601*10**6
    assert next_record(store, task, people[2]).record == one.record
    annotate(store, a, task, one.record, dict(label='x'))  # too late, and still not lost
    assert next_record(store, task, people[2]).record == two.record
    close_task(store, None, task)
    assert next_record(store, task, people[2]) is None
    with pytest.raises(ValueError, match='is closed'): annotate(store, b, task, two.record, dict(label='x'))


def test_the_queue_is_what_was_answered(store, people, draw):  # noqa: F811
    "After any series of answers, corrections, skips and undos the counts are those of the annotations"
    _, task = new_task(store, rows=5, annotators=2)
    for _ in range(40):
        who, record = draw.choice(people), draw.randrange(1, 6)
        act = draw.choice(['answer', 'answer', 'skip', 'undo', 'judge'])
        if act == 'answer': annotate(store, who, task, record, answer_of('classification', draw))
        elif act == 'skip': skip(store, who, task, record)
        elif act == 'judge': adjudicate(store, who, task, record, dict(label='y'))
        elif found := undo(store, who, task): assert next_record(store, task, who) is None or found
    with store.read() as c:
        every = c.execute(select(annotations)).all()
        said = [(a.record_id, a.source) for a in every if a.value != dict(skip=True) and a.source != 'adjudication:']
        for q in c.execute(select(queue)):
            n = sum(r == q.record_id for r, _ in said)
            assert (q.given, q.done) == (n, n >= 2)
        assert c.scalar(select(func.count()).select_from(audits)) > 20
    assert task_progress(store, task)['answers'] == len(said) and store.check() == []


def test_the_most_uncertain_comes_first(store, people):  # noqa: F811
    version, task = new_task(store, rows=6)
    sure = {r.data['text']: p for r, p in zip(iter_rows(store, version), [.9, .5, 1., .7, .99, .6], strict=True)}
    predict(store, None, task, lambda rows: [dict(x=sure[r['text']], y=1 - sure[r['text']]) for r in rows], size=4)
    order = []
    while o := next_record(store, task, people[0]):
        order.append(sure[o.data['text']])
        assert o.prediction == dict(label='x')
        annotate(store, people[0], task, o.record, dict(label='x'))
    assert order == sorted(order)


@pytest.mark.parametrize('kind', [*DATA])
def test_labels_become_a_version(store, people, draw, kind):  # noqa: F811
    "Agreement, disputes and their settlement, a labelled version with the splits of the old one, and a round trip through both tools"
    version, task = new_task(store, kind, 8, 2)
    ids = [r.id for r in iter_rows(store, version)]
    given = {r: [answer_of(kind, draw) for _ in 'ab'] for r in ids}
    for r, said in given.items():
        for who, v in zip(people, said, strict=False): annotate(store, who, task, r, v, 1.5)
    skip(store, people[2], task, ids[0])
    core = lambda v: v.get('rating', v)  # notes of ratings may differ
    differ = [r for r in ids if core(given[r][0]) != core(given[r][1])]
    assert [d.record for d in disagreements(store, task, limit=100)] == differ
    found = agreement_of(store, task)
    assert found.records == 8 and abs(found.equal - (1 - len(differ)/8)) < 1e-9
    if kind == 'classification':
        right = krippendorff_alpha([[v['label'] for v in said] for said in given.values()])
        assert found.value == right or np.isnan(right)
    for r in differ: adjudicate(store, people[3], task, r, given[r][0])
    assert disagreements(store, task) == []
    made, old = [*iter_rows(store, labelled_version(store, None, task).version)], {r.id: r for r in iter_rows(store, version)}
    final = {i: v[0] if i in differ else final_answer(dict(enumerate(v)), kind) for i, v in given.items()}
    assert all(core(v) == core(given[i][0]) for i, v in final.items())
    assert {r.digest: r.split for r in made} == {row_digest(old[i].data | v): old[i].split for i, v in final.items()}
    predict(store, None, task, lambda rows: [(answer_of(kind, draw), .25) for _ in rows])
    for write in (to_label_studio, to_argilla): check_round_trip(store, task, kind, write)


numbers = count()


def check_round_trip(store, task, kind, write):  # noqa: F811
    labels = ('x', 'y') if kind in ('classification', 'spans') else ()
    out = [json.loads(json.dumps(o)) for o in write(store, task)]
    again = import_task(store, None, f'copy {next(numbers)}', out, kind, labels, annotators=2)
    bare = lambda o: re.sub(r'"id": (\d+|"[^"]*")', '', json.dumps(o, sort_keys=True))
    assert sorted(map(bare, write(store, again))) == sorted(map(bare, out))


def test_exports_and_broken_imports(store, people, tmp_path):  # noqa: F811
    version, task = new_task(store, rows=3)
    annotate(store, people[0], task, 1, dict(label='x'))
    lines = b''.join(export_answers(store, task)).decode().splitlines()
    (tmp_path/'x.jsonl').write_text('\n'.join(lines))
    assert task_progress(store, import_task(store, None, 'back', tmp_path/'x.jsonl', labels=['x', 'y']))['answers'] == 1
    bad = import_rows(store, None, 'formulas', [dict(text=c + 'cmd') for c in ('=', '+', '-', '@')]).version
    sheet = b''.join(export_rows(store, bad, 'csv')).decode().splitlines()[1:]
    assert len(sheet) == 4 and all(line.startswith("'") for line in sheet)
    good = json.loads(lines[0])
    wrong = [dict(good, annotations=3), dict(good, annotations=[3]), dict(good, data=None), dict(good, predictions=[dict(score='x')]),
             dict(good, annotations=[dict(result=[3])]), dict(fields=3), dict(fields=dict(text='a'), responses=[1]), {}]
    for item in wrong:
        with pytest.raises(ValueError): import_task(store, None, 'wrong', [item], labels=['x', 'y'])


# ---- pages

@pytest.fixture
def client(store, monkeypatch):  # noqa: F811
    from starlette.testclient import TestClient
    monkeypatch.setattr(access, 'SCRYPT', dict(n=16, r=8, p=1))
    boss = create_user(store, None, 'boss', 'correct horse battery', 'admin')
    create_user(store, boss, 'vic', 'only wants to look', 'viewer')
    def visit(name, password):
        c = TestClient(Site(store, data_pages), base_url='http://localhost')
        c.cookies.set('session', log_in(store, name, password))
        return c
    return visit


def test_pages_of_all_kinds(store, client):  # noqa: F811
    "Every kind is labelled by forms alone, spans with an emoji before them too; hostile texts stay texts"
    boss, vic = client('boss', 'correct horse battery'), client('vic', 'only wants to look')
    token = csrf_field(boss.get('/datasets').text)
    post = lambda url, **data: boss.post(url, data=data | dict(csrf=token))
    said = dict(classification=dict(label='x'), preference=dict(better='tie'), chat=dict(rating='4', note='<i>ok</i>'),
                spans=dict(spans='[]', start=0, end=3, label='y', do='add'))
    for kind, value in said.items():
        _, task = new_task(store, kind, 2)
        shown = boss.get(f'/tasks/{task}/label').text
        assert {'Enter', 's', 'u', '1', '2'} <= {*re.findall('data-key="([^"]*)"', shown)}
        assert ' style=' not in shown and 'onclick' not in shown
        record = int(re.search(r'<input[^>]*name="record"[^>]*>', shown)[0].split('value="')[1].split('"')[0])
        answer = post(f'/tasks/{task}/label', record=record, began=store.now(), **value)
        if kind == 'spans':
            assert '<mark title="y">Ann</mark>' in answer.text
            answer = post(f'/tasks/{task}/label', record=record, began=store.now(), spans=json.dumps([dict(start=0, end=3, label='y')]))
        assert answer.status_code == 200 and task_progress(store, task)['answers'] == 1
        for path in ('', '/disputes', '/export?format=csv', '/export?format=xml', '/state'):
            assert boss.get(f'/tasks/{task}{path}').status_code == 200
        assert post(f'/tasks/{task}/label', record=record, began=0, **{k: '?' for k in value}).status_code == 400
    assert vic.get('/tasks/1').status_code == 200 and vic.get('/tasks/1/label').status_code == 403
    assert vic.post('/datasets', data=dict(csrf=csrf_field(vic.get('/tasks/1').text), name='x')).status_code == 403
    for hub in ('/etc/passwd', '../x', 'tests', 'a b'):
        assert post('/datasets', name='x', kind='classification', hub=hub).status_code == 400, hub

"What people stumbled over in the platform, each as a test."
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
from fasthtml.components import to_xml  # noqa: E402
from platform_fixtures import postgres, postgres_url, store  # noqa: E402, F401
from sqlalchemy import func, select  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from deepseek_nb.eval.drift import EmbeddingTable  # noqa: E402
from deepseek_nb.files.tokenizer import Tokenizer  # noqa: E402
from deepseek_nb.platform import access, jobs, runs  # noqa: E402
from deepseek_nb.platform import labels as lab  # noqa: E402
from deepseek_nb.platform.app import PlatformServer, all_pages  # noqa: E402
from deepseek_nb.platform.datasets import house_row, import_rows, iter_rows, list_datasets, version_report  # noqa: E402
from deepseek_nb.platform.events import Recorder, RequestEvent  # noqa: E402
from deepseek_nb.platform.exchange import erase_text  # noqa: E402
from deepseek_nb.platform.layout import Site, page_text, when  # noqa: E402
from deepseek_nb.platform.monitor import give_feedback  # noqa: E402
from deepseek_nb.platform.registry import Limit, add_model, check_gates, measure, model_path  # noqa: E402
from deepseek_nb.platform.rollout import GatesFailed, choose, end_release, gates_of, release  # noqa: E402
from deepseek_nb.platform.runs import FinetuneRun  # noqa: E402
from deepseek_nb.platform.start import back_up, bring_back  # noqa: E402
from deepseek_nb.platform.store import audits, curves, events, measures, newest, open_store, row_of  # noqa: E402
from deepseek_nb.platform.store import jobs as jobs_  # noqa: E402
from deepseek_nb.platform.style import curve, ticks  # noqa: E402

PASSWORD = 'correct horse battery staple'
SEED = int(os.environ.get('SEED', 0))


class Visitor:
    "A browser of an administrator"
    def __init__(self, store, name='ann', role='admin'):
        self.store, self.user = store, access.create_user(store, None, name, PASSWORD, role)
        self.session = access.log_in(store, name, PASSWORD)
        self.client = TestClient(Site(store, all_pages()), base_url='http://localhost', cookies=dict(session=self.session))

    def get(self, url): return self.client.get(url)
    def text(self, url): return page_text(self.get(url).text)

    def post(self, url, files=None, **values):
        return self.client.post(url, data=values | dict(csrf=access.csrf_of(self.session)), files=files)


@pytest.fixture
def ann(store): return Visitor(store)  # noqa: F811


def texts(n, kind='train', label=None, start=0):
    return [(dict(text=f'text number {i**3} about {i}') | (dict(label=label(i)) if label else {}), kind) for i in range(start, start + n)]


def test_back_and_enter_change_the_record_that_is_seen(ann):
    "Each record has its own address: back shows the one that was answered, with its answer; without a choice nothing is an error page"
    store = ann.store
    version = import_rows(store, None, 'letters', texts(3)).version
    task = lab.create_task(store, None, version, 'topic', 'classification', labels=['post', 'sums'])
    first = ann.get(f'/tasks/{task}/label')
    record = int(re.search(r'/label/(\d+)$', str(first.url))[1])
    seen = re.search('id="record"[^>]*>([^<]*)|class="item"[^>]*>([^<]*)', first.text)[0]
    second = ann.post(f'/tasks/{task}/label', record=record, began=0, label='post')
    assert f'/label/{record}' not in str(second.url) and seen not in second.text
    back = ann.get(first.url)
    assert seen in back.text and re.search(r'<input[^>]*value="post"[^>]*checked|<input[^>]*checked[^>]*value="post"', back.text)
    assert 'required' in re.search(r'<input[^>]*type="radio"[^>]*>', back.text)[0]
    ann.post(f'/tasks/{task}/label', record=record, began=0, label='sums')
    assert lab.task_progress(store, task)['answers'] == 1
    assert lab.answered_record(store, ann.user, task, record).answer == dict(label='sums')
    empty = ann.post(f'/tasks/{task}/label', record=record, began=0)
    assert empty.status_code == 400 and seen in empty.text and 'Choose an answer first' in empty.text


def test_any_curve_is_drawn(ann):
    "Rates of a run with 999999999999 steps differ by less than 1e-12; its page stays, and such a run is refused"
    rates = [1e-4*k/999_999_999_999 for k in range(1, 5)]
    for values in (rates, [1e-300, 2e-300], [1., 1. + 1e-15], [1e300, 1.1e300], [-1e-20, 1e-20]):
        found = ticks(min(values), max(values))
        assert len({*found}) == len(found) > 1 and found[0] <= min(values) and found[-1] >= max(values)*(1 - 1e-9)
        curve(dict(rate=list(enumerate(values))), 'Rate')
    with pytest.raises(ValueError, match='steps is 999999999999'): FinetuneRun(steps=999_999_999_999)


def test_a_run_that_has_ended_has_nothing_stale(ann):
    "What renews itself has the buttons and the model that was made"
    @jobs.job_kind('nothing')
    def nothing(job): return {}
    job = jobs.submit(ann.store, None, 'nothing', {})
    live = f'/runs/{job}/live'
    assert f'/runs/{job}/cancel' in ann.get(live).text and 'data-live' in ann.get(live).text
    jobs.cancel(ann.store, None, job)
    ended = ann.get(live).text
    assert f'/runs/{job}/cancel' not in ended and 'data-live' not in ended and f'/runs/{job}/continue' in ended
    assert 'Made' in ended


def test_a_labelled_version_says_what_it_leaves_out(ann):
    store = ann.store
    version = import_rows(store, None, 'letters', texts(7)).version
    task = lab.create_task(store, None, version, 'topic', 'classification', labels=['post', 'sums'], annotators=2)
    people = [access.create_user(store, None, name, PASSWORD, 'annotator') for name in ('bob', 'cleo')]
    for i, r in enumerate(iter_rows(store, version)):
        if i < 5:
            for k, user in enumerate(people): lab.annotate(store, user, task, r.id, dict(label=['post', 'sums'][i < 2 and k]))
    made = ann.post(f'/tasks/{task}/version')
    assert '3 rows have their labels; left out: 2 in dispute and 2 without an answer' in page_text(made.text)


def trained(store, n=300, classes=('post', 'sums')):
    "A data set, and a model that was trained on it"
    right = lambda i: classes[i % len(classes)]
    rows = texts(n, 'train', right) + texts(n, 'test', right, n)
    version = import_rows(store, None, 'mail', rows).version
    folder = store.folder/'models'/'one'
    folder.mkdir(parents=True)
    (folder/'weights').write_text('1')
    card = dict(classes=[*classes], template='{text}\nAnswer:')
    return version, add_model(store, None, 'mail', folder, version=version, card=card)


@pytest.fixture
def measured(monkeypatch):
    "An evaluation without weights: the classes are known for even numbers; for the others, a coin decides"
    def probabilities(model, tok, some, *known):
        return np.array([[.9, .1] if int(re.search(r'about (\d+)', t + 'about 0')[1]) % 2 == 0 else [.2, .8] for t in some])
    class Nothing:
        def __init__(self, *a): pass
        def load(self): return None, None
    monkeypatch.setattr(runs, 'Named', Nothing)
    monkeypatch.setattr(runs, '_cost_measures', lambda *a: dict(latency_p95=dict(value=.1, low=.1, high=.2, n=100)))
    monkeypatch.setattr(runs, 'class_probabilities', probabilities)

    def evaluate(store, model, version, **config):
        number = jobs.submit(store, None, 'evaluate', config, '', version, model)
        row = jobs.claim(store, 9)
        assert row.id == number
        state = jobs.Job(store, row).perform()
        return state, row_of(store, jobs_, number)
    return evaluate


def test_gates_can_not_be_fooled(store, measured):  # noqa: F811
    "Not by the training split, nor by few rows, another data set, texts that the model has seen, or a later evaluation"
    version, model = trained(store)
    gates = [Limit('accuracy', min=.8)]
    check = lambda: check_gates(store, model, gates)[0]
    assert check().why == 'not measured'
    measured(store, model, version, split='train')
    assert 'seen in training' in check().why
    measured(store, model, version, most=1)
    assert check().why == 'measured on 1 rows, and 100 are needed'
    other = import_rows(store, None, 'easy', texts(200, 'test', lambda i: 'post' if i % 2 == 0 else 'sums', 900)).version
    measured(store, model, other)
    assert check().why == 'measured on the data set easy, not mail'
    seen = import_rows(store, None, 'copies', texts(200, 'test', lambda i: 'post' if i % 2 == 0 else 'sums')).version
    state, job = measured(store, model, seen)
    assert state == 'done' and 'has not seen' in job.result['failed']['data'] and 'accuracy' not in job.result['measures']
    with pytest.raises(GatesFailed): release(store, None, 'here', model, gates=gates)
    measured(store, model, version)
    assert check().passed
    measured(store, model, version, most=5)
    measured(store, model, version, split='train')
    assert check().passed and check().measure is not None
    assert len([r for r in newest(store, measures, measures.c.model_id == model) if r.name == 'accuracy']) == 6
    assert not check_gates(store, model, [Limit('accuracy', min=.8, version=2)])[0].passed
    found = check_gates(store, model, gates_of(store))
    assert {g.name for g in found if not g.passed} <= {'swap_flips', 'typo_flips', 'calibration_error'}
    assert {'typo_flips', 'swap_flips'} <= {g.name for g in found}


def test_the_lower_end_of_the_interval_decides(store):  # noqa: F811
    model = add_model(store, None, 'one', 'smollm2-135m')
    measure(store, model, 'accuracy', .82, .77, .87, n=200, split='test')
    assert not check_gates(store, model, [Limit('accuracy', min=.8)])[0].passed
    assert check_gates(store, model, [Limit('accuracy', min=.75)])[0].passed


def test_a_second_person_approves(ann):
    "Where the operator says so: a release waits, its author can't approve it, and the page of the place has the button"
    store = ann.store
    (store.folder/'platform.toml').write_text('second_person = true\n')
    (store.folder/'gates.toml').write_text('[quality]\naccuracy = {min = 0.5}\n')
    model = add_model(store, None, 'one', 'smollm2-135m')
    measure(store, model, 'accuracy', .9)
    asked = ann.post(f'/models/{model}/release', place='here', mode='live')
    assert 'waits for a second person' in asked.text and choose(store, 'here', 'x', 0).model_id is None
    number = re.search(r'name="release"[^>]*value="(\d+)"|value="(\d+)"[^>]*name="release"', ann.get('/places/here').text)
    number = number[1] or number[2]
    assert ann.post('/places/here/approve', release=number).status_code == 403
    assert 'approved' in Visitor(store, 'bob', 'developer').post('/places/here/approve', release=number).text
    assert choose(store, 'here', 'x', 0).model_id == model
    ann.post('/places/here/end', mode='live')  # it is taken down
    assert choose(store, 'here', 'x', 0).model_id is None and 'ended' in ann.text('/places/here')


def test_one_part_that_fails_leaves_the_rest(store, measured):  # noqa: F811
    "A test set that is missing is named, and what else was measured is kept"
    version, model = trained(store)
    state, job = measured(store, model, version, split='dev', tasks=['swaps'])
    assert state == 'done' and job.result['measures'] == dict(latency_p95=.1)
    assert 'split dev' in job.result['failed']['data'] and job.result['failed']['swaps']
    assert [r.name for r in newest(store, measures, measures.c.model_id == model)] == ['latency_p95']


MESSY = 'text,label\na bill,billing \n,billing\nan invoice,Billing\na payment,billing\n,other\n'


def test_all_faults_of_a_file_at_once(ann):
    "Each with its row; nothing is imported unless the visitor says what to do; no class is made by a capital letter or a space"
    send = lambda **more: ann.post('/datasets', files=dict(file=('mail.csv', MESSY)), name='mail', kind='classification', **more)
    refused = send()
    said = page_text(refused.text)
    assert refused.status_code == 400 and list_datasets(ann.store) == []
    assert all(o in said for o in ('2 | its text is empty', '5 | its text is empty', "3 | its label 'Billing' is mostly written 'billing'"))
    skipped = version_report(ann.store, list_datasets(ann.store)[0].version) if send(skip='yes').status_code == 200 else None
    assert skipped['labels'] == dict(billing=2) and '3 rows with faults left out' in skipped['note']
    send(skip='yes', merge='yes')
    assert version_report(ann.store, list_datasets(ann.store)[0].version)['labels'] == dict(billing=3)


def test_names_in_errors_stay_as_they_are(ann):
    "Not in capitals, and settings as the form calls them"
    import_rows(ann.store, None, 'letters', texts(3))
    said = ann.post('/runs', kind='finetune', version=1, set_steps='many', set_eval_every='2.5').text
    assert 'steps is &#x27;many&#x27;' in said or "steps is 'many'" in said and 'et_steps' not in said
    assert 'no public name' in (said := page_text(ann.post('/models', name='no/such/name').text)) and "'no/such/name'" in said


def test_tokens_and_exports(ann):
    "A token is a viewer's unless asked, and ends with the password; exports are in the audit log"
    store = ann.store
    key = access.create_token(store, ann.user, 'x')
    assert access.user_of_token(store, key).role == 'viewer'
    assert re.search(r'<option[^>]*value="viewer"[^>]*selected|<option[^>]*selected[^>]*value="viewer"', ann.get('/account').text)
    version = import_rows(store, None, 'letters', texts(3)).version
    task = lab.create_task(store, None, version, 'topic', 'classification', labels=['post', 'sums'])
    ann.get(f'/versions/{version}/export?format=csv')
    ann.get(f'/tasks/{task}/export')
    with store.read() as c: found = [(r.action, r.subject, r.user_id) for r in c.execute(select(audits).order_by(audits.c.id))]
    assert [o[1:] for o in found if o[0] == 'export'] == [(f'version:{version}', ann.user.id), (f'task:{task}', ann.user.id)]
    access.set_password(store, ann.user, ann.user.id, 'nine quiet volcanoes', PASSWORD)
    assert access.user_of_token(store, key) is None


def test_a_button_that_is_pressed_twice(ann):
    "makes one run, also where both presses arrive together; the same run again later, or by somebody else, is another one"
    version = import_rows(ann.store, None, 'letters', texts(3)).version
    send = lambda who=ann, **more: who.post('/runs', kind='finetune', version=version, name='x', **more)
    with ThreadPoolExecutor(4) as pool: all(pool.map(lambda _: send(), range(4)))
    assert len(newest(ann.store, jobs_)) == 1
    send(set_steps='7')
    send(Visitor(ann.store, 'bob'))
    assert len(newest(ann.store, jobs_)) == 3


def test_many_log_ins_from_one_address(store):  # noqa: F811
    "An office behind one address is not locked out by those who know their passwords"
    access.create_user(store, None, 'ann', PASSWORD)
    for _ in range(25): access.log_in(store, 'ann', PASSWORD, '10.0.0.1')


def test_a_password_is_not_among_the_arguments(tmp_path, monkeypatch, capsys):
    from deepseek_nb.platform.start import print_password
    from deepseek_nb.tools.cli import main
    assert main(['platform', str(tmp_path/'a'), '--url', 'postgresql://ann:secret@host/x']) == 2
    assert 'DEEPSEEK_NB_DATABASE' in capsys.readouterr().err
    monkeypatch.setenv('DEEPSEEK_NB_DATABASE', 'nonsense://')
    with pytest.raises(ValueError, match='not a postgresql'): print_password(tmp_path/'a', '', 'ann')


def test_who_has_lost_the_password(ann, monkeypatch, capsys):
    "An administrator, or the console of the machine, gives a new one; it also ends the wait after too many tries"
    from deepseek_nb.platform import start
    store = ann.store
    bob = access.create_user(store, None, 'bob', PASSWORD)
    for _ in range(7):
        with pytest.raises(PermissionError): access.log_in(store, 'bob', 'a wrong guess', '10.0.0.1')
    said = ann.post(f'/users/{bob.id}/password').text
    new = re.search(r'<pre id="token"[^>]*>([^<]*)', said)[1]
    access.log_in(store, 'bob', new, '10.0.0.2')
    with pytest.raises(PermissionError): access.log_in(store, 'bob', PASSWORD, '10.0.0.3')
    monkeypatch.setattr(start, '_opened', lambda *a: nullcontext(store))
    monkeypatch.setattr(start, 'closing', lambda o: o)
    start.print_password('', '', 'bob')
    access.log_in(store, 'bob', re.search('password (\\S+)', capsys.readouterr().out)[1], '10.0.0.2')


def test_a_text_is_erased_everywhere(ann):
    "Records, answers, prompts and feedback; the file of the database holds it no longer, and the audit log says so without it"
    store, secret = ann.store, 'Erika Mustermann, 12 Main Street'
    version = import_rows(store, None, 'letters', [*texts(3), (dict(text=f'from {secret}'), 'train')]).version
    task = lab.create_task(store, None, version, 'topic', 'classification', labels=['post', 'sums'])
    lab.annotate(store, ann.user, task, 4, dict(label='post'))
    with Recorder(store, keep_texts=['here']) as r: r.record(RequestEvent('here', texts=(f'I am {secret.upper()}', 'hello')))
    give_feedback(store, 'here', dict(note=secret))
    add_model(store, None, 'one', 'mini', version=version)
    found = page_text(ann.post('/settings/erase', erase=secret.lower()).text)
    assert all(o in found for o in ('Records: 1', 'Prompts: 1', 'Feedback: 1', 'Models: one 1', 'Erase for ever'))
    assert 'may still hold it' in ann.post('/settings/erase', erase=secret.lower(), sure='yes').text
    with store.read() as c:
        said = repr([c.execute(t.select()).all() for t in audits.metadata.sorted_tables])
    assert 'Mustermann' not in said and 'MUSTERMANN' not in said and 'erase text' in said and version_report(store, version)['rows'] == 3
    if store.kind == 'sqlite':
        store.close()
        assert not any(b'Mustermann' in p.read_bytes() for p in store.folder.glob('platform.db*'))
    assert not [s for s in store.check() if 'audit' not in s]


def test_datasets_models_and_users_are_deleted(ann):
    store, bob = ann.store, access.create_user(ann.store, None, 'bob', PASSWORD, 'annotator')
    version, model = trained(store, 3)
    task = lab.create_task(store, None, version, 'topic', 'classification', labels=['post', 'sums'])
    lab.annotate(store, bob, task, 1, dict(label='post'))
    ann.post(f'/users/{bob.id}/delete')
    assert lab.task_progress(store, task)['people'].keys() == {f'deleted-{bob.id}'}
    with pytest.raises(PermissionError): access.log_in(store, 'bob', PASSWORD)
    measure(store, model, 'accuracy', .9)
    release(store, None, 'here', model, gates=[Limit('accuracy', min=.5)])
    assert 'is released' in ann.post(f'/models/{model}/delete').text
    end_release(store, None, 'here', 'live')
    ann.post(f'/models/{model}/delete')
    assert not (store.folder/'models'/'one').exists() and ann.get('/places/here').status_code == 200
    assert 'stay: mail 1' in ann.post('/datasets/1/delete').text and list_datasets(store) == [] and store.check() == []


def test_a_release_answers_as_it_was_measured(store):  # noqa: F811
    "A thousand texts: /v1/classify and the evaluation agree, and chats, in any protocol, say that label and nothing else"
    words = np.random.default_rng(SEED)
    print(f'SEED={SEED}')
    known = 'the senate house bill tax was charged twice on my card please help now'.split()
    some = [' '.join(words.choice(known, 6)) for _ in range(1000)]
    known = runs.Classifier(['billing', 'delivery', 'other'], '{text}\nAnswer:')
    model = add_model(store, None, 'sorter', 'mini', card=known._asdict())
    measure(store, model, 'accuracy', .9)
    release(store, None, 'sort', model, gates=[Limit('accuracy', min=.5)])
    user = access.create_user(store, None, 'ann', PASSWORD, 'admin')
    net, tok = runs.Named('mini', None, 'cpu').load()
    expected = runs.class_probabilities(net, tok, some, *known)
    margin = np.diff(np.sort(expected, 1), axis=1)[:, -1]
    server = PlatformServer(store, all_pages())
    heads = {'authorization': f"Bearer {access.create_token(store, user, 'x')}"}
    with TestClient(server.app(), base_url='http://localhost', headers=heads) as client:
        ask = lambda texts: client.post('/v1/classify', json=dict(model='sort', input=texts)).json()['data']
        found = [o for i in range(0, 1000, 100) for o in ask(some[i:i + 100])]
        np.testing.assert_allclose([o['probs'] for o in found], expected, atol=1e-4)
        sure = [i for i in range(1000) if margin[i] > 2e-4]
        assert len(sure) > 900 and all(found[i]['label'] == known.classes[expected[i].argmax()] for i in sure)
        for i in sure[:8]:
            said = [dict(role='user', content=some[i])]
            chat = client.post('/v1/chat/completions', json=dict(model='sort', messages=said, temperature=2, max_tokens=1)).json()
            other = client.post('/anthropic/v1/messages', json=dict(model='sort', messages=said, max_tokens=1)).json()
            assert chat['choices'][0]['message']['content'] == other['content'][0]['text'] == found[i]['label']
        assert client.post('/v1/completions', json=dict(model='sort', prompt='x')).status_code == 400
        assert ask('one text')[0]['num_classes'] == 3
        assert client.post('/v1/classify', json=dict(model='sort', input=[''])).status_code == 400
        server.recorder.flush()
    with store.read() as c: assert c.scalar(select(func.count()).select_from(events).where(events.c.kind == 'classify')) == 1001
    server.recorder.close()


def test_requests_of_one_program_are_compared_with_the_training_data(store):  # noqa: F811
    "At once, though all requests have one owner: which differ is told with both distributions, and requests like the data are calm"
    version, model = trained(store)
    pick = SimpleNamespace(tok=Tokenizer.from_pretrained('mini'), name='m')
    table = EmbeddingTable(torch.randn(8192, 8, generator=torch.Generator().manual_seed(0)))
    user = access.create_user(store, None, 'ann', PASSWORD, 'admin')
    server = PlatformServer(store, all_pages())
    server.pick, server.tables['m'] = lambda *a: (pick, SimpleNamespace(model_id=model)), table
    draw = np.random.default_rng(0)  # not SEED: of two samples that are alike, one pair in a hundred differs at this level
    rows = [r.data for r in iter_rows(store, version, 'train')]
    other = ['please refund the second payment for my broken kettle ' + r['text'] for r in rows]
    for place, some in (('alike', [r['text'] for r in rows]), ('other', other)):
        for i, k in enumerate(draw.permutation(len(some))[:150]):
            ids = pick.tok.encode(some[k])
            at, label = store.now() - i//5*60*10**6, rows[k]['label']
            server.recorder.record(RequestEvent(place, 'classify', 'program', model, outcome=label, at=at,
                                                features=lambda ids=ids, k=k: table.features(ids, 0, rows[k]['label'])))
        server.recorder.flush()
    session = access.log_in(store, 'ann', PASSWORD)
    with TestClient(server.app(), base_url='http://localhost', cookies=dict(session=session)) as client:
        ask = lambda place: page_text(client.post(f'/watch/drift/{place}', data=dict(csrf=access.csrf_of(session))).text)
        alike, other = ask('alike'), ask('other')
    assert 'Nothing speaks for a difference' in alike and 'differ more than chance explains' in other and user
    assert 'Training data' in other and re.search(r'post \| \d+% \| \d+%', alike), alike


def test_feedback_adds_what_a_data_set_lacks(ann):
    "Corrected texts become rows, and the right class is one of those that the model has"
    store = ann.store
    version, model = trained(store, 3)
    with Recorder(store, keep_texts=['here']) as r:
        for text in ('something new', 'text number 0 about 0'): r.record(RequestEvent('here', model_id=model, texts=(text, 'post')))
    page = ann.get('/answers/1').text
    assert re.search(r'<select[^>]*name="label"', page) and all(f'>{o}<' in page for o in ('post', 'sums'))
    assert ann.post('/answers/1', label='Post ').status_code in (200, 400) and ann.post('/answers/1', label='none').status_code == 400
    for i in (1, 2): ann.post(f'/answers/{i}', label='sums')
    made = ann.post('/feedback/version', place='here', dataset=1)
    found = [r.data for r in iter_rows(store, int(re.search(r'/versions/(\d+)', str(made.url))[1]))]
    assert dict(text='something new', label='sums') in found and len(found) == 7
    assert ann.post('/feedback/version', place='here', dataset=1).status_code == 400


def test_a_place_where_nothing_is_released(store):  # noqa: F811
    "is no fault of ours: the pages that ask a model say so"
    user, server = access.create_user(store, None, 'ann', PASSWORD, 'admin'), PlatformServer(store, all_pages())
    session = access.log_in(store, user.name, PASSWORD)
    with TestClient(server.app(), base_url='http://localhost', cookies=dict(session=session)) as client:
        csrf = access.csrf_of(session)
        asked = dict(model='none', messages=[dict(role='user', content='Hello')])
        for answer in (client.post('/watch/drift/none', data=dict(csrf=csrf)),
                       client.post('/v1/chat/completions', json=asked, headers={'x-csrf': csrf})):
            assert answer.status_code == 404 and 'nothing is released as' in answer.text


# ---- what a team asks for

def test_an_evaluation_shows_where_it_errs(ann, measured):
    "Scores of each class, the confusion matrix, and the texts behind each of its numbers; an erased text is gone there, too"
    _, model = trained(ann.store)
    version = import_rows(ann.store, None, 'odd', texts(90, 'test', lambda i: ('post', 'sums')[i % 3 % 2], 1000)).version
    state, job = measured(ann.store, model, version)
    assert state == 'done'
    result, rows = job.result, {r.digest: r.data for r in iter_rows(ann.store, version)}
    table = np.zeros((2, 3), int)
    for r in iter_rows(ann.store, version, 'test'):  # what the stand-in answers: even numbers are `post`
        table[result['classes'].index(r.data['label']), int(re.search(r'about (\d+)', r.data['text'])[1]) % 2] += 1
    assert result['confusion'] == table.tolist() and len(result['mistakes']) == table[0, 1] + table[1, 0]
    for digest, true, said, p in result['mistakes']:
        assert rows[digest]['label'] == result['classes'][true] != result['classes'][said] and p in (.8, .9)
    known = ann.text('/runs/new?kind=evaluate')
    assert f'Run {job.id} | ' in known and f'{job.memory/2**30:.1f} GB' in known
    shown = ann.text(f'/runs/{job.id}')
    assert f"{table[0, 0]} | {table[0, 1]}" in shown and f'{100*table[0, 0]/table[0].sum():.1f}%' in shown
    page = ann.get(f'/runs/{job.id}/mistakes?true=0&said=1')
    assert page.text.count('<tr') == table[0, 1] + 1
    assert ann.get(f'/runs/{job.id}/mistakes?true=0&said=0').text.count('<tr') == 0 and ann.get('/runs/99/mistakes').status_code == 404
    text = rows[result['mistakes'][0][0]]['text']
    assert text in ann.text(f'/runs/{job.id}/mistakes')
    erase_text(ann.store, None, text)
    assert text not in ann.text(f'/runs/{job.id}/mistakes')


def test_runs_side_by_side(ann):
    "Curves over each other, and only those settings that differ; and when a run will have ended"
    data = import_rows(ann.store, None, 'mail', texts(4)).version
    ids = [jobs.submit(ann.store, None, 'finetune', dict(steps=50, batch=b), f'run {b}', data) for b in (2, 4)]
    for scale in (1, 2):
        job = jobs.Job(ann.store, jobs.claim(ann.store, 99))
        for step in (1, 2):
            job.report(step, loss=scale/step)
            job.flush()
    shown = ann.get(f'/runs/compare?run={ids[0]}&run={ids[1]}').text
    assert 'run 2' in shown and shown.count('class="series s1"') >= 1
    differ = [line.split(' | ') for line in page_text(shown).splitlines() if ' | ' in line]
    assert ['batch', '2', '4'] in differ and not any(o[0] in ('steps', 'Kind') for o in differ)
    assert ann.get(f'/runs/compare?run={ids[0]}').status_code == 400 and 'Expected end' in ann.text(f'/runs/{ids[0]}')
    with ann.store.read() as c: at = c.execute(select(curves.c.at).where(curves.c.job_id == ids[0]).order_by(curves.c.step)).scalars().all()
    end = re.search(r'Expected end: (.*)', ann.text(f'/runs/{ids[0]}'))[1]
    assert end == page_text(to_xml(when(at[1] + 48*(at[1] - at[0]))))


def test_a_model_suggests_labels(ann, measured):
    "The texts of which it is least sure are handed out first, with its answer chosen"
    version, model = trained(ann.store)
    task = lab.create_task(ann.store, None, version, 'Which?', 'classification', labels=['post', 'sums'])
    assert 'Suggest labels' in ann.text(f'/tasks/{task}')
    ann.post(f'/tasks/{task}/suggest', model=model)
    row = jobs.claim(ann.store, 9)
    assert (row.kind, jobs.Job(ann.store, row).perform()) == ('suggest', 'done')
    work = lab.next_record(ann.store, task, ann.user)
    number = int(re.search(r'about (\d+)', work.data['text'])[1])
    assert number % 2 and work.prediction == dict(label='sums')  # .8 is less sure than .9
    assert 'A model has chosen' in ann.text(f'/tasks/{task}/label/{work.record}')
    assert row_of(ann.store, jobs_, row.id).result == dict(suggested=600)


def test_from_a_version_to_a_program(ann):
    "A version leads to a run on it, and a release says how it is asked"
    version, model = trained(ann.store)
    assert f'/runs/new?preset=lora&amp;version={version}' in ann.get(f'/versions/{version}').text
    chosen = ann.get(f'/runs/new?preset=lora&version={version}').text
    assert f'value="{version}" selected' in re.sub(r'selected value="(\d+)"', r'value="\1" selected', chosen)
    measure(ann.store, model, 'accuracy', .9)
    release(ann.store, None, 'mail-room', model, gates=[Limit('accuracy', min=.5)])
    said = ann.text(f'/models/{model}')
    assert 'http://localhost/v1/classify' in said and '"model": "mail-room"' in said and "base_url='http://localhost/v1'" in said


def test_pairs_of_answers_by_their_usual_names():
    "`chosen` and `rejected`, as texts or messages: the better one stands at either place, and the same row always at the same"
    sides = set()
    for i in range(20):
        row = house_row(dict(prompt='Why?', chosen=f'good {i}', rejected=f'bad {i}', source='x'), 'preference')
        assert row == house_row(dict(rejected=f'bad {i}', chosen=f'good {i}', prompt='Why?', source='x'), 'preference')
        assert row.keys() == {'prompt', 'a', 'b', 'better', 'source'} and row[row['better']] == f'good {i}'
        sides.add(row['better'])
    assert sides == {'a', 'b'}
    turns = [dict(role='user', content='Why?')]
    said = {k: [*turns, dict(role='assistant', content=k)] for k in ('chosen', 'rejected')}
    row = house_row(said, 'preference')
    assert row['prompt'] == 'Why?' and row[row['better']] == 'chosen'
    for bad in (dict(prompt='x', chosen=[], rejected='b'), dict(prompt='x', chosen=None, rejected='b'), dict(chosen='a', rejected='b')):
        with pytest.raises(ValueError): house_row(bad, 'preference')


def test_the_audit_log_is_searched_and_exported(ann):
    import_rows(ann.store, ann.user, 'mail', texts(4))
    shown = ann.text('/audit?contains=import version')
    assert 'import version' in shown and 'create user' not in shown
    lines = ann.get('/audit/export?contains=ann').text.splitlines()
    assert lines[0] == 'id,at,name,action,subject,detail,before,digest' and len(lines) > 2 and all(',ann,' in o for o in lines[1:])
    with ann.store.read() as c: assert c.scalar(select(func.count()).select_from(audits).where(audits.c.action == 'export')) == 1
    assert Visitor(ann.store, 'eve', 'developer').get('/audit/export').status_code == 403


def test_backup_and_restore(ann, tmp_path, capsys):
    "A copy has tables and files, in either direction between the databases"
    version, model = trained(ann.store)
    url = '' if ann.store.kind == 'sqlite' else ann.store.engine.url.render_as_string(hide_password=False)
    back_up(ann.store.folder, url, tmp_path/'copy')
    with pytest.raises(ValueError, match='exists'): back_up(ann.store.folder, url, tmp_path/'copy')
    bring_back(tmp_path/'new', '', tmp_path/'copy')
    with pytest.raises(ValueError, match='rows already'): bring_back(tmp_path/'new', '', tmp_path/'copy')
    with pytest.raises(ValueError, match='no backup'): bring_back(tmp_path/'newer', '', tmp_path)
    moved = open_store(tmp_path/'new')
    assert model_path(moved, model) == str(tmp_path/'new/models/one') and (tmp_path/'new/models/one/weights').read_text() == '1'
    assert [r.data for r in iter_rows(moved, version)] == [r.data for r in iter_rows(ann.store, version)] and moved.check() == []
    moved.close()
    assert sorted(p.name for p in tmp_path.glob('.*')) == []

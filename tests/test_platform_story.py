"""The platform in a real browser, as one story: administrator, labels, a run, gates, a release, a chat, an alarm, and the way back."""
import json
import re
import threading
import time
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest

pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
from test_browser import AXE, CHROMIUM, FLAGS  # noqa: E402

from deepseek_nb.eval.features import EmbeddingTable  # noqa: E402
from deepseek_nb.platform import access  # noqa: E402
from deepseek_nb.platform.events import Recorder, RequestEvent  # noqa: E402
from deepseek_nb.platform.monitor import MONDAY, WEEK, DriftPlan, Monitor  # noqa: E402
from deepseek_nb.platform.start import gloss_rows, start_platform  # noqa: E402

GATES = '[quality]\naccuracy = {min = 0.62}\n'
QUICK = dict(rate='0.003', warmup='0', length='48', save_every='100', eval_every='0', blocks='0')
LOOKS = {('light', 1200), ('dark', 360)}


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "The platform with its first task, in a thread; it ends in order"
    folder, ready, found = tmp_path_factory.mktemp('platform'), threading.Event(), []
    (folder/'gates.toml').write_text(GATES)
    old, access.SCRYPT = access.SCRYPT, dict(n=16, r=8, p=1)
    def listening(server):
        found.append(server)
        ready.set()
    with redirect_stdout(StringIO()) as console:
        thread = threading.Thread(target=start_platform, args=(folder,), kwargs=dict(port=0, cores=1, ready=listening), daemon=True)
        thread.start()
        assert ready.wait(120)
    found[0].console = console.getvalue()
    yield found[0]
    found[0].uvicorn.should_exit = True
    thread.join(60)
    access.SCRYPT = old
    assert not thread.is_alive()


@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Reader:
    "A page of a browser that notes what a person would complain about"
    def __init__(self, chromium, server):
        self.base, self.faults = f'http://127.0.0.1:{server.address[1]}', []
        self.context = chromium.new_context(viewport=dict(width=1200, height=900), base_url=self.base)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        # a refused form answers with 400, which Chromium reports as an error of its own
        self.page.on('console', lambda o: o.type in ('error', 'warning') and '400 (Bad' not in o.text and self.faults.append(o.text))
        self.page.on('pageerror', lambda o: self.faults.append(str(o)))
        self.page.on('request', lambda o: o.url.startswith((self.base, 'data:')) or self.faults.append(f'foreign {o.url}'))

    def go(self, path): self.page.goto(path)
    def text(self): return self.page.inner_text('main')

    def send(self, button, **fields):
        "Fill in fields by their ids, and press a button"
        for name, value in fields.items():
            place = self.page.locator(f'#{name}')
            if place.evaluate('o => o.tagName') == 'SELECT': place.select_option(value)
            else: place.fill(value)
        with self.page.expect_navigation(): self.page.get_by_role('button', name=button, exact=True).click()

    def until(self, said, seconds=240):
        "Load the page again until it says something"
        end = time.monotonic() + seconds
        while not re.search(said, self.text()):
            assert time.monotonic() < end, self.text()
            time.sleep(.5)
            self.page.reload()


@pytest.fixture
def reader(chromium, server):
    reader = Reader(chromium, server)
    yield reader
    reader.context.close()
    assert not reader.faults, reader.faults


def run(reader, version, **settings):
    "Start a fine-tuning of `mini` on a version, watch it, and return the number of its model"
    reader.go(f'/runs/new?kind=finetune&version={version}')
    reader.page.locator('#model').select_option(label='mini 1')
    reader.page.get_by_text('Settings', exact=True).last.click()
    reader.send('Start', name='topics', **{f'set_{k}': v for k, v in (QUICK | settings).items()})
    assert 'waits in the queue' in reader.text()
    reader.page.wait_for_selector('svg.chart >> nth=0', timeout=180_000) # the page renews itself
    reader.until('State\\s*done')
    assert 'falls' in (said := reader.page.locator('svg.chart').first.get_attribute('aria-label')) or 'rises' in said
    reader.go('/models')
    reader.page.get_by_role('link', name=re.compile('topics')).first.click()
    reader.until(r'accuracy\s+at least [\d.]+\s+[\d.]+') # it is measured by a job of its own
    return int(reader.page.url.rpartition('/')[2])


def traffic(server, weeks):
    "Weeks of requests that have passed: the last one is about something else"
    store, rng = server.platform, np.random.default_rng(0)
    import torch
    table = EmbeddingTable(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)))
    start = MONDAY + ((store.now() - MONDAY)//WEEK - weeks)*WEEK
    with Recorder(store, seed=0) as recorder:
        for week in range(weeks):
            for user in range(100):
                ids = (rng.integers(0, 200, 20) + 200*(week == weeks - 1)).tolist()
                recorder.record(RequestEvent('assistant', 'chat', f'u{user}', None, 20, 9, .1, .3, outcome='stop',
                                             features=lambda ids=ids: table.features(ids, 9, 'stop'), at=start + week*WEEK + user*10**9))
    Monitor(store, plan=DriftPlan(past=400)).tick()


def test_story(server, reader, tmp_path):
    page, labels = reader.page, {r['text']: r['label'] for r in gloss_rows()}
    # the first administrator, with the code of the console
    reader.go('/')
    assert page.url.endswith('/setup')
    code = re.search(r'with the code (\S+)', server.console)[1]
    reader.send('Begin', code=code, name='ann', password='correct horse battery', again='correct horse battery')
    assert 'You are the administrator' in reader.text()
    # import a file
    file = tmp_path/'more.jsonl'
    file.write_text(''.join(json.dumps(r) + '\n' for r in gloss_rows()))
    reader.go('/datasets')
    page.set_input_files('input[type=file]', file)
    page.fill('#name', 'definitions')
    page.get_by_label('Column of the split').fill('split')
    reader.send('Import')
    assert '500' in reader.text()
    # label 40, by keyboard alone
    reader.go('/tasks/1/label')
    names = sorted({*labels.values()})
    for _ in range(40):
        text = page.inner_text('#record')
        page.keyboard.press(str(1 + names.index(labels[text])))
        with page.expect_navigation(): page.keyboard.press('Enter')
    reader.go('/tasks/1')
    assert '240 of 500' in reader.text()
    reader.send('Make a labelled version')
    labelled = 3
    # a short run on few labels: its curves are seen, and its gates fail
    poor = run(reader, labelled, steps='2', batch='2', rate='0.00001')
    assert 'would be refused' in reader.text()
    reader.send('Release', place='assistant')
    assert 'was not released' in reader.text() and 'accuracy' in reader.text()
    # more labels and more steps: the gates pass, and the model is released
    good = run(reader, 2, steps='40', batch='16')
    assert good != poor and 'would be refused' not in reader.text() and 'passed' in reader.text()
    reader.send('Release', place='assistant')
    assert 'Released: live at assistant' in reader.text()
    # chat: the answer appears while it is generated, and gets a thumb
    reader.go('/chat')
    page.fill('#message', 'large white heron of Florida and the Florida Keys')
    page.keyboard.press('Enter')
    page.wait_for_selector('.said.assistant small')
    assert 'tokens in' in page.inner_text('.said.assistant')
    page.get_by_role('button', name='Good answer').click()
    page.wait_for_selector('text=Thank you.')
    # traffic changes: an alarm
    traffic(server, 6)
    reader.go('/alerts')
    assert 'drift' in reader.text() and 'assistant' in reader.text()
    # a staged release, and one click back
    reader.go(f'/models/{good}')
    reader.send('Release', place='assistant', mode='staged', share='50')
    reader.go('/places/assistant')
    reader.send('Roll back')
    assert f'Model {good} answers again' in reader.text()
    look(reader)
    reader.go('/audit')
    assert 'The chain is whole' in reader.text()


def look(reader):
    "Every page that links lead to, wide and light, narrow and dark: axe finds nothing, and nothing is cut off"
    for scheme, width in LOOKS:
        page = reader.page
        page.set_viewport_size(dict(width=width, height=800))
        page.emulate_media(color_scheme=scheme)
        seen, todo = set(), ['/']
        while todo:
            url = todo.pop(0)
            shape = re.sub(r'\d+', '1', url.partition('?')[0])
            if shape in seen or re.search('export|/card$|/log$|/static', url): continue
            seen.add(shape)
            answer = page.goto(url)
            assert answer.status == 200, url
            if 'html' not in answer.headers['content-type']: continue
            assert page.evaluate('document.documentElement.scrollWidth') <= width, (url, width)
            todo += page.eval_on_selector_all('a[href^="/"]', 'all => all.map(a => a.getAttribute("href"))')
            if AXE.exists(): assert not axe(reader, url), url
        assert len(seen) > 20


def axe(reader, url):
    "What axe finds on a page; it is loaded as the browser's own, since the page's policy forbids foreign scripts"
    tools = reader.page.context.new_cdp_session(reader.page)
    tools.send('Page.enable')
    frame = tools.send('Page.getFrameTree')['frameTree']['frame']['id']
    world = tools.send('Page.createIsolatedWorld', dict(frameId=frame, worldName='axe'))['executionContextId']
    tools.send('Runtime.evaluate', dict(expression=AXE.read_text(), contextId=world))
    how = 'axe.run().then(o => JSON.stringify(o.violations.map(v => v.id + ": " + v.nodes[0].html)))'
    found = tools.send('Runtime.evaluate', dict(expression=how, contextId=world, awaitPromise=True, returnByValue=True))
    tools.detach()
    return json.loads(found['result']['value'])

"""The platform in a real browser, as one story: administrator, labels, a run, gates, a release, a chat, an alarm, and the way back."""
import json
import os
import random
import re
import threading
import time
from contextlib import redirect_stdout
from io import StringIO
from unittest import mock

import numpy as np
import pytest

pytest.importorskip('fasthtml', reason="the platform needs pip install 'deepseek-nb[platform]'")
from conftest import SEED  # noqa: E402
from platform_fixtures import _binaries, postgres  # noqa: E402, F401
from test_browser import AXE, CHROMIUM, FLAGS  # noqa: E402

from deepseek_nb.eval.drift import EmbeddingTable  # noqa: E402
from deepseek_nb.platform import access  # noqa: E402
from deepseek_nb.platform.events import Recorder, RequestEvent  # noqa: E402
from deepseek_nb.platform.monitor import MONDAY, WEEK, DriftPlan, Monitor  # noqa: E402
from deepseek_nb.platform.start import gloss_rows, start_platform  # noqa: E402
from deepseek_nb.platform.store import jobs, newest  # noqa: E402

BOTH = ['sqlite', 'postgres'] if _binaries() else ['sqlite']
KINDS = BOTH if os.environ.get('EVERY') else [random.Random(SEED).choice(BOTH)] # of a run
GATES = '[quality]\naccuracy = {min = 0.62}\n'
# Where a page is seen in all forms, two of them get all rules, as colours depend on the scheme alone
LOOKS = [('light', 1200, ()), ('dark', 1200, ('color-contrast',)), ('dark', 360, ()), ('light', 360, ('color-contrast',))]

# After a press of Tab: whether the control was reached, and what has the focus without showing it
STOP = """target => {
  const o = document.activeElement, box = o.getBoundingClientRect(), style = getComputedStyle(o);
  const ring = o.matches(':focus-visible') && style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
  const x = Math.max(box.left, 0) + 3, y = Math.max(box.top, 0) + 3, inside = box.width > 6 && x < innerWidth && y < innerHeight;
  const on = document.elementFromPoint(Math.max(x, (box.left + Math.min(box.right, innerWidth))/2),
                                       Math.max(y, (box.top + Math.min(box.bottom, innerHeight))/2));
  const seen = o === document.body || ring && inside && on && (o.contains(on) || on.contains(o));
  return [o === target, seen ? '' : o.outerHTML.slice(0, 200)];
}"""


@pytest.fixture(scope='module', params=KINDS)
def server(tmp_path_factory, request):
    "The platform with its first task, in a thread, over SQLite or Postgres; it ends in order"
    print(f'SEED={SEED}, over {request.param}')
    url = dict(url=request.getfixturevalue('postgres').database()) if request.param == 'postgres' else {}
    folder, ready, found = tmp_path_factory.mktemp('platform'), threading.Event(), []
    (folder/'gates.toml').write_text(GATES)
    old, access.SCRYPT = access.SCRYPT, dict(n=16, r=8, p=1)
    def listening(server):
        found.append(server)
        ready.set()
    with redirect_stdout(StringIO()) as console:
        thread = threading.Thread(target=start_platform, args=(folder,), kwargs=dict(port=0, cores=1, ready=listening) | url, daemon=True)
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
        self.base, self.store, self.faults = f'http://127.0.0.1:{server.address[1]}', server.platform, []
        self.context = chromium.new_context(viewport=dict(width=1200, height=900), base_url=self.base)
        self.context.set_default_timeout(60_000)
        self.page = self.context.new_page()
        self.choosers = []
        self.page.on('filechooser', lambda o: self.choosers.append(o)) # from now on: the browser needs a moment
        # a refused form answers with 400, which Chromium reports as an error of its own
        self.page.on('console', lambda o: o.type in ('error', 'warning') and '400 (Bad' not in o.text and self.faults.append(o.text))
        self.page.on('pageerror', lambda o: self.faults.append(str(o)))
        self.page.on('request', lambda o: o.url.startswith((self.base, 'data:')) or self.faults.append(f'foreign {o.url}'))

    def text(self): return self.page.inner_text('main')

    def to(self, target, back=False):
        "Press Tab until a control has the focus; at each stop on the way the focus is seen"
        target = target.element_handle()
        for _ in range(200):
            self.page.keyboard.press('Shift+Tab' if back else 'Tab')
            here, unseen = self.page.evaluate(STOP, target)
            assert not unseen, f'{self.page.url}: the focus is not seen on {unseen}'
            if here: return
        raise AssertionError(f'{self.page.url}: {target} is not reached with Tab')

    def link(self, name): self.press(name, 'link')

    def press(self, name, role='button'):
        "Tab to a button or link, press Enter, and wait for the next page"
        self.to(self.page.get_by_role(role, name=name, exact=isinstance(name, str)).first)
        with self.page.expect_navigation(): self.page.keyboard.press('Enter')

    def menu(self, name):
        "Follow a link of the navigation, and skip the navigation of the page behind it"
        self.link(name)
        self.page.keyboard.press('Tab')
        assert self.page.evaluate(STOP, None) == [False, ''] and self.page.evaluate('document.activeElement.className') == 'skip'
        self.page.keyboard.press('Enter')
        assert self.page.evaluate('document.activeElement.id') == 'main'

    def enter(self, fields):
        "Tab from field to field and type: by label, what stands in each"
        keys = self.page.keyboard
        for label, value in fields.items():
            place = self.page.get_by_label(label, exact=True)
            self.to(place)
            kind = place.evaluate('o => o.tagName === "SELECT" ? "select" : o.type')
            if kind == 'select':
                options = place.evaluate('o => [...o.options].map(p => p.text)')
                steps = next(i for i, o in enumerate(options) if o.startswith(value)) - place.evaluate('o => o.selectedIndex')
                for _ in range(abs(steps)): keys.press('ArrowDown' if steps > 0 else 'ArrowUp')
                assert place.evaluate('o => o.selectedOptions[0].text').startswith(value)
            elif kind == 'file':
                keys.press('Enter')
                end = time.monotonic() + 60
                while not self.choosers and time.monotonic() < end: self.page.wait_for_timeout(50)
                self.choosers.pop().set_files(value)
            else:
                keys.press('Control+A')
                keys.type(value)
                assert place.input_value() == value

    def send(self, button, fields=()):
        "Fill in a form, and send it"
        self.enter(dict(fields))
        self.press(button)

    def until(self, said, seconds=240):
        "Load the page again until it says something: when no job is left, as each time takes as much as a step of training"
        end = time.monotonic() + seconds
        while not re.search(said, self.text()):
            assert time.monotonic() < end, self.text()
            time.sleep(.5)
            while time.monotonic() < end and any(newest(self.store, jobs, jobs.c.state == o) for o in ('queued', 'running')): time.sleep(.1)
            self.page.reload()


@pytest.fixture
def reader(chromium, server):
    reader = Reader(chromium, server)
    yield reader
    reader.context.close()
    assert not reader.faults, reader.faults


def run(reader, data, settings=()):
    "Start a fine-tuning of `mini` on a version, watch it, and stay on the page of its model"
    reader.menu('Runs')
    reader.link('New run')
    reader.link('mini, within a minute')
    assert reader.page.get_by_label('Model', exact=True).evaluate('o => o.selectedOptions[0].text') == 'mini 1'
    reader.enter({'Name of the run': 'topics', 'Data': data})
    if settings:
        reader.to(reader.page.locator('summary'))
        reader.page.keyboard.press('Enter')
    reader.send('Start', settings)
    assert 'waits in the queue' in reader.text()
    reader.page.wait_for_selector('svg.chart >> nth=0', timeout=180_000) # the page renews itself
    reader.until('State\\s*done')
    assert 'falls' in (said := reader.page.locator('svg.chart').first.get_attribute('aria-label')) or 'rises' in said
    reader.menu('Models')
    reader.link(re.compile('^topics'))
    reader.until(r'accuracy\s+at least [\d.]+\s+[\d.]+') # it is measured by a job of its own
    return int(reader.page.url.rpartition('/')[2])


def traffic(server, weeks):
    "Weeks of requests that have passed: the last one is about something else"
    store, rng = server.platform, np.random.default_rng(0)
    import torch
    table = EmbeddingTable(torch.randn(400, 8, generator=torch.Generator().manual_seed(0)))
    start = MONDAY + ((store.now() - MONDAY)//WEEK - weeks)*WEEK
    tick = Monitor.tick
    # Meanwhile the server's own monitor waits: it would judge weeks of which a part is written, or some of them at the same time
    with mock.patch.object(Monitor, 'tick', lambda monitor: []):
        with Recorder(store, seed=0) as recorder:
            for week in range(weeks):
                for user in range(100):
                    ids = (rng.integers(0, 200, 20) + 200*(week == weeks - 1)).tolist()
                    at, features = start + week*WEEK + user*10**9, lambda ids=ids: table.features(ids, 9, 'stop')
                    recorder.record(RequestEvent('assistant', 'chat', f'u{user}', None, 20, 9, .1, .3, outcome='stop',
                                                 features=features, at=at))
        tick(Monitor(store, plan=DriftPlan(past=400)))


def test_story(server, reader, tmp_path):
    "By keyboard alone: Tab, Enter, arrows and typing, from the address of the first page"
    page, keys, labels = reader.page, reader.page.keyboard, {r['text']: r['label'] for r in gloss_rows()}
    # the first administrator, with the code of the console
    page.goto('/')
    assert page.url.endswith('/setup')
    code, password = re.search(r'with the code (\S+)', server.console)[1], 'correct horse battery'
    reader.send('Begin', {'Code': code, 'Your name': 'ann', 'Password': password, 'Password again': password})
    assert 'You are the administrator' in reader.text()
    # import a file
    file = tmp_path/'more.jsonl'
    file.write_text(''.join(json.dumps(r) + '\n' for r in gloss_rows()))
    reader.menu('Data')
    reader.send('Import', {'Name of the dataset': 'definitions', 'File': file, 'Column of the split': 'split'})
    assert '500' in reader.text()
    # label 16
    reader.menu('Labelling')
    reader.link('What is it?')
    with page.expect_navigation(): keys.press('l')
    names = sorted({*labels.values()})
    for _ in range(16):
        text = page.inner_text('#record')
        keys.press(str(1 + names.index(labels[text])))
        with page.expect_navigation(): keys.press('Enter')
    reader.link('Stop')
    assert '216 of 500' in reader.text()
    reader.press('Make a labelled version')
    # a short run on few labels: its curves are seen, and its gates fail
    poor = run(reader, 'glosses, version 2', {'Steps': '2', 'Batch': '2', 'Rate': '0.00001', 'Eval every': '0'})
    assert 'would be refused' in reader.text()
    reader.send('Release', {'Place': 'assistant'})
    assert 'was not released' in reader.text() and 'accuracy' in reader.text()
    # more labels and more steps, the settings that stand ready: the gates pass, and the model is released
    good = run(reader, 'definitions')
    assert good != poor and 'would be refused' not in reader.text() and 'passed' in reader.text()
    reader.send('Release', {'Place': 'assistant'})
    assert 'Released: live at assistant' in reader.text()
    # chat: the answer appears while it is generated, and gets a thumb
    reader.menu('Chat')
    reader.enter({'Message': 'large white heron of Florida and the Florida Keys'})
    keys.press('Enter')
    page.wait_for_selector('.said.assistant small')
    assert 'tokens in' in page.inner_text('.said.assistant')
    reader.to(page.get_by_role('button', name='Good answer'), back=True)
    keys.press('Space')
    page.wait_for_selector('text=Thank you.')
    assert page.evaluate('document.activeElement.id') == 'message'
    # traffic changes: an alarm
    traffic(server, 6)
    reader.menu('Alerts')
    assert 'drift' in reader.text() and 'assistant' in reader.text()
    # a staged release, and one button back
    reader.menu('Models')
    reader.link(re.compile('^topics 2'))
    assert page.url.endswith(f'/{good}')
    reader.send('Release', {'Place': 'assistant', 'Mode': 'staged', 'Share of a staged release, in per cent': '50'})
    reader.link('History, share and back')
    reader.press('Roll back')
    assert f'Model {good} answers again' in reader.text()
    reader.menu('Audit log')
    assert 'The chain is whole' in reader.text()
    look(reader)


def look(reader):
    """Every page that links lead to: axe finds nothing, and nothing is cut off. Wide or narrow, light or dark, drawn for each page; all of
    these with EVERY=1"""
    page, seen, todo, r = reader.page, set(), ['/'], random.Random(SEED)
    looks = LOOKS if os.environ.get('EVERY') else [(scheme, width, ()) for scheme, width, _ in LOOKS]
    print(f'SEED={SEED}')
    while todo:
        url = todo.pop(0)
        shape = re.sub(r'\d+', '1', url.partition('?')[0])
        if shape in seen or re.search('export|/card$|/log$|/static', url): continue
        seen.add(shape)
        answer = page.goto(url)
        assert answer.status == 200, url
        if 'html' not in answer.headers['content-type']: continue
        todo += page.eval_on_selector_all('a[href^="/"]', 'all => all.map(a => a.getAttribute("href"))')
        judge = AXE.exists() and Axe(page)
        for scheme, width, rules in looks if os.environ.get('EVERY') else [r.choice(looks)]:
            page.set_viewport_size(dict(width=width, height=800))
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate('document.documentElement.scrollWidth') <= width, (url, width)
            if judge: assert not (found := judge.faults(rules)), (url, scheme, width, found)
    assert len(seen) > 20


class Axe:
    "Axe on a page that was just loaded; it runs as the browser's own, since the page's policy forbids foreign scripts"
    def __init__(self, page):
        self.tools = page.context.new_cdp_session(page)
        frame = self.tools.send('Page.getFrameTree')['frameTree']['frame']['id']
        self.world = self.tools.send('Page.createIsolatedWorld', dict(frameId=frame, worldName='axe'))['executionContextId']
        self.run(AXE.read_text())

    def run(self, code):
        found = self.tools.send('Runtime.evaluate', dict(expression=code, contextId=self.world, awaitPromise=True, returnByValue=True))
        return found['result'].get('value')

    def faults(self, rules):
        "What axe finds; it measures again, since the window has changed"
        ask = dict(resultTypes=['violations']) | (dict(runOnly=dict(type='rule', values=rules)) if rules else {})
        how = 'axe.run(%s).then(o => JSON.stringify(o.violations.map(v => v.id + ": " + v.nodes[0].html)))'
        return json.loads(self.run(how % json.dumps(ask)))

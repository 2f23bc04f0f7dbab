"The figures in which a page runs `mini`: their numbers are Python's, and they are accessible and offline."
import json
import shutil
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from deepseek_nb import Model, Tokenizer
from deepseek_nb.arch.moe import MoE
from deepseek_nb.export import wasm
from deepseek_nb.export.figures import FIGURE_NOTES, export_page, figure_visit, served
from deepseek_nb.export.wasm import compile_wasm, find_clang, interface, read_wasm, wasm_sections, wasm_sources
from deepseek_nb.infer.inside import attention_pattern, record_stream, routes

browsing = pytest.importorskip('test_browser', reason='playwright or chromium is absent', exc_type=ImportError)
AXE, CHROMIUM, FAULTS, FLAGS, NARROW, WIDE, Quiet = (getattr(browsing, o) for o in 'AXE CHROMIUM FAULTS FLAGS NARROW WIDE Quiet'.split())
browser, window, url = browsing.browser, browsing.window, browsing.url
PAGES = dict(experts='arch.routing', attention='arch.attention', cache='arch.cache', sampling='infer.generate')
WORDS = 'my lord the king of France 1842 says: “Zürich”, naïve Ωmega; (peace) don\'t 7% war — if we\'re Union Congress'.split()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    with pytest.warns(UserWarning, match='left out'): return export_page('mini', tmp_path_factory.mktemp('live')/'page')


class Plain(Quiet):
    "A server that knows no WebAssembly, as many don't"
    extensions_map = Quiet.extensions_map | {'.wasm': 'application/octet-stream'}


@pytest.fixture(scope='module')
def url(folder):  # noqa: F811, instead of the whole site
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Plain, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def mini(): return Model.from_pretrained('mini', dtype='float32', device='cpu').requires_grad_(False), Tokenizer.from_pretrained('mini')


@pytest.fixture
def opened(window):
    "Opens a figure of the page, with a text, and returns it when it has answered."
    def open(kind, text=None, page=None):
        if page is None:
            page = window()
            page.goto('/index.html')
        figure = page.locator(f'live-figure[data-show={kind}]')
        figure.get_by_role('button', name='Run mini here').click()
        figure.locator('table').first.wait_for()
        if text is not None: show(figure, text)
        return figure
    return open


def show(figure, text):
    "Enter a text, and wait for its report"
    figure.evaluate('o => { o.report = null }')
    figure.get_by_role('textbox').fill(text)
    figure.get_by_role('button', name='Show').click()
    figure.page.wait_for_function('o => o.report', arg=figure.element_handle())


REPORT = """o => ({ids: o.report.tokens.map(t => t.id), cache: o.report.tokens.map(t => t.cache), kept: o.report.kept,
  routes: o.report.tokens.map(t => t.routes.map(r => r && [...r])),
  attention: o.report.tokens.map(t => t.attention.map(r => [...r])), logits: [...o.report.logits]})"""


def margin(model, ids):
    "The least distance between the last expert that is chosen and the first that isn't"
    least = 1.
    for layer, r in routes(model, ids).items():
        gate = model.layers[layer].mlp.gate
        best = (r.scores + gate.e_score_correction_bias).topk(model.config.n_activated_experts + 1).values
        least = min(least, (best[:, -2] - best[:, -1]).min().item())
    return least


def encode(mini, text): return [mini[0].config.bos_id, *mini[1].encode(text)]


def fresh(mini, r, n=14):
    "A text that is new in each run, whose experts don't depend on the last bits, and its tokens"
    while True:
        text = ' '.join(r.choices(WORDS, k=n))
        ids = torch.tensor([encode(mini, text)])
        if ids.shape[1] <= 48 and margin(mini[0], ids) > 1e-4: return text, ids


def test_experts_are_those_of_python(opened, mini, source):
    text, ids = fresh(mini, source('experts'))
    figure = opened('experts', text)
    page = figure.evaluate(REPORT)
    assert page['ids'] == ids[0].tolist()
    want, e, k = routes(mini[0], ids), mini[0].config.n_routed_experts, mini[0].config.n_activated_experts
    assert [r is not None for r in page['routes'][0]] == [isinstance(b.mlp, MoE) for b in mini[0].layers]
    for layer, r in want.items():
        got = torch.tensor([token[layer] for token in page['routes']], dtype=torch.float32)
        torch.testing.assert_close(got[:, :e], r.scores, atol=1e-3, rtol=0)
        weights = torch.zeros_like(r.scores).scatter(-1, r.experts, r.weights)
        torch.testing.assert_close(torch.zeros_like(weights).scatter(-1, got[:, e:e+k].long(), got[:, e+k:]), weights, atol=1e-3, rtol=0)
    token = len(ids[0]) // 2
    figure.locator(f'input[value="{token}"]').check()
    for layer, row in zip(want, figure.locator('tbody tr').all_inner_texts(), strict=True):  # what a reader sees
        shown = {int(o.split(' (')[0]): float(o.split('(')[1].rstrip(')')) for o in row.split('\t')[1].split(', ')}
        r = want[layer]
        of_python = dict(zip(r.experts[token].tolist(), r.weights[token].tolist(), strict=True))
        assert shown.keys() == of_python.keys() and max(abs(shown[o] - of_python[o]) for o in shown) < 1e-3


def test_attention_is_that_of_python(opened, mini, source):
    text, ids = fresh(mini, source('attention'))
    figure = opened('attention', text)
    page, record = figure.evaluate(REPORT), record_stream(mini[0], ids)
    for layer in range(mini[0].config.n_layers):
        want = attention_pattern(mini[0], record, layer)[0]
        for i, token in enumerate(page['attention']):
            torch.testing.assert_close(torch.tensor(token[layer], dtype=torch.float32).view(-1, i+1), want[:, i, :i+1], atol=1e-3, rtol=0)
    figure.get_by_label('Layer', exact=True).select_option('2')
    figure.get_by_label('Head', exact=True).select_option('3')
    weights = attention_pattern(mini[0], record, 2)[0, 3, -1]
    rows = [o.split('\t') for o in figure.locator('tbody tr').all_inner_texts()]
    for row, best in zip(rows, weights.sort(descending=True).values.tolist(), strict=False):
        assert abs(float(row[2]) - best) < 1e-3 and abs(float(row[2]) - weights[int(row[1])]) < 1e-3


def test_next_tokens_are_those_of_python(opened, mini, source):
    text, ids = fresh(mini, source('next'), n=6)
    figure = opened('sampling', text)
    logits = mini[0](ids)[0, -1]
    torch.testing.assert_close(torch.tensor(figure.evaluate(REPORT)['logits']).softmax(-1), logits.softmax(-1), atol=1e-3, rtol=0)
    for temperature, top_p in ((1, 1), (.5, 1), (1.6, .6), (0, 1)):
        for label, value in (('Temperature', temperature), ('Top-p', top_p)):
            figure.get_by_label(label).evaluate('(o, v) => { o.value = v; o.dispatchEvent(new Event("input")) }', value)
        p = (logits/max(temperature, 1e-3)).softmax(-1)
        best, order = p.sort(descending=True)
        inside = best.cumsum(-1) - best < top_p
        inside[0] = True
        want = (best*inside/(best*inside).sum())[:10]
        end = time.monotonic() + 120
        while True:
            rows = [o.split('\t') for o in figure.locator('tbody tr').all_inner_texts()]
            error = max(abs(float(o[1]) - w) for o, w in zip(rows, want.tolist(), strict=True))
            if error < 1e-3 or time.monotonic() > end: break
        assert error < 1e-3, (temperature, top_p, rows, want)
        assert rows[0][0].replace('␣', ' ').replace('↵', '\n') == mini[1].decode([order[0].item()])


def test_cache_grows_and_shrinks(opened, mini):
    figure = opened('cache', 'The President of the United')
    ids, sizes = encode(mini, 'The President of the United'), figure.evaluate(REPORT)['cache']
    assert sizes == [sizes[0]*(i+1) for i in range(len(ids))] and sizes[0] in (6*80*4, 6*80*2)
    for name, n, kept in (('Next token', 1, 0), ('Take one back', 0, 0), ('Next token', 1, 0), ('Next token', 2, 1)):
        figure.evaluate('o => { o.report = null }')
        figure.get_by_role('button', name=name).click()
        figure.page.wait_for_function('o => o.report', arg=figure.element_handle())
        page = figure.evaluate(REPORT)
        assert len(page['ids']) == len(page['cache']) == len(ids) + n and page['kept'] == len(ids) + kept, name
    with torch.no_grad(): want = mini[0].generate(torch.tensor([ids]), max_new_tokens=2)[0].tolist()
    assert page['ids'] == want
    show(figure, 'The President was')
    assert figure.evaluate(REPORT)['kept'] == len(encode(mini, 'The President'))


def test_written(opened, mini):
    "Greedy tokens are Python's; their rate is shown, and depends on the machine"
    figure, text = opened('sampling'), 'Of the people, by the people'
    show(figure, text)
    figure.get_by_label('Temperature').evaluate('o => { o.value = 0; o.dispatchEvent(new Event("input")) }')
    figure.get_by_role('button', name='Write').click()
    figure.page.wait_for_function('o => o.written', arg=figure.element_handle())
    written = figure.evaluate('o => o.written')
    assert written['rate'] > 0
    with torch.no_grad(): want = mini[0].generate(torch.tensor([encode(mini, text)]), max_new_tokens=40, temperature=0.)[0].tolist()
    agree = next((i for i, (a, b) in enumerate(zip(written['ids'], want, strict=False)) if a != b), len(want))
    assert agree > len(encode(mini, text)) + 8, (written['ids'], want)  # later, equal scores may part them


def no_workers(page):
    "Whether the worker ends: the browser reports it a moment later"
    end = time.monotonic() + 120
    while page.workers and time.monotonic() < end: page.wait_for_timeout(20)
    return not page.workers


def test_memory_is_released(opened, window):
    "The worker ends with the last figure, and with the page"
    page = window()
    page.goto('/index.html')
    first, second = (opened(o, page=page) for o in ('experts', 'cache'))
    assert len(page.workers) == 1
    first.get_by_role('button', name='Close').click()
    assert len(page.workers) == 1
    second.get_by_role('button', name='Close').click()
    assert no_workers(page) and second.get_by_role('button', name='Run mini here').is_visible()
    opened('cache', page=page)
    page.goto('about:blank')
    assert no_workers(page)


@pytest.mark.parametrize('text, words', [('Four score and seven', None), ('state and union ' * 25, 'shorten it')])
def test_the_benchmark_uses_a_figure_as_a_reader_does(browser, folder, text, words):
    with served(folder) as (address, sent):
        if words:
            with pytest.raises(browsing.playwright.Error, match=words): figure_visit(browser, address, sent, 'sampling', text)
            return
        found = figure_visit(browser, address, sent, 'sampling', text)
    sizes = {o.name: o.stat().st_size for o in [folder/'index.html', *(folder/'live').iterdir()]}
    assert found['faults'] == [] and found['opening'] > 0 and found['answer'] > 0 and found['rate'] > 0 and found['tokens'] >= 4
    assert found['bytes'] == dict(before=sizes['index.html'] + sizes['live.js'], after=sum(sizes.values()))
    weights = sizes['mini.gguf']
    memory = found['memory']
    assert memory['open'] - memory['closed'] > weights and memory['again'] - memory['closed'] < weights and memory['left'] < memory['open']


def test_bad_input_is_said(opened):
    figure = opened('experts')
    figure.get_by_role('textbox').fill('state and union ' * 25)
    figure.get_by_role('button', name='Show').click()
    status = figure.get_by_role('status').filter(has_text='shorten it')
    status.wait_for()
    show(figure, 'state <b>and</b> union')  # and the figure goes on; text stays text
    assert figure.locator('b').count() == 0


def test_nothing_is_loaded_before_the_button(window):
    page, asked = window(), []
    page.on('request', lambda o: asked.append(o.url.rsplit('/', 1)[1]))
    page.goto('/index.html')
    page.get_by_role('button', name='Run mini here').first.wait_for()
    assert [o for o in asked if not o.startswith('data:') and 'base64' not in o] == ['index.html', 'live.js'], asked


def test_without_javascript_and_from_a_file(browser, url, folder):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f'{url}/index.html')
    for note in FIGURE_NOTES.values(): assert page.get_by_text(note).is_visible()
    assert page.get_by_role('button').count() == 0
    context.close()
    page, said = browser.new_page(), []
    page.on('console', lambda o: said.append(o.text))
    page.goto((folder/'index.html').as_uri())
    figure = page.locator('live-figure').first
    figure.get_by_role('button').click()
    assert 'python -m http.server' in figure.get_by_role('status').inner_text() and not said
    page.close()


def test_a_broken_download_is_said(browser, folder, tmp_path):
    shutil.copytree(folder, tmp_path/'page')
    for name in ('mini.gguf', 'runner.wasm'):
        (tmp_path/'page/live'/name).write_bytes(b'not what it was')
        server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Plain, directory=tmp_path/'page'))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        page.goto(f'http://127.0.0.1:{server.server_port}/index.html')
        figure = page.locator('live-figure').first
        figure.get_by_role('button').click()
        figure.get_by_role('status').filter(has_text='This figure could not start: ').wait_for()
        assert figure.get_by_role('button', name='Run mini here').is_enabled() and not page.workers
        page.close()
        server.shutdown()


@pytest.mark.parametrize('size, scheme', [(WIDE, 'light'), (NARROW, 'dark')], ids=['wide-light', 'narrow-dark'])
def test_accessible_and_within_the_window(window, opened, size, scheme):
    page = window(size, scheme)
    page.goto('/index.html')
    for kind in FIGURE_NOTES: opened(kind, page=page)
    page.faults.extend(page.evaluate(FAULTS))
    page.keyboard.press('Tab')
    token = page.locator('live-figure[data-show=experts] input[type=radio]').nth(1)
    token.focus()
    page.keyboard.press('ArrowRight')  # the tokens by keyboard alone
    assert page.locator('live-figure[data-show=experts] input[type=radio]').nth(2).is_checked()
    if AXE.exists():
        page.add_script_tag(path=AXE)
        for o in page.evaluate('axe.run({resultTypes: ["violations"]}).then(o => o.violations)'):
            if o['impact'] in ('serious', 'critical'): page.faults.extend(f'{o["id"]}: {node["html"][:120]}' for node in o['nodes'])


def test_pages_of_the_site(site):
    "Four chapters have a figure and the loader, and no other page loads it"
    for kind, name in PAGES.items(): assert f'<live-figure data-show="{kind}"' in (site/f'{name}.html').read_text()
    loading = {o.stem for o in site.glob('*.html') if 'src="live/live.js"' in o.read_text()}
    assert loading == {*PAGES.values()}
    facts = json.loads((site/'live/figures.js').read_text().split('MODEL = ')[1].split(';')[0])
    assert (site/'live'/facts['file']).stat().st_size == facts['bytes'] and (site/'live/live.js').stat().st_size < 3000


def test_the_module_is_made_from_the_sources(tmp_path, monkeypatch):
    "Its digest is that of the sources; where the compiler is, they compile to a module with the same interface, here without optimising"
    stored = read_wasm()
    try: find_clang()
    except FileNotFoundError as e: pytest.skip(str(e))
    if not Path('/usr/include/wasm32-wasi').exists(): pytest.skip('wasi-libc is absent: apt-get install wasi-libc')
    monkeypatch.setattr(wasm, 'WASM_FLAGS', (*wasm.WASM_FLAGS, '-O0'))
    made = dict(wasm_sections(read_wasm(compile_wasm(tmp_path/'runner.wasm'))))
    assert made['deepseek_nb.sources'] == dict(wasm_sections(stored))['deepseek_nb.sources']
    assert all(o.encode() in made['export'] for o in interface(wasm_sources()['runner.h']))

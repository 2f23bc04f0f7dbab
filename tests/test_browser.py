"The site in a real browser: every page, wide and narrow, light and dark, read and clicked through."
import os
import random
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import SEED

playwright = pytest.importorskip('playwright.sync_api', reason='playwright is absent: pip install playwright')
# The first is the same browser without its own windows and menus, and takes half of the time
CHROMIUM = next(filter(None, map(shutil.which, ('chromium-headless-shell', 'chromium', 'chromium-browser', 'google-chrome'))), None)
if not CHROMIUM: pytest.skip('chromium is absent: apt-get install chromium-headless-shell', allow_module_level=True)
AXE = Path(__file__).parents[1]/'.venv/axe/node_modules/axe-core/axe.min.js'
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking']
WIDE, NARROW = dict(width=1440, height=1000), dict(width=400, height=850)

# What a reader would see wrong on a page
FAULTS = r"""() => {
  const found = [], main = document.querySelector('main');
  const texts = document.createTreeWalker(main, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const o = texts.currentNode;
    const raw = /\$\$|\\\(|\\\[/.test(o.data) && !o.parentElement.closest('code, pre, .katex');
    if (raw) found.push('raw maths: ' + o.data.trim().slice(0, 60));
  }
  for (const o of main.querySelectorAll('.katex-error')) found.push('maths in error: ' + o.textContent.slice(0, 60));
  for (const o of main.querySelectorAll('.math:not(:has(.katex))')) found.push('maths not set: ' + o.textContent.slice(0, 60));
  for (const o of document.images) {
    if (!o.complete || !o.naturalWidth) found.push('picture not loaded: ' + o.src.slice(0, 60));
    if (!o.alt.trim()) found.push('picture without alternative text, near: ' + (o.closest('.cell')?.innerText || '').slice(0, 60));
  }
  const page = document.documentElement, known = new Map([[main, true]]);
  const cut = box => {  // whether what leaves this box at the right is seen by nobody
    if (!known.has(box)) known.set(box, !/auto|scroll|hidden/.test(getComputedStyle(box).overflowX) && cut(box.parentElement));
    return known.get(box);
  };
  if (page.scrollWidth > page.clientWidth) found.push(`the page scrolls sideways: ${page.scrollWidth} in ${page.clientWidth}`);
  for (const o of main.querySelectorAll('*')) {
    if (o.getBoundingClientRect().right <= page.clientWidth + 1 || o.closest('.katex')) continue;
    if (cut(o)) found.push(`cut off at the right: ${o.tagName} ${o.textContent.trim().slice(0, 60)}`);
  }
  return found;
}"""


class Quiet(SimpleHTTPRequestHandler):
    "One connection for many files, and those that all pages share are asked for once"
    protocol_version = 'HTTP/1.1'
    def log_message(self, *args): pass
    def end_headers(self):
        if '/site_libs/' in self.path: self.send_header('Cache-Control', 'max-age=3600')
        super().end_headers()


@pytest.fixture(scope='module')
def url(site):
    "The address of the site, served on loopback."
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def window(browser, url):
    "Opens a window; what goes wrong in it is collected in its `faults`, and any fault fails the test."
    contexts, faults = [], []
    def open(size=WIDE, scheme='light'):
        context = browser.new_context(viewport=size, color_scheme=scheme, base_url=url, permissions=['clipboard-read', 'clipboard-write'])
        context.set_default_timeout(120_000)  # a busy machine is no fault
        contexts.append(context)
        page = context.new_page()
        fault = lambda kind, what: faults.append(f'{page.url}: {kind}: {what}')
        page.on('console', lambda o: o.type in ('error', 'warning') and fault('console', o.text))
        page.on('pageerror', lambda o: fault('script', o))
        page.on('requestfailed', lambda o: 'ERR_ABORTED' in (o.failure or '') or fault('request failed', o.url))
        page.on('response', lambda o: o.status >= 400 and fault(o.status, o.url))
        page.on('request', lambda o: o.url.startswith(('data:', url)) or fault('another host', o.url))
        page.faults = faults
        return page
    yield open
    for o in contexts: o.close()
    if faults: pytest.fail('\n'.join(map(str, faults)), pytrace=False)


def names(site): return sorted(o.name for o in site.glob('*.html') if 'http-equiv="refresh"' not in o.read_text()[:1000])
def place(page): return urlsplit(page.url).path.strip('/') or 'index.html'


def follow(page, link):
    "Click a link, and wait for the page that it leads to."
    with page.expect_navigation(wait_until='domcontentloaded'): page.click(link)
    return place(page)


@pytest.fixture(scope='module')
def book(site):
    "The pages in the book's order, by `llms.txt`."
    links = [o.split('](')[1] for o in (site/'llms.txt').read_text().splitlines() if o.startswith('- [')]
    return [o.rstrip(')').replace('.llms.md', '.html') for o in links]


# Puts the text of another page into a page of the same template, which its scripts and styles must be
SWAP = """async name => {
  const page = new DOMParser().parseFromString(await (await fetch(name)).text(), 'text/html');
  const parts = o => [...o.querySelectorAll('script[src], link[rel=stylesheet]')].map(o => o.getAttribute('src') || o.getAttribute('href'));
  document.querySelector('main').replaceWith(page.querySelector('main'));
  await Promise.all([...document.querySelectorAll('main img')].map(o => o.decode().catch(() => {})));
  return `${parts(page)}` === `${parts(document)}`;
}"""
DARK = "document.documentElement.classList.contains('quarto-dark')"


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('size', [WIDE, NARROW], ids=['wide', 'narrow'])
def test_every_page(site, window, size, scheme):
    """A quarter of the pages, a sixth of them drawn for this run (all with EVERY=1): each opens as the last one stood, and turns to the
    other width; one in eight turns to the other theme too. Sources, pages of one template, don't turn, and of three in four only the text
    is put into another, three others in the next run."""
    page, start = window(size, scheme), 2*(size is WIDE) + (scheme == 'dark')
    sizes = [size, NARROW if size is WIDE else WIDE]
    own = names(site)[start::4]
    if not os.environ.get('EVERY'): own = sorted(random.Random(f'{SEED} {start}').sample(own, -(-len(own)//6)))
    for i, name in enumerate(own):
        if name.startswith('source.') and place(page).startswith('source.') and (i + SEED) % 4:
            assert page.evaluate(SWAP, name), f'{name} has other scripts or styles than {place(page)}'
            page.faults.extend(f'{name}: {o}' for o in page.evaluate(FAULTS))
            continue
        page.goto(f'/{name}')
        page.faults.extend(f'{name}: {o}' for o in page.evaluate(FAULTS))
        assert page.evaluate(DARK) == (scheme == 'dark'), f'{name} ignores the theme'
        if name.startswith('source.'): continue
        sizes.reverse()
        page.set_viewport_size(sizes[0])
        if i % 8 == 0:
            scheme = dict(light='dark', dark='light')[scheme]
            page.emulate_media(color_scheme=scheme)
            page.wait_for_function(f'{DARK} === {"true" if scheme == "dark" else "false"}')
        page.faults.extend(f'{name}, turned: {o}' for o in page.evaluate(FAULTS))


# Of each page the addresses of its links to the next page and the previous one, as they are written, and which pages its sidebar lacks
READ = """names => Promise.all(names.map(async name => {
  const page = new DOMParser().parseFromString(await (await fetch(name)).text(), 'text/html');
  const links = part => [...page.querySelectorAll(part + ' a[href]')].map(o => o.getAttribute('href').replace(/^\\.\\//, ''));
  const found = new Set(links('#quarto-sidebar'));
  return {next: links('.nav-page-next'), previous: links('.nav-page-previous'), lacks: names.filter(o => !found.has(o))};
}))"""


@pytest.fixture(scope='module')
def links(browser, url, book):
    "What `READ` finds, as reading 200 pages takes seconds"
    page = browser.new_page(base_url=url)
    page.goto('/')
    found = page.evaluate(READ, book)
    page.close()
    return found


def test_next_walks_the_book_and_previous_goes_back(book, links, window):
    assert [o['next'] for o in links] == [[o] for o in book[1:]] + [[]]
    assert [o['previous'] for o in links] == [[]] + [[o] for o in book[:-1]]
    page = window()
    page.goto(f'/{book[0]}')
    for name in book[1:6]: assert follow(page, '.nav-page-next a') == name
    assert follow(page, '.nav-page-previous a') == book[4]


def go(page, name):
    "Follow a link of the sidebar, the sections around it opened first, from outside to inside."
    sections = page.locator('#quarto-sidebar .sidebar-item-section', has=page.locator(f'a[href="{name}"]'))
    for section in sections.all():
        if not section.locator(':scope > ul').is_visible():
            section.locator('a.sidebar-item-toggle').first.click()
            section.locator(':scope > ul.show').wait_for() # open, not opening: a click on what moves may miss
    return follow(page, f'#quarto-sidebar a[href="{name}"]')


def test_sidebar_reaches_every_page(book, links, window):
    assert not {name: o['lacks'] for name, o in zip(book, links, strict=True) if o['lacks']}
    page = window()
    page.goto('/')
    print(f'SEED={SEED}')
    for name in book[1 + SEED % 48::48]: assert go(page, name) == name


def test_sidebar_folds_by_mouse_and_keyboard(window):
    "Only the current part stands open, and another one opens and shuts without a mouse."
    page = window()
    page.goto('/arch.rope.html')
    link = page.locator('#quarto-sidebar a[href$="quant.int8.html"]')
    playwright.expect(page.locator('#quarto-sidebar a[href$="arch.cache.html"]')).to_be_visible()
    playwright.expect(link).to_be_hidden()
    part = page.get_by_role('button', name='Make it fast')
    part.focus()
    page.keyboard.press('Enter')
    playwright.expect(link).to_be_visible()
    page.wait_for_timeout(500) # a section that is still opening can't shut
    page.keyboard.press('Space')
    playwright.expect(link).to_be_hidden()
    page.wait_for_timeout(500)
    part.click()
    playwright.expect(link).to_be_visible()


def test_an_old_address_leads_on_with_its_anchor(window):
    page = window()
    page.goto('/quant.cache.html#quantizedcache')
    page.wait_for_url('**/infer.quant_cache.html#quantizedcache')


def test_front_page_shows_before_it_tells(window):
    "The first screen holds the picture, the chart and the way to the paths, on a usual screen."
    page = window(dict(width=1280, height=900))
    page.goto('/')
    for part in ('.way svg', '.rates svg', '.starts a >> nth=0', '.starts a >> nth=2'):
        playwright.expect(page.locator(part)).to_be_in_viewport(ratio=.6)
    assert follow(page, '.way a[href$="arch.cache.html"]') == 'arch.cache.html'


def test_imports_are_folded(window):
    page = window()
    page.goto('/arch.cache.html')
    fold = page.locator('details.code-fold', has_text='imports').first
    assert not fold.get_attribute('open') and fold.locator('code').is_hidden()
    fold.locator('summary').click()
    playwright.expect(fold.locator('code')).to_contain_text('import')


def test_a_term_leads_to_its_entry(window):
    page = window()
    page.goto('/arch.cache.html')
    assert follow(page, 'a.term[href$="#gqa"]') == 'glossary.html'
    playwright.expect(page.locator('#gqa')).to_contain_text('grouped-query')


def test_sidebar_opens_in_a_narrow_window(book, window):
    page = window(NARROW)
    page.goto('/')
    for name in (book[1], book[len(book)//2], book[-1], book[0]):
        page.click('.quarto-btn-toggle')
        page.locator('#quarto-sidebar.show').wait_for()
        assert go(page, name) == name


def test_search_finds_a_symbol(window):
    page = window()
    page.goto('/index.html')
    page.fill('#quarto-search input', 'route')
    page.click('.search-result[href$="arch.routing.html#route"]')
    page.wait_for_url('**/arch.routing.html#route')
    heading = page.locator('[data-anchor-id="route"]')
    playwright.expect(heading).to_contain_text('route')
    playwright.expect(heading).to_be_in_viewport()


def test_source_is_a_click_away(window):
    page = window()
    page.goto('/arch.attention.html#attend')
    assert follow(page, 'a.source >> nth=0') == 'source.arch.attention.html'
    anchor = urlsplit(page.url).fragment
    assert 'def ' in page.locator(f'#{anchor}').inner_text() or 'class ' in page.locator(f'#{anchor}').inner_text()


def test_copy_button_copies(window):
    page = window()
    page.goto('/arch.attention.html')
    block = page.locator('.code-copy-outer-scaffold').nth(1)
    block.hover()
    block.locator('.code-copy-button').click()
    block.locator('.code-copy-button-checked').wait_for()
    assert page.evaluate('navigator.clipboard.readText()').strip() == block.locator('pre code').inner_text().strip()
    assert page.locator('main pre.sourceCode').count() == page.locator('main .code-copy-button').count()


def test_theme_is_kept(window):
    page = window()
    background = lambda: page.wait_for_timeout(100) or page.evaluate('getComputedStyle(document.body).backgroundColor')
    page.goto('/index.html')
    light = background()
    page.click('.quarto-color-scheme-toggle')
    dark = background()
    assert dark != light
    page.reload()
    assert background() == dark
    page.goto('/arch.cache.html')
    assert background() == dark
    page.click('.quarto-color-scheme-toggle')
    assert background() == light


def test_wide_formulas_scroll_with_the_keyboard(window):
    "On a phone's width a wide formula has a name, takes the focus and scrolls with an arrow key; one that fits is no stop"
    page = window(NARROW)
    page.goto('/arch.attention.html')
    page.wait_for_selector('.katex-display[tabindex="0"][role="group"][aria-label]').focus()
    page.keyboard.press('ArrowRight')
    page.wait_for_function('document.activeElement.matches(".katex-display") && document.activeElement.scrollLeft > 0')
    stops = lambda: page.wait_for_function("""[...document.querySelectorAll(".katex-display")].every(
        o => (o.scrollWidth > o.clientWidth) === o.hasAttribute("tabindex"))""")
    stops(), page.set_viewport_size(WIDE), stops()


FORMS = dict(light=('light', WIDE), dark=('dark', WIDE), narrow=('light', NARROW))


@pytest.mark.skipif(not AXE.exists(), reason='axe-core is absent: .ci/run puts it into .venv')
@pytest.mark.parametrize('form', FORMS)
def test_accessible(window, form):
    "Each of these pages in one form, drawn for this run; in all three with EVERY=1"
    names = random.Random(SEED).sample(own := ['index', 'contents', 'glossary', 'arch.attention', 'arch.routing', 'arch.cache'], 6)
    scheme, size = FORMS[form]
    page = window(size, scheme)
    for name in own if os.environ.get('EVERY') else names[[*FORMS].index(form)::3]:
        page.goto(f'/{name}.html')
        page.add_script_tag(path=AXE)
        for o in page.evaluate('axe.run({resultTypes: ["violations"]}).then(o => o.violations)'):
            if o['impact'] not in ('serious', 'critical'): continue
            page.faults.extend(f'{name}: {o["id"]}: {node["html"][:120]} {node["failureSummary"][:160]}' for node in o['nodes'])

"""The server's chat page in a real browser: it streams, stops, stays within the window, and loads nothing from elsewhere."""
import pytest
from test_browser import CHROMIUM, FLAGS
from test_server import Live


@pytest.fixture(scope='module')
def live():
    live = Live()
    yield live
    live.stop()


@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.mark.parametrize('scheme, width', [('light', 1000), ('dark', 360)])
def test_chat(live, chromium, scheme, width):
    page = chromium.new_page(color_scheme=scheme, viewport=dict(width=width, height=640))
    errors, hosts = [], []
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('request', lambda r: hosts.append(r.url.split('/')[2]))
    page.goto(f'http://127.0.0.1:{live.port}/')
    page.fill('#text', 'The Congress of the United States')
    page.keyboard.press('Enter')
    page.wait_for_selector('article.assistant small:not(:empty)', timeout=60_000)
    figures = page.inner_text('article.assistant small')
    assert 'tokens' in figures and 'prompt tokens cached' in figures, figures
    assert page.inner_text('article.assistant div:not(:empty)') and page.inner_text('article.user') == 'The Congress of the United States'
    assert page.locator('main').bounding_box()['width'] <= width
    page.click('#clear')
    assert page.locator('article').count() == 0
    assert not errors and {*hosts} == {f'127.0.0.1:{live.port}'}
    page.close()


def test_stop(live, chromium):
    "Escape ends the answer in the browser, and in the engine."
    page = chromium.new_page()
    page.goto(f'http://127.0.0.1:{live.port}/')
    page.fill('#text', 'The Congress')
    page.keyboard.press('Enter')
    page.wait_for_selector('article.assistant div:not(:empty)', timeout=60_000)
    page.keyboard.press('Escape')
    page.wait_for_selector('article.assistant small:not(:empty)')
    live.idle()
    assert page.inner_text('#send') == 'Send'
    page.close()

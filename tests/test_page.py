"""The server's chat page in a real browser: it streams, stops, stays within the window, and loads nothing from elsewhere."""
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_browser import AXE, CHROMIUM, FLAGS
from test_server import HI, Live

from deepseek_nb.serve.page import _ONE, chosen_experts


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
    assert page.inner_text('article.assistant > div:not(:empty)')
    assert page.inner_text('article.user > div') == 'The Congress of the United States'
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


TEXT = """# Head
A **bold** word, *slanted*, `a < b`, [a link](https://example.org/a) and [none](javascript:alert(1)).
<img src=x onerror="window.hit = 1"> <script>window.hit = 1</script>

1. one
2. two
- point

> said

| a | b |
|---|:-:|
| 1 | `2` |

```python
print("<b>")
"""


def test_markdown_is_safe_and_settings_are_sent_if_set(live, chromium):
    "An answer of Markdown and HTML; edit, regenerate, settings, an attachment, a second conversation, and all of it after a reload"
    page, errors, bodies = chromium.new_page(), [], []
    page.on('pageerror', lambda e: errors.append(str(e)))
    page.on('console', lambda m: m.type == 'error' and errors.append(m.text))
    def reply(route):
        bodies.append(json.loads(route.request.post_data))
        chunks = [dict(choices=[dict(delta=dict(reasoning_content='Hm.'))]), *[dict(choices=[dict(delta=dict(content=c))]) for c in TEXT]]
        usage = dict(completion_tokens=3, prompt_tokens=5, prompt_cache_hit_tokens=1)
        lines = [*chunks, dict(choices=[dict(delta={})], usage=usage)]
        route.fulfill(content_type='text/event-stream', body=''.join(f'data: {json.dumps(c)}\n\n' for c in lines) + 'data: [DONE]\n\n')
    page.route('**/chat/completions', reply)
    ask = lambda text: (page.fill('#text', text), page.keyboard.press('Enter'), page.wait_for_selector('small:not(:empty)'))
    page.goto(f'http://127.0.0.1:{live.port}/')
    assert 'Ask something' in page.inner_text('#log')
    ask('first')
    assert {*bodies[0]} == {'model', 'messages', 'stream', 'return_token_ids'}
    assert bodies[0]['messages'] == [dict(role='user', content='first')]
    found = page.evaluate("[...document.querySelectorAll('article.assistant > div *')].map(e => e.localName).join(' ')")
    assert found == 'strong p strong em code a ol li li ul li blockquote table tr th th tr td td code div button pre code', found
    assert page.get_attribute('article a', 'href') == 'https://example.org/a' and page.inner_text('pre') == 'print("<b>")\n'
    assert page.evaluate('window.hit') is None and '<img src=x' in page.inner_text('article.assistant')
    assert page.inner_text('article.assistant summary') == 'Reasoning' and not page.is_visible('details > div:has-text("Hm.")')
    page.click('summary:has-text("Settings")')
    page.fill('[data-setting=system]', 'Be brief.')
    page.fill('[data-setting=temperature]', '0.3')
    page.click('button:has-text("Regenerate")')
    page.wait_for_selector('small:not(:empty)')
    assert bodies[1]['temperature'] == .3
    assert bodies[1]['messages'] == [dict(role='system', content='Be brief.'), dict(role='user', content='first')]
    page.click('button:has-text("Edit")')
    page.fill('article textarea', 'second')
    page.click('article button:has-text("Send")')
    page.wait_for_selector('small:not(:empty)')
    assert [m['content'] for m in bodies[2]['messages']] == ['Be brief.', 'second'] and page.locator('article').count() == 2
    page.set_input_files('#files', [dict(name='a.txt', mimeType='text/plain', buffer=b'inside')])
    page.wait_for_function('document.getElementById("text").value')
    assert page.input_value('#text') == '\na.txt:\n```\ninside\n```\n'
    page.click('#clear')
    assert page.locator('article').count() == 0 and page.input_value('[data-setting=temperature]') == ''
    page.reload()
    page.select_option('#chats', label='second')
    assert page.locator('article').count() == 2 and page.input_value('[data-setting=system]') == 'Be brief.' and len(bodies) == 3
    page.click('#remove')
    assert page.evaluate('localStorage.getItem("deepseek_nb.chats")') == '[]' and not errors, errors
    page.close()


def post(live, path, **body):
    data = json.dumps(dict(model='mini') | body).encode()
    request = urllib.request.Request(f'http://127.0.0.1:{live.port}{path}', data, {'content-type': 'application/json'})
    try:
        with urllib.request.urlopen(request, timeout=60) as r: return json.loads(r.read())
    except urllib.error.HTTPError as error: return json.loads(error.read())['error']


def test_experts_of_an_answer(live):
    "The ids of an answer, their experts, and an answer that comes at the same time stays as it was"
    ask = dict(messages=HI, max_tokens=24, temperature=0, return_token_ids=True)
    answer = post(live, '/v1/chat/completions', **ask)
    ids, prompt = answer['choices'][0]['token_ids'], answer['prompt_token_ids']
    assert len(ids) == answer['usage']['completion_tokens'] and len(prompt) == answer['usage']['prompt_tokens']
    stream = live.client().chat.completions.create(model='mini', messages=HI, max_tokens=24, temperature=0, stream=True,
                                                   extra_body=dict(return_token_ids=True))
    chunks = iter(stream)
    first = next(chunks)
    assert first.prompt_token_ids == prompt
    report = post(live, '/v1/experts', tokens=prompt + ids, last=len(ids))
    rest = list(chunks)
    assert [t for c in rest for t in c.choices[0].token_ids] == ids and all(not hasattr(c, 'prompt_token_ids') for c in rest)
    assert ''.join(c.choices[0].delta.content or '' for c in rest) == answer['choices'][0]['message']['content']
    want = chosen_experts(live.engine.model, prompt + ids)
    assert report['layers'] == [*want] and report['n_experts'] == 32 and len(report['tokens']) == len(ids)
    for row, (layer, r) in enumerate(want.items()):
        for token, experts in zip(report['tokens'], r.experts[-len(ids):].tolist(), strict=True):
            assert {*token['experts'][row]} == {*experts}, layer
    assert 'token_ids' not in post(live, '/v1/chat/completions', messages=HI, max_tokens=1)['choices'][0]
    for body, said in ((dict(), 'tokens'), (dict(tokens=['a']), 'must be ids'), (dict(tokens=[1]*513), 'is 512')):
        assert said in post(live, '/v1/experts', **body)['message']


def test_experts_have_a_limit_of_their_own(live):
    "Four requests wait for one another, the fifth is refused at once, and answers go on; then there is room again"
    ask = lambda: post(live, '/v1/experts', tokens=[1, 2])
    with ThreadPoolExecutor(4) as pool:
        with _ONE:
            waiting = [pool.submit(ask) for _ in range(4)]
            end = time.monotonic() + 30
            while live.server.reports < 4 and time.monotonic() < end: time.sleep(.01)
            refused = ask()
            assert (refused['type'], 'too many' in refused['message']) == ('rate_limit_error', True)
            assert post(live, '/v1/chat/completions', messages=HI, max_tokens=1)['usage']['completion_tokens'] == 1
            assert not any(w.done() for w in waiting)
        assert all(w.result(30)['object'] == 'experts' for w in waiting)
    assert ask()['object'] == 'experts' and live.server.reports == 0


def test_the_tokenizer_for_harnesses(live):
    "What lm-evaluation-harness asks before it scores over HTTP: no model is named, and the end token is one token"
    with urllib.request.urlopen(f'http://127.0.0.1:{live.port}/tokenizer_info', timeout=60) as r: info = json.loads(r.read())
    assert info['chat_template'] == live.tok.chat_template and info['model_max_length'] == 512
    data = json.dumps(dict(prompt=info['eos_token'] + 'a', add_special_tokens=False)).encode()
    request = urllib.request.Request(f'http://127.0.0.1:{live.port}/tokenize', data, {'content-type': 'application/json'})
    with urllib.request.urlopen(request, timeout=60) as r: assert json.loads(r.read())['tokens'][0] == live.tok.eos_ids[0]
    assert post(live, '/tokenize', prompt='a', add_special_tokens=True)['tokens'] == [live.tok.bos_id, *live.tok.encode('a')]


@pytest.mark.skipif(not AXE.exists(), reason='axe-core is absent: .ci/run puts it into .venv')
@pytest.mark.parametrize('scheme, width', [('light', 360), ('dark', 1000)])
def test_experts_and_access(live, chromium, scheme, width):
    "With the keyboard alone: ask, open the experts, go through the tokens; and axe finds nothing before and after"
    page = chromium.new_page(color_scheme=scheme, viewport=dict(width=width, height=640))
    faults = lambda: page.evaluate('axe.run({resultTypes: ["violations"]}).then(o => o.violations.map(v => v.id + ": " + v.nodes[0].html))')
    page.goto(f'http://127.0.0.1:{live.port}/')
    page.evaluate(AXE.read_text())
    assert not faults()
    page.keyboard.type('The Congress')
    page.keyboard.press('Enter')
    page.locator('article.assistant > div', has_text=re.compile(r'\w\W+\w+\W+\w')).first.wait_for(timeout=60_000) # several tokens
    page.keyboard.press('Escape')
    page.wait_for_selector('button.experts', timeout=60_000)
    page.focus('button.experts')
    page.keyboard.press('Enter')
    page.wait_for_selector('figure output:not(:empty)', timeout=60_000)
    assert 'experts' in page.inner_text('figure output') and '5 layers of 32' in page.inner_text('figure output')
    assert page.evaluate('document.activeElement.type') == 'range'
    page.keyboard.press('ArrowRight')
    assert page.inner_text('figure output').count('layer') == 5 and page.inner_text('figure output').startswith('"')
    drawn = 'c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data].filter((v, i) => i % 4 == 3 && v == 255).length'
    assert page.eval_on_selector('figure canvas', drawn) == 5*6
    assert not faults()
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    page.close()

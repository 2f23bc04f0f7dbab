"""Ollama's own Python package, unmodified, against a live server: chats, texts, tools, thoughts, schemas, lists and errors."""
import json

import pytest
from test_clients import SAID, Reporter
from test_server import HI, Live

ollama = pytest.importorskip('ollama')
GREEDY = dict(temperature=0, num_predict=8)
CITY = dict(type='object', properties=dict(city=dict(type='string')))
TOOL = dict(type='function', function=dict(name='weather', description='', parameters=CITY))


@pytest.fixture(scope='module')
def live():
    live = Live()
    live.server.models['script'] = Reporter('script', live.engine, live.tok, 'v4')
    live.ollama = ollama.Client(host=f'http://127.0.0.1:{live.port}')
    yield live
    live.stop()


def test_chat_and_generate_say_what_the_chat_api_says(live):
    want = live.client().chat.completions.create(model='mini', messages=HI, temperature=0, max_tokens=8)
    whole = live.ollama.chat('mini:latest', HI, options=GREEDY, keep_alive='5m')
    parts = [*live.ollama.chat('mini', HI, options=GREEDY, stream=True)]
    texts = [*live.ollama.generate('mini', HI[0]['content'], options=GREEDY, stream=True)]
    assert want.choices[0].message.content == whole.message.content == ''.join(p.message.content for p in parts)
    text = live.ollama.generate('mini', HI[0]['content'], options=GREEDY).response
    assert ''.join(t.response for t in texts) == text == whole.message.content
    assert [p.done for p in parts] == [False]*(len(parts) - 1) + [True]
    for last in (whole, parts[-1], texts[-1]):
        assert (last.done_reason, last.eval_count, last.prompt_eval_count) == ('length', 8, want.usage.prompt_tokens)
        assert last.total_duration >= last.eval_duration > 0
    assert live.ollama.generate('mini').done_reason == live.ollama.chat('mini').done_reason == 'load'
    live.idle()


def test_tools_thoughts_and_schemas(live):
    for stream in (False, True):
        ask = dict(role='user', content='How warm is it?')
        found = live.ollama.chat('script', [ask], tools=[TOOL], think=True, stream=stream)
        parts = [*found] if stream else [found]
        calls = [c for p in parts for c in p.message.tool_calls or ()]
        assert [(c.function.name, c.function.arguments) for c in calls] == [('weather', dict(city='Köln'))]
        assert ''.join(p.message.thinking or '' for p in parts) == 'Hm, 🤔 let\nme.'
        assert ''.join(p.message.content for p in parts).strip() == 'I look.'
        talk = [ask, dict(role='assistant', tool_calls=[dict(function=dict(c.function)) for c in calls]),
                dict(role='tool', tool_name='weather', content='18 °C')]
        assert live.ollama.chat('script', talk, tools=[TOOL]).message.content == SAID
    schema = dict(type='object', properties=dict(n=dict(type='integer', maximum=99)), required=['n'], additionalProperties=False)
    assert json.loads(live.ollama.chat('mini', HI, format=schema).message.content)['n'] <= 99


def test_lists_and_errors(live):
    assert {m.model for m in live.ollama.list().models} == {m.model for m in live.ollama.ps().models} == {'mini', 'script'}
    shown = live.ollama.show('mini')
    assert shown.details.family == 'deepseek_v3' and shown.modelinfo['deepseek_v3.context_length'] == 512
    image = [dict(role='user', content='x', images=['aGk='])]
    for call, status, said in ((lambda: live.ollama.chat('none', HI), 404, 'not served'),
                               (lambda: live.ollama.pull('none'), 404, 'no route'),
                               (lambda: live.ollama.chat('mini', HI, options=dict(temperature=-1)), 400, 'temperature'),
                               (lambda: live.ollama.chat('mini', image), 400, 'text only')):
        with pytest.raises(ollama.ResponseError, match=said) as error: call()
        assert error.value.status_code == status
    assert live.ollama.chat('mini', HI, options=GREEDY | dict(num_ctx=4096)).eval_count == 8 # what steers memory is ignored

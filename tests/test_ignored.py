"""Requests as coding agents and load generators send them: what the server can't honour is ignored and named

What would change an answer's meaning is refused. The bodies are shortened; one has a web search added,
and guidellm's is written from its fields.

The bodies are shortened from those that Codex's, Claude Code's and @ai-sdk/anthropic's packages sent on 2026-12-02."""
import json

import pytest
from test_server import HI, JSON, Live

V31 = 'deepseek-v3.1'
PROPERTIES = dict(type='object', properties=dict(cmd=dict(type='string')), required=['cmd'], additionalProperties=False)
CODEX = dict(
    model='mini', stream=True, tool_choice='auto', parallel_tool_calls=True, reasoning=dict(summary='auto'), store=False,
    include=['reasoning.encrypted_content'], prompt_cache_key='01a2390c-dc2b',
    client_metadata={'session_id': '01a2', 'x-codex-window-id': '01a2:0'},
    input=[dict(type='message', id='msg_1', role='developer', content=[dict(type='input_text', text='You are a coding agent.')]),
           dict(type='message', id='msg_2', role='user', content=[dict(type='input_text', text='hi')])],
    tools=[dict(type='function', name='exec_command', description='Runs', strict=False, parameters=PROPERTIES),
           dict(type='namespace', name='multi_agent_v1', description='', tools=[]), dict(type='web_search', external_web_access=False)])
CLAUDE = dict(
    model='mini', max_tokens=32000, stream=True, thinking=dict(type='adaptive'), output_config=dict(effort='high'),
    context_management=dict(edits=[dict(type='clear_thinking_20251015', keep='all')]), metadata=dict(user_id='{"device_id":"7d21"}'),
    system=[dict(type='text', text='x-anthropic-billing-header'), dict(type='text', text='You are', cache_control=dict(type='ephemeral'))],
    messages=[dict(role='user', content=[dict(type='text', text='hi')]), dict(role='system', content='Available agent types')],
    tools=[dict(name='Bash', description='Runs', input_schema=PROPERTIES), dict(type='web_search_20250305', name='web_search')])
OF_BOTH = 'stream', 'stream_options', 'logit_bias', 'temperature'  # fields of both kinds of completions
GUIDELLM = dict(model='mini', messages=HI, stream=True, stream_options=dict(include_usage=True, continuous_usage_stats=True),
                max_completion_tokens=40, max_tokens=40, ignore_eos=True, stop=None)
SDK = dict(model='mini', max_tokens=4096, messages=[dict(role='user', content=[dict(type='text', text='hi')])])


@pytest.fixture(scope='module')
def live():
    live = Live()
    live.tok.chat_template = V31
    live.server.models['mini'].format = 'v31'
    yield live
    live.stop()


def ask(live, path, body):
    "Status, the header, and the text of the answer"
    data = json.dumps(body).encode()
    raw = live.raw(f'POST {path} HTTP/1.1\r\n{JSON}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n'.encode() + data)
    head, _, text = raw.partition(b'\r\n\r\n')
    lines = dict(line.lower().split(': ', 1) for line in head.decode().split('\r\n')[1:])
    return int(head.split()[1]), [n for n in lines.get('x-ignored-fields', '').split(', ') if n], text.decode()


def small(body, name): return body | {name: 5}


@pytest.mark.parametrize('path, body, ignored', [
    ('/v1/responses', small(CODEX, 'max_output_tokens'), ['tools[1]', 'tools[2]', 'client_metadata']),
    ('/v1/messages', CLAUDE, ['tools[1]', 'context_management', 'thinking', 'max_tokens']),
    ('/v1/messages', small(SDK, 'max_tokens'), []),
    ('/v1/chat/completions', GUIDELLM, []),
    ('/v1/chat/completions', dict(model='mini', messages=HI, max_tokens=3, top_k=-1, store=True, verbosity='low',
                                  chat_template_kwargs=dict(enable_thinking=False, colour=1)),
     ['store', 'verbosity', 'chat_template_kwargs.colour']),
    ('/v1/completions', dict(model='mini', prompt='The', max_tokens=3, min_tokens=2), [])])
def test_what_is_ignored_is_named(live, path, body, ignored):
    "In the header and in a counter; a strict server names the first as an error"
    status, named, text = ask(live, path, body)
    assert status == 200 and sorted(named) == sorted(ignored), text
    metrics = live.server.metrics.text()
    for name in ignored: assert f'deepseek_nb:ignored_fields_total{{field="{name.replace("1", "").replace("2", "")}"}}' in metrics
    live.server.config.strict = True
    try: assert ask(live, path, body)[0] == (400 if ignored else 200)
    finally: live.server.config.strict = False


@pytest.mark.parametrize('path, more, part', [
    ('/v1/chat/completions', dict(modalities=['audio']), 'modalities'), ('/v1/chat/completions', dict(functions=[]), 'functions'),
    ('/v1/chat/completions', dict(guided_json={}), 'guided_json'),
    ('/v1/chat/completions', dict(tool_choice='required'), 'tool_choice'),
    ('/v1/chat/completions', dict(response_format=dict(type='xml')), 'type'),
    ('/v1/chat/completions', dict(messages=[dict(role='user', content=[dict(type='image_url', image_url=dict(url='x'))])]), 'type'),
    ('/v1/responses', dict(conversation='c', input='hi', messages=None), 'conversation')])
def test_what_changes_the_meaning_is_refused(live, path, more, part):
    status, _, text = ask(live, path, dict(model='mini', messages=HI, max_tokens=3) | more)
    assert status == 400 and part in json.loads(text)['error']['param']


@pytest.mark.parametrize('path', ['/v1/chat/completions', '/v1/completions'])
def test_an_answer_goes_on_behind_its_end(live, path):
    "`ignore_eos` where the end token is certain, and the usage in every chunk"
    end = live.engine.ends[0]
    body = dict(GUIDELLM, logit_bias={str(end): 100}, temperature=0)
    if path == '/v1/completions': body = dict(model='mini', prompt='The', max_tokens=40) | {k: v for k, v in body.items() if k in OF_BOTH}
    for ignored, want in ((True, 40), (False, 1)):
        status, _, text = ask(live, path, body | dict(ignore_eos=ignored))
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {')]
        assert status == 200 and all(c['usage'] for c in chunks)
        assert chunks[-1]['usage']['completion_tokens'] == want


def test_a_limit_for_those_who_name_none(live):
    "It is told in the list of models, and kept"
    card, = live.client().models.list().data
    assert card.default_max_tokens == min(2048, card.max_model_len)
    live.server.models['mini'].default_max_tokens = 7
    try: status, _, text = ask(live, '/v1/chat/completions', dict(model='mini', messages=HI, ignore_eos=True))
    finally: live.server.models['mini'].default_max_tokens = 2048
    assert json.loads(text)['usage']['completion_tokens'] == 7 and json.loads(text)['choices'][0]['finish_reason'] == 'length'

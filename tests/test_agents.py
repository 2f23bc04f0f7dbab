"""Requests as coding agents and load generators send them, in the form that they had on the wire; only texts and tools are shorter.

Recorded from Codex 0.171.0 and Claude Code 2.1.197, which both showed the answers and the errors of this server."""
import pytest
from test_server import Live, post

CACHED = dict(cache_control=dict(type='ephemeral'))
WORD = dict(type='object', properties=dict(cmd=dict(type='string')), required=['cmd'], additionalProperties=False)


def said(text): return [dict(type='input_text', text=text)]


CODEX = dict(
    input=[dict(type='message', id='msg_1', role='developer', content=said('You are a coding agent.')),
           dict(type='message', id='msg_2', role='developer', content=said('Skills') + said('Permissions')),
           dict(type='message', id='msg_3', role='user', content=said('Say hello'))],
    tools=[dict(type='function', name='exec_command', description='Runs a command', strict=False, parameters=WORD),
           dict(type='namespace', name='multi_agent_v1', description='Agents', tools=[
               dict(type='function', name='close_agent', description='Closes', strict=False, parameters=WORD)]),
           dict(type='web_search', external_web_access=False)],
    tool_choice='auto', parallel_tool_calls=True, reasoning=dict(summary='auto'), store=False, include=['reasoning.encrypted_content'],
    prompt_cache_key='01a23a52', client_metadata={'turn_id': '1', 'x-codex-turn-metadata': '{"session_id": "1"}'})
CLAUDE = dict(
    system=[dict(type='text', text='x-header: 1;'), dict(type='text', text='You are an agent.', **CACHED)],
    messages=[dict(role='user', content=[dict(type='text', text='A reminder'), dict(type='text', text='Say hello', **CACHED)]),
              dict(role='system', content='Types of agents')],
    tools=[dict(name='Bash', description='Runs', input_schema={'$schema': 'https://json-schema.org/draft/2020-12/schema', **WORD}),
           dict(type='web_search_20250305', name='web_search', max_uses=8)],
    metadata=dict(user_id='{"device_id": "1"}'), max_tokens=32_000, thinking=dict(type='adaptive'), output_config=dict(effort='high'),
    context_management=dict(edits=[dict(type='clear_thinking_20251015', keep='all')]))
GUIDELLM = dict(messages=[dict(role='user', content=[dict(type='text', text='Hello')])], max_completion_tokens=4, max_tokens=4,
                ignore_eos=True, stop=None, stream_options=dict(include_usage=True, continuous_usage_stats=True))
ASKED = {'/v1/responses': (CODEX, 'tools[1], tools[2], client_metadata'), '/v1/messages?beta=true': (CLAUDE, ''),
         '/v1/chat/completions': (GUIDELLM, '')}
IGNORED = {'/v1/messages?beta=true': {'tools[1]', 'context_management', 'thinking', 'max_tokens'}}


@pytest.fixture(scope='module')
def live():
    live = Live(default_max_tokens=8)
    yield live
    live.stop()


@pytest.mark.parametrize('path', ASKED)
def test_an_agent_gets_an_answer(live, path):
    "Streamed, and the header names what it did without"
    import http.client
    import json
    body, ignored = ASKED[path]
    link = http.client.HTTPConnection('127.0.0.1', live.port, timeout=60)
    link.request('POST', path, json.dumps(body | dict(model='mini', stream=True)), {'content-type': 'application/json'})
    answer = link.getresponse()
    text = answer.read().decode()
    assert answer.status == 200, text
    names = {*filter(None, (answer.headers['x-ignored-fields'] or '').split(', '))}
    assert names == IGNORED.get(path, {*filter(None, ignored.split(', '))})
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {')]
    last = events[-1]
    assert last.get('type') in ('response.incomplete', 'response.completed', 'message_stop') or last['usage']['completion_tokens'] == 4
    if path.endswith('completions'): assert all(e['usage'] for e in events)


def test_a_prompt_beyond_the_context(live):
    "Each says so in the words by which its agent knows it, before the text is cut into tokens"
    status, answer = post(live, CODEX | dict(model='mini', instructions='word '*20_000), '/v1/responses')
    assert status == 400 and answer['error']['code'] == 'context_length_exceeded'
    status, answer = post(live, CLAUDE | dict(model='mini', system='word '*20_000), '/v1/messages')
    assert status == 400 and answer['error']['message'].startswith('prompt is too long: ')

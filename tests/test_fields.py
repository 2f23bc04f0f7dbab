"""No field is ignored in silence: every field of the packages' own request types is sent, with values of each of its types.

It works, which is that the prompt, the settings or the response differ, or a 400 names it."""
import copy
import re
import types
import typing
from collections.abc import Iterable, Mapping
from functools import reduce
from importlib import import_module
from types import SimpleNamespace

import pytest
import typing_extensions as te

from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.infer.request import Request, Stream
from deepseek_nb.serve.anthropic import MessagesRun, read_anthropic
from deepseek_nb.serve.chat import Answer, ApiError, ServedModel
from deepseek_nb.serve.completions import ChatRun, read_chat
from deepseek_nb.serve.events import Splitter
from deepseek_nb.serve.responses import ResponsesRun, read_responses
from deepseek_nb.serve.text import read_completion
from deepseek_nb.serve.tools import Call, write_calls

openai, anthropic = pytest.importorskip('openai'), pytest.importorskip('anthropic')


# ---- values of a type

def bare(tp):
    "A type without its wrappers"
    while te.get_origin(tp) in (te.Required, te.NotRequired, te.Annotated): tp = te.get_args(tp)[0]
    return tp


def hints(tp): return te.get_type_hints(tp, include_extras=True)


def options(tp):
    "The alternatives of a type"
    tp = bare(tp)
    if te.get_origin(tp) in (typing.Union, types.UnionType): return [o for a in te.get_args(tp) for o in options(a)]
    return [tp]


def item(tp):
    "Type of the items of a list; None: it is no list"
    origin = te.get_origin(tp)
    return te.get_args(tp)[0] if isinstance(origin, type) and issubclass(origin, Iterable) and not issubclass(origin, Mapping) else None


# What a field of an earlier answer holds, where any value of its type would be odd
PLAIN = dict(status='completed', annotations=[], logprobs=[], summary=[], encrypted_content='b25l')


def least(tp):
    "The smallest value of a type"
    tp = options(tp)[0]
    if not te.is_typeddict(tp): return next(iter(values(tp)))[1]
    more = {k: v for k, v in dict(schema={}, call_id='one').items() if k in tp.__annotations__}
    return {k: PLAIN.get(k, least(h)) for k, h in hints(tp).items() if needed(tp, h)} | more


def needed(tp, hint): return te.get_origin(hint) is te.Required or tp.__total__ and te.get_origin(hint) is not te.NotRequired


def values(tp, depth=0):
    "Paths and values: each alternative of a type, and each field of an object by itself"
    for kind in options(tp):
        origin = te.get_origin(kind)
        if kind is type(None): continue
        if te.is_typeddict(kind):
            base = least(kind)
            yield (), base
            if depth > 5: continue
            for k, h in hints(kind).items():
                for path, v in values(h, depth + 1):
                    if base.get(k) != v: yield (k, *path), base | {k: v}
        elif origin is te.Literal: yield from (((), v) for v in te.get_args(kind))
        elif item(kind): yield from (((0, *path), [v]) for path, v in values(item(kind), depth + 1))
        elif origin is not None and issubclass(origin, Mapping) or kind is dict: yield (), {'7': 1}
        elif kind is bool: yield from (((), False), ((), True))
        elif kind is int: yield from (((), 3), ((), 5))
        elif kind is float: yield from (((), .25), ((), .5))
        else: yield from (((), 'one'), ((), 'two'))


# ---- what a server makes of them

class Asked(ServedModel):
    "A model of V4's type that keeps what would be generated"
    def ask(self, text, ids, thinking=False, tools=None, max_tokens=None, begun='', **settings):
        self.asked, self.grammar = dict(text=text, begun=begun), settings.get('grammar')
        return Answer(Stream(Request(ids)), Splitter(self.format, thinking=thinking, tools=tools or False))


@pytest.fixture(scope='module')
def served():
    tok = Tokenizer.from_pretrained('mini')
    tok.chat_template, config = None, SimpleNamespace(model_type='deepseek_v4', vocab_size=len(tok), max_positions=10**6)
    return Asked('m', SimpleNamespace(model=SimpleNamespace(config=config), ends=(0,), context=10**6,
                                      store=SimpleNamespace(longest=10**6)), tok)


class DeepSeekThinking(te.TypedDict, total=False):
    type: te.Required[te.Literal['enabled', 'disabled']]


class DeepSeekMessage(te.TypedDict, total=False):
    role: te.Required[te.Literal['assistant']]
    content: te.Required[str]
    prefix: bool
    reasoning_content: str


class DeepSeekChat(te.TypedDict, total=False):
    "Fields of DeepSeek's documents that OpenAI's package lacks, and those of this server"
    thinking: DeepSeekThinking
    messages: list[DeepSeekMessage]
    reasoning_effort: te.Literal['minimal', 'low', 'medium', 'high', 'xhigh', 'max', 'ultra']
    user_id: str
    min_p: float
    top_k: int
    repetition_penalty: float
    timeout: float
    draft_tokens: int
    return_token_ids: bool


READ = dict(chat=(read_chat, ChatRun), responses=(read_responses, ResponsesRun), messages=(read_anthropic, MessagesRun))
HI, SCHEMA = [dict(role='user', content='hi, json')], dict(type='object', properties=dict(z=dict(type='string')))
CHAT = dict(messages=HI, tools=[dict(type='function', function=dict(name='f', parameters=SCHEMA))])
ASKED = dict(  # protocol, type of the body, and a body without the field
    chat=('chat', 'openai.types.chat.completion_create_params.CompletionCreateParamsBase', CHAT),
    deepseek=('chat', DeepSeekChat, CHAT),
    completions=('completions', 'openai.types.completion_create_params.CompletionCreateParamsBase', dict(prompt='hi')),
    responses=('responses', 'openai.types.responses.response_create_params.ResponseCreateParamsBase',
               dict(input=HI, tools=[dict(type='function', name='f', parameters=SCHEMA)])),
    messages=('messages', 'anthropic.types.message_create_params.MessageCreateParamsBase',
              dict(messages=HI, max_tokens=9, tools=[dict(name='f', input_schema=SCHEMA)])))
FORMS = 'response_format', 'text', 'output_config'  # which exclude tools

# Fields with a value that asks for what happens anyway. Nothing else may change nothing.
NEUTRAL = dict(
    chat=r'''messages\.1\.(tool_calls\.0\.id|tool_call_id)='(one|two)' logprobs=False parallel_tool_calls=True store=False
            verbosity='medium' response_format={'type':'text'} response_format\.json_schema\.(name|strict)=.* service_tier='(auto|default)'
            tool_choice='auto' stream_options={} ''',
    deepseek=r'''messages\.1\.(prefix=False|reasoning_content='.*') return_token_ids=False
                thinking={'type':'disabled'} thinking\.type='disabled' ''',
    completions=r'echo=False stream_options\.include_usage=False',
    responses=r'''background=False input\.1\.(phase='.*'|type='message'|status='(in)?complete.?'|id='.*')
                input\.1\.content\.0\.(annotations|logprobs)=\[\] input\.1\.content\.0={.*'reasoning_text'}
                parallel_tool_calls=True reasoning={} reasoning\.summary='auto' service_tier='(auto|default)' store=False tool_choice='auto'
                stream_options={} stream_options\.include_obfuscation=False text={} text\.format={'type':'text'} truncation='disabled' ''',
    messages=r'''(.*\.)?cache_control={'type':'ephemeral'} (.*\.)?cache_control\.ttl='5m' .*\.is_error=False .*\.signature='.*'
               .*\.caller={'type':'direct'} metadata={} output_config={} output_config\.effort='high' service_tier='(auto|standard_only)'
               thinking={'type':'disabled'} tool_choice={'type':'auto'} tool_choice\.disable_parallel_tool_use=False tools\.0\.strict=False
               tools\.0\.type='custom' tools\.0\.eager_input_streaming=(True|False)
               messages\.1\.content\.0={'signature':'one','thinking':'one','type':'thinking'} ''')


def effect(served, protocol, body):
    "Everything that a body changes: the settings, the prompt, and what the response repeats"
    if protocol == 'completions': return vars(read_completion(body, served.tok))
    read, run = READ[protocol]
    run(served, r := read(body))
    strict = [t['function'].get('strict') for t in r.tools or ()]
    return {k: v for k, v in vars(r).items() if k not in ('messages', 'said', 'items', 'tools')} | served.asked | dict(strict=strict)


def bodies(kind, base):
    "Each field with each value: the path, and the body"
    for name, hint in hints(kind).items():
        plain = {k: v for k, v in base.items() if name not in FORMS or k != 'tools'}
        for path, value in values(hint):
            if name in ('messages', 'input') and isinstance(value, list): path, value = (1, *path[1:]), plain[name] + value
            if name != 'model': yield (name, *path), plain | {name: value}


def without(body, path):
    "The body before the field came"
    body = copy.deepcopy(body)
    inside = reduce(lambda x, k: x[k], path[:-1], body)
    del inside[path[-1]]
    return body


def names(param, path):
    "Whether an error names the field, an object around it, or such an object's kind"
    spelt = ''.join(f'[{p}]' if isinstance(p, int) else f'.{p}' for p in path)[1:]
    return param and (spelt + '.').startswith((param + '.', param + '[')) or param.startswith(spelt) or \
        param.rpartition('.')[2] in ('type', 'role') and spelt.startswith(param.rpartition('.')[0])


def verdict(served, asked, path, body):
    "'refused', 'works', 'neutral', or what is wrong"
    protocol = ASKED[asked][0]
    try: got = effect(served, protocol, body)
    except ApiError as error: return 'refused' if error.status == 400 and names(error.param, path) else f'{error.param}: {error}'
    try:
        if effect(served, protocol, without(body, path)) != got: return 'works'
    except ApiError: return 'works'  # the body needs the field
    said = f'{".".join(map(str, path))}={reduce(lambda x, k: x[k], path, body)!r}'.replace(' ', '')
    return 'neutral' if any(re.fullmatch(p, said) for p in NEUTRAL[asked].split()) else f'ignored: {said}'


@pytest.mark.parametrize('asked', ASKED)
def test_every_field_works_or_is_named(served, asked):
    _, kind, base = ASKED[asked]
    if isinstance(kind, str): kind = getattr(import_module(kind.rpartition('.')[0]), kind.rpartition('.')[2])
    found = [(path, verdict(served, asked, path, body)) for path, body in bodies(kind, base)]
    wrong = [f for f in found if f[1] not in ('refused', 'works', 'neutral')]
    assert not wrong
    counts = {v: sum(f[1] == v for f in found) for v in ('works', 'refused')}
    assert counts['works'] >= dict(chat=60, deepseek=12, completions=30, responses=40, messages=40)[asked] and len(found) > 20
    assert counts['refused'] >= dict(chat=100, deepseek=0, completions=5, responses=500, messages=500)[asked]


def test_an_image_is_named(served):
    "These models read text, and each API says so of the part"
    url = 'data:image/png;base64,AAAA'
    for asked, part in dict(chat=dict(type='image_url', image_url=dict(url=url)), responses=dict(type='input_image', image_url=url),
                            messages=dict(type='image', source=dict(type='url', url=url))).items():
        name = 'input' if asked == 'responses' else 'messages'
        with pytest.raises(ApiError, match=f'{part["type"]}.*this server reads') as error:
            effect(served, asked, ASKED[asked][2] | {name: [dict(role='user', content=[part])]})
        assert (error.value.status, error.value.param) == (400, f'{name}[0].content[0].type')


@pytest.mark.parametrize('asked, one', [
    ('chat', dict(parallel_tool_calls=False)), ('responses', dict(parallel_tool_calls=False)),
    ('messages', dict(tool_choice=dict(type='auto', disable_parallel_tool_use=True)))])
def test_one_call_at_most(served, asked, one):
    "Text or one call may come, and a second one can't; without the field there may be any number"
    body, call = ASKED[asked][2], [Call('f', '{"z": "x"}')]
    free = dict(tool_choice=dict(type='any') if asked == 'messages' else 'required')
    must = one | free if asked != 'messages' else dict(tool_choice=one['tool_choice'] | free['tool_choice'])
    def takes(extra, text):
        effect(served, asked, body | extra)
        return all(served.grammar.matcher.consume_token(i) for i in served.tok.encode(text)) and served.grammar.matcher.is_accepting()
    for extra in (one, must):
        assert takes(extra, write_calls('v4', call)) and not takes(extra, write_calls('v4', call*2))
        assert takes(extra, 'It is warm.') == (extra is one)
        assert not takes(extra, write_calls('v4', call) + '\n\n' + write_calls('v4', call))
    assert takes(free, write_calls('v4', call*2))


def test_what_contradicts_itself_is_refused(served):
    hi = dict(messages=HI)
    for body, param in [(dict(max_tokens=3, max_completion_tokens=4), 'max_tokens'), (dict(tools=CHAT['tools']*2), 'tools[1]'),
                        (dict(messages=[HI[0] | dict(name='Ann')]), 'messages[0].name'),
                        (dict(messages=[HI[0] | dict(prefix=True)]), 'messages[0].prefix'),
                        (dict(messages=[dict(role='assistant', content='a', prefix=True), *HI]), 'messages[0].prefix')]:
        with pytest.raises(ApiError) as error: effect(served, 'chat', hi | body)
        assert error.value.param == param
    for n in (0, 17):
        with pytest.raises(ApiError) as error: effect(served, 'completions', dict(prompt='hi', n=n))
        assert error.value.param == 'n'
    ends = [*HI, dict(role='assistant', content=[dict(type='tool_use', id='1', name='f', input={})])]
    with pytest.raises(ApiError, match='send its result'): effect(served, 'messages', dict(messages=ends, max_tokens=3))


def test_what_a_template_leaves_out_is_refused(served, monkeypatch):
    "Earlier calls, where the template writes only texts"
    monkeypatch.setattr(served.tok, 'chat_template', '{% for m in messages %}{{ m.content }}{% endfor %}')
    called = dict(role='assistant', content='ok', tool_calls=[dict(id='1', type='function', function=dict(name='f', arguments='{}'))])
    result = dict(role='tool', tool_call_id='1', content='r')
    with pytest.raises(ApiError) as error: effect(served, 'chat', dict(messages=[*HI, called, result]))
    assert error.value.param == 'messages[1].tool_calls'
    monkeypatch.undo()
    assert '<｜DSML｜invoke name="f">' in effect(served, 'chat', dict(messages=[*HI, called, result]))['text']
    assert effect(served, 'chat', dict(messages=[*HI, called, result | dict(name='f')]))['text'] # repeats the call
    with pytest.raises(ApiError, match='has no place'): effect(served, 'chat', dict(messages=[*HI, called, result | dict(name='g')]))


def test_one_effort_only(served, monkeypatch):
    "V3.1's template has no degrees: those that it would ignore are refused, by the name that the protocol has for them"
    monkeypatch.setattr(served, 'format', 'v31')
    monkeypatch.setattr(served.tok, 'chat_template', 'deepseek-v3.1')
    hi = dict(messages=HI)
    asks = {'reasoning_effort': ('chat', lambda e: hi | dict(reasoning_effort=e)),
            'reasoning.effort': ('responses', lambda e: dict(input=HI, reasoning=dict(effort=e))),
            'output_config.effort': ('messages', lambda e: hi | dict(max_tokens=9, thinking=dict(type='adaptive'),
                                                                       output_config=dict(effort=e)))}
    for name, (asked, body) in asks.items():
        for e in ('medium', 'high'): assert effect(served, asked, body(e))['thinking']
        for e in ('low', 'max'):
            with pytest.raises(ApiError, match='has one effort only') as error: effect(served, asked, body(e))
            assert error.value.param == name

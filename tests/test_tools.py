"Tool calls: the same events as DeepSeek's own parser, BFCL's calls written and read back, and what users reported elsewhere."
import gzip
import json
import random
import re
from pathlib import Path

import pytest

from deepseek_nb.serve.events import (
    ContentDelta,
    ReasoningDelta,
    Splitter,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    cuts_agree,
    events_of,
)
from deepseek_nb.serve.tools import DSML, Call, gather_answer, write_calls

BFCL = Path(__file__).parents[2]/'shared'/'data'/'bfcl'
FORMATS = ['r1', 'v3', 'v31', 'v32', 'v4', 'v41', 'smollm2']
MODELS = dict(v4='DeepSeek-V4-Pro', v41='DeepSeek-V4.1-Flash')
F = dict(type='function', function=dict(name='f', parameters=dict(type='object', properties=dict(a=dict(type='string')))))


def ours(format, thinking, pieces, finish='stop', begun=''):
    s = Splitter(format, thinking, begun=begun)
    return said(e for p in [*pieces, None] for e in (s.close(finish) if p is None else s.feed(p))) + [('finish', s.finish)]


def said(events):
    "Events as joined tuples"
    names = {ReasoningDelta: 'reasoning', ContentDelta: 'content', ToolCallStart: 'start', ToolCallDelta: 'arguments'}
    return join((names[type(e)], *e) for e in events if not isinstance(e, ToolCallEnd))


def join(rows):
    out = []
    for r in rows:
        if out and r[0] != 'start' and out[-1][:-1] == r[:-1]: out[-1] = (*r[:-1], out[-1][-1] + r[-1])
        elif r[-1] != '': out.append(r)
    return out


@pytest.fixture(scope='module')
def recipe():
    "DeepSeek's own parser for V4 and V4.1, over the same text"
    d = pytest.importorskip('deepseek_recipe')
    def convert(format, thinking, **more):
        body = dict(model=MODELS[format], messages=[dict(role='user', content='hi')], tools=[F], stream=True,
                    thinking=dict(type='enabled' if thinking else 'disabled'), **more)
        return d.ChatCompletionRequest(body).convert(d.ConversionOptions())
    options = {(f, t): convert(f, t) for f in MODELS for t in (False, True)}
    def run(format, thinking, pieces, finish='Stop', request=None):
        request = request or options[format, thinking]
        p = d.StreamProcessor(d.ChatCompletionRequest.chunk_generator(request, 'id', 'm'), request.parsing_options)
        chunks = [d.InferenceChunk.ready(prompt_usage=d.PromptUsage(prompt_tokens=1)), *map(d.InferenceChunk.text, pieces)]
        out = [c for chunk in chunks for c in p.push(chunk)] + p.push(d.InferenceChunk.finish(getattr(d.InferenceFinishReason, finish)))
        return join(rows([json.loads(c.to_json()) for c in out + p.finish()]))
    run.module, run.convert = d, convert
    return run


def rows(chunks):
    "Chat completion chunks as tuples"
    for choice in (c for chunk in chunks for c in chunk['choices']):
        for key, name in (('reasoning_content', 'reasoning'), ('content', 'content')):
            if choice['delta'].get(key): yield name, choice['delta'][key]
        for call in choice['delta'].get('tool_calls') or []:
            if call['function'].get('name'): yield 'start', call['index'], call['function']['name']
            if call['function'].get('arguments'): yield 'arguments', call['index'], call['function']['arguments']
        if choice['finish_reason']: yield 'finish', choice['finish_reason']


VALUES = ['\n"\\', '</a>', '<｜DSML｜invoke name="f">', '', '日本 🙂', '\u2028\x01\x7f', 'def f():\n\treturn {"a": 1}', 3, -1.5, None, True,
          [1, {'q': '</'}], {'a': {'b': []}}, '"}', '```', '<think>']


def answer(rng, format, thinking):
    "An answer as the model should write it, and its parts"
    args = lambda: {rng.choice(['a', 'city', 'b.c', '日']): rng.choice(VALUES) for _ in range(rng.randint(0, 3))}
    calls = [Call(rng.choice(['f', 'get_weather', 'a-b']), json.dumps(args(), ensure_ascii=False)) for _ in range(rng.randint(0, 3))]
    thought, content = rng.choice(['', '\nhm\n', 'a < b', '<think>']), rng.choice(['', 'ok', ' a\n\nb', '\n\n**4** <b>', 'x\n'])
    return (f'{thought}\n</think>\n\n' if thinking else '') + content + ('\n\n' + write_calls(format, calls) if calls else '')


def test_the_same_events_as_deepseeks_parser_at_every_cut(recipe):
    rng, n = random.Random(0), 0
    for i in range(200):
        format, thinking = rng.choice([*MODELS]), rng.random() < .5
        text = answer(rng, format, thinking)
        want = recipe(format, thinking, [text])
        cuts = range(1, len(text)) if i < 3 else rng.sample(range(1, len(text)), min(3, len(text) - 1)) if len(text) > 1 else []
        for pieces in [[text], list(text), *([text[:k], text[k:]] for k in cuts)]:
            assert ours(format, thinking, pieces) == want == recipe(format, thinking, pieces)
            n += 1
    assert n > 1000


OPEN = re.compile(r'(\n*<｜DSML｜ ?(tool_)?calls>\s*)?(\n*<(｜(D(S(M(L(｜[^>]*)?)?)?)?)?)?)?$')


def test_the_same_events_for_answers_that_stop_early(recipe):
    """Cut off anywhere. In an opening tag the two differ: DeepSeek's parser drops it, and passes on the beginning of a parameter
    (`, "city": `); here a call without a name stays text, and a parameter without a value is left out."""
    rng, same, tags = random.Random(1), 0, 0
    for _ in range(800):
        format, thinking = rng.choice([*MODELS]), rng.random() < .5
        text = answer(rng, format, thinking)
        text = text[:rng.randint(0, len(text))]
        mine = ours(format, thinking, [text], 'length')
        if mine == recipe(format, thinking, [text], 'Length'):
            same += 1
            continue
        tags += 1
        tail = OPEN.search(text)[0]
        head = text.removesuffix(tail)
        before = ours(format, thinking, [head], 'length')
        assert tail and before == recipe(format, thinking, [head], 'Length')
        assert mine in (before, with_text(before, thinking and '</think>' not in head, tail)), (text, mine, before)
    assert same > 3*tags > 0, (same, tags)


def with_text(before, inside, tail):
    "Events, with a tail that stays text"
    *events, finish = before
    kind = 'reasoning' if inside else 'content'
    return join([*events, (kind, tail if events and events[-1][0] == kind else tail.lstrip('\n'))]) + [finish]


def test_where_deepseeks_parser_differs(recipe):
    "Version 0.2.0 drops what is no call and what follows a block, and loses the end of a parameter's name with a space"
    call = write_calls('v4', [Call('f', '{"a": 1}')])
    cases = {'see <｜DSML｜tool_calls> there': ([('content', 'see <｜DSML｜tool_calls> there')], [('content', 'see ')]),
             '<｜DSML｜b>': ([('content', '<｜DSML｜b>')], []),
             call + '\n\nDone.': ([('start', 0, 'f'), ('arguments', 0, '{"a": 1}'), ('content', 'Done.')],
                                 [('start', 0, 'f'), ('arguments', 0, '{"a": 1}')]),
             write_calls('v4', [Call('f', '{"b c": 1}')]): ([('start', 0, 'f'), ('arguments', 0, '{"b c": 1}')],
                                                          [('start', 0, 'f'), ('arguments', 0, '{"b: 1}')])}
    for text, want in cases.items(): assert (ours('v4', False, [text])[:-1], recipe('v4', False, [text])[:-1]) == want


def test_a_required_call_begins_in_the_prompt(recipe):
    for format in MODELS:
        request = recipe.convert(format, False, tool_choice='required')
        d = recipe.module
        encoding = dict(v4=d.DeepseekV4Encoding, v41=d.DeepseekV41Encoding)[format]()
        begun = encoding.render_conversation(request.conversation).prompt.rpartition('</think>')[2]
        whole = write_calls(format, [Call('f', '{"a": "x"}')])
        assert begun.strip() and whole.startswith(begun.lstrip('\n'))
        rest = whole.removeprefix(begun.lstrip('\n'))
        assert ours(format, False, list(rest), begun=begun) == recipe(format, False, list(rest), request=request)


def test_calls_are_written_as_deepseek_writes_them_into_prompts(recipe):
    d, rng = recipe.module, random.Random(3)
    for format, encoding in dict(v4=d.DeepseekV4Encoding(), v41=d.DeepseekV41Encoding()).items():
        for _ in range(100):
            args = {rng.choice(['a', 'b c', '日']): rng.choice([v for v in VALUES if '｜' not in str(v)]) for _ in range(3)}
            calls = [Call('f', json.dumps(args, ensure_ascii=False)), Call('g', '{}')][:rng.randint(1, 2)]
            turn = d.AssistantMessage('ok', 'hm', [d.ToolCall(str(i), *c) for i, c in enumerate(calls)])
            results = [d.ToolMessage('1', str(i)) for i in range(len(calls))]
            talk = d.Conversation([d.UserMessage('hi'), turn, *results], tools=[d.ToolDefinition('f')])
            text = encoding.render_conversation(talk).prompt.partition('<｜Assistant｜>')[2].partition('<｜end▁of▁sentence｜>')[0]
            assert text.endswith('\n\n' + write_calls(format, calls))


def test_the_built_in_template_writes_the_same_calls():
    from deepseek_nb.files.chat import TEMPLATES, render
    calls = [Call('f', '{"a": 1}'), Call('g', '{}')]
    turn = dict(role='assistant', content='ok', tool_calls=[dict(type='function', function=c._asdict()) for c in calls])
    prompt = render(TEMPLATES['deepseek-v3.1'], [dict(role='user', content='hi'), turn], bos_token='', add_generation_prompt=False)
    assert prompt == f"<｜User｜>hi<｜Assistant｜></think>ok{write_calls('v31', calls)}<｜end▁of▁sentence｜>"


def cases():
    "BFCL's accepted calls, of each parameter the first value"
    for name in ('simple_python', 'live_simple', 'parallel', 'live_parallel', 'parallel_multiple', 'multiple', 'simple_java'):
        for row in map(json.loads, gzip.open(BFCL/'possible_answer'/f'BFCL_v4_{name}.json.gz', 'rt')):
            calls = [(f, args) for call in row['ground_truth'] for f, args in call.items()]
            first = lambda args: {k: v[0] for k, v in args.items() if v[:1] not in ([], [''])}
            yield [Call(f, json.dumps(first(args), ensure_ascii=False)) for f, args in calls]


@pytest.mark.skipif(not BFCL.exists(), reason='BFCL is not here')
def test_the_calls_of_bfcl_are_read_back_in_every_format():
    rng, n = random.Random(0), 0
    for calls in cases():
        n += len(calls)
        for format in rng.sample(FORMATS, 2):
            text = 'Let me see.\n\n' + write_calls(format, calls)
            cut = rng.randrange(len(text))
            assert gather_answer(events_of(Splitter(format), [text[:cut], text[cut:]])) == ('', 'Let me see.', calls), (format, text)
    assert n > 2000


# What users of other servers reported

ENDS = ['{"a": [1, 2]}', '{"a": 5}', '{"a": null}', '{"a": {"b": {}}}', '{"a": "}"}', '{"a": "\\\\"}', '{}', '{"a": "```"}',
        '{"a": "x\\n```"}']


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('arguments', ENDS)
def test_arguments_may_end_in_anything(format, arguments):
    calls = [Call('f', arguments), Call('g', arguments)]
    assert gather_answer(cuts_agree(lambda: Splitter(format), write_calls(format, calls))).calls == calls


@pytest.mark.parametrize('format', FORMATS)
def test_arguments_go_out_while_they_are_written(format):
    "No character of a long string waits for the parameter or the call to close"
    text = write_calls(format, [Call('f', json.dumps(dict(a='word '*50)))])
    begin = text.index('word') + 5
    s = Splitter(format)
    s.feed(text[:begin])
    for c in text[begin:begin + 200]: assert s.feed(c) == [ToolCallDelta(0, c)]


@pytest.mark.parametrize('format', FORMATS)
def test_a_tag_inside_an_argument_is_text(format):
    inside = {'v3': '<｜tool▁sep｜>', 'r1': '<｜tool▁calls▁begin｜>', 'v31': '<｜tool▁sep｜>', 'smollm2': '</tool_call>'}
    value = inside.get(format, f'<｜DSML｜{DSML[format].block}></p>' if format in DSML else '')
    calls = [Call('f', json.dumps(dict(a=f'see {value} there'), ensure_ascii=False))]
    assert gather_answer(cuts_agree(lambda: Splitter(format), write_calls(format, calls))).calls == calls


@pytest.mark.parametrize('format', FORMATS)
def test_calls_that_lack_a_tag(format):
    "The block's first tag, or the last ones"
    call = Call('f', '{"a": "x"}')
    whole = write_calls(format, [call, call])
    split = lambda text: gather_answer(cuts_agree(lambda: Splitter(format), text))
    if format != 'smollm2':
        first = whole.index('>') + 1
        assert split('ok\n' + whole[first:]) == ('', 'ok', [call, call])
        assert split(whole[:whole.rindex('<')]).calls == [call, call]
    else: assert split(whole.removesuffix('</tool_call>')).calls == [call, call]


def test_loose_hermes():
    split = lambda text: gather_answer(cuts_agree(lambda: Splitter('smollm2'), text))
    one = Call('f', '{"a": 1}')
    assert split('<tool_call>[{"name": "f", "arguments": {"a": 1}}, {"name": "f", "arguments": {"a": 1}}]</tool_call>').calls == [one]*2
    assert split('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>').calls == [one]
    assert split('<tool_call>{"id": {"x": ["}"]}, "name": "f", "parameters": {"a": 1}, "n": 1}</tool_call>').calls == [one]
    assert split('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>').calls == [one]
    for none in ('{"name": "f"}', '{"name": "f", "arguments": null}', '{"name": "f", "arguments": {}}'):
        assert split(f'<tool_call>{none}</tool_call>') == ('', '', [Call('f', '{}')])
    assert split('<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>!') == ('', '!', [Call('f', '{"a": 1')])
    for no in ('f(a=1)', '{"name": 5}', "{'name': 'f'}", '[]', '{"name": "", "arguments": {}}', '{"arguments": {}}'):
        assert split(f'<tool_call>{no}</tool_call>!') == ('', f'<tool_call>{no}</tool_call>!', [])
    assert split('<tool_call>[{"name": "f"}, 5]</tool_call>').calls == [Call('f', '{}')]


def test_what_markup_cant_say_is_refused():
    for arguments in ('{"a\\"b": 1}', '{"a": "</｜DSML｜parameter>"}'):
        with pytest.raises(ValueError, match='has no way to write the parameter'): write_calls('v4', [Call('f', arguments)])


def test_without_tools_the_tags_are_text():
    for format in FORMATS:
        text = write_calls(format, [Call('f', '{"a": 1}')])
        assert cuts_agree(lambda f=format: Splitter(f, tools=[]), text) == [ContentDelta(text)]

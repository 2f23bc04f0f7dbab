"The text of an answer becomes the same events wherever it is cut, in every format, and nothing of it is lost."
import json
import random
from time import process_time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_nb.serve.events import (
    FORMATS,
    THINKING,
    ContentDelta,
    Markers,
    ReasoningDelta,
    Splitter,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    cuts_agree,
    events_of,
    join_deltas,
)
from deepseek_nb.serve.tools import DSML, SYNTAX, Call, answer_format, gather_answer, write_calls

CALLS = [f for f in FORMATS if f != 'plain']
quick = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

TAGS = {f: [s.begin, s.end, s.call] for f, s in SYNTAX.items()} | {'smollm2': ['<tool_call>', '</tool_call>'], 'plain': ['<x>']}
for f in ('r1', 'v3', 'v31'):
    TAGS[f] += ['<｜tool▁sep｜>', '<｜tool▁call▁end｜>', 'function', '\n```json\n', '\n```', '{"a": [1, {"b": "}"}]}', '{}']
for f, t in DSML.items():
    TAGS[f] += ['f">', *('" string="true">', '" string="false">')*2, t.closed('parameter'), t.closed('invoke'), t.opened('parameter')]
TAGS['smollm2'] += ['{"name": "', '"', '{', '}', '[', ']', ', ', '"arguments": ', ': ', '{"a": {"b": "</tool_call>"}}', '\\', '"name"',
                    'null', '<tool_call>{"name": "f", "arguments": {"a": ']
WORDS = ['f', 'get_it', ' ', '\n', '\n\n', '<', '>', '"', '\\', 'é', '日本', '🙂', '1', '</think>', '<think>', '</thi', '<｜']


@st.composite
def answers(draw, format):
    "Texts that are nearly answers: whole calls, tags in any order, pieces of tags, any characters"
    piece = st.one_of(st.sampled_from(TAGS[format]), st.sampled_from(WORDS), st.text(max_size=4))
    if format in CALLS:
        value = st.one_of(st.text(max_size=6), st.integers(), st.none(), st.lists(st.sampled_from(['}', '"', '</'])))
        name, args = st.sampled_from(['f', 'get_it', 'a.b-c']), st.dictionaries(st.sampled_from(['a', 'b c', '日']), value, max_size=3)
        some = st.lists(st.builds(lambda n, a: Call(n, json.dumps(a, ensure_ascii=False)), name, args), max_size=3)
        whole = some.map(lambda calls: write_calls(format, [c for c in calls if '</｜DSML｜' not in c.arguments]))
        piece = st.one_of(piece, piece, whole)
    text = ''.join(draw(st.lists(piece, max_size=9)))
    return text[:draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


@pytest.mark.parametrize('format', FORMATS)
@quick
@given(data=st.data())
def test_every_cut_gives_the_same_events(format, data):
    text, thinking = data.draw(answers(format)), format in THINKING and data.draw(st.booleans())
    whole = events_of(Splitter(format, thinking), [text])
    assert events_of(Splitter(format, thinking), text) == whole
    for _ in range(3):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert events_of(Splitter(format, thinking), pieces) == whole
    balanced(whole)


def balanced(events):
    "Calls come one after another, each with its start and its end"
    index, inside = 0, False
    for e in events:
        if isinstance(e, ToolCallStart): assert not inside and e.index == index and e.name; inside = True
        elif isinstance(e, ToolCallDelta): assert inside and e.index == index
        elif isinstance(e, ToolCallEnd): assert inside and e.index == index; index, inside = index + 1, False
        elif isinstance(e, ReasoningDelta): assert index == 0 and not inside
    assert not inside


@pytest.mark.parametrize('format', FORMATS)
@quick
@given(data=st.data())
def test_what_is_no_call_stays_content(format, data):
    text = data.draw(st.lists(st.sampled_from([*TAGS[format], *WORDS[:-4], '<thi', '<｜tool']), max_size=12).map(''.join))
    events = events_of(Splitter(format), [text])
    if any(isinstance(e, ToolCallStart) for e in events): return
    said = ''.join(e.text for e in events)
    empty = SYNTAX[format].begin in text and SYNTAX[format].end in text if format in SYNTAX else False
    assert said == (text.lstrip('\n') if format in THINKING else text) or empty
    assert all(isinstance(e, ContentDelta) for e in events)


@pytest.mark.parametrize('format', FORMATS)
def test_text_without_tags_is_never_held_back(format):
    s = Splitter(format, format in THINKING)
    for c in 'Is 2 > 1? Yes, "really" {so}.': assert [e.text for e in s.feed(c)] == [c]


@pytest.mark.parametrize('format', FORMATS)
def test_a_long_answer_costs_time_in_proportion(format):
    text = 'word <b> ' * 1000
    s = Splitter(format, format in THINKING)
    assert len(join_deltas(e for c in text for e in s.feed(c))) == 1 and len(s._text) < 20


def test_a_thousand_newlines_cost_little():
    s = Splitter('v4', thinking=True)
    for _ in range(8000): assert s.feed('\n') == []
    s.feed('a')
    tick = process_time()
    for _ in range(8000): assert s.feed('\n') == []
    assert s.feed('b') == [ReasoningDelta('\n'*8000 + 'b')] and process_time() - tick < 3


def test_a_name_that_never_ends_is_given_back():
    for format, begin in dict(v31='<｜tool▁call▁begin｜>', v4='<｜DSML｜invoke name="', smollm2='<tool_call>{"name": "').items():
        text = begin + 'x'*1000
        s = Splitter(format)
        shown = ''.join(e.text for c in text for e in s.feed(c))
        assert len(text) - len(shown) < 10, format
        assert cuts_agree(lambda f=format: Splitter(f), begin + 'x'*300) == [ContentDelta(begin + 'x'*300)]


def test_tags_of_which_one_would_be_found_first_by_the_cut_alone_are_refused():
    with pytest.raises(ValueError, match='lies inside'): Markers('b', 'abc')
    assert Markers('bc', 'abc').find('abc').tag == 'abc'


@pytest.mark.parametrize('format', THINKING)
def test_reasoning_may_be_empty_or_without_end(format):
    split = lambda text: gather_answer(cuts_agree(lambda: Splitter(format, True), text))
    assert split('</think>\n\nok') == ('', 'ok', []) and split('\n\n</think>') == ('', '', [])
    assert split('hm\n') == ('hm\n', '', []) and split('') == ('', '', [])
    assert split('a\n\n</think>b</think>\nc') == ('a', 'b\nc', [])
    call = write_calls(format, [Call('f', '{"a": 1}')])
    assert split('hm\n' + call) == ('hm', '', [Call('f', '{"a": 1}')])
    assert split(f'hm, {call[:20]} begins a call</think>ok') == (f'hm, {call[:20]} begins a call', 'ok', [])


def test_a_format_without_reasoning_refuses_it():
    for format in ('v3', 'smollm2'):
        with pytest.raises(ValueError, match='has no reasoning'): Splitter(format, thinking=True)


@pytest.mark.parametrize('format', CALLS)
def test_a_prompt_may_have_written_the_beginning(format):
    for begun in ('', 'Well', 'Well\n\n', 'Well <｜', 'Well\n<', 'a\n\n<｜DSML｜tool'):
        for rest in ('', 'more', '\nmore', '\n', '<', '\n\n' + write_calls(format, [Call('f', '{"a": 1}')])):
            s = Splitter(format, begun=begun)
            got = gather_answer(join_deltas([*(e for c in rest for e in s.feed(c)), *s.close()]))
            whole = gather_answer(events_of(Splitter(format), [begun + rest]))
            assert got.calls == whole.calls and whole.content in (begun + got.content, begun.rstrip('\n') + got.content)
    opened = write_calls(format, [Call('f', '{"a": "x"}')])
    for n in range(1, len(opened)):
        s = Splitter(format, begun=opened[:n])
        assert join_deltas([*s.feed(opened[n:]), *s.close()]) == events_of(Splitter(format), [opened]) and s.finish == 'tool_calls'


def test_why_an_answer_ended():
    call = write_calls('v4', [Call('f', '{"a": "x"}')])
    cases = (('hi', 'stop', 'stop'), (call, 'stop', 'tool_calls'), (call[:70], 'length', 'length'), (call, 'cancelled', 'cancelled'))
    for text, finish, want in cases:
        s = Splitter('v4')
        s.feed(text)
        assert s.finish is None
        s.close(finish)
        assert s.finish == want


def test_the_format_is_read_off_the_template():
    from deepseek_nb.files.chat import TEMPLATES
    assert answer_format(TEMPLATES['deepseek-v3.1']) == 'v31' and answer_format(TEMPLATES['deepseek-r1-distill']) == 'r1'
    v3 = '<｜Assistant｜> <｜tool▁sep｜> ```json'
    assert answer_format(v3) == 'v3' and answer_format(v3 + '</think>') == 'r1'
    assert [answer_format(f'<｜DSML｜{t.block}>') for t in DSML.values()] == list(DSML)
    assert answer_format('<|im_start|>') == 'smollm2' and answer_format(None, 'deepseek_v4') == 'v4' and answer_format('{{ x }}') == 'plain'


def test_random_cuts_of_long_answers():
    rng = random.Random(0)
    for format in CALLS:
        calls = [Call(f'f{i}', json.dumps({'text': 'line\n"q" \\ {' * 20, 'n': [1, {'k': None}]})) for i in range(4)]
        text = 'Hm.\n\n' + write_calls(format, calls)
        whole = events_of(Splitter(format), [text])
        assert gather_answer(whole).calls == calls
        for _ in range(20):
            cuts = sorted(rng.sample(range(len(text)), 30))
            assert events_of(Splitter(format), [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]) == whole

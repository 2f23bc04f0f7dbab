"The prompts of V3.2, V4 and V4.1: the same text as DeepSeek's own conversion writes, for conversations of every kind."
import hashlib
import json
import random
from types import SimpleNamespace

import pytest

from deepseek_nb.files.chat import TEMPLATES, render
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.serve.chat import ApiError

MODELS = {'deepseek-v4': 'DeepSeek-V4-Pro', 'deepseek-v4.1': 'DeepSeek-V4.1-Flash'}
PARAMETERS = dict(type='object', properties=dict(z=dict(type='string')), required=['z'])
TOOLS = [dict(type='function', function=dict(name='f', description='Wörter', parameters=PARAMETERS)),
         dict(type='function', function=dict(name='g'))]
ARGUMENTS = ['{}', '{"z": "q<"}', '{"a": [1.50, null, {"é": "\\u00e9"}], "b": true, "c": "true"}', '{"z": ', '[1]', '5', '{"z": "</a>\\n"}']


@pytest.fixture(scope='module')
def recipe():
    d = pytest.importorskip('deepseek_recipe')
    encodings = {'deepseek-v4': d.DeepseekV4Encoding(), 'deepseek-v4.1': d.DeepseekV41Encoding()}
    def run(name, **body):
        request = d.ChatCompletionRequest(body | dict(model=MODELS[name])).convert(d.ConversionOptions())
        return encodings[name].render_conversation(request.conversation).prompt
    return run


def answer(rng):
    "A message of the assistant, and the results of its tools"
    m = dict(role='assistant', content=rng.choice(['', 'ok', 'x\n']), reasoning_content=rng.choice(['', 'hm\n', 'R']))
    if rng.random() < .5: return [m]
    n = rng.randint(1, 3)
    m['tool_calls'] = [dict(id=str(i), type='function', function=dict(name='f', arguments=rng.choice(ARGUMENTS))) for i in range(n)]
    results = [dict(role='tool', tool_call_id=str(i), content=f'r{i}') for i in rng.sample(range(n), n)]
    return [m, *results, *([dict(role='assistant', content='then', reasoning_content='T')] if rng.random() < .5 else [])]


def conversation(rng):
    out = [dict(role='system', content=rng.choice(['Be kind.', 'a\n']))] if rng.random() < .5 else []
    for _ in range(rng.randint(1, 4)):
        if rng.random() < .1: out.append(dict(role='system', content='late'))
        out += [dict(role='user', content=rng.choice(['a', 'b\n\nc', ' x '])) for _ in range(rng.choice([1, 1, 1, 2]))]
        if rng.random() < .7: out += answer(rng)
    called = any('tool_calls' in m for m in out) # which DeepSeek's conversion refuses together with a prefix
    if out[-1]['role'] != 'assistant' and not called and rng.random() < .5:
        thought = dict(reasoning_content='P') if rng.random() < .5 else {}
        out.append(dict(role='assistant', content=rng.choice(['He', '']), prefix=True, **thought))
    return out


@pytest.mark.parametrize('name', MODELS)
def test_the_prompts_are_deepseeks(recipe, name):
    rng, kinds = random.Random(name), set()
    for _ in range(150):
        messages, thinks, tools = conversation(rng), rng.random() < .5, rng.choice([None, TOOLS[:1], TOOLS])
        prefix = bool(messages[-1].get('prefix'))
        if prefix: tools = None
        effort = rng.choice(['low', 'high', 'max', 'minimal', 'medium', 'xhigh', 'ultra']) if thinks and rng.random() < .8 else None
        body = dict(messages=messages, thinking=dict(type='enabled' if thinks else 'disabled'))
        body |= (dict(tools=tools) if tools else {}) | (dict(reasoning_effort=effort) if effort else {})
        got = render(TEMPLATES[name], messages, tools, thinking=thinks, reasoning_effort=effort)
        assert got == recipe(name, **body), (messages, thinks, effort)
        kinds.add((thinks, prefix, bool(tools), any('tool_calls' in m for m in messages)))
    assert len(kinds) == 10


def test_v32():
    "The format of the program in V3.2's checkpoint, written down"
    call = dict(type='function', function=dict(name='f', arguments='{"z": "q", "n": [1]}'))
    talk = [dict(role='system', content='Be kind.'), dict(role='user', content='a'),
            dict(role='assistant', content='', reasoning_content='R', tool_calls=[call | dict(id='1'), call | dict(id='2')]),
            dict(role='tool', tool_call_id='2', content='two'), dict(role='tool', tool_call_id='1', content='one')]
    one = '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="z" string="true">q</｜DSML｜parameter>\n' \
          '<｜DSML｜parameter name="n" string="false">[1]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    calls = f'\n\n<｜DSML｜function_calls>\n{one*2}</｜DSML｜function_calls><｜end▁of▁sentence｜>'
    results = '\n\n<function_results>\n<result>one</result>\n<result>two</result>\n</function_results>'
    run = lambda messages, **kw: render(TEMPLATES['deepseek-v3.2'], messages, bos_token='', **kw)
    assert run(talk, thinking=True) == f'Be kind.<｜User｜>a<｜Assistant｜><think>R</think>{calls}{results}\n\n<think>'
    assert run(talk) == f'Be kind.<｜User｜>a<｜Assistant｜></think>{calls}{results}\n\n</think>'
    more = [*talk, dict(role='assistant', content='b', reasoning_content='S'), dict(role='user', content='c')]
    assert run(more, thinking=True) == \
        f'Be kind.<｜User｜>a<｜Assistant｜></think>{calls}{results}\n\n</think>b<｜end▁of▁sentence｜><｜User｜>c<｜Assistant｜><think>'
    text = run(talk[:2], tools=TOOLS)
    assert text.startswith('Be kind.\n\n## Tools\n') and text.count('｜DSML｜function_calls>') == 5
    assert f'<functions>\n{json.dumps(TOOLS[0]["function"], ensure_ascii=False)}\n{{"name": "g"}}\n</functions>\n<｜User｜>' in text


def test_tools_of_v31():
    "As the card of the checkpoint has them, word for word: behind the system message, with a heading for each function"
    card = ('## Tools\nYou have access to the following tools:\n\n### f\nDescription: Wörter\n\nParameters: {PARAMETERS}\n\n'
            '### g\nDescription: \n\nParameters: {}\n\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n'
            '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>'
            '{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n'
            '- `tool_call_name` must be an exact match to one of the available tools\n'
            "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
            '- For multiple tool calls, chain them directly without separators or spaces').replace('{PARAMETERS}', json.dumps(PARAMETERS))
    run = lambda messages, **kw: render(TEMPLATES['deepseek-v3.1'], messages, bos_token='', **kw)
    hi, kind = dict(role='user', content='a'), dict(role='system', content='Be kind.')
    assert run([kind, hi], tools=TOOLS) == f'Be kind.\n\n{card}<｜User｜>a<｜Assistant｜></think>'
    assert run([hi], tools=TOOLS) == run([hi], tools=[t['function'] for t in TOOLS]) == f'\n\n{card}<｜User｜>a<｜Assistant｜></think>'
    assert run([kind, hi], tools=[]) == run([kind, hi]) == 'Be kind.<｜User｜>a<｜Assistant｜></think>'
    with pytest.raises(ValueError, match='without thinking only'): run([hi], tools=TOOLS, thinking=True)


def test_the_words_of_v32_about_tools():
    "Compared with the program in V3.2's checkpoint: the digest of what it writes for these two functions"
    talk = [dict(role='system', content='Be kind.'), dict(role='user', content='a')]
    text = render(TEMPLATES['deepseek-v3.2'], talk, TOOLS, bos_token='')
    assert hashlib.sha256(text.encode()).hexdigest() == 'dbf35d1c70a3f0e9983ad1719d94656966d4f90bc697b79d7a1883f4ccac3048'


@pytest.mark.parametrize('own', [True, False])
def test_a_checkpoint_of_v31_calls_tools(own):
    "Its own template leaves the tools out, so ours writes the prompts that have some"
    from deepseek_nb.serve.chat import ServedModel
    tok = Tokenizer.from_pretrained('mini')
    published = TEMPLATES['deepseek-v3.1'].replace('tools', 'functions') # a name that nobody fills in
    tok.chat_template = published if own else 'deepseek-v3.1'
    config = SimpleNamespace(model_type='deepseek_v3', max_positions=4096)
    model = ServedModel('m', SimpleNamespace(model=SimpleNamespace(config=config), ends=(), context=4096,
                                              store=SimpleNamespace(longest=4096)), tok)
    hi = [dict(role='user', content='a')]
    assert model.format == 'v31' and '### f\nDescription: Wörter' in model.prompt(hi, TOOLS)
    assert model.prompt(hi, TOOLS).endswith('<｜User｜>a<｜Assistant｜></think>') and 'Tools' not in model.prompt(hi)
    assert tok.decode(model.ids(hi, TOOLS)) == model.prompt(hi, TOOLS)
    with pytest.raises(ApiError, match='without thinking only'): model.prompt(hi, TOOLS, True)


def test_calls_as_the_parsers_read_them():
    from deepseek_nb.serve.tools import Call, write_calls
    calls = [dict(function=dict(name='f', arguments=a)) for a in ('{}', '{"z": "q", "é": [1, null]}')]
    for name, format in {'deepseek-v3.2': 'v32', 'deepseek-v4': 'v4', 'deepseek-v4.1': 'v41'}.items():
        assert TEMPLATES[name].calls(calls) == write_calls(format, [Call(**c['function']) for c in calls])


def test_unknown_roles_and_efforts():
    hard = dict(messages=[dict(role='user', content='x')], thinking=True, reasoning_effort='huge')
    for bad in (dict(messages=[dict(role='robot', content='x')]), hard):
        with pytest.raises(ValueError, match='rejects this conversation'): render(TEMPLATES['deepseek-v4'], **bad)


# ---- behind the server

@pytest.fixture
def served():
    "A model of V4's type without a chat template, and without a model; what would be asked is kept"
    from deepseek_nb.files.tokenizer import Tokenizer
    from deepseek_nb.infer.request import Request, Stream
    from deepseek_nb.serve.chat import Answer, ServedModel
    from deepseek_nb.serve.events import Splitter
    class Asked(ServedModel):
        def ask(self, text, ids, thinking=False, tools=None, max_tokens=None, begun='', **settings):
            self.asked = dict(text=text, ids=ids, begun=begun)
            return Answer(Stream(Request(ids)), Splitter(self.format, thinking=thinking, tools=tools or False))
    tok = Tokenizer.from_pretrained('mini')
    tok.chat_template = None
    return Asked('m', SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(model_type='deepseek_v4', max_positions=4096)), ends=(),
                                      context=4096, store=SimpleNamespace(longest=4096)), tok)


@pytest.mark.parametrize('effort,begin', [(None, 'Absolute'), ('xhigh', 'Absolute'), ('max', 'Beyond'), ('ultra', 'Beyond'), ('low', None)])
def test_the_effort_of_a_request_is_in_the_prompt(served, effort, begin):
    from deepseek_nb.serve.completions import ChatRun, read_chat
    from deepseek_nb.serve.responses import ResponsesRun, read_responses
    hi = [dict(role='user', content='hi')]
    body = dict(messages=hi, tools=TOOLS, thinking=dict(type='enabled'))
    ChatRun(served, read_chat(body | (dict(reasoning_effort=effort) if effort else {})))
    asked = [served.asked]
    if effort:
        ResponsesRun(served, read_responses(dict(input='hi', reasoning=dict(effort=effort))))
        asked.append(served.asked)
    for a in asked:
        assert a['text'].endswith('<｜User｜>hi<｜Assistant｜><think>') and served.tok.decode(a['ids']) == a['text']
        assert (f'Reasoning Effort: {begin}' if begin else '<｜begin▁of▁sentence｜>') in a['text']
        assert ('Effort' in a['text']) == bool(begin)
    assert served.format == 'v4' and '### Available Tool Schemas' in asked[0]['text']


def test_without_thinking_and_with_a_begun_answer(served):
    from deepseek_nb.serve.completions import ChatRun, read_chat
    def ask(thinking, **begun):
        talk = [dict(role='user', content='hi'), *([dict(role='assistant', prefix=True, **begun)] if begun else [])]
        mode = dict(type='enabled' if thinking else 'disabled')
        ChatRun(served, read_chat(dict(messages=talk, thinking=mode, reasoning_effort='low')))
        return served.asked['text'].rpartition('<｜Assistant｜>')[2], served.asked['begun']
    assert ask(False) == ('</think>', '') and ask(False, content='He') == ('</think>He', 'He')
    assert ask(True, content='He') == ('<think></think>He', 'He')
    assert ask(True, content='', reasoning_content='Hm') == ('<think>Hm', 'Hm')
    assert ask(True, content='He', reasoning_content='Hm') == ('<think>Hm</think>He', 'He')

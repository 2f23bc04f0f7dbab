"Grammars: what a schema, an expression or a tool's syntax allows, in the vocabularies of two tokenizers, and what hostile ones cost."
import gzip
import json
import re
import threading
from pathlib import Path
from time import process_time

import numpy as np
import pytest

pytest.importorskip('llguidance')
from deepseek_nb.files.tokenizer import Tokenizer, from_folder
from deepseek_nb.serve.events import Splitter, events_of
from deepseek_nb.serve.grammar import FRAMES, ToolGrammar, compile_grammar, json_rule, token_trie
from deepseek_nb.serve.tools import Call, gather_answer, write_calls

ROOT = Path(__file__).parents[1]
SETS = ROOT.parent/'shared'/'data'
CITY = dict(type='string', pattern='^[A-Z][a-z]{1,7}$')
WEATHER = dict(type='object', required=['city', 'days'], additionalProperties=False,
               properties=dict(city=CITY, days=dict(type='integer', minimum=1, maximum=7), unit=dict(type='string', enum=['C', 'F'])))
PLACE = {'$defs': {'point': dict(type='array', items=dict(type='integer', minimum=-90, maximum=90), minItems=2, maxItems=2)},
         'type': 'object', 'properties': {'at': {'$ref': '#/$defs/point'}}, 'required': ['at'], 'additionalProperties': False}
TOOLS = [dict(type='function', function=dict(name='get_weather', parameters=WEATHER)), dict(name='place.at', parameters=PLACE),
         dict(name='now')]


@pytest.fixture(scope='module')
def tok(): return Tokenizer.from_pretrained('smollm2-135m')


@pytest.fixture(scope='module')
def mini():
    "Our own small vocabulary, with the tags of V3.1 and V4 as control tokens, as DeepSeek's vocabularies have them"
    plain = from_folder(ROOT/'deepseek_nb'/'mini')
    tags = ['</think>', *(f'<｜tool▁{t}｜>' for t in ('calls▁begin', 'calls▁end', 'call▁begin', 'call▁end', 'sep')), '｜DSML｜']
    added = {t: dict(id=i, special=True) for t, i in plain.special_tokens.items()}
    added |= {t: dict(id=len(plain) + i) for i, t in enumerate(tags)}
    return Tokenizer(plain.backend, added, plain.named, plain.eos_ids)


def allowed(grammar): return np.flatnonzero(np.unpackbits(grammar.mask().view(np.uint8), bitorder='little'))


def walk(tok, grammar, seed=0, steps=600):
    rng, ids = np.random.default_rng(seed), []
    while not grammar.finished and len(ids) < steps:
        ids.append(int(rng.choice(allowed(grammar))))
        grammar.accept(ids[-1])
    return tok.decode([i for i in ids if i not in tok.eos_ids]), grammar.finished


def takes(tok, grammar, text):
    return all(grammar.matcher.consume_token(i) for i in tok.encode(text, special=True)) and grammar.matcher.is_accepting()


def test_random_walks_end_and_are_valid(tok):
    from jsonschema import Draft202012Validator
    schemas = [WEATHER, PLACE, dict(type='array', items=dict(type='boolean'), maxItems=5), dict(enum=[1, 'a', None, {'b': [2]}]),
               dict(type='object', properties=dict(a=WEATHER, b=dict(type='number', multipleOf=.5, minimum=0, maximum=9)), required=['b'],
                    additionalProperties=False), dict(anyOf=[WEATHER, dict(type='null')])]
    for i, schema in enumerate(schemas):
        for seed in range(6):
            text, finished = walk(tok, compile_grammar(tok, 'schema', schema), 10*i + seed)
            assert finished
            Draft202012Validator(schema).validate(json.loads(text))


def test_white_space_cant_go_on_for_ever(tok):
    g = lambda: compile_grammar(tok, 'schema', WEATHER | {'x-guidance': dict(whitespace_flexible=True, lenient=True)})
    for text in ('{"city": "Rome", "days": 2}', '{"city":"Rome","days":2}'): assert takes(tok, g(), text)
    for text in ('{"city":  "Rome", "days":2}', '{ "city":"Rome","days":2}', '\n{"city":"Rome","days":2}'): assert not takes(tok, g(), text)
    with pytest.raises(ValueError, match='"not"'): compile_grammar(tok, 'schema', {'not': {}, 'x-guidance': dict(lenient=True)})


def test_masks_are_those_of_the_vocabulary(tok, mini):
    for t in (tok, mini):
        g = compile_grammar(t, 'choice', ['yes', 'no', 'nothing'])
        assert g.mask().dtype == np.int32 and len(g.mask()) == -(-len(t)//32)
        want = [i for i in range(len(t)) if i not in t.special_tokens.values() and i in t._tokens
                and any(c.encode().startswith(t.id_to_bytes(i)) for c in ('yes', 'no', 'nothing'))]
        assert allowed(g).tolist() == want
        for i in t.encode('no'): g.accept(i)
        assert set(t.eos_ids) <= set(allowed(g).tolist()) and not g.finished
        g.accept(t.eos_ids[0])
        assert g.finished and allowed(g).tolist() == sorted(t.eos_ids)
        g.accept(t.eos_ids[0])


def test_characters_of_several_tokens(tok):
    text = json.dumps(dict(a='深度 🙂 e\u0301 ß'), ensure_ascii=False)
    assert takes(tok, compile_grammar(tok, 'json'), text) and takes(tok, compile_grammar(tok, 'regex', r'\{.*🙂.*'), text)


@pytest.mark.parametrize('kind,value,good,bad', [
    ('json', None, ['{}', '{"a": [1, {"b": null}]}'], ['[]', '1', '{"a": 01}', '{a: 1}', '{} ']),
    ('regex', r'\d{3}|[a-c]+/x', ['123', 'abc/x'], ['12', '1234', 'd/x', 'x123']),
    ('regex', r'"(a|b)"\n?/', ['"a"/', '"b"\n/'], ['a']),
    ('choice', ['red', 'red wine', 'a"b\n', '深'], ['red', 'red wine', 'a"b\n', '深'], ['re', 'red w', ''])])
def test_kinds(tok, kind, value, good, bad):
    for after in (None, '</think>'):
        begin = 'hm {"a": 1} < \n' + after + '\n\n' if after else ''
        for text in good: assert takes(tok, compile_grammar(tok, kind, value, after=after), begin + text), text
        for text in bad: assert not takes(tok, compile_grammar(tok, kind, value, after=after), begin + text), text
        if after: assert not takes(tok, compile_grammar(tok, kind, value, after=after), good[0])


def test_behind_reasoning_where_the_tag_is_one_token(mini):
    g = lambda: compile_grammar(mini, 'schema', dict(type='integer'), after='</think>')
    assert takes(mini, g(), 'a < b </ think\n</think>5') and takes(mini, g(), '</think>\n\n-5') and not takes(mini, g(), '</think>a')
    assert set(allowed(g())) & set(mini.special_tokens.values()) == {mini.special_tokens['</think>']}


@pytest.mark.parametrize('which', ['tok', 'mini'])
@pytest.mark.parametrize('format', FRAMES)
def test_calls_that_the_grammar_allows_are_calls_that_the_splitter_reads(request, which, format):
    from jsonschema import validate
    t = request.getfixturevalue(which)
    schemas = {'get_weather': WEATHER, 'place.at': PLACE, 'now': dict(type='object', maxProperties=0)}
    for seed, choice in enumerate(['get_weather', 'place.at', 'now', 'required', 'required']):
        g = compile_grammar(t, 'tools', ToolGrammar(format, TOOLS, choice, parallel=seed != 3))
        text, finished = walk(t, g, seed)
        calls = gather_answer(events_of(Splitter(format), [text]))
        assert finished and not calls.content.strip() and (len(calls.calls) == 1 or choice == 'required' and seed == 4)
        for c in calls.calls:
            validate(json.loads(c.arguments), schemas[c.name])
            assert choice in ('required', c.name)


@pytest.mark.parametrize('which', ['tok', 'mini'])
@pytest.mark.parametrize('format', FRAMES)
def test_written_calls_are_allowed(request, which, format):
    t = request.getfixturevalue(which)
    calls = [Call('get_weather', '{"city": "Rome", "days": 2, "unit": "C"}'), Call('place.at', '{"at": [1, -2]}'), Call('now', '{}')]
    text = write_calls(format, calls)
    # A string with a pattern is written as JSON, where alone it can be guaranteed
    text = text.replace('"city" string="true">Rome<', '"city" string="false">"Rome"<')
    free = '' if format == 'smollm2' else '\n\n'
    new = lambda *more, **kw: compile_grammar(t, 'tools', ToolGrammar(format, TOOLS, *more), **kw)
    assert takes(t, new('required'), text) and takes(t, new('auto'), f'Let me see < 5.{free}' + text) and takes(t, new('auto'), text)
    assert takes(t, new('auto'), 'No call, <tool> or <｜ or </think> [].'.replace('</think>', '' if which == 'mini' else '</think>'))
    assert takes(t, new('auto', after='</think>'), 'hm\n</think>' + free + text) and takes(t, new('auto', after='</think>'), 'hm</think>ok')
    for wrong in (text.replace('Rome', 'rome'), text.replace('now', 'then'), text + '!', text[:-3], 'No.'):
        assert not takes(t, new('required'), wrong)
    assert not takes(t, new('now'), text) and not takes(t, new('auto', False), text)
    assert takes(t, new('now'), write_calls(format, calls[2:]))


def test_free_strings_and_open_objects_as_markup(tok):
    fields = dict(type='object', properties=dict(a=dict(type='string'), b={}), required=['a'])
    tools = [dict(name='f', parameters=fields), dict(name='g', parameters=dict(type='object'))]
    for format in ('v32', 'v4', 'v41'):
        g = lambda: compile_grammar(tok, 'tools', ToolGrammar(format, tools, 'required'))  # noqa: B023
        for args in ({'a': 'x < y </p>\n"z" {'}, {'a': '', 'b': 'text'}, {'a': '日', 'b': [1]}):
            text = write_calls(format, [Call('f', json.dumps(args, ensure_ascii=False))])
            if args.get('b') == 'text': text = text.replace('string="true">text', 'string="false">"text"')
            assert takes(tok, g(), text), text
        for args in ('{"any": "x", "n": {"k": 2}}', '{}'): assert takes(tok, g(), write_calls(format, [Call('g', args)]))
        assert not takes(tok, g(), write_calls(format, [Call('f', '{"b": 1}')]))


def test_parameters_as_markup_in_the_order_of_the_schema_as_text_where_text_may_be(tok):
    "Required ones needn't come first; a value of any type or of several is written as text or as JSON; what no value fits is left out"
    fields = dict(a=dict(type='integer'), b={}, c=dict(anyOf=[dict(type='string'), dict(type='null')]), d=dict(type=['string', 'number']),
                  e=dict(type='boolean', enum=['yes']), f=dict(type='integer'))
    tool = dict(name='f', strict=True, parameters=dict(type='object', properties=fields, required=['f', 'b'], additionalProperties=False))
    for format in ('v32', 'v4', 'v41'):
        def ok(as_json=(), **args):
            text = write_calls(format, [Call('f', json.dumps(args))])  # noqa: B023
            for t in as_json: text = text.replace(f'string="true">{t}', f'string="false">"{t}"')
            return takes(tok, compile_grammar(tok, 'tools', ToolGrammar(format, [tool], 'required')), text)  # noqa: B023
        assert ok(a=1, b='x', f=2) and ok(b=[1], f=2) and ok(b='x', c='y', d='z', f=3) and ok('xyz', b='x', c='y', d='z', f=3)
        assert ok(b='', c=None, d=5, f=3) and ok(b='x', c='false', d='5', f=3)
        assert not any([ok(f=2, b='x'), ok(a=1, f=2), ok(b='x', d=True, f=2), ok(b='x', c=5, f=2)])
        assert not ok(b='x', e='yes', f=2) and not ok(b='x', f='2')


@pytest.mark.parametrize('parameters', [dict(properties=[]), dict(properties=5), dict(required='a'), dict(required=[1]),
                                        dict(properties=dict(a=5))])
def test_schemas_of_parameters_that_are_none(tok, parameters):
    for format in ('v31', 'v4'):
        tool = dict(name='f', parameters=parameters)
        with pytest.raises(ValueError, match="the strict tool 'f'"):
            compile_grammar(tok, 'tools', ToolGrammar(format, [tool | dict(strict=True)], 'f'))
        assert takes(tok, compile_grammar(tok, 'tools', ToolGrammar(format, [tool], 'f')), write_calls(format, [Call('f', '{"x": "y"}')]))


@pytest.mark.parametrize('schema,message', [
    ({'not': {}}, 'the key "not"'), (dict(type='array', uniqueItems=True), 'the key "uniqueItems"'), ({'if': {}}, 'the key "if"'),
    (dict(oneOf=[dict(type='number'), {}]), 'the key "oneOf"'), (dict(type='string', format='zip'), 'format: zip'),
    (dict(type='nothing'), 'type'), ({'$ref': 'http://example.com/x'}, 'example.com'), (5, 'must be an object'),
    (dict(type='string', pattern='(?=a)b'), 'look-around'), (dict(enum=[]), 'empty'),
    (dict(type='string', minLength=5, maxLength=2), 'schema'),
    ({'$ref': '#/$defs/a', '$defs': {'a': {'$ref': '#/$defs/a'}}}, 'no text at all')])
def test_what_cant_be_guaranteed_is_refused_with_its_name(tok, schema, message):
    with pytest.raises(ValueError, match=re.escape(message)) as e: compile_grammar(tok, 'schema', schema)
    assert '\n' not in str(e.value) and len(str(e.value)) < 400
    for format in ('v31', 'v4') if message != 'no text at all' else ():
        tool = dict(name='f', strict=True, parameters=dict(type='object', properties=dict(a=schema), required=['a']))
        with pytest.raises(ValueError, match="the strict tool 'f'"): compile_grammar(tok, 'tools', ToolGrammar(format, [tool]))
        loose = compile_grammar(tok, 'tools', ToolGrammar(format, [tool | dict(strict=False)], 'f'))
        assert takes(tok, loose, write_calls(format, [Call('f', '{"a": 1}')]))


def test_other_refusals(tok):
    for kind, value, message in [('regex', '(', 'regular expression'), ('regex', '', 'must be a text'), ('choice', [], 'choices'),
                                 ('choice', [''], 'choices'), ('choice', [1], 'choices'), ('xml', '', 'kind is'),
                                 ('tools', ToolGrammar('v4', TOOLS, 'nope'), "tool_choice names 'nope'"),
                                 ('tools', ToolGrammar('plain', TOOLS), 'has no tool calls'),
                                 ('tools', ToolGrammar('v4', []), 'the tools are none'),
                                 ('tools', ToolGrammar('v4', [dict(name='a"b')]), 'is no name of a tool')]:
        with pytest.raises(ValueError, match=message): compile_grammar(tok, kind, value)
    with pytest.raises(ValueError, match='no token that ends'): token_trie(Tokenizer(tok.backend, {}))


def test_forced_tokens_are_the_only_way(tok):
    g = compile_grammar(tok, 'tools', ToolGrammar('smollm2', TOOLS[:1], 'required'))
    g.accept(tok.encode('<')[0])
    forced = g.forced()
    assert tok.decode(forced).startswith('tool_call>\n{"name": "get_weather", "arguments": {"')
    for i in forced:
        assert i in allowed(g)
        g.accept(i)


def test_answers_dont_share_their_state(tok):
    "Also where threads compile the same grammar at once"
    found, schema = [], dict(type='array', items=dict(type='integer', maximum=5, minimum=0), minItems=3, maxItems=3)
    def run(seed): found.append((seed, walk(tok, compile_grammar(tok, 'schema', schema), seed)[0]))
    threads = [threading.Thread(target=run, args=[i % 4]) for i in range(12)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 12 and len(set(found)) == 4


def rss(): return int(Path('/proc/self/statm').read_text().split()[1])*4096


DOUBLING = {f'a{i}': {'anyOf': [{'$ref': f'#/$defs/a{i+1}'}, {'type': 'array', 'items': {'$ref': f'#/$defs/a{i+1}'}}]} for i in range(60)}
DEEP = json.loads('{"properties":{"a":'*200 + '{}' + '}}'*200)
BOMBS = [
    ('regex', '((((a{1,100}){1,100}){1,100}){1,100}){1,100}'), ('regex', '(a*)*b'), ('regex', '[ab]*a[ab]{25}'), ('regex', '(x+x+)+y'),
    ('regex', r'(.|\n)*a(.|\n){25}b(.|\n){200}'), ('regex', '((.*a){20}|(.*b){20}).{300}'), ('regex', '(a|b|ab){1,1000000}'),
    ('regex', '|'.join(f'(.*{c}.{{{i + 5}}})' for i, c in enumerate('abcdefghijklmnopqrstuvwxyz'))), ('regex', '('*2000 + 'a' + ')'*2000),
    ('schema', {'$ref': '#/$defs/a0', '$defs': DOUBLING | {'a60': {}}}), ('schema', DEEP), ('schema', dict(type='array', minItems=10**9)),
    ('schema', dict(type='string', minLength=10**9)), ('schema', dict(type='integer', multipleOf=10**30)),
    ('schema', dict(allOf=[dict(anyOf=[dict(properties={f'k{i}{j}': dict(minLength=j)}) for j in range(6)]) for i in range(12)])),
    ('schema', dict(type='object', properties={f'k{i}': dict(type='string', pattern=f'[ab]*a[ab]{{{i % 30}}}') for i in range(1000)})),
    ('schema', dict(type='object', properties={f'k{i}': WEATHER for i in range(3000)})), ('choice', ['x'*i for i in range(1, 800)]),
    ('choice', ['x'*1000]*1000), ('json', None)]


@pytest.mark.parametrize('n', range(len(BOMBS)))
def test_bombs_are_bounded_in_time_and_memory(tok, n):
    "Refused, or each step within the limits; what an answer costs is far below a model's step"
    before, start, steps = rss(), process_time(), [0.]
    try:
        g = compile_grammar(tok, *BOMBS[n])
        for seed in range(60):
            tick = process_time()
            ids = allowed(g)
            steps.append(process_time() - tick)
            if g.finished: break
            g.accept(int(ids[seed*7919 % len(ids)]))
    except ValueError as e: assert '\n' not in str(e)
    assert process_time() - start < 6 and max(steps) < 1 and rss() - before < 300*2**20


def test_strict_closes_what_says_nothing(tok):
    "At every depth, in formats of answers and in tools; where the schema speaks, it counts"
    inner = dict(properties=dict(b=dict(type='boolean')), required=['b'])
    schema = dict(type='object', properties=dict(properties=inner, c=dict(anyOf=[inner, dict(type='null')])), required=['properties', 'c'],
                  additionalProperties=dict(type='integer', maximum=9, minimum=9))
    good, bad = '{"properties": {"b": true}, "c": {"b": true}, "x": 9}', '{"properties": {"b": true, "x": 1}, "c": null}'
    def fits(kind, text, schema=schema): return takes(tok, compile_grammar(tok, kind, schema), text)
    assert fits('schema', good) and fits('schema', bad) and fits('strict', good) and not fits('strict', bad)
    base = {'$defs': {'base': inner}, 'properties': {'c': True}, 'required': ['c']}
    parts = {'allOf': [{'$ref': '#/$defs/base'}, {k: base[k] for k in ('properties', 'required')}], '$defs': base['$defs']}
    for spread in (base | {'$ref': '#/$defs/base'}, base | {'anyOf': [inner]}, parts):
        assert fits('strict', '{"c": 1, "b": true}', spread) or fits('strict', '{"b": true, "c": 1}', spread)
    for format in ('smollm2', 'v4'):
        for strict in (False, True):
            tool = dict(name='f', parameters=schema | dict(additionalProperties=False), strict=strict)
            text = '\n\n'*(format == 'v4') + write_calls(format, [Call('f', bad)])
            assert takes(tok, compile_grammar(tok, 'tools', ToolGrammar(format, [tool], 'required')), text) == (not strict)


def test_too_deep_for_json(tok):
    schema = {}
    for _ in range(5000): schema = dict(items=schema)
    tool = dict(name='f', parameters=schema, strict=True)
    for deep in (lambda: json_rule(schema), lambda: compile_grammar(tok, 'strict', schema),
                 lambda: compile_grammar(tok, 'tools', ToolGrammar('v4', [tool], 'required'))):
        with pytest.raises(ValueError, match='nested too deeply'): deep()


def says_why(message, schema):
    "A refusal is one line, and the keys that it names are in the schema, or in the one of the drafts that it refers to"
    assert '\n' not in message and len(message) < 400
    named = re.match('the key (.*) of the schema', message)
    text = json.dumps(schema)
    if named and schema is not False and '"$ref": "http' not in text:
        for key in re.findall('"([^"]+)"', named[1]): assert f'"{key}"' in text, message


def outcomes(tok, rows):
    "Schemas that were refused, valid instances that weren't taken, invalid ones that were, and all instances"
    refused, lost, wrong, n = 0, 0, [], 0
    for schema, tests in rows:
        try: g = compile_grammar(tok, 'schema', schema)
        except ValueError as e:
            says_why(str(e), schema)
            refused += 1
            continue
        for t in tests or []:
            ok, n = takes(tok, g.fork(), json.dumps(t['data'], ensure_ascii=False)), n + 1
            lost += t['valid'] and not ok
            if ok and not t['valid']: wrong.append((schema, t))
    return refused, lost, wrong, n


@pytest.mark.skipif(not SETS.exists(), reason='the sets are not here')
def test_no_invalid_instance_of_the_json_schema_test_suite_is_taken(tok):
    files = sorted((SETS/'json_schema_test_suite'/'tests'/'draft2020-12').glob('*.json'))
    refused, lost, wrong, n = outcomes(tok, [(g['schema'], g['tests']) for f in files for g in json.loads(f.read_text())])
    assert not wrong and n > 500 and lost < 30 and refused < 230


@pytest.mark.skipif(not SETS.exists(), reason='the sets are not here')
def test_no_invalid_instance_of_jsonschemabench_is_taken(tok):
    rows = list(map(json.loads, gzip.open(SETS/'jsonschemabench'/'maskbench_sample.jsonl.gz', 'rt')))[::20]
    refused, lost, wrong, n = outcomes(tok, [(r['schema'], r['tests']) for r in rows])
    assert not wrong and n > 300 and lost < 10 and refused < len(rows)/4


@pytest.mark.skipif(not SETS.exists(), reason='the sets are not here')
def test_the_masks_allow_valid_instances_token_by_token(tok):
    rows = list(map(json.loads, gzip.open(SETS/'jsonschemabench'/'maskbench_sample.jsonl.gz', 'rt')))[::200]
    n = 0
    for r in rows:
        valid = [t['data'] for t in r['tests'] or [] if t['valid']]
        try: g = compile_grammar(tok, 'schema', r['schema'])
        except ValueError: continue
        for ids in [tok.encode(json.dumps(v, ensure_ascii=False)) for v in valid[:1]]:
            if not takes(tok, g.fork(), tok.decode(ids)): continue
            for i in [*ids, tok.eos_ids[0]]:
                assert i in allowed(g)
                g.accept(i)
            n += 1
    assert n > 10

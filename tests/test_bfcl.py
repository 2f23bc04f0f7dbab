"""The Berkeley Function Calling Leaderboard's calls, in the syntax of every release: parsed from a stream, and allowed by the grammar.

A part of the cases is tested; `BFCL_EVERY=1` takes all. `python tests/test_bfcl.py FOLDER --out FILE` counts all by set and format,
for the chapter on tool calls;
FOLDER holds `BFCL_v4_*.json` and `possible_answer`, as the package `bfcl-eval` of PyPI has them in `bfcl_eval/data`."""
import argparse
import gzip
import json
import os
import random
import re
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from deepseek_nb.bench import make_record, save_result
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.serve.events import Splitter
from deepseek_nb.serve.grammar import ToolGrammar, compile_grammar
from deepseek_nb.serve.tools import DSML, Call, gather_answer, write_calls

BFCL = Path(os.environ.get('BFCL_DATA') or Path(__file__).parents[2]/'shared'/'data'/'bfcl')
pytestmark = pytest.mark.skipif(not BFCL.exists(), reason='the data of the Berkeley Function Calling Leaderboard is not here')
SETS = ('simple_python', 'live_simple', 'multiple', 'parallel', 'parallel_multiple', 'live_parallel', 'live_parallel_multiple',
        'live_multiple', 'simple_java', 'simple_javascript')
FORMATS = ['v3', 'v31', 'v32', 'v4', 'v41', 'smollm2']
EVERY = int(os.environ.get('BFCL_EVERY', 40))
# The set's types: Python's, Java's and JavaScript's names. Values of Java and JavaScript are written as text or as JSON, whatever the type
TYPES = dict(dict='object', float='number', tuple='array', list='array', bool='boolean')


def json_schema(x, code):
    "A parameter's description as JSON schema"
    if isinstance(x, list): return [json_schema(v, code) for v in x]
    if not isinstance(x, dict): return x
    out = {k: {n: json_schema(s, code) for n, s in v.items()} if k == 'properties' else json_schema(v, code) for k, v in x.items()
           if k not in ('default', 'optional')}
    if isinstance(kind := x.get('type'), str):
        out['type'] = TYPES.get(kind, kind)
        known = ('object', 'array', 'string', 'number', 'integer', 'boolean', 'null')
        if kind == 'any' or code and out['type'] != 'object' or out['type'] not in known: out = {}
    return out


def chosen(args):
    "The first of the accepted values of each argument, also inside objects; an empty text says that the argument may be left out"
    pick = lambda v: next((x for x in v if x != ''), '') if isinstance(v, list) else v
    inner = lambda v: chosen(v) if isinstance(v, dict) else [*map(inner, v)] if isinstance(v, list) else v
    return {k: inner(pick(v)) for k, v in args.items() if not isinstance(v, list) or v[:1] not in ([], [''])}


def ordered(x, schema):
    "Arguments in the order of the schema"
    if isinstance(x, list): return [ordered(v, schema.get('items', {})) for v in x]
    fields = schema.get('properties', {})
    return {k: ordered(x[k], fields.get(k, {})) for k in [*fields, *x] if k in x} if isinstance(x, dict) else x


def lines(path):
    "The lines of a file, which may be compressed"
    packed = path.with_name(path.name + '.gz')
    return (gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()).decode().splitlines()


@cache
def rows(name):
    "Cases of a set: tools, and the calls with their arguments in the order of the schema, as the grammars have it"
    tables = [[*map(json.loads, lines(folder/f'BFCL_v4_{name}.json'))] for folder in (BFCL, BFCL/'possible_answer')]
    questions, out = {r['id']: r['function'] for r in tables[0]}, []
    for row in tables[1]:
        code = 'java' in name
        tools = [dict(name=f['name'], parameters=json_schema(f['parameters'], code)) for f in questions[row['id']]]
        of = {t['name']: t['parameters'] for t in tools}
        calls = [(f, chosen(args), of[f]) for call in row['ground_truth'] for f, args in call.items()]
        out.append((tools, [Call(f, json.dumps(ordered(args, s), ensure_ascii=False)) for f, args, s in calls]))
    return out


def parsed(format, pieces):
    splitter = Splitter(format)
    return gather_answer([*(e for p in pieces for e in splitter.feed(p)), *splitter.close()])


def cut(text, rng):
    at = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.choice([1, 2, 5]))))
    return [text[i:j] for i, j in zip([0, *at], [*at, None], strict=True)]


def stream_fails(format, calls, rng):
    "Whether the calls are lost when the text comes whole, in letters, or cut anywhere"
    text = 'Let me see.\n\n' + write_calls(format, calls)
    return [p for p in ([text], [*text], cut(text, rng), cut(text, rng)) if parsed(format, p) != ('', 'Let me see.', calls)]


@pytest.mark.parametrize('format', FORMATS)
def test_calls_are_parsed_wherever_the_stream_is_cut(format):
    rng, n = random.Random(format), 0
    for name in SETS:
        for _, calls in rows(name)[::EVERY]:
            assert not stream_fails(format, calls, rng)
            n += len(calls)
    assert n > 2900/EVERY


# ---- through the grammar

@cache
def vocabulary(): return Tokenizer.from_pretrained('smollm2-135m')


def as_json(text, tools):
    "Markup, with the texts that must have a form written as JSON: only so can the form be guaranteed"
    formed = {k for t in tools for k, s in t['parameters'].get('properties', {}).items() if {'format', 'pattern', 'minLength'} & s.keys()}
    for k in formed: text = re.sub(f'(name="{re.escape(k)}" string=)"true">([^<"]*)<', r'\1"false">"\2"<', text)
    return text


def verdict(format, tools, calls):
    """'allowed' and parsed back, 'refused' by the grammar, or 'key': the schema can't be guaranteed.

    Strict, so that no schema is replaced by any object."""
    tok = vocabulary()
    try: g = compile_grammar(tok, 'tools', ToolGrammar(format, [t | dict(strict=True) for t in tools], 'required'))
    except ValueError: return 'key'
    text = as_json(write_calls(format, calls), tools) if format in DSML else write_calls(format, calls)
    ok = all(g.matcher.consume_token(i) for i in tok.encode(text, special=True)) and g.matcher.is_accepting()
    if ok: assert parsed(format, [*text]).calls == calls
    return 'allowed' if ok else 'refused'


def follows(format, tools, calls):
    "Whether the arguments are what the tools' schemas say: not all of the set's are. As markup only parameters that are named are allowed"
    closed = dict(type='object') | (dict(additionalProperties=False) if format in DSML else {})
    of = {t['name']: Draft202012Validator(t['parameters'] | closed) for t in tools}
    return all(of[c.name].is_valid(json.loads(c.arguments)) for c in calls)


@pytest.mark.parametrize('format', FORMATS)
def test_the_grammar_allows_the_calls_that_follow_the_schema_and_no_others(format):
    n = Counter()
    for name in SETS:
        for tools, calls in rows(name)[::EVERY]:
            ok = follows(format, tools, calls)
            assert (verdict(format, tools, calls) == 'allowed') == ok, (tools, calls)
            n[ok] += 1
    assert n[True] > 2400/EVERY


@pytest.mark.parametrize('format', FORMATS)
def test_the_grammar_refuses_calls_with_a_wrong_argument(format):
    "An argument of another type, a required one left out, or a function that isn't there"
    rng, n = random.Random(format), 0
    for name in SETS[:5]:
        for tools, calls in rows(name)[::EVERY]:
            for wrong in spoilt(tools, calls, rng):
                if not follows(format, tools, wrong):
                    found = verdict(format, tools, wrong)
                    # A schema that nothing follows, such as an array with an enum of texts, has no grammar
                    assert found == 'refused' or found == 'key' and not follows(format, tools, calls), wrong
                    n += 1
    assert n > 1500/EVERY


def spoilt(tools, calls, rng):
    "The calls, one of them changed"
    i = rng.randrange(len(calls))
    put = lambda args: [*calls[:i], calls[i]._replace(arguments=json.dumps(args, ensure_ascii=False)), *calls[i + 1:]]
    args = json.loads(calls[i].arguments)
    for key, value in args.items():
        yield put({k: v for k, v in args.items() if k != key})
        yield put(args | {key: [value] if not isinstance(value, list) else 5})
    needed = next(t['parameters'] for t in tools if t['name'] == calls[i].name).get('required')
    if needed: yield put({})


def test_the_record_is_what_a_run_gives():
    "Of the smallest sets, in a format of each kind; the others by the command"
    record = json.loads((Path(__file__).parents[1]/'nbs'/'results'/'evidence'/'bfcl.json').read_text())['result']
    assert record.keys() == {*SETS} and all(found.keys() == {*FORMATS} for found in record.values())
    for name, format in (('live_parallel', 'v31'), ('live_parallel', 'v41'), ('live_parallel_multiple', 'smollm2')):
        assert counted(name, format) == record[name][format]


def counted(name, format):
    "Of one set: cases and calls, how many of both are parsed exactly at every cut, and what the grammar says"
    rng, out = random.Random(0), Counter(cases=0, calls=0, parsed_cases=0, parsed_calls=0, follow=0, allowed=0, refused=0)
    for tools, calls in rows(name):
        whole = not stream_fails(format, calls, rng)
        out += Counter(cases=1, calls=len(calls), parsed_cases=whole, parsed_calls=len(calls)*whole)
        ok, said = follows(format, tools, calls), verdict(format, tools, calls)
        out += Counter(follow=ok, allowed=ok and said == 'allowed', refused=not ok and said != 'allowed')
    return {k: out[k] for k in ('cases', 'calls', 'parsed_cases', 'parsed_calls', 'follow', 'allowed', 'refused')}


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Count the calls of BFCL that are parsed and allowed')
    parser.add_argument('folder', type=Path, nargs='?', default=BFCL, help='Folder with BFCL_v4_*.json and possible_answer')
    parser.add_argument('--out', type=Path, help='File for the record')
    given = parser.parse_args()
    BFCL = given.folder
    if not BFCL.exists(): sys.exit(f'{BFCL} is not here; unpack bfcl_eval/data of the package bfcl-eval')
    sets = {name: {f: counted(name, f) for f in FORMATS} for name in SETS}
    if given.out: save_result(given.out, make_record('bfcl', sets))
    for name, formats in sets.items():
        for format, found in formats.items(): print(f'{name:22} {format:8}', *(f'{k} {v:5}' for k, v in found.items()))

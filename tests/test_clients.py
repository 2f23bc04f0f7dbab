"""The programs of the folder examples, each a process of its own, against a live server: the same answer in every language, reasoning and
tools, a schema, refusals, and Ctrl-C in the middle of a stream."""
import io
import json
import logging
import os
import re
import runpy
import shlex
import signal
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from test_protocols import Scripted
from test_server import Live

from deepseek_nb.core.nbproc import owner
from deepseek_nb.serve.app import key_digest
from deepseek_nb.serve.tools import Call, write_calls

EXAMPLES = Path(__file__).parent.parent/'nbs'/'examples'
QUESTION = 'The Congress of the United States'
PAGE = EXAMPLES.parent/'tutorials/70_clients.ipynb'
NEEDED = re.compile('^(import shlex|class Client|CLIENTS =|def (missing|client_env|run_client))', re.M)
FOUND = dict(__name__=__name__)
exec('\n'.join(c for c in (''.join(c['source']) for c in json.loads(PAGE.read_text(encoding='utf-8'))['cells']) if NEEDED.search(c)), FOUND)
CLIENTS, client_env, missing, prepare, run_client = (FOUND[n] for n in ('CLIENTS', 'client_env', 'missing', 'prepare', 'run_client'))
SAID = 'It is 18 °C in Köln 🌡, and dry.'


class Reporter(Scripted):
    "A model with V4's format that thinks, calls a tool, and tells what it got, one character at a time"
    def prompt(self, messages, tools=None, thinking=False, effort=None):
        self.messages = messages
        return super().prompt(messages, tools, thinking)

    def ask(self, text, ids, thinking=False, tools=None, *args, **settings):
        call = tools and self.messages[-1]['role'] != 'tool'
        said = 'I look.\n\n' + write_calls('v4', [Call('weather', '{"city": "Köln"}')]) if call else SAID
        self.pieces = [*('Hm, 🤔 let\nme.\n</think>\n\n'*thinking + said)]
        return super().ask(text, ids, thinking, tools, *args, **settings)


@pytest.fixture(scope='module')
def live():
    live = Live(keys={name: key_digest(f'sk-{name}') for name in (*CLIENTS, 'ann')})
    live.script = live.server.models['script'] = Reporter('script', live.engine, live.tok, 'v4')
    how = dict(model='mini', messages=[dict(role='user', content=QUESTION)], temperature=0, max_tokens=200)
    live.plain = live.client('sk-ann').chat.completions.create(**how)
    yield live
    live.stop()


@pytest.fixture(scope='module')
def cut(live):
    "A proxy that cuts every answer between the bytes of a character, between the two ends of line, and within the word before the data"
    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm = True
        def handle(self):
            head = b''.join(iter(self.rfile.readline, b'\r\n'))
            body = self.rfile.read(int(re.search(rb'(?i)content-length: (\d+)', head)[1]))
            raw, begin = live.raw(head + b'Connection: close\r\n\r\n' + body, 30.), 0
            for end in [m.start() for m in re.finditer(rb'[\x80-\xbf]|(?<=\n)\n|(?<=\nda)ta', raw)] + [len(raw)]:
                self.wfile.write(raw[begin:end])
                begin = end
                time.sleep(.0005) # each piece is a packet of its own
    with socketserver.ThreadingTCPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(.01,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(autouse=True)
def logged():
    "No program makes the server log anything"
    class Keep(logging.Handler):
        def emit(self, record): lines.append(record.getMessage())
    lines, log, keep = [], logging.getLogger('uvicorn.error'), Keep()
    log.addHandler(keep)
    yield lines
    log.removeHandler(keep)
    assert not lines


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('examples')


@pytest.fixture(scope='module')
def client(request, folder):
    client = CLIENTS[request.param]
    if lacks := missing(client): pytest.skip(f'no {", ".join(lacks)}: {client.install}')
    prepare(client, (EXAMPLES/client.file).read_text(encoding='utf-8'), folder)
    client.name = request.param
    return client


def among(*names): return pytest.mark.parametrize('client', names, indirect=True)


def run(live, folder, client, *words, model='mini', key=None, port=None):
    "Run a program; one of Python only once in a process of its own, as it takes a second to import OpenAI's or Anthropic's package"
    env = dict(url=f'http://127.0.0.1:{port or live.port}', key=key or f'sk-{client.name}', model=model)
    if not client.module or model == 'script': return run_client(client, folder, *words, **env)
    out, err, code = io.StringIO(), io.StringIO(), 0
    patches = patch.dict(os.environ, client_env(**env)), patch.object(sys, 'argv', [client.file, *words])
    with redirect_stdout(out), redirect_stderr(err), patches[0], patches[1]:
        try: runpy.run_path(folder/client.file)
        except SystemExit as end: code, _ = 1, err.write(str(end))
    return subprocess.CompletedProcess(client.file, code, out.getvalue(), err.getvalue())


@among(*CLIENTS)
def test_the_same_answer_after_a_refusal(live, folder, client, monkeypatch):
    "The key's limit is used up until the server has refused once; the program waits as long as the header says, and asks again."
    refused, admit = [], live.server._admit
    def once(request):
        try: return admit(request)
        except Exception as error:
            refused.append(error.status)
            live.server.running[client.name] = 0
            raise
    monkeypatch.setattr(live.server, '_admit', once)
    live.server.running[client.name] = live.server.config.per_key
    begin = time.monotonic()
    done = run(live, folder, client, QUESTION)
    assert done.returncode == 0 and refused == [429] and time.monotonic() - begin >= .9, done.stderr
    assert done.stdout.strip() == live.plain.choices[0].message.content.strip() and done.stdout.strip()
    assert f'[{live.plain.usage.prompt_tokens} + {live.plain.usage.completion_tokens} tokens]' in done.stderr


@among(*CLIENTS)
def test_reasoning_and_tools(live, folder, client, cut):
    "Reasoning apart from the answer, the tool's arguments, and its result on the way back, however the network cuts the events."
    tool = '--tool' in client.options
    done = run(live, folder, client, '--think', *['--tool']*tool, 'Is it warm in Köln?', model='script', port=cut)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == 'I look.'*tool + SAID and done.stderr.count('Hm, 🤔 let\nme.') == 1 + tool
    if not tool: return
    question, asked, result = live.script.messages
    assert (question['content'], asked['content'], result['content']) == ('Is it warm in Köln?', 'I look.', '18 °C in Köln, and dry')
    call, = asked['tool_calls']
    assert json.loads(call['function']['arguments']) == dict(city='Köln') and call['id'] == result['tool_call_id']
    assert asked.get('reasoning_content') == (None if client.name == 'node-openai' else 'Hm, 🤔 let\nme.') # `runTools` sends none back


@among('java', 'c++', 'curl')
def test_a_schema(live, folder, client):
    "The fields come in the schema's order, which the program's JSON library must keep."
    done = run(live, folder, client, '--json', QUESTION)
    answer = json.loads(done.stdout)
    assert done.returncode == 0 and [*answer] == ['city', 'big'] and len(answer['city']) <= 20 and isinstance(answer['big'], bool)


@among('openai', 'anthropic', 'node-openai', 'ai-sdk', 'java', 'c++', 'curl')
def test_a_wrong_key(live, folder, client):
    done = run(live, folder, client, QUESTION, key='wrong')
    assert done.returncode and '401' in done.stderr and not done.stdout.strip()


@among('java', 'c++', 'curl')
def test_an_error_in_a_stream(live, folder, client, monkeypatch):
    "It is an event, as the status has been sent."
    monkeypatch.setattr(live.script, 'error', RuntimeError('inside'), raising=False)
    done = run(live, folder, client, QUESTION, model='script')
    assert done.returncode and 'could not complete the answer' in done.stderr and SAID in done.stdout


def heeds_interrupts():
    "A shell that starts tests in the background ignores SIGINT, and its children inherit this."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@among('openai', 'node-openai', 'java', 'c++', 'curl')
def test_a_stop_in_a_stream(live, folder, client, monkeypatch):
    "Ctrl-C after the first character. The engine stands still until the server has noticed; then it drops the answer within one step."
    steps, step, before = threading.Semaphore(12), live.engine.model.ragged, live.engine.stats.finished['cancelled']
    def gated(*args):
        steps.acquire()
        return step(*args)
    monkeypatch.setattr(live.engine.model, 'ragged', gated)
    env = client_env(f'http://127.0.0.1:{live.port}', f'sk-{client.name}', 'mini')
    process = subprocess.Popen([*shlex.split(client.run), QUESTION], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               start_new_session=True, preexec_fn=heeds_interrupts)
    watch = threading.Timer(60, os.killpg, (process.pid, signal.SIGKILL)) # what a shell has started too
    watch.start()
    try:
        assert process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.read()
        assert process.wait(60) not in (0, -signal.SIGKILL)
        end = time.monotonic() + 30
        while sum(live.server.running.values()) and time.monotonic() < end: time.sleep(.01)
        assert not sum(live.server.running.values())
    finally:
        watch.cancel()
        steps.release(1_000)
    live.idle()
    assert live.engine.stats.finished['cancelled'] == before + 1 and not live.engine.rows


AI_SDK = r"""
import {generateText, streamText, tool, stepCountIs, jsonSchema} from 'ai'
import {createAnthropic} from '@ai-sdk/anthropic'
import {createOpenAI} from '@ai-sdk/openai'
globalThis.AI_SDK_LOG_WARNINGS = false
const at = process.argv.at(-1), settings = {apiKey: 'sk-ann'}
const openai = createOpenAI({baseURL: at + '/v1', ...settings})
const models = {
  messages: [createAnthropic({baseURL: at + '/anthropic/v1', ...settings})('script'), {anthropic: {thinking: {type: 'adaptive'}}}],
  chat: [openai.chat('script'), {}],
  responses: [openai.responses('script'), {openai: {store: false, reasoningEffort: 'high', forceReasoning: true}}]}
const city = jsonSchema({type: 'object', properties: {city: {type: 'string'}}, required: ['city']})
const weather = tool({description: 'Weather', inputSchema: city, execute: async () => '18 °C'})
for (const [name, [model, providerOptions]] of Object.entries(models)) for (const generate of [generateText, streamText]) {
  const how = {model, prompt: 'Is it warm?', tools: {weather}, stopWhen: stepCountIs(3), providerOptions, maxRetries: 0}
  const answer = await generate({...how, onError: ({error}) => { throw error }})
  console.log(JSON.stringify([name, await answer.text, await answer.finishReason, (await answer.steps).length]))
}
"""


def test_the_schemas_of_the_ai_sdk(live):
    "It checks each answer with a schema: what has no value must be absent, or null, or empty, as the schema says"
    modules = Path(__file__).parent.parent/'.venv/clients/node_modules'
    if lacks := [n for n in ('ai', '@ai-sdk/anthropic', '@ai-sdk/openai') if not (modules/n).is_dir()]:
        pytest.skip(f'npm install --prefix .venv/clients {" ".join(lacks)}')
    command = ['node', '--input-type=module', '--eval', AI_SDK, f'http://127.0.0.1:{live.port}']
    done = subprocess.run(command, cwd=modules.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    want = [[name, SAID, 'stop', 2] for name in ('messages', 'chat', 'responses') for _ in range(2)]
    assert [json.loads(line) for line in done.stdout.splitlines()] == want


def test_every_program_is_known():
    assert {c.file for c in CLIENTS.values()} | {'recipes.py'} == {p.name for p in EXAMPLES.iterdir() if owner(p).name == PAGE.name}

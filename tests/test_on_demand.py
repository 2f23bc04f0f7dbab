"""Models that are loaded when a request names them, and let go by time and by memory, while answers run."""
import gc
import json
import threading
import time
import urllib.request
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

openai = pytest.importorskip('openai')
from test_server import HI, TEMPLATE  # noqa: E402

from deepseek_nb.arch.model import Model  # noqa: E402
from deepseek_nb.files.tokenizer import Tokenizer  # noqa: E402
from deepseek_nb.infer.engine import Engine  # noqa: E402
from deepseek_nb.serve.app import OnDemand, Server, ServerConfig  # noqa: E402
from deepseek_nb.serve.chat import ServedModel  # noqa: E402

MB = 2**20


class Shelf:
    "A server with models a, b and c on demand, each of 10 MB by its own word."
    def __init__(self, **config):
        self.loads, self.models, self.fail = [], [], set()
        waiting = {n: OnDemand(lambda n=n: self.load(n), 10*MB) for n in 'abc'}
        self.server, ready = Server([], ServerConfig(port=0, log_format='off', **config), waiting), threading.Event()
        self.thread = threading.Thread(target=self.server.run, args=(ready.set,), daemon=True)
        self.thread.start()
        assert ready.wait(60)
        self.address = f'http://127.0.0.1:{self.server.address[1]}'
        self.client = openai.OpenAI(api_key='none', base_url=f'{self.address}/v1', max_retries=0, timeout=60)

    def load(self, name):
        self.loads.append(name)
        if name in self.fail: raise OSError('the disk is gone')
        model, tok = Model.from_pretrained('mini'), Tokenizer.from_pretrained('mini')
        tok.chat_template = TEMPLATE
        self.models.append(weakref.ref(model))
        time.sleep(.2)
        return ServedModel(name, Engine(model, tok, nbytes=8*MB), tok)

    def ask(self, name, n=4):
        return self.client.chat.completions.create(model=name, messages=HI, max_tokens=n, temperature=0).choices[0].message.content

    def get(self, path):
        with urllib.request.urlopen(self.address + path, timeout=60) as r: return json.loads(r.read())

    @property
    def loaded(self): return [m['name'] for m in self.get('/api/ps')['models']]

    def stop(self):
        self.server.uvicorn.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def shelf(request):
    shelf = Shelf(**request.param)
    yield shelf
    shelf.stop()


@pytest.mark.parametrize('shelf', [dict(resident=25)], indirect=True)
def test_the_model_that_waits_longest_gives_its_place(shelf):
    assert [m['id'] for m in shelf.get('/v1/models')['data']] == ['a', 'b', 'c'] and shelf.loaded == []
    with ThreadPoolExecutor(8) as pool: answers = [*pool.map(shelf.ask, 'aaaaaaaa')]
    assert len({*answers}) == 1 and shelf.loads == ['a']  # eight at once, loaded once
    assert shelf.ask('b') == answers[0] and sorted(shelf.loaded) == ['a', 'b']
    shelf.ask('a:latest')
    shelf.ask('c')  # b is the one that waits longest
    assert sorted(shelf.loaded) == ['a', 'c'] and shelf.loads == ['a', 'b', 'c']
    gc.collect()
    assert [m() is None for m in shelf.models] == [False, True, False]
    metrics = urllib.request.urlopen(f'{shelf.address}/metrics').read().decode()
    assert 'num_requests_running{model_name="c"}' in metrics and 'num_requests_running{model_name="b"}' not in metrics
    assert {m['name'] for m in shelf.get('/api/tags')['models']} == {'a', 'b', 'c'}
    with pytest.raises(openai.NotFoundError, match='known are .*b'): shelf.ask('d')


@pytest.mark.parametrize('shelf', [dict(resident=10)], indirect=True)
def test_a_model_that_answers_stays(shelf):
    stream = shelf.client.chat.completions.create(model='a', messages=HI, max_tokens=300, temperature=0, stream=True,
                                                  logit_bias={str(i): -100 for i in shelf_ends()})
    next(stream)
    with pytest.raises(openai.InternalServerError, match='leave no memory') as e: shelf.ask('b')
    assert e.value.status_code == 503 and e.value.response.headers['retry-after'] and shelf.loaded == ['a']
    assert sum(1 for _ in stream) > 50
    assert shelf.ask('b') and shelf.loaded == ['b']


def shelf_ends(): return Tokenizer.from_pretrained('mini').eos_ids


@pytest.mark.parametrize('shelf', [dict(idle=.5)], indirect=True)
def test_models_leave_after_a_while_and_return(shelf):
    first, end = shelf.ask('a'), time.monotonic() + 30
    assert shelf.loaded == ['a']
    while shelf.loaded and time.monotonic() < end: time.sleep(.05)
    assert shelf.loaded == []
    gc.collect()
    assert shelf.models[0]() is None
    assert shelf.ask('a') == first and shelf.loads == ['a', 'a']


@pytest.mark.parametrize('shelf', [dict(resident=25)], indirect=True)
def test_a_load_that_fails_is_tried_again(shelf):
    shelf.fail.add('a')
    with pytest.raises(openai.InternalServerError, match='could not complete'): shelf.ask('a')
    shelf.fail.clear()
    assert shelf.ask('a') and shelf.loads == ['a', 'a'] and shelf.get('/health')['status'] == 'ok'

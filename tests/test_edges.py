"""The edges of what a server is asked for: numbers at the ends of their ranges, less memory than a context, control tokens in prompts, and
answers that the server itself cuts."""
import json
import math
import os
import random
import signal
import threading
import time

import pytest
import torch
import warm
from test_server import HI, JSON, SERVE, Live, openai, post

from deepseek_nb.arch.model import Model
from deepseek_nb.infer.drafts import Draft, pick_token
from deepseek_nb.infer.engine import Engine
from deepseek_nb.infer.sampling import RowSampler, SamplingParams, draw_token, sample_rows
from deepseek_nb.infer.speculate import verify_drafts
from deepseek_nb.serve.app import key_digest

COLD = 1e-38, 1e-30, 5e-324, 1e-45, 1e-20, -0.
TINY = 1e-38, 1e-46, 5e-324


@pytest.fixture
def seed(request):
    seed = int(os.environ.get('SEED', random.randrange(10**6)))
    print('SEED', seed)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope='module')
def live():
    live = Live(keys=dict(ann=key_digest('sk-ann')))
    yield live
    live.stop()


KEY = 'Authorization: bearer sk-ann\r\n'


def asked(live, body, path='/v1/chat/completions'): return post(live, dict(model='mini', max_tokens=4) | body, path, KEY)


@pytest.mark.parametrize('cold', COLD)
def test_a_cold_temperature_is_greedy(seed, cold):
    "In every sampler: the limit of a temperature that goes to 0 is the most likely token"
    x = torch.randn(20, 300)*torch.tensor([.01, 1., 30., 1e4]).repeat(5)[:, None]
    best, how = x.argmax(-1), SamplingParams(temperature=cold, top_p=.9, min_p=.1, top_k=50)
    assert [pick_token(row, [], RowSampler(how, []))[0] for row in x] == best.tolist()
    for i, t in enumerate(best.tolist()):
        for draft in (Draft([t]), Draft([t], [torch.full((300,), 1/300)])):
            [new] = verify_drafts(torch.stack([x[i], x[i-1]]), [RowSampler(how, [])], [draft])
            assert [d.id for d in new] == [t, int(best[i-1])]
    rows = [RowSampler(SamplingParams(temperature=cold, top_p=.9, logprobs=1, frequency_penalty=2), []) for _ in x]
    assert [d.id for d in sample_rows(x, rows)] == best.tolist()


@pytest.mark.parametrize('p', TINY)
def test_a_tiny_top_p_keeps_the_most_likely_token(seed, p):
    x = torch.randn(20, 300)
    rows = [RowSampler(SamplingParams(top_p=p), []) for _ in x]
    assert [d.id for d in sample_rows(x, rows)] == x.argmax(-1).tolist()


@pytest.mark.parametrize('wrong', [dict(temperature=math.inf), dict(temperature=math.nan), dict(temperature=1e308), dict(top_p=math.nan),
    dict(repetition_penalty=1e-38), dict(repetition_penalty=1e308), dict(repetition_penalty=math.inf), dict(min_p=math.nan)])
def test_what_has_no_limit_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): SamplingParams(**wrong)


def test_penalties_at_their_limits(seed):
    "Every allowed setting draws a token, at the coldest temperature that isn't greedy and at the hottest"
    seen = list(range(150))
    for penalty in (1e-6, 10):
        for temperature in (1e-30, 2):
            rows = [RowSampler(SamplingParams(temperature=temperature, repetition_penalty=penalty, presence_penalty=2, frequency_penalty=-2,
                                              logit_bias={3: 100, 4: -100, 5: 5e-324}), seen) for _ in range(8)]
            for row in rows: row.tokens = [*range(100, 200)]
            for d in sample_rows(torch.randn(8, 300)*20, rows): assert not isinstance(d, Exception)


def test_generate_at_a_cold_temperature(seed):
    model, ids = Model.from_pretrained('mini'), torch.randint(300, (1, 20))
    want = model.generate(ids, 12, eos_token_id=[])
    for how in (dict(temperature=1e-38), dict(temperature=1e-38, do_sample=True), dict(temperature=5e-324, draft='lookup', draft_tokens=3)):
        assert torch.equal(model.generate(ids, 12, eos_token_id=[], **how), want)


def test_a_cold_temperature_over_http(live):
    want = asked(live, dict(messages=HI, temperature=0))[1]['choices'][0]['message']
    for cold in COLD:
        status, answer = asked(live, dict(messages=HI, temperature=cold, top_p=1e-46, seed=2**63 - 1, n=2))
        assert status == 200 and [c['message'] for c in answer['choices']] == [want]*2, cold


@pytest.mark.parametrize('number', ['NaN', 'Infinity', '-Infinity', '1e309', '-1e309', '1e308', '1' + '0'*400, '-1' + '0'*400])
def test_numbers_beyond_all_limits(live, number):
    "Everywhere in a body, and also where nothing reads them"
    fields = ('temperature top_p min_p top_k repetition_penalty presence_penalty frequency_penalty seed timeout n max_tokens top_logprobs '
              'draft_tokens logit_bias').split()
    for name in fields:
        value = f'{{"5": {number}}}' if name == 'logit_bias' else number
        body = f'{{"model": "mini", "messages": {json.dumps(HI)}, "{name}": {value}}}'
        status, answer = post(live, body.encode(), headers=KEY)
        if name == 'max_tokens' and number == '1' + '0'*400: assert status == 200  # a limit above the context is that of the context
        else: assert status == 400 and isinstance(answer['error']['message'], str), name
    body = f'{{"model": "mini", "input": "Hi", "max_output_tokens": 1, "metadata": {{"a": {number}}}}}'
    status, answer = post(live, body.encode(), '/v1/responses', KEY)
    assert status == (400 if number[-1] in 'Ny9' else 200) # a long whole number is JSON, and comes back as it was sent


def test_control_tokens_in_a_prompt(live):
    "They are read as /tokenize reads them; in a message, and around a gap, they are text"
    name = max(live.tok.special_tokens, key=len)
    text = f'The Congress{name} of{name}{name}'
    ids = post(live, dict(prompt=text), '/tokenize', KEY)[1]['tokens']
    assert len(ids) < len(live.tok.encode(text))
    for prompt, n in ((text, 1), ([text, text], 2), (ids, 1)):
        status, answer = asked(live, dict(prompt=prompt, temperature=0), '/v1/completions')
        assert status == 200 and answer['usage']['prompt_tokens'] == n*len(ids)
    plain = asked(live, dict(messages=[dict(role='user', content='The Congress')]))[1]['usage']['prompt_tokens']
    named = asked(live, dict(messages=[dict(role='user', content=f'The Congress{name}')]))[1]['usage']['prompt_tokens']
    assert named - plain >= len(live.tok.encode(name)) - 1 > 1


@pytest.mark.parametrize('scheme', ['Bearer', 'bearer', 'BEARER', 'bEaReR '])
def test_the_scheme_in_any_case(live, scheme):
    body = dict(model='mini', messages=HI, max_tokens=1)
    assert post(live, body, headers=f'Authorization: {scheme} sk-ann\r\n')[0] == 200
    assert post(live, body, headers=f'Authorization: {scheme} sk-bob\r\n')[0] == 401
    assert post(live, body, headers=f'Authorization: {scheme}sk-ann\r\n')[0] == (200 if scheme[-1] == ' ' else 401)


@pytest.mark.parametrize('pages', [1, 3, 7])
def test_less_memory_than_a_context(pages):
    "A request without a limit goes to the end of what there is, and the server says how much that is"
    live = Live()
    try:
        whole = live.engine
        small = live.server.models['mini'].engine = Engine(whole.model, live.tok, nbytes=pages*whole.pool.page_bytes).start()
        room = pages*whole.pool.page
        status, answer = post(live, dict(model='mini', prompt='Hi', max_tokens=room + 1), '/v1/completions')
        assert status == 400 and 'more bytes' in answer['error']['message']
        with live.client() as client:
            card = client.models.list().data[0]
            assert card.max_model_len == card.max_input_tokens == room == live.server.models['mini'].context
            assert room < whole.model.config.max_positions
            how = dict(model='mini', logit_bias={i: -100 for i in small.ends})
            for _ in range(2): # the second one finds pages of the first
                used = client.chat.completions.create(messages=HI, **how).usage
                assert used.total_tokens == room
            used = client.responses.create(model='mini', input='The Congress of the United States', max_output_tokens=4).usage
            assert used.output_tokens == 4
            with pytest.raises(openai.BadRequestError, match=f'maximum context length is {room} tokens'):
                client.chat.completions.create(messages=[dict(role='user', content='word '*room)], **how)
    finally:
        small.close(drain=False)
        live.stop()


PATHS = {'/v1/chat/completions': dict(messages=HI), '/beta/chat/completions': dict(messages=HI), '/v1/completions': dict(prompt='The'),
         '/v1/responses': dict(input='The', max_output_tokens=400, max_tokens=None), '/v1/messages': dict(messages=HI)}


@pytest.mark.parametrize('path', PATHS)
@pytest.mark.parametrize('stream', [False, True])
def test_an_answer_that_a_drain_cuts(path, stream):
    "It is no answer that has reached its length: an error says that it isn't whole, in the form of the protocol"
    live = Live(drain=.2)
    step = live.engine.model.ragged
    def slow(*args):
        time.sleep(.02)
        return step(*args)
    live.engine.model.ragged = slow
    body = dict(model='mini', max_tokens=400, stream=stream) | PATHS[path]
    body = {k: v for k, v in body.items() if v is not None}
    if path != '/v1/messages' and path != '/v1/responses': body['logit_bias'] = {str(i): -100 for i in live.engine.ends}
    data, found = json.dumps(body).encode(), []
    head = f'POST {path} HTTP/1.1\r\n{JSON}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n'
    reader = threading.Thread(target=lambda: found.append(live.raw(head.encode() + data)))
    reader.start()
    while not live.engine.stats.output_tokens: time.sleep(.01)
    live.stop()
    reader.join()
    status, _, rest = found[0].partition(b'\r\n')
    said = rest.decode()
    assert 'the server stopped before the answer was complete' in said and 'max_tokens' not in said.replace('max_output_tokens', '')
    assert '"length"' not in said and '"incomplete"' not in said and '"completed"' not in said
    if not stream: assert int(status.split()[1]) == 503 and 'retry-after: 1' in said.lower()
    else: assert int(status.split()[1]) == 200
    if stream: assert {'/v1/messages': 'event: error', '/v1/responses': 'event: response.failed'}.get(path, 'data: {"error"') in said
    if '/messages' in path: assert 'overloaded_error' in said


def test_the_client_of_a_cut_stream_raises():
    code = SERVE.format(folder=os.path.dirname(__file__)).replace('drain=20', 'drain=0')
    process = warm.start('-c', code, modules=warm.WORKER)
    try:
        client = openai.OpenAI(api_key='x', base_url=f'http://127.0.0.1:{int(warm.first_line(process))}/v1', max_retries=0)
        stream = client.chat.completions.create(model='mini', messages=HI, max_tokens=400, logit_bias={1: -100}, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match='the server stopped before'): list(stream)
        process.wait(60)
    finally: process.kill()


def test_rows_are_drawn_with_the_bits_they_have_alone(seed):
    "32 rows of mixed settings and a broken one: each has the tokens that it draws alone, and by the readable definition"
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    w = r.choice([63, 64, 1000, 4097])
    steps = torch.randn(3, 33, w, generator=g)*torch.rand(3, 33, 1, generator=g)*8
    steps[:, 5] = torch.nan
    how = [SamplingParams(r.choice([0., .7, 1.5]), r.choice([.5, .95, 1.]), r.choice([0, 1, 40, w]), r.choice([0., .05]),
                          repetition_penalty=r.choice([1., 1.05]), seed=i) for i in range(33)]
    rows, alone, naive = ([RowSampler(h, [1, 2]) for h in how] for _ in range(3))
    for x in steps:
        found = sample_rows(x, rows)
        for i, new in enumerate(found):
            if i == 5: assert isinstance(new, FloatingPointError); continue
            assert [new] == sample_rows(x[i:i+1], alone[i:i+1]), i
            p = naive[i].weights(x[i])
            naive[i].tokens.append(int(p.argmax()) if how[i].greedy else draw_token(p, naive[i].uniform()))
            assert new.id == naive[i].tokens[-1], (i, how[i])

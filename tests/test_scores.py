"""Embeddings, orders and classes, asked by the clients of OpenAI and Ollama and by plain requests, beside answers that run."""
import threading

import numpy as np
import pytest
import torch

pytest.importorskip('openai')
from test_page import post  # noqa: E402
from test_server import HI, Live  # noqa: E402

from deepseek_nb.infer.scores import log_likelihoods, pooled  # noqa: E402
from deepseek_nb.serve.scores import PASSAGE  # noqa: E402

TEXTS = ['The Congress of the United States', 'a', 'New York is a city in the state of New York. ' * 9]


@pytest.fixture(scope='module')
def live():
    live = Live()
    yield live
    live.stop()


def own(model, ids):
    "The position-weighted mean in float64, by a loop"
    with torch.inference_mode(): h = model.hidden(torch.tensor([ids]))[0].double().numpy()  # as served: in bfloat16 where there is AMX
    v = sum((i + 1)*row for i, row in enumerate(h))
    return v/np.linalg.norm(v)


def test_the_vectors_of_two_clients_are_those_of_the_definition(live):
    ids, model = [live.tok(t).input_ids for t in TEXTS], live.engine.model
    want = np.stack([own(model, row) for row in ids])
    for given in (TEXTS, ids):
        found = live.client().embeddings.create(model='mini', input=given)  # base64, unless the caller says so
        np.testing.assert_allclose([d.embedding for d in found.data], want, atol=1e-6)
        assert [d.index for d in found.data] == [0, 1, 2] and found.usage.prompt_tokens == sum(map(len, ids))
    short = live.client().embeddings.create(model='mini', input=TEXTS[0], dimensions=7, encoding_format='float').data[0].embedding
    np.testing.assert_allclose(short, want[0, :7]/np.linalg.norm(want[0, :7]), atol=1e-6)
    ollama = pytest.importorskip('ollama')
    said = ollama.Client(host=f'http://127.0.0.1:{live.port}').embed('mini', TEXTS)
    np.testing.assert_allclose(said.embeddings, want, atol=1e-6)


def test_the_order_of_documents_is_that_of_likelihoods(live):
    model, tok, query = live.engine.model, live.tok, 'Which city is large?'
    asked = tok.encode(f' {query}')
    contexts = [tok('Passage: ').input_ids + tok.encode(t) + tok.encode('\nA question that this passage answers:') for t in TEXTS]
    assert PASSAGE == 'Passage: {text}\nA question that this passage answers:'
    want = [np.exp(log_likelihoods(model, [[(c, asked)]])[0][0]/len(asked)) for c in contexts]
    for path in ('/v1/rerank', '/v2/rerank', '/rerank'):
        found = post(live, path, query=query, documents=[TEXTS[0], dict(text=TEXTS[1]), TEXTS[2]], return_documents=False)['results']
        assert [d['index'] for d in found] == sorted(range(3), key=lambda i: -want[i]) and 'document' not in found[0]
        np.testing.assert_allclose([d['relevance_score'] for d in found], sorted(want, reverse=True), rtol=1e-5)


def test_classes_add_up_to_one_and_follow_the_names(live):
    found = post(live, '/v1/classify', input=TEXTS, labels=['law', 'art', 'city'])
    assert len(found['data']) == 3 and found['classes'] == ['law', 'art', 'city']
    for d in found['data']: assert abs(sum(d['probs']) - 1) < 1e-9 and d['label'] == found['classes'][int(np.argmax(d['probs']))]
    turned = post(live, '/v1/classify', input=TEXTS, labels=['city', 'law', 'art'])
    np.testing.assert_allclose([d['probs'] for d in turned['data']], [np.roll(d['probs'], 1) for d in found['data']], rtol=1e-6)


@pytest.mark.parametrize('path, body, said', [
    ('embeddings', dict(), 'input is missing'), ('embeddings', dict(input=[3, 'a']), 'token ids'),
    ('embeddings', dict(input=['']), 'not empty'), ('rerank', dict(query='', documents=['b']), 'it must have a word'),
    ('embeddings', dict(input='a b'*9000), 'the context is 512'), ('embeddings', dict(input=['a']*1001), '1,000'),
    ('rerank', dict(query='a', documents='b c', top_n='2'), 'top_n must be'),
    ('classify', dict(input='a', labels=['b']), '2 to 100 names'), ('classify', dict(input='a', labels=['b', 3]), 'labels must be')])
def test_errors_say_what_and_where(live, path, body, said):
    error = post(live, f'/v1/{path}', **body)
    assert said in error['message'] and error['type'] == 'invalid_request_error'


def test_an_answer_that_comes_at_the_same_time_stays_as_it_was(live):
    ask = lambda: live.client().chat.completions.create(model='mini', messages=HI, max_tokens=48, temperature=0).choices[0].message.content
    want, wrong = ask(), []
    vector = pooled(live.engine.model, live.tok(TEXTS[2]).input_ids).tolist()
    def embed():
        for _ in range(12):
            got = post(live, '/v1/embeddings', input=TEXTS[2])['data'][0]['embedding']
            if not np.allclose(got, vector, atol=1e-6): wrong.append(got)
    thread = threading.Thread(target=embed)
    thread.start()
    while thread.is_alive(): assert ask() == want
    thread.join()
    assert not wrong
    live.idle()

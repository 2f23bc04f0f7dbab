"The harness's model class: scores by their definition, and the same numbers as the harness's own classes, offline and over HTTP"
import gzip
import importlib.util
import json
import os
import random
import secrets
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_choice import make

from deepseek_nb.eval import report as H
from deepseek_nb.files.tokenizer import Tokenizer

DATA = Path(os.environ.get('DEEPSEEK_NB_DATA') or Path(__file__).parents[2]/'shared/data')
INSTALLED = importlib.util.find_spec('lm_eval') is not None
TASKS = ['piqa_local', 'hellaswag_local']


@pytest.fixture(scope='module')
def models(): return {kind: make(kind) for kind in ('llama', 'deepseek_v3')}


def alone(model, context, continuation):
    ids = (context + continuation)[-(model.config.max_positions + 1):]
    with torch.no_grad(): logits = model(torch.tensor([ids[:-1]]))[0, -len(continuation):].double()
    want = torch.tensor(continuation)
    best = logits.gather(1, want[:, None])[:, 0]
    others = logits.scatter(1, want[:, None], -torch.inf).amax(1)
    return logits.log_softmax(-1).gather(1, want[:, None]).sum().item(), float((best - others).min())


tokens = lambda low, high: st.lists(st.integers(0, 63), min_size=low, max_size=high)
asked = st.lists(st.tuples(tokens(0, 30), tokens(1, 25), st.lists(tokens(1, 40), min_size=1, max_size=3)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=20)
@given(asked, tokens(0, 25), st.integers(1, 200), st.sampled_from(['llama', 'deepseek_v3']), st.randoms())
def test_scores_by_their_definition(models, asked, common, budget, kind, rng):
    "Any prefix, any budget, contexts that are cut, any order"
    model = models[kind]
    pairs = [(common + a + b, c) for a,b,cs in asked for c in cs]
    rng.shuffle(pairs)
    scorer = H.PairScorer(model, budget)
    for got,pair in zip(scorer.score(pairs), pairs, strict=True):
        logprob,lead = alone(model, *pair)
        assert got.logprob == pytest.approx(logprob, abs=3e-4, rel=2e-5)
        if abs(lead) > 1e-4: assert got.greedy == (lead > 0)
    assert scorer.computed <= scorer.asked


class Ask:
    def __init__(self, *args): self.args = args


class Hook(list):
    def add_partial(self, *args): self.append(args)


@pytest.fixture
def mini():
    pytest.importorskip('lm_eval', reason='lm-eval is not installed')
    return H.Model.from_pretrained('mini'), Tokenizer.from_pretrained('mini')


PROMPT = 'The Congress of the United States shall have power to lay and collect taxes, duties, imposts and excises'


def test_generations(mini):
    "Greedy, cut at the left, until a stop string; and the harness's cache hears of each answer"
    model,tok = mini
    lm = H.harness_model(*mini, max_length=24)
    lm.cache_hook = Hook()
    asks = [Ask(PROMPT, dict(max_gen_toks=8)), Ask('The House', dict(max_gen_toks=8))]
    got = lm.generate_until(asks)
    for r,text in zip(asks, got, strict=True):
        ids = torch.tensor([([tok.bos_id]*tok.add_bos + tok.encode(r.args[0]))[-16:]])
        assert text == tok.decode(model.generate(ids, 8, eos_token_id=list(tok.eos_ids))[0, ids.shape[1]:])
    stop = got[0][3:5]
    assert lm.generate_until([Ask(PROMPT, dict(max_gen_toks=8, until=[stop]))]) == [got[0][:got[0].index(stop)]]
    assert [h[0] for h in lm.cache_hook] == ['generate_until']*3
    assert {h[1][0]: h[2] for h in lm.cache_hook[:2]} == {r.args[0]: text for r,text in zip(asks, got, strict=True)}
    with pytest.raises(ValueError, match='unheard_of'): lm.generate_until([Ask('a', dict(max_gen_toks=2, unheard_of=1))])


@pytest.mark.parametrize('limit', [None, 5, 16])
def test_documents_by_their_definition(mini, limit):
    "Each token once, as much context as fits; the harness's cache hears of each document, and of each pair"
    model,tok = mini
    lm = H.harness_model(*mini, max_length=limit)
    lm.cache_hook = Hook()
    stream = [lm.prefix_token_id, *lm.tok_encode(PROMPT)]
    n,at,want = limit or model.config.max_positions,0,0.
    while at < len(stream) - 1:
        end = min(at + n, len(stream) - 1)
        want += alone(model, stream[max(0, end - n):at + 1], stream[at + 1:end + 1])[0]
        at = end
    found, = lm.loglikelihood_rolling([Ask(PROMPT)])
    assert found == pytest.approx(want, abs=3e-4, rel=2e-5)
    pair = 'The Congress of the', ' United'
    scored, = lm.loglikelihood([Ask(*pair)])
    assert lm.cache_hook == [('loglikelihood_rolling', (PROMPT,), found), ('loglikelihood', pair, scored)]


def test_by_its_name(mini):
    "The harness finds the class as `deepseek-nb`, and loads the model that is named; conversations get its template"
    from lm_eval.api.registry import get_model
    named = get_model('deepseek-nb').create_from_arg_string('pretrained=mini,dtype=float32', dict(device='cpu', batch_size=4))
    assert type(named) is type(H.harness_model(*mini)) and named.tokenizer_name == 'mini' and named.batch_size == 4
    ask = Ask(PROMPT, ' for the common defence')
    assert named.loglikelihood([ask])[0][0] == pytest.approx(H.harness_model(*mini).loglikelihood([ask])[0][0], abs=1e-3)
    tok = Tokenizer.from_pretrained('smollm2-135m')
    lm = H.harness_model(H.Model.from_pretrained('smollm2-135m', device='cpu'), tok)
    messages = [dict(role='user', content='Is ice cold?'), dict(role='assistant', content='Yes, ice')]
    assert lm.chat_template(True) == tok.chat_template
    for end in (True, False):
        want = tok.prompt(messages[:2 - end], add_generation_prompt=end, continue_final_message=not end)
        assert lm.apply_chat_template(messages[:2 - end], end) == want


def test_says_what_to_install():
    if INSTALLED: pytest.skip('lm-eval is installed')
    with pytest.raises(ImportError, match='lm_eval is not installed'): H.harness_model(None)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "Two of the harness's tasks over a handful of rows, drawn anew; HARNESS_ROWS=100 asks more"
    pytest.importorskip('lm_eval', reason='lm-eval is not installed')
    if not DATA.exists(): pytest.skip('the data sets are not on this machine')
    folder,n = tmp_path_factory.mktemp('tasks'),int(os.environ.get('HARNESS_ROWS', 12))
    print('seed', seed := secrets.randbits(32))
    rng = random.Random(seed)
    rows = [json.loads(line) for line in gzip.open(DATA/'piqa/valid.jsonl.gz', 'rt')]
    labels = (DATA/'piqa/valid-labels.lst').read_text().split()
    rows = rng.sample([r | dict(label=int(y)) for r,y in zip(rows, labels, strict=True)], n)
    (folder/'piqa.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    rows = rng.sample([json.loads(line) for line in gzip.open(DATA/'hellaswag_sample/val_1000.jsonl.gz', 'rt')], (n + 2)//3)
    (folder/'hellaswag.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    for base,name,file in (('piqa/piqa.yaml', 'piqa_local', 'piqa'), ('hellaswag/hellaswag.yaml', 'hellaswag_local', 'hellaswag')):
        H.local_task(folder, base, name, dict.fromkeys(('train', 'validation'), folder/f'{file}.jsonl'))
    return folder


@pytest.fixture(scope='module')
def smol(): return H.Model.from_pretrained('smollm2-135m', dtype='float32', device='cpu'), Tokenizer.from_pretrained('smollm2-135m')


def scores(found):
    return {task: [[r[0][0] for r in s['resps']] for s in sorted(found['samples'][task], key=lambda s: s['doc_id'])] for task in TASKS}


def close(a, b, atol):
    for task in TASKS:
        worst = max(np.abs(np.float64(x) - np.float64(y)).max() for x,y in zip(a[task], b[task], strict=True))
        print(task, len(a[task]), 'questions, largest difference', worst)
        for x,y in zip(a[task], b[task], strict=True): np.testing.assert_allclose(np.float64(x), np.float64(y), atol=atol, rtol=0)


@pytest.fixture(scope='module')
def ours(folder, smol): return H.run_tasks(H.harness_model(*smol), TASKS, folder, log_samples=True, bootstrap_iters=0)


def accuracy(found): return {t: {k: v for k,v in found['results'][t].items() if k.startswith('acc')} for t in TASKS}


def test_the_harness_with_transformers(folder, smol, ours, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM
    smol[0].save_pretrained(tmp_path)
    theirs = HFLM(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), backend='causal', batch_size=8, device='cpu',
                  tokenizer=smol[1].to_transformers())  # transformers' own reading of the file leaves out that digits stand alone
    found = H.run_tasks(theirs, TASKS, folder, log_samples=True, bootstrap_iters=0)
    close(scores(ours), scores(found), 1e-3)
    assert accuracy(ours) == accuracy(found)


def test_over_http(folder, smol, ours):
    import threading

    from deepseek_nb.infer.engine import Engine
    from deepseek_nb.serve.app import Server, ServerConfig
    from deepseek_nb.serve.chat import ServedModel
    server,ready = Server([ServedModel('smol', Engine(*smol), smol[1])], ServerConfig(port=0)),threading.Event()
    thread = threading.Thread(target=server.run, args=(ready.set,), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        where = f'http://127.0.0.1:{server.address[1]}/v1/completions'
        args = dict(model='smol', base_url=where, tokenizer_backend='auto', num_concurrent=4)
        found = H.run_tasks('local-completions', TASKS, folder, model_args=args, log_samples=True, bootstrap_iters=0)
        close(scores(ours), scores(found), 1e-4)
        assert accuracy(ours) == accuracy(found)
    finally:
        server.uvicorn.should_exit = True
        thread.join(60)


def test_the_same_bits_as_the_engine():
    "The log-probabilities of a prompt depend neither on its chunks nor on who computes them"
    from deepseek_nb.infer.engine import Engine
    from deepseek_nb.infer.request import Request
    model, tok = H.Model.from_pretrained('mini', dtype='float32', device='cpu'), Tokenizer.from_pretrained('mini')
    ids = torch.randint(4000, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for budget in (256, 40):
        engine = Engine(model, tok, budget=budget)
        stream = engine.submit(Request(ids, max_tokens=1, prompt_logprobs=True))
        while engine.count: engine.step()
        found.append([d.logprob for d in stream.prompt_logprobs])
    assert found[0] == found[1]
    for start in (1, 60, 149): assert H.PairScorer(model).score([(ids[:start], ids[start:])])[0].logprob == sum(found[0][start:])

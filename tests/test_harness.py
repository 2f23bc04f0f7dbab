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


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 63), max_size=40), st.integers(1, 12))
def test_windows_by_their_definition(document, limit):
    "Each token once, as much context as fits, and exactly the harness's windows where it is installed"
    windows = H.rolling_windows(document, 99, limit)
    assert [t for _,c in windows for t in c] == document
    stream,at = [99, *document],0
    for before,after in windows:
        at += len(after)
        assert before + after == stream[at + 1 - len(before) - len(after):at + 1]
        assert len(before) + len(after) - 1 == min(limit, at)
    if not INSTALLED: return
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    theirs = [make_disjoint_window(w) for w in get_rolling_token_windows(document, 99, limit, 1)]
    assert windows == [tuple(w) for w in theirs]


@pytest.mark.parametrize('kwargs,error', [(dict(num_beams=2), "'num_beams' is not supported"),
                                          (dict(temperature=900), 'temperature is 900')])
def test_generation_settings(kwargs, error):
    with pytest.raises(ValueError, match=error): H.generation_of(kwargs)


def test_settings_of_generations():
    for settings_,want in ((dict(), (0., 256, ())), (dict(until='a', max_tokens=3, do_sample=True, temperature=.5), (.5, 3, ('a',))),
                       (dict(do_sample=False, temperature=.5), (0., 256, ())), (dict(max_gen_toks=1, max_tokens=2), (0., 1, ()))):
        how,most,stops = H.generation_of(settings_)
        assert (how.temperature, most, stops) == want


class Ask:
    def __init__(self, *args): self.args = args


def test_generations(models):
    "Greedy, cut at the left, until a stop string; and the harness's cache hears of each answer"
    tok,heard = Tokenizer.from_pretrained('mini'),[]
    model = H.Model.from_pretrained('mini')
    lm = H.HarnessMethods(model, tok, max_length=24)
    lm.cache_hook = type('Hook', (), dict(add_partial=lambda self, *a: heard.append(a)))()
    prompt = 'The Congress of the United States shall have power to lay and collect taxes, duties, imposts and excises'
    asks = [Ask(prompt, dict(max_gen_toks=8)), Ask('The House', dict(max_gen_toks=8))]
    got = lm.generate_until(asks)
    for r,text in zip(asks, got, strict=True):
        ids = torch.tensor([([tok.bos_id]*tok.add_bos + tok.encode(r.args[0]))[-16:]])
        assert text == tok.decode(model.generate(ids, 8, eos_token_id=list(tok.eos_ids))[0, ids.shape[1]:])
    stop = got[0][3:5]
    assert lm.generate_until([Ask(prompt, dict(max_gen_toks=8, until=[stop]))]) == [got[0][:got[0].index(stop)]]
    assert [h[0] for h in heard] == ['generate_until']*3 and heard[0][1][0] == prompt and heard[0][2] == got[0]
    with pytest.raises(ValueError, match='leave no room'): lm.generate_until([Ask('a', dict(max_gen_toks=24))])
    with pytest.raises(ValueError, match="'peft' is not supported"): H.HarnessMethods(model, tok, peft='x')


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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deepseek_nb.files.hub import fetch
    smol[0].save_pretrained(tmp_path)
    path = fetch('smollm2-135m')
    theirs = HFLM(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), backend='causal', batch_size=8, device='cpu',
                  tokenizer=AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
    found = H.run_tasks(theirs, TASKS, folder, log_samples=True, bootstrap_iters=0)
    close(scores(ours), scores(found), 1e-3)
    assert accuracy(ours) == accuracy(found)


def test_over_http(folder, smol, ours):
    import threading

    from deepseek_nb.serve.app import Server, ServerConfig
    from deepseek_nb.serve.chat import ServedModel
    server,ready = Server([ServedModel('smol', H.Engine(*smol), smol[1])], ServerConfig(port=0)),threading.Event()
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
    model, tok = H.Model.from_pretrained('mini', dtype='float32', device='cpu'), Tokenizer.from_pretrained('mini')
    ids = torch.randint(4000, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for budget in (256, 40):
        engine = H.Engine(model, tok, budget=budget)
        stream = engine.submit(H.Request(ids, max_tokens=1, prompt_logprobs=True))
        while engine.count: engine.step()
        found.append([d.logprob for d in stream.prompt_logprobs])
    assert found[0] == found[1]
    for start in (1, 60, 149): assert H.PairScorer(model).score([(ids[:start], ids[start:])])[0].logprob == sum(found[0][start:])

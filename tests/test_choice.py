"Multiple choice: the same numbers as lm-evaluation-harness, whatever is shared, padded or cut"
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.eval import choice as C
from deepseek_nb.files.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent/'fixtures'  # choice.json is written by make_choice.py beside it
LLAMA = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, inter_dim=48)
V3 = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, inter_dim=48, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
          qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2, moe_inter_dim=16,
          n_dense_layers=1, score_func='sigmoid', score_bias=True, group_score='sum2', norm_topk=True)


def make(kind, vocab=64, positions=48, std=.2):
    torch.manual_seed(0)
    config = Config(kind, vocab_size=vocab, max_positions=positions, **(V3 if kind == 'deepseek_v3' else LLAMA))
    return Model(config, dtype='float32', device='cpu').init_weights(std).eval()


@pytest.fixture(scope='module')
def tok(): return Tokenizer.from_pretrained('smollm2-135m')


@pytest.fixture(scope='module')
def models(): return {kind: make(kind) for kind in ('llama', 'deepseek_v3')}


def form(row):
    "A row of the fixture, put by this package's own forms where it has one"
    put = dict(cloze=C.cloze, letters=C.letters).get(row['form'], lambda row: (row['context'], row['choices']))(row)
    assert put[0] == row['context']
    return put


def test_the_stored_numbers(tok):
    stored = json.loads((FIXTURES/'choice.json').read_text(encoding='utf-8'))
    model = Model.from_pretrained('smollm2-135m', dtype='float32', device='cpu')
    got,rows = C.multiple_choice(model, tok, stored['rows'], form),stored['rows']
    worst = max(abs(a - b)/(1 + abs(b)) for ours,row in zip(got.scores, rows, strict=True) for a,b in zip(ours, row['scores'], strict=True))
    assert worst < 1e-5, worst  # sums of logits in float32, over as many tokens as an answer has
    for name,length in (('acc', lambda a: 1), ('acc_norm', len), ('acc_bytes', C.in_bytes)):
        assert got.hits(length).tolist() == [row[name] for row in rows], name
        assert got.hits(length).mean() == pytest.approx(stored['results'][name], abs=1e-12)
        assert C.stderr(got.hits(length)) == pytest.approx(stored['results'][f'{name}_stderr'], rel=1e-9)
    assert (got.acc, got.acc_norm, got.acc_bytes) == tuple(stored['results'][k] for k in ('acc', 'acc_norm', 'acc_bytes'))


@pytest.mark.parametrize('kind', ['llama', 'deepseek_v3'])
def test_against_lm_eval(kind, tmp_path):
    "A random model, saved, with contexts longer than it can read"
    pytest.importorskip('lm_eval', reason='lm-eval is not installed')
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from deepseek_nb.files.hub import fetch
    spec = importlib.util.spec_from_file_location('make_choice', FIXTURES/'make_choice.py')
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    tok = Tokenizer.from_pretrained('deepseek-v4-tokenizer')
    model = make(kind, len(tok), 64)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rows = [dict(r, form='') for r in script.MADE if r['context']] + [
        dict(context='word '*90 + 'end', choices=['a', 'a much longer answer than that', 'b ' * 20], answer=1, form=''),
        dict(context='深度求索' * 10, choices=[' two spaces', 'é', 'naïve 🐶'], answer=1, form='')]
    found,results = script.evaluate(theirs, AutoTokenizer.from_pretrained(fetch('deepseek-v4-tokenizer')), rows, max_length=64)
    got = C.multiple_choice(model, tok, rows, form)
    for ours,row in zip(got.scores, found, strict=True): np.testing.assert_allclose(ours, row['scores'], atol=2e-3)
    assert [got.acc, got.acc_norm, got.acc_bytes] == [results[k] for k in ('acc', 'acc_norm', 'acc_bytes')]


def alone(model, context, answer):
    ids = (context + answer)[-(model.config.max_positions + 1):]
    with torch.no_grad(): logp = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return sum(logp[-i, ids[-i]].item() for i in range(1, len(answer) + 1))


ids = lambda low, high: st.lists(st.integers(0, 63), min_size=low, max_size=high)
questions = st.lists(st.tuples(ids(1, 55), st.lists(ids(1, 12), min_size=1, max_size=4)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=25)
@given(questions, st.sampled_from(['llama', 'deepseek_v3']))
def test_one_by_one(models, questions, kind):
    got = C.log_likelihoods(models[kind], [[(c, a) for a in answers] for c,answers in questions])
    for ours,(c,answers) in zip(got, questions, strict=True):
        np.testing.assert_allclose(ours, [alone(models[kind], c, a) for a in answers], atol=2e-4, rtol=2e-5)


def test_answers_with_contexts_of_their_own(models):
    pairs = [[([1, 2, 3], [4]), ([5, 6], [7, 8])], [([9], [1])]]
    got = C.log_likelihoods(models['llama'], pairs)
    np.testing.assert_allclose(sum(got, []), [alone(models['llama'], c, a) for c,a in sum(pairs, [])], atol=2e-4)


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_measures_by_their_definition(data):
    text = st.text(st.sampled_from('aé猫🐶 '), min_size=1, max_size=5)
    n = data.draw(st.integers(2, 8))
    answers = [data.draw(st.lists(text, min_size=2, max_size=4)) for _ in range(n)]
    scores = [[data.draw(st.sampled_from([-1., -2., -3., -4., -6.])) for _ in a] for a in answers]
    right = [data.draw(st.integers(0, len(a)-1)) for a in answers]
    got = C.Choices(scores, answers, right)
    for value,length in ((got.acc, lambda a: 1), (got.acc_norm, lambda a: len(a)), (got.acc_bytes, lambda a: len(a.encode()))):
        hits = []
        for s,a,r in zip(scores, answers, right, strict=True):
            values = [x/length(t) for x,t in zip(s, a, strict=True)]
            hits.append(values.index(max(values)) == r)
        assert value == pytest.approx(sum(hits)/n)
    p = got.acc
    assert got.acc_stderr == pytest.approx(math.sqrt(p*(1-p)/(n-1)), abs=1e-12)


def test_paired_comparison():
    rng = np.random.default_rng(0)
    right,answers = [0]*400,[['a', 'b']]*400
    a,b = (C.Choices([[0., s] for s in rng.normal(-.5, 1, 400)], answers, right) for _ in range(2))
    d,e = a.against(b)
    assert d == pytest.approx(a.acc_norm - b.acc_norm) and e == pytest.approx((a.hits(len) - b.hits(len)).std(ddof=1)/20)
    assert a.against(a) == (0., 0.)
    with pytest.raises(ValueError, match='the results are for different questions'): a.against(C.Choices(a.scores, answers, [1]*400))


def test_examples_go_first(tok):
    rows = [dict(question=f'q{i}', choices=['x', 'y'], answer=i % 2) for i in range(3)]
    assert C.with_examples(rows[:2])(rows[2]) == ('Question: q0\nAnswer: x\n\nQuestion: q1\nAnswer: y\n\nQuestion: q2\nAnswer:', ['x', 'y'])
    assert C.with_examples(rows[1:2], C.letters)(rows[0])[0] == 'q1\nA. x\nB. y\nAnswer: B\n\nq0\nA. x\nB. y\nAnswer:'
    assert C.cloze(dict(rows[0], passage='P.'))[0] == 'P.\nQuestion: q0\nAnswer:'
    assert [tok.decode(x) for x in C.encode_pair(tok, 'a  ', 'b')] == ['a', '  b']


@pytest.mark.parametrize('row,error', [
    (dict(answer=2), 'question 1: answer 2 is not one of its 2 choices'), (dict(answer=-1), 'question 1: answer -1 is not one'),
    (dict(choices=['a', '']), 'question 1 has an empty choice'), (dict(choices=[]), 'question 1: answer 0 is not one of its 0 choices'),
    (dict(context='   '), 'consists of white space only'), (dict(choices=['w '*99, 'a']), 'has .* tokens; each needs 1 to 48')])
def test_bad_questions(models, tok, row, error):
    good = dict(context='c', choices=['a', 'b'], answer=0, form='')
    with pytest.raises(ValueError, match=error) as e: C.multiple_choice(models['llama'], tok, [good, good | row], form)
    assert '\n' not in str(e.value)


def test_no_questions(models):
    with pytest.raises(ValueError, match='there are no questions'): C.multiple_choice(models['llama'], None, [])

"The second study of fewer experts: the plan, the start, FLOPs against a counter, the gate on made-up runs, and two tiny runs"
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.core.dispatch import use
from deepseek_nb.studies import open_study, read_plan, read_protocol, run_study
from deepseek_nb.studies.cases import WordBayes
from deepseek_nb.train.dynamic import mixtures
from deepseek_nb.train.upcycle import TAU, moe_config, to_moe

X, C = open_study('spared'), open_study('compute')
PLAN = Path(__file__).parents[1]/'nbs/configs/evidence/spared.toml'
TASKS = ('a', 'b', 'c')


@pytest.fixture(scope='module')
def dense():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    c = Config('llama', vocab_size=90, dim=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, inter_dim=96, max_positions=64,
               tie_embeddings=True)
    return Model(c, 'float32', 'cpu').init_weights(.3).requires_grad_(False).eval()


def mixture(dense, active): return to_moe(dense, moe_config(dense.config, 12, active), torch.randint(90, (4, 40)))


def test_plan():
    plan = read_plan(PLAN)
    full = plan.arms['full']
    def differs(arm): return {k for k in full if full[k] != plan.arms[arm][k]} - {'rates', 'scores'}
    assert differs('small') == {'active'} and differs('spared') == {'after'} and differs('dense') == {'kind'}
    assert len(plan.seeds) >= 3 and {*read_protocol(plan)['floors']} == {'constant', 'bayes', 'bayes-all'}
    assert plan.arms['bayes-all']['learn'] == 0 and all(plan.arms[a]['learn'] == full['learn'] for a in plan.arms if a != 'bayes-all')
    assert {k for k in X.DATA if plan.arms['bayes'][k] != full[k]} == set()
    d, f = 576, 1536//full['experts']
    c = Config('glm4_moe', dim=d, n_layers=full['blocks'], n_heads=9, n_kv_heads=3, head_dim=64, inter_dim=1536, moe_inter_dim=f,
               n_routed_experts=full['experts'], n_activated_experts=8, vocab_size=9)
    other, n = C.text_flops(c, 25, 20)
    assert (8 - full['mean'])*n*6*d*f/(other + 8*n*6*d*f) >= .42  # the claim is within reach


def test_every_neuron_is_in_one_expert_and_routers_keep_their_order(dense):
    made, tokens = mixture(dense, 12), torch.randint(90, (3, 17))
    for old, new in zip(dense.layers, mixtures(made), strict=True):
        rows = new.experts.gate_up_proj[:, :8].reshape(96, 32)
        assert {tuple(r) for r in rows.tolist()} == {tuple(r) for r in old.mlp.gate_proj.weight.tolist()}
    want = C.answer(dense, tokens)
    assert (C.answer(made, tokens) - want).norm() < .02*want.norm()
    x = torch.randn(200, 32)
    before = [m.gate(x) for m in mixtures(made)]
    X.sharpen(made, .5)
    for a, m in zip(before, mixtures(made), strict=True):
        b = m.gate(x)
        logits = (x@m.gate.weight.T)*TAU/.5
        torch.testing.assert_close(logits.sigmoid(), a.scores, atol=1e-6, rtol=1e-6)
        assert b.weights.std() > 50*a.weights.std()


@pytest.mark.parametrize('s', [2, 13])
def test_flops_of_the_dense_arm(dense, s):
    rows = [dict(task='t', tokens=torch.randint(80, (s,)).tolist(), label=80 + i) for i in range(3)]
    found = X.ask_task(dense, rows, range(80, 87))
    with use('reference'), FlopCounterMode(display=False) as counter, torch.no_grad():
        C.answer(dense, torch.tensor([rows[0]['tokens']]))@dense.embed_tokens.weight[:7].T
    c = dense.config
    unseen = c.n_layers*2*c.n_heads*c.head_dim*s*(s - 1)  # scores above the diagonal, which the readable code computes and masks
    assert found['flops']*s == counter.get_total_flops() - unseen and found['experts'] == 0


def test_answers_are_stored_in_the_order_of_the_texts(dense):
    rows = [dict(task='t', tokens=torch.randint(80, (int(n),)).tolist(), label=80 + i%5) for i, n in enumerate(torch.randint(2, 30, (40,)))]
    found, model = X.ask_task(dense, rows, range(80, 85), 64), mixture(dense, 8)
    for r, right in zip(rows, found['right'], strict=True):
        said = (C.answer(dense, torch.tensor([r['tokens']]))@dense.embed_tokens.weight[80:85].T).argmax().item() + 80
        assert int(right) == (said == r['label'])
    assert found['accuracy'] == pytest.approx(found['right'].count('1')/40)
    some = C.Tasks(dict(t=[*'vwxyz']), dict(test=rows), 85, {})
    model.embed_tokens.weight.data = model.embed_tokens.weight[:85]
    two, theirs = (f(model, some, 'test', X.best_of(2)) for f in (X.ask, C.ask))
    assert {k: v for k, v in two['t'].items() if k != 'right'} == pytest.approx(theirs['t']) and two['t']['experts'] == 2


def test_a_copy_with_a_rule_is_the_model_with_the_rule(dense):
    model, tokens = X.sharpen(mixture(dense, 8), .5), torch.randint(90, (4, 11))
    for name, number in dict(layers=[3, 2, 4], top_p=.5, relative=.9, null=.7).items():
        with C.spared(model, X.rule_of(model, name, number)): want = C.answer(model, tokens)
        torch.testing.assert_close(C.answer(X.with_rule(model, name, number), tokens), want)
        assert (C.answer(model, tokens) - want).norm() > 0


# ---- the gate, on made-up runs

def text(r, n, share): return ''.join(map(str, (r.random(n) < share).astype(int)))


def run(r, arm, seed, share, less=None, flops=100.):
    sizes = dict(zip(TASKS, (90, 200, 41), strict=True))
    right = {t: text(r, n, share) for t, n in sizes.items()}
    def found(by=0., cost=flops):
        return {t: dict(accuracy=o.count('1')/len(o) - by, flops=cost, experts=8., routed=.6) for t, o in right.items()}
    out = dict(full=found(), right=right, chance=dict.fromkeys(TASKS, .1))
    if less is not None:
        peers = {n: found(less + .01*i, 50.) for i, n in enumerate(('layers', 'top_p', 'relative', 'null'))}
        out |= dict(rule='layers', tried=dict(layers=.5), peers=peers, curve=[dict(mean=2.25, number=[2], found=peers['layers'])],
                    static={'3': found(less, 55.)}, random={'3': found(.3, 55.)})
    return dict(arm=arm, seed=seed, settings=dict(mean=2.25, active=8), result=out)


def made(full=.8, small=.6, bayes=.5, less=.0, ratio=.5):
    r = np.random.default_rng(4)
    of = [run(r, a, s, share, l) for s in range(3) for a, share, l in (('full', full, less), ('small', small, None), ('dense', full, None))]
    of += [dict(o, arm='spared') for o in of if o['arm'] == 'full']
    for a, share in (('constant', .1), ('bayes', bayes - .1), ('bayes-all', bayes)):
        found = {t: dict(right=(o := text(r, n, share)), accuracy=o.count('1')/n) for t, n in zip(TASKS, (90, 200, 41), strict=True)}
        keys = {t: ' '.join(str(i//3) for i in range(len(o['right']))) for t, o in found.items()}
        of.append(dict(arm=a, seed=0, settings={}, result=dict(found=found, keys=keys)))
    row = {n: dict(seconds=.01, ratio=ratio, low=ratio, high=ratio) for n in ('full, layers', 'spared, layers')}
    row |= {a: dict(seconds=.01, ratio=1., low=1., high=1.) for a in ('full', 'small', 'dense')}
    return of + [dict(arm='times', seed=s, settings={}, result=dict(times={k: dict.fromkeys(TASKS, row) for k in ('single', 'batch')}))
                 for s in range(3)]


def test_tasks_have_the_same_weight():
    records = made()
    full = [o['result'] for o in records if o['arm'] == 'full']
    low = next(o['result']['found'] for o in records if o['arm'] == 'bayes-all')
    gate = X.gate_of(records)
    want = np.mean([np.mean([o['full'][t]['accuracy'] for o in full]) for t in TASKS]) - np.mean([low[t]['accuracy'] for t in TASKS])
    assert gate.floor == 'bayes-all' and gate.over.value == pytest.approx(want) and gate.over.low < want < gate.over.high
    small = [X.mean_accuracy(o['result']['full']) for o in records if o['arm'] == 'small']
    assert gate.gap.mean == pytest.approx(np.mean([X.mean_accuracy(o['full']) for o in full]) - np.mean(small))


@pytest.mark.parametrize('how,word,said', [
    ({}, 'reached', 'The gate holds'), (dict(bayes=.95), 'missed', 'below its floor'), (dict(bayes=.8), 'missed', 'not clearly above'),
    (dict(small=.8), 'missed', 'not clearly better than three'), (dict(less=.2), 'refuted', '**refuted**'),
    (dict(ratio=.9), 'missed', '**missed**')])
def test_the_verdict(how, word, said):
    records = made(**how)
    words = X.finding(records)
    assert X.headline(records) == word and said in words and f'**{word}**' in words and 'nan' not in words
    assert ('fewer FLOPs' in words) == X.gate_of(records).open
    assert all(f'| {a}, all experts |' in X.table(records) for a in X.MODELS) and '`bayes-all`' in X.table(records)


def test_nothing_is_said_of_half_a_study():
    records = made()
    for arm in ('times', 'small', 'bayes-all', 'dense'):
        assert X.finding([o for o in records if o['arm'] != arm]) == f'Not run yet: {arm}.'


# ---- tiny runs

@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp('spared')
    path = folder/'spared.toml'
    path.write_text(PLAN.read_text().replace('blocks = 2', 'blocks = 1').replace('tasks = ["icd10", "sentiment"]', 'tasks = ["sentiment"]'))
    return run_study('spared', path, folder/'out.json', folder/'work', ['bayes', 'spared'], smoke=True), read_plan(path, smoke=True).arms


def test_smoke(smoke):
    records, arms = smoke
    bayes, one = (r['result'] for r in records)
    rows = X.texts_of(arms['bayes'])['sentiment']
    model = WordBayes([r['text'] for r in rows['learn']], [r['label'] for r in rows['learn']], bayes['alpha']['sentiment'])
    right = [int(p == r['label']) for p, r in zip(model.predict([r['text'] for r in rows['test']]), rows['test'], strict=True)]
    assert bayes['found']['sentiment']['right'] == ''.join(map(str, right))
    assert len(one['right']['sentiment']) == len(right) and one['steps'] == 3 and one['rate'] == 3e-4
    assert {*one['peers']} == {'top_p', 'relative', 'null', 'layers'} and one['static']['3']['sentiment']['experts'] == 3
    assert one['overlap'] == dict(sentiment=0) and json.dumps(one)


def test_texts_are_read_as_the_base_reads_them(smoke):
    s = smoke[1]['spared']
    e, rows, tok = X.encoded(s), X.texts_of(s)['sentiment'], X.Tokenizer.from_pretrained(s['base'])
    for r, o in zip(rows['test'], e.tasks.parts['test'], strict=True):
        assert [e.kept[i] for i in o['tokens'][1:-1]] == tok.encode(r['text'])[:s['length']]
        assert e.tasks.classes['sentiment'][o['label'] - e.tasks.answers('sentiment')[0]] == r['label']
    model = X.start(s | dict(kind='dense'), 0)
    base = X.FIRST(s['base'], s['blocks'])
    assert torch.equal(model.embed_tokens.weight[5], base.embed_tokens.weight[e.kept[5]])
    assert model.config == replace(base.config, vocab_size=e.tasks.vocab_size)

"The experiment on dynamic routing: no leak, FLOPs against a counter, resume, bad plans, and tables of made-up runs"
from math import ceil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepseek_nb.arch.model import Model
from deepseek_nb.core.dispatch import use
from deepseek_nb.studies import open_study, read_plan, run_study
from deepseek_nb.train.callbacks import Callback
from deepseek_nb.train.corpora import grams
from deepseek_nb.train.dynamic import keep_best

C = open_study('compute')
PLAN = Path(__file__).parent.parent/'nbs/configs/evidence/compute.toml'


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp('work')


@pytest.fixture(scope='module')
def smoke(work): return run_study('compute', PLAN, work/'compute.json', work, smoke=True)


@pytest.fixture(scope='module')
def settings(): return read_plan(PLAN, smoke=True).arms['spared']


@pytest.fixture(scope='module')
def tasks(settings, tmp_path_factory): return C.prepare(settings, tmp_path_factory.mktemp('tasks'))


@pytest.fixture(scope='module')
def model(settings, tasks):
    torch.manual_seed(0)
    return Model(C.make_config(settings, tasks), dtype='float32', device='cpu').init_weights(.2).eval().requires_grad_(False)


def test_smoke(smoke, work):
    arms = {r['arm']: r['result'] for r in smoke}
    assert {'full', 'small', 'spared'} <= {*arms}
    assert len({(a['steps'], a['answered'], str(a['texts']), str(a['chance'])) for a in arms.values()}) == 1
    assert 'rule' not in arms['small'] and arms['spared']['rule'] in arms['spared']['tried']
    assert [*arms['full']['static']] == [*arms['full']['random']] == ['3']
    assert run_study('compute', PLAN, work/'compute.json', work, smoke=True) == smoke # nothing is left to run
    assert all('full, all experts' in C.table(smoke) and t in C.table(smoke) for t in arms['full']['full']) and C.times_table(smoke)


def test_plan():
    plan = read_plan(PLAN)
    full,small,spared = (plan.arms[a] for a in ('full', 'small', 'spared'))
    assert len(plan.seeds) >= 3
    assert full['mean'] <= small['model']['n_activated_experts'] == ceil(full['mean']) < full['model']['n_activated_experts']
    assert {k for k in full if full[k] != spared[k]} <= {'after'} # a baseline differs in what is tested, and in nothing else
    assert full | dict(model=0) == small | dict(model=0) and full['training'] == spared['training']
    c = C.make_config(full, C.Tasks({}, {p: [dict(tokens=[0]*48)] for p in C.PARTS}, 4200, {}))
    other,n = C.text_flops(c, 36, 30)
    routed = c.n_activated_experts*n*6*c.dim*c.moe_inter_dim
    assert routed/(other + routed) >= .65
    assert (c.n_activated_experts - full['mean'])*n*6*c.dim*c.moe_inter_dim/(other + routed) >= .42


def test_no_leak(settings):
    for task,parts in C.divided(settings | dict(tasks=[*C.TASKS])).items():
        learn,choose,test = (parts[p] for p in ('learn', 'validation', 'test'))
        assert min(map(len, (learn, choose, test))) > 5
        for a,b in ((learn, choose), (learn, test), (choose, test)):
            assert not {r['key'] for r in a} & {r['key'] for r in b}, task
            assert not {r['text'].lower() for r in a} & {r['text'].lower() for r in b}, task
        known = set().union(*(grams(r['text'], 8) for r in learn))
        assert not any(grams(r['text'], 8) & known for r in choose + test)
        counts = [sum(r['label'] == c for r in test) for c in {r['label'] for r in test}]
        classes = {r['label'] for r in learn}
        assert max(counts) <= max(1, settings['most']//len(classes)) and {r['label'] for r in test} <= classes


@pytest.mark.parametrize('s', [2, 9, 14])
def test_flops(model, s):
    c,tokens = model.config,torch.randint(400, (1, s))
    with use('reference'), FlopCounterMode(display=False) as counter, torch.no_grad():
        C.answer(model, tokens)@model.embed_tokens.weight[:7].T
    other,routed = C.text_flops(c, s, 7)
    unseen = c.n_layers*2*c.n_heads*c.head_dim*s*(s - 1) # scores above the diagonal, which the readable code computes and masks
    assert counter.get_total_flops() == other + unseen + routed*c.n_activated_experts*6*c.dim*c.moe_inter_dim


def test_answer(model):
    tokens = torch.randint(400, (3, 11))
    want = model.hidden(tokens)[:, -1]
    torch.testing.assert_close(C.answer(model, tokens), want, atol=1e-5, rtol=1e-5)
    with torch.enable_grad(): torch.testing.assert_close(C.answer(model, tokens), want, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), use('reference'): torch.testing.assert_close(C.answer(model, tokens), want, atol=1e-5, rtol=1e-5)


def test_ask(model, tasks):
    full,two = C.ask(model, tasks, 'test'),C.ask(model, tasks, 'test', lambda g, r: keep_best(r.weights, 2), size=64)
    for t in full:
        assert (full[t]['experts'], two[t]['experts']) == (8, 2)
        assert full[t]['flops']*full[t]['routed']/4 == pytest.approx(two[t]['flops']*two[t]['routed'])
    for row in tasks.parts['test'][:5]:
        with torch.no_grad(): x = C.answer(model, torch.tensor([row['tokens']]))@model.embed_tokens.weight.T
        own = [*tasks.answers(row['task'])]
        right = own[int(x[0, own].argmax())] == row['label']
        only = C.Tasks({row['task']: tasks.classes[row['task']]}, dict(test=[row]), tasks.vocab_size, {})
        if tasks.answers(row['task']) == only.answers(row['task']): assert C.ask(model, only, 'test')[row['task']]['accuracy'] == right


@pytest.mark.parametrize('mean', [1.5, 3., 6.])
def test_budget(model, tasks, mean):
    seen,errors = C.seen_routes(model, tasks),C.answer_errors(model, tasks, 50)
    for name,(keep,_) in C.rules_at(model, seen, errors, mean).items():
        total,n = (sum(f(x) for x in seen) for f in (lambda x, k=keep: k(*x).sum().item(), lambda x: len(x[1].experts)))
        if name == 'layers': assert mean - 1 < total/n <= mean # whole experts
        else: assert total/n == pytest.approx(mean, abs=.05), name


def test_nearest():
    for mean in (1., 1.7, 3., 4.):
        w = torch.rand(50, 4)
        stays = C.nearest(w, mean)
        assert stays.sum() == max(50, round(50*mean))
        assert stays.gather(1, w.argmax(1, keepdim=True)).all()


class Kill(Callback):
    def after_update(self, t):
        if t.step == 3: raise KeyboardInterrupt


def test_resume(settings, tasks, tmp_path):
    s = settings | dict(training=settings['training'] | dict(max_steps=6, save_steps=2))
    whole = C.train(s, 1, tasks, tmp_path/'whole')
    with pytest.raises(KeyboardInterrupt): C.train(s, 1, tasks, tmp_path/'part', [Kill()])
    again = C.train(s, 1, tasks, tmp_path/'part')
    assert [r['loss'] for r in again.history] == [r['loss'] for r in whole.history]
    for a,b in zip(again.model.state_dict().values(), whole.model.state_dict().values(), strict=True): assert torch.equal(a, b)


def test_bad_plans(tmp_path):
    text = PLAN.read_text()
    for old,new,words in (('tasks = ["icd10", "wordnet"', 'tasks = ["tweets", "wordnet"', None), ('[arms.full]', '[arm.full]', "'arm'"),
                          ('minutes = ', 'minuets = ', "'minuets'")):
        assert old in text
        (path := tmp_path/'compute.toml').write_text(text.replace(old, new).replace('tasks = ["icd10", "sotu"]', 'tasks = ["tweets"]'))
        with pytest.raises(ValueError, match=words or "task 'tweets' is not known here") as e:
            run_study('compute', path, tmp_path/'o', tmp_path, smoke=True)
        assert '\n' not in str(e.value)


def synthetic(arm, seed, right):
    one = lambda a, flops: {t: dict(accuracy=a - .01*seed, flops=flops, experts=3, routed=.8) for t in ('x', 'y')} # noqa: E731
    result = dict(full=one(right, 100.), chance=dict(x=.2, y=right - .1))
    time = dict(full=.02, spared=.01, ratio=.5, low=.4, high=.6, length=9, rows=7)
    if arm != 'small':
        result |= dict(rule='null', tried=dict(null=.3 - .1*(arm == 'spared')))
        result |= dict(curve=[dict(mean=3., number=.5, found=one(right - .02, 55.))], static={'3': one(right - .1, 55.)},
                       random={'3': one(right - .2, 55.)}, times={'3.0': dict(x=time, y=time)})
    return dict(arm=arm, seed=seed, settings=dict(mean=3., model=dict(n_activated_experts=8)), result=result, minutes=1.)


def test_tables_of_synthetic_runs():
    assert C.table([]) == C.times_table([]) == 'This experiment has not been run yet.'
    C.plot_curves([])
    made = [synthetic(*a) for a in (('full', 0, .8), ('full', 1, .8), ('small', 0, .7), ('spared', 0, .8), ('spared', 1, .8))]
    assert C.counted(made) == ['x'] # on y the full model is ten points above chance
    lines = {l.split('|')[1].strip(): l for l in C.table(made).splitlines()}
    assert lines['full, all experts'].endswith('| 100.0 ± 0.0 | 100.0 ± 0.0 | 2 |')
    assert f'| 55.0 | 77.5 ± 0.7 | 77.5 ± 0.7 | {100*(.58/.6 + .57/.59)/2:.1f} ± ' in lines['spared, by rule']
    assert f'| {100*.5/.6:.1f} ± 0.0 | {100*.5/.6:.1f} ± 0.0 | 1 |' in lines['small, all experts']
    assert '-50.0 ± 0.0 | -60.0 to -40.0 | 2 |' in C.times_table(made)
    assert C.outcome(made)['spared, by rule']['saved'] == pytest.approx([.45, .45])
    assert C.outcome(made)['spared, by rule']['tasks']['x'] == pytest.approx([.58/.6, .57/.59])
    said = C.finding(made)
    kept = f'{100*(.58/.6 + .57/.59)/2:.1f} ± 0.0%'
    assert 'missed (2 of 3)' in said and 'has **45.0 ± 0.0% fewer FLOPs**, takes **50.0 ± 0.0% less time**' in said
    assert 'with 3.0 ± 0.0 of 8 experts per token the model `full` has' in said and f'keeps **{kept} of the accuracy**' in said
    assert said.endswith('The rule is ahead of all baselines. The time is that of batches, not of one request.')
    assert [l.split(' | ')[1:] for l in C.targets(made).splitlines()[2:]] == [
        ['42%', '45.0 ± 0.0%', 'reached |'], ['35%', '50.0 ± 0.0%', 'reached |'], ['98%', kept, 'missed |']]
    assert '| 100.0 | 70.0 ± 0.0 | 70.0 ± 0.0 | 83.3 ± 0.0 |' in lines['small, all experts']
    assert '| 83.2 ± 0.2 |' in lines['spared, best 3'] and '| 96.6 ± 0.0 |' in lines['spared, by rule']
    assert C.preferred(made) == 'full' and C.preferred(made[-1:]) == 'spared'
    better = [synthetic(*a) for a in (('full', 0, .8), ('small', 0, .9))]
    assert 'The rule is not ahead of `small, all experts`.' in C.finding(better)
    assert C.finding(made[:2]) == C.targets(made[:2]) == 'Not run yet: small.'
    C.plot_curves(made)
    plt.close('all')

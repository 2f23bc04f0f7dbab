"The second study of conversion: selections with a gradient, stored answers, a run that continues after a kill, verdicts of made-up runs"
import random
from copy import deepcopy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepseek_nb.arch.model import Model
from deepseek_nb.arch.moe import MoE
from deepseek_nb.core.config import Config
from deepseek_nb.eval.intervals import Interval
from deepseek_nb.studies import open_study, read_plan
from deepseek_nb.train.convert import convert
from deepseek_nb.train.upcycle import TAU

study = open_study('converted')
TOY = Config('llama', vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, inter_dim=96, max_positions=64)


@pytest.fixture
def seed():
    n = random.randrange(2**31)
    print('seed', n)
    torch.manual_seed(n)
    return n


@pytest.fixture
def settings(root):
    return read_plan(root/'nbs/configs/evidence/converted.toml', smoke=True).arms['moe-70'] | dict(
        model='toy', watched=[1, 2], top=8, bf16=False, steps=6, batch=2, save=2, heard=4)


@pytest.fixture
def toy(seed):
    dense = Model(TOY, 'float32', 'cpu').init_weights(.3).requires_grad_(False)
    tokens = torch.randint(64, (12, 30))
    return dense, tokens, convert(dense, 'moe', tokens, 0, experts=12, active=5, shared=4)[0]


def test_parts_share_no_document():
    parts = {p: {*study.texts_of(p)} for p in ('speeches', 'validation', 'test', 'prose', 'other')}
    assert all(parts.values()) and sum(map(len, parts.values())) == len(set().union(*parts.values()))


def test_selections_have_their_size(seed):
    n, e = random.randint(1, 9), random.randint(3, 30)
    k = random.randint(1, e - 1)
    choice = torch.randperm(n*e).view(n, e).float()
    assert ((choice > study.least_of(choice, k, 'top')).sum(1) == k).all()
    least = study.least_of(choice, k, 'threshold')
    assert (choice > least).sum() == n*k and ((study.soft_choice(choice, least, .7) > .5) == (choice > least)).all()


def test_trained_routers_lose_less(toy, settings, seed):
    dense, tokens, mixed = toy
    found = np.array(study.train_routers(mixed, dense, tokens, settings | dict(router_steps=60), seed))
    assert found.shape == (2, 2) and (found[:, 1] < found[:, 0]).all()


@pytest.mark.parametrize('way', ['top', 'threshold'])
def test_relaxed_selection(toy, way):
    "The output is that of the hard selection; more of one expert is less of the others near the threshold"
    mixed, x = toy[2], torch.randn(2, 7, 32)
    want = mixed.layers[0].mlp(x)
    study.turned(mixed, study.Relaxed, True, way=way, width=TAU/8)
    moe = mixed.layers[0].mlp.train()
    moe.gate.e_score_correction_bias.requires_grad_()
    y, flat, k = moe(x), x.flatten(0, 1), moe.gate.c.n_activated_experts
    if way == 'top': assert torch.allclose(y.detach(), want, atol=1e-4*want.abs().max())
    dy = torch.randn_like(y)
    got, = torch.autograd.grad(y, moe.gate.e_score_correction_bias, dy)
    choice = (flat@moe.gate.weight.T).sigmoid() + moe.gate.e_score_correction_bias.detach()
    least = study.least_of(choice, k, way)
    soft = study.soft_choice(choice, least, TAU/8)
    outs = torch.stack([study.expert(flat, g, d) for g, d in zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)], 1)
    s = (flat@moe.gate.weight.T).sigmoid()
    scale = s*k/(s*(choice > least)).sum(1, keepdim=True) if way == 'top' else 1.
    slope, gain = soft*(1 - soft), (outs*dy.flatten(0, 1)[:, None]).sum(2)*scale
    over = -1 if way == 'top' else (0, 1)
    mean = (slope*gain).sum(over, keepdim=True)/slope.sum(over, keepdim=True)
    expected = ((gain - mean)*slope/(TAU/8)).sum(0)
    assert torch.allclose(got, expected, rtol=1e-3, atol=1e-4*expected.abs().max())
    assert [*study.turned(mixed, MoE).layers[0].mlp.gate.state_dict()] == ['weight', 'e_score_correction_bias']


def test_stored_answers_bound_the_divergence(seed):
    z, t = torch.randn(2, 6, 50, dtype=torch.double).unbind()
    z.requires_grad_()
    whole = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction='sum')
    def stored(n):
        logs, ids = t.log_softmax(-1).topk(n, -1)
        return study.follow(z, logs.double(), ids)
    parts = [stored(n).item() for n in (1, 5, 20, 49)]
    assert parts == sorted(parts) and parts[-1] == pytest.approx(whole.item(), abs=1e-4)
    got, want = (torch.autograd.grad(o, z)[0] for o in (stored(49), whole))
    assert torch.allclose(got, want, atol=1e-4)


def test_a_killed_run_continues(toy, settings, tmp_path, monkeypatch):
    dense, tokens, mixed = toy
    said = study.told(dense, tokens, settings)
    def train(folder): return study.distilled(deepcopy(mixed), said, [*range(12)], settings, 0, folder)
    once, make, calls = train(tmp_path/'once'), study.follow_loss, []
    def killed(*a):
        loss = make(*a)
        def one(model, batch):
            calls.append(1)
            if len(calls) == 4: raise KeyboardInterrupt
            return loss(model, batch)
        return one
    monkeypatch.setattr(study, 'follow_loss', killed)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'twice')
    twice = train(tmp_path/'twice')
    assert len(calls) < 4 + 6
    for k, v in once.state_dict().items(): assert torch.equal(v, twice.state_dict()[k]), k
    assert all((mixed.layers[0].mlp.gate.weight != once.layers[0].mlp.gate.weight).any(1))


def test_threshold_keeps_the_budget(toy):
    dense, tokens, mixed = toy
    sparse = study.fixed_thresholds(study.turned(mixed, study.Relaxed, way='threshold', width=TAU), tokens)
    sparse(tokens)
    used = [n/t for b in sparse.layers for n, t in b.mlp.used]
    assert all(4.5 < u < 5.5 for u in used)


def run(arm, seed, rises, flops=.84, speed=1.):
    loss = {t: [3 + .1*i + np.log1p(up + .001*(-1)**(i + seed)) for i in range(20)] for t, up in zip(study.TEXTS, rises, strict=True)}
    clock = {p: dict(quartiles=[speed - .01, speed, speed + .01]) for p in study.PHASES}
    result = dict(loss=loss, documents={t: [i//2 for i in range(20)] for t in study.TEXTS}, cache=.5, feed_forward=.7,
                  flops=dict.fromkeys(study.PHASES, flops))
    return dict(arm=arm, seed=seed, result=result | dict(clock=clock, seen=dict(test=0., other=.25)))


def test_verdicts_follow_the_plan():
    records = [run(a, 0, (0., 0.)) for a in study.NEEDED[:4]]
    records += [run(a, s, (.05, .09)) for a in (*study.NEEDED[4:], 'mla-40') for s in (0, 1)]
    assert study.headline(records) == dict(half='reached', forty='reached', experts='reached', decode='missed', prefill='missed')
    said = study.finding(records)
    assert 'Half of the cache: reached, +5.0% on speeches and +9.0% on other text**' in said
    assert 'as time, a prompt: missed, ' in said and 'Not run' not in said
    for arm in study.NEEDED: assert study.finding([r for r in records if r['arm'] != arm]) == f'Not run yet: {arm}.'
    assert study.headline([r for r in records if r['arm'] != 'mla-40'])['forty'] == 'not measured'
    worse = [r | run(r['arm'], r['seed'], (.05, .15)) if r['arm'] in ('mla-50', 'mla-40') else r for r in records]
    assert study.headline(worse)['half'] == 'refuted' and study.headline(worse)['forty'] == 'reached'
    assert '| `moe-70` | 50% | 70% | 84%, 84% |' in study.table(records) and study.table([]) == 'Not run yet.'
    low = random.uniform(.02, .09)
    assert study.within([Interval(.095, low, .11)]) == 'missed'
    assert study.faster([run('moe-70', 0, (0., 0.), .84, .9)], 'moe-70', 'decode') == 'refuted'
    assert study.wanted(records, 'moe-70', 'prefill') == pytest.approx(1/.92)


def test_steps_are_relative_to_the_size_of_a_matrix(toy, settings):
    "Matrices have steps in proportion to their elements, and a router without a rate isn't trained"
    dense, _, mixed = toy
    for joint in 0., .02:
        model = study.turned(deepcopy(mixed), study.Relaxed, joint > 0, way='top', width=TAU/8).requires_grad_(True)
        if not joint:
            for b in model.layers: b.mlp.gate.requires_grad_(False)
        names = {id(p): n for n, p in model.named_parameters()}
        rates = {names[id(g['params'][0])]: g['lr'] for g in study.groups_of(model, settings | dict(joint_rate=joint), .01)}
        own = dict(model.named_parameters())
        assert {*rates} == {n for n, p in own.items() if p.requires_grad}
        assert any(n.endswith('gate.weight') for n in rates) == (joint > 0)
        for n, lr in rates.items():
            size = own[n].detach().square().mean().sqrt().item() if own[n].ndim > 1 else .1
            if not n.endswith('correction_bias'): assert lr == pytest.approx((joint if n.endswith('gate.weight') else .01)*size)

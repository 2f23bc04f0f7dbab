"""Muon against its algorithm written out and torch.optim.Muon, AdamW's groups, and every step of every schedule against transformers

Fresh random inputs; the seed is printed, SEED=n repeats a run.
"""
import copy
import io
import math
import os
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_nb import Model
from deepseek_nb.core.config import Config
from deepseek_nb.train import schedule as ours
from deepseek_nb.train.loss import language_loss
from deepseek_nb.train.optim import V4_STEPS, AdamW, Muon, direction, muon_groups, newton_schulz, param_groups
from deepseek_nb.train.world import total_norm

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
SIZES = dict(vocab_size=64, dim=32, n_layers=2, n_heads=4, inter_dim=48, max_positions=64)
MOE = Config('deepseek_v3', **SIZES, n_dense_layers=1, moe_inter_dim=16, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, score_func='sigmoid', score_bias=True)
DENSE = Config('qwen2', **SIZES, n_kv_heads=2, head_dim=8, attn_bias=True, tie_embeddings=True)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_optim SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


# ---- orthogonal matrices

def polar(m):
    u, _, vt = torch.linalg.svd(m, full_matrices=False)
    return u@vt


@pytest.mark.draw(4)
@pytest.mark.parametrize('trial', range(10))
def test_newton_schulz_settles_all_singular_values(r, trial):
    o, i = r.randrange(1, 40), r.randrange(1, 40)
    values = torch.logspace(-2, 0, min(o, i), dtype=torch.float64)*10**r.uniform(-20, 20)  # any scale
    u, _, vt = torch.linalg.svd(torch.randn(o, i, dtype=torch.float64), full_matrices=False)
    m = u@values.diag()@vt
    got = newton_schulz(m)
    if values.norm() > 1e-6: torch.testing.assert_close(got, u@vt, rtol=0, atol=2e-3)
    assert newton_schulz(m.float()).dtype == torch.float32


def test_newton_schulz_of_stacks_and_precision():
    m = torch.randn(3, 2, 7, 5)
    for a in range(3):
        for b in range(2): torch.testing.assert_close(newton_schulz(m)[a, b], newton_schulz(m[a, b]), rtol=1e-4, atol=1e-5)
    assert newton_schulz(m.bfloat16()).dtype == torch.float32
    assert (newton_schulz(m.bfloat16()) - newton_schulz(m)).abs().max() < .2
    assert newton_schulz(torch.zeros(3, 4)).eq(0).all()


def test_v4_steps():
    "The last two steps have a fixed point at one, flat to second order; the first eight have not"
    for a, b, c in V4_STEPS[-2:]: assert a + b + c == 1 and a + 3*b + 5*c == 0
    assert len(V4_STEPS) == 10 and all(a + b + c != pytest.approx(1, abs=.1) for a, b, c in V4_STEPS[:8])


# ---- Muon

def written_out(w, grads, lr, decay=.1, mu=.95, gamma=.18):
    "Algorithm 1 of DeepSeek-V4's report, one matrix at a time, with an exact polar factor"
    m = torch.zeros_like(w)
    for g in grads:
        m = mu*m + g
        w = w*(1 - lr*decay) - lr*gamma*math.sqrt(max(w.shape))*polar(mu*m + g)
    return w


@pytest.mark.parametrize('shape', ((6, 9), (9, 6), (5, 5), (1, 8)))
def test_muon_equals_its_algorithm(shape):
    p = nn.Parameter(torch.randn(*shape, dtype=torch.float64))
    w, grads = p.detach().clone(), [torch.randn(*shape, dtype=torch.float64) for _ in range(4)]
    optimiser = Muon([p], lr=.03)
    for p.grad in grads: optimiser.step()
    torch.testing.assert_close(p.detach(), written_out(w, grads, .03), rtol=0, atol=.03*4*2e-3*.18*3)


def test_muon_treats_each_expert_and_each_half_as_a_matrix():
    e, f, d = 3, 5, 7
    p = nn.Parameter(torch.randn(e, 2*f, d, dtype=torch.float64))
    w, grads = p.detach().clone(), [torch.randn_like(p) for _ in range(3)]
    optimiser = Muon([dict(params=[p], halves=2)], lr=.03)
    for p.grad in grads: optimiser.step()
    single = Muon([dict(params=(ps := [nn.Parameter(x.clone()) for x in w.reshape(e*2, f, d)]))], lr=.03)
    for g in grads:
        for x, y in zip(ps, g.reshape(e*2, f, d), strict=True): x.grad = y.clone()
        single.step()
    torch.testing.assert_close(p.detach().reshape(e*2, f, d), torch.stack([x.detach() for x in ps]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('nothing', (1, 2))
def test_muon_equals_torch(r, monkeypatch, nothing):
    "torch.optim.Muon takes one triple of coefficients and works in bfloat16; kept in float64, it is ours with other settings"
    monkeypatch.setattr(torch.Tensor, 'bfloat16', lambda t: t.clone())
    shapes, coefficients = [(6, 9), (9, 6), (5, 5)], (3.4445, -4.7750, 2.0315)
    a, b = ([nn.Parameter(t.clone()) for t in ts] for ts in [[torch.randn(s, dtype=torch.float64) for s in shapes]]*2)
    steps = r.randrange(1, 7)
    theirs = torch.optim.Muon(a, lr=.02, weight_decay=.1, ns_coefficients=coefficients, ns_steps=steps, adjust_lr_fn='match_rms_adamw')
    mine = Muon(b, lr=.02, rms=.2, steps=(coefficients,)*steps)
    for _ in range(4):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        theirs.step(); mine.step()
        for p, q in zip(a, b, strict=True): torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-9, atol=1e-9)


def test_update_has_the_same_size_for_every_shape(r):
    for _ in range(10):
        shape = r.randrange(1, 60), r.randrange(1, 60)
        assert direction(torch.randn(shape, dtype=torch.float64)).square().mean().sqrt().item() == pytest.approx(.18, rel=5e-3)


def train(model, optimiser, steps=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randint(64, (2, 9), generator=draw)
        total, n = language_loss(model, dict(tokens=x[:, :-1], labels=x[:, 1:]))
        optimiser.zero_grad()
        (total/n).backward()
        optimiser.step()
    return total.item()/n


@pytest.mark.parametrize('config', (MOE, DENSE), ids=('moe', 'dense'))
def test_groups_hold_every_parameter_once(config):
    model = Model(config, dtype='float32', device='cpu')
    names = {p: n for n, p in model.named_parameters()}
    for groups in (param_groups(model, .3), muon_groups(model, .3)):
        assert sorted(names[p] for g in groups for p in g['params']) == sorted(names.values())
        for g in groups:
            for p in g['params']: assert g['weight_decay'] == (0 if 'norm' in names[p] or names[p].endswith('bias') else .3), names[p]
    for g in muon_groups(model):
        for p in g['params']:
            special = re.search(r'norm|bias|embed_tokens|lm_head', names[p])
            assert g['halves'] == (0 if special else 2 if 'gate_up_proj' in names[p] else 1), names[p]
    model.requires_grad_(False)
    model.norm.weight.requires_grad_()
    assert [g['params'] for g in muon_groups(model)] == [[model.norm.weight]] == [g['params'] for g in param_groups(model)]
    model.norm.weight.requires_grad_(False)
    for make in (param_groups, muon_groups):
        with pytest.raises(ValueError, match='^no parameter of this Model is trainable'): make(model)


def test_rest_is_torchs_adamw():
    torch.manual_seed(0)
    model = Model(MOE, dtype='float32', device='cpu').init_weights(.1)
    other = copy.deepcopy(model)
    optimiser = Muon(muon_groups(model), lr=.01, betas=(.8, .9), eps=1e-6)
    train(model, optimiser, 1)
    rest = [p for g in muon_groups(other) if not g['halves'] for p in g['params']]
    same = AdamW([g for g in muon_groups(other) if not g['halves']], lr=.01, betas=(.8, .9), eps=1e-6)
    train(other, same, 1)
    moved = [p for g in optimiser.param_groups if not g['halves'] for p in g['params']]
    assert all(torch.equal(p, q) for p, q in zip(moved, rest, strict=True))


MAKERS = {'muon': lambda m: Muon(muon_groups(m), lr=.01), 'adamw': lambda m: AdamW(param_groups(m), lr=.01)}


@pytest.mark.parametrize('which', MAKERS)
def test_optimiser_resumes_bit_for_bit(which):
    make = MAKERS[which]
    torch.manual_seed(0)
    model = Model(MOE, dtype='float32', device='cpu').init_weights(.1)
    optimiser = make(model)
    schedule = ours.get_cosine_schedule_with_warmup(optimiser, 2, 10)
    for i in range(3): train(model, optimiser, 1, i); schedule.step()
    torch.save([o.state_dict() for o in (model, optimiser, schedule)], file := io.BytesIO())
    for i in range(3, 6): train(model, optimiser, 1, i); schedule.step()
    again = Model(MOE, dtype='float32', device='cpu')
    optimiser2 = make(again)
    schedule2 = ours.get_cosine_schedule_with_warmup(optimiser2, 2, 10)
    file.seek(0)
    for o, state in zip((again, optimiser2, schedule2), torch.load(file), strict=True): o.load_state_dict(state)
    for i in range(3, 6): train(again, optimiser2, 1, i); schedule2.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert [g['lr'] for g in optimiser.param_groups] == [g['lr'] for g in optimiser2.param_groups]
    assert len(optimiser.state) == len(list(model.parameters()))


def test_schedule_drives_both_halves():
    model = Model(MOE, dtype='float32', device='cpu').init_weights(.1)
    optimiser = Muon(muon_groups(model), lr=.01)
    ours.get_linear_schedule_with_warmup(optimiser, 5, 10)  # the first rate is zero
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimiser, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_muon_skips_what_has_no_gradient():
    p, q = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimiser = Muon([p, q], lr=.1)
    p.grad = torch.ones(2, 3)
    assert optimiser.step(lambda: 7) == 7
    assert not p.eq(1).any() and q.eq(1).all()
    with pytest.raises(ValueError, match=r'^Muon was given a parameter of shape \(3,\)'): Muon([nn.Parameter(torch.zeros(3))])


def test_muon_learns(r):
    torch.manual_seed(SEED)
    model = Model(MOE, dtype='float32', device='cpu').init_weights(.1)
    optimiser = Muon(muon_groups(model), lr=.02)
    first = train(model, optimiser, 1)
    for _ in range(15): last = train(model, optimiser, 1)
    assert last < first/2


def test_total_norm(r):
    params = [nn.Parameter(torch.randn(r.randrange(1, 9), 3, dtype=torch.float64)) for _ in range(4)]
    for p in params[:3]: p.grad = torch.randn_like(p)
    want = torch.cat([p.grad.flatten() for p in params[:3]]).norm()
    torch.testing.assert_close(total_norm(params), want)
    assert total_norm([nn.Parameter(torch.ones(2))]) == 0


# ---- schedules

def factors(make, steps, groups=2):
    params = [nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    optimiser = torch.optim.SGD([dict(params=[p], lr=10.**-i) for i, p in enumerate(params)], lr=1.)
    schedule, out = make(optimiser), []
    for _ in range(steps):
        out.append([g['lr'] for g in optimiser.param_groups])
        optimiser.step(); schedule.step()
    return out


@pytest.fixture(scope='module')
def theirs(): return pytest.importorskip('transformers.optimization')


@settings(max_examples=60, deadline=None)
@given(warmup=st.integers(0, 12), total=st.integers(1, 40), cycles=st.sampled_from([.5, .25, 1., 1.5]),
       scale=st.none() | st.integers(1, 30), again=st.integers(1, 5))
def test_every_step_equals_transformers(theirs, warmup, total, cycles, scale, again):
    n = total + 5
    for name, args in {'get_linear_schedule_with_warmup': (warmup, total), 'get_cosine_schedule_with_warmup': (warmup, total, cycles),
                       'get_constant_schedule_with_warmup': (warmup,), 'get_inverse_sqrt_schedule': (warmup, scale),
                       'get_cosine_with_hard_restarts_schedule_with_warmup': (warmup, total, again)}.items():
        got, want = (factors(lambda o, m=m, name=name, args=args: getattr(m, name)(o, *args), n) for m in (ours, theirs))
        for g, w in zip(got, want, strict=True): assert g == pytest.approx(w, rel=1e-12, abs=1e-15), name


@settings(max_examples=60, deadline=None)
@given(warmup=st.integers(0, 8), stable=st.integers(0, 8), decay=st.integers(0, 8), least=st.sampled_from([0., .1, .5]),
       rise=st.sampled_from(['linear', 'cosine', '1-sqrt']), fall=st.sampled_from(['linear', 'cosine', '1-sqrt']),
       cycles=st.sampled_from([.5, 1., 1.25]), whole=st.booleans())
def test_warmup_stable_decay_equals_transformers(theirs, warmup, stable, decay, least, rise, fall, cycles, whole):
    kwargs = dict(num_warmup_steps=warmup, num_decay_steps=decay, warmup_type=rise, decay_type=fall, min_lr_ratio=least, num_cycles=cycles)
    kwargs |= dict(num_training_steps=warmup + stable + decay) if whole else dict(num_stable_steps=stable)
    got, want = (factors(lambda o, m=m: m.get_wsd_schedule(o, **kwargs), warmup + stable + decay + 4) for m in (ours, theirs))
    for g, w in zip(got, want, strict=True): assert g == pytest.approx(w, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize('name', ('linear', 'cosine', 'constant', 'constant_with_warmup', 'inverse_sqrt', 'cosine_with_restarts'))
def test_names_equal_transformers(theirs, name):
    got, want = (factors(lambda o, m=m: m.get_scheduler(name, o, num_warmup_steps=4, num_training_steps=20), 24) for m in (ours, theirs))
    for g, w in zip(got, want, strict=True): assert g == pytest.approx(w, rel=1e-12)


def test_settings_reach_the_schedule():
    from deepseek_nb.train.trainer import TrainingArguments, make_schedule
    args = TrainingArguments(lr_scheduler_type='cosine_with_restarts', lr_scheduler_kwargs=dict(num_cycles=3), warmup_steps=2)
    got = factors(lambda o: make_schedule(o, args, 20), 22, 1)
    assert got == factors(lambda o: ours.get_cosine_with_hard_restarts_schedule_with_warmup(o, 2, 20, 3), 22, 1)
    assert [f for f, in got].count(1.) == 3


def test_warmup_stable_decay_by_name():
    got = factors(lambda o: ours.get_scheduler('warmup_stable_decay', o, 10, 110), 112, 1)
    want = factors(lambda o: ours.get_wsd_schedule(o, 10, 10, 110), 112, 1)
    assert got == want and got[99] == [1.] and got[101][0] < 1 and got[110] == [0.]


SCHEDULES = {'linear': lambda o: ours.get_linear_schedule_with_warmup(o, 3, 9), 'wsd': lambda o: ours.get_wsd_schedule(o, 2, 3, 9),
             'inverse_sqrt': lambda o: ours.get_inverse_sqrt_schedule(o, 3)}


@pytest.mark.parametrize('name', SCHEDULES)
def test_schedule_resumes(name):
    make = SCHEDULES[name]
    want = factors(make, 9, 1)
    p = nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([p], lr=1.)
    schedule = make(optimiser)
    for _ in range(4): optimiser.step(); schedule.step()
    state = copy.deepcopy([optimiser.state_dict(), schedule.state_dict()])
    optimiser2 = torch.optim.SGD([p], lr=1.)
    schedule2 = make(optimiser2)
    optimiser2.load_state_dict(state[0]); schedule2.load_state_dict(state[1])
    for rate in want[4:]:
        assert optimiser2.param_groups[0]['lr'] == rate[0]
        optimiser2.step(); schedule2.step()


def test_bad_schedules_are_refused():
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.)
    for call, text in {lambda: ours.get_scheduler('step', optimiser): "unknown schedule 'step'; known are constant, linear",
                       lambda: ours.get_scheduler('cosine', optimiser, 3): "schedule 'cosine' depends on the length of the run; give",
                       lambda: ours.get_wsd_schedule(optimiser, 1, 1): 'give either num_training_steps or num_stable_steps',
                       lambda: ours.get_wsd_schedule(optimiser, 1, 1, 5, 5): 'give either num_training_steps or num_stable_steps',
                       lambda: ours.get_wsd_schedule(optimiser, 4, 4, 5): '4 steps of warmup and 4 of decay are more than all 5 steps',
                       lambda: ours.get_wsd_schedule(optimiser, 1, 1, 5, warmup_type='log'): "unknown shape 'log'"}.items():
        with pytest.raises(ValueError, match=f'^{re.escape(text)}'): call()

"""The policy loss against plain loops with derivatives written out, log-probabilities against a full log-softmax, and both against TRL

Fresh random inputs; the seed is printed, SEED=n repeats a run. TRL is an oracle that is used where it is installed: pip install trl
"""
import math
import os
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_nb import Model
from deepseek_nb.core.config import Config
from deepseek_nb.quant import quantize
from deepseek_nb.train.advantage import generalised_advantage, group_advantage, informative, leave_one_out
from deepseek_nb.train.data import IGNORE, collate, example
from deepseek_nb.train.kl_estimate import KL_KINDS, kl_estimate
from deepseek_nb.train.lora import LoraConfig
from deepseek_nb.train.on_policy import answer_log_probs, answer_rows, linear_log_probs
from deepseek_nb.train.policy import LOSS_TYPES, MISMATCH, PolicyLoss

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
SIZES = dict(vocab_size=61, dim=32, n_layers=2, n_heads=4, inter_dim=48, max_positions=64, n_kv_heads=2, head_dim=8)
CASES = range(24)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_policy SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


# ---- the loss, by hand

def settings(r):
    "Any settings, and whether the tokens' ratios are far from one"
    maybe = lambda value: r.choice((None, value))
    return dict(epsilon=r.uniform(.01, .5), epsilon_high=maybe(r.uniform(.01, .8)), delta=maybe(r.uniform(1.9, 3)),
                beta=r.choice((0., r.uniform(.01, 1))), kl=r.choice(KL_KINDS), unbiased_kl=r.random() < .5,
                loss_type=r.choice(LOSS_TYPES), importance_sampling_level=r.choice(('token', 'sequence')),
                max_completion_length=r.randrange(1, 40), truncate=maybe(r.uniform(1, 2)), mismatch=r.choice(MISMATCH),
                off_policy=maybe(r.uniform(.01, .5)), top_entropy_quantile=r.choice((1., r.uniform(.1, .9))))


def inputs(r, dtype=torch.float64, far=.5):
    "Log-probabilities of answers of unequal length, in a random order of tokens"
    b = r.randrange(1, 7)
    rows = torch.tensor([i for i in range(b) for _ in range(r.choice((1, 2, 3, r.randrange(1, 30))))])
    rows = rows[torch.randperm(len(rows))]
    old = -torch.rand(len(rows), dtype=dtype)*3 - .01
    new, reference, sampled = (old + far*torch.randn(len(rows), dtype=dtype) for _ in range(3))
    advantages = torch.tensor([r.choice((0., r.gauss(0, 1))) for _ in range(b)], dtype=dtype)
    return dict(new=new, old=old, advantages=advantages, rows=rows, reference=reference, sampled=sampled,
                entropies=torch.rand(len(rows), dtype=dtype)*3)


def by_hand(s, new, old, advantages, rows, reference, sampled, entropies):
    "Loss, its derivative by each log-probability, and statistics, in plain Python"
    answers = [[t for t, row in enumerate(rows) if row == i] for i in range(len(advantages))]
    high = s['epsilon'] if s['epsilon_high'] is None else s['epsilon_high']
    kept = len(rows)
    at = (len(rows) - 1)*(1 - s['top_entropy_quantile'])
    ranked = sorted(entropies)
    threshold = ranked[int(at)] + (at - int(at))*(ranked[math.ceil(at)] - ranked[int(at)])
    loss, grad, stats = 0., [0.]*len(new), dict(ratio=0., clip_low=0., clip_high=0., masked=0.)
    for a, tokens in zip(advantages, answers, strict=True):
        size = len(tokens)
        if not size: continue
        mean = sum(new[t] - old[t] for t in tokens)/size
        product = math.exp(sum(old[t] - sampled[t] for t in tokens))
        gone = a < 0 and s['off_policy'] is not None and sum(sampled[t] - new[t] for t in tokens)/size > s['off_policy']
        for t in tokens:
            weight = dict(grpo=1/len(advantages)/size, bnpo=1/kept, dapo=1/kept,
                          dr_grpo=1/len(advantages)/s['max_completion_length'])[s['loss_type']]
            sequence = s['importance_sampling_level'] == 'sequence'
            ratio = math.exp(mean if sequence else new[t] - old[t])
            factor = 0. if gone or (s['top_entropy_quantile'] < 1 and entropies[t] < threshold) else 1.
            if s['truncate'] is not None:
                level, what = s['mismatch'].split('_')
                rho = product if level == 'sequence' else math.exp(old[t] - sampled[t])
                factor *= rho if rho <= s['truncate'] else s['truncate'] if what == 'truncate' else 0.
            free, inside = min(ratio, s['delta'] or math.inf), 1 - s['epsilon'] <= ratio <= 1 + high
            bounded = min(max(ratio, 1 - s['epsilon']), 1 + high)
            slope = a*(1. if inside else 0. if bounded*a < free*a else float(free == ratio))
            loss -= weight*factor*min(free*a, bounded*a)
            for u in tokens if sequence else [t]: grad[u] -= weight*factor*slope*ratio/(size if sequence else 1)
            x = new[t] - reference[t]
            kl, dkl = dict(k1=(x, 1), k2=(x*x/2, x), k3=(math.exp(-x) - 1 + x, 1 - math.exp(-x)))[s['kl']]
            if s['unbiased_kl']: kl, dkl = (math.exp(new[t] - old[t])*o for o in (kl, kl + dkl))
            loss += weight*s['beta']*kl
            grad[t] += weight*s['beta']*dkl
            for name, value in dict(ratio=ratio, clip_low=ratio < 1 - s['epsilon'] and a < 0, clip_high=ratio > 1 + high and a > 0,
                                    masked=factor == 0).items(): stats[name] += value/len(rows)
    return loss, grad, stats


@pytest.mark.parametrize('case', CASES)
def test_loss_by_hand(r, case):
    s, given = settings(r), inputs(r)
    given['new'].requires_grad_()
    loss, stats = PolicyLoss(**s)(**given)
    loss.backward()
    want, grad, wanted = by_hand(s, **{k: v.tolist() for k, v in given.items()})
    assert abs(loss.item() - want) < 1e-10*(1 + abs(want)), s
    assert max(abs(x - y) for x, y in zip(given['new'].grad.tolist(), grad, strict=True)) < 1e-10*(1 + max(map(abs, grad))), s
    for name, value in wanted.items(): assert abs(stats[name] - value) < 1e-9, (name, s)


@pytest.mark.parametrize('case', CASES[:8])
def test_parts_add_up(r, case):
    "Micro-batches with the totals of the whole step give its loss and gradient"
    s, given = settings(r) | dict(top_entropy_quantile=1.), inputs(r)
    if s['loss_type'] == 'bnpo': s['loss_type'] = 'dapo'
    b, rows = len(given['advantages']), given['rows']
    cut = r.randrange(b + 1)
    given['new'].requires_grad_()
    whole, _ = PolicyLoss(**s)(**given)
    want, = torch.autograd.grad(whole, given['new'])
    loss = 0
    for part, answers in ((rows < cut, slice(0, cut)), (rows >= cut, slice(cut, b))):
        some = {k: v[part] for k, v in given.items() if k not in ('advantages', 'rows')}
        total = len(rows) if s['loss_type'] == 'dapo' else b
        loss = loss + PolicyLoss(**s)(**some, rows=rows[part] - answers.start, advantages=given['advantages'][answers], total=total)[0]
    got, = torch.autograd.grad(loss, given['new'])
    assert abs(loss - whole) < 1e-10*(1 + abs(whole)) and (got - want).abs().max() < 1e-10*(1 + want.abs().max()), s


def test_first_update_is_the_plain_gradient(r):
    "At ratio one nothing is clipped, and each type's gradient is −A times its weight"
    given = inputs(r)
    new, rows, a = given['new'].requires_grad_(), given['rows'], given['advantages']
    b, sizes = len(a), torch.bincount(rows, minlength=len(a)).double()
    for kind, weight in dict(grpo=1/(b*sizes[rows]), bnpo=1/len(rows), dapo=1/len(rows), dr_grpo=1/(b*7)).items():
        loss, stats = PolicyLoss(loss_type=kind, max_completion_length=7)(new, None, a, rows)
        got, = torch.autograd.grad(loss, new)
        assert (got + a[rows]*weight).abs().max() < 1e-12 and stats['clip_low'] == stats['clip_high'] == 0


@pytest.mark.parametrize('name', ['new', 'old', 'reference', 'sampled', 'entropies', 'advantages'])
def test_nan_never_passes(r, name):
    given = inputs(r)
    given[name][r.randrange(len(given[name]))] = r.choice((math.nan, math.inf, -math.inf))
    with pytest.raises(ValueError, match='not finite'): PolicyLoss(beta=.1, truncate=2., top_entropy_quantile=.5)(**given)


@pytest.mark.parametrize('change, words', [
    (dict(kl='k0'), 'kl'), (dict(loss_type='mean'), 'loss_type'), (dict(importance_sampling_level='word'), 'importance_sampling_level'),
    (dict(mismatch='drop'), 'mismatch'), (dict(epsilon=1.5), 'epsilon'), (dict(epsilon=math.nan), 'epsilon'), (dict(beta=-1.), 'beta'),
    (dict(top_entropy_quantile=2.), 'top_entropy_quantile'), (dict(truncate=0.), 'truncate'),
    (dict(loss_type='dr_grpo'), 'max_completion_length')])
def test_bad_settings(change, words):
    with pytest.raises(ValueError, match=words): PolicyLoss(**change)


def test_bad_tensors(r):
    given = inputs(r)
    for name, words in (('reference', 'reference is missing'), ('sampled', 'sampled is missing'), ('entropies', 'entropies is missing')):
        with pytest.raises(ValueError, match=words): PolicyLoss(beta=.1, truncate=2., top_entropy_quantile=.5)(**given | {name: None})
    with pytest.raises(ValueError, match='old has shape'): PolicyLoss()(**given | dict(old=given['old'][1:]))
    with pytest.raises(ValueError, match='rows name answers'): PolicyLoss()(**given | dict(advantages=given['advantages'][:-1]))


# ---- estimators of the divergence

def test_kl_estimators_exactly(r):
    "Means over all tokens: which values and which gradients are those of the divergence, for a policy, a reference and an older policy"
    z, ref, older = torch.randn(3, r.randrange(2, 12), dtype=torch.float64)
    z.requires_grad_()
    new, ref, older = z.log_softmax(0), ref.log_softmax(0), older.log_softmax(0)
    reverse, forward = (new.exp()*(new - ref)).sum(), (ref.exp()*(ref - new)).sum()
    def mean(kind, sampler, corrected):
        sampler = sampler.detach()
        return (sampler.exp()*kl_estimate(new, ref, kind, sampler if corrected else None)).sum()
    for kind, sampler, corrected in (('k1', new, False), ('k3', new, False), ('k1', older, True), ('k3', older, True)):
        assert abs(mean(kind, sampler, corrected) - reverse) < 1e-12
    def gradient(value): return torch.autograd.grad(value, z, retain_graph=True)[0]
    for got, want in ((gradient(mean('k1', new, False)), 0*z), (gradient(mean('k2', new, False)), gradient(reverse)),
                      (gradient(mean('k3', new, False)), gradient(forward)), (gradient(mean('k3', older, True)), gradient(reverse)),
                      (gradient(mean('k3', new, True)), gradient(reverse)), (gradient(mean('k1', older, True)), gradient(reverse))):
        assert (got - want).abs().max() < 1e-12


# ---- advantages

@pytest.mark.parametrize('case', CASES[:6])
def test_advantages_by_hand(r, case):
    "Means, standard deviations and sums in plain Python, on rewards of which some groups are all equal"
    g, groups = r.randrange(2, 9), r.randrange(1, 6)
    def row(): return [r.choice((.1, .7, 1/3))]*g if r.random() < .4 else [r.choice((0., 1., r.gauss(0, 3))) for _ in range(g)]
    rewards = [row() for _ in range(groups)]
    flat = torch.tensor(rewards, dtype=torch.float64).flatten()
    whole = [x for row in rewards for x in row]
    spread = math.sqrt(math.fsum((x - math.fsum(whole)/len(whole))**2 for x in whole)/(len(whole) - 1))
    for i, row in enumerate(rewards):
        mean = math.fsum(row)/g
        std = math.sqrt(math.fsum((x - mean)**2 for x in row)/(g - 1))
        equal, part = len({*row}) == 1, slice(i*g, i*g + g)
        assert informative(flat, g)[i] == (not equal)
        for got, want in ((group_advantage(flat, g), [0. if equal else (x - mean)/(std + 1e-4) for x in row]),
                          (group_advantage(flat, g, 'batch'), [0. if equal else (x - mean)/(spread + 1e-4) for x in row]),
                          (group_advantage(flat, g, scale=False), [0. if equal else x - mean for x in row]),
                          (leave_one_out(flat, g), [0. if equal else x - (math.fsum(row) - x)/(g - 1) for x in row])):
            assert max(abs(a - b) for a, b in zip(got[part].tolist(), want, strict=True)) < 1e-12*(1 + max(map(abs, want)))
            if equal: assert not got[part].any()


@pytest.mark.parametrize('rewards, group, words', [
    ([1., 0, 1], 2, 'do not form groups of 2'), ([1., 0], 1, 'nothing to compare'), ([1., math.nan], 2, '1 of 2 rewards are not finite')])
def test_bad_rewards(rewards, group, words):
    for f in (group_advantage, leave_one_out, informative):
        with pytest.raises(ValueError, match=words): f(torch.tensor(rewards), group)


def test_generalised_advantage_by_its_sum(r):
    "Equation 16, term by term"
    n, gamma, lam = r.randrange(1, 12), r.uniform(.5, 1), r.uniform(0, 1)
    rewards, values = torch.randn(2, 3, n, dtype=torch.float64)
    got = generalised_advantage(rewards, values, gamma, lam)
    for b in range(3):
        v = [*values[b].tolist(), 0.]
        delta = [rewards[b, t].item() + gamma*v[t + 1] - v[t] for t in range(n)]
        for t in range(n): assert abs(got[b, t] - sum((gamma*lam)**k*delta[t + k] for k in range(n - t))) < 1e-12


# ---- log-probabilities

def full(x, w, labels, temperature):
    logp = (x@w.T/temperature).log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp()*logp).sum(1)


@pytest.mark.parametrize('case', CASES[:8])
def test_log_probs_in_float64(r, case):
    n, d, w = r.choice((0, 1, r.randrange(2, 40))), r.randrange(1, 20), r.randrange(2, 50)
    x, head = (torch.randn(s, d, dtype=torch.float64, requires_grad=True) for s in (n, w))
    if r.random() < .3: head.requires_grad_(False)
    labels, temperature = torch.randint(w, (n,)), r.uniform(.3, 2)
    weights = torch.randn(n, dtype=torch.float64)*(torch.rand(n) < .7)
    got, entropies = linear_log_probs(x, head, labels, temperature, r.randrange(0, n + 2))
    want, wanted = full(x, head, labels, temperature)
    assert not entropies.requires_grad
    leaves = [t for t in (x, head) if t.requires_grad]
    grads = [torch.autograd.grad((o*weights).sum(), leaves) for o in (got, want)]
    for a, b in ((got, want), (entropies, wanted), *zip(*grads, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype and (not a.numel() or (a - b).abs().max() < 1e-11)


def test_log_probs_under_autocast(r):
    n, d, w = 9, 32, 61
    x, head = (.3*torch.randn(n, d)).requires_grad_(), torch.randn(w, d, requires_grad=True)
    labels, weights = torch.randint(w, (n,)), torch.randn(n)
    with torch.autocast('cpu', torch.bfloat16): got, entropies = linear_log_probs(x, head, labels, .7, r.randrange(0, n + 2))
    (got*weights).sum().backward()
    half = [t.detach().bfloat16().double().requires_grad_() for t in (x, head)]
    logits = half[0]@half[1].T/.7
    full = logits.log_softmax(-1)
    want = full.gather(1, labels[:, None])[:, 0]
    (want*weights).sum().backward()
    step = 2*2**-8*logits.abs().max().item() # of the logits, which bfloat16 rounds, and of their normaliser
    assert got.dtype == entropies.dtype == torch.float32
    assert (got - want).abs().max() <= step
    assert (entropies + (full.exp()*full).sum(1)).abs().max() <= step*(1 + math.log(w))
    for one,other in zip((x, head), half, strict=True): assert (one.grad - other.grad).norm() <= (.02 + step)*other.grad.norm()


@pytest.mark.parametrize('case', CASES[:8])
def test_log_probs_among_kept_tokens(r, case):
    "Each position by the logits of its own tokens, in plain sums of float64; values, entropies and gradients"
    n, d, w = r.choice((0, 1, r.randrange(2, 40))), r.randrange(1, 20), r.randrange(2, 50)
    x, head = (torch.randn(s, d, dtype=torch.float64, requires_grad=True) for s in (n, w))
    if r.random() < .3: head.requires_grad_(False)
    sets = [sorted(r.sample(range(w), r.randrange(1, w + 1))) for _ in range(n)]
    at, temperature, weights = [r.randrange(len(s)) for s in sets], r.uniform(.3, 2), torch.randn(n, dtype=torch.float64)
    labels = torch.tensor([s[i] for s, i in zip(sets, at, strict=True)], dtype=torch.int64)
    ids = [*map(torch.tensor, sets)]
    got, entropies = linear_log_probs(x, head, labels, temperature, r.randrange(0, n + 2), ids)
    rows = [x[i]@head[s].T/temperature for i, s in enumerate(sets)]
    logp = [z - z.exp().sum().log() for z in rows]
    want = torch.stack([p[i] for p, i in zip(logp, at, strict=True)]) if n else x.sum(1)
    assert got.shape == entropies.shape == (n,) and not entropies.requires_grad
    assert all(abs(h + (p.exp()*p).sum()) < 1e-11 for h, p in zip(entropies, logp, strict=True))
    leaves = [t for t in (x, head) if t.requires_grad]
    grads = [torch.autograd.grad((o*weights).sum(), leaves, allow_unused=True, materialize_grads=True) for o in (got, want)]
    for a, b in ((got, want), *zip(*grads, strict=True)): assert not a.numel() or (a - b).abs().max() < 1e-11
    whole = linear_log_probs(x, head, labels, temperature)[0]
    everything = linear_log_probs(x, head, labels, temperature, kept=[torch.arange(w)]*n)[0]
    assert not n or (whole - everything).abs().max() < 1e-11


def batch_of(r, w, b=4):
    "Prompts and answers of unequal length"
    sizes = [(r.randrange(1, 6), r.randrange(1, 9)) for _ in range(b)]
    return collate([example([r.randrange(w) for _ in range(p + a)], [False]*p + [True]*a) for p, a in sizes])


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('kind', ['full', 'lora', 'int8'])
def test_model_log_probs(r, kind, tied):
    "Values and all gradients equal those through all logits of the model"
    model = Model(Config('llama', **SIZES, tie_embeddings=tied), dtype='float32', device='cpu').init_weights(.3)
    if kind == 'lora': LoraConfig(r=2, target_modules=['q_proj', 'o_proj']).apply(model)
    batch, temperature = batch_of(r, SIZES['vocab_size']), r.uniform(.5, 1.5)
    labels, rows = batch['labels'], answer_rows(batch['labels'])
    if kind == 'int8':
        if tied: pytest.skip('a quantised head is a head of its own')
        model.requires_grad_(False)
        x = model.hidden(batch['tokens'], documents=batch.get('documents'))[labels != IGNORE].requires_grad_()
        int8, some = quantize(model.head_weight, 'int8'), labels[labels != IGNORE]
        (got, entropies), (want, wanted) = linear_log_probs(x, int8, some, temperature, 3), full(x, int8.dequantize(), some, temperature)
        leaves = [x]
    else:
        leaves = [p for p in model.parameters() if p.requires_grad]
        got, entropies = answer_log_probs(model, batch, temperature, r.randrange(0, 5))
        x = model.hidden(batch['tokens'], documents=batch.get('documents'))[labels != IGNORE]
        want, wanted = full(x, model.head_weight, labels[labels != IGNORE], temperature)
    assert len(rows) == len(got) == (labels != IGNORE).sum()
    weights = torch.randn(4)[rows]
    for a, b in ((got, want), (entropies, wanted)): assert (a - b).abs().max() < 1e-4
    for a, b in zip(*(torch.autograd.grad((o*weights).sum(), leaves) for o in (got, want)), strict=True):
        assert (a - b).abs().max() < 1e-4*(1 + b.abs().max())


@pytest.mark.parametrize('name', ['mini'])
def test_real_weights(r, name):
    "Log-probabilities and entropies of the shipped model's own answers, each prompt alone and all logits at once"
    model = Model.from_pretrained(name, dtype='float32', device='cpu')
    batch = batch_of(r, model.config.vocab_size, 3)
    with torch.no_grad(): got, entropies = answer_log_probs(model, batch, .7, 2)
    at = 0
    for tokens, labels in zip(batch['tokens'], batch['labels'], strict=True):
        scored = (labels != IGNORE).nonzero()[:, 0]
        with torch.no_grad(): logp = (model(tokens[None, :int(scored[-1]) + 1])[0, scored].double()/.7).log_softmax(-1)
        part = slice(at, at + len(scored))
        assert (got[part] - logp.gather(1, labels[scored][:, None])[:, 0]).abs().max() < 1e-4
        assert (entropies[part] + (logp.exp()*logp).sum(1)).abs().max() < 1e-4
        at += len(scored)
    assert at == len(got)


class Largest(TorchDispatchMode):
    "Keeps the number of elements of the largest result"
    size = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_never_all_logits(r):
    x, w = torch.randn(300, 4, requires_grad=True), torch.randn(2000, 4, requires_grad=True)
    with Largest() as seen:
        logps, _ = linear_log_probs(x, w, torch.randint(2000, (300,)), chunk=7)
        (logps*torch.randn(300)).sum().backward()
    assert seen.size <= 7*2000


def test_bfloat16_is_as_near_as_its_bits(r):
    x, w, labels = torch.randn(20, 16).bfloat16(), torch.randn(50, 16).bfloat16(), torch.randint(50, (20,))
    got, _ = linear_log_probs(x, w, labels)
    want, _ = full(x.double(), w.double(), labels, 1.)
    assert got.dtype == torch.float32 and (got - want).abs().max() < 2*2**-8*(x.double()@w.double().T).abs().max()


# ---- TRL's trainer on the same batch

TRL = [dict(loss_type=t) for t in LOSS_TYPES] + [dict(loss_type=t, beta=.07, unbiased_kl=u) for t in LOSS_TYPES for u in (False, True)] + [
    dict(loss_type='dapo', epsilon_high=.28), dict(epsilon=.05, epsilon_high=.1, delta=1.3), dict(loss_type='bnpo', delta=1.5, beta=.04),
    *(dict(loss_type=t, importance_sampling_level='sequence', epsilon=3e-4, epsilon_high=4e-4) for t in LOSS_TYPES),
    dict(importance_sampling_level='sequence', beta=.1), dict(loss_type='dapo', top_entropy_quantile=.2),
    dict(top_entropy_quantile=.5, beta=.05), dict(off_policy=.05), dict(off_policy=.05, beta=.05, unbiased_kl=True, loss_type='dr_grpo'),
    dict(loss_type='dr_grpo', max_completion_length=1, importance_sampling_level='sequence', theirs=dict(loss_type='luspo')),
    *(dict(truncate=1.1, mismatch=m, loss_type=t) for m, t in zip(MISMATCH, LOSS_TYPES, strict=True)),
    dict(truncate=1.05, off_policy=.1, beta=.01, unbiased_kl=True, epsilon_high=.28, loss_type='dapo', top_entropy_quantile=.8)]
NAMES = dict(unbiased_kl='use_bias_correction_kl', off_policy='off_policy_mask_threshold', truncate='vllm_importance_sampling_clip_max',
             mismatch='vllm_importance_sampling_mode')


@pytest.fixture(scope='module')
def policies(tmp_path_factory):
    "A random policy of transformers and ours of the same weights, and three others near it"
    trl = pytest.importorskip('trl', reason='TRL is not installed: pip install trl')
    transformers = pytest.importorskip('transformers')
    from deepseek_nb.files.hub import fetch
    tok = transformers.AutoTokenizer.from_pretrained(fetch('deepseek-v4-tokenizer'))
    torch.manual_seed(SEED)
    config = transformers.LlamaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, intermediate_size=24, max_position_embeddings=64,
                                      initializer_range=.3, bos_token_id=0, eos_token_id=1)
    folders = [tmp_path_factory.mktemp('policy') for _ in range(4)]
    model = transformers.LlamaForCausalLM(config)
    for folder in folders:
        model.save_pretrained(folder)
        with torch.no_grad():
            for p in model.parameters(): p.add_(.1*p.std()*torch.randn_like(p))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float32)
    return trl, tok, theirs, [Model.from_pretrained(f, dtype='float32', device='cpu') for f in folders]


def trainer(trl, tok, model, folder, s, temperature, length=9):
    "TRL's trainer with these settings; its sampler is this process, but its correction is computed"
    import datasets
    s = dict(max_completion_length=length) | s
    s = {NAMES.get(k, k): v for k, v in s.items() if k != 'theirs'} | s.get('theirs', {})
    s |= dict(use_bias_correction_kl=s.get('use_bias_correction_kl', False))
    args = trl.GRPOConfig(output_dir=str(folder), per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to=[],
                          gradient_checkpointing=False, temperature=temperature, save_strategy='no',
                          **dict(loss_type='grpo', num_generations=4) | s)
    t = trl.GRPOTrainer(model=model, reward_funcs=lambda completions, **_: [0.]*len(completions), args=args, processing_class=tok,
                        train_dataset=datasets.Dataset.from_list([dict(prompt='a')]*4))
    t.current_gradient_accumulation_steps = 1
    t.use_vllm = 'vllm_importance_sampling_clip_max' in s
    return t


def padded(values, rows, b):
    "Tokens of answers as a matrix with zeros at the right, as TRL has them"
    out = [values[rows == i] for i in range(b)]
    return torch.nn.utils.rnn.pad_sequence(out, batch_first=True)


def their_inputs(batch, given, rows, b):
    "The same batch in TRL's form: prompts padded at the left, answers at the right"
    ids, labels = batch['tokens'], batch['labels']
    answers = padded(labels[labels != IGNORE], rows, b)
    mask = padded(torch.ones_like(rows), rows, b)
    prompts = [row[:int((lab != IGNORE).int().argmax()) + 1] for row, lab in zip(ids, labels, strict=True)]
    wide = max(map(len, prompts))
    prompt_ids = torch.stack([torch.cat([p.new_zeros(wide - len(p)), p]) for p in prompts])
    prompt_mask = torch.stack([torch.cat([p.new_zeros(wide - len(p)), torch.ones_like(p)]) for p in prompts])
    return dict(prompt_ids=prompt_ids, prompt_mask=prompt_mask, completion_ids=answers, completion_mask=mask,
                advantages=given['advantages'], old_per_token_logps=padded(given['old'], rows, b),
                ref_per_token_logps=padded(given['reference'], rows, b),
                sampling_per_token_logps=padded(given['sampled'], rows, b), num_items_in_batch=mask.sum())


def correction(inputs, s):
    "TRL computes this factor while it generates with vLLM, which is absent here; its formula, on matrices"
    difference = (inputs['old_per_token_logps'] - inputs['sampling_per_token_logps'])*inputs['completion_mask']
    if s['mismatch'].startswith('sequence'): difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    return ratio.clamp(max=s['truncate']) if s['mismatch'].endswith('truncate') else ratio.masked_fill(ratio > s['truncate'], 0)


def steady(entropies, share):
    "Whether the same tokens are selected if entropies change by a rounding error"
    if share == 1: return True
    at = (len(entropies) - 1)*(1 - share)
    return abs(at - round(at)) > .01 and (entropies - torch.quantile(entropies, 1 - share)).abs().min() > 1e-4


def relative(got, want):
    "Distance of two gradients as vectors of all weights; that of one weight is rounded as the largest are"
    error, size = (torch.cat([t.flatten() for t in ts]).norm().item() for ts in ([a - b for a, b in zip(got, want, strict=True)], want))
    return error/size if size else error  # all answers may be clipped


def test_against_trl(r, policies, tmp_path, capsys):
    "Loss and gradient of every weight, for every setting that TRL has, on fresh batches"
    trl, tok, theirs, (ours, *others) = policies
    temperature, found = r.uniform(.6, 1.4), []
    for s in TRL:
        b, share, entropies = 4, s.get('top_entropy_quantile', 1), None
        while entropies is None or not steady(entropies.detach(), share):
            batch = batch_of(r, 61, b)
            ours.zero_grad()
            new, entropies = answer_log_probs(ours, batch, temperature)
        rows = answer_rows(batch['labels'])
        with torch.no_grad(): old, reference, sampled = (answer_log_probs(m, batch, temperature)[0] for m in others)
        given = dict(old=old, reference=reference, sampled=sampled, advantages=torch.randn(b))
        settings = dict(max_completion_length=9, mismatch='token_truncate') | {k: v for k, v in s.items() if k != 'theirs'}
        loss, stats = PolicyLoss(**settings)(new, rows=rows, entropies=entropies, **given)
        loss.backward()
        t = trainer(trl, tok, theirs, tmp_path, s, temperature)
        inputs = their_inputs(batch, given, rows, b)
        if t.use_vllm: inputs['importance_sampling_ratio'] = correction(inputs, settings)
        if not t.use_vllm and not s.get('off_policy'): del inputs['sampling_per_token_logps']
        theirs.zero_grad()
        theirs.train()
        want = t._compute_loss(theirs, inputs)
        want.backward()
        grads, theirs_by_name = dict(ours.named_parameters()), dict(theirs.named_parameters())
        error = relative([grads[k.removeprefix('model.')].grad for k in theirs_by_name], [p.grad for p in theirs_by_name.values()])
        size = max(abs(want.item()), given['advantages'].abs().mean().item()) # the terms may cancel, their rounding errors don't
        found.append((abs(loss.item() - want.item())/size, error, s))
        for name, key in (('clip_low', 'clip_ratio/low_mean'), ('clip_high', 'clip_ratio/high_mean')):
            if s.get('importance_sampling_level') != 'sequence' and 'delta' not in s:
                assert abs(stats[name] - t._metrics['train'][key][-1]) < 1e-6, (name, s)
    with capsys.disabled():
        print(f'TRL, {len(found)} settings: worst loss {max(v for v, *_ in found):.1e}, gradient {max(g for _, g, _ in found):.1e}')
        if os.environ.get('SHOW'): print(*(f'{s}: loss {value:.1e}, gradient {gradient:.1e}' for value, gradient, s in found), sep='\n')
    for value, gradient, s in found: assert value < 1e-5 and gradient < 1e-5, s


def test_advantages_against_trl(r, policies, tmp_path):
    "TRL generates with a model of its own and turns random rewards into advantages"
    trl, tok, theirs, _ = policies
    given = []
    def reward(completions, **_):
        given[:] = [r.choice((0., 1., r.gauss(0, 1))) for _ in completions]
        return given
    theirs.config.vocab_size = len(tok)
    model = type(theirs)(theirs.config)
    for scale, group in (('group', 4), ('none', 4), ('batch', 2), ('group', 2), (True, 2), (False, 2)):
        t = trainer(trl, tok, model, tmp_path, dict(scale_rewards=scale, num_generations=group), 1., length=2)
        t.reward_funcs = [reward]
        got = t._generate_and_score_completions([dict(prompt='a')]*4)['advantages']
        assert len(given) == 4 and (got - group_advantage(torch.tensor(given), group, scale)).abs().max() < 1e-5


@pytest.mark.parametrize('kind', LOSS_TYPES)
def test_truncated_answers_against_trl(r, policies, tmp_path, kind):
    "TRL masks answers without an end token, of given texts; loss and gradients equal those of a batch of ours"
    from deepseek_nb.train.grpo import GroupBatches, GRPOConfig, PolicyObjective
    from deepseek_nb.train.rollout import Rollouts
    trl, tok, theirs, (ours, *_) = policies
    t = trainer(trl, tok, theirs, tmp_path, dict(loss_type=kind, mask_truncated_completions=True, scale_rewards='none'), 1.)
    end = t.eos_token_ids[0]
    plain = [i for i in range(61) if i not in {*t.eos_token_ids, tok.pad_token_id}]
    ended = [True, False, *(r.random() < .5 for _ in range(2))]
    prompts = [[r.choice(plain) for _ in range(3)]]*4
    answers = [[r.choice(plain) for _ in range(r.randrange(1, 9))] + [end]*e for e in ended]
    rewards = [r.gauss(0, 1) for _ in range(4)]
    t._tokenize_prompts = lambda *a: (prompts, None, {})
    t._generate_single_turn = lambda *a, **k: (answers, None)
    t.reward_funcs = [lambda completions, **_: rewards]
    inputs = t._generate_and_score_completions([dict(prompt='a')]*4)
    theirs.zero_grad()
    theirs.train()
    want = t._compute_loss(theirs, inputs)
    want.backward()
    args = GRPOConfig(loss_type=kind, mask_truncated_completions=True, max_completion_length=9, num_generations=4,
                      per_device_train_batch_size=4)
    drawn = Rollouts(prompts, answers, ended, [torch.zeros(len(a)) for a in answers], 4)
    batch = GroupBatches([dict(prompt='')], ours, tok, [], args).cut(drawn, group_advantage(torch.tensor(rewards), 4, False), [*range(4)])
    assert answer_rows(batch['labels']).tolist() == [i for i in range(4) if ended[i] for _ in answers[i]]
    ours.zero_grad()
    loss, n = PolicyObjective(args)(ours, batch)
    (loss/n).backward()
    grads, by_name = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert abs(loss.item()/n - want.item()) < 1e-5*(1 + abs(want.item()))
    assert relative([grads[k.removeprefix('model.')].grad for k in by_name], [p.grad for p in by_name.values()]) < 1e-5

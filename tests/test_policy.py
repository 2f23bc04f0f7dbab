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
from deepseek_nb.train.data import IGNORE, collate, example
from deepseek_nb.train.kl_estimate import KL_KINDS
from deepseek_nb.train.log_probs import answer_log_probs, answer_rows, linear_log_probs
from deepseek_nb.train.lora import LoraConfig
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

"Rollouts repeat bit for bit, alone and in company, and the trainer can have the sampler's bits."
import random

import pytest
import torch

from deepseek_nb.arch.model import Model, head
from deepseek_nb.arch.routing import Gate
from deepseek_nb.core.config import Config
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.train.data import IGNORE
from deepseek_nb.train.lora import LoraConfig
from deepseek_nb.train.rollout import (
    ROLLOUT_PAGE,
    Sampler,
    is_invariant,
    mismatch,
    recorded_routes,
    replay_table,
    replayed_routes,
    row_seed,
    sampler_log_probs,
    token_log_probs,
    with_values,
)

TOK = Tokenizer.from_pretrained('mini')
SIZES = dict(vocab_size=len(TOK), dim=32, n_layers=2, n_heads=2, inter_dim=48, max_positions=128, eos_ids=TOK.eos_ids[:1])
DENSE = Config('llama', **SIZES, n_kv_heads=1, head_dim=16)
MOE = Config('deepseek_v3', **SIZES, n_dense_layers=1, moe_inter_dim=16, n_routed_experts=8, n_shared_experts=1, n_activated_experts=2,
             kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16, score_func='sigmoid', score_bias=True, norm_topk=True)


@pytest.fixture
def seed(pytestconfig):
    n = random.SystemRandom().randrange(10**6)
    print(f'seed {n}')
    torch.manual_seed(n)
    random.seed(n)
    return n


def fresh(c=DENSE, lora=False, std=.3):
    model = Model(c, dtype='float32', device='cpu').init_weights(std)
    if lora:
        LoraConfig(r=3, lora_alpha=6, target_modules=['q_proj', 'o_proj', 'kv_b_proj', 'down_proj'][:2]).apply(model)
        for n, p in model.named_parameters():
            if n.endswith('.b'): torch.nn.init.normal_(p, std=.2)
    return model


def prompts(n):
    "Prompts of ragged lengths, some longer than a page; two begin with the same page"
    short = lambda: [random.randrange(4, 200) for _ in range(random.randrange(1, 2*ROLLOUT_PAGE))]
    long = random.choices(range(4, 200), k=ROLLOUT_PAGE + 3)
    return [[*long, 5], [*long, 6, 7], *(short() for _ in range(n - 2))]


def same(a, b):
    assert a.answers == b.answers and a.ended == b.ended
    for x, y in zip(a.sampled, b.sampled, strict=True): assert torch.equal(x, y)


KINDS = dict(dense=(DENSE, False), moe=(MOE, False), lora=(DENSE, True))


def ordinary(model, rollouts, temperature=1.):
    batch = rollouts.batch()
    at = batch['labels'] != IGNORE
    x = model.hidden(batch['tokens'], documents=batch.get('documents'))
    return token_log_probs(head(x, model.head_weight)[at], batch['labels'][at], temperature)


@pytest.mark.parametrize('kind', KINDS)
def test_company_changes_no_bit_and_the_scorer_has_the_samplers_bits(kind, seed):
    model = fresh(*KINDS[kind])
    if not is_invariant(model): pytest.skip('no row-invariant kernels on this machine')
    make = lambda **kw: Sampler(model, TOK, max_tokens=9, temperature=.8, seed=seed, **kw)
    asked = prompts(4)
    together = make()(asked, 3, phase=2)
    same(together, make()(asked, 3, phase=2))
    same(together, make(max_rows=2)(asked, 3, phase=2))
    first = make()(asked[:1], 3, phase=2)
    assert first.answers == together.answers[:3]
    for a, b in zip(first.sampled, together.sampled[:3], strict=True): assert torch.equal(a, b)
    found = sampler_log_probs(model, together.prompts, together.answers, .8)
    assert torch.equal(found, torch.cat(together.sampled))
    some = slice(4, 7)
    assert torch.equal(sampler_log_probs(model, together.prompts[some], together.answers[some], .8), torch.cat(together.sampled[some]))
    far = mismatch(ordinary(model, together, .8).detach(), found)
    assert far['largest'] < 1e-3 and far['kl'] >= 0


def test_the_draw_follows_the_distribution(seed):
    "First tokens of many answers against the model's probabilities: chi-square of 8 classes, exceeded once in 10⁶ seeds"
    model, prompt, n = fresh(std=.2), [5, 6, 7], 1500
    drawn = Sampler(model, TOK, max_tokens=1, temperature=1.3, seed=seed)([prompt], n)
    with torch.no_grad(): p = (model(torch.tensor([prompt]))[0, -1]/1.3).double().softmax(0)
    classes = (torch.arange(len(p))*8//len(p))
    want = torch.zeros(8, dtype=torch.float64).index_add(0, classes, p)*n
    got = torch.bincount(classes[[a[0] for a in drawn.answers]], minlength=8)
    assert ((got - want)**2/want).sum() < 40.5
    ids = torch.tensor([a[0] for a in drawn.answers])
    assert torch.allclose(torch.cat(drawn.sampled).double(), p.log()[ids], atol=1e-4)


def test_weights_that_change_change_the_next_phase(seed):
    for lora in (False, True):
        model = fresh(DENSE, lora)
        sampler, asked = Sampler(model, TOK, max_tokens=6, seed=seed), prompts(2)
        before = sampler(asked, 2)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad: p.add_(torch.randn_like(p)*.3)
        after = sampler(asked, 2)
        want = sampler_log_probs(model, after.prompts, after.answers)
        assert (want - torch.cat(after.sampled)).abs().max() < 1e-4
        assert after.answers != before.answers


def test_values_of_the_sampler_have_the_ordinary_gradient(seed):
    model = fresh(MOE)
    drawn = Sampler(model, TOK, max_tokens=7, seed=seed)(prompts(3), 2)
    value, weights = torch.cat(drawn.sampled), torch.randn(sum(map(len, drawn.answers)))
    grads = []
    for swap in (False, True):
        model.zero_grad()
        new = ordinary(model, drawn)
        if swap:
            new = with_values(new, value)
            assert torch.equal(new.detach(), value)
            assert torch.equal((new - value).exp(), torch.ones_like(value))
        (new*weights).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True): assert torch.equal(a, b)


def test_replay_uses_the_recorded_experts(seed):
    model, asked = fresh(MOE), prompts(3)
    drawn = Sampler(model, TOK, max_tokens=6, seed=seed, replay=True)(asked, 2)
    batch = drawn.batch()
    table = replay_table(drawn.routes, batch['tokens'].shape[1])
    for row, r in enumerate(drawn.routes):
        assert r.shape == (1, len(drawn.prompts[row]) + len(drawn.answers[row]) - 1, 2) and (r >= 0).all()
    gate = next(m for m in model.modules() if type(m) is Gate)
    with torch.no_grad(): gate.weight.add_(torch.randn_like(gate.weight)*3)
    seen = []
    with replayed_routes(model, table):
        hook = gate.register_forward_hook(lambda m, a, r: seen.append(r))
        new = ordinary(model, drawn)
        hook.remove()
    known = table.flatten(1, 2)[0] >= 0
    assert torch.equal(seen[0].experts[known], table.flatten(1, 2)[0][known])
    chosen = seen[0].scores.gather(-1, seen[0].experts)
    assert torch.allclose(seen[0].weights, chosen/chosen.sum(-1, keepdim=True), atol=1e-6)
    new.sum().backward()
    assert gate.weight.grad.abs().sum() > 0
    with torch.no_grad(): assert not torch.equal(ordinary(model, drawn), new.detach())
    assert not gate._forward_hooks


def test_what_cannot_be(seed):
    engine = Sampler(fresh(), TOK).engine()[0]
    with pytest.raises(ValueError, match='has no learned router'), recorded_routes(engine): pass
    with pytest.raises(ValueError, match='above 0'): Sampler(fresh(), TOK, temperature=0.)
    assert len({row_seed(0, i, j) for i in range(40) for j in range(40)}) == 1600

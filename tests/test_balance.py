"Router balance in the loop, against sums written out."
import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.arch.routing import Route, expert_load
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.infer.inside import routes
from deepseek_nb.train.balance import (
    Balance,
    balance_terms,
    communication_loss,
    device_loss,
    evenness,
    expert_loss,
    routers,
    row_routes,
    sequence_loss,
    unpadded,
    with_balance,
)
from deepseek_nb.train.callbacks import Callback, CancelStep
from deepseek_nb.train.data import Batches
from deepseek_nb.train.loss import language_loss
from deepseek_nb.train.trainer import Trainer, TrainingArguments

V3 = Config('deepseek_v3', vocab_size=64, dim=16, n_layers=3, n_heads=2, inter_dim=24, max_positions=32, n_dense_layers=1, moe_inter_dim=8,
            n_routed_experts=8, n_shared_experts=1, n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, group_score='sum2',
            kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, score_func='sigmoid', score_bias=True, norm_topk=True,
            rope=Rope(interleaved=True))
V2 = Config('deepseek_v2', vocab_size=64, dim=16, n_layers=2, n_heads=2, inter_dim=24, max_positions=32, n_dense_layers=1, moe_inter_dim=8,
            n_routed_experts=8, n_shared_experts=1, n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, kv_lora_rank=8,
            qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, rope=Rope(interleaved=True))


def fresh(c=V3, seed=0):
    torch.manual_seed(seed)
    return Model(c, dtype='float32', device='cpu').init_weights(.3)


def rows(n=24, s=12, uneven=True):
    g = torch.Generator().manual_seed(7)
    walk = (torch.randint(1, 4, (n, s+1), generator=g).cumsum(1)*7)%64
    return [dict(tokens=w[:-1][:s - i%5*uneven], labels=w[1:][:s - i%5*uneven]) for i,w in enumerate(walk)]


def args(**kwargs):
    return TrainingArguments(**dict(max_steps=4, learning_rate=.01, per_device_train_batch_size=4, disable_tqdm=True) | kwargs)


@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('accumulation', [1, 3])
def test_visits_and_bias_by_hand(checkpointing, accumulation):
    "Padding isn't counted, accumulated batches are added up, recomputed blocks, evaluations and other forward passes count once."
    class Ask(Callback):
        "Computes the loads anew, before the update"
        seen, moves = [], []
        def before_loss(self, t):
            with torch.no_grad(): t.model(t.batch['tokens'])
            now = routes(t.model, t.batch['tokens'])
            mask = t.batch['documents'].flatten() >= 0
            self.part = [expert_load(r.experts[mask], 8) for r in now.values()]
            self.seen[-1] = [a + b for a,b in zip(self.seen[-1], self.part, strict=True)]
        def before_step(self, t): self.seen.append([0, 0])
        def before_update(self, t): self.before = [g.e_score_correction_bias.clone() for g in routers(t.model)]
        def after_step(self, t):
            want = [b + .05*torch.sign(v.float().mean() - v) for b,v in zip(self.before, self.seen[-1], strict=True)]
            for b,w in zip(routers(t.model), want, strict=True): torch.testing.assert_close(b.e_score_correction_bias, w)
            for a,b in zip(balance.counts, self.seen[-1], strict=True): assert torch.equal(a, b)
    balance = Balance(.05, until=1.)
    a = args(gradient_checkpointing=checkpointing, gradient_accumulation_steps=accumulation, eval_steps=1)
    history = Trainer(fresh(), a, rows(), rows(), callbacks=[balance, Ask()]).train()
    for row in history: assert len(row['max_load']) == len(row['load_entropy']) == 2
    assert sum(v.sum() for v in balance.counts) == 2*2*history[-1]['tokens']
    assert not any(g._forward_hooks for g in balance.routers)


def test_gamma_falls_to_zero():
    seen = []
    class Look(Callback):
        order = 1
        def after_step(self, t): seen.append([g.e_score_correction_bias.clone() for g in routers(t.model)])
    Trainer(fresh(), args(max_steps=8), rows(), callbacks=[Balance(.01, until=.5), Look()]).train()
    still = [all(torch.equal(a, b) for a,b in zip(x, y, strict=True)) for x,y in zip(seen, seen[1:], strict=False)]
    assert still == [False]*3 + [True]*4
    shares = []
    Trainer(fresh(), args(max_steps=4), rows(), callbacks=[Balance(lambda share: shares.append(share) or 0)]).train()
    assert shares == [0, .25, .5, .75]


def test_looking_changes_nothing():
    a, b = (Trainer(fresh(), args(), rows(), callbacks=c) for c in ([], [Balance(0)]))
    assert [r['loss'] for r in a.train()] == [r['loss'] for r in b.train()]
    assert all(not g.e_score_correction_bias.any() for g in routers(b.model))


def test_a_cancelled_step_moves_no_bias():
    class Cancel(Callback):
        def before_update(self, t): raise CancelStep
    trainer = Trainer(fresh(), args(), rows(), callbacks=[Balance(.1), Cancel()])
    trainer.train()
    assert all(not g.e_score_correction_bias.any() for g in routers(trainer.model))


def test_routers_without_a_bias_are_only_watched():
    history = Trainer(fresh(V2), args(), rows(), callbacks=[Balance(.1)]).train()
    assert len(history[0]['max_load']) == 1 and all(g.e_score_correction_bias is None for g in routers(fresh(V2)))


def test_models_without_routers():
    dense = Config('llama', vocab_size=64, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, inter_dim=24)
    for act in (lambda m: routers(m), lambda m: Trainer(m, args(), rows(), callbacks=[Balance()]).train(),
                lambda m: with_balance(language_loss)(m, rows())):
        with pytest.raises(ValueError, match='has no router to balance'): act(Model(dense, dtype='float32', device='cpu'))


@pytest.mark.parametrize('c', [V3, V2])
@pytest.mark.parametrize('uneven', [False, True])
def test_losses_by_hand(c, uneven):
    "Each sequence by itself, without padding, summed over layers and times the scored tokens."
    model, batch = fresh(c), next(Batches(rows(uneven=uneven), 5, shuffle=False).rest())
    alphas = dict(sequence=.3, expert=.2, device=.1, communication=.05)
    total, n = with_balance(language_loss, **alphas)(model, batch)
    plain, _ = language_loss(model, batch)
    want = 0.
    for r in routes(model, batch['tokens']).values():
        for i in range(5):
            s = batch['tokens'].shape[1]
            length = s if not uneven else int((batch['documents'][i] >= 0).sum())
            p = Route(*(t[i*s:i*s+length] for t in r))
            want += (.3*sequence_loss(p, 1) + .2*expert_loss(p) + .1*device_loss(p, 4) + .05*communication_loss(p, 4, 2))/5
    assert ((total - plain)/n).item() == pytest.approx(want.item(), rel=1e-4)


def test_gradient_of_the_terms():
    "On a router's weights, as finite differences have it in float64."
    torch.manual_seed(0)
    x, w = torch.randn(12, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    batch, experts = dict(tokens=torch.zeros(3, 4)), torch.rand(12, 8).topk(2).indices
    def terms(w): return balance_terms(Route(torch.ones(12, 2), experts, (x@w.T).sigmoid()), batch, V3, dict(sequence=1., device=.5))
    assert torch.autograd.gradcheck(terms, (w,))


def test_losses_are_composed_and_trained():
    from deepseek_nb.arch.mtp import MTPLoss
    losses = []
    for wrap in (lambda f: f, with_balance, lambda f: with_balance(f, .5), lambda f: MTPLoss(with_balance(f, .5)),
                 lambda f: with_balance(MTPLoss(f), .5)):
        model = fresh(Config(**V3.__dict__ | dict(n_mtp_layers=1))).add_mtp()
        losses.append(Trainer(model, args(max_steps=2), rows(), loss=wrap(language_loss)).train()[0]['loss'])
    assert losses[0] < losses[1] < losses[2] < losses[3]
    assert losses[4] > losses[3]  # the block's own router is balanced too


def test_evaluation_reports_the_text_alone():
    a, b = (Trainer(fresh(), args(), rows(), rows(), loss=loss).evaluate() for loss in (language_loss, with_balance(language_loss, 1.)))
    assert a == pytest.approx(b, rel=1e-6)  # the last bit moves with where memory lies


def test_evenness():
    assert evenness(torch.tensor([4, 4, 4, 4])) == (torch.tensor(1.), torch.tensor(1.))
    assert evenness(torch.tensor([8, 0, 0, 0])) == (torch.tensor(4.), torch.tensor(0.))
    assert all(torch.isfinite(o) for o in evenness(torch.zeros(4)))
    assert unpadded(dict(tokens=torch.zeros(1, 2))) is None
    r = Route(torch.ones(6, 1), torch.zeros(6, 1, dtype=torch.int64), torch.rand(6, 4))
    assert [len(p.scores) for p in row_routes(r, torch.tensor([[True, False, True], [False]*3]), 2)] == [2]

"Training of the lightning indexer: its target, its gradients, what may move, and what it is worth on a trained model"
import json
import math
import random

import pytest
import torch

from deepseek_nb import Config, Model, Tokenizer
from deepseek_nb.arch.attention import causal_mask
from deepseek_nb.core.config import Rope
from deepseek_nb.studies import open_study
from deepseek_nb.train.indexer import (
    attention_recall,
    attention_target,
    dense_streams,
    fit_indexer,
    index_loss,
    selected_loss,
    sparse_hidden,
    sparse_loss,
    sparsify,
    top_mask,
    trained_scores,
    warm_up_indexer,
)

KINDS = ('indexer', 'best', 'window', 'random')
SEED = random.SystemRandom().randrange(10**6)
LENGTH = 24


def dense_config(draw):
    "A random dense model with latent attention"
    r = draw.choice([4, 8])
    mixture = dict(n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2, moe_inter_dim=16, score_func='sigmoid',
                   score_bias=True, norm_topk=True) if draw.random() < .5 else dict(n_dense_layers=2)
    return Config('deepseek_v3', vocab_size=50, dim=draw.choice([24, 32]), n_layers=2, n_heads=draw.choice([2, 3]), inter_dim=40,
                  q_lora_rank=draw.choice([0, 20]), kv_lora_rank=draw.choice([12, 16]), qk_nope_head_dim=draw.choice([6, 8]),
                  qk_rope_head_dim=r, v_head_dim=draw.choice([6, 10]), max_positions=64, rope=Rope(interleaved=True), **mixture)


@pytest.fixture(scope='module')
def pair():
    "A dense model, the same model with an indexer, and rows of tokens"
    print('seed', SEED)
    draw, _ = random.Random(SEED), torch.manual_seed(SEED)
    c = dense_config(draw)
    dense = Model(c, 'float32', 'cpu').init_weights(.3).requires_grad_(False)
    j, topk = draw.choice([2, 3]), draw.choice([5, 9])
    return dense, sparsify(dense, j, c.qk_rope_head_dim + draw.choice([0, 4]), topk, SEED), torch.randint(50, (5, LENGTH))


def fresh(pair, topk=None):
    dense, sparse, _ = pair
    c = sparse.config
    return sparsify(dense, c.index_n_heads, c.index_head_dim, topk or c.index_topk, SEED)


def worst(a, b): return ((a - b).abs().max()/b.abs().max()).item()


def test_sparse_model_is_the_dense_one_while_all_is_selected(pair):
    dense, sparse, rows = pair
    a = sparse.config.index_topk
    assert worst(sparse(rows[:, :a]), dense(rows[:, :a])) < 1e-4
    assert worst(fresh(pair, LENGTH)(rows), dense(rows)) < 1e-4
    assert not torch.allclose(sparse(rows), dense(rows), atol=1e-3)
    for (_, x, _), (_, y, _) in zip(dense_streams(sparse, rows), dense_streams(dense, rows), strict=True): assert worst(x, y) < 1e-4


def test_sparse_model_is_saved_and_loaded(pair, tmp_path):
    _, sparse, rows = pair
    again = Model.from_pretrained(sparse.save_pretrained(tmp_path), 'float32', 'cpu').requires_grad_(False)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in sparse.state_dict().items())
    assert again.config.model_type == 'deepseek_v32' and worst(again(rows), sparse(rows)) < 1e-5


def test_target_by_a_loop_over_heads(pair):
    "Keys and queries of each head written out, in float64"
    dense, _, rows = pair
    for block, x, ctx in dense_streams(dense, rows[:2]):
        attn, c = block.self_attn, dense.config
        target = attention_target(attn, x, ctx, causal_mask(LENGTH, LENGTH))
        q_nope, q_rope = attn.queries(x, ctx.angles)
        latent, rope = attn.latents(x, ctx.angles).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        keys = (latent@attn.kv_b_proj.weight.T).unflatten(-1, (c.n_heads, -1))[..., :c.qk_nope_head_dim]
        wanted = torch.zeros(2, LENGTH, LENGTH, dtype=torch.float64)
        for b in range(2):
            for h in range(c.n_heads):
                for s in range(LENGTH):
                    dots = keys[b, :s+1, h].double()@q_nope[b, h, s].double() + rope[b, :s+1].double()@q_rope[b, h, s].double()
                    wanted[b, s, :s+1] += (dots*attn.scale).softmax(0)/c.n_heads
        assert (target - wanted).abs().max() < 1e-5
        assert (target.sum(-1) - 1).abs().max() < 1e-5 and (target.triu(1) == 0).all()
        some = top_mask(torch.rand(2, LENGTH, LENGTH), 4)[:, 0]
        among = attention_target(attn, x, ctx, some)
        assert (among.sum(-1) - 1).abs().max() < 1e-5 and (among[~some] == 0).all()


def test_loss_and_its_gradient():
    torch.manual_seed(SEED)
    scores = torch.randn(2, 6, 6, dtype=torch.float64, requires_grad=True)
    mask = top_mask(torch.rand(2, 6, 6), 3)[:, 0]
    p = torch.rand(2, 6, 6, dtype=torch.float64).masked_fill(~mask, 0)
    p = p/p.sum(-1, keepdim=True)
    assert torch.autograd.gradcheck(lambda s: index_loss(s, p, mask), scores)
    by_hand = sum((p[b, s, t]*(p[b, s, t]/q[t]).log()).item() for b in range(2) for s in range(6)
                  for q in [scores[b, s].masked_fill(~mask[b, s], -torch.inf).softmax(0)] for t in range(6) if mask[b, s, t])/12
    assert index_loss(scores, p, mask).item() == pytest.approx(by_hand, abs=1e-9)
    assert index_loss(p.clamp(min=1e-300).log(), p, mask).item() == pytest.approx(0, abs=1e-9)


def scores_by_the_paper(w, x, latent, r, angles):
    "Equation 1 of arXiv 2512.02556 in float64, with weights by name"
    def turn(y):
        cos, sin = angles
        a, b = y[..., :r//2], y[..., r//2:r]
        return torch.cat([a*cos - b*sin, b*cos + a*sin, y[..., r:]], -1)
    k = x@w['wk.weight'].T
    k = (k - k.mean(-1, keepdim=True))/(k.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()*w['k_norm.weight'] + w['k_norm.bias']
    j, u = len(w['weights_proj.weight']), k.shape[-1]
    q, k = turn((latent@w['wq_b.weight'].T).unflatten(-1, (j, u)).transpose(1, 2)), turn(k[:, None])
    heads = (x@w['weights_proj.weight'].T*(j*u)**-.5).transpose(1, 2)[..., None]
    return ((q@k.transpose(-1, -2)).relu()*heads).sum(1)


def test_gradients_against_finite_differences(pair):
    model, rows = fresh(pair), pair[2]
    block, x, ctx = [*dense_streams(model, rows[:2, :10])][1]
    attn, causal, r = block.self_attn, causal_mask(10, 10), model.config.qk_rope_head_dim
    p = attention_target(attn, x, ctx, causal)
    attn.indexer.requires_grad_(True)
    loss = index_loss(trained_scores(attn, x, ctx), p, causal)
    loss.backward()
    w = {n: t.detach().double() for n, t in attn.indexer.named_parameters()}
    latent, angles = attn.query_latent(x).double(), [a.double() for a in ctx.angles]
    def exact(): return index_loss(scores_by_the_paper(w, x.double(), latent, r, angles), p.double(), causal).item()
    assert loss.item() == pytest.approx(exact(), abs=1e-5)
    draw = random.Random(SEED)
    for n, t in attn.indexer.named_parameters():
        largest = t.grad.abs().max().item()
        for i in {int(t.grad.abs().argmax()), *(draw.randrange(t.numel()) for _ in range(4))}:
            flat, e = w[n].view(-1), 1e-6
            flat[i] += e; up = exact()
            flat[i] -= 2*e; down = exact()
            flat[i] += e
            assert (up - down)/(2*e) == pytest.approx(t.grad.view(-1)[i].item(), abs=2e-3*largest + 1e-7), n


def test_only_the_indexer_learns(pair):
    model, rows = fresh(pair), pair[2]
    before = {k: t.clone() for k, t in model.state_dict().items()}
    losses = warm_up_indexer(model, rows, steps=25, lr=2e-2, batch=5)
    assert len(losses) == 2 and all(len(l) == 25 and l[-1] < l[0] for l in losses)
    for k, t in model.state_dict().items(): assert torch.equal(t, before[k]) == ('indexer' not in k), k
    assert not any(p.requires_grad for p in model.parameters())


def test_zero_weights_of_the_heads_stop_queries_and_keys(pair):
    model, rows = fresh(pair), pair[2]
    attn = model.layers[0].self_attn
    attn.indexer.weights_proj.weight.zero_()
    q = attn.indexer.wq_b.weight.clone()
    (_, x, ctx), _ = dense_streams(model, rows)
    fit_indexer(attn, x, ctx, 1, 1e-2, 2, 0)
    assert torch.equal(attn.indexer.wq_b.weight, q) and attn.indexer.weights_proj.weight.any()


def test_a_run_that_was_interrupted(pair, tmp_path):
    rows, once, again = pair[2], fresh(pair), fresh(pair)
    losses = warm_up_indexer(once, rows, 4, state=tmp_path)
    note = json.loads((tmp_path/'state.json').read_text())
    (tmp_path/'state.json').write_text(json.dumps(note | dict(errors=note['errors'][:1])))
    assert warm_up_indexer(again, rows, 4, state=tmp_path) == losses
    assert all(torch.equal(a, b) for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r'belongs to another conversion \(.*steps.*differ\)'):
        warm_up_indexer(fresh(pair), rows, 5, state=tmp_path)


def test_losses_of_the_second_stage_train_apart(pair):
    model, rows = fresh(pair).requires_grad_(True), pair[2]
    x, divergence = sparse_hidden(model, rows)
    assert worst(x.detach(), model.hidden(rows).detach()) < 1e-3
    for loss, own in ((divergence, True), (x.square().sum(), False)):
        model.zero_grad(); loss.backward(retain_graph=True)
        assert {'indexer' in n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {own}
    total, n = sparse_loss(model, dict(tokens=rows[:, :-1], labels=rows[:, 1:]))
    _, short = sparse_hidden(model, rows[:, :-1])
    alone = selected_loss(model, rows, model.config.index_topk)
    assert n == 5*(LENGTH - 1) and total.item()/n == pytest.approx(alone + short.item(), rel=1e-4)


def test_recall_and_loss_of_selections(pair):
    dense, model, rows = pair
    with torch.no_grad(): logits = dense(rows[:, :-1]).log_softmax(-1)
    plain = -logits.gather(-1, rows[:, 1:, None]).mean().item()
    for kind in KINDS:
        assert selected_loss(model, rows, LENGTH, kind) == pytest.approx(plain, abs=1e-4)
        recall, best = (attention_recall(model, rows, (3, 8, LENGTH - 1), k) for k in (kind, 'best'))
        assert all(0 < x <= y + 1e-6 for r, b in zip(recall, best, strict=True) for x, y in zip(r, b, strict=True))
    assert worst(torch.tensor(selected_loss(model, rows, model.config.index_topk)), torch.tensor(
        -model(rows[:, :-1]).detach().log_softmax(-1).gather(-1, rows[:, 1:, None]).mean().item())) < 1e-3


def test_trained_indexer_of_mini_beats_window_and_random():
    from deepseek_nb.train.mini import documents, set_aside
    from deepseek_nb.train.upcycle import random_rows
    mini, tok = Model.from_pretrained('mini', 'float32', 'cpu').requires_grad_(False), Tokenizer.from_pretrained('mini')
    learn, held = set_aside(documents('sotu', 40), 20)
    rows, test = (random_rows('\n\n'.join(t), tok, n, 192) for t, n in ((learn[-4:], 10), (held[-1:], 3)))
    model = sparsify(mini, 4, 32, 16)
    warm_up_indexer(model, rows, steps=30)
    found = {k: [r for r, in attention_recall(model, test, (16,), k)] for k in KINDS}
    means = {k: sum(r)/len(r) for k, r in found.items()}
    assert means['best'] > means['indexer'] > means['window'] > means['random'], means
    assert means['indexer'] > .9*means['best'], means
    assert all(i > r for i, r in zip(found['indexer'], found['random'], strict=True))


# ---- the study

def made(arm, seed, lost):
    "A made-up run: recall 1 − lost, loss that rises by lost"
    result = dict(shares=[.125, .5], dense=3., recall=[[1 - lost, 1 - lost/2]]*2, losses=[3 + lost, 3 + lost/2], seen=0.)
    return dict(arm=arm, seed=seed, settings={}, result=result)


def test_study_of_synthetic_runs():
    study = open_study('indexer')
    records = [made(a, s, x + .01*s) for a, x in zip(KINDS, (.1, .05, .2, .5), strict=True) for s in range(3)]
    assert study.finding(records[:3]) == 'Not run yet: best, random, window.'
    said = study.finding(records)
    assert '**89.0% ± 1.0% of the attention mass**' in said and f'{sum(math.exp(.1 + .01*s) - 1 for s in range(3))/3:+.1%}' in said
    assert '| indexer | 89.0% ± 1.0% | 94.5% ± 0.5% |' in study.recall_table(records)
    assert 'not been run' in study.rise_table([])

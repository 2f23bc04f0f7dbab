"""The loss of packed rows against one document at a time, and the chunked head against autograd through `F.cross_entropy` in float64

Fresh random inputs; the seed is printed, SEED=n repeats a run.
"""
import os
import random

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_nb import Model
from deepseek_nb.arch.attention import document_mask
from deepseek_nb.core.config import Config
from deepseek_nb.core.dispatch import use
from deepseek_nb.quant import quantize
from deepseek_nb.train.loss import IGNORE, cross_entropy_, language_loss, linear_cross_entropy

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
SIZES = dict(vocab_size=64, dim=32, n_layers=2, n_heads=4, inter_dim=48, max_positions=64)
GQA = Config('llama', **SIZES, n_kv_heads=2, head_dim=8, tie_embeddings=True)
MLA = Config('deepseek_v3', **SIZES, n_dense_layers=1, moe_inter_dim=16, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, score_func='sigmoid', score_bias=True)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_train_loss SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


def close(got, want):
    "To the precision of scores, which the definition of attention takes in float32 whatever the model is"
    assert got.shape == want.shape
    if not want.any():
        assert got.abs().max() < 1e-12  # what is exactly zero may be the rest of terms that cancel
        return
    err = (got - want).abs().max()/want.abs().max()
    assert err < 1e-5, f'{err:.1e} of the largest value'


def some_labels(r, n, w):
    labels = torch.randint(w, (n,))
    labels[torch.rand(n) < r.choice((0., .3, .9))] = IGNORE
    return labels


def gradients(fn, x, w):
    x, w = (t.detach().requires_grad_() for t in (x, w))
    loss = fn(x, w)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


# ---- the chunked head

@pytest.mark.draw(7)
@pytest.mark.parametrize('trial', range(20))
def test_head_equals_cross_entropy(r, trial):
    n, d, w = r.randrange(1, 40), r.randrange(1, 20), r.randrange(1, 50)
    x, weight = torch.randn(n, d, dtype=torch.float64)*r.choice((1, 10)), torch.randn(w, d, dtype=torch.float64)
    labels = some_labels(r, n, w)
    want = gradients(lambda x, w: F.cross_entropy(x@w.T, labels, reduction='sum', ignore_index=IGNORE), x, weight)
    chunk = r.choice((0, 1, 3, n, 100))
    for got, expected in zip(gradients(lambda x, w: linear_cross_entropy(x, w, labels, chunk), x, weight), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    half = gradients(lambda x, w: linear_cross_entropy(x, w, labels, chunk), x.float(), weight.float())
    for got, expected in zip(half, want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_head_gradcheck(r):
    x, w = (torch.randn(n, 5, dtype=torch.float64, requires_grad=True) for n in (6, 7))
    labels = torch.tensor([0, IGNORE, 6, 3, IGNORE, 3])
    for chunk in (0, 1, 4):
        assert gradcheck(lambda x, w, chunk=chunk: linear_cross_entropy(x, w, labels, chunk), (x, w))
        assert gradcheck(lambda x, w, chunk=chunk: linear_cross_entropy(x, w, labels, chunk)**2, (x, w))  # a gradient that isn't one


def test_score_of_extreme_logits():
    logits = torch.tensor([[1e4, 0, -1e4], [-1e4, -1e4, -1e4 + 3]])
    labels = torch.tensor([2, 2])
    want = F.cross_entropy(logits.double(), labels, reduction='sum')
    assert abs(cross_entropy_(logits, labels).double() - want) < 1e-2 and logits.isfinite().all()
    torch.testing.assert_close(logits[0], torch.tensor([1., 0, -1]))


def test_head_without_anything_scored():
    x, w = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.full((4,), IGNORE))
    loss.backward()
    assert loss == 0 and not x.grad.any() and not w.grad.any()


def test_head_computes_only_what_learns(r):
    x, w, labels = torch.randn(9, 5), torch.randn(7, 5), torch.randint(7, (9,))
    for learns in ((True, False), (False, True)):
        a, b = (t.clone().requires_grad_(l) for t, l in zip((x, w), learns, strict=True))
        linear_cross_entropy(a, b, labels, 2).backward()
        assert [t.grad is not None for t in (a, b)] == list(learns)
    assert not linear_cross_entropy(x, w, labels).requires_grad
    with torch.no_grad(): assert not linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), labels).requires_grad


class Tensors(TorchDispatchMode):
    "Remembers the shapes of results"
    def __init__(self): super().__init__(); self.shapes = []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes += [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


def test_head_never_holds_all_logits_nor_a_frozen_gradient():
    x, w, labels = torch.randn(600, 8, requires_grad=True), torch.randn(50, 8), torch.randint(50, (600,))
    labels[::2] = IGNORE
    with Tensors() as seen: linear_cross_entropy(x, w, labels, 100).backward()
    assert max(s[0] for s in seen.shapes if len(s) == 2 and s[1] == 50) == 100
    assert (50, 8) not in seen.shapes and sum(s == (100, 50) for s in seen.shapes) >= 3  # 300 scored of 600
    with Tensors() as seen, torch.no_grad(): linear_cross_entropy(x, w.requires_grad_(), labels, 100)
    assert (600, 8) not in seen.shapes and (50, 8) not in seen.shapes


def test_head_under_autocast():
    x, w, labels = torch.randn(30, 16, requires_grad=True), torch.randn(20, 16, requires_grad=True), torch.randint(20, (30,))
    want = gradients(lambda x, w: F.cross_entropy(x@w.T, labels, reduction='sum'), x, w)
    with torch.autocast('cpu', torch.bfloat16): got = gradients(lambda x, w: linear_cross_entropy(x, w, labels, 7), x, w)
    for g, e in zip(got, want, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).norm() < .02*e.norm() + 1e-6
    halves = gradients(lambda x, w: linear_cross_entropy(x, w, labels, 7), x.bfloat16(), w.bfloat16())
    assert [t.dtype for t in halves] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for g, e in zip(halves, want, strict=True): assert (g.float() - e).norm() < .03*e.norm()


def test_head_of_codes():
    w, x, labels = torch.randn(40, 64), torch.randn(5, 64, requires_grad=True), torch.randint(40, (5,))
    codes = quantize(w, 'int8')
    got = linear_cross_entropy(x, codes, labels)
    got.backward()
    want = gradients(lambda x, w: F.cross_entropy(x@w.T, labels, reduction='sum'), x, codes.dequantize())
    torch.testing.assert_close(got.detach(), want[0])
    torch.testing.assert_close(x.grad, want[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('label', (-1, 6, 1000))
def test_labels_outside_the_classes_are_refused(label):
    labels = torch.tensor([0, label, IGNORE])
    with pytest.raises(ValueError, match=rf'^label {label} is outside the 6 classes; unscored positions have -100'):
        linear_cross_entropy(torch.randn(3, 5), torch.randn(6, 5), labels)


# ---- documents

@pytest.mark.parametrize('config', (GQA, MLA), ids=('gqa', 'mla'))
@pytest.mark.parametrize('which', ('reference', 'auto'))
def test_packed_documents_equal_single_ones(r, config, which):
    model = Model(config, dtype='float64', device='cpu').init_weights(.3)
    lengths = [r.randrange(1, 9) for _ in range(4)]
    tokens = torch.randint(64, (1, sum(lengths)))
    documents = torch.repeat_interleave(torch.tensor([5, 2, 9, 2]), torch.tensor(lengths))[None]  # 2 comes twice, and is one document
    with use(which):
        got = model.hidden(tokens, documents=documents)
        for i in (0, 2):
            at = slice(sum(lengths[:i]), sum(lengths[:i+1]))
            close(got[:, at], model.hidden(tokens[:, at]))
        first, again = (torch.arange(sum(lengths[:i]), sum(lengths[:i+1])) for i in (1, 3))
        last = model.hidden(tokens[:, :sum(lengths)], documents=(documents == 2).long())
        close(got[:, first], last[:, first])
        close(got[:, again], last[:, again])


@pytest.mark.parametrize('config', (GQA, MLA), ids=('gqa', 'mla'))
def test_later_tokens_and_other_documents_get_no_gradient(config):
    model = Model(config, dtype='float64', device='cpu').init_weights(.3)
    tokens, documents = torch.arange(12)[None], torch.tensor([[0]*5 + [1]*7])
    x = model.hidden(tokens, documents=documents)
    g, = torch.autograd.grad(x[0, 8].sum(), model.embed_tokens.weight)
    assert g[:12].any(1).tolist() == [5 <= i <= 8 for i in range(12)]


def test_one_document_a_row_takes_the_causal_path(monkeypatch):
    from deepseek_nb.arch import model as chapter
    model = Model(GQA, dtype='float32', device='cpu').init_weights(.3)
    tokens, masks = torch.randint(64, (2, 6)), []
    run = chapter.run_blocks
    monkeypatch.setattr(chapter, 'run_blocks', lambda x, blocks, ctx: masks.append(ctx.mask) or run(x, blocks, ctx))
    a = model.hidden(tokens)
    b = model.hidden(tokens, documents=torch.tensor([[3]*6, [7]*6]))
    assert masks == [None, None] and torch.equal(a, b)


def test_mask_by_hand(r):
    documents = torch.randint(3, (2, 7))
    mask = document_mask(documents)
    assert mask.shape == (2, 1, 7, 7)
    for b in range(2):
        for s in range(7):
            for t in range(7): assert mask[b, 0, s, t] == (t <= s and documents[b, s] == documents[b, t])


# ---- the model's loss

@pytest.mark.parametrize('config', (GQA, MLA), ids=('tied', 'own head'))
def test_language_loss_and_gradients(r, config):
    model = Model(config, dtype='float64', device='cpu').init_weights(.3)
    tokens = torch.randint(64, (3, 9))
    labels = some_labels(r, 27, 64).view(3, 9)
    total, n = language_loss(model, dict(tokens=tokens, labels=labels))
    params = list(model.parameters())
    got = torch.autograd.grad(total, params)
    with use('reference'):
        logits = F.linear(model.hidden(tokens), model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight)
        want = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='sum', ignore_index=IGNORE)
        expected = torch.autograd.grad(want, params)
    assert n == (labels != IGNORE).sum() and isinstance(n, int)
    close(total, want)
    for g, e in zip(got, expected, strict=True): close(g, e)


def test_sums_of_parts_are_the_whole(r):
    model = Model(GQA, dtype='float64', device='cpu').init_weights(.3)
    batch = dict(tokens=torch.randint(64, (5, 9)), labels=some_labels(r, 45, 64).view(5, 9))
    total, n = language_loss(model, batch)
    parts = [language_loss(model, {k: v[i] for k, v in batch.items()}) for i in (slice(0, 2), slice(2, 5))]
    torch.testing.assert_close(sum(t for t, _ in parts), total)
    assert sum(m for _, m in parts) == n


def test_bad_batches_are_refused():
    model = Model(GQA, dtype='float32', device='cpu').init_weights(.3)
    tokens = torch.randint(64, (2, 6))
    with pytest.raises(ValueError, match=r'^labels have shape \(2, 5\), tokens \(2, 6\)'):
        language_loss(model, dict(tokens=tokens, labels=tokens[:, 1:]))
    with pytest.raises(ValueError, match=r'^documents have shape \(6,\), tokens \(2, 6\)'):
        language_loss(model, dict(tokens=tokens, labels=tokens, documents=tokens[0]))
    with pytest.raises(ValueError, match='longer than max_positions 64'):
        language_loss(model, dict(tokens=torch.zeros(1, 65, dtype=torch.long), labels=torch.zeros(1, 65, dtype=torch.long)))
    with pytest.raises(ValueError, match='label 64 is outside the 64 classes'):
        language_loss(model, dict(tokens=tokens, labels=tokens*0 + 64))

"""Divergences, chunked losses, matching and on-policy distillation against definitions in float64

Fresh random inputs; the seed is printed, SEED=n repeats a run.
"""
import math
import os
import random

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.quant.model import quantize_model
from deepseek_nb.train.callbacks import Callback
from deepseek_nb.train.data import IGNORE, example
from deepseek_nb.train.distill import (
    DIVERGENCES,
    Match,
    attention_distance,
    attention_logs,
    check_tokenizers,
    chunked_loss,
    distillation_loss,
    divergence,
    hidden_distance,
    layer_map,
    residuals,
)
from deepseek_nb.train.loss import language_loss
from deepseek_nb.train.on_policy import Collapsed, CollapseGuard, OnPolicy, measures, prompts_of, sample_answers
from deepseek_nb.train.trainer import Trainer, TrainingArguments

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
SMALL = dict(vocab_size=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=8, max_positions=64)
MLA = dict(vocab_size=64, dim=40, n_layers=4, n_heads=2, inter_dim=48, kv_lora_rank=16, q_lora_rank=24, qk_nope_head_dim=8,
           qk_rope_head_dim=4, v_head_dim=8, rope=Rope(interleaved=True), n_dense_layers=1, n_routed_experts=4, n_shared_experts=1,
           n_activated_experts=2, moe_inter_dim=24, score_func='sigmoid', score_bias=True, norm_topk=True, max_positions=64)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_distill SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


def model_of(*args, **kw): return Model(Config(*args, **kw), dtype='float32', device='cpu').init_weights(.2)
def llama(dim=32, **kw): return model_of('llama', dim=dim, inter_dim=48, **SMALL | kw)
def deepseek(): return model_of('deepseek_v3', **MLA)


def batch_of(r, rows=3, s=11, masked=True, documents=False):
    batch = dict(tokens=torch.randint(64, (rows, s)), labels=torch.randint(64, (rows, s)))
    if masked: batch['labels'][torch.rand(rows, s) < .3] = IGNORE
    if documents: batch['documents'] = (torch.rand(rows, s) < .2).long().cumsum(1)
    return batch


def by_definition(zs, zt, kind, share=None, T=1.):
    "From probabilities, in float64, term by term as the papers write them"
    q, p = ((z.double()/T).softmax(-1) for z in (zs, zt))
    def kl(a, b): return (a*(a/b).log()).sum(-1)
    share = DIVERGENCES[kind] if share is None else share
    if kind == 'forward': return kl(p, q)
    if kind == 'reverse': return kl(q, p)
    if kind == 'skew': return kl(p, share*p + (1-share)*q)
    if kind == 'skew_reverse': return kl(q, (1-share)*p + share*q)
    m = share*p + (1-share)*q
    return share*kl(p, m) + (1-share)*kl(q, m)


@pytest.mark.parametrize('kind', DIVERGENCES)
def test_divergence_is_its_definition(kind, r):
    for _ in range(5):
        shape = [r.randrange(1, 5) for _ in range(r.randrange(1, 3))] + [r.randrange(2, 40)]
        T, share = r.uniform(.3, 5), None if DIVERGENCES[kind] is None else r.uniform(.05, .95)
        zs, zt = 2*torch.randn(2, *shape, dtype=torch.float64)
        got = divergence(zs, zt, kind, share, T)
        torch.testing.assert_close(got, by_definition(zs, zt, kind, share, T), rtol=1e-9, atol=1e-12)
        assert (got >= -1e-12).all() and divergence(zs, zs + 3, kind, share, T).abs().max() < 1e-12
        torch.testing.assert_close(divergence(zs.float(), zt.float(), kind, share, T).double(), got, rtol=1e-4, atol=1e-5)
        assert gradcheck(lambda z, zt=zt, share=share, T=T: divergence(z, zt, kind, share, T), zs.clone().requires_grad_())


def test_divergence_against_pytorch(r):
    zs, zt = torch.randn(2, 6, 30, dtype=torch.float64)
    torch.testing.assert_close(divergence(zs, zt).sum(), F.kl_div(zs.log_softmax(-1), zt.log_softmax(-1), reduction='sum', log_target=True))
    torch.testing.assert_close(divergence(zs, zt, 'js'), divergence(zt, zs, 'js'))  # symmetric at one half
    assert divergence(100*zs, 100*zt, 'js').max() <= math.log(2) + 1e-12  # and bounded


@pytest.mark.parametrize('kind,end', [('skew', 'forward'), ('skew_reverse', 'reverse')])
def test_skew_ends_in_plain_kl(kind, end):
    zs, zt = torch.randn(2, 6, 30, dtype=torch.float64)
    torch.testing.assert_close(divergence(zs, zt, kind, 1e-9), divergence(zs, zt, end), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('kind', DIVERGENCES)
def test_extreme_logits_stay_finite(kind):
    zs = (torch.randn(4, 50)*1e4).requires_grad_()
    d = divergence(zs, torch.randn(4, 50)*1e4, kind)
    d.sum().backward()
    assert d.isfinite().all() and zs.grad.isfinite().all()


@pytest.mark.parametrize('kind', DIVERGENCES)
def test_high_temperature_compares_logits(kind):
    zs, zt = torch.randn(2, 5, 20, dtype=torch.float64)
    a = {'forward': 1, 'reverse': 1, 'skew': .9**2, 'skew_reverse': .9**2, 'js': .25}[kind]  # curvature of the kind at p = q
    z = zs.clone().requires_grad_()
    grad, = torch.autograd.grad(1e10*divergence(z, zt, kind, temperature=1e5).sum(), z)
    difference = zs - zt
    torch.testing.assert_close(grad, a*(difference - difference.mean(-1, keepdim=True))/20, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize('learns', [(True, True), (True, False), (False, True), (False, False)])
def test_chunks_change_nothing(learns, r):
    n, d, w = r.randrange(1, 20), r.randrange(1, 8), r.randrange(2, 30)
    x, head, zt = torch.randn(n, d).double(), torch.randn(w, d).double(), torch.randn(n, w).double()
    leaves = [t.requires_grad_(o) for t, o in zip((x, head), learns, strict=True)]
    whole = divergence(x@head.T, zt, 'js').sum()
    for chunk in (1, r.randrange(1, n+1), n, n+5, 0):
        total = chunked_loss(x, head, lambda z, at: divergence(z, zt[at], 'js').sum(), chunk)
        torch.testing.assert_close(total, whole)
        assert total.requires_grad == any(learns)
        wanted = [t for t in leaves if t.requires_grad]
        if not wanted: continue
        for g, e in zip(torch.autograd.grad(total*3, wanted), torch.autograd.grad(whole*3, wanted, retain_graph=True), strict=True):
            torch.testing.assert_close(g, e)


def test_halves_are_summed_in_float32(r):
    x, w, zt = torch.randn(40, 16), torch.randn(99, 16), torch.randn(40, 99)
    half = [t.bfloat16().requires_grad_() for t in (x, w)]
    exact = [t.detach().double().requires_grad_() for t in half]
    total = chunked_loss(*half, lambda z, at: divergence(z, zt[at]).sum(), 7)
    whole = divergence(exact[0]@exact[1].T, zt.double()).sum()
    assert total.dtype == torch.float32
    assert abs(total.item()/whole.item() - 1) < 2e-2
    for g, e in zip(torch.autograd.grad(total, half), torch.autograd.grad(whole, exact), strict=True):
        assert g.dtype == torch.bfloat16 and (g.double() - e).norm() < 2e-2*e.norm()


class Largest(TorchDispatchMode):
    numel = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        return out


def test_logits_are_never_all_in_memory(r):
    teacher, student = llama(40, vocab_size=500), llama(vocab_size=500)
    batch = batch_of(r, 8, 32, masked=False)
    with Largest() as seen:
        total, n = distillation_loss(teacher, 'js', mix=.2, chunk=16)(student, batch)
        total.backward()
    assert n == 256 and seen.numel < 256*500/4


def definition_loss(teacher, student, batch, kind, T, mix, share=None):
    zs, zt = (m.hidden(batch['tokens'], documents=batch.get('documents'))@m.head_weight.T for m in (student, teacher))
    seen = batch['labels'] != IGNORE
    ce = F.cross_entropy(zs[seen], batch['labels'][seen], reduction='sum')
    return (1-mix)*T**2*divergence(zs[seen], zt[seen].detach(), kind, share, T).sum() + mix*ce


@pytest.mark.parametrize('kind', DIVERGENCES)
@pytest.mark.parametrize('tied', [False, True])
def test_loss_and_gradients_of_a_model(kind, tied, r):
    teacher, student = deepseek(), llama(tie_embeddings=tied)
    batch, T, mix = batch_of(r, documents=True), r.uniform(.5, 3), r.choice([0., r.uniform(.1, .9)])
    total, n = distillation_loss(teacher, kind, T, mix, chunk=5)(student, batch)
    assert n == (batch['labels'] != IGNORE).sum()
    expected = definition_loss(teacher, student, batch, kind, T, mix)
    assert abs(total.item() - expected.item()) < 1e-4*max(1, abs(expected.item()))
    got, want = (torch.autograd.grad(t, list(student.parameters())) for t in (total, expected))
    for g, e in zip(got, want, strict=True): assert (g - e).norm() <= 1e-4*e.norm() + 1e-5
    assert all(p.grad is None for p in teacher.parameters())


def test_masked_positions_and_padding_change_nothing(r):
    teacher, student = llama(40), llama()
    batch = batch_of(r)
    loss = distillation_loss(teacher)
    total, n = loss(student, batch)
    longer = {k: torch.cat([v, torch.full((3, 4), IGNORE if k == 'labels' else 5)], 1) for k, v in batch.items()}
    other, m = loss(student, longer)
    assert n == m and abs(total.item() - other.item()) < 1e-4
    nothing, none = loss(student, batch | dict(labels=torch.full((3, 11), IGNORE)))
    nothing.backward()
    assert none == 0 and nothing == 0 and all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_quantised_teacher_and_head(r):
    teacher, student, batch = llama(64), llama(), batch_of(r)
    want = distillation_loss(teacher)(student, batch)[0]
    packed = llama(64)
    packed.load_state_dict(teacher.state_dict())
    packed = quantize_model(packed, 'int8')
    got = distillation_loss(packed)(student, batch)[0]
    assert got.requires_grad and abs(got.item()/want.item() - 1) < .05
    total, n = distillation_loss(teacher)(packed, batch)  # a quantised student has nothing to learn, but a loss
    assert total > 0 and n and not total.requires_grad


@pytest.mark.parametrize('bad,why', [
    (dict(kind='kl'), "kind 'kl' is not known"), (dict(temperature=-1.), 'temperature is -1.0; it must be above 0'),
    (dict(temperature=math.nan), 'temperature is nan'), (dict(mix=-.1), 'mix is -0.1'),
    (dict(kind='js', share=0.), 'share 0.0 must be between'),
    (dict(kind='reverse', share=.5), "kind 'reverse' has no share")])
def test_bad_settings(bad, why):
    with pytest.raises(ValueError, match=why): distillation_loss(llama(), **bad)


def test_other_vocabularies(r):
    teacher, student, batch = llama(vocab_size=72), llama(), batch_of(r)
    with pytest.raises(ValueError, match="the teacher has 72 tokens, the student 64; their distributions can't be compared"):
        distillation_loss(teacher)(student, batch)
    total, _ = distillation_loss(teacher, vocabulary=60, mix=.5, chunk=4)(student, batch)
    seen = batch['labels'] != IGNORE
    zs, zt = student(batch['tokens'])[seen], teacher(batch['tokens'])[seen]
    expected = .5*divergence(zs[:, :60], zt[:, :60]).sum() + .5*F.cross_entropy(zs, batch['labels'][seen], reduction='sum')
    assert abs(total.item() - expected.item()) < 1e-3
    tok = Tokenizer.from_pretrained('smollm2-135m')
    check_tokenizers(tok, tok)

    class Shifted:
        def encode(self, text): return [i + (i > 300) for i in tok.encode(text)]
    with pytest.raises(ValueError, match='the tokenizers differ: token'): check_tokenizers(tok, Shifted())


def test_layer_maps(r):
    for _ in range(50):
        n = r.randrange(1, 40)
        m = r.randrange(n, 80)
        pairs = layer_map(n, m)
        assert [i for i, _ in pairs] == list(range(1, n+1)) and pairs[-1] == (n, m)
        assert all(1 <= a < b for (_, a), (_, b) in zip(pairs, pairs[1:], strict=False))


@pytest.mark.parametrize('documents', [False, True])
def test_matching_against_its_definition(documents, r):
    teacher, student, batch = deepseek(), llama(), batch_of(r, documents=documents)
    match = Match(student, teacher, hidden=.7, attention=.3, pairs=[(1, 2), (3, 4)])
    total, n = distillation_loss(teacher, match=match)(student, batch)
    with residuals(student, range(4)) as s: student.hidden(batch['tokens'], documents=batch.get('documents'))
    with residuals(teacher, range(5)) as t: teacher.hidden(batch['tokens'], documents=batch.get('documents'))
    seen, expected = batch['labels'] != IGNORE, definition_loss(teacher, student, batch, 'forward', 1., 0.)
    for (i, j), p in zip(match.pairs, match.projectors, strict=True):
        hidden = ((s[i]@p.weight.T - t[j])**2).sum(-1)/(t[j]**2).sum(-1)
        a, b = (attention_logs(m, k, x[k-1], batch.get('documents')).exp().mean(1) for m, k, x in ((student, i, s), (teacher, j, t)))
        expected = expected + ((.7*hidden + .3*torch.where(b > 0, b*(b/a.clamp(min=1e-30)).log(), 0.).sum(-1))/2)[seen].sum()
    assert abs(total.item() - expected.item()) < 1e-3*abs(expected.item())
    grads = torch.autograd.grad(total, [*match.parameters(), student.layers[0].self_attn.q_proj.weight])
    assert all(g.isfinite().all() and g.any() for g in grads)


def test_distances_are_zero_for_equals(r):
    model, batch = deepseek(), batch_of(r, documents=True)
    with residuals(model, range(5)) as s: model.hidden(batch['tokens'], documents=batch.get('documents'))
    logs = attention_logs(model, 2, s[1], batch['documents'])
    assert attention_distance(logs, logs).abs().max() == 0 and hidden_distance(s[1], s[1]).max() == 0
    shares = logs.exp()
    torch.testing.assert_close(shares.sum(-1), torch.ones(shares.shape[:3]))
    other = batch['documents'][:, None, :, None] != batch['documents'][:, None, None, :]
    assert shares.masked_select(other.expand_as(shares)).abs().sum() == 0


# ---- on-policy

def counting(rows, r, s=12):
    first, stride = torch.randint(63, (rows, 1)), torch.randint(1, 5, (rows, 1))
    return [example(t) for t in ((first + stride*torch.arange(s))%63).tolist()]


def test_prompts_and_writing(r):
    model = llama()
    prompts = [torch.randint(64, (r.randrange(1, 9),)).tolist() for _ in range(5)]
    answers, ended = sample_answers(model, prompts, 7, temperature=0., eos_token_id=[9])
    for p, a, e in zip(prompts, answers, ended, strict=True):
        alone = model.generate(torch.tensor([p]), 7, eos_token_id=[9])[0, len(p):].tolist()
        assert a == alone[:len(a)] and e == (a[-1] == 9) and (e or len(a) == 7)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.05)  # an update in place: nothing stale may be kept
    for p, a in zip(prompts, sample_answers(model, prompts, 5, temperature=0., eos_token_id=[])[0], strict=True):
        for _ in range(5):
            with use('reference'): p = [*p, model(torch.tensor([p]))[0, -1].argmax().item()]
        assert p[-5:] == a


def test_only_rows_with_a_question_are_prompts():
    batch = dict(tokens=torch.arange(8).view(2, 4), labels=torch.tensor([[IGNORE]*4, [IGNORE, 5, 6, IGNORE]]))
    assert prompts_of(batch) == [[4, 5]]


def test_measures_by_hand():
    m = measures([[1, 2, 3, 1, 2, 3, 1, 2, 3]], [False], 1.)
    assert m['repetition'] == 3/6 and m['variety'] == 3/8 and m['length'] == 9
    assert measures([[1], [2, 3]], [True, True], 0.)['repetition'] == 0


@pytest.mark.parametrize('own', [0., 1.])
def test_own_share(own, r):
    teacher, student, data = llama(40), llama(), counting(8, r)
    seen = []
    loss = OnPolicy(lambda m, b: seen.append(b) or language_loss(m, b), own, max_new_tokens=3, prompt_length=2)
    batch = dict(tokens=torch.tensor([e['tokens'] for e in data]), labels=torch.tensor([e['labels'] for e in data]))
    loss(student, batch)
    assert (loss.measured is None) == (own == 0)
    assert (seen[0]['tokens'].shape[1] == 5) == (own == 1)
    assert (seen[0]['tokens'][:, :2] == batch['tokens'][:, :2]).all()
    with torch.no_grad(): loss(student, batch)
    assert seen[1] is batch and teacher is not student


def test_resumed_on_policy_run_is_the_same(tmp_path, r):
    data, teacher, seed = counting(20, r), llama(40).requires_grad_(False), r.randrange(10**6)

    class Stop(Callback):
        def before_update(self, t):
            if t.step == 5: raise KeyboardInterrupt

    def trainer(out=None, *more):
        torch.manual_seed(seed)
        loss = OnPolicy(distillation_loss(teacher, 'js'), .5, max_new_tokens=4, prompt_length=2)
        args = TrainingArguments(max_steps=8, learning_rate=1e-3, per_device_train_batch_size=4, output_dir=out, save_steps=2)
        return Trainer(llama(), args, data, loss=loss, callbacks=[CollapseGuard(loss, least=0.), *more])
    straight = trainer()
    history = straight.train()
    with pytest.raises(KeyboardInterrupt): trainer(tmp_path/'a', Stop()).train()
    again = trainer(tmp_path/'a')
    assert [x['loss'] for x in again.train(resume_from_checkpoint=True)] == [x['loss'] for x in history]
    assert all((p == q).all() for p, q in zip(straight.model.parameters(), again.model.parameters(), strict=True))


def test_collapse_stops_with_the_last_good_weights(r):
    data, student = counting(40, r), llama()
    loss = OnPolicy(language_loss, max_new_tokens=12, prompt_length=1)

    class Babble(Callback):
        order = -20
        def before_step(self, t):
            if t.step == 6: self.weights = [p.detach().clone() for p in t.params]
            if t.step == 7:  # from here on one token is all that it says
                with torch.no_grad(): t.model.norm.weight.zero_(); t.model.lm_head.weight[7] += 1; t.model.norm.weight.fill_(9.)
    usual = dict(entropy=4., length=12., ended=0., repetition=0., variety=.9)
    babble, guard = Babble(), CollapseGuard(loss, usual, patience=2, every=1)
    args = TrainingArguments(max_steps=20, learning_rate=1e-4, per_device_train_batch_size=8)
    trainer = Trainer(student, args, data, loss=loss, callbacks=[babble, guard])
    with pytest.raises(Collapsed, match='step 9: the student collapses .*weights are those after step 6'): trainer.train()
    assert all((p == q).all() for p, q in zip(trainer.params, babble.weights, strict=True))
    assert [bool(guard.faults(row)) for row in trainer.history] == [False]*7 + [True]

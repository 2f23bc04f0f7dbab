"The Trainer against loops written by hand."
import math
from dataclasses import replace

import datasets
import pytest
import torch
import torch.nn.functional as F
import warm
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.train.callbacks import EVENTS, Callback, CancelFit, CancelStep, Diverged, Guard, LivePlot, Progress
from deepseek_nb.train.data import IGNORE, Batches, collate
from deepseek_nb.train.loss import language_loss
from deepseek_nb.train.optim import Muon, muon_groups, param_groups
from deepseek_nb.train.schedule import get_linear_schedule_with_warmup
from deepseek_nb.train.trainer import (
    Trainer,
    TrainingArguments,
    checkpointed,
    compute_dtype,
    master_weights,
    scale_gradients,
)

SIZES = dict(vocab_size=64, dim=16, n_layers=2, n_heads=2, inter_dim=24, max_positions=32)
DENSE = Config('llama', **SIZES, n_kv_heads=1, head_dim=8)
MOE = Config('deepseek_v3', **SIZES, n_dense_layers=1, moe_inter_dim=8, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, score_func='sigmoid', score_bias=True, norm_topk=True,
             rope=Rope(interleaved=True))


def fresh(c=DENSE, seed=0, **kwargs):
    torch.manual_seed(seed)
    return Model(c, **dict(dtype='float32', device='cpu') | kwargs).init_weights(.1)


def rows(n=24, s=12, uneven=True):
    "Rows that walk through the vocabulary, of unequal length and with a part that isn't scored."
    g = torch.Generator().manual_seed(7)
    walk = (torch.randint(1, 4, (n, s+1), generator=g).cumsum(1)*7)%64
    out = [dict(tokens=w[:-1].clone(), labels=w[1:].clone()) for w in walk]
    if not uneven: return out
    for i,r in enumerate(out): r['labels'][:i%s] = -100
    return [{k: v[:s - i%5] for k,v in r.items()} for i,r in enumerate(out)]


def args(**kwargs):
    return TrainingArguments(**dict(max_steps=6, learning_rate=.01, per_device_train_batch_size=4, disable_tqdm=True) | kwargs)


def weights(model): return torch.cat([p.detach().flatten() for p in model.parameters()])


# ---- the same as by hand

@pytest.mark.parametrize('optim', ['adamw', 'muon'])
@pytest.mark.parametrize('c', [DENSE, MOE])
def test_equals_a_loop_by_hand(c, optim):
    hand, ours = fresh(c), fresh(c)
    data = iter(Batches(rows(), 4, seed=3))
    opt = (Muon(muon_groups(hand, .1), lr=.01) if optim == 'muon' else
           torch.optim.AdamW(param_groups(hand, .1), lr=.01, betas=(.8, .9), eps=1e-7))
    schedule, losses, norms = get_linear_schedule_with_warmup(opt, 2, 6), [], []
    for _ in range(6):
        total, n = language_loss(hand, next(data))
        (total/n).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(hand.parameters(), .5).item())
        opt.step(); schedule.step(); opt.zero_grad()
        losses.append((total/n).item())
    a = args(seed=3, warmup_steps=2, max_grad_norm=.5, weight_decay=.1, adam_beta1=.8, adam_beta2=.9, adam_epsilon=1e-7, optim=optim)
    history = Trainer(ours, a, rows()).train()
    torch.testing.assert_close([r['loss'] for r in history], losses, rtol=1e-5, atol=0)
    torch.testing.assert_close([r['grad_norm'] for r in history], norms, rtol=1e-4, atol=0)
    torch.testing.assert_close(weights(ours), weights(hand), rtol=0, atol=2e-5)
    assert max(norms) > .5
    assert [r['learning_rate'] for r in history] == pytest.approx([0, .005, .01, .0075, .005, .0025])


def test_costs_no_more_than_by_hand():
    "PyTorch's operations of a step, counted: a few scalars more than the shortest loop, whatever the model's size."
    class Count(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.n += 1
            return func(*args, **(kwargs or {}))
    def by_hand(c, steps):
        model, data = fresh(c), iter(Batches(rows(uneven=False), 4, seed=42))
        opt = torch.optim.AdamW(param_groups(model, 0.), lr=.01, fused=True)
        with Count() as count:
            for _ in range(steps):
                total, n = language_loss(model, next(data))
                (total/n).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
                opt.step(); opt.zero_grad(); (total/n).item()
        return count.n
    def ours(c, steps):
        with Count() as count: Trainer(fresh(c), args(max_steps=steps), rows(uneven=False), callbacks=[Guard(every=0)]).train()
        return count.n
    for c in (DENSE, replace(DENSE, n_layers=6)):
        step = {f.__name__: f(c, 6) - f(c, 5) for f in (by_hand, ours)}
        assert step['ours'] <= step['by_hand'] + 12, step


@pytest.mark.parametrize('c, atol', [(DENSE, 1e-14), (MOE, 1e-10)])
def test_accumulation_is_exact(c, atol):
    "Batches with any number of scored tokens: four of 2 are one of 8, in float64 (a router runs in float32), under SGD."
    got = {}
    for size,steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        model = fresh(c, dtype='float64')
        a = args(per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=3, max_grad_norm=.1)
        sgd = torch.optim.SGD(model.parameters(), lr=.1)
        history = Trainer(model, a, rows(), optimizers=(sgd, None)).train()
        got[size] = weights(model), [r['loss'] for r in history], [r['tokens'] for r in history]
    for size in (4, 2, 1):
        torch.testing.assert_close(got[size][0], got[8][0], rtol=0, atol=atol)
        torch.testing.assert_close(got[size][1], got[8][1], rtol=max(atol, 1e-13), atol=0)
        assert got[size][2] == got[8][2]


def test_evaluation_does_not_depend_on_the_batch():
    values = [Trainer(fresh(dtype='float64'), args(per_device_eval_batch_size=n), rows(), rows()).evaluate() for n in (1, 5, 24)]
    total, n = language_loss(fresh(dtype='float64'), next(Batches(rows(), 24, shuffle=False).rest()))
    assert values == pytest.approx([(total/n).item()]*3, rel=1e-12)


def test_evaluation_leaves_the_run_alone():
    runs = [Trainer(fresh(), args(eval_steps=steps), rows(), eval_dataset=data) for steps,data in ((2, rows()), (0, None))]
    histories = [t.train() for t in runs]
    assert [r['loss'] for r in histories[0]] == [r['loss'] for r in histories[1]]
    assert histories[0].series('eval_loss')[0] == [2, 4, 6]


@pytest.mark.parametrize('c', [DENSE, MOE])
def test_activation_checkpointing_changes_nothing(c):
    a, b = (Trainer(fresh(c), args(gradient_checkpointing=o), rows()) for o in (False, True))
    assert [r['loss'] for r in a.train()] == [r['loss'] for r in b.train()]
    assert torch.equal(weights(a.model), weights(b.model))
    assert all('forward' not in block.__dict__ for block in b.model.layers)


def test_activation_checkpointing_keeps_less():
    "Bytes that the graph keeps for the way back."
    batch = next(Batches(rows(uneven=False), 8).rest())
    def kept(model):
        seen = {}
        def pack(t): seen[t.data_ptr()] = t.nbytes; return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): language_loss(model, batch)
        return sum(seen.values())
    model = fresh(replace(DENSE, n_layers=8))
    before = kept(model)
    with checkpointed(model): after = kept(model)
    assert after < before/3


def test_workers_prepare_the_same_batches():
    a, b = (Trainer(fresh(), args(dataloader_num_workers=n, max_steps=3), rows()).train() for n in (0, 1))
    assert [r['loss'] for r in a] == [r['loss'] for r in b]


# ---- precision

def test_half_weights_are_trained_in_float32():
    model = fresh(MOE, dtype='bfloat16')
    trainer = Trainer(model, args(learning_rate=1e-5, max_steps=3), rows())
    assert trainer.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.float32}
    before = weights(model)
    history = trainer.train()
    moved = (weights(model) - before).abs()
    assert 0 < moved.max() < 1e-4 and (moved > 0).float().mean() > .8
    full = Trainer(fresh(MOE, dtype='bfloat16').float(), args(learning_rate=1e-5, max_steps=3), rows()).train()
    assert [r['loss'] for r in history] == pytest.approx([r['loss'] for r in full], abs=.03)


@pytest.mark.parametrize('has,want', [('amx_bf16', torch.bfloat16), ('avx512_bf16', torch.bfloat16), ('avx512_f', None)])
def test_bf16_asks_the_processor(monkeypatch, has, want):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: {has: True, 'avx2': True})
    if want: assert compute_dtype(fresh(), args(bf16=True)) == want
    else:
        with pytest.warns(UserWarning, match='no bfloat16 products worth using'):
            assert compute_dtype(fresh(), args(bf16=True)) is None
    assert compute_dtype(fresh(dtype='bfloat16'), args(bf16=False)) is None
    assert compute_dtype(fresh(), args(fp16=True)) == torch.float16


def test_float16_skips_an_update_that_overflows():
    class Overflow(Callback):
        def after_backward(self, t):
            if t.step == 2: t.params[0].grad[0] = math.inf
        def before_update(self, t): self.before = weights(t.model)
        def after_update(self, t):
            if t.step == 2: self.same = torch.equal(self.before, weights(t.model))
    look = Overflow()
    trainer = Trainer(fresh(), args(fp16=True, lr_scheduler_type='linear'), rows(), callbacks=[look])
    history = trainer.train()
    assert look.same and trainer.scaler.get_scale() == 2.**9
    assert history[3]['learning_rate'] == history[2]['learning_rate'] > history[4]['learning_rate']
    assert history[-1]['loss'] < history[0]['loss']


def test_scale_gradients():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in ((3, 4), (5,), (2, 2, 2), (2,))]
    grads = [torch.randn_like(p) for p in params[:-1]]
    for n,limit in ((1, 1.), (7, .1), (7, 100.), (3, 0)):
        for p,g in zip(params, grads, strict=False): p.grad = g.clone()
        norm = scale_gradients(params, n, limit)
        want = torch.cat([g.flatten() for g in grads])/n
        assert norm.item() == pytest.approx(want.norm().item(), rel=1e-12)
        if limit and want.norm() > limit: want *= limit/(want.norm() + 1e-6)
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in params[:-1]]), want, rtol=1e-12, atol=0)
    assert params[-1].grad is None


# ---- callbacks

def test_events_in_order():
    seen = []
    class See(Callback):
        def __init__(self, order): self.order = order
    for e in EVENTS: setattr(See, e, lambda self, t, e=e: seen.append((e, self.order)))
    a = args(max_steps=1, gradient_accumulation_steps=2)
    Trainer(fresh(), a, rows(), rows(), callbacks=[See(2), See(1)]).train()
    batch = ['before_loss', 'after_loss']
    want = ['before_fit', 'before_step', *batch, *batch, 'after_backward', 'before_update', 'after_update', 'after_eval', 'after_step',
            'after_fit', 'cleanup']
    assert seen == [(e, o) for e in want for o in (1, 2)]
    assert set(want) == set(EVENTS)


@pytest.mark.parametrize('event', ['before_step', 'after_loss', 'after_backward', 'before_update'])
def test_a_cancelled_step_changes_no_weights(event):
    class Cancel(Callback): pass
    def cancel(self, t):
        if t.step == 1: self.before = weights(t.model); raise CancelStep
    setattr(Cancel, event, cancel)
    class Check(Callback):
        def after_step(self, t):
            if t.step == 2: self.after = weights(t.model); assert all(p.grad is None for p in t.params)
    c, check = Cancel(), Check()
    history = Trainer(fresh(), args(), rows(), callbacks=[c, check]).train()
    assert torch.equal(c.before, check.after) and len(history) == 6


def test_a_cancelled_run_finishes():
    class Early(Callback):
        done = False
        def after_step(self, t):
            if t.step == 3: raise CancelFit
        def after_fit(self, t): self.done = True
    early = Early()
    assert len(Trainer(fresh(), args(), rows(), callbacks=[early]).train()) == 3 and early.done


def test_cleanup_after_a_failure():
    class Fail(Callback):
        clean = finished = False
        def before_loss(self, t): raise RuntimeError('no')
        def after_fit(self, t): self.finished = True
        def cleanup(self, t): self.clean = True
    fail, model = Fail(), fresh().eval()
    with pytest.raises(RuntimeError): Trainer(model, args(gradient_checkpointing=True), rows(), callbacks=[fail]).train()
    assert fail.clean and not fail.finished and not model.training and 'forward' not in model.layers[0].__dict__


def test_own_callbacks_replace_standard_ones():
    guard = Guard(every=7)
    trainer = Trainer(fresh(), args(), rows(), callbacks=[guard])
    assert [c for c in trainer.callbacks if isinstance(c, Guard)] == [guard]


def test_progress(capsys, monkeypatch):
    Trainer(fresh(), args(disable_tqdm=False), rows()).train()
    assert '6/6' in (err := capsys.readouterr().err) and 'loss=' in err
    Trainer(fresh(), args(disable_tqdm=None), rows()).train()
    assert capsys.readouterr().err == ''


def test_live_plot_updates_one_picture(monkeypatch):
    pytest.importorskip('IPython')
    shown = []
    class Screen:
        def update(self, fig): shown.append('update')
    monkeypatch.setattr('IPython.display.display', lambda fig, display_id: shown.append('first') or Screen())
    Trainer(fresh(), args(logging_steps=2), rows(), callbacks=[LivePlot()]).train()
    assert shown == ['first', 'update', 'update']


# ---- divergence

@pytest.mark.parametrize('what', [math.nan, math.inf])
def test_no_number_stops_the_run(what):
    class Poison(Callback):
        def after_loss(self, t):
            if t.step == 4: t.part = t.part[0]*what, t.part[1]
            if t.step == 3: self.kept = weights(t.model)
    poison = Poison()
    trainer = Trainer(fresh(), args(), rows(), callbacks=[poison, Guard(every=3)])
    said = 'step 5: loss (nan|inf), gradient norm (nan|inf).*weights are those after step 3'
    with pytest.raises(Diverged, match=said) as e: trainer.train()
    assert '\n' not in str(e.value) and torch.equal(weights(trainer.model), poison.kept) and len(trainer.history) == 4


def test_an_infinite_gradient_stops_the_run():
    class Poison(Callback):
        def after_backward(self, t):
            if t.step == 4: t.params[0].grad[0] = math.inf
    with pytest.raises(Diverged, match='step 5: loss .*, gradient norm inf'): Trainer(fresh(), args(), rows(), callbacks=[Poison()]).train()


def test_a_leap_stops_the_run_after_some_patience():
    class Leap(Callback):
        def __init__(self, steps): self.steps = steps
        def after_loss(self, t):
            if t.step in self.steps: t.part = t.part[0]*5, t.part[1]
    Trainer(fresh(), args(max_steps=20), rows(), callbacks=[Leap({8, 10, 11, 15})]).train()
    with pytest.raises(Diverged, match='step 11: loss'): Trainer(fresh(), args(max_steps=20), rows(), callbacks=[Leap({8, 9, 10})]).train()


def test_buffers_go_back_too():
    class Poison(Callback):
        def after_loss(self, t):
            if t.step == 2: t.model.layers[1].mlp.gate.e_score_correction_bias += 1; t.part = t.part[0]*math.nan, t.part[1]
    trainer = Trainer(fresh(MOE), args(), rows(), callbacks=[Poison()])
    with pytest.raises(Diverged): trainer.train()
    assert not trainer.model.layers[1].mlp.gate.e_score_correction_bias.any()


# ---- adapters, other models, other data

def test_lora_config_is_a_hook():
    class Config:
        def apply(self, model):
            model.requires_grad_(False)
            model.norm.requires_grad_()
            return model
    model = fresh()
    before = weights(model)
    settings = TrainingArguments(per_device_train_batch_size=8, learning_rate=.01, num_train_epochs=2)
    trainer = Trainer(model, args=settings, train_dataset=rows(), lora_config=Config())
    assert [p.shape for p in trainer.params] == [(16,)]
    assert len(trainer.train()) == 6
    assert (weights(model) != before).sum() == 16


def test_any_module_and_any_loss():
    torch.manual_seed(0)
    x, w = torch.randn(32, 3), torch.tensor([1., -2., 3.])
    class Data:
        def rest(self): yield dict(x=x, y=x@w)
        def __iter__(self):
            while True: yield from self.rest()
        def state_dict(self): return {}
    def squares(model, batch): return F.mse_loss(model(batch['x'])[:, 0], batch['y'], reduction='sum'), len(batch['x'])
    model = torch.nn.Linear(3, 1)
    Trainer(model, args(max_steps=300, learning_rate=.1), Data(), loss=squares).train()
    torch.testing.assert_close(model.weight[0], w, rtol=0, atol=.01)


def test_grad_mode_of_the_caller_does_not_matter():
    with torch.no_grad(): history = Trainer(fresh(), args(), rows()).train()
    assert history[-1]['loss'] < history[0]['loss']


def test_a_step_without_scored_tokens_changes_nothing():
    blank = [dict(tokens=r['tokens'], labels=torch.full_like(r['labels'], -100)) for r in rows()]
    model = fresh()
    before = weights(model)
    history = Trainer(model, args(weight_decay=.1), blank).train()
    assert torch.equal(weights(model), before) and {r['tokens'] for r in history} == {0}


@pytest.mark.parametrize('wrong, said', [
    (dict(optim='sgd'), "optim 'sgd' is not known"), (dict(lr_scheduler_type='up'), "lr_scheduler_type 'up' is not known"),
    (dict(learning_rate=-1), 'learning_rate is -1'), (dict(gradient_accumulation_steps=0), 'gradient_accumulation_steps is 0'),
    (dict(warmup_ratio=2), 'warmup_ratio is 2'), (dict(save_total_limit=0), 'save_total_limit is 0'),
    (dict(bf16=True, fp16=True), 'choose one')])
def test_bad_settings(wrong, said):
    with pytest.raises(ValueError, match=said) as e: args(**wrong)
    assert '\n' not in str(e.value)


def test_bad_data():
    for data,said in (([], 'the data set is empty'), (None, 'Trainer has no data'), (rows(s=40), 'more than the context of 32')):
        with pytest.raises(ValueError, match=said) as e: Trainer(fresh(), args(), data).train()
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='all of its parameters are frozen'): Trainer(fresh().requires_grad_(False), args(), rows())
    with pytest.raises(ValueError, match='has no `layers` to act on'):
        with checkpointed(torch.nn.Linear(2, 2)): pass
    assert any(isinstance(c, Progress) for c in Trainer(fresh(), args(), rows()).callbacks)
    assert master_weights(fresh())[0].dtype == torch.float32


# ---- text columns, as transformers and TRL take them

TURNS = [[dict(role='user', content=f'{i} + {i}?'), dict(role='assistant', content=f'{2*i}, I think.')] for i in range(8)]
MESSAGES = [dict(messages=t) for t in TURNS]
PAIRS = [dict(prompt=t[:-1], completion=t[-1:]) for t in TURNS]
STRINGS = [dict(prompt=f'{i} + {i} =', completion=f' {2*i}', id=i) for i in range(8)]
TEXTS = [dict(text=f'{i} and {i} make {2*i}.') for i in range(8)]  # fit into one row: a document that is cut loses its beginning
WORDS = Config('llama', vocab_size=49152, dim=16, n_layers=2, n_heads=2, inter_dim=24, max_positions=128, n_kv_heads=1, head_dim=8)


@pytest.fixture(scope='module')
def tok():
    datasets.disable_progress_bars()
    return Tokenizer.from_pretrained('smollm2-135m')


def by_transformers(tok, row):
    "Token ids and those that count in the loss, from the rendered text alone"
    if 'text' in row: return [*tok.encode(row['text']), tok.eos_ids[0]], None
    if isinstance(row.get('prompt'), str):
        head, answer = tok.encode(row['prompt']), [*tok.encode(row['completion']), tok.eos_ids[0]]
        return head + answer, len(head)
    talk = row.get('messages') or row['prompt'] + row['completion']
    ids = tok.chat(talk, add_generation_prompt=False)
    return ids[:ids.index(tok.eos_ids[0], len(tok.chat(talk[:-1])))+1], len(tok.chat(talk[:-1]))


@pytest.mark.parametrize('make', [list, datasets.Dataset.from_list], ids=['list', 'Dataset'])
@pytest.mark.parametrize('data', [MESSAGES, PAIRS, STRINGS, TEXTS], ids=['messages', 'messages in pairs', 'pairs', 'text'])
def test_columns_equal_a_loop_by_hand(tok, data, make):
    hand = fresh(WORDS)
    opt = torch.optim.AdamW(param_groups(hand, 0.), lr=.01)
    losses = []
    for _ in range(3):
        total = n = 0
        for row in data: # one example at a time, so neither packing nor padding
            ids, first = by_transformers(tok, row)
            logits = hand(torch.tensor([ids]))[0, :-1].float()
            labels = torch.tensor(ids[1:])
            if first is not None: labels[:first-1] = IGNORE
            total = total + F.cross_entropy(logits, labels, reduction='sum')
            n += (labels != IGNORE).sum().item()
        (total/n).backward()
        torch.nn.utils.clip_grad_norm_(hand.parameters(), 1.)
        opt.step(); opt.zero_grad()
        losses.append((total/n).item())
    for packing in (True, False):
        a = args(max_steps=3, per_device_train_batch_size=64, lr_scheduler_type='constant', packing=packing)
        trainer = Trainer(fresh(WORDS), a, train_dataset=make(data), processing_class=tok)
        assert [r['loss'] for r in trainer.train()] == pytest.approx(losses, rel=1e-5)
        assert trainer.history[0]['tokens'] == n
        assert (len(trainer.train_dataset) < len(data)) == packing


def test_columns_are_streamed_and_evaluated(tok):
    stream = datasets.Dataset.from_list(MESSAGES).to_iterable_dataset()
    trainer = Trainer(fresh(WORDS), args(max_steps=2), stream, eval_dataset=MESSAGES, processing_class=tok)
    history = trainer.train()
    assert len(history) == 2 and 'eval_loss' in history[-1]
    assert trainer.evaluate(MESSAGES) == trainer.evaluate() == history[-1]['eval_loss']


@pytest.mark.parametrize('data, said', [
    ([dict(question='a', answer='b')], 'has the columns question, answer; known layouts are `messages`, `prompt` and `completion`, `text`'),
    ([dict(prompt='a')], 'has the columns prompt; known layouts are'),
    ([dict(prompt='a', completion=[])], 'prompt is a str and completion a list'),
    ([dict(messages=TURNS[0][:1])], 'has no message of the assistant'),
    ([dict(messages=[TURNS[0][0], dict(role='assistant', content='long '*200)])], 'more than the context of 128'),
    ([dict(text=3)], "column 'text' must contain text, not int")])
def test_columns_that_cannot_be_read(tok, data, said):
    with pytest.raises((KeyError, ValueError)) as e: Trainer(fresh(WORDS), args(), data, processing_class=tok)
    assert said in str(e.value) and '\n' not in str(e.value)


def test_columns_need_the_tokenizer():
    with pytest.raises(ValueError, match="has the columns messages; give processing_class, the model's Tokenizer"):
        Trainer(fresh(), args(), MESSAGES)
    with pytest.raises(ValueError, match=r"the tokenizer is a builtins.object; give deepseek_nb's Tokenizer.from_pretrained"):
        Trainer(fresh(), args(), MESSAGES, processing_class=object())


def test_max_length_ends_at_the_context(tok):
    rows = Trainer(fresh(WORDS), args(max_length=1024), TEXTS*4, processing_class=tok).train_dataset
    assert {len(r['tokens']) for r in rows} == {128}
    assert collate([rows[0]], max_length=128)['tokens'].shape == (1, 128)


def test_strategies(tmp_path):
    a = args(max_steps=-1, num_train_epochs=2, eval_strategy='epoch', save_strategy='epoch', output_dir=tmp_path)
    history = Trainer(fresh(), a, rows(), rows()).train()
    assert len(history) == 12 and history.series('eval_loss')[0] == [6, 12]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint-12', 'checkpoint-6']
    a = args(eval_strategy='no', save_strategy='no', output_dir=tmp_path/'none')
    assert Trainer(fresh(), a, rows(), rows()).train().series('eval_loss') == ([], [])
    assert not (tmp_path/'none').exists()
    a = args(eval_strategy='steps', logging_steps=4)
    assert Trainer(fresh(), a, rows(), rows()).train().series('eval_loss')[0] == [4, 6]


def test_progress_shows_throughput_and_the_time_left(capsys):
    Trainer(fresh(), args(disable_tqdm=False), rows()).train()
    err = capsys.readouterr().err
    assert 'tokens/s=' in err and '<00:00' in err


def test_the_curve_is_shown_in_a_notebook(monkeypatch):
    pytest.importorskip('IPython')
    shown = []
    monkeypatch.setattr('deepseek_nb.train.callbacks.in_notebook', lambda: True)
    monkeypatch.setattr('IPython.display.display', lambda fig, display_id: shown.append(fig))
    Trainer(fresh(), args(disable_tqdm=False), rows()).train()
    Trainer(fresh(), args(disable_tqdm=True), rows()).train()
    assert len(shown) == 1


def test_saving_needs_no_import(tmp_path):
    "A process that imports the Trainer alone saves, resumes and writes the model."
    code = """
import sys, torch
from deepseek_nb import Trainer, TrainingArguments, Model
from deepseek_nb.core.config import Config
assert 'deepseek_nb.train.resume' not in sys.modules
c = Config('llama', vocab_size=8, dim=8, n_layers=1, n_heads=1, inter_dim=8, max_positions=8, n_kv_heads=1, head_dim=8)
row = dict(tokens=[1, 2, 3], labels=[2, 3, 4])
for resume,n in ((False, 2), (True, 2)):
    model = Model(c, dtype='float32', device='cpu').init_weights(.1)
    t = Trainer(model, TrainingArguments(output_dir=sys.argv[1], max_steps=2), [row]*8)
    t.train(resume_from_checkpoint=resume)
    assert len(t.history) == n
print(sorted(p.name for p in t.save_model().iterdir()))
"""
    done = warm.run('-c', code, tmp_path/'out', modules=warm.TRAINING)
    assert done.returncode == 0, done.stderr
    assert "'checkpoint-2', 'config.json'" in done.stdout

"Rollouts repeat bit for bit, alone and in company, and the trainer can have the sampler's bits."
import copy
import hashlib
import json
import math
import os
import random
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import warm

from deepseek_nb.arch.model import Model, head
from deepseek_nb.arch.routing import Gate
from deepseek_nb.core.config import Config
from deepseek_nb.core.dispatch import use
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.train.callbacks import Callback
from deepseek_nb.train.data import IGNORE
from deepseek_nb.train.grpo import CURVES, GRPOConfig, GRPOTrainer, RewardGuard, batch_answers
from deepseek_nb.train.lora import LoraConfig
from deepseek_nb.train.on_policy import Collapsed
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
from deepseek_nb.train.sandbox import guarded

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


def test_sampler_and_trainer_share_the_kept_tokens(seed):
    "The sets are those of the definition in float64, and probabilities are among them, in the trainer too"
    s = Sampler(fresh(), TOK, max_tokens=6, temperature=.9, top_p=.6, top_k=30, seed=seed, keep=True)
    drawn = s(prompts(3), 2)
    compared = 0
    for prompt, answer, sets, noted in zip(drawn.prompts, drawn.answers, drawn.kept, drawn.sampled, strict=True):
        with torch.no_grad(): logits = s.model(torch.tensor([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1:].double()/.9
        for z, token, kept, logp in zip(logits, answer, sets, noted, strict=True):
            best = z.topk(30).indices
            q = z[best].softmax(0)
            if (q.cumsum(0) - .6).abs().min() > 1e-4: # otherwise rounding decides
                compared += 1
                assert {*kept.tolist()} == {*best[q.cumsum(0) - q < .6].tolist()}
            assert abs(logp - (z[token] - z[kept].logsumexp(0))) < 1e-3
    assert compared
    args = config(top_p=.6, top_k=30, keep_sampling_mask=True, max_steps=1, beta=.1)
    t = GRPOTrainer(fresh(), digits_reward, args, ROWS, processing_class=TOK)
    row = t.train()[0]
    assert row['gap'] < 1e-3 and row['kl'] < 1e-6 and row['entropy'] < math.log(30)


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
    assert torch.allclose(seen[0].weights, chosen/(chosen.sum(-1, keepdim=True) + 1e-20), atol=1e-6)  # scores may be as small
    new.sum().backward()
    assert gate.weight.grad.abs().sum() > 0
    with torch.no_grad(): assert not torch.equal(ordinary(model, drawn), new.detach())
    assert not gate._forward_hooks


def test_what_cannot_be(seed):
    engine = Sampler(fresh(), TOK).engine()[0]
    with pytest.raises(ValueError, match='has no learned router'), recorded_routes(engine): pass
    with pytest.raises(ValueError, match='above 0'): Sampler(fresh(), TOK, temperature=0.)
    assert len({row_seed(0, i, j) for i in range(40) for j in range(40)}) == 1600


# ---- the loop

ROWS = [dict(prompt=f'{a}+{b}', answer=str(a + b)) for a in range(1, 8) for b in range(1, 5)]
CHARS = ''.join(map(str, range(10)))


def digits_reward(prompts, completions, answer, **columns):
    "Share of digits in a text; +1 for the sum"
    return [sum(c in CHARS for c in t)/max(1, len(t)) + (t.strip() == a) for t, a in zip(completions, answer, strict=True)]


def config(**kw):
    base = dict(max_steps=6, learning_rate=.01, per_device_train_batch_size=4, num_generations=4, max_completion_length=4,
                reward_timeout=None, disable_tqdm=True, lr_scheduler_type='constant')
    return GRPOConfig(**base | kw)


def trainer_for(case, **kw):
    torch.manual_seed(0)
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=['q_proj', 'down_proj'])
    c, more, peft = dict(
        full=(DENSE, dict(beta=.05, steps_per_generation=2, num_iterations=2, dynamic_sampling=2), None),
        lora=(DENSE, dict(beta=.05, gradient_accumulation_steps=2, loss_type='grpo', row_invariant=is_invariant(fresh())), lora),
        mixture=(MOE, dict(replay_routes=True, steps_per_generation=2, top_k=20, keep_sampling_mask=True), None))[case]
    model = Model(c, dtype='float32', device='cpu').init_weights(.3)
    return GRPOTrainer(model, digits_reward, config(**more | kw), ROWS, processing_class=TOK, peft_config=peft)


@pytest.mark.filterwarnings('ignore:bf16=True')
@pytest.mark.parametrize('case', ['full', 'mixture'])
def test_steps_in_mixed_precision(case):
    rows = trainer_for(case, bf16=True, max_steps=2).train()
    assert len(rows) == 2 and all(math.isfinite(r['loss']) and r['entropy'] > 0 for r in rows)


def digest(trainer):
    h = hashlib.sha256()
    for n, p in sorted(trainer.model.named_parameters()): h.update(n.encode() + p.detach().numpy().tobytes())
    free = 'seconds',
    rows = [{k: v for k, v in r.items() if k not in free} for r in trainer.history]
    return dict(weights=h.hexdigest(), history=json.loads(json.dumps(rows)), phase=trainer.batches.phase)


KILLED = r'''
import json, os, random, signal, sys, tempfile, time
from pathlib import Path
import torch
import torch._dynamo # of which each child's optimiser would need a second
sys.path.insert(0, sys.argv[1])
from test_grpo import digest, trainer_for
from deepseek_nb.train.resume import checkpoints

def run(case, out):
    kw = dict(output_dir=out, save_steps=1, save_total_limit=2, log_completions=True) if out else {}
    trainer = trainer_for(case, **kw)
    trainer.train(resume_from_checkpoint=bool(out and checkpoints(out)))
    return digest(trainer)

def child(case, out, result, seconds=None):
    "Run in another process, and kill it after a time; whether it was killed"
    if not (pid := os.fork()):
        try: result.write_text(json.dumps(run(case, out)))
        except BaseException as e: print('child failed', repr(e), file=sys.stderr)
        finally: os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9

random.seed(int(sys.argv[2]))
folder = Path(tempfile.mkdtemp())
for case in ('full', 'lora', 'mixture'):
    begin = time.monotonic()
    child(case, None, folder/'want')
    took,killed,wrong = time.monotonic() - begin,0,0
    for i in range(int(sys.argv[3])):
        out = folder/f'{case}-{i}'
        killed += child(case, out, folder/'got', random.uniform(.1, 1)*took)
        (folder/'got').unlink(missing_ok=True)
        child(case, out, folder/'got')
        wrong += (folder/'got').read_text() != (folder/'want').read_text()
    print(json.dumps(dict(case=case, killed=killed, wrong=wrong)), flush=True)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='processes are forked')
def test_killed_at_random_moments_it_arrives_at_the_same_bits(root, seed):
    "GRPO_KILLS=20 kills 20 runs of each case; the moments are anywhere in a run. The parent never computes, so that it can fork."
    done = warm.run('-c', KILLED, root/'tests', seed, os.environ.get('GRPO_KILLS', 1), modules=warm.TRAINING)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f['case'] for f in found] == ['full', 'lora', 'mixture'], done.stderr
    assert sum(f['killed'] for f in found), (seed, found)
    assert not sum(f['wrong'] for f in found), (seed, found, done.stderr)


def test_a_checkpoint_in_the_middle_of_a_phase(tmp_path):
    whole = trainer_for('full')
    whole.train()
    class Stop(Callback):
        def before_update(self, t):
            if t.step == 3: raise KeyboardInterrupt
    broken = trainer_for('full', output_dir=tmp_path, save_steps=1)
    broken.callbacks.append(Stop())
    with pytest.raises(KeyboardInterrupt): broken.train()
    again = trainer_for('full', output_dir=tmp_path, save_steps=1)
    again.train(resume_from_checkpoint=True)
    assert digest(again) == digest(whole)
    other = trainer_for('full', output_dir=tmp_path, save_steps=1)
    with torch.no_grad(): other.reference.norm.weight.mul_(2)
    with pytest.raises(ValueError, match='the reference of the run is not this one'): other.train(resume_from_checkpoint=True)


def test_ratios_are_one_with_the_samplers_bits():
    if not is_invariant(fresh()): pytest.skip('no row-invariant kernels on this machine')
    t = trainer_for('lora', gradient_accumulation_steps=1, max_steps=3)
    for r in t.train(): assert (r['ratio'], r['gap']) == (1, 0)
    assert t.history[0]['kl'] == 0


def test_a_step_by_hand(seed):
    "Gradient of one step against a loss in float64, from the definition"
    t = trainer_for('full', beta=0., loss_type='grpo', steps_per_generation=1, num_iterations=1, per_device_train_batch_size=8)
    t.begin()
    batch = next(iter(t.batches))
    loss, n = t.compute_loss(t.model, batch)
    (loss/n).backward()
    got = {k: p.grad.clone() for k, p in t.model.named_parameters()}
    rewards = torch.tensor([s['reward'] for s in t.batches.samples], dtype=torch.float64).view(-1, 4)
    advantages = ((rewards - rewards.mean(1, keepdim=True))/(rewards.std(1, keepdim=True) + 1e-4)).flatten()
    assert torch.allclose(batch['advantages'].double(), advantages, atol=1e-4)
    model = copy.deepcopy(t.model).double()
    model.zero_grad()
    with use('reference'):
        total = 0.
        for i, (prompt, answer) in enumerate(zip(*batch_answers(batch), strict=True)):
            logp = model(torch.tensor([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1:].double().log_softmax(-1)
            new = logp[range(len(answer)), answer]
            total = total - ((new - new.detach()).exp()*advantages[i]).mean()/8
        total.backward()
    for k, p in model.named_parameters():
        if p.grad is not None: assert (got[k] - p.grad).abs().max() <= 1e-3*(1e-2 + p.grad.abs().max()), k


def hostile(prompts, completions, **columns):
    print('\x1b]0;hostile\x07'*10**5)
    time.sleep(99*('+' in prompts[0]))


@pytest.mark.parametrize('direct', [False, True])
def test_a_reward_that_fails_stops_the_run(direct):
    "It scores nothing: `reward_timeout` bounds it by itself, and a guarded reward isn't guarded again"
    rewards = [digits_reward, guarded(hostile, .5) if direct else hostile]
    model = Model(DENSE, dtype='float32', device='cpu').init_weights(.3)
    trainer = GRPOTrainer(model, rewards, config(max_steps=1, reward_timeout=30. if direct else .5), ROWS, processing_class=TOK)
    with pytest.raises(RuntimeError, match='reward hostile: no answer in 0.5 s; completion 0 of 4'): trainer.train()
    assert trainer.step == 0


def test_silent_groups_are_replaced(seed):
    "Each phase has the groups that a loop over the same prompts and draws would take, and the curves count them"
    g, cap = 4, 3
    rows = [dict(prompt=f'{a}+{b}', answer=str(a + b), quiet=random.random() < .6) for a in range(1, 8) for b in range(1, 5)]
    def reward(prompts, completions, quiet, **columns):
        return [0. if q else float(len({*c})) for c, q in zip(completions, quiet, strict=True)]
    torch.manual_seed(seed)
    model = Model(DENSE, dtype='float32', device='cpu').init_weights(.3)
    def made(n):
        args = config(dynamic_sampling=n, per_device_train_batch_size=12, seed=seed)
        return GRPOTrainer(model, reward, args, rows, processing_class=TOK)
    t, plain = made(cap), made(0)
    t.begin(), plain.begin()
    asked, draws = 0, 0
    for _ in range(3):
        next(iter(t.batches))
        t.batches.place = t.batches.size
        groups = []
        for _ in range(cap + 1):
            silent = [i for i, x in enumerate(groups) if len({s['reward'] for s in x}) == 1] if groups else [0, 1, 2]
            if not silent: break
            plain.batches.asked, plain.batches.draws = asked, draws
            answers, each, values, _ = plain.batches.ask(len(silent))
            asked, draws = asked + len(silent), draws + 1
            new = [[dict(reward=v, ids=a) for v, a in zip(values[i:i + g].tolist(), answers.answers[i:i + g], strict=True)]
                   for i in range(0, len(each), g)]
            good = [x for x in new if len({s['reward'] for s in x}) > 1]
            if not groups: groups, first = new, values
            else:
                for i, x in zip(silent, good, strict=False): groups[i] = x
        now = t.batches.measured
        assert [s['reward'] for s in t.batches.samples] == [s['reward'] for x in groups for s in x]
        assert batch_answers(t.batches.buffer[0])[1] == [s['ids'] for x in groups for s in x]
        assert (t.batches.asked, t.batches.draws) == (asked, draws) and now['reward'] == first.mean().item()
        assert now['filled'] == pytest.approx(sum(len({s['reward'] for s in x}) > 1 for x in groups)/3)
        assert now['redrawn'] <= 3*cap


@pytest.mark.parametrize('case', ['full', 'lora'])
def test_unfinished_answers_are_left_out(case):
    "A batch of them has no scored token, and its loss no gradient"
    t = trainer_for(case, mask_truncated_completions=True, dynamic_sampling=0)
    t.begin()
    t.batches.sampler.stop_ids = ()
    batch = next(iter(t.batches))
    assert not t.batches.measured['ended'] and (batch['labels'] == IGNORE).all()
    loss, _ = t.compute_loss(t.model, batch)
    loss.backward()
    assert loss == 0 and not any(p.grad is not None and p.grad.any() for p in t.params)


def test_every_curve_is_in_the_history(tmp_path):
    t = trainer_for('full', output_dir=tmp_path, max_steps=3)
    t.train()
    state = dict(json.loads((tmp_path/'checkpoint-3/trainer_state.json').read_text())['state']['dict'])
    stored = [dict(row['dict']) for row in state['history']]
    for history in (t.history, stored):
        assert {*CURVES} - {'clipped'} | {'clip_low', 'clip_high'} <= {k for row in history for k in row}


def test_guard_stops_a_policy_that_loses_its_reward():
    t = trainer_for('full', max_steps=60, per_device_train_batch_size=8)
    source = SimpleNamespace(measured=None)
    guard = RewardGuard(source, patience=3)
    t.loss, t.norm, t.scaler, t.params = 0., 1., SimpleNamespace(is_enabled=lambda: False), [*t.model.parameters()]
    base = dict(entropy=1., length=5., variety=.5, repetition=0., ended=1., reward_std=.1)
    with pytest.raises(Collapsed, match='reward 0, best 0.8'):
        for t.step, reward in enumerate([.2]*5 + [.8]*8 + [0.]*3):
            source.measured = base | dict(reward=reward)
            guard.before_update(t)
    assert t.step == 15


def test_settings_and_columns_that_do_not_fit():
    with pytest.raises(ValueError, match='no multiple of num_generations'): config(per_device_train_batch_size=6)
    with pytest.raises(ValueError, match="use 'group', 'batch' or 'none'"): config(scale_rewards='all')
    with pytest.raises(ValueError, match='keep_sampling_mask needs'): config(keep_sampling_mask=True)
    with pytest.raises(ValueError, match='dynamic_sampling is -1'): config(dynamic_sampling=-1)
    with pytest.raises(ValueError, match='2 factors for 1 rewards'):
        GRPOTrainer(fresh(), digits_reward, config(reward_weights=[1., 2.]), ROWS, processing_class=TOK)
    with pytest.raises(ValueError, match='a prompt is needed'):
        GRPOTrainer(fresh(), digits_reward, config(), [dict(text='a')], processing_class=TOK)

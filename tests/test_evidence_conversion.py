"Conversion of a real model: the experiment tiny, its texts apart, its costs as they should be"
import os
import random

import pytest
import torch
from conftest import SEED

from deepseek_nb import Model, Tokenizer
from deepseek_nb.studies import carry_out, open_study, read_plan
from deepseek_nb.studies.cases import share_seen
from deepseek_nb.train.upcycle import random_rows, split_speeches

conversion = open_study('conversion')


@pytest.fixture(scope='module')
def texts(): return split_speeches()


def test_no_speech_in_two_parts(texts):
    from deepseek_nb.train.corpora import corpus
    for d in corpus('sotu'):
        assert sum(d['text'] in texts[k] for k in ('learn', 'validation', 'test')) <= 1
    assert all(len(t) > 100_000 for t in texts.values())
    assert share_seen([texts['learn']], texts['test'].split('\n\n'), 20) < .01


def test_rows_move_with_the_seed_alone(texts):
    tok = Tokenizer.from_pretrained('smollm2-135m')
    one, same, other = (random_rows(texts['test'][:50_000], tok, 3, 40, seed) for seed in (1, 1, 2))
    assert one.shape == (3, 40) and torch.equal(one, same) and not torch.equal(one, other)
    with pytest.raises(ValueError, match='a text of .* tokens is too short for rows of 64'): random_rows('too short', tok, 1, 64)


@pytest.mark.draw(1, group='studies of SmolLM2')
def test_smoke(root, tmp_path):
    "Of the mixture, and of one of the other two that is drawn for each run; all three with EVERY=1"
    plan = read_plan(root/'nbs/configs/evidence/conversion.toml', smoke=True)
    drawn = {*plan.arms} if os.environ.get('EVERY') else {'moe-50', random.Random(SEED).choice(['mla-50', 'neurons-50'])}
    found = carry_out(plan, tmp_path/'conversion.json', tmp_path, [a for a in plan.arms if a in drawn], say=lambda o: None)
    costs = {r['arm']: (r['result']['cache'], r['result']['feed_forward']) for r in found}
    expected = {'mla-50': (.5, 1.), 'moe-50': (1., .5), 'neurons-50': (1., .5)}
    assert plan.arms.keys() == expected.keys() and costs == {k: v for k, v in expected.items() if k in drawn}
    for r in found:
        assert r['result']['original'] == found[0]['result']['original'] and len(r['result']['errors']) == 1
        assert conversion.higher(r['result'], 'original') == 0
    # a run that is started again after its end finds all that it did, and says the same
    folder = next(o for o in (tmp_path/'conversion').iterdir() if o.name.startswith('moe'))
    moe, = (r['result'] for r in found if r['arm'] == 'moe-50')
    assert conversion.convert_and_distil(plan.arms['moe-50'], 0, folder) == moe
    assert all(a in conversion.summary(found) for a in drawn) and 'not been run' in conversion.summary([])


def test_first_blocks():
    model = conversion.first_blocks(Model.from_pretrained('smollm2-135m', 'float32', 'cpu'), 2)
    assert len(model.layers) == model.config.n_layers == 2 and model(torch.ones(1, 3, dtype=torch.long)).shape == (1, 3, 49152)


def synthetic(arm, seed, rise):
    "A made-up run: perplexity that rises by a half when it is converted, by `rise` in the end"
    def at(r): return dict(test=20*(1 + r), other=30*(1 + 2*r), answer='')
    result = dict(original=at(0), converted=at(.5), repaired=at(rise + .05), distilled=at(rise), cache=.5, feed_forward=1.)
    return dict(arm=arm, seed=seed, settings={}, result=result)


def test_finding_of_synthetic_runs():
    made = [synthetic('mla-50', s, .03 + .01*s) for s in range(3)]
    assert conversion.finding(made[:0]) == 'Not run yet: mla-50, neurons-70, mla-40, moe-69.'
    said = conversion.finding(made)
    assert said.startswith('The target is an increase of perplexity') and said.endswith('Not run yet: neurons-70, mla-40, moe-69.')
    assert '**Half of the cache: reached, +4.0 ± 1.0%** after distillation (`mla-50`, reached once repaired); ' in said
    assert 'on other text `mla-50` has +8.0 ± 2.0%.' in said
    assert '| +50.0% ± 0.0% | +9.0% ± 1.0% | +4.0% ± 1.0% | +8.0% ± 2.0% | 3 |' in conversion.summary(made)
    assert 'at most 10%' in said
    made.append(synthetic('neurons-70', 0, .02))
    assert conversion.finding(made).endswith('Not run yet: mla-40, moe-69.')
    said = conversion.finding(made + [synthetic('mla-40', 0, .09), synthetic('moe-69', 0, .2)])
    assert 'Not run yet' not in said
    assert '**40% of the cache: reached, +9.0%** after distillation (`mla-40`, reached once distilled)' in said
    short = synthetic('moe-50', 0, .01)
    del short['result']['distilled']  # an arm of the frontier alone
    assert conversion.finding(made + [short]) == conversion.finding(made) and 'moe-50' not in conversion.rises(made + [short], 'distilled')
    assert '| moe-50 | 50% | 100% | +50.0% ± 0.0% | +6.0% ± 0.0% |  |  | 1 |' in conversion.summary(made + [short])
    assert 'router: missed, +20.0%** after distillation (`moe-69`);' in said and 'four-bit weights' in said

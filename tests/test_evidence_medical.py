"The medical experiment: no leak, resume, bad plans, and tables of made-up runs"
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_nb.studies import open_study, read_plan, run_study
from deepseek_nb.studies.cases import best_tried, word_runs
from deepseek_nb.train.trainer import TrainingArguments

M = open_study('medical')
PLAN = Path(__file__).parent.parent/'nbs/configs/evidence/medical.toml'


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp('work')


@pytest.fixture(scope='module')
def smoke(work):
    return run_study('medical', PLAN, work/'medical.json', work, smoke=True)


def staged(): return read_plan(PLAN, smoke=True).arms['staged']


def plain(result):
    cells = [{k: v for k,v in c.items() if k != 'minutes'} for c in result['cells']]
    return cells, {k: result[k] for k in ('tokens', 'overlap', 'texts')}


def test_smoke(smoke, work):
    assert [r['arm'] for r in smoke] == ['labels', 'general', 'staged']
    assert len({(r['result']['steps'], r['result']['tokens']) for r in smoke}) == 1
    for r in smoke:
        assert [(c['task'], c['count']) for c in r['result']['cells']] == [('chapter', 2), ('inheritance', 2), ('disease', 2)]
        assert ('teacher' in r['result']['cells'][0]) == (r['arm'] == 'staged')
    assert json.loads((work/'medical.json').read_text())['study'] == 'medical'
    assert run_study('medical', PLAN, work/'medical.json', work, smoke=True) == smoke # nothing is left to run


def test_no_leak(smoke):
    tasks,_,texts = M.of_data(staged())
    asked = [r for parts in tasks.values() for p in ('validation', 'test') for r in parts[p]]
    known = set().union(*(word_runs(r['text'], 8) for r in asked))
    for name in ('chapter', 'inheritance'):
        groups = [{r['group'] for r in tasks[name][p]} for p in ('train', 'validation', 'test')]
        assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
        assert not any(word_runs(r['text'], 8) & known for r in tasks[name]['train'])
        assert not {r['text'].lower() for r in tasks[name]['train']} & {r['text'].lower() for r in asked}
    told = [{frozenset(r['text'].split('; ')) for r in tasks['disease'][p]} for p in ('train', 'validation', 'test')]
    assert not told[0] & told[1] and not told[0] & told[2] and not told[1] & told[2]
    for some in texts.values(): # of what is read, no eight words of a text that is asked
        assert not any(word_runs(t, 8) & known for t in some)


def test_teacher_sees_the_labels_of_the_student_alone(smoke, monkeypatch, work):
    seen,settings = [],staged()
    tasks,words,_ = M.of_data(settings)
    def probe(x, y, k, decay):
        seen.append((len(x), y.tolist()))
        return torch.zeros(k, x.shape[1]), torch.zeros(k)
    monkeypatch.setattr(M, 'probe', probe)
    kept = M.said(next(work.glob('medical/teachers-*')), 'chapter')
    M.one_task(M.student(settings, 0), tasks['chapter'], words, kept, 2, settings, 0)
    classes = sorted({r['label'] for r in tasks['chapter']['train']})
    assert seen == [(42, [classes.index(tasks['chapter']['train'][i]['label']) for i in M.choose(tasks['chapter']['train'], 2, 0)])]


def test_resume(smoke, work, monkeypatch):
    settings = staged()
    (folder := work/'medical'/'killed').mkdir()
    step,n = M.Best.after_step,[]
    def dies(self, t):
        n.append(t.step)
        if len(n) == 6: raise KeyboardInterrupt
        step(self, t)
    monkeypatch.setattr(M.Best, 'after_step', dies)
    with pytest.raises(KeyboardInterrupt): M.medical(settings, 0, folder)
    assert [p.name for p in folder.glob('*.json')] == ['chapter-2.json'] # in the second task
    monkeypatch.setattr(M.Best, 'after_step', step)
    whole = next(r for r in smoke if r['arm'] == 'staged')['result']
    assert plain(M.medical(settings, 0, folder)) == plain(whole)


def test_resume_within_a_stage(smoke, work, monkeypatch):
    settings,teachers = staged() | dict(steps=[4, 4]),next(work.glob('medical/teachers-*'))
    monkeypatch.setattr(M, 'TrainingArguments', lambda **kw: TrainingArguments(**kw | dict(save_steps=2)))
    whole,killed = M.student(settings, 0),M.student(settings, 0)
    M.before_labels(whole, settings, 0, work/'whole', teachers)
    def dies(self, t):
        if t.step == 3: raise KeyboardInterrupt
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(M.Projectors, 'after_step', dies, raising=False)
        M.before_labels(killed, settings, 0, work/'half', teachers)
    assert [p.name for p in (work/'half'/'general').glob('checkpoint-*')] == ['checkpoint-2']
    other = M.student(settings, 5)
    M.before_labels(other, settings, 0, work/'half', teachers)
    for k,t in whole.state_dict().items(): assert torch.equal(other.state_dict()[k], t), k


def test_bad_plan(smoke, work, tmp_path):
    text = PLAN.read_text()
    def wrong(old, new):
        assert old in text
        (tmp_path/'medical.toml').write_text(text.replace(old, new))
        return lambda: run_study('medical', tmp_path/'medical.toml', tmp_path/'out.json', work, only=['general'], smoke=True)
    for old,new,why in (("['general', 'general']", "['verses']", "path names 'verses'; there are texts of general, domain"),
                        ('[smoke]\n', '[smoke]\ncolour = 1\n', "'colour', which \\[settings\\] does not have"),
                        ('vocabulary = 300', 'vocabulary = 90000', 'the text has only enough pairs for [0-9]+ tokens, not 90000')):
        with pytest.raises(ValueError, match=why): wrong(old, new)()


def synthetic(arms=('labels', 'general', 'domain', 'staged'), seeds=3):
    "Made-up runs: each arm a tenth above the one before, seeds a hundredth apart"
    def cell(i, seed, task, count):
        made = dict(task=task, count=count, labelled=4, f1=.1*(i+1) + .01*seed, validation=.5, step=1, minutes=1., nearest=.1)
        return made | (dict(teacher=.6) if arms[i] == 'staged' else {})
    places,minutes = [(t, c) for t in ('chapter', 'disease') for c in (2, 0)],dict(stages=1., labels=2., teachers=0.)
    return [dict(arm=a, seed=s, settings={}, result=dict(cells=[cell(i, s, *place) for place in places], minutes=minutes))
            for i,a in enumerate(arms) for s in range(seeds)]


def test_tables_of_synthetic_runs():
    assert M.table([]) == M.costs([]) == M.plot([]) == 'not run yet' and M.gains([], 'general') == {}
    made = synthetic()
    assert M.places(made) == [('chapter', 2), ('chapter', 0), ('disease', 2), ('disease', 0)]
    mean,dev,n = M.reached(made, 'chapter', 2)['staged']
    assert (round(mean, 6), round(dev, 6), n) == (.41, .01, 3)
    assert np.isclose(M.gains(made, 'general')['disease', 0], .41/.21 - 1)
    assert np.isclose(M.few_gains(made, 'general'), [(.4 + .01*i)/(.2 + .01*i) - 1 for i in range(3)]).all()
    assert M.finding(made) == 'Not run yet: scratch, untaught.'
    said = M.finding(synthetic(('labels', 'scratch', 'untaught', 'general', 'domain', 'staged')))
    for words in ('reached beside the general', 'missed beside the domain'): assert f'**{words} teacher alone, ' in said
    assert 'patient with **a macro-F1 of 0.61 ± 0.01 from all labels**, ' in said and ' of 5 other arms are behind it' in said
    assert '| `general` | ' in M.few_table(synthetic(tuple(M.ARMS))) and M.few_table(made) == M.finding(made)
    rows = M.table(made).split('\n')
    assert rows[0] == '| task | labels per class | nearest | labels | general | domain | staged | teacher |' and len(rows) == 6
    assert rows[2] == '| chapter | 2 | 0.100 | 0.110 ± 0.010 | 0.210 ± 0.010 | 0.310 ± 0.010 | 0.410 ± 0.010 | 0.600 |'
    assert rows[3].startswith('| chapter | all |') and M.costs(made).split('\n')[2] == '| labels | 1.0 | 2.0 | 0.0 |'
    fig = M.plot(made)
    assert [ax.get_title() for ax in fig.axes] == ['chapter', 'disease']
    labels = [t.get_text() for t in fig.axes[-1].get_legend().get_texts()]
    assert {'labels', 'general', 'domain', 'staged', 'nearest', 'teacher'} == {*labels}


def test_rates_are_chosen_without_the_test(smoke, work):
    settings = staged()
    tasks,words,_ = M.of_data(settings)
    rest = {p: tasks['chapter'][p] for p in ('train', 'validation')}
    kept = M.said(M.teach(settings, work/'medical'), 'chapter')
    got = M.one_task(M.student(settings, 9), rest, words, kept, 2, settings, 9, 'validation')
    assert got['f1'] == got['validation'] and 'teacher' not in got
    assert best_tried([[1, .2], [2, .4], [3, .4]]) == 2
    with pytest.raises(ValueError, match='no learning rate was tried'): best_tried([])


def test_probe_is_logistic_regression():
    r = np.random.default_rng(0)
    x,y = torch.tensor(r.normal(size=(40, 5)), dtype=torch.float32),torch.tensor(r.integers(0, 3, 40))
    w,b = M.probe(x, y, 3, .2)
    p = (x@w.T + b).softmax(-1) - torch.nn.functional.one_hot(y, 3)
    assert (p.T@x/40 + 2*.2/5*w).abs().max() < 1e-3 and p.sum(0).abs().max() < .04 # the gradient vanishes


@pytest.mark.draw(2)
@pytest.mark.parametrize('seed', range(5))
def test_lessons_have_the_teachers_shares(seed):
    settings = dict(taught=.5, rows=8, length=16)
    ids,p = [[0, 5, 6]]*3,np.array([[.8, .2], [.1, .9], [.5, .5]])
    rows = M.lessons(ids, [0], [1], p, 100, 50, settings, np.random.default_rng(seed))
    assert len(rows) == 800
    said = [[t - 50 for row in some for t in row['labels'] if t != M.IGNORE] for some in (rows[:400], rows[400:])]
    assert {*said[1]} == {1} # labels come last, and are true
    assert abs(np.mean(said[0]) - p[:, 1].mean()) < .05


def test_filled_keeps_examples_whole():
    r = np.random.default_rng(0)
    made = [dict(tokens=[i]*n, labels=[i]*n) for i,n in enumerate(r.integers(1, 9, 200), 1)]
    rows = M.filled(iter(made), 12, 20)
    assert all(len(row['tokens']) == 12 for row in rows)
    found = [int((row['tokens'] == i).sum()) for row in rows for i in dict.fromkeys(row['tokens'].tolist()) if i]
    assert found == [len(e['tokens']) for e in made[:len(found)]]

"The report of all evaluations: its file, its page, and its comparison."
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from deepseek_nb.eval import report as R
from deepseek_nb.eval.choice import FORMS, TaskScore
from deepseek_nb.eval.intervals import holm, mcnemar, paired

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Fixed(R.EvalTask):
    def load(self): return lambda model, tok, n, seed, **kw: model[self.run]


def scores(share, n=120, first=0):
    rng = np.random.default_rng(0)
    hard = rng.random(n)
    ids = [f'i{first + i}' for i in range(n)]
    right = (hard < share).astype(float)
    return dict(accuracy=TaskScore(right.tolist(), ids), error=TaskScore((1 - right).tolist(), ids, 'lower'),
                bias=TaskScore((hard - share).tolist(), ids, 'zero'),
                rate=TaskScore(np.stack([right, hard], 1).tolist(), ids, form='ratio'))


@pytest.fixture(scope='module')
def reports():
    table = {'a': Fixed('a', 'Title & more', 'Set <1>', 'CC0', 'Criticism “x” < y', {}, .5), 'b': Fixed('b', 'B', 's', 'l', 'c')}
    def of(name, share, first=0):
        return R.run_report(dict(a=scores(share), b=scores(share, 50, first)), None, name, table=table)
    return of('first', .8), of('second', .6), of('other items', .6, 1000)


def test_a_report_follows_its_schema(reports):
    jsonschema = pytest.importorskip('jsonschema')
    check = jsonschema.Draft202012Validator(R.REPORT_SCHEMA)
    check.check_schema(R.REPORT_SCHEMA)
    for r in reports: assert check.is_valid(json.loads(json.dumps(r))) and not [*R.report_faults(r)]


def broken(report):
    "Reports that are wrong in one way each"
    score = 'tasks', 'a', 'scores', 'accuracy'
    for path, value in ((('version',), 2), (('form',), 'x'), (('tasks',), []), (('model',), 3), ((*score, 'n'), -1),
                        ((*score, 'better'), 'red'), ((*score, 'form'), 'os.system'), ((*score, 'values'), [True]), ((*score, 'ids'), [1]),
                        (score[:3], None), (('skipped', 'x'), 1), (('tasks', 'a', 'title'), None)):
        new = json.loads(json.dumps(report))
        at = new
        for k in path[:-1]: at = at[k]
        at[path[-1]] = value
        yield path, new


def test_broken_reports_are_refused(reports, tmp_path):
    jsonschema = pytest.importorskip('jsonschema')
    check = jsonschema.Draft202012Validator(R.REPORT_SCHEMA)
    for path, new in broken(reports[0]):
        assert [*R.report_faults(new)], path
        assert not check.is_valid(new), path
        (tmp_path/'r.json').write_text(json.dumps(new))
        with pytest.raises(ValueError, match='is no report of this version') as e: R.load_report(tmp_path/'r.json')
        assert '\n' not in str(e.value)
    short = json.loads(json.dumps(reports[0]))
    short['tasks']['a']['scores']['accuracy']['values'].pop()
    assert 'different lengths' in next(R.report_faults(short))
    for text in ('', 'null', '[]', '{"form": 1}', 'not json', '<html>'):
        (tmp_path/'r.json').write_text(text)
        with pytest.raises(ValueError, match='no report'): R.load_report(tmp_path/'r.json')


def test_both_files_hold_the_report(reports, tmp_path):
    for name in ('x/r.json', 'x/r.html'):
        R.save_report(tmp_path/name, reports[0], reports[1] if name.endswith('html') else None)
        assert R.load_report(tmp_path/name) == json.loads(json.dumps(reports[0]))
    assert [p.name for p in (tmp_path/'x').iterdir() if p.name not in ('r.json', 'r.html')] == []


def test_a_failed_write_leaves_the_old_report(reports, tmp_path, monkeypatch):
    R.save_report(tmp_path/'r.json', reports[0])
    before = (tmp_path/'r.json').read_bytes()
    def full(*a, **k): raise OSError(28, 'no space left')
    with monkeypatch.context() as m:
        m.setattr(Path, 'write_text', full)
        with pytest.raises(OSError, match='no space'): R.save_report(tmp_path/'r.json', reports[1])
    assert (tmp_path/'r.json').read_bytes() == before and len([*tmp_path.iterdir()]) == 1


def test_a_comparison_is_paired_and_adjusted(reports):
    rows = R.compare_reports(*reports[:2], draws=400)
    assert {r.shared for r in rows if r.task == 'a'} == {120} and len(rows) == 8
    np.testing.assert_allclose([r.adjusted for r in rows], holm([r.difference.p for r in rows]))
    first = rows[0]
    a, b = (np.array(r['tasks']['a']['scores']['accuracy']['values']) for r in reports[:2])
    assert first.difference.p == mcnemar(a, b) and first.difference[:3] == paired(a, b, draws=400)[:3]
    assert first.verdict == rows[1].verdict == 'better'
    back = R.compare_reports(reports[1], reports[0], draws=400)
    assert [r.verdict for r in back[:2]] == ['worse', 'worse'] and back[0].difference.value == -first.difference.value
    zero = next(r for r in rows if r.score == 'bias')
    assert zero.verdict in ('', 'better' if abs(zero.first.value) < abs(zero.second.value) else 'worse')


def test_other_items_are_compared_without_pairs(reports):
    rows = R.compare_reports(reports[0], reports[2], draws=400)
    assert {r.shared for r in rows if r.task == 'a'} == {120} and {r.shared for r in rows if r.task == 'b'} == {0}
    same = R.compare_reports(reports[0], reports[0], draws=200)
    assert not any(r.verdict for r in same) and all(r.difference.value == 0 for r in same)


def test_a_score_that_changed_its_form_is_not_compared(reports):
    new = json.loads(json.dumps(reports[0]))
    new['tasks']['a']['scores']['rate']['form'] = 'difference'
    with pytest.raises(ValueError, match="the score 'rate' is not the same"): R.compare_reports(reports[0], new, draws=10)


class Seen(HTMLParser):
    "Elements, ids and addresses of a page; open and closed tags must match"
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.links, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.ids += [given['id']] if 'id' in given else []
        self.links += [v for k, v in given.items() if k in ('href', 'src', 'action')]
        assert not any(k.startswith('on') or k == 'style' for k in given)
        if tag != 'meta': self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_a_page_needs_no_other_host_and_runs_nothing(reports):
    page = R.report_page(reports[0], reports[1])
    seen = Seen(page)
    assert all(link.startswith('#') and link[1:] in seen.ids for link in seen.links) and len({*seen.ids}) == len(seen.ids)
    assert not re.search(r'https?:|@import|url\(', page.split('<script')[0].replace('http-equiv', ''))
    assert seen.tags.count('script') == 1 and "default-src 'none'" in page and {'img', 'iframe', 'link'}.isdisjoint(seen.tags)
    for said in ('Title &amp; more', 'Set &lt;1&gt;', 'Criticism “x” &lt; y', 'prefers-color-scheme: dark', 'width=device-width',
                 'lang="en"'):
        assert said in page, said


def test_hostile_text_stays_text(reports):
    new = json.loads(json.dumps(reports[0]).replace('"first"', json.dumps(EVIL)).replace('"CC0"', json.dumps(EVIL)))
    new['tasks'][EVIL] = new['tasks'].pop('b')
    new['skipped'] = {EVIL: EVIL}
    new['about'] = {EVIL: {EVIL: EVIL}}
    page = R.report_page(new, new)
    seen = Seen(page)
    assert seen.tags.count('script') == 1 and 'img' not in seen.tags and EVIL not in page


def test_every_task_has_its_function_and_criticism():
    for name, t in R.EVAL_TASKS.items():
        assert callable(t.load()) and all((t.title, t.source, t.licence, t.criticism)), name
    assert {'perturb', 'checklist', 'advglue', 'calibration', 'xstest'} <= R.EVAL_TASKS.keys() and len(FORMS) >= 5


def test_unknown_tasks_are_refused_before_anything_runs():
    def never(*a, **k): raise AssertionError
    with pytest.raises(ValueError, match="there is no evaluation task 'wit'"): R.run_report(None, None, 'x', ['piqa', 'wit'], log=never)


def test_the_stored_reports_can_be_read():
    path = Path(__file__).parents[1]/'nbs/results/evaluation.json'
    if not path.exists(): pytest.skip('no report is stored')
    assert not [*R.report_faults(json.loads(path.read_text())['result'])]

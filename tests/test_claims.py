"The claims page is computed from the stored records by one set of rules."
import json
import re
import shutil
from pathlib import Path

import pytest

from deepseek_nb.bench import BENCHMARKS, Comparison

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/'nbs'/'results'
PAGE = json.loads((ROOT/'nbs/lab/980_studies.claims.ipynb').read_text(encoding='utf-8'))['cells']


@pytest.fixture(scope='module')
def claims():
    "Imported when first used, as it registers benchmarks."
    from deepseek_nb.studies import claims
    return claims


@pytest.fixture
def results(tmp_path):
    "A copy of the stored results, to spoil."
    return Path(shutil.copytree(RESULTS, tmp_path/'results'))


def spoil(folder, name, change):
    path = folder/f'{name}.json'
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def row(claims, folder, page, word=''):
    "The row of a claim."
    c = next(c for c in claims.ARTICLE + claims.STUDY_CLAIMS + claims.OURS if c.page == page and word in c.claim)
    return claims.claim_row(c, claims.Stored(folder))


# ---- a wrong record for each rule turns the verdict

def scale(arm, key, factor):
    "Multiply a number of an arm."
    def change(found):
        for r in (o for o in found['runs'] if o['arm'] == arm):
            *way, last = key.split('/')
            part = r['result']
            for k in way: part = part[int(k) if isinstance(part, list) else k]
            part[last] *= factor
    return change


def fix(arm, key, value):
    "Set a number of an arm in all seeds."
    def change(found):
        for r in (o for o in found['runs'] if o['arm'] == arm): r['result'][key] = value
    return change


def threads(found):
    for r in found['runs']: r['machine']['threads'] = 4


def fresh(found):
    for r in found['runs']: r['commit'] = '00000000'


def swahili(found):
    for r in (o for o in found['runs'] if o['arm'] == 'frozen'): r['result']['f1']['swh_Latn'] = .9


def steered(factor): return [scale('steer', f'curve/{i}/style', factor) for i in range(3)]


def no_hits(found):
    for r in found['runs']: r['result']['hits'] = dict.fromkeys(r['result']['hits'], 1)


TURNS = dict(
    goal_reached=('studies.control', 'style', 'evidence/control', steered(1.2), 'undecided', 'shown'),
    goal_missed=('studies.control', 'style', 'evidence/control', [scale('asked', 'value', .3), *steered(.8)], 'undecided', 'refuted'),
    floor=('studies.control', 'style', 'evidence/control', [scale('asked', 'value', 1.4)], 'undecided', 'not shown at this scale'),
    above_the_floor=('studies.compute', 'Sparse', 'evidence/floors', [no_hits], 'not shown at this scale', 'shown'),
    covered=('studies.workers', '', 'evidence/workers', [threads], 'partly shown', 'shown'),
    more_samples=('studies.ranks', 'more than', 'evidence/ranks', [fix('full-10000', 'seen', 20_000)], 'partly shown', 'shown'),
    one_of_three=('studies.crosslingual', '', 'evidence/crosslingual', [swahili], 'partly shown', 'shown'),
    part_of_a_range=('studies.ranks', 'fewer', 'evidence/ranks', [fix('full-50', 'f1', .1)], 'undecided', 'partly shown'),
    worse=('studies.indexer', '', 'evidence/indexer', [fix('indexer', 'losses', [0., 0., 0.])], 'refuted', 'shown'),
    late=('studies.safety', '', 'evidence/safety', [fresh], 'undecided', 'undecided'),
    memory=('bench.quant', '65%', 'quant-decode', [lambda o: o['result']['peak']['int8'].update(o['result']['peak']['float32'])],
            'shown', 'partly shown'),
    robustness=('eval.drift', '', 'perturb', [lambda o: o['result']['falls'][0].update(adjusted=.01)], 'partly shown',
                'shown without a number'))


@pytest.mark.parametrize('name', TURNS)
def test_a_planted_record_turns_the_verdict(claims, results, name):
    page, word, record, changes, before, after = TURNS[name]
    assert row(claims, results, page, word).verdict == before
    for change in changes: spoil(results, record, change)
    assert row(claims, results, page, word).verdict == after


def test_a_lost_commit_takes_the_figure(claims, results):
    old = row(claims, results, 'studies.safety')
    assert (old.verdict, old.worst) == ('undecided', None) and '%' not in old.said
    spoil(results, 'evidence/safety', fresh)
    assert row(claims, results, 'studies.safety').worst and '99.7' in row(claims, results, 'studies.safety').said


def test_the_worst_case_of_the_fastest_peer_counts(claims, results):
    def quick(found):
        case = found['result']['cases']['decode 1×512']
        case['quick'] = [1e-9]*len(case['deepseek_nb'])
    old = row(claims, results, 'bench.runtimes', 'decodes')
    spoil(results, 'peers', quick)
    assert row(claims, results, 'bench.runtimes', 'decodes').worst.value < .01 < old.worst.value


def test_nan_is_never_shown(claims):
    bad = claims.Measured(*[float('nan')]*3)
    assert claims.verdict_of([bad]) == 'undecided'
    assert claims.verdict_of([claims.Measured(2., 2., 2.)], floor=bad) == 'not shown at this scale'


def test_intervals_over_seeds_are_those_of_student(claims):
    from deepseek_nb.eval.intervals import t_tail
    for df, t in enumerate(claims.T95[1:], 1): assert 2*t_tail(t, df) == pytest.approx(.05, abs=2e-4)


# ---- records that contradict themselves, or are missing

EDITS = dict(
    ratio=lambda o: o['result'].update(ratio=9.), median=lambda o: o['result']['medians'].__setitem__(0, 1e-9),
    quartile=lambda o: o['result']['quartiles'].__setitem__(2, 99.), round=lambda o: o['result']['seconds'][0].__setitem__(0, 1e-9),
    rounds=lambda o: o['result']['seconds'][0].pop(), none=lambda o: o['result'].update(seconds=[[], []]),
    zero=lambda o: o['result'].update(seconds=[[0.], [1.]]), words=lambda o: o['result'].update(seconds=['fast', 'slow']),
    more=lambda o: o['result'].update(speedup=9.), empty=lambda o: o.update(result={}), other=lambda o: o.update(result=[1, 2]),
    name=lambda o: o.update(name='another'), hardware=lambda o: o.pop('hardware'), cpu=lambda o: o['hardware'].pop('cpu'),
    versions=lambda o: o.pop('versions'), date=lambda o: o.pop('date'))


@pytest.mark.parametrize('edit', EDITS)
def test_an_edited_result_is_none(claims, results, edit):
    spoil(results, 'moe-decode', EDITS[edit])
    assert row(claims, results, 'bench.models', 'Latent')[::2] == ('not measured', '')


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '3'])
def test_a_damaged_result_is_none(claims, results, text):
    (results/'moe-decode.json').write_text(text)
    assert row(claims, results, 'bench.models', 'Latent')[::2] == ('not measured', '')


def test_without_results_nothing_is_measured(claims, tmp_path):
    rows = claims.claims(claims.ARTICLE + claims.STUDY_CLAIMS + claims.OURS, tmp_path)
    assert {r.verdict for r in rows} == {'not measured', 'needs hardware', 'shown without a number'}
    assert all(r.verdict == 'not measured' for r in rows if r.claim.parts)
    assert claims.sources(tmp_path) == 'Nothing was measured yet.'


# ---- the page

def test_the_articles_claims_are_all_there(claims):
    text = ' '.join(c.claim for c in claims.ARTICLE)
    for said in ('LoRA', 'fewer than 1,000', 'more than 10,000', 'logistics', '98%', '42%', '35%', '0.89', '21%', '65%', '2.1', '30%',
                 'past_key_values', '3.8', '82% to 91%', '0.3%', '78% to 94%', '12 a second', '99.7%', '4.3 of 5', '30 languages',
                 'Arabic and Swahili', 'seconds to milliseconds', '18% shorter', 'Python, Java and C++', 'bias and robustness'):
        assert said in text, said
    assert len(claims.ARTICLE) == 17


def test_the_articles_part_is_short_and_measured(claims):
    rows = claims.claims(claims.ARTICLE, RESULTS)
    assert len('\n'.join(map(str, rows)).split()) <= 900
    assert not [r.claim.claim for r in rows if r.verdict == 'not measured']
    assert all(len(str(r).split()) <= 75 for r in rows)
    clients = (ROOT/'nbs/tutorials/70_clients.ipynb').read_text()
    for name in 'openai anthropic node-openai node-anthropic ai-sdk java c++ curl'.split():
        assert re.search(rf'{re.escape(name)} +The capital of Germany is Berlin', clients), name


def test_templates_spell_out_no_measured_number(claims):
    for c in claims.ARTICLE + claims.STUDY_CLAIMS + claims.OURS:
        assert not re.search(r'\d\.\d|\d ?%', re.sub(r'{[^}]*}', '', c.says)), c.says


def test_every_chapter_is_there(claims):
    from deepseek_nb.tools.book import book, page_name
    pages = {page_name(o.removesuffix('.ipynb')) for o in book(ROOT/'nbs')}
    assert {c.page for c in claims.ARTICLE + claims.STUDY_CLAIMS + claims.OURS} <= pages


def test_the_page_is_what_the_results_say(claims):
    shown = [''.join(o['data']['text/markdown']) for c in PAGE for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
    for which in (claims.ARTICLE, claims.STUDY_CLAIMS, claims.OURS):
        assert '\n'.join(map(str, claims.claims(which, RESULTS))) in shown, 'nbs/lab/980_studies.claims.ipynb is stale: run it'


def test_whole_results_are_read(claims):
    names = [n for n in BENCHMARKS if n in claims.sources(RESULTS)]
    assert len(names) >= 8
    for name in ('moe-decode', 'load-smollm2', 'int8', 'cache'): assert isinstance(claims.checked_record(name, RESULTS)[1], Comparison)

"The claims page says what the stored results say, and nothing else."
import ast
import json
import re
import shutil
from pathlib import Path
from statistics import median

import pytest
import warm

from deepseek_nb.bench import BENCHMARKS, Comparison, find_benchmark, make_record, save_result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/'nbs'/'results'
PAGE = json.loads((ROOT/'nbs'/'980_tools.claims.ipynb').read_text(encoding='utf-8'))['cells']


@pytest.fixture(scope='module')
def claims():
    "Imported when first used, as it registers benchmarks."
    from deepseek_nb.tools import claims
    return claims


@pytest.fixture(scope='module')
def every(claims): return claims.ARTICLE + claims.OURS


@pytest.fixture(scope='module')
def said(claims):
    "The table of experiments and the words of all, which are worked out from their runs once"
    return claims.experiments(RESULTS), claims.findings(RESULTS)


@pytest.fixture
def results(tmp_path):
    "A copy of the stored results, to spoil."
    return Path(shutil.copytree(RESULTS, tmp_path/'results'))


def spoil(folder, name, change):
    path = folder/f'{name}.json'
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def numbers(text): return re.findall(r'(?<![A-Za-z\d.])\d+(?:\.\d+)?', text) # not those of names such as int8


def flat(x):
    "All numbers in a record."
    if isinstance(x, dict): x = list(x.values())
    if isinstance(x, list): return [v for o in x for v in flat(o)]
    return [float(x)] if isinstance(x, int | float) else []


def known(found, times=None):
    "Numbers that a record states or implies, and those in its words."
    times = times or found['result']
    values = flat(times) + [len(times['seconds'][0]), abs(times['medians'][1] - times['medians'][0])]
    p = found.get('provenance', {})
    words = found['hardware'], found['versions'], found['date'], p.get('commit'), p.get('load')
    return values, set(numbers(json.dumps(words)))


def follows(number, values):
    "Whether a printed number is one of the values, rounded, with any prefix."
    half = .5 * 10.**-len(number.partition('.')[2])
    return any(abs(v * s - float(number)) <= half * 1.001 for v in values for s in (1, 1e3, 1e6, 1e9))


# ---- claims and commands

def test_a_claim_has_a_command_or_is_not_measured(claims, every):
    for c in every:
        if c.command: assert c.result in BENCHMARKS and c.command.split()[-1] == c.result and callable(c.read), c.claim
        elif c.study: assert claims.claim_row(c, RESULTS).command == f'`deepseek-nb evidence {c.study}`'
        else: assert (c.result, c.read) == ('', None)
        if not c.command and not c.study: assert claims.claim_row(c, RESULTS) == claims.ClaimRow('not measured', c.claim)


def test_commands_find_their_benchmarks(claims, every):
    by = {}
    for c in filter(lambda c: c.command, every): by.setdefault(c.command.rpartition(' ')[0], set()).add(c.result)
    call = {'deepseek-nb bench': 'from deepseek_nb.tools.cli import main; raise SystemExit(main(["bench"]))'}
    assert by.keys() <= call.keys()
    for command, names in by.items():
        done = warm.run('-c', call[command], check=True)
        assert names <= {line.split()[0] for line in done.stdout.splitlines() if line.strip()}, command


def test_module_prints_the_page(every, tmp_path):
    page = warm.run('-m', 'deepseek_nb.tools.claims', cwd=tmp_path)
    assert page.returncode == 0 and page.stdout.count('| not measured | ') == len(every) and 'Nothing was measured yet.' in page.stdout


def test_the_articles_claims_are_all_there(claims):
    text = ' '.join(c.claim for c in claims.ARTICLE)
    for said in ('LoRA', 'fewer than 1,000', 'more than 10,000', 'logistics', '98%', '42%', '35%', '0.89', '21%', '65%', '2.1', '30%',
                 'past_key_values', '3.8', '82% to 91%', '0.3%', '78% to 94%',
                 '12 a second', '99.7%', '4.3 of 5', '30 languages', 'Arabic and Swahili',
                 'seconds to milliseconds', 'Python, Java and C++', 'bias and robustness'):
        assert said in text, said
    assert len(claims.ARTICLE) == 16 # its sentence on compliance and style is two claims, as two studies measure it


# ---- numbers come from records that hold together

def test_without_results_nothing_is_measured(claims, tmp_path):
    assert {(r.verdict, r.figure, r.on) for r in claims.claims(tmp_path).rows} == {('not measured', '', '')}
    assert claims.measured(tmp_path) == 'Nothing was measured yet.'


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
    assert claims.checked_record('moe-decode', results) is None
    row = next(r for r in claims.claims(results).rows if 'moe-decode' in r.command)
    assert (row.verdict, row.figure, row.on) == ('not measured', '', '') and 'bench-moe' not in claims.measured(results)


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '3'])
def test_a_damaged_result_is_none(claims, results, text):
    (results/'moe-decode.json').write_text(text)
    assert claims.checked_record('moe-decode', results) is None


def test_whole_results_are_read(claims, every):
    names = [c.result for c in every if c.command and (RESULTS/f'{c.result}.json').exists()]
    assert len(names) >= 4
    for c in every:
        if c.result in names: assert claims.record_of(c, RESULTS), f'nbs/results/{c.result}.json contradicts itself: measure again'


def test_numbers_are_in_the_record(claims, every):
    for c in every:
        found, row = claims.record_of(c, RESULTS), claims.claim_row(c, RESULTS)
        if not found: continue
        (values, words), on = known(found[0], json.loads(json.dumps(found[1].to_dict()))), row.on
        if c.case: assert found[2].startswith(c.case) and found[2] in row.domain
        assert numbers(row.figure) and row.verdict in ('reached', 'missed')
        for what in (row.figure, row.interval): assert all(follows(n, values) for n in numbers(what)), what
        assert set(numbers(on)) <= words, on


def test_numbers_of_the_table_are_in_the_records(claims):
    lines = claims.measured(RESULTS).splitlines()
    rows = [line.strip('| ').split(' | ') for line in lines if line.startswith('| ') and not line.startswith('| job')]
    assert len(rows) == len(claims.FRONT_PAGE)
    for name, row in zip(claims.FRONT_PAGE, rows, strict=True):
        found = claims.checked_record(name, RESULTS)[0]
        assert find_benchmark(name).__doc__.startswith(row[0])
        assert all(follows(n, known(found)[0]) for cell in row[1:] for n in numbers(cell)), row
        on = next(line for line in lines if line.startswith(f'`{name}`'))
        assert set(numbers(on.partition(':')[2])) <= known(found)[1]


def test_the_table_says_which_way(claims, tmp_path):
    order = {'moe-decode': ('deepseek_nb', 'transformers'), 'import-time': ('import torch', 'from deepseek_nb import Model')}
    for name, names in order.items():
        save_result(tmp_path/f'{name}.json', make_record(name, Comparison(names, ([1., 1.], [3., 3.]))))
    text = claims.measured(tmp_path)
    assert '| 1.00 s | transformers: 3.00 s | is **3.00** times as fast' in text
    assert '| 3.00 s | import torch: 1.00 s | takes **3.00** times as long' in text
    assert 'SmolLM2' not in text


def test_experiments_say_what_their_runs_say(claims, said, results):
    from deepseek_nb.studies import open_study, study_names
    from deepseek_nb.studies.report import runs
    table, every = said
    for name, row in zip(study_names(), table.rows, strict=True):
        done = runs(name, RESULTS/'evidence')
        assert row.claim == claims.EXPERIMENTS[name] and row.command == f'`deepseek-nb evidence {name}`'
        words = open_study(name).finding(done) if done else 'Not run yet'
        if words.startswith('Not run yet'): assert (row.verdict, row.figure, row.on) == ('not measured', '', ''); continue
        assert row.verdict in ('reached', 'missed', 'refuted') and f'{len(done)} runs' in row.cost
        assert words in every
        assert 'protocol' in row.on and row.domain and row.figure and row.interval, row
        assert all(f'**{part}**' in words for part in row.figure.split(' · ')), row
        assert {p for p in numbers(row.floor)} <= {*numbers(words)}, row
    shutil.rmtree(results/'evidence', ignore_errors=True)
    assert {(r.verdict, r.figure) for r in claims.experiments(results).rows} == {('not measured', '')}
    assert 'No experiment' in claims.findings(results)


# ---- objections

def spelt(path):
    "Text in the functions of a module without a name, without what is computed and without formats"
    for made in (o.body for o in ast.walk(ast.parse(path.read_text())) if isinstance(o, ast.Lambda)):
        computed = {id(x) for o in ast.walk(made) if isinstance(o, ast.FormattedValue) for x in ast.walk(o)}
        yield from (o.value for o in ast.walk(made) if isinstance(o, ast.Constant) and isinstance(o.value, str) and id(o) not in computed)


def test_answers_spell_out_no_measured_number():
    texts = [*spelt(ROOT/'deepseek_nb'/'tools'/'verdicts.py')]
    assert len(texts) > 40 and max(map(len, texts)) > 100
    for text in texts: assert not re.search(r'\d\.\d|\d ?%', text), text


def test_each_row_has_its_objections_answered(claims):
    from deepseek_nb.studies import study_names
    from deepseek_nb.tools.verdicts import ANSWERS, SPEED_ANSWERS, speed_answer, study_answer
    assert [*ANSWERS] == study_names()
    assert {*SPEED_ANSWERS} == {c.result for c in claims.ARTICLE + claims.OURS if c.result}
    for name in ANSWERS:
        said = study_answer(name, RESULTS)
        assert bool(said) == (RESULTS/'evidence'/f'{name}.json').exists() and 'is missing' not in said
        assert not said or said.count('?* ') >= 2
    for name in SPEED_ANSWERS: assert 'is missing' not in (said := speed_answer(name, RESULTS)) and '?* ' in said, name


@pytest.mark.parametrize('name,arm,key', [('sparse', 'moe8', 'test'), ('finetuning', 'lora-whole', 'f1'), ('inspect', 'late', 'value'),
                                          ('balancing', 'bias', 'test'), ('anomaly', 'ucr-full', 'value')])
def test_an_answer_follows_its_record(results, name, arm, key):
    from deepseek_nb.tools.verdicts import study_answer
    def worse(found):
        for r in (o for o in found['runs'] if o['arm'] == arm): r['result'][key] *= 1.1
    before = study_answer(name, results)
    spoil(results/'evidence', name, worse)
    assert study_answer(name, results) not in ('', before)
    spoil(results/'evidence', name, lambda found: [r['result'].pop(key) for r in found['runs'] if r['arm'] == arm])
    assert study_answer(name, results) == 'A record that would answer the objections is missing.'


def test_int8_is_judged_by_its_memory_too(claims, results):
    def row(): return claims.claim_row(next(c for c in claims.ARTICLE if c.result == 'int8'), results)
    found = json.loads((results/'quant-decode.json').read_text())['result']
    less = [1 - a['int8']/a['float32'] for a in (found['nbytes'], {f: o['decode'] for f, o in found['peak'].items()})]
    prompt = found['cases']['prompt of 512']['seconds']
    more = ['16', f'{100*(1 - 2*(1 - less[0])):.0f}', f"{median(a/b for a,b in zip(prompt['float32'], prompt['int8'], strict=True)):.2f}"]
    assert row().verdict == 'reached' and min(less) > .65 and numbers(row().cost) == [f'{100*x:.0f}' for x in less] + more
    spoil(results, 'quant-decode', lambda o: o['result']['peak']['int8'].update(decode=o['result']['peak']['float32']['decode']))
    assert row().verdict == 'missed'
    (results/'quant-decode.json').unlink()
    assert (row().verdict, row().figure) == ('not measured', '')


def test_the_worst_case_is_shown(claims, every, results):
    c = next(c for c in every if (c.result, c.case) == ('peers', 'decode'))
    before, (_, times, case) = claims.claim_row(c, results), claims.record_of(c, results)
    cases = {n: t for n, t in json.loads((results/'peers.json').read_text())['result']['cases'].items() if n.startswith('decode')}
    def ratio(seconds):
        fast = min((o for n, o in seconds.items() if n != 'deepseek_nb'), key=median)
        return median(b/a for a, b in zip(seconds['deepseek_nb'], fast, strict=True))
    assert len(cases) >= 3 and times.ratio == pytest.approx(min(map(ratio, cases.values()))) == pytest.approx(ratio(cases[case]))
    spoil(results, 'peers', lambda o: o['result']['cases'][case].update(quick=[t/100 for t in times.seconds[0]]))
    row = claims.claim_row(c, results)
    assert row.verdict == 'missed' and row.figure != before.figure and row.floor == 'quick' and '**0.01**' in row.figure
    spoil(results, 'peers', lambda o: o['result']['cases'].clear())
    assert claims.claim_row(c, results).verdict == 'not measured'


# ---- the page

def outputs(cell): return [''.join(o['data']['text/markdown']) for o in cell.get('outputs', []) if 'text/markdown' in o.get('data', {})]


def test_the_page_is_what_the_results_say(claims, said):
    shown = [o for cell in PAGE for o in outputs(cell)]
    tables = claims.claims(RESULTS, claims.ARTICLE), claims.claims(RESULTS, claims.OURS), said[0]
    for what in (*(t._repr_markdown_() for t in tables), claims.measured(RESULTS), said[1], claims.speed_answers(RESULTS)):
        assert what in shown, 'nbs/980_tools.claims.ipynb is stale: run it and store its outputs'
        shown.remove(what)
    assert not numbers(' '.join(shown)), 'the page shows a number that no record holds'


def test_the_prose_holds_no_number():
    for cell in PAGE:
        if cell['cell_type'] != 'markdown': continue
        prose = re.sub(r'\$[^$]*\$|`[^`]*`|\A#\|.*', '', ''.join(cell['source']))
        assert not re.search(r'(?<![A-Za-z\d])\d', prose), prose

"""Where numbers come from: hashes of code, plans that are sealed, and records that are refused

Headlines are computed from stored runs alone. Under the protocol a record with an unclean tree, without a commit, with a best rate at
the end of its grid, without its floor, or older than the code it measures is refused. Records from before are counted, and may only
become fewer.
"""
import ast
import importlib
import inspect
import json
import random
import re
import subprocess
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek_nb.core import provenance
from deepseek_nb.core.provenance import EQUAL, bare_code, before, changed_since, code_hash, doubts, reached_code, used_code
from deepseek_nb.eval.intervals import equivalent, t_tail
from deepseek_nb.studies import carry_out, open_study, read_plan, read_records, seal_plan, study, study_names
from deepseek_nb.studies.protocol import BEFORE, check_records, edge, not_run, objections, read_protocol, read_study, standing
from deepseek_nb.studies.report import runs
from deepseek_nb.studies.texts import WordBayes, majority
from deepseek_nb.tools.verdicts import study_row

# Records of benchmarks that were stored before provenance was kept; a measurement on today's code takes one off
BENCHES_BEFORE = """
    bias format-rates lora machine prefix-cache quality roofline
""".split()
PLAN = '''minutes = 1
seeds = [0, 1]
[settings]
rates = [0.1, 1.0, 10.0]
best = 1.0
[arms.ours]
[arms.floor]
rates = []
[protocol]
metric = "a number"
better = "higher"
headline = "ours is above the floor"
floors = ["floor"]
margin = 0.1
code = ["deepseek_nb.core.config"]
grid = "rates"
chosen = "rate"
'''


@study('guess')
def guess(settings, seed, folder): return dict(value=seed, rate=settings['best'])


@pytest.fixture
def made(tmp_path):
    "A study under the protocol, run in a clean tree: plan, records, seal, folder"
    (tmp_path/'guess.toml').write_text(PLAN)
    plan = read_plan(tmp_path/'guess.toml')
    records = carry_out(plan, tmp_path/'guess.json', tmp_path/'work', say=lambda o: None)
    for r in records: r['provenance'] |= dict(commit='0123abcd', clean=True)
    store(tmp_path, records)
    return plan, records, json.loads((tmp_path/'guess.seal.json').read_text()), tmp_path


def store(folder, records): (folder/'guess.json').write_text(json.dumps(dict(study='guess', runs=records)))


# ---- what is refused

SPOILT = {
    'the tree was not clean': lambda r: r['provenance'].update(clean=False),
    'no commit': lambda r: r['provenance'].update(commit=''),
    'no module is named': lambda r: r['provenance'].update(code={}),
    'older than the code it measures: deepseek_nb.core.config':
        lambda r: r['provenance']['code'].update({'deepseek_nb.core.config': '0'*12}),
    'the best rate is at an end of the grid': lambda r: r['result'].update(rate=10.),
    'it was made with another plan': lambda r: r['provenance'].update(plan='0'*12),
    'stored before provenance was kept': lambda r: r.pop('provenance')}


@pytest.mark.parametrize('said', SPOILT)
def test_a_spoilt_record_is_refused(made, said):
    plan, records, seal, folder = made
    assert objections(plan, records, seal) == [] and len(check_records('guess', folder, folder)) == 4
    SPOILT[said](next(r for r in records if (r['arm'], r['seed']) == ('ours', 1)))
    assert [f'ours, seed 1: {said}'] == objections(plan, records, seal)
    store(folder, records)
    with pytest.raises(ValueError, match='guess: ours, seed 1: ') as e: check_records('guess', folder, folder)
    assert '\n' not in str(e.value)


def test_a_missing_floor_and_a_changed_plan_are_refused(made):
    plan, records, seal, folder = made
    assert objections(plan, [r for r in records if r['arm'] != 'floor'], seal) == ["the floor 'floor' has no run"]
    assert objections(plan, records, {}) == ['the plan was not sealed before its first run']
    other = replace(plan, protocol=plan.protocol | dict(margin=.5))
    assert [f for f in objections(other, records, seal) if f.startswith('the plan changed after its first run')]
    (folder/'guess.toml').write_text(PLAN.replace('margin = 0.1', 'margin = 0.5'))
    with pytest.raises(ValueError, match='needs a name of its own'): carry_out(read_plan(folder/'guess.toml'), folder/'guess.json', folder)
    (folder/'guess.toml').write_text(PLAN + '\n# a remark\n[smoke]\nseeds = [7]\n')
    assert read_plan(folder/'guess.toml').mark == plan.mark and read_plan(folder/'guess.toml', smoke=True).protocol == {}


@pytest.mark.parametrize('change', ['settings', 'seeds', 'arms', 'protocol'])
def test_the_mark_hears_every_part_of_a_plan(made, change):
    plan = made[0]
    other = dict(settings=dict(arms=plan.arms | dict(ours=dict(best=2.))), seeds=dict(seeds=(0, 1, 2)),
                 arms=dict(arms=plan.arms | dict(more={})), protocol=dict(protocol=plan.protocol | dict(headline='other')))[change]
    assert replace(plan, **other).mark != plan.mark


@pytest.mark.parametrize('key, value', [('metric', None), ('better', 'more'), ('floors', []), ('floors', ['x']), ('margin', 'small')])
def test_a_protocol_is_complete(made, key, value):
    plan = replace(made[0], protocol=made[0].protocol | {key: value})
    with pytest.raises(ValueError, match=f'guess: .*({key}|floor)'): read_protocol(plan)


def test_edges_of_several_rates(made):
    r = made[1][0]
    assert not edge(r | dict(result=dict(rate=dict(a=1., b=1.))), made[0].protocol)
    assert edge(r | dict(result=dict(rate=dict(a=1., b=.1))), made[0].protocol)


# ---- hashes of code

CODE = '''"Doc"
import math
__all__ = ['f']
TABLE = {'a': 1}

@staticmethod
def f(x, # a number
      y=2):
    "Add"
    return x + y  # sum
class A:
    """Longer
    text"""
    text = """# not a comment"""
'''


@pytest.mark.parametrize('old, new, same', [
    ('"Add"', '"Sum"', True), ('# a number', '# another', True), ('# sum', '', True), ("'f'", "'f', 'g'", True),
    ('Longer', 'Other', True),
    ('\n\n', '\n\n\n', True), ("'a': 1", "'a': 2", True), ('y=2', 'y=3', False), ('# not', '# now', False),
    ('import math', 'import os', False), ('@staticmethod\n', '', False)])
def test_only_code_counts(old, new, same):
    assert (bare_code(CODE.replace(old, new, 1), ('TABLE',)) == bare_code(CODE, ('TABLE',))) == same


def test_of_a_study_only_what_its_runs_reach():
    text = 'N = 3\n@study("a")\ndef a(s): return b(s)\ndef b(s): return N\ndef finding(r): return "words"\nX = 1\n'
    assert reached_code(text) == reached_code(text.replace('words', 'others').replace('X = 1', 'X = 2'))
    assert len({reached_code(text.replace(*o)) for o in (('', ''), ('N = 3', 'N = 4'), ('return N', 'return 2*N'))}) == 3
    assert reached_code('def f(): pass') == 'def f(): pass'


def test_every_module_has_a_hash(root):
    names = ['arch.moe', 'train.trainer', 'bench', 'kernels', 'studies.texts', 'studies.compute', 'studies.balancing']
    hashes = [code_hash(f'deepseek_nb.{n}') for n in names]
    assert all(len(h) == 12 for h in hashes) and len({*hashes}) == len(names)
    cpp = [p.name for p in (root/'deepseek_nb'/'csrc').glob('*.cpp')]
    assert len({code_hash(f'csrc/{n}') for n in cpp}) == len(cpp)
    assert code_hash('deepseek_nb.nothing.here') == code_hash('csrc/nothing.cpp') == ''


def of_commit(root, commit, name):
    "A module as it was at a commit, and its hash"
    whole = Path(importlib.import_module(name).__file__).name == '__init__.py'
    file = name.replace('.', '/') + ('/__init__.py' if whole else '.py')
    found = subprocess.run(['git', 'show', f'{commit}:{file}'], cwd=root, capture_output=True, text=True)
    if found.returncode: pytest.skip(f'Git does not have {file} of commit {commit} here')
    module = types.ModuleType(f'{name}_before')
    module.__package__, module.source = name if whole else name.rpartition('.')[0], found.stdout
    exec(compile(found.stdout, file, 'exec'), vars(module))
    return module, provenance._digest(bare_code(found.stdout))


def both_codes(root, name):
    "A module as a benchmark's record measured it, and as it is now"
    old, = [o for n,o in EQUAL if n == name]
    if code_hash(name) != EQUAL[name, old]: pytest.skip('the module has changed again, so its records are stale')
    records = [json.loads(p.read_text()) for p in sorted((root/'nbs'/'results').glob('*.json'))]
    record = next((r for r in records if r.get('provenance', {}).get('code', {}).get(name) == old), None)
    if record is None: pytest.fail(f'no record has this code of {name} any more: take it out of EQUAL')
    then, digest = of_commit(root, record['provenance']['commit'], name)
    assert digest == old
    return then, importlib.import_module(name)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_listed_changes_of_log_probs_leave_every_bit(root, dtype):
    name = 'deepseek_nb.train.log_probs'
    old, = [o for n,o in EQUAL if n == name]
    if code_hash(name) != EQUAL[name, old]: pytest.skip('the module has changed again, so its records are stale')
    record = next(r for r in read_study('reasoning')[1] if r['provenance']['code'][name] == old)
    then, digest = of_commit(root, record['provenance']['commit'], name)
    assert digest == old
    now, seed = importlib.import_module(name), random.randrange(10**6)
    print(f'SEED={seed}')
    torch.manual_seed(seed)
    for n,d,w,chunk in (1, 5, 7, 0), (13, 32, 61, 0), (13, 32, 61, 4), (130, 17, 2000, 50):
        x, head, labels, weights = torch.randn(n, d, dtype=dtype), torch.randn(w, d, dtype=dtype), torch.randint(w, (n,)), torch.randn(n)
        outs = []
        for module in then, now:
            a, b = x.clone().requires_grad_(), head.clone().requires_grad_()
            logps, entropies = module.linear_log_probs(a, b, labels, .7, chunk)
            (logps*weights).sum().backward()
            outs.append((logps.detach(), entropies, a.grad, b.grad))
        for one,other in zip(*outs, strict=True): assert one.dtype == other.dtype and torch.equal(one, other) and one.isfinite().all()


def test_listed_changes_of_gguf_leave_every_tensor(root, tmp_path):
    "The reader refuses more files; what it reads of a sound one is the same"
    gguf, name = pytest.importorskip('gguf'), 'deepseek_nb.files.gguf'
    (then, now), r = both_codes(root, name), np.random.default_rng()
    for align in (32, 64):
        w = gguf.GGUFWriter(path := tmp_path/f'{align}.gguf', 'llama')
        w.add_custom_alignment(align), w.add_token_list(['a', 'b']), w.add_uint32('llama.block_count', 3)
        for i,kind in enumerate(('F32', 'F16', 'Q8_0', 'Q4_0', 'Q4_1')):
            kind, x = gguf.GGMLQuantizationType[kind], r.standard_normal((r.integers(1, 9), 32*r.integers(1, 9))).astype(np.float32)
            w.add_tensor(f't{i}', gguf.quantize(x, kind), raw_dtype=kind)
        w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
        a, b = then.open_gguf(path), now.open_gguf(path)
        assert then.metadata(a) == now.metadata(b) and len(a.tensors) == len(b.tensors) == 5
        for o,t in zip(a.tensors, b.tensors, strict=True):
            assert (o.name, o.tensor_type, o.shape.tolist(), o.data_offset) == (t.name, t.tensor_type, t.shape.tolist(), t.data_offset)
            assert np.array_equal(o.data, t.data)


def test_listed_changes_of_the_trainer_leave_every_run_that_did_not_ask_for_bfloat16(root):
    "One function differs; it differs where `bf16=True`, on a processor that multiplies bfloat16 without tiles, and no record has that"
    from deepseek_nb.arch.model import Model
    from deepseek_nb.core.config import Config
    name = 'deepseek_nb.train.trainer'
    then, now = both_codes(root, name)
    def parts(code):
        return {ast.unparse(o) for o in ast.parse(bare_code(code)).body if getattr(o, 'name', '') not in ('compute_dtype', 'has_fast_bf16')}
    assert {o for o in parts(then.source) ^ parts(inspect.getsource(now)) if not o.startswith('__all__')} == set()
    c = Config('llama', vocab_size=8, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8, inter_dim=8, max_positions=8)
    for dtype in 'float32', 'bfloat16', 'float16':
        for how in {}, dict(bf16=False), dict(fp16=True):
            model, args = Model(c, dtype, 'cpu'), now.TrainingArguments(**how)
            assert then.compute_dtype(model, args) == now.compute_dtype(model, args), (dtype, how)
    def asks(o): return any(k == 'bf16' and v is True or asks(v) for k,v in o.items()) if isinstance(o, dict) else False
    old, = [o for n,o in EQUAL if n == name]
    for named in study_names():
        for r in read_study(named)[1]:
            if r.get('provenance', {}).get('code', {}).get(name) == old: assert not asks(r['settings']), named


def test_listed_changes_of_the_block_drafter_leave_every_draft(root):
    "Only confidences differ, which no stored number contains"
    from dataclasses import replace

    from deepseek_nb.arch.releases import preset
    name = 'deepseek_nb.arch.dspark'
    (then, now), seed = both_codes(root, name), random.randrange(10**6)
    print(f'SEED={seed}')
    torch.manual_seed(seed)
    c = replace(preset('deepseek-v4-flash'), vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=32, n_routed_experts=2,
                n_activated_experts=1, moe_inter_dim=32, head_dim=16, q_lora_rank=24, qk_rope_head_dim=8, window=8, compress_ratios=(0, 4),
                o_groups=2, o_lora_rank=16, n_hash_layers=0, index_n_heads=2, index_head_dim=16, index_topk=4, max_positions=128,
                n_mtp_layers=0, mtp_ratios=(), hc_mult=2, hc_iters=2)
    for b,t in (1, 1), (2, 7), (3, 40):
        a, z = (m.DSpark(c, (0, 1), length=4, stages=2, rank=8) for m in (then, now))
        for p in a.parameters(): torch.nn.init.normal_(p, std=.3)
        z.load_state_dict(a.state_dict())
        embed = torch.nn.Embedding(c.vocab_size, c.dim)
        anchor, before = torch.randint(c.vocab_size, (b,)), torch.randint(c.vocab_size, (b, 4))
        main, w = torch.randn(b, t, c.dim), torch.randn(c.vocab_size, c.dim)
        with torch.no_grad(): (one, sure), (other, differs) = (m.predict(m.forward(main, anchor, embed), before, w) for m in (a, z))
        assert torch.equal(one, other) and one.isfinite().all() and not torch.equal(sure, differs)


def test_listed_changes_of_bench_are_names_of_libraries(root):
    "One hash counted `_PEERS`, a part of the table of benchmarks; the code without the table is the same"
    name = 'deepseek_nb.bench'
    (old, now), tables = next((o, h) for (n, o), h in EQUAL.items() if n == name), provenance.NAME_TABLES[name]
    if code_hash(name) != now: pytest.skip('the module has changed again, so its records are stale')
    records = [json.loads(p.read_text()) for p in sorted((root/'nbs'/'results').glob('*.json'))]
    record = next((r for r in records if r.get('provenance', {}).get('code', {}).get(name) == old), None)
    if record is None: pytest.fail(f'no record has this code of {name} any more: take it out of EQUAL')
    then, _ = of_commit(root, record['provenance']['commit'], name)
    assert provenance._digest(bare_code(then.source, tuple(t for t in tables if t != '_PEERS'))) == old
    assert bare_code(then.source, tables) == bare_code(inspect.getsource(importlib.import_module(name)), tables)


class Unrefused(ast.NodeTransformer):
    "Code without statements that can only refuse: `if …: raise`, and handlers that raise"
    def only_raises(self, body):
        return all(isinstance(o, ast.Raise) or isinstance(o, ast.If) and self.only_raises(o.body) and not o.orelse for o in body)

    def visit_If(self, node):
        return None if not node.orelse and self.only_raises(node.body) else self.generic_visit(node)

    def visit_Try(self, node):
        self.generic_visit(node)
        plain = not node.orelse and not node.finalbody and all(self.only_raises(h.body) for h in node.handlers)
        return node.body if plain else node


def unrefused(source): return ast.dump(Unrefused().visit(ast.parse(bare_code(source))))


def test_refusals_are_left_out_and_nothing_else():
    def code(*lines): return unrefused('\n    '.join(['def f(x):', *lines]))
    old = code('y = g(x)', 'return y')
    assert old == code('if x < 0: raise ValueError(x)', 'try: y = g(x)', 'except TypeError: raise KeyError', 'return y')
    for other in (('if x < 0: x = 0', 'y = g(x)', 'return y'), ('try: y = g(x)', 'except TypeError: y = 0', 'return y'),
                  ('if x < 0: raise ValueError(x)', 'else: x = 0', 'y = g(x)', 'return y'), ('y = g(x)', 'return -y')):
        assert old != code(*other), other


@pytest.mark.parametrize('name', ['core.config', 'core.device', 'arch.model', 'files.tokenizer'])
def test_listed_changes_only_refuse_more(root, name):
    name = f'deepseek_nb.{name}'
    old, = [o for n,o in EQUAL if n == name]
    if code_hash(name) != EQUAL[name, old]: pytest.skip('the module has changed again, so its records are stale')
    records = [json.loads(p.read_text()) for p in sorted((root/'nbs'/'results').glob('*.json'))]
    record = next((r for r in records if r.get('provenance', {}).get('code', {}).get(name) == old), None)
    if record is None: pytest.fail(f'no record has this code of {name} any more: take it out of EQUAL')
    file = f"{name.replace('.', '/')}.py"
    found = subprocess.run(['git', 'show', f"{record['provenance']['commit']}:{file}"], cwd=root, capture_output=True, text=True)
    if found.returncode: pytest.skip(f'Git does not have {file} of this commit here')
    now = inspect.getsource(importlib.import_module(name))
    assert provenance._digest(bare_code(found.stdout)) == old and bare_code(found.stdout) != bare_code(now)
    assert unrefused(found.stdout) == unrefused(now)


def test_changes_are_named():
    found = used_code()
    assert 'deepseek_nb.eval.intervals' in found and not {'deepseek_nb', 'deepseek_nb.studies', 'deepseek_nb.core.provenance'} & {*found}
    assert changed_since(found) == [] and changed_since(found | {'deepseek_nb.gone': 'f'*12}) == ['deepseek_nb.gone']
    many = dict(provenance=dict(commit='a', clean=True, code={f'deepseek_nb.gone{i}': '1' for i in range(5)}))
    assert 'and 2 more' in doubts(many)[0] and before({}) and not before(many)


def test_a_tree_with_changes_is_not_clean(tmp_path, monkeypatch):
    who = 'git', '-c', 'user.name=a', '-c', 'user.email=a@b'
    def git(*args): subprocess.run([*who, *args], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path/'package').mkdir()
    monkeypatch.setattr(provenance, '_PACKAGE', tmp_path/'package')
    (tmp_path/'nbs'/'results').mkdir(parents=True)
    git('init', '-q')
    for name in ('package/a.py', 'nbs/b.ipynb', 'nbs/results/c.json'): (tmp_path/name).write_text('1')
    git('add', '-A'), git('commit', '-qm', 'x')
    assert provenance.git_state()['clean'] is True
    (tmp_path/'nbs/results/c.json').write_text('2')
    assert provenance.git_state()['clean'] is True
    (tmp_path/'nbs/b.ipynb').write_text('2')  # outside the package's folder
    assert provenance.git_state()['clean'] is False


# ---- statistics and floors

def test_equivalence_equals_two_tests_of_scipy():
    stats = pytest.importorskip('scipy.stats')
    g = torch.Generator().manual_seed(torch.seed() % 2**31)
    for n in (2, 3, 11, 40):
        x, m = (torch.randn(n, generator=g, dtype=torch.float64)*2).numpy(), .7
        want = max(stats.ttest_1samp(x, -m, alternative='greater').pvalue, stats.ttest_1samp(x, m, alternative='less').pvalue)
        assert equivalent(x, m).p == pytest.approx(want, rel=1e-6, abs=1e-12), (n, g.initial_seed())
        assert equivalent(x, m).equal == (want <= 1 - .95)
    for df in (1, 2, 9, 300): assert t_tail(-1.7, df) == pytest.approx(stats.t.sf(-1.7, df), rel=1e-9)


@pytest.mark.parametrize('values, margin', [([1.], 1), ([1., 2.], 0), ([1., float('nan')], 1), ([[1.], [2.]], 1)])
def test_equivalence_of_nothing_is_an_error(values, margin):
    with pytest.raises(ValueError, match='equivalence needs|not finite'): equivalent(values, margin)


def test_naive_bayes_equals_that_of_scikit_learn():
    text, bayes = pytest.importorskip('sklearn.feature_extraction.text'), pytest.importorskip('sklearn.naive_bayes')
    import random
    r = random.Random()
    docs = [' '.join(r.choices('abcdefgh', k=r.randint(1, 9))) for _ in range(60)]
    labels = [r.choice('xyz') for _ in docs]
    count = text.CountVectorizer(token_pattern=r'\S+')
    theirs = bayes.MultinomialNB(alpha=.3).fit(count.fit_transform(docs[:40]), labels[:40])
    want = theirs.predict_joint_log_proba(count.transform(docs[40:]))
    ours = WordBayes(docs[:40], labels[:40], .3)
    best = [ours.classes.index(c) for c in ours.predict(docs[40:])]
    assert [row[b] for row, b in zip(want, best, strict=True)] == pytest.approx(want.max(1).tolist())
    assert majority(list('abb'), docs[:2]) == ['b', 'b']


# ---- what is stored

def test_studies_from_before_may_only_become_fewer():
    where = {n: standing(n) for n in study_names()}
    old = {n for n, (state, _) in where.items() if state == 'before the protocol'}
    assert old <= {*BEFORE}, f'{sorted(old - {*BEFORE})}: a new study needs a table [protocol] in its plan'
    assert len(BEFORE) <= 13
    refused = {n: found[:3] for n, (state, found) in where.items() if state == 'refused'}
    assert not refused, f'{refused}: run again with deepseek-nb evidence NAME'


def test_headlines_follow_from_stored_runs(root):
    for name in study_names():
        plan, records, _ = read_study(name)
        if not (plan.protocol and records): continue
        assert check_records(name)
        cost = study_row(name, 'A claim', root/'nbs/results').cost
        for arm in {a for a, _ in not_run(name)}: assert re.search(rf'planned and not run: .*\b{arm}\b', cost), (name, arm)
    said = open_study('floors').finding(runs('floors', root/'nbs/results/evidence'), runs('compute', root/'nbs/results/evidence'))
    by = {r['arm']: r['result'] for r in read_records(root/'nbs/results/evidence/floors.json')}
    for task, n in by['bayes']['n'].items(): assert f"{task} {by['bayes']['hits'][task]/n:.0%} against" in said


def test_benchmarks_from_before_may_only_become_fewer(root):
    found = {p.stem: json.loads(p.read_text()) for p in (root/'nbs/results').glob('*.json')}
    new = {n for n, r in found.items() if before(r)} - {*BENCHES_BEFORE}
    assert not new, f'{sorted(new)}: a new record has provenance; measure with deepseek-nb bench NAME --out FILE'
    for name, r in found.items():
        if not before(r): assert r['provenance']['commit'] and r['provenance']['clean'] is True and r['provenance']['code'], name


def test_a_seal_is_written_once(made):
    plan, folder = made[0], made[3]
    assert seal_plan(plan, folder/'guess.json') == made[2] and made[2]['plan'] == plan.mark


# ---- measuring again

def test_the_short_measurements_are_done_in_turn(tmp_path, monkeypatch):
    from subprocess import CompletedProcess

    from deepseek_nb.studies import fresh
    calls, said = [], []
    def run(words): return calls.append(words) or CompletedProcess(words, len(calls) == 1)
    monkeypatch.setattr(fresh, 'git_state', lambda: dict(commit='a', clean=True))
    names = 'dispatch', 'cache'
    assert fresh.measure_again(tmp_path, names, said.append, run, float) == ['cache']  # the first one failed
    assert [c[-3] for c in calls] == ['dispatch', 'cache'] and 'its record stays as it is' in said[1]
    assert fresh.measure_again(tmp_path, names, said.append, run, lambda: 6.) == [] and len(calls) == 2 and 'quiet' in said[-1]
    for n in names: (tmp_path/f'{n}.json').write_text(json.dumps(dict(provenance=dict(commit='a', clean=True, code=used_code()))))
    assert fresh.stale(tmp_path, names) == {} and fresh.measure_again(tmp_path, names, said.append, run, float) == []
    (tmp_path/'old.json').write_text('{}')
    assert fresh.left_out(tmp_path) == dict(old='stored before provenance was kept') and '1 records were not' in fresh.planned(tmp_path)
    monkeypatch.setattr(fresh, 'git_state', lambda: dict(commit='a', clean=False))
    with pytest.raises(ValueError, match='commit them first'): fresh.measure_again(tmp_path, names)

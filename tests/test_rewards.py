"Rewards against exact fractions and brute force, tasks whose parts share nothing, and text made to cheat or to hurt."
import itertools
import json
import math
import os
import random
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.train import sandbox
from deepseek_nb.train import tasks as T
from deepseek_nb.train.rewards import (
    TAGS,
    RewardModel,
    answer_number,
    boxes,
    checked_rewards,
    language_reward,
    language_share,
    number_reward,
    numbers_in,
    overlong_reward,
    parse_number,
    preference_loss,
    program_reward,
    program_text,
    read_test,
    repetition_reward,
    tag_reward,
    weighted,
)
from deepseek_nb.train.sandbox import Confines, guarded

SEED = int(os.environ.get('REWARDS_SEED') or random.randrange(10**6))


@pytest.fixture
def rng():
    print(f'REWARDS_SEED={SEED}')
    return random.Random(SEED)


# ---- numbers

def grouped(n, separator): return f'{n:,}'.replace(',', separator)


def written(rng):
    "A number with its text in a notation drawn at random"
    sign, n = rng.choice(['', '', '-', '−', '+']), rng.randrange(10**rng.randint(1, 9))
    d, places = rng.randrange(1, 10**3), rng.randint(1, 6)
    digits = f'{rng.randrange(10**places):0{places}}'
    decimal, value = f'{n}.{digits}', n + Fraction(int(digits), 10**places)
    text, value = rng.choice([
        (str(n), n), (grouped(n, ','), n), (grouped(n, '{,}'), n), (grouped(n, r',\!'), n), (decimal, value), (f'.{digits}', value - n),
        (f'{n}/{d}', Fraction(n, d)), (f'{n} / {d}', Fraction(n, d)), (f'{grouped(n, ",")}.{digits}', value), (f'{decimal}%', value/100),
        (rf'{n}\%', Fraction(n, 100)), (rf'\frac{{{n}}}{{{d}}}', Fraction(n, d)), (rf'\dfrac{{{decimal}}}{{{d}}}', value/d),
        (rf'\tfrac {n%10}{d%9 + 1}', Fraction(n % 10, d % 9 + 1)), (rf'{d}\frac{{{n}}}{{{d}}}', d + Fraction(n, d)),
        (f'{decimal}e{places}', value*10**places), (rf'{decimal} \times 10^{{-{places}}}', value/10**places)])
    return sign + text, -value if sign in ('-', '−') else value


def test_numbers_equal_fractions(rng):
    for _ in range(400):
        text, value = written(rng)
        assert parse_number(text) == value, text
        assert parse_number(f' ${text}$ ') == value, text
        assert answer_number(rf'First 7, then \boxed{{{text}}}') == value, text
        assert answer_number(f'<think>8, 9</think><answer>It is {text} apples.</answer>') == value, text
        assert answer_number(f'1 and 2 is\n#### {text}\nThat is all, 5.') == value, text
        assert answer_number(f'I think 3 of these are ({text})') == value, text
        assert number_reward([''], [text], [f'{value.numerator}/{value.denominator}']) == [1.], text
        assert number_reward([''], [text], [str(value + Fraction(1, 10**9))]) == [0.], text


@settings(max_examples=80, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet='0123456789.,/-+%$\\{}frac boxed<>think/answer#e×^', max_size=300)))
def test_no_text_hurts(text):
    for found in (parse_number(text), answer_number(text)): assert found is None or type(found) is Fraction
    assert all(type(v) is Fraction for v in numbers_in(text))
    assert all(b in text for b in boxes(text))
    assert 0 <= language_share(text, 'en') <= 1
    scores = [number_reward([''], [text], ['3'])[0], tag_reward()([''], [text])[0], *T.json_reward([''], [text], ['{"a": 1}']),
              *T.countdown_reward([''], [text], [[1, 2]], [3]), *T.tool_reward()([''], [text], ['f'], ['{}'])]
    assert all(0 <= s <= 1 for s in scores) and -1 <= repetition_reward()([''], [text])[0] <= 0


def test_text_of_every_kind_of_cheat():
    cheats = [''.join(rf'\boxed{{{i}}}' for i in range(100)), '<answer>42</answer><answer>41</answer>', '<answer>42', '42</answer>',
              '<think>42', '<think>42</think>', r'\boxed{42} or \boxed{41}', r'\boxed{41, 42}', '<answer>42 41</answer>', '#### 42 43',
              '<think></think><think>42',
              '<answer>4**2*2+10</answer>', '<answer>0x2a</answer>', '<answer>forty-two</answer>', '<answer>٤٢</answer>', '42'*40, '']
    assert number_reward(['']*len(cheats), cheats, ['42']*len(cheats)) == [0.]*len(cheats)
    assert number_reward([''], ['<answer>41</answer> 42'], ['42']) == [0.]


# ---- layout, language, length

def test_one_tag_more_or_less_is_no_layout(rng):
    good = '<think>first we add, then carry</think>\n<answer>42</answer>\n'
    assert tag_reward()([''], [good]) == [1.]
    for tag in TAGS:
        for place in range(0, len(good), 3): assert tag_reward()([''], [good[:place] + tag + good[place:]]) == [0.], (tag, place)
        assert tag_reward()([''], [good.replace(tag, '')]) == [0.]
    assert tag_reward()([''], [f'{good} so']) == tag_reward()([''], [good.replace('42', ' ')]) == [0.]
    for thought in ('', ' \n', 'so so so so so so', '...'): # the cheapest text between the tags
        assert tag_reward()([''], [f'<think>{thought}</think><answer>42</answer>']) == [0.], thought


def test_overlong_is_dapos_formula(rng):
    for _ in range(300):
        length = rng.randint(1, 500)
        margin = rng.randint(1, length)
        n = rng.randint(0, 600)
        want = 0. if n <= length - margin else (length - margin - n)/margin if n <= length else -1.
        got = overlong_reward(length, margin)([''], ['x'], completion_ids=[[0]*n])[0]
        assert math.isclose(got, want, rel_tol=1e-12, abs_tol=0.) and -1 <= got <= 0


def test_language_counts_different_words():
    assert language_share('we find that the sum is even', 'en') == 1.
    assert language_share('我们 find 3', 'zh') == 2/3
    assert language_share('the '*100 + 'мы нашли сумму', 'en') == 1/4
    assert language_share('12 + 3 = 15', 'en') == 0.


# ---- sums of rewards

def test_weighted_equals_the_sum_by_hand(rng):
    n = 50
    tables = [[rng.choice([None, rng.uniform(-1, 1)]) for _ in range(n)] for _ in range(3)]
    weights = [rng.uniform(-2, 2) for _ in range(3)]
    rewards = [lambda prompts, completions, values=t, **columns: values for t in tables]
    for row, got in enumerate(weighted(rewards, weights)(['']*n, ['']*n)):
        parts = [w*t[row] for w, t in zip(weights, tables, strict=True) if t[row] is not None]
        assert got == (sum(parts) if parts else None)
    for bad in ([float('inf')], [float('nan')], [], [1., 2.]):
        with pytest.raises(ValueError): checked_rewards(bad, 1, 'r')
    with pytest.raises(ValueError, match='2 rewards and 1 weights'): weighted(rewards[:2], [1.])


def test_rewards_take_messages_too():
    for text in ('The answer is 42', '41'):
        assert number_reward([''], [text], ['42']) == number_reward([[]], [[dict(role='assistant', content=text)]], ['42'])


# ---- rewards in another process

def test_a_guarded_reward_may_use_threads():
    "A fork of this process would wait for threads that it doesn't have"
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def product(prompts, completions, **columns): return [float((torch.ones(400, 400) @ torch.ones(400, 400)).mean())/400]*len(completions)
    try:
        assert product(['']*2, ['1', '2']) == [1., 1.]
        assert guarded(product, 20.)(['']*2, ['1', '2']) == [1., 1.]
    finally: torch.set_num_threads(threads)


def crash(prompts, completions, **columns):
    if 'boom' in completions: os.abort()
    return [1.]*len(completions)


def test_a_guarded_sum_survives():
    three = dict(prompts=['']*3, completions=['3', 'boom', '5'], answer=['3', '3', '3'])
    told = r'crash\+number_reward fails for 1 of 3 completions, which get 0.0: its process ended with code -6'
    with pytest.warns(UserWarning, match=told):
        assert guarded(weighted([crash, number_reward]), 5., broken=0.)(**three) == [2., 0., 1.]


LOCKS = [threading.Lock()]
FAILING = dict(
    raises=(lambda prompts, completions, **c: 1/0, 'ZeroDivisionError: division by zero'),
    lacks_a_column=(lambda prompts, completions, **c: c['answer'], "KeyError: 'answer'"),
    hangs=(lambda prompts, completions, **c: time.sleep(99), 'no answer in 0.5 s'),
    hangs_on=(lambda prompts, completions, **c: [signal.signal(signal.SIGTERM, signal.SIG_IGN), time.sleep(99)], 'no answer in 0.5 s'),
    crashes=(lambda prompts, completions, **c: os.abort(), 'its process ended with code -6'),
    leaves=(lambda prompts, completions, **c: os._exit(0), 'its process ended with code 0'),
    eats=(lambda prompts, completions, **c: [len(bytearray(2**40))], 'MemoryError'),
    too_few=(lambda prompts, completions, **c: [], r'it returned \[\], not 1 finite numbers'),
    too_large=(lambda prompts, completions, **c: [float('inf')], r'it returned \[inf\], not 1 finite numbers'),
    no_number=(lambda prompts, completions, **c: [float('nan')], r'it returned \[nan\], not 1 finite numbers'),
    is_killed=(lambda prompts, completions, **c: os.kill(os.getpid(), 9), 'its process was killed, by the system if memory was short'),
    kills_the_worker=(lambda prompts, completions, **c: os.kill(os.getppid(), 9), 'the worker died, or did not answer'),
    can_not_be_sent=(lambda prompts, completions, locks=LOCKS, **c: [1.], "can't be sent to another process"))


@pytest.mark.parametrize('name', FAILING)
@pytest.mark.parametrize('broken', [None, 0.])
def test_a_reward_that_fails_is_an_error_that_names_it(name, broken):
    "Also if broken completions may have a value: here all fail, so it isn't them"
    reward, why = FAILING[name]
    reward.__name__ = name
    with pytest.raises(RuntimeError, match=f'reward {name}: .*{why}'): guarded(reward, .5, broken=broken)(['?'], ['42'])
    assert guarded(crash, 20.)(['?'], ['42']) == [1.] # the next call is not the last one's


@pytest.mark.parametrize('who', ['getpid', 'getppid'])
def test_the_machine_is_never_a_score(who):
    "Neither a process that the system kills nor the worker's death is the fault of a completion, though the others are scored"
    def killed(prompts, completions, **columns):
        if 'boom' in completions: os.kill(getattr(os, who)(), 9), time.sleep(9)
        return [1.]*len(completions)
    with pytest.raises(RuntimeError, match='reward killed: (its process was killed|the worker died)'):
        guarded(killed, 20., broken=0.)(['']*3, ['3', 'boom', '5'])


def test_a_worker_that_can_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(sandbox, 'REWARD_WORKER', sandbox.RewardWorker())
    monkeypatch.setattr(sandbox.sys, 'executable', '/bin/false')
    with pytest.raises(RuntimeError, match='reward crash: the worker died, or did not answer'): guarded(crash)(['?'], ['42'])


def test_an_answer_that_comes_late_is_not_the_next_ones():
    def slow(prompts, completions, **columns): return [time.sleep(1.5) or 7.]

    def interrupt(*_): raise KeyboardInterrupt
    assert guarded(crash, 20.)(['?'], ['42']) == [1.]
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, .5)
        with pytest.raises(KeyboardInterrupt): guarded(slow, 20.)(['?'], ['42'])
    finally: signal.signal(signal.SIGALRM, before)
    assert guarded(crash, 20.)(['?'], ['42']) == [1.]


def test_threads_share_the_worker():
    def own(prompts, completions, **columns): return [float(c) for c in completions]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda i: guarded(own, 20.)(['?'], [str(i)]), range(20))] == [[float(i)] for i in range(20)]


# ---- long text made to take long

def long_texts(n):
    parts = [
        '<think>' + '</think><answer>'*(n//16), '<think>a</think>' + ' '*n, '</think> '*(n//9), '<answer>'*(n//8), ' '*n + 'x',
        '<think>'*(n//7), '<'*n, '1,111'*(n//5), '9'*n, '1/'*(n//2), '-'*n, '.'*n, r'\frac{'*(n//6), r'\frac 1'*(n//7),
        r'\boxed{'*(n//7), r'\boxed{1}'*(n//9), '{'*n, '['*n, '('*n, '1+'*(n//2), '####'*(n//4), '= '*(n//2), '\n'*n,
        '```\n'*(n//4), '```python\n'*(n//10), '`'*n, '```' + ' '*n, '```py'*(n//5), '"a":'*(n//4), '{"a":'*(n//5), '{"a": 1' + '0'*n,
        '\\'*n, '"'*n, 'the '*(n//4), ' '.join(map(str, range(n//6))),
        'é中'*(n//2), 'ﷺ'*(n//2), ('x'*40 + ' ')*(n//41), '<｜tool▁calls▁begin｜>'*(n//20),
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n'*(n//40)]
    return [p[:n] for p in parts]


def each(function): return lambda prompts, completions, **columns: [len(function(c)) for c in completions]


RULES = dict(
    number=number_reward, tags=tag_reward(), opened=tag_reward(opened=True), behind=tag_reward(answer=False),
    language=language_reward('en'), chinese=language_reward('zh'), overlong=overlong_reward(100, 50), repetition=repetition_reward(),
    json=T.json_reward, countdown=T.countdown_reward, tool=T.tool_reward(), tool_v4=T.tool_reward('v4'), program=each(program_text),
    numbers=each(numbers_in), boxes=each(boxes))


@pytest.mark.parametrize('name', RULES)
def test_no_text_takes_more_than_its_share(name):
    "Time grows with the length: 8 times for 8 times the text, where a quadratic rule takes 64 times"
    columns = dict(answer=['{"a": 1}' if name == 'json' else '42'], numbers=[[1, 2]], target=[3], name=['f'], arguments=['{}'])

    def seconds(text):
        least = float('inf')
        for _ in range(3):
            start = time.process_time()
            RULES[name](prompts=['?'], completions=[text], **columns)
            least = min(least, time.process_time() - start)
        return least
    for short, long in zip(long_texts(2**14), long_texts(2**17), strict=True):
        start, end = seconds(short), seconds(long)
        assert end < .02 or end < 28*start, (name, long[:40], start, end)


# ---- programs

def test_programs_earn_by_their_results_only():
    tests = ['assert f([3, 1, 2]) == [1, 2, 3]', 'assert f([]) == []', "assert f(['b', 'a'])==['a', 'b']"]
    small = Confines(wall=20., cpu=1., memory=256*2**20)
    programs = {
        'f = sorted': 1., 'def f(x): x.sort(); print(x); return x': 1., 'f = tuple': 0., 'def f(x): return [1, 2, 3]': 0.,
        'import os; os._exit(0)': 0., 'raise SystemExit(0)': 0., 'x = (': 0., 'def f(x): return f(x)': 0.,
        'class L(list):\n    def __eq__(s, o): return True\ndef f(x): return L(x)': 0.,
        'import json; json.dumps = lambda o: "[\\"[1, 2, 3]\\"]"\ndef f(x): return x': 0.,
        'import builtins; builtins.repr = lambda o: "1"\ndef f(x): return 1': 0.,
        'import os\nfor i in range(3, 64):\n    try: os.write(i, b"[null]")\n    except OSError: pass\ndef f(x): return x': 0.}
    assert program_reward(small)(None, [*programs], [tests]*len(programs)) == [*programs.values()]
    assert program_reward(small)(None, ['f = sorted'], [[]]) == [None]
    assert program_reward(small)(None, ['f = tuple'], [['assert f([1]) == [1]']]) == [0.]
    for bad in ('assert f(1)', 'f(1) == 2', 'assert f(1) == g(2)', 'assert f(1) == 2 == 2', '', 'assert'):
        with pytest.raises(ValueError, match='is no test'): read_test(bad)


# ---- a reward model

def test_preference_loss_and_gradient_in_float64():
    torch.manual_seed(SEED)
    a, b = torch.randn(2, 17, dtype=torch.float64)*30
    a.requires_grad_()
    loss = preference_loss(a, b)
    want = sum(math.log1p(math.exp(-d)) if d > 0 else -d + math.log1p(math.exp(d)) for d in (a - b).tolist())/17
    assert math.isclose(loss.item(), want, rel_tol=1e-12)
    loss.backward()
    torch.testing.assert_close(a.grad, -torch.sigmoid(b - a.detach())/17, rtol=1e-12, atol=1e-300)


def test_a_reward_does_not_depend_on_its_neighbours(rng):
    torch.manual_seed(SEED)
    config = Config('llama', vocab_size=32, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, inter_dim=64, max_positions=64)
    judge = RewardModel(Model(config, 'float32', 'cpu').init_weights(.2)).double()
    with torch.no_grad(): judge.head.weight.normal_()
    rows = [[rng.randrange(32) for _ in range(rng.randint(1, 40))] for _ in range(9)]
    with torch.no_grad(): torch.testing.assert_close(judge(rows), torch.cat([judge([r]) for r in rows]), rtol=1e-5, atol=1e-5)


def test_a_reward_model_is_cheated_by_length(rng):
    "Its known hack: trained on pairs whose preferred answer is longer in nine of ten, it pays more for a wrong answer with filler"
    torch.manual_seed(SEED)
    config = Config('llama', vocab_size=16, dim=16, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=8, inter_dim=32, max_positions=64)
    judge = RewardModel(Model(config, 'float32', 'cpu').init_weights(.1))
    optimizer = torch.optim.AdamW(judge.parameters(), 1e-2)

    def text(a, right, n): return [11, a, 12, a + 1 if right else rng.choice([i for i in range(10) if i != a + 1]), *[10]*n]

    def size(long): return rng.randint(4, 12) if long else rng.randint(0, 3)

    for _ in range(50):
        rows = [(rng.randrange(9), rng.random() < .9) for _ in range(24)]
        pairs = [text(a, right, size(longer == right)) for right in (True, False) for a, longer in rows]
        preference_loss(*judge(pairs).chunk(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = [rng.randrange(9) for _ in range(100)]
    with torch.no_grad(): right, padded = (judge([text(a, r, n) for a in asked]) for r, n in ((True, 0), (False, 12)))
    assert (padded > right).float().mean() > .5
    answers = [('4', 1.), ('5' + ' filler'*12, 0.)] # a rule is not impressed
    assert number_reward(['']*2, [t for t, _ in answers], ['4']*2) == [v for _, v in answers]


# ---- Countdown

def reachable(numbers):
    "All values of all expressions that use each number once, by brute force"
    if len(numbers) == 1: return {Fraction(numbers[0])}
    found = set()
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left, right = (reachable([n for i, n in enumerate(numbers) if (i in chosen) == side]) for side in (True, False))
            for a, b in itertools.product(left, right): found |= {a + b, a - b, a*b, *([a/b] if b else [])}
    return found


def test_the_solver_equals_brute_force(rng):
    for count, cases in ((2, 10), (3, 8), (4, 1)):
        for _ in range(cases):
            numbers = [rng.randint(0, 13) for _ in range(count)]
            known = {int(v) for v in reachable(numbers) if v.denominator == 1 and 0 < v <= 60}
            for target in sorted({*rng.sample(range(1, 61), 12), *rng.sample(sorted(known), min(12, len(known)))}):
                found = T.solve_countdown(numbers, target)
                assert (found is not None) == (target in known), (numbers, target, found)
                if found: assert T.countdown_right(found[-1], numbers, target), (numbers, target, found)


def drawn_expression(rng, depth):
    if not depth or rng.random() < .2: return str(rng.randint(0, 30))
    a, b = drawn_expression(rng, depth - 1), drawn_expression(rng, depth - 1)
    space = rng.choice(['', ' '])
    text = f'{a}{space}{rng.choice("+-*/")}{space}{b}'
    return f'({text})' if rng.random() < .6 else text


def test_the_parser_equals_python(rng):
    for _ in range(400):
        text = drawn_expression(rng, 4)
        if len(text) > 200: continue
        try: want = eval(re.sub(r'\d+', r'F(\g<0>)', text), dict(F=Fraction))
        except ZeroDivisionError: want = None
        e = T.Expression(text)
        assert e.value == want, text
        if want is not None: assert e.numbers == [int(n) for n in re.findall(r'\d+', text)]
        i = rng.randrange(len(text))
        broken = text[:i] + rng.choice('+*/()_.x^=') + text[i:]
        other = re.search(r'\*\s*\*|//|[_.x^=]|[-+*/(]\s*[-+]|^\s*[-+]', broken) # in Python's grammar, or no text of ours
        try: want = None if other else eval(re.sub(r'\d+', r'F(\g<0>)', broken), dict(F=Fraction))
        except (SyntaxError, TypeError, ZeroDivisionError): want = None
        assert T.Expression(broken).value == want, broken


# ---- tasks

MADE = dict(sum=lambda s: T.arithmetic(3, '+-*', 150, 30, s), small=lambda s: T.arithmetic(2, '+', 300, 30, s),
            game=lambda s: T.countdown(3, train=150, test=30, seed=s),
            four=lambda s: T.countdown(4, words=True, train=60, test=20, seed=s), json=lambda s: T.formatting(2, 300, 40, s),
            tools=lambda s: T.tool_calling('v4', False, 300, 40, s))
KEYS = dict(sum=lambda r: tuple(sorted(re.findall(r'\d+|\D', r['prompt']))), small=lambda r: tuple(sorted(re.findall(r'\d+', r['prompt']))),
            game=lambda r: (tuple(sorted(r['numbers'])), r['target']), four=lambda r: (tuple(sorted(r['numbers'])), r['target']),
            json=lambda r: json.dumps(json.loads(r['answer']), sort_keys=True), tools=lambda r: r['prompt'])


@pytest.mark.parametrize('name', MADE)
def test_a_task_is_split_by_content_and_seed(name, rng):
    seed = rng.randrange(1000)
    task, again, other = MADE[name](seed), MADE[name](seed), MADE[name](seed + 1)
    assert (task.train, task.test) == (again.train, again.test) and task.train != other.train
    keys = [[KEYS[name](r) for r in part] for part in (task.train, task.test)]
    assert not {*keys[0]} & {*keys[1]} and all(len({*k}) == len(k) for k in keys)
    assert task.dataset('test').to_list() == task.test


@pytest.mark.parametrize('name', MADE)
def test_worked_solutions_are_right_and_mistakes_wrong(name, rng):
    task = MADE[name](rng.randrange(1000))
    rows = {r['prompt']: r for r in task.train}
    for wrong, short in ((0., 0.), (0., float(task.steps)), (1., 0.), (.3, .3*task.steps)):
        start = T.start_rows(task, 60, wrong, short, rng.randrange(1000))
        columns = {k: [rows[r['prompt']][k] for r in start] for k in task.train[0] if k != 'prompt'}
        values = task.reward(prompts=[r['prompt'] for r in start], completions=[r['completion'] for r in start], **columns)
        full = sum(v == 1 for v in values)
        assert full == 60*(wrong == 0) if wrong in (0., 1.) else 20 < full < 60, (name, wrong, full)
    text = [r[k] for r in T.start_rows(task, 60) for k in ('prompt', 'completion')]
    tok = T.character_tokenizer(text)
    assert all(tok.decode(tok.encode(t)) == t and len(tok.encode(t)) == len(t.encode()) for t in text)


def test_gsm8k_is_read_and_its_parts_share_no_question():
    folder = Path(os.environ.get('DEEPSEEK_NB_DATA', 'none'))/'gsm8k'
    if not folder.is_dir(): pytest.skip('DEEPSEEK_NB_DATA names no folder with gsm8k')
    everything = [T.gsm8k_rows(s, folder) for s in ('train', 'test')]
    assert [len(o) for o in everything] == [7473, 1319]
    solutions = [T.worked_steps(r['answer']) for o in everything for r in o]
    assert all(parse_number(number) is not None and '<<' not in worked for worked, _, number in solutions)
    task = T.word_problems(2, 200, folder=folder)
    assert not {r['prompt'] for r in task.train} & {r['prompt'] for r in task.test} and len(task.test) > 100
    values = task.reward(['']*len(task.train), [r['worked'] for r in task.train], [r['answer'] for r in task.train])
    assert values == [1.]*len(values)

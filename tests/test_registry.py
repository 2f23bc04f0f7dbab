"Models, gates and releases of the platform, over both databases."
import random
import threading

import pytest
from platform_fixtures import again, postgres, postgres_url, store  # noqa: F401

from deepseek_nb.platform.access import User
from deepseek_nb.platform.registry import Limit, add_model, card_of, check_gates, measure
from deepseek_nb.platform.rollout import GatesFailed, choose, end_release, release, roll_back, set_share
from deepseek_nb.platform.store import models, newest, releases, row_of

OPEN = [Limit('accuracy', min=0.)]


def some_models(store, n):
    out = [add_model(store, None, f'model {i}', 'smollm2-135m') for i in range(n)]
    for m in out: measure(store, m, 'accuracy', .9, .8, .95, n=200)
    return out


def test_numbers_are_given_once(store):
    found = []

    def add():
        mine = again(store)
        found.extend(add_model(mine, None, 'same', 'smollm2-135m') for _ in range(4))
        mine.close()
    threads = [threading.Thread(target=add) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(set(found)) == 12 and sorted(m.number for m in newest(store, models)) == [*range(1, 13)]


def test_a_name_is_no_path(store, tmp_path, monkeypatch):
    "A file or folder of this machine is no public model, whatever way leads there"
    (tmp_path/'inner').mkdir()
    (tmp_path/'other').mkdir()
    for p in (tmp_path/'secret.gguf', tmp_path/'inner'/'secret.gguf'): p.write_bytes(b'GGUF')
    monkeypatch.chdir(tmp_path/'inner')
    for place in (*'../secret.gguf secret.gguf ./secret.gguf .. ../x x/.. . -x a/-b ../other'.split(), str(tmp_path/'other')):
        with pytest.raises((FileNotFoundError, ValueError), match='no name of a model|lies outside of'):
            add_model(store, None, 'one', place)
    assert not newest(store, models)


def test_a_release_needs_its_gates_and_unchanged_files(store):
    folder = store.folder/'models'/'one'
    folder.mkdir(parents=True)
    (folder/'weights').write_text('1')
    model = add_model(store, None, 'one', folder)
    (store.folder/'gates.toml').write_text('[quality]\naccuracy = {min = 0.8}\n[bias]\ngap = {max = 0.1}\n')
    with pytest.raises(GatesFailed, match='accuracy .* not measured; gap .* not measured') as e: release(store, None, 'here', model)
    assert [g.passed for g in e.value.gates] == [False, False]
    measure(store, model, 'accuracy', .85, .79, .9)
    measure(store, model, 'gap', .05)
    with pytest.raises(GatesFailed, match='accuracy must be at least 0.8, and is 0.79 to 0.9$'):
        release(store, None, 'here', model)
    assert choose(store, 'here', 'ann', 0).model_id is None and newest(store, releases) == []
    measure(store, model, 'accuracy', .85, .81, .9)
    (folder/'weights').write_text('2')
    with pytest.raises(ValueError, match='were changed'): release(store, None, 'here', model)
    (folder/'weights').write_text('1')
    release(store, None, 'here', model)
    assert newest(store, releases)[0].gates[0]['passed'] and choose(store, 'here', 'ann').model_id == model


def test_shares_are_sticky_and_grow(store):
    old,new,shadow = some_models(store, 3)
    release(store, None, 'p', old, gates=OPEN)
    release(store, None, 'p', shadow, 'shadow', gates=[])
    release(store, None, 'p', new, 'staged', 0., gates=OPEN)
    owners,before = [str(i) for i in range(400)],set()
    other = again(store)
    for share in 0., .1, .3, 1.:
        set_share(store, None, 'p', share)
        got = {o for o in owners if choose(store, 'p', o).model_id == new}
        assert before <= got and abs(len(got)/400 - share) < .15  # six standard deviations of a share
        choose(other, 'p', 'x', 0)  # another process sees the change, and has the same key
        assert got == {o for o in owners if choose(other, 'p', o, 1e9).model_id == new}
        before = got
    assert choose(store, 'p', 'x').shadows == ((2, shadow),)
    other.close()


def test_going_back_is_a_stack(store):
    seed = random.randrange(10**9)
    print('seed', seed)
    rng,some,stack,staged = random.Random(seed),some_models(store, 4),[],None
    for _ in range(25):
        act = rng.choice(['live', 'live', 'staged', 'back', 'back', 'end'])
        model = rng.choice(some)
        if act == 'live':
            release(store, None, 'p', model, gates=OPEN)
            stack,staged = [*stack, model],None
        elif act == 'staged':
            if not stack:
                with pytest.raises(ValueError, match='nothing is live'): release(store, None, 'p', model, 'staged', 1., gates=OPEN)
                continue
            release(store, None, 'p', model, 'staged', 1., gates=OPEN)
            staged = model
        elif act == 'end':
            if staged is None:
                with pytest.raises(ValueError, match='no staged'): end_release(store, None, 'p', 'staged')
            else: end_release(store, None, 'p', 'staged')
            staged = None
        elif staged is None and len(stack) < 2:
            with pytest.raises(ValueError, match='no earlier release'): roll_back(store, None, 'p')
        else:
            if staged is None: stack.pop()
            staged = None
            assert roll_back(store, None, 'p') == stack[-1]
        assert choose(store, 'p', 'ann').model_id == (staged or (stack[-1] if stack else None))
    active = [r.mode for r in newest(store, releases, releases.c.place == 'p') if r.ended is None]
    assert len(active) == len(set(active))


def test_a_card_shows_only_what_was_measured(store):
    model, = some_models(store, 1)
    measure(store, model, 'gap', .2, test='a | <script>alert(1)</script>\n# Heading')
    card = card_of(store, model, [Limit('gap', max=.1), Limit('toxicity', max=.1)])
    assert '<script' not in card and '\n# Heading' not in card
    assert '| toxicity | at most 0.1 | not measured | no |' in card and '| gap | at most 0.1 | 0.2 | no |' in card
    assert '0.8 to 0.95' in card and 'Not measured, although a gate asks for it: toxicity.' in card
    assert row_of(store, models, model).number == 1 and not check_gates(store, model, [Limit('toxicity', max=1.)])[0].passed
    nobody = User(99, 'x', 'viewer')
    with pytest.raises(ValueError, match='is no name of a measure'): measure(store, model, 'a b', 1.)
    with pytest.raises(ValueError, match='mode'): release(store, nobody, 'p', model, 'now')

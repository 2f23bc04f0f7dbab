"Users, sessions and tokens of the platform, over SQLite and Postgres."
import random
import threading
from pathlib import Path

import pytest
from platform_fixtures import again, postgres, postgres_url, store  # noqa: F401
from sqlalchemy import func, select, update

from deepseek_nb.platform import access
from deepseek_nb.platform.access import (
    IDLE,
    LIFETIME,
    NOTED,
    USER_ROLES,
    TooManyTries,
    User,
    allowed,
    check_password,
    create_token,
    create_user,
    csrf_matches,
    csrf_of,
    device_note,
    disable_user,
    first_admin,
    hash_password,
    log_in,
    log_out,
    password_matches,
    revoke_token,
    set_password,
    set_role,
    setup_code,
    user_of_session,
    user_of_token,
)
from deepseek_nb.platform.store import attempts, audits, metadata, newest, sessions, tokens, users

ADA, BOB = 'four blue whales sing', 'seven green kettles'
HOUR, DAY = 3600*10**6, 86400*10**6


@pytest.fixture
def ada(store): return first_admin(store, setup_code(store), 'ada', ADA)


@pytest.fixture
def bob(store, ada): return create_user(store, ada, 'bob', BOB, 'developer')


@pytest.fixture
def at(store):
    "Sets the store's clock, hours after the start"
    start = store.now()
    def at(hours): store.clock = lambda: start + round(hours*HOUR)
    at(0)
    return at


def actions(store):
    with store.read() as c: return list(c.scalars(select(audits.c.action).order_by(audits.c.id)))


# ---- the first admin

def test_no_default_password(store):
    with store.read() as c: assert c.scalar(select(func.count()).select_from(users)) == 0
    for name, password in (('admin', 'admin'), ('root', ''), ('', '')):
        with pytest.raises(PermissionError): log_in(store, name, password)
    old, code = setup_code(store), setup_code(store)
    for bad in ('', old, code[:-1], code + 'x'):
        with pytest.raises(PermissionError): first_admin(store, bad, 'eve', 'another long word')
    with pytest.raises(ValueError): first_admin(store, code, 'ada', 'short')
    assert first_admin(store, f' {code}\n', 'ada', ADA).role == 'admin'
    assert setup_code(store) is None
    with pytest.raises(PermissionError): first_admin(store, code, 'eve', 'another long word')
    assert [o.name for o in newest(store, users)] == ['ada'] and store.check() == []


def test_two_first_admins_at_once(store):
    code, won, lost = setup_code(store), [], []
    def race(name):
        try: won.append(first_admin(again(store), code, name, ADA))
        except PermissionError: lost.append(name)
    threads = [threading.Thread(target=race, args=(n,)) for n in ('eve', 'ida')]
    for t in threads: t.start()
    for t in threads: t.join()
    assert (len(won), len(lost)) == (1, 1) and len(newest(store, users)) == 1


# ---- passwords

def test_passwords_are_hashed(monkeypatch):
    monkeypatch.setattr(access, 'SCRYPT', dict(n=16, r=8, p=1))
    stored = hash_password(ADA)
    assert ADA not in stored and stored != hash_password(ADA) and password_matches(ADA, stored)
    for other in (ADA[:-1], ADA + ' ', ADA.upper(), '', '\ud800', 'x'*1000): assert not password_matches(other, stored)
    assert password_matches('cafe\u0301 au lait', hash_password('café au lait')), 'one form for each accented letter'


def test_the_cost_of_a_guess():
    n, r, p = access.SCRYPT.values()
    assert 128*n*r == 32*2**20 and p == 3


@pytest.mark.parametrize('bad', ['', 'a'*11, 'a'*40, 'abababababab', 'password1234', 'P@ssw0rd!P@ssw0rd!', '123456789012', 'qwertyuiop[]',
                                 'letmein-welcome', 'admin_admin_2026', 'x'*1001, 'annika loves tea', 'aet akinna 55'])
def test_bad_passwords(bad):
    with pytest.raises(ValueError, match='password'): check_password(bad, 'annika')


@pytest.mark.parametrize('good', [ADA, BOB, 'a long password', 'correct horse battery staple', 'пять синих китов', 'T9#kf82!mQzz',
                                  '五頭の青い鯨が歌っている海'])
def test_good_passwords(good): check_password(good, 'annika')


def test_passwords_are_hashed_anew_when_the_cost_rises(store, bob, monkeypatch):
    monkeypatch.setattr(access, 'SCRYPT', dict(n=32, r=8, p=1))
    log_in(store, 'bob', BOB)
    with store.read() as c: assert c.scalar(select(users.c.password).where(users.c.id == bob.id)).startswith('scrypt$32$8$1$')
    log_in(store, 'bob', BOB)


# ---- log-in

def test_log_in(store, bob):
    for typed in ('bob', ' BOB ', 'ｂｏｂ'): assert user_of_session(store, log_in(store, typed, BOB)) == bob
    token = log_in(store, 'bob', BOB)
    log_out(store, token)
    assert user_of_session(store, token) is None and store.check() == []
    for bad in (None, '', 'x', token[:-1], token + 'x', '\ud800', "' OR 1=1 --"): assert user_of_session(store, bad) is None
    log_out(store, 'x')


def test_session_fixation(store, bob):
    planted = log_in(store, 'bob', BOB)
    token = log_in(store, 'bob', BOB, old=planted)
    assert token != planted and user_of_session(store, planted) is None and user_of_session(store, token) == bob
    assert user_of_session(store, log_in(store, 'bob', BOB, old='never was one')) == bob


def test_forms_know_their_session(store, bob):
    one, two = log_in(store, 'bob', BOB), log_in(store, 'bob', BOB)
    assert csrf_matches(one, csrf_of(one)) and not csrf_matches(one, csrf_of(two))
    for bad in ('', None, one, '\ud800', csrf_of(one)[:-1]): assert not csrf_matches(one, bad)


def test_answers_say_nothing_about_who_exists(store, ada, bob, monkeypatch):
    "The same words and the same work, whether a name exists or not; times would be flaky, calls aren't"
    disable_user(store, ada, bob.id)
    create_user(store, ada, 'cem', 'nine quiet volcanoes')
    hashed, real = [], access._scrypt
    monkeypatch.setattr(access, '_scrypt', lambda *args: hashed.append(args[2:]) or real(*args))
    access._dummy()
    said = set()
    for name, password in (('cem', 'wrong'), ('nobody', 'wrong'), ('bob', BOB), ('bob', 'wrong'), ('no name at all:', 'wrong'), ('', '')):
        hashed.clear()
        with pytest.raises(PermissionError) as e: log_in(store, name, password)
        said.add(str(e.value))
        assert hashed == [tuple(access.SCRYPT.values())], name
    assert len(said) == 1


def test_tries_wait_longer_and_longer(store, bob, at):
    failed, hours = [], 0.
    while hours < 2:
        at(hours)
        try: log_in(store, 'bob', 'a wrong guess', '10.6.6.6')
        except TooManyTries as e:
            assert 0 < e.seconds <= 900
            with pytest.raises(TooManyTries): log_in(store, 'bob', BOB, '10.6.6.6')  # also the right password, from there
            assert user_of_session(store, log_in(store, 'bob', BOB, '10.6.6.7')) == bob
            hours += e.seconds/3600 + 1e-6
        except PermissionError: failed.append(hours)
    waits = [round((b - a)*3600) for a, b in zip(failed, failed[1:], strict=False)]
    assert waits[:14] == [0, 0, 0, 0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512] and set(waits[14:]) == {900}
    at(hours + 1)
    assert user_of_session(store, log_in(store, 'bob', BOB)) == bob
    for _ in range(5):
        with pytest.raises(PermissionError): log_in(store, 'bob', 'a wrong guess')
    with pytest.raises(TooManyTries): log_in(store, 'bob', BOB)
    with again(store).read() as c: assert c.scalar(select(func.count()).select_from(attempts)) == 4, 'a restart forgets nothing'


def test_successes_count_for_nothing(store, ada, bob, at):
    "However many log in from one address, also side by side, and whatever others there have typed"
    for i in range(60): assert log_in(store, *(('bob', BOB) if i%2 else ('ada', ADA)), '10.0.0.1')
    with store.read() as c: assert not c.scalar(select(func.sum(attempts.c['count'])))
    for i in range(15):
        with pytest.raises(PermissionError): log_in(store, f'name{i}', 'a wrong guess', '10.0.0.1')
        assert log_in(store, 'bob', BOB, '10.0.0.1')
    for i in range(5): # the successes between have not cleared the failures of the address
        with pytest.raises(PermissionError, match='wrong'): log_in(store, f'other{i}', 'a wrong guess', '10.0.0.1')
    with pytest.raises(TooManyTries): log_in(store, 'ada', ADA, '10.0.0.1')


def test_guesses_of_others_keep_nobody_out(store, ada, bob, at):
    "From elsewhere or from the same address, a hundred or more: bob's own browser is let in, and no other one with it"
    note = device_note(store, log_in(store, 'bob', BOB, '10.0.0.1'))
    for i in range(8):
        with pytest.raises(PermissionError): log_in(store, 'bob', f'a wrong guess {i}', '10.6.6.6')
    assert log_in(store, 'bob', BOB, '10.0.0.1') and log_in(store, 'bob', BOB, '10.0.0.2')
    failed, hours = 0, 0.
    while failed < 110: # of many addresses
        at(hours)
        try: log_in(store, 'bob', f'a wrong guess {failed}', f'10.6.{failed}.1')
        except TooManyTries as e: hours += e.seconds/3600 + 1e-6
        except PermissionError: failed += 1
    with pytest.raises(TooManyTries): log_in(store, 'bob', BOB, '10.0.0.1')
    other = device_note(store, log_in(store, 'ada', ADA))
    for wrong in ('', note[:-1] + 'x', other, '\ud800', '..', note.replace('.', '.9', 1), f'{bob.id}.{10**17}.{"0"*64}', 'x'*10**5):
        with pytest.raises(TooManyTries): log_in(store, 'bob', BOB, '10.0.0.1', device=wrong)
    assert user_of_session(store, log_in(store, 'bob', BOB, '10.6.6.6', device=note)) == bob
    for _ in range(5):
        with pytest.raises(PermissionError, match='wrong'): log_in(store, 'bob', 'a wrong guess', '10.0.0.3', device=note)
    with pytest.raises(TooManyTries): log_in(store, 'bob', BOB, '10.0.0.3', device=note)  # a stolen note has limits of its own


def test_a_note_ends(store, ada, bob, at):
    "With its time, with the password, and with the user"
    def known(device):
        try: log_in(store, 'bob', 'a wrong guess', '10.6.6.6', device=device)
        except TooManyTries: return False
        except PermissionError: return True
    note = device_note(store, log_in(store, 'bob', BOB))
    for _ in range(5):
        with pytest.raises(PermissionError): log_in(store, 'bob', 'a wrong guess', '10.6.6.6')
    assert known(note) and not known(None)
    at(NOTED/HOUR + .5)
    for _ in range(5):
        with pytest.raises(PermissionError): log_in(store, 'bob', 'a wrong guess', '10.6.6.6')
    assert not known(note)
    at(NOTED/HOUR + 1)
    note = device_note(store, log_in(store, 'bob', BOB))
    for _ in range(5): known(None)
    assert known(note) and not known(None)
    set_password(store, ada, bob.id, 'nine quiet volcanoes')
    assert not known(note)


def test_an_address_is_limited_over_all_names(store, bob, at):
    for i in range(20):
        with pytest.raises(PermissionError) as e: log_in(store, f'name{i}', 'a wrong guess', '10.6.6.6')
        assert not isinstance(e.value, TooManyTries)
    with pytest.raises(TooManyTries): log_in(store, 'bob', BOB, '10.6.6.6')
    note = device_note(store, log_in(store, 'bob', BOB, '10.0.0.1'))
    assert user_of_session(store, log_in(store, 'bob', BOB, '10.6.6.6', device=note)) == bob


def test_tries_side_by_side_all_count(store, bob, at):
    ended = []
    def guess(i):
        own = again(store)
        own.clock = store.clock
        try: log_in(own, 'bob', f'a wrong guess {i}')
        except TooManyTries: ended.append('wait')
        except PermissionError: ended.append('wrong')
    threads = [threading.Thread(target=guess, args=(i,)) for i in range(12)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(ended) == ['wait']*7 + ['wrong']*5


def test_the_count_of_tries_survives_a_clock_that_jumps_back(store, bob, at):
    for _ in range(5):
        with pytest.raises(PermissionError): log_in(store, 'bob', 'a wrong guess')
    with pytest.raises(TooManyTries): log_in(store, 'bob', BOB)
    other = again(store)  # a process that starts after the jump
    other.clock = lambda: store.now() - 10*365*DAY
    assert user_of_session(other, log_in(other, 'bob', BOB)) == bob, 'nobody waits for ten years'


# ---- sessions end

def test_sessions_end(store, bob, at):
    idle, busy = log_in(store, 'bob', BOB), log_in(store, 'bob', BOB)
    hours, step = 0., IDLE/HOUR - .01
    while hours + step < LIFETIME/HOUR:
        hours += step
        at(hours)
        assert user_of_session(store, busy) == bob
    assert user_of_session(store, idle) is None
    at(LIFETIME/HOUR - .001)
    assert user_of_session(store, busy) == bob
    at(LIFETIME/HOUR + .001)
    assert user_of_session(store, busy) is None
    at(LIFETIME/HOUR + .002)
    log_in(store, 'bob', BOB)
    with store.read() as c: assert c.scalar(select(func.count()).select_from(sessions)) == 1, 'ended sessions are deleted'


def test_sessions_and_clocks(store, bob, at):
    token = log_in(store, 'bob', BOB)
    at(-5)
    assert user_of_session(store, token) == bob
    other = again(store)
    other.clock = lambda: store.now() - 10*365*DAY
    assert user_of_session(other, token) is None, 'a session from the future would live for ten years'
    at(10**6)
    assert user_of_session(store, token) is None
    at(1)
    assert user_of_session(store, token) is None, 'the time of a process never goes back'


def test_a_session_is_noted_once_a_minute(store, bob, at):
    token = log_in(store, 'bob', BOB)
    def seen():
        user_of_session(store, token)
        with store.read() as c: return c.scalar(select(sessions.c.seen))
    first = seen()
    at(.9/60)
    assert seen() == first
    at(1.1/60)
    assert seen() == first + round(1.1*60*10**6)


# ---- changes of users

def test_disabling_ends_everything(store, ada, bob):
    token, key = log_in(store, 'bob', BOB), create_token(store, bob, 'key')
    disable_user(store, ada, bob.id)
    assert user_of_session(store, token) is None and user_of_token(store, key) is None
    with pytest.raises(PermissionError): log_in(store, 'bob', BOB)
    disable_user(store, ada, bob.id, False)
    assert user_of_session(store, token) is None and user_of_token(store, key) is None, 'what ended stays ended'
    assert user_of_session(store, log_in(store, 'bob', BOB)) == bob


def test_disabled_while_the_password_is_hashed(store, ada, bob, monkeypatch):
    real = access.password_matches
    monkeypatch.setattr(access, 'password_matches', lambda *args: disable_user(store, ada, bob.id) or real(*args))
    with pytest.raises(PermissionError): log_in(store, 'bob', BOB)
    with store.read() as c: assert c.scalar(select(func.count()).select_from(sessions)) == 0


def test_the_last_admin_stays(store, ada, bob):
    for act in (lambda: disable_user(store, ada, ada.id), lambda: set_role(store, ada, ada.id, 'developer'),
                lambda: disable_user(store, None, ada.id)):
        with pytest.raises(ValueError, match='last admin'): act()
    bob = set_role(store, ada, bob.id, 'admin')
    disable_user(store, bob, ada.id)
    for act in (lambda: disable_user(store, None, bob.id), lambda: set_role(store, None, bob.id, 'viewer')):
        with pytest.raises(ValueError, match='last admin'): act()


def test_two_admins_remove_each_other_at_once(store, ada, bob):
    bob = set_role(store, ada, bob.id, 'admin')
    def remove(by, id):
        try: disable_user(again(store), by, id)
        except ValueError: pass
    threads = [threading.Thread(target=remove, args=a) for a in ((ada, bob.id), (bob, ada.id))]
    for t in threads: t.start()
    for t in threads: t.join()
    assert [o.disabled for o in newest(store, users)].count(False) == 1


def test_set_password(store, ada, bob):
    token, new = log_in(store, 'bob', BOB), 'nine quiet volcanoes'
    for old in (None, '', 'wrong'):
        with pytest.raises(PermissionError, match='present'): set_password(store, bob, bob.id, new, old)
    with pytest.raises(ValueError): set_password(store, bob, bob.id, 'short', BOB)
    set_password(store, bob, bob.id, new, BOB)
    assert user_of_session(store, token) is None
    with pytest.raises(PermissionError): log_in(store, 'bob', BOB)
    log_in(store, 'bob', new)
    set_password(store, ada, bob.id, BOB)
    log_in(store, 'bob', BOB)


def test_guesses_at_the_present_password_are_limited(store, bob):
    for _ in range(5):
        with pytest.raises(PermissionError, match='present'): set_password(store, bob, bob.id, 'nine quiet volcanoes', 'wrong')
    with pytest.raises(TooManyTries): set_password(store, bob, bob.id, 'nine quiet volcanoes', BOB)


def test_bad_names(store, ada):
    for name in ('', ' ', 'a'*65, 'import:x', 'two words', 'new\nline', '<b>', "x'--", 'a\u202eb', 'ann\x00', '../x', '=cmd'):
        with pytest.raises(ValueError, match='user name'): create_user(store, ada, name, BOB)


def test_names_are_unique_whatever_their_case(store, bob):
    for name in ('Bob', 'BOB', ' bob', 'ｂｏｂ'):
        with pytest.raises(ValueError, match='already'): create_user(store, None, name, 'nine quiet volcanoes')
    assert create_user(store, None, 'Žofie', 'nine quiet volcanoes').name == 'žofie'


def test_who_may_change_users(store, ada, bob):
    for user in (bob, User(9, 'x', 'viewer')):
        for act in (lambda: create_user(store, user, 'eve', 'another long word'), lambda: set_role(store, user, user.id, 'admin'),  # noqa: B023
                    lambda: disable_user(store, user, ada.id), lambda: set_password(store, user, ada.id, 'another long word')):  # noqa: B023
            with pytest.raises(PermissionError, match='admin'): act()
    for act in (lambda: set_role(store, ada, 99, 'viewer'), lambda: disable_user(store, ada, 99),
                lambda: set_password(store, ada, 99, BOB)):
        with pytest.raises(KeyError, match='no user 99'): act()
    with pytest.raises(ValueError, match='no role'): set_role(store, ada, bob.id, 'emperor')
    with pytest.raises(ValueError, match='no role'): create_user(store, ada, 'eve', 'another long word', 'emperor')
    assert [[allowed(User(1, 'x', a), b) for b in USER_ROLES] for a in USER_ROLES] == [[j <= i for j in range(4)] for i in range(4)]
    assert not any(allowed(None, role) for role in USER_ROLES)


def test_users_come_in_pages(store, ada):
    for i in range(5): create_user(store, ada, f'user{i}', BOB)
    first = newest(store, users, limit=4)
    assert [o.name for o in first + newest(store, users, after=first[-1].id, limit=4)] == [*(f'user{4 - i}' for i in range(5)), 'ada']
    assert all(not hasattr(o, 'password') for o in first)


# ---- tokens

def test_tokens(store, ada, bob, at):
    lasting, short = create_token(store, bob, 'a', bob.role), create_token(store, bob, 'b', bob.role, 2)
    least = create_token(store, bob, 'c')
    assert all(o.startswith('dnb_') and len(o) > 40 for o in (lasting, short, least)) and len({lasting, short, least}) == 3
    assert [user_of_token(store, o) for o in (lasting, short, least)] == [bob, bob, bob._replace(role='viewer')]
    for bad in (None, '', 'dnb_', lasting[:-1], lasting[4:], '\ud800'): assert user_of_token(store, bad) is None
    for wrong in (dict(role='admin'), dict(role='emperor'), dict(days=0), dict(days=-1), dict(days=float('nan')), dict(days=10**9),
                  dict(name=''), dict(name='x'*101), dict(name='a\x00b')):
        with pytest.raises((ValueError, PermissionError)): create_token(store, bob, **dict(name='x') | wrong)
    at(49)
    assert user_of_token(store, short) is None and user_of_token(store, lasting) == bob
    set_role(store, ada, bob.id, 'annotator')
    assert [user_of_token(store, o).role for o in (lasting, least)] == ['annotator', 'viewer'], 'never more than its user'
    assert all(not hasattr(o, 'digest') for o in newest(store, tokens))


def test_tokens_are_revoked_by_their_user_or_an_admin(store, ada, bob):
    cem = create_user(store, ada, 'cem', 'nine quiet volcanoes', 'developer')
    keys = [create_token(store, bob, str(i)) for i in range(3)]
    mine = tokens.c.user_id == bob.id
    ids = [o.id for o in newest(store, tokens, mine)]
    for by, id in ((cem, ids[0]), (bob, 99)):
        with pytest.raises(KeyError, match='no token'): revoke_token(store, by, id)
    for by, id in zip((bob, ada, None), ids, strict=True): revoke_token(store, by, id)
    assert [user_of_token(store, o) for o in keys] == [None]*3 and newest(store, tokens, tokens.c.user_id == cem.id) == []
    ended = [o.revoked for o in newest(store, tokens, mine)]
    revoke_token(store, bob, ids[0])
    assert [o.revoked for o in newest(store, tokens, mine)] == ended and all(ended)


# ---- what the database and the log know

def test_nothing_secret_is_stored(store, ada, bob):
    session, key = log_in(store, 'bob', BOB, '10.0.0.1'), create_token(store, bob, 'key')
    with pytest.raises(PermissionError): log_in(store, 'bob', 'a wrong guess')
    log_out(store, log_in(store, 'bob', BOB))
    secrets = [session, key, key[4:], ADA, BOB, 'a wrong guess']
    with store.read() as c:
        for t in metadata.sorted_tables:
            for row in c.execute(select(t)): assert not any(s in repr(row) for s in secrets), t.name
    for path in Path(store.folder).rglob('*'):
        if path.is_file(): assert not any(s.encode() in path.read_bytes() for s in secrets), path


def test_the_code_of_the_first_admin_is_not_stored(store):
    code = setup_code(store)
    with store.read() as c: assert code not in repr(c.execute(select(metadata.tables['settings'])).all())


def test_the_log_knows_who_did_what(store, ada, bob):
    token = log_in(store, 'bob', BOB)
    set_role(store, ada, bob.id, 'viewer')
    create_token(store, bob._replace(role='viewer'), 'x')
    revoke_token(store, ada, 1)
    with pytest.raises(PermissionError): log_in(store, 'bob', 'a wrong guess')
    set_password(store, ada, bob.id, 'nine quiet volcanoes')
    log_out(store, token)
    log_out(store, log_in(store, 'bob', 'nine quiet volcanoes'))
    disable_user(store, ada, bob.id)
    assert actions(store) == ['create user', 'create user', 'log in', 'set role', 'create token', 'revoke token', 'refuse log-in',
                              'set password', 'log in', 'log out', 'disable user']
    with store.read() as c: assert set(c.scalars(select(audits.c.user_id))) == {None, ada.id, bob.id}
    assert store.check() == []


def test_hostile_words_stay_words(store, ada):
    "Names and passwords are values of a statement, never a part of it"
    for bad in ("x' OR '1'='1", 'x"; DROP TABLE users; --', '%', '_', '\\', '\x00', 'ada\x00', '\ud800'):
        with pytest.raises(PermissionError): log_in(store, bad, bad, address='10.0.0.' + str(random.randrange(256)))
    assert newest(store, users)[-1].name == 'ada'
    with store.write() as c: c.execute(update(users).values(disabled=False))

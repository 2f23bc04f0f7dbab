"Users, sessions and tokens of the platform, over SQLite and Postgres."
import pytest
from platform_fixtures import postgres, postgres_url, store  # noqa: F401

from deepseek_nb.platform.access import create_user, first_admin, log_in, log_out, setup_code, user_of_session


@pytest.fixture
def ada(store): return first_admin(store, setup_code(store), 'ada', 'four blue whales sing')


def test_log_in(store, ada):
    bob = create_user(store, ada, 'Bob', 'seven green kettles', 'annotator')
    token = log_in(store, 'bob ', 'seven green kettles')
    assert user_of_session(store, token) == bob
    log_out(store, token)
    assert user_of_session(store, token) is None and store.check() == []

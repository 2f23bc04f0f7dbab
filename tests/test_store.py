"What the platform's store promises, over SQLite and Postgres."
import pytest
from platform_fixtures import again, postgres, postgres_url, store  # noqa: F401
from sqlalchemy import insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from deepseek_nb.platform.audit import audit, head_of
from deepseek_nb.platform.store import datasets, faults, records


def add(c, name): return c.execute(insert(datasets).values(name=name, kind='chat', created=0)).inserted_primary_key[0]
def names(c): return list(c.scalars(select(datasets.c.name).order_by(datasets.c.id)))


def test_transactions(store):
    with store.write() as c: first = add(c, 'a')
    with pytest.raises(ZeroDivisionError), store.write() as c: add(c, 'b'), 1/0
    with store.read() as c:
        assert names(c) == ['a']
        with store.write() as w: assert add(w, 'c') > first
        assert names(c) == ['a'], 'a reader keeps its snapshot'
    with again(store).read() as c: assert names(c) == ['a', 'c']
    with pytest.raises(DBAPIError, match='readonly|read-only'), store.read() as c: add(c, 'd')
    with pytest.raises(IntegrityError), store.write() as c:
        c.execute(insert(records).values(dataset_id=99, digest='', data={}, split='train', created=0))
    with pytest.raises(IntegrityError), store.write() as c: add(c, 'a')
    assert faults(store) == []


def test_audit_chain(store):
    for i in range(3):
        with store.write() as c: audit(c, None, 'make', f'thing:{i}', n=i, ratio=.1 + .2, words=['ü', '\ud800'])
    assert store.check() == [] and head_of(store).id == 3

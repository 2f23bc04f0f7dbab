"Datasets of the platform: versions by content, fixed splits, hostile files, over both databases."
import csv
import gzip
import io
import json
import random
import re
import tracemalloc
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from platform_fixtures import postgres, postgres_url, store  # noqa: F401
from sqlalchemy import func, select, text

from deepseek_nb.files.untrusted import RowLimits, check_value, csv_text, safe_cell, untrusted_rows
from deepseek_nb.platform import datasets
from deepseek_nb.platform.datasets import (
    SPLITS,
    import_dataset,
    import_rows,
    iter_rows,
    list_datasets,
    page_of_rows,
    row_digest,
    search_rows,
    version_report,
)
from deepseek_nb.platform.store import newest, open_store, records, version_rows, versions
from deepseek_nb.train.corpora import band_keys, folded, jaccard, minhash, near_groups, shingle_set


def texts(draw, n):
    "Random texts without near-duplicates: 30 words of 2,000"
    return [' '.join(f'{draw.randrange(2000)*7919 % 100003:05}' for _ in range(30)) for _ in range(n)]


@pytest.fixture
def draw():
    seed = random.SystemRandom().randrange(2**32)
    print('seed', seed)
    return random.Random(seed)


def test_versions_and_splits(store, draw):  # noqa: F811
    "The same rows are the same version, in any order; a record keeps its split; near-duplicates share one; records are shared"
    rows = [dict(text=t, label=draw.choice('ab')) for t in texts(draw, 120)]
    first = import_rows(store, None, 'one', rows)
    old = {r.digest: r.split for r in iter_rows(store, first.version)}
    draw.shuffle(rows)
    assert import_rows(store, None, 'one', rows + rows[:3])[:2] == (first.version, False)
    assert len(newest(store, versions, versions.c.dataset_id == 1)) == 1
    copies = [dict(text=r['text'].upper() + ' !', label='c') for r in rows[:40]]
    more = import_rows(store, None, 'one', rows[:100] + copies + [dict(text=t) for t in texts(draw, 30)])
    new = {r.digest: r for r in iter_rows(store, more.version)}
    assert all(new[d].split == s for d, s in old.items() if d in new)
    assert all(new[row_digest(c)].split == old[row_digest(r)] for c, r in zip(copies, rows[:40], strict=True))
    assert more.report['leaks'] == {k: dict(rows=0, examples=[]) for k in ('exact', 'near')} and more.report['near'] == 80
    with store.read() as c:
        assert c.scalar(select(func.count()).select_from(records)) == 120 + 40 + 30
        assert c.scalar(select(func.count()).select_from(version_rows)) == 120 + 170
    assert [v.number for v in newest(store, versions, versions.c.dataset_id == 1)] == [2, 1]
    assert version_report(store, more.version)['parent_id'] == first.version
    assert [(d.name, d.number, d.rows) for d in list_datasets(store)] == [('one', 2, 170)]
    assert store.check() == []


def test_order_of_rows_plays_no_part(store, draw):  # noqa: F811
    rows = [dict(text=t) for t in texts(draw, 60)]
    rows += [dict(text=r['text'] + '.') for r in rows[:30]]
    one = {r.digest: r.split for r in iter_rows(store, import_rows(store, None, 'x', rows).version)}
    with store.write() as c: [c.execute(t.delete()) for t in (version_rows, versions, records)]
    draw.shuffle(rows)
    assert {r.digest: r.split for r in iter_rows(store, import_rows(store, None, 'x', rows).version)} == one


def low(text): return ''.join(c.lower() if c.isascii() else c for c in text)


def test_pages_of_rows(store, draw, monkeypatch):  # noqa: F811
    "Pages by key, with filters, join to what a loop over all rows finds, whatever range of ids a search begins with"
    ranges = draw.randrange(1, 9)
    monkeypatch.setattr(datasets, '_windows', partial(datasets._windows, size=ranges))
    words = ['100%', 'a_b', 'back\\slash', '"quoted"', 'Äpfel', 'line\nend', 'other']
    rows = [dict(text=f'{t} {draw.choice(words)}') for t in texts(draw, 90)]
    version = import_rows(store, None, 'x', rows).version
    every = [*iter_rows(store, version)]
    assert len(every) == 90 and [r.id for r in every] == sorted(r.id for r in every)
    for split in (None, *SPLITS):
        for contains in (None, *words[:6], 'OTHER', 'A_b', 'äpfel', '%', 'zzz'):
            found, after, most = [], 0, draw.randrange(1, 40)
            while after is not None:
                if contains: part, after = search_rows(store, version, contains, after, 7, split, most)
                else: after = part[-1].id if (part := page_of_rows(store, version, after, 7, split)) else None
                found += part
            held = low(contains or '')
            assert found == [r for r in every if split in (None, r.split) and held in low(r.data['text'])], (split, contains)
    assert [r for s in SPLITS for r in iter_rows(store, version, s)].__len__() == 90


def test_postgres_knows_how_many_rows_there_are(postgres_url, tmp_path, draw):  # noqa: F811
    "An import asks for statistics, without which its own look-ups would read the whole table for each thousand rows"
    with closing(open_store(postgres_url, folder=tmp_path/'store', durable=False)) as store:  # noqa: F811
        import_rows(store, None, 'x', (dict(text=f'{i} {draw.random()}') for i in range(2500)))
        counted = text("SELECT relname, reltuples FROM pg_class WHERE relname IN ('records', 'version_rows')")
        with store.read() as c: assert dict(c.execute(counted).all()) == dict(records=2500, version_rows=2500)


def test_given_splits_and_leaks(store):  # noqa: F811
    rows = [dict(text='the first text of this set', part='train'), dict(text='The first  text of this set', part='test'),
            dict(text='another text, which is long enough to be compared', part='training'),
            dict(text='another text, which is long enough to be compared!', part='validation')]
    report = version_report(store, import_dataset(store, None, 'x', rows, split='part'))
    assert report['splits'] == dict(train=2, test=1, dev=1)
    assert (report['leaks']['exact']['rows'], report['leaks']['near']['rows']) == (1, 1)
    with pytest.raises(ValueError, match='row 1: its split must be one of'):
        import_dataset(store, None, 'y', [dict(text='a', s='?')], split='s')
    assert len(list_datasets(store)) == 1  # a file with an error leaves nothing behind


def test_a_bad_last_row_leaves_nothing(store, tmp_path):  # noqa: F811
    (tmp_path/'x.jsonl').write_text(json.dumps(dict(text='good'))*1 + '\n' + '{"text": 1}\n')
    with pytest.raises(ValueError, match='row 2: text must be text'): import_dataset(store, None, 'x', tmp_path/'x.jsonl')
    with store.read() as c: assert not c.scalar(select(func.count()).select_from(records))
    assert not list_datasets(store)


def test_memory_of_an_import_is_bounded(store, tmp_path, draw):  # noqa: F811
    "Long texts stay on the disk: a file of 12 MB in 1,200 rows adds less than half of its size"
    with open(tmp_path/'x.jsonl', 'w') as f:
        for t in texts(draw, 1200): f.write(json.dumps(dict(text=t + ' ' + t[:5]*2000)) + '\n')
    tracemalloc.start()
    rows = sum(1 for _ in untrusted_rows(tmp_path/'x.jsonl'))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == 1200 and peak < 2**20


# ---- files

@pytest.mark.parametrize('name, data, said', [
    ('x.csv', b'', 'empty'), ('x.csv', b'a,a\n1,2\n', 'twice'), ('x.csv', b'a,\n1,2\n', 'column 2 has no name'),
    ('x.csv', b'a,b\n1\n', 'line 2'),
    ('x.csv', b'a\n"open', 'no rows|no CSV'), ('x.csv', b'a\n"' + b'x'*200000, 'no CSV'), ('x.csv', b'a\n\xe4\n', 'not UTF-8'),
    ('x.csv', 'a\nä\n'.encode('utf-16'), 'UTF-16'), ('x.csv', b'a\nx\0\n', 'NUL'), ('x.csv', b'PK\x03\x04xx', 'zip'),
    ('x.csv', b','.join(b'%d' % i for i in range(300)), '300 columns'), ('x.jsonl', b'{"a": 1}\n[1]\n', 'line 2: it is no object'),
    ('x.jsonl', b'{"a": "' + b'x'*2**21 + b'"}', 'longer than'), ('x.jsonl', b'{"a": ' + b'['*50000 + b']'*50000 + b'}', 'nested'),
    ('x.jsonl', b'{"a": Infinity}', 'Infinity'), ('x.jsonl', br'{"a": "\u0000"}', 'NUL'),
    ('x.jsonl', br'{"a": "\udfff"}', 'half a character'),
    ('x.jsonl', b'{"a": 1, "a": 2}', 'twice'), ('x.json', b'[1', 'no JSON'), ('x.json', b'[[1]]', 'no object'),
    ('x.json', b'['*9999, 'JSON'),
    ('x.jsonl.gz', gzip.compress(b'x'*2**22), 'longer than'), ('x.jsonl.gz', b'\x1f\x8bxx', 'gzip'),
    ('x.parquet', b'PAR1' + b'\xff'*99 + b'PAR1', 'Parquet'),
    ('x.exe', b'MZ', 'files end in'), ('x.jsonl', b'', 'no rows')])
def test_hostile_files_end_with_one_line(name, data, said):
    with pytest.raises(ValueError, match=said) as e: [*untrusted_rows(io.BytesIO(data), name)]
    assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_bombs(tmp_path):
    "What unpacks to more than is allowed is noticed on the way, and Parquet's memory is that of another process"
    import pyarrow as pa
    import pyarrow.parquet as pq
    with pytest.raises(ValueError, match='unpacks to more'):
        [*untrusted_rows(io.BytesIO(gzip.compress(b'{"a": 1}\n'*10**5)), 'x.jsonl.gz', limits=RowLimits(size=10**5))]
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(2**14, np.int32)), pa.array(['x'*2**18]))
    pq.write_table(pa.table(dict(text=many)), tmp_path/'many.parquet')
    pq.write_table(pa.table(dict(text=[['x'*2**20]*150])), tmp_path/'one.parquet')
    assert (tmp_path/'many.parquet').stat().st_size < 2**16
    with pytest.raises(ValueError, match='unpacks to more than'): [*untrusted_rows(tmp_path/'many.parquet', limits=RowLimits(size=2**22))]
    with pytest.raises(ValueError, match='memory'): [*untrusted_rows(tmp_path/'one.parquet', limits=RowLimits(memory=2**29))]
    pq.write_table(pa.table(dict(text=['ä', None], n=[1., float('nan')])), tmp_path/'good.parquet')
    with open(tmp_path/'good.parquet', 'rb') as f:
        assert [*untrusted_rows(f, 'x.parquet')] == [dict(text='ä', n=1.), dict(text=None, n=None)]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(['x.csv', 'x.jsonl', 'x.json']))
def test_any_bytes_give_rows_or_one_line(data, name):
    try: rows = [*untrusted_rows(io.BytesIO(data), name)]
    except ValueError as e: assert '\n' not in str(e)
    else:
        for r in rows: check_value(r)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_no_cell_is_a_formula(text):
    "Whatever stands in front: after white space, no cell that is written begins like a formula"
    line = ''.join(csv_text([dict(a=text)], ['a'])).split('\r\n', 1)[1]
    cell = next(csv.reader(io.StringIO(line, newline='')), [''])
    assert (''.join(cell).lstrip(' \n')[:1] or 'x') not in '=+-@\t\r＝＋－＠'
    for part in re.split('[;\t\r\n]', line)[1:]: assert (part.lstrip(' ')[:1] or 'x') not in '=+-@＝＋－＠'  # where semicolons separate
    assert safe_cell(text).replace("'", '') == text.replace("'", '')


# ---- near-duplicates

def test_groups_equal_a_comparison_of_all_pairs(draw):
    "A pair of similarity 0.9 is missed with a probability of (1 - 0.9**4)**16 < 1e-7"
    lot = texts(draw, 80)
    lot += [t[:60] + 'changed' + t[67:] for t in lot[:25]] + [t.upper() for t in lot[:10]]
    sets = [shingle_set(t) for t in lot]
    close = {(i, j) for i in range(len(lot)) for j in range(i) if jaccard(sets[i], sets[j]) >= .8}
    assert len(close) > 25 and all(jaccard(sets[i], sets[j]) > .85 for i, j in close)
    found = near_groups(band_keys(minhash(lot)), lambda numbers: [lot[i] for i in numbers])
    assert {(i, j) for i in range(len(lot)) for j in range(i) if found[i] == found[j]} == close


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), min_size=1, max_size=6))
def test_signatures_depend_on_the_text_alone(lot):
    together = minhash(lot)
    assert (together == np.concatenate([minhash([t]) for t in lot])).all()
    for i, a in enumerate(lot):
        for j, b in enumerate(lot): assert not folded(a) == folded(b) or (together[i] == together[j]).all()

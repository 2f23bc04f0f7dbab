"Applications behind one command: options, files, rows, errors and the server with its keys"
import gzip
import json

import pytest

from deepseek_nb.apps import command
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
    for argv, said in [(('fly',), "there is no application 'fly'"), (('counter', 'fly'), 'there are train, score, serve, card'),
                       (('counter', 'score', 'none.csv'), 'none.csv: no such file'), (('counter', 'train', tmp_path), 'name it with --out'),
                       (('counter', 'train', tmp_path, '--out', 'x', '--options', 'size=3'), 'there are times'),
                       (('counter', 'train', tmp_path, '--out', 'x', '--options', 'times'), 'NAME=VALUE')]:
        code, _, err = shell(capsys, *argv)
        assert code == 2 and said in err and err.count('\n') == 1
    assert shell(capsys, 'counter', 'train', tmp_path, '--out', 'x', '--options', 'times=3')[1] == f'{tmp_path} x 3\n'
    assert shell(capsys, 'counter', 'card', '--weights', 'w')[1] == '# Counter w\n' and 'counter' in shell(capsys)[1]


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
        assert post([1]).status_code == 400 and post(None, content='{').status_code == 400 and post(dict(n=[1]*99)).status_code == 413
        assert post(dict(n=1), 'fly').status_code == 404 and post(dict(n=13)).status_code == 500
        assert post(dict(n=1), headers=dict(authorization='Bearer no')).status_code == 401
        assert post(dict(n=4)).json() == dict(total=7), 'no error changed the state'
        assert c.get('/v1/apps').json()['data'] == [dict(id='counter', object='app')] and c.get('/v1/apps/counter').text == '# Counter'
        assert c.get('/v1/apps', headers=dict(authorization='')).status_code == 401
        assert c.get('/health', headers=dict(authorization='')).status_code == 200
        assert c.get('/v1/chat').json()['error']['message'].startswith('GET /v1/chat is no route') and not server.running['ann']
        server.draining = True
        assert post(dict(n=1)).status_code == 503 and json.loads(c.get('/ready').text) == dict(status='draining')

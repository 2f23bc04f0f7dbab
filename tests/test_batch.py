"Batches: a run that is killed at any moment leaves one answer a line, and a node that dies takes none with it."
import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from deepseek_nb.infer.generate import stream_text
from deepseek_nb.tools import cli, serving
from deepseek_nb.tools.serving import run_batch


def ask(path, n, **more):
    path.write_text(''.join(json.dumps(dict(prompt=f'{i} and', max_tokens=4, temperature=0) | more) + '\n' for i in range(1, n + 1)))
    return path


def ids(path): return sorted(int(json.loads(line)['custom_id']) for line in path.read_text().splitlines())


class Scripted:
    "A worker without a model"
    def __init__(self, *_): pass
    async def ready(self): pass
    async def answer(self, line):
        await asyncio.sleep(random.random()/100)
        row = dict(id=f'batch_req_{line[1]}', custom_id=str(line[1]), response=dict(status_code=200, body='é'*random.randrange(2000)))
        return json.dumps(row, ensure_ascii=False, separators=(',', ':')).encode() + b'\n'


def test_a_run_that_is_killed_writes_every_line_once(tmp_path, monkeypatch):
    "SIGKILL at 20 random moments, and a last line that is torn at a random byte"
    print('seed', seed := time.time_ns())
    random.seed(seed)
    # The lock of progress bars is shared with children, and one that is killed while it holds it keeps it for ever
    monkeypatch.setattr(serving.tqdm, '_lock', threading.RLock(), raising=False)
    monkeypatch.setattr(serving, 'local_worker', contextmanager(lambda *a: iter([[((w := Scripted()).ready, w.answer)]])))
    source, out, kills = ask(tmp_path/'in.jsonl', 150), tmp_path/'out.jsonl', 0
    for _ in range(20):
        if not (pid := os.fork()):
            try: asyncio.run(run_batch(source, out, 'mini', max_rows=2))
            finally: os._exit(0)
        time.sleep(random.uniform(.005, .02))
        os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
        if out.exists() and random.random() < .5: os.truncate(out, max(0, out.stat().st_size - random.randrange(3000)))
    asyncio.run(run_batch(source, out, 'mini', max_rows=2))
    assert kills > 10 and ids(out) == [*range(1, 151)]


def test_the_command_answers_as_the_model_does(tmp_path, capsys):
    source, out = ask(tmp_path/'in.jsonl', 5), tmp_path/'out.jsonl'
    with open(source, 'a') as f: f.write('{"custom_id": "bad", "url": "/v1/chat/completions", "body": {"messages": []}}\n')
    command = ['batch', source, out, '--model', 'mini', '--memory', '64', '--max-rows', '4']
    assert cli.main([*map(str, command)]) == 0 and 'answers in' in capsys.readouterr().out
    found = {r['custom_id']: r['response'] for r in map(json.loads, out.read_text().splitlines())}
    model, tok = cli._load('mini', None, None)
    for i in range(1, 6):
        text = ''.join(stream_text(model, tok, tok.encode(f'{i} and'), max_new_tokens=4))
        assert found[str(i)]['body']['choices'][0]['text'] == text
    assert (found['bad']['status_code'], found['bad']['body']['error']['param']) == (400, 'messages') and len(found) == 6
    assert cli.main([*map(str, command)]) == 0 and '0 answers in' in capsys.readouterr().out


@pytest.mark.parametrize('text,said', [
    ('nothing', 'in.jsonl, line 1: '), ('{"text": "a"}', 'line 1: url is None'), ('[]', 'line 1: a line must be a JSON object'),
    ('{"prompt": "a"}\n{"custom_id": "1", "prompt": "b"}', "line 2: custom_id '1' is that of line 1"),
    ('{"custom_id": 1, "prompt": "b"}', 'line 1: custom_id is 1'), ('{"url": "/v1/completions", "body": 1}', 'body must be'),
    ('{"model": "other", "prompt": "b"}', "model is 'other', and 'mini' answers")])
def test_one_line_for_what_is_wrong(text, said, tmp_path, capsys):
    "And nothing is written"
    (source := tmp_path/'in.jsonl').write_text(text)
    assert cli.main(['batch', str(source), str(tmp_path/'out.jsonl'), '--model', 'mini']) == 2
    assert said in (err := capsys.readouterr().err) and err.count('\n') == 1 and not (tmp_path/'out.jsonl').exists()


def test_another_file_is_not_harmed(tmp_path, capsys):
    source, out = ask(tmp_path/'in.jsonl', 2), tmp_path/'notes.txt'
    other, twice = '{"id":"batch_req_1","custom_id":"7"}\n', '{"id":"batch_req_1","custom_id":"1"}\n'*2
    for text in ('My notes', 'My notes\n', '{"id": "x"}\n', other, twice):
        out.write_text(text)
        assert cli.main(['batch', str(source), str(out), '--model', 'mini']) == 2 and 'name another file' in capsys.readouterr().err
        assert out.read_text() == text


def test_a_cluster_needs_an_extra(tmp_path, capsys, monkeypatch):
    "And a batch on this machine does not: the test above ran without it, where it is not installed"
    ask(tmp_path/'in.jsonl', 1)
    monkeypatch.setitem(sys.modules, 'ray', None)
    batch = ['batch', str(tmp_path/'in.jsonl'), str(tmp_path/'out.jsonl'), '--model', 'mini', '--on', 'ray']
    (tmp_path/'run.toml').write_text('')
    for command in (batch, ['finetune', str(tmp_path/'run.toml'), '--on', 'ray'], ['evidence', 'balancing', '--smoke', '--on', 'ray']):
        assert cli.main(command) == 2 and "pip install 'deepseek-nb[ray]'" in capsys.readouterr().err
    assert not (tmp_path/'out.jsonl').exists()


@pytest.fixture(scope='module')
def cluster():
    "Two nodes of one core, beside a head that computes nothing"
    pytest.importorskip('ray')
    from ray.cluster_utils import Cluster
    os.environ |= dict(RAY_DEDUP_LOGS='0', RAY_USAGE_STATS_ENABLED='0')
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, include_dashboard=False))
    yield cluster
    sys.modules['ray'].shutdown()
    cluster.shutdown()


def test_a_node_that_dies_takes_no_line_with_it(cluster, tmp_path):
    source, out = ask(tmp_path/'in.jsonl', 60, max_tokens=40), tmp_path/'out.jsonl'
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    async def run():
        task = asyncio.create_task(run_batch(source, out, 'mini', cluster.address, memory=64, max_rows=4))
        while not task.done() and len(out.read_text().splitlines() if out.exists() else ()) < 10: await asyncio.sleep(.02)
        await asyncio.to_thread(cluster.remove_node, nodes[0], False)
        lines = len(out.read_text().splitlines())
        return lines, await task
    lines, found = asyncio.run(run())
    assert lines < 60 and found == {200: 60} and ids(out) == [*range(1, 61)]


RUN = """
[model]
name = "mini"
dtype = "float32"
[data]
source = "texts.jsonl"
length = 32
[training]
output_dir = "run"
max_steps = 12
per_device_train_batch_size = 2
save_steps = 2
"""


def test_a_run_continues_on_another_node(cluster, tmp_path, monkeypatch, capfd):
    "The node that trains is killed after the first checkpoint, when there is a second"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'texts.jsonl').write_text(''.join(json.dumps(dict(text=f'{i} and {i + 1} make {2*i + 1}.')) + '\n' for i in range(200)))
    (tmp_path/'run.toml').write_text(RUN)
    for node in [*cluster.worker_nodes]: cluster.remove_node(node, False)
    first, found = cluster.add_node(num_cpus=1), []
    thread = threading.Thread(target=lambda: found.append(cli.main(['finetune', 'run.toml', '--on', cluster.address])))
    thread.start()
    while thread.is_alive() and not (tmp_path/'run'/'checkpoint-2').exists(): time.sleep(.01)
    assert thread.is_alive() and not (tmp_path/'run'/'checkpoint-12').exists()
    cluster.add_node(num_cpus=1)
    cluster.remove_node(first, False)
    thread.join()
    said = capfd.readouterr().out
    assert found == [0] and 'continued after step' in said and (tmp_path/'run'/'model'/'model.safetensors').exists(), said


def test_what_fails_on_a_node_is_one_line(cluster, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'run.toml').write_text('[model]\nname = "mini"\n[data]\nsource = "sotu"')
    assert cli.main(['finetune', 'run.toml', '--on', cluster.address]) == 2
    assert (err := capsys.readouterr().err).startswith('deepseek-nb: run.toml: training is missing') and err.count('\n') == 1

"The walks of CONTRIBUTING.md are what a profiler sees: each place is entered, in the order of the page."
import asyncio
import json
import re
import sys
import threading
from pathlib import Path

import torch

from deepseek_nb import Model, Tokenizer
from deepseek_nb.core.config import Config
from deepseek_nb.core.dispatch import use

PAGE = (Path(__file__).parents[1]/'CONTRIBUTING.md').read_text()


class Trace:
    "The first call of each function of the package, in all threads that start within"
    def __enter__(self):
        self.seen = {}
        threading.setprofile(self.note)
        sys.setprofile(self.note)
        return self

    def note(self, frame, event, arg):
        name = frame.f_globals.get('__name__', '')
        if event == 'call' and name.startswith('deepseek_nb.'):
            self.seen.setdefault((name.removeprefix('deepseek_nb.'), frame.f_code.co_qualname), len(self.seen))

    def __exit__(self, *error):
        sys.setprofile(None)
        threading.setprofile(None)


def section(title): return PAGE.split(f'### {title}\n')[1].split('\n## ')[0].split('\n### ')[0]


def entered(trace, room, text):
    "When the first function of a line of the page that was called in its room was called"
    names = re.findall(r'`([\w.]+)`', text)
    return next((trace.seen[room, n] for n in names if (room, n) in trace.seen), None)


def steps(title): return [m[1] for m in re.finditer(r'^\d+\. (.*(?:\n   .*)*)', section(title), re.M)]


def in_order(trace, lines, rooms):
    found = [entered(trace, room, line) for room, line in zip(rooms, lines, strict=True)]
    assert None not in found, [(r, o) for r, o, at in zip(rooms, lines, found, strict=True) if at is None]
    assert found == sorted(found), [*zip(rooms, found, strict=True)]


def room_of(line): return next(n for n in re.findall(r'`([^`]+)`', line) if re.fullmatch(r'[a-z]+\.[a-z_]+', n))


def test_token_ids_to_logits():
    mix = Config('deepseek_v3', vocab_size=64, dim=16, n_layers=2, n_heads=2, inter_dim=32, kv_lora_rank=8, qk_nope_head_dim=8,
                 qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=0, n_routed_experts=4, n_activated_experts=2, moe_inter_dim=8,
                 max_positions=32)
    model = Model(mix, dtype=torch.float32, device='cpu').init_weights(.2)
    with use('reference'), torch.no_grad(), Trace() as trace: model(torch.ones(1, 3, dtype=torch.long), model.new_cache(1))
    lines = steps('Token ids to logits')
    assert len(lines) <= 8
    in_order(trace, lines, [*map(room_of, lines)])


def test_a_batch_to_an_optimiser_step(tmp_path):
    from deepseek_nb.train.data import example, pack
    from deepseek_nb.train.trainer import Trainer, TrainingArguments
    plain = Config('llama', vocab_size=64, dim=16, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=8, inter_dim=32, max_positions=32)
    model = Model(plain, dtype=torch.float32, device='cpu').init_weights(.2)
    with Trace() as trace:
        packed = pack([example([*range(1, 20)]), example([*range(5, 30)])], 16)
        rows = [{k: v[i].tolist() for k, v in packed.items()} for i in range(len(packed['tokens']))]
        Trainer(model, TrainingArguments(tmp_path, max_steps=1, per_device_train_batch_size=1), rows).train()
    rooms = [room_of(line) for line in steps('A batch to an optimiser step')]
    first = {room: min(at for (r, _), at in trace.seen.items() if r == room) for room in rooms if any(r == room for r, _ in trace.seen)}
    assert len(rooms) <= 8 and {*rooms} - {*first} <= {'kernels.train'}, first # twins run where they compile


def request(app, body):
    "One request of an ASGI application; returns the bytes of its answer"
    raw, sent, out = json.dumps(body).encode(), [], []
    scope = dict(type='http', asgi=dict(version='3.0'), http_version='1.1', method='POST', path='/v1/chat/completions', raw_path=b'',
                 query_string=b'', root_path='', scheme='http', client=None, server=None,
                 headers=[(b'host', b'localhost'), (b'content-type', b'application/json')])
    async def receive():
        if not sent: return sent.append(1) or dict(type='http.request', body=raw, more_body=False)
        await asyncio.sleep(60)
    async def send(message): out.append(message.get('body', b''))
    asyncio.run(app(scope, receive, send))
    return b''.join(out)


def test_a_request_to_its_first_token():
    from deepseek_nb.infer.engine import Engine
    from deepseek_nb.serve.app import Server
    from deepseek_nb.serve.chat import ServedModel
    tok = Tokenizer.from_pretrained('mini')
    with use('reference'), Trace() as trace:
        engine = Engine(Model.from_pretrained('mini'), tok, nbytes=2**24)
        app = Server([ServedModel('mini', engine, tok)]).app()
        trace.seen.clear()
        engine.start()
        said = request(app, dict(model='mini', messages=[dict(role='user', content='Hi')], max_tokens=2, stream=True, temperature=0))
        engine.close()
    assert said.endswith(b'data: [DONE]\n\n'), said
    lines = [o for o in section('HTTP request to first token').splitlines() if re.match(r'\| \d', o)]
    rows = [[*map(str.strip, o.strip('|').split('|'))] for o in lines]
    assert len(rows) <= 12
    in_order(trace, [row[2] for row in rows], [row[1].strip('`') for row in rows])

"""Stored answers: exact, compact, whole or absent, and never of another teacher; texts that a teacher writes

Fresh random inputs; the seed is printed, SEED=n repeats a run.
"""
import json
import os
import random
import signal
import time

import pytest
import torch
import warm
from torch.autograd import gradcheck

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.files.safetensors import read_json
from deepseek_nb.train import distill_stages as module
from deepseek_nb.train.data import IGNORE, Batches, collate, example, pack
from deepseek_nb.train.distill import DIVERGENCES, distillation_loss, divergence
from deepseek_nb.train.distill_stages import (
    TeacherLogits,
    answers,
    bytes_a_token,
    compact_logits,
    continued,
    merge_tail,
    offline_loss,
    row_keys,
    text_examples,
    top_and_tail,
    write_logits,
    write_texts,
)

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
SMALL = dict(vocab_size=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, max_positions=64, eos_ids=(63,))


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_teacher SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


def llama(dim=32, **kw): return Model(Config('llama', dim=dim, inter_dim=48, **SMALL | kw), dtype='float32', device='cpu').init_weights(.2)


def rows(r, n=9):
    "Examples of unequal length, some partly asked"
    ids = [torch.randint(64, (r.randrange(2, 15),)).tolist() for _ in range(n)]
    return [example(t, [r.random() < .7 for _ in t]) for t in ids]


def test_tail_is_exact(r):
    for _ in range(10):
        n, w = r.randrange(1, 6), r.randrange(2, 60)
        k, T, z = r.randrange(1, w), r.uniform(.3, 3), 3*torch.randn(n, w)
        logs, indices = top_and_tail(z, k, T)
        p = (z.double()/T).softmax(-1)
        torch.testing.assert_close(logs[:, :k].double().exp(), p.sort(descending=True).values[:, :k], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(logs[:, k].double().exp(), p.sort(descending=True).values[:, k:].sum(-1), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(merge_tail(z, indices, T), logs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', DIVERGENCES)
def test_merging_is_a_lower_bound_that_grows_with_k(kind, r):
    zs, zt = (2*torch.randn(5, 40, dtype=torch.float64) for _ in range(2))
    full, last = divergence(zs, zt, kind), torch.zeros(5, dtype=torch.float64)
    for k in (1, 3, 10, 30, 39):
        logs, indices = top_and_tail(zt, k)
        now = divergence(merge_tail(zs, indices), logs, kind)
        assert (now >= last - 1e-10).all() and (now <= full + 1e-10).all()
        last = now
    torch.testing.assert_close(last, full)  # one token in the tail is no loss
    assert gradcheck(lambda z: divergence(merge_tail(z, indices[:, :4], 2.), logs[:, :5], kind), zs.requires_grad_())


@pytest.mark.parametrize('w,kind', [(2**16, torch.uint16), (2**16+1, torch.int32)])
def test_width_of_indices(w, kind):
    z = torch.randn(2, w)
    z[:, w-1] = 20.
    got = compact_logits(z, 3, 1.)
    assert got['indices'].dtype == kind and got['values'].dtype == torch.float16
    assert (got['indices'].long()[:, 0] == w-1).all()
    assert sum(t.nbytes for t in got.values()) == 2*bytes_a_token(w, 3)


def test_loss_from_all_logits_is_the_online_loss(tmp_path, r):
    teacher, student, data = llama(40), llama(), rows(r)
    folder = write_logits(teacher, data, tmp_path/'a', k=None, batch_size=4, shard=5)
    for kind in DIVERGENCES:
        T, mix, batch = r.uniform(.5, 3), r.uniform(0, .9), collate(r.sample(data, 4))
        got, n = offline_loss(folder, kind, temperature=T, mix=mix, chunk=3)(student, batch)
        want, m = distillation_loss(teacher, kind, T, mix)(student, batch)
        assert n == m and abs(got.item() - want.item()) < 2e-3*max(1, abs(want.item()))
        a, b = (torch.autograd.grad(t, list(student.parameters())) for t in (got, want))
        for g, e in zip(a, b, strict=True): assert (g - e).norm() <= 1e-2*e.norm() + 1e-3


@pytest.mark.parametrize('packed', [False, True])
def test_any_order_and_padding_finds_its_answers(packed, tmp_path, r):
    teacher, data = llama(40), rows(r, 20)
    if packed: data = [dict(zip(columns, row, strict=True)) for columns in [pack(data, 16)] for row in zip(*columns.values(), strict=True)]
    kept = TeacherLogits(write_logits(teacher, data, tmp_path/'a', k=7, temperature=1.5, batch_size=3, shard=4), teacher, data)
    assert kept.temperature == 1.5 and len(kept) == len(data)
    for batch in Batches(data, 5, seed=r.randrange(100)).rest():
        logs, indices = kept(batch)
        exact = answers(teacher, batch, 7, 1.5)
        assert ((logs - exact['values'].float()).abs() < 1e-2).all()  # float16, and other rows beside it
        assert (indices != exact['indices'].long()).sum() <= .02*indices.numel()  # near ties may turn round


def test_what_is_asked_is_part_of_the_key():
    a, b = example([1, 2, 3, 4]), example([1, 2, 3, 4], [False, False, False, True])
    keys = row_keys(collate([a, b])) + row_keys(collate([a | dict(documents=[0, 0, 1, 1])]))
    assert len({*keys}) == 3


def write_24(folder):
    torch.manual_seed(5)
    return write_logits(llama(40), rows(random.Random(1), 24), folder, k=5, batch_size=2, shard=2)


SCRIPT = '''
import sys, time
sys.path.insert(0, {tests!r})
from test_teacher import write_24
from deepseek_nb.train import distill_stages as module
inner, left = module.answers, int(sys.argv[2])
def few(*args, **kw):
    global left
    if not left: time.sleep(3600)
    left -= 1
    return inner(*args, **kw)
module.answers = few
write_24(sys.argv[1])
print('done')
'''


def test_killed_and_run_again(tmp_path, r):
    "kill -9 at random moments, then a run that ends by itself; all shards equal those of a run in peace"
    code, peace, war = SCRIPT.format(tests=os.path.dirname(__file__)), tmp_path/'peace', tmp_path/'war'
    write_24(peace)
    for _ in range(3):
        have = len(list(war.glob('*.safetensors')))
        p = warm.start('-c', code, war, r.randrange(2, 4), modules=warm.TRAINING)  # whoever is slow to kill finds it waiting, not done
        while p.poll() is None and len(list(war.glob('*.safetensors'))) <= have: time.sleep(.01)
        time.sleep(r.uniform(0, .1))
        assert p.poll() is None, p.communicate()
        p.send_signal(signal.SIGKILL)
        p.wait()
        with pytest.raises(FileNotFoundError, match='shards are missing'): TeacherLogits(war)
    out, err = (p := warm.start('-c', code, war, -1, modules=warm.TRAINING)).communicate(timeout=600)
    assert 'done' in out, err
    for f in peace.iterdir(): assert (war/f.name).read_bytes() == f.read_bytes()
    assert {f.name for f in war.iterdir()} == {f.name for f in peace.iterdir()}


def test_full_disk(tmp_path, r, monkeypatch):
    teacher, data, write = llama(40), rows(r, 6), module.write_tensors

    def full(path, tensors):
        if '00001' in path.name: path.with_name(f'.{path.name}.0.tmp').write_bytes(b'half'); raise OSError(28, 'No space left on device')
        write(path, tensors)
    monkeypatch.setattr(module, 'write_tensors', full)
    with pytest.raises(OSError, match='logits-00001.safetensors: the shard cannot be written .*No space left.*finished shards remain') as e:
        write_logits(teacher, data, tmp_path/'a', k=5, shard=2)
    assert '\n' not in str(e.value)
    first = (tmp_path/'a'/'logits-00000.safetensors').read_bytes()
    monkeypatch.undo()
    write_logits(teacher, data, tmp_path/'a', k=5, shard=2)
    assert (tmp_path/'a'/'logits-00000.safetensors').read_bytes() == first
    assert len(TeacherLogits(tmp_path/'a', teacher, data)) == 6 and not list((tmp_path/'a').glob('.*'))


def test_refusals(tmp_path, r):
    teacher, data = llama(40), rows(r, 6)
    folder = write_logits(teacher, data, tmp_path/'a', k=5, shard=4)
    for args, why in (((llama(40), data), 'contains outputs of another teacher'),
                      ((teacher, data[::-1]), 'contains outputs for other data')):
        with pytest.raises(ValueError, match=why): write_logits(*args, folder, k=5, shard=4)
        with pytest.raises(ValueError, match=why): TeacherLogits(folder, *args)
    with pytest.raises(ValueError, match='contains temperature 1.0, not 2.0'):
        write_logits(teacher, data, folder, k=5, temperature=2., shard=4)
    with pytest.raises(ValueError, match='k is 64; it must be at least 1 and less than the 64'): write_logits(teacher, data, folder, k=64)
    with pytest.raises(ValueError, match='k is 0'): write_logits(teacher, data, folder, k=0)
    with pytest.raises(ValueError, match='a stream has no length'): write_logits(teacher, iter(data), tmp_path/'b', k=5)
    with pytest.raises(FileNotFoundError, match='about.json: no such file'): TeacherLogits(tmp_path/'none')
    with pytest.raises(ValueError, match='written at temperature 1.0'): offline_loss(folder, temperature=3.)
    with pytest.raises(ValueError, match="the teacher has 64 tokens, but the student 72"):
        offline_loss(folder)(llama(vocab_size=72), collate(data[:2]))
    with pytest.raises(ValueError, match='row 0 of the batch is not among the 6 rows'): TeacherLogits(folder)(collate([example([1, 2])]))
    shard = folder/'logits-00000.safetensors'
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match='logits-00000.safetensors: truncated'): TeacherLogits(folder)
    about = read_json(folder/'about.json')
    (folder/'about.json').write_text(json.dumps(about | dict(version=9)))
    with pytest.raises(ValueError, match='contains version 9, not 1'): TeacherLogits(folder)


# ---- texts

class Letters:
    "A tokenizer of single characters, with numbers of its own"
    def __init__(self, first): self.first, self.eos_ids = first, (63,)
    def encode(self, text): return [(ord(c) - self.first) % 60 for c in text]
    def decode(self, ids): return ''.join(chr(self.first + i) for i in ids)
    def chat(self, messages): return self.encode(''.join(m['content'] for m in messages))


PROMPTS = ['abc', 'hello', 'x', 'some', 'who', 'is', 'there']


def test_greedy_texts_are_what_generate_gives(r):
    teacher, tok = llama(40), Letters(65)
    ids = [tok.encode(p) for p in PROMPTS]
    for p, (text, ended) in zip(ids, continued(teacher, tok, ids, 6), strict=True):
        new = teacher.generate(torch.tensor([p]), 6)[0, len(p):].tolist()
        assert tok.encode(text) == [i % 60 for i in new[:new.index(63) if 63 in new else None]] and ended == (63 in new)


def test_interrupted_texts_are_the_same(tmp_path, r, monkeypatch):
    teacher, tok, inner, calls = llama(40), Letters(65), module.continued, []
    how = dict(max_new_tokens=5, batch_size=2, temperature=1., seed=7)
    want = write_texts(teacher, tok, PROMPTS, tmp_path/'a', **how).read_text()

    def breaks(*args, **kw):
        calls.append(1)
        if len(calls) == 3: raise KeyboardInterrupt
        return inner(*args, **kw)
    monkeypatch.setattr(module, 'continued', breaks)
    with pytest.raises(KeyboardInterrupt): write_texts(teacher, tok, PROMPTS, tmp_path/'b', **how)
    assert not (tmp_path/'b'/'texts.jsonl').exists()
    with open(tmp_path/'b'/'texts.part', 'a') as f: f.write('{"prompt": "wh')  # what a kill may leave
    assert write_texts(teacher, tok, PROMPTS, tmp_path/'b', **how).read_text() == want
    assert len(calls) == 3 + 2 and len(want.splitlines()) == len(PROMPTS)
    with pytest.raises(ValueError, match='outputs for other data'): write_texts(teacher, tok, PROMPTS[:3], tmp_path/'b', **how)
    with pytest.raises(ValueError, match='settings'): write_texts(teacher, tok, PROMPTS, tmp_path/'b', **how | dict(seed=8))
    with pytest.raises(ValueError, match='outputs of another teacher'): write_texts(llama(40), tok, PROMPTS, tmp_path/'b', **how)


def test_a_student_with_another_vocabulary_reads_the_texts(tmp_path, r):
    teacher, student = Letters(65), Letters(90)
    texts = [dict(prompt='abc', text='de', ended=True), dict(prompt=[dict(role='user', content='hi')], text='yo', ended=False)]
    one, two = text_examples(texts, student)
    assert one['tokens'] == [*student.encode('abcde'), 63] and one['labels'] == [IGNORE]*2 + [*student.encode('de'), 63] + [IGNORE]
    assert two['tokens'] == student.encode('hiyo') and two['labels'] == [IGNORE] + student.encode('yo') + [IGNORE]
    assert text_examples(texts, student, max_length=4)[0]['tokens'] == student.encode('abcd')
    assert one['tokens'][:3] != teacher.encode('abc')
    student.eos_ids = ()
    with pytest.raises(ValueError, match='has no end-of-text token'): text_examples(texts, student)

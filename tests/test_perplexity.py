"Perplexity: against a loop in float64, and against transformers on SmolLM2 and on random models"
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb import Model, Tokenizer
from deepseek_nb.core.config import Config
from deepseek_nb.eval.perplexity import Perplexity, perplexity, speeches, token_losses, windows
from deepseek_nb.infer.generate import left_padded
from deepseek_nb.tools.cli import main

LLAMA = Config('llama', vocab_size=97, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, inter_dim=48, max_positions=128)


@pytest.fixture(scope='module')
def toy():
    torch.manual_seed(0)
    return Model(LLAMA, dtype='float32', device='cpu').init_weights(.2).eval()


@given(n=st.integers(2, 400), window=st.integers(2, 100), data=st.data())
@settings(max_examples=200, deadline=None)
def test_each_token_is_scored_once(n, window, data):
    stride = data.draw(st.integers(1, window - 1))
    at, seen = windows(n, window, stride), []
    for begin, end, scored in at:
        assert 0 <= begin < end <= n and end - begin <= window and scored < end - begin
        seen += range(end - scored, end)
    assert seen == [*range(1, n)]


def slow(model, ids, window, stride):
    "Token by token, in float64, each with the context that its window gives it"
    out = []
    for begin, end, scored in windows(len(ids), window, stride):
        logits = model(ids[None, begin:end])[0].double().log_softmax(-1)
        out += [-logits[i-1, ids[begin+i]].item() for i in range(end-begin-scored, end-begin)]
    return out


@pytest.mark.parametrize('n,window,stride', [(2, 8, 4), (50, 64, 10), (101, 16, 15), (101, 16, 1), (200, 128, 64)])
@torch.no_grad()
def test_against_a_loop(toy, n, window, stride):
    ids = torch.randint(97, (n,))
    found = perplexity(toy, ids, window, stride)
    expected = torch.tensor(slow(toy, ids, window, stride), dtype=torch.float64)
    assert found.tokens == n - 1
    torch.testing.assert_close(found.losses, expected, rtol=1e-5, atol=1e-6)
    assert math.isclose(found.value, expected.mean().exp().item(), rel_tol=1e-6)


def test_padding_is_neither_seen_nor_scored(toy):
    rows = [torch.randint(97, (n,)).tolist() for n in (3, 20, 11, 2)]
    ids, mask = left_padded(rows)
    for chunk in (1, 7, 128):
        losses = token_losses(toy, ids, mask, chunk=chunk)
        for row, got in zip(rows, losses, strict=True):
            alone = token_losses(toy, torch.tensor([row]))[0]
            torch.testing.assert_close(got[-len(alone):], alone, rtol=1e-5, atol=1e-6)
            assert not got[:-len(alone)].any()
    torch.testing.assert_close(token_losses(toy, ids, mask, last=5), token_losses(toy, ids, mask)[:, -5:], rtol=1e-5, atol=1e-6)


def test_ratio_of_two():
    a, b = torch.rand(1000, dtype=torch.float64), torch.rand(1000, dtype=torch.float64)
    ratio, error = Perplexity(a, 8, 4).against(Perplexity(b, 8, 4))
    assert math.isclose(ratio, Perplexity(a, 8, 4).value/Perplexity(b, 8, 4).value, rel_tol=1e-12)
    assert .005 < error/ratio < .02  # the spread of a difference of uniforms, over the root of 1000


@pytest.mark.parametrize('call,said', [
    (dict(ids=[], window=8), 'a text of 0 tokens'), (dict(ids=[1], window=8), 'a text of 1 tokens'),
    (dict(ids=[1, 2, 3], window=8, stride=8), 'stride 8 must be at least 1 and less than the window of 8'),
    (dict(ids=[1, 2, 3], window=8, stride=-1), 'stride -1 must be at least 1'), (dict(ids=[1, 2, 97], window=8), 'outside the vocabulary')])
def test_bad_input(toy, call, said):
    with pytest.raises(ValueError, match=said) as e: perplexity(toy, **call)
    assert '\n' not in str(e.value)


def test_as_transformers(toy, tmp_path):
    transformers = pytest.importorskip('transformers')
    peer = transformers.AutoModelForCausalLM.from_pretrained(toy.save_pretrained(tmp_path/'toy'), dtype=torch.float32)
    ids = torch.randint(97, (1, 60))
    with torch.no_grad(): loss = peer(ids, labels=ids).loss.double().item()
    assert math.isclose(math.log(perplexity(toy, ids[0], 64).value), loss, rel_tol=1e-5)


def test_smollm2_as_transformers(tmp_path):
    "The text of the book, by the recipe of transformers' documentation: sliding windows, labels of -100 where nothing is scored"
    transformers = pytest.importorskip('transformers')
    model = Model.from_pretrained('smollm2-135m', dtype='float32', device='cpu')
    ids = torch.tensor([Tokenizer.from_pretrained('smollm2-135m').encode(speeches())[:400]])
    peer = transformers.AutoModelForCausalLM.from_pretrained(model.save_pretrained(tmp_path/'smol'), dtype=torch.float32)
    total, done = 0., 0
    for begin in range(0, 400, 128):
        end = min(begin + 256, 400)
        labels = ids[:, begin:end].clone()
        labels[:, :-(end - done)] = -100
        with torch.no_grad(): loss = peer(ids[:, begin:end], labels=labels).loss.double().item()
        total, done = total + loss*(labels[:, 1:] != -100).sum().item(), end
        if end == 400: break
    assert math.isclose(perplexity(model, ids[0], 256, 128).value, math.exp(total/399), rel_tol=1e-4)


def test_command(toy, tmp_path, capsys):
    (tmp_path/'text.txt').write_text('The router picks 8 of 256 experts, and every token visits the shared one. '*3)
    text = str(tmp_path/'text.txt')
    argv = ['eval', 'smollm2-135m', '--perplexity', '--text', text, '--tokens', '20', '--dtype', 'int4', '--device', 'cpu']
    assert main(argv) == 0
    assert 'on 19 tokens' in capsys.readouterr().out
    assert main(['eval', 'smollm2-135m', '--text', str(tmp_path/'none.txt'), '--device', 'cpu']) == 2
    assert 'none.txt' in capsys.readouterr().err

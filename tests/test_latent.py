"Grouped attention becomes latent: exact where it can be, equal to transformers everywhere, and resumed to the bit"
import json
import random
import signal
import time
import warnings
from dataclasses import replace
from pathlib import Path
from runpy import run_path

import pytest
import torch
import warm

from deepseek_nb.arch.model import Model
from deepseek_nb.arch.releases import shapes
from deepseek_nb.arch.rope import frequencies
from deepseek_nb.bench import load_result
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.train.convert import (
    choose_pairs,
    compress,
    convert,
    folded_rope,
    joined_halves,
    mean_rotation,
    mla_config,
    moment,
    reconstruct,
    roots,
    shared_pairs,
    stream_error,
    to_mla,
)
from deepseek_nb.train.upcycle import moe_config, to_moe

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ROOT = Path(__file__).parents[1]
GQA = Config('llama', vocab_size=80, dim=48, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=8, inter_dim=96, max_positions=256,
             norm_eps=1e-5, tie_embeddings=True, rope=Rope(theta=2e3), eos_ids=(1,), bos_id=0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def fresh(c, std=.2): return Model(c, 'float32', 'cpu').init_weights(std).requires_grad_(False)


def hf(folder, **kw):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                                                    attn_implementation='eager', experts_implementation='eager', **kw)
    assert not any(info.values()), info
    return model.eval()


# What is exact

@pytest.mark.draw(3)
@pytest.mark.parametrize('seed', range(8))
def test_one_or_two_heads_are_exact(seed):
    r = random.Random(seed)
    g = r.choice([1, 2])
    h, x = g*r.choice([1, 2, 3]), 2*r.randrange(2, 7)
    c = replace(GQA, dim=2*h*x + 2, n_heads=h, n_kv_heads=g, head_dim=x, rope=Rope(r.choice([100., 1e4, 5e5]), r.random() < .3))
    model, tokens = fresh(c), torch.randint(80, (2, 200))
    new = to_mla(model, tokens[:, :64], g*x + 1, g*x)
    assert new.config.rope.kind == (None if g == 1 else 'yarn')
    torch.testing.assert_close(new(tokens), model(tokens), rtol=0, atol=5e-4*model(tokens).abs().max().item())


def test_stretched_frequencies_stay_as_they_are():
    for rope in (Rope(5e5, kind='llama3', factor=8., original_positions=32), Rope(1e4, kind='linear', factor=4.),
                 Rope(1e4, kind='yarn', factor=4., original_positions=64)):
        c = replace(GQA, n_kv_heads=1, rope=rope)
        model, tokens = fresh(c), torch.randint(80, (2, 100))
        new = to_mla(model, tokens, 9, 8)
        torch.testing.assert_close(new(tokens), model(tokens), rtol=0, atol=1e-3)
        with pytest.raises(ValueError, match=f'frequencies scaled by {rope.kind}'): to_mla(model, tokens, 9, 4)


def test_the_folded_sequence_repeats_the_originals():
    for seed in range(50):
        r = random.Random(seed)
        x = 2*r.randrange(2, 65)
        first = r.randrange(1, x//2 + 1)
        second = r.randrange(first + 1)
        c = replace(GQA, head_dim=x, max_positions=r.choice([64, 2048, 8192]), rope=Rope(r.choice([100., 1e4, 1e5, 1e6])))
        whole, found = frequencies(c.rope, x).double(), frequencies(folded_rope(c, first, second), 2*(first + second)).double()
        torch.testing.assert_close(found, torch.cat([whole[:first], whole[:second]]), rtol=3e-6, atol=0)


def test_wider_is_closer():
    model, tokens = fresh(GQA), torch.randint(80, (4, 100))
    want = model(tokens)
    lost = [(to_mla(model, tokens, c, 16)(tokens) - want).norm().item() for c in (6, 12, 24, 47)]
    assert lost == sorted(lost, reverse=True)
    lost = [(to_mla(model, tokens, 47, r)(tokens) - want).norm().item() for r in (4, 8, 16)]
    assert lost == sorted(lost, reverse=True)


def test_a_constant_is_better_than_a_fit():
    "On tokens of different lengths, which is what the norm can't see"
    model, tokens = fresh(replace(GQA, n_heads=4, n_kv_heads=2)), torch.randint(80, (4, 100))
    want = model(tokens)
    one, other = ((to_mla(model, tokens, 17, 16, k)(tokens) - want).norm() for k in (True, False))
    assert one < 1e-4*want.norm() < .01*other


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_a_constant_survives_half_precision(dtype):
    c = replace(GQA, n_kv_heads=1)
    model, tokens = fresh(c), torch.randint(80, (2, 60))
    want, half = model(tokens), fresh(c).to(getattr(torch, dtype))
    half.load_state_dict(model.state_dict())
    new = to_mla(half, tokens, 9, 8)
    assert new.dtype == getattr(torch, dtype)
    assert (new(tokens) - want).norm() < 3*(half(tokens) - want).norm()


# Parts against their definitions

@pytest.mark.draw(2)
@pytest.mark.parametrize('seed', range(5))
def test_pairs_add_up_to_the_scores(seed):
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(n, 4, 20, generator=g, dtype=torch.complex128) for n in (6, 3))
    x = torch.randn(300, 20, generator=g).double()
    v, a, lam = shared_pairs(q, k, moment(x))
    z = x.to(q)
    old_q, old_k = torch.einsum('td,hjd->thj', z, q), torch.einsum('td,gjd->tgj', z, k)
    new_k = torch.einsum('tgj,jg,jgp->tjp', old_k, a.to(v), v.conj())
    for i in range(6):
        new_q = old_q[:, i, :, None]*v[:, i//2].conj()/a[:, i//2, None]
        torch.testing.assert_close((new_q.conj()*new_k).sum(-1), old_q[:, i].conj()*old_k[:, i//2])
    torch.testing.assert_close(new_k.abs().square().mean(0), lam) # contributions, in the order of size
    assert (lam.diff(dim=1) <= 1e-9).all()
    torch.testing.assert_close(lam.sum(), (old_q.abs().square().mean(0).view(3, 2, 4).sum(1)*old_k.abs().square().mean(0)).sum())


def test_a_static_pair_has_the_mean_rotation():
    freqs = torch.tensor([1., .1, 0.])
    distance = torch.arange(100.).double()
    p = (1/(1 + distance))/(1/(1 + distance)).sum()
    want = torch.stack([(p*torch.exp(-1j*w*distance)).sum() for w in freqs.double()])
    torch.testing.assert_close(mean_rotation(freqs, 100), want)


def test_the_split_of_pairs_is_the_best():
    lam, gamma = torch.rand(3, 6, 3).double().sort(-1, descending=True).values, torch.rand(6)*torch.exp(2j*torch.rand(6))
    price = (lam/lam.sum((1, 2), keepdim=True)).mean(0)*(1 - gamma.abs()**2)[:, None]
    for n in range(1, 13):
        lost = {(m, n - m): (price.sum() - price[:m, 0].sum() - price[:n-m, 1].sum()).item() for m in range(7) if 0 <= n - m <= m}
        first, second, found = choose_pairs(lam, gamma, n)
        assert abs(found - min(lost.values())) < 1e-9 and abs(lost[first, second] - found) < 1e-9
    with pytest.raises(ValueError, match='13 rotary pairs must be between 1 and 12'): choose_pairs(lam, gamma, 13)


@pytest.mark.parametrize('c', [1, 4, 11, 12, 15])
def test_compression_is_the_best_of_its_rank(c):
    m, x = torch.randn(12, 20).double(), torch.randn(500, 20).double()
    a = torch.randn(3, 4, 4).double()
    metric, sigma = a@a.mT + .1*torch.eye(4), moment(x)
    down, up, lost = compress(m, metric, sigma, c)
    assert down.shape == (c, 20) and up.shape == (12, c)
    root = torch.block_diag(*roots(metric)[0])
    target = root@m@torch.linalg.cholesky(sigma)
    s = torch.linalg.svdvals(target) # Eckart-Young
    got = (root@(m - up@down)@torch.linalg.cholesky(sigma)).square().sum()
    torch.testing.assert_close(got, s[c:].square().sum(), rtol=1e-6, atol=1e-9)
    assert abs(lost - (s[c:].square().sum()/s.square().sum()).item()) < 1e-9


def test_stream_error_is_relative_to_each_token():
    want = torch.randn(2, 5, 7)*torch.logspace(-2, 3, 10).view(2, 5, 1)
    assert abs(stream_error(1.1*want, want) - .01) < 1e-6


# Whole models

@pytest.mark.draw(2)
@pytest.mark.parametrize('seed', range(6))
def test_transformers_gives_the_same_logits(seed, tmp_path):
    r = random.Random(seed)
    g = r.choice([1, 2, 3])
    c = replace(GQA, n_kv_heads=g, n_heads=g*r.choice([1, 2]), tie_embeddings=r.random() < .5, rope=Rope(r.choice([100., 1e5])))
    model, tokens = fresh(c), torch.randint(80, (2, 150))
    new = to_mla(model, tokens, r.randrange(4, 40), 2*r.randrange(1, 4*min(g, 2) + 1), r.random() < .7)
    assert {k: tuple(v.shape) for k, v in new.state_dict().items()} == shapes(new.config)
    theirs = hf(new.save_pretrained(tmp_path))
    assert type(theirs).__name__ == 'DeepseekV3ForCausalLM'
    torch.testing.assert_close(theirs(tokens).logits, new(tokens), rtol=0, atol=1e-4)
    again = Model.from_pretrained(tmp_path, 'float32', 'cpu')
    assert again.config == new.config
    torch.testing.assert_close(again(tokens), new(tokens), rtol=0, atol=1e-5)


def test_a_cache_changes_nothing():
    model, tokens = fresh(GQA), torch.randint(80, (2, 90))
    new = to_mla(model, tokens, 20, 10)
    want = new(tokens)
    for mla in ('naive', 'absorbed'): torch.testing.assert_close(new(tokens, mla=mla), want, rtol=0, atol=2e-4)
    cache = new.new_cache(2)
    got = torch.cat([new(t, cache) for t in tokens.split(30, 1)], 1)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    old = model.new_cache(2)
    model(tokens, old)
    assert new.config.cache_bytes_per_token() == 2*2*(20 + 10) < model.config.cache_bytes_per_token() == 2*2*48


def test_training_brings_some_of_it_back():
    model, tokens = fresh(replace(GQA, n_layers=1)), torch.randint(80, (40, 48))
    new, errors = convert(model, 'mla', tokens, steps=60, latent=12, rotary=4, how=dict(lr=1e-2))
    raw, _ = convert(model, 'mla', tokens, steps=0, latent=12, rotary=4)
    assert all(after <= before for before, after in errors) and errors[0][1] < .97*errors[0][0]
    assert (new(tokens[:3]) - model(tokens[:3])).norm() < (raw(tokens[:3]) - model(tokens[:3])).norm()
    more = torch.randint(80, (160, 48))
    mixture, errors = convert(model, 'moe', more, steps=60, experts=6, active=3, shared=2, how=dict(lr=1e-2))
    assert all(after <= before for before, after in errors) and errors[0][1] < .97*errors[0][0]
    both = joined_halves(new, mixture)
    assert both.config.mla and both.config.n_routed_experts == 6
    torch.testing.assert_close(both.layers[0].mlp.gate.weight, mixture.layers[0].mlp.gate.weight)


RUN = '''
import sys
from pathlib import Path

import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.train.convert import convert

def run(to, folder):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Config('llama', 80, 48, 2, 6, 96, n_kv_heads=3, head_dim=8)
    model, tokens = Model(config, 'float32', 'cpu').init_weights(.2).requires_grad_(False), torch.randint(80, (16, 40))
    kind = dict(latent=12, rotary=4) if to == 'mla' else dict(experts=6, active=3, shared=2)
    return convert(model, to, tokens, steps=60, state=folder, **kind)

if __name__ == '__main__':
    to, folder = sys.argv[1], Path(sys.argv[2])
    model, errors = run(to, folder)
    torch.save((model.state_dict(), [*map(tuple, errors)]), folder.with_suffix('.pt'))
'''


@pytest.mark.parametrize('to', ['mla', 'moe'])
def test_killed_and_resumed_to_the_bit(to, tmp_path):
    (program := tmp_path/'program.py').write_text(RUN)
    def start(): return warm.start(program, to, tmp_path/'cut', cwd=ROOT, modules=warm.TRAINING)
    p = start()
    while not (tmp_path/'cut'/'state.json').is_file() and p.poll() is None: time.sleep(.002)
    p.send_signal(signal.SIGKILL)
    p.wait()
    assert len(json.loads((tmp_path/'cut'/'state.json').read_text())['errors']) == 1
    assert start().wait() == 0
    threads = torch.get_num_threads()
    try: model, e = run_path(program)['run'](to, None)
    finally: torch.set_num_threads(threads)
    b, f = torch.load(tmp_path/'cut.pt')
    assert [*map(tuple, e)] == f and all(torch.equal(t, b[k]) for k, t in model.state_dict().items())


def test_a_state_of_another_conversion_is_refused(tmp_path):
    model, tokens = fresh(GQA), torch.randint(80, (8, 20))
    def run(m=model, t=tokens, steps=2, **kw):
        return convert(m, 'mla', t, steps, tmp_path/'s', **dict(latent=12, rotary=4) | kw)
    run()
    others = (dict(steps=3), 'steps'), (dict(t=tokens.flip(1)), 'model'), (dict(m=fresh(GQA)), 'model'), (dict(latent=13), 'config')
    for kw, odd in others:
        with pytest.raises(ValueError, match=rf'belongs to another conversion \(.*{odd}.* differ\); delete it'): run(**kw)
    (tmp_path/'s'/'block-001.safetensors').write_bytes(b'half')
    with pytest.raises(ValueError, match='block-001.safetensors: truncated'): run()


def test_bad_requests(tmp_path):
    model, tokens = fresh(GQA), torch.randint(80, (8, 20))
    with pytest.raises(ValueError, match="to 'gqa' must be 'mla', 'moe' or 'neurons'"): convert(model, 'gqa', tokens)
    with pytest.raises(ValueError, match='latent width 49 must be between 2 and the model width 48'): to_mla(model, tokens, 49, 8)
    with pytest.raises(ValueError, match='9 rotary pairs must be between 1 and 8'): convert(model, 'mla', tokens, latent=9, rotary=18)
    with pytest.raises(ValueError, match='this qwen2 model has biases'): mla_config(replace(GQA, model_type='qwen2', attn_bias=True), 9, 4)
    with pytest.raises(ValueError, match='already has latent attention'): to_mla(to_mla(model, tokens, 9, 4), tokens, 9, 4)
    mixture = to_moe(model, moe_config(GQA, 6, 3, 2), tokens)
    latent = to_mla(mixture, tokens, 25, 16) # the other order works too
    assert latent.config.model_type == 'deepseek_v3' and latent.config.is_moe(0)
    torch.testing.assert_close(hf(latent.save_pretrained(tmp_path))(tokens).logits, latent(tokens), rtol=0, atol=1e-4)
    assert reconstruct(latent, mixture, tokens, steps=1)


# SmolLM2, from one end to the other

@pytest.fixture(scope='module')
def smol():
    torch.set_grad_enabled(False)
    yield Model.from_pretrained('smollm2-135m', 'float32', 'cpu').requires_grad_(False), Tokenizer.from_pretrained('smollm2-135m')
    torch.set_grad_enabled(True)


def test_smollm2_goes_all_the_way(smol, tmp_path):
    model, tok = smol
    ids = tok.encode('The State of the Union is strong because the people of the United States have made it so. ')
    text = torch.tensor(ids*12)[:240].view(2, 120)
    latent = to_mla(model, text, 320, 128)
    assert latent.config.cache_bytes_per_token() > model.config.cache_bytes_per_token() # so wide that it must answer right
    first = Model(replace(latent.config, n_layers=3), 'float32', 'cpu')
    first.load_state_dict({k: t for k, t in latent.state_dict().items() if k in first.state_dict()})
    every = to_moe(first, moe_config(first.config, 12, 12, 4), text) # with a choice among 12, rounding makes some of them
    mine = every(text[:1])
    theirs = hf(every.save_pretrained(tmp_path/'every'))(text[:1]).logits
    assert (theirs - mine).abs().max() <= 1e-5*mine.abs().max() # 3 layers of float32
    both = to_moe(latent, moe_config(latent.config, 12, 11, 4), text)
    tok.save_pretrained(both.save_pretrained(tmp_path))
    theirs, reader = hf(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [dict(role='user', content='What is the capital of France?')]
    prompt = reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompt == tok.chat(messages) == Tokenizer.from_pretrained(tmp_path).chat(messages)
    prompt = torch.tensor([prompt])
    mine = both.generate(prompt, 8, temperature=0.)[0]
    assert 'Paris' in tok.decode(mine[prompt.shape[1]:].tolist())
    other = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)[0]
    assert 'Paris' in tok.decode(other[prompt.shape[1]:].tolist())


def test_the_tokenizer_reads_the_same(smol, tmp_path):
    tok, r = smol[1], random.Random(3)
    fresh(replace(GQA, vocab_size=40)).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer.from_pretrained(tmp_path)
    letters = 'aZ 09\n\t.,\'"éß你😀<|im_start|>'
    for _ in range(200):
        text = ''.join(r.choice([*letters, '<|im_end|>', ' the', "don't", '  ']) for _ in range(r.randrange(1, 40)))
        ids = tok.encode(text, special=True)
        assert theirs(text).input_ids == ids == ours.encode(text, special=True)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (tok.eos_ids[0], tok.bos_id)


def test_what_is_stored():
    if not (ROOT/'nbs'/'results'/'conversion.json').is_file(): pytest.skip('python -m deepseek_nb.bench conversion has not been run')
    found = load_result('conversion', ROOT/'nbs'/'results')['result']
    table = {row['name']: row for row in found['table']}
    for name, answer in found['answers'].items(): assert answer['gap'] < 1e-4 and answer['same'], name
    assert table['dense']['perplexity'] < table['128 + 64']['perplexity'] < table['128 + 64, fitted']['perplexity']
    if steps := found['steps']:
        for name in ('128 + 64', '8 of 12'): assert table[f'{name}, {steps} steps']['perplexity'] < table[name]['perplexity']
    assert table['128 + 64']['cache']*2 == table['dense']['cache']
    assert all(after <= before for errors in found['errors'].values() for before, after in errors)

"Attention, RMSNorm and rotation in C++ against float64, over ragged shapes, dtypes, strides, instruction sets and numbers of threads"
import os
import random
import time

import pytest
import torch
import warm
from fastcore.test import expect_fail

from deepseek_nb.arch import attention as att
from deepseek_nb.arch import rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.kernels import attention, flash, norm

pytestmark = pytest.mark.skipif(not attention.attention_kernels.ready(), reason='no C++ compiler')
KINDS = torch.float32, torch.bfloat16


@pytest.fixture
def r():
    seed = int(os.environ.get('SEED', time.time_ns() % 10**9))
    print(f'SEED={seed}')
    torch.manual_seed(seed)
    return random.Random(seed)


def exact(q, k, v, scale, mask):
    "The definition in float64"
    (b, h, s, x), g = q.shape, k.shape[1]
    scores = torch.einsum('bghsx,bgtx->bghst', q.double().view(b, g, h//g, s, x), k.double())*scale
    if mask is not None: scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask[:, :, None]), -torch.inf)
    return torch.einsum('bghst,bgtv->bghsv', scores.softmax(-1), v.double()).reshape(b, h, s, -1)


def close(got, want, what):
    assert got.dtype == KINDS[0] or got.dtype == KINDS[1]
    assert torch.equal(got.isnan(), want.isnan()), what
    limit = 5e-6 if got.dtype == torch.float32 else 1e-2
    error = (got - want).nan_to_num(0).abs().max().item() if got.numel() else 0
    assert error <= limit*max(1e-3, want.nan_to_num(0).abs().max().item() if got.numel() else 0), (error, what)


def spaced(r, dtype, *shape):
    "Random numbers, often in memory that isn't contiguous, with a contiguous last axis"
    how = r.choice(['plain', 'plain', 'exchanged', 'cut'])
    if how == 'exchanged': return torch.randn(shape[0], shape[2], shape[1], shape[3]).to(dtype).transpose(1, 2)
    if how == 'cut': return torch.randn(*shape[:2], shape[2] + 3, shape[3] + 5).to(dtype)[:, :, 1:-2, 2:-3]
    return torch.randn(shape).to(dtype)


def one_attend(r):
    dtype, b, g, each = r.choice(KINDS), r.choice([1, 2, 3]), r.choice([1, 2, 3]), r.choice([1, 2, 3, 4, 5, 8, 9, 17])
    s = r.choice([1, 1, 1, 2, 3, 7, 33, 70])
    t, x, v = s + r.choice([0, 0, 1, 5, 30, 63, 64, 65, 200]), r.choice([1, 3, 8, 17, 32, 96]), r.choice([1, 2, 8, 19, 32, 64])
    q, k, w = spaced(r, dtype, b, g*each, s, x), spaced(r, dtype, b, g, t, x), spaced(r, dtype, b, g, t, v)
    if r.random() < .2 and v <= x: w = k[..., :v]
    how, mask = r.choice(['causal', 'all', 'padded', 'random', 'row']), None
    if how == 'padded': mask = att.causal_mask(s, t, torch.randint(t, (b,)))
    if how == 'random': mask = torch.rand(s, t) < r.choice([.05, .5, .99])
    if how == 'row': mask = torch.rand(b, 1, 1, t) < .5
    if how == 'padded' and r.random() < .3: mask = mask.mT.contiguous().mT
    seen = att.causal_mask(s, t) if how == 'causal' else mask
    got = attention.attend_cpp(q, k, w, .3, mask, how == 'causal')
    close(got, exact(q, k, w, .3, seen), f'attend {how} {dtype} {b=} {g=} {each=} {s=} {t=} {x=} {v=}')


def one_ragged(r):
    "Rows of unequal length, padded at the left, whose queries are the last of their own keys"
    dtype, b, g, each = r.choice(KINDS), r.choice([1, 3, 8]), r.choice([1, 2]), r.choice([1, 3, 8, 24])
    s, x = r.choice([1, 2, 5, 40]), r.choice([6, 16, 96])
    t = s + r.choice([0, 3, 64, 200])
    q, k, v = spaced(r, dtype, b, g*each, s, x), spaced(r, dtype, b, g, t, x), spaced(r, dtype, b, g, t, 16)
    length = torch.randint(s, t + 1, (b,))
    start = (torch.rand(b)*length).long()
    got = attention.attention_kernels.attend(q, k, v, .3, None, True, start, length)
    for i in range(b):
        n = length[i]
        want = exact(q[i:i+1], k[i:i+1, :, :n], v[i:i+1, :, :n], .3, att.causal_mask(s, n, start[i:i+1]))
        close(got[i:i+1], want, f'ragged {dtype} {b=} {g=} {each=} {s=} {t=} {x=} {length=} {start=}')


def one_latent(r):
    dtype, b, h = r.choice(KINDS), r.choice([1, 2, 3, 8]), r.choice([1, 2, 5, 8, 16, 40, 128])
    s, c, rot = r.choice([1, 1, 1, 2, 5]), r.choice([1, 8, 16, 33, 128]), r.choice([2, 6, 32])
    t = s + r.choice([0, 1, 62, 63, 64, 300])
    q, z = spaced(r, dtype, b, h, s, c + rot), spaced(r, dtype, b, 1, t, c + rot)[:, 0]
    mask = att.causal_mask(s, t, torch.randint(t, (b,))) if r.random() < .5 else None
    got = attention.attend_latent_cpp(q, z, c, .2, mask)
    want = exact(q, z[:, None], z[:, None, :, :c], .2, att.causal_mask(s, t) if mask is None else mask)
    close(got, want, f'latent {dtype} {b=} {h=} {s=} {t=} {c=} {rot=}')


def one_stream(r):
    s, t, x, v = r.randint(1, 64), r.choice([1, 5, 64, 65, 200]), r.choice([16, 48]), r.choice([16, 32, 80])
    q, k, w = torch.randn(s, x), torch.randn(t, x), torch.randn(t, v)
    close(flash.flash_cpp(q, k, w, .3), flash.flash(q.double(), k.double(), w.double(), .3), f'stream {s=} {t=} {x=} {v=}')


def sweep(n=60, seed=None):
    "Random shapes for every operator; the sanitizers' target calls it too"
    r = random.Random(seed)
    if seed is not None: torch.manual_seed(seed)
    before = torch.get_num_threads()
    for i in range(n):
        torch.set_num_threads(1 + i%2)
        for one in ONES: one(r)
    torch.set_num_threads(before)

ONES = [one_attend, one_ragged, one_latent, one_stream]


@pytest.mark.parametrize('one', ONES)
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_random_shapes(one, threads, r):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for _ in range(60): one(r)
    torch.set_num_threads(before)


@pytest.mark.draw(1, group='instruction sets')
def test_other_instruction_sets(isa):
    env = dict(os.environ, **warm.built_for(isa), PYTHONPATH=os.path.dirname(__file__))
    code = 'import test_kernels_attention as t; t.sweep(40)'
    done = warm.run('-c', code, env=env)
    if "it may be" in done.stderr: pytest.skip(f'no {isa} on this processor')
    assert done.returncode == 0, done.stderr


def test_more_threads_than_keys(r):
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    for t in (1, 2, 17, 100):
        q, k = torch.randn(1, 4, 1, 8), torch.randn(1, 2, t, 8)
        close(attention.attend_cpp(q, k, k, .5), exact(q, k, k, .5, None), t)
    torch.set_num_threads(before)


def test_python_threads(r):
    "Python threads each have room of their own"
    from concurrent.futures import ThreadPoolExecutor
    cases = [(torch.randn(1, 4, 30, 16), torch.randn(1, 2, 90, 16)) for _ in range(8)]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda a: attention.attend_cpp(*a, a[1], .3, causal=True), cases*4))
    for y, (q, k) in zip(got, cases*4, strict=True): close(y, exact(q, k, k, .3, att.causal_mask(30, 90)), 'threads')


def test_nan_and_infinity(r):
    "Where a query sees one, the output is what the definition gives"
    for value in (torch.nan, torch.inf, -torch.inf):
        for where in ('q', 'k'):
            q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 90, 8), torch.randn(2, 2, 90, 16)
            dict(q=q, k=k)[where][1, 1, -1, 3] = value
            want = exact(q, k, v, .3, att.causal_mask(5, 90))
            close(attention.attend_cpp(q, k, v, .3, causal=True), want, (value, where))


def test_large_scores(r):
    q, k, v = 40*torch.randn(2, 2, 3, 8), 40*torch.randn(2, 1, 7, 8), torch.randn(2, 1, 7, 5)
    got, want = attention.attend_cpp(q, k, v, 1., causal=True), exact(q, k, v, 1., att.causal_mask(3, 7))
    assert (got - want).abs().max() < 1e-3


def test_long_context(r):
    "A single query over more keys than a block, split between threads, against a sum in float64"
    q, z, threads = torch.randn(1, 8, 1, 160), torch.randn(1, 20_011, 160), torch.get_num_threads()
    torch.set_num_threads(max(2, threads))  # each adds up its own keys
    close(attention.attend_latent_cpp(q, z, 128, .05), exact(q, z[:, None], z[:, None, :, :128], .05, None), 'long')
    torch.set_num_threads(threads)


def test_empty(r):
    for b, s in ((0, 3), (2, 0)):
        q, k = torch.randn(b, 4, s, 8), torch.randn(b, 2, 5, 8)
        assert att.attend(q, k, k, .3, causal=True).shape == (b, 4, s, 8)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8)
    assert att.attend(q, k, k, .3).shape == (1, 2, 3, 8)


BAD = [
    (dict(q=torch.zeros(2, 4, 5)), 'q is float32 of shape (2, 4, 5)'),
    (dict(q=torch.zeros(2, 4, 5, 8, dtype=torch.float64)), 'q is float64'),
    (dict(k=torch.zeros(2, 2, 9, 7)), 'k is float32 of shape (2, 2, 9, 7) on cpu; the kernel takes float32 of shape (2 any any 8)'),
    (dict(k=torch.zeros(2, 2, 9, 8).bfloat16()), 'k is bfloat16'),
    (dict(v=torch.zeros(2, 2, 8, 8)), 'v is float32 of shape (2, 2, 8, 8)'),
    (dict(v=torch.zeros(2, 2, 9, 8, device='meta')), 'on meta'),
    (dict(k=torch.zeros(2, 3, 9, 8), v=torch.zeros(2, 3, 9, 8)), 'k has 3 heads, which do not divide the 4 of q'),
    (dict(k=torch.zeros(2, 0, 9, 8), v=torch.zeros(2, 0, 9, 8)), 'k has 0 heads'),
    (dict(mask=torch.zeros(5, 9)), 'mask is float32'),
    (dict(mask=torch.zeros(5, 8).bool()), 'mask is bool of shape (5, 8)'),
    (dict(mask=torch.zeros(3, 1, 5, 9).bool()), 'mask is bool of shape (3, 1, 5, 9)'),
    (dict(mask=torch.zeros(1, 5, 9).bool()), 'mask is bool of shape (1, 5, 9)'),
]


@pytest.mark.parametrize('change,message', BAD)
def test_bad_arguments(change, message):
    good = dict(q=torch.zeros(2, 4, 5, 8), k=torch.zeros(2, 2, 9, 8), v=torch.zeros(2, 2, 9, 8), mask=None)
    attention.attend_cpp(**good, scale=1.)
    with expect_fail(ValueError, message): attention.attend_cpp(**(good | change), scale=1.)


def test_bad_latents():
    q, z = torch.zeros(2, 4, 1, 8), torch.zeros(2, 9, 8)
    with expect_fail(ValueError, 'z is float32 of shape (2, 9, 7)'): attention.attend_latent_cpp(q, z[..., :7], 4, 1.)
    with expect_fail(ValueError, 'c is 9; z is 8 wide'): attention.attend_latent_cpp(q, z, 9, 1.)


@pytest.mark.parametrize('compiled', [False, True])
def test_inference_and_compile(compiled, r):
    def both(q, k, z): return att.attend(q, k, k, .3, causal=True), att.attend_latent(q, z, 4, .3)
    q, k, z = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 9, 8)
    with use('reference'): want = both(q, k, z)
    fn = torch.compile(both, fullgraph=True, backend='aot_eager') if compiled else both
    with use('cpp'), torch.inference_mode():
        for a, b in zip(fn(q, k, z), want, strict=True): assert (a - b).abs().max() < 1e-5


def test_gradients_take_another_twin(r):
    q, k = torch.randn(1, 4, 3, 8, requires_grad=True), torch.randn(1, 2, 9, 8)
    att.attend(q, k, k, .3, causal=True).sum().backward()
    assert q.grad.abs().sum() > 0


# RMSNorm and rotation

def exact_norm(x, weight, eps):
    y = x.double()
    return y/(y.square().mean(-1, keepdim=True) + eps).sqrt()*weight.double()


def exact_turn(x, cos, sin, interleaved):
    y, half = x.double(), x.shape[-1]//2
    i = torch.arange(half)
    a, b = (2*i, 2*i + 1) if interleaved else (i, i + half)
    out = torch.empty_like(y)
    out[..., a], out[..., b] = y[..., a]*cos - y[..., b]*sin, y[..., a]*sin + y[..., b]*cos
    return out


def one_norm(r):
    dtype, b, s, h = r.choice(KINDS), r.choice([1, 2, 3]), r.choice([1, 2, 60]), r.choice([1, 3, 8])
    c, half = r.choice([1, 5, 16, 100, 576]), r.choice([1, 3, 16, 32])
    interleaved, eps, weight = r.random() < .5, r.choice([1e-6, 1e-3]), torch.rand(c).to(dtype)
    angle = torch.rand(r.choice([1, b]), 1, s, half)*6
    cos, sin = angle.cos(), angle.sin()
    what = f'{dtype} {b=} {s=} {h=} {c=} {half=} {interleaved=}'
    x = spaced(r, dtype, b, h, s, c)
    close(norm.rms_norm_cpp(x, weight, eps), exact_norm(x, weight, eps), 'rms_norm ' + what)
    x = spaced(r, dtype, b, h, s, 2*half)
    close(norm.rotate_cpp(x, cos, sin, interleaved), exact_turn(x, cos, sin, interleaved), 'rotate ' + what)
    x = spaced(r, dtype, b, 1, s, c + 2*half)[:, 0]
    want = torch.cat([exact_norm(x[..., :c], weight, eps), exact_turn(x[..., c:], cos[:, 0], sin[:, 0], interleaved)], -1)
    close(norm.norm_rotate_cpp(x, weight, cos, sin, eps, interleaved), want, 'norm_rotate ' + what)

ONES.append(one_norm)


def test_norms_of_random_shapes(r):
    before = torch.get_num_threads()
    for i in range(120):
        torch.set_num_threads(1 + i%3)
        one_norm(r)
    torch.set_num_threads(before)


def test_dispatched_norms(r):
    "The dispatched functions take the kernel where they can and agree with the definition where they can't"
    x, weight, angle = torch.randn(2, 3, 5, 8), torch.rand(8), torch.rand(1, 1, 5, 4)
    for dtype in (*KINDS, torch.float64):
        y, w = x.to(dtype), weight.to(dtype)
        strided = y.mT.contiguous().mT
        turned = rope.rotate(strided, angle.cos(), angle.sin(), True), exact_turn(y, angle.cos(), angle.sin(), True)
        for got, want in ((att.rms_norm(y, w, 1e-6), exact_norm(y, w, 1e-6)), turned):
            assert got.dtype == dtype and (got - want).abs().max() < (.03 if dtype == torch.bfloat16 else 1e-5)
    y = x.clone().requires_grad_()
    att.rms_norm(y, weight, 1e-6).sum().backward()
    rope.rotate(y, angle.cos(), angle.sin(), False).sum().backward()
    assert y.grad.abs().sum() > 0


def test_shares(r):
    "Every key of every block belongs to exactly one piece, and no thread has more than another by more than a unit"
    for _ in range(200):
        keys, threads = [r.randint(1, 300) for _ in range(r.randint(1, 9))], r.randint(1, 9)
        pieces, held = attention.key_shares(keys, threads), [0]*threads
        for i, n in enumerate(keys): assert [x for b, _, first, end in pieces if b == i for x in range(first, end)] == list(range(n))
        for _, thread, first, end in pieces: held[thread] += end - first
        assert max(held) <= -(-sum(keys)//(16*threads))*16

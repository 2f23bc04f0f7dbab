"""Attention, rotary positions, routing and experts against plain float64 references, on fresh random inputs

The references below are loops over rows, heads, tokens and experts, written from the papers. The seed is printed; SEED=n repeats a run.
"""
import math
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from deepseek_nb.arch import attention as att
from deepseek_nb.arch import moe, rope, routing
from deepseek_nb.arch.cache import Cache
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
KINDS = [torch.float32, torch.bfloat16]
TOL = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_arch SEED={SEED}')


@pytest.fixture(autouse=True)
def r(request):
    "A source of randomness that depends on the seed and the test alone"
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


def close(got, want, tol=None, size=0.):
    "Within the tolerance of `got`'s dtype, relative to the largest value, or to the size of terms that cancel; NaN never passes"
    assert got.shape == want.shape, (got.shape, want.shape)
    if not want.numel(): return
    size = max(size, .3 if got.dtype == torch.bfloat16 else .1, want.abs().max().item())
    err = (got.double()-want.double()).abs().max().item()/size
    assert err <= (TOL[got.dtype] if tol is None else tol), f'{err:.2e} apart in {got.dtype}'


def draw(dtype, *shape): return torch.randn(*shape).to(dtype)


# Attention

def plain(q, k, v, scale, sees):
    "Attention, one query at a time: `sees(row, query, key)`"
    (b, h, s, _), (g, t) = q.shape, k.shape[1:3]
    q, k, v, out = q.double(), k.double(), v.double(), []
    for n in range(b):
        for i in range(h):
            for p in range(s):
                keys = [m for m in range(t) if sees(n, p, m)]
                a = ((k[n, i*g//h, keys]@q[n, i, p])*scale).exp()
                out.append((a/a.sum())@v[n, i*g//h, keys])
    return torch.stack(out).view(b, h, s, -1)


def causal(s, t, pad=None):
    "Which keys a query sees: itself, and what lies between the padding and it"
    def sees(n, p, m):
        here = t-s+p
        return m == here or (pad[n] if pad is not None else 0) <= m <= here
    return sees


SIZES = [(1, 1), (1, 2), (1, 13), (2, 2), (7, 7), (13, 13), (5, 11), (2, 17), (11, 12)]


@pytest.mark.parametrize('s,t', SIZES)
@pytest.mark.parametrize('padded', [False, True])
def test_visible(s, t, padded):
    pad = torch.arange(t) if padded else None
    got = att.causal_mask(s, t, pad)
    sees = causal(s, t, pad)
    assert got.shape == ((t, 1, s, t) if padded else (s, t))
    for n in range(t if padded else 1):
        assert [[sees(n, p, m) for m in range(t)] for p in range(s)] == (got[n, 0] if padded else got).tolist()


@pytest.mark.parametrize('dtype', KINDS)
@pytest.mark.parametrize('s,t', SIZES)
@pytest.mark.parametrize('fn', [att.attend.op.reference, att.attend_sdpa, att.attend], ids=['reference', 'sdpa', 'dispatched'])
def test_attend(fn, s, t, dtype, r):
    g = r.choice([1, 2, 3])
    h, x, v, scale = g*r.choice([1, 2, 5]), r.choice([1, 3, 8, 17]), r.choice([1, 2, 8, 19]), r.choice([.1, .5, 1.])
    for how in ('causal', 'all', 'padded', 'random'):
        b = t if how == 'padded' else r.choice([1, 2, 3])
        q, k, w = draw(dtype, b, h, s, x), draw(dtype, b, g, t, x), draw(dtype, b, g, t, v)
        if how == 'causal': got, sees = fn(q, k, w, scale, causal=True), causal(s, t)
        if how == 'all': got, sees = fn(q, k, w, scale), lambda *_: True
        if how == 'padded': # every length of padding, up to all but the last token
            pad = torch.arange(t)
            got, sees = fn(q, k, w, scale, att.causal_mask(s, t, pad)), causal(s, t, pad)
        if how == 'random':
            m = torch.rand(s, t) < .5
            m[torch.arange(s), torch.randint(t, (s,))] = True
            got, sees = fn(q, k, w, scale, m), lambda n, p, j, m=m: bool(m[p, j])
        assert got.dtype == dtype
        close(got, plain(q, k, w, scale, sees))


@pytest.mark.parametrize('dtype', KINDS)
@pytest.mark.parametrize('s,t', SIZES)
def test_attend_latent(s, t, dtype, r):
    h, c, w, scale = r.choice([1, 2, 5]), r.choice([1, 7, 16]), r.choice([2, 6]), r.choice([.1, .5])
    for padded in (False, True):
        b, pad = (t, torch.arange(t)) if padded else (2, None)
        q, z = draw(dtype, b, h, s, c+w), draw(dtype, b, t, c+w)
        got = att.attend_latent(q, z, c, scale, att.causal_mask(s, t, pad) if padded else None)
        assert got.dtype == dtype
        close(got, plain(q, z[:, None], z[:, None, :, :c], scale, causal(s, t, pad)))


@pytest.mark.parametrize('fn', [att.attend.op.reference, att.attend_sdpa, 'latent'])
def test_large_scores_stay_finite(fn):
    "Scores of several hundred: softmax in float32 with the largest subtracted"
    q, k, v = 40*torch.randn(2, 2, 3, 8), 40*torch.randn(2, 1, 7, 8), torch.randn(2, 1, 7, 5)
    if fn == 'latent': got = att.attend_latent(q, z := torch.cat([v, k], -1)[:, 0, :, :8], 5, 1.); k, v = z[:, None], z[:, None, :, :5]
    else: got = fn(q, k, v, 1., causal=True)
    scores = (q.double()@k.double().transpose(2, 3)).masked_fill(~att.causal_mask(3, 7), -torch.inf)
    close(got, scores.softmax(-1)@v.double(), 1e-3)


# Rotary positions

def turn(x, angle, interleaved):
    "Each pair is a complex number, and turning it is a product; float64"
    x, half = x.double(), x.shape[-1]//2
    pairs = [(2*i, 2*i+1) if interleaved else (i, i+half) for i in range(half)]
    out = [None]*(2*half)
    for n, (a, b) in enumerate(pairs):
        z = torch.complex(x[..., a], x[..., b])*torch.polar(torch.ones_like(angle[..., n]), angle[..., n])
        out[a], out[b] = z.real, z.imag
    return torch.stack(out, -1)


@pytest.mark.parametrize('dtype', KINDS)
@pytest.mark.parametrize('interleaved', [False, True])
@pytest.mark.parametrize('width', [2, 4, 6, 14, 64])
def test_rotate(width, interleaved, dtype, r):
    b, h, s = r.choice([1, 2]), r.choice([1, 3]), r.choice([1, 2, 7])
    x, pos, factor = draw(dtype, b, h, s, width), torch.randint(0, 300, (b, s)), r.choice([1., 1.3])
    freqs = rope.rope_frequencies(r.choice([100., 10000.]), width)
    got = rope.rotate(x, *rope.cos_sin(freqs, pos, factor), interleaved)
    assert got.dtype == dtype
    close(got, turn(x, (pos[:, None, :, None]*freqs.double()), interleaved)*factor, None if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize('interleaved', [False, True])
def test_products_know_distances_alone(interleaved, r):
    freqs, q, k = rope.rope_frequencies(10000., 8), torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    at = lambda x, p: rope.rotate(x, *rope.cos_sin(freqs, torch.tensor([[p]])), interleaved)
    for _ in range(10):
        m, n, shift = (r.randrange(100) for _ in range(3))
        assert (at(q, m)*at(k, n)).sum().item() == pytest.approx((at(q, m+shift)*at(k, n+shift)).sum().item(), abs=1e-4)


@pytest.mark.parametrize('kind', ['default', 'linear', 'yarn', 'llama3'])
def test_frequencies_of_transformers(kind, r):
    transformers = pytest.importorskip('transformers')
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    for _ in range(60):
        width, length = 2*r.randrange(1, 65), r.choice([16, 100, 2048, 4096, 8192])
        theta, factor = r.choice([500., 10000., 160000., 1e6])*r.uniform(.5, 2), 1. if kind == 'default' else r.uniform(1., 50.)
        p = dict(rope_type=kind, rope_theta=theta, factor=factor)
        ours = dict(theta=theta, kind=None if kind == 'default' else kind, factor=factor)
        if kind == 'yarn':
            kw = dict(beta_fast=r.uniform(4., 40.), beta_slow=r.uniform(.5, 2.))
            kw |= r.choice([dict(mscale=r.uniform(.5, 1.), mscale_all_dim=r.uniform(.5, 1.)), dict(attention_factor=r.uniform(.5, 2.)), {}])
            p |= kw | dict(original_max_position_embeddings=length)
            ours |= kw | dict(original_positions=length)
        if kind == 'llama3':
            low = r.uniform(.5, 2.)
            high = low*r.uniform(1.5, 8.)
            p |= dict(low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=length)
            ours |= dict(low_freq=low, high_freq=high, original_positions=length)
        sizes = dict(hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=10**5)
        config = transformers.LlamaConfig(**sizes, rope_parameters=p)
        if kind == 'default': want, factor = 1/theta**(torch.arange(0, width, 2, dtype=torch.float64)/width), 1.
        else: want, factor = ROPE_INIT_FUNCTIONS[kind](config, 'cpu')
        mine = Rope(**ours)
        got = rope.frequencies(mine, width).double()
        assert got.shape == want.shape and ((got/want-1).abs() < 2e-5).all(), (mine, width)
        assert rope.rotary_factor(mine) == pytest.approx(factor, rel=1e-6), mine


# Whole attention layers

def linear(x, p): return x@p.weight.double().T + (p.bias.double() if p.bias is not None else 0)
def rms(x, p, eps=1e-6): return x/(x.pow(2).mean(-1, keepdim=True)+eps).sqrt()*p.weight.double()
def heads(x, h): return x.view(*x.shape[:2], h, -1).transpose(1, 2)


def angles(c, t, pad):
    "Positions count from the end of the padding; float64 angles `b 1 t r/2`"
    pos = torch.tensor([[max(0, i-n) for i in range(t)] for n in (pad.tolist() if pad is not None else [0])])
    freqs = rope.frequencies(c.rope, c.qk_rope_head_dim if c.mla else c.head_dim)
    return pos, pos[:, None, :, None].double()*freqs.double()


def plain_gqa(m, c, x, pad):
    _, angle = angles(c, t := x.shape[1], pad)
    q, k, v = (heads(linear(x.double(), p), n) for p, n in ((m.q_proj, c.n_heads), (m.k_proj, c.n_kv_heads), (m.v_proj, c.n_kv_heads)))
    f = rope.rotary_factor(c.rope)
    o = plain(turn(q, angle, c.rope.interleaved)*f, turn(k, angle, c.rope.interleaved)*f, v, c.head_dim**-.5, causal(t, t, pad))
    return linear(o.transpose(1, 2).flatten(2), m.o_proj)


def plain_mla(m, c, x, pad):
    _, angle = angles(c, t := x.shape[1], pad)
    x, nope, f = x.double(), c.qk_nope_head_dim, rope.rotary_factor(c.rope)
    q = heads(linear(rms(linear(x, m.q_a_proj), m.q_a_layernorm), m.q_b_proj) if c.q_lora_rank else linear(x, m.q_proj), c.n_heads)
    a = linear(x, m.kv_a_proj_with_mqa)
    latent, shared = rms(a[..., :c.kv_lora_rank], m.kv_a_layernorm), turn(a[:, None, :, c.kv_lora_rank:], angle, c.rope.interleaved)*f
    kv = heads(linear(latent, m.kv_b_proj), c.n_heads)
    q = torch.cat([q[..., :nope], turn(q[..., nope:], angle, c.rope.interleaved)*f], -1)
    k = torch.cat([kv[..., :nope], shared.expand(-1, c.n_heads, -1, -1)], -1)
    scale = q.shape[-1]**-.5
    if c.rope.kind == 'yarn' and c.rope.mscale_all_dim: scale *= (.1*c.rope.mscale_all_dim*math.log(c.rope.factor)+1)**2
    return linear(plain(q, k, kv[..., nope:], scale, causal(t, t, pad)).transpose(1, 2).flatten(2), m.o_proj)


def some_rope(r, interleaved):
    kind = r.choice([None, 'linear', 'yarn', 'llama3'])
    m = r.choice([0., .707, 1.])
    return Rope(theta=r.choice([100., 10000.]), interleaved=interleaved, kind=kind, factor=1. if kind is None else r.choice([4., 40.]),
                original_positions=r.choice([16, 64]), mscale=m or 1., mscale_all_dim=m)


def some_gqa(r):
    kv = r.choice([1, 2, 3])
    h, bias = kv*r.choice([1, 2, 3]), r.random() < .5
    return Config('llama', vocab_size=9, dim=r.choice([5, 12, 23]), n_layers=1, n_heads=h, n_kv_heads=kv, head_dim=2*r.randrange(1, 7),
                  inter_dim=8, attn_bias=bias, out_bias=r.random() < .5, rope=some_rope(r, r.random() < .3), max_positions=99)


def some_mla(r):
    "Ranks of three and more: RMSNorm of one or two numbers near zero turns rounding into a sign"
    bias = r.random() < .4
    return Config('deepseek_v3', vocab_size=9, dim=r.choice([5, 12, 23]), n_layers=1, n_heads=r.choice([1, 2, 3]), inter_dim=8,
                  q_lora_rank=r.choice([0, 3, 7]), kv_lora_rank=r.choice([4, 5, 16]), qk_nope_head_dim=r.choice([1, 6, 11]),
                  qk_rope_head_dim=2*r.randrange(1, 5), v_head_dim=r.choice([1, 5, 16]), attn_bias=bias, out_bias=bias,
                  rope=some_rope(r, r.random() < .7), max_positions=99)


def fresh(m, dtype):
    "Weights under which every part counts, rounded to `dtype`"
    for k, p in m.named_parameters():
        x = torch.randn(p.shape)
        p.data = (1+.2*x if 'norm' in k else x*(.3 if p.ndim == 1 else p.shape[-1]**-.5)).to(dtype)
    return m


def chunks(r, t):
    "Cut t positions in pieces"
    cuts = sorted(r.sample(range(1, t), min(t-1, r.randrange(3))))
    return list(zip([0, *cuts], [*cuts, t], strict=True))


def run_layer(m, c, x, pad, pieces, cached, **kw):
    "A layer over pieces of the context, with positions and masks as the model gives them"
    pos, _ = angles(c, x.shape[1], pad)
    cache, out = Cache(c, x.shape[0], 0, x.dtype) if cached else None, []
    for a, b in pieces:
        cs = rope.cos_sin(rope.frequencies(c.rope, c.qk_rope_head_dim if c.mla else c.head_dim), pos[:, a:b], rope.rotary_factor(c.rope))
        if cached: cache.reserve(b-a)
        ctx = att.Context(cs, None if pad is None else att.causal_mask(b-a, b, pad), cache[0] if cached else None, **kw)
        out.append(m(x[:, a:b], ctx))
        if cached: cache.advance(b-a)
    return torch.cat(out, 1)


@pytest.mark.parametrize('dtype', KINDS)
@pytest.mark.draw(4, each='dtype')
@pytest.mark.parametrize('draw_no', range(10))
def test_gqa(draw_no, dtype, r):
    c = some_gqa(r)
    m, t = fresh(att.GQA(c), dtype), r.choice([1, 2, 7, 13])
    with torch.no_grad():
        for pad in (None, torch.arange(t)):
            x = draw(dtype, 2 if pad is None else t, t, c.dim)
            want = plain_gqa(m, c, x, pad)
            tol = None if dtype == torch.float32 else .06 # three products in a row
            for kind in ('auto', 'reference', 'torch'):
                with use(kind):
                    close(run_layer(m, c, x, pad, [(0, t)], cached=False), want, tol)
                    close(run_layer(m, c, x, pad, chunks(r, t), cached=True), want, tol)


@pytest.mark.filterwarnings("ignore:attend_latent.*'torch' twin")
@pytest.mark.parametrize('dtype', KINDS)
@pytest.mark.draw(4, each='dtype')
@pytest.mark.parametrize('draw_no', range(10))
def test_mla(draw_no, dtype, r):
    c = some_mla(r)
    m, t = fresh(att.MLA(c), dtype), r.choice([1, 2, 7, 13])
    with torch.no_grad():
        for pad in (None, torch.arange(t)):
            x = draw(dtype, 2 if pad is None else t, t, c.dim)
            want = plain_mla(m, c, x, pad)
            tol = None if dtype == torch.float32 else .1 # five products in a row, each rounded to eight bits
            for form in ('naive', 'absorbed', 'auto'):
                for kind in ('auto', 'reference', 'torch'):
                    with use(kind):
                        close(run_layer(m, c, x, pad, [(0, t)], cached=False, mla=form), want, tol)
                        close(run_layer(m, c, x, pad, chunks(r, t), cached=True, mla=form), want, tol)


@pytest.mark.parametrize('layer', ['gqa', 'naive', 'absorbed'])
def test_gradients_of_layers(layer, r):
    "Float32 gradients of weights and inputs against those of the float64 references"
    c = some_gqa(r) if layer == 'gqa' else some_mla(r)
    t, pad = 7, torch.tensor([0, 3, 6])
    m, x = fresh((att.GQA if layer == 'gqa' else att.MLA)(c), torch.float32), torch.randn(3, t, c.dim, requires_grad=True)
    w, wrt = torch.randn(3, t, c.dim), [x, *m.parameters()]
    got = torch.autograd.grad((run_layer(m, c, x, pad, [(0, t)], cached=False, mla=layer if c.mla else 'auto')*w).sum(), wrt)
    want = torch.autograd.grad(((plain_mla if c.mla else plain_gqa)(m, c, x, pad)*w.double()).sum(), wrt)
    for a, b in zip(got, want, strict=True): # a key bias has no gradient beyond rounding
        assert ((a-b).abs().max() <= 1e-4*max(b.abs().max(), torch.tensor(.1))).item(), (layer, a.shape)


@pytest.mark.parametrize('fn', [att.attend.op.reference, att.attend_sdpa, 'latent'])
@pytest.mark.parametrize('s,t', [(1, 5), (5, 5), (3, 7)])
def test_gradients_of_attention(fn, s, t):
    q, k, v = (torch.randn(2, *shape, requires_grad=True) for shape in ((4, s, 6), (1, t, 6), (1, t, 5)))
    def run(): return att.attend_latent(q, k[:, 0], 5, .4) if fn == 'latent' else fn(q, k, v, .4, causal=True)
    want = plain(q, k, k[..., :5] if fn == 'latent' else v, .4, causal(s, t))
    w, wrt = torch.randn(2, 4, s, 5), [q, k] if fn == 'latent' else [q, k, v]
    got, want = torch.autograd.grad((run()*w).sum(), wrt), torch.autograd.grad((want*w.double()).sum(), wrt)
    for a, b in zip(got, want, strict=True): close(a, b, 1e-4)


def test_gradcheck_of_attention():
    q, k, v = (torch.randn(2, *shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3, 6), (2, 5, 6), (2, 5, 3)))
    for kw in (dict(causal=True), dict(mask=att.causal_mask(3, 5, torch.tensor([0, 4]))), {}):
        assert torch.autograd.gradcheck(lambda q, k, v, kw=kw: att.attend_sdpa(q, k, v, .4, **kw), (q, k, v))


@pytest.mark.parametrize('interleaved', [False, True])
def test_gradient_of_rotation(interleaved):
    "A rotation's gradient is the rotation back"
    x, cs = torch.randn(2, 3, 5, 8, requires_grad=True), rope.cos_sin(rope.rope_frequencies(100., 8), torch.arange(5)[None])
    w = torch.randn(x.shape)
    got, = torch.autograd.grad((rope.rotate(x, *cs, interleaved)*w).sum(), x)
    close(got, rope.rotate(w, cs[0], -cs[1], interleaved), 1e-6)


# Experts

def plain_experts(x, weights, experts, gate_up, down, size=False):
    "Each token through each of its experts, float64; or, with `size`, the terms without their signs"
    x, weights, gate_up, down = (a.double() for a in (x, weights, gate_up, down))
    f, out = gate_up.shape[1]//2, []
    for n in range(len(x)):
        y = torch.zeros_like(x[n])
        for w, e in zip(weights[n], experts[n].tolist(), strict=True):
            gate, up = gate_up[e, :f]@x[n], gate_up[e, f:]@x[n]
            h = gate/(1+(-gate).exp())*up
            y = y + w*(down[e].abs()@h.abs() if size else down[e]@h)
        out.append(y)
    return torch.stack(out) if out else x


def some_experts(r, dtype, n, e, k, d=None, f=None):
    d, f = d or r.choice([1, 5, 16]), f or r.choice([1, 7, 8])
    among = r.sample(range(e), r.randrange(k, e+1)) # the others stay empty
    chosen = torch.tensor([r.sample(among, k) for _ in range(n)], dtype=torch.int64).view(n, k)
    weights = torch.rand(n, k).to(dtype if dtype == torch.float64 else torch.float32)
    return draw(dtype, n, d), weights, chosen, draw(dtype, e, 2*f, d)*d**-.5, draw(dtype, e, d, f)*f**-.5


@pytest.mark.parametrize('dtype', KINDS)
@pytest.mark.parametrize('n,e,k', [(0, 3, 2), (1, 1, 1), (1, 8, 3), (2, 5, 5), (7, 4, 1), (13, 8, 8), (31, 6, 2), (3, 64, 6), (97, 11, 3)])
@pytest.mark.parametrize('fn', [moe.run_experts.op.reference, moe.run_grouped, moe.run_experts], ids=['reference', 'grouped', 'dispatched'])
def test_experts(fn, n, e, k, dtype, r):
    for _ in range(3):
        args = some_experts(r, dtype, n, e, k)
        got = fn(*args)
        assert got.dtype == dtype
        close(got, plain_experts(*args), size=plain_experts(*args, size=True).max().item() if n else 0.)


@pytest.mark.parametrize('fn', [moe.run_experts.op.reference, moe.run_grouped])
def test_gradcheck_of_experts(fn, r):
    x, w, chosen, gate_up, down = some_experts(r, torch.float64, 5, 4, 2, d=3, f=2)
    for a in (x, w, gate_up, down): a.detach_().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, g, d: fn(x, w, chosen, g, d), (x, w, gate_up, down))


@pytest.mark.parametrize('shared', [0, 2])
@pytest.mark.parametrize('dtype', KINDS)
def test_layer_of_experts(dtype, shared, r):
    c = some_router(r)
    c = replace(c, n_shared_experts=shared)
    m = fresh(moe.MoE(c), dtype)
    if c.score_bias: m.gate.e_score_correction_bias.copy_(torch.randn(c.n_routed_experts)*.1)
    x = draw(dtype, 2, 7, c.dim)
    with torch.no_grad():
        n = x.view(14, -1)
        weights, chosen, _ = m.gate(n)
        want = plain_experts(n, weights, chosen, m.experts.gate_up_proj, m.experts.down_proj)
        if shared:
            s, nd = m.shared_experts, n.double()
            gate = linear(nd, s.gate_proj)
            want = want + linear(gate/(1+(-gate).exp())*linear(nd, s.up_proj), s.down_proj)
        close(m(x), want.view(2, 7, -1))


# Routing

def plain_route(logits, bias, c):
    "Expert: weight, for one token; and by how much the choice was clear"
    x = logits.tolist()
    if c.score_func == 'softmax': top = max(x); z = sum(math.exp(v-top) for v in x); score = [math.exp(v-top)/z for v in x]
    if c.score_func == 'sigmoid': score = [1/(1+math.exp(-v)) for v in x]
    if c.score_func == 'sqrtsoftplus': score = [math.sqrt(math.log1p(math.exp(v))) for v in x]
    choice = [s+float(b) for s, b in zip(score, bias, strict=True)] if bias is not None else score
    size = len(x)//c.n_expert_groups
    def rank(g):
        best = sorted(choice[g*size:(g+1)*size], reverse=True)
        return best[0] if c.group_score == 'max' else best[0]+best[1]
    order = sorted(range(c.n_expert_groups), key=rank, reverse=True)
    kept, clear = order[:c.n_limited_groups], math.inf
    if len(kept) < len(order): clear = rank(kept[-1])-rank(order[len(kept)])
    among = sorted((e for e in range(len(x)) if e//size in kept), key=lambda e: choice[e], reverse=True)
    k = c.n_activated_experts
    if k < len(among): clear = min(clear, choice[among[k-1]]-choice[among[k]])
    total = sum(score[e] for e in among[:k]) if c.norm_topk else 1.
    return {e: score[e]/total*c.route_scale for e in among[:k]}, score, clear


def some_router(r, **kw):
    g, size = r.choice([1, 2, 4, 5]), r.choice([2, 3, 7])
    keep = r.randrange(1, g+1)
    k = keep*size if r.random() < .25 else r.randrange(1, keep*size+1) # a quarter of the draws take all that are kept
    widths = dict(vocab_size=9, dim=11, n_layers=1, n_heads=1, inter_dim=8, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2)
    how = dict(group_score=r.choice(['max', 'sum2']), score_func=r.choice(['softmax', 'sigmoid', 'sqrtsoftplus']),
               score_bias=r.random() < .5, norm_topk=r.random() < .5, route_scale=r.choice([1., 2.5, 16.])) | kw
    return Config('deepseek_v3', **widths, v_head_dim=4, n_routed_experts=g*size, n_activated_experts=k, moe_inter_dim=5,
                  n_expert_groups=g, n_limited_groups=keep, **how)


@pytest.mark.parametrize('score_func', ['softmax', 'sigmoid', 'sqrtsoftplus'])
@pytest.mark.parametrize('group_score', ['max', 'sum2'])
@pytest.mark.parametrize('norm_topk', [False, True])
@pytest.mark.parametrize('score_bias', [False, True])
def test_route(score_func, group_score, norm_topk, score_bias, r):
    unclear = seen = 0
    for _ in range(12):
        c = some_router(r, score_func=score_func, group_score=group_score, norm_topk=norm_topk, score_bias=score_bias)
        n = r.choice([1, 2, 13])
        logits, bias = 2*torch.randn(n, c.n_routed_experts), torch.randn(c.n_routed_experts)*r.choice([.1, 3.]) if score_bias else None
        got = routing.route(logits, c, bias)
        assert got.weights.dtype == torch.float32 and got.weights.shape == got.experts.shape == (n, c.n_activated_experts)
        for i in range(n):
            want, score, clear = plain_route(logits[i], bias, c)
            seen, unclear = seen+1, unclear+(clear < 1e-5)
            close(got.scores[i], torch.tensor(score, dtype=torch.float64))
            assert len(set(got.experts[i].tolist())) == c.n_activated_experts
            if clear < 1e-5: continue
            assert set(got.experts[i].tolist()) == set(want), (c, logits[i], bias)
            close(got.weights[i], torch.tensor([want[e] for e in got.experts[i].tolist()], dtype=torch.float64))
    assert unclear < .1*seen + 2


@pytest.mark.parametrize('dtype', KINDS)
def test_gate_routes_in_float32(dtype, r):
    for _ in range(10):
        c = some_router(r)
        gate = fresh(routing.Gate(c), dtype).to(dtype)
        if c.score_bias:
            assert gate.e_score_correction_bias.dtype == torch.float32
            gate.e_score_correction_bias.copy_(torch.randn(c.n_routed_experts))
        x = draw(dtype, 5, c.dim)
        got = gate(x)
        for i, logits in enumerate(x.double()@gate.weight.double().T):
            want, score, clear = plain_route(logits, gate.e_score_correction_bias, c)
            close(got.scores[i], torch.tensor(score, dtype=torch.float64))
            if clear > 1e-5: assert set(got.experts[i].tolist()) == set(want)


def test_gradient_of_routing(r):
    "Weights carry the gradient of their affinities, at float32's accuracy; the bias carries none"
    for _ in range(20):
        c = some_router(r)
        logits = torch.randn(4, c.n_routed_experts, requires_grad=True)
        bias = torch.randn(c.n_routed_experts, requires_grad=True) if c.score_bias else None
        got = routing.route(logits, c, bias)
        w = torch.randn(got.weights.shape)
        a = torch.autograd.grad((got.weights*w).sum(), [logits] + ([bias] if c.score_bias else []), allow_unused=True)
        exact = logits.double()
        score = {'softmax': exact.softmax(-1), 'sigmoid': exact.sigmoid(), 'sqrtsoftplus': F.softplus(exact).sqrt()}[c.score_func]
        score = score.gather(1, got.experts)
        if c.norm_topk: score = score/score.sum(1, keepdim=True)
        want, = torch.autograd.grad((score*c.route_scale*w).sum(), logits)
        assert ((a[0]-want).abs().max() <= 1e-5*c.route_scale).item()
        assert len(a) == 1 or a[1] is None

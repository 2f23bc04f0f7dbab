"Formats of weights: packed against unpacked references and other people's code, bit for bit, on ragged shapes, stacks and rows."
import copy

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from deepseek_nb.core.dispatch import use
from deepseek_nb.files.checkpoint import E2M1, dequant_fp8, quant_fp8, round_up_scale
from deepseek_nb.quant import QuantizedWeight, make_format, quantize, relative_error, replace_parameter
from deepseek_nb.quant.fp8 import FP8, round_activations_fp8, rounded_fp8, small_codes, small_values
from deepseek_nb.quant.groups import FP4, Int8Fine, fine_activations, rounded_fine, to_e2m1
from deepseek_nb.quant.int4 import Int4, pack_nibbles, unpack_nibbles
from deepseek_nb.quant.int8 import Int8, round_activations, rounded
from deepseek_nb.quant.nf4 import DYNAMIC, LEVELS, NF4, nearest, nest, pack_pairs, unnest, unpack_pairs

E4M3 = torch.float8_e4m3fn
FORMATS = [Int8(), Int8(group=32), Int8(group=64), Int8Fine(), Int8Fine(64),
           Int4(), Int4(64), Int4(128), Int4(symmetric=True), Int4(64, symmetric=True), Int4(128, symmetric=True),
           NF4(), NF4(double=False), FP8(), FP8('ue8m0'), FP4()]
SHAPES = [(1, 1), (1, 64), (7, 31), (5, 33), (3, 65), (40, 96), (130, 200), (129, 257), (2, 9, 70), (3, 130, 129), (2, 2, 3, 40),
          (300, 576)]
every_format = pytest.mark.parametrize('f', FORMATS, ids=str)
every_shape = pytest.mark.parametrize('shape', SHAPES, ids=str)


def weights(*shape, seed=0):
    "Normal numbers of rows of very different sizes, an outlier, a row of zeros."
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(*shape, generator=g)*10**(4*torch.rand(*shape[:-1], 1, generator=g) - 3)
    w[..., 0, shape[-1]//2] *= 30
    if shape[-2] > 2: w[..., 1, :] = 0
    return w


def same(a, b):
    "Bits included."
    a, b = a.contiguous(), b.contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))

def equal(a, b): return a.shape == b.shape and a.dtype == b.dtype and bool((a == b).all())


# ---- unpacked references: numpy, a row or a block at a time, no packing

def f32(x): return np.float32(x)


def int8_grids(numbers, scales):
    return [numbers*0 if s < np.finfo(np.float32).tiny else np.clip(np.round(numbers/s), -127, 127).astype(np.float32)*s for s in scales]


def int8_row(row, group, got):
    "With groups, several scales may be equally good: then the one that was taken."
    if not group: return int8_grids(row, [f32(np.abs(row).max()/f32(127))])[0]
    out = []
    for i in range(0, len(row), group):
        g, least = row[i:i+group], f32(np.abs(row[i:i+group]).max()/f32(127))
        grids = int8_grids(g, [f32(np.float16(least*f32(f))) for f in (1, 1.007, 1.014, 1.021)])
        errors = [((grid.astype(np.float64) - g)**2).sum() for grid in grids]
        good = [grid for grid, e in zip(grids, errors, strict=True) if e <= min(errors)*(1 + 1e-5)]
        out.append(next((grid for grid in good if (grid == got[i:i+group]).all()), good[0]))
    return np.concatenate(out)


def fine_row(row, group, got):
    "Of three minima the one with the least error; where several are equally good, the one that was taken."
    out = []
    for i in range(0, len(row), group):
        g = row[i:i+group]
        g = np.concatenate([g, np.full(group - len(g), g[-1])])
        step, grids = f32(np.float16((g.max() - g.min())/f32(255))), []
        for m in (f32(np.float16(g.min() + f32(k)*step)) for k in (0, -.25, .25)):
            grids.append(np.clip(np.round((g - m)/max(step, np.finfo(np.float32).tiny)), 0, 255).astype(np.float32)*step + m)
        errors, n = [((grid.astype(np.float64) - g)**2).sum() for grid in grids], len(row[i:i+group])
        good = [grid[:n] for grid, e in zip(grids, errors, strict=True) if e <= min(errors)*(1 + 1e-5) + 1e-30]
        out.append(next((grid for grid in good if (grid == got[i:i+group]).all()), good[0]))
    return np.concatenate(out)


def int4_row(row, f):
    out = []
    for g in (row[i:i+f.group] for i in range(0, len(row), f.group)):
        if f.symmetric: step = f32(np.float16(g[np.abs(g).argmax()]/f32(-8))); low = -8*step
        else: step,low = f32(np.float16((g.max() - g.min())/f32(15))), f32(np.float16(g.min()))
        q = np.clip(np.round((g - low)/(step or f32(1))), 0, 15) if step else np.full(len(g), 8*f.symmetric)
        out.append(((q - 8)*step if f.symmetric else q.astype(np.float32)*step + low).astype(np.float32))
    return np.concatenate(out)


def lower_nearest(x, levels):
    "The level that is nearest by comparing distances in float64; midway, the lower one."
    return np.abs(x.astype(np.float64)[:, None] - levels.astype(np.float64)[None]).argmin(1)


def nf4_matrix(w, double):
    g = -(-w.shape[1]//64)
    blocks = [[row[64*j:64*j+64] for j in range(g)] for row in w]
    absmax = np.array([np.abs(b).max() for row in blocks for b in row], np.float32)
    inverse = f32(1)/np.maximum(absmax, f32(1e-38))
    if double:
        mean = torch.tensor(absmax).mean().numpy()
        kept, code = [], DYNAMIC.numpy()
        for run in (absmax[i:i+256] - mean for i in range(0, len(absmax), 256)):
            top = np.abs(run).max()
            place = np.floor((run*(f32(1)/max(top, f32(1e-38))) + f32(1))*f32(32767.5) + f32(.5))
            kept.append(code[lower_nearest(place/f32(32767.5) - f32(1), code)]*top + mean)
        absmax = np.concatenate(kept)
    table, out = LEVELS.numpy(), np.zeros_like(w)
    for n, b in enumerate(b for row in blocks for b in row):
        r, j = divmod(n, g)
        out[r, 64*j:64*j+64] = table[lower_nearest(b*inverse[n], table)]*absmax[n]
    return out


def fp8_matrix(w, f):
    out = torch.zeros(w.shape)
    for r in range(0, w.shape[0], 128):
        for c in range(0, w.shape[1], 128):
            box = torch.tensor(w[r:r+128, c:c+128])
            scale = box.abs().max().clamp(min=1e-4)/448
            if f.scale == 'ue8m0': scale = torch.tensor(deepseek_power(scale.item()))
            out[r:r+128, c:c+128] = (box/scale).clamp(-448, 448).to(E4M3).float()*scale
    return out.numpy()


def deepseek_power(x):
    "`fast_round_scale` of DeepSeek's kernels: the exponent's bits, one more where a bit of the mantissa is set."
    bits = int(np.float32(x).view(np.uint32))
    return float(np.uint32(((bits >> 23) + bool(bits & 0x7fffff)) << 23).view(np.float32))


def fp4_row(row):
    out, magnitudes = [], np.array([0, .5, 1, 1.5, 2, 3, 4, 6])
    for b in (row[i:i+32] for i in range(0, len(row), 32)):
        scale = deepseek_power(max(np.abs(b).max()/f32(6), f32(2**-126)))
        for x in b:
            far = np.abs(abs(float(x))/scale - magnitudes)
            best = np.flatnonzero(far == far.min())
            out.append(np.copysign(magnitudes[best[best % 2 == 0][0] if len(best) > 1 else best[0]]*scale, x))
    return np.array(out, np.float32)


def reference(w, f, got):
    def matrix(m, q):
        if isinstance(f, NF4): return nf4_matrix(m, f.double)
        if isinstance(f, FP8): return fp8_matrix(m, f)
        by_row = {'int8': lambda r, q: int8_row(r, f.group, q), 'int8-fine': lambda r, q: fine_row(r, f.group, q),
                  'int4': lambda r, _: int4_row(r, f), 'fp4': lambda r, _: fp4_row(r)}[f.name]
        return np.stack([by_row(*pair) for pair in zip(m, q, strict=True)])
    flat, found = (t.reshape(-1, *w.shape[-2:]).numpy() for t in (w, got))
    return torch.tensor(np.stack([matrix(*pair) for pair in zip(flat, found, strict=True)])).reshape(w.shape)


@every_format
@every_shape
def test_packed_equals_unpacked(f, shape):
    w = weights(*shape)
    q = quantize(w, f)
    assert equal(q.dequantize(), reference(w, f, q.dequantize())) and q.dtype == torch.float32 and q.shape == w.shape


@every_format
@settings(max_examples=25, deadline=None)
@given(o=st.integers(1, 12), i=st.integers(1, 150), seed=st.integers(0, 2**31), lattice=st.booleans())
def test_packed_equals_unpacked_anywhere(f, o, i, seed, lattice):
    w = weights(o, i, seed=seed)
    if lattice: w = (w*8).round()/8
    got = quantize(w, f).dequantize()
    assert equal(got, reference(w, f, got))


# ---- what every format promises

@every_format
@every_shape
def test_slices(f, shape):
    q = quantize(weights(*shape), f)
    full, m = q.dequantize(), q
    while m.ndim > 2:
        m, full = m[len(m) - 1], full[-1]
        assert equal(m.dequantize(), full) and m.shape == full.shape
    o, none = shape[-2], torch.zeros(0, dtype=torch.long)
    for ids in (torch.tensor(o - 1), torch.arange(o), torch.randint(o, (3, 4)), torch.tensor([0, 0]), none):
        assert equal(m.rows(ids), full[ids])
    assert q[0].codes.data_ptr() == q.codes.data_ptr()


@every_format
def test_experts_are_quantised_alone(f):
    w = weights(3, 150, 200)
    q = quantize(w, f)
    for e in range(3):
        alone = quantize(w[e], f)
        assert all(same(a, b) for a, b in zip(alone.parts().values(), q[e].parts().values(), strict=True))


@every_format
@every_shape
def test_state_dict(f, shape, tmp_path):
    "Saved, read back in the file's own order of names, and decoded by what the spec says."
    q = quantize(weights(*shape), f)
    save_file({k: v.contiguous() for k, v in q.state_dict().items()}, tmp_path/'q.safetensors')
    read = load_file(tmp_path/'q.safetensors')
    back = QuantizedWeight(make_format(f.spec()), shape, dict(sorted(read.items())), q.dtype)
    assert equal(back.dequantize(), q.dequantize())
    other = quantize(torch.randn(shape), f)
    other.load_state_dict(read)
    assert equal(other.dequantize(), q.dequantize())
    if len(shape) == 2: assert equal(back.rows(torch.tensor([shape[0] - 1])), q.dequantize()[-1:])
    assert equal(copy.deepcopy(q).dequantize(), q.dequantize())


@every_format
def test_zeros(f):
    w = torch.zeros(3, 5, 130)
    assert equal(quantize(w, f).dequantize(), w)
    w[1, 2] = torch.randn(130)
    got = quantize(w, f).dequantize()
    w[1, 2] = got[1, 2]
    assert equal(got, w) and got.any()


@every_format
@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
def test_not_numbers(f, bad):
    w = torch.ones(2, 40)
    w[1, 3] = bad
    with pytest.raises(ValueError, match=r'weight of shape \(2, 40\) has NaN or infinite values'): quantize(w, f)


@every_format
@pytest.mark.parametrize('size', [1e-45, 1e-40, 1e-30, 1e-6, 1e4, 1e30, 3.4e38])
def test_extreme_sizes(f, size):
    "Finite, no larger than what went in by more than a rounding, and as exact as at size one where the scale allows it."
    torch.manual_seed(0)
    x = torch.randn(6, 256).clamp(-3, 3)/3
    w = x*size
    refused = {'int4': (1e5, 'numbers beyond 65504'), 'int8-fine': (6e4, 'numbers beyond 65,504'),
               'fp8': (3e38, 'numbers beyond 2.9e38'), 'fp4': (3e38, 'numbers beyond 2.5e38')}
    if f == NF4(): refused['nf4'] = 1e38, 'use double=False'
    if f.name == 'int8' and f.group: refused['int8'] = 8e6, 'numbers beyond 8 million'
    most, text = refused.get(f.name, (4e38, ''))
    if size > most:
        with pytest.raises(ValueError, match=text): quantize(w, f)
        return
    got = quantize(w, f).dequantize()
    assert got.isfinite().all() and got.abs().max() <= 1.2*w.abs().max()
    exact = {'int8': 10 if getattr(f, 'group', 0) else 1e-30, 'int8-fine': 1, 'int4': 1e-2, 'nf4': 1e-30, 'fp8': 1e-6, 'fp4': 1e-30}[f.name]
    if size >= exact: assert relative_error(w.double()/size, got.double()/size) < 1.2*relative_error(x, quantize(x, f).dequantize())


BITS = {Int8(): 8 + 32/1024, Int8(group=32): 8.5, Int8(group=64): 8.25, Int8Fine(): 9, Int8Fine(64): 8.5,
        Int4(): 5, Int4(64): 4.5, Int4(128): 4.25, Int4(symmetric=True): 4.5, Int4(64, symmetric=True): 4.25,
        Int4(128, symmetric=True): 4.125, NF4(): 4 + 8/64 + 32/(64*256) + 32/2**18, NF4(double=False): 4.5,
        FP8(): 8 + 32/128**2, FP8('ue8m0'): 8 + 8/128**2, FP4(): 4.25}
ERROR = {'int8': .0105, 'int8-fine': .0055, 'int4': .112, 'nf4': .0925, 'fp8': .0267, 'fp4': .117}


def test_two_codes_of_an_activation():
    "Against float64, an element at a time; the rest is 128 times finer than the step."
    for n in (1, 31, 32, 70, 576):
        x = torch.randn(5, n)*10.**torch.randint(-6, 6, (5, 1))
        codes, rest, scales = fine_activations(x)
        steps = scales.double().repeat_interleave(32, -1)[:, :n]
        assert (rest.abs() <= 64).all() and (codes.abs() <= 127).all()
        exact = x.double()/steps
        assert ((codes + rest.double()/128 - exact).abs() <= 1/256 + 1e-4).all()
        assert torch.equal(codes, round_activations(x)[0]) and torch.equal(scales, round_activations(x)[1])
        assert relative_error(x, rounded_fine(x)) < relative_error(x, rounded(x))/50 + 1e-6


@every_format
def test_cost_and_loss(f):
    w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(1))
    q = quantize(w, f)
    assert q.nbytes*8/w.numel() == BITS[f] and .4*ERROR[f.name] < relative_error(w, q.dequantize()) < ERROR[f.name]


@every_format
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_model_dtype(f, dtype):
    w = torch.randn(10, 70).to(dtype)
    q = quantize(w, f)
    assert q.dequantize().dtype == dtype and equal(q.dequantize(), quantize(w.float(), f).dequantize().to(dtype))
    before = {n: b.clone() for n, b in q.named_buffers()}
    q.to(torch.float64)
    assert q.dequantize().dtype == torch.float64 and all(same(b, before[n]) for n, b in q.named_buffers())


@every_format
def test_in_layers(f):
    layer, table, x = nn.Linear(70, 9), nn.Embedding(9, 70), torch.randn(4, 70, requires_grad=True)
    replace_parameter(layer, 'weight', quantize(layer.weight, f))
    replace_parameter(table, 'weight', layer.weight)
    w = layer.weight.dequantize()
    with use('reference'): y = layer(x)
    torch.testing.assert_close(y, x @ w.T + layer.bias)
    y.sum().backward()
    torch.testing.assert_close(x.grad, w.sum(0).expand(4, -1))
    assert equal(table(torch.tensor([[3, 8]])), w[torch.tensor([[3, 8]])])


@every_format
def test_by_name(f):
    assert make_format(f.spec()) == f and type(make_format(f.name)) is type(f)
    with pytest.raises(ValueError, match="has no field 'bits'"): make_format(f.spec() | dict(bits=3))


@pytest.mark.parametrize('spec,text', [
    (dict(format='int4', group=48), 'int4 group 48'), (dict(format='int4', group=0), 'int4 group 0'), ('nf8', "unknown format 'nf8'"),
    (dict(format='int8', activations='fp4'), "activations 'fp4'"), (dict(format='int8', group=48), 'int8 group 48'),
    (dict(format='fp8', scale='float16'), "fp8: scale 'float16' must be")], ids=str)
def test_bad_formats(spec, text):
    with pytest.raises(ValueError, match=text): make_format(spec)


# ---- packing

@pytest.mark.parametrize('i', [1, 2, 5, 32, 64, 97])
def test_nibbles(i):
    codes = torch.randint(16, (3, 2, i), dtype=torch.uint8)
    for first in (True, False):
        packed = pack_pairs(codes, first)
        assert packed.shape == (3, 2, -(-i//2)) and equal(unpack_pairs(packed, first)[..., :i], codes)
        assert (packed[..., 0] >> 4*first & 15).equal(codes[..., 0])
    whole = F.pad(codes, (0, -i % 32))
    assert equal(unpack_nibbles(pack_nibbles(whole)), whole)


# ---- int8's activations

@settings(max_examples=50, deadline=None)
@given(i=st.integers(1, 200), block=st.sampled_from([16, 32, 128]), seed=st.integers(0, 2**31))
def test_activations_int8(i, block, seed):
    x = weights(4, i, seed=seed)
    codes, scales = round_activations(x, block)
    for g in range(0, i, block):
        part = x[:, g:g+block]
        scale = part.abs().amax(1)/127
        assert equal(scales[:, g//block], scale)
        assert equal(codes[:, g:g+block].float(), (part*(1/scale.clamp(min=torch.finfo().tiny))[:, None]).round().clamp(-127, 127))
        assert equal(rounded(x, block)[:, g:g+block], codes[:, g:g+block].float()*scale[:, None])


# ---- int4 and GGUF's own grids

def test_int4_is_q4():
    "A group's bytes in front of its scale are blocks of GGUF's Q4_0 and Q4_1."
    w = torch.randn(7, 96)
    for f, kind in ((Int4(symmetric=True), 'Q4_0'), (Int4(), 'Q4_1')):
        q = quantize(w, f)
        head = torch.stack([q.scales, *([q.mins] if kind == 'Q4_1' else [])], -1).view(torch.uint8)
        blocks = torch.cat([head, q.codes.unflatten(-1, (3, 16))], -1).flatten(1)
        assert equal(torch.tensor(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])), q.dequantize())


# ---- NF4 and bitsandbytes

@pytest.fixture(scope='module')
def bnb(): return pytest.importorskip('bitsandbytes').functional


def by_bitsandbytes(bnb, w, double=True):
    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type='nf4', compress_statistics=double)
    return codes, state, bnb.dequantize_4bit(codes, state)


def normal_levels():
    "QLoRA's derivation in float64."
    def half(n): return torch.special.ndtri(torch.linspace(.9677083, .5, n, dtype=torch.float64))
    levels = torch.cat([-half(8), half(9)[:-1].flip(0)])
    return levels/levels.max()


def test_levels_are_quantiles():
    torch.testing.assert_close(LEVELS.double(), normal_levels(), rtol=0, atol=2e-7)
    assert (LEVELS.diff() > 0).all() and (DYNAMIC.diff() > 0).all() and len(DYNAMIC) == 256 and LEVELS[7] == DYNAMIC[127] == 0


def test_tables(bnb):
    assert same(bnb.get_4bit_type('nf4', 'cpu'), LEVELS)
    assert same(bnb.create_dynamic_map(), DYNAMIC)


NF4_INPUTS = dict(
    normal=lambda *s: torch.randn(*s), uneven=lambda *s: weights(*s), zeros=lambda *s: torch.zeros(*s), ones=lambda *s: torch.ones(*s),
    negative=lambda *s: -torch.ones(*s), tails=lambda *s: torch.distributions.StudentT(2.).sample(s),
    small=lambda *s: 1e-30*torch.randn(*s),
    smallest=lambda *s: 1e-41*torch.randn(*s), large=lambda *s: 1e30*torch.randn(*s), lattice=lambda *s: torch.randn(*s).mul(4).round(),
    midway=lambda *s: ((LEVELS[1:] + LEVELS[:-1])/2)[torch.randint(15, s)].index_fill(-1, torch.arange(0, s[-1], 64), 1.),
    half=lambda *s: torch.randn(*s).half(), bfloat=lambda *s: torch.randn(*s).bfloat16())


@pytest.mark.parametrize('double', [True, False])
@pytest.mark.parametrize('shape', [(1, 64), (3, 64), (5, 320), (40, 512), (257, 128), (300, 576), (64, 2048)], ids=str)
@pytest.mark.parametrize('kind', NF4_INPUTS)
def test_nf4_equals_bitsandbytes(bnb, kind, shape, double):
    torch.manual_seed(0)
    w = NF4_INPUTS[kind](*shape)
    codes, state, want = by_bitsandbytes(bnb, w, double)
    q = quantize(w, NF4(double))
    assert same(q.codes.flatten(), codes.flatten())
    if double and kind == 'smallest': return  # the inverse of a subnormal scale is infinite there; ours is the test of extreme sizes
    assert same(q.absmax.flatten(), state.absmax.flatten())
    if double: assert same(q.scales, state.state2.absmax) and same(q.offset, state.offset.reshape(1))
    assert equal(q.dequantize(), want)
    assert q.nbytes == sum(t.nbytes for t in (codes, state.absmax, *([state.offset, state.state2.absmax] if double else [])))


@settings(max_examples=40, deadline=None)
@given(o=st.integers(1, 30), g=st.integers(1, 12), seed=st.integers(0, 2**31))
def test_nf4_equals_bitsandbytes_anywhere(bnb, o, g, seed):
    w = weights(o, 64*g, seed=seed)
    codes, state, want = by_bitsandbytes(bnb, w)
    q = quantize(w, 'nf4')
    assert same(q.codes.flatten(), codes.flatten()) and same(q.absmax.flatten(), state.absmax.flatten())
    assert equal(q.dequantize(), want)


def test_each_expert_equals_bitsandbytes(bnb):
    w = weights(3, 70, 384)
    q = quantize(w, 'nf4')
    for e in range(3): assert equal(q[e].dequantize(), by_bitsandbytes(bnb, w[e])[2])


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 40), g=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_nested_scales(o, g, seed):
    absmax = torch.rand(2, o, g, generator=torch.Generator().manual_seed(seed)) + 1
    parts = nest(absmax)
    assert parts['scales'].shape == (2, -(-o*g//256)) and parts['absmax'].shape == (2, o, g)
    reach = parts['scales'].repeat_interleave(256, -1)[:, :o*g].reshape(2, o, g)
    assert ((unnest(**parts) - absmax).abs() <= reach*(DYNAMIC.diff().max()/2 + 2e-5) + 1e-6).all()


def test_nearest_is_nearest():
    x = torch.linspace(-1.2, 1.2, 100_001)
    for levels in (LEVELS, DYNAMIC):
        chosen = (levels[nearest(x, levels).long()].double() - x.double()).abs()
        assert (chosen <= (levels.double()[:, None] - x.double()).abs().amin(0) + 1e-8).all()


# ---- E4M3

def all_halves():
    x = torch.arange(-2**15, 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    return x[~x.isnan()]


def test_e4m3_of_every_half():
    x = all_halves()
    want = x.clamp(-448, 448).to(E4M3)
    assert equal(small_codes(x) | x.signbit().to(torch.uint8) << 7, want.view(torch.uint8))
    assert equal(small_values(small_codes(x))*torch.where(x.signbit(), -1, 1), want.float())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_e4m3_of_random_bits(seed):
    x = torch.randint(-2**31, 2**31, (20_000,), generator=torch.Generator().manual_seed(seed)).to(torch.int32).view(torch.float32)
    x = torch.cat([x[~x.isnan()], torch.randn(20_000)*torch.randint(-12, 10, (20_000,)).float().exp2()])
    assert equal(small_codes(x), x.abs().clamp(max=448).to(E4M3).view(torch.uint8))


def test_e4m3_edges():
    codes = torch.arange(127, dtype=torch.uint8)
    values = codes.view(E4M3).float()
    assert equal(small_values(codes), values) and equal(small_codes(values), codes)
    middle = (values[1:] + values[:-1])/2
    for x in (middle, middle.nextafter(torch.tensor(1e9)), middle.nextafter(torch.tensor(0.))):
        assert equal(small_codes(x), x.to(E4M3).view(torch.uint8))
    assert equal(small_codes(middle) % 2, torch.zeros(126, dtype=torch.uint8))


def test_e5m2_too():
    "The widths are arguments: the other type of 8 bits."
    x = all_halves().abs()
    x = x[x <= 57344]
    assert equal(small_codes(x, 2, -14, 57344.), x.to(torch.float8_e5m2).view(torch.uint8))


# ---- FP8 in blocks

def act_quant(x, round_scale):
    "DeepSeek's `act_quant`, tile by tile: the largest magnitude, 1e-4 or more, over 448."
    codes, scales = torch.empty(x.shape, dtype=E4M3), torch.empty(len(x), -(-x.shape[1]//128))
    for n in range(len(x)):
        for t in range(scales.shape[1]):
            part = x[n, 128*t:128*t+128].float()
            scale = part.abs().max().clamp(min=1e-4)/448
            scales[n, t] = s = torch.tensor(deepseek_power(scale.item())) if round_scale else scale
            codes[n, 128*t:128*t+128] = (part/s).clamp(-448, 448).to(E4M3)
    return codes, scales


@pytest.mark.parametrize('ue8m0', [False, True])
@pytest.mark.parametrize('shape', [(1, 1), (3, 128), (5, 200), (9, 1000)], ids=str)
@pytest.mark.parametrize('size', [1, 1e-5, 1e-12, 1e5])
def test_activations_fp8(shape, ue8m0, size):
    x = weights(*shape)*size
    want, scales = act_quant(x, ue8m0)
    got, got_scales = round_activations_fp8(x[None], ue8m0)
    assert same(got[0], want) and same(got_scales[0], scales)
    assert equal(rounded_fp8(x, ue8m0), want.float()*scales.repeat_interleave(128, 1)[:, :shape[1]])


@pytest.mark.parametrize('ue8m0', [False, True])
@every_shape
def test_fp8_is_the_checkpoints(shape, ue8m0):
    "Parts and numbers are those that DeepSeek's files hold."
    w = weights(*shape)
    f = FP8('ue8m0' if ue8m0 else 'float32')
    q = quantize(w, f)
    for got, codes, scales, m in zip(*(t.reshape(-1, *t.shape[-2:]) for t in (q.dequantize(), q.codes, q.scales, w)), strict=True):
        want = quant_fp8(m, ue8m0)
        assert same(codes, want[0]) and equal(scales.float(), want[1]) and equal(got, dequant_fp8(*want))
    assert q.scales.dtype == (torch.float8_e8m0fnu if ue8m0 else torch.float32)
    assert q.scales.shape[-2:] == (-(-shape[-2]//128), -(-shape[-1]//128))


def test_fp8_error_of_each_weight():
    w = weights(200, 300)
    q = quantize(w, FP8())
    scale = q.scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert ((q.dequantize() - w).abs() <= w.abs()/16*(1 + 1e-5) + scale*2**-10).all()


# ---- FP4

def test_e2m1():
    x = all_halves()
    got, magnitudes = E2M1[to_e2m1(x).long()], E2M1[:8].double()
    far = (x.double().abs().clamp(max=6)[:, None] - magnitudes).abs()
    assert equal((got - x.clamp(-6, 6)).abs().double(), far.amin(1)) and equal(got.signbit(), x.signbit())
    tie = (far == far.amin(1, keepdim=True)).sum(1) == 2
    assert tie.sum() == 14 and (to_e2m1(x[tie]) % 2 == 0).all()


@pytest.mark.parametrize('shape', [(1, 32), (5, 96), (40, 320)], ids=str)
def test_fp4_decodes_as_gguf_does(shape):
    "GGUF's MXFP4 has the same codes and scales, in another order."
    q = quantize(weights(*shape), 'fp4')
    codes = unpack_pairs(q.codes, high_first=False).unflatten(-1, (-1, 32))
    blocks = torch.cat([q.scales.view(torch.uint8)[..., None], codes[..., :16] | codes[..., 16:] << 4], -1).flatten(1)
    assert equal(torch.tensor(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4)), q.dequantize())


def test_fp4_decodes_as_deepseek_does():
    "The table of V4's `convert.py`: even columns in the low nibble, a scale for 32."
    table = torch.tensor([0., .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6])
    weight, exponent = torch.randint(-128, 128, (6, 48), dtype=torch.int8), torch.randint(100, 150, (6, 3), dtype=torch.uint8)
    x = weight.view(torch.uint8)
    numbers = torch.stack([table[(x & 15).long()], table[(x >> 4).long()]], -1).flatten(1)
    want = numbers*torch.exp2(exponent.float() - 127).repeat_interleave(32, 1)
    q = QuantizedWeight(FP4(), (6, 96), dict(codes=x, scales=exponent.view(torch.float8_e8m0fnu)))
    assert equal(q.dequantize(), want)
    assert equal(quantize(want, 'fp4').dequantize(), want)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 2.**125, width=32))
def test_round_up_scale(x):
    got = round_up_scale(torch.tensor([x]).clamp(min=2.**-126)).item()
    assert got >= x and got >= 2**-126 and (got == 2**-126 or got/2 < x) and got == deepseek_power(max(x, 2**-126))


# ---- scales that are powers of two

def test_scales_are_rounded_up_to_the_bit():
    "A logarithm in float32 rounds, and just above a power of two its ceiling is one too low."
    from deepseek_nb.quant.fp8 import quant_tiles
    exact = torch.ldexp(torch.ones(200), torch.arange(-100, 100))
    above,below = (exact.nextafter(torch.tensor(x)) for x in (torch.inf, 0.))
    for got,want in ((exact, exact), (above, 2*exact), (below, exact)): assert torch.equal(round_up_scale(got), want)
    x = torch.rand(10000)*10 + 1e-6
    m,e = torch.frexp(x)
    assert torch.equal(round_up_scale(x), torch.ldexp(torch.ones_like(x), e - (m == .5).int()))
    assert round_up_scale(torch.tensor([torch.nan])).isnan().all()
    for k in range(-6, 6):  # 448 times a number just above a power of two
        amax = (448*exact[100 + k]).nextafter(torch.tensor(torch.inf)).nextafter(torch.tensor(torch.inf))
        w = torch.zeros(1, 128)
        w[0, 3] = amax
        want = round_up_scale(amax/448)
        assert quant_fp8(w, ue8m0=True)[1].item() == quant_tiles(w, ue8m0=True)[1].item() == want and amax/want <= 448

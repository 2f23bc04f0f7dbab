"Products with weights in few bits in CUDA: compiled, and emulated against float64, in an order of threads drawn for each test."
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from deepseek_nb.arch.moe import run_experts
from deepseek_nb.core import nbproc
from deepseek_nb.core.nbproc import find_compiler, source_text
from deepseek_nb.cuda.build import ARCHS, find_nvrtc, resources
from deepseek_nb.cuda.emulation import ORDERS, thread_order
from deepseek_nb.cuda.quant import (
    decoded_shared,
    experts_in_codes,
    fits_coded_experts,
    fits_codes,
    fits_fp8_weight,
    group_of,
    in_order,
    linear_codes,
    linear_fp8_weight,
    product_decoded,
    product_int8,
    round_rows,
    run_experts_codes,
    signed_group,
    vector_launch,
)
from deepseek_nb.kernels.panels import Panels, pack_panels
from deepseek_nb.quant import QuantizedWeight, linear_quantized, quantize
from deepseek_nb.quant.fp8 import FP8, rounded_fp8
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8, round_activations, rounded

BF16 = torch.bfloat16
FOURS = [Int4(g, s) for g in (32, 64, 128) for s in (False, True)]
DECODED = [Int4(), Int4(64, symmetric=True), Int4(128), Int8('float'), Int8(group=64)]


def found(kind):
    try: return bool(find_compiler(kind))
    except FileNotFoundError: return False


needs_cpp = pytest.mark.skipif(not found('cpp'), reason='no C++ compiler, which emulation needs')
needs_cuda = pytest.mark.skipif(not (find_nvrtc() or found('cu')), reason='neither NVRTC nor nvcc here')


@pytest.fixture(autouse=True)
def seed():
    seed = torch.seed() % 2**32
    print('seed', seed)
    torch.manual_seed(seed)


def error(y, exact): return ((y.double() - exact).abs().max()/exact.abs().max().clamp(min=1e-30)).item()
def weight(o, i, f): return quantize(torch.randn(o, i).to(BF16), f)
def decoded(w): return w.format.decode(w.parts(), w.shape).double()


def right(y, x, w, bias=0, result=2**-8, terms=2**-9):
    "Within what rounding the result and what is added up can do, by default to bfloat16"
    exact,sizes = x.double()@w.T + bias, x.double().abs()@w.abs().T
    return bool(((y.double() - exact).abs() <= exact.abs()*result + sizes*terms + 1e-6).all())


# ---- activations in 8 bits

@needs_cpp
@pytest.mark.parametrize('dtype', [torch.float32, BF16])
@pytest.mark.parametrize('n,i', [(1, 4), (3, 32), (2, 36), (2, 512), (3, 516), (1, 1100)])
def test_rounding_is_the_definitions(order, n, i, dtype):
    x = (torch.randn(n, i)*10**torch.randn(n, i)).to(dtype)
    x.view(-1)[torch.randint(n*i, (3,))] = torch.tensor([0., 1e-40, 1e30]).to(dtype)
    if n == 3: x[0, 1],x[1, -1],x[2] = torch.nan, -torch.inf, 0
    codes,scales = round_rows(x)
    exact = round_activations(x)
    assert torch.equal(codes, exact[0]) and torch.equal(scales.nan_to_num(-1), exact[1].nan_to_num(-1))


# ---- integers

SHAPES = [(1, 16, 1), (1, 48, 7), (1, 2064, 6), (2, 16, 3), (17, 144, 130), (5, 272, 129), (66, 80, 2)]


@needs_cpp
@pytest.mark.parametrize('n,i,o', SHAPES)
def test_integers(order, n, i, o):
    x,w,bias = torch.randn(n, i), weight(o, i, 'int8'), torch.randn(o).to(BF16)
    codes,meant = (*round_rows(x), w.codes, w.scales), (rounded(x), decoded(w))
    for defines in ({}, dict(ROWS=16), dict(ROWS=64)):
        assert right(product_int8(*codes, **defines), *meant, result=2**-22, terms=2**-22)
        assert right(product_int8(*codes, bias, BF16, **defines), *meant, bias, terms=2**-22)


@needs_cpp
@pytest.mark.parametrize('sign', [1, -1])
def test_largest_sums_are_exact(order, sign):
    q = torch.full((3, 96), 127, dtype=torch.int8)
    q[1] = torch.randint(-127, 128, (96,))
    w = torch.full((9, 96), 127*sign, dtype=torch.int8)
    w[5] = torch.randint(-127, 128, (96,))
    exact = (q.double()@w.double().T).float()
    for defines in (dict(ROWS=16), dict(ROWS=64)): assert torch.equal(product_int8(q, torch.ones(3, 3), w, torch.ones(9), **defines), exact)
    assert torch.equal(product_int8(q[:1], torch.ones(1, 3), w, torch.ones(9)), exact[:1])


@needs_cpp
@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('n', [1, 4])
def test_bad_activations_as_integers(order, value, n):
    x,w = torch.randn(n, 80), weight(6, 80, 'int8')
    w.codes[2],w.scales[2] = 0, 0
    x[-1, 70] = value
    y = product_int8(*round_rows(x), w.codes, w.scales)
    assert torch.equal(y.isnan(), (rounded(x)@decoded(w).float().T).isnan())
    assert y[-1].isnan().all() and y[:-1].isfinite().all()


@needs_cpp
@pytest.mark.parametrize('n,i,o', [(1, 144, 129), (18, 560, 131)])
def test_split_products(order, n, i, o):
    "Two parts, three, and five, of which some have no step"
    x,w,bias = torch.randn(n, i).to(BF16), weight(o, i, 'int8'), torch.randn(o).to(BF16)
    for parts in (2, 5):
        assert right(product_int8(*round_rows(x), w.codes, w.scales, bias, BF16, parts=parts), rounded(x), decoded(w), bias, terms=2**-22)
    for f in (Int4(), Int8('float')):
        w = weight(o, i, f)
        for splits in (2, 3, 5):
            assert right(product_decoded(x, w.parts(), signed_group(f), bias, splits=splits, ROWS=16), x, decoded(w), bias)


# ---- decoded weights

@needs_cpp
@pytest.mark.parametrize('f', DECODED, ids=str)
@pytest.mark.parametrize('n,i,o,heights', [(1, 32, 1, (16,)), (1, 4176, 5, ()), (18, 144, 130, (16, 128)), (5, 272, 129, (128,))])
def test_decoded(order, f, n, i, o, heights):
    x,w,bias = torch.randn(n, i).to(BF16), weight(o, i, f), torch.randn(o).to(BF16)
    parts,group = w.parts(), signed_group(f)
    assert right(product_decoded(x, parts, group), x, decoded(w))
    assert right(product_decoded(x, parts, group, bias), x, decoded(w), bias)
    for rows in heights: assert right(product_decoded(x, parts, group, bias, ROWS=rows), x, decoded(w), bias)


@needs_cpp
@pytest.mark.parametrize('f', FOURS, ids=str)
@pytest.mark.parametrize('i', [1, 31, 33, 70, 100, 200])
def test_widths_that_32_does_not_divide(f, i):
    x,w = torch.randn(3, i).to(BF16), weight(9, i, f)
    for n in (1, 3): assert right(product_decoded(x[:n], w.parts(), signed_group(f)), x[:n], decoded(w))


@needs_cpp
@pytest.mark.parametrize('f', [*FOURS, Int8('float'), Int8(group=32)], ids=str)
def test_unit_vectors_give_the_weight(order, f):
    "Each decoded number, bit for bit, in tiles and one by one"
    w,x = weight(5, 160, f), torch.eye(160).to(BF16)
    for defines in (dict(ROWS=16), dict(ROWS=64), dict(ROWS=128)):
        assert torch.equal(product_decoded(x, w.parts(), signed_group(f), **defines).T, w.dequantize())
    one = torch.cat([product_decoded(x[j:j+1], w.parts(), signed_group(f)) for j in range(0, 160, 7)])
    assert torch.equal(one.T, w.dequantize()[:, ::7])


@needs_cpp
@pytest.mark.parametrize('symmetric', [True, False])
def test_every_code_and_every_half(symmetric):
    "All positive halves that are numbers, subnormal ones too, with all sixteen codes"
    halves = torch.arange(0x7c00, dtype=torch.int16).view(torch.float16)
    halves = halves[torch.randperm(len(halves))[:1024]].view(-1, 1)
    halves[:3, 0] = torch.tensor([0, 2**-24, 2**-14 - 2**-24])
    codes = torch.tensor([[16*j + j for j in range(16)]], dtype=torch.uint8).repeat(1024, 1)
    parts = dict(codes=codes, scales=halves, **({} if symmetric else dict(mins=-halves.roll(1, 0))))
    w = QuantizedWeight(Int4(32, symmetric), (1024, 32), parts, BF16)
    y = product_decoded(torch.eye(32).to(BF16), parts, 32, ROWS=16)
    if symmetric: assert torch.equal(y.T, w.dequantize())
    else: assert ((y.T.double() - decoded(w)).abs() <= decoded(w).abs()*2**-8 + halves.double()*2**-19).all()


@needs_cpp
@pytest.mark.parametrize('f', [Int4(), Int4(64, symmetric=True), Int8('float')], ids=str)
@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_bad_activations_behave_as_the_definition(order, f, value):
    x,w = torch.randn(4, 96).to(BF16), weight(6, 96, f)
    w.codes[2],w.scales[3] = 0x88 if f.name == 'int4' else 0, 0   # weights that are zero, and so times infinity NaN
    x[2, 70] = value
    exact = x.float()@w.dequantize().float().T
    for rows in (slice(0, 4), slice(2, 3)):
        y,meant = product_decoded(x[rows], w.parts(), signed_group(f)), exact[rows]
        assert torch.equal(y.isnan(), meant.isnan()) and torch.equal(y.isinf(), meant.isinf())
        assert torch.equal(y.float()[y.isinf()], meant[y.isinf()])
    assert not exact[2].isfinite().any()


# ---- nothing outside of a tensor is touched

GUARDED = """
import ctypes, torch
from deepseek_nb.cuda.build import launch
from deepseek_nb.cuda import experts as cuda_experts
from deepseek_nb.cuda import quant as qc
from deepseek_nb.quant import quantize
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8

libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int]*3, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def raw(t): return t.view(-1).view(torch.uint8)

def guarded(t, at_end):
    "The same values between two pages that nobody may touch, at the end or the start of what lies between"
    n = t.numel()*t.element_size()
    inside = -(-n//4096)*4096
    base = libc.mmap(None, inside + 8192, 3, 0x22, -1, 0)
    libc.mprotect(base, 4096, 0), libc.mprotect(base + 4096 + inside, 4096, 0)
    there = torch.frombuffer((ctypes.c_char*n).from_address(base + 4096 + (inside - n if at_end else 0)), dtype=torch.uint8)
    return there.copy_(raw(t)).view(t.dtype).view(t.shape)

def moved_to(a, at_end):
    if isinstance(a, dict): return {k: moved_to(v, at_end) for k,v in a.items()}
    return guarded(a, at_end) if isinstance(a, torch.Tensor) else a

def copy_back(a, m):
    if isinstance(a, dict): [copy_back(v, m[k]) for k,v in a.items()]
    elif isinstance(a, torch.Tensor): raw(a).copy_(raw(m))

def guarded_launch(name, kernel, grid, block, *args, **options):
    given = dict(options, args=dict(enumerate(args)))
    moved = moved_to(given, at_end)
    launch(name, kernel, grid, block, *moved.pop('args').values(), **moved)
    copy_back(options, moved)

for module in (qc, cuda_experts): module.launch = guarded_launch
for at_end in (True, False):
    for n,i,o in [(1, 16, 1), (1, 80, 6), (3, 48, 5), (18, 144, 130)]:
        x,bias = torch.randn(n, i), torch.randn(o)
        w = quantize(torch.randn(o, i), 'int8')
        assert qc.product_int8(*qc.round_rows(x), w.codes, w.scales, bias).isfinite().all()
        for f in (Int4(), Int4(64, symmetric=True), Int8('float'), Int8(group=32)):
            w = quantize(torch.randn(o, i).bfloat16(), f)
            assert qc.product_decoded(x.bfloat16(), w.parts(), qc.signed_group(f), bias.bfloat16()).isfinite().all()
    for f in (Int4(), Int8('float'), Int8()):
        stacks = [quantize(torch.randn(*s).bfloat16(), f) for s in ((6, 64, 96), (6, 96, 32))]
        x,w,experts = torch.randn(19, 96).bfloat16(), torch.rand(19, 3), torch.rand(19, 6).topk(3).indices
        assert qc.run_experts_codes(x, w, experts, *stacks).isfinite().all()
print('untouched')
"""


@needs_cpp
@pytest.mark.skipif(sys.platform != 'linux', reason='mmap and mprotect as Linux has them')
def test_nothing_outside_is_touched(python):
    assert python(GUARDED) == 'untouched'


# ---- a barrier less

def wrong_somewhere(monkeypatch, old, new, run, exact, tolerance, header='quant.cuh'):
    "Whether a change in the header shows in at least one order of threads"
    text = source_text(header)
    assert old in text
    monkeypatch.setitem(nbproc._session, header, {'cell': text.replace(old, new)})
    def wrong(order):
        with thread_order(order): return not error(run(), exact) < tolerance
    return any([wrong(o) for o in ORDERS])


@needs_cpp
@pytest.mark.parametrize('old,new', [('        __syncthreads();\n', ''), ('wait_copies<STAGES - 2>();', 'wait_copies<STAGES - 1>();')])
def test_missing_barrier_or_wait_of_a_tile(monkeypatch, old, new):
    x,w = torch.randn(20, 640).to(BF16), weight(130, 640, Int4())
    exact = x.double()@decoded(w).T
    assert error(product_decoded(x, w.parts(), 32, ROWS=16), exact) < 2**-7
    assert wrong_somewhere(monkeypatch, old, new, lambda: product_decoded(x, w.parts(), 32, ROWS=16), exact, 2**-7)


@needs_cpp
def test_missing_barrier_of_one_token(monkeypatch):
    x,w = torch.randn(1, 4096).to(BF16), weight(5, 4096, Int4())
    exact = x.double()@decoded(w).T
    run = lambda: product_decoded(x, w.parts(), 32)
    assert vector_launch(128, 5) == (2, 128, 64) and error(run(), exact) < 2**-7
    assert wrong_somewhere(monkeypatch, '\n    __syncthreads();\n', '\n', run, exact, 2**-7, 'int8.cuh')


# ---- the twins

@needs_cpp
@pytest.mark.parametrize('f', [*DECODED, Int8()], ids=str)
def test_linear(order, f):
    x,w,bias = torch.randn(272, 2, 3).to(BF16).permute(1, 2, 0), weight(7, 272, f), torch.randn(8).to(BF16)[1:]
    meant = rounded(x) if f == Int8() else x
    for y in (linear_codes(x, w, bias), linear_codes(x, pack_panels(w), bias)):
        assert y.shape == (2, 3, 7) and y.dtype == BF16 and right(y, meant, decoded(w), bias)
    assert linear_codes(x[:0], w).shape == (0, 3, 7)


@pytest.mark.parametrize('f', [Int8(), Int4(), Int4(64, symmetric=True)], ids=str)
def test_panels_are_put_in_order(f):
    stack = quantize(torch.randn(3, 20, 80), f)
    before = {n: t.clone() for n,t in stack.parts().items()}
    pack_panels(stack)
    one,again = in_order(stack[1]), in_order(stack)
    assert isinstance(pack_panels(quantize(torch.randn(4, 32), f)).layout, Panels) and in_order(again) is again
    for n,t in before.items(): assert torch.equal(again.parts()[n], t) and torch.equal(one.parts()[n], t[1])
    assert {n for n,_ in again.named_buffers()} == set(before)


def test_what_the_twins_take():
    x,fours,eights,floats = torch.randn(2, 48).to(BF16), *(weight(6, 48, f) for f in (Int4(), Int8(), Int8('float')))
    assert all(fits_codes(x, w) for w in (fours, eights, floats)) and fits_codes(x.float(), eights)
    assert not fits_codes(x.float(), fours) and not fits_codes(x.float(), floats) and not fits_codes(x.half(), eights)
    assert not fits_codes(x, fours.float())                           # a model in float32
    assert not fits_codes(x[:, :20], weight(6, 20, Int8())) and fits_codes(x[:, :20], weight(6, 20, Int4()))
    assert not fits_codes(x, torch.randn(6, 48)) and not fits_codes(x, weight(6, 48, 'fp8'))
    assert not fits_codes(x, quantize(torch.randn(2, 6, 48).to(BF16), Int4()))
    assert not fits_codes(x, fours, torch.randn(6)) and fits_codes(x, eights, torch.randn(6).to(BF16))
    bias = torch.zeros(6, dtype=BF16, requires_grad=True)
    assert not fits_codes(x.clone().requires_grad_(), eights) and not fits_codes(x, eights, bias)
    with torch.no_grad(): assert fits_codes(x, eights, bias)
    assert linear_quantized.op.twins['cuda/cuda'].fn is linear_codes and linear_quantized.op.twins['cuda/cuda/fp8'].fn is linear_fp8_weight


@needs_cpp
@pytest.mark.parametrize('f', [FP8(), FP8('ue8m0')], ids=str)
def test_fp8(order, f):
    x,w = torch.randn(2, 3, 144).to(BF16), weight(130, 144, f)
    assert fits_fp8_weight(x, w) and not fits_fp8_weight(x, w, torch.zeros(130)) and not fits_fp8_weight(x[..., :16], weight(7, 16, f))
    assert error(linear_fp8_weight(x, w), rounded_fp8(x).double()@decoded(w).T) < 2**-7


@needs_cpp
def test_a_layer_on_a_card(monkeypatch):
    "`F.linear` finds the twin, as on a GPU, but emulated"
    op = linear_quantized.op
    op.plan('auto', 'cpu')
    twin = replace(op.twins['cuda/cuda'], device='cpu', available=None)
    monkeypatch.setitem(op.twins, twin.name, twin)
    monkeypatch.setattr(op, 'plans', {})
    x,w = torch.randn(3, 96).to(BF16), weight(8, 96, Int4())
    with torch.no_grad(): assert torch.equal(F.linear(x, w), linear_codes(x, w))
    leaf = x.clone().requires_grad_()
    F.linear(leaf, w).sum().backward()
    assert error(leaf.grad, decoded(w).sum(0).expand(3, 96)) < 2**-6


@needs_cpp
def test_under_compile():
    x,w8,w4 = torch.randn(2, 48).to(BF16), weight(6, 48, Int8()), weight(6, 48, Int4())
    f = torch.compile(lambda x: linear_codes(x, w8)*2 + linear_codes(x, w4), fullgraph=True, backend='aot_eager')
    with torch.inference_mode(): assert torch.equal(f(x), linear_codes(x, w8)*2 + linear_codes(x, w4))


@pytest.mark.parametrize('change,message', [
    (dict(s=torch.ones(2, 1)), r's is torch.float32, shape \(2, 1\); expected .* \(2, 2\)'),
    (dict(w=torch.ones(3, 32).to(torch.int8)), r'w is torch.int8, shape \(3, 32\); expected .* \(3, 48\)'),
    (dict(ws=torch.ones(3).half()), 'ws is torch.float16'), (dict(bias=torch.ones(4)), 'bias is'),
    (dict(dtype=torch.float16), 'y is torch.float16'), (dict(q=torch.ones(2, 48)), 'q is torch.float32')])
def test_wrong_integers(change, message):
    ones = torch.ones(2, 48).to(torch.int8)
    with pytest.raises(ValueError, match=message):
        product_int8(**dict(q=ones, s=torch.ones(2, 2), w=torch.ones(3, 48).to(torch.int8), ws=torch.ones(3)) | change)


def test_wrong_levels():
    x,parts = torch.randn(2, 64).to(BF16), weight(3, 64, Int4()).parts()
    with pytest.raises(ValueError, match=r'codes is torch.uint8, shape \(3, 32\); expected torch.uint8, shape \(3, 16\)'):
        product_decoded(x[:, :32], parts, 32)
    with pytest.raises(ValueError, match='scales is torch.float16'): product_decoded(x, parts, 64)
    with pytest.raises(ValueError, match='x is torch.float32'): product_decoded(x.float(), parts, 32)
    with pytest.raises(ValueError, match='bias is torch.float32'): product_decoded(x, parts, 32, torch.zeros(3))
    with pytest.raises(ValueError, match='round_rows: x is torch.float16'): round_rows(x.half())


# ---- experts

def stack(g, *shape): return quantize((torch.randn(*shape)/shape[-1]**.5).to(BF16), g)
def stacks(e, d, f, formats): return stack(formats[0], e, 2*f, d), stack(formats[1], e, d, f)


def experts_exact(x, w, experts, gate_up, down):
    "The result with the weights that kernels use, and the sizes of what is added up, which rounding errors are relative to"
    def used(w): return w.dequantize().double() if w.format.name == 'int4' else decoded(w)
    y,sizes = torch.zeros(2, *x.shape, dtype=torch.float64)
    def rows(t, weight): return (rounded(t) if weight.format == Int8() else t).double()
    for e,(gu,dn) in enumerate(zip(used(gate_up), used(down), strict=True)):
        token,slot = torch.where(experts == e)
        gate,up = (rows(x[token], gate_up)@gu.T).chunk(2, -1)
        hidden = rows((F.silu(gate)*up).to(BF16), down)
        y.index_add_(0, token, hidden@dn.T*w[token, slot, None])
        sizes.index_add_(0, token, hidden.abs()@dn.abs().T*w[token, slot, None].abs())
    return y, sizes


def right_experts(y, *args):
    exact,sizes = experts_exact(*args)
    steps = 2**-6 if args[4].format == Int8() else 2**-7     # a hidden row's scale may fall to another code
    return bool(((y.double() - exact).abs() <= sizes*steps + 1e-5).all())


def codes_run(args, rows):
    gate_up,down = args[3:]
    return experts_in_codes(*args[:3], gate_up.parts(), down.parts(), (group_of(gate_up), group_of(down)), down.shape[2], rows)


@needs_cpp
@pytest.mark.parametrize('formats', [*((f, f) for f in (Int4(), Int8('float'), Int8())),
                                     (Int4(64, True), Int4(128)), (Int4(), Int8()), (Int8(group=64), Int4(64)),
                                     (Int8(), Int8(group=32))], ids=str)
@pytest.mark.parametrize('n,k,e,d,f', [(1, 2, 5, 96, 64), (19, 3, 6, 64, 96), (7, 1, 1, 32, 160)])
def test_experts(order, formats, n, k, e, d, f):
    args = torch.randn(n, d).to(BF16), torch.rand(n, k), torch.rand(n, e).topk(k).indices, *stacks(e, d, f, formats)
    highest = 64 if Int8() in formats else 128
    for rows in {64, highest}: assert right_experts(codes_run(args, rows), *args)
    assert right_experts(run_experts_codes(*args[:3], *map(pack_panels, args[3:])), *args)      # 16 rows, and parts put in order


@needs_cpp
@pytest.mark.parametrize('f', [Int4(), Int8()], ids=str)
@pytest.mark.parametrize('load', ['all to one', 'only the last', 'nobody', 'some to nobody'])
def test_loads(order, f, load):
    experts = torch.rand(18, 6).topk(2).indices
    if load == 'all to one': experts[:] = 3
    if load == 'only the last': experts[:] = 5
    if load == 'nobody': experts[:] = -1
    if load == 'some to nobody': experts[::3, 1] = 6
    args = torch.randn(18, 64).to(BF16), torch.rand(18, 2), experts, *stacks(6, 64, 32, (f, f))
    assert right_experts(run_experts_codes(*args), *args)
    assert run_experts_codes(args[0][:0], args[1][:0], experts[:0], *args[3:]).shape == (0, 64)


@needs_cpp
@pytest.mark.parametrize('f', [Int4(), Int8('float'), Int8()], ids=str)
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_bad_tokens_stay_alone(order, f, value):
    args = torch.randn(5, 64).to(BF16), torch.rand(5, 1), torch.arange(5)[:, None] % 4, *stacks(4, 64, 32, (f, f))
    args[0][1, 7] = value
    assert run_experts_codes(*args).isfinite().all(1).tolist() == [True, False, True, True, True]


def test_what_the_experts_take():
    args = torch.randn(3, 64).to(BF16), torch.rand(3, 2), torch.zeros(3, 2).long(), *stacks(4, 64, 32, (Int4(), Int8()))
    assert fits_coded_experts(*args) and not fits_coded_experts(args[0].float(), *args[1:])
    assert not fits_coded_experts(*args[:3], args[3].dequantize(), args[4])
    assert not fits_coded_experts(args[0], args[1].clone().requires_grad_(), *args[2:])
    assert not fits_coded_experts(args[0][:, :48], *args[1:3], *stacks(4, 48, 32, (Int4(), Int4())))
    assert not fits_coded_experts(*args[:3], *stacks(4, 64, 32, ('fp8', 'fp8')))
    assert not fits_coded_experts(*args[:3], stack(Int4(), 4, 64, 64).float(), args[4])
    assert run_experts.op.twins['cuda/cuda/codes'].fn is run_experts_codes
    with pytest.raises(ValueError, match='experts is torch.int32'): run_experts_codes(*args[:2], args[2].int(), *args[3:])
    with pytest.raises(ValueError, match='weights is torch.float32, shape'): run_experts_codes(args[0], args[1][:2], *args[2:])


@needs_cpp
def test_experts_under_compile():
    args = torch.randn(3, 64).to(BF16), torch.rand(3, 2), torch.rand(3, 4).topk(2).indices, *stacks(4, 64, 32, (Int4(), Int4()))
    f = torch.compile(lambda x: run_experts_codes(x, *args[1:])*2, fullgraph=True, backend='aot_eager')
    with torch.inference_mode(): assert torch.equal(f(args[0]), run_experts_codes(*args)*2)


@needs_cpp
def test_missing_barrier_of_the_tokens(monkeypatch):
    args = torch.randn(19, 64).to(BF16), torch.rand(19, 2), torch.rand(19, 4).topk(2).indices, *stacks(4, 64, 32, (Int4(), Int4()))
    exact = experts_exact(*args)[0]
    assert error(codes_run(args, 16), exact) < 2**-6
    text = source_text('experts.cuh')
    assert text.count('    __syncthreads();\n') == 1
    monkeypatch.setitem(nbproc._session, 'experts.cuh', {'cell': text.replace('    __syncthreads();\n', '')})
    def wrong(order):
        with thread_order(order): return not error(codes_run(args, 16), exact) < 2**-6
    assert any([wrong(o) for o in ORDERS])


# ---- what the compilers say

HEIGHTS = dict(int8=(16, 64), decoded=(16, 64, 128), experts=(16, 64, 128))
FILES = [('quant_vector.cu', {}), ('int8_vector.cu', {}), *((f'quant_{f}.cu', dict(ROWS=r)) for f,rows in HEIGHTS.items() for r in rows)]


@pytest.mark.draw(3)
@needs_cuda
@pytest.mark.parametrize('file,defines', FILES)
def test_compiles_for_a_target(file, defines):
    "One generation of cards, drawn anew each time: a compilation takes a second or more"
    arch = ARCHS[torch.randint(len(ARCHS), ())]
    found = resources(file, (arch,), **defines)
    assert {a for _,a in found} == {arch}
    used = {k: v for k,v in found.items() if not (k[0].startswith('w8a8') and defines.get('ROWS') == 128)}  # integers stop at 64
    for (kernel,arch),(registers,*_,spilled) in used.items():
        assert registers < 255 and spilled <= 8*(kernel[2:5] == 'a16' and file == 'quant_experts.cu'), (kernel, arch, spilled)
    if defines: assert max(decoded_shared(defines['ROWS'], b) for b in (4, 8))*2 <= 228*1024

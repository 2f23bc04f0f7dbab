"Tiles, grouped experts and FP8 in CUDA: compiled, and emulated against float64, in an order of threads drawn for each test."
import sys
import warnings

import pytest
import torch

from deepseek_nb.arch.moe import run_experts
from deepseek_nb.core import nbproc
from deepseek_nb.core.dispatch import use
from deepseek_nb.core.nbproc import find_compiler, source_text
from deepseek_nb.cuda import experts as cuda_experts
from deepseek_nb.cuda import fp8 as cuda_fp8
from deepseek_nb.cuda import tiles as cuda_tiles
from deepseek_nb.cuda.build import ARCHS, find_nvrtc, resources
from deepseek_nb.cuda.emulation import ORDERS, thread_order
from deepseek_nb.cuda.experts import cut_tiles, experts_cost, experts_in_tiles, fits_experts, run_experts_cuda
from deepseek_nb.cuda.fp8 import (
    dequant_tiles,
    fits_fp8,
    linear_fp8,
    linear_fp8_cuda,
    product_fp8,
    quant_tiles,
    quantise_blocks,
    quantise_tiles,
    round_e4m3,
)
from deepseek_nb.cuda.route import sort_by_expert
from deepseek_nb.cuda.tiles import aligned, product, tile_defines, tile_rows
from deepseek_nb.files.checkpoint import dequant_fp8, quant_fp8

E4M3 = torch.float8_e4m3fn
VARIANTS = [dict(ROWS=16), dict(ROWS=64), dict(ROWS=128), dict(ROWS=64, WARPGROUP=1), dict(ROWS=128, WARPGROUP=1)]


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


def error(y, exact): return ((y.double() - exact).abs().max()/exact.abs().max()).item()


# ---- nothing outside of a tensor is touched

GUARDED = """
import ctypes, os, random, torch
from deepseek_nb.cuda import experts as cuda_experts, fp8 as cuda_fp8, route as cuda_route, tiles as cuda_tiles
from deepseek_nb.cuda.build import launch

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

for module in (cuda_experts, cuda_fp8, cuda_route, cuda_tiles): module.launch = guarded_launch
ways = [(a, v) for a in (True, False) for v in (dict(ROWS=16), dict(ROWS=64), dict(ROWS=64, WARPGROUP=1))]
if not os.environ.get('EVERY'): ways = random.Random(os.environ['SEED']).sample(ways, 3)
for at_end,variant in ways:
    for n,k,e,d,f in [(1, 2, 5, 72, 40), (19, 3, 6, 88, 72), (3, 2, 300, 8, 8)]:
        x,w,experts = torch.randn(n, d).bfloat16(), torch.rand(n, k), torch.rand(n, e).topk(k).indices
        stacked = torch.randn(e, 2*f, d).bfloat16(), torch.randn(e, d, f).bfloat16()
        assert cuda_experts.experts_in_tiles(x, w, experts, *stacked, **variant).isfinite().all()
    for n,i,o in [(1, 16, 2), (5, 400, 40), (18, 144, 258)]:
        x,w = torch.randn(n, i), torch.randn(o, i)
        assert cuda_fp8.product_fp8(*cuda_fp8.quantise_tiles(x), *cuda_fp8.quantise_blocks(w), **variant).isfinite().all()
        assert cuda_tiles.product(x.bfloat16(), w.bfloat16(), **variant).isfinite().all()
print('untouched')
"""


@needs_cpp
@pytest.mark.skipif(sys.platform != 'linux', reason='mmap and mprotect as Linux has them')
def test_nothing_outside_is_touched(python):
    assert python(GUARDED) == 'untouched'


# ---- what the compilers say

FILES = [(f, dict(ROWS=r)) for f in ('tile_product.cu', 'experts.cu') for r in (16, 64, 128)]
FILES += [('fp8_product.cu', dict(ROWS=r)) for r in (16, 64)] + [('fp8_quantise.cu', {}), ('fp8_vector.cu', {}), ('sum_parts.cu', {})]


@pytest.mark.draw(3)
@needs_cuda
@pytest.mark.parametrize('file,defines', FILES)
def test_compiles_for_a_target(file, defines):
    "One generation of cards, drawn anew each time; make gpu FLAGS=--dry compiles for all"
    archs = ARCHS if 'fp8' not in file else (*ARCHS, 'sm_89')
    found = resources(file, (archs[torch.randint(len(archs), ())],), **defines)
    assert found
    for (kernel,arch),(registers,*_,spilled) in found.items():
        few = 192 if kernel.startswith('fp8_product') and defines['ROWS'] == 64 else 0
        assert registers <= 255 and spilled <= few, (kernel, arch, spilled)


@pytest.mark.draw(1)
@needs_cuda
@pytest.mark.parametrize('file,rows', [('tile_product.cu', 128), ('experts.cu', 128), ('fp8_product.cu', 64)])
def test_warp_group_compiles_for_hopper(file, rows):
    for registers,*_,spilled in resources(file, ('sm_90a',), ROWS=rows, WARPGROUP=1).values(): assert registers <= 255 and not spilled


# ---- tiles

@needs_cpp
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('n,d,o', [(1, 8, 2), (17, 72, 130), (3, 328, 6)])
def test_product(order, variant, n, d, o):
    x,w = torch.randn(n, d).bfloat16(), torch.randn(o, d).bfloat16()
    exact = x.double()@w.double().T
    y = product(x, w, **variant)
    assert ((y - exact).abs() <= exact.abs()*2**-8 + 1e-3).all()


@needs_cpp
def test_product_of_other_layouts():
    x,w = torch.randn(40, 8).bfloat16().t(), torch.randn(6, 41).bfloat16()[:, 1:]
    assert error(product(x, w), x.double()@w.double().T) < 2**-7
    assert aligned(w.flatten()[3:]).data_ptr() % 16 == 0
    with pytest.raises(ValueError, match='x is torch.float32 .8, 40. and w'): product(x.float(), w)
    assert product(x[:0], w).shape == (0, 6)


def mutated(monkeypatch, old, new):
    text = source_text('tiles.cuh')
    assert text.count(old) == 1
    monkeypatch.setitem(nbproc._session, 'tiles.cuh', {'cell': text.replace(old, new)})


@needs_cpp
@pytest.mark.parametrize('old,new', [('__syncthreads();', ''), ('wait_copies<STAGES - 2>();', 'wait_copies<STAGES - 1>();')])
def test_missing_barrier_or_wait_shows(monkeypatch, old, new):
    "The emulation would notice: each of these is wrong in at least one order of threads"
    x,w = torch.randn(20, 328).bfloat16(), torch.randn(130, 328).bfloat16()
    exact = x.double()@w.double().T
    mutated(monkeypatch, old, new)
    def wrong(order):
        with thread_order(order): return not error(product(x, w), exact) < 2**-7
    assert any([wrong(o) for o in ORDERS])


def test_height_of_tiles(monkeypatch):
    assert [tile_rows(m) for m in (.5, 16, 16.1, 64, 65, 1e6)] == [16, 16, 64, 64, 128, 128]
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
    card = torch.device('cuda')
    made = []
    def product(x, w, WARPGROUP=0, **defines): return made.append(WARPGROUP) or x.float()@w.float().T + wrong*WARPGROUP
    monkeypatch.setattr(cuda_tiles, 'product', product)
    monkeypatch.setattr(torch, 'arange', lambda n, device, arange=torch.arange: arange(n))
    for wrong,group in ((0, dict(WARPGROUP=1)), (1, {})):  # checked once, before it is used
        cuda_tiles.wgmma_works.cache_clear()
        with warnings.catch_warnings(record=True) as said:
            for rows in (64, 128): assert tile_defines(rows, card) == dict(ROWS=rows, **group)
        assert made == [0, 1] and len(said) == wrong
        made.clear()
    monkeypatch.setenv('DEEPSEEK_NB_WGMMA', '0')
    assert tile_defines(128, card) == dict(ROWS=128)
    monkeypatch.delenv('DEEPSEEK_NB_WGMMA')
    assert tile_defines(16, card) == dict(ROWS=16) and tile_defines(128, torch.device('cpu')) == dict(ROWS=128)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (8, 0))
    assert tile_defines(128, card) == dict(ROWS=128)


# ---- experts

def stacked(e, d, f): return (torch.randn(e, 2*f, d)/d**.5).bfloat16(), (torch.randn(e, d, f)/f**.5).bfloat16()
def exact_experts(*args): return run_experts.op.reference(*(a.double() if a.is_floating_point() else a for a in args))


def right(y, *args):
    "Three roundings to bfloat16, relative to the sizes of what is added up"
    x,w,experts,gate_up,down = (a.double() if a.is_floating_point() else a for a in args)
    sizes = torch.zeros_like(x)
    for e in range(len(down)):
        token,slot = torch.where(experts == e)
        gate,up = (x[token]@gate_up[e].T).chunk(2, -1)
        sizes.index_add_(0, token, (torch.nn.functional.silu(gate)*up).abs()@down[e].abs().T*w[token, slot, None].abs())
    return bool(((y.double() - exact_experts(*args)).abs() <= sizes*3*2**-8 + 1e-6).all())


LAYERS = {'one token': (1, 2, 5, 72, 40), 'ragged': (19, 3, 6, 88, 72), 'one choice': (1, 1, 1, 8, 8), 'narrow': (5, 2, 4, 16, 136),
          'one expert': (7, 1, 1, 24, 16)}


def named(x, weights, experts, gate_up, down): return dict(x=x, weights=weights, experts=experts, gate_up=gate_up, down=down)


@needs_cpp
@pytest.mark.parametrize('variant', VARIANTS[:3] + VARIANTS[-1:])
@pytest.mark.parametrize('name', LAYERS)
def test_experts(order, variant, name):
    n,k,e,d,f = LAYERS[name]
    args = torch.randn(n, d).bfloat16(), torch.rand(n, k), torch.rand(n, e).topk(k).indices, *stacked(e, d, f)
    assert right(experts_in_tiles(*args, **variant), *args)


@needs_cpp
@pytest.mark.parametrize('load', ['all to one', 'empty in the middle', 'only the last', 'nobody', 'some to nobody'])
def test_loads(order, load):
    n,k,e,d,f = 18, 2, 6, 24, 16
    experts = torch.rand(n, e).topk(k).indices
    if load == 'all to one': experts[:, 0],experts[:, 1] = 3, 3
    if load == 'empty in the middle': experts = torch.tensor([0, 5]).repeat(n, 1)
    if load == 'only the last': experts[:] = e - 1
    if load == 'nobody': experts[:] = -1
    if load == 'some to nobody': experts[::3, 1] = e
    args = torch.randn(n, d).bfloat16(), torch.rand(n, k), experts, *stacked(e, d, f)
    assert right(run_experts_cuda(*args), *args)


@needs_cpp
def test_tiles_cover_every_row_once(order):
    for e,n,rows in [(1, 1, 16), (9, 40, 16), (5, 200, 64)]:
        experts = torch.randint(0, e, (n, 2))
        offsets = sort_by_expert(experts, e).offsets
        tiles = [t for t in cut_tiles(offsets, 2*n, rows).tolist() if t[0] >= 0]
        seen = [r for i,first,end in tiles for r in range(first, min(first + rows, end))]
        assert sorted(seen) == list(range(2*n)) and all(offsets[i] <= first < end == offsets[i + 1] for i,first,end in tiles)


@needs_cpp
def test_other_layouts_and_dtypes(order):
    n,k,e,d,f = 6, 2, 4, 40, 24
    x,w,experts = torch.randn(d, n).bfloat16().t(), torch.rand(k, n).bfloat16().t(), torch.rand(n, e).topk(k).indices.flip(1)
    gate_up,down = (torch.randn(e, d, 2*f)/6).bfloat16().mT, (torch.randn(e, f, d)/5).bfloat16().mT
    assert not any(t.is_contiguous() for t in (x, w, gate_up, down))
    args = x, w, experts, gate_up, down
    assert right(run_experts_cuda(*args), *args)
    assert run_experts_cuda(x[:0], w[:0], experts[:0], gate_up, down).shape == (0, d)


@needs_cpp
@pytest.mark.parametrize('where', ['x', 'weights', 'gate_up', 'down'])
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_nan_and_infinity_propagate(where, value):
    n,k,e,d,f = 5, 1, 4, 16, 8
    args = named(torch.randn(n, d).bfloat16(), torch.rand(n, k), torch.arange(n)[:, None] % e, *stacked(e, d, f))
    args[where].view(-1)[0] = value
    got,exact = run_experts_cuda(**args), exact_experts(*args.values())
    assert torch.equal(got.isfinite().all(1), exact.isfinite().all(1))
    assert torch.equal(got.isnan(), exact.isnan()) or where == 'gate_up'


def test_what_the_twin_takes():
    args = torch.randn(3, 16).bfloat16(), torch.rand(3, 2), torch.zeros(3, 2).long(), *stacked(4, 16, 8)
    assert fits_experts(*args)
    assert not fits_experts(*(a.float() if a.is_floating_point() else a for a in args))
    assert not fits_experts(args[0][:, :12], *args[1:3], args[3][..., :12], args[4][:, :12])
    assert not fits_experts(args[0], args[1].requires_grad_(), *args[2:])
    with torch.no_grad(): assert fits_experts(*args)
    assert run_experts.op.twins['cuda/cuda'].fn is run_experts_cuda
    with use('cuda'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert run_experts(*args).shape == (3, 16)   # on the CPU another twin runs


@pytest.mark.parametrize('name,change', [('weights', lambda t: t[:2]), ('experts', lambda t: t.int()),
                                         ('gate_up', lambda t: t[:, :-2]), ('down', lambda t: t.float())])
def test_wrong_arguments(name, change):
    args = named(torch.randn(3, 16).bfloat16(), torch.rand(3, 2), torch.zeros(3, 2).long(), *stacked(4, 16, 8))
    args[name] = change(args[name])
    with pytest.raises(ValueError, match=f'{name} is torch.* expected torch'): run_experts_cuda(**args)


@needs_cpp
def test_under_compile():
    args = torch.randn(3, 16).bfloat16(), torch.rand(3, 2), torch.rand(3, 4).topk(2).indices, *stacked(4, 16, 8)
    compiled = torch.compile(lambda *a: run_experts_cuda(*a)*2, fullgraph=True, backend='aot_eager')
    with torch.inference_mode(): assert torch.equal(compiled(*args), run_experts_cuda(*args)*2)
    torch.library.opcheck(cuda_experts._experts, args)


def test_cost_of_v3():
    flops,moved = experts_cost(1, 8, 256, 7168, 2048)
    assert flops == 6*8*7168*2048 and moved == pytest.approx(2*(3*8*7168*2048 + 2*7168 + 2*8*(2048 + 7168)))
    assert cuda_tiles.tile_shared(128)*2 <= 228*1024 and cuda_tiles.tile_shared(16)*3 <= 228*1024
    assert max(map(cuda_tiles.tile_shared, cuda_tiles.HEIGHTS)) <= 99*1024  # of compute capabilities 8.6 and 8.9


LAUNCHES = {'sort_few': 1, 'gate_up': 1, 'down': 1, 'combine_bf16': 1}


@needs_cpp
@pytest.mark.parametrize('n,count', [(1, 4), (64, 4), (65, 7)])
def test_launches_of_a_layer(n, count):
    from deepseek_nb.bench.gpu import launches
    args = torch.randn(n, 16).bfloat16(), torch.rand(n, 2), torch.rand(n, 4).topk(2).indices, *stacked(4, 16, 8)
    with launches() as (found,_): y = run_experts_cuda(*args)
    assert sum(found.values()) == count and (count > 4 or found == LAUNCHES)
    exact = run_experts.op.reference(*(a.double() if a.is_floating_point() else a for a in args))
    assert error(y, exact) < .02


@pytest.mark.parametrize('o,i,n,blocks', [(2048, 2048, 1, 128), (4096, 4096, 16, 128), (7168, 2048, 64, 112), (32768, 7168, 1, 256)])
def test_blocks_of_a_product(monkeypatch, o, i, n, blocks):
    "Blocks for the 132 multiprocessors of an H100: a part keeps at least four steps"
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda device: type('Card', (), dict(multi_processor_count=132)))
    tiles = -(-n//tile_rows(n))*-(-o//cuda_tiles.COLUMNS)
    assert tiles*cuda_tiles.count_splits(tiles, i//64, torch.device('cuda')) == blocks


# ---- FP8

@needs_cpp
@pytest.mark.parametrize('n,i,o', [(1, 16, 2), (1, 400, 130), (1, 2064, 258), (5, 1040, 130)])
def test_vector_and_split(order, n, i, o):
    q,s = quantise_tiles(torch.randn(n, i))
    w,ws = quant_fp8(torch.randn(o, i))
    exact = dequant_tiles(q, s).double()@dequant_fp8(w, ws).double().T
    for parts in (None, 2, 3, 7):
        assert error(product_fp8(q, s, w, ws, parts=parts), exact) < 2e-6
        assert error(product_fp8(q, s, w, ws, torch.bfloat16, parts=parts), exact) < 2**-8


@needs_cpp
@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_vector_passes_nan(value):
    x = torch.randn(1, 160)
    x[0, 150] = value
    w,ws = quant_fp8(torch.randn(6, 160))
    assert product_fp8(*quantise_tiles(x), w, ws).isnan().all()


def as_bytes(q): return q.view(torch.uint8)
def same(a, b): return torch.equal(as_bytes(a[0]) & 127, as_bytes(b[0]) & 127) and torch.equal(a[1].nan_to_num(-1), b[1].nan_to_num(-1))


@needs_cpp
def test_rounding_is_pytorchs():
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    middle = (codes + codes.roll(-1))/2
    near = torch.cat([middle.nextafter(torch.tensor(torch.inf)), middle.nextafter(torch.tensor(-torch.inf))])
    bits = torch.randint(-2**31, 2**31 - 1, (60000,), dtype=torch.int32).view(torch.float32)
    ends = torch.tensor([0., -0., 448, 464, 480, 1e30, torch.inf, -torch.inf, torch.nan, 2**-10, 2**-9.99, -2**-10])
    x = torch.cat([codes, middle, near, bits, torch.randn(4000)*10, ends])
    assert torch.equal(as_bytes(round_e4m3(x)), as_bytes(x.clamp(-448, 448).to(E4M3)))


@needs_cpp
@pytest.mark.parametrize('n,d', [(1, 4), (3, 128), (130, 132), (129, 260)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('ue8m0', [False, True])
def test_quantise(order, n, d, dtype, ue8m0):
    x = (torch.randn(n, d)*torch.rand(n, 1)*10**torch.randn(1, d)).to(dtype)
    if n == 3: x[0, 3],x[1, 7],x[2] = torch.nan, torch.inf, 0
    assert same(quantise_tiles(x, ue8m0), quant_tiles(x, ue8m0))
    assert same(quantise_blocks(x, ue8m0), quant_fp8(x, ue8m0))


def test_quantised_activations():
    x = torch.randn(7, 300)
    assert ((dequant_tiles(*quant_tiles(x)) - x).abs() <= x.abs()/16 + 1e-4).all()
    assert torch.equal(quant_tiles(x[:1])[0], quant_tiles(x)[0][:1])


@needs_cpp
@pytest.mark.parametrize('variant', [dict(ROWS=16), dict(ROWS=64), dict(ROWS=16, WIDEN=1), dict(ROWS=64, WIDEN=1),
                                     dict(ROWS=64, WARPGROUP=1)])
@pytest.mark.parametrize('n,i,o', [(1, 16, 2), (5, 400, 40), (18, 144, 258), (66, 128, 8)])
def test_fp8_product(order, variant, n, i, o):
    (q,s),(w,ws) = quant_tiles(torch.randn(n, i)), quant_fp8(torch.randn(o, i))
    exact = (q.double()*s.double().repeat_interleave(128, 1)[:, :i])@dequant_fp8(w, ws).double().T
    assert error(product_fp8(q, s, w, ws, **variant), exact) < 1e-6
    assert error(product_fp8(q, s, w, ws, torch.bfloat16, **variant), exact) < 2**-7


@needs_cpp
@pytest.mark.parametrize('widen', [0, 1])
def test_every_code_is_multiplied(widen):
    "All 256 codes through the matrix product: NaN stays NaN, the rest is exact"
    q = torch.arange(256, dtype=torch.uint8).view(E4M3)[:, None].repeat(1, 16)
    w = torch.zeros(2, 16)
    w[:, 0] = 1
    y = product_fp8(q, torch.ones(256, 1), w.to(E4M3), torch.ones(1, 1), ROWS=64, WIDEN=widen)
    assert torch.equal(y.nan_to_num(999), q[:, :2].float().nan_to_num(999))


@needs_cpp
def test_linear(order):
    for n,dtype in ((1, torch.float32), (4, torch.bfloat16)):
        x,(w,ws) = torch.randn(n, 272).to(dtype), quant_fp8(torch.randn(130, 272))
        exact = (dequant_tiles(*quant_tiles(x)).double()@dequant_fp8(w, ws).double().T)
        assert error(linear_fp8_cuda(x, w, ws), exact) < (1e-6 if dtype == torch.float32 else 2**-7)
    x[0, 5] = torch.nan
    y,exact = linear_fp8_cuda(x, w, ws), linear_fp8(x, w, ws)
    assert torch.equal(y.isnan(), exact.isnan()) and y[0].isnan().all() and not y[1:].isnan().any()


def test_fp8_arguments():
    x,(w,ws) = torch.randn(2, 144), quant_fp8(torch.randn(130, 144))
    assert fits_fp8(x, w, ws) and not fits_fp8(x.double(), w, ws) and not fits_fp8(x.clone().requires_grad_(), w, ws)
    assert not fits_fp8(x[:, :136], w[:, :136], ws) and not fits_fp8(x, w[:129], ws)
    (q,s) = quant_tiles(x)
    with pytest.raises(ValueError, match='s has shape'): product_fp8(q, s[:, :1], w, ws)
    with pytest.raises(ValueError, match='w has shape'): product_fp8(q, s, w[:, :8], ws)
    with pytest.raises(ValueError, match='multiple of 16'): product_fp8(q[:, :136], s, w[:, :136], ws)
    with pytest.raises(ValueError, match='quantise_tiles: x is torch.int64'): quantise_tiles(torch.ones(2, 4).long())


@needs_cpp
def test_linear_under_compile():
    x,(w,ws) = torch.randn(2, 144), quant_fp8(torch.randn(130, 144))
    compiled = torch.compile(lambda *a: linear_fp8_cuda(*a) + 1, fullgraph=True, backend='aot_eager')
    with torch.inference_mode(): assert torch.equal(compiled(x, w, ws), linear_fp8_cuda(x, w, ws) + 1)
    # Its test of the schema multiplies arguments, which PyTorch can't do in FP8
    checks = 'test_autograd_registration', 'test_faketensor', 'test_aot_dispatch_dynamic'
    torch.library.opcheck(cuda_fp8._linear, (x, w, ws), test_utils=checks)


def test_twins_stay_away_without_a_card():
    from deepseek_nb.arch.attention import attend_latent, norm_rotate
    from deepseek_nb.arch.norm import rms_norm
    from deepseek_nb.arch.rope import rotate
    from deepseek_nb.arch.routing import route
    from deepseek_nb.quant import linear_quantized
    ops = [f.op for f in (attend_latent, norm_rotate, rms_norm, rotate, route, run_experts, linear_fp8, linear_quantized)]
    for op in ops: op.plan('auto', 'cuda')  # loads them
    twins = [t for op in ops for t in op.twins.values() if t.kind == 'cuda']
    assert len(twins) >= len(ops) and all(t.available is not None for t in twins)
    assert torch.cuda.is_available() or not any(t.runs_on('cuda') for t in twins)

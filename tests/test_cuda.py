"""CUDA kernels: emulated against float64 in a thread order drawn for each test, broken on purpose, and compiled for cards"""
import ctypes
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
import warm

from deepseek_nb.arch.attention import attend_latent
from deepseek_nb.arch.releases import preset
from deepseek_nb.arch.rope import cos_sin, rope_frequencies, rotate
from deepseek_nb.arch.routing import limit_groups, route
from deepseek_nb.core import nbproc
from deepseek_nb.core.dispatch import use
from deepseek_nb.cuda import build as cuda
from deepseek_nb.cuda.attention import attend_latent_cuda, attend_paged_latents, attend_ragged, fits
from deepseek_nb.cuda.build import cubin, emulate, find_nvrtc, has_compiler, launch, resources, signatures
from deepseek_nb.cuda.device import Arguments, Parameter, kernels_in, structs_in
from deepseek_nb.cuda.emulation import ORDERS, thread_order
from deepseek_nb.cuda.norm import kernel_supports, norm_rotate_cuda, norm_rotate_into, rms_norm_cuda, rotate_cuda
from deepseek_nb.cuda.route import combine, route_cuda, sort_by_expert, sort_few

pytestmark = pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='no C++ compiler to emulate with')
NVCC = shutil.which('nvcc', path=os.environ.get('PATH', '') + ':/usr/local/cuda/bin')
needs_nvcc = pytest.mark.skipif(not NVCC, reason='nvcc is not installed')
ARCHS = ('sm_80', 'sm_90a', 'sm_100')
SIZES = {'row_sum.cu': [{}], 'norm_rotate.cu': [dict(VECTOR=1), dict(VECTOR=8)], 'sort_experts.cu': [{}],
         'combine.cu': [dict(VECTOR=1), dict(VECTOR=8)],
         'route.cu': [dict(EXPERTS=160, GROUPS=8), dict(EXPERTS=256, GROUPS=8), dict(EXPERTS=384, GROUPS=1)],
         'attend_latent.cu': [dict(LATENT=512, ROTARY=64, ROWS=r, KEYS=k) for r,k in ((16, 64), (64, 32), (64, 64))]}


@pytest.fixture(autouse=True)
def seeded(request):
    seed = torch.randint(2**31, ()).item()
    print('seed', seed)
    torch.manual_seed(seed)


def guarded(x):
    "The same values between NaNs, so that a read outside shows"
    room = torch.full((x.numel() + 256,), torch.nan, dtype=x.dtype)
    inside = room[128:128 + x.numel()]
    inside.copy_(x.flatten())
    return inside.view(x.shape)


def close(got, exact, tolerance):
    error = ((got.double() - exact).abs().max()/exact.abs().max().clamp(min=1e-30)).item()
    assert error < tolerance, error


TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}

# --- emulation itself ---------------------------------------------------------------------------------------------------------------


def source(name, text): return mock.patch.dict(nbproc._session, {name: {0: '#include "device.cuh"\n' + text}})


def test_divergent_barrier_is_reported(order):
    with source('hang.cu', 'extern "C" __global__ void hang(float* y) { if (threadIdx.x < 7) __syncthreads(); else __syncwarp(); }'):
        message = 'hang.cu, hang, .* block .* threads wait at different barriers'
        with pytest.raises(RuntimeError, match=message): launch('hang.cu', 'hang', 2, 64, torch.ones(1))
        with source('fine.cu', 'extern "C" __global__ void fine(float* y) { __syncthreads(); if (threadIdx.x == 0) y[0] = 3; }'):
            launch('fine.cu', 'fine', 2, 64, y := torch.ones(1))
    assert y.item() == 3


def test_write_behind_shared_memory_is_reported():
    with source('behind.cu', 'extern "C" __global__ void behind(float* y) { DYNAMIC_SHARED(float, a); a[threadIdx.x] = 1; }'):
        launch('behind.cu', 'behind', 1, 8, torch.ones(1), shared=32)
        with pytest.raises(RuntimeError, match='writes past the end of its shared memory'):
            launch('behind.cu', 'behind', 1, 9, torch.ones(1), shared=32)


SHUFFLES = '''extern "C" __global__ void shuffles(int* y) {
    const int l = threadIdx.x, m = 0xff << l / 8 * 8;
    y[l] = __shfl_up_sync(WARP, l, 3), y[32 + l] = __shfl_down_sync(WARP, l, 3, 8);
    y[64 + l] = __shfl_sync(WARP, l, l + 5, 16), y[96 + l] = __shfl_xor_sync(WARP, l, 9);
    y[128 + l] = __ballot_sync(WARP, l % 3 == 0), y[160 + l] = __ballot_sync(m, l % 3 == 0);
    y[192 + l] = __any_sync(WARP, l == 40), y[224 + l] = __all_sync(WARP, l < 32);
    if (l < 20) y[256 + l] = __match_any_sync(0xfffff, l % 4);
}'''


def test_warp_operations(order):
    y = torch.zeros(288, dtype=torch.int32)
    with source('shuffles.cu', SHUFFLES): launch('shuffles.cu', 'shuffles', 1, 32, y)
    y,lanes = y.view(9, 32).tolist(),range(32)
    thirds = sum(1 << i for i in range(0, 32, 3))
    signed = lambda x: x - 2**32 if x >= 2**31 else x
    assert y[0] == [i - 3 if i >= 3 else i for i in lanes]
    assert y[1] == [i + 3 if i%8 < 5 else i for i in lanes]
    assert y[2] == [i//16*16 + (i + 5)%16 for i in lanes]
    assert y[3] == [i ^ 9 for i in lanes]
    assert y[4] == [signed(thirds)]*32
    assert y[5] == [signed(thirds & 0xff << i//8*8) for i in lanes]
    assert y[6] == [0]*32 and y[7] == [1]*32
    assert y[8][:20] == [sum(1 << j for j in range(20) if j%4 == i%4) for i in range(20)]


CONVERT = '''extern "C" __global__ void convert(const float* x, {0}* y, float* z, int n) {{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = from_float<{0}>(x[i]), z[i] = to_float(y[i]);
}}'''


@pytest.mark.parametrize('kind,dtype', [('bf16', torch.bfloat16), ('e4m3', torch.float8_e4m3fn)])
def test_conversions_are_pytorchs(kind, dtype):
    bits = torch.randint(-2**31, 2**31, (20000,), dtype=torch.int64).int()
    x = torch.cat([bits.view(torch.float32), torch.randn(5000)*100, torch.arange(-600, 600)/4, torch.arange(-300, 300)*2.**-12,
                   torch.tensor([0., -0., torch.inf, -torch.inf, torch.nan])])
    y,z = torch.empty(len(x), dtype=dtype),torch.empty(len(x))
    with source('convert.cu', CONVERT.format(kind)): launch('convert.cu', 'convert', (len(x) + 127)//128, 128, x, y, z, len(x))
    wanted = (x.clamp(-448, 448) if kind == 'e4m3' else x).to(dtype).float()       # PTX's conversion to e4m3 saturates
    torch.testing.assert_close(z, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(y.float(), wanted, rtol=0, atol=0, equal_nan=True)


MMA8 = '''extern "C" __global__ void tile(const e4m3* a, const e4m3* b, float* d) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    uint32_t x[4], y[2];
    float sum[4] = {};
    for (int i = 0; i < 4; ++i) x[i] = *reinterpret_cast<const uint32_t*>(&a[(g + 8 * (i % 2)) * 32 + 4 * t + 16 * (i / 2)]);
    for (int i = 0; i < 2; ++i) y[i] = *reinterpret_cast<const uint32_t*>(&b[g * 32 + 4 * t + 16 * i]);
    mma_e4m3(sum, x, y);
    for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}'''


def test_fp8_tile(order):
    a,b,d = torch.randn(16, 32).to(torch.float8_e4m3fn),torch.randn(8, 32).to(torch.float8_e4m3fn),torch.empty(16, 8)
    with source('mma8.cu', MMA8): launch('mma8.cu', 'tile', 1, 32, a, b, d)
    close(d, a.double() @ b.double().T, 1e-6)


def test_copies_come_late():
    text = '''extern "C" __global__ void copy(const float* x, float* y) {
        DYNAMIC_SHARED(float, a);
        copy_async(a, x), commit_copies(), copy_async(a + 4, x + 4), commit_copies(), copy_async(a + 8, x, false), commit_copies();
        wait_copies<2>();
        for (int i = 0; i < 12; ++i) y[i] = a[i];
        wait_copies();
        for (int i = 0; i < 12; ++i) y[12 + i] = a[i];
    }'''
    x,y = torch.arange(8.),torch.empty(24)
    with source('copy.cu', text): launch('copy.cu', 'copy', 1, 1, x, y, shared=48)
    assert y[:4].equal(x[:4]) and y[4:12].isnan().all() and y[12:20].equal(x) and y[20:].eq(0).all()


def start(*args, shared=4, **named): launch('row_sum.cu', 'row_sum', 1, 32, *args, shared=shared, **named)


@pytest.mark.parametrize('call,message', [
    (lambda: start(torch.ones(4), torch.ones(1)), 'row_sum takes 3 arguments, 2 given'),
    (lambda: start(torch.ones(4), y=torch.ones(1), e=4), "row_sum has no parameter 'e' left; it takes x, y, d"),
    (lambda: start(torch.ones(4), torch.ones(1, device='meta'), 4), 'row_sum: y is on meta, the kernel runs on cpu'),
    (lambda: start(torch.ones(4, device='meta')), 'kernels run on cpu or cuda, not on meta'),
    (lambda: start(torch.ones(4), 1, 4), 'y must be a tensor, not int'),
    (lambda: start(torch.ones(4), torch.ones(1), 4, shared=2**20), '1048576 bytes of shared memory are more'),
])
def test_launch_refuses(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_code_that_does_not_compile():
    with source('wrong.cu', 'extern "C" __global__ void wrong(float* y) { y[0] = nothing; }'):
        with pytest.raises(ValueError, match='wrong.cu does not compile: .*nothing'): emulate('wrong.cu')
        if NVCC or find_nvrtc():
            with pytest.raises(ValueError, match='wrong.cu does not compile: .*nothing'): cubin('wrong.cu', 'sm_80')


def test_driver_gets_the_same_arguments(monkeypatch):
    "The launch through the CUDA driver, with a driver that runs the emulated kernel"
    x,y = torch.randn(3, 70),torch.empty(3)
    rows,said = emulate('row_sum.cu'),[]

    class Driver:
        def cuModuleLoadData(self, module, image): return said.append(image[:4]) or 0
        def cuCtxGetCurrent(self, context): return 0
        def cuCtxSetCurrent(self, context): return 0
        def cuModuleGetFunction(self, handle, module, name): return said.append(name) or 0
        def cuFuncSetAttribute(self, handle, attribute, value): return said.append((attribute, value)) or 0
        def cuGetErrorString(self, code, text): text._obj.value = b'out of luck'
        def cuLaunchKernel(self, handle, gx, gy, gz, bx, by, bz, shared, stream, pointers, extra):
            sizes = (ctypes.c_uint*6)(gx, gy, gz, bx, by, bz)
            return 0 if rows.library.launch_row_sum(pointers, sizes, ctypes.c_size_t(shared), 0, 0) is None else 700

    image = mock.Mock(read_bytes=lambda: b'\x7fELF...')
    monkeypatch.setattr(cuda.ctypes, 'CDLL', lambda name: Driver())
    monkeypatch.setattr(cuda, 'cubin', lambda *args, **defines: image)
    monkeypatch.setattr(cuda, 'arch_of', lambda device: 'sm_90a')
    monkeypatch.setattr(torch.cuda, 'device', lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device=None: mock.Mock(cuda_stream=0))
    rows.library.launch_row_sum.restype = ctypes.c_char_p
    loaded = cuda.Loaded('row_sum.cu', torch.device('cpu'))
    loaded.run('row_sum', (3, 1, 1), (64, 1, 1), (x, y, 70), 65536)
    close(y, x.double().sum(1), 1e-5)
    loaded.run('row_sum', (3, 1, 1), (64, 1, 1), (x, y, 70), 65536)
    assert said == [b'\x7fELF', b'row_sum', (8, 65536)]
    Driver.cuLaunchKernel = lambda self, *args: 700
    with pytest.raises(RuntimeError, match=r'row_sum.cu: cuLaunchKernel failed on cpu: out of luck \(700\)'):
        loaded.run('row_sum', (3, 1, 1), (64, 1, 1), (x, y, 70))


# --- RMSNorm and rotary -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('shape', [(1,), (7,), (3, 33), (2, 3, 64), (5, 160), (1, 2050), (0, 8)])
def test_rms_norm(shape, dtype, order):
    x,weight = guarded(torch.randn(shape).to(dtype)),guarded(torch.rand(shape[-1]).to(dtype))
    y = rms_norm_cuda(x, weight, 1e-5)
    assert y.shape == x.shape and y.dtype == dtype
    if x.numel(): close(y, torch.nn.functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-5), TOLERANCE[dtype])


def latents(kv, weight, cos, sin, interleaved):
    latent,k = kv.split([len(weight), kv.shape[-1] - len(weight)], -1)
    latent = latent*(latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt()*weight
    x1,x2 = (k[..., 0::2], k[..., 1::2]) if interleaved else k.chunk(2, -1)
    y = [x1*cos[:, 0] - x2*sin[:, 0], x1*sin[:, 0] + x2*cos[:, 0]]
    return torch.cat([latent, torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)], -1)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('interleaved', [True, False])
@pytest.mark.parametrize('b,s,c,r', [(1, 1, 128, 32), (2, 3, 40, 6), (3, 2, 7, 2), (1, 2, 512, 64)])
def test_norm_rotate(b, s, c, r, interleaved, dtype, order):
    kv,weight = torch.randn(b, s, c + r).to(dtype),torch.rand(c).to(dtype)
    positions = torch.randint(0, 1000, (b if order == 'random' else 1, s))
    cos,sin = cos_sin(rope_frequencies(1e4, r), positions)
    cache = torch.full((b, s + 5, c + r), 7.).to(dtype)
    norm_rotate_into(guarded(kv), weight, guarded(cos), guarded(sin), 1e-6, interleaved, cache[:, 2:2 + s])
    close(cache[:, 2:2 + s], latents(kv.double(), weight.double(), cos.double(), sin.double(), interleaved), TOLERANCE[dtype])
    assert (cache[:, :2] == 7).all() and (cache[:, 2 + s:] == 7).all()
    turned = rotate(kv[:, None, :, c:].float(), cos, sin, interleaved)[:, 0]
    close(cache[:, 2:2 + s, c:], turned.double(), TOLERANCE[dtype])


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('b,h,s,r', [(1, 1, 1, 2), (2, 3, 5, 6), (3, 2, 1, 64)])
def test_rotate(b, h, s, r, dtype, order):
    x = torch.randn(b, s, h, r + 5).to(dtype).transpose(1, 2)[..., 5:]
    cos,sin = cos_sin(rope_frequencies(1e4, r), torch.randint(0, 1000, (b if order == 'random' else 1, s)))
    for interleaved in (True, False):
        got = rotate_cuda(x, guarded(cos), guarded(sin), interleaved)
        close(got, rotate.op.reference(x.float(), cos, sin, interleaved).double(), TOLERANCE[dtype])
    with pytest.raises(ValueError, match='cos is torch.float32, shape .* expected'): rotate_cuda(x, cos[..., 1:], sin, True)


def test_norm_nan_stays_in_its_row():
    x = torch.randn(3, 40)
    x[1, 3],x[2, 5] = torch.nan,torch.inf
    y = rms_norm_cuda(x, torch.ones(40), 1e-6)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (40,), None, 1e-6), equal_nan=True)


def test_norm_of_strided_rows():
    x = torch.randn(40, 3).T
    close(rms_norm_cuda(x, torch.ones(40), 1e-6), torch.nn.functional.rms_norm(x.double(), (40,), None, 1e-6), 2e-6)


@pytest.mark.parametrize('change,message', [
    (dict(weight=torch.ones(40).bfloat16()), r'weight is torch.bfloat16, shape \(40,\); expected torch.float32, shape \(40,\)'),
    (dict(cos=torch.ones(1, 1, 3, 4)), r'cos is torch.float32, shape \(1, 1, 3, 4\); expected torch.float32, shape \(1, 1, 3, 3\)'),
    (dict(x=torch.ones(2, 3, 46).half(), out=torch.ones(2, 3, 46).half()), 'the kernel takes float32 or bfloat16|expected torch.float16'),
    (dict(out=torch.ones(2, 3, 45)), r'out is torch.float32, shape \(2, 3, 45\); expected'),
])
def test_norm_rotate_refuses(change, message):
    angles = torch.ones(1, 1, 3, 3)
    args = dict(x=torch.ones(2, 3, 46), weight=torch.ones(40), cos=angles, sin=angles, eps=1e-6, interleaved=True, out=torch.ones(2, 3, 46))
    with pytest.raises(ValueError, match=message): norm_rotate_into(**args | change)


def test_norm_twin_leaves_gradients_to_others():
    x,weight = torch.randn(2, 8),torch.ones(8)
    assert kernel_supports(x, weight) and not kernel_supports(x, weight.bfloat16()) and not kernel_supports(x.requires_grad_(), weight)
    with torch.inference_mode(): assert kernel_supports(x, weight)


def test_norm_compiles_without_a_break():
    x,weight,angles = torch.randn(2, 3, 46),torch.ones(40),torch.ones(1, 1, 3, 3)
    f = torch.compile(lambda x: norm_rotate_cuda(x, weight, angles, angles, 1e-6, True)*2, fullgraph=True, backend='eager')
    assert f(x).equal(norm_rotate_cuda(x, weight, angles, angles, 1e-6, True)*2)


# --- routing ------------------------------------------------------------------------------------------------------------------------


def config(e, k, groups=1, keep=1, how='sum2', score='sigmoid', norm=True, scale=2.5):
    return replace(preset('deepseek-v3'), n_routed_experts=e, n_activated_experts=k, n_expert_groups=groups, n_limited_groups=keep,
                   group_score=how, score_func=score, norm_topk=norm, route_scale=scale)


def same_route(got, exact):
    torch.testing.assert_close(got.scores, exact.scores, rtol=2e-5, atol=1e-7, equal_nan=True)
    by_expert = lambda r: (r.experts.sort(-1).values, r.weights.gather(-1, r.experts.argsort(-1)))
    (e1,w1),(e2,w2) = by_expert(got),by_expert(exact)
    assert e1.equal(e2)
    torch.testing.assert_close(w1, w2, rtol=2e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize('score', ['softmax', 'sigmoid', 'sqrtsoftplus'])
@pytest.mark.parametrize('e,k,groups,keep,how', [(8, 2, 1, 1, 'max'), (64, 6, 1, 1, 'max'), (160, 6, 8, 3, 'max'), (64, 4, 8, 3, 'sum2'),
                                                 (48, 5, 4, 2, 'sum2'), (33, 32, 1, 1, 'max'), (1, 1, 1, 1, 'max')])
def test_route(e, k, groups, keep, how, score, order):
    c = config(e, k, groups, keep, how, score, norm=order != 'backward')
    n = {'forward': 1, 'backward': 5, 'random': 11}[order]
    logits = torch.randn(n, e)
    for bias in (None, torch.randn(e)*.3): same_route(route_cuda(guarded(logits), c, bias), route.op.reference(logits, c, bias))


def test_route_in_bfloat16():
    logits = torch.stack([torch.randperm(64).float() - 32 for _ in range(6)]).bfloat16()/8          # no ties
    same_route(route_cuda(logits, config(64, 6)), route.op.reference(logits, config(64, 6)))


def test_route_of_no_tokens(): assert route_cuda(torch.ones(0, 64), config(64, 6)).experts.shape == (0, 6)


@pytest.mark.parametrize('score', ['softmax', 'sigmoid'])
def test_route_nan_and_infinity(score):
    logits = torch.randn(4, 64)
    logits[0, 5],logits[1, 9],logits[2, 11] = torch.nan,torch.inf,-torch.inf
    c = config(64, 6, score=score)
    got,exact = route_cuda(logits, c),route.op.reference(logits, c)
    torch.testing.assert_close(got.scores, exact.scores, equal_nan=True)
    assert got.weights.isnan().equal(exact.weights.isnan())


def test_route_prefers_the_lower_of_equals():
    got = route_cuda(torch.zeros(2, 64), config(64, 6))
    assert got.experts.tolist() == [list(range(6))]*2


@pytest.mark.parametrize('n,k,e', [(1, 1, 1), (1, 8, 256), (3, 2, 5), (100, 6, 64), (65, 4, 40), (300, 3, 2), (0, 2, 4)])
def test_sort(n, k, e, order):
    experts = torch.randint(0, e, (n, k))
    got = sort_by_expert(experts, e)
    assert got.order.long().equal(experts.flatten().argsort(stable=True))
    assert got.offsets.tolist() == [0, *torch.bincount(experts.flatten(), minlength=e).cumsum(0).tolist()]
    assert got.position.flatten().long().equal(got.order.long().argsort())


@pytest.mark.parametrize('n,k,e,height', [(1, 8, 256, 16), (3, 2, 5, 16), (64, 6, 64, 16), (64, 8, 300, 64), (0, 2, 4, 16), (33, 3, 40, 1)])
def test_sort_of_few(n, k, e, height, order):
    "The same as in four launches, with experts outside of the range too"
    experts = torch.randint(-2, e + 3, (n, k)) if n == 33 else torch.rand(n, e).topk(k).indices
    (found,tile),exact = sort_few(experts, e, height),sort_by_expert(experts, e)
    inside,counts = exact.offsets[-1],exact.offsets.diff()
    assert found.offsets.equal(exact.offsets) and found.position.equal(exact.position)
    assert found.order[:inside].equal(exact.order[:inside])
    wanted = [[j, r, exact.offsets[j + 1]] for j in range(e) for r in range(exact.offsets[j], exact.offsets[j + 1], height)]
    assert tile[:len(wanted)].tolist() == wanted and (tile[len(wanted):, 0] == -1).all() and counts.sum() == inside


def test_sort_of_one_expert_and_of_strangers(order):
    got = sort_by_expert(torch.full((90, 4), 3), 8)
    assert got.order.equal(torch.arange(360, dtype=torch.int32)) and got.offsets.tolist() == [0]*4 + [360]*5
    experts = torch.randint(-3, 9, (90, 4))
    got,inside = sort_by_expert(experts, 6),(experts >= 0) & (experts < 6)
    assert (got.position >= 0).equal(inside) and got.offsets[-1] == inside.sum()
    assert experts.flatten()[got.order[:inside.sum()].long()].equal(experts[inside].sort().values)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('n,k,d', [(1, 1, 8), (3, 2, 33), (9, 6, 64), (2, 4, 1500)])
def test_combine(n, k, d, dtype, order):
    rows,weights,position = torch.randn(n*k, d).to(dtype),torch.rand(n, k),torch.randperm(n*k).view(n, k).int()
    position[0, 0] = -1
    more = torch.randn(n, d).to(dtype) if order != 'random' else None
    exact = (rows.double()[position.long()]*weights[..., None].double()*(position >= 0)[..., None]).sum(1)
    if more is not None: exact += more
    close(combine(guarded(rows), position, guarded(weights), more), exact, TOLERANCE[dtype])


def test_combine_passes_nan():
    rows = torch.randn(6, 8)
    rows[4, 2] = torch.nan
    y = combine(rows, torch.arange(6).view(3, 2).int(), torch.rand(3, 2))
    assert y.isnan().nonzero().tolist() == [[2, 2]]


# --- attention ----------------------------------------------------------------------------------------------------------------------


def exact_latent(q, z, c, scale, mask=None): return attend_latent.op.reference(q.double(), z.double(), c, scale, mask)


def bf16(*shape): return torch.randn(*shape).bfloat16()


@pytest.mark.draw(4)
@pytest.mark.parametrize('b,h,s,t', [(1, 1, 1, 1), (2, 3, 1, 63), (1, 16, 1, 65), (1, 9, 2, 300), (1, 33, 1, 129), (2, 5, 4, 520)])
def test_attend_latent(b, h, s, t, order):
    q,z = bf16(b, h, s, 160),bf16(b, t, 160)
    close(attend_latent_cuda(guarded(q), guarded(z), 128, .1), exact_latent(q, z, 128, .1), .01)


def test_attend_wide(order):
    q,z = bf16(1, 20, 1, 576),bf16(1, 70, 576)
    close(attend_latent_cuda(q, z, 512, .05), exact_latent(q, z, 512, .05), .01)


def test_attend_in_ampere_tiles(order, monkeypatch):
    from deepseek_nb.cuda import attention as cuda_attention
    monkeypatch.setattr(cuda_attention, 'gpu_limits', lambda device: (4, 63*1024 if order == 'random' else 50*1024))
    for h in (3, 20, 40):
        q,z = bf16(1, h, 1, 160),bf16(1, 150, 160)
        close(attend_latent_cuda(q, z, 128, .1), exact_latent(q, z, 128, .1), .01)


def shifted(x):
    "The same values, contiguous, eight bytes behind a multiple of 16"
    room = x.new_empty(x.numel() + 4)
    return room[4:].view(x.shape).copy_(x)


def test_attend_misaligned():
    q,z = bf16(1, 3, 1, 160),bf16(1, 70, 160)
    close(attend_latent_cuda(shifted(q), shifted(z), 128, .1), exact_latent(q, z, 128, .1), .01)
    from deepseek_nb.cuda import attention as cuda_attention
    with mock.patch.object(cuda_attention, 'aligned', torch.Tensor.contiguous):
        with pytest.raises(RuntimeError, match='cp.async with an address that is not a multiple of 16 bytes'):
            attend_latent_cuda(shifted(q), z, 128, .1)


def test_attend_large_scores():
    q,z = bf16(1, 2, 1, 160)*20,bf16(1, 400, 160)
    close(attend_latent_cuda(q, z, 128, 1.), exact_latent(q, z, 128, 1.), .01)


def test_attend_with_a_mask(order):
    q,z = bf16(2, 3, 4, 160),bf16(2, 300, 160)
    shared,own = torch.rand(4, 300) < .3,torch.rand(2, 1, 4, 300) < .3
    own[0, :, :, :280] = False                                         # the first stretch sees nothing
    own[..., -1] = True                                                # and every row something, which 1 draw in 300 lacked
    for mask in (shared, own): close(attend_latent_cuda(q, z, 128, .1, mask), exact_latent(q, z, 128, .1, mask), .01)
    own[1, 0, 2] = False
    assert attend_latent_cuda(q, z, 128, .1, own).isnan().any(-1).nonzero().tolist() == [[1, h, 2] for h in range(3)]


def test_attend_views_and_nan(order):
    cache,q = bf16(2, 400, 160),bf16(2, 3, 1, 160)
    close(attend_latent_cuda(q, cache[:, 3:303], 128, .1), exact_latent(q, cache[:, 3:303], 128, .1), .01)
    wide = bf16(2, 90, 163)[:, :, 3:]
    close(attend_latent_cuda(q, wide, 128, .1), exact_latent(q, wide, 128, .1), .01)
    cache[1, 7, 9] = torch.nan
    y = attend_latent_cuda(q, cache, 128, .1)
    assert y[1].isnan().all() and y[0].isfinite().all()


@pytest.mark.parametrize('page', [1, 16, 64])
def test_attend_ragged_and_paged(page, order):
    t,lengths = 576,torch.tensor([576, 2, 77, 320], dtype=torch.int32)
    q,z = bf16(4, 5, 2, 160),bf16(4, t, 160)
    for i,n in enumerate(lengths): z[i, n:] = torch.nan                # nothing behind the end may be read
    pages = torch.randperm(4*t//page + 3)[:4*t//page].view(4, -1)
    pool = torch.full((4*t//page + 3, page, 160), torch.nan).bfloat16()
    pool[pages] = z.view(4, -1, page, 160)
    for y in (attend_ragged(q, z, lengths, 128, .1), attend_paged_latents(q, pool, pages.int(), lengths, 128, .1)):
        for i,n in enumerate(lengths): close(y[i:i+1], exact_latent(q[i:i+1], z[i:i+1, :n], 128, .1), .01)


@pytest.mark.parametrize('q,z,c,message', [
    (torch.ones(1, 1, 1, 160), torch.ones(1, 9, 160), 128, 'q is torch.float32, z is torch.float32; expected torch.bfloat16'),
    (bf16(1, 1, 1, 160), bf16(1, 9, 128), 128, r'z has shape \(1, 9, 128\); expected 3 axes, the last 160'),
    (bf16(1, 1, 1, 160), bf16(2, 9, 160), 128, 'z has 2 sequences, q 1'),
    (bf16(1, 1, 1, 96), bf16(1, 9, 96), 64, 'c is 64 of 96 columns'),
])
def test_attend_refuses(q, z, c, message):
    with pytest.raises(ValueError, match=message): attend_latent_cuda(q, z, c, .1)


def test_twin_leaves_gradients_to_others():
    q,z = bf16(1, 1, 1, 160).requires_grad_(),bf16(1, 9, 160)
    assert not fits(q, z, 128, .1)
    with torch.no_grad(): assert fits(q, z, 128, .1)


def test_attend_compiles_without_a_break():
    q,z = bf16(1, 2, 1, 160),bf16(1, 9, 160)
    f = torch.compile(lambda q, z: attend_latent_cuda(q, z, 128, .1)*2, fullgraph=True, backend='eager')
    assert f(q, z).equal(attend_latent_cuda(q, z, 128, .1)*2)


# --- a barrier less -----------------------------------------------------------------------------------------------------------------


def without(name, line, nth=0):
    "The kernel's file without one of its lines"
    text = nbproc.source_text(name)
    parts = text.split(line)
    assert len(parts) > nth + 1
    return mock.patch.dict(nbproc._session, {name: {0: line.join(parts[:nth + 1]) + line.join(parts[nth + 1:])}})


def caught(run, exact, tolerance):
    "The orders in which a result is wrong"
    wrong = []
    for name in ORDERS:
        with thread_order(name, 1):
            try: close(run(), exact, tolerance)
            except AssertionError: wrong.append(name)
    return wrong


def test_missing_barrier_of_the_norm():
    x = torch.randn(3, 512)
    exact = torch.nn.functional.rms_norm(x.double(), (512,), None, 1e-6)
    with without('norm_rotate.cu', '    __syncthreads();\n'): assert caught(lambda: rms_norm_cuda(x, torch.ones(512), 1e-6), exact, 1e-5)


def test_missing_barrier_of_the_sort():
    "A lane that reads an expert's place after another has moved it; the rooms are large enough for what goes wrong"
    experts,counts = torch.randint(0, 3, (200,)),torch.zeros(1, 3, dtype=torch.int32)
    offsets = torch.bincount(experts, minlength=3).cumsum(0)
    counts[0, 1:] = offsets[:2]

    def place():
        order,position = torch.zeros(1000, dtype=torch.int32),torch.zeros(200, dtype=torch.int32)
        launch('sort_experts.cu', 'place_experts', 1, 32, experts, counts, order, position, 200, 3, shared=12)
        return position

    exact = experts.argsort(stable=True).argsort().double()
    assert caught(place, exact, 1e-9) == []
    with without('sort_experts.cu', '__syncwarp();', 0): assert caught(place, exact, 1e-9)


LOOP = '    UNROLL for (int m = 0; m < M; ++m)\n'


@pytest.mark.parametrize('line,rest', [('        wait_copies();\n        __syncthreads();\n', '        wait_copies();\n'),
                                       ('        wait_copies();\n', ''), ('    __syncthreads();\n' + LOOP, LOOP),
                                       ('    __syncthreads();\n    add_values', '    add_values')])
def test_missing_barrier_of_attention(line, rest):
    q,z = bf16(1, 3, 1, 160),bf16(1, 200, 160)
    texts = {name: nbproc.source_text(name) for name in ('attend_latent.cu', 'attend.cuh')}
    assert sum(t.count(line) for t in texts.values()) == 1
    with mock.patch.dict(nbproc._session, {name: {0: t.replace(line, rest)} for name,t in texts.items()}):
        assert caught(lambda: attend_latent_cuda(q, z, 128, .1), exact_latent(q, z, 128, .1), .01)


# --- sanitizers ---------------------------------------------------------------------------------------------------------------------


def sanitized(code):
    "Python with AddressSanitizer, and emulated kernels built for it"
    if not (under := warm.sanitized('-O1')): pytest.skip('this compiler has no AddressSanitizer')
    env = os.environ | under | dict(OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, '-c', warm.ALONE + code], capture_output=True, text=True, env=env)


@pytest.mark.draw(1, group='sanitizers')
@pytest.mark.parametrize('some', [('test_norm_nan', 'test_route_prefers', 'test_sort', 'test_combine'),
                                  ('test_attend_with', 'test_attend_ragged')], ids=['small', 'attention'])
def test_clean_under_sanitizers(some):
    done = sanitized(f'import pytest, sys; sys.exit(pytest.main(["-q", {__file__!r}, "-k", {" or ".join(some)!r}]))')
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def test_sanitizers_see_a_mistake():
    done = sanitized("""
import torch
from deepseek_nb.cuda.build import launch
launch('row_sum.cu', 'row_sum', 3, 64, torch.ones(3, 100), torch.empty(2), 100, shared=8)""")
    assert done.returncode and 'heap-buffer-overflow' in done.stderr


# --- compilers ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.draw(4)
@pytest.mark.skipif(not has_compiler(), reason='neither NVRTC nor nvcc here')
@pytest.mark.parametrize('name,defines', [(n, d) for n,many in SIZES.items() for d in many], ids=str)
def test_compiles(name, defines):
    "For one generation of cards, drawn anew each time; make gpu FLAGS=--dry compiles for all"
    arch = ARCHS[torch.randint(len(ARCHS), ())]
    for registers,_,stack,spilled in resources(name, (arch,), **defines).values():
        assert 0 < registers <= 255 and stack == spilled == 0


def compiled_struct(fields):
    "Offsets and size of a struct, by ctypes, which knows the rules of C"
    kinds = dict(P=ctypes.c_void_p, f=ctypes.c_float, i=ctypes.c_int32, q=ctypes.c_int64, I=ctypes.c_uint32)
    return type('S', (ctypes.Structure,), dict(_fields_=[(f'f{i}', kinds[c]) for i,c in enumerate(fields)]))


def test_arguments_lie_as_in_c():
    "Drawn structs and scalars have the places that C gives them"
    r = random.Random(seed := torch.randint(2**31, ()).item())
    codes = dict(i='int', q='int64_t', f='float', I='uint32_t')
    for _ in range(100):
        structs,parameters,values,meant = {},[],[],[]
        for i in range(r.randint(1, 6)):
            fields = [r.choice('iqfIP') for _ in range(r.choice([1, r.randint(2, 7)]))]
            here = [r.randint(0, 100) if c != 'P' else None for c in fields]
            params = [Parameter('float', True, f'f{j}') if c == 'P' else Parameter(codes[c], False, f'f{j}') for j,c in enumerate(fields)]
            if len(fields) > 1: structs[f'S{i}'] = params
            parameters.append(Parameter(f'S{i}', False, f'a{i}') if len(fields) > 1 else params[0]._replace(name=f'a{i}'))
            values.append(dict(zip((p.name for p in params), here, strict=True)) if len(fields) > 1 else here[0])
            meant.append((compiled_struct(fields), here))
        packing = Arguments('k', parameters, structs)
        packed = packing.pack(values, torch.device('cpu'))
        for at,(kind,here) in zip(packing.places, meant, strict=True):
            got = kind.from_buffer_copy(packed[at:].ljust(ctypes.sizeof(kind), b'\0'))
            assert at % ctypes.alignment(kind) == 0, f'{seed=} {parameters} {structs}'
            assert [getattr(got, name) for name,_ in kind._fields_] == here, f'{seed=} {parameters} {structs}'


@pytest.mark.parametrize('driver,taken', [(13000, 'cu13'), (12090, 'cu12'), (None, 'cu13'), (11080, None)])
def test_nvrtc_fits_the_driver(driver, taken, tmp_path, monkeypatch):
    "Wheels of CUDA 12 and 13 side by side: the newest that the driver loads; a warning names what to install if none does"
    for name in ('cu12', 'cu13'):
        lib = tmp_path/'nvidia'/name/'lib'
        lib.mkdir(parents=True)
        for f in (f'libnvrtc.so.{name[2:]}', f'libnvrtc-builtins.so.{name[2:]}.0'): (lib/f).write_bytes(b'')

    class Driver:
        def cuDriverGetVersion(self, version): version._obj.value = driver

    def load(name):
        if driver is None: raise OSError(name)
        return Driver()

    monkeypatch.setattr(cuda.ctypes, 'CDLL', load)
    monkeypatch.setattr(cuda.sys, 'path', [str(tmp_path)])
    glob = cuda.Path.glob
    monkeypatch.setattr(cuda.Path, 'glob', lambda self, p: glob(self, p) if tmp_path in (self, *self.parents) else iter(()))
    cuda._too_new.cache_clear()
    if taken: assert cuda.find_nvrtc().parent.parent.name == taken
    else:
        said = "the GPU's driver supports CUDA 11: install nvidia-cuda-nvrtc-cu11"
        with pytest.warns(UserWarning, match=said): assert cuda.find_nvrtc() is None


@pytest.mark.skipif(not find_nvrtc(), reason='NVRTC is not installed')
def test_nvrtc_compiles(monkeypatch):
    monkeypatch.setattr(cuda, 'find_compiler', lambda kind: 1/0)
    assert cubin('row_sum.cu', 'sm_80').read_bytes()[:4] == b'\x7fELF'


@needs_nvcc
@pytest.mark.parametrize('broken', ['absent', 'empty', 'old'])
def test_nvcc_compiles_where_nvrtc_does_not(broken, tmp_path, monkeypatch):
    "No library, a file that is none, and a library that doesn't know the card"
    path = tmp_path/'libnvrtc.so.13'
    if broken != 'absent': path.write_bytes(b'')
    monkeypatch.setattr(cuda, 'find_nvrtc', lambda: None if broken == 'absent' else path)
    if broken == 'old': monkeypatch.setattr(cuda, 'nvrtc_works', lambda path, arch: False)
    assert cuda.has_compiler() and not cuda.has_compiler('sm_999')
    assert cubin('row_sum.cu', 'sm_80').read_bytes()[:4] == b'\x7fELF'


@pytest.mark.parametrize('card,runs', [((7, 0), 'none'), ((7, 5), 'plain'), ((8, 0), 'all')])
def test_twins_on_old_cards(card, runs, monkeypatch):
    "No twin raises or traps: below 8.0 those for tensor cores are not available, and below 7.5 none, as no compiler knows the card"
    from deepseek_nb.core.dispatch import _ops, twins
    twins()
    monkeypatch.setattr(cuda, 'has_compiler', lambda arch='sm_80': arch not in ('sm_70',))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *device: card)
    monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
    found = {f'{op.name}/{t.name}': bool(t.available()) for op in _ops.values() for t in op.twins.values() if t.kind == 'cuda'}
    assert len(found) > 12
    plain = {n for n in found if n.startswith(('rms_norm/', 'norm_rotate/', 'rotate/', 'route/'))}
    assert {n for n,ok in found.items() if ok} == dict(none=set(), plain=plain, all={*found})[runs]


def test_no_compiler_is_an_empty_table(monkeypatch):
    monkeypatch.setattr(cuda, 'find_nvrtc', lambda: None)
    monkeypatch.setenv('NVCC', 'absent-nvcc')
    assert resources('row_sum.cu') == {} and resources('row_sum.cu')._repr_markdown_() == 'no CUDA compiler here'
    with pytest.raises(FileNotFoundError, match='no CUDA compiler: absent-nvcc not found'): cubin('row_sum.cu', 'sm_80')


def test_pack_takes_null():
    assert Arguments('k', [Parameter('float', True, 'x')]).pack((None,), torch.device('cpu')) == bytes(8)


STRUCT = '''
struct Small { int one_line; };
struct Rows {                              // a comment
    const float* x;                        // another
    int n, d;
    int64_t step;
    __device__ int size() const {
        int here = n * d;
        return here;
    }
};
extern "C" __global__ void add(float* y, Rows rows, float scale) {
'''


def test_structs_are_read_from_the_source():
    kernels, structs = kernels_in(STRUCT), structs_in(STRUCT)
    assert structs == {'Rows': [('float', True, 'x'), ('int', False, 'n'), ('int', False, 'd'), ('int64_t', False, 'step')]}
    assert kernels == {'add': [('float', True, 'y'), ('Rows', False, 'rows'), ('float', False, 'scale')]}
    x, rows = torch.ones(4), dict(x=None, n=2, d=3, step=2**40)
    packing = Arguments('add', kernels['add'], structs)
    packed = packing.pack((x, rows, .5), torch.device('cpu'))
    assert packing.packed.unpack(packed) == (x.data_ptr(), 0, 2, 3, 2**40, .5) and packing.places == [0, 8, 32]
    for wrong, said in ((dict(n=1), 'rows has the fields x, n, d, step, not n'), (rows | dict(x=x.double()), 'x must be torch.float32')):
        with pytest.raises(ValueError, match=said): packing.pack((x, wrong, .5), torch.device('cpu'))


LATER = 'experts.cu', 'int8_vector.cu', 'quant_vector.cu', 'quant_int8.cu', 'quant_decoded.cu', 'quant_experts.cu'


@pytest.mark.parametrize('name', [*SIZES, *LATER])
def test_every_parameter_is_known(name):
    "A struct that Python could not fill would show only when its kernel is launched"
    from deepseek_nb.cuda.device import POINTERS, SCALARS
    kernels, structs = signatures(name)
    for p in (p for ps in kernels.values() for p in ps):
        if p.pointer: assert p.kind in POINTERS or structs[p.kind]
        else: assert p.kind in SCALARS or structs[p.kind], p
    for line in (nbproc.source_text(name)).splitlines(): assert len(line) <= 120, line


def test_a_model_runs_on_these_kernels(monkeypatch):
    "The twins where a model calls them, as on a GPU, but emulated"
    from deepseek_nb.arch.attention import norm_rotate
    from deepseek_nb.arch.model import Model, add_attention, add_feed_forward, run_blocks
    from deepseek_nb.arch.moe import mixture
    from deepseek_nb.arch.norm import rms_norm
    ops = [f.op for f in (attend_latent, norm_rotate, rms_norm, rotate, route)]
    for f in (run_blocks, add_attention, add_feed_forward, mixture):  # whole steps of C++, which a GPU doesn't have
        f.op.plan('auto', 'cpu')  # loads them
        monkeypatch.setattr(f.op, 'twins', {n: t for n,t in f.op.twins.items() if t.kind != 'cpp'})
        monkeypatch.setattr(f.op, 'plans', {})
    c = replace(preset('deepseek-v3'), vocab_size=64, dim=64, n_layers=2, n_dense_layers=1, inter_dim=64, n_heads=2, q_lora_rank=64,
                kv_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32, moe_inter_dim=32, n_routed_experts=8,
                n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, n_mtp_layers=0)
    model, ran, routes = Model(c, dtype=torch.bfloat16, device='cpu'), [], []
    for op in ops:
        op.plan('auto', 'cpu')
        twin = replace(op.twins['cuda/cuda'], device='cpu', available=None)
        counted = replace(twin, fn=lambda *args, fn=twin.fn, name=op.name, **kwargs: ran.append(name) or fn(*args, **kwargs))
        monkeypatch.setitem(op.twins, counted.name, counted)
        monkeypatch.setattr(op, 'plans', {})
    for name in ('reference', counted.name):  # `route` is the last one
        kept = replace(twin := op.twins[name], fn=lambda *args, fn=twin.fn: [routes.append(out := fn(*args)), out][1])
        monkeypatch.setitem(op.twins, name, kept)

    def logits(kind):
        routes.clear()
        with use(kind), torch.inference_mode():
            cache = model.new_cache(2, 8)
            model(tokens[:, :5], cache=cache)
            return model(tokens[:, 5:], cache=cache, mla='absorbed'), [*routes]

    for _ in range(20):  # until rounding turns no token to another expert
        tokens, before = torch.randint(0, 64, (2, 6)), len(ran)
        exact, wanted = logits('reference')
        assert len(ran) == before
        found, got = logits('auto')
        assert len(got) == len(wanted) == 2
        for a, b in zip(got, wanted, strict=True):
            assert (a.scores - b.scores).abs().max() < 2**-6
            again = limit_groups(a.scores + model.layers[1].mlp.gate.e_score_correction_bias, 4, 2, c.group_score).topk(2).indices
            assert torch.equal(again.sort().values, a.experts.sort().values)  # by the same rule, of scores that differ by rounding
        if all(torch.equal(a.experts.sort().values, b.experts.sort().values) for a, b in zip(got, wanted, strict=True)): break
    close(found, exact.double(), .03)
    assert set(ran) == {op.name for op in ops}

"Products and rows of codes where inputs are nothing, are not finite, are too small to have an inverse, or end within a block."
import os
import platform
import random
import shutil
import subprocess

import pytest
import torch
import warm
from conftest import SEED
from torch.nn import functional as F

from deepseek_nb.core.dispatch import use
from deepseek_nb.core.nbproc import find_compiler, source_text
from deepseek_nb.cuda.experts import fits_experts
from deepseek_nb.kernels.build import processor
from deepseek_nb.kernels.codes import linear_panels, panel_kernels
from deepseek_nb.kernels.gemm import gemm_kernels, linear_cpp
from deepseek_nb.kernels.panels import pack_panels
from deepseek_nb.quant import quantize
from deepseek_nb.quant.ggml import from_blocks
from deepseek_nb.quant.groups import Int8Fine, rounded_fine
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8, rounded

needs_compiler = pytest.mark.skipif(not (panel_kernels.ready() and gemm_kernels.ready()), reason='no C++ compiler')
FORMATS = ['int8', Int8(group=32), Int8Fine(), Int4(), Int4(64, symmetric=True)]
BAD = [float('nan'), float('inf'), -float('inf')]


@needs_compiler
@pytest.mark.parametrize('shape', [(0, 64), (2, 0, 64)])
def test_no_tokens(shape):
    x,want = torch.zeros(shape),(*shape[:-1], 24)
    for f in FORMATS: assert linear_panels(x, quantize(torch.randn(24, 64), f)).shape == want
    assert linear_cpp(x, torch.randn(24, 64)).shape == want
    assert linear_panels(F.pad(x, (0, 192)), from_blocks(torch.zeros(24, 144, dtype=torch.uint8), 'Q4_K')).shape == want


@needs_compiler
@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('at', [0, 31, 32, 69])
@pytest.mark.parametrize('tokens', [1, 9, 40])
def test_what_is_not_finite_stays_so(bad, at, tokens):
    "In the token that has it, for every output, and in no other."
    for f in FORMATS:
        w,x = quantize(torch.randn(40, 70), f),torch.randn(tokens, 70)
        good = linear_panels(x, w)
        x[tokens//2, at] = bad
        got = linear_panels(x, w)
        assert not got[tokens//2].isfinite().any()
        others = torch.arange(tokens) != tokens//2
        assert torch.equal(got[others], good[others])


@needs_compiler
@pytest.mark.parametrize('size', [1e-45, 1e-40, 1e-37, 1e-30, 1e30])
def test_sizes_without_an_inverse(size):
    for f in FORMATS:
        w,x = quantize(torch.randn(40, 64), f),torch.randn(3, 64)*size
        got,exact = linear_panels(x, w).double(),x.double() @ w.dequantize().double().T
        assert got.isfinite().all() and (got - exact).abs().max() <= .05*exact.abs().max() + 1e-35


@needs_compiler
@pytest.mark.parametrize('tokens', [1, 40])
def test_activations_round_as_the_definition_says(tokens):
    "Also at the border between two codes, where a product that rounds once more or once less gives the other."
    step = torch.rand(tokens, 1) + .5
    x = step*(torch.randint(-126, 126, (tokens, 160)) + .5)*(1 + torch.randint(-2, 3, (tokens, 160))*2**-23)
    x[:, ::32] = 127*step
    one = quantize(torch.eye(160), 'int8')
    with use('reference'): meant = rounded(x)
    scale = (x.view(tokens, 5, 32).abs().amax(-1)/127).repeat_interleave(32, -1)
    assert torch.equal((linear_panels(x, one)/scale).round(), (meant/scale).round())


def test_experts_in_few_bits_are_not_for_the_float_kernel():
    x,weights,chosen = torch.randn(4, 64).bfloat16(),torch.ones(4, 1),torch.zeros(4, 1, dtype=torch.int64)
    gate_up,down = torch.randn(2, 64, 64).bfloat16(),torch.randn(2, 64, 32).bfloat16()
    assert fits_experts(x, weights, chosen, gate_up, down)
    few = quantize(gate_up, 'int8'),quantize(down, 'int8')
    for pair in (few, (few[0], down), (gate_up, few[1])): assert not fits_experts(x, weights, chosen, *pair)


def test_the_definition_agrees_on_what_is_not_finite():
    x = torch.randn(2, 64)
    x[0, 3] = float('nan')
    with use('reference'): got = F.linear(x, quantize(torch.randn(24, 64), 'int8'))
    assert got[0].isnan().all() and got[1].isfinite().all()


@needs_compiler
@pytest.mark.parametrize('f', FORMATS, ids=str)
def test_embedding_is_decoding(f):
    for o, i in ((1, 1), (5, 31), (16, 32), (17, 97), (40, 64), (33, 200)):
        w, ids = pack_panels(quantize(torch.randn(o, i), f)), torch.randint(o, (3, 7))
        assert torch.equal(F.embedding(ids, w), w.dequantize()[ids])
        assert F.embedding(ids[:0], w).shape == (0, 7, i)
        for bad in (-1, o):
            with pytest.raises(RuntimeError, match=f'row {bad} of a weight with {o}'): F.embedding(torch.tensor([[0, bad]]), w)


@needs_compiler
@pytest.mark.parametrize('f', FORMATS, ids=str)
def test_panels_give_back_every_part(f):
    for o, i in ((1, 1), (5, 31), (16, 32), (17, 97), (40, 64), (33, 200)):
        w = quantize(torch.randn(2, o, i), f)
        parts = {n: t.clone() for n, t in w.parts().items()}
        again = pack_panels(w).parts()
        assert parts.keys() == again.keys() and all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in parts.items())


@needs_compiler
@pytest.mark.parametrize('f', [*FORMATS, Int4(64), Int4(128), Int4(symmetric=True)], ids=str)
def test_many_tokens_are_as_one_at_a_time(f):
    "Whole tiles of tokens, what is left of them, and one by one; a token that isn't finite stays alone"
    for o, i, n in ((16, 32, 16), (17, 33, 17), (40, 70, 31), (5, 576, 32), (100, 150, 50), (33, 290, 64)):
        w, x = quantize(torch.randn(o, i), f), torch.randn(n, i)
        one = torch.cat([linear_panels(row[None], w) for row in x])
        many = linear_panels(x, w)
        assert (many - one).abs().max() <= 2e-6*one.abs().max()
        x[n//2, i//2] = float('nan')
        bad = linear_panels(x, w)
        assert bad[n//2].isnan().all()
        assert torch.equal(bad[:n//2], many[:n//2]) and torch.equal(bad[n//2+1:], many[n//2+1:])


def sweep(rounds):
    "Products with two codes per activation against float64, at sizes that end within blocks, groups, panels and tiles"
    r = random.Random(SEED)
    torch.manual_seed(SEED)
    for _ in range(rounds):
        o, i, n = (r.choice(n) for n in ((1, 15, 16, 17, 40, 100), (1, 31, 32, 33, 64, 97, 290, 576), (1, 2, 3, 9, 12, 13, 16, 25, 33)))
        w, x = quantize(torch.randn(o, i)*10**r.uniform(-2, 2), Int8Fine(r.choice((32, 64, 96)))), torch.randn(n, i)*10**r.uniform(-3, 3)
        x[:, r.randrange(i)] *= r.choice((1, 100))
        weight, codes = w.dequantize().double(), rounded_fine(x).double()
        # float32's sums: terms of 128 steps and of minima cancel each other
        bound = 2**-22*(codes.abs() @ (weight.abs() + 4*weight.abs().amax(-1, True)).T)
        got = linear_panels(x, w)
        assert ((got - codes @ weight.T).abs() <= bound).all(), (o, i, n, w.format, SEED)
        assert torch.equal(F.embedding(ids := torch.randint(o, (5,)), w), w.dequantize()[ids])


@needs_compiler
def test_two_codes_equal_float64():
    print('seed', SEED)
    sweep(60)


@pytest.mark.draw(1, group='instruction sets')
@needs_compiler
def test_narrower_instruction_sets(isa):
    done = warm.run('-c', 'import test_quant_edges as t; t.sweep(20)', env={**os.environ, **warm.built_for(isa), 'SEED': str(SEED),
                    'PYTHONPATH': os.pathsep.join((os.path.dirname(__file__), os.environ.get('PYTHONPATH', '')))})
    if 'it may be' in done.stderr: pytest.skip(f'no {isa} on this processor')
    assert done.returncode == 0, done.stderr[-3000:]


# ---- products of bytes

SETS = {'-march=x86-64': '', '-march=x86-64-v3': 'avx2 fma', '-march=x86-64-v3 -mavxvnni': 'avx2 fma avx_vnni',
        '-march=x86-64-v4': 'avx512bw avx512dq avx512vl', '-march=x86-64-v4 -mavx512vnni': 'avx512bw avx512dq avx512vl avx512_vnni',
        '-march=armv8-a': '', '-march=armv8.2-a+dotprod': 'asimddp'}
DOTS = r'''
#include <algorithm>
#include <cstdio>
int main() {
    uint64_t seed = SEED;
    auto next = [&] { return seed = seed * 6364136223846793005u + 1442695040888963407u, int(seed >> 33); };
    for (int round = 0; round < 4000; ++round) {
        const bool wide = round & 1, ends = round & 2;  // codes of 8 bits, and the ends of the ranges only
        const int low = wide ? -128 : 0, high = wide ? 127 : 15;
        int8_t w[8][4 * L], a[8][4];
        int want[L] = {}, total = 0;
        for (auto& block : w) for (int8_t& x : block) x = ends ? (next() & 1 ? low : high) : low + next() % (high - low + 1);
        for (auto& word : a) for (int8_t& x : word) x = ends ? (next() & 1 ? -127 : 127) : next() % 255 - 127;
        if (ends && !(next() & 3)) memset(w, high, sizeof w), memset(a, 127, sizeof a);
        ivec s = {}, v;
        for (int i = 0; i < 8; ++i) {
            memcpy(&v, w[i], sizeof v);
            int32_t word;
            memcpy(&word, a[i], 4);
            s = wide && !WIDE ? dot_signed(s, v, word) : dot(s, wide ? v ^ int32_t(0x80808080) : v, word);
            for (int j = 0; j < 4; ++j) total += a[i][j];
            for (int j = 0; j < 4 * L; ++j) want[j / 4] += w[i][j] * a[i][j % 4];
        }
        if (!wide || WIDE) s = whole(s);
        if (wide && WIDE) s -= 128 * total;
        for (int j = 0; j < L; ++j)
            if (s[j] != want[j]) return printf("round %d, lane %d: %d, not %d\n", round, j, s[j], want[j]), 1;
    }
    printf("%d lanes\n", L);
}'''


@pytest.mark.parametrize('flags', SETS)
def test_products_of_bytes_are_exact(flags, tmp_path):
    "With every instruction set that this processor, or an emulator, runs: all codes, and sums that a narrower one would clip"
    arm = 'armv8' in flags
    own = arm == (platform.machine() in ('aarch64', 'arm64'))
    compiler, emulator = find_compiler('cpp') if own else shutil.which('aarch64-linux-gnu-g++'), shutil.which('qemu-aarch64')
    if not compiler or not own and not (arm and emulator): pytest.skip('no compiler, or nothing that runs its programs')
    if own and not {*SETS[flags].split()} <= {*processor().split()}: pytest.skip(f'this processor lacks {SETS[flags]}')
    head = source_text('panels.h').split('struct CodeBlock')[0].replace('gemm.h', 'simd.h')
    (tmp_path/'simd.h').write_text(source_text('simd.h'))
    (tmp_path/'dots.cpp').write_text(head + DOTS.replace('SEED', f'{SEED}u'))
    made = subprocess.run([compiler, '-std=c++20', '-O1', *flags.split(), *(['-static'] if arm else []), 'dots.cpp', '-o', 'dots'],
                          cwd=tmp_path, capture_output=True, text=True)
    if 'unrecognized' in made.stderr or 'unknown argument' in made.stderr: pytest.skip(f'{compiler} has no {flags}')
    assert made.returncode == 0, made.stderr[:2000]
    done = subprocess.run([*([] if own else [emulator]), tmp_path/'dots'], capture_output=True, text=True)
    assert done.returncode == 0, f'{flags}, SEED={SEED}: {done.stdout}{done.stderr}'
    print(done.stdout)

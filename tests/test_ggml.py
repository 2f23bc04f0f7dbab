"GGUF's blocks: every kind against the gguf package, the C++ product against float64, and models that stay in their file's bytes"
import os
import random
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import warm
from gguf import GGMLQuantizationType as Q
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import LLAMA, QWEN2, TOKENS, V2, V3, fresh, tensors, write_metadata
from torch.nn import functional as F

from deepseek_nb import Model, QuantizedModel
from deepseek_nb.core.device import pick_dtype
from deepseek_nb.core.dispatch import use
from deepseek_nb.files.gguf import gguf_config, open_gguf
from deepseek_nb.kernels import build
from deepseek_nb.kernels.panels import pack_panels
from deepseek_nb.kernels.plan import why_readable
from deepseek_nb.quant import QuantizedWeight, make_format, quantize, relative_error
from deepseek_nb.quant.ggml import BLOCK_KINDS as KINDS
from deepseek_nb.quant.ggml import SPLIT, Ggml, block_format, from_blocks, prepack_blocks, split_blocks
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8, rounded
from deepseek_nb.quant.save import GgufSource

SEED = int(os.environ.get('SEED', random.randrange(10**6)))
HERE = Path(__file__).parent
HALVES = dict(Q8_0=(0,), Q4_0=(0,), Q4_1=(0, 2), Q4_K=(0, 2), Q6_K=(208,))
DTYPES = [torch.float32, torch.bfloat16]
needs_compiler = pytest.mark.skipif(not any(shutil.which(n) for n in ('c++', 'g++', 'clang++')), reason='no C++ compiler')


@pytest.fixture(autouse=True)
def seeded():
    random.seed(SEED)
    torch.manual_seed(SEED)
    print('seed', SEED)
    with torch.no_grad(): yield


def blocks(kind, *shape, tame=True):
    "Random bytes `… o (n size)`; tame: the halves are small numbers, where else they may be anything"
    b = torch.randint(256, (*shape, KINDS[kind][1]), dtype=torch.uint8)
    if tame:
        for at in HALVES[kind]: b[..., at:at+2] = (torch.randn(*shape, 1)*.1).half().view(torch.uint8)
    return b.flatten(-2)


def package(b, kind): return gguf.dequantize(b.numpy(), Q[kind])


# ---- decoding and encoding

@pytest.mark.parametrize('tame', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_decoding_equals_the_package(kind, tame):
    for shape in ((1, 1), (37, 3), (3, 5, 2), (16, 1), (17, 4)):
        b = blocks(kind, *shape, tame=tame)
        w = from_blocks(b, kind)
        with np.errstate(all='ignore'): want = package(b, kind)
        assert w.shape == want.shape
        got = w.dequantize().numpy()
        np.testing.assert_array_equal(got, want)  # NaN where NaN is
        np.testing.assert_array_equal(np.signbit(got)[~np.isnan(got)], np.signbit(want)[~np.isnan(want)])


@pytest.mark.parametrize('bits', [0x7c00, 0xfc00, 0x7e01, 0x0001, 0x83ff, 0x8000, 0x7bff])
@pytest.mark.parametrize('kind', KINDS)
def test_special_scales(kind, bits):
    b = blocks(kind, 9, 2).view(9, 2, -1)
    for at in HALVES[kind]: b[4, 1, at:at+2] = torch.tensor([bits & 255, bits >> 8], dtype=torch.uint8)
    b = b.flatten(-2)
    with np.errstate(all='ignore'): want = package(b, kind)
    w = from_blocks(b, kind)
    np.testing.assert_array_equal(w.dequantize().numpy(), want)
    np.testing.assert_array_equal(w.rows(torch.tensor([4, 0])).numpy(), want[[4, 0]])
    np.testing.assert_array_equal(split_blocks(w).dequantize().numpy(), want)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(['Q8_0', 'Q4_0', 'Q4_1']), o=st.integers(1, 9), n=st.integers(1, 4), scale=st.sampled_from([0., 1e-6, 1., 1e4]))
def test_encoding_writes_the_package_s_bytes(kind, o, n, scale):
    w = torch.randn(o, 32*n)*scale
    q = quantize(w, Ggml(kind))
    np.testing.assert_array_equal(q.blocks.numpy(), gguf.quantize(w.numpy(), Q[kind]))
    i = split_blocks(q)
    assert i.format == (Int8(group=32) if kind == 'Q8_0' else Int4(32, symmetric=kind == 'Q4_0')) and i.nbytes == q.nbytes
    assert torch.equal(i.dequantize(), q.dequantize())
    def kinds(parts): return {k: (v.shape, v.dtype) for k, v in parts.items()}
    assert kinds(i.parts()) == kinds(i.format.encode(i.dequantize()))


def test_a_format_is_written_and_read():
    f = Ggml('Q6_K')
    assert make_format(f.spec()) == f and f.spec() == {'format': 'ggml', 'kind': 'Q6_K'}
    w = from_blocks(blocks('Q6_K', 3, 5, 2), 'Q6_K', torch.bfloat16)
    assert w.dequantize().dtype == torch.bfloat16 and torch.equal(w[1].dequantize(), w.dequantize()[1])
    before = w.blocks.clone()
    assert torch.equal(w.to(torch.float32).blocks, before) and w.dequantize().dtype == torch.float32


@pytest.mark.parametrize('call,said', [
    (lambda: Ggml('Q9_9'), "ggml: unknown block format 'Q9_9'; use one of Q8_0"),
    (lambda: quantize(torch.ones(2, 256), Ggml('Q4_K')), 'Q4_K is read only'),
    (lambda: quantize(torch.ones(2, 256), Ggml('Q6_K')), 'Q6_K is read only'),
    (lambda: quantize(torch.ones(2, 33), Ggml('Q8_0')), 'do not divide a row of 33'),
    (lambda: quantize(torch.full((2, 32), 1e30), Ggml('Q4_1')), 'scale overflows float16'),
    (lambda: from_blocks(torch.zeros(2, 143, dtype=torch.uint8), 'Q4_K'), 'a row of 143 bytes is not a multiple of 144')])
def test_errors(call, said):
    with pytest.raises(ValueError, match=said) as e: call()
    assert '\n' not in str(e.value)


def test_what_cannot_be_split_stays():
    for w in (quantize(torch.ones(2, 32), Int4()), from_blocks(blocks('Q4_K', 3, 2), 'Q4_K'), from_blocks(blocks('Q6_K', 3, 2), 'Q6_K')):
        assert split_blocks(w) is w


def test_the_lowest_code_of_eight_bits():
    "-128, which llama.cpp does not write, is multiplied as it decodes"
    b = blocks('Q8_0', 20, 4)
    b.view(20, 4, 34)[:, :, 2:] = 128
    b.view(20, 4, 34)[:, :, :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    w, x = split_blocks(from_blocks(b, 'Q8_0')), torch.randint(-127, 128, (3, 128)).float()
    x[:, ::32] = 127    # the largest of each block and row: activations in eight bits are then exact, and only float32 rounds
    assert w.dequantize().min() < -1.27
    got, exact = torch.nn.functional.linear(x, w), x.double() @ w.dequantize().double().T
    assert ((got - exact).abs() <= rounding(x, w, exact)).all(), (got - exact).abs().max()


# ---- the product in C++

def rounding(x, w, exact):
    "What rounding may do to each output: sqrt(k) units of the sum of |x w| (Higham and Mary, 2019), and its own dtype"
    unit = torch.finfo(torch.float32).eps/2
    return x.shape[-1]**.5*unit*(x.double().abs() @ w.dequantize().double().abs().T) + torch.finfo(x.dtype).eps*exact.abs() + 1e-30


def packed(b, kind): return prepack_blocks(from_blocks(b, kind))


def tolerance(x, w):
    "The bound of `rounding`, with the larger terms of a product of codes, minimum and scale"
    d = w.dequantize().abs()
    wide = d.unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(-2)
    return 4*x.shape[-1]**.5*torch.finfo(torch.float32).eps*(x.abs() @ (d + 4*wide).double().T) + 1e-30


def sweep(rounds=40):
    "Ragged rows and tokens of every kind against float64 on the rounded activations"
    random.seed(SEED)
    torch.manual_seed(SEED)
    for i in range(rounds):
        kind, dtype = [*KINDS][i % len(KINDS)], random.choice(DTYPES)
        o, n, b = random.randint(1, 70), random.choice([1, 2, 5, 12, 13, 23, 24, 25, 40, 64, 65, 130]), random.randint(1, 5)
        w, x = packed(blocks(kind, o, b), kind), torch.randn(n, b*KINDS[kind][0]).to(dtype)
        bias = random.choice([None, torch.randn(o).to(dtype)])
        got, codes = F.linear(x, w, bias), rounded(x.float()).double()
        exact = codes @ w.dequantize().double().T + (0 if bias is None else bias.double())
        bound = tolerance(codes, w) + torch.finfo(dtype).eps*exact.abs()*2
        error = (got.double() - exact).abs()
        assert got.dtype == dtype and (error <= bound).all(), f'{kind, dtype, o, n, b}: {(error/bound).max():.2f} of the bound, seed {SEED}'
        assert torch.equal(F.linear(x[:1], w, bias), got[:1]), 'a row has the bits that it has alone'


@needs_compiler
@pytest.mark.parametrize('threads', [1, 2, 3])
def test_product_equals_float64(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try: sweep(40)
    finally: torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize('kind', KINDS)
def test_panels_hold_the_bytes_of_the_file(kind):
    "Both packers make the same panels, which give back each block; a row of an embedding is that of the definition"
    for shape in ((21, 2), (3, 16, 1), (2, 40, 3)):
        b = blocks(kind, *shape)
        plain, w = from_blocks(b, kind), packed(b.clone(), kind)
        assert torch.equal(w.panels, pack_panels(split_blocks(from_blocks(b, kind))).panels)
        assert torch.equal(w.dequantize(), plain.dequantize()) and w.format == block_format(kind)
        if kind not in SPLIT: assert torch.equal(w.parts()['blocks'], b) and w.nbytes <= 1.02*16*-(-shape[-2]//16)*b[..., 0, :].numel()
    ids, one = torch.tensor([[20, 3], [3, 0]]), packed(blocks(kind, 21, 2), kind)
    exact = one.dequantize()
    top = exact.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True).expand(-1, -1, 32).flatten(-2)
    assert ((F.embedding(ids, one) - exact[ids]).abs() <= 2**-21*top[ids]).all()


@needs_compiler
@pytest.mark.parametrize('kind', KINDS)
def test_what_is_not_finite_stays_so(kind):
    for n in (2, 50):
        b = blocks(kind, 40, 2).view(40, 2, -1)
        for row,value in ((3, torch.nan), (5, torch.inf)):
            for at in HALVES[kind]: b[row, row % 2, at:at+2] = torch.tensor([value]).half().view(torch.uint8)
        w, x = packed(b.flatten(-2), kind), torch.randn(n, 2*KINDS[kind][0])
        bad = (~F.linear(x, w).isfinite()).all(0)
        assert bad[[3, 5]].all() and F.linear(x, w)[:, ~bad].isfinite().all() and bad.sum() == 2
        x[1, 7] = torch.nan
        assert F.linear(x, w)[1].isnan().all() and F.linear(x, w)[0, ~bad].isfinite().all()


def run(code, **env):
    env = {**os.environ, 'SEED': str(SEED), **env}
    if 'LD_PRELOAD' not in env: return warm.run('-c', code, env=env, cwd=HERE)
    return subprocess.run([sys.executable, '-c', warm.ALONE + code], capture_output=True, text=True, env=env, cwd=HERE, timeout=600)


@pytest.mark.draw(1, group='instruction sets')
@needs_compiler
def test_narrower_instruction_sets(isa):
    if isa not in build.ARCHITECTURES.get(os.uname().machine, {}): pytest.skip(f'{os.uname().machine} has no {isa}')
    code = '''import test_ggml as t
t.sweep(20)
for k in t.KINDS: t.test_panels_hold_the_bytes_of_the_file(k); t.test_what_is_not_finite_stays_so(k)'''
    done = run(code, **warm.built_for(isa))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.draw(1, group='sanitizers')
@needs_compiler
def test_clean_under_sanitizers():
    if not (under := warm.sanitized()): pytest.skip('this compiler has no AddressSanitizer')
    done = run('import test_ggml as t; t.sweep(25)', **under, OMP_NUM_THREADS='2')
    assert done.returncode == 0, done.stderr[-3000:]


def test_gradients_and_stacks_take_the_definition():
    w = quantize(torch.randn(3, 5, 64), Ggml('Q8_0'))
    x = torch.randn(2, 64, requires_grad=True)
    with torch.enable_grad(): F.linear(x, w[1]).sum().backward()
    torch.testing.assert_close(x.grad, w[1].dequantize().sum(0).expand(2, -1))


# ---- models

BIG = dict(dim=256, inter_dim=512, vocab_size=64)
CONFIGS = dict(llama=(replace(LLAMA, **BIG, n_heads=8, head_dim=32), False),
               tied=(replace(QWEN2, **BIG, n_heads=8, head_dim=32, tie_embeddings=True), False),
               v2=(replace(V2, **BIG, moe_inter_dim=256), False), v3=(replace(V3, **BIG, moe_inter_dim=256, q_lora_rank=256), False),
               v3_split=(replace(V3, **BIG, moe_inter_dim=256, q_lora_rank=256), True))


def write(path, model, split, kinds):
    "A file whose matrices have random kinds, gate and up of a layer's experts the same; returns name -> kind"
    w, used = gguf.GGUFWriter(path, 'deepseek2' if model.config.mla else model.config.model_type), {}
    write_metadata(w, model.config, split)
    for name, x in tensors(model, split):
        k = used.get(name.replace('_up_exps', '_gate_exps')) or random.choice(kinds)
        if x.ndim < 2 or 'gate_inp' in name: k = 'F32'
        elif x.shape[-1] % KINDS.get(k, (32,))[0]: k = 'Q8_0'
        if k in ('Q4_K', 'Q6_K'): q = blocks(k, *x.shape[:-1], x.shape[-1]//256).numpy()
        else: q = gguf.quants.quantize(np.ascontiguousarray(x), Q[k])
        w.add_tensor(name, q, raw_dtype=Q[k])
        used[name] = k
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    return used


def weights(model): return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}


@pytest.mark.parametrize('name', CONFIGS)
def test_a_model_is_the_one_that_decoding_gives(name, tmp_path):
    config, split = CONFIGS[name]
    used = write(tmp_path/'m.gguf', fresh(config), split, [*KINDS])
    exact = Model.from_pretrained(tmp_path/'m.gguf', dtype=torch.float32, device='cpu')
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        kept = QuantizedModel.from_pretrained(tmp_path/'m.gguf', device='cpu')
    own = weights(kept)
    for n, t in exact.state_dict().items():
        assert torch.equal(own[n].dequantize() if n in own else kept.state_dict()[n], t), n
    expanded = [str(w.message) for w in said if 'are decoded to floats' in str(w.message)]
    lost = {n for n in exact.state_dict() if 'kv_b_proj' in n} - {*own}
    assert bool(expanded) == bool(lost) and all(m.count('_proj') == m.count('kv_b_proj') for m in expanded)
    assert not any(split or w.format.name == 'ggml' for n, w in own.items() if 'kv_b_proj' in n)
    plain = {n for n, t in exact.state_dict().items() if t.ndim > 1 and 'gate.weight' not in n and 'kv_b_proj' not in n}
    assert plain == {n for n in own if 'kv_b_proj' not in n}, 'every matrix that is only multiplied stays in blocks'
    assert {w.format.name for w in own.values()} <= {'ggml', 'int4', 'int8'} and {'Q4_K', 'Q6_K'} & {*used.values()}
    assert not any(w.format.name == 'ggml' and w.format.kind in SPLIT for w in own.values())
    with use('reference'): a, b = exact(TOKENS), kept(TOKENS)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4*a.abs().max().item())


def test_tensors_of_two_kinds_in_one_parameter_become_floats(tmp_path):
    config, _ = CONFIGS['v3']
    model = fresh(config)
    w = gguf.GGUFWriter(tmp_path/'m.gguf', 'deepseek2')
    write_metadata(w, config, False)
    for name, x in tensors(model, False):
        k = 'F32' if x.ndim < 2 or 'gate_inp' in name else 'Q4_0' if 'up_exps' in name else 'Q8_0'
        w.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x), Q[k]), raw_dtype=Q[k])
    w.write_header_to_file(); w.write_kv_data_to_file(); w.write_tensors_to_file(); w.close()
    with pytest.warns(UserWarning, match=r'layers.1.mlp.experts.gate_up_proj \(Q4_0, Q8_0\)'):
        kept = Model.from_pretrained(tmp_path/'m.gguf', device='cpu')
    exact = Model.from_pretrained(tmp_path/'m.gguf', dtype=torch.float32, device='cpu')
    assert torch.equal(kept.layers[1].mlp.experts.gate_up_proj, exact.layers[1].mlp.experts.gate_up_proj)
    assert isinstance(kept.layers[1].mlp.experts.down_proj, QuantizedWeight)


def test_kinds_that_stay_outside_are_named(tmp_path):
    config, _ = CONFIGS['llama']
    write(tmp_path/'m.gguf', fresh(config), False, ['Q5_0'])
    with pytest.warns(UserWarning, match=r'm.gguf: 23 weights are decoded to floats, .*embed_tokens.weight \(Q5_0\)'):
        kept = Model.from_pretrained(tmp_path/'m.gguf', device='cpu')
    exact = Model.from_pretrained(tmp_path/'m.gguf', dtype=torch.float32, device='cpu')
    exact.to(kept.dtype)
    assert type(kept) is Model and torch.equal(kept(TOKENS), exact(TOKENS))


def test_a_plain_file_has_no_blocks(tmp_path):
    write(tmp_path/'m.gguf', fresh(LLAMA), False, ['F16', 'BF16', 'F32'])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        kept = Model.from_pretrained(tmp_path/'m.gguf', device='cpu')
    assert type(kept) is Model and kept.dtype == pick_dtype(None, 'cpu')


def test_damaged_files(tmp_path):
    path = tmp_path/'m.gguf'
    write(path, fresh(CONFIGS['llama'][0]), False, ['Q4_K'])
    raw = path.read_bytes()
    for n in (len(raw) - 1, len(raw)//2, 400, 3):
        path.write_bytes(raw[:n])
        with pytest.raises(ValueError, match='truncated|not a GGUF file') as e: Model.from_pretrained(path)
        assert str(path) in str(e.value) and '\n' not in str(e.value)
    with pytest.raises(FileNotFoundError, match='none.gguf'): Model.from_pretrained(tmp_path/'none.gguf')


def test_blocks_are_the_mapped_file(tmp_path):
    path = tmp_path/'m.gguf'
    write(path, fresh(CONFIGS['llama'][0]), False, ['Q6_K'])
    reader = open_gguf(path)
    source = GgufSource(meta := Model(gguf_config(reader, path), dtype=torch.float32, device='meta'), reader, path)
    first, last = reader.data.ctypes.data, reader.data.ctypes.data + reader.data.nbytes
    parts = {k: source.parts(k, f) for k in meta.state_dict() if isinstance(f := source.format(k), Ggml)}
    inside = {k for k, p in parts.items() if first <= p['blocks'].data_ptr() < last}
    assert {k.split('.')[-2] for k in parts if k not in inside} == {'q_proj', 'k_proj'} and len(inside) > 10


MEMORY = '''
import resource, sys, warnings
import torch
from deepseek_nb import Model
from deepseek_nb.files.gguf import open_gguf
from deepseek_nb.files.hub import fetch
import deepseek_nb.infer.load, deepseek_nb.kernels.codes
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
open_gguf(fetch('smollm2-135m'))
before = peak()
Model.from_pretrained('smollm2-135m', device='cpu')
print(peak() - before)'''


@pytest.mark.skipif(sys.platform != 'linux', reason='counts memory as Linux does')
def test_the_floats_are_never_in_memory():
    done = run(MEMORY)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 250e6, f'{int(done.stdout):,} bytes for a file of 98 MB, whose floats are 538 MB'


def test_smollm2():
    exact, kept = (Model.from_pretrained('smollm2-135m', d, 'cpu') for d in ('float32', None))
    tokens = torch.randint(49152, (2, 30))
    with use('reference'): a, b = exact(tokens), kept(tokens)
    assert ((a - b).norm()/a.norm()).item() < 1e-5


@needs_compiler
@pytest.mark.parametrize('name', ['llama', 'v2', 'v3'])
def test_the_step_runs_blocks_of_256(name, tmp_path):
    """Dense models and mixtures in Q4_K and Q6_K run in one step: a row has the bits that it has alone, and errs as products one at a time
    do. All experts are used, as a rounded activation may choose another one; MLA's latents are rounded in another order."""
    import test_ragged
    c = CONFIGS[name][0]
    if c.n_routed_experts: c = replace(c, n_activated_experts=c.n_routed_experts, n_limited_groups=c.n_expert_groups)
    write(tmp_path/'m.gguf', fresh(c), False, ['Q4_K', 'Q6_K'])
    model = Model.from_pretrained(tmp_path/'m.gguf', dtype=None, device='cpu').requires_grad_(False)
    assert why_readable(model) is None and {m.format.name for m in weights(model).values()} >= {'ggml'}
    r, texts = random.Random(SEED), [torch.randint(64, (n,)) for n in (1, 17, 60)]
    found = test_ragged.in_company(model, texts, r, 16)
    for text,a in zip(texts, found, strict=True):
        assert torch.equal(a, test_ragged.alone(model, text, 64, r.choice([1, 7, 10**9]))), len(text)
    for m in model.layers.modules(): m.register_forward_hook(lambda *ignored: None)
    assert why_readable(model) == 'a module has a hook'
    exact = Model.from_pretrained(tmp_path/'m.gguf', dtype=torch.float32, device='cpu')
    one_by_one,exact = (torch.cat([test_ragged.alone(m, t) for t in texts]) for m in (model, exact))
    found = torch.cat(found)
    if name == 'llama': assert relative_error(one_by_one, found) < 1e-4
    assert 0 < relative_error(exact, found) < 2*relative_error(exact, one_by_one)  # 150 seeds: 0.76 to 1.28 times

"The runner: every format, architecture and stage against Python, files that are no models, and the program itself"
import json
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

gguf = pytest.importorskip('gguf')
from deepseek_nb.core.device import usable_cpus  # noqa: E402
from deepseek_nb.core.nbproc import find_compiler  # noqa: E402
from deepseek_nb.export.gguf import export_gguf  # noqa: E402
from deepseek_nb.export.runner import Runner, compile_runner, runner_sources  # noqa: E402
from deepseek_nb.export.runner_binary import build_program  # noqa: E402
from deepseek_nb.files.tokenizer import PRE, byte_alphabet, from_gguf  # noqa: E402

try: find_compiler('cpp')
except FileNotFoundError: pytest.skip('no C++ compiler', allow_module_level=True)

Q = gguf.GGMLQuantizationType
GOLDEN = Path(os.environ.get('DEEPSEEK_NB_GOLDEN') or Path(__file__).resolve().parents[2]/'shared/golden')/'chat_prompts.json'


@pytest.fixture(scope='module')
def seed():
    value = int(np.random.default_rng().integers(2**31))
    print('seed', value)
    return value


def tiny(path, seed, kind='F32', arch='llama', **facts):
    "A model of one block with random weights, whose tokens are the 256 bytes and some merges"
    rng,d,f,v = np.random.default_rng(seed),256 if kind.endswith('_K') else 64,256 if kind.endswith('_K') else 96,270
    w = gguf.GGUFWriter(path, arch)
    letters = [*byte_alphabet().values()]
    w.add_tokenizer_model('gpt2'), w.add_tokenizer_pre('smollm' if arch == 'llama' else 'deepseek-v3')
    w.add_token_list(letters + [letters[i] + letters[i+1] for i in range(65, 77)] + ['<s>', '</s>'])
    w.add_token_types([1]*(v - 2) + [3, 3]), w.add_bos_token_id(v - 2), w.add_eos_token_id(v - 1)
    w.add_token_merges([f'{letters[i]} {letters[i+1]}' for i in range(65, 77)])
    base = dict(embedding_length=d, feed_forward_length=f, block_count=1, context_length=64) | {'attention.head_count': 4}
    mla = {'attention.key_length': 24, 'attention.value_length': 16, 'rope.dimension_count': 8, 'attention.kv_lora_rank': 32,
           'expert_count': 8, 'expert_used_count': 2, 'expert_shared_count': 1, 'expert_feed_forward_length': 32,
           'expert_group_count': 4, 'expert_group_used_count': 2, 'expert_gating_func': 2}
    for k,x in (base | (mla if arch == 'deepseek2' else {'attention.head_count_kv': 2}) | facts).items(): w.add_uint32(f'{arch}.{k}', x)
    w.add_float32(f'{arch}.attention.layer_norm_rms_epsilon', 1e-5)
    def add(name, *shape):
        x = (rng.standard_normal(shape)*(.15 if len(shape) > 1 else .1) + (len(shape) == 1)).astype(np.float32)
        if len(shape) == 1 or kind == 'F32': return w.add_tensor(name, x)
        if kind.endswith('_K'): return w.add_tensor(name, blocks(rng, kind, x.size//256).reshape(*shape[:-1], -1), raw_dtype=Q[kind])
        w.add_tensor(name, gguf.quantize(x, Q[kind]), raw_dtype=Q[kind])
    add('token_embd.weight', v, d), add('output_norm.weight', d)
    for n in ('attn_norm', 'ffn_norm'): add(f'blk.0.{n}.weight', d)
    if arch == 'llama':
        for n,o,i in (('attn_q', d, d), ('attn_k', d//2, d), ('attn_v', d//2, d), ('attn_output', d, d),
                      ('ffn_gate', f, d), ('ffn_up', f, d), ('ffn_down', d, f)):
            add(f'blk.0.{n}.weight', o, i)
    else:
        for n,*s in (('attn_q', 96, d), ('attn_kv_a_mqa', 40, d), ('attn_kv_b', 4*32, 32), ('attn_output', d, 64), ('ffn_gate_inp', 8, d),
                     ('ffn_gate_exps', 8, 32, d), ('ffn_up_exps', 8, 32, d), ('ffn_down_exps', 8, d, 32), ('ffn_gate_shexp', 32, d),
                     ('ffn_up_shexp', 32, d), ('ffn_down_shexp', d, 32)): add(f'blk.0.{n}.weight', *s)
        add('blk.0.attn_kv_a_norm.weight', 32), add('blk.0.exp_probs_b.bias', 8)
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


def blocks(rng, kind, n):
    """Random bytes, and scales in half precision that make weights of less than .1. With larger ones attention picks one key, and where two
    are nearly tied rounding decides which"""
    b = rng.integers(0, 256, (n, gguf.GGML_QUANT_SIZES[Q[kind]][1]), dtype=np.uint8)
    half = rng.uniform(*((3e-4, 8e-4) if kind == 'Q4_K' else (2e-5, 6e-5)), (n, 2)).astype(np.float16).view(np.uint8).reshape(n, 4)
    if kind == 'Q4_K': b[:, :4] = half
    else: b[:, -2:] = half[:, :2]
    return b


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K'])
def test_every_format(kind, seed, tmp_path):
    "Rows equal the gguf package's; the logits of float32 products equal those of the decoded model, and packed ones are near"
    r = Runner(tiny(tmp_path/'a.gguf', seed, kind), exact=True)
    reader = gguf.GGUFReader(tmp_path/'a.gguf')
    for t in reader.tensors:
        whole = gguf.dequantize(t.data, t.tensor_type).reshape(-1, int(t.shape[0]))
        for i in (0, len(whole) - 1): np.testing.assert_array_equal(r.row(t.name, i), whole[i])
    ids = np.random.default_rng(seed + 1).integers(0, 270, 40)
    exact,packed = r.step(ids),Runner(tmp_path/'a.gguf').step(ids)
    assert exact.isfinite().all()
    assert (exact - packed).norm() <= .05*exact.norm()
    np.testing.assert_allclose(Runner(tmp_path/'a.gguf', threads=2, exact=True).step(ids), exact, atol=1e-5*exact.abs().max().item())


def matrices(path, tensors):
    "A file with some more matrices: name -> bytes or numbers, and kind"
    w = gguf.GGUFWriter(path, 'llama')
    d = dict(embedding_length=2, feed_forward_length=2, block_count=1, context_length=8) | {'attention.head_count': 1}
    for k,x in d.items(): w.add_uint32(f'llama.{k}', x)
    w.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
    for n,*s in (('token_embd', 3, 2), ('output_norm', 2), *((f'blk.0.{n}_norm', 2) for n in ('attn', 'ffn')),
                 *((f'blk.0.{n}', 2, 2) for n in ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down'))):
        w.add_tensor(f'{n}.weight', np.ones(s, np.float32))
    for n,(x,kind) in tensors.items(): w.add_tensor(n, x, raw_dtype=Q[kind])
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


SHAPES = [(1, 1), (17, 1), (33, 5), (16, 25), (50, 70)]  # rows and tokens: of one, of few and of many tokens' products

@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K'])
def test_every_product(kind, seed, tmp_path):
    "Floats: the bits of float32 products of the same numbers. Blocks: float64 products with activations of 8 bits, but for float32 sums"
    rng = np.random.default_rng(seed)
    block = gguf.GGML_QUANT_SIZES[Q[kind]][0]
    found = {}
    for i,(o,_) in enumerate(SHAPES):
        cols = int(rng.integers(1, 4))*block if block > 1 else int(rng.integers(1, 300))
        numbers = rng.standard_normal((o, cols)).astype(np.float32)
        found[f'w{i}'] = blocks(rng, kind, o*cols//256).reshape(o, -1) if block == 256 else gguf.quantize(numbers, Q[kind]),kind
    plain = {n: (gguf.dequantize(w, Q[k]).astype(np.float32), 'F32') for n,(w,k) in found.items()}
    packed = Runner(matrices(tmp_path/'a.gguf', found), threads=2)
    floats,exact = Runner(matrices(tmp_path/'b.gguf', plain)),Runner(tmp_path/'a.gguf', exact=True)
    for i,(_,n) in enumerate(SHAPES):
        w = torch.from_numpy(plain[f'w{i}'][0]).double()
        x = torch.from_numpy(rng.standard_normal((n, w.shape[1]))*10.**rng.integers(-3, 4, (n, 1))).float()
        y = packed.product(f'w{i}', x)
        if block == 1:
            assert torch.equal(y, floats.product(f'w{i}', x)) and torch.equal(y, exact.product(f'w{i}', x))
            continue
        g = x.view(n, -1, 32)
        step = g.abs().amax(-1, keepdim=True)/127
        codes = (g*(1/step.clamp(min=2.**-126))).round()
        assert codes.abs().max() == 127
        rounded = (codes.double()*step.double()).view(n, -1)
        reach = 4*w.abs().amax(1) + .63  # at least the codes times the scale, and the offset: 63 minima of at most .01, or 128 scales
        bound = 2.**-24*(w.shape[1]/32*3 + 8)*rounded.abs().sum(1, keepdim=True)*reach
        assert ((y - rounded @ w.T).abs() <= bound).all() and (bound.norm() < 1e-3*(x.double().norm()*w.norm())).item()
        assert ((exact.product(f'w{i}', x) - x.double() @ w.T).abs() <= 2.**-24*w.shape[1]*(x.double().abs() @ w.abs().T)).all()


@pytest.mark.parametrize('arch', ['llama', 'deepseek2'])
def test_logits_equal_the_model(arch, seed, tmp_path):
    "Against `Model` with the same file, in one step, in steps of one token, and after a rewind"
    from deepseek_nb.arch.model import Model
    path = tiny(tmp_path/'a.gguf', seed, arch=arch)
    model,r = Model.from_pretrained(path, dtype=torch.float32),Runner(path)
    ids = torch.randint(0, 270, (1, 60), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(): expected = model(ids)[0]
    bound = 1e-4*expected.abs().max().item()
    assert (r.step(ids[0, :50]) - expected[49]).abs().max() <= bound
    for i in range(50, 60): assert (r.step(ids[0, i:i+1]) - expected[i]).abs().max() <= bound
    r.rewind(3)
    assert (r.step(ids[0, 3:9]) - expected[8]).abs().max() <= bound
    with pytest.raises(ValueError, match='context'): r.step([1]*60)
    with pytest.raises(ValueError, match='vocabulary'): r.step([270])


def test_greedy_text_of_golden_prompts(tmp_path):
    if not GOLDEN.exists(): pytest.skip(f'{GOLDEN} is missing')
    from deepseek_nb.arch.model import Model
    path = export_gguf('mini', tmp_path/'mini.gguf', 'F32')
    model,r,tokenizer = Model.from_pretrained('mini', dtype='float32'),Runner(path),from_gguf(path)
    for case in json.loads(GOLDEN.read_text())['cases'][::1 if os.environ.get('DEEPSEEK_NB_SLOW') else 6]:
        ids = tokenizer.encode(case['prompt'], special=True)[:300]
        assert r.encode(case['prompt'], special=True)[:300] == ids
        r.rewind()
        with torch.inference_mode():
            logits,cache = r.step(ids),model.new_cache(1, len(ids) + 16)
            other = model(torch.tensor([ids]), cache=cache)[0, -1]
            for _ in range(12):
                assert (logits - other).abs().max() <= 1e-4*other.abs().max()
                token = logits.argmax().item()
                assert token == other.argmax().item()
                logits,other = r.step([token]),model(torch.tensor([[token]]), cache=cache)[0, -1]


def vocabulary(path, pre, rng):
    "A file whose tokens are the bytes and a random eighth of their pairs, so that most wrong ends of words change the tokens"
    w,letters = gguf.GGUFWriter(path, 'llama'),[*byte_alphabet().values()]
    pairs = [(letters[a], letters[b]) for a,b in np.argwhere(rng.random((256, 256)) < .125)]
    rng.shuffle(pairs)
    tokens = letters + [a + b for a,b in pairs] + ['<s>', '</s>']
    w.add_tokenizer_model('gpt2'), w.add_token_list(tokens), w.add_token_types([1]*(len(tokens) - 2) + [3, 4])
    if pre: w.add_tokenizer_pre(pre)
    w.add_token_merges([f'{a} {b}' for a,b in pairs]), w.add_bos_token_id(len(tokens) - 2)
    d = dict(embedding_length=2, feed_forward_length=2, block_count=1, context_length=8) | {'attention.head_count': 1}
    for k,x in d.items(): w.add_uint32(f'llama.{k}', x)
    w.add_float32('llama.attention.layer_norm_rms_epsilon', 1e-5)
    for n,*s in (('token_embd', len(tokens), 2), ('output_norm', 2), *((f'blk.0.{n}_norm', 2) for n in ('attn', 'ffn')),
                 *((f'blk.0.{n}', 2, 2) for n in ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down'))):
        w.add_tensor(f'{n}.weight', np.ones(s, np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return path


EXAMPLES = int(os.environ.get('DEEPSEEK_NB_EXAMPLES', 40))
WORDS = st.text(st.sampled_from("aZéſßǅʼ你カ한１½٣12 \n\r\t'’.,:#_-~`$+^|！。　\u0301\u0378\u0085\u2028😀<s>tTRElLvVmMdD"), max_size=24)
HARD = ("I'll 'RE'ſ don't\t\tx=3.14159; 1234567\r\n\n  \n Ümlaut Ελλ ʼnβ ǅ Ⅷ² 你好123你 ひらカタ한국어 हिन्दी é́"
        " _a (b[c])<d> 「x」~`^ 🙂\u0378\u0378\x01\x01 \u3000x\xa0y </s> ")

@pytest.mark.parametrize('pre', [*PRE, 'deepseek-r1-qwen', ''])
def test_every_pre_tokenizer(pre, seed, tmp_path):
    "Random Unicode text has the tokens of the tokenizer in Python, by every rule that a GGUF file names"
    path = vocabulary(tmp_path/'a.gguf', pre, np.random.default_rng(seed))
    r,tokenizer = Runner(path),from_gguf(path)
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], database=None)
    @given(st.one_of(WORDS, st.text(max_size=40), st.lists(WORDS, max_size=4).map(' '.join)))
    @example(HARD)
    def same(text):
        for special in (False, True): assert r.encode(text, special) == tokenizer.encode(text, special=special), repr(text)
        assert r.decode(r.encode(text)) == text
    same()
    if GOLDEN.exists():
        for case in json.loads(GOLDEN.read_text())['cases']: same.hypothesis.inner_test(case['prompt'])


def test_a_quantised_folder(seed, tmp_path):
    """Our int4 folder as GGUF: float32 logits are those of the decoded weights, a re-import gives the same bytes, packed steps are near.
    Where scores of two experts nearly tie, rounded activations may select another one; such prompts are rare: the middle of five is held"""
    from deepseek_nb.arch.model import Model
    from deepseek_nb.export.gguf import export_packed
    from deepseek_nb.quant.model import QuantizedModel
    QuantizedModel.from_pretrained('mini', 'int4').save_pretrained(folder := tmp_path/'int4')
    path = export_packed(folder, tmp_path/'a.gguf')
    model = Model.from_pretrained(path, dtype='float32')
    prompts = torch.randint(0, 4096, (5, 20), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(): expected = model(prompts)[:, -1]
    exact,packed = (torch.stack([Runner(path, exact=e).step(ids) for ids in prompts]) for e in (True, False))
    assert (exact - expected).abs().max() <= 1e-4*expected.abs().max()
    assert ((packed - exact).norm(dim=-1)/exact.norm(dim=-1)).median() <= .05
    assert export_packed(folder, tmp_path/'b.gguf').read_bytes() == path.read_bytes()


@pytest.fixture(scope='module')
def program(): return build_program(level=1, variants=('portable',))


BAD = [(b'', 'no GGUF|begin with GGUF'), (b'x'*100, 'begin with GGUF'), (b'GGUF' + b'\xff'*60, 'version'), (None, 'no such file'),
       (b'GGUF\x03\0\0\0' + (2**63).to_bytes(8, 'little') + bytes(40), 'more entries')]

@pytest.mark.parametrize('content,problem', BAD)
def test_a_bad_file_is_one_line_and_code_2(content, problem, program, tmp_path):
    import re
    path = tmp_path/'a.gguf'
    if content is not None: path.write_bytes(content)
    done = subprocess.run([program, path, '-p', 'a'], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count('\n') == 1 and re.search(problem, done.stderr) and not done.stdout


def test_the_program_equals_the_library(program, seed, tmp_path):
    path = tiny(tmp_path/'a.gguf', seed)
    done = subprocess.run([program, path, '-p', 'ABCDE', '-n', '8', '--ids', '--exact', '--threads', '2'], capture_output=True, text=True)
    r,found = Runner(path, exact=True),[]
    ids = r.encode('ABCDE', special=True)
    while len(found) < 8:
        ids = [r.step(ids).argmax().item()]
        if ids[0] == 269: break
        found += ids
    assert done.returncode == 0 and [int(o) for o in done.stdout.split()] == found


LIMIT = r"""
#define main program
#include "runner_main.cc"
#undef main
int main(int, char** words) { return usable_cpus(words[1]); }
"""

def test_threads_that_a_container_may_use(seed, tmp_path):
    "Affinity and the quotas of both versions of cgroups, in the group or one that contains it, by the program and by Python"
    sources = runner_sources('runner_main.cc') | {'limit.cc': LIMIT}
    program = compile_runner(sources, ['limit.cc'], ['-O0'], tmp_path/'limit')
    rng,processors = np.random.default_rng(seed),len(os.sched_getaffinity(0))
    def found(groups, files):
        shutil.rmtree(root := tmp_path/'root', ignore_errors=True)
        for name,text in ({'proc/self/cgroup': groups} | {f'sys/fs/cgroup/{n}': t for n,t in files.items()}).items():
            (root/name).parent.mkdir(parents=True, exist_ok=True)
            (root/name).write_text(text)
        assert subprocess.run([program, root]).returncode == (n := usable_cpus(root)[0])
        return n
    first = lambda quota: {'cpu.cfs_quota_us': f'{quota}\n', 'cpu.cfs_period_us': '100000\n'}
    second = lambda quota: {'cpu.max': f'{quota} 100000\n'}
    under = lambda folder,files: {f'{folder}/{n}': t for n,t in files.items()}
    assert found('', {}) == found('0::/\n', second('max')) == found('2:cpu,cpuacct:/\n', under('cpu,cpuacct', first(-1))) == processors
    for quota,n in ((10_000, 1), (100_000, 1), (199_999, 1), (10**9, processors)):
        assert found('0::/a/b\n', under('a/b', second(quota))) == found('0::/a/b\n', second(quota)) == n
        assert found('0::/a/b\n', under('a', second(quota)) | under('a/b', second('max'))) == n
        assert found('5:memory:/x\n4:cpu,cpuacct:/docker/1\n', under('cpu,cpuacct', first(quota))) == n
        assert found('4:cpu:/docker/1\n0::/\n', under('cpu/docker/1', first(quota))) == n
        assert found('4:cpuset:/a\n', under('cpuset/a', first(quota))) == processors
    quota = int(rng.integers(1000, 10**6))
    assert found('0::/a\n', under('a', second(quota)) | second(quota*2)) == max(1, min(processors, quota//100_000))


def test_two_runners_keep_their_threads_and_messages(seed, tmp_path):
    "Runners in eight threads: each has its own number of threads, logits and message"
    path = tiny(tmp_path/'a.gguf', seed, arch='deepseek2')
    ids = np.random.default_rng(seed).integers(0, 270, 30)
    expected = Runner(path).step(ids)
    def use(i):
        r = Runner(path, threads=1 + i%3)
        for _ in range(10):
            r.rewind()
            assert (r.step(ids) - expected).abs().max() <= 1e-5*expected.abs().max()
            with pytest.raises(ValueError, match=f'^{1000 + i} is not'): r.rewind(1000 + i)
        return True
    for n in (2, 8):
        with ThreadPoolExecutor(n) as pool: assert all(pool.map(use, range(n)))


def test_aarch64(seed, tmp_path):
    qemu,compiler = shutil.which('qemu-aarch64'),shutil.which('aarch64-linux-gnu-g++')
    if not qemu or not compiler or platform.machine() == 'aarch64': pytest.skip('apt-get install qemu-user g++-aarch64-linux-gnu')
    program,path = build_program('aarch64', level=1),tiny(tmp_path/'a.gguf', seed, 'Q8_0')
    words = [path, '-p', 'ABCDE', '-n', '8', '--ids', '--exact', '--threads', '1']
    own = build_program(level=1, variants=('portable',))
    texts = [subprocess.run([*o, *words], capture_output=True, text=True).stdout for o in ([qemu, program], [own])]
    assert texts[0] == texts[1] and texts[0].strip()

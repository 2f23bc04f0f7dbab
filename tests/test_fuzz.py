"""Drawn models, whole and broken, under AddressSanitizer and UBSan; runners and teams of threads under ThreadSanitizer

`make fuzz` spends ten minutes of a processor on it, the check half a minute; FUZZ_SECONDS sets another time, SEED repeats the draws.
"""
import os
import resource
import shutil
import subprocess
from itertools import count

import numpy as np
import pytest

gguf = pytest.importorskip('gguf')
from test_runner import blocks  # noqa: E402

from deepseek_nb.core.nbproc import find_compiler, with_includes  # noqa: E402
from deepseek_nb.export.runner import Runner, compile_runner, runner_path, runner_sources  # noqa: E402
from deepseek_nb.export.wasm import MODULE  # noqa: E402
from deepseek_nb.files.tokenizer import byte_alphabet  # noqa: E402

try: find_compiler('cpp')
except FileNotFoundError: pytest.skip('no C++ compiler', allow_module_level=True)

Q,SIZES = gguf.GGMLQuantizationType,gguf.GGML_QUANT_SIZES
KINDS = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K')
SECONDS = float(os.environ.get('FUZZ_SECONDS', 30))


class Drawn:
    "A small valid model: each number of its metadata and each format of its tensors is drawn, unless it is given"
    def __init__(self, path, rng, arch, kind=None, **given):
        self.w,self.rng,self.arch,self.facts,self.given = gguf.GGUFWriter(path, arch),rng,arch,{},given
        self.kind = kind or rng.choice(KINDS)
        self.width = lambda most: int(rng.integers(1, most + 1)) if rng.random() < .5 else 32*int(rng.integers(1, most//32 + 2))
        if rng.random() < .2: self.width = lambda most: 256

    def pick(self, *values): return values[self.rng.integers(len(values))]

    def add(self, name, *shape):
        "A tensor, in the drawn format where its rows are whole blocks"
        x = self.rng.standard_normal(shape).astype(np.float32)
        x = 1 + x/10 if len(shape) == 1 else x/np.float32(shape[-1]**.5)
        kind = 'F32' if len(shape) == 1 else self.kind if self.given or self.rng.random() < .8 else self.pick(*KINDS)
        if shape[-1] % SIZES[Q[kind]][0]: kind = self.pick('F32', 'F16', 'BF16')
        if kind == 'F32': self.w.add_tensor(name, x)
        else:
            rows = blocks(self.rng, kind, x.size//256).reshape(*shape[:-1], -1) if kind.endswith('_K') else gguf.quantize(x, Q[kind])
            self.w.add_tensor(name, rows, raw_dtype=Q[kind])

    def vocabulary(self):
        "The 256 bytes, some merges and two tokens that control"
        letters,w = [*byte_alphabet().values()],self.w
        w.add_tokenizer_model('gpt2')
        w.add_tokenizer_pre(self.pick('smollm', 'deepseek-v3', 'qwen2', 'llama-bpe', 'deepseek-llm', 'default'))
        w.add_token_list(letters + [letters[i] + letters[i+1] for i in range(65, 77)] + ['<s>', '</s>'])
        w.add_token_types([1]*268 + [3, 4]), w.add_bos_token_id(268), w.add_eos_token_id(269)
        w.add_token_merges([f'{letters[i]} {letters[i+1]}' for i in range(65, 77)])

    def experts(self, d, layers):
        "Sizes of the experts, which may be wider than everything else"
        groups = self.pick(1, 1, 2, 3)
        each,keep = int(self.rng.integers(1, 5)),int(self.rng.integers(1, groups + 1))
        f = self.given.get('expert_feed_forward_length') or self.pick(self.width(64), self.width(64), 1024)
        self.facts |= dict(expert_count=groups*each, expert_used_count=int(self.rng.integers(1, keep*each + 1)),
                           expert_shared_count=self.pick(0, 0, 1, 2), expert_feed_forward_length=f, expert_group_count=groups,
                           expert_group_used_count=keep, expert_gating_func=self.pick(1, 2), expert_weights_norm=self.pick(0, 1),
                           leading_dense_block_count=int(self.rng.integers(0, layers + 1))) | self.given
        return self.facts['expert_count'],f

    def attention(self, p, d, heads):
        "The weights of a block's attention"
        kv,key,value,rotary,latent,q = (self.facts[f'attention.{n}'] if n != 'rope' else self.facts['rope.dimension_count'] for n in
                                        ('head_count_kv', 'key_length', 'value_length', 'rope', 'kv_lora_rank', 'q_lora_rank'))
        self.add(f'{p}.attn_output.weight', d, heads*value)
        if self.arch != 'deepseek2':
            for n,rows in (('q', heads*key), ('k', kv*key), ('v', kv*value)):
                self.add(f'{p}.attn_{n}.weight', rows, d)
                if self.arch == 'qwen2': self.add(f'{p}.attn_{n}.bias', rows)
            return
        if q: self.add(f'{p}.attn_q_a.weight', q, d), self.add(f'{p}.attn_q_a_norm.weight', q)
        self.add(f'{p}.attn_q_b.weight' if q else f'{p}.attn_q.weight', heads*key, q or d)
        self.add(f'{p}.attn_kv_a_mqa.weight', latent + rotary, d), self.add(f'{p}.attn_kv_a_norm.weight', latent)
        if key == rotary or self.rng.random() < .5: return self.add(f'{p}.attn_kv_b.weight', heads*(key - rotary + value), latent)
        self.add(f'{p}.attn_k_b.weight', heads, latent, key - rotary), self.add(f'{p}.attn_v_b.weight', heads, value, latent)

    def feed_forward(self, p, d, inner, dense, e, f):
        "The weights of a block's feed-forward, or of its router and experts"
        shared = self.facts.get('expert_shared_count', 0)*f
        for n,rows,cols in (('gate', inner, d), ('up', inner, d), ('down', d, inner)) if dense else ():
            self.add(f'{p}.ffn_{n}.weight', rows, cols)
        if dense: return
        self.add(f'{p}.ffn_gate_inp.weight', e, d)
        if self.rng.random() < .5: self.add(f'{p}.exp_probs_b.bias', e)
        for n,rows,cols in (('gate', f, d), ('up', f, d), ('down', d, f)): self.add(f'{p}.ffn_{n}_exps.weight', e, rows, cols)
        for n,rows,cols in (('gate', shared, d), ('up', shared, d), ('down', d, shared)) if shared else ():
            self.add(f'{p}.ffn_{n}_shexp.weight', rows, cols)

    def write(self):
        "Draw the sizes, and write the file"
        rng,deepseek = self.rng,self.arch == 'deepseek2'
        d,inner = (self.given.get(n) or self.width(128) for n in ('embedding_length', 'feed_forward_length'))
        layers = int(rng.integers(1, 3))
        kv = self.pick(1, 1, 2)
        heads,rotary = kv*self.pick(1, 1, 3),2*int(rng.integers(1, 13))
        key = rotary + (int(rng.integers(0, 20)) if deepseek else 0)
        sizes = dict(embedding_length=d, feed_forward_length=inner, block_count=layers, context_length=300)
        self.facts = sizes | {'attention.head_count': heads, 'attention.head_count_kv': 1 if deepseek else kv, 'attention.key_length': key,
                              'attention.value_length': self.width(24) if deepseek else key, 'rope.dimension_count': rotary,
                              'attention.kv_lora_rank': self.width(48), 'attention.q_lora_rank': self.pick(0, self.width(40))}
        e,f = self.experts(d, layers) if deepseek and (self.given or rng.random() < .9) else (0, 0)
        for n,x in self.facts.items(): self.w.add_uint32(f'{self.arch}.{n}', x)
        self.w.add_float32(f'{self.arch}.attention.layer_norm_rms_epsilon', 1e-5)
        if scaling := self.pick('', '', 'linear', 'yarn'):
            self.w.add_string(f'{self.arch}.rope.scaling.type', scaling)
            self.w.add_float32(f'{self.arch}.rope.scaling.factor', 4.)
            self.w.add_uint32(f'{self.arch}.rope.scaling.original_context_length', 75)
        self.vocabulary()
        self.add('token_embd.weight', 270, d), self.add('output_norm.weight', d)
        if rng.random() < .5: self.add('output.weight', 270, d)
        for i in range(layers):
            for n in ('attn_norm', 'ffn_norm'): self.add(f'blk.{i}.{n}.weight', d)
            self.attention(f'blk.{i}', d, heads)
            self.feed_forward(f'blk.{i}', d, inner, not e or i < self.facts['leading_dense_block_count'], e, f)
        self.w.write_header_to_file(), self.w.write_kv_data_to_file(), self.w.write_tensors_to_file(), self.w.close()


HARNESS = r'''
#include "runner.cc"
#include <sanitizer/asan_interface.h>
#include <time.h>

uint64_t state;
uint64_t draw(uint64_t m) { return (state = state * 6364136223846793005u + 1442695040888963407u, (state >> 33) % m); }
const uint64_t odd[] = {0, 1, 1ull << 63, ~0ull, 0x7fc000007fc00000, 1ull << 32, 1ull << 40, 9, 8, 0xffffffff, 0x7f8000007f800000,
                        0xff800000ff800000};
unsigned long long files = 0, loaded = 0, computed = 0;

// load a model from memory that ends where the file ends, and use all of the interface; whole: nothing may fail
int use(const std::vector<uint8_t>& bytes, bool whole) {
    const size_t n = bytes.size(), room = (n + 63) / 64 * 64, end = (n + 7) / 8 * 8;
    uint8_t* exact = (uint8_t*)aligned_alloc(64, room);
    memcpy(exact, bytes.data(), n);
    ASAN_POISON_MEMORY_REGION(exact + end, room - end);
    int wrong = 0;
    ++files;
    if (runner* r = runner_load(exact, n)) {
        ++loaded;
        const int vocab = int(runner_info(r, "vocab")), context = int(std::min<int64_t>(runner_info(r, "context"), 300));
        std::vector<float> logits(vocab), seen(1 << 16);
        std::vector<int32_t> tokens(512);
        runner_threads(r, 1 + int(draw(3))), runner_pack(r, draw(4) > 0), runner_watch(r, draw(2));
        for (int step = 0, at = 0; step < 3; ++step) {
            const int some = draw(3) ? 1 + int(draw(130)) : 1 + int(draw(4));
            if (at + some > context) runner_reset(r), at = 0;
            for (int i = 0; i < some; ++i) tokens[i] = int32_t(draw(vocab));
            const bool good = !runner_step(r, tokens.data(), some, draw(8) ? logits.data() : nullptr);
            computed += good, at += good ? some : 0;
            if (whole && (!good || std::isnan(logits[0]))) wrong = 6;
            if (!good && !*runner_error()) wrong = 4;
            if (wrong) fprintf(stderr, "a step: %s\n", runner_error());
            for (char kind : {'r', 'a', 'x', 'c'}) runner_probe(r, kind, int(draw(3)) - 1, seen.data(), int(draw(seen.size())));
            if (draw(4) == 0) runner_rewind(r, at = int(draw(at + 1)));
        }
        char text[512];
        for (char& c : text) c = draw(3) ? char(draw(256)) : "It's 12\n <s>"[draw(12)];
        const int ids = runner_encode(r, text, int(draw(sizeof text)), int(draw(2)), tokens.data(), int(tokens.size()));
        runner_decode(r, tokens.data(), std::clamp(ids, 0, int(tokens.size())), text, sizeof text);
        text[511] = 0, runner_prompt(r, nullptr, text + draw(512), (char*)seen.data(), 4096);
        runner_free(r);
    } else if (whole) wrong = 6;
    else if (!*runner_error()) wrong = 4;
    for (const char* c = runner_error(); *c; ++c) if ((*c > 0 && *c < ' ') || *c == 127) wrong = 5;
    if (wrong) fprintf(stderr, "wrong %d: %s\n", wrong, runner_error());
    ASAN_UNPOISON_MEMORY_REGION(exact, room);
    return free(exact), wrong;
}

int main(int count, char** words) {
    state = strtoull(words[1], nullptr, 10);
    const double each = atof(words[2]) / (count - 3) * CLOCKS_PER_SEC;
    for (int k = 3; k < count; ++k) {
        FILE* f = fopen(words[k], "rb");
        fseek(f, 0, SEEK_END);
        std::vector<uint8_t> good(ftell(f));
        rewind(f);
        if (fread(good.data(), 1, good.size(), f) != good.size()) return 3;
        fclose(f);
        fprintf(stderr, "%s\n", words[k]);
        const double end = clock() + each;
        if (int wrong = use(good, true)) return wrong;
        for (size_t header = std::min<size_t>(good.size(), 12000); clock() < end;) {
            std::vector<uint8_t> bytes = good;
            const size_t cut = draw(8) ? good.size() : 1 + draw(good.size());
            for (uint64_t some = draw(4) + (cut == good.size()); some--;) {
                const uint64_t x = draw(3) ? odd[draw(std::size(odd))] : draw(1u << 31);
                memcpy(&bytes[draw((draw(2) ? header : good.size()) - 8)], &x, 1 << draw(4));
            }
            bytes.resize(cut);
            if (int wrong = use(bytes, false)) return wrong;
        }
    }
    printf("%llu files, %llu loaded, %llu steps\n", files, loaded, computed);
}
'''
ASAN = ['-O1', '-g1', '-fsanitize=address,undefined', '-fno-sanitize=alignment', '-fno-sanitize-recover=undefined']


def compiled(text, flags, sources=None):
    "A program with the engine, or with other sources; skips where the compiler lacks a sanitizer"
    sources = (sources or runner_sources()) | {'main.cc': text}
    out = runner_path('fuzz', sources, flags, find_compiler('cpp'))
    try: return out if out.exists() else compile_runner(sources, ['main.cc'], flags, out)
    except ValueError as e:
        if 'asan' in str(e) or 'tsan' in str(e): pytest.skip('this compiler lacks a sanitizer')
        raise


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def harness(): return compiled(HARNESS, ASAN)


def run(*words): return subprocess.run([*map(str, words)], capture_output=True, text=True, env={'ASAN_OPTIONS': 'detect_leaks=1'})


def used():
    "Seconds of a processor, of this process and those that it started"
    return sum(sum(resource.getrusage(o)[:2]) for o in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def test_experts_wider_than_everything(harness, folder):
    "A valid file that overflowed the room of the runner: width 64, feed-forward 64, experts of 1,024 and no shared ones"
    for i,kind in enumerate(('F32', 'Q8_0', 'Q4_K')):
        Drawn(path := folder/f'wide-{i}.gguf', np.random.default_rng(i), 'deepseek2', kind, embedding_length=64, feed_forward_length=64,
              expert_feed_forward_length=1024, expert_shared_count=0, leading_dense_block_count=0).write()
        done = run(harness, i, 0, *[path]*3)
        assert done.returncode == 0, done.stderr[-3000:]


def poisoned(path, name, value, seed=0, **given):
    "A model with experts, one of whose tensors has the same number everywhere"
    Drawn(path, np.random.default_rng(seed), 'deepseek2', 'F32', leading_dense_block_count=0, expert_count=4, expert_used_count=2,
          expert_group_count=1, expert_group_used_count=1, **given).write()
    found = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    data = np.memmap(path, np.uint8, 'r+')
    data[found.data_offset:][:found.n_bytes] = np.full(found.n_elements, value, np.float32).view(np.uint8)
    data.flush()
    return path


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_numbers(value, harness, folder):
    "An error that names block and token; nothing is computed, and nothing is written past its room"
    path = poisoned(folder/'nan.gguf', 'blk.0.ffn_gate_inp.weight', value)
    done = run(harness, 1, 0, *[path]*4)
    assert done.returncode == 6 and "router's scores" in done.stderr, done.stderr[-3000:]
    r = Runner(path, threads=2)
    with pytest.raises(ValueError, match="block 0: the router's scores for token 0 are NaN"): r.step(range(4))
    assert r.info('position') == 0


JS = """
const fs = require('fs'), [, , code, file] = process.argv;
const host = new Proxy({}, {get: () => () => 52});
WebAssembly.instantiate(fs.readFileSync(code), {wasi_snapshot_preview1: host}).then(({instance: {exports: w}}) => {
  w._initialize?.();
  const bytes = fs.readFileSync(file), at = w.malloc(bytes.length), ids = w.malloc(400), view = () => new Uint8Array(w.memory.buffer);
  view().set(bytes, at), view().fill(0, ids, ids + 400);
  const r = w.runner_load(at, bytes.length), done = w.runner_step(r, ids, 100, 0), e = w.runner_error();
  console.log(done, Buffer.from(view().subarray(e, view().indexOf(0, e))).toString());
});
"""

def test_the_same_in_webassembly(folder):
    if not shutil.which('node'): pytest.skip('node is absent')
    (folder/'use.cjs').write_text(JS)
    Drawn(folder/'good.gguf', np.random.default_rng(0), 'deepseek2', 'F32', expert_feed_forward_length=1024).write()
    bad = poisoned(folder/'bad.gguf', 'blk.0.ffn_gate_inp.weight', np.nan)
    said = [subprocess.run(['node', folder/'use.cjs', MODULE, p], capture_output=True, text=True, check=True).stdout
            for p in (folder/'good.gguf', bad)]
    assert said[0] == '0 \n' and said[1].startswith("-1 block 0: the router's scores for token 0 are NaN"), said


def test_drawn_models_under_sanitizers(harness, folder):
    "Valid models compute prompts of 1 to 130 tokens; broken ones are an error or a model, but no fault"
    seed = int(os.environ.get('SEED') or np.random.default_rng().integers(2**31))
    print('SEED', seed)
    end,rng,found = used() + SECONDS,np.random.default_rng(seed),np.zeros(3, int)
    for batch in count():
        paths = [folder/f'{i}-{arch}.gguf' for i in range(4) for arch in ('llama', 'qwen2', 'deepseek2', 'deepseek2')]
        for p in paths: Drawn(p, rng, p.stem.partition('-')[2]).write()
        done = run(harness, rng.integers(2**31), min(10, SECONDS/4), *paths)
        assert done.returncode == 0, f'SEED={seed}, batch {batch}: {done.stdout}{done.stderr[-6000:]}'
        found += [int(o) for o in done.stdout.split() if o.isdigit()]
        if used() > end: break
    print(found)
    all,loaded,steps = found
    assert 0 < loaded < all and steps > all/4


# ---- threads

RUNNERS = r"""
#include "runner.cc"
#include <cstdlib>
int wrong = 0;
void expect(bool good, const char* what) { if (!good) fprintf(stderr, "%s: %s\n", what, runner_error()), ++wrong; }
int main(int, char** words) {
    FILE* f = fopen(words[1], "rb");
    fseek(f, 0, SEEK_END);
    std::vector<uint8_t> file((ftell(f) + 63) / 64 * 64);
    rewind(f);
    const size_t n = fread(file.data(), 1, file.size(), f);
    fclose(f);
    const int callers = atoi(words[2]);
    const int32_t ids[] = {5, 66, 7, 88, 9, 101, 11, 122, 13};
    auto step = [&](runner* r, std::vector<float>& y) {
        y.resize(runner_info(r, "vocab"));
        return !runner_step(r, ids, 9, y.data()) && !runner_step(r, ids, 1, y.data());
    };
    runner* shared = runner_load(file.data(), n);
    runner_threads(shared, 2);
    std::vector<float> right;
    expect(step(shared, right), "first");
    std::vector<std::thread> all;
    for (int i = 0; i < callers; ++i)
        all.emplace_back([&, i] {
            for (int round = 0; round < 3; ++round) {
                runner* own = runner_load(file.data(), n);
                std::vector<float> y;
                runner_threads(own, 1 + (i + round) % 3);
                expect(step(own, y) && !memcmp(y.data(), right.data(), 4 * y.size()), "own");
                runner_rewind(shared, 0), expect(!runner_step(shared, ids, 1 + i, y.data()), "shared");
                char text[100];
                expect(runner_encode(shared, "ABC", 3, 0, (int32_t*)y.data(), 100) > 0, "tokens");
                expect(runner_prompt(shared, "", "a", text, 100) > 0, "text");
                runner_threads(shared, 1 + i % 2);
                runner_rewind(own, 1000 + i);
                const std::string said = runner_error(), wanted = std::to_string(1000 + i);
                expect(said.compare(0, wanted.size(), wanted) == 0, "another thread's message");
                runner_free(own);
            }
        });
    for (auto& t : all) t.join();
    return runner_free(shared), wrong;
}
"""
STAND_IN = """#pragma once
#include <cstdint>
#include <thread>
#include <vector>
namespace torch::stable {
inline int64_t get_num_threads() { return 3; }
template <class F> void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
    std::vector<std::thread> all;
    for (int64_t i = begin + 1; i < end; ++i) all.emplace_back([&f, i] { f(i, i + 1); });
    f(begin, begin + 1);
    for (auto& t : all) t.join();
}
}
"""
TEAMS = r"""
#include "gemm.cc"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
std::atomic<int> wrong{0}, running{0};
void expect(bool good, const char* what) { if (!good) fprintf(stderr, "%s\n", what), ++wrong; }
// stages that read what others wrote in the stage before
void sum(int caller, int fails) {
    int64_t a[7] = {}, b[7] = {};
    team([&](const Team& t) {
        if (t.rank == 0) expect(running.fetch_add(1) == 0, "two teams at once");
        const auto [begin, end] = t.share(7);
        for (int round = 0; round < 20; ++round) {
            for (int64_t i = begin; i < end; ++i) a[i] = i + round;
            t.wait();
            for (int64_t i = begin; i < end; ++i) b[i] = a[6 - i];
            if (fails == round && t.rank == round % t.size) running = 0, throw std::runtime_error(std::to_string(caller));
            t.wait();
        }
        for (int64_t i = begin; i < end; ++i) expect(b[i] == 6 - i + 19, "a thread went on too early");
        t.wait();
        team([&](const Team& u) { expect(u.size == 1, "a team within a team"); });
        if (t.rank == 0) running = 0;
    });
}
void multiply_matrix() {
    const int64_t R = 37, n = 40, K = 19;
    std::vector<float> w(R * K, 1), x(n * K, 2), y(n * R), panel(panel_size(n, K));
    const auto rows = row_pointers(x.data(), n, K);
    team([&](const Team& t) { product(t, R, n, K, (const float*)w.data(), rows.data(), y.data(), R, panel.data()); });
    for (float v : y) expect(v == 38, "a product is wrong");
}
int main(int, char** words) {
    const int callers = atoi(words[1]);
    std::vector<std::thread> all;
    for (int i = 0; i < callers; ++i)
        all.emplace_back([i] {
            for (int k = 0; k < 15; ++k) {
                try { sum(i, k % 3 ? -1 : (k + i) % 20), expect(k % 3, "an exception was lost"); }
                catch (const std::runtime_error& e) { expect(e.what() == std::to_string(i), "another caller's exception"); }
                multiply_matrix();
            }
        });
    int status = 0;
    if (words[2]) {  // a process that is forked while others wait for their turn, and one that is forked later
        if (const pid_t child = fork()) waitpid(child, &status, 0);
        else running = 0, sum(0, -1), _exit(wrong);
    }
    for (auto& t : all) t.join();
    return wrong + (status != 0);
}
"""
TSAN = ['-O1', '-g1', '-pthread', '-fsanitize=thread']


def racing(program, *words):
    "Run under ThreadSanitizer"
    words = [*map(str, (program, *words))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env={'TSAN_OPTIONS': 'halt_on_error=1'})
    if 'unexpected memory mapping' in done.stderr: pytest.skip('ThreadSanitizer does not run on this system')
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]


@pytest.fixture(scope='module')
def experts(folder):
    sizes = dict(embedding_length=64, expert_feed_forward_length=32)
    Drawn(path := folder/'experts.gguf', np.random.default_rng(3), 'deepseek2', 'Q8_0', **sizes).write()
    return path


def test_runners_in_threads(experts):
    "Two and eight callers, each with a runner of its own, and all with one: no race, right numbers, and each its own message"
    program = compiled(RUNNERS, TSAN)
    for callers in (2, 8): racing(program, experts, callers)


def test_teams_in_threads():
    "Up to eight callers take turns; an exception ends a team and reaches its caller; a forked process has its turn"
    sources = with_includes('#include "gemm.h"\n#include "gemm.cc"') | {'torch/csrc/stable/ops.h': STAND_IN}
    program = compiled(TEAMS, [*TSAN, '-fexceptions'], sources)
    for callers in (1, 2, 8): racing(program, callers)
    plain = compiled(TEAMS, ['-O1', '-pthread', '-fexceptions'], sources)
    for _ in range(20 if SECONDS > 60 else 5): assert subprocess.run([plain, '8', 'fork'], timeout=60).returncode == 0

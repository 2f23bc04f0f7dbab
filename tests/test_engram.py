"""Engram against loops over positions, with Python's integers for the hash: whole, cached, chunked, rewound and padded.

The settings are drawn anew in each run; the seed is printed, and ENGRAM_SEED=n repeats a run."""
import os
import random

import pytest
import torch
import torch.nn.functional as F

from deepseek_nb.arch.engram import (
    Engram,
    EngramConfig,
    EngramState,
    MappedTables,
    NgramHash,
    add_engram,
    dilated_conv,
    is_prime,
    memory_gate,
    ngram_rows,
    normalise_token,
    odd_multipliers,
    table_rows,
)
from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files.safetensors import weight_map

SEED = int(os.environ.get('ENGRAM_SEED') or random.SystemRandom().randrange(2**32))
MOST = 2**63 - 1


@pytest.fixture(scope='module', autouse=True)
def seed(): print(f'ENGRAM_SEED={SEED}')


def draw(r, **kwargs):
    "Random small settings"
    orders = r.randint(1, 3)
    least = [r.randint(2, 60) for _ in range(orders)]
    layers = tuple(sorted(r.sample(range(20), r.randint(1, 3))))
    return EngramConfig(**dict(dim=r.choice([3, 8]), layers=layers, vocab_size=r.randint(2, 30), table_sizes=tuple(least),
                               heads=r.randint(1, 4), width=r.choice([1, 5]), pad=r.randrange(2), seed=r.randrange(2**20),
                               streams=r.randint(1, 3), kernel=r.choice([0, 1, 2, 4]), bias=r.random() < .5,
                               eps=r.choice([None, 1e-20, 1e-6])) | kwargs)


def make(r, c, dtype=torch.float64):
    "A hash and the memories of all layers, with no weight at its trivial start"
    torch.manual_seed(r.randrange(2**31))
    compress = torch.cat([torch.arange(c.vocab_size), torch.randint(c.vocab_size, (r.randint(0, 9),))])
    engrams = [Engram(c, o).to(dtype).requires_grad_(False) for o in c.layers]
    for p in (p for o in engrams for p in o.parameters()): p.copy_(torch.randn_like(p))
    return NgramHash(c, compress), engrams


# ---- the definition, written a second time

def slow_hash(c, layer, ids):
    "Rows of one sequence of compressed ids, with Python's integers"
    a = odd_multipliers(c, layer).tolist()
    primes = iter(table_rows(c)[layer])
    columns = []
    for order in range(2, c.n + 1):
        mix = []
        for s in range(len(ids)):
            products = [(ids[s - o] if s - o >= 0 else c.pad)*a[o] for o in range(order)]
            assert all(0 <= p <= MOST for p in products)
            x = 0
            for p in products: x ^= p
            mix.append(x)
        for _ in range(c.heads):
            m = next(primes)
            columns.append([x % m for x in mix])
    return [list(o) for o in zip(*columns, strict=True)]


def rms(t, w, eps):
    eps = torch.finfo(t.dtype).eps if eps is None else eps
    return t/((t*t).mean() + eps).sqrt()*w


def slow_engram(e, x, rows):
    "One sequence `s x d`, a position and a stream at a time"
    c,out,values = e.c,torch.empty_like(x),{}
    starts = [sum(table_rows(c)[e.layer][:i]) for i in range(len(rows[0]))]
    for s in range(len(x)):
        memory = torch.cat([e.tables.weight[start + row] for start,row in zip(starts, rows[s], strict=True)])
        projected = e.kv_proj.weight @ memory + (e.kv_proj.bias if c.bias else 0)
        for i in range(c.streams):
            key = rms(projected[i*c.dim:(i + 1)*c.dim], e.key_norm[i], c.eps)
            z = (key @ rms(x[s, i], e.stream_norm[i], c.eps))/c.dim**.5
            gate = torch.sigmoid(torch.sign(z)*z.abs().clamp(min=1e-6).sqrt())
            values[s, i] = gate*projected[c.streams*c.dim:]
            out[s, i] = x[s, i] + values[s, i]
            if c.kernel:
                mixed = torch.zeros_like(key)
                for tap in range(c.kernel):
                    at = s - (c.kernel - 1 - tap)*c.n
                    if at >= 0: mixed += e.conv[i, :, tap]*rms(values[at, i], e.conv_norm[i], 1e-5)
                out[s, i] += mixed*torch.sigmoid(mixed)
    return out


# ---- the hash

def test_primes_are_the_smallest_unused():
    r = random.Random(SEED)
    for _ in range(20):
        c = draw(r)
        rows = table_rows(c)
        assert [*rows] == list(c.layers)
        taken = set()
        for layer in c.layers:
            for p,least in enumerate(c.table_sizes):
                for m in rows[layer][p*c.heads:(p + 1)*c.heads]:
                    below = [i for i in range(max(2, least), m) if i not in taken and all(i % j for j in range(2, i))]
                    assert m >= least and m not in taken and all(m % j for j in range(2, m)) and not below
                    taken.add(m)


@pytest.mark.parametrize('n', [0, 1, 2, 3, 4, 25, 49, 121, 561, 7919, 15_999_989, 16_000_057, 4099*4111, 2**31 - 1])
def test_is_prime(n):
    assert is_prime(n) == (n > 1 and all(n % i for i in range(2, int(n**.5) + 1)))


@pytest.mark.parametrize('vocab', [1, 2, 99_092, 129_280, 2**31, 2**62])
def test_products_fit_an_int64(vocab):
    "Also the largest multiplier that could be drawn, times the largest id."
    bound = max(1, MOST//vocab//2)
    assert (2*(bound - 1) + 1)*(vocab - 1) <= MOST
    a = odd_multipliers(EngramConfig(8, (3,), vocab, (7, 7, 7)), 3)
    assert a.dtype == torch.int64 and all(0 < o < 2*bound and o % 2 for o in a.tolist())


def test_largest_ids_and_multipliers():
    "The edge of int64: no product may turn negative, and the rows are those of Python's integers."
    for vocab in (2, 3, 129_280, 2**40):
        bound = MOST//vocab//2
        a = [2*bound - 1, 2*bound - 3, 1]
        ids = [vocab - 1, 0, vocab - 1, vocab - 1]
        rows = ngram_rows(torch.tensor([[0, 0, *ids]]), torch.tensor(a), torch.tensor([97, 2**31 - 1]))[0].tolist()
        padded = [0, 0, *ids]
        for s in range(4):
            two = a[0]*padded[s + 2] ^ a[1]*padded[s + 1]
            assert rows[s] == [two % 97, (two ^ a[2]*padded[s]) % (2**31 - 1)]


def test_multipliers_differ_between_layers_and_seeds():
    c = EngramConfig(8, (1, 15), 1000, (7, 7))
    drawn = {tuple(odd_multipliers(EngramConfig(8, (1, 15), 1000, (7, 7), seed=s), layer).tolist()) for s in (0, 1) for layer in c.layers}
    assert len(drawn) == 4
    # layer 1 of seed 10007 is layer 2 of seed 0: the definition adds 10007·layer to the seed
    assert odd_multipliers(EngramConfig(8, (1,), 1000, (7, 7), seed=10007), 1).tolist() == odd_multipliers(c, 2).tolist()


@pytest.mark.draw(3)
@pytest.mark.parametrize('i', range(8))
def test_hash_is_that_of_python_integers(i):
    r = random.Random(SEED + i)
    c = draw(r, vocab_size=r.choice([2, 30, 99_092, 2**33]))
    compress = torch.tensor([r.randrange(c.vocab_size) for _ in range(50)])
    hasher = NgramHash(c, compress)
    tokens = torch.randint(50, (2, 9))
    found = hasher(tokens)
    assert found.real is None
    for layer in c.layers:
        for row in range(2): assert found.rows[layer][row].tolist() == slow_hash(c, layer, compress[tokens[row]].tolist())


def test_hash_is_saved_with_the_weights():
    r = random.Random(SEED)
    c = draw(r)
    hasher,_ = make(r, c)
    other = NgramHash(EngramConfig(**{**vars(c), 'seed': c.seed + 1}), torch.zeros_like(hasher.compress)).bfloat16()
    other.load_state_dict(hasher.state_dict())
    tokens = torch.randint(len(hasher.compress), (1, 8))
    assert all(torch.equal(other(tokens).rows[o], hasher(tokens).rows[o]) for o in c.layers)


def test_normalised_tokens():
    same = [['Café', 'cafe', ' CAFE\u0301 ', 'ｃａｆｅ'], ['\n\t ', ' ', '\r'], ['ﬁ', 'FI', 'fi'], ['Ⅳ', 'iv']]
    keys = [{normalise_token(o, '?') for o in group} for group in same]
    assert all(len(k) == 1 for k in keys) and len(set.union(*keys)) == len(same)
    assert normalise_token('\ufffd', 'Ġ<0xE2>') == 'Ġ<0xE2>'
    assert normalise_token('\u0301', '?') == '\u0301' and normalise_token('', '?') == ''


# ---- the module

@pytest.mark.draw(2)
@pytest.mark.parametrize('i', range(6))
def test_module_is_the_loop(i):
    r = random.Random(SEED + i)
    c = draw(r)
    hasher,engrams = make(r, c)
    tokens = torch.randint(len(hasher.compress), (2, 7))
    x = torch.randn(2, 7, c.streams, c.dim, dtype=torch.float64)
    found = hasher(tokens)
    for e in engrams:
        y = e(x, found)
        for row in range(2):
            slow = slow_engram(e, x[row], found.rows[e.layer][row].tolist())
            torch.testing.assert_close(y[row], slow, rtol=1e-10, atol=1e-10)
        if c.streams == 1: assert torch.equal(e(x[:, :, 0], found), y[:, :, 0])


def run(c, hasher, engrams, tokens, x, state=None, pad=None):
    "All layers on the same activations, stacked"
    found = hasher(tokens, state, pad)
    return found,torch.stack([e(x, found, state) for e in engrams])


def pieces(r, total, rewindable):
    "Random calls as (start, end), some after a rewind"
    at = 0
    while at < total:
        back = r.randint(0, min(at, rewindable)) if r.random() < .5 else 0
        start,at = at - back,min(total, at - back + r.randint(max(1, back), back + 4))
        yield start,at


@pytest.mark.draw(4)
@pytest.mark.parametrize('i', range(10))
def test_cached_chunked_rewound_and_padded(i):
    "Rows are the same. Activations are float64, where a sum of some hundred terms of order one is rounded by less than 1e-13."
    r = random.Random(SEED + i)
    c = draw(r)
    hasher,engrams = make(r, c)
    b,s = 2,r.randint(6, 24)
    tokens,x = torch.randint(len(hasher.compress), (b, s)),torch.randn(b, s, c.streams, c.dim, dtype=torch.float64)
    whole,y = run(c, hasher, engrams, tokens, x)
    for pad in (None, torch.tensor([0, r.randint(1, s - 1)])):
        if pad is not None:  # row 1 begins after its padding: what stands there, ids and activations, must not matter
            n = pad[1].item()
            tokens,x = tokens.clone(),x.clone()
            tokens[1] = torch.cat([torch.randint(len(hasher.compress), (n,)), tokens[1, :s - n]])
            x[1] = torch.cat([torch.full((n, c.streams, c.dim), r.choice([-1e6, 1e6]), dtype=x.dtype), x[1, :s - n]])
        most = r.randint(1, 5)
        state = EngramState(c, b, most, torch.float64)
        taken = state.nbytes
        for start,end in pieces(r, s, most):
            state.rewind(state.length - start)
            found,z = run(c, hasher, engrams, tokens[:, start:end], x[:, start:end], state, None if start else pad)
            assert state.length == end
            for row,shift in ((0, 0), (1, 0 if pad is None else n)):
                first = max(0, shift - start)
                want = slice(start + first - shift, max(start + first, end) - shift)
                for o in c.layers: assert torch.equal(found.rows[o][row, first:], whole.rows[o][row, want])
                torch.testing.assert_close(z[:, row, first:], y[:, row, want], rtol=1e-9, atol=1e-9)
        assert state.nbytes <= taken


def test_state_takes_what_the_formula_says():
    r = random.Random(SEED)
    for _ in range(10):
        c,most = draw(r),r.randint(0, 5)
        rows = (c.kernel - 1)*c.n + most if c.kernel else 0
        assert EngramState(c, 3, most).nbytes == 3*(8*(c.n - 1 + most) + 4*len(c.layers)*rows*c.streams*c.dim)


def test_rewinding_too_far_is_refused():
    c = EngramConfig(4, (0,), 9, (5,), heads=1, width=2)
    hasher,state = NgramHash(c, torch.arange(9)),EngramState(c, 1, 2)
    hasher(torch.tensor([[1, 2, 3, 4]]), state)
    state.rewind(1)
    with pytest.raises(ValueError, match='cannot rewind 2 tokens of a state that can take back 1'): state.rewind(2)
    assert state.length == 3


def test_a_convolution_row_has_the_same_bits_alone():
    r = random.Random(SEED)
    torch.manual_seed(SEED % 2**31)
    for _ in range(10):
        k,dilation,s = r.randint(1, 4),r.randint(1, 4),r.randint(1, 20)
        rows,w = torch.randn(2, (k - 1)*dilation + s, 2, 7),torch.randn(2, 7, k)
        y = dilated_conv(rows, w, dilation)
        for i in range(s): assert torch.equal(y[:, i:i+1], dilated_conv(rows[:, i:i + (k - 1)*dilation + 1], w, dilation))


def test_a_fresh_convolution_adds_nothing():
    torch.manual_seed(0)
    c = EngramConfig(8, (0,), 9, (5, 5), heads=2, width=4, streams=2)
    e,hasher,x = Engram(c, 0),NgramHash(c, torch.arange(9)),torch.randn(1, 5, 2, 8)
    found = hasher(torch.randint(9, (1, 5)))
    assert torch.equal(e(x, found), x + e.recall(x, found))


def test_gate_bounds_and_symmetry():
    torch.manual_seed(0)
    k,x = (F.rms_norm(torch.randn(2, 5, 3, 16), (16,)) for _ in range(2))
    a = memory_gate(k, x)
    least = torch.tensor(-16**.25).sigmoid()  # |z| ≤ √d
    assert (a >= least - 1e-6).all() and (a <= 1 - least + 1e-6).all()
    torch.testing.assert_close(memory_gate(-k, x), 1 - a)
    assert (memory_gate(0*k, x) == .5).all()


def test_every_weight_is_trained():
    r = random.Random(SEED)
    c = draw(r, kernel=4, dim=8, width=5)
    hasher,engrams = make(r, c)
    e = engrams[0].requires_grad_(True)
    tokens = torch.randint(len(hasher.compress), (2, 9))
    found = hasher(tokens)
    e(torch.randn(2, 9, c.streams, c.dim, dtype=torch.float64), found).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in e.parameters())
    read = (found.rows[e.layer] + e.tables.first).unique()
    assert set(e.tables.weight.grad.abs().sum(1).nonzero().flatten().tolist()) <= set(read.tolist())


# ---- tables in a file

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_mapped_tables(tmp_path, dtype):
    "The same bits as from memory, in each dtype, and as many pages as the rows lie in, counted byte by byte."
    r = random.Random(SEED)
    for i in range(4):
        c = draw(r, layers=(3,), width=r.choice([1, 64, 1500]))
        sizes = table_rows(c)[3]
        weight = torch.randn(sum(sizes), c.width).to(dtype)
        path = tmp_path/str(i)
        path.write_bytes(weight.view(torch.uint8).numpy().tobytes())
        mapped = MappedTables(path, sizes, c.width, dtype)
        rows = torch.stack([torch.randint(m, (2, 3)) for m in sizes], -1)
        flat = (rows + mapped.first).flatten()
        assert torch.equal(mapped(rows).view(torch.uint8).flatten(), weight[flat].view(torch.uint8).flatten())
        n,page = c.width*dtype.itemsize,__import__('mmap').PAGESIZE
        assert mapped.prefetch(rows) == len({byte//page for row in set(flat.tolist()) for byte in range(row*n, (row + 1)*n)})


def test_a_module_reads_mapped_tables(tmp_path):
    r = random.Random(SEED)
    c = draw(r)
    hasher,engrams = make(r, c, torch.float32)
    e,x,found = engrams[0],torch.randn(1, 6, c.streams, c.dim),hasher(torch.randint(len(hasher.compress), (1, 6)))
    path = tmp_path/'tables'
    e.tables.weight.numpy().tofile(path)
    other = Engram(c, e.layer, MappedTables(path, table_rows(c)[e.layer], c.width)).requires_grad_(False)
    other.load_state_dict({k: v for k,v in e.state_dict().items() if not k.startswith('tables')})
    assert torch.equal(other(x, found), e(x, found))


def test_a_file_of_another_size_is_refused(tmp_path):
    (tmp_path/'t').write_bytes(bytes(40))
    with pytest.raises(ValueError, match='has 40 bytes, the tables 80; check sizes, width and dtype'): MappedTables(tmp_path/'t', [2, 3], 4)


@pytest.mark.parametrize('streams', [1, 2])
def test_a_model_with_memories_is_saved(tmp_path, streams):
    "A folder gives the same logits, cached and rewound, and settings and compressed ids survive; other formats are refused"
    r = random.Random(SEED + streams)
    torch.manual_seed(SEED)
    shared = dict(vocab_size=40, dim=16, n_layers=2, n_heads=2, inter_dim=16, q_lora_rank=8, qk_rope_head_dim=4, index_n_heads=8,
                  index_head_dim=8, index_topk=64, max_positions=64, rope=Rope(interleaved=True), n_routed_experts=2,
                  n_activated_experts=2, moe_inter_dim=8) # all keys and experts are selected: no choice hangs on the last bit
    v4 = dict(n_kv_heads=1, head_dim=8, window=4, compress_ratios=(4, 0), o_groups=1, o_lora_rank=8, hc_mult=2, score_func='sqrtsoftplus',
              swiglu_limit=10., compress_rope=Rope(interleaved=True))
    v32 = dict(kv_lora_rank=8, qk_nope_head_dim=4, v_head_dim=4, score_func='sigmoid')
    conf = Config('deepseek_v4', **shared, **v4) if streams == 2 else Config('deepseek_v32', **shared, **v32)
    compress, text = torch.tensor([r.randrange(30) for _ in range(40)]), torch.randint(40, (2, 24))
    c = EngramConfig(16, tuple(r.sample((0, 1), r.randrange(1, 3))), 30, (50, 60), heads=2, width=4, seed=r.randrange(99), streams=streams)
    model = add_engram(Model(conf, 'float32', 'cpu').eval(), c, compress, rewindable=9)
    model.save_pretrained(tmp_path/'x')
    again = Model.from_pretrained(tmp_path/'x', dtype='float32', device='cpu')
    assert again.hashes.c == c and again.hashes.rewindable == 9 and again.hashes.compress.equal(compress)
    want = model(text)
    assert again(text).equal(want)
    cache = again.new_cache(2)
    again(text[:, :20], cache)
    cache.rewind(7)
    assert (again(text[:, 13:], cache) - want[:, 13:]).abs().max() <= 1e-5*want.abs().max()
    again.save_pretrained(tmp_path/'y')
    assert {k: e.shape for k, e in weight_map(tmp_path/'y').items()} == {k: e.shape for k, e in weight_map(tmp_path/'x').items()}
    with pytest.raises(ValueError, match='Engram tables is not quantised'): Model.from_pretrained(tmp_path/'x', dtype='int8')

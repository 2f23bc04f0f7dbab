"""V4's fused decode step against the readable blocks, on tiny configs that are drawn anew in every run

The seed is printed; SEED=n repeats a run, DRAWS=n asks for more draws. A rounding error can change which entry or expert is selected
where two scores nearly tie; a draw whose readable result moves when its weights move by a few roundings is drawn again.
"""
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from deepseek_nb.arch import hash as hashed
from deepseek_nb.arch.compressed import Compressor
from deepseek_nb.arch.hyper import HyperConnection, HyperHead, expand_streams
from deepseek_nb.arch.model import Model, run_blocks
from deepseek_nb.arch.rewindable import RewindableCache
from deepseek_nb.arch.v4 import read_streams
from deepseek_nb.arch.window import WindowAttention, project_groups, rotate_back
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.core.nbproc import find_compiler
from deepseek_nb.kernels.plan import plan_of
from deepseek_nb.kernels.v4 import V4Blocks, v4_codes_kernels, v4_head_kernels, v4_kernels
from deepseek_nb.quant import QuantizedWeight
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8, rounded
from deepseek_nb.quant.model import quantize_model

DRAWS = int(os.environ.get('DRAWS') or 2)
pytestmark = pytest.mark.usefixtures('source')


@pytest.fixture(autouse=True, scope='module')
def kernels():
    "Where a compiler is present, the kernels must compile"
    try: find_compiler('cpp')
    except FileNotFoundError as e: pytest.skip(str(e))
    for k in (v4_kernels, v4_codes_kernels, v4_head_kernels): assert k.ready(), k.failed


def draw(r, **kw):
    "A tiny config with layers of all kinds in a random order, and widths that no vector divides"
    rot, groups, csa, hca = r.choice([2, 4, 6]), r.choice([1, 2]), r.choice([2, 4]), r.choice([5, 8])
    ratios = [0, csa, hca, r.choice([0, csa, hca])]
    r.shuffle(ratios)
    rope = Rope(theta=160000., interleaved=True)
    if r.random() < .5: rope = replace(rope, kind='yarn', factor=4., original_positions=32, attention_factor=r.choice([None, 1.]))
    return Config('deepseek_v4', **dict(
        vocab_size=r.randrange(40, 70), dim=2*r.randrange(8, 24), n_layers=4, n_heads=groups*r.choice([1, 2, 5]), n_kv_heads=1,
        head_dim=rot + 2*r.randrange(1, 12), qk_rope_head_dim=rot, q_lora_rank=r.randrange(5, 20), o_groups=groups,
        o_lora_rank=r.randrange(3, 9), window=r.randrange(2, 12), compress_ratios=tuple(ratios), csa_ratio=csa,
        index_n_heads=r.choice([16, 20]), index_head_dim=rot + 2*r.randrange(0, 4), index_topk=r.randrange(1, 6), inter_dim=24,
        n_dense_layers=r.choice([0, 0, 1]), n_routed_experts=r.choice([4, 8, 18]), n_shared_experts=r.choice([0, 1]),
        n_activated_experts=r.randrange(1, 4), moe_inter_dim=4*r.randrange(1, 6), score_func='sqrtsoftplus', score_bias=True,
        group_score='sum2', norm_topk=r.random() < .8, route_scale=r.choice([1., 1.5]), n_hash_layers=r.randrange(0, 5),
        swiglu_limit=r.choice([.5, 2., 10.]), hc_mult=r.choice([1, 2, 4]), hc_iters=r.choice([1, 3, 20]),
        hc_eps=r.choice([1e-6, 1e-3]), norm_eps=r.choice([1e-6, 1e-4]), rope=Rope(interleaved=True), compress_rope=rope,
        max_positions=256) | kw)


def make(c, dtype='float32'):
    "A model with weights that make every part count"
    model = Model(c, 'float32', 'cpu').init_weights(.3).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith('norm.weight'): p.add_(torch.randn_like(p), alpha=.2)
        if name.endswith(('attn_sink', '.ape')): p.normal_()
    for m in model.modules():
        if isinstance(m, (HyperConnection, HyperHead)):
            m.reset(std=.3, scale=.7)
            m.base.add_(torch.randn_like(m.base), alpha=.5)
    for name, b in model.named_buffers():
        if 'bias' in name: b.normal_(std=.2)
    return model.to(getattr(torch, dtype))


def moved(model):
    "The same model with weights that differ by a few roundings"
    other = Model(model.config, 'float32', 'cpu').eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    for p in other.parameters(): p.mul_(1 + 2e-6*torch.randn_like(p))
    return other


def plan(r, total, rewinds=32):
    "Random calls: numbers of tokens, negative ones to take back"
    calls, at, held = [], 0, 0
    while at < total:
        n = min(r.choice([1, 1, 1, 1, 2, 3, r.randrange(4, 34)]), total - at)
        calls.append(n)
        at, held = at + n, min(held + n, rewinds)
        if r.random() < .25:
            back = r.randrange(0, held + 1)
            calls.append(-back)
            at, held = at - back, held - back
    return calls


def follow(model, ids, calls, kind='auto', cache=None):
    "Logits of all calls, and the cache"
    cache, found = model.new_cache(len(ids)) if cache is None else cache, []
    with use(kind):
        for n in calls:
            if n <= 0: cache.rewind(-n)
            else: found.append(model(ids[:, len(cache):len(cache) + n], cache))
    return torch.cat(found, 1), cache


def well_posed(r, total=50, rows=(1, 2), **kw):
    "A model, tokens, calls, and the readable result, which roundings don't change much"
    for _ in range(20):
        model = make(draw(r, **kw))
        ids, calls = torch.randint(model.config.vocab_size, (r.choice(rows), total)), plan(r, total)
        want = follow(model, ids, calls, 'reference')
        if distance(follow(moved(model), ids, calls, 'reference')[0], want[0]) < 1e-4: return model, ids, calls, want
    raise AssertionError('every draw is badly conditioned')


def distance(got, want): return ((got - want).abs().max()/want.abs().max()).item()


def fused(model, cache):
    "Whether the next token of the cache runs in one call"
    x = expand_streams(torch.zeros(cache.batch, 1, model.config.dim, dtype=model.dtype), model.config.hc_mult)
    ids = torch.zeros(cache.batch, 1, dtype=torch.long)
    return run_blocks.op.choose(x, model.layers, model.context(1, cache, cache.pad, tokens=ids)).name == 'cpp/cpu'


def held(cache):
    "What a cache holds: window keys, raw rows of windows that may change, and finished entries"
    n = len(cache)
    for slot in cache.slots:
        yield slot.keys.between(max(0, n - cache.c.window + 1), n)
        for o in slot.lists:
            yield o.rows.between(max(0, n - o.m*(1 + o.overlap) + 1), n)
            yield o.entries[:, :n//o.m]


@pytest.mark.parametrize('n', range(DRAWS))
def test_like_the_readable_blocks(n, source):
    "Ragged calls, beyond the window, rewound and continued; the same logits, tokens and cache"
    model, ids, calls, (want, kept) = well_posed(source(f'blocks {n}'))
    got, cache = follow(model, ids, calls)
    assert fused(model, cache)
    assert distance(got, want) < 1e-4
    best, second = want.topk(2, -1).values.unbind(-1)
    clear = best - second > 2e-4*want.abs().max()
    assert (got.argmax(-1) == want.argmax(-1))[clear].all() and clear.float().mean() > .9
    for a, b in zip(held(cache), held(kept), strict=True): assert a.shape == b.shape and torch.allclose(a, b, 1e-3, 1e-3)


def test_calls_of_both_kinds_alternate(source):
    "A call of either kind continues on the cache of the other"
    r = source('alternate')
    model, ids, calls, (want, _) = well_posed(r)
    cache, got = None, []
    for n in calls:
        out = follow(model, ids, [n], r.choice(['auto', 'reference']), cache) if n > 0 else (None, cache.rewind(-n) or cache)
        cache = out[1]
        if n > 0: got.append(out[0])
    assert distance(torch.cat(got, 1), want) < 1e-4


def test_threads_and_many_heads(source):
    "More heads than a block of queries has, and shares of keys that end inside of a row"
    r = source('threads')
    model, ids, calls, (want, _) = well_posed(r, 40, (3,), n_heads=66, o_groups=2, head_dim=8, qk_rope_head_dim=4,
                                           index_head_dim=6, q_lora_rank=8)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert distance(follow(model, ids, calls)[0], want) < 1e-4
    finally: torch.set_num_threads(before)


def rows_plan(r, lengths, most):
    "Random steps for rows that enter one after another: numbers of new tokens and of tokens to take back of each row"
    done, held, steps = [0]*len(lengths), [0]*len(lengths), []
    while any(a < b for a, b in zip(done, lengths, strict=True)):
        step = []
        for i, n in enumerate(lengths):
            enters = done[i] or not i or done[i - 1] > 3
            new = min(r.choice([0, 1, 1, 1, 3, r.randrange(1, most)]), n - done[i]) if enters else 0
            done[i], held[i] = done[i] + new, min(held[i] + new, 20)
            back = r.randrange(held[i] + 1) if new and r.random() < .2 else 0
            done[i], held[i] = done[i] - back, held[i] - back
            step.append((new, back))
        steps.append(step)
    return steps


def follow_rows(model, texts, steps, rewinds=20):
    "Activations of all rows of a ragged batch, and their caches"
    caches = [RewindableCache(model.config, 1, 0, model.dtype, 'cpu', rewinds) for _ in texts]
    found = [[None]*len(t) for t in texts]
    for step in steps:
        rows = [i for i, (n, _) in enumerate(step) if n]
        if not rows: continue
        new = [texts[i][len(caches[i]):len(caches[i]) + step[i][0]] for i in rows]
        y = model.ragged(torch.cat(new), [caches[i] for i in rows], [len(t) for t in new])
        for i, part in zip(rows, y.split([len(t) for t in new]), strict=True):
            found[i][len(caches[i]) - len(part):len(caches[i])] = part
            caches[i].rewind(step[i][1])
    return [torch.stack(f) for f in found], caches


def alone(model, text, r, rewinds):
    "Activations of one row, in calls of up to 64 tokens of a batch of one row"
    cache, found = RewindableCache(model.config, 1, 0, model.dtype, 'cpu', rewinds), []
    while len(cache) < len(text):
        new = text[len(cache):][:r.choice([1, 2, r.randrange(1, 65)])]
        found.append(model.hidden(new[None], cache)[0])
        assert fused(model, cache)
    return torch.cat(found)


@pytest.mark.parametrize('n', range(DRAWS))
def test_rows_are_near_the_definition_in_float64(n, source):
    "Chunks longer than a ring, decoding, rewinds, rows that enter later; activations and caches of each row"
    r = source(f'rows {n}')
    for _ in range(20):
        model = make(draw(r))
        texts = [torch.randint(model.config.vocab_size, (r.randrange(30, 90),)) for _ in range(r.randrange(2, 6))]
        steps = rows_plan(r, [*map(len, texts)], 60)
        with use('reference'): readable, _ = follow_rows(model, texts, steps)
        double = Model(model.config, 'float64', 'cpu').requires_grad_(False)
        double.load_state_dict(model.state_dict())
        with use('reference'): want, kept = follow_rows(double, texts, steps)
        if max(map(distance, readable, want)) < 1e-4: break
    else: raise AssertionError('every draw is badly conditioned')
    got, caches = follow_rows(model, texts, steps)
    assert max(map(distance, got, want)) < 1e-4
    for mine, theirs in zip(caches, kept, strict=True):
        assert len(mine) == len(theirs) and mine.floor == theirs.floor
        for a, b in zip(held(mine), held(theirs), strict=True):
            assert a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-3, 1e-3)


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'int8', 'int4'])
def test_a_row_has_the_bits_that_it_has_alone(kind, source):
    "In company and alone, in any chunks, with any ring, number of threads, and more keys than a partial result has"
    r = source(f'bits {kind}')
    big = dict(window=r.choice([9, 150]), n_heads=r.choice([2, 6, 66]), o_groups=2)
    if kind.startswith('int'): big |= whole(r)
    model = make(draw(r, **big), kind if 'float' in kind else 'float32')
    if kind.startswith('int'): model = quantize_model(model, kind, embedding=None)
    texts = [torch.randint(model.config.vocab_size, (r.randrange(20, 250),)) for _ in range(r.randrange(3, 10))]
    steps = rows_plan(r, [*map(len, texts)], 140)
    assert max(sum(n for n, _ in s) for s in steps) > 64
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(r.choice([1, 2, 3]))
        got, _ = follow_rows(model, texts, steps)
        for i, text in enumerate(texts):
            torch.set_num_threads(r.choice([1, 2, 3]))
            assert torch.equal(alone(model, text, r, r.choice([0, 5, 40])), got[i]), (i, len(text), model.config)
    finally: torch.set_num_threads(before)
    assert got[0].isfinite().all()


def test_a_call_has_bounded_size(source):
    "A step of more tokens than a call takes: some calls, and the same bits; nothing of a row leaks into another"
    r = source('parts')
    model = make(draw(r, max_positions=512))
    texts = [torch.randint(model.config.vocab_size, (n,)) for n in (150, 300, 90)]
    got, _ = follow_rows(model, texts, [[(150, 0), (300, 0), (90, 0)]])
    for i, text in enumerate(texts): assert torch.equal(alone(model, text, r, 3), got[i])
    nan = model.embed_tokens.weight[texts[1][200]].clone()
    model.embed_tokens.weight[texts[1][200]] = float('nan')
    bad, _ = follow_rows(model, texts, [[(150, 0), (300, 0), (90, 0)]])
    for i, text in enumerate(texts):
        clean = len(text) if (text != texts[1][200]).all() else (text == texts[1][200]).nonzero()[0].item()
        assert torch.equal(bad[i][:clean], got[i][:clean]) and bad[1][200].isnan().any()
    model.embed_tokens.weight[texts[1][200]] = nan


@pytest.mark.parametrize('threads', [1, 2])
def test_a_table_that_names_no_expert(threads, source):
    "An error, in whichever thread it is found, and the next step runs"
    model, before = make(draw(source('table'), n_hash_layers=4, n_dense_layers=0)), torch.get_num_threads()
    ids, table = torch.arange(9)[None], next(m for m in model.modules() if hasattr(m, 'tid2eid')).tid2eid
    right = table.clone()
    torch.set_num_threads(threads)
    try:
        for wrong in (-1, model.config.n_routed_experts, 2**40):
            table[source('token').randrange(9)] = wrong
            with pytest.raises(RuntimeError, match=f'tid2eid names expert {wrong}'): model(ids, model.new_cache(1))
            table.copy_(right)
            assert model(ids, model.new_cache(1)).isfinite().all()
    finally: torch.set_num_threads(before)


def test_one_token_at_a_time_is_greedy_decoding(source):
    model, ids, _, _ = well_posed(source('greedy'), 30)
    a, b = [], []
    for kind, out in (('reference', a), ('auto', b)):
        with use(kind): out.append(model.generate(ids[:1, :9], max_new_tokens=24))
    assert a[0].tolist() == b[0].tolist()


def test_padded_rows(source):
    "Prompts of several lengths, padded on the left: each row as if it were alone"
    r = source('padded')
    model, ids, _, _ = well_posed(r, 50, (3,))
    pads = torch.tensor([0, r.randrange(1, 9), r.randrange(1, 20)])
    mask = (torch.arange(24) >= pads[:, None]).long()
    cache = model.new_cache(3)
    model(ids[:, :24], cache, attention_mask=mask)
    assert fused(model, cache)
    got = [model(ids[:, i:i+1], cache)[:, 0] for i in range(24, 40)]
    cache.rewind(7)
    got.append(model(ids[:, 33:40], cache)[:, -1])
    for row, pad in enumerate(pads.tolist()):
        want, _ = follow(model, ids[row:row+1, pad:40], [24 - pad, *[1]*16], 'reference')
        assert distance(torch.stack([g[row] for g in got]), torch.cat([want[0, -16:], want[0, -1:]])) < 1e-4


def test_many_rows_and_long_prompts(source):
    "More rows than a call has tokens, and more tokens than a call takes, in any number of rows"
    model = make(draw(source('rows'), max_positions=700))
    for rows, lengths in ((300, [5, 1]), (1, [600, 1, 40]), (3, [200, 100])):
        ids = torch.randint(model.config.vocab_size, (rows, sum(lengths)))
        want, _ = follow(model, ids, lengths, 'reference')
        got, cache = follow(model, ids, lengths)
        assert fused(model, cache)
        errors = ((got - want).abs().amax(-1)/want.abs().max()).flatten()
        assert errors.quantile(.95) < 1e-4  # experts or entries of a token may nearly tie, which later tokens of its row see


def test_bfloat16(source):
    "No further from float32 than the readable blocks in bfloat16"
    model = make(draw(source('bfloat16'), index_topk=100, n_hash_layers=4, n_dense_layers=0))
    ids = torch.randint(model.config.vocab_size, (2, 40))
    exact, _ = follow(model, ids, [28, *[1]*12], 'reference')
    model = model.to(torch.bfloat16)
    readable, _ = follow(model, ids, [28, *[1]*12], 'reference')
    got, cache = follow(model, ids, [28, *[1]*12])
    assert fused(model, cache)
    assert (got - exact).abs().mean() < 1.2*(readable - exact).abs().mean()


def test_read_streams(source):
    "Collapse and last norm in one call: as the modules, with the same bits alone; not with a hook"
    r = source('read')
    model = make(draw(r))
    x = torch.randn(r.randrange(1, 5), r.randrange(1, 13), model.config.hc_mult, model.config.dim)
    args = model.hc_head, model.norm
    assert read_streams.op.choose(x, *args).kind == 'cpp'
    got = read_streams(x, *args)
    with use('reference'): want = read_streams(x, *args)
    assert distance(got, want) < 1e-5
    assert torch.equal(read_streams(x[-1:, -1:], *args)[0], got[-1, -1:])
    with model.keep_hidden() as kept: model(torch.zeros(1, 1, dtype=torch.long))
    assert kept[0].shape == (1, 1, *x.shape[2:])
    for module in args:
        hook = module.register_forward_hook(lambda *a: None)
        assert read_streams.op.choose(x, *args).kind == 'reference'
        hook.remove()


def test_falls_back(source):
    "A changed module, a hook, gradients, too many tokens or padding among the new tokens: the readable blocks run"
    model, ids, _, _ = well_posed(source('fallback'), 30, (2,))
    layer, x = model.layers[2], torch.zeros(2, 1, model.config.hc_mult, model.config.dim)
    can = lambda: bool(plan_of(model.layers, x, V4Blocks))
    assert can()
    with torch.enable_grad(): assert not can()
    for module in (layer, layer.mlp, layer.self_attn.wq_b, layer.attn_hc):
        hook = module.register_forward_hook(lambda *a: None)
        assert not can()
        hook.remove()
        assert can()
    kept, layer.self_attn.wo_b = layer.self_attn.wo_b, nn.Sequential(layer.self_attn.wo_b)
    assert not can() and not V4Blocks(model.layers).plain
    layer.self_attn.wo_b = kept
    layer.self_attn.forward = lambda x, ctx: x
    assert not can()
    del layer.self_attn.forward
    cache = model.new_cache(2)
    model(ids[:, :6], cache, attention_mask=torch.tensor([[1]*6, [0]*4 + [1]*2]))
    assert fused(model, cache)
    cache.rewind(3)
    assert not fused(model, cache)
    assert not plan_of(model.layers, x.double(), V4Blocks)


def whole(r):
    "Widths that begin with a panel of sixteen rows; those that are sums may be any"
    return dict(o_lora_rank=16*r.randrange(1, 3), dim=16*r.randrange(1, 5), moe_inter_dim=16*r.randrange(1, 4),
                q_lora_rank=r.randrange(5, 90), index_n_heads=r.choice([4, 16, 20]), inter_dim=r.randrange(20, 80))


@pytest.fixture
def rounding(monkeypatch):
    "Makes a float model of the weights of a quantised one, whose products round their activations to 8 bits in blocks of 32"
    def expert(x, gate_up, down, limit):
        return F.linear(rounded(hashed.swiglu_clamped(*F.linear(rounded(x), gate_up).chunk(2, -1), limit)), down)

    def output(self, y, angles):
        y, g = rotate_back(y, angles), self.c.o_groups
        y = rounded(rearrange(y, 'b (g h) s v -> b s g (h v)', g=g))
        return self.wo_b(project_groups(rearrange(y, 'b s g (h v) -> b (g h) s v', v=self.c.head_dim), self.wo_a.weight, g))
    rows = Compressor.rows
    monkeypatch.setattr(Compressor, 'rows', lambda self, x: rows(self, rounded(x)))
    monkeypatch.setattr(WindowAttention, 'output', output)
    monkeypatch.setattr(hashed, 'expert_clamped', expert)

    def make(model):
        other = Model(model.config, 'float32', 'cpu').eval().requires_grad_(False)
        exact = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedWeight)}
        other.load_state_dict({n: exact[n].dequantize() if n in exact else model.state_dict()[n] for n in other.state_dict()})
        for m in other.layers.modules():
            if isinstance(m, nn.Linear): m.register_forward_pre_hook(lambda m, args: (rounded(args[0]),))
        return other
    return make


@pytest.mark.parametrize('format', ['int8', 'int4', Int8(), Int4(64, symmetric=True)], ids=str)
def test_codes(format, source, rounding):
    "On int8 and int4: calls of one or several tokens, padded rows, rewinds; the readable blocks with rounded activations compute the same"
    r = source(f'codes {format}')
    model = quantize_model(make(draw(r, **whole(r))), format, embedding=None)
    exact, errors = rounding(model), []
    ids, pads = torch.randint(model.config.vocab_size, (3, 44)), torch.tensor([0, r.randrange(1, 9), r.randrange(1, 20)])
    cache = model.new_cache(3)
    with use('reference'): exact(ids[:, :20], cache, attention_mask=(torch.arange(20) >= pads[:, None]).long())
    assert fused(model, cache) and not plan_of(model.layers, torch.zeros(1), V4Blocks).floats
    while len(cache) < 42:
        n = min(r.choice([1, 1, 1, 2, 5, 12]), 44 - len(cache))
        new = ids[:, len(cache):len(cache) + n]
        got = model(new, cache)
        cache.rewind(n)
        with use('reference'): want = exact(new, cache)  # what comes next continues on its rows
        errors += ((got - want).abs().amax(-1)/want.abs().max()).flatten().tolist()
    errors = torch.tensor(errors)
    # a rounding error can move a code, an entry or an expert; then two results differ by at most the sum of their largest values
    assert errors.quantile(.4) < 1e-5 and errors.max() < 2, errors


def test_codes_fall_back(source):
    "Other formats, widths that cut a panel, and weights that are exchanged"
    r = source('codes fall back')
    c = draw(r, **whole(r))
    x = torch.zeros(1, 1, c.hc_mult, c.dim)

    def label(model):
        cache = model.new_cache()
        model(torch.zeros(1, 3, dtype=torch.long), cache)
        plan = plan_of(model.layers, x, V4Blocks)
        assert fused(model, cache) == bool(plan)
        return ('v4' if plan.floats else 'v4_codes') if plan else ''
    model = make(c)
    assert [label(quantize_model(model, f)) for f in ('int8', 'int4', 'fp8')] == ['v4_codes', 'v4_codes', '']
    assert label(quantize_model(make(replace(c, o_lora_rank=8)), 'int8')) == ''
    assert label(quantize_model(model, 'int8', skip=['layers.1.self_attn.wkv.weight'])) == ''
    assert label(model) == 'v4' and plan_of(model.layers, x, V4Blocks).floats

"""V3.2 and V4 in the engine: the same answers alone and in company, prefixes, preemptions, drafts, and memory to the byte."""
import os
import random
from dataclasses import replace

import pytest
import torch
from test_engine import Bytes, requests, run, tokens

from deepseek_nb.arch.dspark import DSpark, keep_taps
from deepseek_nb.arch.model import Model
from deepseek_nb.arch.releases import preset
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer import engine as engine_module
from deepseek_nb.infer import ragged
from deepseek_nb.infer.drafts import save_drafter
from deepseek_nb.infer.engine import Engine
from deepseek_nb.infer.request import Request
from deepseek_nb.infer.sampling import SamplingParams
from deepseek_nb.infer.stores import (
    OwnedCache,
    OwnedRows,
    PagedRows,
    RowPool,
    Snapshots,
    block_bytes,
    border_distance,
    restore,
    state_bytes,
)
from deepseek_nb.kernels.v4 import v4_kernels
from deepseek_nb.quant.model import quantize_model
from deepseek_nb.tools.serving import draft_source
from deepseek_nb.train.lora import LoraConfig, lora_weights

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_stores SEED={SEED}')
    yield


def v4(r):
    "A tiny V4 model with layers of all kinds, in random order and sizes"
    csa, hca = r.choice([2, 4]), r.choice([8, 16])
    ratios = [0, csa, hca]
    r.shuffle(ratios)
    return replace(preset('deepseek-v4-flash'), vocab_size=256, dim=r.choice([16, 20]), n_layers=3, n_heads=2, inter_dim=16,
                   head_dim=12, q_lora_rank=8, qk_rope_head_dim=4, window=r.choice([3, 8, 140]), compress_ratios=tuple(ratios),
                   csa_ratio=csa, o_groups=2, o_lora_rank=8, index_n_heads=4, index_head_dim=8,
                   index_topk=r.choice([2, 6]), hc_mult=r.choice([2, 4]), hc_iters=3, n_hash_layers=1, n_routed_experts=4,
                   n_activated_experts=2, moe_inter_dim=8, max_positions=512)


def v32(r):
    "A tiny V3.2 model that selects few tokens"
    return replace(preset('deepseek-v3.2'), vocab_size=256, dim=32, n_layers=2, n_heads=r.choice([2, 3]), inter_dim=32, q_lora_rank=24,
                   kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, index_n_heads=r.choice([4, 12]), index_head_dim=8,
                   index_topk=r.choice([5, 40]), n_dense_layers=1, n_routed_experts=4, n_expert_groups=1, n_limited_groups=1,
                   n_activated_experts=2, moe_inter_dim=16, max_positions=512)


def v4_codes(r): return replace(v4(r), dim=32, o_lora_rank=16, moe_inter_dim=16)
def v32_codes(r): return replace(v32(r), qk_nope_head_dim=16, v_head_dim=16, index_head_dim=16)


def made(kind, seed=SEED):
    r = random.Random(f'{seed} {kind.__name__}')
    torch.manual_seed(r.randrange(10**9))
    model = Model(kind(r), torch.float32, 'cpu').requires_grad_(False).init_weights(std=.3)
    return quantize_model(model, r.choice(['int8', 'int4']), embedding=None) if kind in (v4_codes, v32_codes) else model, r


@pytest.fixture(scope='module', params=[v32, v4, v32_codes, v4_codes], ids=lambda k: k.__name__)
def model(request): return made(request.param)[0]


def small_engine(model, rows, **kw):
    "An engine with memory for about so many rows of 130 tokens"
    if not model.config.window: return Engine(model, Bytes(), nbytes=int(rows*9*PagedRows(model, 2**30, 16).pool.page_bytes), page=16, **kw)
    return Engine(model, Bytes(), nbytes=int(rows*RowPool(model.config, 0, 16).row_bytes(130)), page=16, **kw)


def short(draw, n):
    "Random requests of up to 120 tokens"
    return [replace(r, prompt=r.prompt[-80:], max_tokens=min(r.max_tokens, 40)) for r in requests(draw, n)]


def emptied(engine):
    "Whether all memory is free once the prefix cache is empty"
    engine.store.clear()
    if isinstance(engine.store, PagedRows): return len(engine.pool.free) == engine.pool.pages
    return engine.pool.rows == engine.pool.kept == 0 and not engine.store.blocks


def test_alone_and_in_company(model):
    "Random arrivals, lengths, chunks, cancellations, preemptions and drafts; ids, log-probabilities and alternatives equal to the bit"
    draw = random.Random(f'{SEED} {model.config.model_type}')
    asked = short(draw, 6)
    given = draw.choice([dict(draft='lookup'), dict(draft='lookup', draft_tokens=draw.randrange(1, 9)), {}])
    if not given: asked = [replace(r, draft_tokens=None) for r in asked]
    engine = small_engine(model, draw.choice([2, 6]), max_rows=draw.choice([3, 8]), budget=draw.choice([16, 64, 256]), **given)
    assert engine.exact
    streams, waiting, cancelled = [], [*asked], set()
    while waiting or engine.count:
        while waiting and draw.random() < .3: streams.append(engine.submit(waiting.pop(0)))
        if streams and draw.random() < .01: streams[n := draw.randrange(len(streams))].cancel(); cancelled.add(n)
        engine.step()
        if isinstance(engine.pool, RowPool):
            assert engine.pool.rows == sum(r.cache.nbytes for r in engine.rows) and engine.pool.free >= 0
            assert engine.pool.kept == sum(b.nbytes for b in engine.store.blocks.values())
    alone = Engine(model, Bytes(), budget=512)
    for i,(stream,request) in enumerate(zip(streams, asked, strict=True)):
        one = alone.submit(replace(request, draft_tokens=None, user=f'{i}'))
        run(alone)
        got, want = tokens(stream), tokens(one)
        assert len(want) == request.max_tokens and not one.usage.prompt_cache_hit_tokens
        assert got == (want[:len(got)] if stream.finish == 'cancelled' else want), (SEED, i, request)
        assert stream.finish == 'length' or i in cancelled
    assert emptied(engine)


def test_preemption_and_prefixes(model):
    "Little memory and much: the same bits; a prompt that was computed is found again, by its user alone"
    shared, results = [*range(64)], []
    asked = [Request([*shared, i], SamplingParams(seed=i), max_tokens=20, stop_ids=()) for i in range(2)]
    for rows in (1.3, 30):
        engine = small_engine(model, rows)
        streams = [engine.submit(r) for r in asked]
        run(engine)
        results.append([tokens(s) for s in streams])
        hits = [s.usage.prompt_cache_hit_tokens for s in streams]
        assert rows < 30 or hits == [0, 64]
        again = [engine.submit(replace(asked[0], user=user)) for user in ('', 'bob')]
        run(engine)
        if rows == 30: assert [s.usage.prompt_cache_hit_tokens for s in again] == [64, 0]
        assert [tokens(s) for s in again] == [results[-1][0]]*2
    assert results[0] == results[1]


class Thirds:
    "A grammar that allows every third token, and others after each token"
    finished = False
    def __init__(self): self.n = 0
    def mask(self): return torch.tensor([sum(1 << i for i in range(self.n % 3, 12, 3))], dtype=torch.int32)
    def accept(self, token):
        assert token % 3 == self.n % 3, 'a mask of another token'
        self.n += 1


@pytest.mark.parametrize('kind, block', [(v4, False), (v4, True), (v32, False)], ids=['v4-mtp', 'v4-dspark', 'v32-mtp'])
def test_drafts_of_blocks(kind, block):
    "Greedy and sampled rows, penalties and grammars, together; ids, log-probabilities and alternatives are those without drafts"
    r = random.Random(f'{SEED} {kind.__name__} {block}')
    torch.manual_seed(r.randrange(10**9))
    c = replace(kind(r), vocab_size=12, n_mtp_layers=1)
    model = Model(c, torch.float32, 'cpu').add_mtp().init_weights(std=.3).requires_grad_(False)
    taps = r.sample(range(c.n_layers), r.randrange(1, 4)) if block else ()
    source = Model.init_weights(DSpark(c, taps, 3, 1, 4), .3).requires_grad_(False) if block else 'mtp'
    how = [SamplingParams(temperature=0., logprobs=2), SamplingParams(temperature=2., seed=1, logprobs=1),
           SamplingParams(temperature=1.5, top_p=.9, repetition_penalty=1.3, frequency_penalty=.4, seed=2),
           SamplingParams(temperature=0., presence_penalty=1.), SamplingParams(temperature=1., seed=3)]
    texts, results = [[r.randrange(12) for _ in range(r.randrange(1, 40))] for _ in how], []
    for draft in (None, source):
        engine = Engine(model, Bytes(), page=16, draft=draft, draft_tokens=draft and 3, budget=40)
        assert engine.exact
        streams = [engine.submit(Request(t, h, max_tokens=30, stop_ids=(), grammar=Thirds() if i > 2 else None))
                   for i,(t,h) in enumerate(zip(texts, how, strict=True))]
        run(engine)
        results.append([tokens(s) for s in streams])
        assert all(len(t) == 30 for t in results[-1]) and emptied(engine)
    assert results[0] == results[1], (SEED, c)
    assert all(s.drafted for s in streams) and engine.drafts.room == engine.store.positions


def test_a_block_drafter_of_a_served_model(tmp_path):
    "From a folder, behind a cached prefix, and on the C++ path: the taps are those of the readable blocks"
    model, r = made(v4)
    spark = Model.init_weights(DSpark(model.config, (0, 2), 3, 1, 4), .3)
    source = draft_source(str(save_drafter(spark, tmp_path)), None, model)
    text, found = [r.randrange(256) for _ in range(40)], []
    for kind in ('reference', 'auto'):
        with use(kind), torch.no_grad(), keep_taps(model, source.taps) as kept:
            cache = model.new_cache(1)
            for part in (text[:20], text[20:21], text[21:]): model.hidden(torch.tensor([part]), cache)
        found.append(torch.cat(kept, 1))
    assert len(kept) == 3 and torch.allclose(*found, atol=1e-4)
    engine, asked = Engine(model, Bytes(), page=16, draft=source), Request(text, SamplingParams(seed=1), max_tokens=8, stop_ids=())
    first, second = engine.submit(asked), None
    run(engine)
    second = engine.submit(asked)
    run(engine)
    assert tokens(first) == tokens(second) and second.usage.prompt_cache_hit_tokens and second.drafted
    with pytest.raises(ValueError, match='the drafter was made for'): Engine(Model(v32(r), torch.float32, 'meta'), Bytes(), draft=source)


def test_v4_without_kernels():
    "In chunks and batches, without the promise of bits, the answers are those of `generate`; with it, each token is computed alone"
    model, r = made(v4)
    prompts = [[r.randrange(256) for _ in range(n)] for n in (140, 7, 60)]
    for exact in (False, True):
        with use('reference'):
            engine = Engine(model, Bytes(), budget=50, exact=exact)
            assert engine.exact == engine.single == exact
            streams = [engine.submit(Request(p, SamplingParams(temperature=0.), max_tokens=9, stop_ids=())) for p in prompts]
            run(engine)
        for p,stream in zip(prompts, streams, strict=True):
            with use('reference'): want = model.generate(torch.tensor([p]), max_new_tokens=9, eos_token_id=-1)[0, len(p):].tolist()
            assert [t[0] for t in tokens(stream)] == want
    with use('reference'), pytest.warns(UserWarning, match='a draft may change a token'): Engine(model, Bytes(), draft='lookup')


def test_a_step_of_v4_is_one_call(monkeypatch):
    "Eight rows that read their prompts and answer: as many calls of the kernel as steps, and as many steps as of another model"
    assert v4_kernels.ready(), v4_kernels.failed
    model, r = made(v4)
    prompts, steps = [[r.randrange(256) for _ in range(150)] for _ in range(8)], []
    for m in (model, made(v32)[0]):
        engine, calls, real = Engine(m, Bytes(), page=64), [], v4_kernels.v4_step
        with monkeypatch.context() as patched:
            patched.setattr(v4_kernels, 'v4_step', lambda x, *args, real=real, calls=calls: (calls.append(len(x)), real(x, *args))[1])
            for p in prompts: engine.submit(Request(p, SamplingParams(temperature=0.), max_tokens=20, stop_ids=()))
            run(engine)
        steps.append(engine.stats.steps)
        if m is model: assert len(calls) == engine.stats.steps and sum(calls) == 8*(150 + 19)
    assert steps[0] <= steps[1] + 8 # a chunk ends where a prompt could be continued


def test_adapters_of_v4(tmp_path):
    "A row with an adapter beside rows without one: the bits of each alone"
    model, r = made(v4)
    other = Model(model.config, torch.float32, 'cpu').init_weights(.3)
    LoraConfig(r=2, target_modules='all-linear').apply(other)
    for w in lora_weights(other).values():
        for a in w.adapters.values(): torch.nn.init.normal_(a.b, std=.3)
    folder = other.save_adapter(tmp_path)
    asked = [Request([r.randrange(256) for _ in range(n)], SamplingParams(seed=n, logprobs=1), max_tokens=9, stop_ids=(), adapter=name)
             for n,name in ((70, None), (50, 'own'), (9, None))]
    found = []
    for together in (True, False):
        engine = Engine(model, Bytes(), budget=64 if together else 7)
        engine.adapters.load('own', folder)
        streams = []
        for request in asked:
            streams.append(engine.submit(request))
            if not together: run(engine)
        run(engine)
        found.append([tokens(s) for s in streams])
    assert found[0] == found[1] and len({*map(len, found[0])}) == 1
    plain = Engine(model, Bytes())
    stream = plain.submit(replace(asked[1], adapter=None))
    run(plain)
    assert tokens(stream) != found[0][1], 'the adapter changes the answer'


def test_memory_of_v4():
    "Formulas to the byte, for random models and lengths; evicted least recently used, states inside of prompts first"
    for seed in range(3):
        model, r = made(v4, f'{SEED} {seed}')
        c, rewinds = model.config, r.choice([0, 5])
        pool = RowPool(c, 10**7, r.choice([8, 128]), rewinds=rewinds)
        snapshots, cache, ids = Snapshots(pool), OwnedCache(pool), [r.randrange(256) for _ in range(3*pool.page + 1)]
        while len(cache) < len(ids):
            n = min(r.randrange(1, 100), pool.page - len(cache) % pool.page, len(ids) - len(cache))
            model.ragged(torch.tensor(ids[len(cache):][:n]), [cache], [n])
            snapshots.insert(ids, cache, '')
            assert pool.rows == cache.nbytes == pool.row_bytes(len(cache))
        borders = [pool.page*i for i in (1, 2, 3)]
        assert pool.kept == 3*block_bytes(c, pool.page, 4) + sum(state_bytes(c, at, 4) for at in borders)
        other = OwnedCache(pool)
        restore(other, [b.entries for b in snapshots.match(ids)], snapshots.match(ids)[-1].state, pool.page)
        cache.rewind(len(cache) - 3*pool.page if rewinds else 0)
        assert len(other) == 3*pool.page and all(torch.equal(a, b) for a, b in zip(*(
            [t for s in o.slots for x in s.lists for t in (x.entries[:, :len(other)//x.m],)] for o in (cache, other)), strict=True))
        snapshots.evict(state_bytes(c, borders[0], 4) + 1)
        assert [b.state is not None for b in snapshots.match(ids)] == [False, False, True]
        assert not snapshots.match(ids[:2*pool.page]), 'blocks without a state at their end are no prefix'
        snapshots.clear()
        for o in (cache, other): o.free()
        assert pool.rows == pool.kept == 0


def test_a_failed_step_forgets_the_row(monkeypatch):
    "A ring may be overwritten when a step fails: nothing of it is kept, and the engine goes on"
    model, _ = made(v4)
    engine, asked = Engine(model, Bytes(), page=16), Request([3]*40, SamplingParams(seed=1), max_tokens=4, stop_ids=())
    want = engine.submit(asked)
    run(engine)
    engine.store.clear()
    with monkeypatch.context() as patched:
        real, calls = ragged.run_rows, []
        def fails(x, blocks, batch):
            calls.append(real(x, blocks, batch)) # the rings are written
            if len(calls) > 1: raise MemoryError('too little')
            return calls[-1]
        patched.setattr(ragged, 'run_rows', fails)
        bad = engine.submit(asked)
        with pytest.raises(MemoryError): run(engine)
        for row in [*engine.rows]: engine.finish(row, 'error', MemoryError())
    again = engine.submit(asked)
    run(engine)
    assert bad.finish == 'error' and tokens(again) == tokens(want) and emptied(engine)


def test_prefixes_of_v4_on_disk(tmp_path):
    "Another engine finds prompts again: the same bits, for the user alone, in files of the formula's size; bad files are ignored"
    model, r = made(v4)
    ids = [r.randrange(256) for _ in range(3*border_distance(model.config, 16) + 5)]
    asked = Request(ids, SamplingParams(seed=1, logprobs=1), max_tokens=6, stop_ids=())
    def served(request, **kw):
        engine = Engine(model, Bytes(), page=16, folder=tmp_path, **kw)
        stream = engine.submit(request)
        run(engine)
        return engine, tokens(stream), stream.usage.prompt_cache_hit_tokens
    engine, want, hits = served(asked)
    c, page = model.config, engine.pool.page
    assert not hits
    of = lambda n, states: n*(32 + block_bytes(c, page, 4)) + states*(32 + state_bytes(c, c.window, 4))
    assert engine.store.store.nbytes == of(3, 1), (SEED, c)
    found, got, hits = served(asked)
    assert (got, hits) == (want, 3*page) and found.pool.kept == sum(b.nbytes for b in found.store.blocks.values())
    assert served(replace(asked, user='bob'))[1:] == (want, 0)
    path = (store := engine.store.store.states).path(store.keys(ids)[2])
    path.write_bytes((data := path.read_bytes())[:-1] + bytes([data[-1] ^ 1]))
    with pytest.warns(UserWarning, match='is damaged; it is ignored'): assert served(asked)[1:] == (want, 0)
    assert served(asked)[1:] == (want, 3*page), 'a damaged file is written again'
    (store := engine.store.store.entries).path(store.keys(ids)[1]).unlink()
    assert served(asked)[1:] == (want, 0)
    with pytest.raises(ValueError, match='there is no folder'): Engine(model, Bytes(), disk_nbytes=2**20)
    bounded = served(replace(asked, user='eve'), disk_nbytes=of(3, 1) + 10)[0]
    assert bounded.store.store.nbytes <= of(3, 1) + 10


def test_what_v4_has_not():
    model, _ = made(v4)
    with pytest.raises(ValueError, match='kv_cache is .*; the cache of a deepseek_v4 model is kept in its dtype'):
        Engine(model, Bytes(), kv_cache='int8')
    engine = Engine(model, Bytes(), nbytes=RowPool(model.config, 0).row_bytes(128))
    with pytest.raises(ValueError, match='130 tokens need more than the'): engine.submit(Request([1]*120, max_tokens=10))
    assert isinstance(engine.store, OwnedRows) and engine_module.store_for

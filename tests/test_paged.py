"Paged caches against contiguous ones: no page leaked, none shared wrongly, the same tokens whatever is forked, freed, reused or evicted."
import gc
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deepseek_nb.arch.cache import Cache, cache_shapes
from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer.generate import left_padded
from deepseek_nb.infer.paged import PagedCache, PagePool, PoolFull, gather, page_bytes

GQA = Config('llama', vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=64, n_kv_heads=2, head_dim=8, max_positions=96)
MLA = Config('deepseek_v3', vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=64, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             moe_inter_dim=16, score_func='sigmoid', score_bias=True, norm_topk=True, max_positions=96, rope=Rope(interleaved=True))
CONFIGS = dict(gqa=GQA, mla=MLA)


def made(config, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Model(config, dtype, 'cpu').requires_grad_(False).init_weights(std=.3)


MODELS = {name: made(c) for name,c in CONFIGS.items()}


@pytest.fixture(params=MODELS)
def model(request): return MODELS[request.param]


def check_pool(pool, caches, held=()):
    "Reference counts are the owners, free pages are the others, and no page that can be written has two."
    owners = Counter(p for c in caches for t in c.tables for p in t)
    owners.update(held)
    assert pool.refs == [owners[p] for p in range(pool.pages)]
    assert sorted(pool.free) == [p for p in range(pool.pages) if not owners[p]]
    for c in caches:
        if c.table is None: continue
        assert c.table.tolist() == c.tables
        for t in c.tables: assert all(owners[p] == 1 for p in t[c.length//pool.page:])


def stored(cache):
    "What a cache holds, a list a layer, by the block table alone."
    pick = lambda x, t: torch.cat([x[p] for p in t], -2)[..., :len(cache), :] if t else x[0][..., :0, :]
    return [[torch.stack([pick(x, t) for t in cache.tables]) for x in layer] for layer in cache.pool.layers]


# ---- caches against lists of what they should hold

class Caches(RuleBasedStateMachine):
    "Caches in one small pool, beside the numbers that each of their rows was given."
    pick = st.integers(0, 9)

    @initialize(config=st.sampled_from([*CONFIGS.values()]), page=st.integers(1, 5), pages=st.integers(1, 14), evicts=st.booleans())
    def begin(self, config, page, pages, evicts):
        self.c,self.pool,self.caches,self.expected,self.held,self.next = config,PagePool(config, pages, page),[],[],[],1.
        if evicts: self.pool.on_full = self.evict
        self.make(1)

    def evict(self):
        "Give up pages until one is free."
        while self.held and not self.pool.free: self.pool.drop(self.held.pop(0)[0])

    def numbers(self, batch, s):
        "Numbers that were never seen before, for all layers: `b s` of them, each fills a position."
        n = torch.arange(batch*s, dtype=torch.float32).view(batch, s) + self.next
        self.next += batch*s
        return n

    def write(self, cache, n):
        for i,slot in enumerate(cache.slots):
            new = [torch.empty(s).copy_(n.view(len(n), *[1]*(len(s)-3), -1, 1)) + 1000*i
                   for s in cache_shapes(self.c, cache.batch, n.shape[1])]
            old = slot.append(*new)
        return old

    def needed(self, cache, s):
        "Pages that room for `s` positions takes: new ones, and copies for all owners but one of a page that will be written."
        page,tails = self.pool.page,Counter(p for t in cache.tables for p in t[len(cache)//self.pool.page:])
        copies = sum(k - (self.pool.refs[p] == k) for p,k in tails.items())
        return copies + sum(max(-(-(len(cache) + s)//page) - len(t), 0) for t in cache.tables)

    def at(self, i): return i % len(self.caches)

    @precondition(lambda self: len(self.caches) < 4)
    @rule(batch=st.integers(1, 3))
    def make(self, batch):
        self.caches.append(PagedCache(self.pool, batch))
        self.expected.append(torch.zeros(batch, 0))

    @rule(i=pick, pieces=st.lists(st.integers(1, 5), min_size=1, max_size=2), more=st.integers(0, 6))
    def extend(self, i, pieces, more):
        "Room for all pieces and more at once, then one after the other."
        cache,before = self.caches[i := self.at(i)],len(self.caches[i])
        short = self.needed(cache, sum(pieces) + more) > len(self.pool.free)
        try: cache.reserve(sum(pieces) + more)
        except PoolFull as e:
            assert str(e).startswith(f'all {self.pool.pages} pages of {self.pool.page} positions are in use') and '\n' not in str(e)
            assert short and not self.held*bool(self.pool.on_full) and len(cache) == before, 'full, and nothing is lost'
            return
        assert not short or self.pool.on_full
        for s in pieces:
            old = self.write(cache, n := self.numbers(cache.batch, s))
            self.expected[i] = torch.cat([self.expected[i], n], 1)
            cache.advance(s)
            for x in old: assert x.shape[-2] == len(cache), 'what attention sees ends with what is new'

    @rule(i=pick, s=st.integers(0, 9))
    def reserve(self, i, s):
        cache = self.caches[self.at(i)]
        try: cache.reserve(s)
        except PoolFull: assert cache.table is None
        else: assert cache.capacity >= len(cache) + s

    @rule(i=pick, n=st.integers(0, 8))
    def rewind(self, i, n):
        cache,n = self.caches[i := self.at(i)],min(n, len(self.caches[i]))
        cache.rewind(n)
        self.expected[i] = self.expected[i][:, :len(cache)]
        assert all(len(t) == -(-len(cache)//self.pool.page) for t in cache.tables), 'pages behind the end are given back'

    @precondition(lambda self: len(self.caches) < 5)
    @rule(i=pick, rows=st.lists(pick, min_size=1, max_size=4))
    def fork(self, i, rows):
        cache,free = self.caches[i := self.at(i)],len(self.pool.free)
        cache.rewind(0)
        free,rows = len(self.pool.free),[r % cache.batch for r in rows]
        self.caches.append(cache.fork(rows))
        self.expected.append(self.expected[i][rows])
        assert len(self.pool.free) == free, 'a fork takes no page'

    @rule(i=pick)
    def free(self, i):
        self.caches[i := self.at(i)].free()
        self.expected[i] = self.expected[i][:, :0]

    @precondition(lambda self: len(self.caches) > 1)
    @rule(i=pick)
    def forget(self, i):
        "Without `free`: pages come back when the cache is no more."
        del self.caches[i := self.at(i)], self.expected[i]

    @rule(i=pick, row=pick)
    def hold(self, i, row):
        "Own a page beside its cache, as a prefix tree does."
        cache = self.caches[i := self.at(i)]
        if not (whole := len(cache)//self.pool.page): return
        page = self.pool.share(cache.tables[row % cache.batch][whole-1])
        self.held.append((page, self.expected[i][row % cache.batch, (whole-1)*self.pool.page:whole*self.pool.page]))

    @rule(i=pick)
    def misuse(self, i):
        "Errors in one line, and nothing changes."
        cache,shapes = self.caches[i := self.at(i)],cache_shapes(self.c, self.caches[i].batch, 1)
        before = [list(t) for t in cache.tables]
        for said,bad in (('cannot rewind', lambda: cache.rewind(len(cache) + 1)), ('cannot fork rows', lambda: cache.fork([cache.batch])),
                         ('cannot fork rows', lambda: cache.fork([])), ('longer than max_positions', lambda: cache.reserve(97)),
                         ('make a cache for this model and batch', lambda: cache[0].append(*(torch.zeros(*s, 1) for s in shapes))),
                         ('no pages for', lambda: cache[0].append(*(torch.zeros(s) for s in cache_shapes(self.c, cache.batch, 90))))):
            with pytest.raises(ValueError, match=said) as e: bad()
            assert '\n' not in str(e.value)
            del e  # it knows this frame, and the frame the cache
        assert before == cache.tables

    @invariant()
    def exact(self):
        if not hasattr(self, 'pool'): return
        check_pool(self.pool, self.caches, [p for p,_ in self.held])
        for cache,n in zip(self.caches, self.expected, strict=True):
            assert len(cache) == n.shape[1] and cache.nbytes == len({p for t in cache.tables for p in t})*self.pool.page_bytes
            for i,layer in enumerate(stored(cache)):
                for x in layer: assert torch.equal(x, (n + 1000*i).view(len(n), *[1]*(x.ndim-3), -1, 1).expand_as(x))
        for page,n in self.held:
            for i,layer in enumerate(self.pool.layers):
                for x in layer: assert torch.equal(x[page], (n + 1000*i)[:, None].expand_as(x[page])), 'written by another owner'

    def teardown(self):
        if not hasattr(self, 'pool'): return
        for cache in self.caches: cache.free()
        for page,_ in self.held: self.pool.drop(page)
        assert sorted(self.pool.free) == [*range(self.pool.pages)] and not any(self.pool.refs)


Caches.TestCase.settings = settings(max_examples=250, stateful_step_count=50, deadline=None, suppress_health_check=[*HealthCheck])
TestCaches = Caches.TestCase


# ---- models with paged caches against models without any

class Decoding(RuleBasedStateMachine):
    "Logits of a model with paged caches beside those of all tokens at once, without a cache."
    pick,tokens = st.integers(0, 9),st.integers(0, 31)

    @initialize(which=st.sampled_from([*MODELS]), page=st.sampled_from([1, 3, 16]), how=st.sampled_from(['auto', 'reference']))
    def begin(self, which, page, how):
        self.model,self.how,self.kept = MODELS[which],how,[]
        self.pool = PagePool(self.model.config, 90//page, page)
        self.pool.on_full = lambda: self.kept and self.kept.pop(0).free()
        self.caches = [PagedCache(self.pool)]
        self.ids = [torch.zeros(1, 0, dtype=torch.long)]

    @rule(i=pick, s=st.integers(1, 6), seed=st.integers(0, 99))
    def feed(self, i, s, seed):
        cache,ids = self.caches[i := i % len(self.caches)],self.ids[i % len(self.caches)]
        new = torch.randint(32, (len(ids), s), generator=torch.Generator().manual_seed(seed))
        if len(cache) + s > 40: return
        with use(self.how):
            try: got = self.model(new, cache)
            except PoolFull: return
            self.ids[i] = torch.cat([ids, new], 1)
            expected = self.model(self.ids[i])[:, -s:]
        assert torch.allclose(got, expected, atol=2e-4, rtol=1e-4) and torch.equal(got.argmax(-1), expected.argmax(-1))

    @rule(i=pick, n=st.integers(0, 9))
    def rewind(self, i, n):
        cache = self.caches[i := i % len(self.caches)]
        cache.rewind(n := min(n, len(cache)))
        self.ids[i] = self.ids[i][:, :len(cache)]

    @precondition(lambda self: len(self.caches) < 3)
    @rule(i=pick, rows=st.lists(pick, min_size=1, max_size=3))
    def fork(self, i, rows):
        cache,ids = self.caches[i := i % len(self.caches)],self.ids[i % len(self.caches)]
        rows = [r % cache.batch for r in rows]
        self.caches.append(cache.fork(rows))
        self.ids.append(ids[rows])

    @precondition(lambda self: len(self.caches) > 1)
    @rule(i=pick, keep=st.booleans())
    def leave(self, i, keep):
        "Its pages come back, at once or when others need them."
        i = i % len(self.caches)
        cache,_ = self.caches.pop(i),self.ids.pop(i)
        if keep: self.kept.append(cache)

    @rule(i=pick)
    def restart(self, i):
        self.caches[i := i % len(self.caches)].free()
        self.ids[i] = self.ids[i][:, :0]

    @invariant()
    def counted(self):
        if hasattr(self, 'pool'): check_pool(self.pool, self.caches + self.kept)


Decoding.TestCase.settings = settings(max_examples=100, stateful_step_count=30, deadline=None, suppress_health_check=[*HealthCheck])
TestDecoding = Decoding.TestCase


def prompts(n, seed=0):
    "Ragged prompts."
    rng = random.Random(seed)
    return [[rng.randrange(32) for _ in range(rng.randint(1, 20))] for _ in range(n)]


@pytest.mark.parametrize('page', [1, 3, 16])
@pytest.mark.parametrize('batch', [1, 3])
def test_generate_across_calls(model, page, batch):
    "The same tokens call after call, from a paged cache, a plain one, and none."
    ids,mask = left_padded(prompts(batch, seed=batch))
    pool = PagePool(model.config, 200//page*batch, page)
    paged,plain,kw = PagedCache(pool, batch),model.new_cache(batch),dict(eos_token_id=[], attention_mask=mask)
    want = model.generate(ids, 24, **kw)
    for n in range(6, 25, 6):
        out = want[:, :ids.shape[1] + n - 6]
        got = [model.generate(out, 6, past_key_values=c, **kw) for c in (paged, plain)]
        kw['attention_mask'] = None if n == 6 else torch.cat([mask, torch.ones(batch, n, dtype=torch.long)], 1)  # may be left out
        assert torch.equal(got[0], want[:, :ids.shape[1] + n]) and torch.equal(got[1], got[0])
        assert len(paged) == len(plain) == got[0].shape[1] - 1
    check_pool(pool, [paged])
    again = model.generate(ids, 6, cache=paged, eos_token_id=[])
    assert torch.equal(again, want[:, :ids.shape[1] + 6]), 'a shorter prompt rewinds'


def test_a_freed_cache_serves_another_prompt(model):
    pool = PagePool(model.config, 12, 4)
    with PagedCache(pool) as cache:
        for seed in range(4):
            ids = torch.tensor(prompts(1, seed))
            assert torch.equal(model.generate(ids, 10, cache=cache, eos_token_id=[]), model.generate(ids, 10, eos_token_id=[]))
            cache.free()
    assert len(pool.free) == 12


def test_sampling_and_stream(model):
    ids,kw = torch.tensor(prompts(2, 5)[:1]),dict(temperature=1., top_p=.9, seed=4, repetition_penalty=1.1, eos_token_id=[])
    cache = PagedCache(PagePool(model.config, 20, 4))
    assert torch.equal(torch.stack([*model.stream(ids, 9, cache=cache, **kw)], 1), model.generate(ids, 9, **kw)[:, ids.shape[1]:])


def rows_of(cache, rows):
    "A contiguous cache with some rows of another, copied."
    new = Cache(cache.c, len(rows), cache.capacity, cache.dtype)
    for a,b in zip(new.slots, cache.slots, strict=True): a.tensors = [x[rows].clone() for x in b.tensors]
    new.length,new.pad = cache.length,None if cache.pad is None else cache.pad[rows]
    return new


def beams(model, ids, cache, pick, n, width=3):
    "Beam search; `pick` makes a cache of some rows of another."
    logp = model(ids, cache, logits_to_keep=1)[:, -1].log_softmax(-1)
    scores,tokens = logp[0].topk(width)
    cache,ids = pick(cache, [0]*width),torch.cat([ids.expand(width, -1), tokens[:, None]], 1)
    came_from = []
    for _ in range(n):
        logp = model(ids[:, -1:], cache)[:, -1].log_softmax(-1) + scores[:, None]
        scores,best = logp.flatten().topk(width)
        rows,tokens = (best//32).tolist(),best % 32
        came_from.append(rows)
        cache,ids = pick(cache, rows),torch.cat([ids[rows], tokens[:, None]], 1)
    return ids,scores,came_from,cache


@pytest.mark.parametrize('page', [1, 4, 16])
def test_beams(model, page):
    pool,ids = PagePool(model.config, 160//page, page),torch.tensor([[*range(1, 12)]])
    got,scores,rows,cache = beams(model, ids, PagedCache(pool), PagedCache.fork, 14)
    want,expected,same,_ = beams(model, ids, model.new_cache(1), rows_of, 14)
    assert torch.equal(got, want) and torch.allclose(scores, expected, atol=1e-4) and rows == same
    assert any(len(set(r)) < 3 for r in rows), 'a beam was continued twice'
    gc.collect()
    check_pool(pool, [cache])
    if page == 1: assert len(cache.pages) < 3*len(cache), 'beams share their beginning'


def test_fork_of_padded_rows(model):
    ids,mask = left_padded([[1, 2, 3, 4, 5], [6, 7]])
    pool = PagePool(model.config, 20, 4)
    paged,plain = PagedCache(pool, 2),model.new_cache(2)
    for c in (paged, plain): model(ids, c, attention_mask=mask)
    new = torch.tensor([[8], [9], [10]])
    got = model(new, paged.fork([0, 0, 1]))
    assert torch.allclose(got, model(new, rows_of(plain, [0, 0, 1])), atol=1e-4)
    assert torch.allclose(got[2, -1], model(torch.tensor([[6, 7, 10]]))[0, -1], atol=1e-4), 'padding is not seen'
    assert torch.allclose(model(new[:2], paged), model(new[:2], plain), atol=1e-4), 'the rows it came from go on as before'


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_gather_is_the_definition(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    heads,b,n = [draw(1, 3) for _ in range(draw(0, 1))],draw(1, 3),draw(1, 4)
    x = torch.arange(float(6*(heads or [1])[0]*3*2)).view(6, *heads, 3, 2)
    table = torch.tensor([[draw(0, 5) for _ in range(n)] for _ in range(b)])
    want = torch.stack([torch.cat([x[p] for p in row], -2) for row in table.tolist()])
    assert torch.equal(gather(x, table), want)


# ---- size and errors

@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_bytes(config, dtype):
    pool = PagePool(config, 7, 5, dtype)
    held = sum(x.nbytes for layer in pool.layers for x in layer)
    assert held == pool.nbytes == 7*pool.page_bytes == 7*5*config.cache_bytes_per_token(dtype.itemsize) == 7*page_bytes(config, 5, dtype)
    small = PagePool.sized(config, held - 1, 5, dtype)
    assert small.pages == 6 and small.nbytes <= held - 1
    assert f'0 of 7 pages of 5 positions in use, {held:,} bytes' in repr(pool)
    cache = PagedCache(pool, 2)
    cache.reserve(6)
    assert repr(cache) == f'PagedCache(2×0 positions in 4 pages, {4*pool.page_bytes:,} bytes)' and '4 of 7 pages' in repr(pool)


def test_a_full_pool_loses_nothing(model):
    pool,ids = PagePool(model.config, 6, 4),torch.tensor([[*range(20)]])
    first,second = PagedCache(pool),PagedCache(pool)
    model(ids, first)
    with pytest.raises(PoolFull, match=r'all 6 pages of 4 positions are in use \([\d,]+ bytes\); free a cache or enlarge the pool') as e:
        model.generate(ids[:, :6], 5, cache=second)
    assert '\n' not in str(e.value) and isinstance(e.value, ValueError)
    check_pool(pool, [first, second])
    assert len(second) == 0
    with pytest.raises(PoolFull): model.generate(ids, 20, cache=first, eos_token_id=[])
    check_pool(pool, [first, second])
    assert len(first) == 24, 'all that there were pages for'
    first.free()
    assert torch.equal(model.generate(ids[:, :6], 5, cache=second), model.generate(ids[:, :6], 5))


def test_an_error_in_the_middle_loses_nothing(model):
    pool = PagePool(model.config, 8, 4)
    cache = PagedCache(pool, 2)
    model(torch.ones(2, 6, dtype=torch.long), cache)
    def fail(): raise RuntimeError('on_full failed')
    pool.on_full = fail
    with pytest.raises(RuntimeError, match='on_full failed'): cache.reserve(20)
    check_pool(pool, [cache])
    assert all(len(t) == 2 for t in cache.tables) and len(cache) == 6


def test_a_cache_of_another_model_or_batch(model):
    other = MODELS['gqa' if model is MODELS['mla'] else 'mla']
    deeper = made(replace(model.config, n_layers=3))
    ids = torch.ones(1, 3, dtype=torch.long)
    for bad,said in ((PagedCache(PagePool(other.config, 4, 4)), 'make a cache for this model and batch'),
                     (PagedCache(PagePool(model.config, 4, 4), 2), 'cache has 2 rows, tokens have 1; make a new cache for this batch'),
                     (PagedCache(PagePool(model.config, 4, 4, torch.half)), 'cache is torch.float16, .* torch.float32; make')):
        with pytest.raises(ValueError, match=said) as e: model.generate(ids, 2, past_key_values=bad)
        assert '\n' not in str(e.value) and len(bad) == 0
    with pytest.raises(ValueError, match='make (a cache|one) for this model') as e:
        deeper.generate(ids, 2, past_key_values=PagedCache(PagePool(model.config, 4, 4)))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('config', CONFIGS.values(), ids=CONFIGS)
def test_bad_input(config):
    for pages,page in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match=f'a pool needs at least 1 page of at least 1 position, not {pages} pages of {page}'):
            PagePool(config, pages, page)
    with pytest.raises(ValueError, match=r'a budget of 10 bytes is smaller than one page of [\d,]+ bytes; raise the budget'):
        PagePool.sized(config, 10)
    with pytest.raises(ValueError, match='not 1 pages of 0'): PagePool.sized(config, 10**6, page=0)
    pool = PagePool(config, 4, 4)
    with pytest.raises(ValueError, match='a cache needs at least 1 row, not 0'): PagedCache(pool, 0)
    for p in (-1, 0, 4):
        for name in ('share', 'drop'):
            with pytest.raises(ValueError, match=f'cannot {name} page {p}: it is not in use'): getattr(pool, name)(p)
    with pytest.raises(ValueError, match='5 positions take 2 pages of 4 a row, not'): PagedCache.from_pages(pool, [[0]], 5)
    page = pool.take()
    with pytest.raises(ValueError, match='cannot share page'): PagedCache.from_pages(pool, [[page, (page + 1) % 4]], 5)
    gc.collect()
    assert pool.refs.count(1) == 1 and pool.refs[page] == 1, 'what was shared before the error is given back'


def test_gradients_do_not_pass():
    "Pages hold numbers: nothing is kept of how they were computed."
    torch.manual_seed(0)
    model = Model(GQA, torch.float32, 'cpu')
    cache = PagedCache(PagePool(GQA, 8, 4))
    for _ in range(2): model(torch.ones(1, 3, dtype=torch.long), cache).sum().backward()
    assert not any(x.requires_grad for layer in cache.pool.layers for x in layer)
    assert model.embed_tokens.weight.grad.isfinite().all()

"The prefix cache: a tree that forgets in order, pages that are neither lost nor shared wrongly, and files that are whole or not used."
import errno
import os
import signal
import time
import warnings
from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
import warm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import deepseek_nb.infer.persist as persist
from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.infer.paged import PagedCache, PagePool, PoolFull
from deepseek_nb.infer.persist import START, PageStore, checksum, fingerprint, from_bytes, to_bytes, word_sums
from deepseek_nb.infer.prefix import PrefixCache, RadixTree, Usage

GQA = Config('llama', vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=64, n_kv_heads=2, head_dim=8, max_positions=96)
MLA = Config('deepseek_v3', vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=64, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
             moe_inter_dim=16, score_func='sigmoid', score_bias=True, norm_topk=True, max_positions=96, rope=Rope(interleaved=True))
PAGE = 4
PROMPT = [*range(1, 31)]


def made(config, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return Model(config, dtype, 'cpu').requires_grad_(False).init_weights(std=.3)


MODELS = dict(gqa=made(GQA), mla=made(MLA))


@pytest.fixture(params=MODELS)
def model(request): return MODELS[request.param]


def new(model, pages=40, **kw):
    prefix = PrefixCache(model, nbytes=pages*PagePool(model.config, 1, PAGE).page_bytes, page=PAGE, **kw)
    assert prefix.pool.pages == pages
    return prefix


ANSWERS = {}


def alone(model, ids, n=6):
    "What the model gives without a prefix cache."
    key = model.config.model_type, *ids
    if len(ANSWERS.get(key, '')) < len(ids) + n: ANSWERS[key] = model.generate(torch.tensor([ids]), max(n, 6), eos_token_id=[])[0].tolist()
    return ANSWERS[key][:len(ids) + n]


def ask(prefix, ids, n=6, **kw):
    "Tokens and hits of a request, checked against the model alone."
    out,usage = prefix.generate(ids, max_new_tokens=n, eos_token_id=[], **kw)
    assert out[0].tolist() == alone(prefix.model, ids, n)
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens == len(ids)
    assert usage.completion_tokens == n and usage.total_tokens == len(out[0])
    return usage.prompt_cache_hit_tokens


# ---- the tree against a list of all beginnings

class Forest(RuleBasedStateMachine):
    "A radix tree beside a dictionary: (user, beginning) -> its page and when it was used."
    ids = st.lists(st.integers(0, 1), max_size=9)
    users = st.sampled_from(['', 'a'])

    def __init__(self):
        super().__init__()
        self.tree,self.known,self.clock,self.next = RadixTree(page=2),{},0,0

    def touch(self, ids, user):
        self.clock += 1
        found = []
        for n in range(2, len(ids)+1, 2):
            if (entry := self.known.get((user, tuple(ids[:n])))) is None: break
            entry[1] = self.clock
            found.append(entry[0])
        return found

    def leaves(self):
        inner = {(user, ids[:-2]) for user,ids in self.known}
        return {k: v for k,v in self.known.items() if k not in inner}

    @rule(ids=ids, user=users)
    def match(self, ids, user): assert self.tree.match(ids, user) == self.touch(ids, user)

    @rule(ids=ids, user=users)
    def insert(self, ids, user):
        found = self.touch(ids, user)
        assert self.tree.match(ids, user) == found
        fresh = [*range(self.next, self.next + len(ids)//2 - len(found))]
        self.next += len(fresh)
        assert self.tree.insert(ids, found + fresh, user) == fresh
        self.clock += 1
        for i,p in enumerate(found + fresh): self.known[user, tuple(ids[:2*i+2])] = [p, self.clock]

    @rule(n=st.integers(0, 4), kept=st.integers(0, 4))
    def evict(self, n, kept):
        kept = {p for p,_ in [*self.known.values()][:kept]}
        for p in (out := self.tree.evict(n, busy=kept.__contains__)):
            leaves = self.leaves()
            key = next(k for k,v in leaves.items() if v[0] == p)
            assert p not in kept
            assert self.known[key][1] == min(t for q,t in leaves.values() if q not in kept)
            del self.known[key]
        if len(out) < n: assert {p for p,_ in self.leaves().values()} <= kept

    @invariant()
    def same(self):
        assert sorted(p for node in self.tree.nodes() for p in node.pages) == sorted(p for p,_ in self.known.values())
        assert self.tree.size == len(self.known)
        assert set(self.tree.roots) == {u for u,_ in self.known}


Forest.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestForest = Forest.TestCase


# ---- requests in any order

class Service(RuleBasedStateMachine):
    "Requests of two users that start, run beside one another, stop and are forgotten, in little memory and on disk."
    ends = st.lists(st.integers(0, 2), min_size=1, max_size=6)
    prompts = st.tuples(st.sampled_from([0, 6, 13, 21]), ends).map(lambda o: PROMPT[:o[0]] + o[1])
    users = st.sampled_from(['', 'a'])

    @initialize(which=st.sampled_from([*MODELS]), pages=st.integers(28, 40), disk=st.sampled_from([None, 9, 1000]))
    def begin(self, which, pages, disk):
        import tempfile
        self.running,self.disk,self.folder = [],disk,None
        kw = {}
        if disk:
            self.folder = tempfile.TemporaryDirectory()
            kw = dict(folder=self.folder.name, disk_nbytes=disk*(START + PagePool(MODELS[which].config, 1, PAGE).page_bytes))
        self.prefix = new(MODELS[which], pages, **kw)
        self.asked,self.kept = {'': [], 'a': []},{'': [], 'a': []}

    def known(self, ids, earlier):
        "Tokens in whole pages that a prompt has in common with earlier ones of the same user."
        same = lambda o: next((i for i,(x,y) in enumerate(zip(o, ids, strict=False)) if x != y), min(len(o), len(ids)))
        return max([min(same(o), len(ids)-1)//PAGE*PAGE for o in earlier], default=0)

    @property
    def roomy(self): return self.disk == 1000 and not self.running

    @rule(ids=prompts, user=users, n=st.integers(1, 5))
    def ask(self, ids, user, n):
        hits = ask(self.prefix, ids, n, user=user)
        assert hits <= self.known(ids, self.asked[user])
        if self.roomy: assert hits >= self.known(ids, self.kept[user])
        self.asked[user].append(alone(self.prefix.model, ids, n)[:-1])
        if self.roomy: self.kept[user].append(self.asked[user][-1])

    @precondition(lambda self: len(self.running) < 2)
    @rule(ids=prompts, user=users)
    def start(self, ids, user):
        request = self.prefix.stream(ids, user, max_new_tokens=6, eos_token_id=[])
        self.running.append((request, alone(self.prefix.model, ids), len(ids)))

    @precondition(lambda self: self.running)
    @rule(i=st.integers(0, 1))
    def step(self, i):
        request,expected,s = self.running[i % len(self.running)]
        if request.usage.completion_tokens < 6: next(request)
        assert request.ids == expected[:s + request.usage.completion_tokens]
        self.asked[request.user].append(request.ids[:-1])

    @precondition(lambda self: self.running)
    @rule()
    def stop(self):
        request,*_ = self.running.pop(0)
        request.close()
        if self.roomy and request.usage.completion_tokens: self.kept[request.user].append(request.ids[:-1])

    @rule()
    def clear(self): self.prefix.clear()

    @invariant()
    def counted(self):
        if not hasattr(self, 'prefix'): return
        pool,tree = self.prefix.pool,self.prefix.tree
        owners = Counter(p for node in tree.nodes() for p in node.pages)
        assert max(owners.values(), default=1) == 1 and owners.total() == tree.size
        for request,*_ in self.running:
            if request.cache is not None: owners.update(request.cache.tables[0])
        assert pool.refs == [owners[p] for p in range(pool.pages)]
        assert sorted(pool.free) == [p for p in range(pool.pages) if not owners[p]]
        if self.disk: assert sum(size for _,size,_ in self.prefix.store.files()) <= self.prefix.store.nbytes

    def teardown(self):
        if not hasattr(self, 'prefix'): return
        for request,*_ in self.running: request.close()
        self.prefix.clear()
        assert len(self.prefix.pool.free) == self.prefix.pool.pages
        if self.folder: self.folder.cleanup()


Service.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[*HealthCheck])
TestService = Service.TestCase


# ---- hits, misses and users

def test_tokens_and_hits(model):
    prefix = new(model)
    assert ask(prefix, PROMPT) == 0
    assert ask(prefix, PROMPT) == 28
    assert ask(prefix, PROMPT[:28]) == 24, 'one token at least is computed'
    assert ask(prefix, PROMPT[:22] + [0, 0]) == 20
    assert ask(prefix, alone(model, PROMPT) + [3]) == 32, 'the answer is part of the next turn'
    assert ask(prefix, PROMPT[:3]) == 0
    assert ask(prefix, [5]) == 0


class Counted:
    "Counts the tokens that a model computes."
    def __init__(self, model): self.n,self.hook = 0,model.embed_tokens.register_forward_pre_hook(self.count)
    def count(self, embed, args): self.n += args[0].numel()
    def __enter__(self): return self
    def __exit__(self, *error): self.hook.remove()


requests = st.tuples(
    st.sampled_from([0, 3, 8, 13, 30]), st.lists(st.integers(0, 2), min_size=1, max_size=9), st.sampled_from(['', 'a']),
    st.sampled_from(['all', 'some', 'none', 'fails', 'clears']))


@given(which=st.sampled_from([*MODELS]), pages=st.sampled_from([3, 14, 40]), requests=st.lists(requests, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_hits_and_misses_are_the_prompt(which, pages, requests):
    "At every moment hits and misses add up to the prompt, and what the model computes before its first token are the misses."
    prefix = new(MODELS[which], pages)
    for n,ends,user,how in requests:
        ids = PROMPT[:n] + ends + [99]*(how == 'fails')
        def holds(request, ids=ids, done=0):
            u = request.usage
            assert u.prompt_cache_hit_tokens + u.prompt_cache_miss_tokens == u.prompt_tokens == len(ids)
            assert 0 <= u.prompt_cache_hit_tokens < len(ids) and u.prompt_cache_hit_tokens % PAGE == 0
            assert u.completion_tokens == done and u.total_tokens == len(ids) + done == len(request.ids)
        with Counted(prefix.model) as computed, prefix.stream(ids, user, max_new_tokens=4, eos_token_id=[]) as request:
            holds(request)
            if how == 'clears': prefix.clear()
            try:
                for done in range(dict(all=4, some=2, none=0).get(how, 1)):
                    next(request)
                    assert computed.n == request.usage.prompt_cache_miss_tokens + done
                    holds(request, done=done + 1)
            except PoolFull: assert pages < 40
            except ValueError as e: assert how == 'fails' and 'token id 99 is outside' in str(e)
            done = request.usage.completion_tokens
        holds(request, done=done)


def test_two_users_share_nothing(model, tmp_path):
    prefix = new(model, folder=tmp_path)
    assert ask(prefix, PROMPT, user='a') == 0
    assert ask(prefix, PROMPT, user='b') == ask(prefix, PROMPT) == 0
    mine = {u: set(prefix.tree.match(PROMPT, u)) for u in ('a', 'b', '')}
    keys = {u: set(prefix.store.keys(PROMPT, u)) for u in mine}
    for u,v in (('a', 'b'), ('a', ''), ('b', '')): assert not mine[u] & mine[v] and not keys[u] & keys[v]
    assert len([*tmp_path.glob('*.page')]) == 3*8
    assert new(model, folder=tmp_path).lookup(PROMPT, user='c') == 0
    assert new(model, folder=tmp_path).lookup(PROMPT, user='b') == 28


def test_many_users_leave_nothing_behind(model):
    prefix = new(model, pages=8)
    for i in range(20): ask(prefix, PROMPT, n=1, user=str(i))
    assert set(prefix.tree.roots) == {'19'}


def test_usage_has_the_names_of_the_api():
    assert Usage(5, 3, 1).to_dict() == dict(prompt_tokens=5, prompt_cache_hit_tokens=3, prompt_cache_miss_tokens=2, completion_tokens=1,
                                            total_tokens=6)


def test_sampling_follows_the_seed(model):
    prefix,kw = new(model),dict(max_new_tokens=8, temperature=1., top_p=.9, seed=3, repetition_penalty=1.2, eos_token_id=[])
    expected = model.generate(torch.tensor([PROMPT]), **kw)
    for _ in range(2): assert torch.equal(prefix.generate(PROMPT, **kw)[0], expected)


def test_an_end_token_ends_it(model):
    expected = alone(model, PROMPT)
    first = expected.index(expected[32], 30)
    out,usage = new(model).generate(PROMPT, max_new_tokens=6, eos_token_id=expected[32])
    assert out[0].tolist() == expected[:first+1] and usage.completion_tokens == first - 29


# ---- budgets

def test_least_recently_used_first(model):
    prefix,prompts = new(model, pages=21),[[i]*28 for i in range(3)]
    for p in prompts: ask(prefix, p, n=1)
    for i in (0, 2): assert ask(prefix, prompts[i], n=1) == 24
    ask(prefix, [9]*8, n=1)
    held = [len(prefix.tree.match(p)) for p in prompts]
    assert held == [7, 5, 7], 'two pages from the end of the prompt that was used longest ago'


def test_a_budget_below_one_request(model):
    prefix = new(model, pages=9)
    long = [*range(30)]
    for _ in range(2): ask(prefix, long)
    assert prefix.tree.size <= prefix.pool.pages
    with pytest.raises(ValueError, match='all 9 pages of 4 positions are in use'): ask(prefix, long[::-1]*2)
    assert ask(prefix, long) >= 0


def test_running_requests_keep_their_pages(model):
    prefix = new(model, pages=16)
    with prefix.stream(PROMPT, max_new_tokens=9, eos_token_id=[]) as request:
        next(request)
        for i in range(4): ask(prefix, [i]*24, n=2)
        assert len(prefix.tree.match(PROMPT)) == 7
        for _ in request: continue
    assert request.ids == alone(model, PROMPT, 9)


def test_a_memory_smaller_than_what_lies_on_disk(model, tmp_path):
    "What comes from disk takes no page of what it follows."
    ask(new(model, folder=tmp_path), PROMPT)
    small = new(model, pages=3, folder=tmp_path)
    assert [small.lookup(PROMPT) for _ in range(3)] == [12, 12, 12]
    assert len(set(small.pages(PROMPT))) == small.tree.size == 3


def test_a_closed_request_is_over(model):
    prefix = new(model)
    for _ in range(2):
        request = prefix.stream(PROMPT, max_new_tokens=9, eos_token_id=[])
        next(request)
        for _ in range(2): request.close()
        with pytest.raises(StopIteration): next(request)
        assert request.usage.completion_tokens == 1 and prefix.pool.refs.count(0) == prefix.pool.pages - prefix.tree.size


def test_memory_is_what_was_asked_for(model):
    prefix = PrefixCache(model, nbytes=100_000, page=PAGE)
    held = sum(x.nbytes for layer in prefix.pool.layers for x in layer)
    assert 100_000 - prefix.pool.page_bytes < held == prefix.pool.nbytes <= 100_000
    for i in range(20): ask(prefix, [i]*40, n=1)
    assert prefix.nbytes <= held == sum(x.nbytes for layer in prefix.pool.layers for x in layer)


def test_bad_input(model, tmp_path):
    prefix,other = new(model),MODELS['gqa' if model is MODELS['mla'] else 'mla']
    for cache in (other.new_cache(1), model.new_cache(2), made(model.config, dtype=torch.bfloat16).new_cache(1)):
        with pytest.raises(ValueError, match='must be a cache of this model with one row and no padding'): prefix.keep(PROMPT, cache)
    for cache in (PagedCache(PagePool(model.config, 9, 16)), PagedCache(PagePool(model.config, 9, PAGE))):
        model(torch.tensor([PROMPT]), cache)
        with pytest.raises(ValueError, match='must be a cache of this model with one row'): prefix.keep(PROMPT, cache)
    for pool in (PagePool(other.config, 9, PAGE), PagePool(model.config, 9, PAGE, torch.bfloat16)):
        with pytest.raises(ValueError, match='is a pool of another model'): PrefixCache(model, pool=pool)
    padded = model.new_cache(1)
    model(torch.tensor([PROMPT]), padded, attention_mask=torch.tensor([[0] + [1]*29]))
    with pytest.raises(ValueError, match='must be a cache of this model with one row and no padding'): prefix.keep(PROMPT, padded)
    for pool in (prefix.pool, PagePool(model.config, 9, PAGE)):
        pool.on_full = pool.on_full or (lambda: None)
        with pytest.raises(ValueError, match='give each prefix cache its own') as e: PrefixCache(model, pool=pool)
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match='is not a string'): prefix.keep(PROMPT, prefix.find(PROMPT), user=3)
    with pytest.raises(ValueError, match='disk_nbytes is 9, and there is no folder'): PrefixCache(model, disk_nbytes=9)
    with pytest.raises(ValueError, match='not 1 pages of 0'): PrefixCache(model, page=0)
    with pytest.raises(ValueError, match='is smaller than one page'): PrefixCache(model, nbytes=10)
    with pytest.raises(ValueError, match='is smaller than one page'): PrefixCache(model, 10**5, folder=tmp_path, disk_nbytes=10)
    with pytest.raises(ValueError, match='is not a string'): prefix.generate(PROMPT, user=None)
    with pytest.raises(ValueError, match=r'prompt has shape \(2, 3\)'): prefix.stream(torch.ones(2, 3, dtype=torch.long))
    for name in ('cache', 'past_key_values', 'attention_mask'):
        with pytest.raises(ValueError, match=f'{name} was given'): prefix.stream(PROMPT, **{name: torch.ones(1, 30)})
    for kw in (dict(max_new_tokens=-1), dict(temperature=-1.), dict(top_p=0.)):
        with pytest.raises(ValueError): prefix.stream(PROMPT, **kw)
    with pytest.raises(ValueError, match='longer than max_positions 96'): prefix.stream([1]*97)
    assert len(prefix.pool.free) == prefix.pool.pages


# ---- files

def caught(f):
    "What a function returns, and what it warns of."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        return f(), [str(w.message) for w in said]


def flip(i): return lambda b, other: b[:i % len(b)] + bytes([b[i] ^ 16]) + b[i % len(b) + 1:]


DAMAGE = dict(
    first_byte=flip(START), last_byte=flip(-1), checksum=flip(START - 1), first=flip(0), truncated=lambda b, other: b[:-1],
    longer=lambda b, other: b + b'0', head=lambda b, other: b[:20], empty=lambda b, other: b'', foreign=lambda b, other: b'GGUF' + b[4:],
    model=lambda b, other: checksum(other, bytes(32), b[START:]) + b[START:], key=lambda b, other: b[:START])


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_file_is_never_used(kind, tmp_path):
    model,spoil = MODELS['gqa'],DAMAGE[kind]
    first = new(model, folder=tmp_path)
    ask(first, PROMPT)
    path = first.store.path(first.store.keys(PROMPT)[3])
    sound = path.read_bytes()
    path.write_bytes(spoil(sound, fingerprint(made(GQA, seed=1))))
    later = new(model, folder=tmp_path)
    hits,said = caught(lambda: [later.lookup(PROMPT), later.lookup(PROMPT), ask(later, PROMPT)])
    assert hits == [12, 12, 12] and len(said) == 1 and path.name in said[0] and 'is damaged' in said[0]
    assert caught(lambda: new(model, folder=tmp_path).lookup(PROMPT)) == (28, []), 'a sound file took its place'


def test_an_unreadable_file_is_ignored(tmp_path):
    model = MODELS['gqa']
    ask(first := new(model, folder=tmp_path), PROMPT)
    path = first.store.path(first.store.keys(PROMPT)[3])
    path.unlink()
    path.mkdir()
    later = new(model, folder=tmp_path)
    hits,said = caught(lambda: ask(later, PROMPT))
    assert hits == 12 and any('cannot be read' in s for s in said) and any('cannot be written' in s for s in said)


def test_a_full_disk_is_a_warning(model, tmp_path, monkeypatch):
    prefix = new(model, folder=tmp_path)
    def full(path, mode, **how):
        if mode == 'wb': raise OSError(errno.ENOSPC, 'No space left on device')
        return open(path, mode, **how)
    monkeypatch.setattr(persist, 'open', full, raising=False)
    (a,b),said = caught(lambda: (ask(prefix, PROMPT), ask(prefix, [*reversed(PROMPT)])))
    assert a == b == 0 and len(said) == 1 and 'No space left on device' in said[0]
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_cannot_be_cleared_is_a_warning(model, tmp_path, monkeypatch):
    size = START + PagePool(model.config, 1, PAGE).page_bytes
    prefix = new(model, folder=tmp_path, disk_nbytes=8*size)
    ask(prefix, PROMPT, n=1)
    before = sorted(tmp_path.iterdir())
    def denied(path, missing_ok=False): raise PermissionError(errno.EACCES, 'Permission denied')
    monkeypatch.setattr(persist.Path, 'unlink', denied)
    (a,b),said = caught(lambda: (ask(prefix, [*reversed(PROMPT)]), ask(prefix, [7]*20)))
    assert a == b == 0 and len(said) == 1 and 'cannot be removed (Permission denied)' in said[0]
    assert sorted(tmp_path.iterdir()) == before, 'and nothing beyond the budget was written'


@pytest.mark.parametrize('limit', [None, 10**6])
def test_a_folder_that_disappears_is_a_warning(model, tmp_path, limit):
    prefix = new(model, folder=tmp_path/'pages', disk_nbytes=limit)
    ask(prefix, PROMPT, n=1)
    for p in (tmp_path/'pages').iterdir(): p.unlink()
    (tmp_path/'pages').rmdir()
    hits,said = caught(lambda: ask(prefix, [*reversed(PROMPT)]))
    assert hits == 0 and len(said) == 1 and 'a page cannot be written' in said[0]


def test_an_unfinished_file_may_vanish_meanwhile(tmp_path, monkeypatch):
    "Another process finishes a page while this one looks for leftovers."
    monkeypatch.setattr(persist.Path, 'glob', lambda self, pattern: iter([self/'.00.page.1.tmp']))
    PageStore(tmp_path, '0'*64, '', 1, 8)


def test_disk_budget(tmp_path):
    model = MODELS['gqa']
    size = START + PagePool(GQA, 1, PAGE).page_bytes
    prefix = new(model, folder=tmp_path, disk_nbytes=14*size + 5)
    (tmp_path/'notes.txt').write_text('mine'*10_000)
    prompts = [[i]*28 for i in range(3)]
    for i in (0, 1, 0, 2):
        ask(prefix, prompts[i], n=1)
        assert sum(p.stat().st_size for p in tmp_path.glob('*.page')) <= 14*size + 5
    assert [new(model, folder=tmp_path).lookup(p + [1]) for p in prompts] == [28, 0, 28]
    ask(prefix, [*range(30)]*2, n=1)
    assert len([*tmp_path.glob('*.page')]) == 14 and (tmp_path/'notes.txt').exists()
    assert new(model, folder=tmp_path).lookup([*range(30)]*2) == 56


def test_who_looks_a_prompt_up_uses_it(tmp_path):
    model = MODELS['gqa']
    prefix = new(model, folder=tmp_path, disk_nbytes=14*(START + PagePool(GQA, 1, PAGE).page_bytes))
    for i in range(2): ask(prefix, [i]*28, n=1)
    assert new(model, folder=tmp_path).lookup([0]*29) == 28
    ask(prefix, [2]*28, n=1)
    assert [new(model, folder=tmp_path).lookup([i]*29) for i in range(3)] == [28, 0, 28]


def test_the_end_of_a_prompt_leaves_the_folder_first(tmp_path):
    model = MODELS['gqa']
    prefix = new(model, folder=tmp_path, disk_nbytes=10*(START + PagePool(GQA, 1, PAGE).page_bytes))
    for i in range(2): ask(prefix, [i]*28, n=1)
    assert [new(model, folder=tmp_path).lookup([i]*29) for i in range(2)] == [12, 28]


def test_making_room_spares_what_the_prompt_begins_with(tmp_path):
    store,data = PageStore(tmp_path, '0'*64, '', 1, 8, nbytes=4*(START + 8)),torch.zeros(8, dtype=torch.uint8)
    a,b = store.keys([1, 2, 3]),store.keys([4, 5])
    for keys in (a[:2], b, a): store.save(keys, lambda i: data)
    assert [[store.load(k) is not None for k in keys] for keys in (a, b)] == [[True]*3, [True, False]]


def test_folders_are_private(tmp_path):
    ask(new(MODELS['gqa'], folder=tmp_path/'a'/'b'), PROMPT)
    assert (tmp_path/'a'/'b').stat().st_mode & 0o077 == 0


def test_pages_are_private_in_any_folder(tmp_path):
    "Also in one that others may read, and also pages that were left open to all"
    tmp_path.chmod(0o755)
    ask(new(MODELS['gqa'], folder=tmp_path), PROMPT)
    modes = lambda: {p.stat().st_mode & 0o777 for p in tmp_path.glob('*.page')}
    assert modes() == {0o600}
    for p in tmp_path.glob('*.page'): p.chmod(0o644)
    new(MODELS['gqa'], folder=tmp_path)
    assert modes() == {0o600}


RESTART = '''
import json, sys, torch
from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config
from deepseek_nb.infer.prefix import PrefixCache
torch.manual_seed(int(sys.argv[2]))
config = Config('llama', vocab_size=32, dim=32, n_layers=2, n_heads=4, inter_dim=64, n_kv_heads=2, head_dim=8, max_positions=96)
model = Model(config, torch.float32, 'cpu').requires_grad_(False).init_weights(std=.3)
prefix = PrefixCache(model, 10**6, page=4, folder=sys.argv[1])
out, usage = prefix.generate(range(1, 31), max_new_tokens=6, eos_token_id=[])
print(json.dumps([out[0].tolist(), usage.prompt_cache_hit_tokens]))
'''


def test_a_restart_finds_it(tmp_path, python):
    import json
    (tmp_path/'run.py').write_text(RESTART)
    run = lambda seed: json.loads(python(tmp_path/'run.py', tmp_path/'pages', str(seed)))
    model = MODELS['gqa']
    assert run(0) == [alone(model, PROMPT), 0]
    assert new(model, folder=tmp_path/'pages').lookup(PROMPT) == 28
    assert run(0) == [alone(model, PROMPT), 28]


def test_another_model_finds_nothing(tmp_path):
    ask(new(MODELS['gqa'], folder=tmp_path), PROMPT)
    assert new(made(GQA, seed=1), folder=tmp_path).lookup(PROMPT) == 0
    assert new(made(GQA), folder=tmp_path).lookup(PROMPT) == 28
    assert PrefixCache(made(GQA), 10**5, page=2, folder=tmp_path).lookup(PROMPT) == 0, 'pages of another size'


def test_bfloat16_comes_back_to_the_bit(tmp_path):
    for config in (GQA, MLA):
        pool = PagePool(config, 2, PAGE, torch.bfloat16)
        for layer in pool.layers:
            for x in layer: x.normal_()
        from_bytes(pool.parts(1), to_bytes(pool.parts(0)))
        assert all(torch.equal(x[0], x[1]) for layer in pool.layers for x in layer)


ENDLESS = """
import os
import sys
import torch
import warm
from deepseek_nb.infer.persist import PageStore
store, data = PageStore(sys.argv[1], '0'*64, '', 1, 2**21), torch.zeros(2**21, dtype=torch.uint8)
with open(sys.argv[2], 'wb', buffering=0) as told:
    for i in range(1000):  # at most 2 GB, should nobody end this process
        store.save(store.keys([i]), lambda i: data)
        told.write(b'.')
"""


def test_kill_in_the_middle_of_a_write(tmp_path):
    "Each process writes pages for ever, and tells which are written"
    caught_writing = 0
    for i in range(100):
        if i >= 8 and caught_writing: break  # on a busy machine, most writes have ended when the signal comes
        folder, told = tmp_path/str(i), tmp_path/f'{i}.told'
        p = warm.start('-c', ENDLESS, folder, told)
        while p.poll() is None and not (told.exists() and told.stat().st_size): time.sleep(.001)
        time.sleep(.02 + .003*(i % 8))
        deadline = time.monotonic() + 1
        while not [*folder.glob('.*.tmp')] and time.monotonic() < deadline: continue
        p.send_signal(signal.SIGKILL)
        assert p.wait() == -signal.SIGKILL
        written = told.stat().st_size
        store = PageStore(folder, '0'*64, '', 1, 2**21)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            found = [store.load(store.keys([n])[0]) is not None for n in range(written + 2)]
        assert written and all(found[:written])
        unfinished = [*folder.glob('.*.tmp')]
        caught_writing += len(unfinished)
        assert len(unfinished) <= 1
        for p in unfinished:
            os.utime(p, (time.time() - 100,)*2)
            PageStore(folder, '0'*64, '', 1, 2**21)
            assert not p.exists()
    assert caught_writing, 'no process was killed while it wrote'


def test_two_processes_share_a_folder(tmp_path):
    size = PagePool(GQA, 1, PAGE).page_bytes
    a,b = (new(MODELS['gqa'], folder=tmp_path, disk_nbytes=10*(START + size)) for _ in range(2))
    for i,prefix in enumerate((a, b, a, b)): ask(prefix, [i]*28, n=1)
    assert sum(p.stat().st_size for p in tmp_path.glob('*.page')) <= 10*(START + size)
    b.clear()
    assert caught(lambda: b.lookup([3]*29)) == (28, [])


# ---- fingerprints

def test_fingerprint_sees_every_weight(model):
    before = fingerprint(model)
    rng = torch.Generator().manual_seed(0)
    for name,p in model.state_dict().items():
        flat = p.view(-1)
        i = torch.randint(len(flat), (1,), generator=rng).item()
        old = flat[i].item()
        flat[i] = torch.nextafter(flat[i], torch.tensor(torch.inf)) if p.is_floating_point() else flat[i] + 1
        assert fingerprint(model) != before, name
        flat[i] = old
        if len(flat) > 1 and flat[0] != flat[-1]:
            flat[[0, -1]] = flat[[-1, 0]]
            assert fingerprint(model) != before, name
            flat[[0, -1]] = flat[[-1, 0]]
    assert fingerprint(model) == before == fingerprint(made(model.config))
    assert fingerprint(made(model.config, dtype=torch.bfloat16)) != before


def test_fingerprint_sees_the_config(model):
    other = made(replace(model.config, rope=replace(model.config.rope, theta=5e5)))
    assert all(torch.equal(a, b) for a,b in zip(other.parameters(), model.parameters(), strict=True))
    assert fingerprint(other) != fingerprint(model)


@pytest.mark.parametrize('dtype,shape', product((torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int32, torch.bool),
                                                ((), (7,), (3, 5), (4, 8), (2, 3, 16))))
def test_word_sums(dtype, shape):
    x = torch.randint(2, shape).to(dtype)
    rows = x.reshape(-1, shape[-1] if shape else 1).contiguous().view(torch.uint8)
    width = next(w for w in (8, 4, 2, 1) if rows.shape[1] % w == 0)
    words = [[int.from_bytes(bytes(r[i:i+width]), 'little', signed=width > 1) for i in range(0, len(r), width)] for r in rows.tolist()]
    expected = [sum(r) for r in words] + [sum(c) for c in zip(*words, strict=True)]
    assert [int(v) % 2**64 for v in word_sums(x)] == [v % 2**64 for v in expected]
    padded = torch.zeros(*(shape[:-1] if shape else ()), (shape[-1] if shape else 1) + 1, dtype=torch.uint8).to(dtype)[..., 1:]
    assert torch.equal(word_sums(padded), word_sums(padded.clone()))

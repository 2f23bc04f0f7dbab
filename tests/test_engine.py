"""The same answer alone and in company: random mixes of requests, arrivals, cancellations and preemptions."""
import random
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer import speculate as drafts
from deepseek_nb.infer.drafts import Draft, Drafter
from deepseek_nb.infer.engine import Engine, QueueFull
from deepseek_nb.infer.paged import PagePool
from deepseek_nb.infer.quant_cache import CacheFormat
from deepseek_nb.infer.request import Request, Stream
from deepseek_nb.infer.sampling import RowSampler, SamplingParams
from deepseek_nb.quant import quantize, replace_parameter
from deepseek_nb.tools.serving import path_notes

LATENT = Config('deepseek_v3', vocab_size=256, dim=64, n_layers=2, n_heads=4, inter_dim=128, q_lora_rank=48, kv_lora_rank=32,
                qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_dense_layers=1, n_routed_experts=8, n_shared_experts=1,
                n_activated_experts=2, moe_inter_dim=32, n_expert_groups=4, n_limited_groups=2, score_func='sigmoid', score_bias=True,
                group_score='sum2', norm_topk=True, route_scale=2.5, max_positions=512, rope=Rope(interleaved=True))
GROUPED = Config('qwen2', vocab_size=256, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, inter_dim=96, attn_bias=True,
                 max_positions=512)


class Bytes:
    "A tokenizer whose tokens are bytes."
    eos_ids, _skip, chat_template = (), (), None
    def id_to_bytes(self, i): return bytes([i])
    def stream_decoder(self, skip_special_tokens=False):
        from deepseek_nb.files.tokenizer import StreamDecoder
        return StreamDecoder(self, skip_special_tokens)


@pytest.fixture(scope='module', params=[LATENT, GROUPED], ids=lambda c: c.model_type)
def model(request):
    torch.manual_seed(0)
    return Model(request.param, dtype=torch.float32, device='cpu').requires_grad_(False).init_weights(std=.2)


def requests(draw, n):
    "Random requests of two users, some with a common prefix."
    shared = [draw.randrange(256) for _ in range(150)]
    for i in range(n):
        prompt = shared[:draw.randrange(150)] if draw.random() < .5 else []
        prompt = prompt + [draw.randrange(256) for _ in range(draw.randrange(1, 40))]
        how = dict(temperature=draw.choice([0., .7, 1.5]), top_p=draw.choice([1., .8]), top_k=draw.choice([0, 20]), seed=i,
                   presence_penalty=draw.choice([0., 1.]), repetition_penalty=draw.choice([1., 1.3]), logprobs=draw.choice([None, 0, 3]))
        yield Request(prompt, SamplingParams(**how), max_tokens=draw.randrange(1, 70), stop_ids=(), user=draw.choice(['ann', 'bob']),
                      draft_tokens=draw.choice([None, None, 3, 0]))


def run(engine):
    while engine.step(): continue


def tokens(stream): return [(p.id, p.logprob, p.top) for p in stream.arrived() if p is not None]


@pytest.mark.parametrize('seed', range(4))
def test_alone_and_in_company(model, seed):
    """Ids, log-probabilities and alternatives are equal to the bit, whoever else is served, with drafts and without, and cancelled answers
    are beginnings."""
    draw = random.Random(seed)
    asked = [*requests(draw, 10)]
    page = PagePool(model.config, 1, 64).page_bytes
    given = [dict(draft='lookup'), dict(draft='lookup', draft_tokens=draw.randrange(1, 9)), dict(draft=model, draft_tokens=4), {}][seed]
    engine = Engine(model, Bytes(), nbytes=draw.choice([7, 9, 40])*page, max_rows=draw.choice([3, 8]), budget=draw.choice([16, 64, 256]),
                    **given)
    if not given: asked = [replace(r, draft_tokens=None) for r in asked]
    streams, waiting, cancelled = [], [*asked], set()
    while waiting or engine.count:
        while waiting and draw.random() < .3: streams.append(engine.submit(waiting.pop(0)))
        if streams and draw.random() < .01: streams[n := draw.randrange(len(streams))].cancel(); cancelled.add(n)
        engine.step()
        assert len(engine.rows) <= engine.max_rows
    for i,(stream,request) in enumerate(zip(streams, asked, strict=True)):
        alone = Engine(model, Bytes(), budget=512)
        one = alone.submit(replace(request, draft_tokens=None))
        run(alone)
        got, want = tokens(stream), tokens(one)
        assert 0 <= stream.accepted <= stream.drafted and (request.draft_tokens != 0 or not stream.drafted)
        assert len(want) == request.max_tokens and one.finish == 'length'
        assert got == (want[:len(got)] if stream.finish == 'cancelled' else want)
        assert stream.finish == 'length' or i in cancelled
    assert len(engine.pool.free) + engine.store.tree.size == engine.pool.pages
    assert not given or engine.drafts.room == 64*engine.pool.pages and (given['draft'] == 'lookup' or engine.stats.accepted.total())
    engine.store.clear()
    assert len(engine.pool.free) == engine.pool.pages and not any(engine.pool.refs)
    assert not engine.queue.waiting and not engine.queue.running


class Told(Drafter):
    "A drafter that knows the answer, and says something else now and then"
    def __init__(self, answers): self.answers = answers
    def kind(self, ids): return 0
    def note(self, ids, x): pass
    def feed(self, ids, n): return True
    def draft(self, ids, n):
        known = next(a for a in self.answers if a[:len(ids)] == ids)
        return Draft([t if (len(ids) + i) % 7 else (t + 1) % 256 for i,t in enumerate(known[len(ids):][:n])])


@pytest.fixture
def told(monkeypatch):
    "Drafts that are often right, for sampled answers too"
    answers = []
    monkeypatch.setattr(drafts, 'LookupDrafter', lambda: Told(answers))
    return answers


@pytest.mark.parametrize('kv_cache', ['auto', 'int8'])
def test_drafts_that_are_right_change_nothing(model, told, kv_cache):
    "Sampling, penalties, stop strings and end tokens, preemptions, a second turn behind an answer: bits, finish and cache hits."
    draw, page = random.Random(4), 64
    kind = partial(PagePool, codec=CacheFormat() if kv_cache == 'int8' else None)
    for given in (None, 'lookup'):
        engine = Engine(model, Bytes(), nbytes=5*kind(model.config, 1, page).page_bytes, kv_cache=kv_cache, draft=given,
                        draft_tokens=given and 6)
        if given is None:
            asked = [replace(r, draft_tokens=None, max_tokens=60, user='') for r in requests(draw, 5)]
            asked[0] = replace(asked[0], params=SamplingParams(temperature=2., seed=0), stop=tuple(map(chr, range(40, 90))))
            asked[1] = replace(asked[1], params=SamplingParams(temperature=2., seed=1), stop_ids=tuple(range(0, 256, 5)))
        streams = [engine.submit(r) for r in asked]
        run(engine)
        found = [tokens(s) for s in streams]
        told[:] = [r.prompt + [t[0] for t in f] for r,f in zip(asked, found, strict=True)]
        again = [Request(told[i] + [1, 2], SamplingParams(seed=0, logprobs=2), max_tokens=5, stop_ids=()) for i in (1, 4)]
        engine.drafts = None
        later = [engine.submit(r) for r in again]
        run(engine)
        results = found, [(s.finish, s.matched, s.usage.completion_tokens) for s in streams], [tokens(s) for s in later]
        assert len(engine.pool.free) + engine.store.tree.size == engine.pool.pages
        if given is None: want, steps = results, engine.stats.steps
    assert results == want and want[1][0][0] == want[1][1][0] == 'stop'
    assert engine.stats.steps < .7*steps and engine.stats.draft_tokens == sum(s.drafted for s in streams)
    assert engine.stats.accepted.total() == sum(s.accepted for s in streams) > .5*engine.stats.draft_tokens


def test_a_draft_takes_nobodys_pages(model, told):
    "Two rows that fit without drafts fit with them, and a row is never preempted for a draft."
    asked = [Request([i]*60, SamplingParams(seed=i), max_tokens=5 if i else 4, stop_ids=()) for i in range(2)]
    for given in (None, 'lookup'):
        engine = Engine(model, Bytes(), nbytes=2*PagePool(model.config, 1, 64).page_bytes, draft=given, draft_tokens=given and 20)
        streams = [engine.submit(r) for r in asked]
        run(engine)
        told[:] = [r.prompt + [t[0] for t in tokens(s)] for r,s in zip(asked, streams, strict=True)]
        assert not engine.stats.preempted


def test_drafters_that_fail_or_fall_behind(model, monkeypatch):
    "A failing drafter costs its row the drafts and nothing else; a long prompt reaches a draft model in parts; room is bounded."
    asked = Request([5]*200, SamplingParams(temperature=0.), max_tokens=12, stop_ids=())
    small = Model(GROUPED, dtype=torch.float32, device='cpu').init_weights(.2)
    wanted = None
    for source in (None, small):
        engine = Engine(model, Bytes(), draft=source, draft_tokens=source and 2)
        stream = engine.submit(asked)
        run(engine)
        wanted = wanted or tokens(stream)
        if source: assert tokens(stream) == wanted and stream.drafted
    def fails(*args): raise MemoryError('too little')
    monkeypatch.setattr(drafts.ModelDrafter, 'draft', fails)
    engine = Engine(model, Bytes(), draft=small, draft_tokens=2)
    stream = engine.submit(asked)
    with pytest.warns(UserWarning, match='goes on without drafts .MemoryError: too little'): run(engine)
    assert [t[0] for t in tokens(stream)] == [t[0] for t in wanted] and engine.drafts.room == 64*engine.pool.pages


def test_a_draft_that_is_not_served(model):
    engine = Engine(model, Bytes())
    with pytest.raises(ValueError, match='served without drafts'): engine.submit(Request([1], draft_tokens=2))
    engine.submit(Request([1], max_tokens=1, draft_tokens=0))
    run(engine)
    for said, kwargs in (("draft is 'fast'", dict(draft='fast')), ('without a draft', dict(draft_tokens=2)),
                         ('draft_tokens is 0', dict(draft='lookup', draft_tokens=0)), ('no multi-token-prediction', dict(draft='mtp'))):
        with pytest.raises(ValueError, match=said): Engine(model, Bytes(), **kwargs)
    with use('reference'), pytest.warns(UserWarning, match='a draft may change a token'): Engine(model, Bytes(), draft='lookup')


def test_preemption_happens_and_changes_nothing(model):
    asked = [Request([i]*120, SamplingParams(seed=i), max_tokens=100, stop_ids=()) for i in range(4)]
    results = []
    for pages in (9, 40):
        engine = Engine(model, Bytes(), nbytes=pages*PagePool(model.config, 1, 64).page_bytes)
        streams = [engine.submit(r) for r in asked]
        run(engine)
        results.append([tokens(s) for s in streams])
        assert (engine.stats.preempted > 0) == (pages == 9)
    assert results[0] == results[1] and all(len(t) == 100 for t in results[0])


@pytest.mark.parametrize('config', [LATENT, GROUPED], ids=lambda c: c.model_type)
def test_codes_have_the_bits_of_their_role(config):
    """Where prompts are computed in bfloat16: chunks of any size, one token after a prefix, drafts, and an answer that is computed again
    after a preemption have the bits of a request alone."""
    torch.manual_seed(0)
    model = Model(config, dtype=torch.float32, device='cpu').requires_grad_(False).init_weights(std=.2)
    for name,m in [*model.layers.named_modules()]:
        for k,w in [*m.named_parameters(recurse=False)]:
            if w.ndim > 1 and not name.endswith('mlp.gate'): replace_parameter(m, k, quantize(w, 'int4'))
    asked = [Request([i % 3, 7]*60 + [i], SamplingParams(temperature=.5, seed=i, logprobs=2), max_tokens=70, stop_ids=()) for i in range(4)]
    page,results = PagePool(config, 1, 64).page_bytes,[]
    for given in (dict(nbytes=9*page), dict(nbytes=40*page, budget=16), dict(draft='lookup', draft_tokens=3)):
        engine = Engine(model, Bytes(), **given)
        streams = [engine.submit(r) for r in [*asked, asked[0]]]
        run(engine)
        results.append([tokens(s) for s in streams])
        assert engine.exact and (given.get('nbytes') != 9*page or engine.stats.preempted)
    for r,*same in zip(asked, *results, strict=False):
        one = (alone := Engine(model, Bytes())).submit(r)
        run(alone)
        want = tokens(one)
        assert all(t == want for t in same)
    assert [t[-1] for t in results] == [t[0] for t in results]


def test_a_quantised_cache_alone_in_company_and_behind_a_prefix(model, tmp_path):
    "Small pool or large, prefix in memory, on disk or computed: the same bits; the pool holds codes"
    asked,results = [Request([i % 3]*130, SamplingParams(seed=i), max_tokens=70, stop_ids=()) for i in range(6)],[]
    for pages in (9, 60):
        one = PagePool(model.config, 1, 64, codec=CacheFormat()).nbytes
        engine = Engine(model, Bytes(), nbytes=pages*one, kv_cache='int8', folder=tmp_path)
        assert engine.pool.codec == CacheFormat() and engine.pool.pages == pages
        streams = [engine.submit(r) for r in asked]
        run(engine)
        results.append([tokens(s) for s in streams])
        assert pages == 60 or engine.stats.preempted
    assert engine.stats.cached_tokens and results[0] == results[1]
    for r,want in zip(asked, results[0], strict=True):
        one = (alone := Engine(model, Bytes(), kv_cache='int8')).submit(r)
        run(alone)
        assert tokens(one) == want


def test_users_never_share_a_prefix(model):
    engine, prompt = Engine(model, Bytes()), [7]*130
    hits = []
    for user in ('ann', 'bob', 'ann'):
        stream = engine.submit(Request(prompt, max_tokens=1, user=user))
        run(engine)
        hits.append(stream.usage.prompt_cache_hit_tokens)
    assert hits == [0, 0, 128]


def test_a_prefix_in_prefill_is_awaited(model):
    "Eight answers to one long prompt compute it once."
    engine = Engine(model, Bytes(), budget=64)
    streams = [engine.submit(Request([5]*200, SamplingParams(seed=i), max_tokens=3, stop_ids=())) for i in range(8)]
    run(engine)
    assert engine.stats.prompt_tokens == 200 + 7*(200 - 192)
    assert [s.usage.prompt_cache_hit_tokens for s in streams] == [0] + [192]*7


def test_a_page_that_is_not_full_is_shared(model):
    "A repeated prompt costs one token, and one that differs inside of a page the tokens from there; the bits are those of a request alone."
    prompt = [i*7 % 256 for i in range(150)]
    asked = [prompt, prompt, prompt[:140] + [1, 2, 3], prompt[:129] + [9], prompt]
    asked = [Request(p, SamplingParams(seed=i, logprobs=1), max_tokens=5, stop_ids=(), user='bob' if i == 4 else '')
             for i,p in enumerate(asked)]
    for pages in (3, 40): # of three pages, none is left for a copy
        engine, got, hits = Engine(model, Bytes(), nbytes=pages*PagePool(model.config, 1, 64).page_bytes), [], []
        for r in asked:
            stream = engine.submit(r)
            run(engine)
            hits.append(stream.usage.prompt_cache_hit_tokens)
            got.append(tokens(stream))
            assert len(engine.pool.free) + engine.store.tree.size == engine.pool.pages
        assert hits == ([0, 149, 140, 128, 0] if pages > 3 else [0, 128, 128, 128, 0])
        for r,answer in zip(asked, got, strict=True):
            alone = (one := Engine(model, Bytes())).submit(r)
            run(one)
            assert tokens(alone) == answer


@pytest.mark.parametrize('kinds', [['Q8_0', 'Q4_0', 'Q4_1'], ['Q6_K', 'Q4_K']], ids=['split', 'blocks'])
@pytest.mark.parametrize('name', ['llama', 'v3'])
def test_a_gguf_model(name, kinds, tmp_path):
    "All kinds of blocks give the same bits in any chunks."
    from test_ggml import CONFIGS, fresh, write
    config = replace(CONFIGS[name][0], vocab_size=256, max_positions=512)
    write(tmp_path/'m.gguf', fresh(config), False, kinds)
    model = Model.from_pretrained(tmp_path/'m.gguf', device='cpu')
    asked = [Request([i]*70 + [7, i], SamplingParams(seed=i, logprobs=2), max_tokens=6, stop_ids=()) for i in range(3)]
    want = []
    assert 'deepseek-nb quantize' not in '\n'.join(path_notes('m.gguf', Engine(model, Bytes())))
    for r in asked:
        alone = (one := Engine(model, Bytes())).submit(r)
        run(one)
        want.append(tokens(alone))
    for budget in (32, 256):
        engine = Engine(model, Bytes(), budget=budget)
        streams = [engine.submit(r) for r in [*asked, asked[0]]]
        run(engine)
        assert [tokens(s) for s in streams] == [*want, want[0]]


def test_cancelled_within_one_step(model):
    engine = Engine(model, Bytes(), budget=32)
    running, waiting = (engine.submit(Request([1]*200, max_tokens=200, stop_ids=())) for _ in range(2))
    engine.step()
    for s in (running, waiting): s.cancel()
    engine.step()
    assert (running.finish, waiting.finish, engine.count) == ('cancelled', 'cancelled', 0)
    engine.store.clear()
    assert len(engine.pool.free) == engine.pool.pages


def test_deadline(model):
    engine = Engine(model, Bytes())
    stream = engine.submit(Request([1], max_tokens=400, stop_ids=(), deadline=0.))
    run(engine)
    assert (stream.finish, engine.count) == ('deadline', 0)


def test_an_error_ends_its_request_alone(model):
    "A grammar that fails, and a model that fails."
    class Broken:
        finished = False
        def mask(self): raise RuntimeError('no mask')
    engine = Engine(model, Bytes())
    bad = engine.submit(Request([1], grammar=Broken()))
    good = engine.submit(Request([2], SamplingParams(seed=0), max_tokens=5, stop_ids=()))
    run(engine)
    assert bad.finish == 'error' and len(tokens(good)) == 5
    with pytest.raises(RuntimeError, match='no mask'): bad.text()
    with Engine(model, Bytes()) as engine:
        ragged, engine.model = engine.model.ragged, _Failing(model)
        stream = engine.submit(Request([1], max_tokens=3))
        with pytest.raises(RuntimeError, match='out of order'): stream.text()
        engine.model = model
        assert ragged and len([*engine.submit(Request([1], max_tokens=3, stop_ids=()))]) == 3


class _Failing:
    "A model whose steps fail."
    def __init__(self, model): self.config, self.device, self.head_weight = model.config, model.device, model.head_weight
    def ragged(self, *args): raise RuntimeError('out of order')


def test_a_prefix_cache_that_fails(model, monkeypatch):
    "A lookup that fails ends its request alone; what can't be stored is a warning."
    engine = Engine(model, Bytes())
    good = engine.submit(Request([2]*80, SamplingParams(seed=0), max_tokens=5, stop_ids=()))
    engine.step()
    with monkeypatch.context() as patched:
        def fails(*args, **kwargs): raise OSError('no such disk')
        patched.setattr(engine.store, 'pages', fails)
        bad = engine.submit(Request([1], max_tokens=5))
        engine.step()
        assert bad.finish == 'error' and good.finish is None and engine.count == 1
        patched.setattr(engine.store, 'keep', fails)
        with pytest.warns(UserWarning, match='could not store a prompt .OSError: no such disk'): run(engine)
    assert len(tokens(good)) == 5 and (engine.count, engine.rows, engine.queue.running) == (0, [], {})
    engine.store.clear()
    assert len(engine.pool.free) == engine.pool.pages


def test_text_that_fails_ends_its_request_alone(model):
    engine = Engine(model, Bytes())
    bad, good = (engine.submit(Request([i], SamplingParams(seed=0), max_tokens=4, stop_ids=())) for i in (1, 2))
    engine.step()
    def fails(token): raise KeyError(token)
    engine.rows[0].out.push = fails
    run(engine)
    assert (bad.finish, good.finish, engine.count) == ('error', 'length', 0) and len(tokens(good)) == 4


def test_closed_before_it_was_started(model):
    "What was submitted ends, with or without an answer."
    for drain, finish in ((True, 'length'), (False, 'cancelled')):
        engine = Engine(model, Bytes())
        stream = engine.submit(Request([1], max_tokens=2, stop_ids=()))
        engine.close(drain=drain)
        assert stream.finish == finish and engine.count == 0


def test_many_threads_submit(model):
    with Engine(model, Bytes(), max_waiting=1000) as engine:
        results = {}
        def ask(i): results[i] = [p.id for p in engine.submit(Request([i], SamplingParams(seed=1), max_tokens=4, stop_ids=()))]
        threads = [threading.Thread(target=ask, args=(i % 8,)) for i in range(40)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert len(results) == 8 and engine.count == 0 and engine.stats.finished['length'] == 40


def test_limits(model):
    engine = Engine(model, Bytes(), max_rows=1, max_waiting=1, nbytes=3*PagePool(model.config, 1, 64).page_bytes)
    with pytest.raises(ValueError, match='maximum context length is 512'): engine.submit(Request([1]*500, max_tokens=13))
    with pytest.raises(ValueError, match='need more than the 3 pages'): engine.submit(Request([1]*150, max_tokens=100))
    with pytest.raises(ValueError, match='token id 256 in logit_bias'): engine.submit(Request([1], SamplingParams(logit_bias={256: 1}), 5))
    for _ in range(2): engine.submit(Request([1], max_tokens=2))
    with pytest.raises(QueueFull, match='2 requests run or wait'): engine.submit(Request([1], max_tokens=2))
    run(engine)
    engine.submit(Request([1], max_tokens=2))


def test_frequency_of_draws():
    "A hundred thousand draws of one row follow the truncated distribution."
    logits = torch.tensor([2., 1., 0., -1., -2.])
    row = RowSampler(SamplingParams(seed=3, top_k=3, temperature=.8), [])
    counts = torch.zeros(5)
    for _ in range(5_000): counts[row.sample(logits).id] += 1
    want = 5_000*torch.cat([(logits[:3]/.8).softmax(0), torch.zeros(2)])
    assert counts[3:].sum() == 0
    assert ((counts - want)[:3]**2/want[:3]).sum() < 13.8  # two degrees of freedom: exceeded once in a thousand seeds


def test_a_stream_that_nobody_reads():
    stream = Stream(Request([1]))
    stream.end('length')
    assert stream.text() == '' and stream.text() == ''

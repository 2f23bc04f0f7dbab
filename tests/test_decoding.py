"""Decoding: cached, uncached, padded, rewound and chunked agree token for token; generate, sampling, stops and streams

Configs are drawn at random in every run. The seed is printed; SEED=n repeats a run, DRAWS=n asks for more draws.
"""
import os
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deepseek_nb import Model, Tokenizer
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.infer.generate import Stopper, left_padded, stream_text
from deepseek_nb.infer.sampling import RowSampler, SamplingParams, draw_token

SEED = int(os.environ.get('SEED') or random.SystemRandom().randrange(10**6))
DRAWS = int(os.environ.get('DRAWS') or 4)
NEW = 8
many = settings(deadline=None, max_examples=300)


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\ntest_decoding SEED={SEED}')
    with torch.no_grad(): yield


@pytest.fixture
def r(request):
    r = random.Random(f'{SEED} {request.node.name}')
    torch.manual_seed(r.randrange(10**9))
    return r


# Draws

def some_rope(r, interleaved):
    kind, m = r.choice([None, None, 'linear', 'yarn', 'yarn', 'llama3']), r.choice([0., .707, 1.])
    return Rope(theta=r.choice([100., 10000.]), interleaved=interleaved, kind=kind, factor=1. if kind is None else r.choice([2., 8., 40.]),
                original_positions=r.choice([16, 64]), mscale=m or 1., mscale_all_dim=m)


def gqa(r):
    kv = r.choice([1, 2, 3])
    return Config('llama', vocab_size=r.randrange(30, 80), dim=r.choice([12, 24]), n_layers=r.choice([1, 2]), n_heads=kv*r.choice([1, 2]),
                  n_kv_heads=kv, head_dim=2*r.randrange(1, 7), inter_dim=20, attn_bias=r.random() < .3, tie_embeddings=r.random() < .3,
                  rope=some_rope(r, False), max_positions=64)


def mla(r, q_lora, moe):
    g, size = r.choice([1, 2, 4]), r.choice([2, 3])
    keep = r.randrange(1, g+1)
    kw = dict(n_dense_layers=r.choice([0, 1]), n_routed_experts=g*size, n_activated_experts=r.randrange(1, keep*size+1), moe_inter_dim=10,
              n_shared_experts=r.choice([0, 1]), n_expert_groups=g, n_limited_groups=keep, group_score=r.choice(['max', 'sum2']),
              score_func=r.choice(['softmax', 'sigmoid', 'sqrtsoftplus']), score_bias=r.random() < .5, norm_topk=r.random() < .5,
              route_scale=1.5)
    return Config('deepseek_v3', vocab_size=r.randrange(30, 80), dim=r.choice([12, 24]), n_layers=2, n_heads=r.choice([1, 2, 3]),
                  inter_dim=20, q_lora_rank=r.choice([3, 8]) if q_lora else 0, kv_lora_rank=r.choice([4, 9, 16]),
                  qk_nope_head_dim=r.choice([3, 8]), qk_rope_head_dim=2*r.randrange(1, 5), v_head_dim=r.choice([3, 8, 16]),
                  rope=some_rope(r, r.random() < .7),
                  max_positions=64, **kw if moe else {})


FAMILIES = {'gqa': gqa, 'mla': lambda r: mla(r, False, False), 'mla-q_lora': lambda r: mla(r, True, False),
            'mla-moe': lambda r: mla(r, False, True), 'mla-q_lora-moe': lambda r: mla(r, True, True)}


def fresh(config):
    "Weights under which every part counts"
    m = Model(config, dtype=torch.float32, device='cpu').eval()
    for k, t in m.state_dict().items():
        x = torch.randn(t.shape)
        t.copy_(1 + .2*x if k.endswith('norm.weight') else x*(.3 if t.ndim == 1 else t.shape[-1]**-.5))
    return m


def uncached(m, prompt, n=NEW, **kw):
    "The definition: everything anew for each token. Tokens, and their logits"
    ids, logits = list(prompt), []
    for _ in range(n):
        logits.append(m(torch.tensor([ids]), **kw)[0, -1])
        ids.append(logits[-1].argmax().item())
    return ids[len(prompt):], torch.stack(logits)


def steady(m, prompt):
    "Whether rounding can move neither a router's choice nor an argmax"
    new, a = uncached(m, prompt)
    w = m.embed_tokens.weight
    kept, ids = w.clone(), torch.tensor([[*prompt, *new]])
    before = m(ids)
    w.mul_(1 + 2e-6*torch.randn(w.shape))
    after = m(ids)
    w.copy_(kept)
    top = a.topk(2).values
    return (after-before).abs().max() < 3e-5*before.abs().max() and ((top[:, 0]-top[:, 1]) > 3e-4*a.abs().max()).all()


def prompts(m, r, lengths):
    out = []
    for n in lengths:
        for _ in range(100):
            p = [r.randrange(m.config.vocab_size) for _ in range(n)]
            if steady(m, p): break
        else: raise AssertionError(f'no prompt found that rounding does not disturb: {m.config}')
        out.append(p)
    return out


def near(got, want, told=''): # NaN never passes
    err = ((got-want).abs().max()/want.abs().max()).item()
    assert err < 1e-4, f'{err:.2e} apart {told}'


def pieces(r, ids):
    cuts = sorted(r.sample(range(1, len(ids)), min(len(ids)-1, r.randrange(1, 4))))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


# The ways to decode

def one_by_one(m, prompt, max_len, r, **kw):
    "Cached, with a cache of any size to begin with"
    cache, step, new, logits = m.new_cache(1, max_len), prompt, [], []
    for _ in range(NEW):
        logits.append(m(torch.tensor([step]), cache, logits_to_keep=r.choice([0, 1]), **kw)[0, -1])
        new.append(logits[-1].argmax().item())
        step = new[-1:]
    assert len(cache) == len(prompt)+NEW-1 <= cache.capacity
    return new, torch.stack(logits)


def in_chunks(m, prompt, r, **kw):
    "The prompt in pieces, and then tokens"
    cache, new, logits = m.new_cache(1), [], []
    for piece in pieces(r, prompt): x = m(torch.tensor([piece]), cache, **kw)
    for _ in range(NEW):
        logits.append(x[0, -1])
        new.append(logits[-1].argmax().item())
        x = m(torch.tensor([new[-1:]]), cache, **kw)
    return new, torch.stack(logits)


def rewound(m, prompt, r, **kw):
    "Wrong tokens in one go or singly after every right one, then taken back; now and then right ones too"
    cache, ids, logits = m.new_cache(1, r.choice([0, 1, 5])), list(prompt), []
    def wrong():
        n, have = r.randrange(1, 6), len(cache)
        guess = [r.randrange(m.config.vocab_size) for _ in range(n)]
        for piece in pieces(r, guess) if r.random() < .5 else [guess]: m(torch.tensor([piece]), cache, **kw)
        back = n + r.randrange(min(3, have+1)) # into what was right
        cache.rewind(back)
        assert len(cache) == have + n - back
    while len(ids) < len(prompt)+NEW:
        if r.random() < .7 or not logits: wrong()
        logits.append(m(torch.tensor([ids[len(cache):]]), cache, logits_to_keep=1, **kw)[0, -1])
        ids.append(logits[-1].argmax().item())
    return ids[len(prompt):], torch.stack(logits)


def in_a_batch(m, rows, r, **kw):
    "Prompts of unequal lengths, padded on the left with any token"
    ids, mask = left_padded(rows, r.randrange(m.config.vocab_size))
    cache, x, logits = m.new_cache(len(rows), r.choice([0, 1, 99])%60), ids, []
    for i in range(NEW):
        if i == 3: # a detour for all rows
            m(torch.randint(m.config.vocab_size, (len(rows), 2)), cache, **kw)
            cache.rewind(2)
        logits.append(m(x, cache, attention_mask=mask if i == 0 else None, **kw)[:, -1])
        x = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits, 1)


@pytest.mark.parametrize('draw', range(DRAWS))
@pytest.mark.parametrize('family', FAMILIES)
def test_all_ways_agree(family, draw, r):
    m = fresh(FAMILIES[family](r))
    c, rows = m.config, prompts(m, r, [1, r.randrange(2, 6), r.choice([7, 11, 13])])
    told = f'SEED={SEED} {family} {draw} {c}'
    want = [uncached(m, p) for p in rows]
    for form in ('naive', 'absorbed', 'auto') if c.mla else ('auto',):
        kw = dict(mla=form)
        for p, (new, logits) in zip(rows, want, strict=True):
            ways = dict(uncached=uncached(m, p, **kw), empty=one_by_one(m, p, 0, r, **kw), one=one_by_one(m, p, 1, r, **kw),
                        exact=one_by_one(m, p, len(p)+NEW, r, **kw), chunks=in_chunks(m, p, r, **kw), rewound=rewound(m, p, r, **kw))
            for way, (got, x) in ways.items():
                assert got == new, (way, form, told)
                near(x, logits, (way, form, told))
            assert m.generate(torch.tensor([p]), NEW, **kw)[0].tolist() == p+new, (form, told)
        got = in_a_batch(m, rows, r, **kw)
        for x, (new, logits) in zip(got, want, strict=True):
            assert x.argmax(-1).tolist() == new, (form, told)
            near(x, logits, (form, told))
        ids, mask = left_padded(rows)
        assert m.generate(ids, NEW, attention_mask=mask, **kw)[:, ids.shape[1]:].tolist() == [new for new, _ in want], (form, told)


@pytest.mark.parametrize('family', FAMILIES)
def test_every_length_of_padding(family, r):
    "One prompt a row, each with its own padding, whole sequences against single ones"
    m = fresh(FAMILIES[family](r))
    longest, = prompts(m, r, [9])
    rows = [longest[i:] for i in range(9)]
    ids, mask = left_padded(rows, 0)
    for form in ('naive', 'absorbed', 'auto') if m.config.mla else ('auto',):
        got, cache = m(ids, attention_mask=mask, mla=form), m.new_cache(9)
        assert torch.isfinite(got).all() and torch.isfinite(m(ids, cache, attention_mask=mask, mla=form)).all()
        for x, p in zip(got, rows, strict=True):
            if steady(m, p): near(x[-len(p):], m(torch.tensor([p]))[0], (form, m.config))
        cache.rewind(2)
        for x, p in zip(m(ids[:, -2:], cache, mla=form), rows, strict=True):
            if len(p) > 2 and steady(m, p): near(x, m(torch.tensor([p]))[0, -2:], (form, m.config))


@pytest.mark.parametrize('family', ['gqa', 'mla-q_lora-moe'])
def test_a_cache_that_holds_part_of_the_prompt(family, r):
    "As a conversation does it: rewind to the common beginning, and give the whole prompt again"
    m = fresh(FAMILIES[family](r))
    p, = prompts(m, r, [9])
    want = m.generate(torch.tensor([p]), NEW)
    for kept in range(10):
        cache = m.new_cache(1)
        m(torch.tensor([p[:kept] + [r.randrange(m.config.vocab_size) for _ in range(3)]]), cache)
        cache.rewind(3)
        for name in ('cache', 'past_key_values'):
            assert torch.equal(m.generate(torch.tensor([p]), NEW, **{name: cache}), want)
            cache.rewind(len(cache)-kept)
    m.generate(torch.tensor([p]), NEW, cache=cache) # holds more than the prompt now
    cache.rewind(NEW-1)
    assert torch.equal(m.generate(torch.tensor([p]), NEW, cache=cache), want)


def test_growth(r):
    for c in (gqa(r), mla(r, True, False)):
        m = fresh(c)
        for start in (0, 1, 3):
            cache, sizes = m.new_cache(2, start), []
            for _ in range(c.max_positions):
                m(torch.zeros(2, 1, dtype=torch.int64), cache)
                sizes.append(cache.capacity)
            assert len(set(sizes)) <= 8 and sizes[-1] == c.max_positions == len(cache) # doubles, and stops at the longest context
            assert cache.nbytes == sum(t.nbytes for s in cache.slots for t in s.tensors)
            with pytest.raises(ValueError, match='longer than max_positions 64'): m(torch.zeros(2, 1, dtype=torch.int64), cache)
            assert len(cache) == c.max_positions


# transformers' generate

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    transformers = pytest.importorskip('transformers')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.LlamaConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                      intermediate_size=40, max_position_embeddings=128, bos_token_id=0, eos_token_id=None)
    torch.manual_seed(SEED)
    theirs = transformers.LlamaForCausalLM(config).eval()
    for k, t in theirs.state_dict().items():
        t.copy_(1 + .2*torch.randn(t.shape) if 'norm' in k else torch.randn(t.shape)*t.shape[-1]**-.5)
    theirs.save_pretrained(folder := tmp_path_factory.mktemp('llama'))
    return Model.from_pretrained(folder, dtype='float32', device='cpu'), theirs


def theirs_greedy(m, ids, mask, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return m.generate(ids, attention_mask=mask, do_sample=False, **kw)


def batch(m, r, lengths=(3, 8, 1, 5)):
    return left_padded(prompts(m, r, lengths), r.randrange(61))


def test_generate_is_transformers(pair, r):
    ours, theirs = pair
    for _ in range(3):
        ids, mask = batch(ours, r)
        want = theirs_greedy(theirs, ids, mask, max_new_tokens=NEW, pad_token_id=0)
        assert torch.equal(ours.generate(ids, NEW, attention_mask=mask), want)
        assert torch.equal(ours.generate(ids, max_length=ids.shape[1]+NEW, attention_mask=mask), want)
        want = theirs_greedy(theirs, ids, mask, max_length=ids.shape[1]+5, pad_token_id=0)
        assert torch.equal(ours.generate(ids, max_length=ids.shape[1]+5, attention_mask=mask), want)
        assert torch.equal(ours.generate(ids, 0, attention_mask=mask), ids)


@pytest.mark.parametrize('pad', [7, None])
def test_end_tokens(pair, pad, r):
    "One row ends early, then all of them"
    ours, theirs = pair
    early = 0
    for _ in range(6):
        ids, mask = batch(ours, r)
        new = ours.generate(ids, NEW, attention_mask=mask)[:, ids.shape[1]:]
        row, step = r.randrange(len(ids)), r.randrange(1, NEW-2)
        for eos in (new[row, step].item(), [new[row, step].item(), 60], new[:, step].tolist()):
            want = theirs_greedy(theirs, ids, mask, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=pad)
            got = ours.generate(ids, NEW, attention_mask=mask, eos_token_id=eos, pad_token_id=pad)
            assert torch.equal(got, want), (SEED, eos, got[:, ids.shape[1]:], want[:, ids.shape[1]:])
            early += got.shape[1] < ids.shape[1]+NEW
            after = got[row, ids.shape[1]:].tolist()
            fill, ends = pad if pad is not None else eos if isinstance(eos, int) else eos[0], [eos] if isinstance(eos, int) else eos
            first = next(i for i, t in enumerate(after) if t in ends)
            assert first <= step and set(after[first+1:]) <= {fill}
    assert early >= 6


def test_no_end_tokens(pair, r):
    ours, _ = pair
    ids, mask = batch(ours, r)
    assert ours.config.eos_ids == () and ours.generate(ids, NEW, attention_mask=mask, eos_token_id=[]).shape[1] == ids.shape[1]+NEW


def test_repetition_penalty_is_transformers(pair, r):
    ours, theirs = pair
    changed = 0
    for penalty in (1.1, 1.5, 3., .8): # padding is nothing that was seen
        ids, mask = batch(ours, r, (4, 9, 2))
        want = theirs_greedy(theirs, ids, mask, max_new_tokens=2*NEW, repetition_penalty=penalty, pad_token_id=0)
        assert torch.equal(ours.generate(ids, 2*NEW, attention_mask=mask, repetition_penalty=penalty), want), (SEED, penalty)
        changed += not torch.equal(want, ours.generate(ids, 2*NEW, attention_mask=mask))
    assert changed


# Sampling

def processed(how, logits, seen):
    "The distribution that each row draws from"
    weights = torch.stack([RowSampler(how, s).weights(x) for x, s in zip(logits, seen.tolist(), strict=True)])
    return weights/weights.sum(-1, keepdim=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_processors_of_transformers(dtype, r):
    "Penalty, temperature, top-k, top-p, min-p in this order: the same survivors, the same probabilities"
    L = pytest.importorskip('transformers.generation.logits_process')
    for _ in range(150):
        w = r.choice([2, 5, 50, 300])
        logits, seen = torch.randn(3, w, dtype=dtype)*r.choice([.5, 2., 8.]), torch.randint(w, (3, r.choice([1, 4, 20])))
        pick = lambda off, *on: off if r.random() < .4 else r.choice(on)
        kw = dict(temperature=r.uniform(.2, 3.), top_k=pick(0, 1, 3, w, w+5), top_p=pick(1., r.uniform(.05, .99), 1e-6),
                  min_p=pick(0., r.uniform(.01, .9), 1.), repetition_penalty=pick(1., 1.3, .7))
        theirs = L.LogitsProcessorList()
        if kw['repetition_penalty'] != 1: theirs.append(L.RepetitionPenaltyLogitsProcessor(kw['repetition_penalty']))
        theirs.append(L.TemperatureLogitsWarper(kw['temperature']))
        if kw['top_k']: theirs.append(L.TopKLogitsWarper(kw['top_k']))
        if kw['top_p'] < 1: theirs.append(L.TopPLogitsWarper(kw['top_p']))
        if kw['min_p']: theirs.append(L.MinPLogitsWarper(kw['min_p']))
        want, got = theirs(seen, logits.clone()).softmax(-1), processed(SamplingParams(**kw), logits, seen)
        differ = (got > 0) != (want > 0)
        if dtype == torch.float32: # skip what rounding decides
            p = processed(SamplingParams(**kw | dict(top_p=1., min_p=0.)), logits, seen).double().sort(descending=True)
            edge = ((p.values.cumsum(-1)-kw['top_p']).abs() < 1e-5).any(-1) | ((p.values/p.values[:, :1]-kw['min_p']).abs() < 1e-5).any(-1)
            if edge.any(): continue
        assert not differ.any(), (SEED, kw)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7, msg=lambda m, kw=kw: f'SEED={SEED} {kw}: {m}')


def test_order_of_transformers(pair):
    "The order that the test above assumes is the one in which transformers' generate applies them"
    from transformers import GenerationConfig
    config = GenerationConfig(do_sample=True, temperature=.7, top_k=5, top_p=.9, min_p=.1, repetition_penalty=1.3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ids = torch.zeros(1, 3, dtype=torch.int64)
        processors = pair[1]._get_logits_processor(config, input_ids_seq_length=3, encoder_input_ids=ids, device='cpu')
    assert [type(p).__name__.split('Logits')[0] for p in processors] == ['RepetitionPenalty', 'Temperature', 'TopK', 'TopP', 'MinP']


def test_draws_follow_the_distribution(r):
    logits, n = torch.randn(6), 60_000
    row = RowSampler(SamplingParams(temperature=.8, top_k=4, seed=SEED), [])
    weights = row.weights(logits)
    got = torch.bincount(torch.tensor([draw_token(weights, row.uniform()) for _ in range(n)]), minlength=6)/n
    top = logits.topk(4)
    want = torch.zeros(6).scatter(0, top.indices, (top.values/.8).softmax(0))
    # Bernstein's bound, which one of four frequencies exceeds once in ten million draws, however rare its token
    assert ((got-want).abs() <= 6.04*(want*(1-want)/n).sqrt() + 12.2/n*(want > 0)).all()


def test_seeds(pair):
    ids, kw = torch.tensor([[1, 2, 3]]), dict(max_new_tokens=20, temperature=1.5)
    a, b, c = (pair[0].generate(ids, seed=s, **kw) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    state = torch.get_rng_state()
    pair[0].generate(ids, seed=3, **kw)
    assert torch.equal(torch.get_rng_state(), state) # a seeded draw leaves PyTorch's generator alone


# Stop strings and characters

def until(text, stops):
    "Text up to the stop string that is complete first; of two that end together, the longer"
    found = [(i+len(s), i) for s in stops if (i := text.find(s)) >= 0]
    return text[:min(found)[1]] if found else text


def cut(text, at):
    at = sorted({min(i, len(text)) for i in at})
    return [text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]


few = st.text('ab\né', min_size=1, max_size=4)


@many
@given(st.text('ab\né', max_size=40), st.lists(few, max_size=4), st.lists(st.integers(0, 40)))
@example('abcab', ['cab', 'ab'], [1, 2])
@example('aab', ['ab'], [1, 2])
@example('abab\n', ['aba\n', 'bab'], [3])
def test_stopper(text, stops, at):
    stopper, shown, want = Stopper(stops), '', until(text, stops)
    for piece in cut(text, at):
        shown += stopper.push(piece)
        assert want.startswith(shown) # nothing is shown that is part of a stop string
        if stopper.stopped: break
    assert stopper.stopped == (want != text or any(s in text for s in stops))
    assert shown + ('' if stopper.stopped else stopper.held) == want
    if len(stops) == 1: assert want == text.split(stops[0])[0]


@many
@given(st.text('abc', max_size=30), st.lists(st.text('abc', min_size=1, max_size=4), max_size=4), *[st.lists(st.integers(0, 30))]*2)
@example('abcd', ['abcd', 'c'], [3], [])
def test_stopper_does_not_mind_the_cuts(text, stops, one, other):
    def run(at):
        stopper, shown = Stopper(stops), ''
        for piece in cut(text, at):
            shown += stopper.push(piece)
            if stopper.stopped: return shown
        return shown + stopper.held
    assert run(one) == run(other) == run(range(31))


@many
@given(st.text('ab', max_size=20), st.lists(st.text('ab', min_size=1, max_size=3), min_size=1, max_size=3))
def test_stopper_holds_back_no_more_than_it_must(text, stops):
    "What is held begins a stop string, and no shorter tail would do"
    stopper = Stopper(stops)
    for c in text:
        stopper.push(c)
        if stopper.stopped: break
        assert len(stopper.held) < max(map(len, stops))
        assert not stopper.held or any(s.startswith(stopper.held) for s in stops)


@pytest.fixture(scope='module')
def smol():
    try: return Tokenizer.from_pretrained('smollm2-135m')
    except FileNotFoundError as e: pytest.skip(str(e))


def speaks(tokens, eos=()):
    "A model that says these tokens"
    return SimpleNamespace(stream=lambda ids, **kw: (torch.tensor([t]) for t in tokens), config=SimpleNamespace(eos_ids=eos))


def test_streamed_characters(smol):
    "Text in any script, token by token, arrives whole"
    @many
    @given(st.text(st.characters(exclude_categories=['Cs']) | st.sampled_from('🙂深é👩\u200d💻\u0301\ufffd'), max_size=30))
    @example('🙂\ufffd深👩\u200d💻')
    def check(text):
        if set(text.encode()) & set(smol._missing): return
        tokens, decoder = smol.encode(text), smol.stream_decoder()
        parts = [decoder.push(t) for t in tokens]
        assert ''.join(parts) == text and decoder.flush() == ''
        assert ''.join(stream_text(speaks(tokens), smol, [1])) == text
        shown = list(stream_text(speaks([*tokens, smol.eos_ids[0], *tokens]), smol, [1]))
        assert ''.join(shown) == text and all(shown)
    check()


def test_streamed_stops(smol):
    @many
    @given(st.text('ab \n🙂深', max_size=30), st.lists(st.text('ab \n🙂深', min_size=1, max_size=3), max_size=3))
    def check(text, stops):
        shown = list(stream_text(speaks(smol.encode(text)), smol, [1], stop=stops))
        assert ''.join(shown) == until(text, stops) and all(shown)
    check()

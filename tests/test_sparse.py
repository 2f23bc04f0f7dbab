"""DeepSeek-V3.2's sparse attention against transformers, and the same selection in prefill, decode and batch

Configs are drawn at random in every run. The seed is printed; SPARSE_SEED=n repeats a run, SPARSE_DRAWS=n asks for more draws.
"""
import itertools
import json
import os
import random
import warnings
from dataclasses import replace

import pytest
import torch

from deepseek_nb import Model
from deepseek_nb.arch import sparse
from deepseek_nb.arch.attention import causal_mask
from deepseek_nb.arch.routing import affinity, route
from deepseek_nb.arch.sparse import DSA, attend_selected, index_scores, top_by_threshold, top_positions
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use

SEED = int(os.environ.get('SPARSE_SEED') or random.SystemRandom().randrange(10**6))
DRAWS = int(os.environ.get('SPARSE_DRAWS') or 4)
NEW = 5
NEAR = 1e-5 # scores closer than this, relative to the largest, may be exchanged by rounding


@pytest.fixture(autouse=True, scope='module')
def say(pytestconfig):
    with pytestconfig.pluginmanager.getplugin('capturemanager').global_and_fixture_disabled(): print(f'\nSPARSE_SEED={SEED}')
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def draw(r):
    "A V3.2 config of transformers"
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    groups, rotary = r.choice([1, 2]), 2*r.randrange(1, 5)
    keep, kind = r.randrange(1, groups+1), r.choice(['default', 'yarn'])
    rope = dict(rope_type=kind, rope_theta=r.choice([100., 10000.]))
    if kind == 'yarn': rope |= dict(factor=4., original_max_position_embeddings=16, beta_fast=32., beta_slow=1.)
    if kind == 'yarn' and r.random() < .7: rope |= dict(mscale=1., mscale_all_dim=1.)
    heads = r.choice([1, 2, 3])
    return transformers.DeepseekV32Config(
        vocab_size=r.randrange(40, 90), hidden_size=heads*2*r.randrange(4, 12), num_hidden_layers=r.randrange(1, 4), intermediate_size=24,
        num_attention_heads=heads, num_key_value_heads=heads, q_lora_rank=r.choice([8, 12]), kv_lora_rank=r.choice([4, 8, 17]),
        qk_nope_head_dim=r.choice([4, 7]), qk_rope_head_dim=rotary, v_head_dim=r.choice([3, 8]), attention_bias=r.random() < .3,
        index_n_heads=r.choice([1, 2, 8, 16]), index_head_dim=rotary+r.choice([0, 4]), index_topk=r.choice([1, 4, 9]),
        first_k_dense_replace=r.randrange(0, 3), n_routed_experts=groups*3, n_shared_experts=1,
        num_experts_per_tok=r.randrange(1, keep*3+1),
        moe_intermediate_size=8, n_group=groups, topk_group=keep, routed_scaling_factor=2.5, norm_topk_prob=True, rope_parameters=rope,
        max_position_embeddings=128, tie_word_embeddings=r.random() < .4, bos_token_id=0, eos_token_id=1, pad_token_id=None)


EAGER = dict(attn_implementation='eager', experts_implementation='eager')


def oracle(config, seed):
    import transformers
    torch.manual_seed(seed)
    m = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER)
    for k, t in m.state_dict().items():
        noise = torch.randn(t.shape)
        t.copy_(1 + .2*noise if k.endswith('norm.weight') else noise*(.3 if t.dim() == 1 else t.shape[-1]**-.5))
    return m.eval()


class Spy:
    "Records scores, masks and positions of every selection within a `with` block"
    def __enter__(self):
        self.calls, self.real = [], sparse.select_positions
        def spied(q, k, w, a, mask=None):
            out = self.real(q, k, w, a, mask)
            seen = causal_mask(q.shape[1], k.shape[1]) if mask is None else mask
            self.calls.append((index_scores(q, k, w), a, seen, out))
            return out
        spied.op, spied.twin = self.real.op, self.real.twin # for chapters that are imported meanwhile
        sparse.select_positions = spied
        return self
    def __exit__(self, *error): sparse.select_positions = self.real

    def margins(self):
        "Distance between the last selected and the first other score, relative to the largest, `b s`; ∞ where all are selected"
        for scores, k, mask, _ in self.calls:
            best = scores.masked_fill(~mask.expand_as(scores), -torch.inf).sort(-1, descending=True).values
            gap = (best[..., k-1] - best[..., k])/scores.abs().max()
            yield gap.where(best[..., k] > -torch.inf, torch.inf).nan_to_num(torch.inf, posinf=torch.inf)


def clear(m, *args, **kwargs):
    "Logits, and for each row the number of positions before the first near tie of a selection"
    with Spy() as spy: logits = m(*args, **kwargs)
    b, s = logits.shape[:2]
    sure = torch.ones(b, s, dtype=torch.bool)
    for gap in spy.margins(): sure &= gap > NEAR
    return logits, (sure.long().cumprod(-1)).sum(-1).tolist()


def steady(m, ids):
    "Whether rounding doesn't change the choice of an expert, of a token or of a key: the oracle's own answer to tiny noise"
    a, w = m(ids).logits, m.get_input_embeddings().weight
    kept = w.clone()
    w.mul_(1 + 2e-6*torch.randn(w.shape))
    b = m(ids).logits
    w.copy_(kept)
    top = a.topk(2).values
    return ((a - b).abs().amax() < 3e-5*a.abs().amax()) and ((top[..., 0] - top[..., 1]) > 1e-4*a.abs().max()).all()


def same(got, want, upto, told, skip=0):
    for g, w, n in zip(got, want, upto, strict=True):
        if n <= skip: continue
        far = (g[skip:n] - w[skip:n]).abs().max().item()
        assert far <= 1e-4*want.abs().max().item(), f'{far:.2e} apart: {told}'


@pytest.fixture(scope='module', params=range(DRAWS))
def pair(request, tmp_path_factory):
    "transformers' model, ours from its folder, tokens, and the number of positions of each row that are compared"
    pytest.importorskip('transformers')
    r = random.Random(f'{SEED} {request.param}')
    with torch.no_grad():
        theirs, folder = oracle(draw(r), r.randrange(10**6)), tmp_path_factory.mktemp('v32')
        theirs.save_pretrained(folder)
        ours = Model.from_pretrained(folder, dtype=torch.float32, device='cpu')
        for _ in range(20):
            ids = torch.randint(2, theirs.config.vocab_size, (3, 40))
            logits, upto = clear(ours, ids)
            if steady(theirs, ids) and (ours.config.index_n_heads < 8 or min(upto) == 40): break
    return theirs, ours, ids, upto, f'SPARSE_SEED={SEED} draw {request.param} {theirs.config.to_json_string()}'


def test_full_in_both_forms(pair):
    theirs, ours, ids, upto, told = pair
    want = theirs(ids).logits
    for form in ('auto', 'naive', 'absorbed'): same(ours(ids, mla=form), want, upto, told)
    assert all(type(b.self_attn) is DSA for b in ours.layers)


def test_chunks_steps_and_rewind(pair):
    theirs, ours, ids, upto, told = pair
    want = theirs(ids).logits
    cache = ours.new_cache(3)
    parts = [ours(ids[:, a:b], cache=cache) for a, b in ((0, 3), (3, 17), (17, 30))]
    parts += [ours(ids[:, i:i+1], cache=cache) for i in range(30, 40)]
    same(torch.cat(parts, 1), want, upto, told)
    cache.rewind(25)
    same(torch.cat([ours(ids[:, 15:16], cache=cache), ours(ids[:, 16:], cache=cache)], 1), want[:, 15:], [max(0, n-15) for n in upto], told)


def test_left_padding_and_rows_alone(pair):
    theirs, ours, ids, upto, told = pair
    pads = [0, 7, 19]
    mask = torch.stack([torch.arange(40) >= p for p in pads]).long()
    cache = ours.new_cache(3)
    got, sure = clear(ours, ids, attention_mask=mask)
    steps = [ours(ids[:, :33], cache=cache, attention_mask=mask[:, :33]), *(ours(ids[:, i:i+1], cache=cache) for i in range(33, 40))]
    steps = torch.cat(steps, 1)
    want = theirs(ids, attention_mask=mask).logits
    for i, p in enumerate(pads):
        alone, n = clear(ours, ids[i:i+1, p:])
        n = min(n[0] + p, sure[i])
        for other in (want[i], steps[i], torch.cat([got[i, :p], alone[0]])): same(got[i:i+1], other[None], [n], told, skip=p)


def test_greedy_and_folders(pair, tmp_path):
    theirs, ours, ids, upto, told = pair
    import transformers
    if ours.config.index_n_heads >= 8 and min(upto) == 40 and steady(theirs, ids):
        full = ids
        for _ in range(NEW): full = torch.cat([full, theirs(full).logits[:, -1:].argmax(-1)], 1)
        if steady(theirs, full) and min(clear(ours, full)[1]) == 40+NEW:
            assert torch.equal(ours.generate(ids, max_new_tokens=NEW, eos_token_id=-1), full), told
    saved = ours.save_pretrained(tmp_path/'b')
    back, info = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32, **EAGER, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), told
    assert torch.equal(back.eval()(ids).logits, theirs(ids).logits), told
    again = Config.from_hf(json.loads((saved/'config.json').read_text()))
    for form in ('official', 'transformers'): assert Config.from_hf(json.loads(json.dumps(ours.config.to_hf(form)))) == ours.config == again


def test_cache_takes_what_the_formula_says(pair):
    _, ours, ids, _, told = pair
    c = ours.config
    cache = ours.new_cache(3, 48)
    ours(ids, cache=cache)
    width = c.kv_lora_rank + c.qk_rope_head_dim + c.index_head_dim
    assert cache.nbytes == 3*48*c.cache_bytes_per_token(4) == 3*48*4*c.n_layers*width, told


# The selection

def stable(scores, k, mask):
    "The rule in words: the highest scores, then the lowest positions"
    rows = []
    for row, seen in zip(scores.tolist(), mask.tolist(), strict=True):
        best = sorted((i for i, m in enumerate(seen) if m), key=lambda i: (-row[i], i))[:k]
        rows.append(sorted(best) + [-1]*(min(k, len(row)) - len(best)))
    return torch.tensor(rows)


@pytest.mark.parametrize('kind', ['reference', 'torch', 'auto'])
def test_rule_in_prefill_decode_and_batch(kind):
    "Scores without rounding: multiples of 1/32, of which many tie"
    torch.manual_seed(SEED)
    for heads, t, k in ((1, 33, 5), (2, 70, 16), (4, 40, 1), (3, 20, 30)):
        q, keys, w = ((torch.randn(3, *shape)*32).round()/32 for shape in ((t, heads, 8), (t, 8), (t, heads)))
        with use(kind):
            whole = top_positions(index_scores(q, keys, w), k, causal_mask(t, t))
            for b in range(3):
                with use('reference'): scores = index_scores(q[b:b+1], keys[b:b+1], w[b:b+1])[0]
                want = stable(scores, k, causal_mask(t, t))
                assert torch.equal(whole[b], want)
                for i in range(t):
                    step = top_positions(index_scores(q[b:b+1, i:i+1], keys[b:b+1, :i+1], w[b:b+1, i:i+1]), k)[0, 0]
                    assert torch.equal(step, want[i, :len(step)]), (kind, heads, b, i)
                    assert (want[i, len(step):] == -1).all()


@pytest.mark.parametrize('kind', ['reference', 'torch', 'auto'])
def test_rule_on_signed_zeros_and_masks(kind):
    torch.manual_seed(SEED)
    scores = torch.randint(-1, 2, (50, 23))*torch.tensor([1., -1.])[torch.randint(2, (50, 23))] # 0 and −0 are equal
    mask = torch.rand(50, 23) < .6
    with use(kind): assert torch.equal(top_positions(scores, 7, mask), stable(scores, 7, mask))
    with use(kind): assert torch.equal(top_positions(scores[:, :5], 7), stable(scores[:, :5], 7, torch.ones(50, 5)))
    low = scores.float().masked_fill(scores <= 0, -torch.inf) # visible scores of −∞ beside hidden positions, most of them before
    with use(kind): assert torch.equal(top_positions(low, 12, mask), stable(low, 12, mask))


def toy(**kw):
    return Config('deepseek_v32', **dict(
        vocab_size=50, dim=24, n_layers=2, n_heads=2, inter_dim=24, q_lora_rank=12, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4,
        v_head_dim=6, index_n_heads=1, index_head_dim=8, index_topk=6, rope=Rope(interleaved=True), max_positions=128, n_dense_layers=1,
        n_routed_experts=4, n_shared_experts=1, n_activated_experts=2, moe_inter_dim=8, score_func='sigmoid', score_bias=True,
        group_score='sum2', norm_topk=True) | kw)


def model(c, seed=SEED):
    torch.manual_seed(seed)
    m = Model(c, torch.float32, 'cpu').init_weights(.3).eval()
    for k, p in m.named_parameters():
        if k.endswith('weights_proj.weight'): p.data.abs_()
    return m


def test_model_selects_the_same_in_prefill_decode_and_batch():
    "One index head: half of the scores are exactly zero. Where no two scores nearly tie, all positions are equal, exact ties included"
    m = model(toy(n_layers=1))
    ids, ties, t = torch.randint(50, (3, 40)), 0, 40
    cache = m.new_cache(3)
    with use('torch'): # block by block: the fused step of decoding has its selection in C++, which its own tests compare
        with Spy() as whole: m(ids)
        with Spy() as steps:
            for i in range(t): m(ids[:, i:i+1], cache=cache)
        with Spy() as rows:
            for b in range(3): m(ids[b:b+1])
    scores, k, _, positions = whole.calls[0]
    steps = {s[0].shape[-1]: s[3][:, 0] for s in steps.calls}
    assert sorted(steps) == [*range(k+1, t+1)] # under index_topk tokens there is no score
    for b in range(3):
        for i in range(k, t):
            seen = scores[b, i, :i+1].sort(descending=True).values
            gap = (seen[k-1] - seen[k]).item()/scores.abs().max().item()
            near = (seen.abs()/scores.abs().max())
            if 0 < gap < NEAR or ((near > 0) & (near < NEAR)).any(): continue
            ties += gap == 0
            assert torch.equal(positions[b, i], steps[i+1][b]) and torch.equal(positions[b, i], rows.calls[b][3][0, i]), (SEED, b, i)
    assert ties > 3, 'the test must see exact ties'


def test_dense_up_to_topk():
    "With at most index_topk tokens, the logits are those of V3 with the same weights, bit for bit, and the index keys are in the cache"
    m = model(toy())
    dense = Model(replace(m.config, model_type='deepseek_v3', index_n_heads=0, index_head_dim=0, index_topk=0), torch.float32, 'cpu').eval()
    dense.load_state_dict({k: v for k, v in m.state_dict().items() if '.indexer.' not in k})
    ids = torch.randint(50, (2, 6))
    with use('torch'):
        assert torch.equal(m(ids), dense(ids))
        assert not torch.allclose(m(torch.cat([ids, ids], 1)), dense(torch.cat([ids, ids], 1)), atol=1e-4)
        cache = m.new_cache(2)
        with Spy() as spy: m(ids, cache=cache)
        assert not spy.calls and cache[0].tensors[1][:, :6].abs().sum(-1).min() > 0


def test_attention_reads_only_what_was_selected():
    "Rows that no query selected may hold anything"
    torch.manual_seed(SEED)
    q, z, positions = torch.randn(2, 3, 4, 10), torch.randn(2, 20, 10), torch.tensor([[0, 3, 7, -1]]*4)[None].expand(2, -1, -1)
    want = attend_selected(q, z, positions, 6, .3)
    other = torch.ones(20, dtype=torch.bool)
    other[[0, 3, 7]] = False
    z[:, other] = torch.nan
    assert torch.equal(attend_selected(q, z, positions, 6, .3), want)


# The same rule in the router

@pytest.mark.parametrize('score', ['softmax', 'sigmoid', 'sqrtsoftplus'])
def test_experts_of_equal_scores_in_every_twin(score):
    "Logits and biases of few values: prefill, single tokens and a permuted batch choose the experts that the rule names, in every twin"
    r, found = random.Random(f'{SEED} {score}'), set()
    torch.manual_seed(SEED)
    for groups, per, keep, how in ((1, 12, 1, 'max'), (4, 4, 2, 'max'), (4, 4, 2, 'sum2'), (8, 8, 3, 'sum2')):
        k = r.randrange(1, keep*per)
        c = toy(n_routed_experts=groups*per, n_expert_groups=groups, n_limited_groups=keep, group_score=how, n_activated_experts=k,
                score_func=score)
        logits, bias = torch.tensor([-1., 0., 2.])[torch.randint(3, (60, groups*per))], torch.randint(2, (groups*per,))/4
        logits = logits[[i for i,row in enumerate(logits) if decided(row, bias, groups, how, score)]][:20]
        assert len(logits) > 5
        choice = affinity(logits, score) + bias
        want = [by_hand(row, groups, keep, how, k) for row in choice]
        for name in route.op.plan('auto', 'cpu'):
            twin = route.op.twins[name]
            if not route.op.ready(name) or (twin.supports and not twin.supports(logits, c, bias)): continue
            found.add(name)
            chosen = lambda x, twin=twin, c=c, bias=bias: [sorted(e) for e in twin.fn(x, c, bias).experts.tolist()]
            assert chosen(logits) == want, (SEED, name)
            assert [chosen(x[None])[0] for x in logits] == want and chosen(logits.flip(0)) == want[::-1], (SEED, name)
    assert 'reference' in found


def decided(logits, bias, groups, how, score):
    "Whether ranks that are nearly equal come from equal numbers: the sums (p+1/4)+q and p+(q+1/4) may be rounded apart"
    made = [*zip(logits.tolist(), bias.tolist(), strict=True)]
    choice = affinity(logits.double(), score) + bias
    per, tops = len(made)//groups, 1 if how == 'max' else 2
    parts = [sorted(range(g*per, (g + 1)*per), key=lambda e: -choice[e].item())[:tops] for g in range(groups)]
    ranked = [[(choice[e].item(), made[e]) for e in range(len(made))],
              [(sum(choice[e].item() for e in part), sorted(made[e] for e in part)) for part in parts]]
    return all(a[1] == b[1] or abs(a[0] - b[0]) > 1e-5 for some in ranked for a,b in itertools.combinations(some, 2))


def by_hand(scores, groups, keep, how, k):
    "Experts of one token, by lists: Python sorts keep the order of equal items"
    x = scores.view(groups, -1)
    rank = x.amax(-1) if how == 'max' else x.topk(2, -1).values.sum(-1)
    kept = sorted(range(groups), key=lambda g: -rank[g].item())[:keep]
    return sorted(sorted((e for e in range(len(scores)) if e//x.shape[1] in kept), key=lambda e: -scores[e].item())[:k])


# Where V3 works

@pytest.fixture(scope='module')
def small():
    with torch.no_grad():
        m = model(toy(n_mtp_layers=1, index_n_heads=8)).add_mtp()
        Model.init_weights(m.mtp, .3)
        for _ in range(50):
            ids = torch.randint(50, (2, 30))
            logits, upto = clear(m, ids, mla='naive')
            parts = [clear(m, ids[:, part])[1] for part in (slice(0, 12), slice(12, 30))]
            if min(upto) == 30 and parts == [[12]*2, [18]*2]: return m, ids, logits
    raise AssertionError(f'no tokens without near ties, SPARSE_SEED={SEED}')


def in_steps(m, ids, cache):
    return torch.cat([m(ids[:, :20], cache=cache), *(m(ids[:, i:i+1], cache=cache) for i in range(20, 30))], 1)


def close(a, b): assert ((a - b).abs().max() <= 1e-4*b.abs().max()).item(), (SEED, ((a - b).abs().max()/b.abs().max()).item())


def test_paged_ragged_and_quantised_caches(small):
    from deepseek_nb.arch.model import head
    from deepseek_nb.infer.paged import PagedCache, PagePool
    from deepseek_nb.infer.quant_cache import CacheFormat, quantized_bytes
    m, ids, want = small
    c = m.config
    pool = PagePool(c, 40, page=4)
    assert pool.page_bytes == 4*c.cache_bytes_per_token(4)
    cache = PagedCache(pool, 2)
    close(torch.cat([m(ids[:, :11], cache=cache), m(ids[:, 11:12], cache=cache), m(ids[:, 12:], cache=cache)], 1), want)
    cache.rewind(9)
    close(m(ids[:, 21:], cache=cache), want[:, 21:])
    cache.free()
    a, b = PagedCache(pool, 1), PagedCache(pool, 1)
    x = m.ragged(torch.cat([ids[0, :20], ids[1, :3]]), [a, b], [20, 3])
    y = m.ragged(torch.cat([ids[0, 20:21], ids[1, 3:30]]), [a, b], [1, 27])
    close(head(torch.cat([x[:20], y[:1]]), m.head_weight), want[0, :21])
    close(head(torch.cat([x[20:], y[1:]]), m.head_weight), want[1])
    form = CacheFormat('int8', 32)
    z, k = torch.randn(2, 30, 12), torch.randn(2, 30, 8)
    back = form.decode_layer(c, *form.encode_layer(c, z, k))
    assert torch.equal(back[1], k) and torch.equal(back[0][..., 8:], z[..., 8:]) and torch.allclose(back[0], z, atol=.03)
    cache = m.new_cache(2, 30, form)
    whole = m(ids, cache=cache)
    assert cache.nbytes == 60*quantized_bytes(form, c)
    stepped, pages = m.new_cache(2, codec=form), PagedCache(PagePool(c, 40, page=4, codec=form), 2)
    for other in (stepped, pages): close(in_steps(m, ids, other), whole)


def test_documents_drafts_and_mtp(small, tmp_path):
    m, ids, want = small
    docs = torch.tensor([[0]*12 + [1]*18]*2)
    h = m.hidden(ids, documents=docs)
    assert not torch.allclose(h, m.hidden(ids), atol=1e-3)
    for part in (slice(0, 12), slice(12, 30)): close(h[:, part], m.hidden(ids[:, part]))
    saved = m.save_pretrained(tmp_path/'m')
    back = Model.from_pretrained(saved, dtype=torch.float32, mtp=True)
    assert torch.equal(back.hidden_ahead(back.hidden(ids), ids)[0], m.hidden_ahead(m.hidden(ids), ids)[0])
    plain = m.generate(ids[:1], max_new_tokens=8, eos_token_id=-1)
    for draft in ('lookup', 'mtp'): assert torch.equal(m.generate(ids[:1], max_new_tokens=8, eos_token_id=-1, draft=draft), plain), draft


@pytest.mark.parametrize('form', ['int8', 'nf4'])
def test_quantised_weights(small, form):
    from deepseek_nb.quant.model import quantize_model
    m, ids, _ = small
    q = quantize_model(m, form, embedding=None)
    lines = [l for l in str(q.quantization_report()).splitlines() if 'indexer' in l]
    exact = {n: next(l for l in lines if n in l) for n in ('weights_proj', 'k_norm.weight', 'k_norm.bias')}
    assert all('float32' in l for l in exact.values()) and 'indexer weights' in exact['weights_proj']
    assert sum(form in l for l in lines) == 2 # wq_b and wk
    got, want = in_steps(q, ids, q.new_cache(2)), q(ids)
    if form == 'nf4': return close(got, want)
    # an activation that differs in its last bit may round to another of 255 codes, which changes its token and later ones by up to a code
    off = (got - want).abs().amax(-1)/want.abs().max()
    assert off.isfinite().all() and off.median() <= 1e-4, off


def test_fixed_cache_of_compiled_steps(small):
    "The step that `Model.compile` traces sees the whole capacity, also positions that are not yet written"
    from deepseek_nb.arch.rope import frequencies
    from deepseek_nb.kernels.compile import decode_step
    m, ids, want = small
    cache, no_pad, freqs = m.new_cache(2, 40), torch.zeros(2, dtype=torch.long), frequencies(m.config.rope, 4)
    m(ids[:, :3], cache=cache)
    for slot in cache.slots:
        for x in slot.tensors: x[:, 3:] = torch.randn(x[:, 3:].shape)*9
    for i in range(3, 30):
        close(decode_step(m, ids[:, i:i+1], torch.tensor([i]), no_pad, freqs, [s.tensors for s in cache.slots])[:, 0], want[:, i])


def test_pattern_is_what_was_read(small):
    from deepseek_nb.infer.inside import attention_pattern, record_stream
    m, ids, _ = small
    p = attention_pattern(m, record_stream(m, ids[:1]), 1)
    with Spy() as spy: m(ids[:1])
    read = sparse.selected_mask(spy.calls[1][3], 30)
    assert torch.equal(p.sum(1)[0] > 0, read[0, 0]) and torch.allclose(p.sum(-1), torch.ones(1, 2, 30))


def test_adapters_and_gradients(small):
    "LoRA finds the indexer by name, and merges; a loss on tokens reaches every weight but the indexer's, which no selection lets through"
    from deepseek_nb import LoraConfig
    from deepseek_nb.train.lora import lora_weights
    m, ids, _ = small
    own = model(m.config)
    LoraConfig(r=2, target_modules='all-linear').apply(own)
    names = {k for k in lora_weights(own) if '.indexer.' in k}
    assert names == {f'layers.{i}.self_attn.indexer.{n}.weight' for i in range(2) for n in ('wq_b', 'wk', 'weights_proj')}
    for p in own.parameters():
        if p.requires_grad: p.data.normal_(std=.1)
    logits, upto = clear(own, ids)
    with torch.enable_grad(): torch.nn.functional.cross_entropy(own(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for k, p in own.named_parameters():
        if p.requires_grad: assert (p.grad is None) == ('.indexer.' in k), k
    same(own.merge_and_unload()(ids), logits, upto, SEED)


@pytest.mark.parametrize('chunk', [1, 100, 10**9])
def test_chunks_of_queries(small, chunk, monkeypatch):
    m, ids, want = small
    monkeypatch.setattr(sparse, 'CHUNK', chunk)
    close(m(ids, mla='absorbed'), want)


class Bytes:
    "A tokenizer whose tokens are bytes"
    eos_ids, _skip, chat_template = (), (), None
    def id_to_bytes(self, i): return bytes([i])
    def stream_decoder(self, skip_special_tokens=False):
        from deepseek_nb.files.tokenizer import StreamDecoder
        return StreamDecoder(self, skip_special_tokens)


def test_server():
    "Prompts with a common prefix, in pages and chunks, get the tokens of `generate`"
    from deepseek_nb.infer.engine import Engine
    from deepseek_nb.infer.request import Request
    from deepseek_nb.infer.sampling import SamplingParams
    m, r = model(toy(index_n_heads=8), seed=0), random.Random(0)
    engine, shared = Engine(m, Bytes(), budget=64), [r.randrange(50) for _ in range(80)]
    prompts = [shared + [r.randrange(50) for _ in range(9)], [5, 6, 7], shared[:70], shared]
    greedy = SamplingParams(temperature=0.)
    streams = []
    for group in (prompts[:2], prompts[2:]):
        streams += [engine.submit(Request(p, greedy, max_tokens=8, stop_ids=())) for p in group]
        while engine.step(): continue
    for p, stream in zip(prompts, streams, strict=True):
        want = m.generate(torch.tensor([p]), max_new_tokens=8, eos_token_id=-1)[0, len(p):].tolist()
        assert [x.id for x in stream.arrived() if x is not None] == want


def test_nothing_to_select():
    for scores, k in ((torch.randn(2, 3, 0), 4), (torch.randn(2, 3, 5), 0)):
        with use('reference'): want = top_positions(scores, k)
        assert torch.equal(top_by_threshold(scores, k), want) and want.shape == (2, 3, 0)

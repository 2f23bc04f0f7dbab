"""The compiled decode step: the eager tokens, one graph whatever the cache holds, and a model that is otherwise what it was.

Where a test is of what is traced, guarded or chosen, the backend is `eager`: `aot_eager` makes the same graphs in twice the time.
"""
import copy
import io
import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.infer.generate import left_padded
from deepseek_nb.kernels import compile as comp

MOE = Config('deepseek_v3', vocab_size=64, dim=32, n_layers=2, n_heads=2, inter_dim=48, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=1, n_routed_experts=8, n_shared_experts=1, n_activated_experts=2,
             n_expert_groups=4, n_limited_groups=2, moe_inter_dim=16, score_func='sigmoid', score_bias=True, group_score='sum2',
             norm_topk=True, route_scale=2.5, max_positions=256, rope=Rope(interleaved=True))
GQA = Config('qwen2', vocab_size=64, dim=32, n_layers=2, n_heads=4, inter_dim=48, n_kv_heads=2, head_dim=8, attn_bias=True,
             tie_embeddings=True, max_positions=256)
CONFIGS = dict(moe=MOE, gqa=GQA, routed=replace(MOE, n_layers=1, n_dense_layers=0), dense=replace(GQA, n_layers=1))
needs_compiler = pytest.mark.skipif(comp.how_to_compile('cpu') != 'inductor', reason='no C++ compiler')


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def model(c=CONFIGS['routed'], dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return Model(c, dtype, 'cpu').init_weights(.3).eval().requires_grad_(False)


def tokens(m, prompt, n, room=8, **kw): return m.generate(prompt, n, eos_token_id=[], cache=m.new_cache(len(prompt), room), **kw)


def through(m, *args, **kw):
    "Tokens with the choice `compile`, as kernels go first where they serve"
    with use('compile'): return tokens(m, *args, **kw)


def graphs(): return counters['stats'].get('unique_graphs', 0)


COMPILED, INDUCTOR = pytest.mark.draw(3, group='compiled'), (needs_compiler, pytest.mark.draw(1, group='inductor'))
# Of one layer, as tracing takes a second each, and a kernel another, of which 20 to 40 are compiled
LARGE = 'EVERY' in os.environ
ONES, TRACED = ('routed', 'dense', *['moe']*LARGE), ('moe', 'gqa') if LARGE else ('routed', 'dense')


@pytest.mark.parametrize('name,backend', [
    *(pytest.param(n, 'aot_eager', marks=COMPILED) for n in TRACED), *(pytest.param(n, 'inductor', marks=INDUCTOR) for n in ONES)])
def test_one_graph_for_200_tokens_and_a_cache_that_grows(name, backend):
    m, prompt = model(CONFIGS[name]), torch.randint(64, (1, 5))
    expected = tokens(m, prompt, 200)
    m.compile(backend)
    cache = m.new_cache(1, 8)
    with use('compile'): assert torch.equal(m.generate(prompt, 200, eos_token_id=[], cache=cache), expected)
    assert cache.capacity == 256 and graphs() == 1 and not counters['graph_break']
    for length in (1, 9, 50): assert through(m, prompt.repeat(1, length)[:, :40], 20).shape[1] == min(5*length, 40) + 20
    assert graphs() == 1


@pytest.mark.draw(3, group='compiled')
@pytest.mark.parametrize('name', TRACED)
def test_batches_and_left_padding(name):
    m = model(CONFIGS[name])
    ids, mask = left_padded([[1, 2, 3, 4, 5, 6, 7], [9], [8, 7, 6]])
    plain = torch.randint(64, (3, 4))
    expected = tokens(m, ids, 30, attention_mask=mask), tokens(m, plain, 30), tokens(m, plain, 9, temperature=.8, seed=3)
    m.compile('aot_eager')
    assert torch.equal(through(m, ids, 30, attention_mask=mask), expected[0])
    assert torch.equal(through(m, plain, 30), expected[1])
    assert torch.equal(through(m, plain, 9, temperature=.8, seed=3), expected[2])
    assert graphs() == 1


@pytest.mark.draw(3, group='compiled')
@pytest.mark.parametrize('name', TRACED)
def test_bfloat16(name):
    "Logits of the same tokens, as greedy tokens of a random model hang on the last bit"
    m, ids, found = model(CONFIGS[name], torch.bfloat16), torch.randint(64, (2, 20)), []
    for _ in range(2):
        with torch.no_grad(), use('compile'):
            cache = m.new_cache(2)
            m(ids[:, :4], cache)
            found.append(torch.cat([m(ids[:, i:i+1], cache) for i in range(4, 20)], 1))
        m.compile('aot_eager')
    assert graphs() == 1 and found[1].dtype == torch.float32
    agree = ((found[0] - found[1]).abs().amax(-1) < .05*found[0].abs().max()).float().mean()
    assert agree > .8  # a router on the edge may choose another expert


def test_a_graph_reads_few_positions(monkeypatch):
    "Positions that a graph attends to, over 700 steps of a cache with room for 4096"
    m, spans = model(replace(GQA, max_positions=4096)), []

    class Graph:
        def replay(self): pass

    def record(self, model, inputs, freqs, tensors):
        spans.append(tensors[0][0].shape[-2])
        return inputs, Graph(), torch.zeros(1, 1, 64)

    monkeypatch.setattr(comp.GraphStep, 'record', record)
    with torch.no_grad():
        cache, stepper = m.new_cache(1, 4096), comp.Stepper(m, comp.GraphStep(), 'graph')
        for n in range(700):
            stepper.advance(torch.zeros(1, 1, dtype=torch.long), cache)
            assert n < spans[-1] <= max(n + 256, (n + 1)*4/3)
    assert spans == [256, 512, 768]
    assert comp.how_to_compile('cuda') == 'graph'


def test_a_decode_step_on_a_gpu_reads_no_token():
    "On the device `meta`, reading a value raises an error"
    m, token = Model(replace(MOE, n_routed_experts=0), torch.float32, 'meta'), torch.zeros(2, 1, dtype=torch.long, device='meta')
    cache = m.new_cache(2)
    with pytest.raises(RuntimeError): m.hidden(token)
    with pytest.raises(RuntimeError): m.hidden(token, cache)
    cache.reserve(3)
    cache.advance(3)
    assert m.hidden(token, cache).shape == (2, 1, MOE.dim)
    with pytest.raises(RuntimeError): m.hidden(token.expand(2, 2), cache)


def test_many_choices_go_to_the_operator():
    m, prompt = model(), torch.randint(64, (20, 3))
    expected = tokens(m, prompt, 12)
    assert torch.equal(through(m.compile('eager'), prompt, 12), expected) and graphs() == 1


def test_other_configs():
    moe, gqa = map(CONFIGS.get, TRACED)
    for c in (replace(moe, q_lora_rank=0, norm_topk=False, score_func='softmax', group_score='max', score_bias=False, n_shared_experts=0),
              replace(gqa, n_kv_heads=4, tie_embeddings=False, rope=Rope(kind='yarn', factor=4., original_positions=64))):
        m, prompt = model(c), torch.randint(64, (2, 3))
        expected = tokens(m, prompt, 12)
        assert torch.equal(through(m.compile('eager'), prompt, 12), expected)


def test_everything_else_is_the_models_own():
    m, prompt = model(), torch.randint(64, (2, 6))
    with torch.no_grad(): expected = m(prompt)
    m.compile('eager')
    with torch.no_grad():
        cache = m.new_cache(2)
        for mla in ('naive', 'absorbed'):
            torch.testing.assert_close(m(prompt[:, :5], cache, mla=mla), expected[:, :5])
            torch.testing.assert_close(m(prompt[:, 5:], cache, mla='naive'), expected[:, 5:])
            cache.rewind(6)
        torch.testing.assert_close(m(prompt), expected)
        assert graphs() == 0
    m.requires_grad_(True)
    m(prompt).sum().backward()
    assert m.norm.weight.grad is not None and graphs() == 0


def test_choices_and_hooks_are_obeyed():
    m, prompt, seen = model(), torch.randint(64, (1, 4)), []
    m.compile('eager')
    with use('reference'): expected = tokens(m, prompt, 5)
    assert graphs() == 0
    handle = m.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(through(m, prompt, 5), expected) and len(seen) == 5 and graphs() == 0
    handle.remove()
    assert torch.equal(through(m, prompt, 5), expected) and graphs() == 1


@needs_compiler
def test_kernels_go_first():
    "Under `auto` a compiled model keeps the faster kernels where they serve, and compiles where they don't"
    m, prompt = model(), torch.randint(64, (1, 4))
    expected = tokens(m, prompt, 9)
    assert torch.equal(tokens(m.compile('eager'), prompt, 9), expected) and graphs() == 0
    m = model(replace(GQA, out_bias=True))
    expected = tokens(m, prompt, 9)
    assert torch.equal(tokens(m.compile('eager'), prompt, 9), expected) and graphs() == 1


def test_rewind_and_new_weights():
    m, prompt = model(), torch.randint(64, (1, 6))
    m.compile('eager')
    with torch.no_grad(), use('compile'):
        cache = m.new_cache(1)
        m(prompt[:, :5], cache)
        a = m(prompt[:, 5:], cache); cache.rewind(1)
        assert torch.equal(m(prompt[:, 5:], cache), a)
        m.load_state_dict(model(seed=1).state_dict())
        cache = m.new_cache(1)
        m(prompt[:, :5], cache)
        torch.testing.assert_close(m(prompt[:, 5:], cache), m(prompt)[:, 5:])
    assert graphs() == 1


def test_the_model_is_what_it_was(tmp_path):
    m = model()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    assert m.compile('eager') is m
    step = m._compiled_call_impl
    assert m.compile('eager')._compiled_call_impl is step
    through(m, torch.tensor([[1, 2]]), 4)
    assert before.keys() == m.state_dict().keys() and all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    m.save_pretrained(tmp_path/'a'); model().save_pretrained(tmp_path/'b')
    assert [p.name for p in sorted((tmp_path/'a').iterdir())] == [p.name for p in sorted((tmp_path/'b').iterdir())]
    assert (tmp_path/'a/model.safetensors').read_bytes() == (tmp_path/'b/model.safetensors').read_bytes()
    copied, file = copy.deepcopy(m), io.BytesIO()
    assert copied._compiled_call_impl is None
    torch.save(m, file)
    assert torch.load(io.BytesIO(file.getvalue()), weights_only=False)._compiled_call_impl is None


def test_many_models_share_no_limit():
    "A graph too many of one function is an error; the limit is 8, and lowered here, as each graph takes a second"
    with torch._dynamo.config.patch(recompile_limit=2):
        for seed in range(3):
            m, prompt = model(replace(GQA, n_layers=1, dim=32+8*seed), seed=seed), torch.randint(64, (1, 3))
            expected = tokens(m, prompt, 2)
            assert torch.equal(through(m.compile('eager'), prompt, 2), expected)
    assert graphs() == 3


def test_bad_calls_say_the_same():
    m = model()
    m.compile('eager')
    with torch.no_grad(), use('compile'):
        cache = m.new_cache(1)
        m(torch.tensor([[1, 2]]), cache)
        with pytest.raises(ValueError, match='token id 64 is outside the vocabulary'): m(torch.tensor([[64]]), cache)
        with pytest.raises(ValueError, match='cache has 1 rows, tokens have 2'): m(torch.tensor([[1], [2]]), cache)
        m(torch.ones(1, 254, dtype=torch.long), cache)
        with pytest.raises(ValueError, match='context of 257 tokens is longer'): m(torch.tensor([[1]]), cache)
    assert len(cache) == 256


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CXX', raising=False)
    m, prompt = model(), torch.randint(64, (1, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        m.compile()
    assert [str(w.message) for w in caught if 'compiler' in str(w.message)] == \
        [f'decoding stays eager: {comp.how_to_compile("cpu")}'] and caught[0].filename == __file__
    assert torch.equal(tokens(m, prompt, 5), tokens(model(), prompt, 5)) and graphs() == 0


def test_import_is_light(python):
    code = "import sys, deepseek_nb.kernels.compile; print([m for m in ('torch._dynamo', 'torch._inductor') if m in sys.modules])"
    assert python(code) == '[]'

"The path of V3 from config to logits: what later generations add stays out of it, and is found when it is asked for"
import ast
import copy
import os
import pickle
import random
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from deepseek_nb import Model
from deepseek_nb.arch.model import add_attention, add_feed_forward
from deepseek_nb.arch.v4 import V4Config, V4Model, V32Config
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.core.lazy import exported_code
from deepseek_nb.quant.model import QuantizedModel, quantize_model

ROOT = Path(__file__).parents[1]
SEED = int(os.environ.get('SEED') or random.randrange(10**6))
SPINE = 'core.config', 'arch.rope', 'arch.norm', 'arch.attention', 'arch.cache', 'arch.routing', 'arch.moe', 'arch.model'
V3 = dict(vocab_size=40, dim=16, n_layers=3, n_heads=2, inter_dim=24, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
          v_head_dim=4, n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2, moe_inter_dim=32, max_positions=64,
          score_func='sigmoid', score_bias=True, norm_topk=True, rope=Rope(interleaved=True))
V4 = dict(vocab_size=40, dim=32, n_layers=3, n_heads=2, inter_dim=32, n_kv_heads=1, head_dim=16, q_lora_rank=32, qk_rope_head_dim=4,
          window=4, compress_ratios=(0, 4, 8), o_groups=1, o_lora_rank=32, index_n_heads=2, index_head_dim=8, index_topk=2, hc_mult=2,
          n_hash_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2, moe_inter_dim=32, score_func='sqrtsoftplus',
          swiglu_limit=10., max_positions=64, rope=Rope(interleaved=True), compress_rope=Rope(16e4, interleaved=True))


@pytest.fixture(autouse=True)
def seed(request):
    print(f'SEED={SEED}')
    torch.manual_seed(SEED)


def code_of(module):
    return exported_code(next((ROOT/'nbs').rglob(f'*_{module}.ipynb')))[1]


def test_the_config_of_v3_has_no_field_of_a_later_one():
    assert not {f.name for f in fields(Config)} & {*V32Config.__annotations__, *V4Config.__annotations__}
    c = Config('deepseek_v3', **V3)
    for name in ('window', 'hc_mult', 'n_hash_layers', 'index_n_heads', 'compress_ratios', 'mtp_ratios'): assert not getattr(c, name)
    body = next(o for o in ast.parse(code_of('core.config')).body if getattr(o, 'name', '') == 'Config').body
    shown = [o for o in body if isinstance(o, ast.AnnAssign)]
    assert shown[-1].end_lineno - shown[0].lineno < 40


def test_the_fields_make_the_class():
    c, sparse = Config('deepseek_v3', **V3), dict(index_n_heads=2, index_head_dim=4, index_topk=3)
    assert [type(replace(c, **kw)) for kw in ({}, dict(dim=32), sparse, dict(hc_mult=2), sparse | dict(hc_mult=2))] == [
        Config, Config, V32Config, V4Config, V4Config]
    assert type(replace(replace(c, **sparse), n_hash_layers=1)) is V4Config and type(Config('deepseek_v4', **V4)) is V4Config
    with pytest.raises(TypeError, match='unexpected keyword argument'): replace(c, windows=3)
    for o in (c, replace(c, **sparse), Config('deepseek_v4', **V4)):
        for same in (copy.copy(o), copy.deepcopy(o), pickle.loads(pickle.dumps(o)), replace(o)): assert same == o and type(same) is type(o)


def test_the_config_makes_the_model(tmp_path):
    for c, kinds in ((Config('deepseek_v3', **V3), (Model, QuantizedModel)), (Config('deepseek_v4', **V4), (V4Model, QuantizedModel))):
        m = Model(c, torch.float32, 'cpu').eval().requires_grad_(False)
        q, tokens = quantize_model(m, 'int8'), torch.randint(40, (2, 9))
        assert type(m) is kinds[0] and isinstance(q, kinds) and isinstance(q, V4Model) == isinstance(m, V4Model)
        want = m(tokens)
        for same in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert type(same) is type(m) and same(tokens).equal(want)
        m.save_pretrained(tmp_path/c.model_type)
        back = Model.from_pretrained(tmp_path/c.model_type, 'float32', 'cpu')
        assert type(back) is type(m) and torch.allclose(back(tokens), want, atol=1e-5)


@pytest.mark.parametrize('kind', ['reference', 'auto'])
def test_the_text_of_a_block_is_its_halves(kind):
    m = Model(Config('deepseek_v3', **V3), torch.float32, 'cpu').init_weights(.1).eval().requires_grad_(False)
    x, ctx = torch.randn(2, 7, 16), m.context(7)
    for block in m.layers:
        with use('reference'):
            want = x + block.self_attn(block.input_layernorm(x), ctx)
            want = want + block.mlp(block.post_attention_layernorm(want))
        with use(kind): got, halves = block(x, ctx), add_feed_forward(add_attention(x, block, ctx), block)
        assert torch.allclose(got, want, atol=1e-5) and torch.allclose(halves, want, atol=1e-5)


def test_no_part_of_v4_stands_in_the_path_of_v3():
    for module in SPINE:
        code = code_of(module)
        for name in re.findall(r'from deepseek_nb\.arch\.(\w+) import', code):
            assert name not in ('compressed', 'window', 'hyper', 'hash', 'rewindable', 'engram', 'v4', 'v4_config'), (module, name)
        if module == 'arch.model': assert not re.search(r'Clamped|Hyper|hc_mult|window|compress|getattr\(self', code)


def test_the_path_of_v3_stays_short():
    "Lines of exported cells that aren't blank"
    lines = {m: sum(bool(l.strip()) and not l.startswith('#|') for l in code_of(m).splitlines()) for m in SPINE}
    assert sum(lines.values()) <= 1145, lines

"ExecuTorch: greedy text of the golden prompts, drawn mixtures, and bad input."
import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config

pytest.importorskip('executorch', reason='pip install executorch')

from deepseek_nb.export.tensorrt import EdgeModel, export_executorch, ranked_sort  # noqa: E402

CONTEXT = 512
GOLDEN = Path(os.environ.get('DEEPSEEK_NB_GOLDEN') or Path(__file__).resolve().parents[2]/'shared/golden')/'chat_prompts.json'


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    "Golden prompts in tokens, a model in Python, and in ExecuTorch"
    from deepseek_nb.files.tokenizer import Tokenizer
    if not GOLDEN.is_file(): pytest.skip('set DEEPSEEK_NB_GOLDEN to the folder of chat_prompts.json')
    tok, model = Tokenizer.from_pretrained('mini'), Model.from_pretrained('mini', dtype='float32', device='cpu')
    file = export_executorch(model, tmp_path_factory.mktemp('pte')/'mini.pte', context=CONTEXT)
    return [tok.encode(o['prompt'])[-CONTEXT + 16:] for o in json.loads(GOLDEN.read_text())['cases']], model, EdgeModel(file, model.config)


@pytest.mark.draw(2)
@pytest.mark.parametrize('prompt', range(41))
def test_greedy_text_of_golden_prompts(mini, prompt):
    ids, model, run = mini[0][prompt], *mini[1:]
    cache, new, run.cache = model.new_cache(1, len(ids) + 12), torch.tensor([ids]), None
    for _ in range(12):
        with torch.no_grad(): want, got = model(new, cache)[:, -1], run(new)[:, -1]
        assert got.isfinite().all() and (got - want).abs().max() <= 1e-4*want.abs().max()
        assert got.argmax() == want.argmax()
        new = want.argmax()[None, None]


@pytest.mark.parametrize('case', range(2))
def test_drawn_mixtures(source, tmp_path, case):
    "Groups of experts, shared experts, softmax and sigmoid, and equal scores, in parts of a text"
    r = source(f'mixture {case}')
    groups = r.choice((1, 2, 4))
    n, k = groups*r.choice((2, 3, 4)), r.choice((1, 2, 3))
    c = Config('deepseek_v3', vocab_size=r.randrange(40, 90), dim=16*r.randrange(1, 4), n_layers=2, n_heads=2, inter_dim=24, kv_lora_rank=8,
               qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=r.randrange(2), n_routed_experts=n,
               n_activated_experts=min(k, n), moe_inter_dim=8, max_positions=64, n_shared_experts=r.randrange(1, 3), n_expert_groups=groups,
               n_limited_groups=r.randrange(-(-min(k, n)*groups//n), groups + 1))
    model = Model(c, dtype='float32', device='cpu').eval()
    model.init_weights(.2)
    gate = model.layers[-1].mlp.gate
    gate.weight[1] = gate.weight[0]  # two experts whose scores are equal
    run, tokens = EdgeModel(export_executorch(model, tmp_path/'a.pte', context=32), c), torch.randint(c.vocab_size, (1, 30))
    cuts = [0, *sorted(r.sample(range(1, 30), 2)), 30]
    got, want = torch.cat([run(tokens[:, a:b]) for a,b in pairwise(cuts)], 1), model(tokens)
    assert got.isfinite().all() and (got - want).abs().max() <= 1e-4*want.abs().max()


@pytest.mark.parametrize('shape', [(1, 1), (3, 5), (2, 3, 17), (4, 64)])
def test_ranked_sort(source, shape):
    source(f'sort {shape}')
    for x in torch.randint(0, 4, shape).float(), torch.randn(shape), torch.randint(-2, 2, shape):
        for descending in False, True:
            got, want = ranked_sort(x, descending=descending), x.sort(stable=True, descending=descending)
            assert torch.equal(got.values, want.values) and torch.equal(got.indices, want.indices)

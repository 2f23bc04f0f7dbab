"ExecuTorch: greedy text of the golden prompts, and bad input."
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config

pytest.importorskip('executorch', reason='pip install executorch')

from deepseek_nb.export.executorch import EdgeModel, export_executorch  # noqa: E402

CONTEXT = 512
GOLDEN = Path(os.environ.get('DEEPSEEK_NB_GOLDEN') or Path(__file__).resolve().parents[2]/'shared/golden')/'chat_prompts.json'


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    "Golden prompts in tokens, a model in Python, and in ExecuTorch: the dense layer of `mini`, as a mixture of experts is refused"
    from deepseek_nb.files.tokenizer import Tokenizer
    if not GOLDEN.is_file(): pytest.skip('set DEEPSEEK_NB_GOLDEN to the folder of chat_prompts.json')
    tok, model = Tokenizer.from_pretrained('mini'), Model.from_pretrained('mini', dtype='float32', device='cpu')
    whole, model = model.state_dict(), Model(replace(model.config, n_layers=1), dtype='float32', device='cpu').eval()
    model.load_state_dict({k: whole[k] for k in model.state_dict()})
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


def test_a_mixture_is_refused_in_one_line(tmp_path):
    c = Config('deepseek_v3', vocab_size=60, dim=16, n_layers=1, n_heads=2, inter_dim=24, kv_lora_rank=8, qk_nope_head_dim=8,
               qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=0, n_routed_experts=8, n_activated_experts=2,
               moe_inter_dim=8, max_positions=32)
    with pytest.raises(ValueError, match='--to onnx or --to binary') as e:
        export_executorch(Model(c, dtype='float32').eval(), tmp_path/'a.pte')
    assert '\n' not in str(e.value) and not [*tmp_path.iterdir()]

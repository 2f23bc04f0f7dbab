"""Qwen3: norms of the queries and keys of each head, against transformers' class on random weights, from its config.json and its names

Fresh weights and tokens; the seed is printed, SEED=n repeats a run."""
import os
from dataclasses import replace

import pytest
import torch

transformers = pytest.importorskip('transformers')
from deepseek_nb import Model, QuantizedModel  # noqa: E402
from deepseek_nb.arch.model import head  # noqa: E402
from deepseek_nb.core.config import Config  # noqa: E402
from deepseek_nb.export.gguf import export_gguf  # noqa: E402
from deepseek_nb.infer.load import decode_path  # noqa: E402
from deepseek_nb.infer.paged import PagedCache, PagePool  # noqa: E402

SEED = int(os.environ.get('SEED', torch.seed() % 10**6))
YARN = dict(rope_type='yarn', factor=4., original_max_position_embeddings=16, rope_theta=1e6)


@pytest.fixture(params=[dict(), dict(tie_word_embeddings=True), dict(rope_parameters=YARN), dict(attention_bias=True)], ids=str)
def pair(request, tmp_path):
    print(f'SEED={SEED}')
    torch.manual_seed(SEED)
    sizes = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=16,
                 intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes | request.param)).eval()
    for n, p in theirs.named_parameters(): torch.nn.init.normal_(p, std=.3, mean=float(n.endswith('norm.weight')))
    theirs.save_pretrained(tmp_path)
    return Model.from_pretrained(tmp_path, 'float32', 'cpu'), theirs, tmp_path


def near(got, want): torch.testing.assert_close(got, want, atol=1e-4*want.abs().max().item(), rtol=0)


@torch.no_grad()
def test_logits_cached_and_padded(pair):
    model, theirs, _ = pair
    ids = torch.randint(2, 96, (2, 40))
    want = theirs(ids).logits
    near(model(ids), want)
    cache = model.new_cache(2)
    near(torch.cat([model(ids[:, :25], cache), model(ids[:, 25:26], cache), model(ids[:, 26:], cache)], 1), want)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    near(model(ids, attention_mask=mask)[1, 9:], theirs(ids[1:, 9:]).logits[0])
    pool = PagePool(model.config, 8, 16, dtype=model.dtype)
    rows = model.ragged(torch.cat([ids[0, :7], ids[1, :12]]), [PagedCache(pool), PagedCache(pool)], [7, 12])
    near(head(rows[-1:], model.head_weight)[0], theirs(ids[1:, :12]).logits[0, -1])


def test_gradients(pair):
    model, theirs, _ = pair
    ids = torch.randint(2, 96, (2, 9))
    for m in (model.to_transformers(), theirs): m(ids, labels=ids).loss.backward()
    want = dict(theirs.named_parameters())['model.layers.0.self_attn.q_norm.weight'].grad
    near(model.layers[0].self_attn.q_norm.weight.grad, want)


def test_saved_as_transformers_reads_it(pair, tmp_path):
    model, theirs, _ = pair
    ids = torch.randint(2, 96, (1, 20))
    again = transformers.AutoModelForCausalLM.from_pretrained(model.save_pretrained(tmp_path/'again'))
    assert type(again) is type(theirs)
    with torch.no_grad():
        near(again(ids).logits, theirs(ids).logits)
        assert torch.equal(model.generate(ids, 12), model.to_transformers().generate(ids, max_new_tokens=12, do_sample=False))


@torch.no_grad()
def test_no_kernel_leaves_the_norms_out(pair):
    "Decode steps go block by block; codes too; and what can't be written or converted is refused"
    model, theirs, folder = pair
    assert 'block by block' in str(decode_path(model)) and model.config.params() == sum(p.numel() for p in model.parameters())
    codes = QuantizedModel.from_pretrained(folder, 'int8', 'cpu')
    ids = torch.randint(2, 96, (1, 20))
    assert (codes(ids) - theirs(ids).logits).abs().max() < .2*theirs(ids).logits.abs().max()
    with pytest.raises(ValueError, match="type 'qwen3' is not written as GGUF"): export_gguf(folder, folder/'x.gguf')
    with pytest.raises(ValueError, match='only qwen3 has norms'): replace(model.config, model_type='llama')
    assert isinstance(model.config, Config) and model.config.head_dim == 16

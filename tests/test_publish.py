"Checkpoints for other servers: transformers loads each of them and compressed-tensors unpacks what was packed"
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files.safetensors import SINGLE, weight_map
from deepseek_nb.quant.save import Fp8Blocks, PackedInts, is_matrix, pack_words, publish, symmetric_codes

pytest.importorskip('compressed_tensors', reason='compressed-tensors is not installed')
CONFIGS = dict(
    deepseek_v3=Config('deepseek_v3', vocab_size=256, dim=128, n_layers=2, n_heads=2, inter_dim=256, kv_lora_rank=64, q_lora_rank=128,
                       qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64, n_routed_experts=4, n_activated_experts=2,
                       n_shared_experts=1, moe_inter_dim=128, n_dense_layers=1, score_func='sigmoid', score_bias=True,
                       group_score='sum2', norm_topk=True, max_positions=64, rope=Rope(interleaved=True)),
    llama=Config('llama', vocab_size=256, dim=128, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, inter_dim=256, max_positions=64))
FORMS = dict(fp8=Fp8Blocks(), int4=PackedInts(4, 64), int8=PackedInts(8, 0))


def unpacked(form, key, parts):
    "The matrix that a folder stands for, by compressed-tensors itself where it has the format"
    if isinstance(form, Fp8Blocks):
        codes, scales = parts[key].float(), parts[f'{key}_scale_inv']
        return codes*scales.repeat_interleave(128, 0)[:len(codes)].repeat_interleave(128, 1)[:, :codes.shape[1]]
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    scheme = QuantizationScheme(**form.config()['config_groups']['group_0'])
    names = {f'weight_{n}': parts[f'{key}_{n}'] for n in ('packed', 'scale', 'shape')}
    return PackedQuantizationCompressor.decompress(names, scheme)['weight'].float()


class Rounded:
    "Matrices as their folders stand for them, in floats"
    def __init__(self, form): self.form = form
    def encode(self, key, w): return {key: unpacked(self.form, key, self.form.encode(key, w))}
    def config(self): return None


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root, out = tmp_path_factory.mktemp('published'), {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        plain = Model(config, dtype='float32', device='cpu').init_weights(.08).save_pretrained(root/name/'plain')
        out[name] = {'plain': plain} | {k: publish(plain, root/name/k, f) for k, f in FORMS.items()}
    return out


def theirs(folder, kind):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config
    how = dict(fp8=lambda: FineGrainedFP8Config(dequantize=True), int4=lambda: CompressedTensorsConfig(dequantize=True))
    how['int8'] = how['int4']
    more = dict(quantization_config=how[kind]()) if kind in how else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


@pytest.mark.parametrize('kind', ['plain', *FORMS])
@pytest.mark.parametrize('name', CONFIGS)
def test_transformers_loads_it(folders, tmp_path, name, kind):
    "The same logits as our model with the matrices for which the folder stands; `test_codes` bounds their distance from the exact ones"
    folder, ids = folders[name][kind], torch.arange(40)[None]*5 % 256
    same = folder if kind == 'plain' else publish(folders[name]['plain'], tmp_path/'rounded', Rounded(FORMS[kind]))
    plain = Model.from_pretrained(folders[name]['plain'], dtype='float32', device='cpu')
    with torch.no_grad():
        got, want = theirs(folder, kind)(ids).logits, Model.from_pretrained(same, dtype='float32', device='cpu')(ids)
        exact = plain(ids)
    assert (got - want).abs().max() < 2e-4*want.abs().max()
    assert (kind == 'plain') == bool((got - exact).norm() < 1e-4*exact.norm())  # the others are rounded


@pytest.mark.parametrize('name', CONFIGS)
def test_the_files_of_a_folder(folders, name):
    "Nothing but the matrices changes, and every matrix does"
    plain = weight_map(folders[name]['plain'])
    kept = {k for k in plain if not is_matrix(k)}
    assert {k.rsplit('.', 2)[-2] for k in plain if k.endswith('weight') and k in kept} <= {
        'embed_tokens', 'lm_head', 'norm', 'gate', 'input_layernorm', 'post_attention_layernorm', 'q_a_layernorm', 'kv_a_layernorm'}
    for kind, ends in dict(fp8=('', '_scale_inv'), int4=('_packed', '_scale', '_shape'), int8=('_packed', '_scale', '_shape')).items():
        found = weight_map(folders[name][kind])
        assert {*found} == kept | {k + e for k in plain if is_matrix(k) for e in ends}
        config = json.loads((folders[name][kind]/'config.json').read_text())
        assert config['quantization_config'] == FORMS[kind].config()
        assert config['architectures'] == [dict(llama='LlamaForCausalLM', deepseek_v3='DeepseekV3ForCausalLM')[name]]


def test_our_own_model_reads_the_blocks(folders, tmp_path):
    "FP8 blocks are an official format, so they load here as any other checkpoint does, also where the last block has 64 rows"
    torch.manual_seed(0)
    config = replace(CONFIGS['deepseek_v3'], kv_lora_rank=128)
    plain = Model(config, dtype='float32', device='cpu').init_weights(.08).save_pretrained(tmp_path/'plain')
    partial = dict(plain=plain, fp8=publish(plain, tmp_path/'fp8', FORMS['fp8']))
    for found in (*folders.values(), partial):
        model, exact = (Model.from_pretrained(found[k], dtype='float32', device='cpu') for k in ('fp8', 'plain'))
        for (k, a), (_, b) in zip(model.state_dict().items(), exact.state_dict().items(), strict=True):
            assert (a - b).abs().max() <= b.abs().max()/16 + 1e-9, k


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 80), st.integers(0, 2**31))
def test_words(bits, rows, columns, seed):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    low = 2**(bits - 1)
    codes = torch.randint(-low, low, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    words = pack_words(codes, bits)
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), codes)
    theirs = pack_to_int32(codes, bits)
    assert words.shape == theirs.shape
    full = columns*bits//32
    assert torch.equal(words[:, :full], theirs[:, :full])


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([(4, 16), (4, 0), (8, 0), (8, 32)]), st.sampled_from([torch.float32, torch.bfloat16]), st.floats(-30, 30),
       st.integers(0, 2**31))
def test_codes(form, dtype, size, seed):
    "Each weight is within half a step, and a row of zeros stays one"
    bits, group = form
    w = (torch.randn(6, 96, generator=torch.Generator().manual_seed(seed))*2.**size).to(dtype)
    w[2] = 0
    codes, scale = symmetric_codes(w, bits, group)
    steps = scale.float().repeat_interleave(group or 96, 1)
    slack = 1e-3 if dtype == torch.float32 else 2**(bits - 1)*2**-8  # a scale in bfloat16 moves the ends
    assert ((w.float() - codes*steps).abs() <= steps*(.5 + slack)).all() and not codes[2].any() and (scale > 0).all()


def test_shards(folders, tmp_path):
    model = Model.from_pretrained(folders['llama']['plain'], dtype='bfloat16', device='cpu')
    plain = model.save_pretrained(tmp_path/'plain', max_shard_bytes=10**5)
    folder = publish(plain, tmp_path/'int8', FORMS['int8'])
    assert not (folder/SINGLE).exists() and len([*folder.glob('model-*')]) == len([*plain.glob('model-*')]) > 1
    for name in ('tokenizer.json', 'generation_config.json'): assert (folder/name).exists() == (plain/name).exists()
    assert len(weight_map(folder)) == len(weight_map(folders['llama']['int8']))

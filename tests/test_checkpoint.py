"Checkpoints: damage of every kind, key maps, FP8, peak memory, atomic saves"
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import warm
from safetensors.torch import load_file, save_file

from deepseek_nb import Model
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files import checkpoint as ck
from deepseek_nb.files.gguf import load_config
from deepseek_nb.files.safetensors import read_header

V3 = Config('deepseek_v3', vocab_size=48, dim=16, n_layers=2, n_heads=2, inter_dim=24, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=8,
            qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=1, n_routed_experts=4, n_shared_experts=1, n_activated_experts=2,
            moe_inter_dim=8, score_func='sigmoid', score_bias=True, group_score='sum2', norm_topk=True,
            rope=Rope(interleaved=True), bos_id=0, eos_ids=(1,))
LLAMA = Config('llama', vocab_size=48, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, inter_dim=24, bos_id=0, eos_ids=(1,))
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad(): yield


def tiny(config=V3):
    m = Model(config, dtype=torch.float32, device='cpu')
    for t in m.state_dict().values(): t.add_(torch.randn(t.shape)*.05)
    return m


@pytest.fixture
def saved(tmp_path): return tiny().save_pretrained(tmp_path/'m')


def load(folder, **kw): return Model.from_pretrained(folder, dtype=torch.float32, device='cpu', **kw)


def one_line(e): assert '\n' not in str(e.value), str(e.value)


def rewrite(folder, change):
    "Apply `change` to the tensors of a single-file checkpoint"
    d = load_file(folder/ck.SINGLE)
    change(d)
    save_file(d, folder/ck.SINGLE)


@pytest.mark.parametrize('config', [V3, LLAMA, replace(V3, q_lora_rank=0), replace(LLAMA, tie_embeddings=True),
                                    replace(LLAMA, model_type='qwen2', attn_bias=True)])
@pytest.mark.parametrize('max_shard_bytes', [10**9, 3000])
def test_round_trip(config, max_shard_bytes, tmp_path):
    m = tiny(config)
    folder = m.save_pretrained(tmp_path/'a', max_shard_bytes=max_shard_bytes)
    assert (folder/ck.INDEX).exists() == (max_shard_bytes == 3000)
    back = load(folder)
    assert load_config(folder) == config
    for k, v in m.state_dict().items(): assert torch.equal(back.state_dict()[k], v), k
    assert torch.equal(back(TOKENS), m(TOKENS))
    assert {p.name for p in tmp_path.iterdir()} == {'a'}


def test_disk_names(saved):
    keys = set(load_file(saved/ck.SINGLE))
    assert {'lm_head.weight', 'model.embed_tokens.weight', 'model.layers.1.mlp.experts.3.up_proj.weight',
            'model.layers.1.mlp.gate.e_score_correction_bias'} <= keys
    assert not any('gate_up' in k for k in keys)


def test_stacked_on_disk(saved):
    want = load(saved)(TOKENS)
    def stack(d):
        for k in list(d):
            if '.mlp.experts.' in k: del d[k]
        sd = load_model.state_dict()
        d |= {f'model.{k}': v.clone() for k, v in sd.items() if '.mlp.experts.' in k}
    load_model = load(saved)
    rewrite(saved, stack)
    assert any('gate_up_proj' in k for k in ck.weight_map(saved))
    assert torch.equal(load(saved)(TOKENS), want)


def test_no_model_prefix(saved):
    want = load(saved)(TOKENS)
    def strip(d):
        for k in list(d): d[k.removeprefix('model.')] = d.pop(k)
    rewrite(saved, strip)
    assert torch.equal(load(saved)(TOKENS), want)


def test_dtype_is_converted_and_bias_stays_float32(saved):
    m = Model.from_pretrained(saved, dtype='bfloat16', device='cpu')
    assert m.embed_tokens.weight.dtype == torch.bfloat16
    assert m.state_dict()['layers.1.mlp.gate.e_score_correction_bias'].dtype == torch.float32
    for k, v in load(saved).state_dict().items(): torch.testing.assert_close(m.state_dict()[k].float(), v, rtol=2**-8, atol=1e-6)


# Damage

def test_missing_folder_and_file(tmp_path, saved):
    with pytest.raises(FileNotFoundError) as e: load(tmp_path/'none')
    one_line(e)
    (saved/ck.SINGLE).unlink()
    with pytest.raises(FileNotFoundError, match='no model.safetensors') as e: load(saved)
    one_line(e)
    (saved/'pytorch_model.bin').touch()
    with pytest.raises(FileNotFoundError, match='pickled weights are never loaded') as e: load(saved)
    one_line(e)


def test_missing_config(saved):
    (saved/'config.json').unlink()
    with pytest.raises(FileNotFoundError, match='config.json') as e: load(saved)
    one_line(e)


@pytest.mark.parametrize('keep', [0, 4, 8, 100, 0.5, -1])
def test_truncated(saved, keep):
    raw = (saved/ck.SINGLE).read_bytes()
    (saved/ck.SINGLE).write_bytes(raw[:int(keep*len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match='truncated') as e: load(saved)
    one_line(e)
    assert 'model.safetensors' in str(e.value)


def test_garbage(saved):
    (saved/ck.SINGLE).write_bytes((20).to_bytes(8, 'little') + b'not json at all, no no no')
    with pytest.raises(ValueError, match='not a safetensors file') as e: load(saved)
    one_line(e)
    (saved/ck.SINGLE).write_bytes(b'<html>404 not found</html>'*10)
    with pytest.raises(ValueError, match='not a safetensors file') as e: load(saved)
    one_line(e)


@pytest.mark.parametrize('entry', [dict(dtype='F32', shape=[3], data_offsets=[0, 4]), dict(dtype='F99', shape=[1], data_offsets=[0, 4]),
                                   dict(shape=[1]), 3,
                                   dict(dtype='F32', shape=[-1], data_offsets=[4, 0]), dict(dtype='F32', shape=[1], data_offsets=[-4, 0])])
def test_corrupt_header(tmp_path, entry):
    raw = json.dumps(dict(a=entry)).encode()
    (tmp_path/'x.safetensors').write_bytes(len(raw).to_bytes(8, 'little') + raw + bytes(8))
    with pytest.raises(ValueError, match='x.safetensors') as e: read_header(tmp_path/'x.safetensors')
    one_line(e)


@pytest.fixture
def sharded(tmp_path): return tiny().save_pretrained(tmp_path/'m', max_shard_bytes=6000)


def test_shard_absent(sharded):
    shard = sorted(sharded.glob('model-*'))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name) as e: load(sharded)
    one_line(e)


def test_shard_truncated(sharded):
    shard = sorted(sharded.glob('model-*'))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f'{shard.name}: truncated') as e: load(sharded)
    one_line(e)


def test_index_names_a_key_that_its_shard_lacks(sharded):
    index = json.loads((sharded/ck.INDEX).read_text())
    files = sorted(set(index['weight_map'].values()))
    key = next(k for k, f in index['weight_map'].items() if f == files[0])
    index['weight_map'][key] = files[1]
    (sharded/ck.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f'{key} is in {files[1]}, which lacks it') as e: load(sharded)
    one_line(e)


def test_shard_or_key_absent_from_the_index(sharded):
    index = json.loads((sharded/ck.INDEX).read_text())
    last = sorted(set(index['weight_map'].values()))[-1]
    short = {k: f for k, f in index['weight_map'].items() if f != last}
    (sharded/ck.INDEX).write_text(json.dumps(dict(weight_map=short)))
    with pytest.raises(ValueError, match=f'{last} not named in {ck.INDEX}') as e: load(sharded)
    one_line(e)
    (sharded/ck.INDEX).write_text(json.dumps(dict(weight_map={k: f for k, f in index['weight_map'].items() if k != 'model.norm.weight'})))
    with pytest.raises(ValueError, match='does not name model.norm.weight') as e: load(sharded)
    one_line(e)


@pytest.mark.parametrize('text', ['{"weight_map": ', '[]', '{}', '{"weight_map": []}'])
def test_broken_index(sharded, text):
    (sharded/ck.INDEX).write_text(text)
    with pytest.raises(ValueError, match=ck.INDEX) as e: load(sharded)
    one_line(e)


@pytest.mark.parametrize('place', ['../secret.safetensors', '{folder}/../secret.safetensors', 'sub/../../secret.safetensors', '..', '.', '',
                                   './model.safetensors', '..\\secret.safetensors', 'secret\0.safetensors', 5, None, ['a'], {}])
def test_an_index_names_only_files_of_its_folder(sharded, place):
    "Wherever else it points, a file with just the right tensors lies there, and isn't read"
    index = json.loads((sharded/ck.INDEX).read_text())
    shard = sorted(set(index['weight_map'].values()))[0]
    (sharded/'sub').mkdir()
    (sharded.parent/'secret.safetensors').write_bytes((sharded/shard).read_bytes())
    (sharded/shard).unlink()
    place = place.format(folder=sharded) if isinstance(place, str) else place
    index['weight_map'] = {k: place if f == shard else f for k, f in index['weight_map'].items()}
    (sharded/ck.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match='which is no file of this folder') as e: load(sharded)
    one_line(e)


def test_missing_and_unused_keys(saved):
    def change(d):
        del d['model.norm.weight']
        d['model.layers.0.self_attn.extra'] = torch.zeros(2)
    rewrite(saved, change)
    with pytest.raises(ValueError, match='1 keys missing: norm.weight; 1 keys unused: layers.0.self_attn.extra') as e: load(saved)
    one_line(e)


def test_one_layer_too_few_in_the_config(tmp_path):
    folder = tiny(replace(V3, n_layers=3, n_mtp_layers=1)).save_pretrained(tmp_path/'m')
    d = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(d | dict(num_hidden_layers=2)))
    with pytest.raises(ValueError, match='keys unused: layers.2') as e: load(folder)
    one_line(e)


@pytest.mark.parametrize('key,value', [('hidden_size', 32), ('vocab_size', 50), ('moe_intermediate_size', 12), ('kv_lora_rank', 16),
                                       ('v_head_dim', 12)])
def test_shapes_contradict_the_config(saved, key, value):
    d = json.loads((saved/'config.json').read_text())
    (saved/'config.json').write_text(json.dumps(d | {key: value}))
    with pytest.raises(ValueError, match=r'has shape \[.*\], but the deepseek_v3 config \(.*\) implies \[.*\]') as e: load(saved)
    one_line(e)
    assert 'model.safetensors' in str(e.value)


# Known keys

def test_known_keys_are_ignored(tmp_path):
    folder = tiny(replace(LLAMA, tie_embeddings=True)).save_pretrained(tmp_path/'m')
    def change(d):
        d['lm_head.weight'] = d['model.embed_tokens.weight'].clone()
        d['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.zeros(2)
    rewrite(folder, change)
    m = load(folder)
    assert m.kept == ()
    assert 'lm_head.weight' not in ck.weight_map(m.save_pretrained(tmp_path/'n'))


def test_mtp_block_is_kept(saved, tmp_path):
    extra = {'model.layers.2.eh_proj.weight': torch.randn(16, 32),
             'model.layers.2.self_attn.o_proj.weight': torch.randn(16, 16).to(torch.float8_e4m3fn),
             'model.layers.2.self_attn.o_proj.weight_scale_inv': torch.rand(1, 1)}
    rewrite(saved, lambda d: d.update(extra))
    m = load(saved)
    again = m.save_pretrained(tmp_path/'again', max_shard_bytes=6000)
    twice = load(load(again).save_pretrained(tmp_path/'twice'))
    got = load_file(tmp_path/'twice'/ck.SINGLE)
    for k, v in extra.items(): assert torch.equal(got[k].view(torch.uint8), v.view(torch.uint8)), k
    assert torch.equal(twice(TOKENS), m(TOKENS))
    inplace = m.save_pretrained(saved)
    assert set(extra) <= set(ck.weight_map(inplace))
    assert set(load(inplace).kept) == {k.removeprefix('model.') for k in extra}


# FP8

@pytest.mark.parametrize('ue8m0', [False, True])
@pytest.mark.parametrize('o,i', [(128, 128), (1, 1), (129, 127), (200, 300), (64, 257)])
def test_fp8_blocks(o, i, ue8m0):
    w = torch.randn(o, i) * torch.rand(o, 1)*10
    q, s = ck.quant_fp8(w, ue8m0)
    assert q.dtype == torch.float8_e4m3fn and s.shape == (-(-o//128), -(-i//128))
    got = ck.dequant_fp8(q, s)
    for a in range(s.shape[0]):
        for b in range(s.shape[1]):
            box = slice(128*a, 128*a+128), slice(128*b, 128*b+128)
            assert torch.equal(got[box], q[box].float()*s[a, b])
            amax = w[box].abs().max().clamp(min=1e-4)
            want = torch.exp2(torch.ceil(torch.log2(amax/448))) if ue8m0 else amax/448
            torch.testing.assert_close(s[a, b], want)
    assert ((got-w).abs() <= w.abs()/16 + s.max()*2**-10 + 1e-12).all()
    if ue8m0: assert torch.equal(ck.dequant_fp8(q, s.to(torch.float8_e8m0fnu)), got)


def test_fp8_zero_block():
    q, s = ck.quant_fp8(torch.zeros(3, 5))
    assert torch.equal(ck.dequant_fp8(q, s), torch.zeros(3, 5)) and s.item() == pytest.approx(1e-4/448)


@pytest.mark.parametrize('block', [(128, 128), (8, 4)])
def test_fp8_checkpoint(tmp_path, block):
    config = replace(V3, extra=dict(quantization_config=dict(quant_method='fp8', fmt='e4m3', activation_scheme='dynamic',
                                                             weight_block_size=list(block), scale_fmt='ue8m0')))
    m = tiny(config)
    folder = m.save_pretrained(tmp_path/'m')
    want = {}
    def quantise(d):
        for k in [k for k in d if '_proj' in k]:
            o, i = d[k].shape
            s = torch.exp2(torch.randint(-9, -5, (-(-o//block[0]), -(-i//block[1]))).float())
            d[k] = (torch.randn(o, i)*100).clamp(-448, 448).to(torch.float8_e4m3fn)
            want[k], d[k+'_scale_inv'] = ck.dequant_fp8(d[k], s, block), s
    rewrite(folder, quantise)
    d = json.loads((folder/'config.json').read_text())
    (folder/'config.json').write_text(json.dumps(d | config.extra))
    back = load(folder)
    for k, v in ck.disk_views(back).items():
        if '_proj' in k: assert torch.equal(v, want[ck.disk_key(k)]), k
    again = back.save_pretrained(tmp_path/'again')
    assert 'quantization_config' not in json.loads((again/'config.json').read_text())
    assert not any('scale_inv' in k for k in ck.weight_map(again))
    assert torch.equal(load(again)(TOKENS), back(TOKENS))


def test_fp8_without_scale_or_other_method(saved):
    d = json.loads((saved/'config.json').read_text())
    (saved/'config.json').write_text(json.dumps(d | dict(quantization_config=dict(quant_method='awq'))))
    with pytest.raises(ValueError, match="quant_method 'awq'") as e: load(saved)
    one_line(e)
    (saved/'config.json').write_text(json.dumps(d))
    key = 'model.layers.0.self_attn.o_proj.weight'
    rewrite(saved, lambda d: d.update({key: d[key].to(torch.float8_e4m3fn)}))
    with pytest.raises(ValueError, match='is an FP8 weight without weight_scale_inv') as e: load(saved)
    one_line(e)


# Saving

def test_files_are_carried_over(saved, tmp_path):
    (saved/'tokenizer.json').write_text('{}')
    (saved/'generation_config.json').write_text('{"eos_token_id": [1, 2], "temperature": 0.6}')
    again = load(saved).save_pretrained(tmp_path/'deep'/'er'/'again')
    assert (again/'tokenizer.json').read_text() == '{}'
    assert json.loads((again/'generation_config.json').read_text())['temperature'] == .6
    assert load_config(again).eos_ids == (1, 2)


def test_failed_save_leaves_the_old_checkpoint(saved, monkeypatch):
    want = load(saved)(TOKENS)
    other, real, calls = tiny(), ck.write_tensors, []
    def fails(path, tensors):
        calls.append(path)
        if len(calls) == 2: raise OSError('disk full')
        real(path, tensors)
    monkeypatch.setattr(ck, 'write_tensors', fails)
    with pytest.raises(OSError, match='disk full'): other.save_pretrained(saved, max_shard_bytes=6000)
    assert torch.equal(load(saved)(TOKENS), want)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_save_replaces_shards_and_leaves_other_files(sharded):
    (sharded/'notes.txt').write_text('mine')
    m = tiny()
    m.save_pretrained(sharded)
    assert not list(sharded.glob('model-*')) and not (sharded/ck.INDEX).exists() and (sharded/'notes.txt').exists()
    assert torch.equal(load(sharded)(TOKENS), m(TOKENS))
    m.save_pretrained(sharded, max_shard_bytes=6000)
    assert not (sharded/ck.SINGLE).exists()
    assert torch.equal(load(sharded)(TOKENS), m(TOKENS))


# Memory

PEAK = """
import sys, torch
from deepseek_nb import Model
import deepseek_nb.infer.load
def status(k): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(k))
Model.from_pretrained(sys.argv[1], dtype='float32', device='cpu')   # warms every import
before = status('VmRSS')
m = Model.from_pretrained(sys.argv[2], dtype='float32', device='cpu')
print(status('VmHWM') - before)
"""


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')
@pytest.mark.parametrize('shard', [10**9, 50*10**6])
def test_peak_memory_stays_near_the_model(saved, tmp_path, shard):
    big = replace(V3, vocab_size=16000, dim=1024, n_layers=3, inter_dim=2048, n_routed_experts=16, moe_inter_dim=512)
    m = Model(big, dtype=torch.float32, device='cpu')
    folder = m.save_pretrained(tmp_path/'big', max_shard_bytes=shard)
    size = sum(t.numel()*t.element_size() for t in m.state_dict().values())
    del m
    assert size > 350e6
    out = warm.run('-c', PEAK, saved, folder, cwd=Path(__file__).parents[1])
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 1.2*size, f'{int(out.stdout)/1e6:.0f} MB at the peak for a model of {size/1e6:.0f} MB'

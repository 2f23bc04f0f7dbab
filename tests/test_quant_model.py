"Models in few bits: every family and format, loading piece by piece, saving, the report, damage, memory"
import json
from contextlib import redirect_stdout
from io import StringIO
from math import prod
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_gguf import write as write_gguf

from deepseek_nb import Config, Model, QuantizedModel, Tokenizer
from deepseek_nb.core.config import Rope
from deepseek_nb.core.dispatch import use
from deepseek_nb.files.checkpoint import quant_fp8
from deepseek_nb.files.safetensors import read_json, weight_map, write_tensors
from deepseek_nb.quant import QuantizedWeight, quantize, relative_error
from deepseek_nb.quant.fp8 import FP8
from deepseek_nb.quant.ggml import Ggml
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.int8 import Int8
from deepseek_nb.quant.model import calibrate_model, plan, quantize_model
from deepseek_nb.quant.nf4 import NF4
from deepseek_nb.quant.save import WeightSource, encode_from, packed_tensors, packed_weights, piece_borders
from deepseek_nb.tools.cli import main

SHARED = dict(vocab_size=160, dim=64, n_layers=2, inter_dim=96, max_positions=64, eos_ids=(2,), bos_id=1)
MLA = dict(n_heads=2, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, rope=Rope(interleaved=True))
MOE = dict(n_dense_layers=1, n_routed_experts=4, n_activated_experts=2, n_shared_experts=1, moe_inter_dim=32)
FAMILIES = dict(
    llama=Config('llama', **SHARED, n_heads=4, n_kv_heads=2, head_dim=16, tie_embeddings=True),
    qwen2=Config('qwen2', **SHARED, n_heads=4, n_kv_heads=2, head_dim=16, attn_bias=True),
    v2=Config('deepseek_v2', **SHARED, **MLA, **MOE),
    v3=Config('deepseek_v3', **SHARED, **MLA, **MOE, q_lora_rank=32, score_func='sigmoid', score_bias=True, group_score='sum2',
              norm_topk=True, n_expert_groups=2, n_limited_groups=1, route_scale=2.5))
FORMATS = [Int8(), Int8('float'), Int8(group=32),
           Int4(), Int4(64), Int4(symmetric=True), Int4(64, symmetric=True), NF4(), NF4(double=False), FP8(),
           FP8('ue8m0'), 'fp4', Ggml('Q8_0')]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad(): yield


@pytest.fixture(scope='module')
def floats():
    torch.manual_seed(0)
    made = {n: Model(c, 'float32', 'cpu').init_weights(.1).eval() for n, c in FAMILIES.items()}
    for m in made.values():
        for k, t in m.state_dict().items():
            if k.endswith('bias'): t.normal_(std=.05)
    return made


@pytest.fixture
def tokens(): return torch.randint(160, (2, 21))


def same(a, b):
    "Equal in every byte and every format, in whatever order kernels keep the bytes"
    a_parts, b_parts = packed_tensors(a), packed_tensors(b)
    assert a_parts.keys() == b_parts.keys()
    for k, t in a_parts.items():
        u = b_parts[k]
        assert t.dtype == u.dtype and t.shape == u.shape and torch.equal(t.view(torch.uint8), u.view(torch.uint8)), k
    fa, fb = ({k: m.format for k, m in x.named_modules() if isinstance(m, QuantizedWeight)} for x in (a, b))
    assert fa == fb


def lines(e): return str(e.value).split('\n')


# ---- every family in every format

def decoded(model):
    "The float model of the same numbers"
    state = dict(model.state_dict())
    for k, m in model.named_modules():
        if isinstance(m, QuantizedWeight): state = {n: t for n, t in state.items() if not n.startswith(f'{k}.')} | {k: m.dequantize()}
    out = Model(model.config, 'float32', 'cpu').eval()
    out.load_state_dict(state)
    return out


@pytest.mark.parametrize('format', FORMATS, ids=str)
@pytest.mark.parametrize('name', FAMILIES)
def test_as_the_decoded_model(name, format, floats, tokens):
    model = quantize_model(floats[name], format)
    exact = decoded(model)
    assert isinstance(model, Model) and model.dtype == torch.float32 and model.device.type == 'cpu'
    with use('reference'):
        for mla in ('auto', 'naive', 'absorbed') if model.config.mla else ('auto',):
            assert relative_error(exact(tokens, mla=mla), model(tokens, mla=mla)) < 1e-5
        assert torch.equal(model.generate(tokens[:, :5], 6, eos_token_id=[]), exact.generate(tokens[:, :5], 6, eos_token_id=[]))
        assert relative_error(floats[name](tokens), model(tokens)) > 1e-4  # something was quantised


@pytest.mark.parametrize('format', FORMATS, ids=str)
@pytest.mark.parametrize('name', FAMILIES)
def test_kernels_and_cache(name, format, floats, tokens):
    "Whatever runs by default: prompt and steps give what the definition gives, but for activations in eight bits"
    model = quantize_model(floats[name], format)
    with use('reference'): expected = model(tokens)
    cache = model.new_cache(2)
    got = torch.cat([model(tokens[:, :5], cache), *(model(tokens[:, i:i+1], cache) for i in range(5, 21))], 1)
    pairs = [(a, b) for x in (model(tokens), got) for a, b in zip(expected.flatten(0, 1), x.flatten(0, 1), strict=True)]
    far = torch.tensor([relative_error(*p) for p in pairs])
    products = 15 if model.config.mla else 9  # one behind the other, with activations off by .0055, and norms and gates
    assert far.median() < 1.2*.0055*products**.5  # a router may choose another expert for some tokens
    assert model.generate(tokens[:, :5], 6, eos_token_id=[]).shape == (2, 11)


@pytest.mark.parametrize('name', FAMILIES)
def test_what_is_quantised(name, floats):
    model = quantize_model(floats[name], 'int4', experts='fp8')
    packed = {k: m for k, m in model.named_modules() if isinstance(m, QuantizedWeight)}
    for k, t in floats[name].state_dict().items():
        matrix = t.ndim >= 2 and '.gate.' not in k
        assert (k in packed) == matrix, k
        if not matrix: assert torch.equal(model.state_dict()[k], t)
        elif 'experts.' in k and 'shared' not in k: assert packed[k].format == FP8() and packed[k].shape == t.shape
        elif k in ('embed_tokens.weight', 'lm_head.weight'): assert packed[k].format == Int8(group=32)
        else: assert packed[k].format == Int4()
    if name == 'llama': assert model.lm_head is None and len([k for k in packed if 'embed' in k]) == 1
    assert not any(p.requires_grad for p in model.parameters())
    same(floats[name], floats[name])  # the float model is as it was: no key has changed


def test_embedding_in_float(floats, tokens):
    model = quantize_model(floats['v3'], 'int8', embedding=None)
    assert torch.equal(model.embed_tokens.weight, floats['v3'].embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, floats['v3'].lm_head.weight)
    assert {r.reason for r in model.quantization_report().rows} == {'', 'norm', 'router', 'not quantised'}


# ---- pieces

SHAPES = st.one_of(st.tuples(st.integers(1, 900), st.integers(1, 200)),
                   st.tuples(st.integers(1, 5), st.integers(1, 300), st.integers(1, 100)))


@given(shape=SHAPES, format=st.sampled_from([f for f in FORMATS if f != Ggml('Q8_0')]), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_pieces_make_the_whole(shape, format, seed):
    torch.manual_seed(seed)
    w = torch.randn(shape)
    source = WeightSource(torch.nn.ParameterDict(dict(w=w)))
    expected = quantize(w, format)
    got = encode_from(source, 'w', shape, expected.format)
    for n, t in expected.named_buffers(): assert torch.equal(t.view(torch.uint8), dict(got.named_buffers())[n].view(torch.uint8)), n
    assert abs(got.error - relative_error(w, expected.dequantize())) < 1e-6
    at = piece_borders(shape, expected.format)
    assert at[0] == 0 and at[-1] == shape[0] and at == sorted(set(at))


# ---- loading

@pytest.mark.parametrize('shards', [10**9, 20_000])
@pytest.mark.parametrize('name', FAMILIES)
def test_loading_is_quantising(name, shards, floats, tmp_path):
    floats[name].save_pretrained(tmp_path/'float', max_shard_bytes=shards)
    for format in (Int8(), Int4(64), 'nf4', 'fp8', 'fp4'):
        same(QuantizedModel.from_pretrained(tmp_path/'float', format, device='cpu'), quantize_model(floats[name], format))


def test_fp8_checkpoint(floats, tmp_path):
    "DeepSeek's own weights: the codes are found again, and int8 is made of what they stand for"
    floats['v3'].save_pretrained(tmp_path/'v3')
    stored = {}
    for k, t in load_file(tmp_path/'v3'/'model.safetensors').items():
        if '_proj' in k and k.endswith('weight'): stored[k], stored[f'{k}_scale_inv'] = quant_fp8(t)
        else: stored[k] = t
    write_tensors(tmp_path/'v3'/'model.safetensors', stored)
    config = read_json(tmp_path/'v3'/'config.json') | dict(quantization_config=dict(quant_method='fp8', weight_block_size=[128, 128]))
    (tmp_path/'v3'/'config.json').write_text(json.dumps(config))
    model = QuantizedModel.from_pretrained(tmp_path/'v3', 'fp8', device='cpu')
    q = model.layers[1].self_attn.o_proj.weight
    assert torch.equal(q.codes.view(torch.uint8), stored['model.layers.1.self_attn.o_proj.weight'].view(torch.uint8))
    assert torch.equal(q.scales, stored['model.layers.1.self_attn.o_proj.weight_scale_inv']) and q.error == 0
    experts, exact = model.layers[1].mlp.experts, Model.from_pretrained(tmp_path/'v3', 'float32', 'cpu').layers[1].mlp.experts
    for n in ('gate_up_proj', 'down_proj'): assert relative_error(getattr(exact, n), getattr(experts, n).dequantize()) < .03
    same(QuantizedModel.from_pretrained(tmp_path/'v3', 'int8', device='cpu'),
         quantize_model(Model.from_pretrained(tmp_path/'v3', 'float32', 'cpu'), 'int8'))


def gguf_kind(name): return getattr(gguf.GGMLQuantizationType, name)


@pytest.mark.parametrize('kind', ['F16', 'Q8_0', 'Q4_0', 'Q4_1'])
@pytest.mark.parametrize('name', ['llama', 'qwen2'])
def test_gguf(name, kind, floats, tmp_path, tokens):
    write_gguf(tmp_path/'m.gguf', floats[name], kind)
    exact = Model.from_pretrained(tmp_path/'m.gguf', 'float32', 'cpu')
    for format in (Int8(), Int4(64), 'fp8'):
        same(QuantizedModel.from_pretrained(tmp_path/'m.gguf', format, device='cpu'), quantize_model(exact, format))
    own = QuantizedModel.from_pretrained(tmp_path/'m.gguf', device='cpu')
    for k, m in own.named_modules():
        if isinstance(m, QuantizedWeight): assert torch.equal(m.dequantize(), exact.get_parameter(k)), k
    with use('reference'): assert relative_error(exact(tokens), own(tokens)) < 1e-4 if kind != 'F16' else True
    assert own.quantization_report().rows and all(r.error == 0 for r in own.quantization_report().rows)


def test_four_bits_of_a_file_are_taken_as_they_are(floats, tmp_path):
    for kind, f in (('Q4_1', Int4()), ('Q4_0', Int4(symmetric=True))):
        write_gguf(tmp_path/f'{kind}.gguf', floats['llama'], kind)
        exact = Model.from_pretrained(tmp_path/f'{kind}.gguf', 'float32', 'cpu')
        got = QuantizedModel.from_pretrained(tmp_path/f'{kind}.gguf', f, device='cpu', embedding=f)
        for k, m in got.named_modules():
            if isinstance(m, QuantizedWeight): assert m.error == 0 and torch.equal(m.dequantize(), exact.get_parameter(k)), k


# ---- saving

@pytest.mark.parametrize('format', FORMATS, ids=str)
@pytest.mark.parametrize('name', FAMILIES)
def test_round_trip(name, format, floats, tokens, tmp_path):
    model = quantize_model(floats[name], format)
    expected = model(tokens)  # kernels may have laid the parts in their own order by now
    saved = model.save_pretrained(tmp_path/'few', max_shard_bytes=30_000)
    again = QuantizedModel.from_pretrained(saved, device='cpu')
    same(again, quantize_model(floats[name], format))
    assert torch.equal(again(tokens), expected) and again.config == model.config
    assert [r.__dict__ for r in again.quantization_report().rows] == [r.__dict__ for r in model.quantization_report().rows]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith('.')]
    same(QuantizedModel.from_pretrained(again.save_pretrained(tmp_path/'twice'), device='cpu'), quantize_model(floats[name], format))


def test_tied_weights_are_stored_once(floats, tmp_path):
    saved = quantize_model(floats['llama'], 'int8').save_pretrained(tmp_path/'few')
    found = {k for k in weight_map(saved) if 'embed' in k or 'head' in k}
    assert found == {'model.embed_tokens.weight.scales', 'model.embed_tokens.weight.codes'}


def test_files_are_mapped(floats, tmp_path):
    maps = Path('/proc/self/maps')
    if not maps.exists(): pytest.skip('this system has no list of maps')
    model = QuantizedModel.from_pretrained(quantize_model(floats['v3'], 'int4').save_pretrained(tmp_path/'few'), device='cpu')
    assert model.layers[1].mlp.experts.gate_up_proj.codes.numel() and str(tmp_path) in maps.read_text()


def test_a_crash_leaves_what_was_there(floats, tmp_path, monkeypatch):
    saved = quantize_model(floats['llama'], 'int8').save_pretrained(tmp_path/'few')
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    import deepseek_nb.quant.save as save
    def broken(*a): raise OSError('no space left')
    monkeypatch.setattr(save, 'save_config', broken)
    with pytest.raises(OSError): quantize_model(floats['llama'], 'int4').save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ['few']


def test_mtp_block_travels(floats, tmp_path):
    floats['v3'].save_pretrained(tmp_path/'v3')

    file = tmp_path/'v3'/'model.safetensors'
    write_tensors(file, load_file(file) | {'model.layers.2.eh_proj.weight': torch.ones(16, 32)})
    first = QuantizedModel.from_pretrained(tmp_path/'v3', 'int8', device='cpu')
    second = QuantizedModel.from_pretrained(first.save_pretrained(tmp_path/'a'), device='cpu')
    assert weight_map(second.save_pretrained(tmp_path/'b'))['model.layers.2.eh_proj.weight'].shape == (16, 32)


# ---- the report

@pytest.mark.parametrize('format', FORMATS, ids=str)
@pytest.mark.parametrize('name', FAMILIES)
def test_report_adds_up(name, format, floats):
    model, exact = quantize_model(floats[name], format), floats[name].state_dict()
    report = model.quantization_report()
    assert [r.name for r in report.rows] == list(dict.fromkeys(r.name for r in report.rows)) and {r.name for r in report.rows} == set(exact)
    assert report.before == sum(t.nbytes for t in exact.values())
    assert report.nbytes == sum(t.nbytes for t in model.state_dict().values())
    for r in report.rows:
        assert r.shape == tuple(exact[r.name].shape) and r.before == 4*prod(r.shape)
        w = dict(model.named_modules()).get(r.name)
        if w is None: assert r.error == 0 and r.reason and r.nbytes == r.before
        else: assert abs(r.error - relative_error(exact[r.name], w.dequantize())) < 1e-6 and r.nbytes == w.nbytes
    shown = repr(report)
    assert f'{report.nbytes:,} of {report.before:,} bytes' in shown and report._repr_markdown_() in model._repr_markdown_()
    assert sum(int(line.split('|')[4]) for line in report.table().splitlines()[2:]) == len(report.rows)


# ---- bad input

def test_errors_of_formats(floats):
    for bad, said in (('int3', "unknown format 'int3'; this package has int8"), ('float32', "unknown format 'float32'"), (torch.int8, None),
                      (dict(format='int4', group=48), '32 does not divide it'), (dict(format='int4', bits=4), "no field 'bits'")):
        if said is None: assert plan(floats['llama'], bad)  # torch.int8 is a name too
        else:
            with pytest.raises(ValueError, match=said) as e: quantize_model(floats['llama'], bad)
            assert len(lines(e)) == 1
    with pytest.raises(ValueError, match='skip: no parameter is called'): quantize_model(floats['llama'], skip=('layers.7.*',))
    with pytest.raises(ValueError, match='is quantised already'): quantize_model(quantize_model(floats['llama']))


def test_weights_that_no_code_stands_for(floats):
    broken = Model(FAMILIES['v3'], 'float32', 'cpu')
    broken.layers[1].mlp.experts.down_proj[2, 3, 1] = torch.nan
    with pytest.raises(ValueError, match='layers.1.mlp.experts.down_proj: .*NaN') as e: quantize_model(broken, 'int4')
    assert len(lines(e)) == 1


@pytest.fixture
def few(floats, tmp_path): return quantize_model(floats['v3'], 'int4').save_pretrained(tmp_path/'few')


def damage(folder, f):
    d = read_json(folder/'config.json')
    f(d['quantization_config'])
    (folder/'config.json').write_text(json.dumps(d))


KEY = 'layers.1.mlp.experts.down_proj'
DAMAGE = {
    'newer': (lambda q: q.update(version=2), 'written in version 2 by deepseek-nb .*update it'),
    'no version': (lambda q: q.pop('version'), 'damaged quantization_config'),
    'no weights': (lambda q: q.pop('weights'), 'damaged quantization_config'),
    'format': (lambda q: q['weights'][KEY].update(format='int5'), "unknown format 'int5'"),
    'field': (lambda q: q['weights'][KEY].update(bits=5), "no field 'bits'"),
    'symmetric': (lambda q: q['weights'][KEY].update(symmetric=True), '1 keys unused: layers.1.mlp.experts.down_proj.mins'),
    'shape': (lambda q: q['weights'][KEY].update(shape=[4, 64, 33]), r'is \[4, 64, 33\], but config.json implies \[4, 64, 32\]'),
    'one less': (lambda q: q['weights'].pop(KEY), '1 keys missing: layers.1.mlp.experts.down_proj; 3 keys unused'),
    'one more': (lambda q: q['weights'].update({'layers.9.x': q['weights'][KEY]}), 'layers.9.x, which is not a weight of the model')}


@pytest.mark.parametrize('name', DAMAGE)
def test_damaged_config(name, few):
    f, said = DAMAGE[name]
    damage(few, f)
    with pytest.raises(ValueError, match=said) as e: QuantizedModel.from_pretrained(few, device='cpu')
    assert len(lines(e)) == 1 and len(str(e.value)) < 600


@pytest.mark.parametrize('keep', [0, 4, 100, -1, -1000])
def test_truncated(keep, few):
    file = few/'model.safetensors'
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match='model.safetensors: truncated') as e: QuantizedModel.from_pretrained(few, device='cpu')
    assert len(lines(e)) == 1
    file.unlink()
    with pytest.raises(FileNotFoundError): QuantizedModel.from_pretrained(few, device='cpu')


def test_quantised_twice(few, floats, tmp_path):
    with pytest.raises(ValueError, match='is quantised already; leave dtype out') as e: QuantizedModel.from_pretrained(few, 'int8')
    assert len(lines(e)) == 1
    floats['llama'].save_pretrained(tmp_path/'llama')
    assert type(Model.from_pretrained(tmp_path/'llama', 'bfloat16', 'cpu')) is Model
    kept, back = (Model.from_pretrained(few, d, 'cpu') for d in (None, 'bfloat16'))
    assert type(kept) is QuantizedModel and type(back) is Model and back.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int7': there are 'float32'"): Model.from_pretrained(few, 'int7')



@pytest.fixture(scope='module')
def smol(tmp_path_factory):
    "SmolLM2 in int4, saved by the command, and what it printed"
    out, said = tmp_path_factory.mktemp('few')/'smol', StringIO()
    with torch.no_grad(), redirect_stdout(said):
        assert main(['quantize', 'smollm2-135m', '--dtype', 'int4', '--group', '64', '--symmetric', '--out', str(out)]) == 0
    return out, said.getvalue()


def test_commands(smol, tmp_path, capsys):
    smol, said = smol
    assert 'int4 (group=64, symmetric=True)' in said
    assert main(['generate', 'The capital of France is', '--model', str(smol), '--max-new-tokens', '3', '--device', 'cpu']) == 0
    assert 'Paris' in capsys.readouterr().out
    assert main(['chat', str(smol), '--demo', '--device', 'cpu', '--max-new-tokens', '4']) == 0
    for argv, said in ((['quantize', 'smollm2-135m', '--out', ''], 'name it with --out'),
                       (['quantize', '--dtype', 'int3', '--out', 'x'], "'int3'"),
                       (['quantize', '--dtype', 'nf4', '--group', '32', '--out', 'x'], "no field 'group'"),
                       (['quantize', '--dtype', 'int4', '--group', '48', '--out', 'x'], '32 does not divide it'),
                       (['quantize', str(smol), '--out', str(tmp_path/'y')], 'is quantised already')):
        capsys.readouterr()
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert said in err and err.count('\n') == 1
    assert not (tmp_path/'y').exists()


def test_saved_tokenizer_is_the_file_s(smol):
    saved = smol[0]
    a, b = Tokenizer.from_pretrained('smollm2-135m'), Tokenizer.from_pretrained(saved)
    talk = [dict(role='user', content='Sei gegrüßt, 世界 <|im_end|> 1234!')]
    assert a.chat(talk) == b.chat(talk) and a.eos_ids == b.eos_ids and a.bos_id == b.bos_id
    transformers = pytest.importorskip('transformers')
    c = transformers.AutoTokenizer.from_pretrained(saved)
    text = 'The router picks 8 of 256 experts, niño. 世界<|im_end|>'
    assert c.encode(text, add_special_tokens=False) == a.encode(text, special=True)


def test_calibrating_from_the_command_line(tmp_path, capsys):
    (tmp_path/'short.txt').write_text('Too short.')
    argv = ['quantize', 'smollm2-135m', '--dtype', 'int4', '--calibrate', str(tmp_path/'short.txt'), '--out', str(tmp_path/'out')]
    assert main(argv) == 2 and 'tokens is too short for an excerpt of 512; give a longer text' in capsys.readouterr().err
    (tmp_path/'long.txt').write_text('One word and another. '*400)
    argv = ['quantize', 'smollm2-135m', '--dtype', 'fp8', '--calibrate', str(tmp_path/'long.txt'), '--out', str(tmp_path/'out')]
    assert main(argv) == 2 and "GPTQ rounds to grids of 'int4', not to 'fp8'" in capsys.readouterr().err
    assert not (tmp_path/'out').exists()


def test_calibrated_models_are_saved_as_others(floats, tmp_path, tokens):
    model = calibrate_model(floats['llama'], tokens.repeat(8, 2), Int4(64, symmetric=True))
    model.save_pretrained(tmp_path/'few')
    same(QuantizedModel.from_pretrained(tmp_path/'few', device='cpu'), model)
    assert {r.format for r in model.quantization_report().rows} == {'int4 (group=64, symmetric=True)', 'int8 (group=32)', 'float32'}


# ---- memory

PEAK = '''
import torch
from deepseek_nb import Model, QuantizedModel
from deepseek_nb.bench import peak_bytes
from deepseek_nb.files.hub import fetch
from deepseek_nb.files.gguf import open_gguf
torch.set_num_threads(1)
path = fetch('smollm2-135m')
open_gguf(path)
keep = []
def first_token():
    keep.append({})
    with torch.inference_mode(): keep[0](torch.ones(1, 1, dtype=torch.long))
print(peak_bytes(first_token))
'''
LOADS = dict(float32="Model.from_pretrained(path, 'float32', 'cpu')", int8="QuantizedModel.from_pretrained(path, 'int8', device='cpu')",
             int4="QuantizedModel.from_pretrained(path, 'int4', device='cpu')", own="QuantizedModel.from_pretrained(path, device='cpu')")


def test_memory_falls_with_the_weights(python):
    "Peaks of loading and of a token, above a process that has imported what it needs: the weights, and an embedding while it is packed"
    peak = {k: int(python(PEAK.replace('keep.append({})', f'keep.append({v})'))) for k, v in LOADS.items()}
    size = dict(int8=139.7e6, int4=96.6e6, own=95.9e6)
    for k, n in size.items(): assert peak[k] < n + 60e6, (k, peak)
    assert peak['int8'] < .3*peak['float32'] and peak['int4'] < .24*peak['float32'], peak
    print(peak)


def test_published_experts_stay_as_they_are(tmp_path):
    "Scales that `quant_fp8` wouldn't choose survive, also those of experts, whose gate and up are two tensors on disk"
    c = Config('deepseek_v3', vocab_size=64, dim=160, n_layers=1, n_heads=2, inter_dim=96, kv_lora_rank=32, q_lora_rank=48,
               qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, rope=Rope(interleaved=True), n_routed_experts=3,
               n_activated_experts=2, moe_inter_dim=128)
    Model(c, 'float32', 'cpu').init_weights(.2).save_pretrained(tmp_path/'m')
    stored = {}
    for k, t in load_file(tmp_path/'m'/'model.safetensors').items():
        stored[k] = t
        if '_proj' in k and k.endswith('weight'):
            stored[k], scale = quant_fp8(t)
            stored[f'{k}_scale_inv'] = scale*(1 + torch.rand_like(scale))
    write_tensors(tmp_path/'m'/'model.safetensors', stored)
    config = read_json(tmp_path/'m'/'config.json') | dict(quantization_config=dict(quant_method='fp8', weight_block_size=[128, 128]))
    (tmp_path/'m'/'config.json').write_text(json.dumps(config))
    exact = Model.from_pretrained(tmp_path/'m', 'float32', 'cpu').state_dict()
    model = QuantizedModel.from_pretrained(tmp_path/'m', 'fp8', embedding=None, device='cpu')
    found = packed_weights(model)
    assert 'layers.0.mlp.experts.gate_up_proj' in found and len(found) == 7
    for k, w in found.items(): assert torch.equal(w.dequantize(), exact[k]) and w.error == 0, k

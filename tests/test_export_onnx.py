"ONNX: logits of GQA with biases, padding, quantised products, damaged and hostile files, other runtimes, real models."
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.core.config import Config, Rope

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

from deepseek_nb.export.onnx import (  # noqa: E402  # noqa: E402
    DATA,
    IntBlocks,
    OnnxModel,
    check_onnx,
    export_genai,  # noqa: E402
    export_onnx,
    onnx_weights,
    rounded_model,
    sort_as_topk,
)

SLOW = pytest.mark.skipif(not os.environ.get('DEEPSEEK_NB_SLOW'), reason='takes minutes: set DEEPSEEK_NB_SLOW=1')


def distance(got, want):
    d = ((got - want).abs().max()/want.abs().max()).item()
    assert np.isfinite(d)
    return d


@pytest.fixture(scope='module')
def seed():
    s = int.from_bytes(os.urandom(3), 'big')
    print('seed', s)
    torch.manual_seed(s)
    return s


@pytest.fixture(scope='module')
def qwen(seed):
    c = Config('qwen2', vocab_size=90, dim=40, n_layers=1, n_heads=6, inter_dim=56, n_kv_heads=2, head_dim=8, attn_bias=True,
               max_positions=128, rope=Rope(5e4, kind='yarn', factor=4., original_positions=32), eos_ids=(3,))
    model = Model(c, dtype='float32').eval()
    model.init_weights(.3)
    for n, p in model.named_parameters():
        if n.endswith('bias'): torch.nn.init.normal_(p)
    return model


@pytest.fixture(scope='module')
def folder(qwen, tmp_path_factory):
    return export_onnx(qwen, tmp_path_factory.mktemp('onnx')/'plain')


def halves(run, tokens, cut):
    run.reset()
    return torch.cat([run(tokens[:, :cut]), run(tokens[:, cut:])], 1)


def test_logits_of_ragged_sizes(qwen, folder):
    run = OnnxModel(folder, threads=1)
    for b, s, cut in ((1, 2, 1), (5, 3, 2), (2, 41, 1), (1, 65, 64)):
        tokens = torch.randint(0, 90, (b, s))
        with torch.no_grad(): assert distance(halves(run, tokens, cut), qwen(tokens)) < 1e-4


def test_weights_come_back(qwen, folder):
    state = qwen.state_dict()
    found = onnx_weights(folder)
    assert set(found) == set(state) and all(torch.equal(found[k], state[k]) for k in state)


@pytest.mark.parametrize('descending', [False, True])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64, torch.float32])
def test_equal_values_keep_their_order(seed, dtype, descending):
    "Not only where a runtime's TopK does so"
    from onnxscript.tensor import Tensor
    for n in (1, 2, 33):
        for dim in (-1, 0):
            x = torch.randint(0, 3, (n, 5) if dim == 0 else (5, n)).to(dtype)
            if dtype.is_floating_point: x[x == 0] = -torch.inf
            got, want = sort_as_topk(Tensor(x.numpy()), True, dim, descending), x.sort(dim=dim, stable=True, descending=descending)
            for o, w in zip(got, want, strict=True): np.testing.assert_array_equal(o.value, w)


def test_no_path_of_this_machine_in_the_graph(folder):
    text = (folder/'model.onnx').read_bytes()
    assert b'site-packages' not in text and str(Path(__file__).parent.parent).encode() not in text


@pytest.mark.parametrize('form', [IntBlocks(4, 16), IntBlocks(8, 32)])
def test_quantised_products_equal_rounded_weights(qwen, folder, tmp_path, form):
    import onnx_ir

    from deepseek_nb.export.onnx import quantise_onnx, write_onnx
    write_onnx(quantise_onnx(onnx_ir.load(folder/'model.onnx'), form), tmp_path)
    tokens = torch.randint(0, 90, (2, 7))
    with torch.no_grad(): assert distance(OnnxModel(tmp_path, threads=1)(tokens), rounded_model(qwen, form)(tokens)) < 1e-4


@pytest.mark.parametrize('cut', [0, 1, 100, -1])
def test_truncated_graph(folder, tmp_path, cut):
    data = (folder/'model.onnx').read_bytes()
    (tmp_path/'model.onnx').write_bytes(data[:cut])
    (tmp_path/DATA).write_bytes((folder/DATA).read_bytes())
    with pytest.raises(ValueError) as e: check_onnx(tmp_path/'model.onnx')
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_truncated_weights(folder, tmp_path):
    (tmp_path/'model.onnx').write_bytes((folder/'model.onnx').read_bytes())
    (tmp_path/DATA).write_bytes((folder/DATA).read_bytes()[:-1])
    with pytest.raises(ValueError, match="don't match"): OnnxModel(tmp_path)
    (tmp_path/DATA).unlink()
    with pytest.raises(ValueError, match='no file'): OnnxModel(tmp_path)


def test_weights_behind_a_link_and_absolute(folder, tmp_path):
    proto = onnx.load(folder/'model.onnx', load_external_data=False)
    inside = tmp_path/'in'
    inside.mkdir()
    (tmp_path/'secret').write_bytes((folder/DATA).read_bytes())
    (inside/DATA).symlink_to(tmp_path/'secret')
    onnx.save(proto, inside/'model.onnx')
    with pytest.raises(ValueError, match='outside'): check_onnx(inside/'model.onnx')
    for t in proto.graph.initializer:
        for e in t.external_data:
            if e.key == 'location': e.value = str(tmp_path/'secret')
    onnx.save(proto, inside/'model.onnx')
    with pytest.raises(ValueError, match='outside'): check_onnx(inside/'model.onnx')


def entry(key, value):
    def change(proto):
        t = next(t for t in proto.graph.initializer if t.external_data)
        found = {e.key: e for e in t.external_data}
        (found.get(key) or t.external_data.add(key=key)).value = value
    return change


def cycle(proto):
    nodes = [n for n in proto.graph.node if n.input]
    nodes[9].input[0] = nodes[20].output[0]


def shape(*dims):
    def change(proto):
        t = next(t for t in proto.graph.initializer if t.external_data)
        del t.dims[:]
        t.dims.extend(dims)
    return change


HOSTILE = [cycle, *(entry('location', o) for o in ('../x', '/dev/zero', '.', '', 'a\0b')),
           *(entry('length', o) for o in ('-4', '0', str(2**63))),
           *(entry('offset', o) for o in ('-1', str(2**63), '1e3', str(10**30))), *(shape(*o) for o in ([0], [2**62, 4], [-1, 16], [])),
           lambda p: setattr(p.graph.node[3], 'op_type', 'Nope'), lambda p: setattr(p.graph.node[3], 'domain', 'elsewhere'),
           lambda p: setattr(p.opset_import[0], 'version', 9999), lambda p: setattr(p, 'ir_version', 9999)]

@pytest.mark.parametrize('change', HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_graphs(folder, tmp_path, change):
    "Cycles, places outside, sizes that overflow, and what the runtime doesn't know: one line each"
    proto = onnx.load(folder/'model.onnx', load_external_data=False)
    change(proto)
    onnx.save(proto, tmp_path/'model.onnx')
    (tmp_path/DATA).write_bytes((folder/DATA).read_bytes())
    with pytest.raises(ValueError) as e: OnnxModel(tmp_path)
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)


def test_openvino_reads_it(qwen, folder):
    ov = pytest.importorskip('openvino', reason='pip install openvino')
    run = ov.Core().compile_model(folder/'model.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    tokens = torch.randint(0, 90, (2, 5))
    empty = np.zeros((2, 2, 0, 8), np.float32)
    feed = dict(input_ids=tokens.numpy(), attention_mask=np.ones((2, 5), np.int64), position_ids=np.tile(np.arange(5), (2, 1)))
    got = run(feed | {'past_key_values.0.key': empty, 'past_key_values.0.value': empty})['logits']
    with torch.no_grad(): assert distance(torch.from_numpy(got), qwen(tokens)) < 1e-4


def golden_prompts():
    file = Path(os.environ.get('DEEPSEEK_NB_GOLDEN') or Path(__file__).resolve().parents[2]/'shared/golden')/'chat_prompts.json'
    if not file.is_file(): pytest.skip('set DEEPSEEK_NB_GOLDEN to the folder of chat_prompts.json')
    return [case['prompt'] for case in json.loads(file.read_text())['cases']]


@pytest.fixture(scope='module')
def mini(tmp_path_factory):
    "Golden prompts in tokens, a model in Python, and its folder: `mini`, or, as tracing it takes half a minute, its first two layers"
    from deepseek_nb.files.tokenizer import Tokenizer
    prompts, tok = golden_prompts(), Tokenizer.from_pretrained('mini')
    model = Model.from_pretrained('mini', dtype='float32', device='cpu')
    if not os.environ.get('DEEPSEEK_NB_SLOW'):
        whole, model = model.state_dict(), Model(replace(model.config, n_layers=2), dtype='float32', device='cpu').eval()
        model.load_state_dict({k: whole[k] for k in model.state_dict()})
    return [tok.encode(text) for text in prompts], model, export_onnx(model, tmp_path_factory.mktemp('mini')/'o')


@pytest.fixture(scope='module')
def by_onnxruntime(mini): return OnnxModel(mini[2], threads=1)


@pytest.fixture(scope='module')
def by_openvino(mini):
    "The same graph, computed by OpenVINO"
    ov = pytest.importorskip('openvino', reason='pip install openvino')
    graph = ov.Core().compile_model(mini[2]/'model.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    run = OnnxModel(mini[2], threads=1)
    run.session = SimpleNamespace(run=lambda _, feed: [x.copy() for x in graph(feed).values()])
    return run


def same_greedy_text(mini, run, prompt):
    model, ids = mini[1], mini[0][prompt]
    cache, new = model.new_cache(1, len(ids) + 12), torch.tensor([ids])
    run.reset()
    for _ in range(12):
        with torch.no_grad(): want, got = model(new, cache)[:, -1], run(new)[:, -1]
        assert distance(got, want) < 1e-4
        assert got.argmax() == want.argmax()
        new = want.argmax()[None, None]


@pytest.mark.draw(6)
@pytest.mark.parametrize('prompt', range(41))
def test_greedy_text_of_golden_prompts(mini, by_onnxruntime, prompt): same_greedy_text(mini, by_onnxruntime, prompt)


@pytest.mark.draw(2)
@pytest.mark.parametrize('prompt', range(41))
def test_greedy_text_of_golden_prompts_by_openvino(mini, by_openvino, prompt): same_greedy_text(mini, by_openvino, prompt)


@SLOW
@pytest.mark.parametrize('name', ['smollm2-135m', 'mini'])
def test_greedy_text_of_real_models(name, tmp_path):
    from deepseek_nb.files.tokenizer import Tokenizer
    model, tok = Model.from_pretrained(name, dtype='float32'), Tokenizer.from_pretrained(name)
    run = OnnxModel(export_onnx(name, tmp_path/'o'))
    for text in golden_prompts()[:12:3]:
        ids = tok.encode(text)
        twice = torch.tensor([ids + ids])
        with torch.no_grad(): assert distance(halves(run, twice, len(ids)), model(twice)) < 1e-4
        want = model.generate(torch.tensor([ids]), 24, temperature=0)[0, len(ids):].tolist()
        assert want and run.greedy(ids, len(want)) == want


@SLOW
def test_genai_generates_the_same_tokens(tmp_path):
    og = pytest.importorskip('onnxruntime_genai', reason='pip install onnxruntime-genai')
    from deepseek_nb.files.tokenizer import Tokenizer
    name = 'smollm2-135m'
    export_genai(name, tmp_path/'g')
    model, ids = Model.from_pretrained(name, dtype='float32'), Tokenizer.from_pretrained(name).encode('The capital of France is')
    params = og.GeneratorParams(loaded := og.Model(str(tmp_path/'g')))
    params.set_search_options(max_length=len(ids) + 16, do_sample=False)
    generator = og.Generator(loaded, params)
    generator.append_tokens(ids)
    while not generator.is_done(): generator.generate_next_token()
    want = model.generate(torch.tensor([ids]), 16, temperature=0)[0].tolist()
    assert generator.get_sequence(0).tolist() == want[:len(generator.get_sequence(0))]

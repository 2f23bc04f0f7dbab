"""DeepSeek-V4 against transformers' model, on tiny configs that are drawn anew in every run: parts, logits, caches, folders

The seed is printed; SEED=n repeats a run, DRAWS=n asks for more draws. Where index scores are tied, transformers may select any of
the entries, so all configs have 16 index heads, for which a score of exactly zero for several entries is rare. A model whose logits move
by a fifth of the bound if its weights change in their last bit is drawn anew.
"""
import json
import os
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from deepseek_nb import Model, QuantizedModel
from deepseek_nb.arch.attention import Context
from deepseek_nb.arch.hash import ClampedMoE, HashGate
from deepseek_nb.arch.hyper import HyperConnection, HyperHead
from deepseek_nb.arch.model import Block
from deepseek_nb.arch.releases import preset, shapes
from deepseek_nb.arch.v4 import HyperBlock
from deepseek_nb.core.config import Config
from deepseek_nb.files.checkpoint import quant_fp8
from deepseek_nb.files.safetensors import read_header, read_tensors, write_tensors
from deepseek_nb.infer.drafts import MTPDrafter
from deepseek_nb.infer.inside import record_stream
from deepseek_nb.infer.paged import PagePool
from deepseek_nb.quant.groups import FP4
from deepseek_nb.quant.model import quantize_model
from deepseek_nb.serve.page import chosen_experts

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as theirs  # noqa: E402

EIGHT = ('wq_a.weight', 'wq_b.weight', 'wkv.weight', 'wo_b.weight')  # matrices that the test of released weights stores in FP8
DRAWS = int(os.environ.get('DRAWS') or 3)
pytestmark = pytest.mark.usefixtures('source')


def draw(r, **kw):
    "A tiny config of transformers with layers of all kinds in a random order"
    n, e, groups, rot = r.randrange(3, 5), r.choice([4, 8]), r.choice([1, 2]), r.choice([2, 4, 6])
    v = rot + 2*r.randrange(1, 6)
    csa, hca = r.choice([2, 4]), r.choice([5, 8])
    kinds = ['sliding_attention', 'compressed_sparse_attention', 'heavily_compressed_attention']
    layers = [*kinds, *r.choices(kinds, k=n - 3)]
    r.shuffle(layers)
    hashed, share = r.randrange(0, n + 1), dict(partial_rotary_factor=(rot + 1e-6)/v)
    other = dict(rope_type='default')
    if r.random() < .7: other = dict(rope_type='yarn', factor=4., original_max_position_embeddings=32, beta_fast=32., beta_slow=1.)
    if other['rope_type'] == 'yarn' and r.random() < .7: other['attention_factor'] = 1.
    return transformers.DeepseekV4Config(**dict(
        vocab_size=r.randrange(40, 70), hidden_size=2*r.randrange(8, 20), num_hidden_layers=n, layer_types=layers,
        num_attention_heads=groups*r.choice([1, 2, 3]), head_dim=v, q_lora_rank=r.randrange(5, 20), o_groups=groups,
        o_lora_rank=r.randrange(3, 9), sliding_window=r.randrange(2, 9), index_n_heads=16, index_head_dim=rot + 2*r.randrange(0, 4),
        index_topk=r.randrange(1, 5), compress_rates={kinds[1]: csa, kinds[2]: hca}, hc_mult=r.choice([1, 2, 4]),
        hc_sinkhorn_iters=r.choice([1, 3, 20]), hc_eps=r.choice([1e-6, 1e-3]), swiglu_limit=r.choice([.5, 2., 10.]),
        mlp_layer_types=['hash_moe']*hashed + ['moe']*(n - hashed), n_routed_experts=e, num_experts_per_tok=r.randrange(1, 4),
        moe_intermediate_size=4*r.randrange(1, 5), scoring_func='sqrtsoftplus', routed_scaling_factor=r.choice([1., 1.5, 2.5]),
        rms_norm_eps=r.choice([1e-6, 1e-4]), **share, tie_word_embeddings=False, max_position_embeddings=256,
        eos_token_id=r.choice([1, [1, 2]]),
        rope_parameters=dict(main=dict(rope_type='default', rope_theta=1e4, **share), compress=other | dict(rope_theta=16e4, **share)),
        attn_implementation='eager', experts_implementation='eager') | kw)


def shake(m):
    "Random weights that make every part of a model matter"
    for k, p in m.named_parameters():
        if 'norm' in k: p.copy_(1 + .3*torch.randn_like(p))
        elif k.endswith(('base', 'sinks', 'position_bias')): p.copy_(torch.randn_like(p))
        elif k.endswith('scale'): p.copy_(.5 + torch.rand_like(p))
        elif k.endswith(('.fn', 'hc_fn')): p.copy_(torch.randn_like(p)*p.shape[-1]**-.5)
        else: p.copy_(torch.randn_like(p)*(1.5*p.shape[-1]**-.5 if p.ndim > 1 else 1.))
    for k, b in m.named_buffers():
        if k.endswith('e_score_correction_bias'): b.copy_(.2*torch.randn_like(b))
        if k.endswith('tid2eid'): b.copy_(torch.rand(len(b), m.config.n_routed_experts).argsort(1)[:, :b.shape[1]])
    return m.eval()


def near(a, b): assert (a - b).abs().max() <= 1e-4*b.abs().max(), ((a - b).abs().max()/b.abs().max()).item()


def steady(hf, ids):
    "Whether noise in the last bit of all weights moves no logit by a fifth of the bound: elsewhere two programs that are both right part"
    want = hf(ids).logits
    for _ in range(3):
        other = deepcopy(hf)
        for p in other.parameters(): p.mul_(1 + 2**-23*torch.randn_like(p))
        if (other(ids).logits - want).abs().max() > 2e-5*want.abs().max(): return False
    return True


def drawn(r):
    "A model of transformers and two texts"
    hf = shake(transformers.DeepseekV4ForCausalLM(draw(r)))
    ids = torch.randint(hf.config.vocab_size, (2, 45))
    return (hf, ids) if steady(hf, ids) else drawn(r)


@pytest.fixture(scope='module', params=range(DRAWS))
def pair(request, tmp_path_factory, source):
    "Ours and theirs with the same weights, through a folder that transformers wrote"
    r, folder = source(f'pair {request.param}'), tmp_path_factory.mktemp('v4')
    hf, ids = drawn(r)
    hf.save_pretrained(folder)
    ours = Model.from_pretrained(folder, dtype='float32', device='cpu').eval().requires_grad_(False)
    return SimpleNamespace(hf=hf, ours=ours, folder=folder, ids=ids, logits=hf(ids).logits, r=r)


# ---- parts

def test_hyper_connections(source):
    r = source('hyper')
    hf = draw(r)
    c, x = Config.from_hf(hf.to_dict()), torch.randn(2, 5, hf.hc_mult, hf.hidden_size)
    site, head = theirs.DeepseekV4HyperConnection(hf), theirs.DeepseekV4HyperHead(hf)
    for m in (site, head):
        for p in m.parameters(): p.copy_(torch.randn_like(p))
    ours, last = HyperConnection(c), HyperHead(c)
    ours.load_state_dict(site.state_dict())
    last.load_state_dict({k.removeprefix('hc_'): v for k, v in head.state_dict().items()})
    post, comb, collapsed = site(x)
    y = torch.randn_like(collapsed)
    seen = []
    near(ours(x, lambda z: seen.append(z) or y), post[..., None]*y[:, :, None] + comb.transpose(-1, -2)@x)
    near(seen[0], collapsed)
    near(last(x), head(x))


@pytest.mark.parametrize('hashed', [True, False])
def test_mixture(hashed, source):
    r = source(f'mixture {hashed}')
    hf = draw(r, num_hidden_layers=1, layer_types=['sliding_attention'], mlp_layer_types=['hash_moe' if hashed else 'moe'])
    c, block = Config.from_hf(hf.to_dict()), theirs.DeepseekV4SparseMoeBlock(hf, 0)
    block.config = hf
    shake(block)
    ours = ClampedMoE(c, 0)
    ours.load_state_dict(block.state_dict())
    x, ids = 3*torch.randn(2, 7, c.dim), torch.randint(c.vocab_size, (2, 7))
    near(ours(x, ids), block(x, ids))
    assert isinstance(ours.gate, HashGate) == hashed
    if hashed:
        with pytest.raises(ValueError, match='hash routing needs token ids'): ours(x)


# ---- the model

def test_prefill_agrees(pair):
    "At lengths around the ends of windows, and for the whole text"
    c = pair.ours.config
    ends = {m*i + d for m in (c.window, *c.compress_ratios) if m for i in (1, 2) for d in (-1, 0, 1)} - {0}
    for s in {*pair.r.sample(sorted(ends), 4), 1, 45}: near(pair.ours(pair.ids[:, :s]), pair.hf(pair.ids[:, :s]).logits)


def test_cache_agrees(pair):
    "Chunks of random sizes, single tokens and rewinds give the logits of one pass"
    model, ids, at, cache = pair.ours, pair.ids, 0, pair.ours.new_cache(2)
    while at < 45:
        n = min(pair.r.choice([1, 1, 1, 2, 3, 7, 12]), 45 - at)
        near(model(ids[:, at:at+n], cache), pair.logits[:, at:at+n])
        at += n
        if at < 45 and pair.r.random() < .3:
            junk = pair.r.randrange(1, 6)
            model((ids[:, :junk] + 1) % model.config.vocab_size, cache)
            cache.rewind(junk)
    assert len(cache) == 45


def test_left_padding(pair):
    "A padded row has the logits of the same row alone, and so has its continuation"
    model, ids, pad = pair.ours, pair.ids, pair.r.randrange(1, 12)
    rows = torch.stack([ids[0, :20], torch.cat([ids[1, :1].expand(pad), ids[1, :20-pad]])])
    mask, cache = torch.tensor([[1]*20, [0]*pad + [1]*(20-pad)]), model.new_cache(2)
    near(model(rows, cache, attention_mask=mask)[1, pad:], pair.logits[1, :20-pad])
    for i in range(6): near(model(torch.stack([ids[0, 20+i], ids[1, 20-pad+i]])[:, None], cache)[1, 0], pair.logits[1, 20-pad+i])


def test_greedy_tokens(pair):
    "Plain decoding with a cache gives the tokens of transformers"
    ids = pair.ids[:1, :9]
    want = pair.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(pair.ours.generate(ids, max_new_tokens=12), want)


# ---- folders and configs

def test_saved_folder_loads_in_transformers(pair, tmp_path):
    "The release's layout, which both read"
    pair.ours.save_pretrained(tmp_path)
    assert 'layers.0.attn.kv_norm.weight' in read_header(tmp_path/'model.safetensors')
    again, info = transformers.DeepseekV4ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation='eager', experts_implementation='eager', output_loading_info=True)
    assert not any(info.values()), info
    near(again.eval()(pair.ids).logits, pair.logits)
    loaded = Model.from_pretrained(tmp_path, dtype='float32', device='cpu').requires_grad_(False)
    assert loaded.config == pair.ours.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), pair.ours.state_dict().values(), strict=True))


def test_released_weights(tmp_path, source):
    "Experts in FP4, other matrices in FP8 with E8M0 scales, and a block for multi-token prediction, which is kept"
    r = source('released')
    c = replace(Config.from_hf(draw(r, moe_intermediate_size=32, hidden_size=32, num_nextn_predict_layers=1).to_dict()))
    model = Model(c, 'float32', 'cpu').init_weights(.1).requires_grad_(False)
    model.save_pretrained(tmp_path)
    file, out = tmp_path/'model.safetensors', {}
    for k, t in read_tensors(read_header(file)):
        if '.experts.' in k and 'shared' not in k:
            p = FP4().encode(t)
            out |= {k: p['codes'].view(torch.int8), k.replace('weight', 'scale'): p['scales']}
        elif k.endswith(EIGHT) and 'compressor' not in k:
            q, s = quant_fp8(t, ue8m0=True)
            out |= {k: q, k.replace('weight', 'scale'): s.to(torch.float8_e8m0fnu)}
        else: out[k] = t.clone()
    out['mtp.0.e_proj.weight'] = torch.randn(4, 4)
    write_tensors(file, out)
    d = json.loads((tmp_path/'config.json').read_text())
    form = dict(quant_method='fp8', fmt='e4m3', scale_fmt='ue8m0', weight_block_size=[128, 128])
    (tmp_path/'config.json').write_text(json.dumps(d | dict(expert_dtype='fp4', quantization_config=form)))
    loaded = Model.from_pretrained(tmp_path, dtype='float32', device='cpu')
    for k, t in loaded.state_dict().items():
        want, fp8 = model.state_dict()[k], k.endswith(EIGHT) and 'compressor' not in k
        if '.experts.' in k and 'shared' not in k: want = torch.stack([FP4().decode(FP4().encode(w), w.shape) for w in want])
        assert (t.float() - want).abs().max() <= (.07*want.abs().max() if fp8 else 0), k
    loaded.save_pretrained(tmp_path/'again')
    saved = json.loads((tmp_path/'again'/'config.json').read_text())
    assert 'mtp.0.e_proj.weight' in read_header(tmp_path/'again'/'model.safetensors')
    assert not {'expert_dtype', 'quantization_config'} & saved.keys()
    del out['mtp.0.e_proj.weight'], out['layers.0.ffn.experts.0.w1.scale']
    write_tensors(file, out)
    with pytest.raises(ValueError, match='FP4 weight without scales'): Model.from_pretrained(tmp_path, dtype='float32', device='cpu')


def test_quantised_from_a_folder(pair, tmp_path):
    "The same codes whether a folder in transformers' layout is quantised while it is read, or the loaded model; and saved, the same logits"
    read, made = QuantizedModel.from_pretrained(pair.folder, 'int8', device='cpu'), quantize_model(pair.ours, 'int8')
    near(want := read(pair.ids), made(pair.ids))
    read.save_pretrained(tmp_path/'int8')
    again = Model.from_pretrained(tmp_path/'int8', device='cpu')
    assert isinstance(again, QuantizedModel) and again(pair.ids).equal(want)


def test_multi_token_prediction(tmp_path, source):
    "The block is saved under the release's names, loaded again, ignored by transformers, and sees no later token"
    r = source('mtp')
    hf = draw(r, num_nextn_predict_layers=1)
    model = Model(Config.from_hf(hf.to_dict()), 'float32', 'cpu').add_mtp().init_weights(.2).requires_grad_(False)
    model.save_pretrained(tmp_path)
    names = {k for k in read_header(tmp_path/'model.safetensors') if k.startswith('mtp.0.')}
    assert {f'mtp.0.{k}' for k in ('e_proj.weight', 'h_proj.weight', 'norm.weight', 'hc_head_fn', 'attn.wkv.weight')} <= names
    loaded, ids = Model.from_pretrained(tmp_path, dtype='float32', device='cpu', mtp=True), torch.randint(hf.vocab_size, (2, 12))

    def ahead(m, ids):
        with m.keep_hidden() as kept: m.hidden(ids)
        return m.hidden_ahead(kept[0], ids)[0]

    want = ahead(model, ids)
    near(ahead(loaded, ids), want)
    near(ahead(model, ids[:, :7]), want[:, :6])
    _, info = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert MTPDrafter(loaded).kind([1]) is None  # drafts are tested with the other sources, in test_speculate


@pytest.mark.parametrize('form', ['official', 'transformers'])
def test_configs(form, source):
    "A config written by us is the same to transformers, in both forms"
    r = source(f'config {form}')
    for _ in range(20):
        hf = draw(r)
        c = Config.from_hf(json.loads(hf.to_json_string()))
        assert Config.from_hf(c.to_hf(form)) == c
        again = transformers.DeepseekV4Config(**{k: v for k, v in c.to_hf(form).items() if k != 'architectures'})
        skip = {'topk_method', 'architectures', 'experts_implementation', 'attn_implementation', 'partial_rotary_factor', 'rope_parameters'}
        a, b = ({k: v for k, v in o.to_dict().items() if k not in skip and not k.startswith('_')} for o in (hf, again))
        assert a == b
        for k in ('main', 'compress'):
            mine, own = (o.rope_parameters[k] for o in (again, hf))
            assert all(mine[n] == v for n, v in own.items() if n != 'partial_rotary_factor')
        assert again.qk_rope_head_dim == hf.qk_rope_head_dim


@pytest.mark.parametrize('change,message', [
    (dict(compress_ratios=[0, 4]), 'give an integer for each of 43 layers'), (dict(compress_ratios='all'), 'must be a list'),
    (dict(o_groups=7), 'o_groups 7 does not divide n_heads 64'), (dict(num_key_value_heads=2), 'needs n_kv_heads 1'),
    (dict(sliding_window=0), 'it must be a positive integer'), (dict(num_hash_layers=99), 'n_hash_layers 99 must be between'),
    (dict(index_topk=0), 'need index_n_heads, index_head_dim and index_topk'), (dict(head_dim=None), 'head_dim missing')])
def test_config_errors(change, message):
    d = preset('deepseek-v4-flash').to_hf()
    with pytest.raises(ValueError, match=message): Config.from_hf(d | change)


# ---- what is for one residual stream says so

def test_hyper_blocks_have_no_fused_twin(source):
    "Grouped-query attention and a plain SwiGLU, for which there are kernels, in a block with several streams"
    r = source('fused')
    c = Config('llama', vocab_size=50, dim=32, n_layers=2, n_heads=4, inter_dim=48, n_kv_heads=2, head_dim=8, max_positions=64, hc_mult=4)
    model = Model(c, 'float32', 'cpu').eval().requires_grad_(False)
    for m in model.modules():
        if hasattr(m, 'reset'): m.reset(std=1., scale=1.)
    assert {k: tuple(t.shape) for k, t in model.state_dict().items()} == shapes(c)
    ids, cache = torch.randint(50, (1, 12)), model.new_cache()
    want = model(ids)
    near(torch.cat([model(ids[:, :r.randrange(1, 11)], cache), *(model(ids[:, i:i+1], cache) for i in range(len(cache), 12))], 1), want)
    plain = Block.forward(model.layers[0], torch.randn(1, 3, 32), model.context(3))
    assert plain.shape == (1, 3, 32) and isinstance(model.layers[0], HyperBlock)


def test_one_stream_only(pair):
    c, ids = pair.ours.config, pair.ids
    for run in (lambda: record_stream(pair.ours, ids), lambda: chosen_experts(pair.ours, [1, 2])):
        with pytest.raises(ValueError, match='needs one residual stream; this deepseek_v4 model has'): run()
    with pytest.raises(ValueError, match='a window and compressed entries'): PagePool(c, 4)
    with pytest.raises(ValueError, match='documents cannot be packed'): pair.ours.hidden(ids, documents=torch.zeros_like(ids))
    with pytest.raises(ValueError, match='needs token ids'):
        gate = HashGate(c)
        gate(torch.randn(2, c.dim), Context(()).tokens)

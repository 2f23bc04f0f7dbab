"""Every feature of the package with the newest architectures: what it does for V3.2 and for V4, or what its error says

A row of the matrix is a feature. A column holds None where the feature must work, and otherwise the text of the error that it must
raise. Models are tiny and drawn anew in every run; COVER_SEED=n repeats a run. Parity with transformers, caches, the server and drafts
have tests of their own.
"""
import copy
import json
import os
import random
import warnings

import matplotlib
import pytest
import torch

from deepseek_nb import LoraConfig, Model, QuantizedModel, Trainer, TrainingArguments
from deepseek_nb.arch.releases import shapes, summary
from deepseek_nb.arch.rewindable import rewindable_bytes
from deepseek_nb.arch.show import draw_architecture, draw_attention, show
from deepseek_nb.bench.limits import attend_work, forward_work
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.eval.perplexity import perplexity
from deepseek_nb.files.checkpoint import quant_fp8
from deepseek_nb.files.safetensors import read_header, read_json, read_tensors, write_tensors
from deepseek_nb.infer.inside import load_map, routes
from deepseek_nb.infer.quant_cache import CacheFormat
from deepseek_nb.quant import relative_error
from deepseek_nb.quant.model import calibrate_model, quantize_model
from deepseek_nb.quant.save import Fp8Blocks, PackedInts, publish
from deepseek_nb.train.distill import distillation_loss
from deepseek_nb.train.dynamic import spent
from deepseek_nb.train.lora import lora_weights
from deepseek_nb.train.optim import Muon, muon_groups
from deepseek_nb.train.peft import merge_experts, tune_experts

SEED = int(os.environ.get('COVER_SEED') or random.SystemRandom().randrange(10**6))
BOTH = dict(v32=None, v4=None)
ONE_STREAM = 'needs one residual stream; this deepseek_v4 model has 2, with hyper-connections; use one without'
FEATURES = {}


def feature(**errors):
    "Enter a function of a case into the matrix, with the errors that it must raise"
    def enter(f): return FEATURES.setdefault(f.__name__, (f, BOTH | errors))[0]
    return enter


def configs(r):
    same = dict(vocab_size=r.randrange(50, 70), dim=32, n_layers=3, n_heads=4, inter_dim=32, max_positions=256, n_routed_experts=4,
                n_shared_experts=1, n_activated_experts=2, moe_inter_dim=32, norm_topk=True, route_scale=1.5, score_bias=True,
                group_score='sum2', bos_id=0, eos_ids=(1,), q_lora_rank=16, qk_rope_head_dim=4, index_n_heads=8, index_head_dim=8,
                rope=Rope(interleaved=True), index_topk=r.randrange(3, 7), n_mtp_layers=1)
    far = Rope(16e4, interleaved=True, kind='yarn', factor=4., original_positions=64, attention_factor=1.)
    kinds = r.sample([0, 4, 8], 3)
    latent = dict(kv_lora_rank=32, qk_nope_head_dim=8, v_head_dim=8, n_dense_layers=1, score_func='sigmoid')
    window = dict(n_kv_heads=1, head_dim=16, window=r.randrange(3, 8), compress_ratios=tuple(kinds), mtp_ratios=(0,), o_groups=2,
                  o_lora_rank=8, hc_mult=2, n_hash_layers=1, swiglu_limit=10., score_func='sqrtsoftplus', compress_rope=far)
    return dict(v32=Config('deepseek_v32', **latent, **same), v4=Config('deepseek_v4', **window, **same))


class Case:
    "A model of one architecture, tokens, their logits and an empty folder"
    def __init__(self, name, c):
        self.name, self.c = name, c
        torch.manual_seed(SEED)
        self.m = Model(c, 'float32', 'cpu').init_weights(.1).eval().requires_grad_(False)
        self.ids = torch.randint(2, c.vocab_size, (2, 24))
        self.logits = self.m(self.ids)

    def own(self):
        "A copy whose weights may change"
        return copy.deepcopy(self.m).requires_grad_(True)


@pytest.fixture(scope='module', params=BOTH)
def case(request):
    print(f'COVER_SEED={SEED}')
    matplotlib.use('Agg')
    with torch.no_grad(): return Case(request.param, configs(random.Random(SEED))[request.param])


def near(a, b, tol=1e-4): assert (a - b).abs().max() <= tol*b.abs().max(), (a - b).abs().max()/b.abs().max()


def shaken(m):
    "Trainable weights, at other values"
    for p in m.parameters():
        if p.requires_grad: p.data.add_(.05*torch.randn_like(p))
    return m


def descends(m, ids):
    "Gradients reach the trainable weights, apart from the indexer's, which no selection lets through"
    with torch.enable_grad(): m(ids).logsumexp(-1).sum().backward()
    for k, p in m.named_parameters(): assert not p.requires_grad or (p.grad is None) == ('.indexer.' in k), k


# ---- configs, costs and pictures

@feature()
def config_in_both_forms(o, tmp):
    for form in ('official', 'transformers'): assert Config.from_hf(o.c.to_hf(form)) == o.c
    assert {k: tuple(t.shape) for k, t in o.m.state_dict().items()} == shapes(o.c)


@feature()
def info(o, tmp):
    s = summary(o.c)
    held = [*o.m.parameters(), *(b for b in o.m.buffers() if b.is_floating_point())]
    assert s['parameters'] == f'{sum(p.numel() for p in held):,}'
    assert ('top' in s['attention']) == (o.name == 'v32') and ('window' in s['attention']) == ('streams' in s['layers']) == (o.name == 'v4')


@feature()
def tables(o, tmp):
    cache = o.m.new_cache(2, 30)
    o.m(o.ids, cache=cache)
    assert o.c.model_type in show(o.c) and ('index keys' if o.name == 'v32' else 'entries') in show(cache)
    assert ('DSA' if o.name == 'v32' else 'CompressedAttention') in show(o.m)


@feature()
def picture_of_the_architecture(o, tmp): draw_architecture(o.c)


@feature(v4='no latent attention to draw')
def picture_of_attention(o, tmp): draw_attention(o.c, 1, 100)


@feature()
def memory_to_the_byte(o, tmp):
    grown = o.m.new_cache(2, 232).nbytes - o.m.new_cache(2, 200).nbytes
    assert grown == 2*32*o.c.cache_bytes_per_token(4)
    if o.name == 'v4': assert o.m.new_cache(2, 200).nbytes == rewindable_bytes(o.c, 200, 2, 4)


@feature()
def limits(o, tmp):
    "What grows is the index and, in V4, the pairs of the layer whose entries are all attended to"
    few, many = (forward_work(o.c, 1, t) for t in (100, 200))
    index = 2*o.c.index_n_heads*o.c.index_head_dim
    grown = o.c.n_layers*100*index if o.name == 'v32' else index*(201//4 - 101//4) + 4*o.c.n_heads*o.c.head_dim*(201//8 - 101//8)
    assert many.flops - few.flops == grown


@feature(v32='selects what it attends to', v4='selects what it attends to')
def limits_of_the_kernel(o, tmp): attend_work(o.c, 100)


# ---- running

@feature()
def generation(o, tmp):
    "Every option; a cache, a stream and drafts give the same tokens"
    how = dict(max_new_tokens=5, eos_token_id=-1)
    one = o.ids[:1]
    want = o.m.generate(one, **how)
    assert torch.equal(o.m.generate(one, cache=o.m.new_cache(), **how), want)
    assert [int(t) for t in o.m.stream(one, **how)] == want[0, 24:].tolist()
    for draft in ('lookup', o.m): assert torch.equal(o.m.generate(one, draft=draft, **how), want)
    sampled = dict(temperature=1., top_k=9, top_p=.9, min_p=.01, repetition_penalty=1.2, seed=3)
    assert torch.equal(o.m.generate(o.ids, **how, **sampled), o.m.generate(o.ids, **how, **sampled))
    assert o.m.generate(o.ids, max_length=26, eos_token_id=-1).shape == (2, 26)


@feature()
def padding_pieces_and_rewinds(o, tmp):
    mask, cache = torch.ones(2, 24), o.m.new_cache(2)
    mask[1, :7] = 0
    near(o.m(o.ids, attention_mask=mask)[1:, 7:], o.m(o.ids[1:, 7:]))
    near(torch.cat([o.m(p, cache) for p in o.ids.split([5, 1, 11, 7], 1)], 1), o.logits)
    cache.rewind(9)
    near(o.m(o.ids[:, 15:], cache), o.logits[:, 15:])


@feature()
def experts_of_each_token(o, tmp): assert load_map(routes(o.m, o.ids)).shape == (2 if o.name == 'v32' else 3, 4)


@feature()
def cache_in_codes(o, tmp):
    "Codes may change a selection, so logits are only roughly equal"
    assert relative_error(o.logits, o.m(o.ids, cache=o.m.new_cache(2, 30, CacheFormat()))) < .5


@feature()
def perplexity_of_a_text(o, tmp): assert 1 < perplexity(o.m, o.ids.flatten(), 16, 8).value < 10*o.c.vocab_size


# ---- folders and formats

@feature()
def folders(o, tmp):
    for size in (10**9, 40_000):
        folder = o.m.save_pretrained(tmp/str(size), max_shard_bytes=size)
        assert (len([*folder.glob('*.safetensors')]) > 1) == (size < 10**9)
        loaded = Model.from_pretrained(folder, dtype='float32', device='cpu')
        assert loaded.config == o.c and all(torch.equal(t, o.m.state_dict()[k]) for k, t in loaded.state_dict().items())
    assert Model.from_pretrained(folder, dtype='bfloat16', device='cpu')(o.ids).isfinite().all()


def quantised(form, **kw):
    "Quantise, save, load, and decode with a cache"
    def run(o, tmp):
        q = quantize_model(o.m, form, **kw)
        want = q(o.ids)
        assert 0 < relative_error(o.logits, want) < 1
        near(Model.from_pretrained(q.save_pretrained(tmp/'q'), device='cpu')(o.ids), want)
        assert 'embed_tokens' in str(q.quantization_report())
        assert q.generate(o.ids, max_new_tokens=3, eos_token_id=-1).shape == (2, 27)
    run.__name__ = f'weights_in_{form}' + '_and_experts_in_fp4'*bool(kw)
    return run


for form in ('int8', 'int4', 'nf4', 'fp8'): feature()(quantised(form))
feature()(quantised('fp8', experts='fp4'))


@feature()
def folder_in_fp8(o, tmp):
    "A release's matrices in FP8, loaded as floats and quantised while they are read"
    folder = o.m.save_pretrained(tmp/'fp8')
    out, names = {}, ('wq_a.weight', 'wkv.weight', 'q_a_proj.weight', 'o_proj.weight', 'w1.weight')
    for k, t in read_tensors(read_header(folder/'model.safetensors')):
        out[k] = t.clone()
        if k.endswith(names) and 'compressor' not in k: out[k], out[k + '_scale_inv'] = quant_fp8(t)
    write_tensors(folder/'model.safetensors', out)
    form = dict(quant_method='fp8', fmt='e4m3', weight_block_size=[128, 128])
    (folder/'config.json').write_text(json.dumps(read_json(folder/'config.json') | dict(quantization_config=form)))
    floats = Model.from_pretrained(folder, dtype='float32', device='cpu')
    assert 0 < relative_error(o.logits, floats(o.ids)) < .6
    near(QuantizedModel.from_pretrained(folder, 'nf4', device='cpu')(o.ids), quantize_model(floats, 'nf4')(o.ids))


@feature(v32='multiple of', v4='servers read only in the form of its releases')
def other_servers(o, tmp):
    folder = o.m.save_pretrained(tmp/'plain')
    if o.name == 'v32': assert Model.from_pretrained(publish(folder, tmp/'a', Fp8Blocks()), dtype='float32')(o.ids).isfinite().all()
    publish(folder, tmp/'b', PackedInts())


@feature(v4=ONE_STREAM)
def calibrated_codes(o, tmp): assert calibrate_model(o.own(), o.ids, 'int4')(o.ids).isfinite().all()


# ---- training

def adapters(name, **kw):
    def run(o, tmp):
        m = LoraConfig(r=2, **kw).apply(o.own())
        y = shaken(m)(o.ids)
        assert relative_error(o.logits, y) > 1e-3
        descends(m, o.ids)
        near(copy.deepcopy(o.m).load_adapter(m.save_adapter(tmp/name))(o.ids), y)
        with pytest.raises(ValueError, match=r'call merge_and_unload\(\)'): m.save_pretrained(tmp/'no')
        near(m.merge_and_unload()(o.ids), y)
    run.__name__ = name
    return run


feature()(adapters('lora', target_modules='all-linear'))
feature()(adapters('dora', target_modules='all-linear', use_dora=True))
feature()(adapters('lora_on_experts', target_parameters=['experts.gate_up_proj', 'experts.down_proj']))


@feature()
def qlora(o, tmp):
    m = LoraConfig(r=2, target_modules='all-linear').apply(quantize_model(o.m, 'nf4'))
    y = shaken(m)(o.ids)
    descends(m, o.ids)
    near(m.merge_to_float()(o.ids), y, .2) # the product of a kernel rounds activations
    assert lora_weights(m)


@feature()
def tuned_experts(o, tmp):
    m = shaken(tune_experts(o.own(), {'layers.1.mlp.experts': [1], 'layers.2.mlp.experts': [0, 3]}))
    y = m(o.ids)
    descends(m, o.ids)
    near(merge_experts(m)(o.ids), y)


@feature()
def fewer_experts(o, tmp):
    m = copy.deepcopy(o.m)
    ids = torch.randint(2, o.c.vocab_size, (24, 24))  # with 48 tokens the share varies by .004, one standard deviation
    for how in ('layers', 'top_p', 'null'): assert .85 < spent(m.set_compute(.95, ids, how), ids).share < .96, how
    near(m.set_compute(None)(o.ids), o.logits)


def rows(o): return [dict(tokens=row.tolist(), labels=row.tolist()) for row in torch.randint(2, o.c.vocab_size, (4, 16))]


@feature()
def trainer_with_muon(o, tmp):
    m = o.own()
    args = TrainingArguments(per_device_train_batch_size=4, max_steps=3, learning_rate=1e-2)
    with torch.enable_grad():
        Trainer(m, args, rows(o)*2, optimizers=(Muon(muon_groups(m), lr=1e-2), None)).train()
        Trainer(m, args, rows(o)*2, loss=distillation_loss(o.m)).train()
    assert all(p.isfinite().all() for p in m.parameters()) and relative_error(o.logits, m(o.ids)) > 1e-3


# ---- the matrix

@pytest.mark.parametrize('name', FEATURES)
def test_feature(name, case, tmp_path):
    run, said = FEATURES[name]
    torch.manual_seed(SEED)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        if said[case.name] is None: return run(case, tmp_path)
        with pytest.raises(ValueError, match=said[case.name]): run(case, tmp_path)

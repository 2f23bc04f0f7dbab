"Adapters exchanged with PEFT: made there and loaded here, made here and loaded there, logits compared"
import json
import random
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import FAMILIES, apart, oracle, steady

from deepseek_nb import Model
from deepseek_nb.train.lora import LoraConfig, candidates, lora_weights
from deepseek_nb.train.peft import adapter_at, layout

peft = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')

STACKS = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
MLA = ['kv_a_proj_with_mqa', 'kv_b_proj', 'o_proj']
KINDS = dict(
    qv=dict(target_modules=['q_proj', 'v_proj'], lora_alpha=32), all=dict(target_modules='all-linear'),
    rslora=dict(target_modules='all-linear', use_rslora=True, lora_alpha=12), dora=dict(target_modules='all-linear', use_dora=True),
    dora_rslora=dict(target_modules=['o_proj', 'down_proj'], use_dora=True, use_rslora=True),
    regex=dict(target_modules=r'.*layers\.\d+\.(self_attn|mlp)\.(o|down)_proj'),
    patterns=dict(target_modules='all-linear', rank_pattern={'o_proj': 5, r'layers\.0\.mlp\.\w+': 2}, alpha_pattern={'down_proj': 40}),
    some=dict(target_modules=['q_proj', 'o_proj', 'up_proj'], layers_to_transform=[0], exclude_modules=['o_proj']))
EXPERT_KINDS = dict(
    mla=dict(target_modules=MLA), mla_dora=dict(target_modules=MLA, use_dora=True),
    experts=dict(target_modules=MLA, target_parameters=STACKS), rs_experts=dict(target_parameters=STACKS, use_rslora=True),
    gate_up=dict(target_parameters=STACKS[:1]), down=dict(target_modules=['o_proj'], target_parameters=STACKS[1:]),
    router=dict(target_parameters=['mlp.gate.weight', 'mlp.experts.down_proj']))
CASES = [*((f, k) for f in ('llama', 'qwen2') for k in KINDS), *((f, k) for f in ('deepseek_v2', 'deepseek_v3') for k in
                                                               ('all', 'rslora', *EXPERT_KINDS))]


@pytest.fixture(autouse=True)
def quiet():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def base(family, seed, folder):
    "transformers' model, ours of the same weights, and tokens at which no router hesitates"
    for i in range(40):
        r = random.Random(f'{family} {seed} {i}')
        config = FAMILIES[family](r)
        if family.startswith('deepseek') and config.first_k_dense_replace >= config.num_hidden_layers: continue
        theirs = oracle(config, r.randrange(10**6))
        ids = torch.randint(config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(i))
        if not steady(theirs, ids): continue
        theirs.save_pretrained(folder)
        return theirs, Model.from_pretrained(folder, dtype='float32', device='cpu'), ids
    raise AssertionError('no model found')


def noise(m):
    "Adapters that change something, at any shape"
    for k, p in m.named_parameters():
        if 'lora_B' in k or 'lora_A' in k: p.normal_(std=.5*p.shape[-1]**-.5)
        if 'magnitude' in k: p.mul_(1 + .3*torch.randn_like(p))


def close(ours, theirs, ids):
    got, want = ours(ids), theirs(ids).logits
    assert apart(got, want) < 1e-5, apart(got, want)
    return want


@pytest.mark.parametrize('family, kind', CASES)
def test_theirs_to_ours(family, kind, tmp_path):
    theirs, ours, ids = base(family, kind, tmp_path/'base')
    before = theirs(ids).logits
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=3, **(KINDS | EXPERT_KINDS)[kind])).eval()
    noise(wrapped)
    for _ in range(20):  # an adapter can bring a router to the edge
        if steady(wrapped, ids): break
        noise(wrapped)
    wrapped.save_pretrained(tmp_path/'adapter')
    ours.load_adapter(tmp_path/'adapter')
    after = close(ours, wrapped, ids)
    assert apart(after, before) > 1e-2
    merged = ours.merge_adapter()(ids)
    assert apart(merged, after) < 1e-5
    assert apart(ours.unload()(ids), before) < 1e-5


@pytest.mark.parametrize('family, kind', CASES)
def test_ours_to_theirs(family, kind, tmp_path):
    theirs, ours, ids = base(family, f'{kind} back', tmp_path/'base')
    before = theirs(ids).logits
    LoraConfig(3, **(KINDS | EXPERT_KINDS)[kind]).apply(ours, 'mine')
    for i in range(20):
        torch.manual_seed(i)
        for w in lora_weights(ours).values():
            a = w.adapters['mine']
            for p in (a.a, a.b): p.normal_(std=.5*p.shape[-1]**-.5)
            if a.magnitude is not None: a.magnitude.mul_(1 + .3*torch.randn_like(a.magnitude))
        ours.save_adapter(tmp_path/'adapter')
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'base', dtype=torch.float32, attn_implementation='eager',
                                                                   experts_implementation='eager').eval()
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path/'adapter').eval()
        if steady(wrapped, ids): break
    assert apart(close(ours, wrapped, ids), before) > 1e-2
    stored = load_file(tmp_path/'adapter/adapter_model.safetensors')
    wrapped.save_pretrained(tmp_path/'again')
    again = load_file(tmp_path/'again/adapter_model.safetensors')
    assert stored.keys() == again.keys() and all(torch.equal(stored[k], again[k]) for k in stored)


@pytest.mark.parametrize('kind', ['attention', 'experts'])
def test_v4_under_the_names_of_transformers(kind, tmp_path):
    "V4's matrices have other names here; their adapters go both ways under those that PEFT finds in transformers"
    from test_v4 import draw, shake
    torch.manual_seed(seed := random.randrange(10**6))
    print(f'{seed=}')
    theirs = shake(transformers.DeepseekV4ForCausalLM(draw(random.Random(seed))))
    theirs.save_pretrained(tmp_path/'base')
    eager = dict(attn_implementation='eager', experts_implementation='eager')
    def fresh(): return transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'base', dtype=torch.float32, **eager).eval()
    names = ['q_a_proj', 'q_b_proj', 'kv_proj', 'gate_proj', 'o_b_proj', 'weights_proj']
    how = dict(target_modules=names) if kind == 'attention' else dict(target_modules=['o_b_proj'], target_parameters=STACKS)
    ids = torch.randint(theirs.config.vocab_size, (2, 20))
    wrapped = peft.get_peft_model(fresh(), peft.LoraConfig(r=2, **how)).eval()
    noise(wrapped)
    for p in (p for k, p in wrapped.named_parameters() if 'lora_' in k): p.mul_(.1) # far from other choices of experts and entries
    wrapped.save_pretrained(tmp_path/'adapter')
    ours = Model.from_pretrained(tmp_path/'base', dtype='float32', device='cpu').load_adapter(tmp_path/'adapter')
    want = wrapped(ids).logits
    assert apart(ours(ids), want) < 1e-4 < apart(want, theirs(ids).logits)
    back = peft.PeftModel.from_pretrained(fresh(), ours.save_adapter(tmp_path/'again')).eval()
    assert apart(back(ids).logits, want) < 1e-4


def test_names_cover_peft(tmp_path):
    "Every layer that is linear there can have an adapter here, and so can experts and routers"
    for family in FAMILIES:
        theirs, ours, _ = base(family, 'names', tmp_path/family)
        names = {k for k, m in theirs.named_modules() if isinstance(m, torch.nn.Linear) and k != 'lm_head'}
        names |= {k.removesuffix('.weight') for k, _ in theirs.named_parameters() if '.experts.' in k or k.endswith('.mlp.gate.weight')}
        assert names == candidates(ours).keys()


def test_refused(tmp_path):
    theirs, ours, ids = base('llama', 'refused', tmp_path/'base')
    before = ours(ids)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=['q_proj', 'o_proj']))
    wrapped.save_pretrained(folder := tmp_path/'a')
    path, tensors = folder/'adapter_model.safetensors', load_file(folder/'adapter_model.safetensors')
    some = next(iter(tensors))
    for wrong, said in ((tensors | {some: torch.zeros(3, 3)}, 'has shape [3, 3]'),
                        ({k: t for k, t in tensors.items() if k != some}, 'missing'),
                        (tensors | {'base_model.model.lm_head.lora_A.weight': torch.zeros(1)}, 'unused')):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=said.replace('[', r'\[')): ours.load_adapter(folder)
        assert torch.equal(ours(ids), before) and not lora_weights(ours)
    path.write_bytes(b'nonsense')
    with pytest.raises(ValueError, match='truncated, corrupt'): ours.load_adapter(folder)
    config = json.loads((folder/'adapter_config.json').read_text())
    for field, value in dict(bias='all', lora_bias=True, fan_in_fan_out=True, modules_to_save=['lm_head'], peft_type='LOHA',
                             use_qalora=True, layer_replication=[[0, 1]]).items():
        (folder/'adapter_config.json').write_text(json.dumps(config | {field: value}))
        with pytest.raises(ValueError, match=f'{field} is'): ours.load_adapter(folder)


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    _, ours, ids = base('llama', 'disk', tmp_path/'base')
    LoraConfig(2, target_modules=['q_proj']).apply(ours)
    ours.save_adapter(tmp_path/'a')
    kept = {p.name: p.read_bytes() for p in (tmp_path/'a').iterdir()}
    for w in lora_weights(ours).values(): w.adapters['default'].b.normal_()

    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    with pytest.raises(OSError, match='No space left'): ours.save_adapter(tmp_path/'a')
    assert {p.name: p.read_bytes() for p in (tmp_path/'a').iterdir()} == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == ['a', 'base']


def test_layout_has_each_parameter_once(tmp_path):
    _, ours, _ = base('deepseek_v3', 'once', tmp_path/'base')
    config = LoraConfig(3, target_modules='all-linear', target_parameters=STACKS)
    config.apply(ours)
    parts = layout(ours, config)
    keys = [p.key for ps in parts.values() for p in ps]
    assert len(set(keys)) == len(keys) == sum(p.requires_grad for p in ours.parameters())
    for k, ps in parts.items():
        for p in ps:
            t = getattr(adapter_at(ours, k, 'default'), p.name)
            assert p.write(t).shape == p.shape and torch.equal(p.read(p.write(t)), t)


def test_smollm(tmp_path):
    "The real model, both ways"
    ours = Model.from_pretrained('smollm2-135m', dtype='float32', device='cpu')
    ours.save_pretrained(tmp_path/'base')
    ids = torch.randint(49152, (1, 24), generator=torch.Generator().manual_seed(0))
    LoraConfig(16, 32, ['q_proj', 'v_proj']).apply(ours, 'mine')
    torch.manual_seed(0)
    for w in lora_weights(ours).values(): w.adapters['mine'].b.normal_(std=.02)
    ours.save_adapter(tmp_path/'mine')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'base', dtype=torch.float32).eval()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path/'mine').eval()
    close(ours, wrapped, ids)
    wrapped = peft.get_peft_model(wrapped.unload(), peft.LoraConfig(r=8, target_modules='all-linear', use_dora=True)).eval()
    for k, p in wrapped.named_parameters():
        if 'lora_B' in k: p.normal_(std=.02)
    wrapped.save_pretrained(tmp_path/'theirs')
    ours.load_adapter(tmp_path/'theirs', 'theirs')
    close(ours, wrapped, ids)

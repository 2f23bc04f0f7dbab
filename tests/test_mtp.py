"Multi-token prediction against transformers' layer, loops by hand, and files on disk"
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from deepseek_nb import Model
from deepseek_nb.arch.attention import one_document
from deepseek_nb.arch.mtp import MTPLoss, acceptance, ahead_labels, mtp_loss
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.files.checkpoint import SINGLE, quant_fp8

V3 = Config('deepseek_v3', vocab_size=48, dim=16, n_layers=2, n_heads=2, inter_dim=24, kv_lora_rank=8, q_lora_rank=12, qk_nope_head_dim=8,
            qk_rope_head_dim=4, v_head_dim=8, rope=Rope(interleaved=True), n_dense_layers=1, n_routed_experts=8, n_shared_experts=1,
            n_activated_experts=2, n_expert_groups=4, n_limited_groups=2, moe_inter_dim=8, score_func='sigmoid', score_bias=True,
            group_score='sum2', norm_topk=True, route_scale=2.5, max_positions=64, n_mtp_layers=1)


def tiny(c=V3, seed=0, std=.3):
    torch.manual_seed(seed)
    m = Model(c, dtype='float32', device='cpu').add_mtp().eval()
    m.init_weights(std)
    for b in m.buffers(): b.copy_(torch.randn_like(b)*.1)
    for k, p in m.named_parameters():
        if k.endswith('norm.weight'): p.data.uniform_(.5, 1.5)
    return m


def draw(*shape, seed=1): return torch.randint(48, shape, generator=torch.Generator().manual_seed(seed))


def batch_of(tokens, **more):
    return dict(tokens=tokens, labels=F.pad(tokens[:, 1:], (0, 1), value=-100), **more)


def language(model, batch):
    logits = model(batch['tokens'])
    return F.cross_entropy(logits.flatten(0, 1), batch['labels'].flatten(), reduction='sum'), int((batch['labels'] != -100).sum())


# Forward

def test_transformers_layer(tmp_path):
    "The block is transformers' decoder layer behind the joined norms"
    tf = pytest.importorskip('transformers')
    m = tiny()
    m.save_pretrained(tmp_path/'m')
    disk = load_file(tmp_path/'m'/SINGLE)
    as_model = {k.replace('layers.2.', 'layers.1.'): v for k, v in disk.items() if 'layers.1.' not in k}
    drop = ('enorm', 'hnorm', 'eh_proj', 'shared_head', 'layers.1.embed_tokens')
    (tmp_path/'one').mkdir()
    save_file({k: v for k, v in as_model.items() if not any(d in k for d in drop)}, tmp_path/'one'/SINGLE, metadata=dict(format='pt'))
    (tmp_path/'one'/'config.json').write_bytes((tmp_path/'m'/'config.json').read_bytes())
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path/'one', dtype=torch.float32).eval()
    tokens = draw(2, 11)
    with torch.no_grad():
        x = m.hidden(tokens)
        def norm(x, w): return x*(x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()*disk[f'model.layers.2.{w}.weight']
        joined = torch.cat([norm(disk['model.embed_tokens.weight'][tokens[:, 1:]], 'enorm'), norm(x[:, :-1], 'hnorm')], -1)
        h = joined@disk['model.layers.2.eh_proj.weight'].T
        mask = torch.full((10, 10), -torch.inf).triu(1)[None, None]
        layer = other.model.layers[1]
        h = layer(h, attention_mask=mask, position_embeddings=other.model.rotary_emb(h, torch.arange(10)[None]))
        want = norm(h[0] if isinstance(h, tuple) else h, 'shared_head.norm')
        got, = m.hidden_ahead(x, tokens)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('depths', [1, 2, 3])
def test_positions_know_nothing_later(depths):
    m, tokens = tiny(replace(V3, n_mtp_layers=depths)), draw(1, 12)
    with torch.no_grad():
        base = m.hidden_ahead(m.hidden(tokens), tokens)
        for at in range(1, 12):
            other = tokens.clone()
            other[0, at] = (other[0, at] + 1)%48
            for k, (a, b) in enumerate(zip(base, m.hidden_ahead(m.hidden(other), other), strict=True), 1):
                moved = (a - b).abs().amax(-1)[0] > 1e-6
                assert a.shape == (1, 12-k, 16)
                assert not moved[:max(0, at-k)].any()
                assert moved[max(0, at-k):].any()


@pytest.mark.parametrize('cut', [1, 4, 9])
def test_packed_documents_stay_apart(cut):
    m, tokens = tiny(), draw(1, 10)
    documents = (torch.arange(10) >= cut).int()[None]
    parts = [tokens[:, :cut], tokens[:, cut:]]
    with torch.no_grad():
        x = torch.cat([m.hidden(p) for p in parts], 1)
        together = m.hidden_ahead(x, tokens, documents)[0]
        for start, p in zip((0, cut), parts, strict=True):
            if p.shape[1] < 2: continue
            alone = m.hidden_ahead(m.hidden(p), p)[0]
            torch.testing.assert_close(together[:, start:start+alone.shape[1]], alone, rtol=1e-4, atol=1e-5)
    labels = ahead_labels(batch_of(tokens, documents=documents), 1)
    assert labels[0, cut-1] == -100 and (labels != -100).sum() == 7 + (cut == 9)


def test_one_document_needs_no_mask():
    assert one_document(torch.full((3, 5), 7))
    m, tokens = tiny(), draw(2, 8)
    with torch.no_grad():
        x = m.hidden(tokens)
        assert torch.equal(m.hidden_ahead(x, tokens, torch.zeros(2, 8))[0], m.hidden_ahead(x, tokens)[0])


# Losses

@pytest.mark.parametrize('depths', [1, 2])
def test_loss_by_hand(depths):
    m, tokens = tiny(replace(V3, n_mtp_layers=depths)).double(), draw(3, 9)
    batch = batch_of(tokens)
    batch['labels'][1, :5] = -100
    with torch.no_grad():
        x = m.hidden(tokens)
        total, n = mtp_loss(m, batch, x)
        want, count = 0., 0
        for k, h in enumerate(m.hidden_ahead(x, tokens), 1):
            for b in range(3):
                for i in range(9-k):
                    label = batch['labels'][b, i+k].item()
                    if label == -100: continue
                    assert label == tokens[b, i+k+1]
                    p = torch.exp(h[b, i]@m.lm_head.weight.T)
                    want -= torch.log(p[label]/p.sum())/depths
                    count += k == 1
    assert n == count == 3*7 - 4
    torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=1e-6)


def test_loss_composes_with_one_forward_pass():
    m, batch = tiny(), batch_of(draw(2, 9))
    total, n = MTPLoss(language, .25)(m, batch)
    ours = torch.autograd.grad(total, list(m.parameters()), allow_unused=True)
    a, (b, _) = language(m, batch)[0], mtp_loss(m, batch, m.hidden(batch['tokens']))
    theirs = torch.autograd.grad(a + .25*b, list(m.parameters()), allow_unused=True)
    assert n == 16 and not m.norm._forward_hooks
    for (k, _), g, w in zip(m.named_parameters(), ours, theirs, strict=True):
        assert (g is None) == (w is None), k
        if g is not None: torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_second_loss_trains_the_model_behind():
    m, batch = tiny(), batch_of(draw(2, 9))
    mtp_loss(m, batch, m.hidden(batch['tokens']))[0].backward()
    for k in ('embed_tokens.weight', 'lm_head.weight', 'layers.0.mlp.down_proj.weight', 'mtp.0.eh_proj.weight', 'mtp.0.mlp.gate.weight'):
        assert m.get_parameter(k).grad.abs().sum() > 0, k


def test_evaluation_is_of_the_first_loss_alone():
    m, batch = tiny(), batch_of(draw(2, 9))
    with torch.no_grad(): assert torch.equal(MTPLoss(language)(m, batch)[0], language(m, batch)[0])


def test_hook_is_removed_when_the_loss_fails():
    m = tiny()
    def broken(model, batch): raise RuntimeError('broken')
    with pytest.raises(RuntimeError, match='broken'): MTPLoss(broken)(m, batch_of(draw(1, 5)))
    assert not m.norm._forward_hooks


def test_acceptance_by_hand():
    m, tokens = tiny(std=.6), draw(2, 9)
    with torch.no_grad():
        p, q = m(tokens).softmax(-1), m.lm_head(m.hidden_ahead(m.hidden(tokens), tokens)[0]).softmax(-1)
        pairs = [(p[b, i+1], q[b, i]) for b in range(2) for i in range(8)]
    got = acceptance(m, tokens)
    assert got['greedy'] == pytest.approx(sum(a.argmax() == b.argmax() for a, b in pairs).item()/16)
    both = sum(min(x, y) for a, b in pairs for x, y in zip(a.tolist(), b.tolist(), strict=True))
    assert got['sampled'] == pytest.approx(both/16, abs=1e-5)
    with pytest.raises(ValueError, match='token id 48 is outside the vocabulary of 48'): acceptance(m, torch.tensor([[1, 48]]))


# Files

def files(folder): return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_plain_models_are_as_before(tmp_path):
    m = tiny()
    folder = m.save_pretrained(tmp_path/'m')
    plain = Model.from_pretrained(folder, 'float32', 'cpu')
    assert not hasattr(plain, 'mtp') and not any('mtp' in k for k in plain.state_dict())
    assert all(k.startswith('layers.2.') for k in plain.kept)
    assert torch.equal(plain(draw(1, 7)), m(draw(1, 7)))
    assert files(plain.save_pretrained(tmp_path/'again')) == files(folder)


@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trip_to_the_byte(tmp_path, tied, dtype):
    folder = tiny(replace(V3, tie_embeddings=tied)).to(getattr(torch, dtype)).save_pretrained(tmp_path/'m', max_shard_bytes=8000)
    m = Model.from_pretrained(folder, dtype, 'cpu', mtp=True)
    assert not m.training and not m.mtp.training and m.mtp[0].eh_proj.weight.dtype == getattr(torch, dtype)
    assert files(m.save_pretrained(tmp_path/'again', max_shard_bytes=8000)) == files(folder)
    names = {k for p in folder.glob('*.safetensors') for k in load_file(p)}
    assert ('model.layers.2.embed_tokens.weight' in names) == ('model.layers.2.shared_head.head.weight' in names) == (not tied)


def test_trained_embedding_is_saved_in_both_places(tmp_path):
    m = Model.from_pretrained(tiny().save_pretrained(tmp_path/'m'), 'float32', 'cpu', mtp=True)
    with torch.no_grad(): m.embed_tokens.weight.add_(1)
    disk = load_file(m.save_pretrained(tmp_path/'n')/SINGLE)
    assert torch.equal(disk['model.layers.2.embed_tokens.weight'], m.embed_tokens.weight)
    assert torch.equal(disk['model.embed_tokens.weight'], m.embed_tokens.weight)


def test_fp8_block(tmp_path):
    m = tiny()
    folder = m.save_pretrained(tmp_path/'m')
    disk = load_file(folder/SINGLE)
    for k in [k for k in disk if '_proj' in k]: disk[k], disk[k+'_scale_inv'] = quant_fp8(disk[k])
    save_file(disk, folder/SINGLE, metadata=dict(format='pt'))
    got = Model.from_pretrained(folder, 'float32', 'cpu', mtp=True)
    torch.testing.assert_close(got.mtp[0].eh_proj.weight, m.mtp[0].eh_proj.weight, rtol=1/15, atol=1e-3)
    assert not any('scale_inv' in k for k in load_file(got.save_pretrained(tmp_path/'n')/SINGLE))
    kept = Model.from_pretrained(folder, 'float32', 'cpu')
    again = load_file(kept.save_pretrained(tmp_path/'o')/SINGLE)
    for k, v in disk.items():
        if 'layers.2.' in k: assert torch.equal(again[k].view(torch.uint8), v.view(torch.uint8)), k


def test_transformers_loads_what_is_saved(tmp_path):
    tf = pytest.importorskip('transformers')
    m = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        other = tf.AutoModelForCausalLM.from_pretrained(m.save_pretrained(tmp_path/'m'), dtype=torch.float32).eval()
    with torch.no_grad(): torch.testing.assert_close(other(draw(2, 9)).logits, m(draw(2, 9)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('change,match', [
    (lambda d: d.pop('model.layers.2.enorm.weight'), '1 keys missing: layers.2.enorm.weight'),
    (lambda d: d.update({'model.layers.2.extra': torch.zeros(1)}), None),
    (lambda d: d.update({'model.layers.2.hnorm.weight': torch.zeros(3)}), r'layers.2.hnorm.weight has shape \[3\]'),
    (lambda d: d.update({'model.layers.2.shared_head.head.weight': torch.zeros(48, 16)}), "differs from the model's own")])
def test_bad_checkpoints(tmp_path, change, match):
    folder = tiny().save_pretrained(tmp_path/'m')
    disk = load_file(folder/SINGLE)
    change(disk)
    save_file(disk, folder/SINGLE, metadata=dict(format='pt'))
    if match is None:
        kept = Model.from_pretrained(folder, 'float32', 'cpu', mtp=True)
        assert 'layers.2.extra' in kept.kept and 'model.layers.2.extra' in load_file(kept.save_pretrained(tmp_path/'n')/SINGLE)
        return
    with pytest.raises(ValueError, match=match) as e: Model.from_pretrained(folder, 'float32', 'cpu', mtp=True)
    assert '\n' not in str(e.value)


def test_models_without_blocks_say_so():
    m = Model(replace(V3, n_mtp_layers=0), dtype='float32', device='cpu')
    for call in (lambda: m.hidden_ahead(m.hidden(draw(1, 5)), draw(1, 5)), lambda: MTPLoss(language)(m, batch_of(draw(1, 5)))):
        with pytest.raises(ValueError, match='no multi-token-prediction blocks; load it with mtp=True'): call()
    with pytest.raises(ValueError, match='n_mtp_layers is 0'): m.add_mtp()

"A dense feed-forward becomes a mixture: exactness, routers against least squares, and transformers as the oracle"
import random
import warnings
from dataclasses import replace

import pytest
import torch

from deepseek_nb.arch.model import Model
from deepseek_nb.arch.moe import MoE, SwiGLU
from deepseek_nb.arch.releases import shapes
from deepseek_nb.arch.routing import Gate
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.train.upcycle import active_share, balanced_kmeans, fit_router, moe_config, partition, split, to_moe, upcycle

transformers = pytest.importorskip('transformers')
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
EAGER = dict(attn_implementation='eager', experts_implementation='eager')
GQA = Config('llama', vocab_size=80, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, inter_dim=96, max_positions=128,
             tie_embeddings=True, rope=Rope(theta=500.), eos_ids=(1,), bos_id=0)
LATENT = replace(GQA, model_type='deepseek_v3', n_kv_heads=0, head_dim=0, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
                 v_head_dim=8, n_dense_layers=2, rope=Rope(interleaved=True), score_func='sigmoid', score_bias=True, norm_topk=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def ffn(d, f): return SwiGLU(d, f).double().requires_grad_(False)


@pytest.mark.draw(2)
@pytest.mark.parametrize('seed', range(6))
def test_copies_are_the_dense_function(seed):
    r = random.Random(seed)
    d, f, e = r.randrange(3, 30), r.randrange(2, 40), r.randrange(1, 7)
    shared = r.randrange(2)
    c = moe_config(replace(GQA, dim=d, inter_dim=f), e, r.randrange(1, e+1), shared, width=f, scale=r.uniform(.1, .9) if shared else 1.)
    c = replace(c, score_func=r.choice(['sigmoid', 'softmax', 'sqrtsoftplus']))
    dense, x = ffn(d, f), torch.randn(2, 9, d).double()
    got, want = upcycle(dense, c, seed=seed)(x), dense(x)
    assert (got - want).abs().max() < 1e-6*want.abs().max(), c # the router's weights are float32


def test_noise_is_in_units_of_the_weights():
    dense = ffn(64, 256)
    c = moe_config(replace(GQA, dim=64, inter_dim=256), 4, 2, width=256, scale=1.)
    moved = upcycle(dense, c, noise=.05).experts.down_proj - dense.down_proj.weight
    assert abs(moved.std()/dense.down_proj.weight.std() - .05) < 2e-3
    assert not torch.equal(moved[0], moved[1])


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('by', ['firing', 'weights'])
def test_parts_add_up(seed, by):
    r = random.Random(seed)
    e, shared, width, d = r.randrange(1, 7), r.randrange(3), r.randrange(1, 6), r.randrange(4, 20)
    c = moe_config(replace(GQA, dim=d, inter_dim=(e + shared)*width), e, e, shared)
    dense, x = ffn(d, c.inter_dim), torch.randn(60, d).double()
    common, routed = partition(dense, c, x, by)
    assert sorted(torch.cat([common, *routed]).tolist()) == list(range(c.inter_dim))
    assert len(common) == shared*width and {len(n) for n in routed} == {width}
    moe = split(dense, c, x, by, r.choice(['regression', 'centroid']))
    assert (moe(x[None])[0] - dense(x)).norm() < .01*dense(x).norm()
    moe.gate.weight.zero_()
    assert (moe(x[None])[0] - dense(x)).abs().max() < 1e-6*dense(x).abs().max()


def test_fewer_experts_lose_more():
    dense, x = ffn(24, 96), torch.randn(200, 24).double()
    lost = [(split(dense, moe_config(replace(GQA, dim=24), 6, k, 2), x)(x[None])[0] - dense(x)).norm() for k in range(6, 0, -1)]
    assert all(a < b for a, b in zip(lost, lost[1:], strict=False))


def test_router_chooses_better_than_chance():
    "Experts that fire on separate parts of the inputs are found by the router"
    d, e, width = 12, 10, 2 # a tenth of the neurons is one expert's
    dense, kind = ffn(d, e*width), torch.arange(400) % e
    x = .1*torch.randn(400, d).double()
    x[torch.arange(400), kind] += 3
    dense.gate_proj.weight.zero_()
    for n in range(e*width):
        dense.gate_proj.weight[n, n % e] = 3
        dense.up_proj.weight[n, n % e] = 1
    c = moe_config(replace(GQA, dim=d, inter_dim=e*width), e, 1)
    moe = split(dense, c, x)
    held = x[::3]
    assert (moe(held[None])[0] - dense(held)).norm() < .05*dense(held).norm()
    assert len({*moe.gate(held).experts[:, 0].tolist()}) == e


@pytest.mark.draw(2)
@pytest.mark.parametrize('seed', range(5))
def test_kmeans_is_balanced(seed):
    g = torch.Generator().manual_seed(seed)
    e, size, d = (int(torch.randint(1, n, (), generator=g)) for n in (9, 12, 7))
    found = balanced_kmeans(torch.randn(e*size, d, generator=g), e, seed=seed)
    assert found.bincount(minlength=e).tolist() == [size]*e


def test_kmeans_finds_separate_groups():
    points = torch.eye(5).repeat_interleave(8, 0)*10 + .1*torch.randn(40, 5)
    best = min((sum((points[found == j] - points[found == j].mean(0)).square().sum() for j in range(5)).item(), seed)
               for seed in range(10) for found in [balanced_kmeans(points, 5, seed=seed)])
    assert best[0] < 5


def test_router_is_least_squares():
    x, y = torch.randn(300, 9).double(), torch.randn(300, 4).double()
    rows, bias = fit_router(x, y, ridge=0.)
    want = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], 1), y).solution
    scale = 1e-3/(x@want[:-1]).std()
    torch.testing.assert_close(rows, (want[:-1]*scale).T)
    torch.testing.assert_close(bias.double(), want[-1]*scale/4, rtol=1e-5, atol=1e-9)


def test_active_share_counts_the_parameters_a_token_meets():
    dense = GQA.active_params()
    for e, k, shared, width in ((12, 4, 4, 0), (4, 2, 0, 96), (4, 1, 1, 48)):
        c = moe_config(GQA, e, k, shared, width=width, scale=1.)
        router = GQA.n_layers*c.n_routed_experts*(c.dim + 1)*k/e # counted like an expert, or not at all
        gone = dense - 3*GQA.dim*GQA.inter_dim*GQA.n_layers*(1 - active_share(c))
        assert abs(c.active_params() - gone) <= GQA.n_layers*c.n_routed_experts*(c.dim + 1) + router


def same_where_sure(theirs, model, tokens, least=.2):
    "Equal logits up to the first token of a row for which two experts are nearly equal: rounding decides between these"
    gaps = []
    def look(gate, _, out):
        best = (out.scores + gate.e_score_correction_bias).sort(-1, descending=True).values
        gaps.append(best[:, gate.c.n_activated_experts - 1] - best[:, gate.c.n_activated_experts])
    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, Gate)]
    ours = model(tokens)
    for h in hooks: h.remove()
    sure = (torch.stack(gaps).amin(0).view(tokens.shape).cummin(1).values > 2e-7)
    assert sure.float().mean() > least, sure.float().mean()
    torch.testing.assert_close(theirs[sure], ours[sure], rtol=0, atol=1e-4)


@pytest.mark.parametrize('base', [GQA, LATENT], ids=['gqa', 'mla'])
@pytest.mark.parametrize('way', ['split', 'upcycle'])
def test_transformers_gives_the_same_logits(base, way, tmp_path):
    model = Model(base, 'float32', 'cpu').init_weights(.2).requires_grad_(False)
    tokens = torch.randint(80, (3, 40))
    c = moe_config(base, 6, 3, 2) if way == 'split' else moe_config(base, 4, 2, 1, width=96, scale=.4)
    new = to_moe(model, c, tokens, way)
    assert {k: tuple(v.shape) for k, v in new.state_dict().items()} == shapes(c)
    new.save_pretrained(tmp_path)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True, **EAGER)
    assert not any(info.values()), info
    assert type(theirs).__name__ == ('Glm4MoeForCausalLM' if base is GQA else 'DeepseekV3ForCausalLM')
    torch.testing.assert_close(Model.from_pretrained(tmp_path, 'float32', 'cpu')(tokens), new(tokens), rtol=0, atol=1e-5)
    same_where_sure(theirs(tokens).logits, new, tokens)
    if way == 'upcycle': torch.testing.assert_close(new(tokens), model(tokens), rtol=0, atol=1e-4)
    mine = new.generate(tokens[:1], 12, temperature=0.)
    assert mine.tolist() == theirs.generate(tokens[:1], max_new_tokens=12, do_sample=False, pad_token_id=1).tolist()


def test_the_original_is_left_alone():
    model = Model(GQA, 'float32', 'cpu').init_weights(.2)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    new = to_moe(model, moe_config(GQA, 6, 3, 2), torch.randint(80, (2, 30)))
    with torch.enable_grad(): new(torch.randint(80, (2, 30))).square().mean().backward()
    assert all(p.grad is not None for p in new.layers[0].mlp.parameters())
    for p in new.parameters(): p.add_(1.)
    assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())


def test_half_precision_stays_half():
    model = Model(GQA, 'bfloat16', 'cpu').init_weights(.2).requires_grad_(False)
    new = to_moe(model, moe_config(GQA, 6, 6, 2), tokens := torch.randint(80, (2, 30)))
    assert new.dtype == torch.bfloat16 and new.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert new.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32
    assert (new(tokens) - model(tokens)).norm() < .05*model(tokens).norm()


@pytest.mark.parametrize('change, says', [
    (dict(mlp_bias=True), "has biases, which experts don't support"),
    (dict(inter_dim=97), "97 neurons can't be divided evenly among"),
    (dict(n_routed_experts=4, n_activated_experts=1, moe_inter_dim=8), 'already has experts')])
def test_what_cannot_be_split(change, says):
    with pytest.raises(ValueError, match=says): moe_config(replace(GQA, **change), 6, 3, 2)


def test_bad_requests():
    c, dense, x = moe_config(GQA, 6, 3, 2), SwiGLU(32, 96).requires_grad_(False), torch.randn(9, 32)
    with pytest.raises(ValueError, match="can't be copies of a feed-forward of width 96"): upcycle(dense, c)
    with pytest.raises(ValueError, match='at most one shared expert'): upcycle(dense, replace(c, moe_inter_dim=96))
    with pytest.raises(ValueError, match="router 'dice' must be"): split(dense, c, x, router='dice')
    with pytest.raises(ValueError, match="by 'size' must be"): split(dense, c, x, by='size')
    with pytest.raises(ValueError, match='n_activated_experts 7 is larger than the 6 experts'): moe_config(GQA, 6, 7, 2)
    assert isinstance(split(dense, c, x), MoE)

"Single neurons as experts, and last projections in closed form: against plain sums, joint least squares, at ragged sizes"
import warnings
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from deepseek_nb.arch.model import Model
from deepseek_nb.arch.moe import MoE, SwiGLU
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.train.convert import _expert_hidden, convert, readers, refit, to_mla
from deepseek_nb.train.upcycle import (
    Neurons,
    ask_neurons_cpp,
    askable,
    better_half,
    choose_neurons,
    contributions,
    correlation,
    load_neurons,
    moe_config,
    neuron_kernels,
    neuron_share,
    save_neurons,
    to_neurons,
)

GQA = Config('llama', vocab_size=80, dim=48, n_layers=2, n_heads=6, n_kv_heads=3, head_dim=8, inter_dim=96, max_positions=256,
             norm_eps=1e-5, tie_embeddings=True, rope=Rope(theta=2e3), eos_ids=(1,), bos_id=0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def fresh(c=GQA, std=.2): return Model(c, 'float32', 'cpu').init_weights(std).requires_grad_(False)


# Single neurons

@pytest.mark.parametrize('d, f, k, n', [(7, 13, 1, 5), (48, 96, 40, 33), (5, 31, 31, 8), (16, 3, 2, 101)])
def test_a_token_gets_its_best_neurons_and_no_other(d, f, k, n):
    ffn, x = SwiGLU(d, f).requires_grad_(False), torch.randn(n, d)
    new = choose_neurons(ffn, k, x)
    g, u = new.gate_proj.weight.double(), new.up_proj.weight.double()
    got = new.double()(x.double())
    for i, t in enumerate(x.double()):
        a = torch.tensor([(u[j]@t if new.up_first[j] else silu(g[j]@t)).abs()*new.scale[j] for j in range(f)])
        want = sum(silu(g[j]@t)*(u[j]@t)*new.down_proj.weight[:, j].double() for j in a.topk(k).indices)
        torch.testing.assert_close(got[i], want, rtol=1e-9, atol=1e-9)


def test_shapes_and_gradients_are_a_feed_forwards():
    ffn, x = SwiGLU(16, 40), torch.randn(2, 3, 5, 16)
    new = choose_neurons(ffn, 10, x.flatten(0, 2))
    assert new(x).shape == x.shape and all(p.requires_grad for p in new.parameters())
    with torch.enable_grad(): new(x[:1, :1, :1]).sum().backward()
    rows = new.gate_proj.weight.grad.abs().sum(1) > 0
    assert rows.sum() == 10  # only the chosen neurons learn from a token
    assert set(new.state_dict()) == set(ffn.state_dict())


def test_the_half_that_tells_more():
    ffn, x = SwiGLU(24, 50).requires_grad_(False), torch.randn(4000, 24)
    up_first, scale = better_half(ffn, x)
    gate, up = silu(ffn.gate_proj(x)).abs(), ffn.up_proj(x).abs()
    for j in range(50):
        a, b = (torch.corrcoef(torch.stack([half[:, j], gate[:, j]*up[:, j]]))[0, 1] for half in (gate, up))
        assert up_first[j] == (b > a)
        torch.testing.assert_close(correlation(up, gate*up)[j], b, rtol=1e-4, atol=1e-5)
        other = (gate if up_first[j] else up)[:, j]
        torch.testing.assert_close(scale[j], other.square().mean().sqrt()*ffn.down_proj.weight[:, j].norm())
    # chosen by it, less is lost than by the same number of neurons for all tokens
    want, k = ffn(x), 25
    kept = contributions(ffn, x).square().mean(0).topk(k).indices
    h = silu(ffn.gate_proj(x))*ffn.up_proj(x)
    still = h[:, kept]@ffn.down_proj.weight[:, kept].T
    assert (choose_neurons(ffn, k, x)(x) - want).norm() < .8*(still - want).norm()


def test_a_silent_neuron_is_no_nan():
    ffn, x = SwiGLU(8, 12).requires_grad_(False), torch.randn(20, 8)
    for p in (ffn.gate_proj, ffn.up_proj, ffn.down_proj): p.weight[:3] = 0
    new = choose_neurons(ffn, 6, x)
    assert new.scale.isfinite().all() and new(x).isfinite().all()


def test_costs():
    assert neuron_share(1536, 1536) == 1 and abs(neuron_share(1536, 844) - .7) < .001 and neuron_share(300, 0) == 1/3
    assert Neurons(8, 30, 15).share == 2/3
    for k in (0, 31):
        with pytest.raises(ValueError, match=f'k is {k}; it must be from 1 to the 30 neurons'): Neurons(8, 30, k)


def test_a_model_of_neurons_generates_as_it_reads():
    model, tokens = fresh(replace(GQA, eos_ids=())), torch.randint(80, (3, 50))
    new = to_neurons(model, 40, tokens)
    out = new.generate(tokens[:1, :9], 12, temperature=0.)
    logits = new(out[:, :-1])[0, 8:]
    assert torch.equal(logits.argmax(-1), out[0, 9:]) and len(out[0]) == 21
    torch.testing.assert_close(to_neurons(to_mla(model, tokens, 25, 16), 96, tokens)(tokens), to_mla(model, tokens, 25, 16)(tokens))
    mixture = Model(moe_config(GQA, 6, 3, 2), 'float32', 'cpu')
    with pytest.raises(ValueError, match='already has experts; give a dense model'): to_neurons(mixture, 40, tokens)
    biased = fresh(replace(GQA, mlp_bias=True))
    with pytest.raises(ValueError, match="has biases, which experts don't support"): to_neurons(biased, 40, tokens)


def test_conversion_repairs_neurons_and_knows_its_state(tmp_path):
    model, tokens = fresh(), torch.randint(80, (24, 40))
    want = model(tokens)
    def off(m): return (m(tokens) - want).square().mean().item()
    new, errors = convert(model, 'neurons', tokens, steps=20, state=tmp_path/'s', active=40)
    assert len(errors) == 2 and all(after < before for before, after in errors) and off(new) < off(to_neurons(model, 40, tokens))
    again, _ = convert(model, 'neurons', tokens, steps=20, state=tmp_path/'s', active=40)
    assert torch.equal(again(tokens), new(tokens))
    with pytest.raises(ValueError, match=r'\(neurons differ\)'): convert(model, 'neurons', tokens, 20, tmp_path/'s', active=41)


# Last projections

@pytest.mark.parametrize('e, k, shared, n', [(7, 1, 0, 203), (5, 2, 1, 331), (6, 3, 2, 97), (4, 4, 3, 150), (9, 1, 2, 181)])
def test_a_refit_is_the_joint_least_squares(e, k, shared, n):
    c = replace(GQA, n_routed_experts=e, n_activated_experts=k, n_shared_experts=shared, moe_inter_dim=6, score_func='sigmoid')
    moe, x, size = MoE(c).requires_grad_(False), torch.randn(n, 48), .1 + torch.rand(n, 1)
    for p in moe.parameters(): p.copy_(.3*torch.randn(p.shape))
    want = torch.nn.functional.silu(x@torch.randn(48, 48))
    def off(): return ((moe(x[None])[0].double() - want)/size).square().sum().item()
    columns, before = [], off()
    for at, h, _ in readers(moe, x): columns.append(torch.zeros(n, h.shape[1]).index_copy(0, at, h))
    a, b = torch.cat(columns, 1).double()/size, want.double()/size
    best = (b - a@torch.linalg.lstsq(a, b, driver='gelsd').solution).square().sum().item()
    refit(moe, x, want, size, ridge=1e-9)
    assert .999*best <= off() <= 1.001*best < before


def test_a_refit_survives_experts_that_nobody_asks():
    c = replace(GQA, n_routed_experts=12, n_activated_experts=1, n_shared_experts=1, moe_inter_dim=6, score_func='sigmoid')
    moe, x = MoE(c).requires_grad_(False), torch.randn(3, 48)
    for p in moe.parameters(): p.copy_(.3*torch.randn(p.shape))
    idle = [i for i, (at, *_) in enumerate(readers(moe, x)) if not len(at)]
    old = moe.experts.down_proj.clone()
    refit(moe, x, torch.randn(3, 48), torch.ones(3, 1))
    assert len(idle) >= 9 and all(torch.equal(moe.experts.down_proj[i-1], old[i-1]) for i in idle)
    assert all(p.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize('d, f, k, n', [(20, 33, 12, 150), (9, 10, 10, 57), (31, 64, 5, 400)])
def test_neurons_are_refitted_at_once(d, f, k, n):
    ffn, x, size = SwiGLU(d, f).requires_grad_(False), torch.randn(n, d), .1 + torch.rand(n, 1)
    new, want = choose_neurons(ffn, k, x), silu(x@torch.randn(d, d))
    (at, h, _), = readers(new, x)
    assert torch.equal(at, torch.arange(n)) and (h != 0).sum(1).max() == k
    a, b = h.double()/size, want.double()/size
    best = (b - a@torch.linalg.lstsq(a, b, driver='gelsd').solution).square().sum().item()
    refit(new, x, want, size, ridge=1e-9)
    torch.testing.assert_close(((new(x) - want).double()/size).square().sum().item(), best, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize('e, k, shared, n', [(5, 2, 1, 41), (4, 4, 0, 7)])
def test_readers_hold_the_whole_output(e, k, shared, n):
    c = replace(GQA, n_routed_experts=e, n_activated_experts=k, n_shared_experts=shared, moe_inter_dim=6, score_func='sigmoid')
    moe, x = MoE(c).requires_grad_(False), torch.randn(n, 48)
    for p in moe.parameters(): p.copy_(.3*torch.randn(p.shape))
    total = torch.zeros(n, 48)
    for at, h, down in readers(moe, x): total[at] += h@down.T
    torch.testing.assert_close(total, moe(x[None])[0], rtol=1e-4, atol=1e-4)
    gate_up = torch.randn(14, 48)
    torch.testing.assert_close(_expert_hidden(x, gate_up), silu(x@gate_up[:7].T)*(x@gate_up[7:].T))


# The kernel

needs_cpp = pytest.mark.skipif(not neuron_kernels.ready(), reason='no C++ kernels here')


def near(new, x, dtype=torch.float32):
    "The kernel against the definition in float64, which chooses by the same affinities but for near ties"
    got = ask_neurons_cpp(x.to(dtype), new)
    g, u = (F(x.double()) for F in (new.double().gate_proj, new.up_proj))
    a = new.affinities(silu(g), u)
    best = a.sort(-1, descending=True).values
    clear = (best[..., new.k-1] - best[..., min(new.k, a.shape[-1] - 1)] > 1e-5*best[..., 0]) | (new.k == a.shape[-1])
    assert clear.float().mean() > .5
    torch.testing.assert_close(got.double()[clear], new(x.double())[clear], rtol=1e-4, atol=1e-4)


SIZES = [(1, 1, 1), (7, 3, 2), (16, 5, 5), (63, 129, 60), (64, 200, 1), (65, 31, 30), (100, 333, 77), (576, 1536, 844)]


@needs_cpp
@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize('d, f, k', SIZES)
def test_kernel_at_ragged_sizes(d, f, k, threads):
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shape in ((1,), (3,), (2, 4), (1, 1)):
            x = torch.randn(*shape, d)
            near(choose_neurons(SwiGLU(d, f).requires_grad_(False), k, torch.randn(50, d)), x)
    finally: torch.set_num_threads(was)


@needs_cpp
def test_kernel_takes_rows_from_anywhere():
    new, big = choose_neurons(SwiGLU(40, 70).requires_grad_(False), 30, torch.randn(50, 40)), torch.randn(6, 90)
    for x in (big[:, 3:43], big[::2, 50:], big.T[:40].T[:4]): near(new.float(), x)
    assert ask_neurons_cpp(big[:0, :40].reshape(0, 40), new.float()).shape == (0, 40)


@needs_cpp
def test_nan_and_infinity_show():
    new, x = choose_neurons(SwiGLU(20, 30).requires_grad_(False), 3, torch.randn(50, 20)), torch.randn(4, 20)
    for bad in (float('nan'), float('inf')):
        odd = x.clone()
        odd[2, 7] = bad
        y = ask_neurons_cpp(odd, new)
        assert not y[2].isfinite().any() and torch.equal(y[[0, 1, 3]], ask_neurons_cpp(x, new)[[0, 1, 3]])
    new.up_proj.weight[4], new.up_first[4] = float('nan'), True  # one neuron alone
    assert ask_neurons_cpp(x, new).isnan().all()


@needs_cpp
def test_who_runs():
    new, x = choose_neurons(SwiGLU(20, 30).requires_grad_(False), 9, torch.randn(50, 20)), torch.randn(4, 20)
    assert askable(x, new)
    for other in (x.double(), torch.randn(9, 20), x[:0]): assert not askable(other, new)
    new.gate_proj.requires_grad_()
    with torch.enable_grad(): assert not askable(x, new) and new(x).requires_grad
    assert askable(x, new)
    handle = new.up_proj.register_forward_hook(lambda *a: None)
    assert not askable(x, new)
    handle.remove()
    new.up_proj = torch.nn.Sequential(new.up_proj)  # wrapped, as an adapter does
    assert not askable(x, new) and new(x).shape == (4, 20)


@needs_cpp
def test_half_precision_sums_in_float32():
    new, x = choose_neurons(SwiGLU(200, 120).requires_grad_(False), 120, torch.randn(50, 200)).bfloat16(), torch.randn(5, 200).bfloat16()
    got, want = ask_neurons_cpp(x, new), new.double()(x.double())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=8e-3, atol=1e-4)


# On disk

def test_saved_and_loaded(tmp_path):
    model, tokens = fresh(), torch.randint(80, (3, 50))
    new = to_neurons(model, 40, tokens)
    for p in new.parameters(): p += .01*torch.randn(p.shape)  # as training would
    again = load_neurons(save_neurons(new, tmp_path/'n'), 'float32', 'cpu')
    assert torch.equal(again(tokens), new(tokens)) and again.layers[1].mlp.k == 40
    assert askable(torch.randn(1, 48), again.layers[0].mlp) or not neuron_kernels.ready()
    transformers = pytest.importorskip('transformers')
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'n', dtype=torch.float32)
    for b in new.layers: b.mlp.k = 96  # all neurons: what others make of the folder
    torch.testing.assert_close(dense(tokens).logits, new(tokens), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match='neurons.safetensors is missing, so save_neurons did not write this folder'):
        load_neurons(model.save_pretrained(tmp_path/'dense'))

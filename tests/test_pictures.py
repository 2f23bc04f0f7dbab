"Pictures and displays for every release: nothing overlaps, numbers add up, hooks leave nothing behind."
import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import pytest
import torch
from fastcore.test import test_close as close

from deepseek_nb.arch.attention import mla_flops
from deepseek_nb.arch.model import Model
from deepseek_nb.arch.releases import PRESETS, preset
from deepseek_nb.arch.routing import Route
from deepseek_nb.arch.show import (
    draw_architecture,
    draw_attention,
    expert_grid,
    human,
    mla_steps,
    model_table,
    module_kind,
    part_params,
    show,
)
from deepseek_nb.core.config import Config, Rope
from deepseek_nb.infer.inside import attention_pattern, logit_lens, record_stream, routes, watch

MLA = [o for o in PRESETS if preset(o).mla]
MOE = [o for o in PRESETS if preset(o).n_routed_experts]
BUILT = [o for o in PRESETS if not preset(o).index_n_heads]
LATENT = Config('deepseek_v3', vocab_size=64, dim=32, n_layers=3, n_heads=4, inter_dim=48, kv_lora_rank=16, qk_nope_head_dim=12,
                qk_rope_head_dim=8, v_head_dim=10, n_dense_layers=1, n_routed_experts=8, n_shared_experts=1, n_activated_experts=2,
                moe_inter_dim=16, score_func='sigmoid', score_bias=True, norm_topk=True, max_positions=64, rope=Rope(interleaved=True))
GROUPED = Config('llama', vocab_size=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, inter_dim=48, max_positions=64)


def overlaps(fig):
    "Pairs of texts that cover each other, and texts that leave the figure."
    fig.canvas.draw()
    texts = [t for ax in fig.axes for t in [*ax.texts, ax.title] if t.get_text()]
    assert min(t.get_fontsize() for t in texts) >= 8
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts]
    pairs = [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i+1:] if x.padded(-1).overlaps(y.padded(-1))]
    return pairs + [a for a, x in boxes if x.x0 < -2 or x.x1 > fig.bbox.x1 + 2]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close('all')


@pytest.mark.parametrize('name', PRESETS)
def test_every_release_can_be_drawn(name):
    draw_architecture(preset(name))
    assert not overlaps(plt.gcf())
    assert sum(part_params(preset(name)).values()) == preset(name).params()


@pytest.mark.parametrize('name', MLA)
@pytest.mark.parametrize('s,t', [(1, 1), (1, 4096), (4096, 4096), (1, 163840)])
def test_data_flow_adds_up(name, s, t):
    draw_attention(preset(name), s, t)
    assert not overlaps(plt.gcf())
    c, flops = preset(name), {form: sum(o.flops for o in steps) for form, steps in mla_steps(preset(name), s, t).items()}
    seen = min(t, c.index_topk) if c.index_n_heads else t
    assert (flops['naive'], flops['absorbed']) == (mla_flops(c, s, t)[0], mla_flops(c, s, seen)[1])
    assert flops.get('indexer', 0) == 2*c.index_n_heads*c.index_head_dim*s*t


@pytest.mark.parametrize('name', MOE)
def test_example_token_keeps_to_its_groups(name):
    c, grid = preset(name), expert_grid(preset(name))
    assert len({o[:2] for o in grid}) == c.n_routed_experts
    assert sum(on for *_, on in grid) == c.n_activated_experts
    if c.n_expert_groups > 1: assert len({row for _, row, on in grid if on}) <= c.n_limited_groups


WRITTEN = [(0, '0'), (1, '1'), (999, '999'), (999.6, '1 K'), (1000, '1 K'), (999_999, '1 M'), (671_026_419_200, '671 B')]


@pytest.mark.parametrize('n,text', WRITTEN)
def test_human(n, text): assert human(n) == text


# ---- displays

@pytest.mark.parametrize('name', BUILT)
def test_model_table_reads_no_weight(name):
    model = Model(preset(name), device='meta')
    rows = model_table(model).splitlines()
    assert len(rows) < 12 and human(sum(p.numel() for p in model.parameters())) in rows[-1]
    assert len(repr(model).splitlines()) < 80


def test_lazy_names_display(python):
    assert python('import sys; from deepseek_nb import Config, Model, Cache; '
                  'print(all(hasattr(o, "_repr_markdown_") for o in (Config, Model, Cache)), "matplotlib" in sys.modules)') == 'True False'
    for name in ('Config', 'Cache'): assert python(f'from deepseek_nb import {name}; print(hasattr({name}, "_repr_markdown_"))') == 'True'


def test_equal_layers_are_told_by_what_they_hold():
    model = Model(LATENT, torch.float32, 'cpu')
    assert module_kind(model.layers[1]) == module_kind(model.layers[2]) != module_kind(model.layers[0])
    model.layers[2].self_attn.o_proj = torch.nn.Linear(40, 32, bias=True)
    assert module_kind(model.layers[1]) != module_kind(model.layers[2])
    assert '| 2 | MLA | MoE |' in show(model)


def test_route_of_nothing_and_of_one():
    for n in (0, 1): assert f'{n} tokens' in show(Route(torch.ones(n, 2), torch.zeros(n, 2, dtype=torch.long), torch.ones(n, 8)))


# ---- inside

@pytest.mark.parametrize('config', [LATENT, GROUPED], ids=['mla', 'gqa'])
def test_record_and_pattern_are_the_models_own(config):
    torch.manual_seed(0)
    model, tokens = Model(config, torch.float32, 'cpu').requires_grad_(False), torch.randint(64, (2, 7))
    r = record_stream(model, tokens)
    close(model.norm(r.stream[-1]), model.hidden(tokens))
    close(logit_lens(model, r)[1][-1, ..., 0], model(tokens).argmax(-1))
    attn, x = model.layers[1].self_attn, model.layers[1].input_layernorm(r.stream[1])
    share = attention_pattern(model, r, 1)
    if config.mla:
        v = attn.kv_b_proj(attn.kv_a_layernorm(attn.kv_a_proj_with_mqa(x)[..., :16])).unflatten(-1, (4, -1))[..., 12:].transpose(1, 2)
    else: v = attn.v_proj(x).unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1)
    again = attn.o_proj((share @ v).transpose(1, 2).flatten(2))
    close(again, attn(x, model.context(7)), eps=1e-5)


def test_hooks_are_gone_after_an_error():
    model = Model(LATENT, torch.float32, 'cpu')
    with pytest.raises(RuntimeError, match='stop'), watch(model.layers, lambda i, y: (_ for _ in ()).throw(RuntimeError('stop'))):
        model(torch.zeros(1, 3, dtype=torch.long))
    assert not any(m._forward_hooks for m in model.modules())


def test_routes_are_those_of_the_forward_pass():
    model, tokens = Model(LATENT, torch.float32, 'cpu'), torch.randint(64, (2, 5))
    found = routes(model, tokens)
    assert list(found) == [1, 2] and all(r.experts.shape == (10, 2) for r in found.values())
    with pytest.raises(ValueError, match='llama has no router'): routes(Model(GROUPED, torch.float32, 'cpu'), tokens)

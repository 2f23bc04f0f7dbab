"Adapters beside codes: gradients, losses, merging, memory"

import pytest
import torch
import torch.nn.functional as F
import warm
from test_lora import FAMILIES, STACKS, batch, made, same, shake

from deepseek_nb import Model
from deepseek_nb.core.dispatch import use
from deepseek_nb.kernels.gradients import back_through
from deepseek_nb.quant import QuantizedWeight, quantize, relative_error
from deepseek_nb.quant.int4 import Int4
from deepseek_nb.quant.model import quantize_model
from deepseek_nb.train.lora import LoraConfig, lora_weights
from deepseek_nb.train.loss import language_loss

FORMATS = ['int8', 'int4', 'nf4', 'fp8', Int4(64)]


@pytest.mark.parametrize('format', FORMATS, ids=str)
def test_gradient_through_codes(format):
    for o, i in ((3, 32), (513, 64), (1030, 96), (40, 33)):
        w = quantize(torch.randn(o, i), format)
        x = torch.randn(2, 3, i, requires_grad=True)
        b = torch.randn(o)
        y = F.linear(x, w, b)
        dy = torch.randn_like(y)
        got, = torch.autograd.grad(y, x, dy)
        want = (dy.double()@w.dequantize().double()).float()
        assert (got-want).abs().max() < 1e-4*want.abs().max()
        assert relative_error(F.linear(x, w.dequantize(), b), y) < .02
        assert torch.equal(got.flatten(0, 1), back_through(dy.flatten(0, 1), w))


def test_no_decoded_weight_is_kept():
    w = quantize(torch.randn(600, 64), 'nf4')
    x = torch.randn(4, 64, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.nbytes) or t, lambda t: t): F.linear(x, w).sum().backward()
    assert sum(seen) < 64*600


@pytest.mark.parametrize('format', FORMATS, ids=str)
@pytest.mark.parametrize('name', ['llama', 'v3'])
def test_loss_falls_as_on_float(name, format):
    some, ends = batch(2, 24), []
    for m in (made(name), quantize_model(made(name), format)):
        torch.manual_seed(3)
        targets = dict(target_modules='all-linear', **(dict(target_parameters=STACKS) if name == 'v3' else {}))
        LoraConfig(4, 8, **targets).apply(m).train()
        codes = {k: b.clone() for k, b in m.named_buffers()}
        optimiser, losses = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], .01), []
        for _ in range(20):
            total, n = language_loss(m, some)
            (total/n).backward(); optimiser.step(); optimiser.zero_grad()
            losses.append(total.item()/n)
        assert all(torch.equal(b, codes[k]) for k, b in m.named_buffers())
        assert losses[-1] < .8*losses[0]
        ends.append(losses[0]-losses[-1])
    assert abs(ends[1]-ends[0]) < .15*ends[0]


@pytest.mark.parametrize('name', ['llama', 'qwen2'])
def test_frozen_halves_of_codes(name):
    "Exact activations: the hand-written halves against the readable ones on the same codes"
    m = shake(LoraConfig(3, 6, 'all-linear').apply(quantize_model(made(name), 'nf4', embedding=None)))
    some = batch(2, 15)
    def learn(choice):
        with use(choice):
            total, n = language_loss(m, some)
            return total.item()/n, torch.autograd.grad(total/n, [p for p in m.parameters() if p.requires_grad])
    same(learn('torch'), learn('reference'))


@pytest.mark.parametrize('dora', [False, True])
@pytest.mark.parametrize('name', FAMILIES)
def test_merge_to_float(name, dora, tmp_path):
    q = quantize_model(made(name), 'nf4')
    shake(LoraConfig(3, 6, 'all-linear', use_dora=dora).apply(q))
    some = batch(2, 9)['tokens']
    with torch.no_grad(), use('reference'):
        got = q(some)
        m = q.merge_to_float()
        assert type(m) is Model and (m(some)-got).abs().max() < 1e-4*got.abs().max()
        m.save_pretrained(tmp_path/'m')
        assert torch.equal(Model.from_pretrained(tmp_path/'m', 'float32', 'cpu')(some), m(some))
        assert (q(some)-got).abs().max() == 0
        merged = q.merge_and_unload()
        assert (merged(some)-got).abs().max() < 1e-4*got.abs().max()
    assert not lora_weights(q) and any(isinstance(x, QuantizedWeight) for x in q.modules())


def test_refused(tmp_path):
    q = LoraConfig(2, 4, ['q_proj']).apply(quantize_model(made('llama'), 'int8'))
    with pytest.raises(ValueError, match='is quantised'): q.merge_adapter()
    with pytest.raises(ValueError, match='the model has adapters'): q.save_pretrained(tmp_path/'q')
    assert not (tmp_path/'q').exists()


MEASURE = '''
import torch
from deepseek_nb import bench, Config
from deepseek_nb.arch.model import Model
from deepseek_nb.kernels import attention, norm, train
from deepseek_nb.quant.model import quantize_model
from deepseek_nb.kernels import codes
from deepseek_nb.train import peft, qlora
from deepseek_nb.train.lora import LoraConfig
from deepseek_nb.train.loss import language_loss
c = Config('llama', vocab_size=512, dim=512, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64, inter_dim=1536, tie_embeddings=True)
def run(few):
    m = Model(c, 'float32', 'cpu').init_weights()
    if few: m = LoraConfig(8, 16, 'all-linear').apply(quantize_model(m, few))
    o = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad])
    some = dict(tokens=torch.randint(512, (1, 64)), labels=torch.randint(512, (1, 64)))
    def steps():
        for _ in range(2):
            language_loss(m, some)[0].backward(); o.step(); o.zero_grad()
    return bench.peak_bytes(steps)
print(run({few!r}))
'''


def test_memory_of_a_step():
    "What a step adds to the model: adapters and activations, not gradients and moments of every weight"
    def peak(few):
        code = MEASURE.format(few=few)
        return int(warm.run('-c', code, modules=warm.TRAINING, check=True).stdout)
    full, few = peak(None), peak('nf4')
    weights = 4*8*(512*512*2+2*512*256+3*512*1536)
    assert full > 2.5*weights and few < .35*full

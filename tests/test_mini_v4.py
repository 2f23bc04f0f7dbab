"The second model that ships, with V4's architecture: found offline by its name, small, the same in transformers, trained, and looked into"
import json
from pathlib import Path

import pytest
import torch

import deepseek_nb
from deepseek_nb import Model, Tokenizer
from deepseek_nb.files.hub import shipped
from deepseek_nb.infer.inside import attended_entries, attention_inputs, attention_parts, entry_shares, mixing_weights
from deepseek_nb.train.corpora import corpus
from deepseek_nb.train.indexer import EntryLoss, entry_scores
from deepseek_nb.train.loss import language_loss
from deepseek_nb.train.mini import read_recipe, set_aside

FOLDER = Path(deepseek_nb.__file__).parent/'mini_v4'


@pytest.fixture(scope='module')
def mini():
    model = Model.from_pretrained('mini-v4', 'float32', 'cpu', mtp=True).eval().requires_grad_(False)
    with torch.no_grad(): yield model, Tokenizer.from_pretrained('mini-v4')


@pytest.fixture(scope='module')
def held(mini):
    "Tokens of held-out speeches `b s`"
    texts = set_aside(corpus('sotu')['text'][:], 20)[1]
    return torch.tensor([mini[1].encode(t)[:512] for t in texts[:2]])


def test_ships_with_the_package_and_is_small(mini, root):
    assert shipped('mini-v4') == shipped('mini_v4') == FOLDER
    assert sum(o.stat().st_size for o in FOLDER.rglob('*')) < 16e6
    c, recipe = mini[0].config, read_recipe(root/'nbs/configs/mini-v4.toml')
    assert c == recipe.model and c.hc_mult == 4 and c.n_hash_layers == 2 and {*c.compress_ratios} == {0, 4, 16}
    card = (FOLDER/'README.md').read_text()
    assert all(word in card for word in ('# mini-v4', 'DeepSeek-V4', 'State of the Union', 'minutes', 'perplexity'))
    assert (FOLDER/'tokenizer.json').read_bytes() == (shipped('mini')/'tokenizer.json').read_bytes()


def test_found_without_a_network(python):
    code = "import socket; socket.socket.connect = None\nfrom deepseek_nb import Model\n"
    assert python(code + "print(Model.from_pretrained('mini-v4').config.hc_mult)") == '4'


def test_transformers_reads_it_and_what_is_saved(mini, held, tmp_path):
    transformers = pytest.importorskip('transformers')
    ids = held[:1, :200]
    ours = mini[0](ids)
    Model.from_pretrained('mini-v4', 'bfloat16', 'cpu').save_pretrained(tmp_path)
    for folder in (FOLDER, tmp_path):
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info['missing_keys'] and not info['mismatched_keys']
        logits = theirs.eval()(ids).logits
        assert (logits - ours).abs().max() < 1e-4*ours.abs().max()


def test_stored_loss_is_found_again(mini, held, root):
    "The loss on held-out speeches is near the stored one, and far below that on shuffled text"
    runs = json.loads((root/'nbs/results/evidence/mini.json').read_text())['runs']
    stored = next(r for r in runs if r['arm'] == 'mini-v4')['result']['text']['sotu']['loss']
    loss = lambda t: language_loss(mini[0], dict(tokens=t[:, :-1], labels=t[:, 1:]))[0].item()/t[:, 1:].numel()
    assert loss(held) == pytest.approx(stored, abs=.5)
    assert loss(held[:, torch.randperm(held.shape[1])]) > loss(held) + 1


def test_text_in_pieces_and_rewound(mini, held):
    "Logits of a whole text, of its pieces through a cache, and after a rewind agree"
    model, ids = mini[0], held[:1, :150]
    whole, cache = model(ids), model.new_cache()
    parts = [model(ids[:, :90], cache), model(ids[:, 90:131], cache)]
    cache.rewind(20)
    again = [model(ids[:, i:i+1], cache) for i in range(111, 131)] + [model(ids[:, 131:], cache)]
    bound = 1e-4*whole.abs().max()
    assert (torch.cat(parts, 1) - whole[:, :131]).abs().max() < bound and (torch.cat(again, 1) - whole[:, 111:]).abs().max() < bound


def test_drafts_of_its_block_change_nothing(mini):
    model, tok = mini
    ids = torch.tensor([tok.encode('The people of the United States')])
    plain = model.generate(ids, 40, temperature=0.)
    assert torch.equal(model.generate(ids, 40, temperature=0., draft='mtp'), plain)
    words = tok.decode(plain[0, ids.shape[1]:].tolist()).split()
    assert len(words) > 15, words


def test_inside(mini, held):
    "Entries hold only tokens of their windows; queries attend to at most 16 of them; streams are mixed by doubly stochastic matrices"
    model, ids = mini[0], held[:, :201]
    inputs = attention_inputs(model, ids)
    for i, m in enumerate(model.config.compress_ratios):
        if not m: continue
        attn, (x, ctx) = model.layers[i].self_attn, inputs[i]
        shares, far = entry_shares(attn.compressor, x), attended_entries(attn, x, ctx)
        assert shares.shape == (2, 201//m, 201) and far.shape == (2, 201, 201//m)
        own = torch.arange(201)//m == torch.arange(201//m)[:, None]
        own |= (torch.arange(201)//m + 1 == torch.arange(201//m)[:, None]) & (m == 4)
        assert (shares[:, ~own] == 0).all() and torch.allclose(shares.sum(-1), torch.ones(2, 201//m), atol=1e-5)
        may = torch.arange(201//m) < ((torch.arange(201) + 1)//m)[:, None]
        assert not (far & ~may).any() and (far.sum(-1) == may.sum(-1).clamp(max=16 if m == 4 else 201)).all()
    assert torch.allclose(attention_parts(model, ids).sum(-1), torch.ones(6, 4), atol=1e-5)
    found = mixing_weights(model, ids)
    assert len(found) == 12 and all((m.comb.sum(-2) - 1).abs().max() < 1e-4 and (m.comb.sum(-1) - 1).abs().max() < .1 for m in found)


def test_indexer_learnt_to_select(mini, held):
    "The selection of the trained indexer covers more attention than the newest entries and than random ones"
    from deepseek_nb.train.indexer import entry_target
    x, ctx = attention_inputs(mini[0], held)[2]
    attn = mini[0].layers[2].self_attn
    p, may = entry_target(attn, x, ctx)[:, 255:], torch.arange(128) < ((torch.arange(255, 512) + 1)//4)[:, None]
    kinds = dict(indexer=entry_scores(attn, x, ctx)[:, 255:], newest=torch.arange(128.).expand_as(p), random=torch.rand_like(p))
    found = {n: p.gather(-1, s.masked_fill(~may, -torch.inf).topk(16).indices).sum(-1).mean().item() for n, s in kinds.items()}
    assert found['indexer'] > max(found['newest'], found['random']) + .02, found


def test_divergence_reaches_the_indexers_only(mini, held):
    model = Model.from_pretrained('mini-v4', 'float32', 'cpu').requires_grad_(True)
    ids = held[:, :100]
    batch = dict(tokens=ids, labels=ids.roll(-1, 1))
    zero = EntryLoss(lambda m, b: (0*language_loss(m, b)[0], 1), rows=2)
    with torch.enable_grad(): zero(model, batch)[0].backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved and all('.indexer.' in n for n in moved), moved
    assert all(torch.isfinite(x) and x > 0 for x in zero.last)

"The model that ships: found offline by its name, small, the same in transformers, balanced and English on text that it hasn't seen"
import re
from pathlib import Path

import pytest
import torch

import deepseek_nb
from deepseek_nb import Model, Tokenizer
from deepseek_nb.files.hub import shipped
from deepseek_nb.train.corpora import corpus
from deepseek_nb.train.data import packed, to_dataset, tokenised
from deepseek_nb.train.mini import documents, held_loads, held_losses, read_recipe, set_aside

FOLDER = Path(deepseek_nb.__file__).parent/'mini'


@pytest.fixture(scope='module')
def mini():
    model = Model.from_pretrained('mini', 'float32', 'cpu', mtp=True).eval().requires_grad_(False)
    with torch.no_grad(): yield model, Tokenizer.from_pretrained('mini')


@pytest.fixture(scope='module')
def held(mini, root):
    recipe = read_recipe(root/'nbs/configs/mini.toml')
    texts = {n: set_aside(documents(n, recipe.most), recipe.held_out)[1] for n in recipe.corpora}
    return {n: packed(tokenised(to_dataset(t), mini[1]), recipe.length).select(range(64)) for n, t in texts.items()}


def test_ships_with_the_package_and_is_small(mini):
    assert shipped('mini') == FOLDER
    assert sum(o.stat().st_size for o in FOLDER.rglob('*')) < 16e6
    model, tok = mini
    c = model.config
    assert c.model_type == 'deepseek_v3' and c.mla and c.is_moe(c.n_layers - 1) and c.n_mtp_layers == 1 and len(tok) == c.vocab_size
    card = (FOLDER/'README.md').read_text()
    assert all(word in card for word in ('State of the Union', 'minutes', 'perplexity'))


def test_found_without_a_network(python):
    code = "import socket; socket.socket.connect = None\nfrom deepseek_nb import Model\n"
    assert python(code + "print(Model.from_pretrained('mini').config.n_routed_experts)") == '32'


def test_transformers_reads_it(mini):
    transformers = pytest.importorskip('transformers')
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True,
                                                                    attn_implementation='eager', experts_implementation='eager')
    assert not info['missing_keys'] and not info['mismatched_keys']
    model, tok = mini
    text = 'My fellow citizens, the state of the union is strong. Enter HAMLET, reading on a book of words.'
    ids = tok.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(FOLDER)(text, add_special_tokens=False).input_ids == tok.encode(text, special=False)
    with torch.no_grad(): theirs, ours = theirs.eval()(torch.tensor([ids])).logits, model(torch.tensor([ids]))
    assert (theirs - ours).abs().max() < 1e-4*ours.abs().max()


def test_text_it_has_not_seen(mini, held):
    model, tok = mini
    held = {n: rows.select(range(8)) for n, rows in held.items()}
    losses = {n: held_losses(model, tok, rows) for n, rows in held.items()}
    assert all(o['bits_per_byte'] < 2.5 for o in losses.values()), losses
    shuffled = {n: held_losses(model, tok, rows.map(lambda r: dict(labels=r['labels'][::-1]))) for n, rows in held.items()}
    assert all(shuffled[n]['loss'] > losses[n]['loss'] + 1 for n in held)


def test_experts_share_the_work(mini, held):
    "The load balance on held-out text of all corpora is that of the model card"
    from datasets import concatenate_datasets
    found = held_loads(mini[0], concatenate_datasets([*held.values()]))
    said = re.search(r'updated only the bias: ([0-9., ]+)\.\n', (FOLDER/'README.md').read_text())[1]
    assert found == pytest.approx([*map(float, said.split(', '))], abs=.02)
    assert len(found) == 6 and all(1 <= x <= 1.3 for x in found), found


def test_its_words_are_words(mini):
    "Nine of ten words that it makes up stand in the text that it learnt from"
    model, tok = mini
    known = {w for n in ('sotu', 'shakespeare', 'wordnet') for t in corpus(n)['text'][:] for w in re.findall('[a-z]+', t.lower())}
    prompts = ('The people of the United States', 'Enter HAMLET.', 'In the year')
    def continued(p, seed): return tok.decode(model.generate(torch.tensor([tok.encode(p)]), 80, temperature=.7, seed=seed)[0].tolist())
    texts = [continued(p, seed) for p in prompts for seed in range(3)]
    words = [w for t in texts for w in re.findall('[a-z]+', t.lower())]
    assert len(words) > 300 and sum(w in known for w in words) > .9*len(words), texts

"The pictures of the front page show what there is."
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deepseek_nb.arch.releases import preset
from deepseek_nb.tools.book import by_part, chapters, save_pictures

NBS = Path(__file__).parents[1]/'nbs'


@pytest.mark.parametrize('name', ['map.svg', 'rates.svg'])
def test_picture_is_current(tmp_path, name):
    (tmp_path/'results').symlink_to(NBS/'results')
    save_pictures(tmp_path, chapters(NBS))
    assert (tmp_path/name).read_text() == (NBS/name).read_text(), f'{name} is stale: run `make export`'


def test_map_has_every_chapter():
    of = lambda tag: [o for o in ElementTree.parse(NBS/'map.svg').iter('{http://www.w3.org/2000/svg}' + tag)]
    book = [o for o in chapters(NBS) if o.room != 'tutorials']
    assert [o.text for o in of('title')] == [o.title for o in book]
    assert {o.title for o in by_part(book)} <= {o.text for o in of('text')}


def test_way_links_to_chapters():
    links = {o.get('href') for o in ElementTree.parse(NBS/'way.svg').iter('{http://www.w3.org/2000/svg}a')}
    assert len(links) > 6 and links <= {f'{o.module}.html' for o in chapters(NBS)}


def test_way_has_the_numbers_of_the_config():
    c, found = preset('deepseek-v3'), list(ElementTree.parse(NBS/'way.svg').iter())
    texts = '; '.join(o.text for o in found if o.tag.endswith('text'))
    for fact in (f'{c.n_layers} layers; the first {c.n_dense_layers} are dense', f'Tokenizer: {c.vocab_size:,} token ids',
                 f'Embedding: {c.dim:,} numbers per token', f'{c.kv_lora_rank} + {c.qk_rope_head_dim} per token',
                 f'{c.n_heads} heads, RoPE on {c.qk_rope_head_dim} of {c.qk_nope_head_dim + c.qk_rope_head_dim} dimensions',
                 f'selects {c.n_activated_experts} of {c.n_routed_experts} experts in {c.n_limited_groups} of {c.n_expert_groups} groups',
                 f'SwiGLU of width {c.moe_inter_dim:,} in each, and {c.n_shared_experts} shared expert', f'head: {c.vocab_size:,} logits',
                 f'{c.params()/1e9:.0f} billion parameters, {c.active_params()/1e9:.0f} billion active per token'): assert fact in texts
    squares = [o.get('class') for o in found if o.get('class') in ('dk-hot', 'dk-cold')]
    assert squares.count('dk-hot') == c.n_activated_experts and len(squares) == c.n_routed_experts

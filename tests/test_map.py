"The pictures of the front page show what there is."
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deepseek_nb.tools.book import by_part, chapters, save_pictures

NBS = Path(__file__).parents[1]/'nbs'


@pytest.mark.parametrize('name', ['map.svg', 'way.svg', 'rates.svg'])
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

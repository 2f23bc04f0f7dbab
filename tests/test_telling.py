"How the book is told, in numbers: what was reached is held."
from pathlib import Path
from statistics import median

import pytest

from deepseek_nb.tools.book import PATHS, book_tellings, chapters, path_places, telling_table

NBS = Path(__file__).parents[1]/'nbs'
FOUND = book_tellings(NBS)


def middle(name): return median(getattr(o, name) or 99 for o in FOUND.values())


def test_the_median_chapter():
    "Words of prose per line of code, cells, the first result, pictures, exercises"
    assert middle('ratio') >= 6.5 and middle('cells') <= 24 and middle('first') <= 6, telling_table(FOUND)
    assert median(o.pictures for o in FOUND.values()) >= 1 and sum(o.pictures > 0 for o in FOUND.values()) >= 53, telling_table(FOUND)


@pytest.mark.parametrize('name', FOUND)
def test_each_chapter_shows_something_early_asks_something_and_leads_on(name):
    o, after = FOUND[name], path_places(name, chapters(NBS))[0][3]
    assert o.first is not None and o.first <= 6 and o.exercises >= 2, o
    assert (after is None) == (name == PATHS[0].modules[-1])

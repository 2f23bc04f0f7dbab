"How the book is told, in numbers: what was reached is held."
from pathlib import Path
from statistics import median

import pytest

from deepseek_nb.tools.book import PATHS, book_tellings, chapters, path_places

NBS = Path(__file__).parents[1]/'nbs'
FOUND = book_tellings(NBS)


def middle(name): return median(getattr(o, name) or 99 for o in FOUND.values())


def test_the_median_chapter():
    assert middle('ratio') >= 4 and middle('cells') <= 35 and middle('first') <= 6


@pytest.mark.parametrize('name', FOUND)
def test_each_chapter_shows_something_early_and_leads_on(name):
    after = path_places(name, chapters(NBS))[0][3]
    assert (after is None) == (name == PATHS[0].modules[-1])

"The stored map of the book shows the chapters that there are"
import re
from html import unescape
from pathlib import Path

from deepseek_nb.tools.map import PARTS, chapters

NBS = Path(__file__).parents[1]/'nbs'


def test_map_is_current():
    shown = [unescape(t) for t in re.findall(r'<text[^>]*>([^<]+)</text>', (NBS/'map.svg').read_text())]
    book = chapters(NBS)
    expected = [c.title for c in book] + [PARTS[p] for p in {c.part for c in book}]
    assert sorted(shown) == sorted(expected), 'the map is stale: run python -m deepseek_nb.tools.map'

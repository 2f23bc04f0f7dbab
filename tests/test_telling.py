"How the book is told, in numbers: what was reached is held."
import json
import re
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from deepseek_nb.tools.book import PATHS, chapters, fine_print, only_imports, path_chapters, path_places

NBS = Path(__file__).parents[1]/'nbs'


class Telling(NamedTuple):
    "How a chapter is told"
    words: int # Words of prose
    lines: int # Lines of code shown unfolded
    cells: int # Cells with these lines
    first: int|None # Which of these cells is the first with a result
    pictures: int # Plots and drawings
    exercises: int # Functions to write, with a check

    @property
    def ratio(self): return self.words/max(1, self.lines)


def shown_code(cells):
    "Cells that the page shows unfolded, and their numbers of lines"
    small, found = fine_print(cells), []
    for o in cells:
        text = ''.join(o['source'])
        lines = [x for x in text.splitlines() if x.strip() and not re.match(r'\s*(#\||%%)', x)]
        folded = re.search(r'^#\| *(hide|default_exp|code-fold)', text, re.M) or only_imports(text) or any(o is x for x in small)
        if o['cell_type'] == 'code' and lines and not folded: found.append((o, len(lines)))
    return found


def prose_words(text):
    "Words of a paragraph without formulas, code blocks and addresses"
    if text.startswith('#| hide'): return 0
    text = re.sub(r'```.*?```|\$\$.*?\$\$|<[^>]+>|\]\([^)]*\)', ' ', text, flags=re.S)
    return len(re.findall(r"[^\W\d_][\w'’-]*", text))


def is_picture(output):
    data = output.get('data', {})
    return any(o.startswith('image/') for o in data) or any('<svg' in ''.join(data.get(o, '')) for o in ('text/html', 'text/markdown'))


def telling(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    texts = [''.join(o['source']) for o in cells]
    prose = [t for o, t in zip(cells, texts, strict=True) if o['cell_type'] == 'markdown']
    shown = shown_code(cells)
    first = next((i for i, (o, _) in enumerate(shown, 1) if o.get('outputs')), None)
    pictures = sum(is_picture(x) for o in cells for x in o.get('outputs', ())) + len(re.findall(r'!\[|<live-figure ', '\n'.join(prose)))
    tasks = sum(o.startswith('#| code-fold') and bool(re.search(r"^check\('", o, re.M)) for o in texts)
    return Telling(sum(map(prose_words, prose)), sum(n for _, n in shown), len(shown), first, pictures, tasks)


FOUND = {o.module: telling(NBS/o.notebook) for o in path_chapters(PATHS[0], chapters(NBS))}


def middle(name): return median(getattr(o, name) or 99 for o in FOUND.values())


def test_the_median_chapter():
    "Words of prose per line of code, cells, the first result, pictures, exercises"
    assert middle('ratio') >= 6.5 and middle('cells') <= 24 and middle('first') <= 6, FOUND
    assert median(o.pictures for o in FOUND.values()) >= 1 and sum(o.pictures > 0 for o in FOUND.values()) >= 53, FOUND


@pytest.mark.parametrize('name', FOUND)
def test_each_chapter_shows_something_early_asks_something_and_leads_on(name):
    o, after = FOUND[name], path_places(name, chapters(NBS))[0][3]
    assert o.first is not None and o.first <= 6 and o.exercises >= 2, o
    assert (after is None) == (name == PATHS[0].modules[-1])


def test_what_counts():
    assert [*map(prose_words, ('Two words.', '[one](a/b.html) $$x$$', '#| hide\nno'))] == [2, 1, 0]
    cells = [dict(cell_type='markdown' if o[0] == '#' else 'code', source=o) for o in ('a', '## Fine print\n\nLater.', 'b', '## End', 'c')]
    assert [(o['source'], n) for o, n in shown_code(cells)] == [('a', 1), ('c', 1)]

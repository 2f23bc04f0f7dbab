"The site is whole: a page for every chapter, no dead link or anchor, and nothing asked of another host."
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from deepseek_nb.site import build, page_name

NOTEBOOKS = sorted(o.name for o in (Path(__file__).parents[1]/'nbs').glob('[!_]*.ipynb'))
LOADS = {('link', 'href'), ('script', 'src'), ('img', 'src'), ('source', 'src'), ('iframe', 'src')}


class Page(HTMLParser):
    "The ids of a page, its links, what it loads, and its text."
    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.text = set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ('id', 'name', 'data-anchor-id') if attrs.get(k)}
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        self.loads += [attrs[a] for t,a in LOADS if t == tag and attrs.get(a)]

    def handle_data(self, data): self.text.append(data)


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site built in a copy of the notebooks."
    root, here = tmp_path_factory.mktemp('site'), Path(__file__).parents[1]
    shutil.copytree(here/'nbs', root/'nbs')
    shutil.copy(here/'pyproject.toml', root)
    return build(root)


@pytest.fixture(scope='module')
def pages(site): return {o.name: Page(o.read_text()) for o in site.glob('*.html')}


def test_page_for_every_chapter(pages):
    assert {page_name(o).replace('.ipynb', '.html') for o in NOTEBOOKS} <= set(pages)


def test_links_and_anchors_resolve(site, pages):
    dead = []
    for name,page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = unquote(url.path) or name
            if not (site/target).exists(): dead.append(f'{name}: {link}')
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids: dead.append(f'{name}: {link}')
    assert not dead, dead


def test_nothing_from_another_host(site, pages):
    assert not [o for page in pages.values() for o in page.loads if urlsplit(o).netloc]
    sheets = [*site.rglob('*.css')]
    assert sheets and not [o for o in sheets if re.search(r'(@import|url\()\s*["\']?(https?:)?//', o.read_text())]


def test_fonts_of_maths_are_there(site):
    named = re.findall(r'url\(([^)]+)\)', (site/'katex/katex.min.css').read_text())
    assert named and all((site/'katex'/o).exists() for o in named)


def test_every_public_name_has_an_anchor(pages):
    from deepseek_nb._modidx import d
    places = [place.split('#') for names in d['syms'].values() for name,(place,_) in names.items() if '._' not in name]
    lost = [f'{page}#{anchor}' for page,anchor in places if page in pages and anchor not in pages[page].ids]
    assert places and not lost, lost


def test_sidebar_follows_the_book(pages):
    first = pages['index.html' if 'index.html' in pages else next(iter(pages))].links
    book = [page_name(o).replace('.ipynb', '.html') for o in NOTEBOOKS if o != 'index.ipynb']
    listed = list(dict.fromkeys(o for o in first if o in book))
    assert listed == book


def test_prose_holds_no_directive(pages):
    for name,page in pages.items(): assert not [o for o in page.text if re.match(r'\s*#\| *export', o)] or name == 'site.html'


def test_search_covers_every_page(site, pages):
    entries = json.loads((site/'search.json').read_text())
    assert {o['href'].split('#')[0] for o in entries} == set(pages)

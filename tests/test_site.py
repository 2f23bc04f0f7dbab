"The site is whole: a page for every chapter, no dead link or anchor, and nothing asked of another host."
import json
import os
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import SEED

from deepseek_nb.core.lazy import ROOMS, find_chapter
from deepseek_nb.tools.book import BOOK, BOOK_PARTS, PATHS, book, by_part, chapters, page_name, path_chapters, read_moves
from deepseek_nb.tools.site import defined_names, link_pages, link_terms, new_chapter, read_glossary, stage

ROOT = Path(__file__).parents[1]
PAGES = [f'{page_name(o).rsplit(".", 1)[0]}.html' for o in book(ROOT/'nbs')]
MOVES = read_moves(ROOT/'nbs/moves.csv')
OLD = {f'{o}.html' for o in MOVES}
TERMS = read_glossary(ROOT/'nbs/glossary.md')
HOLDS = {'a', 'code', 'pre', 'header'}
LOADS = {('link', 'href'), ('script', 'src'), ('img', 'src'), ('source', 'src'), ('iframe', 'src')}


class Page(HTMLParser):
    "The ids of a page, its links, what it loads, its text, and the code in its prose with the link it is."
    def __init__(self, text):
        super().__init__()
        self.ids, self.twice, self.links, self.loads, self.text, self.code, self.open, self.prose = set(), set(), [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if attrs.get('id') in self.ids: self.twice.add(attrs['id'])
        self.ids |= {attrs[k] for k in ('id', 'name', 'data-anchor-id') if attrs.get(k)}
        if tag == 'a' and attrs.get('href'): self.links.append(attrs['href'])
        self.loads += [attrs[a] for t,a in LOADS if t == tag and attrs.get(a)]
        if tag in HOLDS: self.open.append((tag, attrs.get('href')))

    def handle_endtag(self, tag):
        if tag in HOLDS and self.open: self.open.pop()

    def handle_data(self, data):
        self.text.append(data)
        tags = [tag for tag,_ in self.open]
        if not {'pre', 'code'} & {*tags}: self.prose.append(data)
        if tags[-1:] != ['code'] or {'pre', 'header'} & {*tags}: return
        self.code.append((data, next((o for tag,o in self.open if tag == 'a'), None)))


class Tags(Page):
    "The ids of a page, its links and what it loads, as a search for tags finds them: five times as fast where each word is in one"
    def feed(self, text):
        for tag, attrs in re.findall(r'<(\w+)((?: [\w:-]+(?:="[^"]*")?)+)', text):
            if tag == 'span' and ' id=' not in attrs: continue
            self.handle_starttag(tag, [(k, unescape(v)) for k,v in re.findall(r'([\w:-]+)="([^"]*)"', attrs)])


@pytest.fixture(scope='module')
def pages(site):
    """All pages. The sidebar, which is half of their text, is read on ten of them, others in the next run; of other sources of modules,
    pages of one template, tags alone"""
    files, sidebar = sorted(site.glob('*.html')), re.compile(r'<nav id="quarto-sidebar".*?</nav>', re.S)
    whole = files if os.environ.get('EVERY') else random.Random(SEED).sample(files, 10)
    def read(o):
        if o in whole: return Page(o.read_text())
        return (Tags if o.name.startswith('source.') else Page)(sidebar.sub('', o.read_text()))
    return {o.name: read(o) for o in files}


def test_page_for_every_notebook(pages):
    assert set(PAGES) | OLD == {o for o in pages if not o.startswith('source.')} and not OLD & set(PAGES)


def test_links_and_anchors_resolve(site, pages):
    dead, there = [], cache(lambda name: (site/name).exists())
    for name,page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = unquote(url.path) or name
            if not there(target): dead.append(f'{name}: {link}')
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids: dead.append(f'{name}: {link}')
    assert not dead, f'mend these links in their notebooks: {dead}'


def test_anchors_are_unique(pages):
    twice = {name: o.twice for name,o in pages.items() if o.twice}
    assert not twice, twice


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
    assert places and not lost, f'run `make export`, and where a name is still lost, show the cell that defines it: {lost}'


def test_every_public_name_in_prose_is_a_link(pages):
    "Where a name in backticks is defined somewhere in the package, it leads there."
    from deepseek_nb._modidx import d
    known = {}
    for path, names in d['syms'].items():
        for name in names: known.setdefault(name.removeprefix(f'{path}.'), []).append(names[name][0])
    bare = [f'{page}: {text}' for page in PAGES if page != 'contents.html'
            for text,link in pages[page].code if text.removesuffix('()') in known and not link]
    assert known and not bare, f'in backticks and not a link (the package may be stale: run `make export`): {bare}'


def test_every_definition_leads_to_its_source(site, pages):
    "A heading that names what its cell defines is followed by a link to the line of the first of them."
    seen = 0
    for name in PAGES:
        module = ROOT/'deepseek_nb'/(name.removesuffix('.html').replace('.', '/') + '.py')
        if not module.exists(): continue
        lines = {}
        for k,n in defined_names(module.read_text()).items(): lines.setdefault(k.lower(), []).append(n)
        for anchor, after in re.findall(r'<h3[^>]* data-anchor-id="([^"]+)">(.*?)<div class="exported', (site/name).read_text(), re.S):
            if anchor not in lines: continue
            line = re.search(f'href="source.{name}#(cb1-([0-9]+))"', after)
            assert line and int(line[2]) in lines[anchor], f'{name}#{anchor} does not lead to its source: run `make export`'
            assert line[1] in pages[f'source.{name}'].ids
            seen += 1
    assert seen > 100


def test_sidebar_follows_the_book(site, pages):
    nav = re.search(r'<nav id="quarto-sidebar".*?</nav>', (site/'arch.rope.html').read_text(), re.S)[0]
    listed = [o.removeprefix('./') for o in Page(nav).links]
    assert listed[:3] == PAGES[:3] and sorted(listed) == sorted(PAGES), 'each page once'
    assert [o.removesuffix('.html') for o in listed[3:]][:len(PATHS[0].modules)] == [*PATHS[0].modules], 'the book comes first'
    opened = re.findall(r'<ul[^>]*class="collapse[^"]* show"[^>]*>(.*?)</ul>', nav, re.S)
    assert len(opened) == 1 and 'arch.rope.html' in opened[0] and 'quant.int8.html' not in opened[0], 'folded to the current part'


def test_llms_txt_follows_the_book(site):
    links = re.findall(r'^- \[.+\]\((.+)\.llms\.md\)$', (site/'llms.txt').read_text(), re.M)
    nav = re.search(r'<nav id="quarto-sidebar".*?</nav>', (site/'arch.rope.html').read_text(), re.S)[0]
    assert [f'{o}.html' for o in links] == [o.removeprefix('./') for o in Page(nav).links], 'the order of the sidebar'
    for o in links: assert (site/f'{o}.llms.md').stat().st_size


def test_prose_holds_no_directive(pages):
    for name in PAGES: assert not [o for o in pages[name].prose if re.match(r'\s*#\| *export', o)], name


def test_search_covers_every_page(site, pages):
    entries = json.loads((site/'search.json').read_text())
    assert {o['href'].split('#')[0] for o in entries} == set(PAGES)


# ---- one table of contents

def test_every_list_is_current(tmp_path):
    "The front page, the contents, the pictures, README and changelog are what the chapters' titles and first lines give."
    from deepseek_nb.tools.book import write_front
    for o in ('nbs', 'tests'): (tmp_path/o).mkdir()
    shutil.copytree(ROOT/'nbs', tmp_path/'nbs', dirs_exist_ok=True, ignore=shutil.ignore_patterns('.*'))
    for o in ('README.md', 'CHANGELOG.md'): shutil.copy(ROOT/o, tmp_path)
    stale = [o for o in write_front(tmp_path) if (tmp_path/o).read_text() != (ROOT/o).read_text()]
    assert not stale, f'run `make export`: not what the chapters give are {stale}'


def test_no_chapter_is_missing():
    found = chapters(ROOT/'nbs')
    listed = (ROOT/'nbs/contents.md').read_text()
    assert not [o.notebook for o in found if f']({o.notebook})' not in listed]
    told = [o for o in found if o.module in PATHS[0].modules]
    assert len(told) > 50 and not [o.notebook for o in told if f']({o.notebook})** {o.line}' not in listed]
    assert sum(map(len, by_part(found).values())) == len([o for o in found if o.room != 'tutorials'])
    front = re.findall(r'\]\(([\w./]+\.ipynb)\)', (ROOT/'nbs/index.ipynb').read_text())
    assert len(front) < 50, 'the front page is no wall of links'


def test_titles_stand_alone():
    "A title names one chapter in a few words, and its line is whole without the page around it."
    found = chapters(ROOT/'nbs')
    assert len({o.title for o in found}) == len(found)
    assert not [o.title for o in found if len(o.title.split()) > 8 or not o.line]


def test_rooms_are_folders_of_the_package():
    assert [o.name for o in BOOK_PARTS] == [*ROOMS] and not [o for o in ROOMS if not (ROOT/'deepseek_nb'/o).is_dir()]


def test_the_folder_of_the_book_is_the_book_in_order():
    "A notebook of the book is numbered by its part and its place in it."
    numbered = [f'{part}{place:02}_{o}.ipynb' for part, p in enumerate(BOOK, 1) for place, o in enumerate(p.modules, 1)]
    assert [p.name for p in sorted((ROOT/'nbs/book').iterdir()) if p.suffix == '.ipynb'] == numbered


@pytest.mark.parametrize('path', PATHS, ids=lambda o: o.title)
def test_paths_lead_through_the_site(pages, path):
    steps = path_chapters(path, chapters(ROOT/'nbs'))
    for i, (before, after) in enumerate(zip(steps, steps[1:], strict=False), 1):
        page = pages[f'{before.module}.html']
        assert f'{after.module}.html' in [o.removeprefix('./') for o in page.links]
        assert f', {i} of {len(steps)}: ' in ''.join(page.text)


# ---- old addresses

def test_old_addresses_lead_on(site, pages):
    "Every page that was published is a page, or leads to one, with its anchor."
    for old in (ROOT/'tests/fixtures/pages.txt').read_text().split():
        assert f'{MOVES.get(old, old)}.html' in PAGES, f'{old}: name its new page in nbs/moves.csv'
        if old not in MOVES: continue
        text = (site/f'{old}.html').read_text()
        new = f'{MOVES[old]}.html'
        assert f'content="0; url={new}"' in text and f'rel="canonical" href="{new}"' in text and f'"{new}" + location.hash' in text


# ---- the glossary

@pytest.mark.parametrize('term', TERMS, ids=lambda o: o.name)
def test_a_chapter_explains_each_term(pages, term):
    assert (ROOT/'nbs'/term.notebook).exists(), f'glossary.md: {term.name} leads to {term.notebook}, which is no chapter'
    spaced = lambda o: re.escape(o).replace('\\ ', r'[\s-]+').replace('\\-', r'[\s-]+')
    text = ' '.join(pages[page_name(term.notebook).replace('.ipynb', '.html')].text)
    assert re.search('|'.join(map(spaced, (term.name, *term.also))), text, re.I), f'{term.notebook} does not say {term.name!r}'


def test_glossary_is_alphabetical_and_anchored(site, pages):
    anchors = [o.anchor for o in TERMS]
    assert 80 <= len(anchors) == len(set(anchors)) and {*anchors} <= pages['glossary.html'].ids
    names = [line for line in (ROOT/'nbs/glossary.md').read_text().splitlines() if line.startswith('- ')]
    assert names == sorted(names, key=lambda o: re.search(r'\*\*(.+?)\*\*', o)[1].lower())


def test_first_uses_lead_to_the_glossary(pages):
    linked = [o for name in PAGES for o in pages[name].links if 'glossary.html#' in o]
    assert len(linked) > 200 and {o.split('#')[1] for o in linked} > {'kv-cache', 'router', 'expert'}
    for name in PAGES:
        if name == 'glossary.html': continue
        uses = [o for o in pages[name].links if 'glossary.html#' in o]
        assert len(uses) == len(set(uses)), f'{name} links a term twice'


@pytest.mark.parametrize('text', [
    '# A router', '`router`', '```\nrouter\n```', '[router](x)', '$router$', '| router |', '<a title="router">', 'routers_2'])
def test_no_term_is_linked_in(text): assert link_terms([text], TERMS) == [text]


# ---- tutorials, and new chapters

def project(folder, *notebooks):
    "A project of notebooks that have a title and link to each other."
    from fastcore.nbio import mk_cell, new_nb, write_nb
    for o in notebooks:
        (path := folder/'nbs'/o).parent.mkdir(parents=True, exist_ok=True)
        up = '../' if '/' in o else ''
        write_nb(new_nb([mk_cell(f'# Page {o}\n> Line', 'markdown'), mk_cell(f'See [it]({up}{notebooks[0]}).', 'markdown')]), path)
    (folder/'nbs/_quarto.yml').write_text((ROOT/'_quarto.yml').read_text())
    (folder/'pyproject.toml').write_text((ROOT/'pyproject.toml').read_text())
    return folder


def sidebar(folder):
    import yaml
    return yaml.safe_load((folder/'_proc/_quarto.yml').read_text())['website']['sidebar']['contents']


def test_tutorials_come_first(tmp_path):
    root = project(tmp_path, 'book/010_core.config.ipynb', 'index.ipynb', 'tutorials/10_hour.ipynb', 'tutorials/20_real.ipynb')
    assert stage(root, root/'_proc') == ['index.ipynb', 'core.config.ipynb', 'tutorials.hour.ipynb', 'tutorials.real.ipynb']
    assert [o if isinstance(o, str) else o['section'] for o in sidebar(root)] == ['index.ipynb', 'DeepSeek-V3', 'Tutorials']
    assert '](core.config.ipynb)' in (root/'_proc/tutorials.hour.ipynb').read_text()


def test_site_without_tutorials(tmp_path):
    root = project(tmp_path, 'index.ipynb', '010_core.config.ipynb')
    assert stage(root, root/'_proc') == ['index.ipynb', 'core.config.ipynb']
    assert not any('Tutorials' in str(o) for o in sidebar(root))


def test_two_notebooks_are_not_one_page(tmp_path):
    for names in (('book/010_core.config.ipynb', 'library/020_core.config.ipynb'),
                  ('tutorials/10_hour.ipynb', 'lab/500_tutorials.hour.ipynb')):
        root = project(tmp_path/names[0], *names)
        with pytest.raises(ValueError, match='are both the page .+: rename one'): book(root/'nbs')


@pytest.mark.parametrize('link,folder,page', [
    ('book/120_arch.attention.ipynb', '', 'arch.attention.ipynb'), ('tutorials/10_hour.ipynb', '', 'tutorials.hour.ipynb'),
    ('../book/120_arch.attention.ipynb#mla', 'tutorials', 'arch.attention.ipynb#mla'),
    ('20_real.ipynb', 'tutorials', 'tutorials.real.ipynb'),
    ('https://example.org/a.ipynb', '', 'https://example.org/a.ipynb')])
def test_links_between_notebooks(link, folder, page): assert link_pages(f'[o]({link})', folder) == f'[o]({page})'


def test_a_new_chapter_is_in_the_form_of_the_house(tmp_path):
    "It is clean, it exports, and it runs as it stands."
    root = project(tmp_path, 'index.ipynb')
    path = new_chapter('145_arch.balance', 'Balance "kept"', root/'nbs')
    before = path.read_text()
    run = lambda name, *args: subprocess.run([Path(sys.executable).parent/name, *args], cwd=root, capture_output=True, check=True)
    run('nbdev-clean', '--fname', path)
    assert path.read_text() == before
    run('nbdev-export')
    run('nbdev-test', '--n-workers', '0')
    assert 'def double(' in (root/'deepseek_nb/arch/balance.py').read_text()
    run('ruff', 'check', 'nbs')
    title, module, prose = [''.join(o['source']) for o in json.loads(before)['cells']][:3]
    assert title.startswith('# Balance "kept"\n\n> ') and module == '#| default_exp arch.balance' and prose.startswith('#| export\n')


@pytest.mark.parametrize('name', ['14_arch.balance', '145_Arch.balance', '145_arch-balance', '145_arch.', '../145_x', '145', ''])
def test_bad_names_of_chapters(tmp_path, name):
    with pytest.raises(ValueError, match='is no chapter name: give three digits and a module') as e: new_chapter(name, 'Title', tmp_path)
    assert '\n' not in str(e.value) and not [*tmp_path.iterdir()]


def test_make_starts_a_chapter(tmp_path):
    if not shutil.which('make'): pytest.skip('make is absent')
    root = project(tmp_path, 'index.ipynb')
    shutil.copy(ROOT/'Makefile', root)
    make = ['make', '--no-print-directory', '-o', '.venv/.dev', f'BIN={Path(sys.executable).parent}', 'new-chapter']
    run = lambda *args: subprocess.run([*make, *args], cwd=root, capture_output=True, text=True)
    assert run('NAME=145_arch.balance', "TITLE=The load's balance").stdout == 'nbs/library/145_arch.balance.ipynb\n'
    assert "# The load's balance\\n" in (root/'nbs/library/145_arch.balance.ipynb').read_text()
    assert 'is no chapter name' in run().stderr and 'has no title' in run('NAME=146_arch.load').stderr


def test_a_taken_number_is_one_line():
    taken = find_chapter(ROOT/'nbs', 'arch.cache')
    name = ('book/' if taken.parent.name == 'book' else '') + taken.name[:4] + 'arch.balance'
    command = [sys.executable, '-m', 'deepseek_nb.tools.site', '--new', name, 'Balance']
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 1 and not p.stdout and len(p.stderr.splitlines()) == 1 and 'is taken by nbs/' in p.stderr

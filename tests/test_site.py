"The site is whole: a page for every chapter, no dead link or anchor, and nothing asked of another host."
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from deepseek_nb.tools.site import book, definitions, link_pages, new_chapter, page_name, stage

ROOT = Path(__file__).parents[1]
PAGES = [page_name(o).replace('.ipynb', '.html') for o in book(ROOT/'nbs')]
HOLDS = {'a', 'code', 'pre'}
LOADS = {('link', 'href'), ('script', 'src'), ('img', 'src'), ('source', 'src'), ('iframe', 'src')}


class Page(HTMLParser):
    "The ids of a page, its links, what it loads, its text, and the code in its prose with the link it is."
    def __init__(self, text):
        super().__init__()
        self.ids, self.twice, self.links, self.loads, self.text, self.code, self.open = set(), set(), [], [], [], [], []
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
        if tags[-1:] == ['code'] and 'pre' not in tags: self.code.append((data, next((o for tag,o in self.open if tag == 'a'), None)))


@pytest.fixture(scope='module')
def pages(site): return {o.name: Page(o.read_text()) for o in site.glob('*.html')}


def test_page_for_every_notebook(pages):
    assert set(PAGES) == {o for o in pages if not o.startswith('source.')}


def test_links_and_anchors_resolve(site, pages):
    dead = []
    for name,page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = unquote(url.path) or name
            if not (site/target).exists(): dead.append(f'{name}: {link}')
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
    bare = [f'{page}: {text}' for page in PAGES for text,link in pages[page].code if text.removesuffix('()') in known and not link]
    assert known and not bare, f'in backticks and not a link (the package may be stale: run `make export`): {bare}'


def test_every_definition_leads_to_its_source(site, pages):
    "A heading that names what its cell defines is followed by a link to the line of the first of them."
    seen = 0
    for name in PAGES:
        module = ROOT/'deepseek_nb'/(name.removesuffix('.html').replace('.', '/') + '.py')
        if not module.exists(): continue
        lines = {}
        for k,n in definitions(module.read_text()).items(): lines.setdefault(k.lower(), []).append(n)
        for anchor, after in re.findall(r'<h3[^>]* data-anchor-id="([^"]+)">(.*?)<div class="exported', (site/name).read_text(), re.S):
            if anchor not in lines: continue
            line = re.search(f'href="source.{name}#(cb1-([0-9]+))"', after)
            assert line and int(line[2]) in lines[anchor], f'{name}#{anchor} does not lead to its source: run `make export`'
            assert line[1] in pages[f'source.{name}'].ids
            seen += 1
    assert seen > 100


def test_sidebar_follows_the_book(pages):
    listed = list(dict.fromkeys(o.removeprefix('./') for o in pages['arch.rope.html'].links if o.removeprefix('./') in PAGES))
    assert sorted(listed, key=PAGES.index) == PAGES and listed.index('arch.rope.html') < listed.index('files.hub.html')


def test_llms_txt_follows_the_book(site):
    links = re.findall(r'^- \[.+\]\((.+)\.llms\.md\)$', (site/'llms.txt').read_text(), re.M)
    assert [f'{o}.html' for o in links] == PAGES
    for o in links: assert (site/f'{o}.llms.md').stat().st_size


def test_prose_holds_no_directive(pages):
    for name in {*PAGES} - {'tools.site.html'}: assert not [o for o in pages[name].text if re.match(r'\s*#\| *export', o)], name


def test_search_covers_every_page(site, pages):
    entries = json.loads((site/'search.json').read_text())
    assert {o['href'].split('#')[0] for o in entries} == set(PAGES)


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
    root = project(tmp_path, '010_core.config.ipynb', 'index.ipynb', 'tutorials/10_hour.ipynb', 'tutorials/20_real.ipynb')
    assert stage(root, root/'_proc') == ['index.ipynb', 'tutorials.hour.ipynb', 'tutorials.real.ipynb', 'core.ipynb']
    assert [o if isinstance(o, str) else o['section'] for o in sidebar(root)] == ['index.ipynb', 'Tutorials', 'Part 0 · Foundations']
    assert '](core.ipynb)' in (root/'_proc/tutorials.hour.ipynb').read_text()


def test_site_without_tutorials(tmp_path):
    root = project(tmp_path, 'index.ipynb', '010_core.config.ipynb')
    assert stage(root, root/'_proc') == ['index.ipynb', 'core.ipynb']
    assert not any('Tutorials' in str(o) for o in sidebar(root))


def test_two_notebooks_are_not_one_page(tmp_path):
    for names in (('010_core.config.ipynb', '100_core.ipynb'), ('tutorials/10_hour.ipynb', '500_tutorials.hour.ipynb')):
        root = project(tmp_path/names[0], *names)
        with pytest.raises(ValueError, match='are both the page .+: rename one'): book(root/'nbs')


@pytest.mark.parametrize('link,folder,page', [
    ('120_arch.attention.ipynb', '', 'arch.attention.ipynb'), ('tutorials/10_hour.ipynb', '', 'tutorials.hour.ipynb'),
    ('../120_arch.attention.ipynb#mla', 'tutorials', 'arch.attention.ipynb#mla'),
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
    assert title.startswith('# Balance "kept"\n> ') and module == '#| default_exp arch.balance' and prose.startswith('#| export\n')


@pytest.mark.parametrize('name', ['14_arch.balance', '145_Arch.balance', '145_arch-balance', '145_arch.', '../145_x', '145', ''])
def test_bad_names_of_chapters(tmp_path, name):
    with pytest.raises(ValueError, match='names no chapter: give three digits and a module') as e: new_chapter(name, 'Title', tmp_path)
    assert '\n' not in str(e.value) and not [*tmp_path.iterdir()]


def test_make_starts_a_chapter(tmp_path):
    if not shutil.which('make'): pytest.skip('make is absent')
    root = project(tmp_path, 'index.ipynb')
    shutil.copy(ROOT/'Makefile', root)
    make = ['make', '--no-print-directory', '-o', '.venv/.dev', f'BIN={Path(sys.executable).parent}', 'new-chapter']
    run = lambda *args: subprocess.run([*make, *args], cwd=root, capture_output=True, text=True)
    assert run('NAME=145_arch.balance', "TITLE=The load's balance").stdout == 'nbs/145_arch.balance.ipynb\n'
    assert "# The load's balance\\n" in (root/'nbs/145_arch.balance.ipynb').read_text()
    assert 'names no chapter' in run().stderr and 'has no title' in run('NAME=146_arch.load').stderr


def test_a_taken_number_is_one_line():
    taken = book(ROOT/'nbs')[-1][:4]
    command = [sys.executable, '-m', 'deepseek_nb.tools.site', '--new', f'{taken}balance', 'Balance']
    p = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 1 and not p.stdout and len(p.stderr.splitlines()) == 1 and 'is taken by nbs/' in p.stderr

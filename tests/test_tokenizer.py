"Tokenizers against transformers: the same ids, the same text, and no control token out of plain text"
import copy
import json
import struct
import warnings

import gguf
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from deepseek_nb.files.hub import fetch
from deepseek_nb.files.tokenizer import PRE, Tokenizer, from_gguf, gguf_metadata, merge, pre_tokenizer

TEXTS = [
    '', ' ', '\n', '  \n\n \t x', 'Hello, world!', "I'll say it's they've WE'RE DON'T",
    'def f(x):\n    return x**2  # ok\n\n\n', 'x\r\n\r\ny\r', '123456789 1,234.56 ٣٤٥ ½ Ⅷ', 'a  1   22',
    '深度求索，一律平等。', 'こんにちは世界カタカナ', '한국어 문장', 'Привет, мир!', 'مرحبا بالعالم', 'नमस्ते दुनिया', 'ภาษาไทย',
    '🙂👩‍👩‍👧‍👦🏳️‍🌈🇫🇷', 'e\u0301 é ﬁ Å', '\u200b\u00a0\u3000\ufeff|', '\ufffd', '$\\frac{a}{b}$', '<div class="x">&nbsp;</div>',
    'ԵՐԵՎԱՆ երևան ქართული',
    '!!!???...---', '{"a": [1, 2, {"b": null}]}', 'https://example.org/?q=%20&x=1#y', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa']
piece = st.sampled_from([t for t in TEXTS if t]) | st.text(st.characters(exclude_categories=['Cs']), max_size=8) | \
    st.text(' \n\t\r', max_size=5) | st.text('abc\'sS12 .,<|>', max_size=8)
ragged = st.lists(piece, max_size=6).map(''.join)
calm = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large])
many = settings(max_examples=300, **calm)
CONTROL = ['<｜User｜>', '<｜Assistant｜>', '<think>', '</think>', '<｜end▁of▁sentence｜>', '｜DSML｜',
           '<|im_end|>', '<|im_start|>', '<|endoftext|>']


@pytest.fixture(scope='module')
def deepseek():
    try: return fetch('deepseek-v4-tokenizer')
    except FileNotFoundError as e: pytest.skip(str(e))

@pytest.fixture(scope='module')
def smol(): return fetch('smollm2-135m')

@pytest.fixture(scope='module')
def pair_deepseek(deepseek): return Tokenizer.from_pretrained('deepseek-v4-tokenizer'), AutoTokenizer.from_pretrained(deepseek)

@pytest.fixture(scope='module')
def theirs(smol): return AutoTokenizer.from_pretrained(smol.parent, gguf_file=smol.name)

@pytest.fixture(scope='module')
def pair_smol(smol, theirs):
    "transformers reads the vocabulary but not the splitter `smollm`, which is GPT-2's after single digits"
    oracle = copy.deepcopy(theirs)
    tok, digits = oracle.backend_tokenizer, pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return from_gguf(smol), oracle

@pytest.fixture(params=['pair_deepseek', 'pair_smol'])
def pair(request): return request.getfixturevalue(request.param)


def same(pair, text):
    ours, oracle = pair
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ids = ours.encode(text, special=True)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert ours.decode(ids) == oracle.decode(ids, clean_up_tokenization_spaces=False)
    return ids


@pytest.mark.parametrize('text', TEXTS)
def test_known_texts(pair, text): same(pair, text)


def test_random_texts(pair):
    @many
    @given(ragged)
    def check(text): same(pair, text)
    check()


def test_control_tokens_obeyed(pair):
    @many
    @given(st.lists(piece | st.sampled_from(CONTROL), max_size=8).map(''.join))
    @example('<<｜User｜>><｜User｜｜>')
    def check(text): same(pair, text)
    check()


def test_control_tokens_in_plain_text(pair):
    ours, _ = pair
    control = set(ours.special_tokens.values())

    @many
    @given(st.lists(piece | st.sampled_from([*CONTROL, *ours.special_tokens]), max_size=8).map(''.join))
    def check(text):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ids = ours.encode(text)
        assert not control & set(ids)
        if not set(text.encode()) & set(ours._missing): assert ours.decode(ids) == text
    check()


def test_round_trip(pair_deepseek):
    @many
    @given(ragged)
    def check(text): assert pair_deepseek[0].decode(pair_deepseek[0].encode(text)) == text
    check()


def test_stream(pair):
    "Any ids, cut characters and control tokens among them, stream to what they decode to at once"
    ours, oracle = pair
    valid = st.integers(0, len(ours) - 1)

    @many
    @given(st.lists(valid, max_size=30) | ragged.map(lambda t: oracle.encode(t, add_special_tokens=False)))
    @example(oracle.encode('🙂\ufffd深', add_special_tokens=False))
    def check(ids):
        stream = ours.stream_decoder()
        parts = [stream.push(i) for i in ids]
        assert ''.join([*parts, stream.flush()]) == ours.decode(ids) == oracle.decode(ids, clean_up_tokenization_spaces=False)
    check()


def test_stream_is_prompt(pair):
    "Text is given out with the token that completes it, and never taken back"
    ours, _ = pair
    ids, stream, shown = ours.encode('naïve 🙂🙂 \ufffd 深度'), ours.stream_decoder(), ''
    for i, id in enumerate(ids):
        shown += stream.push(id)
        whole = b''.join(map(ours.id_to_bytes, ids[:i+1]))
        assert shown == whole.decode(errors='ignore') and len(whole) - len(shown.encode()) < 4
    assert stream.flush() == ''


def test_skip_special(pair):
    ours, oracle = pair
    text = ''.join(t for t in CONTROL if t in ours.special_tokens) + 'x'
    ids = ours.encode(text, special=True)
    expected = oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    stream = ours.stream_decoder(skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=True) == expected == ''.join(map(stream.push, ids))


def test_facts(pair):
    ours, oracle = pair
    assert len(ours) == ours.vocab_size == len(oracle)
    assert ours.bos_id == oracle.bos_token_id and ours.eos_ids == (oracle.eos_token_id,)
    assert all(ours.id_to_token(i) == oracle.convert_ids_to_tokens(i) for i in range(0, len(ours), 97))


def test_transformers_does_not_split_digits(smol, theirs):
    "Where the two differ, llama.cpp's definition of `smollm` wins: digits are cut first, so white space before one is a word of its own"
    ours = from_gguf(smol)
    assert theirs.encode('a 1', add_special_tokens=False) == ours.encode('a 1')
    assert theirs.encode('a  1', add_special_tokens=False) != ours.encode('a  1')


@pytest.mark.parametrize('kind', ['llama-bpe', 'llama3', 'qwen2', 'deepseek-r1-qwen'])
def test_splitters_of_transformers(kind):
    splits = pytest.importorskip('transformers.integrations.gguf.gguf_tokenizer_mapping').GGUF_PRE_TOKENIZER_SPLITS
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(splits[kind]), 'isolated'), bytewise])

    @many
    @given(ragged)
    def check(text): assert pre_tokenizer(kind).pre_tokenize_str(text) == oracle.pre_tokenize_str(text)
    check()


def write_gguf(path, tokens, merges, types, pre='gpt-2', model='gpt2', **ids):
    writer = gguf.GGUFWriter(path, 'llama')
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name, id in ids.items(): writer.add_uint32(f'tokenizer.ggml.{name}_token_id', id)
    writer.add_chat_template([dict(name='default', template='D'), dict(name='tool_use', template='T')])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_deepseek_through_gguf(deepseek, pair_deepseek, tmp_path):
    "DeepSeek's tokenizer.json rewritten as a GGUF header reads back as the same tokenizer"
    spec = json.loads((deepseek/'tokenizer.json').read_text())
    added = {t['id']: t for t in spec['added_tokens']}
    tokens = {i: t for t, i in spec['model']['vocab'].items()} | {i: t['content'] for i, t in added.items()}
    types = [(3 if added[i]['special'] else 4) if i in added else 1 for i in range(len(tokens))]
    tokens = [tokens[i] for i in range(len(tokens))]
    ours = from_gguf(write_gguf(tmp_path/'v4.gguf', tokens, spec['model']['merges'], types, 'deepseek-v3', bos=0, eos=1))
    assert ours.special_tokens == pair_deepseek[0].special_tokens and (ours.bos_id, ours.eos_ids) == (0, (1,))
    assert ours.chat_template == dict(default='D', tool_use='T')

    @many
    @given(st.lists(piece | st.sampled_from(CONTROL), max_size=8).map(''.join), st.booleans())
    def check(text, special): assert ours.encode(text, special) == pair_deepseek[0].encode(text, special)
    check()


def test_definition_of_bpe(smol, pair_smol):
    ours, meta = pair_smol[0], gguf_metadata(smol)
    ranks = {tuple(m.split(' ')): i for i, m in enumerate(meta['tokenizer.ggml.merges'])}

    @settings(max_examples=100, **calm)
    @given(st.lists(st.sampled_from(TEXTS), max_size=3).map(''.join))
    def check(text):
        words = [w for w, _ in ours.backend.pre_tokenizer.pre_tokenize_str(text)]
        assert [t for w in words for t in merge(w, ranks)] == [ours.id_to_token(i) for i in ours.encode(text)]
    check()


def test_metadata_is_the_packages(smol):
    reader = gguf.GGUFReader(smol)
    for key, value in gguf_metadata(smol).items():
        expected = reader.fields[key].contents()
        assert value == pytest.approx(expected) if isinstance(value, float) else value == expected, key


def test_truncated_and_foreign_gguf(smol, tmp_path):
    head, path = smol.read_bytes()[:200_000], tmp_path/'x.gguf'
    for n in (0, 3, 4, 7, 12, 23, 24, 30, 100, 1000, 199_999):
        path.write_bytes(head[:n])
        with pytest.raises(ValueError, match='x.gguf') as e: from_gguf(path)
        assert '\n' not in str(e.value)
    path.write_bytes(b'GGUF' + struct.pack('<I', 9) + head[8:])
    with pytest.raises(ValueError, match='version 9'): from_gguf(path)
    path.write_bytes(head[:24] + struct.pack('<Q', 1 << 60) + head[32:])
    with pytest.raises(ValueError, match='truncated'): from_gguf(path)


def test_unknown_kinds(tmp_path):
    cases = (dict(pre='gpt-9'), "'gpt-9', which is unknown; known are gpt-2"), (dict(model='llama'), "'llama', only byte-level BPE")
    for i, (args, words) in enumerate(cases):
        path = write_gguf(tmp_path/f'{i}.gguf', ['a', 'b', 'ab'], ['a b'], [1, 1, 1], **args)
        with pytest.raises(ValueError, match=words): from_gguf(path)


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match='has no tokenizer.json'): Tokenizer.from_pretrained(tmp_path)
    unigram = dict(model=dict(type='Unigram', vocab=[]), added_tokens=[], decoder=dict(type='Metaspace'))
    (tmp_path/'tokenizer.json').write_text(json.dumps(unigram))
    with pytest.raises(ValueError, match='not byte-level BPE'): Tokenizer.from_pretrained(tmp_path)
    (tmp_path/'tokenizer.json').write_text('{"model": ')
    with pytest.raises(ValueError, match='tokenizer.json'): Tokenizer.from_pretrained(tmp_path)


def test_outside_the_vocabulary(pair):
    ours, _ = pair
    for id in (-1, len(ours)):
        with pytest.raises(ValueError, match=f'token id {id} is outside the vocabulary'): ours.decode([id])


def test_eos_from_generation_config(deepseek, tmp_path):
    for name in ('tokenizer.json', 'tokenizer_config.json'): (tmp_path/name).symlink_to(deepseek/name)
    (tmp_path/'generation_config.json').write_text('{"eos_token_id": [5, 1]}')
    (tmp_path/'chat_template.jinja').write_text('X')
    ours = Tokenizer.from_pretrained(tmp_path)
    assert ours.eos_ids == (5, 1) and ours.chat_template == 'X'


def test_missing_bytes_warn(smol):
    with pytest.warns(UserWarning, match='no token for the bytes 04'): assert from_gguf(smol).encode('\x04') == []


def test_all_splitters_build():
    for kind in PRE: assert ''.join(w for w, _ in pre_tokenizer(kind).pre_tokenize_str('a1 深\n')) == 'a1Ġæ·±Ċ'

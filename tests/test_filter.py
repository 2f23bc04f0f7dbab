"The content filter: any cut gives the same text, secrets stay in, checksums, the policy's words, and the server in all protocols"
import asyncio
import base64
import json
import logging
import random
import re
import time
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from deepseek_nb.apps import command
from deepseek_nb.apps.command import package_folder
from deepseek_nb.apps.filter import (
    FilterApp,
    NameTagger,
    ToxicityNet,
    content_filter,
    divide_set,
    learn_filter,
    load_filter,
    read_pii,
    read_toxicity,
)
from deepseek_nb.files.tokenizer import Tokenizer
from deepseek_nb.infer.request import Piece, Stream
from deepseek_nb.serve import chat
from deepseek_nb.serve.anthropic import MessagesRun, read_anthropic
from deepseek_nb.serve.chat import ApiError, ServedModel
from deepseek_nb.serve.completions import ChatRun, read_chat
from deepseek_nb.serve.guard import AnswerGuard, ContentFilter, JsonStream
from deepseek_nb.serve.patterns import PartFinder, SecretScan, finder_for, luhn, mod97, nhs_check, skeletons, tax_check
from deepseek_nb.serve.policy import ACTIONS, CONTENT_KINDS, FilterStream, Policy, read_policy, same_for_cuts
from deepseek_nb.serve.responses import ResponsesRun, read_responses
from deepseek_nb.serve.text import TextRun, read_completion
from deepseek_nb.serve.tools import Call, write_calls
from deepseek_nb.tools import cli
from deepseek_nb.tools.serving import read_settings

SECRET = 'tangerine-4711-otter'
MASKS = dict.fromkeys(('secret', 'key', 'card', 'iban', 'national', 'email', 'phone', 'ip', 'person', 'address', 'toxic'), 'mask')


@pytest.fixture(scope='module')
def draw():
    n = random.randrange(10**6)
    print(f'seed {n}')
    return random.Random(n)


@pytest.fixture(scope='module')
def everything(): return content_filter(Policy(MASKS, secrets=(SECRET,)))


# ---- any cut, the same text

PIECES = ('4111 1111 ', '1111 1111', 'DE89 3704 0044 ', '0532 0130 00', 'ann@', 'example', '.org', '(212) ', '555-', '0199', '078-05-',
          '1120', ' ', '  ',
          '\n', 'Mary ', 'Johnson', ', ', '12 Elm ', 'Street', 'an idiot ', '1d10t', 'tangerine', '-4711', '-otter', 'retto', '192.168.',
              '0.1', 'ghp_a1B2a1B2a1B2a1',
          '-----BEGIN ', 'PRIVATE KEY-----', 'é', '你好', '\u200b', 'ａ', "'", '"', '\\', '{', '1', '0', '.', '!', 'Dear ')


@pytest.mark.parametrize('actions', [('mask',), ACTIONS], ids=['mask', 'mixed'])
def test_any_cut_gives_the_same_text(draw, everything, actions):
    "Random texts of what matters most, at every cut, character by character, and at random cuts; nothing is taken back"
    for _ in range(4):
        rules = {k: draw.choice(actions) for k in CONTENT_KINDS}
        f = ContentFilter(Policy(rules, rewrite=dict.fromkeys(CONTENT_KINDS, '…')), [m for m in everything.makers if m[0] != ('secret',)])
        finder = finder_for([SECRET])
        f.makers = [(('secret',), lambda finder=finder: SecretScan(finder)), *f.makers]
        text = ''.join(draw.choices(PIECES, k=9))
        cuts = [sorted(draw.sample(range(1, len(text)), min(len(text) - 1, draw.randint(1, 6)))) for _ in range(10)]
        same_for_cuts(lambda f=f: f.open('answers'), text, cuts)


def test_what_was_shown_is_a_beginning_of_the_end(draw, everything):
    for _ in range(10):
        text = ''.join(draw.choices(PIECES, k=12))
        whole, s, shown = everything.answer(text)[0], everything.open('answers'), ''
        for c in text:
            shown += s.feed(c)
            assert whole.startswith(shown)
            assert s.base + len(s.text) == len(text[:s.base + len(s.text)])
        assert shown + s.close() == whole


def test_a_matching_beginning_in_front_of_the_answer(everything):
    s = everything.open('answers', before='The card is 4111 1111 1111 ')
    assert s.feed('1111, yes') + s.close() == '[CARD], yes'


def test_json_stays_json(draw):
    "Arguments with secrets in strings, numbers, lists and escapes, at every cut; what can't be masked is blocked"
    finder = finder_for([SECRET])
    def opened(): return JsonStream([SecretScan(finder)], dict(secret='mask'))
    def escaped(t): return ''.join(draw.choice([c, f'\\u{ord(c):04x}']) for c in t)
    value = draw.choice(['a "b" \\ ', 'é\n', '']) + SECRET + draw.choice([' c', '"'])
    for text in (json.dumps({'x': value, 'y': [1, *SECRET]}), '{"x": "' + escaped(SECRET) + '"}'):
        out = same_for_cuts(opened, text)
        assert '[SECRET]' in str(json.loads(out)) and '4711' not in out
    s = opened()
    out = s.feed('{"tangerine": {"4711": ["ott", "er"]}}') + s.close()
    assert s.blocked == 'secret' and 'ott' not in out


# ---- secrets

LOOKS = str.maketrans('aceopxyi', 'асеорхуі')
def spelled(raw, draw):
    "A secret as somebody may ask for it"
    text = raw.decode()
    ways = [str.upper, lambda t: t[::-1], lambda t: ' '.join(t), lambda t: '\n'.join(t), lambda t: '-'.join(t),
            lambda t: t.translate(LOOKS),
            lambda t: t.replace('o', '0').replace('i', '1').replace('e', '3'),
                lambda t: ''.join(chr(ord(c) + 0xfee0) if '!' <= c <= '~' else c for c in t),
            lambda t: '\u200b'.join(t), lambda t: base64.b64encode(b'x'*draw.randrange(3) + raw + b'y').decode(),
                lambda t: base64.b32encode(raw).decode(),
            lambda t: base64.urlsafe_b64encode(raw).decode(), lambda t: raw.hex(), lambda t: raw.hex(':').upper(), lambda t: quote(t,
                                                                                                                                   safe=''),
            lambda t: ''.join(f'%{b:02x}' for b in raw), lambda t: ''.join(f'\\x{b:02x}' for b in raw), lambda t: ', '.join(map(str, raw)),
            lambda t: ''.join(f'&#{b};' for b in raw), lambda t: ' '.join(f'{b:08b}' for b in raw),
                lambda t: ' '.join(f'0x{b:02x}' for b in raw),
            lambda t: t.translate(str.maketrans('abcdefghijklmnopqrstuvwxyz', 'nopqrstuvwxyzabcdefghijklm')), lambda t: t[:-(-len(t)*2//3)]]
    return draw.choice(ways)(text)


def longest_part(text, secret):
    "Letters of the longest part of a secret in a text, straightforwardly"
    a, b = skeletons(text), skeletons(secret)
    return max((n for i in range(len(b)) for n in range(1, len(b) - i + 1) if b[i:i + n] in a), default=0)


def test_planted_secrets_never_leave(draw):
    for _ in range(3):
        secret = ''.join(draw.choices('abcdefghjkmnpqrtuvwxyz23456789-', k=draw.randint(14, 30)))
        if len(skeletons(secret)) < 10: continue
        finder, n = finder_for([secret]), len(skeletons(secret))
        for _ in range(30):
            hidden = spelled(secret.encode(), draw)
            text, s, out, at = f'Here you are: {hidden} – is that it?', FilterStream([SecretScan(finder)], dict(secret='mask')), '', 0
            while at < len(text):
                step = draw.randint(1, 6)
                out += s.feed(text[at:at + step])
                at += step
            out += s.close()
            assert '[SECRET]' in out, 'a form of a secret was not found'
            assert longest_part(out, secret) < max(6, n/2), 'a part of a secret left'
            assert hidden not in out


def test_parts_against_a_slow_search(draw):
    "The automaton of several texts, against all parts of them"
    texts = [''.join(draw.choices('ab', k=draw.randint(6, 12))) for _ in range(3)]
    finder = PartFinder([(t, draw.randint(3, 6)) for t in texts])
    read, at = '', (0, 0)
    for c in draw.choices('abc', k=60):
        read, at = read + c, finder.step(*at, c)
        slow = max(n for n in range(min(13, len(read) + 1)) if any(read[len(read) - n:] in t for t in texts))
        assert at[1] == slow


# ---- patterns

def test_checksums_find_every_wrong_digit(draw):
    for check, number in ((luhn, '4111111111111111'), (mod97, 'DE89370400440532013000'), (nhs_check, '9434765919'), (tax_check,
                                                                                                                     '86095742719')):
        i = draw.choice([i for i, c in enumerate(number) if c.isdigit()])
        wrong = number[:i] + draw.choice([d for d in '0123456789' if d != number[i]]) + number[i + 1:]
        assert check(number) and not check(wrong)


@pytest.mark.parametrize(('text', 'kind'), [
    ('4111 1111 1111 1111', 'card'), ('3782-822463-10005', 'card'), ('GB82 WEST 1234 5698 7654 32', 'iban'), ('ann.lee@mail.example.org',
                                                                                                              'email'),
    ('+44 20 7946 0958', 'phone'), ('(212) 555-0199', 'phone'), ('10.1.2.3', 'ip'), ('078-05-1120', 'national')])
def test_a_policy_masks(text, kind):
    f = ContentFilter(Policy({kind: 'mask'}))
    assert f.answer(f'So: {text}, ok.')[0] == f'So: [{kind.upper()}], ok.'
    assert f.answer(f'So: {text[:5]}, ok.')[0] == f'So: {text[:5]}, ok.'


def test_ordinary_text_passes():
    f = ContentFilter(Policy(MASKS, secrets=(SECRET,)))
    for text in ('In 1999-2005, 1,234,567 people (3.14%) came at 10:30.', 'Version 1.2.3 of 2024-05-12, see [1] - [12].',
                 'a@b, x.y, C++ 20', '12 34 56'):
        assert f.answer(text)[0] == text


def test_presidio_agrees_about_cards_and_accounts():
    "An independent library finds what is planted, and nothing in what the filter lets pass"
    known = pytest.importorskip('presidio_analyzer.predefined_recognizers')
    finders = known.CreditCardRecognizer(), known.IbanRecognizer(), known.EmailRecognizer()
    def found(text): return [r for f in finders for r in f.analyze(text, f.supported_entities, None) or [] if r.score >= .5]
    text = 'Pay 4111 1111 1111 1111 or DE89 3704 0044 0532 0130 00, mail ann@example.org.'
    assert len(found(text)) == 3 and not found(ContentFilter(Policy(MASKS)).answer(text)[0])


# ---- policies

def test_wrong_policies_say_what_is_wrong(tmp_path):
    path = tmp_path/'p.toml'
    wrong = [('[answers]\ncards = "mask"', "'cards' is no kind"), ('[prompts]\ncard = "hide"', "'hide' is no action"),
             ('a =', 'is no TOML'), ('[answer]\n', "'answer' is no setting"), ('locale = "fr"', "locale is 'fr'"),
             ('[answers]\ntoxic = "rewrite"', 'has no text for it'), ('secrets = [1]', 'secrets must be texts'),
             ('[locales.us.prompt]', "'prompt' is no setting"), ('answers = 3', 'answers must be a dict'),
             ('locales = 3', 'locales must be a dict'), ('locales = {us = 3}', '[locales]: us must be a dict'),
             ('[locales.us]\nanswers = 3', '[locales.us]: answers must be a dict'),
             ('secrets = "abc"', 'secrets must be a list'), ('secrets_file = 3', 'secrets_file must be a str')]
    for text, said in wrong:
        path.write_text(text)
        with pytest.raises(ValueError, match=re.escape(said)): read_policy(path)
    path.write_bytes(b'\xff')
    with pytest.raises(ValueError, match=f'^{path} is no TOML file'): read_policy(path)
    path.write_text('secrets = ["abc"]\n[answers]\nsecret = "mask"')
    with pytest.raises(ValueError, match='at least six letters'): load_filter(path)


def test_secrets_in_a_file_and_locales(tmp_path):
    (tmp_path/'s.txt').write_text(f'{SECRET}\n\n')
    rules = '[answers]\nsecret = "mask"\nnational = "mask"\n[locales.gb.answers]\nsecret = "block"\n'
    (tmp_path/'p.toml').write_text('secrets_file = "s.txt"\n' + rules)
    assert load_filter(tmp_path/'p.toml').answer(SECRET) == ('[SECRET]', '')
    f = load_filter(tmp_path/'p.toml', locale='gb')
    assert f.answer(f'NHS 943 476 5919 {SECRET}!') == ('NHS [NATIONAL] ', 'secret')


# ---- the server

class Scripted:
    "An engine that says what it was told"
    def __init__(self, text, size=3):
        self.text, self.size, self.asked, self.ends, self.max_waiting, self.max_rows = text, size, [], (), 8, 8
        self.model = SimpleNamespace(config=SimpleNamespace(max_positions=4096, model_type='llama', vocab_size=64))
        self.store, self.context = SimpleNamespace(longest=4096), 4096

    def submit(self, request):
        self.asked.append(request)
        stream = Stream(request)
        for i in range(0, len(self.text), self.size): stream.put(Piece(i, self.text[i:i + self.size],
                                                                       -.5 if request.params.logprobs is not None else None))
        stream.usage.completion_tokens = -(-len(self.text)//self.size)
        stream.end('stop')
        return stream


@pytest.fixture(scope='module')
def tok(): return Tokenizer.from_pretrained('mini')


def served(tok, text, format='smollm2', **policy):
    tok.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools or '' }}{% if thinking %}<think>{% endif %}"
    f = content_filter(Policy(**policy)) if policy else None
    return ServedModel('it', Scripted(text), tok, format, filter=f)


def collect(run): return asyncio.run(run.whole())
async def listed(run): return [c async for c in run.chunks()]
HI = [dict(role='user', content='Hello')]
RULES = dict(answers=dict(card='mask', email='mask', secret='mask'), secrets=(SECRET,))
CARD = '4111 1111 1111 1111'


def test_chat_whole_and_in_chunks(tok):
    m = served(tok, f'Pay with {CARD}, or {SECRET}.', **RULES)
    whole = collect(ChatRun(m, read_chat(dict(messages=HI))))['choices'][0]
    chunks = asyncio.run(listed(ChatRun(m, read_chat(dict(messages=HI, stream=True)))))
    assert whole['message']['content'] == 'Pay with [CARD], or [SECRET].' and whole['finish_reason'] == 'stop'
    assert ''.join(c['choices'][0]['delta'].get('content', '') for c in chunks) == whole['message']['content']


def test_the_times_of_tokens_change_no_text(tok, draw, everything, monkeypatch):
    "A guard reads together what comes within some milliseconds; the first token passes at once"
    clock = [0.]
    def tick():
        clock[0] += draw.choice((0., .004, .011, .03))
        return clock[0]
    monkeypatch.setattr(chat, 'time', SimpleNamespace(**vars(time) | dict(monotonic=tick)))
    reads = []
    feed = AnswerGuard.feed
    monkeypatch.setattr(AnswerGuard, 'feed', lambda self, events: (reads.append(len(events)), feed(self, events))[1])
    for _ in range(10):
        text = 'Yes' + ''.join(draw.choices(PIECES, k=12))
        m = served(tok, text, answers=MASKS, secrets=(SECRET,))
        reads.clear()
        chunks = asyncio.run(listed(ChatRun(m, read_chat(dict(messages=HI, stream=True)))))
        assert ''.join(c['choices'][0]['delta'].get('content', '') for c in chunks) == everything.answer(text)[0]
        assert 1 < len(reads) <= -(-len(text)//m.engine.size) + 1
    monkeypatch.setattr(chat, 'time', SimpleNamespace(**vars(time) | dict(monotonic=lambda: 1.))) # all tokens come at once
    m = served(tok, 'it is a fine day, and we go to the sea again ', answers=MASKS, secrets=(SECRET,))
    reads.clear()
    asyncio.run(listed(ChatRun(m, read_chat(dict(messages=HI, stream=True)))))
    assert 1 < len(reads) < 5


def test_reasoning_and_arguments_are_filtered(tok):
    call = write_calls('v4', [Call('mail', json.dumps(dict(to='ann@example.org', number=4111111111111111)))])
    m = served(tok, f'It is {SECRET}</think>Well.' + call, 'v4', **RULES)
    tools = [dict(type='function', function=dict(name='mail'))]
    body = dict(messages=HI, tools=tools, thinking=dict(type='enabled'))
    choice = collect(ChatRun(m, read_chat(body)))['choices'][0]
    assert choice['message']['reasoning_content'] == 'It is [SECRET]' and choice['finish_reason'] == 'tool_calls'
    assert json.loads(choice['message']['tool_calls'][0]['function']['arguments']) == dict(to='[EMAIL]', number='[CARD]')


@pytest.mark.parametrize('where', ['content', 'reasoning', 'arguments'])
def test_a_blocked_answer_ends_in_all_protocols(tok, where):
    text = dict(content=f'Well, {SECRET}. More.', reasoning=f'Well, {SECRET}</think>More.',
                arguments='More</think>' + write_calls('v4', [Call('mail', json.dumps(dict(to=f'Well, {SECRET}', cc='More')))]))[where]
    think = where != 'content'
    m = served(tok, text, 'v4', answers=dict(secret='block'), secrets=(SECRET,))
    tools = [dict(name='mail', input_schema={})]
    oai = [dict(type='function', function=dict(name='mail'))]
    chat = dict(messages=HI, tools=oai, thinking=dict(type='enabled' if think else 'disabled'))
    found = collect(ChatRun(m, read_chat(chat)))
    assert found['choices'][0]['finish_reason'] == 'content_filter'
    run = MessagesRun(m, read_anthropic(dict(messages=HI, max_tokens=99, tools=tools,
                                             thinking=dict(type='adaptive' if think else 'disabled'))))
    message = collect(run)
    assert message['stop_reason'] == 'refusal'
    flat = [dict(type='function', name='mail', parameters={})]
    response = collect(ResponsesRun(m, read_responses(dict(input='Hello', tools=flat, reasoning=dict(effort='high') if think else None))))
    assert response['status'] == 'incomplete' and response['incomplete_details'] == dict(reason='content_filter')
    for answer in (found, message, response):
        said = json.dumps(answer)
        assert 'tangerine' not in said and 'otter' not in said and ('Well' in said or where == 'arguments')


class Draws(Scripted):
    "An engine that says something else for each draw"
    def __init__(self, *texts):
        super().__init__('')
        self.texts = texts

    def submit(self, request):
        self.text = self.texts[len(self.asked)]
        return super().submit(request)


BAD, GOOD = 'You stupid idiot', 'It was a lovely day'
AGAIN = dict(answers=dict(card='mask'), redraw=dict(toxic=.5))


def test_answers_are_drawn_again_in_all_protocols(tok):
    runs = [lambda m, **k: ChatRun(m, read_chat(dict(messages=HI, **k))),
            lambda m, **k: MessagesRun(m, read_anthropic(dict(messages=HI, max_tokens=99, **k))),
            lambda m, **k: ResponsesRun(m, read_responses(dict(input='Hello', **k))),
            lambda m, **k: TextRun(m, read_completion(dict(prompt='Hi', **k), tok))]
    for run in runs:
        m = served(tok, '', **AGAIN)
        m.engine = Draws(BAD, BAD + '!', f'{GOOD} {CARD}', GOOD)
        said = json.dumps(collect(run(m)))
        assert 'idiot' not in said and GOOD + ' [CARD]' in said and len(m.engine.asked) == 3
        m.engine = Draws(BAD, GOOD)
        assert BAD in json.dumps(collect(run(m, temperature=0))) and len(m.engine.asked) == 1
    m.engine = Draws(BAD, BAD, GOOD)
    said = ''.join(json.dumps(c) for c in asyncio.run(listed(ChatRun(m, read_chat(dict(messages=HI, stream=True, seed=7))))))
    seeds = [r.params.seed for r in m.engine.asked]
    assert 'idiot' not in said and len({*seeds}) == 3 and seeds[0] == 7


def test_draws_end_with_the_tries_or_the_client(tok):
    m = served(tok, '', tries=2, **AGAIN)
    m.engine = Draws(f'{BAD}, {BAD}', BAD, GOOD)
    assert BAD in json.dumps(collect(ChatRun(m, read_chat(dict(messages=HI))))) and len(m.engine.asked) == 2

    def gone(request):
        m.engine.asked.append(request)
        stream = Stream(request)
        stream.put(Piece(0, BAD))
        stream.cancel()
        stream.end('cancelled')
        return stream
    m.engine.submit = gone
    collect(ChatRun(m, read_chat(dict(messages=HI))))
    assert len(m.engine.asked) == 3


def test_text_completions(tok):
    m = served(tok, f'{SECRET[9:]} and {CARD}. More.', **RULES)
    body = dict(prompt=f'The code is {SECRET[:9]}', echo=True)
    choice = collect(TextRun(m, read_completion(body, tok)))['choices'][0]
    assert choice['text'] == body['prompt'] + '[SECRET] and [CARD]. More.'
    m = served(tok, f'So {CARD}. More.', answers=dict(card='block'))
    choice = collect(TextRun(m, read_completion(dict(prompt='Hi'), tok)))['choices'][0]
    assert (choice['text'], choice['finish_reason']) == ('So ', 'content_filter')


def test_prompts_are_refused_or_masked(tok):
    m = served(tok, 'Ok.', prompts=dict(card='mask', secret='block'), secrets=(SECRET,))
    system = dict(role='system', content=f'Never say {SECRET}. ')
    collect(ChatRun(m, read_chat(dict(messages=[system, dict(role='user', content=f'My card: {CARD}')]))))
    prompt = tok.decode(m.engine.asked[-1].prompt)
    assert SECRET in prompt and '[CARD]' in prompt and '4111' not in prompt
    ask = dict(role='user', content=f'Is it {SECRET[::-1]}?')
    starts = [lambda: ChatRun(m, read_chat(dict(messages=[ask]))), lambda: ResponsesRun(m, read_responses(dict(input=ask['content']))),
              lambda: MessagesRun(m, read_anthropic(dict(messages=[ask], max_tokens=9))),
              lambda: TextRun(m, read_completion(dict(prompt=ask['content']), tok))]
    for start in starts:
        with pytest.raises(ApiError, match='refused by the content policy') as e: start()
        assert e.value.status == 400 and e.value.code == 'content_filter' and SECRET[::-1] not in str(e.value)


def test_log_probabilities_do_not_betray(tok):
    m = served(tok, 'Ok.', **RULES)
    for body in (dict(logprobs=True), dict(logprobs=True, top_logprobs=2), dict(return_token_ids=True)):
        with pytest.raises(ApiError, match='would show what the content policy'): ChatRun(m, read_chat(dict(messages=HI) | body))
    with pytest.raises(ApiError, match='logprobs would show'): TextRun(m, read_completion(dict(prompt='Hi', logprobs=1, echo=True), tok))
    assert collect(ChatRun(served(tok, 'Ok.'), read_chat(dict(messages=HI, logprobs=True))))['choices'][0]['logprobs']['content']


def test_without_a_policy_nothing_changes(tok):
    text = f'Pay with {CARD}, {SECRET}, you idiot.'
    m = served(tok, text)
    assert m.guard() is None and m.screened(HI) is HI
    bare = asyncio.run(listed(ChatRun(m, read_chat(dict(messages=HI, stream=True)))))
    assert [c['choices'][0]['delta'].get('content') for c in bare[1:-1]] == [text[i:i + 3] for i in range(0, len(text), 3)]
    only_prompts = served(tok, text, prompts=dict(card='log'))
    assert only_prompts.guard() is None
    assert collect(ChatRun(only_prompts, read_chat(dict(messages=HI))))['choices'][0]['message']['content'] == text


def test_rows_of_a_batch_have_streams_of_their_own(tok):
    "Halves of a secret in two answers at a time don't meet, and each answer is filtered"
    m = served(tok, f'I say {SECRET} now.', **RULES)
    found = collect(ChatRun(m, read_chat(dict(messages=HI, n=4))))
    assert [c['message']['content'] for c in found['choices']] == ['I say [SECRET] now.']*4


def test_the_log_counts_and_does_not_quote(tok):
    from deepseek_nb.serve.logs import JsonLines, RequestRecord
    m = served(tok, f'It is {SECRET}, {CARD}.', **RULES)
    run = ChatRun(m, read_chat(dict(messages=HI)))
    collect(run)
    record = RequestRecord('r', 'POST', '/v1', tok=tok, streams=[a.stream for a in run.answers])
    line = JsonLines().format(logging.makeLogRecord(dict(fields=record.fields(content=True), levelname='INFO')))
    assert json.loads(line)['filtered'] == dict(secret=1, card=1) and json.loads(line)['texts'] == ['It is [SECRET], [CARD].']
    assert 'tangerine' not in line and '4111' not in line


# ---- the application

def test_the_command_and_the_settings(tmp_path, capsys, monkeypatch):
    (tmp_path/'p.toml').write_text('[answers]\nemail = "mask"\n')
    (tmp_path/'t.jsonl').write_text(json.dumps(dict(text='Mail ann@example.org!')) + '\n')
    cli.run_app('filter', 'score', data=str(tmp_path/'t.jsonl'), options=f'policy={tmp_path/"p.toml"}')
    assert json.loads(capsys.readouterr().out) == dict(text='Mail [EMAIL]!', blocked='', found=dict(email=1))
    cli.run_app('filter')
    assert capsys.readouterr().out.startswith('# Safety filter')
    seen = {}
    monkeypatch.setattr('deepseek_nb.tools.serving.serve_models', lambda names, server, **engine: seen.update(policy=server.policy))
    cli.run_server('mini', policy='p.toml')
    assert seen == dict(policy='p.toml') and read_settings(None)[1].policy == ''
    assert command.find_app('filter') is FilterApp


def test_weights_are_small_and_saved_exactly(tmp_path):
    assert sum(p.stat().st_size for p in package_folder('guards').iterdir()) < 2*2**20
    for kind in (NameTagger, ToxicityNet):
        one = kind.load()
        one.save(tmp_path)
        assert abs(kind.load(tmp_path).weights - one.weights).max() <= 1e-6*abs(one.weights).max() + 1e-12


def test_sets_are_divided_by_template_and_document(tmp_path):
    "Read from local folders; nothing in training is, or nearly repeats, a text of the other parts"
    rows = [dict(full_text=f'Dear Ann{i}, ' + ' '.join(f'{c}{i}' for c in 'abcde'), template_id=i % 40,
                 spans=[dict(start_position=5, end_position=8, entity_type='PERSON')]) for i in range(80)]
    (tmp_path/'synth_dataset_v2.json').write_text(json.dumps(rows))
    for name, score in (('toxic', .9), ('nontoxic', .1)):
        lines = [dict(filename=f'd{i}', prompt=dict(text=f'{name} ' + ' '.join(f'{c}{i}' for c in 'uvwxyz'), toxicity=score),
                      continuation=dict(text=f'more {i}', toxicity=None))
                 for i in range(40)]
        (tmp_path/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    pii, texts = read_pii(tmp_path), read_toxicity(tmp_path)
    for found, key in ((pii, lambda r: r.template), (texts, lambda r: r.document)):
        parts = divide_set(found, key)
        keys = [{key(r) for r in parts[p]} for p in ('train', 'val', 'test')]
        assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2] and all(keys[1:])
    held = {r.text for r in parts['val'] + parts['test']}
    assert not held & {r.text for r in parts['train']}
    copy = texts[0]._replace(document='another', text='also ' + max(held, key=len))
    assert copy not in divide_set([*texts, copy], lambda r: r.document)['train']
    net = learn_filter(pii, texts)[1]
    assert net.score('toxic u') > net.score('nontoxic u')

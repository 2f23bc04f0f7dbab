"""What somebody does first with a server: the request of the README, copied, and ordinary questions without any setting."""
import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_server import Live, post

openai = pytest.importorskip('openai')
README = Path(__file__).parents[1]/'README.md'
QUESTIONS = '''What is the capital of France?
Why is the sky blue?
Write a short poem about the sea.
How do I boil an egg?
What is photosynthesis?
List three healthy breakfasts.
Who wrote Romeo and Juliet?
Explain gravity to a child.
What is 12 times 8?
Give me tips for learning a new language.
Write a Python function that adds two numbers.
What are the planets of the solar system?
How can I sleep better?
Translate "good morning" to Spanish.
What causes rain?
Tell me a joke.
Summarize the story of Cinderella.
What is the difference between a cat and a dog?
How does a computer work?
Plan a weekend trip to Rome.'''.split('\n')


@pytest.fixture(scope='module')
def live():
    live = Live('smollm2-135m')
    yield live
    live.stop()


@pytest.mark.skipif(not shutil.which('curl'), reason='apt-get install curl')
def test_the_request_of_the_readme(live):
    "Its text, with the port of this server in place of 8000"
    [command] = [b for b in re.findall(r'```sh\n(.*?)```', README.read_text(encoding='utf-8'), re.DOTALL) if '/chat/completions' in b]
    assert command.count('127.0.0.1:8000') == 1
    said = subprocess.run(['bash', '-c', command.replace(':8000', f':{live.port}')], capture_output=True, text=True, timeout=60, check=True)
    [choice] = json.loads(said.stdout)['choices']
    assert choice['finish_reason'] == 'stop' and 'Tokyo' in choice['message']['content']


@pytest.mark.skipif(not os.environ.get('EVERY'), reason='a minute: EVERY=1 asks all twenty')
def test_answers_to_ordinary_questions_end(live):
    "At the server's defaults, at most one of twenty answers runs to a cap of 1,024 tokens"
    client = openai.AsyncOpenAI(api_key='none', base_url=f'http://127.0.0.1:{live.port}/v1', timeout=600)

    async def ask(i, question):
        how = dict(model='smollm2-135m', messages=[dict(role='user', content=question)], max_tokens=1024, seed=i)
        return (await client.chat.completions.create(**how)).choices[0].finish_reason

    async def ask_all(): return await asyncio.gather(*[ask(i, q) for i, q in enumerate(QUESTIONS)])
    found = asyncio.run(ask_all())
    print('ran to the cap:', long := [q for q, why in zip(QUESTIONS, found, strict=True) if why == 'length'])
    assert len(long) <= 1


def test_tools_without_a_place_in_the_template(live):
    "They stand in the prompt in words; a call can be forced, and its result is read, in all three protocols"
    client, tool = live.client(), dict(name='weather', description='Weather of a city', parameters=dict(
        type='object', properties=dict(city=dict(type='string', enum=['Rome', 'Oslo'])), required=['city'], additionalProperties=False))
    messages = [dict(role='system', content='Be brief.'), dict(role='user', content='Is it warm in Rome?')]
    how = dict(model='smollm2-135m', temperature=0, max_tokens=30, tools=[dict(type='function', function=tool)])
    [choice] = client.chat.completions.create(messages=messages, tool_choice='required', **how).choices
    call = choice.message.tool_calls[0]
    assert choice.finish_reason in ('tool_calls', 'length') and json.loads(call.function.arguments)['city'] in ('Rome', 'Oslo')
    talk = [*messages, dict(role='assistant', content=None, tool_calls=[call.model_dump()]),
            dict(role='tool', tool_call_id=call.id, content='18 °C')]
    answer = client.chat.completions.create(messages=talk, extra_body=dict(return_token_ids=True), **how)
    prompt = live.tok.decode(answer.prompt_token_ids)
    words = 'Be brief.\n\nYou can call functions', '"enum": ["Rome", "Oslo"]', '<tool_call>', 'Result of weather:\n18 °C'
    assert all(w in prompt for w in words)
    assert client.responses.create(model='smollm2-135m', input='Hi', tools=[dict(type='function', **tool)], max_output_tokens=16).output
    body = dict(model='smollm2-135m', max_tokens=4, messages=messages[1:], tools=[dict(name='weather', input_schema=tool['parameters'])])
    assert post(live, body, '/v1/messages')[0] == 200

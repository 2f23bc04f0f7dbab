"Libraries of others, told where our server is by the functions of a chapter; those that aren't installed are skipped."
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_server import Live

RECIPES = Path(__file__).parents[1]/'nbs/examples/recipes.py'
NAMES = ['langchain_openai', 'llama_index', 'litellm', 'smolagents', 'dspy', 'pydantic_ai', 'instructor', 'ollama']


@pytest.fixture(scope='module')
def live():
    live = Live()
    yield live
    live.stop()


def test_each_has_a_recipe():
    assert [n for n in NAMES if f'def {n}(question):' in RECIPES.read_text(encoding='utf-8')] == NAMES


@pytest.mark.parametrize('name', NAMES)
def test_a_recipe_gets_an_answer(live, name):
    "The program prints what the model said, which here is a small one that isn't asked to be right"
    if not find_spec(name): pytest.skip(f'no {name}')
    env = os.environ | dict(OPENAI_BASE_URL=f'http://127.0.0.1:{live.port}/v1', OPENAI_API_KEY='none', MODEL='mini')
    done = subprocess.run([sys.executable, RECIPES, name, 'Name a city.'], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr

"""Sixty-four answers at a time that stream, end and are left by their clients, for as long as is wanted.

384 answers in a usual run; EVERY=1 goes on for two minutes, and DEEPSEEK_NB_SOAK sets other seconds.
"""
import asyncio
import gc
import os
import time

import pytest

pytest.importorskip('openai')
from test_hostile import ON, TINY, Direct, model, tok  # noqa: E402, F401

STREAMS = 64
SECONDS = float(os.environ.get('DEEPSEEK_NB_SOAK', 120 if os.environ.get('EVERY') else 0))


@pytest.fixture
def direct(model, tok):  # noqa: F811
    direct = Direct(model, tok, nbytes=2**19)
    yield direct
    direct.stop()


async def answers(direct, least, until):
    "At least so many answers, and as many as end before a time: every third client leaves while its answer streams."
    count = iter(range(10**9))
    async def client():
        while (i := next(count)) < least or time.monotonic() < until:
            body = dict(model='tiny', prompt=[1 + i % 50]*(1 + i % 90), max_tokens=4 + i % 13, logit_bias=ON, stream=True, user=f'{i}')
            if i % 3: assert (await direct.ask(body))[2].endswith(b'data: [DONE]\n\n')
            else:
                asked = asyncio.create_task(direct.ask(body, leave=i % 2 == 0))
                await asyncio.sleep(.001*(i % 7))
                if i % 2: asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
    await asyncio.gather(*[client() for _ in range(STREAMS)])
    return next(count) - STREAMS


def test_nothing_is_left_of_streams_that_end_or_are_left(direct):
    "No row, page or user stays, and no cycle of objects waits for the collector of garbage."
    def rest():
        while direct.engine.count: time.sleep(.001)
        gc.collect()
        return len(gc.get_objects())
    asyncio.run(answers(direct, 2*STREAMS, 0))
    before = rest()
    gc.disable()
    try:
        n = asyncio.run(answers(direct, 6*STREAMS, time.monotonic() + SECONDS))
        while direct.engine.count: time.sleep(.001)
        cycles = gc.collect()
    finally: gc.enable()
    engine, server = direct.engine, direct.server
    assert n >= 6*STREAMS and cycles < n and rest() - before < n/10
    assert not engine.rows and not engine.queue.served and not len(engine.queue) and not +server.running
    assert len(engine.store.tree.roots) <= engine.pool.pages

"""Blocking work of tasks: nothing is left behind, nothing runs too far ahead."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator

import pytest

from afs.core.threads import ahead, to_its_end


async def test_everything_comes_in_order() -> None:
    assert [item async for item in ahead(iter(range(100)), 3)] == list(range(100))
    assert [item async for item in ahead(iter(list[int]()), 3)] == []


async def test_an_error_comes_behind_what_was_made() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("broken")

    stream = ahead(items(), 5)
    assert [await anext(stream), await anext(stream)] == [1, 2]
    with pytest.raises(KeyError, match="broken"):
        await anext(stream)


async def test_no_more_than_the_limit_is_made_ahead() -> None:
    made = []
    waits = threading.Event()

    def items() -> Iterator[int]:
        for number in range(10):
            made.append(number)
            if number == 3:
                waits.set()  # the fourth: one was taken, and three are ahead
            yield number

    async with contextlib.aclosing(ahead(items(), 3)) as stream:
        assert await anext(stream) == 0
        assert await anext(stream) == 1
        await asyncio.to_thread(waits.wait)
        assert len(made) <= 5


async def test_closing_waits_and_closes_the_generator() -> None:
    entered, go, closed = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        try:
            yield 1
            entered.set()
            go.wait()
            yield 2
        finally:
            closed.set()

    stream = ahead(items(), 5)
    assert await anext(stream) == 1
    await asyncio.to_thread(entered.wait)
    closing = asyncio.ensure_future(stream.aclose())
    await asyncio.sleep(0)
    assert not closing.done()
    go.set()
    await closing
    assert closed.is_set()


async def test_a_cancelled_task_waits_for_its_thread() -> None:
    entered, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        go.wait()
        ended.set()

    task = asyncio.ensure_future(to_its_end(work))
    await asyncio.to_thread(entered.wait)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    assert await to_its_end(lambda: 7) == 7

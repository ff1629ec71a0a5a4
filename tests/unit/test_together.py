"""Sharing work between tasks, and waiting for what must not be left."""

import asyncio

import pytest

from afs.core.together import ended, together


async def test_all_work_and_the_first_error_is_raised_when_all_have_ended() -> None:
    left, going = iter(range(10)), 0

    async def work() -> None:
        nonlocal going
        going += 1
        try:
            for number in left:
                await asyncio.sleep(0)
                if number == 5:
                    raise ValueError("five")
        finally:
            going -= 1

    with pytest.raises(ValueError, match="five"):
        await together(work, 3)
    assert going == 0
    await together(work, 2)
    assert next(left, None) is None


async def test_whoever_is_cancelled_twice_waits_all_the_same() -> None:
    future = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(ended([future]))
    for _ in range(3):
        await asyncio.sleep(0)
        waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    future.set_result(None)
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await ended([future])

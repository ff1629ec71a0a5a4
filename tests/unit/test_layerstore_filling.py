"""Who is told when chunks come: readers of this node by the thread that wrote them, the snapshotter of what came ahead."""

from __future__ import annotations

import asyncio
import threading

from afs.layerstore import fillahead
from afs.layerstore.fillahead import FilledAhead
from afs.layerstore.filling import Arrivals

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


class Chunks:
    """Which are here, and who is told."""

    def __init__(self) -> None:
        self.here: set[int] = set()
        self.arrivals = Arrivals(self.here.__contains__)
        self.called = 0

    def call(self) -> None:
        """All came."""
        self.called += 1

    def write(self, index: int) -> None:
        """One comes."""
        self.here.add(index)
        self.arrivals.arrived(index)


def test_the_last_chunk_calls_once() -> None:
    chunks = Chunks()
    chunks.here.add(1)
    with chunks.arrivals.telling([1, 2, 3], chunks.call):
        chunks.write(3)
        chunks.write(7)
        assert chunks.called == 0
        chunks.write(2)
        assert chunks.called == 1
        chunks.write(2)
    assert chunks.called == 1
    with chunks.arrivals.telling([1, 2], chunks.call):
        assert chunks.called == 2, "at once, if all are here"
    assert not chunks.arrivals._told


def test_who_gave_up_is_not_called() -> None:
    chunks = Chunks()
    with chunks.arrivals.telling([1, 2], chunks.call):
        with chunks.arrivals.telling([2], chunks.call):
            pass
        chunks.write(1)
    chunks.write(2)
    assert chunks.called == 0
    assert not chunks.arrivals._told


def test_chunks_may_come_from_many_threads() -> None:
    chunks, wanted = Chunks(), list(range(64))
    with chunks.arrivals.telling(wanted, chunks.call):
        threads = [threading.Thread(target=chunks.write, args=(index,)) for index in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert chunks.called == 1


class Told:
    """What a snapshotter is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, fillahead.Ranges]] = []

    def tell(self, diff_id: str, ranges: fillahead.Ranges) -> None:
        """For `FilledAhead`."""
        self.heard.append((diff_id, ranges))


async def test_what_came_before_anybody_watched_is_told_then() -> None:
    ahead, told = FilledAhead(), Told()
    ahead.came(A, 0, 5)
    ahead.came(B, 9, 1)
    ahead.came(A, 5, 5)
    ahead.watch(told.tell)
    assert told.heard == [(A, [(0, 5), (5, 5)]), (B, [(9, 1)])]
    ahead.watch(told.tell)
    assert len(told.heard) == 2, "once"


async def test_what_comes_in_a_row_is_told_together() -> None:
    ahead, told = FilledAhead(), Told()
    ahead.watch(told.tell)
    for index in range(3):
        ahead.came(A, index, 1)
    assert told.heard == []
    while not told.heard:  # noqa: ASYNC110 - a timer of the event loop
        await asyncio.sleep(0.001)
    assert told.heard == [(A, [(0, 1), (1, 1), (2, 1)])]


async def test_nobody_is_told_who_is_gone() -> None:
    ahead, told = FilledAhead(), Told()
    ahead.watch(told.tell)  # a bound method is another object each time, and equal
    ahead.came(A, 0, 1)
    ahead.left(told.tell)
    ahead.left(told.tell)
    ahead._tell()
    assert told.heard == []
    ahead.came(B, 0, 1)
    ahead.forget(A)
    ahead.watch(told.tell)
    assert told.heard == [(B, [(0, 1)])]


async def test_what_nobody_watches_is_bounded() -> None:
    ahead, told = FilledAhead(), Told()
    for index in range(fillahead._MOST + 5):
        ahead.came(A, index, 1)
    ahead.watch(told.tell)
    assert [len(ranges) for _, ranges in told.heard] == [fillahead._MOST]
    ahead.came(B, 1, 1)
    ahead._tell()
    assert told.heard[-1] == (B, [(1, 1)]), "there is room again"

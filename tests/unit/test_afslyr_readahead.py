"""A generator that runs in a thread, a little ahead."""

import threading
from collections.abc import Generator

import pytest

from afs.core.digests import sha256_digest
from afs.layerstore.afslyr.readahead import ReadAhead
from afs.layerstore.afslyr.sharedhash import SharedHash

NAME = "afslyr-test"


def counting(count: int, made: list[int], closed: threading.Event) -> Generator[bytes]:
    """Blocks 0 to *count - 1*, listed in *made* as they are; then a ValueError."""
    try:
        for number in range(count):
            made.append(number)
            yield bytes([number])
        raise ValueError("the source broke")
    finally:
        closed.set()


def test_blocks_come_in_order_and_then_the_error() -> None:
    got: list[bytes] = []
    with pytest.raises(ValueError, match="broke"), ReadAhead(counting(9, [], threading.Event()), 2, NAME) as blocks:
        got.extend(blocks)  # keeps what came before the error
    assert got == [bytes([number]) for number in range(9)]


def test_it_is_never_further_ahead_than_told() -> None:
    made: list[int] = []
    closed = threading.Event()
    with ReadAhead(counting(100, made, closed), 2, NAME) as blocks:
        for taken, _ in zip(range(50), blocks, strict=False):
            assert len(made) <= taken + 1 + 2 + 1  # taken, waiting, and the one at hand
    assert closed.is_set()


def test_leaving_early_ends_the_thread_and_closes_the_generator() -> None:
    made: list[int] = []
    closed = threading.Event()
    with ReadAhead(counting(100, made, closed), 2, NAME) as blocks:
        next(blocks)
    assert closed.is_set()
    assert len(made) < 100
    assert not [thread for thread in threading.enumerate() if thread.name == NAME]


def test_the_end_is_the_end_however_often_one_asks() -> None:
    with ReadAhead((block for block in [b"x"]), 2, NAME) as blocks:
        assert list(blocks) == [b"x"]
        assert list(blocks) == []


def test_who_would_wait_does_other_work() -> None:
    """The thread while the queue is full, the caller while it is empty."""
    workers: list[str] = []
    full, first = threading.Event(), threading.Event()

    def spare() -> bool:
        name = threading.current_thread().name
        if name in workers:
            return False
        workers.append(name)
        (full if name == "test" else first).set()
        return True

    def blocks() -> Generator[bytes]:
        first.wait(10)
        yield from (b"a", b"b", b"c")

    with ReadAhead(blocks(), 1, "test", spare=spare) as found:
        assert next(found) == b"a"
        assert full.wait(10)
        assert list(found) == [b"b", b"c"]
    assert workers == [threading.current_thread().name, "test"]


def test_a_shared_hash_is_that_of_the_pieces_in_order() -> None:
    pieces = [bytes([number % 251]) * 10_000 for number in range(500)]
    shared, added = SharedHash(80_000), threading.Event()

    def work() -> None:
        while not added.is_set():
            shared.work()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for piece in pieces:
        shared.add(piece)
        assert len(shared._pieces) <= 8
    added.set()
    for thread in threads:
        thread.join()
    assert shared.digest == sha256_digest(b"".join(pieces))
    assert not shared.work()
    assert shared.digest == sha256_digest(b"".join(pieces)), "it can be asked again"

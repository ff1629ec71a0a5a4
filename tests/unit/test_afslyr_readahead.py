"""A generator that runs in a thread, a little ahead."""

import threading
from collections.abc import Generator

import pytest

from afs.layerstore.afslyr.readahead import ReadAhead

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

"""Blocks that a thread makes while the caller works on earlier ones.

State: everything below ``_changed``. The thread appends to ``_items`` and sets ``_done`` last; the caller takes from
``_items`` and sets ``_stopped``, after which the thread leaves at its next block.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Self


class ReadAhead:
    """Iterates over what the generator *blocks* yields, in a thread named *name* that is at most *depth* blocks ahead.

    *spare* does a millisecond of other work and says whether there was any. Either thread calls it instead of waiting.

    What the generator raises comes where its next block would. Leaving the ``with`` block ends the thread; if that is not
    done yet, *wake* is called before, to end what the generator waits for.
    """

    def __init__(
        self,
        blocks: Generator[bytes],
        depth: int,
        name: str,
        wake: Callable[[], None] = lambda: None,
        spare: Callable[[], bool] = lambda: False,
    ) -> None:
        self._blocks = blocks
        self._wake = wake
        self._spare = spare
        self._depth = depth
        self._changed = threading.Condition()
        self._items: deque[bytes] = deque()
        self._done = self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            done = self._done
        if not done:
            self._wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            for block in self._blocks:
                if not self._put(block):
                    break
        except BaseException as error:  # whatever it is, it belongs to the caller, who waits
            self._error = error
        finally:
            self._blocks.close()
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _put(self, block: bytes) -> bool:
        with self._changed:
            self._wait_until(lambda: len(self._items) < self._depth or self._stopped)
            self._items.append(block)
            self._changed.notify_all()
            return not self._stopped

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Called and left with ``_changed`` held, but not held while other work is done."""
        while not ready():
            self._changed.release()
            try:
                worked = self._spare()
            finally:
                self._changed.acquire()
            if not worked and not ready():
                self._changed.wait()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> bytes:
        with self._changed:
            self._wait_until(lambda: bool(self._items) or self._done)
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
        if self._error is not None:
            raise self._error
        raise StopIteration

"""Threads that hand blocks to each other: bounded, and never waiting for one that is gone."""

import threading
from collections import deque
from collections.abc import Callable, Iterator


class Stopped(Exception):
    """The pipeline was stopped while this thread waited: another one failed and says why itself."""


class _Gate:
    """What the threads of a pipeline share."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.stopped = False


class Channel:
    """A bounded queue of blocks from one thread to another."""

    def __init__(self, gate: _Gate, capacity: int) -> None:
        self._gate = gate
        self._capacity = capacity
        self._items: deque[bytes] = deque()
        self._closed = False

    def put(self, block: bytes) -> None:
        """Append *block*, waiting for room. Raises Stopped."""
        gate, items = self._gate, self._items
        with gate.changed:
            while len(items) >= self._capacity and not gate.stopped:
                gate.changed.wait()
            if gate.stopped:
                raise Stopped
            items.append(block)
            gate.changed.notify_all()

    def close(self) -> None:
        """Say that no more comes."""
        with self._gate.changed:
            self._closed = True
            self._gate.changed.notify_all()

    def __iter__(self) -> Iterator[bytes]:
        """Blocks until the channel is closed. Raises Stopped."""
        gate, items = self._gate, self._items
        while True:
            with gate.changed:
                while not items and not self._closed and not gate.stopped:
                    gate.changed.wait()
                if gate.stopped:
                    raise Stopped
                if not items:
                    return
                block = items.popleft()
                gate.changed.notify_all()
            yield block


class Pipeline:
    """The threads of one job and the first error among them.

    When one fails all channels stop, so that the others leave at their next block.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._gate = _Gate()
        self._threads: list[threading.Thread] = []

    def channel(self, capacity: int) -> Channel:
        """A queue of at most *capacity* blocks that this pipeline can stop."""
        return Channel(self._gate, capacity)

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run *work* in a thread."""

        def run() -> None:
            try:
                work()
            except Stopped:
                pass
            except BaseException as error:  # whatever it is, the others must not wait for this thread
                self.stop(error)

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Stop all threads at their next block; the first *error* is kept."""
        with self._gate.changed:
            if self.error is None:
                self.error = error
            self._gate.stopped = True
            self._gate.changed.notify_all()

    def join(self) -> None:
        """Wait for all threads."""
        for thread in self._threads:
            thread.join()

"""When to give up work with registries: at a time, or as soon as another thread says so.

State and locks: ``_watched`` are the calls that wake the blocks which run now, under ``_lock``. A call is made under the
lock, too, so that none comes after its block.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator


class Stop:
    """An event that another thread sets, or that is set *seconds* from now."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._end = time.monotonic() + seconds
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._watched: dict[object, Callable[[], None]] = {}

    def left(self) -> float:
        """Seconds until the end, never below 0 nor above what locks and timers take."""
        return max(0.0, min(self._end - time.monotonic(), threading.TIMEOUT_MAX))

    def is_set(self) -> bool:
        """Whether it is time to give up."""
        return self._event.is_set() or self.left() == 0

    def wait(self, seconds: float) -> bool:
        """Wait for it at most *seconds*; what :meth:`is_set` says then."""
        self._event.wait(min(seconds, self.left()))
        return self.is_set()

    def set(self) -> None:
        """Give up, and wake those who wait in :meth:`watching`."""
        self._event.set()
        with self._lock:
            for wake in self._watched.values():
                wake()

    @contextlib.contextmanager
    def watching(self, wake: Callable[[], None], seconds: float) -> Iterator[None]:
        """Call *wake*, which must not block, if the block still runs in *seconds* or when it is time to give up."""
        key = object()

        def late() -> None:
            with self._lock:
                if key in self._watched:
                    wake()

        # A thread for each: 0.1 ms, where an answer takes milliseconds.
        timer = threading.Timer(max(0.0, min(seconds, self.left())), late)
        timer.daemon = True
        with self._lock:
            self._watched[key] = wake
            if self._event.is_set():
                wake()
        try:
            timer.start()
            yield
        finally:
            timer.cancel()
            with self._lock:
                del self._watched[key]

"""A SHA-256 that several threads compute: whichever has nothing better to do.

State: ``_pieces`` are not hashed yet, in their order. The thread that holds ``_lock`` takes the first and hashes it, so they
stay in order; hashlib releases the GIL meanwhile. ``_added`` is written by the one thread that adds, ``_hashed`` below the
lock; bytes.
"""

import hashlib
import threading
from collections import deque


class SharedHash:
    """Bytes go in by :meth:`add`, in order; at most *most* of them wait for their turn, or one piece."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._hash = hashlib.sha256()
        self._pieces: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._added = self._hashed = 0

    def add(self, piece: bytes) -> None:
        """Take the next bytes; always by the same thread."""
        self._pieces.append(piece)
        self._added += len(piece)
        while self._added - self._hashed > self._most and self._pieces:
            with self._lock:
                self._hash_one()

    def work(self) -> bool:
        """Hash one piece; False if there is none, or another thread is at it."""
        if not self._pieces or not self._lock.acquire(blocking=False):
            return False
        try:
            return self._hash_one()
        finally:
            self._lock.release()

    def _hash_one(self) -> bool:
        if not self._pieces:
            return False
        piece = self._pieces.popleft()
        self._hash.update(piece)
        self._hashed += len(piece)
        return True

    @property
    def digest(self) -> str:
        """Of all that was added, with its prefix."""
        with self._lock:
            while self._hash_one():
                pass
            return "sha256:" + self._hash.hexdigest()

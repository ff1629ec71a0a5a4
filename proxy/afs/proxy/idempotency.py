"""Requests that name the same run: (tenant, idempotency_key) is run once, and its result told again for a while.

State, on one event loop: per key either the call that runs it, with those that wait for it to end, or a result. A result is
known from the moment it passed through here, so a command that ended is not run again because its client went away. If the
run ended without one, the first of those that wait runs it. All of it is in this process: another proxy knows nothing.
"""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from afs.core.errors import InvalidArgument, ResourceExhausted
from afs.proto.v1 import afslet_pb2 as pb

Key = tuple[str, str]
_MAX_WAITING = 1000  # calls of one key


@dataclass(slots=True, eq=False)
class _Slot:
    fingerprint: bytes
    waiting: list["asyncio.Future[None]"] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that ended with a result. *accepted* and *result* are the serialized responses."""

    accepted: bytes
    result: bytes

    def replay(self) -> list[bytes]:
        """What a further request gets."""
        result = pb.ExecuteResponse.FromString(self.result)
        result.result.replayed = True
        done = pb.ExecuteResponse(done=pb.Done())
        return [self.accepted, result.SerializeToString(), done.SerializeToString()]


def fingerprint(start: pb.StartRequest) -> bytes:
    """Stands for what two requests with one key must have in common: image, tag and command."""
    parts = (start.image, start.tag, *start.command)
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).digest()


class Runs:
    """Results are kept for *ttl* seconds, *most* at a time; *clock* gives monotonic seconds."""

    def __init__(self, ttl: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl = ttl
        self._most = most
        self._clock = clock
        self._under_way: dict[Key, _Slot] = {}
        self._ended: OrderedDict[Key, tuple[float, bytes, Ended]] = OrderedDict()

    def begin(self, key: Key, mark: bytes) -> "Ended | asyncio.Future[None] | None":
        """Claim *key* for a run with the fingerprint *mark*.

        None: it is the caller's, who has to call :meth:`end`. A future: another call runs it; await it, then ask again, or
        call :meth:`give_up`. Raises InvalidArgument if the key belongs to another request.
        """
        self._expire()
        if (found := self._ended.get(key)) is not None:
            _check_same(key, found[1], mark)
            return found[2]
        slot = self._under_way.get(key)
        if slot is None:
            self._under_way[key] = _Slot(mark)
            return None
        _check_same(key, slot.fingerprint, mark)
        if len(slot.waiting) >= _MAX_WAITING:
            raise ResourceExhausted(f"{_MAX_WAITING} requests with idempotency_key {key[1]!r} wait already")
        slot.waiting.append(waiting := asyncio.get_running_loop().create_future())
        return waiting

    def give_up(self, key: Key, waiting: "asyncio.Future[None]") -> None:
        """The call that awaited *waiting* ends, without having asked again."""
        slot = self._under_way.get(key)
        if slot is not None and waiting in slot.waiting:
            slot.waiting.remove(waiting)

    def end(self, key: Key, ended: Ended | None) -> None:
        """The caller's run ended, with a result or without; those that wait ask again, in their order."""
        slot = self._under_way.pop(key)
        if ended is not None and self._ttl > 0 and self._most > 0:
            self._ended[key] = (self._clock() + self._ttl, slot.fingerprint, ended)
            if len(self._ended) > self._most:
                self._ended.popitem(last=False)
        for waiting in slot.waiting:
            if not waiting.done():
                waiting.set_result(None)

    def _expire(self) -> None:
        now = self._clock()
        while self._ended and next(iter(self._ended.values()))[0] <= now:
            self._ended.popitem(last=False)


def _check_same(key: Key, known: bytes, mark: bytes) -> None:
    if known != mark:
        raise InvalidArgument(f"idempotency_key {key[1]!r} was used for another image or command")

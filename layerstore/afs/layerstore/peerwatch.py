"""How quickly other nodes answer, and which of them to leave alone for a while.

State (one event loop): ``_seen`` has an entry for the endpoints that were asked last. Mean and deviation of the time that a
chunk takes are estimated as TCP estimates round trips (RFC 6298). A request that was given up counts with the time
it had taken by then: it would have taken at least that. So what a slow network makes of all peers makes us more patient
with all of them, and no flood of second requests follows.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from afs.core.errors import AfsError, DeadlineExceeded, Unavailable
from afs.discovery.client import Peer

_MOST = 1024  # endpoints remembered
_UNKNOWN_S = 0.1  # before a first answer
_LEAST_HEDGE_S = 0.02  # below that a second request is noise: chunks take 2 ms, and 10 when a process is busy
_LEAST_TIMEOUT_S, _MOST_TIMEOUT_S = 2.0, 30.0
_PART = 4  # chunks under way that make a node that has all of a layer as busy as an idle one that has a part
_STRIKES = 2  # given up so many times in a row without an answer: it is as good as gone
_SHUN_S, _MOST_SHUN_S = 1.0, 30.0
_DOUBLINGS = 5  # of these times, beyond which they are the longest anyway; a node may be gone for days


@dataclass(slots=True)
class _Seen:
    mean: float = _UNKNOWN_S
    deviation: float = 0.0
    known: bool = False
    running: int = 0
    strikes: int = 0
    shunned_until: float = 0.0


class PeerWatch:
    """Of the node *me*. *now* is a monotonic clock. No answer is waited for longer than *longest* seconds."""

    def __init__(self, me: str, now: Callable[[], float] = time.monotonic, longest: float = _MOST_TIMEOUT_S) -> None:
        self._me = me
        self._now = now
        self._longest = min(longest, _MOST_TIMEOUT_S)
        self._seen: dict[str, _Seen] = {}

    def _of(self, endpoint: str) -> _Seen:
        seen = self._seen.pop(endpoint, None) or _Seen()
        self._seen[endpoint] = seen  # the one used last
        while len(self._seen) > _MOST:
            del self._seen[next(iter(self._seen))]
        return seen

    def is_shunned(self, endpoint: str) -> bool:
        """Whether the node did not answer lately; it is asked if there is nobody else."""
        seen = self._seen.get(endpoint)
        return seen is not None and self._now() < seen.shunned_until

    def order(self, peers: Sequence[Peer], complete: Collection[str], chunk: int = 0) -> list[Peer]:
        """*peers* in the order in which to ask: whoever answers, is idle, has all of the layer (*complete*: those ids).

        One that has a part may not have the chunk: it counts as if it had ``_PART`` more to do. Equal ones go in an order that
        depends on this node and the *chunk*: a hundred nodes that start an image at the same time do not all ask the same
        holder first.
        """

        if len(peers) == 1:
            return list(peers)

        def key(peer: Peer) -> tuple[bool, int, bytes]:
            seen = self._seen.get(peer.endpoint)
            return (
                self.is_shunned(peer.endpoint),
                (seen.running if seen is not None else 0) + (0 if peer.node_id in complete else _PART),
                hashlib.blake2b(f"{self._me}\0{chunk}\0{peer.node_id}".encode(), digest_size=8).digest(),
            )

        return sorted(peers, key=key)

    def hedge_delay(self, endpoint: str) -> float:
        """Seconds after which another node is asked too: hardly any answer takes longer."""
        seen = self._seen.get(endpoint, _Seen())
        return max(_LEAST_HEDGE_S, seen.mean + 4 * seen.deviation)

    def timeout(self, endpoint: str, round_: int) -> float:
        """Seconds to wait for an answer in the *round_*-th round of asking everybody, from 0."""
        seen = self._seen.get(endpoint, _Seen())
        return min(
            max(_LEAST_TIMEOUT_S * 2.0 ** min(round_, _DOUBLINGS), 4 * (seen.mean + 4 * seen.deviation)), self._longest
        )

    @contextlib.contextmanager
    def asking(self, endpoint: str) -> Iterator[None]:
        """One request for a chunk; errors that say that nobody is there count against the node."""
        end = self.begin(endpoint)
        try:
            yield
        except BaseException as error:
            end(error)
            raise
        end(None)

    def begin(self, endpoint: str, count: int = 1) -> Callable[[BaseException | None], None]:
        """:meth:`asking` for *count* chunks begins; what is given is called at the end, with the error if there was one."""
        seen, started = self._of(endpoint), self._now()
        seen.running += count

        def end(error: BaseException | None) -> None:
            seen.running -= count
            if isinstance(error, Unavailable | DeadlineExceeded):
                self._took_at_least(seen, self._now() - started)
                self._strike(seen)
            elif isinstance(error, AfsError):  # it says no, but it is there
                seen.strikes, seen.shunned_until = 0, 0.0
            elif error is not None:  # another one was quicker, or nobody wants it any more
                self._took_at_least(seen, self._now() - started)
            else:
                seen.strikes, seen.shunned_until = 0, 0.0
                self._took(seen, (self._now() - started) / count)

        return end

    def _took_at_least(self, seen: _Seen, seconds: float) -> None:
        if seconds > seen.mean:
            self._took(seen, seconds)

    def _took(self, seen: _Seen, seconds: float) -> None:
        if seen.known:
            seen.deviation += (abs(seconds - seen.mean) - seen.deviation) / 4
            seen.mean += (seconds - seen.mean) / 8
        else:
            seen.known, seen.mean, seen.deviation = True, seconds, seconds / 2

    def lost(self, endpoint: str) -> None:
        """Another node that was asked later was quicker."""
        self._strike(self._of(endpoint))

    def _strike(self, seen: _Seen) -> None:
        seen.strikes += 1
        if seen.strikes >= _STRIKES:
            seen.shunned_until = self._now() + min(
                _SHUN_S * 2.0 ** min(seen.strikes - _STRIKES, _DOUBLINGS), _MOST_SHUN_S
            )

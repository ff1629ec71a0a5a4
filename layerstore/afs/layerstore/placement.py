"""Which node owns a layer or an image: rendezvous hashing, weighted by capacity.

Every node that knows the same peers computes the same order without talking, and a node that leaves moves only what it
owned (Thaler and Ravishankar, 1998; the weighted form is that of Schindelhauer and Schomaker, 2005).
"""

import hashlib
import math
from collections.abc import Iterable

from afs.discovery.client import Peer


def ranked(key: str, peers: Iterable[Peer]) -> list[Peer]:
    """*peers* by descending claim on *key*; the first is the owner, the next ones take over in order."""
    return sorted(peers, key=lambda peer: (-_score(key, peer), peer.node_id))


def _score(key: str, peer: Peer) -> float:
    digest = hashlib.sha256(f"{key}\0{peer.node_id}".encode()).digest()
    # Uniform in (0, 1), never 0 or 1: 52 bits fit a float exactly.
    uniform = ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
    return max(peer.capacity, 1) / -math.log(uniform)

"""Placement: agreement, little movement, weights."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from afs.discovery.client import Peer
from afs.layerstore.placement import ranked

KEYS = [f"sha256:{number:064x}" for number in range(3000)]
PEERS = st.lists(
    st.builds(Peer, st.text("abcdef", min_size=1), st.just("x:1"), st.integers(0, 1 << 50)),
    min_size=1,
    unique_by=lambda peer: peer.node_id,
)


def peers(*capacities: int) -> list[Peer]:
    """Nodes of these capacities."""
    return [Peer(f"node{number}", f"host:{number}", capacity) for number, capacity in enumerate(capacities)]


@settings(derandomize=True, deadline=None, database=None)
@given(PEERS, st.text(), st.integers())
def test_the_order_in_which_peers_are_known_does_not_matter(nodes: list[Peer], key: str, seed: int) -> None:
    shuffled = random.Random(seed).sample(nodes, len(nodes))  # noqa: S311 - not for secrets
    assert ranked(key, shuffled) == ranked(key, nodes)
    assert sorted(ranked(key, nodes), key=str) == sorted(nodes, key=str)


def test_addresses_do_not_move_anything() -> None:
    nodes = peers(1, 1, 1)
    moved = [Peer(node.node_id, "elsewhere:1", node.capacity) for node in nodes]
    assert [p.node_id for p in ranked("k", nodes)] == [p.node_id for p in ranked("k", moved)]


@settings(derandomize=True, deadline=None, database=None)
@given(PEERS, st.text())
def test_a_node_that_leaves_moves_only_what_it_owned(nodes: list[Peer], key: str) -> None:
    order = ranked(key, nodes)
    for gone in nodes:
        assert ranked(key, [node for node in nodes if node is not gone]) == [node for node in order if node is not gone]


def test_equal_nodes_own_equal_shares() -> None:
    owners = Counter(ranked(key, peers(5, 5, 5, 5))[0].node_id for key in KEYS)
    assert all(abs(count - len(KEYS) / 4) < 0.12 * len(KEYS) / 4 for count in owners.values()), owners


def test_shares_follow_the_capacity() -> None:
    owners = Counter(ranked(key, peers(100 << 30, 200 << 30, 700 << 30))[0].node_id for key in KEYS)
    shares = [owners[f"node{number}"] / len(KEYS) for number in range(3)]
    assert all(abs(share - wanted) < 0.03 for share, wanted in zip(shares, (0.1, 0.2, 0.7), strict=True)), shares


def test_no_capacity_is_little_but_legal() -> None:
    assert ranked("k", peers(0)) == peers(0)
    assert ranked("k", []) == []
    assert Counter(ranked(key, peers(0, 10**9))[0].node_id for key in KEYS)["node1"] == len(KEYS)

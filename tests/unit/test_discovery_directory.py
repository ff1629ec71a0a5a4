"""The directory: deltas, gaps, incarnations and time."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from afs.discovery.directory import Directory, Report

TTL = 7.0
BASE = Report("n1", "host:1", 100, incarnation=5, sequence=1, full=True)


def beat(directory: Directory, report: Report, now: float = 0.0) -> bool:
    """One heartbeat; whether a resend is wanted."""
    return directory.heartbeat(report, now=now, now_unix=int(now))


def held(directory: Directory, node_id: str = "n1", now: float = 0.0) -> dict[str, tuple[int, bool]]:
    """The layers of a node."""
    return next(node.layers for node in directory.nodes(now) if node.node_id == node_id)


def test_a_full_report_and_deltas() -> None:
    directory = Directory(TTL)
    assert not beat(directory, replace(BASE, layers=(("a", 1, True), ("b", 2, False)), images=("i", "j")))
    delta = Report("n1", "host:1", 200, 5, 2, layers=(("b", 3, True), ("c", 4, False)), removed_layers=("a", "z"))
    assert not beat(directory, replace(delta, images=("k",), removed_images=("i", "z")))
    (node,) = directory.nodes(0)
    assert node.layers == {"b": (3, True), "c": (4, False)}
    assert node.images == {"j", "k"}
    assert node.capacity == 200


def test_a_full_report_forgets_what_it_does_not_name() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, layers=(("a", 1, True),), images=("i",)))
    assert not beat(directory, replace(BASE, sequence=9, layers=(("b", 1, True),)))
    assert held(directory) == {"b": (1, True)}
    assert directory.image_holders("i", 0) == []


def test_a_full_report_that_was_overtaken_is_nothing() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, layers=(("a", 1, True),), chunk_port=1))
    assert not beat(directory, replace(BASE, sequence=3, layers=(("b", 1, True),), chunk_port=3))
    assert not beat(directory, replace(BASE, sequence=2, layers=(("a", 1, True),), chunk_port=2))
    assert held(directory) == {"b": (1, True)}
    (node,) = directory.nodes(0)
    assert node.chunk_port == 3
    assert not beat(directory, replace(BASE, sequence=4, full=False, layers=(("c", 1, True),), chunk_port=3))
    assert not beat(directory, replace(BASE, incarnation=6, sequence=1))
    assert held(directory) == {}, "a new process counts anew"


def test_a_gap_asks_for_everything_and_keeps_what_is_known() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, layers=(("a", 1, True),)))
    delta = Report("n1", "host:1", 100, 5, 3, layers=(("b", 1, True),))
    assert beat(directory, delta, now=6)
    assert held(directory, now=12) == {"a": (1, True)}  # it lives, although it was asked to resend
    assert beat(directory, replace(delta, sequence=4))  # it did not resend: asked again
    assert not beat(directory, replace(delta, sequence=5, full=True))
    assert held(directory) == {"b": (1, True)}
    assert not beat(directory, replace(delta, sequence=6, layers=()))
    assert [node.node_id for node in directory.nodes(0)] == ["n1"]


def test_a_repeated_heartbeat_is_a_gap() -> None:
    directory = Directory(TTL)
    beat(directory, BASE)
    delta = replace(BASE, sequence=2, full=False)
    assert not beat(directory, delta)
    assert beat(directory, delta)


def test_a_delta_from_a_stranger_asks_for_everything() -> None:
    directory = Directory(TTL)
    assert beat(directory, replace(BASE, full=False, layers=(("a", 1, True),)))
    assert held(directory) == {}


def test_a_restarted_node_holds_nothing_until_it_says_so() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, layers=(("a", 1, True),)))
    assert beat(directory, replace(BASE, incarnation=6, sequence=2, full=False))
    assert held(directory) == {}
    assert not beat(directory, replace(BASE, incarnation=6, layers=(("c", 1, True),)))
    assert held(directory) == {"c": (1, True)}


def test_a_node_that_moved_is_another_one() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, layers=(("a", 1, True),)))
    assert beat(directory, replace(BASE, endpoint="host:2", sequence=2, full=False))
    (node,) = directory.nodes(0)
    assert (node.endpoint, node.layers) == ("host:2", {})


def test_silence_longer_than_the_ttl_is_death() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, layers=(("a", 1, True),), images=("i",)))
    beat(directory, replace(BASE, node_id="n0"), now=1)
    assert [node.node_id for node in directory.nodes(TTL)] == ["n0", "n1"]
    assert [node.node_id for node in directory.nodes(TTL + 0.5)] == ["n0"]
    assert directory.layer_holders("a", 0) == []  # it is forgotten, not hidden
    assert beat(directory, replace(BASE, sequence=2, full=False), now=9)


def test_leaving_is_for_the_incarnation_that_leaves() -> None:
    directory = Directory(TTL)
    beat(directory, BASE)
    directory.leave("n1", 4)
    assert len(directory.nodes(0)) == 1
    directory.leave("n1", 5)
    directory.leave("n1", 5)
    assert directory.nodes(0) == []


def test_complete_holders_come_first() -> None:
    directory = Directory(TTL)
    for node_id, complete in (("n1", False), ("n2", True), ("n3", False), ("n4", True)):
        beat(directory, replace(BASE, node_id=node_id, layers=(("a", 1, complete),), images=("i",)))
    beat(directory, replace(BASE, node_id="n5"))
    found = [(node.node_id, complete) for node, complete in directory.layer_holders("a", 0)]
    assert found == [("n2", True), ("n4", True), ("n1", False), ("n3", False)]
    assert [node.node_id for node in directory.image_holders("i", 0)] == ["n1", "n2", "n3", "n4"]


def test_traces_come_change_and_go() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, traces=(("i", 7), ("j", 2))))
    assert not beat(directory, replace(BASE, sequence=2, full=False, traces=(("i", 9),), removed_traces=("j", "z")))
    (node,) = directory.nodes(0)
    assert node.traces == {"i": 9}
    assert beat(directory, replace(BASE, sequence=4, full=False, removed_traces=("i",)))  # a gap
    assert node.traces == {"i": 9}
    assert not beat(directory, replace(BASE, sequence=5, traces=(("k", 1),)))
    assert node.traces == {"k": 1}


def test_who_has_the_longest_trace_comes_first() -> None:
    directory = Directory(TTL)
    for node_id, chunks in (("n1", 3), ("n2", 9), ("n3", 9), ("n4", 1)):
        beat(directory, replace(BASE, node_id=node_id, traces=(("i", chunks),)))
    beat(directory, replace(BASE, node_id="n5", traces=(("j", 99),)))
    assert [node.node_id for node in directory.trace_holders("i", 0)] == ["n2", "n3", "n1", "n4"]
    assert directory.trace_holders("i", TTL + 1) == []


def test_chains_come_and_go() -> None:
    directory = Directory(TTL)
    beat(directory, replace(BASE, chains=(1, 2**64 - 1)))
    beat(directory, replace(BASE, node_id="n0", chains=(1,)))
    assert [node.node_id for node in directory.chain_holders(1, 0)] == ["n0", "n1"]
    assert not beat(directory, replace(BASE, sequence=2, full=False, chains=(3,), removed_chains=(1, 7)))
    assert [node.node_id for node in directory.chain_holders(1, 0)] == ["n0"]
    assert [node.node_id for node in directory.chain_holders(2**64 - 1, 0)] == ["n1"]
    assert not beat(directory, replace(BASE, sequence=3, chains=(4,)))
    assert [chain for chain in (1, 3, 4, 2**64 - 1) if "n1" in _ids(directory, chain)] == [4]
    assert directory.chain_holders(4, TTL + 1) == []


def _ids(directory: Directory, chain: int) -> list[str]:
    return [node.node_id for node in directory.chain_holders(chain, 0)]


LAYER = st.sampled_from("abcd")


@settings(derandomize=True, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(st.dictionaries(LAYER, st.tuples(st.integers(0, 3), st.booleans())), st.booleans(), st.booleans()),
        max_size=20,
    )
)
def test_whatever_is_lost_a_resend_heals(steps: list[tuple[dict[str, tuple[int, bool]], bool, bool]]) -> None:
    """A node's states in order; a heartbeat or its answer may be lost. After an answer both sides agree."""
    directory = Directory(TTL)
    sent: dict[str, tuple[int, bool]] = {}
    full, sequence = True, 0
    for wanted, lost, answer_lost in steps:
        sequence += 1
        old = {} if full else sent
        changed = tuple((key, *value) for key, value in wanted.items() if old.get(key) != value)
        removed = tuple(old.keys() - wanted.keys())
        report = replace(BASE, sequence=sequence, full=full, layers=changed, removed_layers=removed)
        if lost:
            full = True
            continue
        resend = beat(directory, report)
        if answer_lost:
            full = True
            continue
        if not resend:
            assert held(directory) == wanted
            sent = wanted
        full = resend

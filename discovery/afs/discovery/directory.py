"""The soft state of discovery: live layerstores and what they hold. Plain data, no I/O, time is given.

State: ``_nodes`` maps node id to what its heartbeats said. A node that was silent for the time-to-live is dropped when
anything is asked, so no timer is needed. Everything runs on one event loop without an await: no locks.
"""

from dataclasses import dataclass, field


@dataclass(slots=True)
class NodeState:
    """What one layerstore reported.

    *sequence* is that of the last report that was taken in, -1 before the first. *layers* maps diff_id to (size in bytes,
    complete), *traces* the manifest digest of an image to chunks of its trace. *chains* has the first 8 bytes of chain ids.
    """

    node_id: str
    endpoint: str
    capacity: int
    incarnation: int
    sequence: int
    seen: float  # monotonic seconds
    seen_unix: int
    layers: dict[str, tuple[int, bool]] = field(default_factory=dict)
    images: set[str] = field(default_factory=set)
    traces: dict[str, int] = field(default_factory=dict)
    chains: set[int] = field(default_factory=set)
    chunk_port: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One heartbeat; see HeartbeatRequest."""

    node_id: str
    endpoint: str
    capacity: int
    incarnation: int
    sequence: int
    full: bool = False
    layers: tuple[tuple[str, int, bool], ...] = ()
    removed_layers: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    removed_images: tuple[str, ...] = ()
    traces: tuple[tuple[str, int], ...] = ()
    removed_traces: tuple[str, ...] = ()
    chains: tuple[int, ...] = ()
    removed_chains: tuple[int, ...] = ()
    chunk_port: int = 0


class Directory:
    """All live nodes. *ttl* is in seconds: how long a silent node still counts as alive."""

    def __init__(self, ttl: float) -> None:
        self._ttl = ttl
        self._nodes: dict[str, NodeState] = {}

    def heartbeat(self, report: Report, *, now: float, now_unix: int) -> bool:
        """Take *report* in; True if the node must send everything again.

        A delta counts only when it follows the last one without a gap. A node that is asked to resend still counts as
        alive, and what it said before stays: an old answer costs a reader one failed try, no answer costs a pull. A full
        report that comes behind a later one is nothing.
        """
        node = self._nodes.get(report.node_id)
        if node is not None and (node.incarnation, node.endpoint) != (report.incarnation, report.endpoint):
            node = None  # another one of that name
        if node is not None and report.full and report.sequence <= node.sequence:
            return False  # it was given up as lost, and others overtook it
        follows = node is not None and report.sequence == node.sequence + 1
        if node is None:
            node = NodeState(report.node_id, report.endpoint, report.capacity, report.incarnation, -1, now, now_unix)
            self._nodes[report.node_id] = node
        node.capacity, node.seen, node.seen_unix = report.capacity, now, now_unix
        node.chunk_port = report.chunk_port
        if not follows and not report.full:
            return True
        node.sequence = report.sequence
        if report.full:
            node.layers.clear()
            node.images.clear()
            node.traces.clear()
            node.chains.clear()
        node.layers.update((diff_id, (size, complete)) for diff_id, size, complete in report.layers)
        node.images.update(report.images)
        for diff_id in report.removed_layers:
            node.layers.pop(diff_id, None)
        node.images.difference_update(report.removed_images)
        node.traces.update(report.traces)
        for digest in report.removed_traces:
            node.traces.pop(digest, None)
        node.chains.update(report.chains)
        node.chains.difference_update(report.removed_chains)
        return False

    def leave(self, node_id: str, incarnation: int) -> None:
        """Forget a node that stops cleanly, unless a newer incarnation took its place."""
        node = self._nodes.get(node_id)
        if node is not None and node.incarnation == incarnation:
            del self._nodes[node_id]

    def nodes(self, now: float) -> list[NodeState]:
        """The live nodes, by node id."""
        for node_id in [node.node_id for node in self._nodes.values() if now - node.seen > self._ttl]:
            del self._nodes[node_id]
        return [self._nodes[node_id] for node_id in sorted(self._nodes)]

    def layer_holders(self, diff_id: str, now: float) -> list[tuple[NodeState, bool]]:
        """Nodes with at least a part of the layer, and whether they have all of it; complete ones first."""
        found = [(node, node.layers[diff_id][1]) for node in self.nodes(now) if diff_id in node.layers]
        return sorted(found, key=lambda pair: not pair[1])

    def image_holders(self, key: str, now: float) -> list[NodeState]:
        """Nodes that know what image *key* consists of."""
        return [node for node in self.nodes(now) if key in node.images]

    def chain_holders(self, chain: int, now: float) -> list[NodeState]:
        """Nodes that know an image with a chain id that begins with these 8 bytes."""
        return [node for node in self.nodes(now) if chain in node.chains]

    def trace_holders(self, manifest_digest: str, now: float) -> list[NodeState]:
        """Nodes with a start trace of the image, those first whose trace has the most chunks."""
        found = [node for node in self.nodes(now) if manifest_digest in node.traces]
        return sorted(found, key=lambda node: -node.traces[manifest_digest])

"""What the cluster tells about itself, as plain typed values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from afs.proto.v1 import proxy_pb2, runs_pb2


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run that is queued or under way. *phase*: queued, preparing, running or diff; *started* is in Unix seconds."""

    run_id: str
    node_id: str  # empty while it is queued at the proxy
    image: str
    command: tuple[str, ...]
    phase: str
    started: float
    cpu: float
    memory_mb: int
    tenant: str = ""
    owner: str = ""  # the client's address
    labels: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: runs_pb2.Run) -> Self:
        """From the wire."""
        return cls(
            run.run_id,
            run.node_id,
            run.image,
            tuple(run.command),
            run.phase,
            run.started_unix_ms / 1000,
            run.cpu_millis / 1000,
            run.memory_mb,
            run.tenant,
            run.owner,
            dict(run.labels),
        )


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """An image that nodes know, and which nodes those are."""

    name: str
    node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """A layer that nodes hold or fetch: its diff_id, the size of its file in bytes, and which nodes those are."""

    digest: str
    size: int
    node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What the layerstores of a cluster hold, by name and by digest."""

    images: tuple[ImageInfo, ...]
    layers: tuple[LayerInfo, ...]

    @classmethod
    def of(cls, responses: Sequence[proxy_pb2.StatusResponse]) -> Self:
        """Of a cluster's status."""
        images: dict[str, list[str]] = {}
        layers: dict[str, tuple[int, list[str]]] = {}
        for response in responses:
            if response.WhichOneof("payload") != "layerstore":
                continue
            store = response.layerstore
            for name in store.cached_images:
                images.setdefault(name, []).append(store.node_id)
            for layer in store.layers:
                layers.setdefault(layer.digest, (layer.afs_size, []))[1].append(store.node_id)
        return cls(
            tuple(ImageInfo(name, tuple(sorted(nodes))) for name, nodes in sorted(images.items())),
            tuple(LayerInfo(digest, size, tuple(sorted(nodes))) for digest, (size, nodes) in sorted(layers.items())),
        )


class Rounds:
    """Cuts the stream of a status that is said again and again into rounds, each beginning with a summary."""

    def __init__(self) -> None:
        self._round: list[proxy_pb2.StatusResponse] = []
        self._left = 0

    def add(self, response: proxy_pb2.StatusResponse) -> list[proxy_pb2.StatusResponse] | None:
        """The round that *response* completes, if it does: the summary tells how many follow."""
        kind = response.WhichOneof("payload")
        if kind == "summary":
            summary = response.summary
            self._round, self._left = [], summary.layerstore_instances + summary.afslet_instances
        elif kind in ("layerstore", "afslet"):
            self._left -= 1
        self._round.append(response)
        # An error may follow when the round seemed complete; then it is told again, with it.
        return list(self._round) if self._left == 0 else None

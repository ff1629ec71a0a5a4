"""A layer of the cluster, as a snapshot remembers it: enough to ask for it again after any restart."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from afs.proto.v1 import layerstore_pb2 as pb

MOST_NAMES = 8


@dataclass(frozen=True, slots=True)
class Name:
    """An image that may have the layer; empty fields of the platform mean this machine's."""

    image: str
    tag: str = ""
    os: str = ""
    architecture: str = ""
    variant: str = ""


@dataclass(frozen=True, slots=True)
class ClusterLayer:
    """See WantedLayer in layerstore.proto."""

    diff_id: str
    chain_id: str
    parent_chain_id: str = ""
    names: tuple[Name, ...] = ()

    def with_names(self, others: Iterable[Name]) -> "ClusterLayer":
        """The same with more names behind its own, as many as the layerstore looks at."""
        return replace(self, names=tuple(dict.fromkeys((*self.names, *others)))[:MOST_NAMES])

    def to_json(self) -> str:
        """For the database."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ClusterLayer":
        """From the database."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "names": tuple(Name(**name) for name in fields["names"])})

    def message(self) -> pb.WantedLayer:
        """For the layerstore."""
        names = [pb.ImageName(**asdict(name)) for name in self.names]
        return pb.WantedLayer(
            chain_id=self.chain_id, parent_chain_id=self.parent_chain_id, diff_id=self.diff_id, names=names
        )

    @classmethod
    def from_message(cls, message: pb.WantedLayer) -> "ClusterLayer":
        """From the layerstore."""
        return cls(message.diff_id, message.chain_id, message.parent_chain_id, tuple(_names(message.names)))


def _names(messages: Iterable[pb.ImageName]) -> Iterable[Name]:
    for message in messages:
        yield Name(message.image, message.tag, message.os, message.architecture, message.variant)

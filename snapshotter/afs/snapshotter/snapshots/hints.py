"""What a client's labels tell of the layer that it is about to unpack; docs/containerd.md lists the clients.

Labels may come from whoever made the image: containerd copies the annotations ``containerd.io/snapshot/*`` of a layer's
descriptor. So nothing here is believed. A diff_id counts if it and the parent's chain id give the chain id that is asked for,
and a name is only somewhere to look: the image there has to have the chain.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from afs.core.digests import chained, is_digest
from afs.core.errors import InvalidArgument
from afs.core.images import parse_image
from afs.proto.v1 import layerstore_pb2 as pb
from afs.snapshotter.snapshots.metadata import Snapshot

log = logging.getLogger(__name__)
PREFIX = "containerd.io/snapshot"
REFERENCE = f"{PREFIX}.ref"
"""The chain id under which the client will look for the layer."""
_DIFF_IDS = (f"{PREFIX}/diff-id", f"{PREFIX}/afs.diff-id")  # of containerd 2.3, and of an image's author
_PARENT = f"{PREFIX}/parent-chain-id"
_CRI_IMAGE, _CRI_MANIFEST = f"{PREFIX}/cri.image-ref", f"{PREFIX}/cri.manifest-digest"
_STARGZ_IMAGE = f"{PREFIX}/remote/stargz.reference"
_CHAIN = re.compile(r"sha256:[0-9a-f]{64}\Z")


@dataclass(frozen=True, slots=True)
class Hint:
    """A layer that a client asks for; *diff_id* is "" or proved. *names* of images, the surest first."""

    chain_id: str
    parent_chain_id: str
    diff_id: str
    names: tuple[str, ...]

    def message(self) -> pb.WantedLayer:
        """For the layerstore."""
        return pb.WantedLayer(
            chain_id=self.chain_id,
            parent_chain_id=self.parent_chain_id,
            diff_id=self.diff_id,
            names=[pb.ImageName(image=name) for name in self.names],
        )


def read_hint(labels: Mapping[str, str], parent: Snapshot | None) -> Hint | None:
    """What the labels of Prepare say of a layer on *parent*; None if it cannot be one of the cluster's."""
    chain_id = labels.get(REFERENCE, "")
    if not is_digest(chain_id):
        return None
    below = "" if parent is None else chain_of(parent)
    if below is None or labels.get(_PARENT, below) != below:
        log.info("layer %s: nothing says what its parent is", chain_id)
        return None
    if below:
        given = (labels[key] for key in _DIFF_IDS if is_digest(labels.get(key, "")))
        diff_id = next((diff_id for diff_id in given if chained(below, diff_id) == chain_id), "")
    else:
        diff_id = chain_id
    return Hint(chain_id, below, diff_id, tuple(dict.fromkeys(_names(labels))))


def chain_of(snapshot: Snapshot) -> str | None:
    """The chain id of a committed snapshot's contents, if it is known."""
    if snapshot.layer is not None:
        return snapshot.layer.chain_id
    if is_digest(reference := snapshot.labels.get(REFERENCE, "")):
        return reference
    # containerd names a layer that it unpacked <namespace>/<number>/<chain id>.
    found = _CHAIN.search(snapshot.name)
    return found.group() if found else None


def _names(labels: Mapping[str, str]) -> Iterator[str]:
    for image, manifest in ((labels.get(_CRI_IMAGE), labels.get(_CRI_MANIFEST)), (labels.get(_STARGZ_IMAGE), None)):
        if not image or is_digest(image):  # CRI names an image that it unpacks once more by its id
            continue
        try:
            name = parse_image(image)
        except InvalidArgument as error:
            log.info("no name to look under: %s", error.line)
            continue
        if name.is_local:  # a file of this node is nothing that a client of containerd means
            continue
        if manifest and is_digest(manifest):
            yield f"{name.location}@{manifest}"
        yield str(name)

"""Layers as containerd's side asks for them: by chain id, with names of images that may have them.

Names may come from annotations that the author of some image wrote: nothing of them is believed, they only tell where to look.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from afs.core.digests import chained, check_digest
from afs.core.errors import InvalidArgument
from afs.core.images import ImageRef, Platform, parse_image, parse_platform
from afs.layerstore.manifests import NamedImage
from afs.layerstore.peers import image_name
from afs.proto.v1 import layerstore_pb2 as pb

log = logging.getLogger(__name__)
_MOST_NAMES = 8
_LONGEST = 1024  # characters of a name with its platform; registries' paths have 255 at most
_LOGGED = 200  # characters of a bad one

Name = tuple[ImageRef, Platform]


@dataclass(frozen=True, slots=True)
class WantedLayer:
    """A checked request. *parent_chain_id* is empty for the bottom layer; *diff_id*, if it is not empty, is proved."""

    chain_id: str
    parent_chain_id: str
    diff_id: str
    names: tuple[Name, ...]

    @property
    def locations(self) -> frozenset[str]:
        """The repositories of the names."""
        return frozenset(ref.location for ref, _ in self.names)


def parse_wanted(message: pb.WantedLayer) -> WantedLayer:
    """Check *message*; InvalidArgument names the field that is wrong. Bad names are logged and left out."""
    chain_id = _digest("chain_id", message.chain_id)
    parent = _digest("parent_chain_id", message.parent_chain_id) if message.parent_chain_id else ""
    diff_id = _digest("diff_id", message.diff_id) if message.diff_id else ""
    if not parent:
        diff_id = diff_id or chain_id  # there is nothing below it that the chain id could be over
    if diff_id and chained(parent, diff_id) != chain_id:
        raise InvalidArgument(f"diff_id {diff_id} on {parent or 'nothing'} does not make chain_id {chain_id}")
    return WantedLayer(chain_id, parent, diff_id, tuple(dict.fromkeys(_names(message.names[:_MOST_NAMES]))))


def wanted_message(wanted: WantedLayer, diff_id: str, found: NamedImage | None) -> pb.WantedLayer:
    """The answer to a request: with its *diff_id*, and the image that it was *found* in before the other names."""
    names = [found[:2]] if found is not None else []
    return pb.WantedLayer(
        chain_id=wanted.chain_id,
        parent_chain_id=wanted.parent_chain_id,
        diff_id=diff_id,
        names=[image_name(ref, platform) for ref, platform in dict.fromkeys([*names, *wanted.names])],
    )


def _digest(field: str, text: str) -> str:
    try:
        return check_digest(text)
    except InvalidArgument as error:
        raise InvalidArgument(f"{field}: {error.line[:_LOGGED]}") from None


def _names(messages: Iterable[pb.ImageName]) -> Iterator[Name]:
    for name in messages:
        try:
            yield _name(name)
        except InvalidArgument as error:
            log.info("passing over a name: %s", error.line[:_LOGGED])


def _name(name: pb.ImageName) -> Name:
    if sum(map(len, (name.image, name.tag, name.os, name.architecture, name.variant))) > _LONGEST:
        raise InvalidArgument(f"image name of more than {_LONGEST} characters: {name.image!r}")
    ref = parse_image(name.image, name.tag)
    if ref.is_local:  # which file of this node is read is nothing that an image's author may say
        raise InvalidArgument(f"image {name.image!r} is no image of a registry")
    return ref, parse_platform(name.os, name.architecture, name.variant)

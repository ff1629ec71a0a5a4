"""The layerstore's errors; each names the image, layer or registry."""

from collections.abc import Sequence

from afs.core.errors import (
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from afs.core.units import format_size


class ImageNotFound(NotFound):
    """The source does not have the image."""

    def __init__(self, image: str, where: str) -> None:
        self.image = image
        super().__init__(f"image {image} not found: {where}")


class PlatformMissing(FailedPrecondition):
    """The image exists, but not for the wanted platform."""

    def __init__(self, image: str, wanted: str, available: Sequence[str]) -> None:
        self.image, self.wanted, self.available = image, wanted, tuple(available)
        super().__init__(f"image {image} has no platform {wanted}; it has: {', '.join(available) or 'none'}")


class NotAnImage(InvalidArgument):
    """The reference leads to something that is no runnable image, such as an artifact."""

    def __init__(self, image: str, cause: str) -> None:
        self.image = image
        super().__init__(f"{image} is not an image that can run: {cause}")


class CorruptImage(DataLoss):
    """A manifest or config is not what its digest says, or makes no sense."""

    def __init__(self, image: str, cause: str) -> None:
        self.image = image
        super().__init__(f"image {image} is corrupt: {cause}")


class RegistryUnreachable(Unavailable):
    """No answer, or an answer that asks to come back later. *registry* is who was asked: the registry or a mirror."""

    def __init__(self, registry: str, cause: str) -> None:
        self.registry = registry
        super().__init__(f"registry {registry} is unreachable: {cause}")


class RegistryMisconfigured(FailedPrecondition):
    """This node's settings for a registry cannot be used; *cause* names the file or the setting."""

    def __init__(self, registry: str, cause: str) -> None:
        self.registry = registry
        super().__init__(f"this node's settings for registry {registry} cannot be used: {cause}")


class RegistryDenied(PermissionDenied):
    """The registry refuses; a private repository or a missing one, registries do not tell which."""

    def __init__(self, image: str, cause: str) -> None:
        self.image = image
        super().__init__(f"registry denies access to {image}: {cause}")


class LayerNotHeld(NotFound):
    """Nobody has the layer, so it would have to be pulled."""

    def __init__(self, diff_id: str) -> None:
        self.diff_id = diff_id
        super().__init__(f"no node has layer {diff_id}")


class LayerUnavailable(Unavailable):
    """Nobody who has the layer's chunk answers."""

    def __init__(self, diff_id: str, cause: str) -> None:
        self.diff_id, self.cause = diff_id, cause
        super().__init__(f"layer {diff_id} cannot be read: {cause}")


class BadChunk(DataLoss):
    """A chunk came with other bytes than the layer's table says."""

    def __init__(self, diff_id: str, index: int, endpoint: str = "") -> None:
        self.diff_id, self.index = diff_id, index
        source = f" from layerstore {endpoint}" if endpoint else ""
        super().__init__(f"layer {diff_id}: chunk {index} came{source} with the wrong bytes")


class CacheFull(ResourceExhausted):
    """There is no room for a layer, and all that is here is leased. Sizes in bytes."""

    def __init__(self, node: str, diff_id: str, needed: int, used: int, capacity: int, free: int, reserve: int) -> None:
        self.node, self.diff_id, self.needed, self.used = node, diff_id, needed, used
        self.capacity, self.free, self.reserve = capacity, free, reserve
        super().__init__(
            f"cache of node {node} is full: layer {diff_id} needs {format_size(needed)}, {format_size(used)} of "
            f"{format_size(capacity)} are used and leased, {format_size(free)} free on the disk, of which "
            f"{format_size(reserve)} stay free"
        )


class DiskFull(ResourceExhausted):
    """The file system of the cache has no space left."""

    def __init__(self, layer: str, directory: object) -> None:
        super().__init__(f"layer {layer}: no space left in {directory}")


class DamagedLayer(DataLoss):
    """Bytes of a layer here are not what they were, and not yet repaired; others may have them."""

    def __init__(self, diff_id: str, where: str) -> None:
        self.diff_id = diff_id
        super().__init__(f"layer {diff_id}: {where} is damaged on disk, and not repaired yet")

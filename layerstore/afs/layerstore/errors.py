"""The layerstore's errors; each names the image, layer or registry."""

from collections.abc import Sequence

from afs.core.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unavailable


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


class LayerUnavailable(Unavailable):
    """Nobody who has the layer's chunk answers."""

    def __init__(self, diff_id: str, cause: str) -> None:
        self.diff_id = diff_id
        super().__init__(f"layer {diff_id} cannot be read: {cause}")

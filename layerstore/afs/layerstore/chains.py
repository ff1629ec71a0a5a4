"""Which images have a layer, by its chain id: the digest over the layer and all below it (OCI image spec, config.md).

State (one event loop): ``_images`` has, by the first 8 bytes of every chain id of the images that are known here, those images,
the one learnt last at the end. Its keys are what discovery is told. Chain ids can share those bytes (who wants that needs
2^32 tries), so an answer counts only after the whole chain id was computed from the image. Computing costs 1 us per layer;
keeping whole chain ids would take twice the memory. For 2000 images of 10 layers that have none in common this is 4 MB.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from afs.core.digests import chain_ids, hex_of
from afs.discovery.client import Announcer
from afs.layerstore.manifests import Image, NamedImage


def chain_number(chain_id: str) -> int:
    """What discovery knows of a checked chain id: its first 8 bytes, big-endian."""
    return int(hex_of(chain_id)[:16], 16)


def chains_of(image: Image) -> list[str]:
    """The chain ids of an image's layers, bottom first."""
    return chain_ids(layer.diff_id for layer in image.layers)


class ChainIndex:
    """Of the images that a node knows; see the module."""

    def __init__(self, announcer: Announcer) -> None:
        self._announcer = announcer
        self._images: dict[int, list[NamedImage]] = {}

    def add(self, named: NamedImage) -> None:
        """The image is known."""
        numbers = {chain_number(chain_id) for chain_id in chains_of(named.image)}
        self._announcer.know_chains([number for number in numbers if number not in self._images])
        for number in numbers:
            self._images.setdefault(number, []).append(named)

    def remove(self, image: Image) -> None:
        """The image is not known any more."""
        gone = []
        for number in {chain_number(chain_id) for chain_id in chains_of(image)}:
            left = [named for named in self._images[number] if named.image is not image]
            if left:
                self._images[number] = left
            else:
                del self._images[number]
                gone.append(number)
        self._announcer.forget_chains(gone)

    def find(self, chain_id: str, locations: Collection[str] = ()) -> NamedImage | None:
        """An image with a layer of that chain id, best one from these repositories.

        Else rather one from a registry than from a file, which may be another node's.
        """
        return next(
            self._having(chain_id, lambda named: (named.ref.location not in locations, named.ref.is_local)), None
        )

    def find_stack(self, diff_ids: Sequence[str]) -> NamedImage | None:
        """An image with exactly these layers."""
        if not diff_ids:
            return None
        size = len(diff_ids)
        found = next(self._having(chain_ids(diff_ids)[-1], lambda named: len(named.image.layers) != size), None)
        return found if found is not None and len(found.image.layers) == size else None

    def _having(self, chain_id: str, rank: Callable[[NamedImage], Any]) -> Iterator[NamedImage]:
        """Images with a layer of that chain id by *rank*, of equal ones the one learnt last first."""
        found = self._images.get(chain_number(chain_id), [])[::-1]
        found.sort(key=rank)  # which is stable
        for named in found:
            if chain_id in chains_of(named.image):
                yield named

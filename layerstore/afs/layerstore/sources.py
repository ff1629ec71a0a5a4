"""The right source for an image name."""

from typing import TYPE_CHECKING

from afs.core.images import ImageRef
from afs.layerstore.source import Source, local_source

if TYPE_CHECKING:
    import urllib3

    from afs.layerstore.registryoptions import RegistryOptions


class Sources:
    """Sources that share one pool of connections; usable from threads."""

    def __init__(self, options: "RegistryOptions") -> None:
        self._options = options
        self._pool: urllib3.PoolManager | None = None

    def source(self, ref: ImageRef) -> Source:
        """Where *ref* comes from."""
        if ref.is_local:
            return local_source(ref)
        from afs.layerstore.registry import RegistrySource, make_pool  # urllib3 takes 40 ms to import

        if self._pool is None:
            self._pool = make_pool(self._options)
        return RegistrySource(ref, self._pool, self._options)

    def close(self) -> None:
        """Close idle connections."""
        if self._pool is not None:
            self._pool.clear()

"""The right source for an image name."""

import threading
from typing import TYPE_CHECKING

from afs.core.images import ImageRef
from afs.layerstore.registrystop import Stop
from afs.layerstore.source import Source, local_source

if TYPE_CHECKING:
    from afs.layerstore.registry import Registries
    from afs.layerstore.registryoptions import RegistryOptions

# What registries granted for one repository; see afs.layerstore.registryauth.
Grants = list[tuple[str, str, str, float]]


class Sources:
    """Sources that share connections and tokens; usable from threads."""

    def __init__(self, options: "RegistryOptions") -> None:
        self._options = options
        self._lock = threading.Lock()
        self._registries: Registries | None = None

    def _shared(self) -> "Registries":
        from afs.layerstore.registry import Registries  # urllib3 takes 40 ms to import

        with self._lock:
            if self._registries is None:
                self._registries = Registries(self._options)
            return self._registries

    def source(self, ref: ImageRef, stop: Stop | None = None) -> Source:
        """Where *ref* comes from; *stop* ends its requests. Reads files; raises RegistryMisconfigured."""
        return local_source(ref) if ref.is_local else self._shared().source(ref, stop)

    def grants(self, ref: ImageRef) -> Grants:
        """What registries granted for *ref*'s repository, so that another process need not ask again."""
        return [] if ref.is_local else self._shared().authorizer.export(ref.repository)

    def learn(self, grants: Grants) -> None:
        """Use what another process was granted."""
        if grants:
            self._shared().authorizer.learn(grants)

    def close(self) -> None:
        """Close idle connections."""
        if self._registries is not None:
            self._registries.close()

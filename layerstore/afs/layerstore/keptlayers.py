"""Which layers attached roots need, on disk: a layerstore that starts while the snapshotter is away knows them.

One JSON file, replaced at every change. Mounts end with the machine, so what another boot wrote says nothing.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from afs.core.digests import check_digest
from afs.core.errors import InvalidArgument
from afs.core.files import write_atomic

log = logging.getLogger(__name__)


class KeptLayers:
    """Owns the file *path*; *boot* differs from boot to boot."""

    def __init__(self, path: Path, boot: str) -> None:
        self._path = path
        self._boot = boot

    def load(self) -> frozenset[str]:
        """What :meth:`save` was given last in this boot; nothing if there is no such file, or a damaged one."""
        try:
            found = json.loads(self._path.read_bytes())
            return frozenset(map(check_digest, found["layers"])) if found["boot"] == self._boot else frozenset()
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, KeyError, TypeError, InvalidArgument) as error:
            log.error("what attached roots need is unknown until the snapshotter reports: %s: %s", self._path, error)
            return frozenset()

    def save(self, diff_ids: Iterable[str]) -> None:
        """Replace what is there. An error is logged: this process knows the layers still."""
        data = json.dumps({"boot": self._boot, "layers": sorted(diff_ids)}).encode()
        try:
            write_atomic(self._path, data, durable=False)
        except OSError as error:
            log.error("cannot note what attached roots need: %s: %s", self._path, error)

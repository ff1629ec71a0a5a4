"""The process that downloads and converts layers, and checks them, for :mod:`afs.layerstore.workers`, one after the other.

One JSON object per line. On stdin ``{"image", "layer", "out", "registry", "grants"}`` or ``{"check": path of a layer's file}``;
on stdout an empty one when it is ready, then for each job ``{"done": ...}`` or ``{"error": message, "status": gRPC code,
"errno": number or null}``. It ends when stdin does, or with its parent.

A process of its own because of memory and the GIL: converting two layers of IMG4 at once in the layerstore left 35 MiB
resident for good, in arenas that a few surviving objects pin, and parsing one tar held up the other and the serving of
chunks. Killing the process cancels a pull at once, wherever it is.
"""

import dataclasses
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from afs.core import syscalls
from afs.core.errors import AfsError, status_of
from afs.core.images import parse_image
from afs.core.service import set_up_logging
from afs.layerstore.afslyr.check import check_and_sync
from afs.layerstore.afslyr.convert import Converted, convert
from afs.layerstore.afslyr.errors import DigestMismatch, LayerLimit
from afs.layerstore.manifests import Layer
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registryproxies import Proxies
from afs.layerstore.source import Source
from afs.layerstore.sources import Sources

log = logging.getLogger(__name__)


def encode_options(options: RegistryOptions) -> dict[str, Any]:
    """*options* as JSON values."""
    return {
        **dataclasses.asdict(options),
        "docker_config": str(options.docker_config or ""),
        "hosts_dir": str(options.hosts_dir or ""),
        "authorities": [str(path) for path in options.authorities],
    }


def _options(values: dict[str, Any]) -> RegistryOptions:
    def path(name: str) -> Path | None:
        return Path(values[name]) if values[name] else None

    decoded = {
        "plain_http": tuple(values["plain_http"]),
        "insecure": tuple(values["insecure"]),
        "docker_config": path("docker_config"),
        "hosts_dir": path("hosts_dir"),
        "authorities": tuple(Path(name) for name in values["authorities"]),
        "proxies": Proxies(**values["proxies"]),
    }
    return RegistryOptions(**{**values, **decoded})


def _convert(source: Source, layer: Layer, out: Path) -> Converted:
    """Download and convert; again if a mirror sent something else than the layer, or what may be its bytes or not."""
    while True:
        try:
            with source.open_layer(layer) as read:
                return convert(read, out, diff_id=layer.diff_id, blob_digest=layer.blob_digest)
        except (DigestMismatch, LayerLimit) as error:  # over a limit a blob's digest is not known yet
            if (isinstance(error, DigestMismatch) and error.expected != layer.blob_digest) or not source.distrust():
                raise
            log.warning("layer %s: %s; asking another host", layer.blob_digest, error.line)


class _Worker:
    """What is kept from one job to the next."""

    def __init__(self) -> None:
        self._sources: Sources | None = None

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do *job*."""
        try:
            return {"done": self._check(job) if "check" in job else self._pull(job)}
        except (AfsError, OSError) as error:
            line = error.line if isinstance(error, AfsError) else str(error)
            return {"error": line, "status": status_of(error).grpc, "errno": getattr(error, "errno", None)}
        except Exception as error:  # a mistake of ours; the process is still good for the next job
            log.exception("a job failed: %s", job.get("image") or job.get("check"))
            return {"error": f"{type(error).__name__}: {error}", "status": status_of(error).grpc, "errno": None}

    def _pull(self, job: dict[str, Any]) -> dict[str, Any]:
        if self._sources is None:  # the options of one layerstore never change
            self._sources = Sources(_options(job["registry"]))
        self._sources.learn([tuple(grant) for grant in job["grants"]])
        source = self._sources.source(parse_image(job["image"]))
        return dataclasses.asdict(_convert(source, Layer(**job["layer"]), Path(job["out"])))

    def _check(self, job: dict[str, Any]) -> dict[str, Any]:
        check_and_sync(Path(job["check"]))
        return {}


def main() -> None:
    """Serve jobs until stdin ends."""
    syscalls.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # the layerstore died before we asked
        return
    import afs.layerstore.registry  # noqa: F401 - now, not while somebody waits

    set_up_logging("WARNING")  # to the layerstore's stderr
    sys.stdout.buffer.write(b"{}\n")
    sys.stdout.buffer.flush()
    worker = _Worker()
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(worker.answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

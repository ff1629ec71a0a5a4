"""How to talk to registries. Apart from the client, which is slow to import."""

from dataclasses import dataclass
from pathlib import Path

from afs.layerstore.registryproxies import Proxies


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """Settings for all registries; files may be missing.

    *plain_http* and *insecure* list ``host:port``: of registries without TLS (loopback ones always are), and of those
    whose certificate is not checked and who may do without TLS. *hosts_dir* has a directory for each registry (see
    :mod:`afs.layerstore.registryhosts`), *authorities* are files with certificates to trust besides the system's.
    *connections* is how many a layer of *parallel_from* bytes or more comes through. *stall_s* is how long, in seconds, an answer may pause, and
    *backoff* the first pause before another try.
    """

    plain_http: tuple[str, ...] = ()
    docker_config: Path | None = None
    user_agent: str = "afs"
    node_id: str = ""
    backoff: float = 0.3
    insecure: tuple[str, ...] = ()
    hosts_dir: Path | None = None
    authorities: tuple[Path, ...] = ()
    proxies: Proxies = Proxies()
    connections: int = 4
    parallel_from: int = 16 << 20  # less is not worth the requests, see registrydownload
    stall_s: float = 30.0

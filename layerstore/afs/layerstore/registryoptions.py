"""How to talk to registries. Apart from the client, which is slow to import."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RegistryOptions:
    """*plain_http* lists ``host:port`` of registries without TLS, loopback ones always are; *docker_config* may be missing."""

    plain_http: tuple[str, ...] = ()
    docker_config: Path | None = None
    user_agent: str = "afs"
    node_id: str = ""
    backoff: float = 0.3

"""``afs_discovery_grpcd``: the registry of live layerstores."""

import asyncio
from dataclasses import dataclass

from afs.core.cli import daemon_command
from afs.core.config import setting
from afs.core.service import notify
from afs.core.units import parse_duration

SERVICE = "discovery"


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of afs_discovery_grpcd."""

    listen: str = setting("127.0.0.1:60051", "Address to serve on.")
    heartbeat: float = setting(2.0, "Time between heartbeats of a layerstore.", parse_duration)
    ttl: float = setting(7.0, "Silence after which a layerstore counts as dead.", parse_duration)
    insecure: bool = setting(False, "Serve other than loopback addresses in the clear.")
    log_level: str = setting("INFO", "Least level to log.")


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until *stop* is set."""
    from afs.core.rpc import serving
    from afs.discovery.directory import Directory
    from afs.discovery.server import DiscoveryService
    from afs.proto.v1.discovery_pb2_grpc import add_DiscoveryServicer_to_server

    service = DiscoveryService(Directory(config.ttl), config.heartbeat)
    async with serving(
        [config.listen], lambda server: add_DiscoveryServicer_to_server(service, server), insecure=config.insecure
    ) as bound:
        notify(f"READY=1\nSTATUS=serving on {bound[0]}")
        await stop.wait()


main = daemon_command(
    "afs_discovery_grpcd", SERVICE, Config, serve, "Keep track of the live layerstores and of what they hold."
)

if __name__ == "__main__":
    main()

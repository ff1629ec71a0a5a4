"""``afs_proxy``: dispatches runs to afslets and tells the cluster's status."""

import asyncio
import contextlib
from dataclasses import dataclass

from afs.core.cli import daemon_command
from afs.core.config import setting
from afs.core.service import notify
from afs.core.units import parse_duration

SERVICE = "proxy"


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of afs_proxy."""

    listen: str = setting("127.0.0.1:62051", "Address to serve on.")
    afslets: tuple[str, ...] = setting(("127.0.0.1:61051",), "Address of an afslet; repeatable.")
    discovery: str = setting("127.0.0.1:60051", "Address of afs_discovery_grpcd.")
    poll_interval: float = setting(1.0, "Time between two looks at an afslet's free capacity.", parse_duration)
    lease_ttl: float = setting(
        15.0, "Time until a run ends whose client has vanished, or whose afslet.", parse_duration
    )
    insecure: bool = setting(False, "Serve other than loopback addresses in the clear.")
    log_level: str = setting("INFO", "Least level to log.")


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until *stop* is set."""
    import random

    import grpc.aio

    from afs.core.rpc import serving
    from afs.proto.v1.proxy_pb2_grpc import add_AfsProxyServicer_to_server
    from afs.proxy.forward import Forwarder
    from afs.proxy.nodes import Nodes
    from afs.proxy.status import ProxyService

    async with contextlib.AsyncExitStack() as stack:
        rng = random.Random()  # noqa: S311 - load balancing, not secrets
        nodes = Nodes(config.afslets, config.poll_interval, rng, lease_ttl=config.lease_ttl)
        stack.push_async_callback(nodes.close)
        service = ProxyService(nodes, config.discovery)
        stack.push_async_callback(service.close)

        def register(server: grpc.aio.Server) -> None:
            add_AfsProxyServicer_to_server(service, server)
            server.add_generic_rpc_handlers((Forwarder(nodes),))

        await nodes.poll()
        polling = asyncio.create_task(nodes.run())
        stack.callback(polling.cancel)
        bound = await stack.enter_async_context(
            serving([config.listen], register, insecure=config.insecure, lease_ttl=config.lease_ttl)
        )
        notify(f"READY=1\nSTATUS=serving on {bound[0]}")
        await stop.wait()


main = daemon_command("afs_proxy", SERVICE, Config, serve, "Dispatch runs to the cluster's afslets.")

if __name__ == "__main__":
    main()

"""``afs_proxy``: dispatches runs to afslets and tells the cluster's status."""

import asyncio
import contextlib
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from afs.core.cli import daemon_command
from afs.core.config import setting
from afs.core.service import notify
from afs.core.units import parse_duration

if TYPE_CHECKING:
    from afs.proxy.dispatch import Limits
    from afs.proxy.watching import Timing

SERVICE = "proxy"
_ADDRESSES = "HOST:PORT, or dns:///NAME:PORT for all addresses of a name"
# A run that waits holds what its client has sent and nobody reads: one window. gRPC's own measure, which widens it by what a
# connection could carry, would let 500 uploads that wait take gigabytes.
_WINDOW = 1 << 16
_SERVER_OPTIONS = (("grpc.http2.lookahead_bytes", _WINDOW), ("grpc.http2.bdp_probe", 0))


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of afs_proxy."""

    listen: str = setting("127.0.0.1:62051", "Address to serve on.")
    http_listen: str = setting("127.0.0.1:62052", "Address to serve status and metrics on; nowhere if empty.")
    afslets: tuple[str, ...] = setting(("127.0.0.1:61051",), f"Address of an afslet, {_ADDRESSES}; repeatable.")
    peers: tuple[str, ...] = setting(
        (), f"Where another proxy's status is: {_ADDRESSES}, which may include this one; repeatable."
    )
    discovery: str = setting("127.0.0.1:60051", "Address of afs_discovery_grpcd.")
    dns_interval: float = setting(5.0, "Time between two looks at what names of afslets mean.", parse_duration)
    heartbeat: float = setting(1.0, "How often an afslet tells its status when nothing changes.", parse_duration)
    silence: float = setting(3.0, "Silence after which an afslet counts as unreachable.", parse_duration)
    poll_interval: float = setting(
        1.0, "Time between two looks at the free capacity of an afslet that does not tell it by itself.", parse_duration
    )
    max_queued: int = setting(5000, "Runs that wait for room at the same time.")
    max_queued_tenant: int = setting(2000, "Runs of one tenant that wait for room at the same time.")
    priority_ageing: float = setting(
        10.0, "Waiting time that counts as one level of priority; levels never age if 0.", parse_duration
    )
    bypass_limit: float = setting(
        10.0,
        "How long smaller runs may overtake one that does not fit, before a node makes room for it.",
        parse_duration,
    )
    lost_grace: float = setting(10.0, "How long queued runs wait for nodes of which none answers.", parse_duration)
    idempotency_ttl: float = setting(600.0, "How long the result of an idempotency key is known.", parse_duration)
    idempotency_results: int = setting(10000, "Results of idempotency keys that are known at the same time.")
    lease_ttl: float = setting(
        15.0, "Time until a run ends whose client has vanished, or whose afslet.", parse_duration
    )
    insecure: bool = setting(False, "Serve other than loopback addresses in the clear.")
    log_level: str = setting("INFO", "Least level to log.")


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until *stop* is set."""
    import random

    import grpc.aio

    from afs.core.rpc import channel, serving
    from afs.proto.v1.proxy_pb2_grpc import add_AfsProxyServicer_to_server
    from afs.proto.v1.runs_pb2_grpc import add_RunsServicer_to_server
    from afs.proxy import idempotency
    from afs.proxy.dispatch import Dispatcher
    from afs.proxy.endpoints import Endpoints
    from afs.proxy.forward import Forwarder
    from afs.proxy.metrics import Metrics
    from afs.proxy.nodes import Nodes
    from afs.proxy.pages import pages
    from afs.proxy.peers import PeerWatch
    from afs.proxy.runs import RunsService
    from afs.proxy.status import ProxyService
    from afs.proxy.watching import Watcher

    async with contextlib.AsyncExitStack() as stack:
        rng = random.Random()  # noqa: S311 - load balancing, not secrets
        nodes = Nodes((), rng, open_channel=functools.partial(channel, lease_ttl=config.lease_ttl))
        stack.push_async_callback(nodes.close)
        dispatcher = Dispatcher(nodes, _limits(config))
        metrics = Metrics(dispatcher)
        dispatcher.observe_wait = metrics.observe_wait
        watcher = Watcher(nodes, Endpoints(config.afslets), _timing(config))
        stack.push_async_callback(watcher.close)
        peers = PeerWatch(config.peers)
        stack.push_async_callback(peers.close)
        service = ProxyService(dispatcher, watcher, peers, config.discovery)
        stack.push_async_callback(service.close)
        results = idempotency.Runs(config.idempotency_ttl, config.idempotency_results)
        forwarder = Forwarder(dispatcher, results, metrics.count, config.lease_ttl)
        stack.push_async_callback(forwarder.close)

        def register(server: grpc.aio.Server) -> None:
            add_AfsProxyServicer_to_server(service, server)
            add_RunsServicer_to_server(RunsService(nodes, forwarder.runs), server)
            server.add_generic_rpc_handlers((forwarder,))

        await watcher.start()
        stack.callback(asyncio.create_task(dispatcher.run(), name="queue").cancel)
        grpc_server = serving(
            [config.listen], register, insecure=config.insecure, options=_SERVER_OPTIONS, lease_ttl=config.lease_ttl
        )
        bound = await stack.enter_async_context(grpc_server)
        stack.callback(dispatcher.close)  # before the server: those that wait may try another proxy
        http = await stack.enter_async_context(pages(config.http_listen, service, metrics, insecure=config.insecure))
        notify(f"READY=1\nSTATUS=serving on {bound[0]}\nX_AFS_HTTP={http}")
        await stop.wait()


def _limits(config: Config) -> "Limits":
    from afs.proxy.dispatch import Limits

    return Limits(
        config.max_queued, config.max_queued_tenant, config.priority_ageing, config.bypass_limit, config.lost_grace
    )


def _timing(config: Config) -> "Timing":
    from afs.proxy.watching import Timing

    return Timing(config.heartbeat, config.silence, config.poll_interval, config.dns_interval)


main = daemon_command("afs_proxy", SERVICE, Config, serve, "Dispatch runs to the cluster's afslets.")

if __name__ == "__main__":
    main()

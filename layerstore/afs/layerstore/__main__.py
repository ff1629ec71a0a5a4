"""``afs_layerstore_grpcd``: the node's cache of layers, and its server to peers."""

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afs.core.cli import daemon_command
from afs.core.config import setting
from afs.core.errors import InvalidArgument
from afs.core.service import notify
from afs.core.units import parse_duration, parse_size

if TYPE_CHECKING:
    from afs.layerstore.registryoptions import RegistryOptions

log = logging.getLogger(__name__)
SERVICE = "layerstore"
_EVERYWHERE = ("", "0.0.0.0", "::")  # noqa: S104 - looked for, not bound


def parse_mode(text: str) -> str:
    """A value of ``completion``; InvalidArgument if it is none."""
    if text not in ("always", "idle", "never"):
        raise InvalidArgument(f"{text!r} is none of always, idle, never")
    return text


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of afs_layerstore_grpcd."""

    root: Path = setting(Path("/var/lib/afs/layerstore"), "Directory of the cache.")
    run_dir: Path = setting(Path("/run/afs"), "Directory of the unix sockets.")
    listen: str = setting("127.0.0.1:50051", "Address to serve peers on.")
    chunk_port: int = setting(
        50052, "Port, on the host of `listen`, where peers read chunks; the kernel's choice if 0."
    )
    advertise: str = setting("", "Address that peers use, if it is not the one listened on.")
    node_id: str = setting("", "Name of this node in the cluster; the host name if empty.")
    discovery: str = setting("127.0.0.1:60051", "Address of afs_discovery_grpcd.")
    capacity: int = setting(
        0,
        "Size of the cache, and the node's weight in placement; nine tenths of what is free and its own if 0.",
        parse_size,
    )
    reserve: int = setting(
        0,
        "Space that the cache leaves free on its file system; a twentieth of it, at most 1 GiB, if 0.",
        parse_size,
    )
    scrub_interval: float = setting(
        7 * 86400.0,
        "How often every complete layer is verified, besides once after each boot; neither, nor sealed, if 0.",
        parse_duration,
    )
    verity: bool = setting(True, "Seal complete layers with fs-verity where kernel and file system have it.")
    lease_grace: float = setting(
        30.0, "How long layers stay leased after the snapshotter went away, or this service started.", parse_duration
    )
    image_ttl: float = setting(300.0, "How long a tag is believed before the registry is asked again.", parse_duration)
    read_deadline: float = setting(
        30.0, "How long a chunk may take, over all tries, before readers get EIO.", parse_duration
    )
    completion: str = setting(
        "idle",
        "When partial layers that are in use are completed: always, never, or idle: when no reader had to wait for five seconds.",
        parse_mode,
    )
    completion_rate: int = setting(
        64 << 20, "Bytes per second that completing layers may take; no limit if 0.", parse_size
    )
    traces: bool = setting(
        True, "Record which chunks a starting image reads, share that, and fetch them ahead when it starts elsewhere."
    )
    pulls: int = setting(2, "Layers pulled at the same time.")
    plain_http: tuple[str, ...] = setting((), "HOST:PORT of a registry without TLS; loopback ones always are.")
    insecure_registry: tuple[str, ...] = setting(
        (), "HOST:PORT of a registry whose certificate is not checked, and which may do without TLS."
    )
    registry_config: Path = setting(
        Path("/etc/afs/certs.d"), "Directory with a HOST:PORT/hosts.toml for each registry, as containerd's."
    )
    registry_cas: tuple[str, ...] = setting((), "File with certificates to trust besides the system's.")
    docker_config: Path = setting(Path("/root/.docker/config.json"), "Docker's file of registry credentials.")
    download_connections: int = setting(4, "Connections that a large layer is downloaded through.")
    insecure: bool = setting(False, "Serve other than loopback addresses in the clear.")
    log_level: str = setting("INFO", "Least level to log.")


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until *stop* is set."""
    import grpc.aio

    import afs.layerstore.registry  # noqa: F401 - urllib3 takes 40 ms: now, not while the first image waits
    from afs.core.files import locked
    from afs.core.rpc import serving
    from afs.core.service import raise_file_limit
    from afs.discovery.client import Announcer, Peer
    from afs.layerstore.chunkserver import serving_chunks
    from afs.layerstore.completion import Completing, Mode
    from afs.layerstore.fillserver import serving_fills
    from afs.layerstore.images import Images
    from afs.layerstore.keptlayers import KeptLayers
    from afs.layerstore.layers import Layers
    from afs.layerstore.leases import Leases
    from afs.layerstore.peers import Peers
    from afs.layerstore.pull import Puller
    from afs.layerstore.quota import Quota
    from afs.layerstore.room import Room
    from afs.layerstore.scrub import Scrubber
    from afs.layerstore.sealing import Sealer, supported
    from afs.layerstore.server import NodeService, PeerService
    from afs.layerstore.store import LayerStore
    from afs.layerstore.supplying import Supplying
    from afs.layerstore.tracefiles import TraceFiles
    from afs.layerstore.tracing import Tracing
    from afs.proto.v1 import layerstore_pb2_grpc as pb_grpc

    if config.insecure and not config.advertise and config.listen.rpartition(":")[0].strip("[]") in _EVERYWHERE:
        raise InvalidArgument(
            f"--listen {config.listen} is no address that peers could use: give --advertise HOST:PORT"
        )
    raise_file_limit()  # a partial layer takes two
    node_id = config.node_id or socket.gethostname()
    config.run_dir.mkdir(parents=True, exist_ok=True)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(locked(config.run_dir / "layerstore.lock", "afs_layerstore_grpcd"))
        store = LayerStore(config.root)
        stack.callback(store.close)
        sealer = Sealer() if config.verity and config.scrub_interval and supported(store.root / "tmp") else None
        if sealer is not None:
            stack.callback(sealer.close)
        capacity = config.capacity or store.default_capacity()
        headroom, kept = config.reserve or store.default_headroom(), KeptLayers(store.root / "kept.json", _boot())
        leases = Leases(config.lease_grace, kept=kept.load())
        leases.remember = kept.save
        room = Room(store, Quota(capacity), leases, headroom=headroom, node=node_id)
        puller = Puller(store, room, _registry_options(config, node_id), config.pulls)
        stack.push_async_callback(puller.close)
        await puller.start()
        peers = Peers()
        stack.push_async_callback(peers.close)
        announcer = Announcer(config.discovery, Peer(node_id, config.advertise or config.listen, capacity))
        stack.push_async_callback(announcer.leave)
        how = Completing(Mode(config.completion), config.completion_rate)
        layers = Layers(store, room, puller, peers, announcer, config.read_deadline, how)
        layers.repairs.sealer = sealer
        await asyncio.to_thread(layers.restore)
        stack.push_async_callback(layers.close)
        images = Images(store, puller, peers, announcer, config.image_ttl)
        stack.push_async_callback(images.close)
        tracing = Tracing(TraceFiles(store.traces_dir), layers, room, peers, announcer, enabled=config.traces)
        await asyncio.to_thread(tracing.restore, images.manifests())
        stack.push_async_callback(tracing.close)
        images.on_gone = tracing.forget
        supplying = Supplying(images, layers, peers, announcer)
        stack.push_async_callback(supplying.close)
        peer_service = PeerService(images, layers, tracing)
        node_service = NodeService(images, layers, room, tracing, supplying)

        def to_peers(server: grpc.aio.Server) -> None:
            pb_grpc.add_LayerstorePeerServicer_to_server(peer_service, server)

        def to_node(server: grpc.aio.Server) -> None:
            pb_grpc.add_LayerstoreNodeServicer_to_server(node_service, server)
            to_peers(server)

        leases.serve()  # before anybody can be told anything
        await stack.enter_async_context(serving_fills(config.run_dir / "fill.sock", layers))
        await stack.enter_async_context(serving([f"unix:{config.run_dir}/layerstore.sock"], to_node))
        bound = await stack.enter_async_context(serving([config.listen], to_peers, insecure=config.insecure))
        host = config.listen.rpartition(":")[0].strip("[]")
        chunks = await stack.enter_async_context(
            serving_chunks(host, config.chunk_port, peer_service.read_chunk, peer_service.find_chunk)
        )
        announcer.serve_at(config.advertise or bound[0], chunks)
        await announcer.flush()
        _in_background(stack, announcer.run())
        _in_background(stack, room.run())
        _in_background(stack, layers.completion.run())
        if config.scrub_interval:
            check, interval = layers.repairs.check, config.scrub_interval
            _in_background(stack, Scrubber(store, leases, check, interval, boot=_boot(), sealer=sealer).run())
        # What a thread received for a reader waits for the interpreter, which the event loop gives away after this time at
        # the latest, or when it has nothing to do. By default 5 ms: as long as two chunks take.
        sys.setswitchinterval(0.0005)
        notify(f"READY=1\nSTATUS=serving on {bound[0]}")
        await stop.wait()


def _boot() -> str:
    """Another one after each boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _registry_options(config: Config, node_id: str) -> "RegistryOptions":
    from afs.core.version import version
    from afs.layerstore.registryoptions import RegistryOptions
    from afs.layerstore.registryproxies import proxies_from

    return RegistryOptions(
        plain_http=config.plain_http,
        docker_config=config.docker_config,
        user_agent=f"afs/{version()}",
        node_id=node_id,
        insecure=config.insecure_registry,
        hosts_dir=config.registry_config,
        authorities=tuple(Path(name) for name in config.registry_cas),
        proxies=proxies_from(os.environ),
        connections=config.download_connections,
    )


def _in_background(stack: contextlib.AsyncExitStack, work: Coroutine[Any, Any, None]) -> None:
    """Run what has no end until *stack* closes."""
    task = asyncio.create_task(work)

    def ended(_: object) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s ended", task.get_coro(), exc_info=error)

    async def cancel() -> None:
        task.cancel()
        await asyncio.wait([task])

    task.add_done_callback(ended)
    stack.push_async_callback(cancel)


main = daemon_command(
    "afs_layerstore_grpcd", SERVICE, Config, serve, "Keep this node's layers and serve their chunks to peers."
)

if __name__ == "__main__":
    main()

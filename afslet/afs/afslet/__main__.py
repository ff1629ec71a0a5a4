"""``afslet``: the execution service of a node."""

import asyncio
import contextlib
import hashlib
import os
import re
import resource
import signal
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from afs.afslet.isolation import DEFAULT_ID_COUNT, DEFAULT_ID_FIRST, OFF, parse_user_namespace
from afs.core.cli import daemon_command
from afs.core.config import setting
from afs.core.errors import Internal
from afs.core.service import notify
from afs.core.units import parse_duration

if TYPE_CHECKING:
    import grpc.aio

    from afs.afslet.admission import Capacity
    from afs.afslet.execution import Node
    from afs.afslet.remains import Remains
    from afs.snapshotter.client import Mounts

SERVICE = "afslet"
MAX_FILES = 524288  # as systemd gives services


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of afslet."""

    root: Path = setting(
        Path("/var/lib/afs/afslet"), "Directory for uploads and bundles, on a file system fit for overlayfs."
    )
    run_dir: Path = setting(Path("/run/afs"), "Directory of the snapshotter's socket and of the runtime's state.")
    listen: str = setting("127.0.0.1:61051", "Address to serve on.")
    node_id: str = setting("", "Name of this node in the cluster; the host name if empty.")
    cpu_cores: int = setting(0, "CPU cores to give away; all of the machine's if 0.")
    memory_mb: int = setting(0, "MiB of memory to give away; nine tenths of the machine's if 0.")
    disk_mb: int = setting(0, "MiB that all runs together may write; not limited if 0.")
    max_runs: int = setting(0, "Runs at once; not limited if 0.")
    max_disk_mb: int = setting(
        10240, "MiB that one run may write, and what it gets if it asks for none; not limited if 0."
    )
    max_pids: int = setting(4096, "Processes and threads of one run.")
    max_queued: int = setting(0, "Runs that wait here for room, of clients that do not come through a proxy.")
    runtime: str = setting("runc", "OCI runtime.")
    default_timeout: float = setting(3600.0, "Timeout of a run that asks for none.", parse_duration)
    term_grace: float = setting(2.0, "Time between SIGTERM and SIGKILL after a timeout.", parse_duration)
    lease_ttl: float = setting(
        15.0, "Time until nothing is left of a run whose client, proxy or afslet has vanished.", parse_duration
    )
    drain_timeout: float = setting(
        20.0, "How long runs under way may go on after SIGTERM; a second one ends them at once.", parse_duration
    )
    warm_roots: int = setting(8, "Unused roots that are kept mounted for the next runs of their images.")
    seccomp: str = setting(
        "", "Seccomp profile: a file, or unconfined. If empty, /usr/share/containers/seccomp.json, made stricter."
    )
    programs_32bit: bool = setting(
        False, "Allow 32-bit programs in all runs, not only in images that have a loader for them; starts take longer."
    )
    user_namespace: str = setting(
        OFF, "User namespaces: off or on, unless the request says otherwise, or required.", parse_user_namespace
    )
    id_first: int = setting(DEFAULT_ID_FIRST, "User and group that root of a user namespace is outside.")
    id_count: int = setting(DEFAULT_ID_COUNT, "How many ids a user namespace has.")
    network_default: str = setting("none", "Network of a run that asks for none: none, bridge or host.")
    networks_allowed: tuple[str, ...] = setting(("none", "bridge"), "Networks that runs may have.")
    network_pool: int = setting(16, "Network namespaces that are made ahead of runs.")
    bridge_subnet: str = setting("100.127.0.0/16", "Private network that the bridge takes a part of (a /20).")
    egress_allow: tuple[str, ...] = setting(
        (), "ADDRESS[/BITS][:PORT] that runs on the bridge may reach although it is private."
    )
    egress_deny: tuple[str, ...] = setting((), "ADDRESS[/BITS][:PORT] that runs on the bridge may not reach.")
    egress_connections: int = setting(4096, "Connections that one run on the bridge may have at a time.")
    name_servers: tuple[str, ...] = setting((), "Address of a name server of runs on the bridge; the node's if empty.")
    insecure: bool = setting(False, "Serve other than loopback addresses in the clear.")
    log_level: str = setting("INFO", "Least level to log.")


def cgroup_parent(node_id: str, root: Path) -> str:
    """A name for the node's cgroups that no other afslet of this machine has: it uses another root."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "-", node_id)[:40]
    return f"afs-{readable}-{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8]}"


async def serve(config: Config, stop: asyncio.Event) -> None:
    """Serve until *stop* is set, and until the runs that are under way then have ended."""
    from afs.afslet.keeping import kept
    from afs.afslet.locks import take
    from afs.afslet.remains import Remains, clean_up
    from afs.afslet.runs import Runs
    from afs.afslet.server import AfsletService, RunsService
    from afs.core.rpc import serving
    from afs.proto.v1.afslet_pb2_grpc import add_AfsletServicer_to_server
    from afs.proto.v1.runs_pb2_grpc import add_RunsServicer_to_server
    from afs.snapshotter.client import Mounts

    node_id = config.node_id or socket.gethostname()
    parent = cgroup_parent(node_id, config.root)
    runs = Runs(node_id, _capacity(config), config.max_queued)
    for directory in (config.root, config.run_dir):
        directory.mkdir(parents=True, exist_ok=True)
    remains = Remains(str(config.root.resolve()), str(config.run_dir.resolve()), parent)
    async with contextlib.AsyncExitStack() as stack:
        await take(stack.enter_context(contextlib.ExitStack()), remains.locks)
        await stack.enter_async_context(kept(remains, config.lease_ttl))
        await asyncio.to_thread(clean_up, remains, "an earlier afslet")
        stack.push_async_callback(_clean_up, remains)
        for directory in (remains.scratch, remains.state, remains.networks):
            directory.mkdir(mode=0o700)  # uploads may hold setuid files
        mounts = Mounts(f"unix:{config.run_dir}/mounts.sock", lease_ttl=config.lease_ttl)
        stack.push_async_callback(mounts.close)
        service = AfsletService(await _node(stack, config, node_id, remains, mounts), runs)
        status = RunsService(runs)

        def register(server: "grpc.aio.Server") -> None:
            add_AfsletServicer_to_server(service, server)
            add_RunsServicer_to_server(status, server)

        bound = await stack.enter_async_context(
            serving([config.listen], register, insecure=config.insecure, lease_ttl=config.lease_ttl)
        )
        for signum, action in ((signal.SIGUSR1, runs.drain), (signal.SIGUSR2, runs.resume)):
            asyncio.get_running_loop().add_signal_handler(signum, action)
        notify(f"READY=1\nSTATUS=serving on {bound[0]}")
        await stop.wait()
        await runs.end_all(config.drain_timeout, _second_signal())
        status.close()


async def _node(
    stack: contextlib.AsyncExitStack, config: Config, node_id: str, remains: "Remains", mounts: "Mounts"
) -> "Node":
    """What all runs share, until *stack* closes."""
    from afs.afslet.command import Commands
    from afs.afslet.execution import Node, RunSettings
    from afs.afslet.fastattach import FastAttach
    from afs.afslet.isolation import load_isolation
    from afs.afslet.networks import Networks, NetworkSettings
    from afs.afslet.runc import Runtime, become_subreaper
    from afs.afslet.runtimebinary import RuntimeBinary
    from afs.afslet.warmroots import WarmRoots
    from afs.core.files import remove_tree

    files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MAX_FILES)
    binary = RuntimeBinary(config.runtime)
    stack.callback(binary.close)
    become_subreaper()
    attach = FastAttach()
    stack.callback(attach.close)
    settings = NetworkSettings(**{field.name: getattr(config, field.name) for field in fields(NetworkSettings)})
    stack.callback(remove_tree, remains.networks)
    networks = Networks(settings, remains.cgroup_parent, remains.networks)
    await networks.start()
    stack.push_async_callback(networks.close)
    roots = WarmRoots(mounts, config.warm_roots)
    stack.push_async_callback(roots.close)
    return Node(
        node_id,
        remains.scratch,
        roots,
        Runtime(binary, remains.state, remains.cgroup_parent, files),
        RunSettings(config.default_timeout, config.term_grace),
        attach,
        Commands(),
        load_isolation(
            config.seccomp,
            config.user_namespace,
            config.id_first,
            config.id_count,
            programs_32bit=config.programs_32bit,
        ),
        networks,
    )


def _capacity(config: Config) -> "Capacity":
    from afs.afslet.admission import Capacity

    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    cpus, memory = config.cpu_cores or os.cpu_count() or 1, config.memory_mb or total * 9 // 10
    return Capacity(cpus * 1000, memory, config.disk_mb, config.max_runs, config.max_disk_mb, config.max_pids)


def _second_signal() -> asyncio.Event:
    """Set by the next SIGTERM or SIGINT: whoever sends one more does not want to wait."""
    hurry = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, hurry.set)
    return hurry


async def _clean_up(remains: "Remains") -> None:
    from afs.afslet.remains import clean_up

    if not await asyncio.to_thread(clean_up, remains, "this afslet"):
        raise Internal("something is left of the runs; see the log")


main = daemon_command("afslet", SERVICE, Config, serve, "Run commands in images on this node.")

if __name__ == "__main__":
    main()

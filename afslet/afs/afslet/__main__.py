"""``afslet``: the execution service of a node."""

import asyncio
import contextlib
import hashlib
import logging
import os
import re
import resource
import socket
from dataclasses import dataclass, fields
from pathlib import Path

from afs.afslet.isolation import DEFAULT_ID_COUNT, DEFAULT_ID_FIRST, OFF, load_isolation, parse_user_namespace
from afs.core.cli import daemon_command
from afs.core.config import setting
from afs.core.service import notify
from afs.core.units import parse_duration

log = logging.getLogger(__name__)
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
    runtime: str = setting("runc", "OCI runtime.")
    max_pids: int = setting(4096, "Processes and threads of one run.")
    default_timeout: float = setting(3600.0, "Timeout of a run that asks for none.", parse_duration)
    term_grace: float = setting(2.0, "Time between SIGTERM and SIGKILL after a timeout.", parse_duration)
    warm_roots: int = setting(8, "Unused roots that are kept mounted for the next runs of their images.")
    seccomp: str = setting(
        "", "Seccomp profile: a file, or unconfined. If empty, /usr/share/containers/seccomp.json, made stricter."
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
    """Serve until *stop* is set."""
    from afs.afslet.admission import Admission, Capacity
    from afs.afslet.cgroups import clean_up
    from afs.afslet.command import Commands
    from afs.afslet.execution import Node, RunSettings
    from afs.afslet.fastattach import FastAttach
    from afs.afslet.networks import Networks, NetworkSettings
    from afs.afslet.runc import Runtime, become_subreaper
    from afs.afslet.runtimebinary import RuntimeBinary
    from afs.afslet.server import AfsletService
    from afs.afslet.warmroots import WarmRoots
    from afs.core.files import locked, remove_tree
    from afs.core.rpc import serving
    from afs.proto.v1.afslet_pb2_grpc import add_AfsletServicer_to_server
    from afs.snapshotter.client import Mounts

    node_id = config.node_id or socket.gethostname()
    scratch, state = config.root / "runs", config.run_dir / "runtime"
    for directory in (config.root, config.run_dir):
        directory.mkdir(parents=True, exist_ok=True)
    parent = cgroup_parent(node_id, config.root)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(locked(config.root / "lock", "afslet"))
        stack.enter_context(locked(config.run_dir / "afslet.lock", "afslet"))
        if left := await asyncio.to_thread(clean_up, parent):
            log.warning("killed %d runs that an earlier afslet left", left)
        stack.callback(clean_up, parent)
        files_directory = config.root / "network"
        for directory in (scratch, state, files_directory):
            remove_tree(directory)
            directory.mkdir(parents=True, mode=0o700)  # uploads may hold setuid files
            stack.callback(remove_tree, directory)
        mounts = Mounts(f"unix:{config.run_dir}/mounts.sock")
        stack.push_async_callback(mounts.close)
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        limit = Capacity(config.cpu_cores or os.cpu_count() or 1, config.memory_mb or total * 9 // 10)
        files = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], MAX_FILES)
        binary = RuntimeBinary(config.runtime)
        stack.callback(binary.close)
        become_subreaper()
        attach = FastAttach()
        stack.callback(attach.close)
        roots = WarmRoots(mounts, config.warm_roots)
        stack.push_async_callback(roots.close)
        settings = NetworkSettings(**{field.name: getattr(config, field.name) for field in fields(NetworkSettings)})
        networks = Networks(settings, parent, files_directory)
        await networks.start()
        stack.push_async_callback(networks.close)
        isolation = load_isolation(config.seccomp, config.user_namespace, config.id_first, config.id_count)
        node = Node(
            node_id,
            scratch,
            roots,
            Admission(limit),
            Runtime(binary, state, parent, files),
            RunSettings(config.default_timeout, config.term_grace, config.max_pids),
            attach,
            Commands(),
            isolation,
            networks,
        )
        service = AfsletService(node)
        stack.push_async_callback(service.drained)
        bound = await stack.enter_async_context(
            serving(
                [config.listen], lambda server: add_AfsletServicer_to_server(service, server), insecure=config.insecure
            )
        )
        notify(f"READY=1\nSTATUS=serving on {bound[0]}")
        await stop.wait()


main = daemon_command("afslet", SERVICE, Config, serve, "Run commands in images on this node.")

if __name__ == "__main__":
    main()

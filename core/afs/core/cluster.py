"""A whole cluster as child processes on this machine: discovery, nodes (layerstore, snapshotter, afslet), proxy.

For ``afs up`` and for tests. Readiness comes from each process by sd_notify(3), never from waiting; the ports are the
kernel's choice unless given, and each process tells the one it got.
"""

import asyncio
import contextlib
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from afs.core.errors import Internal
from afs.core.run import Child, popen, stop, wait

START_TIMEOUT_S = 120.0  # for hangs: a death is noticed at once, and in an emulated machine a start takes half a minute
STOP_GRACE_S = 10.0


@dataclass(slots=True)
class Process:
    """One service; *address* is what it serves on, empty for the snapshotter; *http* where the proxy's status is."""

    name: str
    popen: Child
    log: Path
    address: str = ""
    http: str = ""


async def start_process(
    name: str, module: str, arguments: Sequence[str], directory: Path, *, prefix: Sequence[str] = ()
) -> Process:
    """Start ``python -m module`` and wait until it says READY=1; Internal with the end of its log if it dies.

    *prefix* is the beginning of a command line that executes the rest in place of itself, as nsenter(1) does.
    """
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    log = directory / "logs" / f"{name}.log"
    path = directory / f"{name}.notify"
    path.unlink(missing_ok=True)
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        )
        sock.bind(str(path))
        stack.callback(path.unlink, missing_ok=True)
        with log.open("ab") as out:
            child = popen(
                [*prefix, sys.executable, "-m", module, *arguments],
                stdout=out,
                stderr=out,
                env={**os.environ, "NOTIFY_SOCKET": str(path), "AFS_PARENT_PID": str(os.getpid())},
                new_session=True,  # a terminal's Ctrl-C is for us; we stop them in order
            )
        process = Process(name, child, log)
        try:
            process.address, process.http = await _ready(process, sock)
        except BaseException:
            child.kill()
            child.wait()
            raise
    return process


async def _ready(process: Process, sock: socket.socket) -> tuple[str, str]:
    ended = asyncio.create_task(wait(process.popen))
    said = asyncio.create_task(_read_ready(sock))
    try:
        done, _ = await asyncio.wait([ended, said], timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if said in done:
            return said.result()
        why = f"ended with status {ended.result()}" if ended in done else f"is not ready after {START_TIMEOUT_S:.0f} s"
        lines = process.log.read_text(errors="replace").splitlines()
        raise Internal(f"{process.name} {why}: {lines[-1] if lines else 'it logged nothing'} (log: {process.log})")
    finally:
        for task in (ended, said):
            task.cancel()
        await asyncio.gather(ended, said, return_exceptions=True)


async def _read_ready(sock: socket.socket) -> tuple[str, str]:
    """The addresses, for gRPC and for HTTP, in the datagram that says READY=1."""
    loop = asyncio.get_running_loop()
    while True:
        lines = (await loop.sock_recv(sock, 4096)).decode().splitlines()
        if "READY=1" in lines:
            marks = ("STATUS=serving on ", "X_AFS_HTTP=")
            grpc, http = (next((line[len(m) :] for line in lines if line.startswith(m)), "") for m in marks)
            return grpc, http


@dataclass(slots=True)
class NodeProcesses:
    """The three services of a node."""

    node_id: str
    directory: Path
    layerstore: Process
    snapshotter: Process
    afslet: Process

    @property
    def run_dir(self) -> Path:
        """Where its sockets and layer mounts are."""
        return self.directory / "run"


@dataclass(frozen=True, slots=True)
class Settings:
    """*cpus* and *memory_mb* are per node (0: the machine's). Ports are those of the first node; 0 lets the kernel choose."""

    directory: Path
    cpus: int = 0
    memory_mb: int = 0
    discovery_port: int = 0
    layerstore_port: int = 0
    afslet_port: int = 0
    proxy_port: int = 0
    proxy_http_port: int = 0
    layerstore_flags: tuple[str, ...] = ()
    snapshotter_flags: tuple[str, ...] = ()
    afslet_flags: tuple[str, ...] = ()
    proxy_flags: tuple[str, ...] = ()


@dataclass(slots=True)
class Cluster:
    """Start it piece by piece, or with :meth:`start`; :meth:`close` stops what runs, in order."""

    settings: Settings
    discovery: Process | None = None
    proxy: Process | None = None
    nodes: list[NodeProcesses] = field(default_factory=list)

    async def start(self, nodes: int) -> None:
        """Discovery, *nodes* nodes and the proxy."""
        self.settings.directory.mkdir(parents=True, exist_ok=True)
        await self.start_discovery()
        started = await asyncio.gather(
            *(self.start_node(number) for number in range(1, nodes + 1)), return_exceptions=True
        )
        for result in started:
            if isinstance(result, BaseException):
                raise result
        self.nodes.sort(key=lambda node: node.node_id)
        await self.start_proxy()

    async def start_discovery(self) -> Process:
        """Start afs_discovery_grpcd."""
        arguments = [f"--listen=127.0.0.1:{self.settings.discovery_port}", "--heartbeat=500ms", "--ttl=3s"]
        self.discovery = await start_process("discovery", "afs.discovery", arguments, self.settings.directory)
        return self.discovery

    async def start_node(self, number: int) -> NodeProcesses:
        """Start node *number*, counted from 1; its id is ``node<number>``."""
        if self.discovery is None:
            raise Internal("discovery has to be started before nodes")
        settings, node_id = self.settings, f"node{number}"
        directory = settings.directory / node_id
        run_dir = directory / "run"

        def port(first: int) -> int:
            return first + number - 1 if first else 0

        async with contextlib.AsyncExitStack() as stack:
            started: list[Process] = []
            stack.push_async_callback(_stop_all, started)
            arguments = [f"--root={directory}/layerstore", f"--run-dir={run_dir}", f"--node-id={node_id}"]
            arguments += [
                f"--discovery={self.discovery.address}",
                f"--listen=127.0.0.1:{port(settings.layerstore_port)}",
                "--chunk-port=0",
            ]
            started.append(
                await start_process(
                    f"{node_id}-layerstore",
                    "afs.layerstore",
                    [*arguments, *settings.layerstore_flags],
                    settings.directory,
                )
            )
            arguments = [f"--root={directory}/snapshotter", f"--run-dir={run_dir}", "--no-keep-mounts"]
            arguments += [f"--layerstore-root={directory}/layerstore", *settings.snapshotter_flags]
            started.append(
                await start_process(f"{node_id}-snapshotter", "afs.snapshotter", arguments, settings.directory)
            )
            arguments = [f"--root={directory}/afslet", f"--run-dir={run_dir}", f"--node-id={node_id}"]
            arguments += [f"--cpu-cores={settings.cpus}", f"--memory-mb={settings.memory_mb}", "--drain-timeout=1s"]
            arguments += [f"--listen=127.0.0.1:{port(settings.afslet_port)}", *settings.afslet_flags]
            started.append(await start_process(f"{node_id}-afslet", "afs.afslet", arguments, settings.directory))
            stack.pop_all()
        node = NodeProcesses(node_id, directory, *started)
        self.nodes.append(node)
        return node

    async def start_proxy(self) -> Process:
        """Start afs_proxy over the nodes that are there."""
        if self.discovery is None:
            raise Internal("discovery has to be started before the proxy")
        arguments = [f"--listen=127.0.0.1:{self.settings.proxy_port}", f"--discovery={self.discovery.address}"]
        arguments += [f"--http-listen=127.0.0.1:{self.settings.proxy_http_port}"]
        arguments += [f"--afslet={node.afslet.address}" for node in self.nodes]
        arguments += self.settings.proxy_flags
        self.proxy = await start_process("proxy", "afs.proxy", arguments, self.settings.directory)
        return self.proxy

    def processes(self) -> list[Process]:
        """All that were started, in the order in which they are to stop."""
        nodes = self.nodes
        found = [
            self.proxy,
            *(n.afslet for n in nodes),
            *(n.snapshotter for n in nodes),
            *(n.layerstore for n in nodes),
        ]
        return [process for process in (*found, self.discovery) if process is not None]

    async def close(self) -> None:
        """Stop everything: proxy, afslets, snapshotters (which unmount), layerstores, discovery."""
        nodes = self.nodes
        for tier in (
            [self.proxy],
            [node.afslet for node in nodes],
            [node.snapshotter for node in nodes],
            [node.layerstore for node in nodes],
            [self.discovery],
        ):
            await _stop_all([process for process in tier if process is not None])
        self.nodes, self.proxy, self.discovery = [], None, None


async def _stop_all(processes: Sequence[Process]) -> None:
    await asyncio.gather(*(stop(process.popen, STOP_GRACE_S) for process in reversed(processes)))

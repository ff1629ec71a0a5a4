"""A real cluster for tests: every service a process of its own, on loopback ports and unix sockets, below one directory."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from afs.afslet.__main__ import cgroup_parent
from afs.client import AfsClient
from afs.client.sync import SyncAfsClient
from afs.core.cluster import Cluster, NodeProcesses, Process, Settings, start_process
from afs.core.mounts import list_mounts
from afs.core.rpc import channel
from afs.proto.v1 import afslet_pb2
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from tests.testbed import leaks
from tests.testbed.mounts import cgroups

if TYPE_CHECKING:
    from collections.abc import Iterator

BIN = Path(sys.executable).parent


class RealCluster:
    """Made by `cluster`. `cluster.nodes[0]` is node1. All methods block."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory = directory
        self.cluster = Cluster(settings)
        self.exemptions: ExitStack | None = None

    @property
    def proxy(self) -> str:
        """Address of afs_proxy."""
        assert self.cluster.proxy is not None
        return self.cluster.proxy.address

    @property
    def proxy_http(self) -> str:
        """Where afs_proxy serves its status over HTTP."""
        assert self.cluster.proxy is not None
        return self.cluster.proxy.http

    @property
    def nodes(self) -> list[NodeProcesses]:
        """The nodes, in order."""
        return self.cluster.nodes

    def start_node(self, number: int) -> NodeProcesses:
        """Start one more node (or one anew)."""
        return asyncio.run(self.cluster.start_node(number))

    def restart_proxy(self) -> None:
        """Start the proxy anew over the nodes that are there now."""
        if self.cluster.proxy is not None:
            self.cluster.proxy.popen.terminate()
            self.cluster.proxy.popen.wait()
        asyncio.run(self.cluster.start_proxy())

    def kill(self, process: Process) -> None:
        """SIGKILL a service and wait for its end."""
        process.popen.kill()
        process.popen.wait()

    async def restart(self, process: Process) -> None:
        """Start a service that ended anew: the same directories and arguments, a TCP address that it had.

        Not from a worker thread: services end with the thread that starts them.
        """
        python, flag, module, *arguments = [str(argument) for argument in cast("list[str]", process.popen.args)]
        assert (python, flag) == (sys.executable, "-m")
        arguments = [f"--listen={process.address}" if a.startswith("--listen=") else a for a in arguments]
        started = await start_process(process.name, module, arguments, self.directory)
        process.popen, process.address, process.http = started.popen, started.address, started.http
        if self.exemptions is not None:
            self.exemptions.enter_context(leaks.exempt(pids=[process.popen.pid]))

    def client(self) -> AfsClient:
        """An asyncio client; use it with `async with`."""
        return AfsClient(self.proxy)

    def sync_client(self) -> SyncAfsClient:
        """A blocking client; use it with `with`."""
        return SyncAfsClient(self.proxy)

    def cli(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run afs_cli against this cluster."""
        return subprocess.run(
            [str(BIN / "afs_cli"), *arguments],
            env={**os.environ, "AFS_PROXY": self.proxy},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **options,
        )

    def popen_cli(self, *arguments: str) -> subprocess.Popen[str]:
        """Start afs_cli against this cluster."""
        return subprocess.Popen(
            [str(BIN / "afs_cli"), *arguments],
            env={**os.environ, "AFS_PROXY": self.proxy},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def log(self, name: str) -> str:
        """What the service *name* (such as ``node1-layerstore``) logged."""
        return (self.directory / "logs" / f"{name}.log").read_text()

    def cgroups(self) -> set[str]:
        """Names of the cgroups that this cluster's runs are in, one per node."""
        return {cgroup_parent(node.node_id, node.directory / "afslet") for node in self.nodes}

    def busy(self) -> list[str]:
        """What runs hold at this moment, and what they should have given back; empty on an idle cluster."""
        found = []
        for node in self.nodes:
            if node.afslet.popen.poll() is None:
                status = asyncio.run(_status(node.afslet.address))
                if status.running_containers or status.queued_runs or status.used_cpu_millis or status.used_memory_mb:
                    found.append(f"{node.node_id}: reserved {status}")
            found += self.left_by_runs(node)
        return found

    def left_by_runs(self, node: NodeProcesses) -> list[str]:
        """What there is on a node of its runs: files, mounts, cgroups, processes. Its services may be dead."""
        parent = cgroup_parent(node.node_id, node.directory / "afslet")
        found = [str(path) for path in cgroups(f"{parent}/*/")]
        scratches = ("snapshotter/roots", "snapshotter/attached", "afslet/runs", "layerstore/tmp", "run/runtime")
        for scratch in scratches:
            directory = node.directory / scratch
            found += [f"{path}" for path in (directory.iterdir() if directory.exists() else ())]
            found += [f"mount {mount.target}" for mount in list_mounts(str(directory))]
        return found + [f"runtime {pid}" for pid in self.runtimes(node)]

    def runtimes(self, node: NodeProcesses) -> list[int]:
        """The processes of the runtime, which are there while containers start."""
        found, wanted = [], b"\0--root\0" + os.fsencode(node.run_dir / "runtime") + b"\0"
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it ended
                if wanted in path.read_bytes():
                    found.append(int(path.parent.name))
        return found

    def processes_of_runs(self, node: NodeProcesses) -> list[int]:
        """What runs in the cgroups of a node's runs."""
        parent = cgroup_parent(node.node_id, node.directory / "afslet")
        found = set[int]()
        for path in cgroups(f"{parent}/**/cgroup.procs"):
            with suppress(OSError):  # the group went
                found.update(map(int, path.read_text().split()))
        return sorted(found)

    def assert_idle(self, grace: float = 5.0) -> None:
        """Fail unless everything was given back within *grace* seconds: a client's end is noticed a moment later."""
        deadline = time.monotonic() + grace
        while (left := self.busy()) and time.monotonic() < deadline:
            time.sleep(0.05)  # other processes clean up; they have no event for us
        assert not left, "runs left behind:\n" + "\n".join(f"  {line}" for line in left)


async def _status(address: str) -> afslet_pb2.GetRuntimeStatusResponse:
    async with channel(address) as opened:
        return await AfsletStub(opened).GetRuntimeStatus(afslet_pb2.GetRuntimeStatusRequest(), timeout=5)


@contextmanager
def cluster(nodes: int = 2, *, proxy: bool = True, **settings: Any) -> Iterator[RealCluster]:
    """A running cluster of *nodes* nodes with 4 CPUs and 4 GiB each, unless *settings* say otherwise; stopped at the end.

    The directory is short, because paths of unix sockets are limited to 107 bytes.
    """
    directory = Path(tempfile.mkdtemp(prefix="afs-", dir="/tmp"))
    directory.chmod(0o711)  # runs in user namespaces have to come to their roots
    chosen = Settings(directory, **{"cpus": 4, "memory_mb": 4096, **settings})
    running = RealCluster(directory, chosen)
    try:
        if proxy:
            asyncio.run(running.cluster.start(nodes))
        else:
            asyncio.run(_start_without_proxy(running.cluster, nodes))
        yield running
    except BaseException:
        for log in sorted(directory.glob("logs/*.log")):
            print(f"--- {log.name}\n{log.read_text()[-4000:]}")
        raise
    finally:
        asyncio.run(running.cluster.close())
        assert not list_mounts(str(directory)), "mounts are left below the cluster's directory"
        shutil.rmtree(directory)


async def _start_without_proxy(target: Cluster, nodes: int) -> None:
    await target.start_discovery()
    for number in range(1, nodes + 1):
        await target.start_node(number)


@contextmanager
def exempt(running: RealCluster) -> Iterator[RealCluster]:
    """Let what a long-lived cluster holds not count as a leak of the test that happens to run."""
    pids = [process.popen.pid for process in running.cluster.processes()]
    with leaks.exempt([str(running.directory), *running.cgroups()], pids), ExitStack() as running.exemptions:
        yield running
    running.exemptions = None

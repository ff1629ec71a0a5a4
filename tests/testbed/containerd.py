"""Debian's containerd with a root, a state directory and a socket of its own."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.testbed import leaks, mounts
from tests.testbed.containerdconfig import Cri, cri_plugin
from tests.testbed.daemon import Daemon

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["CRI_NAMESPACE", "Containerd", "Cri", "CtrError"]

CRI_NAMESPACE = "k8s.io"
"""Where the CRI plugin keeps everything; its containers' cgroups are where each pod says."""
_counter = itertools.count()
_CGROUPS = Path("/sys/fs/cgroup")
# What a containerd for one test does not need, and what would look at the machine's disks.
_DISABLED = (
    "grpc.v1.cri",
    "snapshotter.v1.aufs",
    "snapshotter.v1.btrfs",
    "snapshotter.v1.devmapper",
    "snapshotter.v1.zfs",
)
_RUNTIME_STATE = ("/run/containerd/runc", "/run/containerd/io.containerd.runtime.v2.task")


class CtrError(Exception):
    """A ctr command failed; the message has its output."""


class Containerd:
    """A containerd for one test or benchmark; containers run in `namespace`, whose name is also their cgroup's parent.

    Args:
        extra_config: TOML appended to the configuration, for example `containerdconfig.proxy_plugin`.
        cri: leave the CRI plugin in, with these settings.

    """

    def __init__(self, extra_config: str = "", *, cri: Cri | None = None) -> None:
        self._extra_config = extra_config
        self._cri = cri
        self._daemon: Daemon | None = None
        self.namespace = f"afs-test-{leaks.tag()}-{next(_counter)}"
        self.directory = Path()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def socket(self) -> Path:
        """The gRPC socket."""
        return self.directory / "c.sock"

    @property
    def root(self) -> Path:
        """Where containerd keeps content and snapshots."""
        return self.directory / "root"

    @property
    def pid(self) -> int:
        """containerd's pid."""
        assert self._daemon is not None, "containerd is not running"
        return self._daemon.pid

    def start(self) -> None:
        """Start and wait until it serves, up to 20 s.

        Raises:
            DaemonError: it did not start.

        """
        self.directory = Path(tempfile.mkdtemp(prefix="afs-test-ctrd-"))
        self.directory.chmod(0o711)  # the root of a container in a user namespace finds its files below it
        (self.directory / "config.toml").write_text(self._config())
        self._daemon = Daemon(["containerd", "--config", self.directory / "config.toml"])
        try:
            self._boot(self._daemon)
        except BaseException:
            self.stop()
            raise

    def restart(self) -> None:
        """Stop and start the daemon alone: containers, images and snapshots stay."""
        assert self._daemon is not None, "containerd is not running"
        self._daemon.stop()
        self._boot(self._daemon)

    def log(self) -> list[str]:
        """The lines that the daemon wrote."""
        return [] if self._daemon is None else self._daemon.lines()

    def other_namespace(self, name: str) -> str:
        """The name of one more namespace; what runs there ends with this containerd, too."""
        return f"{self.namespace}.{name}"

    def ctr(self, *args: str | Path, namespace: str = "", program: str = "ctr", timeout: float = 120.0) -> str:
        """Run `ctr` in this containerd's namespace, or another one, and return its standard output.

        `program` is for one that takes the same flags: ctr-remote.

        Raises:
            CtrError: it failed.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.

        """
        done = self.ctr_process(*args, namespace=namespace, program=program, timeout=timeout)
        if done.returncode:
            output = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
            raise CtrError(f"{program} {' '.join(map(str, args))}: exit {done.returncode}\n{output}")
        return done.stdout

    def ctr_process(
        self, *args: str | Path, namespace: str = "", program: str = "ctr", timeout: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `ctr`, which may fail, as `ctr run` of a failing command does."""
        return subprocess.run(
            self.ctr_command(*args, namespace=namespace, program=program),
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
        )

    def ctr_command(self, *args: str | Path, namespace: str = "", program: str = "ctr") -> list[str]:
        """The command line of `ctr`, for who wants to start it otherwise."""
        argv = [program, "--address", self.socket, "--namespace", namespace or self.namespace, *args]
        return [str(arg) for arg in argv]

    def stop(self) -> None:
        """End containers, shims and the daemon, and remove their mounts, cgroups and files."""
        if self._daemon is not None:
            self._end_tasks()
            self._daemon.stop()
            self._daemon = None
        _kill_shims(self.socket)
        if self.directory != Path():
            mounts.umount_below(self.directory)
            shutil.rmtree(self.directory)
            self.directory = Path()
        for state in map(Path, _RUNTIME_STATE):
            for namespace in (state / self.namespace, *state.glob(f"{self.namespace}.*")):
                shutil.rmtree(namespace, ignore_errors=True)
        _remove_cgroups(self.namespace)

    def _boot(self, daemon: Daemon) -> None:
        written = len(daemon.lines())
        daemon.start()
        daemon.wait_for("containerd successfully booted", start=written)

    def _config(self) -> str:
        disabled = [f"io.containerd.{name}" for name in _DISABLED if self._cri is None or not name.endswith("cri")]
        quoted = ", ".join(f'"{name}"' for name in disabled)
        return f"""version = 2
root = "{self.root}"
state = "{self.directory / "state"}"
disabled_plugins = [{quoted}]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.directory / "opt"}"
{cri_plugin(self._cri, self.directory) if self._cri is not None else ""}
{self._extra_config}
"""

    def _end_tasks(self) -> None:
        with suppress(CtrError, subprocess.TimeoutExpired):
            for namespace in self.ctr("namespaces", "list", "--quiet", timeout=20).split():
                self.end_containers(namespace)

    def end_containers(self, namespace: str = "") -> None:
        """Kill and delete all containers of a namespace.

        Raises:
            CtrError: containerd does not even list them.
            subprocess.TimeoutExpired: it took longer than 20 s.

        """
        for name in self.ctr("tasks", "list", "--quiet", namespace=namespace, timeout=20).split():
            self.ctr_process("tasks", "delete", "--force", name, namespace=namespace, timeout=20)
        for name in self.ctr("containers", "list", "--quiet", namespace=namespace, timeout=20).split():
            self.ctr_process("containers", "delete", name, namespace=namespace, timeout=20)


def _kill_shims(socket: Path) -> None:
    """Kill the shims that report to a socket, and wait for them; they outlive containerd by design."""
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with suppress(OSError):
            argv = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in argv[0] and os.fsencode(socket) in argv:
                _kill_and_wait(int(entry))


def _kill_and_wait(pid: int) -> None:
    import select

    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], 10)
    finally:
        os.close(handle)


def _remove_cgroups(name: str) -> None:
    """Remove a namespace's cgroup, and `other_namespace`s' ones, with their children, from every hierarchy if empty."""
    for parent in (_CGROUPS, *(path for path in _CGROUPS.iterdir() if path.is_dir())):
        for top in (parent / name, *parent.glob(f"{name}.*")):
            for directory, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):
                    os.rmdir(directory)

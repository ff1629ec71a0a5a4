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
from tests.testbed.daemon import Daemon

if TYPE_CHECKING:
    from types import TracebackType

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
        extra_config: TOML appended to the configuration, for example a `[proxy_plugins.afs]` table.
        cri: leave the CRI plugin in.

    """

    def __init__(self, extra_config: str = "", *, cri: bool = False) -> None:
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

    def ctr(self, *args: str | Path, timeout: float = 120.0) -> str:
        """Run `ctr` in this containerd's namespace and return its standard output.

        Raises:
            CtrError: it failed.
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.

        """
        done = self.ctr_process(*args, timeout=timeout)
        if done.returncode:
            output = f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
            raise CtrError(f"ctr {' '.join(map(str, args))}: exit {done.returncode}\n{output}")
        return done.stdout

    def ctr_process(self, *args: str | Path, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run `ctr`, which may fail, as `ctr run` of a failing command does."""
        argv = ["ctr", "--address", self.socket, "--namespace", self.namespace, *args]
        return subprocess.run(
            [str(arg) for arg in argv],
            check=False,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=timeout,
        )

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
        for state in _RUNTIME_STATE:
            shutil.rmtree(f"{state}/{self.namespace}", ignore_errors=True)
        _remove_cgroups(self.namespace)

    def _boot(self, daemon: Daemon) -> None:
        written = len(daemon.lines())
        daemon.start()
        daemon.wait_for("containerd successfully booted", start=written)

    def _config(self) -> str:
        disabled = [f"io.containerd.{name}" for name in _DISABLED if not (self._cri and name.endswith("cri"))]
        quoted = ", ".join(f'"{name}"' for name in disabled)
        return f"""version = 2
root = "{self.root}"
state = "{self.directory / "state"}"
disabled_plugins = [{quoted}]
[grpc]
  address = "{self.socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{self.directory / "opt"}"
{self._extra_config}
"""

    def _end_tasks(self) -> None:
        with suppress(CtrError, subprocess.TimeoutExpired):
            for name in self.ctr("tasks", "list", "--quiet", timeout=20).split():
                self.ctr_process("tasks", "delete", "--force", name, timeout=20)
            for name in self.ctr("containers", "list", "--quiet", timeout=20).split():
                self.ctr_process("containers", "delete", name, timeout=20)


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
    """Remove a cgroup and its children from every hierarchy where it is empty."""
    for parent in (_CGROUPS, *(path for path in _CGROUPS.iterdir() if path.is_dir())):
        for directory, _, _ in os.walk(parent / name, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)

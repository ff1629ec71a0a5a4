"""A dockerd of its own, with its own containerd, for benchmarks: no bridge, no firewall rules, nothing of the machine's."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from afs.afslet.cgroups import clean_up
from tests.testbed import leaks
from tests.testbed.daemon import Daemon
from tests.testbed.mounts import umount_below

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_counter = itertools.count()


class Docker:
    """Debian's docker.io below a temporary directory; containers' cgroups have a parent of their own."""

    def __init__(self) -> None:
        self.directory = Path()
        self._daemon: Daemon | None = None
        self._parent = f"afs-test-{leaks.tag()}-docker{next(_counter)}"

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="afs-test-docker-"))
        argv = ["dockerd", f"--host={self._host}", f"--data-root={self.directory}/data"]
        argv += [f"--exec-root={self.directory}/exec", f"--pidfile={self.directory}/pid", "--bridge=none"]
        argv += [
            "--iptables=false",
            "--ip-forward=false",
            f"--cgroup-parent=/{self._parent}",
            "--storage-driver=overlay2",
        ]
        self._daemon = Daemon(argv)
        try:
            self._daemon.start()
            self._daemon.wait_for("API listen on", timeout=60)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    @property
    def _host(self) -> str:
        return f"unix://{self.directory}/d.sock"

    def pull(self, reference: str) -> None:
        """Pull an image; a registry on a loopback address needs no TLS."""
        self("pull", "-q", reference)

    def run(self, image: str, command: Sequence[str]) -> None:
        """`docker run --rm --network host`."""
        self("run", "--rm", "--network", "host", image, *command)

    def __call__(self, *arguments: str) -> str:
        """Run the docker command."""
        argv = ["docker", f"--host={self._host}", *arguments]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"docker {arguments[0]}: {done.stderr.strip()}")
        return done.stdout

    def _stop(self) -> None:
        if self._daemon is not None:
            self._daemon.stop()
        umount_below(self.directory)
        clean_up(self._parent)
        shutil.rmtree(self.directory, ignore_errors=False)

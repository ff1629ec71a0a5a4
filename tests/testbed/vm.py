"""A virtual machine with another kernel, emulated by qemu (TCG): slow, but it runs wherever qemu does.

    with VM(vmimages.images(cache, vmimages.kernel(cache, "bookworm", "linux-image-cloud-amd64"))) as vm:
        done = vm.run(["uname", "-r"])

One command with the kernel of any Debian release (--help shows more; `make vm` installs what it needs before):

    .venv/bin/python -m tests.testbed.vm --kernel trixie/linux-image-cloud-amd64 -- uname -r

It has two CPUs, 2 GiB of memory, a writable root disk that is as before at the next start, pure cgroup v2, and no network
but the loopback device. Python takes 10 to 20 times as long as outside.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import os
import re
import selectors
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.testbed import build, vmimages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

BOOT_S = 120.0
STOP_S = 60.0
GRACE_S = 30.0
"""How long the machine may take, beyond a command's own limit, to say that it ended."""

# Without address randomisation qemu translates shared libraries once and not for each process: Python's imports take a
# third. A warning of a watchdog says that the emulation is slow. A kernel that fails ends the machine, and so the test.
_KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic nowatchdog rcupdate.rcu_cpu_stall_suppress=1 mitigations=off "
    "random.trust_cpu=on norandmaps"
)


class VMError(Exception):
    """The machine did not boot, died, or does not answer; the message has what it said last."""


@dataclass(frozen=True)
class Ended:
    """How a command ended inside: its exit code (124 if its time was up) and all that it wrote."""

    code: int
    output: str

    def checked(self) -> str:
        """The output of a command that has to succeed.

        Raises:
            AssertionError: it did not; the message has its output.

        """
        assert self.code == 0, f"exit code {self.code}\n{self.output}"
        return self.output


class VM:
    """One boot, from `with` to its end; a killed test run takes it along.

    Args:
        images: what boots.
        extra: further files and directories, path inside to path here.

    """

    def __init__(self, images: vmimages.Images, extra: Mapping[Path, Path] | None = None) -> None:
        self._images = images
        self._extra = extra or {}
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="afs-test-vm-"))
        try:
            self._start(self._directory)
            self._read_until(rb"ready\n", BOOT_S)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if error is None:
                self._power_off()
        finally:
            self._kill()

    def run(
        self,
        argv: Sequence[str | Path],
        timeout: float = 60.0,
        env: Mapping[str, str] | None = None,
        cwd: Path = vmimages.PROJECT,
    ) -> Ended:
        """Run a command inside and wait for its end, at most `timeout` seconds (then it is killed, code 124).

        Raises:
            VMError: the machine died or does not answer any more; no further command can run.

        """
        command = ["timeout", "-k", "15", str(timeout), *map(str, argv)]
        variables = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in (env or {}).items())
        return self.shell(f"cd {shlex.quote(str(cwd))} || exit\n{variables}exec {shlex.join(command)}", timeout)

    def python(self, *arguments: str | Path, timeout: float = 60.0, env: Mapping[str, str] | None = None) -> Ended:
        """Run the interpreter of this virtual environment, in the project's directory."""
        return self.run([sys.executable, *arguments], timeout, env)

    def shell(self, script: str, timeout: float = 60.0) -> Ended:
        """Run lines of sh; they must end by themselves. What they leave running must not keep its output open."""
        mark = uuid.uuid4().hex
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{mark} {base64.b64encode(script.encode()).decode()}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise VMError(self._describe("is not running", b"")) from None
        end, output = self._read_until(rb"%s (\d+)\n" % mark.encode(), timeout + GRACE_S)
        return Ended(int(end[1]), output.decode(errors="replace"))

    def _start(self, directory: Path) -> None:
        tar = directory / "work.tar"
        vmimages.pack(tar, self._extra)
        argv = [
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64"),
            # Never KVM: where machines are nested, it hangs. A CPU without AVX: glibc's AVX2 routines are slow in emulation.
            *("-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-smp", "2", "-m", "2048"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", self._images.kernel.image, "-initrd", self._images.initrd, "-append", _KERNEL_ARGUMENTS),
            *("-drive", f"file={self._images.disk},format=raw,if=virtio,snapshot=on,cache=unsafe"),
            *("-drive", f"file={tar},format=raw,if=virtio,read-only=on"),
            *("-chardev", f"file,id=console,path={directory}/console", "-serial", "chardev:console"),
            *("-device", "virtio-serial", "-chardev", "stdio,id=agent,signal=off"),
            *("-device", "virtserialport,chardev=agent,nr=1"),
        ]
        with (directory / "qemu").open("wb") as log:
            self._process = subprocess.Popen(
                [str(arg) for arg in argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"TMPDIR": str(directory)},  # where the snapshots of the disks go
            )

    def _read_until(self, mark: bytes, timeout: float) -> tuple[re.Match[bytes], bytes]:
        """A match of the pattern `mark` at the end of what the machine says, and what came before it."""
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        fd, data, pattern = self._process.stdout.fileno(), b"", re.compile(mark + rb"\Z")
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            while not (found := pattern.search(data, max(0, len(data) - 100))):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise VMError(self._describe(f"does not answer within {timeout:.0f} s", data))
                part = os.read(fd, 1 << 16)
                if not part:
                    raise VMError(self._describe("died", data))
                data += part
        return found, data[: found.start()]

    def _describe(self, what: str, output: bytes) -> str:
        assert self._directory is not None
        parts = [f"the virtual machine ({self._images.kernel.release}) {what}"]
        for name, text in (
            ("output", output.decode(errors="replace")),
            ("console", (self._directory / "console").read_text(errors="replace")),
            ("qemu", (self._directory / "qemu").read_text(errors="replace")),
        ):
            parts += [f"--- {name}", text[-6000:]] if text else []
        return "\n".join(parts)

    def _power_off(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            # Without sync(2): nobody will read the disk, and a file system that hangs must not hold this up.
            script = base64.b64encode(b"poweroff -n -f").decode()
            self._process.stdin.write(f"- {script}\n".encode())
            self._process.stdin.close()
        try:
            code = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise VMError(self._describe("does not power off", b"")) from None
        if code:
            raise VMError(self._describe(f"ended with status {code}", b""))

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None


def main() -> None:
    """Boot, run one command, show what it wrote."""
    parser = argparse.ArgumentParser(description="Run COMMAND in a virtual machine, in the project's directory.")
    parser.add_argument("--kernel", default="bookworm/linux-image-cloud-amd64", help="Debian release and package")
    parser.add_argument(
        "--extra", action="append", default=[], metavar="INSIDE=HERE", help="a file or directory to take in"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for the command")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    suite, _, package = arguments.kernel.partition("/")
    cache = build.default_cache_dir()
    extra = {Path(inside): Path(here) for inside, _, here in (pair.partition("=") for pair in arguments.extra)}
    with VM(vmimages.images(cache, vmimages.kernel(cache, suite, package)), extra) as machine:
        done = machine.run(arguments.command, arguments.timeout)
    print(done.output, end="")
    sys.exit(done.code)


if __name__ == "__main__":
    main()

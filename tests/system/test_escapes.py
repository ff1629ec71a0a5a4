"""Attempts to get out of a run: each has to fail inside, and to change nothing outside.

What is tried is in tests/testbed/escape.c. A sandbox that is broken must not break the machine: see there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from afs.afslet.bundle import CAPABILITIES, Sandbox
from afs.afslet.isolation import DEFAULT_ID_COUNT, DEFAULT_ID_FIRST
from afs.afslet.seccomp import load_filter
from afs.proto.v1 import afslet_pb2 as pb
from tests.testbed import capabilities, escapes
from tests.testbed.escapes import EscapeImage, Ran, escape_image, execute_now
from tests.testbed.sandboxed import MAX_FILES, run_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testbed.cluster import RealCluster

pytestmark = pytest.mark.root
OFF, ON = pb.USER_NAMESPACE_OFF, pb.USER_NAMESPACE_ON
NAMESPACES = pytest.mark.parametrize("user_namespace", [OFF, ON], ids=["plain", "user namespace"])

MARKER = "intruder:x:0:0::/:/bin/sh\n"
DENIED = "EPERM"
HIDDEN = ("ENODATA", "ENOENT")  # an empty file in its place, or the machine has none
UNKNOWN_PROCESS = "ESRCH"
NO_FILE = "ENOENT"
# What attempts fail with that do not fail with EPERM.
ERRORS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("clone_user", "clone_mount", "clone3_user", "personality"), ("ENOSYS",)),
    **dict.fromkeys(("kill", "ptrace", "pidfd", "read_memory", "kill_all"), (UNKNOWN_PROCESS,)),
    **dict.fromkeys(("kcore", "keys", "timers", "interrupts", "firmware"), HIDDEN),
    **dict.fromkeys(("chroot", "proc_root", "descriptors"), (NO_FILE,)),
    **dict.fromkeys(("proc_sys", "proc", "sys"), ("EROFS",)),
    "core_pattern": ("EROFS", "EACCES"),  # a user namespace's root does not even own it
    "sysrq": ("EROFS", "EACCES", "ENOENT"),
    "cgroup": ("EROFS", "ENOENT"),
    # Killed where the image has no loader for such programs; the others without calls of 32-bit programs in the kernel.
    "unshare_user_i386": (DENIED, "SIGSYS", "ENOSYS", "SIGSEGV"),
    "unshare_user_x32": ("SIGSYS", "ENOSYS"),
    "disk": ("EACCES", DENIED),
    "priority": ("EACCES",),
    "oom_score": ("EACCES",),
    "new_privileges": ("EINVAL",),  # cannot be taken back
    "vsock": ("EAFNOSUPPORT",),
    "abstract": ("ECONNREFUSED",),
}
DEFINED_BY_FILTER = {  # that fail for no other reason than the filter
    "unshare_user", "clone_user", "clone3_user", "add_key", "keyctl", "personality", "no_seccomp",
}  # fmt: skip


@dataclass(frozen=True)
class Outside:
    """What attempts aim at."""

    process: subprocess.Popen[bytes]
    marker: Path
    trap: Path
    socket: str
    image: EscapeImage

    def arguments(self) -> list[str]:
        """For `escape`."""
        disk = os.stat("/").st_dev
        numbers = str(os.major(disk)), str(os.minor(disk))
        return [str(self.process.pid), str(self.marker), *numbers, self.socket]

    def assert_unharmed(self) -> None:
        """Nothing happened to it."""
        assert self.process.poll() is None, "a process outside was killed"
        assert self.marker.read_text() == MARKER
        assert list(self.trap.iterdir()) == [], "something was made outside"


@pytest.fixture(scope="module")
def outside(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """A process, files and a socket outside, which are still there afterwards."""
    capabilities.require("gcc")
    directory = tmp_path_factory.mktemp("outside")
    marker, trap, name = directory / "marker", directory / "trap", f"afs-{uuid.uuid4().hex}"
    marker.write_text(MARKER)
    trap.mkdir()
    image = escape_image(cache_dir, directory / "image", trap=trap, marker=marker)
    with subprocess.Popen(["sleep", "1000"]) as process, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        found = Outside(process, marker, trap, name, image)
        try:
            yield found
            found.assert_unharmed()
        finally:
            process.kill()


def machine() -> dict[str, str]:
    """What an attempt that succeeds might change."""
    names = ["core_pattern", "hostname", "domainname", "modprobe", "sysrq", "ctrl-alt-del", "randomize_va_space"]
    paths = [Path("/proc/sys/kernel", name) for name in names] + [Path("/proc/modules"), Path("/proc/swaps")]
    found = {str(path): path.read_text() for path in paths if path.exists()}
    return found | {"clock": str(round(time.time() - time.monotonic()))}


@pytest.fixture
def run(shared_cluster: RealCluster, outside: Outside) -> Iterator[Any]:
    """Runs a command in the escape image; afterwards the machine is as before, and its node works."""

    def run(command: list[str], tag: str = "latest", **fields: Any) -> Ran:
        return execute_now(shared_cluster.proxy, outside.image.reference(tag), command, node_id="node1", **fields)

    before = machine()
    yield run
    assert run(["true"]).result.success
    assert machine() == before
    outside.assert_unharmed()


def attempts(stdout: str) -> dict[str, str]:
    """How each attempt ended."""
    return dict(line.split(" ", 1) for line in stdout.splitlines())


def expected(name: str) -> tuple[str, ...]:
    """How it has to."""
    return ERRORS.get(name, (DENIED,))


@NAMESPACES
def test_every_attempt_fails(run: Any, outside: Outside, user_namespace: int) -> None:
    ran = run(["/bin/escape", *outside.arguments()], user_namespace=user_namespace)
    assert ran.result.success, ran
    found = attempts(ran.stdout.decode())
    assert set(ERRORS) < set(found)
    assert len(found) > 70
    wrong = {name: error for name, error in found.items() if error not in expected(name)}
    assert wrong == {}, ran.stderr.decode()


async def test_the_attempts_can_succeed(outside: Outside, cache_dir: Path, tmp_path: Path) -> None:
    """Without the filter, those that only it forbids; else the test above would tell nothing about it."""
    for name in ("bin", "dev", "proc", "sys", "escape"):
        (tmp_path / name).mkdir()
    shutil.copy2(escapes.compiled(cache_dir), tmp_path / "bin/escape")
    argv = ["/bin/escape", *outside.arguments()]
    confined = attempts(
        (await run_in(tmp_path, argv, Sandbox(MAX_FILES, seccomp=load_filter("", CAPABILITIES)))).stdout
    )
    loose = attempts((await run_in(tmp_path, argv, Sandbox(MAX_FILES))).stdout)
    assert {name: confined[name] for name in DEFINED_BY_FILTER if confined[name] not in expected(name)} == {}
    assert {name: loose[name] for name in DEFINED_BY_FILTER if loose[name] != "ok"} == {}
    outside.assert_unharmed()


@NAMESPACES
def test_namespaces_are_the_run_s_own(run: Any, user_namespace: int) -> None:
    first, second = (attempts(run(["escape", "rights"], user_namespace=user_namespace).stdout.decode()) for _ in "ab")
    own = ("cgroup", "ipc", "mnt", "net", "pid", "uts", *(("user",) if user_namespace == ON else ()))
    ours = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in own}
    assert {kind for kind in own if first[kind] == ours[kind] or second[kind] == ours[kind]} == set()


def test_the_state_of_a_process(run: Any) -> None:
    ran = run(["sh", "-c", "cat /proc/self/status; ls /dev"])
    state = dict(line.split(":\t", 1) for line in ran.stdout.decode().splitlines() if ":\t" in line)
    assert (state["NoNewPrivs"], state["Seccomp"]) == ("1", "2")
    assert state["CapInh"] == state["CapAmb"] == "0" * 16
    assert state["CapEff"] == state["CapBnd"] == "00000000a80425fb"
    devices = {line for line in ran.stdout.decode().splitlines() if ":" not in line}
    standard = {"fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout"}
    assert devices - {"core"} == standard | {"tty", "urandom", "zero"}  # core leads to /proc/kcore, if there is one


@NAMESPACES
def test_setuid_programs_give_nothing(run: Any, user_namespace: int) -> None:
    found = attempts(run(["escape-setuid", "rights"], tag="user", user_namespace=user_namespace).stdout.decode())
    assert (found["uid"], found["euid"]) == (str(escapes.USER), str(escapes.USER))


def test_root_in_a_user_namespace_is_nobody_outside(run: Any) -> None:
    script = "cat /proc/self/uid_map; id -u; echo x > /mine; echo x > /theirs; chown 1000:1001 /theirs; rm -r /opt/old"
    ran = run(["sh", "-c", script], user_namespace=ON)
    lines = ran.stdout.decode().splitlines()
    assert lines[0].split() == ["0", str(DEFAULT_ID_FIRST), str(DEFAULT_ID_COUNT)], ran
    assert lines[1] == "0"
    owners = {name: (member.uid, member.gid) for name, member in ran.members().items()}
    assert owners["mine"] == (0, 0)  # the diff is as without a user namespace
    assert owners["theirs"] == (1000, 1001)
    assert "opt/.wh.old" in owners


def test_links_that_lead_outside(run: Any, outside: Outside) -> None:
    """A link is resolved in the run's own root; the diff has the link and not what it leads to."""
    marker = outside.marker
    script = f"cat /marker-link {marker} /proc/1/root{marker}; ln -s {marker} /link; ln -s / /everything; echo end"
    ran = run(["sh", "-c", script])
    assert ran.stdout == b"end\n"
    assert ran.stderr.count(b"No such file") == 3
    found = ran.members()
    assert set(found) == {"link", "everything"}
    assert (found["link"].issym(), found["link"].linkname) == (True, str(marker))


def test_users_of_a_file_outside(run: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="user 'intruder' is not in its /etc/passwd"):
        run(["true"], tag="passwd")


@pytest.mark.parametrize("name", ["dev", "proc", "sys"])
def test_mount_points_that_lead_outside(run: Any, name: str) -> None:
    """runc would make symlinks where /dev leads; the fixture looks whether they are there."""
    with pytest.raises(grpc.aio.AioRpcError, match=f"/{name} is not a directory"):
        run(["true"], tag=name)


def test_working_directories_of_the_runtime(run: Any, outside: Outside) -> None:
    """What the runtime has open must not become the working directory (CVE-2024-21626)."""
    up = "/".join([".."] * 20)
    for number in range(3, 16):
        with contextlib.suppress(grpc.aio.AioRpcError):  # most of them are none
            ran = run(["sh", "-c", f"cat {up}{outside.marker}; pwd"], tag=f"cwd{number}")
            assert MARKER.encode() not in ran.stdout


def test_a_fork_bomb(run: Any) -> None:
    """As many processes as the limit allows; the fixture asks whether the node still works."""
    ran = run(["escape", "forks"], memory_mb=1024)
    count, error = ran.stdout.split()
    assert error == b"EAGAIN", ran
    assert int(count) <= 4096


def test_a_fork_bomb_without_memory(run: Any) -> None:
    ran = run(["escape", "forks"], memory_mb=64)
    assert ran.result.outcome == pb.OUTCOME_OUT_OF_MEMORY
    assert "ran out of memory: the limit is 64 MiB" in ran.result.error


@pytest.mark.parametrize("where", ["heap", "/dev/shm", "/dev"])
def test_a_memory_hog(run: Any, where: str) -> None:
    """Of its own memory, or in file systems that are in memory: those are limited themselves, and count as the run's."""
    if where == "heap":
        ran = run(["dd", "if=/dev/zero", "of=/dev/null", "bs=400M", "count=1"], memory_mb=64)
        assert ran.result.outcome == pb.OUTCOME_OUT_OF_MEMORY, ran
        assert ran.result.peak_memory_bytes <= 64 << 20
    else:
        ran = run(["sh", "-c", f"dd if=/dev/zero of={where}/hog bs=1M count=500; wc -c < {where}/hog"], memory_mb=256)
        assert "No space left" in ran.stderr.decode(), ran
        assert int(ran.stdout) <= 64 << 20


def test_open_files(run: Any) -> None:
    ran = run(["escape", "files"])
    count, error = ran.stdout.split()
    assert error == b"EMFILE", ran
    assert int(count) < 1 << 20


def test_huge_output(run: Any) -> None:
    ran = run(["sh", "-c", "dd if=/dev/zero bs=1M count=10 2>/dev/null"], memory_mb=64)
    assert ran.result.success, ran.result
    assert len(ran.stdout) == 10 << 20


def test_no_core_file(run: Any) -> None:
    ran = run(["sh", "-c", "ulimit -c unlimited; ulimit -c; sh -c 'kill -SEGV $$'; echo $?"])
    assert ran.stdout == b"0\n139\n"
    assert ran.members() == {}

"""Finding out what works: with parts of the kernel out of reach, in user namespaces; and loop devices that never stay."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from afs.core import syscalls
from afs.core.errors import FailedPrecondition, Internal, InvalidArgument
from afs.core.mounts import list_mounts, unmount
from afs.snapshotter import probe
from afs.snapshotter.backends import Backend, Backends, Trial, Unusable, mount_layer, parse_backend
from tests.testbed import capabilities, tars, unpackers
from tests.testbed.ourroots import convert_bytes

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
_PROBE = """
import sys
from pathlib import Path
from afs.snapshotter.probe import probe
for trial in probe(Path(sys.argv[1]), Path(sys.argv[2])):
    print(trial.backend, "lazy" if trial.lazy else "complete", trial.reason, sep="|")
"""


def probed(tmp_path: Path, *within: str) -> dict[tuple[str, str], str]:
    """What the probe says below a command: reasons by backend and state."""
    argv = [*within, sys.executable, "-c", _PROBE, f"{tmp_path}/not/there/yet", str(tmp_path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split("|") for line in done.stdout.splitlines()]
    return {(backend, state): reason for backend, state, reason in found}


def shell(script: str) -> Sequence[str]:
    """A command that runs its arguments after *script*, in a mount namespace of its own."""
    return ["unshare", "--mount", "--propagation=private", "sh", "-ec", f'{script}; exec "$@"', "sh"]


def backing_files() -> set[str]:
    """Of all loop devices."""
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    found = set()
    for file in files:
        try:
            found.add(file.read_text().strip())
        except OSError:  # cleared meanwhile
            continue
    return found


def test_what_the_kernel_has_works_and_leaves_nothing(tmp_path: Path) -> None:
    trials = probe.probe(tmp_path, tmp_path)
    order = [Backend.FILE, Backend.LOOP, Backend.TREE]
    assert [(trial.backend, trial.lazy) for trial in trials] == [
        *((one, False) for one in order),
        *((one, True) for one in order),
    ]
    if capabilities.have("erofs") and capabilities.have("fuse"):
        assert [trial.reason for trial in trials] == [""] * 6
    assert list_mounts(str(tmp_path)) == []
    assert list(tmp_path.iterdir()) == []
    assert not [name for name in backing_files() if str(tmp_path) in name]


def test_files_of_a_tmpfs_take_a_loop_device(tmp_path: Path) -> None:
    with unpackers.tmpfs(tmp_path / "tmpfs") as at:
        file, loop, *_ = probe.probe(at, tmp_path)
    here = f"here are Linux {os.uname().release} and tmpfs"
    assert (
        file.reason == f"EROFS mounts files from Linux 6.12 on, and those of file systems such as ext4 or xfs; {here}"
    )
    assert loop.works


def test_devices_that_are_missing_are_told(tmp_path: Path) -> None:
    """As in a container without them."""
    found = probed(tmp_path, *shell("mount -t tmpfs none /dev"))
    assert found[Backend.LOOP, "complete"] == "no /dev/loop-control: the module loop is missing or blocked"
    assert "fuse is missing or blocked" in found[Backend.LOOP, "lazy"]
    assert "fuse is missing or blocked" in found[Backend.TREE, "complete"]
    if capabilities.have("erofs"):
        assert found[Backend.FILE, "complete"] == ""


def test_in_a_user_namespace_there_is_the_tree(tmp_path: Path) -> None:
    capabilities.require("fuse")
    within = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*within, "true"], check=False, capture_output=True).returncode:
        capabilities.unavailable("user namespaces")
    found = probed(tmp_path, *within)
    for state in ("complete", "lazy"):
        assert found[Backend.FILE, state] == "mounting erofs is not permitted here, as in a user namespace"
        assert found[Backend.LOOP, state]
        assert found[Backend.TREE, state] == ""


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENODEV, "no erofs in this kernel: the module is missing or blocked"),
        (errno.EINVAL, "does not know blocks of 512 bytes (Linux 6.4 does, and later stable ones do)"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_what_the_kernel_refuses_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    """As kernels do that cannot be had here."""

    def refuse(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
        raise OSError(number, os.strerror(number), target)

    monkeypatch.setattr(syscalls, "mount", refuse)
    for trial in probe.probe(tmp_path, tmp_path)[:2]:
        assert trial.reason.endswith(reason)
    assert not [name for name in backing_files() if str(tmp_path) in name]


def test_choices() -> None:
    trials = (
        Trial(Backend.FILE, False, "too old"),
        Trial(Backend.LOOP, False),
        Trial(Backend.TREE, False),
        Trial(Backend.TREE, True, "no FUSE"),
    )
    assert [one.backend for one in Backends(trials).choices(lazy=False)] == [Backend.LOOP, Backend.TREE]
    assert [one.backend for one in Backends(trials, Backend.TREE).choices(lazy=False)] == [Backend.TREE]
    Backends(trials).check()
    with pytest.raises(FailedPrecondition, match=r"^no backend can mount complete layers here: erofs-file: too old$"):
        Backends(trials, Backend.FILE).check()
    with pytest.raises(FailedPrecondition, match=r"^no backend can mount lazy layers here: tree: no FUSE$"):
        Backends(trials, Backend.TREE).check()
    assert [parse_backend(text) for text in ("auto", "tree")] == [None, Backend.TREE]
    with pytest.raises(InvalidArgument, match=r"^'x' is neither auto nor erofs-file, erofs-loop, tree$"):
        parse_backend("x")


def test_a_file_that_is_no_layer_leaves_no_loop_device(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(bytes(8192))
    (tmp_path / "at").mkdir()
    with pytest.raises(Internal, match=f"^cannot mount {tmp_path}/bad as erofs-loop: Invalid argument$"):
        mount_layer(Backend.LOOP, tmp_path / "bad", tmp_path / "at")
    assert str(tmp_path / "bad") not in backing_files()
    assert list_mounts(str(tmp_path)) == []


def test_no_free_loop_device_is_no_fault_of_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_bytes(tars.tar_of({"file": b""}), tmp_path / "layer")
    monkeypatch.setattr(syscalls, "LOOP_CONTROL", str(tmp_path / "none"))
    with pytest.raises(
        Unusable, match=r"^erofs-loop cannot be used: no .*/none: the module loop is missing or blocked$"
    ):
        mount_layer(Backend.LOOP, tmp_path / "layer", tmp_path)


def test_loop_devices_read_by_direct_io(tmp_path: Path) -> None:
    convert_bytes(tars.tar_of({"file": b"content"}), tmp_path / "layer")
    (tmp_path / "at").mkdir()
    mount_layer(Backend.LOOP, tmp_path / "layer", tmp_path / "at")
    try:
        (mount,) = list_mounts(str(tmp_path))
        assert Path("/sys/block", Path(mount.source).name, "loop/dio").read_text() == "1\n"
    finally:
        unmount(str(tmp_path / "at"))


def test_a_place_without_direct_io_has_no_loop_devices(tmp_path: Path) -> None:
    """Here an ext4 on a disk with blocks of 4096 bytes."""
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    attach = ["losetup", "--find", "--show", "--sector-size=4096", str(image)]
    disk = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    try:
        subprocess.run(["mkfs.ext4", "-q", disk], check=True)
        at = tmp_path / "at"
        at.mkdir()
        subprocess.run(["mount", disk, at], check=True)
        try:
            _, loop, *_ = probe.probe(at, tmp_path)
            reason = "direct I/O is in blocks of 4096 bytes on this disk, and layers have blocks of 512"
            assert loop.reason == reason
            convert_bytes(tars.tar_of({"file": b""}), at / "layer")
            (tmp_path / "layer").mkdir()
            with pytest.raises(Unusable, match=f"^erofs-loop cannot be used: {reason}$"):
                mount_layer(Backend.LOOP, at / "layer", tmp_path / "layer")
            assert str(at / "layer") not in backing_files()
        finally:
            subprocess.run(["umount", at], check=True)
    finally:
        subprocess.run(["losetup", "--detach", disk], check=True)


def test_loop_devices_are_had_by_many_at_once(tmp_path: Path) -> None:
    """Each asks for the first free one, and another may be quicker to take it."""
    for number in range(24):
        convert_bytes(tars.tar_of({"file": b"%d" % number}), tmp_path / f"layer{number}")
        (tmp_path / f"at{number}").mkdir()

    def mount(number: int) -> bytes:
        mount_layer(Backend.LOOP, tmp_path / f"layer{number}", tmp_path / f"at{number}")
        return (tmp_path / f"at{number}" / "file").read_bytes()

    try:
        with ThreadPoolExecutor(24) as pool:
            assert list(pool.map(mount, range(24))) == [b"%d" % number for number in range(24)]
        assert len({mount.source for mount in list_mounts(str(tmp_path))}) == 24
    finally:
        for number in range(24):
            unmount(str(tmp_path / f"at{number}"))
    assert not [name for name in backing_files() if str(tmp_path) in name]


def test_a_killed_process_leaves_no_loop_device(tmp_path: Path) -> None:
    """Killed between the making of the device and the mount."""
    convert_bytes(tars.tar_of({"file": b""}), tmp_path / "layer")
    script = """
import os, sys, signal
from afs.core import syscalls
syscalls.attach_loop(os.open(sys.argv[1], os.O_RDONLY), 512)
print("attached", flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", script, tmp_path / "layer"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"attached\n"
        assert str(tmp_path / "layer") in backing_files()
        process.send_signal(signal.SIGKILL)
    assert str(tmp_path / "layer") not in backing_files()


_ROOT_IN_A_USER_NAMESPACE = """
import asyncio, sys
from pathlib import Path
from tests.fs.test_backend_choice import use_a_root
asyncio.run(use_a_root(Path(sys.argv[1])))
"""


async def use_a_root(work: Path) -> None:
    """A root over two layers with marks, as whoever runs this may have one."""
    import contextlib

    from afs.snapshotter.overlay import in_user_namespace
    from afs.snapshotter.rootmount import RootRequest
    from tests.testbed.fillsource import FillSource
    from tests.testbed.ourmounts import layer_mounts, roots_over

    assert in_user_namespace()
    source = FillSource(work)
    lower = source.add(tars.tar_of({"dir": None, "dir/hidden": b"", "gone": b"", "kept": b"kept"}))
    upper = source.add(
        tars.tar_of({".wh.gone": b"", "dir": None, "dir/.wh..wh..opq": b"", "dir/new": b""}), partial=True
    )
    async with (
        layer_mounts(source, None) as mounts,
        roots_over(mounts, work) as roots,
        contextlib.AsyncExitStack() as stack,
        mounts.using(lower.diff_id, str(lower.whole)) as below,
        mounts.using(upper.diff_id, "") as above,
    ):
        assert (below.backend, above.backend) == (Backend.TREE, Backend.TREE)
        root = await roots.mount_root(stack, [below, above], RootRequest())

        def look() -> None:
            assert sorted(path.name for path in root.path.iterdir()) == ["dev", "dir", "kept", "proc", "sys"]
            assert [path.name for path in (root.path / "dir").iterdir()] == ["new"]
            assert (root.path / "kept").read_bytes() == b"kept"
            (root.path / "kept").write_bytes(b"written")
            (root.path / "dir" / "new").unlink()
            assert list((root.path / "dir").iterdir()) == []

        await asyncio.to_thread(look)


def test_a_root_in_a_user_namespace(tmp_path: Path) -> None:
    capabilities.require("fuse")
    within = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*within, "true"], check=False, capture_output=True).returncode:
        capabilities.unavailable("user namespaces")
    argv = [*within, sys.executable, "-c", _ROOT_IN_A_USER_NAMESPACE, str(tmp_path)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_full_file_system_says_nothing_of_backends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    capabilities.require("fuse")
    full = tmp_path / "full"
    full.mkdir()
    syscalls.mount("tmpfs", str(full), "tmpfs", 0, "size=64k")
    try:
        (full / "filler").write_bytes(bytes(64 << 10))
        trials = probe.probe(full, tmp_path)
    finally:
        unmount(str(full))
    found = {(trial.backend, trial.lazy): trial.reason for trial in trials}
    for backend in (Backend.FILE, Backend.LOOP):
        assert found[backend, False] == found[backend, True]
        assert f"no space at {full} to try {backend}" in caplog.text

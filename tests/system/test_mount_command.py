"""afs_mount against real services: foreground and detached, over restarts, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from afs.core.mounts import list_mounts, unmount
from afs.core.rpc import serving
from afs.proto.v1 import mounts_pb2 as pb
from afs.proto.v1 import mounts_pb2_grpc as pb_grpc
from afs.snapshotter.client import Mounts
from tests.system.test_commands import call, interrupted, read_until, started
from tests.testbed import oci, tars
from tests.testbed.cluster import BIN

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Iterator

    import grpc.aio

    from afs.core.cluster import NodeProcesses
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture
def node(fragile_cluster: RealCluster) -> Iterator[NodeProcesses]:
    """The node that pulls; afterwards nothing is attached there."""
    yield fragile_cluster.nodes[0]
    assert not asyncio.run(attached_roots(fragile_cluster.nodes[0]))
    fragile_cluster.assert_idle()


@pytest.fixture
def big_image(busybox_image: BusyboxImage, tmp_path: Path, rng: random.Random) -> str:
    """Busybox with a layer of 16 MiB that no node has yet; `/big` begins with the sha256 of its rest."""
    data = rng.randbytes(16 * MIB)
    layout = oci.copy_layout(busybox_image.layout, tmp_path / "layout")
    builder = oci.LayoutBuilder(layout)
    layer = builder.add_layer(tars.tar_of({"big": hashlib.sha256(data).digest() + data}), "plain")
    builder.add_image("big", [*busybox_image.layers, layer], {})
    return f"oci:{layout}:big"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """A directory to mount at; afterwards nothing is mounted there."""
    path = tmp_path / "at"
    path.mkdir()
    yield path
    left = list_mounts(str(tmp_path))
    for mount in reversed(left):
        unmount(mount.target)
    assert not left


def afs_mount(node: NodeProcesses, *arguments: str | bytes | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    argv = [str(BIN / "afs_mount"), f"--run-dir={node.run_dir}", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, **options)


def stats(node: NodeProcesses) -> Any:
    """What `afs_mount --stats --json` prints."""
    done = afs_mount(node, "--stats", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


async def attached_roots(node: NodeProcesses) -> list[pb.AttachedRoot]:
    """What the snapshotter says is attached; quicker than `stats`."""
    mounts = Mounts(f"unix:{node.run_dir}/mounts.sock")
    try:
        return list((await mounts.stats()).attached)
    finally:
        await mounts.close()


@contextmanager
def attached(node: NodeProcesses, *arguments: str | Path) -> Iterator[Path]:
    """`afs_mount --detach` with `arguments`, the last one being the target, and `--unmount` at the end."""
    done = afs_mount(node, "--detach", *arguments)
    assert done.returncode == 0, done.stderr
    try:
        yield Path(arguments[-1])
    finally:
        done = afs_mount(node, "--unmount", arguments[-1])
        assert done.returncode == 0, done.stderr


async def end(running: RealCluster, node: NodeProcesses, how: str) -> None:
    """End the node's snapshotter, cleanly or not."""
    if how == "killed":
        running.kill(node.snapshotter)
    else:
        node.snapshotter.popen.terminate()
        assert await asyncio.to_thread(node.snapshotter.popen.wait, 20) == 0


def test_detached(node: NodeProcesses, busybox_image: BusyboxImage, target: Path) -> None:
    image = busybox_image.reference
    done = afs_mount(node, "--detach", image, target)
    said = f"{image} is mounted at {target}; afs_mount --unmount {target} unmounts it\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "", said)
    (target / "new").write_text("new\n")
    assert (target / "data/hello.txt").read_bytes() == busybox_image.present["/data/hello.txt"]
    (root,) = stats(node)["attached"]
    assert (root["target"], root["image"].split()[0], len(root["layers"])) == (str(target), image, 3)
    again = afs_mount(node, "--detach", image, target)
    assert (again.returncode, again.stderr) == (73, f"afs_mount: a root is mounted at {target} already\n")
    with subprocess.Popen(["sleep", "1000"], cwd=target) as user:
        busy = afs_mount(node, "--unmount", target)
        user.kill()
    why = f"afs_mount: {target} is in use: a process works in it or has a file of it open\n"
    assert (busy.returncode, busy.stderr) == (67, why)
    done = afs_mount(node, "--unmount", target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(target.iterdir()) == []
    gone = afs_mount(node, "--unmount", target)
    assert (gone.returncode, gone.stderr) == (66, f"afs_mount: no root is attached at {target}\n")


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_readers_go_on_over_restarts_of_the_snapshotter(
    fragile_cluster: RealCluster, node: NodeProcesses, big_image: str, target: Path, how: str
) -> None:
    """In a complete root, and in one whose layers still come from the other node, while it is away and afterwards."""
    lazy_node = fragile_cluster.nodes[1]
    lazy = target.with_name("lazy")
    lazy.mkdir()

    async def restart(node: NodeProcesses) -> None:
        await fragile_cluster.restart(node.snapshotter)

    with attached(node, big_image, target), attached(lazy_node, big_image, lazy):
        for each, root in ((node, target), (lazy_node, lazy)):
            with (root / "big").open("rb", buffering=0) as file:
                (root / "written").write_text("w")
                expected, digest = file.read(32), hashlib.sha256(file.read(MIB))
                asyncio.run(end(fragile_cluster, each, how))
                file.seek(32 + MIB)
                digest.update(file.read(4 * MIB))
                asyncio.run(restart(each))
                while data := file.read(4 * MIB):
                    digest.update(data)
                assert digest.digest() == expected
            assert (root / "written").read_text() == "w"
            assert [root["target"] for root in stats(each)["attached"]] == [str(root)]
        assert [layer["users"] for layer in stats(lazy_node)["layers"] if layer["lazy"] and layer["users"]]
        # A new snapshotter knows its predecessor's mounts: a second root shares them.
        before = list_mounts(str(node.run_dir / "l"))
        other = target.with_name("other")
        other.mkdir()
        with attached(node, big_image, other):
            assert list_mounts(str(node.run_dir / "l")) == before
            assert 2 in {layer["users"] for layer in stats(node)["layers"]}
    for each in (node, lazy_node):
        assert not any(layer["users"] for layer in stats(each)["layers"])


def test_what_is_mounted_is_told(
    fragile_cluster: RealCluster, node: NodeProcesses, big_image: str, target: Path
) -> None:
    lazy_node = fragile_cluster.nodes[1]
    with attached(node, big_image, target):  # pulls it
        pass
    with attached(lazy_node, "--read-only", big_image, target):
        hashlib.sha256((target / "big").read_bytes())
        told = stats(lazy_node)
        (big,) = [layer for layer in told["layers"] if layer["bytes_local"] > 15 * MIB and layer["users"]]
        assert (big["backend"], big["users"], big["failed_reads"], big["fallback"]) == ("erofs-file", 1, 0, "")
        assert big["bytes_from_peers"].keys() == {node.layerstore.address}
        assert big["lazy"]
        assert big["reads"] > 0
        assert big["worker"] in {worker["number"] for worker in told["workers"] if worker["alive"]}
        shown = afs_mount(lazy_node, "--stats")
        assert shown.returncode == 0
        row = next(line for line in shown.stdout.splitlines() if line.startswith(big["diff_id"][7:19]))
        assert row.split()[1:3] == [big["state"], "erofs-file"]
        assert re.search(
            rf"^{big['diff_id'][7:19]}: \S+ MiB from {node.layerstore.address}$", shown.stdout, re.MULTILINE
        )
        assert f"is attached at {target}" in shown.stdout


def test_a_chroot(node: NodeProcesses, busybox_image: BusyboxImage, target: Path) -> None:
    script = """
        set -e
        echo gone > /dev/null; head -c 4 /dev/zero | wc -c; head -c 8 /dev/urandom | wc -c
        test -c /dev/tty; test -c /dev/random; test "$(readlink /dev/ptmx)" = pts/ptmx; test -c /dev/pts/ptmx
        echo shared > /dev/shm/x; echo through > /dev/stderr; test -e /proc/self/exe; test -d /sys/kernel
        ! mkdir /sys/x 2> /dev/null; ! echo full > /dev/full"""
    choices: list[list[str]] = [[], ["--read-only"]]
    for flags in choices:
        with attached(node, "--mount-proc-dev", *flags, busybox_image.reference, target):
            done = subprocess.run(
                ["chroot", target, "/bin/sh", "-c", script], capture_output=True, text=True, check=False
            )
            assert (done.returncode, done.stdout.split()) == (0, ["4", "8"]), done.stderr
            assert "through" in done.stderr
        assert not list_mounts(str(target))
    with started(
        "afs_mount", f"--run-dir={node.run_dir}", "--mount-proc-dev", busybox_image.reference, target
    ) as process:
        read_until(process.stderr, "is mounted at")
        assert len(list_mounts(str(target))) == 6
        process.kill()
        process.communicate()
    # Its end is the end of what it held; the snapshotter notices by itself, without an event for us.
    deadline = time.monotonic() + 20
    while list_mounts(str(target)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["detached", "held"])
def test_upper_directory(node: NodeProcesses, busybox_image: BusyboxImage, target: Path, how: str) -> None:
    kept = target.with_name("kept")
    kept.mkdir()
    said = f"what was written is in {kept}/upper\n"
    for content in ("first", "second"):
        flags = [f"--upper-dir={kept}", busybox_image.reference, str(target)]
        if how == "detached":
            assert afs_mount(node, "--detach", *flags).returncode == 0
            (target / content).write_text(content)
            done = afs_mount(node, "--unmount", target)
            assert (done.returncode, done.stderr) == (0, said)
        else:
            with started("afs_mount", f"--run-dir={node.run_dir}", *flags) as process:
                read_until(process.stderr, "is mounted at")
                (target / content).write_text(content)
                assert interrupted(process) == (0, said)
        assert (kept / "upper" / content).read_text() == content
    assert [path.name for path in kept.iterdir()] == ["upper"]
    assert sorted(path.name for path in (kept / "upper").iterdir()) == ["first", "second"]


def test_names_of_directories(node: NodeProcesses, busybox_image: BusyboxImage, target: Path) -> None:
    """Relative, through a symlink, odd, not UTF-8; one that is not empty is covered, and there again later."""
    work = target.parent
    odd = os.fsencode(work) + b"/o:d,d \\\xff\n"
    os.mkdir(odd)
    (target / "covered").touch()
    (work / "link").symlink_to("at")
    for name in (b"./at/../at", b"link", odd):
        done = afs_mount(node, "--detach", busybox_image.reference, name, cwd=work)
        assert done.returncode == 0, done.stderr
        assert os.path.exists(os.path.join(os.fsencode(work), name, b"bin/busybox"))
        assert afs_mount(node, "--unmount", name, cwd=work).returncode == 0
    assert (target / "covered").exists()


def test_a_snapshotter_that_goes_away(
    fragile_cluster: RealCluster, node: NodeProcesses, busybox_image: BusyboxImage, target: Path
) -> None:
    """A root that is held is gone with its successor's start at the latest, also where it was mounted."""
    with started("afs_mount", f"--run-dir={node.run_dir}", busybox_image.reference, target) as process:
        read_until(process.stderr, "is mounted at")
        with (target / "data/hello.txt").open("rb") as file:
            asyncio.run(end(fragile_cluster, node, "killed"))
            _, stderr = process.communicate(timeout=20)
            assert process.returncode == 69
            assert re.fullmatch(r"afs_mount: snapshotter unix:\S+ went away while a root of it was in use\n", stderr)
            asyncio.run(fragile_cluster.restart(node.snapshotter))
            assert not list_mounts(str(target))
            assert file.read() == busybox_image.present["/data/hello.txt"]


def test_a_root_that_was_unmounted_by_hand(node: NodeProcesses, busybox_image: BusyboxImage, target: Path) -> None:
    assert afs_mount(node, "--detach", "--mount-proc-dev", busybox_image.reference, target).returncode == 0
    subprocess.run(["umount", "--recursive", target], check=True)
    assert not stats(node)["attached"]
    with attached(node, busybox_image.reference, target):
        pass


WRONG = {
    "no directory": (["IMAGE", "{at}/no"], 64, "not a directory: {at}/no"),
    "no upper directory": (["--upper-dir={at}/no", "IMAGE", "{at}"], 64, "not a directory: {at}/no"),
    "upper directory of nothing": (
        ["--read-only", "--upper-dir={at}", "IMAGE", "{at}"],
        *(64, "a read-only root has no upper directory"),
    ),
    "no image": (["IMAGE"], 64, "give an IMAGE and a directory DIR, or one of --unmount, --probe, --stats; see --help"),
    "over all": (["IMAGE", "/"], 64, "a root cannot be mounted over /"),
    "platform": (["--platform=linux", "IMAGE", "{at}"], 64, "not a platform: 'linux'; write it like linux/amd64 or .*"),
    "no such platform": (["--platform=linux/s390x", "IMAGE", "{at}"], 67, "image .* has no platform linux/s390x.*"),
    "two at once": (["--stats", "--probe"], 64, "--probe and --stats do not go together"),
    "unmount what": (["--unmount", "{at}", "IMAGE"], 64, "--unmount does not go with .*"),
    "unmount how": (["--unmount", "{at}", "--read-only"], 64, "--unmount does not go with --read-only"),
    "json of what": (["--json", "IMAGE", "{at}"], 64, "--json goes with --probe and --stats"),
    "not ours": (["--unmount", "/proc"], 66, "no root is attached at /proc"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be(node: NodeProcesses, busybox_image: BusyboxImage, target: Path, case: str) -> None:
    arguments, status, message = WRONG[case]
    filled = [argument.format(at=target).replace("IMAGE", busybox_image.reference) for argument in arguments]
    message = message.format(at=re.escape(str(target)))
    for detach in ([], ["--detach"]) if "IMAGE" in arguments and arguments[0] != "--unmount" else ([],):
        done = afs_mount(node, *detach, *filled)
        assert (done.returncode, done.stdout) == (status, "")
        assert re.fullmatch(f"afs_mount: {message}\n", done.stderr), done.stderr


def test_without_services(tmp_path: Path) -> None:
    missing = f"afs_mount: no afs_snapshotter at {tmp_path}/mounts.sock; is it running? (--run-dir / AFS_RUN_DIR)\n"
    for arguments in (["--stats"], ["--unmount", tmp_path], ["--detach", "alpine", tmp_path]):
        done = call("afs_mount", f"--run-dir={tmp_path}", *arguments)
        assert done.returncode == 69
        assert done.stderr == missing


def test_probe(tmp_path: Path) -> None:
    told = call("afs_mount", "--probe", f"--layerstore-root={tmp_path}", "--json")
    assert (told.returncode, told.stderr) == (0, "")
    found = json.loads(told.stdout)
    assert found["kernel"] == os.uname().release
    kinds = [(trial["lazy"], trial["backend"]) for trial in found["trials"]]
    assert kinds == [(lazy, name) for lazy in (False, True) for name in ("erofs-file", "erofs-loop", "tree")]
    assert all(trial["works"] == (trial["reason"] == "") for trial in found["trials"])
    assert [trial["backend"] for trial in found["trials"] if trial["used"]] == ["erofs-file", "erofs-file"]
    assert found["limited_roots"] == {"works": True, "reason": ""}
    shown = call("afs_mount", "--probe", f"--layerstore-root={tmp_path}")
    assert shown.returncode == 0
    assert shown.stdout.splitlines()[-1] == "roots of limited size: work"
    assert shown.stdout.splitlines()[:2] == [f"kernel {os.uname().release}", "complete layers, erofs-file: used"]
    subprocess.run(["mount", "-t", "tmpfs", "probe", tmp_path], check=True)
    try:
        shown = call("afs_mount", "--probe", f"--layerstore-root={tmp_path}")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert (
        "complete layers, erofs-file: EROFS mounts files from Linux 6.12 on, and those of file systems such as"
        in shown.stdout
    )
    assert "complete layers, erofs-loop: used" in shown.stdout


class Endless(pb_grpc.MountsServicer):
    """Opens images for ever, and tells when it began and when it was told to stop."""

    Detach = Stats = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.began, self.cancelled = asyncio.Event(), asyncio.Event()

    async def _work(self) -> None:
        self.began.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()

    @override
    async def Hold(
        self, request_iterator: AsyncIterator[pb.HoldRequest], context: Any
    ) -> AsyncIterator[pb.HoldResponse]:
        await self._work()
        yield pb.HoldResponse()

    @override
    async def Attach(self, request: pb.AttachRequest, context: Any) -> pb.MountedRoot:
        await self._work()
        return pb.MountedRoot()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("flags", [[], ["--detach"]])
async def test_interrupted_while_the_image_is_opened(tmp_path: Path, flags: list[str], signum: int) -> None:
    endless = Endless()

    def register(server: grpc.aio.Server) -> None:
        pb_grpc.add_MountsServicer_to_server(endless, server)

    async with serving([f"unix:{tmp_path}/mounts.sock"], register, grace_s=0), asyncio.timeout(30):
        argv = [str(BIN / "afs_mount"), f"--run-dir={tmp_path}", *flags, "alpine", str(tmp_path)]
        process = await asyncio.create_subprocess_exec(*argv, stderr=asyncio.subprocess.PIPE)
        await endless.began.wait()
        process.send_signal(signum)
        _, stderr = await process.communicate()
        await endless.cancelled.wait()
    assert (process.returncode, stderr) == (76, b"afs_mount: mounting alpine was cancelled\n")

"""Containers as a Sandbox describes them, with runc."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from afs.afslet.bundle import IdMap, Sandbox
from tests.testbed import capabilities
from tests.testbed.images import BUSYBOX
from tests.testbed.sandboxed import MAX_FILES, run_in

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.root
IDS = IdMap(0x7000_0000, 65536)


@pytest.fixture
def root() -> Iterator[Path]:
    """A root that every user may read."""
    capabilities.require("runc")
    with tempfile.TemporaryDirectory(prefix="afs-test-", dir="/tmp") as name:
        Path(name).chmod(0o711)
        root = Path(name, "root")
        for directory in ("bin", "dev", "proc", "sys", "tmp", "etc"):
            (root / directory).mkdir(parents=True)
        shutil.copy2(BUSYBOX, root / "bin/busybox")
        for applet in ("sh", "cat", "ls", "grep", "wc", "hostname"):
            (root / "bin" / applet).symlink_to("busybox")
        yield root


@pytest.fixture
def network() -> Iterator[str]:
    """A network namespace of somebody else."""
    with subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield f"/proc/{process.pid}/ns/net"
        finally:
            process.kill()


async def shell(root: Path, script: str, sandbox: Sandbox) -> str:
    """What a script printed."""
    heard = await run_in(root, ["/bin/sh", "-c", script], sandbox)
    assert (heard.ended.code, heard.ended.start_error) == (0, ""), heard
    return heard.stdout


@pytest.mark.parametrize("ids", [None, IDS], ids=["plain", "user namespace"])
async def test_files_are_bound_and_cannot_be_written(root: Path, ids: IdMap | None) -> None:
    hosts = root.parent / "hosts"
    hosts.write_text("1.2.3.4 name\n")
    (root / "etc/hosts").write_text("the image's\n")
    sandbox = Sandbox(MAX_FILES, "name.here", ids=ids, files=((str(hosts), "/etc/hosts"),))
    script = "cat /etc/hosts; hostname; cat /proc/self/oom_score_adj; echo x > /etc/hosts || echo refused"
    assert await shell(root, script, sandbox) == "1.2.3.4 name\nname.here\n500\nrefused\n"
    assert (root / "etc/hosts").read_text() == "the image's\n"


async def test_files_are_bound_inside_whatever_the_image_says(root: Path) -> None:
    trap, hosts = root.parent / "trap", root.parent / "hosts"
    trap.mkdir()
    hosts.write_text("ours\n")
    (root / "etc").rmdir()
    (root / "etc").symlink_to(trap)
    assert await shell(root, "cat /etc/hosts", Sandbox(MAX_FILES, files=((str(hosts), "/etc/hosts"),))) == "ours\n"
    assert list(trap.iterdir()) == []


@pytest.mark.parametrize("ids", [None, IDS], ids=["plain", "user namespace"])
async def test_a_network_to_join(root: Path, network: str, ids: IdMap | None) -> None:
    inside = await shell(root, "ls -l /proc/self/ns/net", Sandbox(MAX_FILES, network=network, ids=ids))
    assert inside.split()[-1] == os.readlink(network)


@pytest.mark.parametrize("ids", [None, IDS], ids=["plain", "user namespace"])
async def test_the_machine_s_network(root: Path, ids: IdMap | None) -> None:
    before = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()
    inside = await shell(root, "ls -l /proc/self/ns/net", Sandbox(MAX_FILES, network=None, ids=ids))
    assert inside.split()[-1] == os.readlink("/proc/self/ns/net")
    assert Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text() == before


async def test_a_bound_sys_shows_no_more_than_a_new_one(root: Path, network: str) -> None:
    """In a user namespace with somebody else's network: the machine's /sys, read-only with all that is mounted in it."""
    sandbox = Sandbox(MAX_FILES, network=network, ids=IDS)
    script = "ls /sys/fs/cgroup /sys/kernel/debug 2>/dev/null | grep -v : | wc -w; grep ' /sys' /proc/mounts"
    count, *mounts = (await shell(root, script, sandbox)).splitlines()
    assert count.strip() == "0"
    assert len(mounts) > 1
    assert [line for line in mounts if "ro" not in line.split()[3].split(",") and not line.startswith("devtmpfs")] == []

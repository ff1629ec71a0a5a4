"""Containers on the networks of runs: what root in one, with Docker's capabilities, can reach and change."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from afs.afslet.cgroups import clean_up
from afs.afslet.networks import Networks, RunNetwork
from afs.proto.v1 import afslet_pb2 as pb
from tests.testbed import capabilities, leaks, uplink
from tests.testbed.uplink import METADATA, NODE, NODE_PORT, OTHER, PRIVATE, PUBLIC, Uplink, network_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

pytestmark = pytest.mark.root
CAPABILITIES = [f"CAP_{name}" for name in ("NET_RAW", "NET_BIND_SERVICE", "DAC_OVERRIDE", "SETUID", "SYS_CHROOT")]


@dataclass(frozen=True)
class Containers:
    """A node, and a root file system for containers on it."""

    up: Uplink
    directory: Path
    cgroup: str

    def play(self, script: str, mode: int, egress: Sequence[str] = ()) -> str:
        """What a shell script prints in a container that is on a network of the node."""

        async def run() -> str:
            files = self.directory / "files"
            files.mkdir(exist_ok=True)
            networks = Networks(network_settings(name_servers=(PUBLIC,)), "afs-test-containers", files)
            await networks.start()
            try:
                async with networks.network(mode, egress, "box") as network:
                    return await asyncio.to_thread(self._run, script, network)
            finally:
                await networks.close()

        return self.up.node.call(lambda: asyncio.run(run()))

    def _run(self, script: str, network: RunNetwork) -> str:
        name = f"afs-test-{uuid.uuid4().hex[:8]}"
        bundle = self.directory / name
        bundle.mkdir()
        (bundle / "config.json").write_text(json.dumps(self._config(script, name, network)))
        argv = ["runc", "--root", str(self.directory / "state"), "run", "--bundle", str(bundle), name]
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        finally:
            clean_up(self.cgroup)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def _config(self, script: str, name: str, network: RunNetwork) -> dict[str, object]:
        namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
        if network.path is not None:
            namespaces.append({"type": "network", "path": network.path})
        binds = [
            {"destination": path, "type": "bind", "source": str(source), "options": ["bind", "ro", "nosuid", "nodev"]}
            for path, source in network.files.items()
        ]
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
        ]
        sets = dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES)
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": ["/bin/sh", "-c", script],
                "env": ["PATH=/bin"],
                "cwd": "/",
                "capabilities": sets,
                "noNewPrivileges": True,
            },
            "root": {"path": str(self.directory / "root")},
            "hostname": "box",
            "mounts": mounts + binds,
            "linux": {
                "namespaces": namespaces,
                "cgroupsPath": f"/{self.cgroup}/{name}",
                "readonlyPaths": ["/proc/sys"],
            },
        }


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """All containers of this module share a node and a root; each one has a bundle of its own."""
    capabilities.require("root", "netns", "cgroup", "runc")
    directory, cgroup = tmp_path_factory.mktemp("containers"), f"afs-test-{leaks.tag()}-networks"
    programs = directory / "root/bin"
    programs.mkdir(parents=True)
    shutil.copy("/bin/busybox", programs / "busybox")
    for applet in ("sh", "cat", "ls", "ip", "nc", "hostname", "ping", "echo", "arping", "timeout"):
        (programs / applet).symlink_to("busybox")
    with uplink.uplink() as up:
        yield Containers(up, directory, cgroup)


def reach(*targets: tuple[str, int]) -> str:
    """A script that prints a line for each target: what it says, or `refused`."""
    return "\n".join(f"echo $(nc {address} {port} </dev/null || echo refused)" for address, port in targets)


def test_none(containers: Containers) -> None:
    script = (
        f"ls /sys/class/net; ip -o addr show; ping -c 1 -q localhost | cat; {reach((PUBLIC, 80), (NODE, NODE_PORT))}"
    )
    lines = containers.play(script, pb.NETWORK_NONE).splitlines()
    assert lines[0] == "lo"
    assert [line.split()[3] for line in lines if " inet" in line] == ["127.0.0.1/8", "::1/128"]
    assert any("1 packets received" in line for line in lines)
    assert lines[-2:] == ["refused", "refused"]


def test_bridge(containers: Containers) -> None:
    targets = [(PUBLIC, 80), (OTHER, 443), (METADATA, 80), (PRIVATE, 80), (NODE, NODE_PORT), ("127.0.0.1", NODE_PORT)]
    script = f"cat /etc/hosts /etc/resolv.conf; hostname -i; {reach(*targets)}"
    lines = containers.play(script, pb.NETWORK_BRIDGE).splitlines()
    *files, address = lines[:-6]
    assert lines[-6:] == [NODE, NODE, "refused", "refused", "refused", "refused"]
    assert f"{address}\tbox" in files
    assert files[-1] == f"nameserver {PUBLIC}"


def test_bridge_with_an_allow_list(containers: Containers) -> None:
    script = reach((PUBLIC, 80), (PUBLIC, 443), (OTHER, 80), (METADATA, 80))
    lines = containers.play(script, pb.NETWORK_BRIDGE, [f"{PUBLIC}:443", METADATA]).splitlines()
    assert lines == ["refused", NODE, "refused", "refused"]


def test_root_cannot_change_its_network(containers: Containers) -> None:
    commands = (
        "ip addr add 10.0.0.1/8 dev eth0",
        "ip link set eth0 down",
        "ip link set eth0 address 02:00:00:00:00:01",
    )
    script = "\n".join(f"{command} 2>/dev/null && echo changed" for command in commands)
    script += f"\necho 1 2>/dev/null >/proc/sys/net/ipv6/conf/all/forwarding && echo changed\n{reach((PUBLIC, 80))}"
    # The kernel would let it: the files of /proc/sys/net belong to uid 0. Runs have /proc/sys read-only.
    assert containers.play(script, pb.NETWORK_BRIDGE).splitlines() == [NODE]

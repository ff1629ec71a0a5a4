"""The runtime's configuration: what a run is confined by."""

from __future__ import annotations

from typing import Any

import pytest

from afs.afslet.bundle import CAPABILITIES, IdMap, Process, Sandbox, runtime_config
from afs.afslet.rootfs import User

DOCKER = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}


def config_for(uid: int = 0, sandbox: Sandbox | None = None) -> dict[str, Any]:
    """The runtime's configuration for a user."""
    process = Process(("true",), ("A=1",), "/w", User(uid, 7, (8, 9), "/"))
    return runtime_config(process, "/root/fs", sandbox or Sandbox(5000))


def namespaces(config: dict[str, Any]) -> dict[str, str]:
    """The path of each kind; "" for a new one."""
    return {entry["type"]: entry.get("path", "") for entry in config["linux"]["namespaces"]}


def mounted(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Mounts by destination."""
    return {mount["destination"]: mount for mount in config["mounts"]}


def test_the_defaults() -> None:
    config = config_for()
    process, linux = config["process"], config["linux"]
    assert process["noNewPrivileges"]
    assert {name.removeprefix("CAP_") for name in process["capabilities"]["bounding"]} == DOCKER
    assert process["capabilities"]["effective"] == process["capabilities"]["permitted"] == list(CAPABILITIES)
    assert process["capabilities"]["inheritable"] == process["capabilities"]["ambient"] == []
    assert namespaces(config) == dict.fromkeys(("pid", "ipc", "uts", "mount", "network", "cgroup"), "")
    assert {"/proc/kcore", "/proc/keys", "/proc/interrupts", "/sys/firmware"} <= set(linux["maskedPaths"])
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(linux["readonlyPaths"])
    assert "ro" in mounted(config)["/sys"]["options"]
    assert linux["resources"]["devices"] == [{"allow": False, "access": "rwm"}]
    limits = {entry["type"]: (entry["soft"], entry["hard"]) for entry in process["rlimits"]}
    assert limits == {"RLIMIT_NOFILE": (1024, 5000), "RLIMIT_CORE": (0, 0)}
    assert process["oomScoreAdj"] > 0
    assert not process["terminal"]
    assert "seccomp" not in linux


def test_only_root_has_capabilities() -> None:
    process = config_for(1000)["process"]
    held = {kind: names for kind, names in process["capabilities"].items() if names}
    assert set(held) == {"bounding"}
    assert process["user"] == {"uid": 1000, "gid": 7, "additionalGids": [8, 9]}


def test_what_a_sandbox_says_is_in_the_configuration() -> None:
    seccomp = {"defaultAction": "SCMP_ACT_ERRNO"}
    files = (("/run/x/hosts", "/etc/hosts"),)
    config = config_for(0, Sandbox(100, "name", seccomp=seccomp, terminal=(24, 80), files=files, oom_score_adj=-5))
    assert config["hostname"] == "name"
    assert config["linux"]["seccomp"] == seccomp
    assert config["process"]["terminal"]
    assert config["process"]["consoleSize"] == {"height": 24, "width": 80}
    assert config["process"]["oomScoreAdj"] == -5
    assert config["process"]["rlimits"][0] == {"type": "RLIMIT_NOFILE", "soft": 100, "hard": 100}
    hosts = mounted(config)["/etc/hosts"]
    assert (hosts["source"], hosts["type"]) == ("/run/x/hosts", "bind")
    assert {"bind", "ro"} <= set(hosts["options"])
    assert list(mounted(config))[-1] == "/etc/hosts"  # over what is mounted before it


@pytest.mark.parametrize(
    ("network", "shown", "changes"), [("", "", True), ("/run/netns/x", "/run/netns/x", True), (None, None, False)]
)
def test_networks(network: str | None, shown: str | None, changes: bool) -> None:
    config = config_for(0, Sandbox(100, network=network))
    assert namespaces(config).get("network") == shown
    assert bool(config["linux"]["sysctl"]) is changes  # never the machine's
    assert mounted(config)["/sys"]["type"] == "sysfs"
    assert "ro" in mounted(config)["/sys"]["options"]


def test_a_user_namespace() -> None:
    config = config_for(0, Sandbox(100, ids=IdMap(200000, 65536)))
    assert namespaces(config)["user"] == ""
    mapping = [{"containerID": 0, "hostID": 200000, "size": 65536}]
    assert config["linux"]["uidMappings"] == config["linux"]["gidMappings"] == mapping
    assert config["linux"]["sysctl"] == {"net.ipv4.ip_unprivileged_port_start": "0"}
    assert mounted(config)["/sys"]["type"] == "sysfs"


@pytest.mark.parametrize("network", [None, "/run/netns/x"])
def test_a_user_namespace_has_no_sysfs_of_another_network(network: str | None) -> None:
    """The kernel mounts sysfs for who owns the network namespace only; the machine's own is bound, and hidden in part."""
    config = config_for(0, Sandbox(100, network=network, ids=IdMap(200000, 65536)))
    sys = mounted(config)["/sys"]
    assert (sys["source"], sys["type"]) == ("/sys", "none")
    assert {"rbind", "rro"} <= set(sys["options"])
    assert "/sys/fs/cgroup" in config["linux"]["maskedPaths"]
    assert config["linux"]["sysctl"] == {}


def test_configurations_share_nothing_that_changes() -> None:
    first, second = config_for(), config_for()
    first["linux"]["cgroupsPath"] = "/x"
    first["mounts"].append({"destination": "/more"})
    first["linux"]["maskedPaths"].append("/more")
    assert second == config_for()

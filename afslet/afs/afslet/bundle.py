"""The runtime's config.json (OCI runtime spec 1.0.2) for one run. Plain data in, plain data out."""

import functools
import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afs.afslet.rootfs import User
from afs.core.errors import InvalidArgument

DEFAULT_HOSTNAME = "afs"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What Docker gives by default (moby, oci/caps/defaults.go).
CAPABILITIES = (
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
)  # fmt: skip
# As moby, oci/defaults.go; /proc/interrupts and each CPU's thermal_throttle tell containers what others do.
_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
    "/sys/devices/virtual/powercap",
)  # fmt: skip
# As Docker, and /proc/pressure, which everybody may write to: every trigger that is set there is work for the kernel.
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/pressure", "/proc/sys", "/proc/sysrq-trigger")
# What is mounted below the machine's /sys, which a container gets to see only if it cannot have a /sys of its own.
_MASKED_BELOW_SYS = ("/sys/fs/bpf", "/sys/fs/cgroup", "/sys/fs/fuse", "/sys/kernel/debug", "/sys/kernel/security",
                     "/sys/kernel/tracing")  # fmt: skip
_MOUNTS: tuple[dict[str, Any], ...] = (
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
    },
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
    },
    {
        "destination": "/dev/shm",  # noqa: S108 - inside the container
        "type": "tmpfs",
        "source": "shm",
        "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
    },
    {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
)
# No /sys/fs/cgroup, not even read-only as Docker has it: our limits are on a group above the container's own, so programs
# that size themselves by it would read that there is no limit.
_SYS = {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}
_MACHINE_SYS = {
    "destination": "/sys",
    "type": "none",
    "source": "/sys",
    "options": ["rbind", "rprivate", "nosuid", "noexec", "nodev", "rro"],
}


@dataclass(frozen=True, slots=True)
class Process:
    """What to run. *argv*, *env* and *cwd* are final: the image's settings are already in them."""

    argv: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User


@dataclass(frozen=True, slots=True)
class IdMap:
    """A user namespace: user and group n in the container, below *count*, is *first* + n outside."""

    first: int
    count: int


NEW_NETWORK = ""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """What a run is confined by, besides its cgroup.

    *network* is NEW_NETWORK for a namespace with a loopback interface alone, the path of a namespace to join, or None for
    the machine's own. *ids* is for a user namespace, and the root has to be mounted with the same ones. *seccomp* comes
    from :func:`afs.afslet.seccomp.load_filter`. *terminal* is (rows, columns), None for no terminal. *files* are (source
    on the node, path in the container), bound read-only; what they are bound over is made, so it should be there.
    *oom_score_adj*: the kernel that runs out of memory takes runs first, not the services of the node.
    """

    max_files: int
    hostname: str = DEFAULT_HOSTNAME
    network: str | None = NEW_NETWORK
    ids: IdMap | None = None
    seccomp: Mapping[str, Any] | None = None
    terminal: tuple[int, int] | None = None
    files: tuple[tuple[str, str], ...] = ()
    oom_score_adj: int = 500


def runtime_config(process: Process, rootfs: str, sandbox: Sandbox) -> dict[str, Any]:
    """config.json: pid, ipc, uts, mount and cgroup namespaces of its own and what *sandbox* says; new lists and tables.

    The limits are not here: they are on the cgroup around the runtime's, whose path :mod:`afs.afslet.runc` fills in.
    """
    # A namespace that somebody else made is not the user namespace's, and sysfs is only for who owns the network.
    has_sys = sandbox.ids is None or sandbox.network == NEW_NETWORK
    binds = [
        {"destination": path, "type": "bind", "source": source, "options": ["bind", "ro", "nosuid", "nodev", "noexec"]}
        for source, path in sandbox.files
    ]
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": _process(process, sandbox),
        "root": {"path": rootfs, "readonly": False},
        "hostname": sandbox.hostname,
        "mounts": [*_MOUNTS, _SYS if has_sys else _MACHINE_SYS, *binds],
        "linux": {
            "namespaces": _namespaces(sandbox),
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "sysctl": _sysctl(sandbox),
            "maskedPaths": [*_MASKED, *_thermal_paths(), *(() if has_sys else _MASKED_BELOW_SYS)],
            "readonlyPaths": list(_READ_ONLY),
        },
    }
    if sandbox.ids is not None:
        mapping = {"containerID": 0, "hostID": sandbox.ids.first, "size": sandbox.ids.count}
        config["linux"] |= {"uidMappings": [mapping], "gidMappings": [mapping]}
    if sandbox.seccomp is not None:
        config["linux"]["seccomp"] = sandbox.seccomp
    return config


def _process(process: Process, sandbox: Sandbox) -> dict[str, Any]:
    held = list(CAPABILITIES) if process.user.uid == 0 else []
    files = sandbox.max_files
    found: dict[str, Any] = {
        "terminal": sandbox.terminal is not None,
        "user": {"uid": process.user.uid, "gid": process.user.gid, "additionalGids": list(process.user.groups)},
        "args": list(process.argv),
        "env": list(process.env),
        "cwd": process.cwd,
        # As Docker: a user other than root starts without capabilities, but setuid programs may gain the bounding set,
        # which no_new_privs forbids as well. With ambient or inheritable ones every program that is run would gain them.
        "capabilities": {
            "bounding": list(CAPABILITIES),
            "effective": held,
            "permitted": held,
            "inheritable": [],
            "ambient": [],
        },
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": min(1024, files), "hard": files},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},  # a core file would be in the diff
        ],
        "noNewPrivileges": True,
        "oomScoreAdj": sandbox.oom_score_adj,
    }
    if sandbox.terminal is not None:
        rows, columns = sandbox.terminal
        found["consoleSize"] = {"height": rows, "width": columns}
    return found


def _namespaces(sandbox: Sandbox) -> list[dict[str, str]]:
    found = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")]
    if sandbox.network is not None:
        found.append({"type": "network"} | ({"path": sandbox.network} if sandbox.network else {}))
    if sandbox.ids is not None:
        found.append({"type": "user"})
    return found


def _sysctl(sandbox: Sandbox) -> dict[str, str]:
    """As Docker since 20.10: low ports and ping for every user, who cannot hurt anybody in a network of his own."""
    if sandbox.network is None or (sandbox.ids is not None and sandbox.network != NEW_NETWORK):
        return {}  # not ours, or not for root in the user namespace to change
    found = {"net.ipv4.ip_unprivileged_port_start": "0"}
    if sandbox.ids is None:  # a group without a number there is refused
        found["net.ipv4.ping_group_range"] = "0 2147483647"
    return found


@functools.cache
def _thermal_paths() -> tuple[str, ...]:
    return tuple(sorted(glob.glob("/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle")))


def merge_env(image: Sequence[str], request: Sequence[str], usual: Mapping[str, str]) -> tuple[str, ...]:
    """What every process expects to have, such as HOME in *usual*; over it the image's environment, then the request's."""
    merged = {"PATH": DEFAULT_PATH, **usual}
    for entry in (*image, *request):
        name, _, value = entry.partition("=")
        merged[name] = value
    return tuple(f"{name}={value}" for name, value in merged.items())


def image_settings(config: bytes, where: str) -> dict[str, Any]:
    """``config`` of an image's configuration (OCI image spec, config.md); InvalidArgument names *where* it is from."""
    try:
        settings = json.loads(config).get("config") or {}
    except (ValueError, AttributeError):
        settings = None
    if not isinstance(settings, dict):
        raise InvalidArgument(f"{where}: its config makes no sense")
    return settings


def command_line(config: Mapping[str, Any], command: Sequence[str]) -> tuple[str, ...]:
    """*command*, or the image's Entrypoint and Cmd (OCI image spec, config.md)."""
    if command:
        return tuple(command)
    return (*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ()))

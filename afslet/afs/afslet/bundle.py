"""The runtime's config.json (OCI runtime spec 1.0.2) for one run. Plain data in, plain data out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from afs.afslet.rootfs import User

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What Docker gives by default.
_CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID", "CAP_SETUID",
    "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
]  # fmt: skip
_MASKED = [
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
]  # fmt: skip
_READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_MOUNTS: list[dict[str, Any]] = [
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
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
]


@dataclass(frozen=True, slots=True)
class Process:
    """What to run. *argv*, *env* and *cwd* are final: the image's settings are already in them."""

    argv: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User


def runtime_config(process: Process, rootfs: str, max_files: int, hostname: str = "afs") -> dict[str, Any]:
    """config.json: own pid, ipc, uts, mount, cgroup and network namespaces (loopback only), Docker's default capabilities.

    The limits are not here: they are on the cgroup around the runtime's, whose path :mod:`afs.afslet.runc` fills in.
    """
    root = process.user.uid == 0
    capabilities = _CAPABILITIES if root else []
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": process.user.uid, "gid": process.user.gid, "additionalGids": list(process.user.groups)},
            "args": list(process.argv),
            "env": list(process.env),
            "cwd": process.cwd,
            # As Docker: a user other than root starts without capabilities, but setuid programs may gain the bounding set,
            # which no_new_privs forbids as well.
            "capabilities": {"bounding": _CAPABILITIES, "effective": capabilities, "permitted": capabilities},
            "rlimits": [{"type": "RLIMIT_NOFILE", "soft": min(1024, max_files), "hard": max_files}],
            "noNewPrivileges": True,
        },
        "root": {"path": rootfs, "readonly": False},
        "hostname": hostname,
        "mounts": _MOUNTS,
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup", "network")],
            "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "maskedPaths": _MASKED,
            "readonlyPaths": _READ_ONLY,
        },
    }


def merge_env(image: Sequence[str], request: Sequence[str], home: str) -> tuple[str, ...]:
    """The image's environment, the request's over it, and what every process expects to have."""
    merged = {"PATH": DEFAULT_PATH, "HOME": home, "HOSTNAME": "afs"}
    for entry in (*image, *request):
        name, _, value = entry.partition("=")
        merged[name] = value
    return tuple(f"{name}={value}" for name, value in merged.items())


def command_line(config: Mapping[str, Any], command: Sequence[str]) -> tuple[str, ...]:
    """*command*, or the image's Entrypoint and Cmd (OCI image spec, config.md)."""
    if command:
        return tuple(command)
    return (*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ()))

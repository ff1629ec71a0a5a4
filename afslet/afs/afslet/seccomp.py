"""The seccomp filter of runs: a profile in the format of Docker and containers/common, or in the OCI runtime spec's own.

The runtime compiles the filter at every start. Measured with `runc run` of /bin/true, 25 times in turn, and Debian's
profile: 9.8 ms without a filter; with one 12 ms for x86_64 alone, 15.5 ms with x86, 21.7 ms with x32 as well. What
counts is the number of system calls times architectures: joining rules and leaving out names that the machine does not
have changes nothing that can be measured. So x32, which nobody builds images for, is left out (libseccomp then kills
who tries it), and x86 stays, for there are 32-bit programs in images.
"""

import dataclasses
import errno
import json
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afs.core.errors import InvalidArgument

log = logging.getLogger(__name__)
DISTRIBUTION_PROFILE = Path("/usr/share/containers/seccomp.json")  # Debian: golang-github-containers-common
UNCONFINED = "unconfined"

_ALLOW, _ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
_ACTIONS = {_ALLOW, _ERRNO, *(f"SCMP_ACT_{name}" for name in ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "LOG"))}
_OPERATORS = {f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")}
_ARCHITECTURES = {  # uname -m: the name in archMap and `architectures`, and the one in includes and excludes
    "x86_64": ("SCMP_ARCH_X86_64", "amd64"),
    "aarch64": ("SCMP_ARCH_AARCH64", "arm64"),
    "ppc64le": ("SCMP_ARCH_PPC64LE", "ppc64le"),
    "riscv64": ("SCMP_ARCH_RISCV64", "riscv64"),
    "s390x": ("SCMP_ARCH_S390X", "s390x"),
}
_X32 = "SCMP_ARCH_X32"
# The distribution's profile is made for podman, whose containers may have containers in them: it lets everybody make
# namespaces and mounts, and leaves it to the kernel to say no. In a user namespace of its own a process has every
# capability, and with that a way to much of the kernel that it has no business with. Docker's profile gives these to
# nobody without the capability (profiles/seccomp/default_linux.go); so do we.
_GUARDED = {
    "CAP_SYS_ADMIN": (
        *("clone3", "unshare", "setns", "mount", "umount", "umount2", "pivot_root", "mount_setattr", "move_mount"),
        *("open_tree", "fsopen", "fsconfig", "fsmount", "fspick"),
    ),
    "CAP_SYS_BOOT": ("reboot",),
    "CAP_SYSLOG": ("syslog",),
    "CAP_SYS_PTRACE": ("pidfd_getfd",),
    "": ("add_key", "keyctl", "request_key", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register"),
}  # fmt: skip
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW*, but for CLONE_NEWTIME, whose bit is an exit signal's to clone(2)
_AF_VSOCK = 40  # reaches the host of a virtual machine, past every network namespace


@dataclass(frozen=True, slots=True)
class Host:
    """What a profile's rules may depend on. *machine* is as `uname -m` has it."""

    machine: str
    kernel: tuple[int, int]
    capabilities: frozenset[str]

    @classmethod
    def here(cls, capabilities: Collection[str]) -> "Host":
        """This machine, and containers with *capabilities* in their bounding set."""
        release = re.match(r"(\d+)\.(\d+)", os.uname().release)
        kernel = (int(release[1]), int(release[2])) if release else (0, 0)
        return cls(os.uname().machine, kernel, frozenset(capabilities))


def load_filter(setting: str, capabilities: Collection[str]) -> dict[str, Any] | None:
    """``linux.seccomp`` of the runtime's configuration for containers with *capabilities*; None for no filter.

    *setting* is a profile's path, taken as it is; ``unconfined``; or empty: the distribution's profile, made stricter.
    Reads the file and logs what it found, so call it once, at start. InvalidArgument names the file and the cause.
    """
    if setting == UNCONFINED:
        log.warning("runs have no seccomp filter: the setting is %s", UNCONFINED)
        return None
    path = Path(setting or DISTRIBUTION_PROFILE)
    if not setting and not path.exists():
        log.error("RUNS HAVE NO SECCOMP FILTER: there is no profile at %s, and no other one is configured", path)
        return None
    host = Host.here(capabilities)
    try:
        with path.open("rb") as file:
            found = translate(json.load(file), host)
    except OSError as error:
        raise InvalidArgument(f"seccomp profile {path}: {error.strerror}") from error
    except ValueError as error:  # of JSON, of its encoding, and our own
        raise InvalidArgument(f"seccomp profile {path}: {error}") from error
    log.info("runs get the seccomp filter of %s", path)
    return found if setting else tighten(found, host)


def native_only(found: Mapping[str, Any]) -> dict[str, Any]:
    """The filter for containers whose programs are all of the machine's own width: those of another are killed.

    Each further architecture is a second filter to be made at every start: 3.5 ms of 15.5.
    """
    return {**found, "architectures": found["architectures"][:1]}


def translate(profile: object, host: Host) -> dict[str, Any]:
    """A profile of either format as the OCI runtime spec (config-linux.md, Seccomp) has it; ValueError says what is wrong."""
    table = _table(profile, "the profile")
    if not table.get("syscalls"):
        raise ValueError("it has no syscalls")
    default = _action(table.get("defaultAction"), "defaultAction")
    found: dict[str, Any] = {"defaultAction": default, "architectures": _architectures(table, host)}
    code = _errno(table, "defaultErrnoRet", "defaultErrno")
    if code is not None:
        found["defaultErrnoRet"] = code
    if flags := _strings(table, "flags"):
        found["flags"] = flags
    rules = [rule for entry in _list(table, "syscalls") for rule in _rules(entry, host)]
    found["syscalls"] = _joined(rules, _Outcome(default, code))
    return found


def tighten(found: Mapping[str, Any], host: Host) -> dict[str, Any]:
    """The filter without what Docker's own profile withholds from containers with the host's capabilities."""
    denied = {name for needed, names in _GUARDED.items() if needed not in host.capabilities for name in names}
    rules: list[dict[str, Any]] = []
    for rule in found["syscalls"]:
        if rule["action"] != _ALLOW:
            rules.append(rule)
            continue
        names = [name for name in rule["names"] if name not in denied]
        for name, conditions in () if rule.get("args") else _CONDITIONS.items():
            if name in names:
                names.remove(name)
                rules += conditions(host)
        if names:
            rules.append({**rule, "names": names})
    if "clone3" in denied:  # libc then uses clone, whose flags a filter can see
        rules.append(_rule("clone3", _ERRNO, code=errno.ENOSYS))
    rules.append({"names": sorted(denied - {"clone3"}), "action": _ERRNO, "errnoRet": errno.EPERM})
    return {**found, "syscalls": _joined(rules, _Outcome(found["defaultAction"], found.get("defaultErrnoRet")))}


def _clone(host: Host) -> list[dict[str, Any]]:
    if "CAP_SYS_ADMIN" in host.capabilities:
        return [_rule("clone", _ALLOW)]
    flags = int(host.machine == "s390x")  # which argument they are
    return [_rule("clone", _ALLOW, _compare(flags, "MASKED_EQ", _NAMESPACE_FLAGS))]


def _socket(_: Host) -> list[dict[str, Any]]:
    return [
        _rule("socket", _ALLOW, _compare(0, "NE", _AF_VSOCK)),
        _rule("socket", _ERRNO, _compare(0, "EQ", _AF_VSOCK), errno.EAFNOSUPPORT),
    ]


_CONDITIONS = {"clone": _clone, "socket": _socket}  # what the profile allows and only some of it is


def _rule(name: str, action: str, argument: dict[str, Any] | None = None, code: int | None = None) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": [name], "action": action}
    return rule | ({"args": [argument]} if argument else {}) | ({} if code is None else {"errnoRet": code})


def _compare(index: int, operator: str, value: int) -> dict[str, Any]:
    return {"index": index, "value": value, "valueTwo": 0, "op": f"SCMP_CMP_{operator}"}


@dataclass(frozen=True, slots=True)
class _Outcome:
    action: str
    code: int | None

    def normal(self) -> "_Outcome":
        # The runtime returns EPERM if no number is given.
        return dataclasses.replace(self, code=errno.EPERM) if self.action == _ERRNO and self.code is None else self


def _joined(rules: list[dict[str, Any]], default: _Outcome) -> list[dict[str, Any]]:
    """One rule for each outcome without conditions, no name twice; without those that say what the default says.

    libseccomp refuses a second rule for one call that says another thing, so the first one counts, as it does there.
    """
    plain: dict[_Outcome, dict[str, None]] = {}
    seen: set[str] = set()
    others = []
    for rule in rules:
        outcome = _Outcome(rule["action"], rule.get("errnoRet"))
        if rule.get("args"):
            others.append(rule)
            continue
        fresh = {name: None for name in rule["names"] if name not in seen}
        seen.update(fresh)
        if outcome.normal() != default.normal():
            plain.setdefault(outcome, {}).update(fresh)
    joined: list[dict[str, Any]] = []
    for outcome, names in plain.items():
        if names:
            code = {} if outcome.code is None else {"errnoRet": outcome.code}
            joined.append({"names": list(names), "action": outcome.action, **code})
    return joined + [rule for rule in others if not seen.issuperset(rule["names"])]


def _architectures(table: Mapping[str, Any], host: Host) -> list[str]:
    if host.machine not in _ARCHITECTURES:
        raise ValueError(f"seccomp on {host.machine} is not supported")
    native = _ARCHITECTURES[host.machine][0]
    if "archMap" not in table:
        given = _strings(table, "architectures")
        if given and native not in given:
            raise ValueError(f"architectures lacks {native}, so every system call would be fatal here")
        return given or [native]
    if table.get("architectures"):
        raise ValueError("it has both architectures and archMap")
    for entry in _list(table, "archMap"):
        if _table(entry, "an entry of archMap").get("architecture") == native:
            return [native, *(name for name in _strings(entry, "subArchitectures") if name != _X32)]
    raise ValueError(f"archMap lacks {native}")


def _rules(entry: object, host: Host) -> Iterator[dict[str, Any]]:
    rule = _table(entry, "a rule of syscalls")
    names = [*_strings(rule, "names"), *([rule["name"]] if isinstance(rule.get("name"), str) and rule["name"] else [])]
    if not names:
        raise ValueError("a rule of syscalls has no names")
    where = f"the rule for {names[0]}"
    action = _action(rule.get("action"), where)
    arguments = [_argument(argument, where) for argument in _list(rule, "args")]
    code = _errno(rule, "errnoRet", "errno")
    if not _applies(rule, host, where):
        return
    found: dict[str, Any] = {"names": names, "action": action}
    if code is not None:
        found["errnoRet"] = code
    if arguments:
        found["args"] = arguments
    yield found


def _applies(rule: Mapping[str, Any], host: Host, where: str) -> bool:
    """Whether the conditions of a rule hold (moby, profiles/seccomp/seccomp_linux.go)."""
    arch = _ARCHITECTURES[host.machine][1]
    includes, excludes = (_table(rule.get(key) or {}, f"{key} of {where}") for key in ("includes", "excludes"))
    for conditions in (includes, excludes):
        if unknown := sorted(conditions.keys() - {"arches", "caps", "minKernel"}):
            raise ValueError(f"{where} has a condition that is not known here: {unknown[0]}")
    arches, caps = set(_strings(includes, "arches")), set(_strings(includes, "caps"))
    if (arches and arch not in arches) or not caps <= host.capabilities or host.kernel < _kernel(includes, where):
        return False
    excluded = arch in _strings(excludes, "arches") or not host.capabilities.isdisjoint(_strings(excludes, "caps"))
    return not excluded and not ("minKernel" in excludes and host.kernel >= _kernel(excludes, where))


def _kernel(conditions: Mapping[str, Any], where: str) -> tuple[int, int]:
    if not conditions.get("minKernel"):
        return 0, 0
    found = re.match(r"(\d+)\.(\d+)$", str(conditions["minKernel"]))
    if found is None:
        raise ValueError(f"{where} has a minKernel that is no version: {conditions['minKernel']!r}")
    return int(found[1]), int(found[2])


def _argument(argument: object, where: str) -> dict[str, Any]:
    table = _table(argument, f"an argument of {where}")
    if table.get("op") not in _OPERATORS:
        raise ValueError(f"{where} has an argument with the unknown op {table.get('op')!r}")
    numbers = {key: table.get(key, 0) for key in ("index", "value", "valueTwo")}
    for key, number in numbers.items():
        if type(number) is not int or not 0 <= number < (6 if key == "index" else 2**64):
            raise ValueError(f"{where} has an argument whose {key} is {number!r}")
    return {**numbers, "op": table["op"]}


def _action(action: object, where: str) -> str:
    # SCMP_ACT_NOTIFY needs an agent that answers, and SCMP_ACT_TRACE a tracer: without them a process waits for good.
    if not isinstance(action, str) or action not in _ACTIONS:
        raise ValueError(f"{where} has the action {action!r}, which is not supported")
    return action


def _errno(table: Mapping[str, Any], number: str, name: str) -> int | None:
    """The error number that a rule returns; containers/common has its name besides, which counts."""
    if given := table.get(name):
        code = getattr(errno, given, None) if isinstance(given, str) and given.startswith("E") else None
        if code is None:
            raise ValueError(f"{name} {given!r} is not known")
        return int(code)
    code = table.get(number)
    if code is not None and (type(code) is not int or not 0 < code < 4096):
        raise ValueError(f"{number} is {code!r}")
    return code


def _table(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")  # noqa: TRY004 - of a file, not of our code
    return value


def _list(table: Mapping[str, Any], key: str) -> list[Any]:
    value = table.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} is not a list")  # noqa: TRY004
    return value


def _strings(table: Mapping[str, Any], key: str) -> list[str]:
    value = _list(table, key)
    if not all(isinstance(each, str) and each for each in value):
        raise ValueError(f"{key} is not a list of names")
    return value

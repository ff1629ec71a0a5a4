"""What a test may leave on the machine: mounts, cgroups, loop devices, processes, network namespaces, files.

Take a `snapshot` before and `assert_no_new` after. Other tests may run on the machine at the same time, so only what
can be told to be ours counts: by path, by name, by descent, or by the tag in AFS_TEST_TAG that children inherit. Where
several workers run (pytest-xdist, or AFS_TEST_SHARED=1), names alone do not count, a tag must be in them.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import mounts

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

TAG_VARIABLE = "AFS_TEST_TAG"
_CGROUPS = Path("/sys/fs/cgroup")
_OURS = re.compile(
    r"(?:^|[\s/])(?:afs|afs_\w+|afslet)(?:\s|$)|-m afs\.|(?:^|/)containerd-shim\S* .*afs-test-|/(?:docker-registry|containerd) .*afs-test-"
)
_HELPERS = re.compile(r"multiprocessing\.(?:resource_tracker|forkserver)|execnet")
_INTERFACES = ("afs", "veth")
_POLL = 0.05
_exempt_paths: list[str] = []
_exempt_pids: list[int] = []

ProcessKey = tuple[int, int]
"""pid and start time (clock ticks since boot): a pid alone may be used again."""


@dataclass(frozen=True)
class Scope:
    """What counts as ours."""

    paths: tuple[str, ...] = ()
    """Directories that belong to this test run: mounts and loop devices below them count."""
    entries_of: tuple[str, ...] = ()
    """Directories whose direct entries are compared."""
    tag: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Snapshot:
    """What was there at one time; the keys of a mapping identify, its values describe."""

    scope: Scope
    processes: frozenset[ProcessKey] = field(repr=False)
    """All of the machine."""
    found: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """By kind (mounts, cgroups, loop devices, ...)."""


def tag() -> str:
    """This test process's tag; a name that contains it is known to be ours."""
    return os.environ.setdefault(TAG_VARIABLE, f"t{os.getpid()}")


def snapshot(paths: Iterable[Path] = (), entries_of: Iterable[Path] = ()) -> Snapshot:
    """Look at the machine; `paths` are directories of this test run, `entries_of` are watched for new entries."""
    shared = "PYTEST_XDIST_WORKER" in os.environ or os.environ.get("AFS_TEST_SHARED") == "1"
    scope = Scope(tuple(map(str, paths)), tuple(map(str, entries_of)), tag(), shared)
    return Snapshot(scope, frozenset(_all_processes()), _look(scope))


@contextmanager
def exempt(paths: Iterable[Path | str] = (), pids: Iterable[int] = ()) -> Iterator[None]:
    """Let nothing count that is under `paths` (mounts, loop devices, cgroups) or descends from `pids`.

    Nor processes with one of `paths` in their command line: some outlive on purpose who started them.

    For what outlives a test on purpose and changes while tests run, as a cluster shared by a session does.
    """
    added_paths, added_pids = [str(path) for path in paths], list(pids)
    _exempt_paths.extend(added_paths)
    _exempt_pids.extend(added_pids)
    try:
        yield
    finally:
        for path in added_paths:
            _exempt_paths.remove(path)
        for pid in added_pids:
            _exempt_pids.remove(pid)


def new_since(before: Snapshot) -> dict[str, list[str]]:
    """What is there now and was not before, by kind; empty if nothing is."""
    found = {kind: sorted(now - before.found[kind]) for kind, now in _look(before.scope).items()}
    found["processes"] = _new_processes(before)
    return {kind: things for kind, things in found.items() if things}


def assert_no_new(before: Snapshot, grace: float = 5.0) -> None:
    """Fail unless all that is new has gone within `grace` seconds: the kernel, and killed processes, take a moment.

    Raises:
        AssertionError: with a list of what is left, by kind.

    """
    deadline = time.monotonic() + grace
    while (left := new_since(before)) and time.monotonic() < deadline:
        time.sleep(_POLL)  # there is no event to wait for: cgroups, mounts and foreign processes end on their own
    if left:
        lines = [f"  {kind}: {thing}" for kind, things in left.items() for thing in things]
        raise AssertionError("left behind:\n" + "\n".join(lines))


def _look(scope: Scope) -> dict[str, frozenset[str]]:
    found = {
        "mounts": (mount.describe() for mount in mounts.table() if _mount_counts(mount, scope)),
        "cgroups": _cgroups(scope),
        "loop devices": _loops(scope),
        "network namespaces": (*_named(Path("/run/netns"), scope, ()), *_open_namespaces()),
        "network interfaces": _named(Path("/sys/class/net"), scope, _INTERFACES),
        "files": (f"{path}/{name}" for path in scope.entries_of for name in _names(Path(path))),
    }
    return {kind: frozenset(thing for thing in things if not _is_exempt(thing)) for kind, things in found.items()}


def _mount_counts(mount: mounts.Mount, scope: Scope) -> bool:
    if _below(mount.target, _exempt_paths):
        return False
    if _below(mount.target, scope.paths) or scope.tag in mount.target:
        return True
    defaults = ("/run/afs", "/var/lib/afs")
    temporary = mount.target.startswith(f"{tempfile.gettempdir()}/afs")
    return not scope.shared and (_below(mount.target, defaults) or temporary or mount.fstype.startswith("fuse.afs"))


def _cgroups(scope: Scope) -> Iterator[str]:
    for directory, children, _ in os.walk(_CGROUPS):
        for name in children:
            path = f"{directory}/{name}"
            if "/afs" in path[len(str(_CGROUPS)) :] and (not scope.shared or scope.tag in path):
                yield path


def _loops(scope: Scope) -> Iterator[str]:
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # detached meanwhile
            backing = device.read_text().strip()
            if _below(backing, scope.paths) or (not scope.shared and backing.endswith(".afslyr")):
                yield f"{device.parts[3]}: {backing}"


def _named(directory: Path, scope: Scope, prefixes: tuple[str, ...]) -> Iterator[str]:
    for name in _names(directory):
        if scope.tag in name or (not scope.shared and (not prefixes or name.startswith(prefixes))):
            yield name


def _open_namespaces() -> Iterator[str]:
    """Namespaces without a name that a descriptor of this process keeps alive; those that a process does go with it."""
    for name in _names(Path("/proc/self/fd")):
        with suppress(OSError):  # the descriptor of this very listing
            if (target := os.readlink(f"/proc/self/fd/{name}")).startswith("net:["):
                yield target


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []


def _below(path: str, directories: Iterable[str]) -> bool:
    return any(path == directory or path.startswith(f"{directory}/") for directory in directories)


def _is_exempt(thing: str) -> bool:
    return any(path in thing for path in _exempt_paths)


def _all_processes() -> dict[ProcessKey, int]:
    """Every process of the machine, with its parent's pid."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):  # it ended
                # The program's name, in parentheses, may hold anything; fields count from behind the last one.
                fields = Path("/proc", name, "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(name), int(fields[19])] = int(fields[1])
    return found


def _new_processes(before: Snapshot) -> list[str]:
    now = _all_processes()
    parents = {pid: parent for (pid, _), parent in now.items()}
    return [
        f"{pid} {command}"
        for pid, start in sorted(set(now) - before.processes)
        if (command := _is_ours(pid, parents, before.scope))
    ]


def _is_ours(pid: int, parents: Mapping[int, int], scope: Scope) -> str | None:
    """The command line of a process that counts, else None."""
    ancestors = set(_ancestors(pid, parents))
    if ancestors & set(_exempt_pids):
        return None
    command = _read(pid, "cmdline").replace("\0", " ").strip() or f"[{_read(pid, 'comm').strip()}]"
    if _HELPERS.search(command) or _is_exempt(command):
        return None
    if os.getpid() in ancestors:
        return command
    found = re.search(rf"(?:^|\0){TAG_VARIABLE}=([^\0]*)", _read(pid, "environ"))
    if found is not None:
        return command if found.group(1) == scope.tag else None
    return command if not scope.shared and _OURS.search(command) else None


def _ancestors(pid: int, parents: Mapping[int, int]) -> Iterator[int]:
    """A process, its parent, and so on."""
    while pid > 0:
        yield pid
        pid = parents.get(pid, 0)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:  # it ended, or is none of ours to read
        return ""

"""What a run executes: the image's settings, the request's over them, looked up in the root."""

import stat
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afs.afslet.bundle import DEFAULT_HOSTNAME, Process, command_line, merge_env
from afs.afslet.networks import HOSTS, RESOLV_CONF
from afs.afslet.rootfs import (
    Command,
    UnknownUser,
    User,
    find_bad_mount_point,
    find_command,
    find_groups,
    find_user,
    has_32bit_programs,
    make_directories,
    open_root,
    stat_inside,
)
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

_REMEMBERED = 1000
_MAX_PATH = 4096  # of a PATH with which something is remembered


@dataclass(frozen=True, slots=True)
class Place:
    """A *root* to look into; *where* is its name in errors, such as ``image alpine``.

    *unchanged* is the manifest digest of the image that the root still equals, else "". The root's owners are shifted so
    that 0 is *first_id*.
    """

    root: Path
    where: str
    unchanged: str = ""
    first_id: int = 0


@dataclass(frozen=True, slots=True)
class _Wanted:
    """All that the look-up depends on, but for the root itself."""

    user: str
    groups: tuple[str, ...]
    cwd: str
    name: str
    path: str


@dataclass(frozen=True, slots=True)
class _Found:
    user: User
    has_cwd: bool
    command: Command
    missing: tuple[str, ...]
    has_32bit: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """What to run, and whether it can be; *missing*: which of the files about the network the root does not have.

    *has_32bit*: programs for 32 bits are to be expected.
    """

    process: Process
    command: Command
    missing: tuple[str, ...]
    has_32bit: bool


class Commands:
    """Looks commands up. What was found in an unchanged image is remembered: nine reads and stats a run."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, int, _Wanted], _Found] = OrderedDict()

    def recall(self, start: pb.StartRequest, settings: dict[str, Any], place: Place) -> Prepared | None:
        """:meth:`prepare`, if that need not touch the root: what was found in the same image before."""
        if not place.unchanged:
            return None
        wanted = _wanted(start, settings, place.where)
        found = self._known.get((place.unchanged, place.first_id, wanted))
        return _prepared(start, settings, wanted, found) if found is not None and found.has_cwd else None

    def prepare(self, start: pb.StartRequest, settings: dict[str, Any], place: Place) -> Prepared:
        """Look up what to run. Blocking: it reads files of the image, which a peer may have to send first.

        *settings* are the image's. InvalidArgument if image or request name no command, or an unknown user.
        """
        wanted = _wanted(start, settings, place.where)
        key = (place.unchanged, place.first_id, wanted)
        found = self._known.pop(key, None) or _look_up(place, wanted)
        if place.unchanged and len(wanted.path) < _MAX_PATH:
            self._known[key] = found
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        if not found.has_cwd:
            with open_root(place.root) as fd:
                if not make_directories(fd, wanted.cwd, found.user.uid, found.user.gid, place.first_id):
                    raise InvalidArgument(f"{place.where}: its working directory {wanted.cwd} is not a directory")
        return _prepared(start, settings, wanted, found)


def _prepared(start: pb.StartRequest, settings: dict[str, Any], wanted: _Wanted, found: _Found) -> Prepared:
    argv, env = command_line(settings, start.command), _environment(start, settings, found.user.home)
    return Prepared(Process(argv, env, wanted.cwd, found.user), found.command, found.missing, found.has_32bit)


def _environment(start: pb.StartRequest, settings: dict[str, Any], home: str) -> tuple[str, ...]:
    usual = {"HOME": home, "HOSTNAME": start.hostname or DEFAULT_HOSTNAME}
    if start.tty:
        usual["TERM"] = "xterm"  # as Docker does
    return merge_env(settings.get("Env") or (), start.env, usual)


def _wanted(start: pb.StartRequest, settings: dict[str, Any], where: str) -> _Wanted:
    argv = command_line(settings, start.command)
    if not argv:
        raise InvalidArgument(f"{where} has neither Entrypoint nor Cmd: give a command")
    env = _environment(start, settings, "/")
    return _Wanted(
        start.user or str(settings.get("User") or ""),
        tuple(start.groups),
        start.cwd or str(settings.get("WorkingDir") or "/"),
        argv[0],
        next((entry[5:] for entry in env if entry.startswith("PATH=")), ""),
    )


def _look_up(place: Place, wanted: _Wanted) -> _Found:
    with open_root(place.root) as fd:
        if bad := find_bad_mount_point(fd):
            raise InvalidArgument(f"{place.where}: {bad} is not a directory")
        try:
            user = find_groups(fd, find_user(fd, wanted.user), wanted.groups)
        except UnknownUser as error:
            raise InvalidArgument(f"{place.where}: {error}") from None
        cwd = stat_inside(fd, wanted.cwd)
        has_cwd = cwd is not None and stat.S_ISDIR(cwd.st_mode)
        command = find_command(fd, wanted.name, wanted.cwd, wanted.path, user, place.first_id)
        missing = tuple(path for path in (HOSTS, RESOLV_CONF) if stat_inside(fd, path) is None)
        return _Found(user, has_cwd, command, missing, has_32bit_programs(fd, command.path))

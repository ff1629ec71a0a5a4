"""What a run executes: the image's settings, the request's over them, looked up in the root."""

import stat
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afs.afslet.bundle import DEFAULT_HOSTNAME, Process, command_line, merge_env
from afs.afslet.rootfs import (
    Command,
    UnknownUser,
    User,
    find_command,
    find_groups,
    find_user,
    make_directories,
    open_root,
    stat_inside,
)
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb

_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class _Wanted:
    """All that the look-up depends on, but for the root itself."""

    image: str
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


class Commands:
    """Looks commands up. What was found in an unchanged image is remembered: nine reads and stats a run."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, _Wanted], _Found] = OrderedDict()

    def prepare(
        self, start: pb.StartRequest, settings: dict[str, Any], root: Path, unchanged: str
    ) -> tuple[Process, Command]:
        """What to run, and whether it can be. Blocking: it reads files of the image, which a peer may have to send first.

        *settings* are the image's; *unchanged* is its manifest digest if *root* is the image as it is, else "".
        InvalidArgument if image or request name no command, or an unknown user.
        """
        wanted = _wanted(start, settings)
        found = self._known.pop((unchanged, wanted), None) or _look_up(root, wanted)
        if unchanged:
            self._known[unchanged, wanted] = found
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        if not found.has_cwd:
            with open_root(root) as fd:
                if not make_directories(fd, wanted.cwd, found.user.uid, found.user.gid):
                    raise InvalidArgument(f"image {start.image}: the working directory {wanted.cwd} is not a directory")
        argv, env = command_line(settings, start.command), _environment(start, settings, found.user.home)
        return Process(argv, env, wanted.cwd, found.user), found.command

    def knows(self, start: pb.StartRequest, settings: dict[str, Any], unchanged: str) -> bool:
        """Whether :meth:`prepare` would touch nothing in the root."""
        found = self._known.get((unchanged, _wanted(start, settings))) if unchanged else None
        return found is not None and found.has_cwd


def _environment(start: pb.StartRequest, settings: dict[str, Any], home: str) -> tuple[str, ...]:
    usual = {"HOME": home, "HOSTNAME": start.hostname or DEFAULT_HOSTNAME}
    if start.tty:
        usual["TERM"] = "xterm"  # as Docker does
    return merge_env(settings.get("Env") or (), start.env, usual)


def _wanted(start: pb.StartRequest, settings: dict[str, Any]) -> _Wanted:
    argv = command_line(settings, start.command)
    if not argv:
        raise InvalidArgument(f"image {start.image} has neither Entrypoint nor Cmd: give a command")
    env = _environment(start, settings, "/")
    return _Wanted(
        start.image,
        start.user or str(settings.get("User") or ""),
        tuple(start.groups),
        start.cwd or str(settings.get("WorkingDir") or "/"),
        argv[0],
        next((entry[5:] for entry in env if entry.startswith("PATH=")), ""),
    )


def _look_up(root: Path, wanted: _Wanted) -> _Found:
    with open_root(root) as fd:
        try:
            user = find_groups(fd, find_user(fd, wanted.user), wanted.groups)
        except UnknownUser as error:
            raise InvalidArgument(f"image {wanted.image}: {error}") from None
        cwd = stat_inside(fd, wanted.cwd)
        has_cwd = cwd is not None and stat.S_ISDIR(cwd.st_mode)
        return _Found(user, has_cwd, find_command(fd, wanted.name, wanted.cwd, wanted.path, user))

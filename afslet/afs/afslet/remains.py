"""What runs may leave on a node when nobody ends them properly, and how it is removed.

Three clear up: afslet when it stops, its keeper when afslet died, and the next afslet when it starts, in case both did.
"""

import json
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from afs.afslet import cgroups
from afs.afslet.netnames import clear_network
from afs.core.errors import AfsError, one_line
from afs.core.files import remove_tree

log = logging.getLogger(__name__)
_PATIENCE_S = 10.0
_PASSES = 10


@dataclass(frozen=True, slots=True)
class Remains:
    """Where they are: below *root* and *run_dir* of one afslet, and in cgroups below ``/cgroup_parent``.

    *temporary*: *root* itself goes as well, as that of one afs_runc.
    """

    root: str
    run_dir: str
    cgroup_parent: str
    temporary: bool = False

    @property
    def scratch(self) -> Path:
        """Uploads and bundles, a directory for each run."""
        return Path(self.root) / "runs"

    @property
    def state(self) -> Path:
        """The runtime's own directory."""
        return Path(self.run_dir) / "runtime"

    @property
    def networks(self) -> Path:
        """Files that runs get about their networks."""
        return Path(self.root) / "network"

    @property
    def locks(self) -> tuple[Path, Path]:
        """Who uses the directories holds these; take them in this order."""
        return Path(self.root) / "lock", Path(self.run_dir) / "afslet.lock"

    def to_json(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Remains":
        """What :meth:`to_json` made."""
        return cls(**json.loads(text))


def _runtimes(remains: Remains) -> str:
    """The runtime's processes: they are in no cgroup of a run, and one that is stopped outlives its container."""
    killed, deadline = 0, time.monotonic() + _PATIENCE_S
    while pids := list(_running(str(remains.state))):
        killed = max(killed, len(pids))
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} of the runtime do not die")
        time.sleep(0.001)
    return f"killed {killed} processes of the runtime" if killed else ""


def _running(state: str) -> Iterator[int]:
    """Kill the processes with ``--root STATE`` in their command line, and tell them; a dead one's is empty."""
    wanted = b"\0--root\0" + os.fsencode(state) + b"\0"
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if wanted not in file.read():
                    continue
            os.kill(int(name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):  # it ended
            continue
        yield int(name)


def _groups(remains: Remains) -> str:
    left = cgroups.clean_up(remains.cgroup_parent, _PATIENCE_S)
    return f"killed {left} runs" if left else ""


def _networks(remains: Remains) -> str:
    """The bridge, its interfaces and its rules; namespaces have gone with their last process and descriptor."""
    return "removed the bridge network" if clear_network(remains.cgroup_parent) else ""


def _directory(path: Path) -> str:
    left = len(os.listdir(path)) if path.is_dir() else 0
    remove_tree(path)
    return f"removed {left} entries of {path}" if left else ""


def _network_files(remains: Remains) -> str:
    remove_tree(remains.networks)  # one of them is afslet's own: that it is there says nothing about runs
    return ""


# In this order: runtimes start processes, and processes use what comes after them. A clean-up says what it found, or "".
CLEAN_UPS: tuple[tuple[str, Callable[[Remains], str]], ...] = (
    ("runtimes", _runtimes),
    ("runs", _groups),
    ("the runtime's state", lambda remains: _directory(remains.state)),
    ("networks", _networks),
    ("files about networks", _network_files),
    ("scratch directories", lambda remains: _directory(remains.scratch)),
    ("its directory", lambda remains: _directory(Path(remains.root)) if remains.temporary else ""),
)


def clean_up(remains: Remains, whose: str) -> bool:
    """Remove all of it, and log what it was, as *whose*. Blocks. One that fails is logged, and False is returned.

    Again as long as there was something: a runtime that is just being executed has no command line to be known by.
    """
    for _ in range(_PASSES):
        found, failed = False, False
        for name, remove in CLEAN_UPS:
            try:
                if removed := remove(remains):
                    log.warning("%s that %s left", removed, whose)
                    found = True
            except (OSError, AfsError) as error:
                log.error("cannot clean up %s that %s left: %s", name, whose, one_line(str(error)))
                failed = True
            except Exception:
                log.exception("cannot clean up %s that %s left", name, whose)
                failed = True
        if failed or not found:
            return not failed
    log.error("what %s left keeps changing", whose)
    return False

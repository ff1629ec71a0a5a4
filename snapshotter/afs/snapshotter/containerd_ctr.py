"""Asks containerd by its command line client, ``ctr``, whose words differ little from 1.6 to 2.4 where they are used here."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from afs.core.errors import DeadlineExceeded, FailedPrecondition, Internal, PermissionDenied, Unavailable
from afs.core.run import Answer, ask

SNAPSHOTTER_PLUGIN = "io.containerd.snapshotter.v1"
_CONNECT_TIMEOUT = "10s"


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin of containerd as it runs; *error* says why it does not."""

    type: str
    id: str
    exports: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


def connect(path: Path, who: str, advice: str) -> None:
    """See that somebody listens on the socket *path*; errors say *who* does not, and *advice*."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(path))
    except FileNotFoundError:
        raise Unavailable(f"{who} has no socket {path}; {advice}") from None
    except ConnectionRefusedError:
        raise Unavailable(f"{who} left its socket {path} behind and does not listen; {advice}") from None
    except PermissionError:
        raise PermissionDenied(f"{who}'s socket {path} is root's; be root") from None
    except TimeoutError:
        raise DeadlineExceeded(f"{who} does not accept connections on {path}; {advice}") from None
    except OSError as error:
        raise Unavailable(f"{who} cannot be reached on {path}: {error.strerror or error}; {advice}") from None


@dataclass(frozen=True, slots=True)
class Ctr:
    """``ctr`` for one containerd and one namespace; a call that takes longer than *timeout* seconds is killed."""

    address: Path
    namespace: str
    timeout: float
    program: str = "ctr"

    def ask(self, *arguments: str, stdin: bytes = b"") -> Answer:
        """Run it, whatever comes of it. FailedPrecondition without ctr, DeadlineExceeded."""
        argv = [self.program, "--address", str(self.address), "--connect-timeout", _CONNECT_TIMEOUT]
        try:
            return ask([*argv, "--namespace", self.namespace, *arguments], stdin=stdin, timeout=self.timeout)
        except OSError as error:
            raise FailedPrecondition(
                f"cannot run {self.program}: {error.strerror}; it comes with containerd, and has to be on PATH"
            ) from error

    def call(self, *arguments: str, stdin: bytes = b"") -> str:
        """What it prints; Internal with its last line of error if it fails."""
        answer = self.ask(*arguments, stdin=stdin)
        if answer.returncode:
            raise Internal(f"ctr {' '.join(arguments[:2])} failed: {last_error(answer)}")
        return answer.stdout.decode(errors="replace")

    def version(self) -> str:
        """The daemon's version, as it writes it."""
        shown = self.call("version").partition("Server:")[2]
        found = re.search(r"Version:\s*(\S+)", shown)
        return found[1] if found else "of unknown version"

    def snapshotters(self) -> dict[str, Plugin]:
        """The snapshotters of the daemon by name, those that do not work among them."""
        plugins = parse_plugins(self.call("plugins", "ls", "--detailed"))
        return {plugin.id: plugin for plugin in plugins if plugin.type == SNAPSHOTTER_PLUGIN}


def last_error(answer: Answer) -> str:
    """What a failed ``ctr`` gave as its reason: the last line that says something."""
    lines = (answer.stderr or answer.stdout).decode(errors="replace").strip().splitlines()
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix("ctr: ") if said else f"status {answer.returncode}, no message"


def parse_plugins(text: str) -> list[Plugin]:
    """What ``ctr plugins ls --detailed`` prints: a block for each plugin, begun by its type, whose parts are indented."""
    plugins = []
    for block in re.split(r"^(?=Type:)", text, flags=re.MULTILINE)[1:]:
        top: dict[str, str] = {}
        below: dict[str, dict[str, str]] = {}
        section = ""
        for line in block.splitlines():
            if not line.strip():
                continue
            if not line[0].isspace():
                section, _, value = line.partition(":")
                top[section] = value.strip()
            elif found := re.fullmatch(r"\s+(\S+?):?(?:\s{2,}(.*\S))?\s*", line):
                below.setdefault(section, {})[found[1]] = found[2] or ""
        error = below.get("Error", {}).get("Message", "")
        plugins.append(Plugin(top.get("Type", ""), top.get("ID", ""), below.get("Exports", {}), error))
    return plugins

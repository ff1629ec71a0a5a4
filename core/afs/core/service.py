"""The frame of every daemon: logging, one asyncio loop, signals, readiness, and how an error ends the process."""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Awaitable, Callable

from afs.core import syscalls
from afs.core.errors import AfsError, status_of

log = logging.getLogger(__name__)
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up_logging(level: str = "INFO") -> None:
    """Log to stderr; the service manager adds the rest."""
    logging.basicConfig(level=level.upper(), format=FORMAT, stream=sys.stderr)


def raise_file_limit() -> None:
    """Let this process open as many files as it may: the soft limit is 1024 by custom, for the sake of select(2)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def notify(state: str) -> None:
    """Tell the service manager *state*, as sd_notify(3) does; nothing happens without ``NOTIFY_SOCKET``."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        sock.sendall(state.encode())


def _end_with_parent() -> None:
    """Stop when the process in ``AFS_PARENT_PID`` ends, even by SIGKILL: so `afs up` and tests leave no services behind."""
    parent = os.environ.get("AFS_PARENT_PID")
    if not parent:
        return
    syscalls.set_parent_death_signal(signal.SIGTERM)
    if os.getppid() != int(parent):  # it ended before we asked
        os.kill(os.getpid(), signal.SIGTERM)


def run_service(name: str, serve: Callable[[asyncio.Event], Awaitable[None]], *, level: str = "INFO") -> int:
    """Run ``serve(stop)`` until it returns and give the exit code.

    *stop* is set by SIGTERM or SIGINT; serve calls :func:`notify` with ``READY=1`` once it answers requests, and must
    release everything before it returns. An AfsError or OSError ends the process with one line and the table's exit
    code; anything else is a bug and shows its traceback.
    """
    set_up_logging(level)
    _end_with_parent()

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stop.set)
        await serve(stop)

    try:
        asyncio.run(main())
    except AfsError as error:
        sys.stderr.write(f"{name}: {error.line}\n")
        return status_of(error).exit_code
    except OSError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return status_of(error).exit_code
    return 0

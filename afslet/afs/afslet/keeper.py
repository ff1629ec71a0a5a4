"""``python -m afs.afslet.keeper``: ends what runs of an afslet are left when it died; afslet starts it itself.

It waits for afslet's death on a pidfd, which even SIGKILL makes readable, and listens to it on a socket: a beat every so
often, and a word when afslet has stopped properly. An afslet that is silent for the time of a lease, because it is stopped
or hangs, is killed: its clients have lost it, and nobody else ends their runs. Then the keeper clears up, unless another
afslet has started meanwhile, which does so itself.

It is a session of its own and ignores what ends sessions, process groups and services. It waits with as few modules as
possible (10 MiB), and imports the rest when it has something to do.
"""

import contextlib
import os
import select
import signal
import sys
import time

BEAT, GOODBYE = b".", b"q"
BEATS_PER_LEASE = 4
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def watch(pidfd: int, sock: int, lease_ttl: float) -> bool:
    """Wait until afslet has ended; whether it stopped properly."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.register(sock, select.POLLIN)
    silent = 0
    while True:
        # Intervals of ours, not time: a machine that was paused is no afslet that hangs.
        ready = [fd for fd, _ in poller.poll(lease_ttl / BEATS_PER_LEASE * 1000)]
        if sock in ready:
            silent = 0
            said = _read(sock)
            if GOODBYE in said:
                return True
            if said:
                _answer(sock)
            else:
                poller.unregister(sock)  # it is ending, or has given us up
        if pidfd in ready:
            return False
        if not ready and (silent := silent + 1) == BEATS_PER_LEASE:
            _say(f"afslet has been silent for {lease_ttl:g} s: killing it")
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _read(sock: int) -> bytes:
    """b"" at the end; a socket that was closed with something unread says it in another way."""
    try:
        return os.read(sock, 64)
    except ConnectionResetError:
        return b""


def _answer(sock: int) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has just ended: the pidfd tells
        os.write(sock, BEAT)


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} WARNING afslet keeper: {line}\n")
    sys.stderr.flush()


def _clean_up(remains_json: str) -> int:
    from afs.afslet.locks import take_for_keeper
    from afs.afslet.remains import Remains, clean_up
    from afs.core.service import set_up_logging

    set_up_logging()
    remains = Remains.from_json(remains_json)
    with contextlib.ExitStack() as stack:
        if not take_for_keeper(stack, remains.locks):
            _say("another afslet has started, and clears up")
            return 0
        return 0 if clean_up(remains, "a killed afslet") else 1


def main(pidfd: int, sock: int, lease_ttl: float, remains_json: str) -> int:
    """See the module; the exit code."""
    for signum in _IGNORED:
        signal.signal(signum, signal.SIG_IGN)
    if watch(pidfd, sock, lease_ttl):
        return 0
    return _clean_up(remains_json)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))

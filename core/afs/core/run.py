"""Every child process of AFS starts here, but for the container's, whose pipes :mod:`afs.afslet.runc` owns.

Children get their own argv only, never a shell. A failure is logged once, with a command line that can be pasted.
"""

import asyncio
import logging
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple

from afs.core.errors import DeadlineExceeded, Internal

log = logging.getLogger(__name__)
Child = subprocess.Popen[bytes]
PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL


class CommandFailed(Internal):
    """A helper program failed; *returncode* is negative for a signal."""

    def __init__(self, argv: Sequence[str], returncode: int, stderr: str) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr = stderr
        super().__init__(f"{shlex.join(argv)} failed with status {returncode}: {stderr.strip() or 'no message'}")


def run(
    argv: Sequence[str], *, stdin: bytes | None = None, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> bytes:
    """Run *argv* to its end and return its stdout; CommandFailed on a non-zero status."""
    done = subprocess.run(list(argv), input=stdin, capture_output=True, check=False, env=env, cwd=cwd)
    if done.returncode:
        failure = CommandFailed(argv, done.returncode, done.stderr.decode(errors="replace"))
        log.warning("%s", failure.line)
        raise failure
    return done.stdout


class Answer(NamedTuple):
    """How a program ended that was asked something; *returncode* is negative for a signal."""

    returncode: int
    stdout: bytes
    stderr: bytes


def ask(argv: Sequence[str], *, stdin: bytes, timeout: float) -> Answer:
    """Run *argv*, whose failure is an answer too, to its end. Raises FileNotFoundError, PermissionError.

    After *timeout* seconds, or when this is interrupted, it is killed with all that it started: DeadlineExceeded.
    """
    with popen(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, new_session=True) as child:
        try:
            out, err = child.communicate(stdin, timeout)
        except BaseException as error:  # an interrupt too: a session of its own gets no Ctrl-C
            os.killpg(child.pid, signal.SIGKILL)  # its children may hold the pipes
            child.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise DeadlineExceeded(f"{shlex.join(argv)} did not answer within {timeout:g} s") from None
            raise
    return Answer(child.returncode, out, err)


def popen(
    argv: Sequence[str],
    *,
    executable: str | None = None,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = False,
) -> Child:
    """Start *argv*, from the file *executable* if it is given; the caller owns the process and its pipes."""
    return subprocess.Popen(
        list(argv),
        executable=executable,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        cwd=cwd,
        pass_fds=pass_fds,
        start_new_session=new_session,
    )


async def wait(process: Child) -> int:
    """Wait for *process* without blocking the loop and return its status; negative for a signal.

    A pidfd becomes readable when the process is a zombie (pidfd_open(2)), so no thread and no SIGCHLD handler is needed.
    """
    if process.poll() is not None:
        return process.returncode
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    try:
        loop.add_reader(pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(pidfd)
    finally:
        os.close(pidfd)
    return process.wait()


async def stop(process: Child, grace_s: float) -> int:
    """Send SIGTERM, after *grace_s* seconds SIGKILL, and return the status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(wait(process), grace_s)
        except TimeoutError:
            log.warning("pid %d ignores SIGTERM for %.0f s: killing it", process.pid, grace_s)
            process.kill()
    return await wait(process)

"""``afs_runc``: run one command in a root directory under limits, with the same code that afslet runs containers with."""

import asyncio
import contextlib
import fcntl
import os
import resource
import secrets
import signal
import struct
import sys
import tempfile
import termios
import tty as terminals
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from afs.core.cli import fail
from afs.core.errors import AfsError, Cancelled, Internal, InvalidArgument
from afs.core.units import parse_duration

if TYPE_CHECKING:
    from afs.afslet.stdio import Stdio
    from afs.proto.v1 import afslet_pb2

_READ_SIZE = 1 << 16
_PATIENCE_S = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the command line asks for. Memory in bytes, times in seconds."""

    rootfs: Path
    start: "afslet_pb2.StartRequest"
    settings: dict[str, Any]  # the image config's
    cpus: float
    memory: int
    swap: int
    timeout: float
    grace: float
    runtime: str
    seccomp: str
    host_network: bool


async def run(wishes: Wishes) -> int:
    """The exit code: the command's, 128 + n for signal n, 124 after a timeout, 137 when memory ran out."""
    from afs.afslet.bundle import CAPABILITIES, NEW_NETWORK, Sandbox, runtime_config
    from afs.afslet.cgroups import Limits, clean_up
    from afs.afslet.command import Commands, Place
    from afs.afslet.outcomes import Subject, cannot_run, result_of
    from afs.afslet.runc import Job, Runtime, become_subreaper, run_container
    from afs.afslet.runtimebinary import RuntimeBinary
    from afs.afslet.seccomp import load_filter, native_only
    from afs.core.files import remove_tree

    start, where = wishes.start, str(wishes.rootfs)
    prepared = Commands().prepare(start, wishes.settings, Place(wishes.rootfs, where))
    process, command = prepared.process, prepared.command
    subject = Subject(process.argv[0], where, wishes.timeout, wishes.memory)
    if not command.executable:
        return _say(cannot_run(subject, command))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    name = secrets.token_hex(8)
    parent = f"afs-runc-{name}"
    found = load_filter(wishes.seccomp, CAPABILITIES)
    sandbox = Sandbox(
        files,
        start.hostname or "afs",
        network=None if wishes.host_network else NEW_NETWORK,
        seccomp=found if found is None or wishes.seccomp or prepared.has_32bit else native_only(found),
        terminal=_window() if start.tty else None,
    )
    become_subreaper()
    async with contextlib.AsyncExitStack() as stack:
        home = Path(tempfile.mkdtemp(prefix="afs-runc-"))
        stack.callback(remove_tree, home)
        binary = RuntimeBinary(wishes.runtime)
        stack.callback(binary.close)
        await stack.enter_async_context(_kept(home, parent))
        stack.push_async_callback(asyncio.to_thread, clean_up, parent)
        (home / "bundle").mkdir()
        stdio = _stdio(start, home)
        stack.callback(stdio.close)
        await stack.enter_async_context(_input(stdio, start))
        limits = Limits(wishes.cpus, wishes.memory, start.pids_limit, wishes.swap)
        config = runtime_config(process, where, sandbox)
        ended = await run_container(
            Runtime(binary, home / "runtime", parent, files),
            Job(name, home / "bundle", config, limits, wishes.timeout, wishes.grace, stdio),
            _output,
            lambda: None,
        )
    return _say(result_of(subject, ended))


@contextlib.asynccontextmanager
async def _kept(home: Path, parent: str) -> AsyncIterator[None]:
    """If we are killed while the block runs, a keeper ends what runs; if we are stopped, as by Ctrl-Z, it does nothing.

    It is told in the end, however the block ends: all that clears up is within it.
    """
    from afs.afslet.keeping import kept
    from afs.afslet.remains import Remains

    failed: BaseException | None = None
    async with kept(Remains(str(home), str(home), parent, temporary=True), _PATIENCE_S):
        try:
            yield
        except (AfsError, OSError, asyncio.CancelledError) as error:
            failed = error
    if failed is not None:
        raise failed


def _say(result: "afslet_pb2.Result") -> int:
    from afs.proto.v1.afslet_pb2 import OUTCOME_SIGNALLED

    if result.error and result.outcome != OUTCOME_SIGNALLED:  # the exit code says that already
        click.echo(f"afs_runc: {result.error}", err=True)
    return result.exit_code


async def _output(source: str, data: bytes) -> None:
    stream = sys.stdout if source == "stdout" else sys.stderr
    await asyncio.to_thread(_write, stream.fileno(), data)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _stdio(start: "afslet_pb2.StartRequest", home: Path) -> "Stdio":
    from afs.afslet.stdio import Pipes, Terminal, Window

    return Terminal(home / "tty", Window(*_window())) if start.tty else Pipes(stdin=start.stdin)


def _window() -> tuple[int, int]:
    """Rows and columns of our terminal."""
    try:
        rows, columns = struct.unpack_from("HH", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))
    except OSError:  # not a terminal
        return 24, 80
    return int(rows) or 24, int(columns) or 80


@contextlib.asynccontextmanager
async def _input(stdio: "Stdio", start: "afslet_pb2.StartRequest") -> AsyncIterator[None]:
    """Standard input goes to the command while the block runs; with a terminal its keys and its size do."""
    from afs.afslet.stdio import Window

    if not start.stdin:
        yield
        return
    loop, arrived = asyncio.get_running_loop(), asyncio.Queue[bytes](16)

    async def feed() -> None:
        while data := await arrived.get():
            await stdio.write(data)
        stdio.end_input()

    # A thread: standard input may be a file, which epoll refuses, and our caller's, so it must not be made non-blocking.
    # It cannot be interrupted in read(2), and ends with the process.
    def read() -> None:
        data = b"more"
        while data:
            data = os.read(0, _READ_SIZE)
            try:
                asyncio.run_coroutine_threadsafe(arrived.put(data), loop).result()
            except (RuntimeError, asyncio.CancelledError):  # the run has ended
                return

    import threading

    feeding = asyncio.create_task(feed())
    threading.Thread(target=read, name="standard input", daemon=True).start()
    with _raw_terminal() if start.tty else contextlib.nullcontext():
        if start.tty:
            loop.add_signal_handler(signal.SIGWINCH, lambda: stdio.resize(Window(*_window())))
        try:
            yield
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Our terminal passes keys on as they are."""
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    terminals.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


async def _until_signal(name: str, work: Coroutine[None, None, int]) -> int:
    """The result of *work*; SIGINT and SIGTERM cancel it, which kills the container and removes its cgroup."""
    task = asyncio.create_task(work)
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise Cancelled(f"command {name!r} was cancelled") from None


def _settings(file: Path | None) -> dict[str, Any]:
    from afs.afslet.bundle import image_settings

    if file is None:
        return {}
    try:
        return image_settings(file.read_bytes(), f"--image-config {file}")
    except OSError as error:
        raise InvalidArgument(f"--image-config {file}: {error.strerror}") from error


@click.command(
    context_settings={"allow_interspersed_args": False},
    help="Run ARGV in a container whose root is the directory --rootfs. See docs/tools.md for its exit codes.",
)
@click.version_option(package_name="afs-cluster", prog_name="afs_runc")
@click.option("--rootfs", type=click.Path(path_type=Path), required=True)
@click.option(
    "--image-config", type=click.Path(path_type=Path), help="JSON of an OCI image: its Entrypoint, Env, ... apply."
)
@click.option("--cpu", "cpus", type=float, default=1.0, show_default=True, help="CPU cores; may be a fraction.")
@click.option("--memory-mb", type=int, default=512, show_default=True)
@click.option("--swap-mb", type=int, default=0, show_default=True, help="How much more may be on disk.")
@click.option("--pids", type=int, default=4096, show_default=True, help="Processes and threads.")
@click.option("--timeout", default="1h", show_default=True)
@click.option("--grace", default="2s", show_default=True, help="From SIGTERM to SIGKILL, after the timeout.")
@click.option("--env", multiple=True, help="NAME=value; repeatable.")
@click.option("--cwd", default="", help="Working directory.")
@click.option("--user", default="", help="USER[:GROUP], names or numbers.")
@click.option("--group", "groups", multiple=True, help="Supplementary group; repeatable.")
@click.option("--hostname", default="")
@click.option("--network", type=click.Choice(["none", "host"]), default="none", show_default=True)
@click.option("--stdin", "-i", is_flag=True, help="Pass standard input on.")
@click.option("--tty", "-t", is_flag=True, help="Give the command a terminal.")
@click.option("--seccomp", default="", help="Seccomp profile; unconfined for none. [default: the distribution's]")
@click.option("--runtime", default="", help="OCI runtime. [default: runc, else crun]")
@click.argument("argv", nargs=-1)
def main(
    rootfs: Path,
    image_config: Path | None,
    cpus: float,
    memory_mb: int,
    swap_mb: int,
    timeout: str,
    grace: str,
    network: str,
    seccomp: str,
    runtime: str,
    argv: tuple[str, ...],
    **options: Any,
) -> None:
    """Entry point."""
    from afs.afslet.requests import check_start
    from afs.proto.v1.afslet_pb2 import StartRequest

    try:
        if not rootfs.is_dir():
            raise InvalidArgument(f"--rootfs {rootfs} is not a directory")
        if not cpus > 0 or memory_mb <= 0 or swap_mb < 0 or options["pids"] <= 0:
            raise InvalidArgument("--cpu, --memory-mb, --swap-mb and --pids must be positive")
        options["pids_limit"] = options.pop("pids")
        # The millis are not what counts here: --cpu may be any fraction.
        start = StartRequest(image=str(rootfs), command=argv, cpu_millis=1000, memory_mb=memory_mb, **options)
        check_start(start)
        wishes = Wishes(
            rootfs.resolve(),
            start,
            _settings(image_config),
            cpus,
            memory_mb << 20,
            swap_mb << 20,
            parse_duration(timeout),
            parse_duration(grace),
            runtime,
            seccomp,
            network == "host",
        )
        code = asyncio.run(_until_signal(argv[0] if argv else "of the image", run(wishes)))
    except AfsError as error:
        fail("afs_runc", error)
    except (OSError, ValueError, OverflowError) as error:  # of the machine, or a number that no message holds
        fail("afs_runc", Internal(str(error)))
    sys.exit(code)


if __name__ == "__main__":
    main()

"""One run from its start request to its diff.

State: an :class:`Execution` belongs to one call and one task. What it takes (reservation, hold on the image, staging
directory, bundle, container) is on one exit stack, so whatever ends the call gives everything back, newest first.
"""

import asyncio
import codecs
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from afs.afslet.admission import Admission
from afs.afslet.bundle import Process, command_line, merge_env, runtime_config
from afs.afslet.cgroups import Limits
from afs.afslet.diff import Diff, DiffOptions
from afs.afslet.receiving import receive
from afs.afslet.requests import check_start
from afs.afslet.rootfs import Command, UnknownUser, find_command, find_user, make_directories, open_root
from afs.afslet.runc import Ended, Runtime, run_container
from afs.afslet.upload import Staging
from afs.core.errors import Internal, InvalidArgument
from afs.core.files import remove_tree
from afs.core.threads import to_its_end
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.mounts_pb2 import OpenImage
from afs.snapshotter.client import Hold, Mounts
from afs.snapshotter.messages import MountedRoot, root_request

TIMED_OUT, NOT_EXECUTABLE, NOT_FOUND, KILLED = 124, 126, 127, 137  # as timeout(1) and sh
_OUTPUT_QUEUE = 16  # messages of at most 64 KiB between the command and a slow client


@dataclass(frozen=True, slots=True)
class Node:
    """What all runs of this afslet share. *scratch* holds staging directories and bundles."""

    node_id: str
    scratch: Path
    mounts: Mounts
    admission: Admission
    runtime: Runtime
    default_timeout: float
    max_pids: int


class Execution:
    """See the module."""

    def __init__(self, node: Node, start: pb.StartRequest) -> None:
        check_start(start)
        self._node = node
        self._start = start
        self._diff_options = DiffOptions.of(start)
        self._name = secrets.token_hex(8)
        self._home = node.scratch / self._name
        self._timings = pb.Timings()
        self._staging: Staging | None = None

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic_ns()
        try:
            yield
        finally:
            setattr(self._timings, phase, (time.monotonic_ns() - started) // 1000)

    async def responses(self, requests: AsyncIterator[pb.ExecuteRequest]) -> AsyncGenerator[pb.ExecuteResponse, None]:
        """Everything the client gets, in order. *requests* are those after the start."""
        async with contextlib.AsyncExitStack() as stack:
            start = self._start
            stack.enter_context(self._node.admission.reserve(start.cpu_cores, start.memory_mb))
            accepted = pb.Accepted(accepted=True, node_id=self._node.node_id, upload_entries=True)
            yield pb.ExecuteResponse(accepted=accepted)
            self._home.mkdir()
            stack.push_async_callback(asyncio.to_thread, remove_tree, self._home)
            hold = await stack.enter_async_context(self._node.mounts.holding())
            image, staging = await self._prepare(stack, hold, requests)
            root = await self._make_root(hold, staging)
            result: pb.Result | None = None
            async with contextlib.aclosing(self._run(hold, image, root.path)) as events:
                async for event in events:
                    if isinstance(event, pb.Result):
                        result = event
                    else:
                        yield pb.ExecuteResponse(log=event)
            if result is None:
                raise Internal(f"run {self._name} ended without a result")
            yield pb.ExecuteResponse(result=result)
            assert root.upper is not None
            done, diff = pb.Done(), Diff(root.upper, root.lower, self._diff_options)
            if self._diff_options.name is not None:
                with self._timed("diff_us"):
                    yield pb.ExecuteResponse(tar_header=pb.TarHeader(name=self._diff_options.name))
                    async with contextlib.aclosing(diff.stream()) as chunks:
                        async for chunk in chunks:
                            yield pb.ExecuteResponse(tar_chunk=pb.TarChunk(data=chunk))
                done = pb.Done(diff_bytes=diff.bytes, diff_entries=diff.entries, diff_error=diff.error)
        # Only now is everything given back: a client that saw `done` can count on it.
        done.timings.CopyFrom(self._timings)
        yield pb.ExecuteResponse(done=done)

    async def _prepare(
        self, stack: contextlib.AsyncExitStack, hold: Hold, requests: AsyncIterator[pb.ExecuteRequest]
    ) -> tuple[dict[str, Any], Staging | None]:
        """Open the image and take the upload at the same time; the image's config and the upload."""
        opening = asyncio.create_task(self._open_image(hold), name=f"open image of {self._name}")
        stack.push_async_callback(_settled, opening)
        stack.push_async_callback(self._close_staging)  # once the upload has settled: it uses the descriptors
        receiving = asyncio.create_task(self._receive(requests), name=f"upload of {self._name}")
        stack.push_async_callback(_settled, receiving)
        await asyncio.wait([opening, receiving], return_when=asyncio.FIRST_EXCEPTION)
        for task in (receiving, opening):
            if task.done():
                task.result()  # the error that ended the wait, or nothing
        return await opening, await receiving

    async def _open_image(self, hold: Hold) -> dict[str, Any]:
        start = self._start
        with self._timed("image_us"):
            opened = await hold.open(
                OpenImage(
                    image=start.image,
                    tag=start.tag,
                    os=start.platform_os,
                    architecture=start.platform_arch,
                    variant=start.platform_variant,
                    force_local_fetch=start.force_local_fetch,
                )
            )
        settings = json.loads(opened.config).get("config") or {}
        if not isinstance(settings, dict):
            raise InvalidArgument(f"image {start.image}: its config makes no sense")
        return settings

    async def _close_staging(self) -> None:
        if self._staging is not None:
            await asyncio.to_thread(self._staging.close)

    async def _receive(self, requests: AsyncIterator[pb.ExecuteRequest]) -> Staging | None:
        """Take files until the client half-closes. None if there were none."""
        staging = self._staging = Staging(self._home / "upload")
        with self._timed("upload_us"):
            await receive(requests, staging)
        return staging if staging.entries else None

    async def _make_root(self, hold: Hold, staging: Staging | None) -> MountedRoot:
        with self._timed("root_us"):
            if staging is None:
                return await hold.mount()
            if self._start.upload_mode == pb.UPLOAD_COPY:
                root = await hold.mount()
                await to_its_end(staging.place_into, root.path)
                return root
            view = await hold.mount(root_request(read_only=True))
            await to_its_end(staging.settle, view.path)
            return await hold.mount(root_request([staging.directory]))

    async def _run(
        self, hold: Hold, image: dict[str, Any], root: Path
    ) -> AsyncGenerator[pb.LogMessage | pb.Result, None]:
        """Logs while the command runs, then its result. Closing it early kills the container."""
        start = self._start
        # In threads: they read files of the image, which may have to come from a peer first.
        process = await asyncio.to_thread(self._process, image, root)
        if (refused := await asyncio.to_thread(self._check_command, process, root)) is not None:
            yield refused
            return
        bundle = self._home / "bundle"
        bundle.mkdir()
        limits = Limits(float(start.cpu_cores), start.memory_mb << 20, self._node.max_pids)
        timeout = start.timeout_ms / 1000 or self._node.default_timeout
        queue: asyncio.Queue[pb.LogMessage | None] = asyncio.Queue(_OUTPUT_QUEUE)

        # One decoder per stream: a read may end within a character, and old clients see the text only.
        decoders = {source: codecs.getincrementaldecoder("utf-8")("replace") for source in ("stdout", "stderr")}

        async def output(source: str, data: bytes) -> None:
            await queue.put(pb.LogMessage(source=source, message=decoders[source].decode(data), data=data))

        async def run() -> Ended:
            config = runtime_config(process, str(root), self._node.runtime.max_files)
            try:
                with self._timed("run_us"):
                    return await run_container(self._node.runtime, self._name, bundle, config, limits, timeout, output)
            finally:
                # Wakes the reader below; with a full queue it is awake anyway and looks at the task.
                with contextlib.suppress(asyncio.QueueFull):
                    queue.put_nowait(None)

        task = asyncio.create_task(run(), name=f"container {self._name}")
        hold.when_lost(task.cancel)  # nobody keeps the root any more
        try:
            while not (task.done() and queue.empty()):
                message = await queue.get()
                if message is not None:
                    yield message
            if task.cancelled() and hold.lost:
                raise hold.loss()
            result = self._result(process, task.result(), timeout)
            await hold.check()  # an I/O error of ours may have become the command's exit code
            yield result
        finally:
            await _settled(task)

    def _process(self, image: dict[str, Any], root: Path) -> Process:
        argv = command_line(image, self._start.command)
        if not argv:
            raise InvalidArgument(f"image {self._start.image} has neither Entrypoint nor Cmd: give a command")
        with open_root(root) as fd:
            try:
                user = find_user(fd, str(image.get("User") or ""))
            except UnknownUser as error:
                raise InvalidArgument(f"image {self._start.image}: {error}") from None
            cwd = str(image.get("WorkingDir") or "/")
            if not make_directories(fd, cwd, user.uid, user.gid):
                raise InvalidArgument(f"image {self._start.image}: its working directory {cwd} is not a directory")
        return Process(argv, merge_env(image.get("Env") or (), self._start.env, user.home), cwd, user)

    def _check_command(self, process: Process, root: Path) -> pb.Result | None:
        """Say what is wrong before the runtime starts: its own messages would mix with the command's stderr."""
        path = next((entry[5:] for entry in process.env if entry.startswith("PATH=")), "")
        with open_root(root) as fd:
            command = find_command(fd, process.argv[0], process.cwd, path, process.user)
        return None if command.executable else _cannot_run(process.argv[0], self._start.image, command)

    def _result(self, process: Process, ended: Ended, timeout: float) -> pb.Result:
        counters = ended.counters
        result = pb.Result(exit_code=ended.status, timings=self._timings)
        result.peak_memory_bytes, result.cpu_time_us = counters.peak_memory, counters.cpu_us
        if ended.start_error and not ended.timed_out and not counters.oom:
            return self._start_failure(process, ended)
        if ended.timed_out:
            result.exit_code, result.outcome = TIMED_OUT, pb.OUTCOME_TIMED_OUT
            result.error = f"command {process.argv[0]!r} timed out after {timeout:g} s"
        elif counters.oom and (ended.status != 0 or ended.start_error):
            result.exit_code, result.outcome = KILLED, pb.OUTCOME_OUT_OF_MEMORY
            result.error = f"command {process.argv[0]!r} ran out of memory: the limit is {self._start.memory_mb} MiB"
        elif ended.status > 128:
            # A shell reports a child's signal the same way; the container's first process does not tell them apart.
            result.outcome, result.signal = pb.OUTCOME_SIGNALLED, ended.status - 128
            result.error = f"command {process.argv[0]!r} was ended by signal {ended.status - 128}"
        else:
            result.outcome = pb.OUTCOME_EXITED
            result.success = ended.status == 0
        return result

    def _start_failure(self, process: Process, ended: Ended) -> pb.Result:
        """The runtime could not start the command: the image's fault, or ours."""
        message = ended.start_error.lower()  # runc and crun differ in that
        if "no such file or directory" in message and "exec" in message:  # a script whose interpreter is missing
            return _cannot_run(process.argv[0], self._start.image, Command(found=False, executable=False))
        if "argument list too long" in message:
            why = Command(found=True, executable=False, why="its arguments and environment are too long")
            return _cannot_run(process.argv[0], self._start.image, why)
        if "exec format error" in message or ("permission denied" in message and "exec" in message):
            return _cannot_run(process.argv[0], self._start.image, Command(found=True, executable=False))
        raise Internal(f"the runtime could not start the container of {self._start.image}: {ended.start_error}")


def _cannot_run(name: str, image: str, command: Command) -> pb.Result:
    why = f": {command.why}" if command.why else ""
    if command.found:
        error = f"command {name!r} in image {image} cannot be executed{why}"
        return pb.Result(exit_code=NOT_EXECUTABLE, error=error, outcome=pb.OUTCOME_COMMAND_NOT_EXECUTABLE)
    error = f"command {name!r} not found in image {image}{why}"
    return pb.Result(exit_code=NOT_FOUND, error=error, outcome=pb.OUTCOME_COMMAND_NOT_FOUND)


async def _settled(task: "asyncio.Task[Any]") -> None:
    """Cancel *task* if it runs and wait until it has cleaned up; its outcome is somebody else's business."""
    if not task.done():
        task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()

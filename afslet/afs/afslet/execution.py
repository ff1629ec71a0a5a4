"""One run from its start request to its diff.

State: an :class:`Execution` belongs to one task, its run's. What it takes (reservation, root, staging directory, bundle,
network, container) is on one exit stack, so whatever ends the task gives everything back, newest first.
"""

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from afs.afslet.bundle import DEFAULT_HOSTNAME, NEW_NETWORK, Sandbox, runtime_config
from afs.afslet.cgroups import Limits
from afs.afslet.command import Commands, Place, Prepared
from afs.afslet.diff import Diff, DiffOptions
from afs.afslet.fastattach import FastAttach
from afs.afslet.incoming import Incoming
from afs.afslet.isolation import Isolation
from afs.afslet.networks import Networks, RunNetwork
from afs.afslet.outcomes import Subject, cannot_run, result_of
from afs.afslet.outputs import Outputs
from afs.afslet.rootfs import open_root, remove_inside, stat_inside
from afs.afslet.runc import Job, Runtime, run_container
from afs.afslet.runs import DIFF, PREPARING, RUNNING, Run
from afs.afslet.stdio import Pipes, Stdio, Terminal, Window
from afs.afslet.upload import Staging
from afs.afslet.warmroots import WarmRoot, WarmRoots
from afs.core.errors import AfsError
from afs.core.files import remove_tree
from afs.core.rpc import as_afs_error
from afs.core.threads import to_its_end
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.mounts_pb2 import MountRoot, OpenImage
from afs.snapshotter.messages import MountedRoot, root_request

Send = Callable[[pb.ExecuteResponse], Awaitable[None]]
_BUNDLE_FILES = ("config.json", "log.json", "pid")


@dataclass(frozen=True, slots=True)
class RunSettings:
    """What the node's operator says of every run. Times in seconds."""

    default_timeout: float
    term_grace: float


@dataclass(frozen=True, slots=True)
class Node:
    """What all runs of this afslet share. *scratch* holds staging directories and bundles."""

    node_id: str
    scratch: Path
    roots: WarmRoots
    runtime: Runtime
    settings: RunSettings
    attach: FastAttach
    commands: Commands
    isolation: Isolation
    networks: Networks


class Execution:
    """See the module. *run* has its reservation, and its request was checked; *send* takes what the client gets.

    While *send* waits, so does everything else: a client that reads slowly has a command that writes slowly.
    """

    def __init__(self, node: Node, run: Run, send: Send) -> None:
        self._node = node
        self._run = run
        self._start = run.start
        self._send = send
        self._home = node.scratch / run.run_id
        self._timings = pb.Timings(queue_us=run.queue_us)
        self._diff_options = DiffOptions.of(run.start)
        self._staging = Staging(self._home / "upload")
        self._ids = node.isolation.ids_for(run.start.user_namespace)
        self._shift = (self._ids.first, self._ids.count) if self._ids else None
        self._made_by_runtime: list[str] = []
        node.networks.check(run.start.network, run.start.egress_allow)

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.monotonic_ns()
        try:
            yield
        finally:
            setattr(self._timings, phase, (time.monotonic_ns() - started) // 1000)

    async def perform(self, requests: AsyncIterator[pb.ExecuteRequest]) -> None:
        """All of it. *requests* are those after the start."""
        run, done = self._run, pb.Done()
        self._node.attach.expect()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(run.release)
            run.accepted = True
            accepted = pb.Accepted(accepted=True, node_id=self._node.node_id, run_id=run.run_id, upload_entries=True)
            await self._send(pb.ExecuteResponse(accepted=accepted))
            self._home.mkdir()
            stack.callback(self._remove_home)
            incoming = Incoming(requests, self._start)
            await self._enter(PREPARING, pb.Progress.PHASE_IMAGE)
            warm = await self._prepare(stack, incoming)
            root = await self._make_root(warm)
            network = await self._connect(stack)
            result = await self._execute(warm, root, network, incoming)
            await self._check_reads(warm, written=root is not warm.root or warm.has_written)
            result.bytes_fetched = max(warm.hold.bytes_fetched - warm.fetched_before, 0)
            await self._send(pb.ExecuteResponse(result=result))
            if self._diff_options.name is not None:
                await self._enter(DIFF, pb.Progress.PHASE_DIFF)
                await self._send_diff(self._diff_options.name, root, done)
                if done.diff_entries:
                    await self._check_reads(warm, written=True)  # and whether all that was written could be read again
            warm.on_lost = None
        # Only now is everything given back: a client that saw `done` can count on it.
        done.timings.CopyFrom(self._timings)
        await self._send(pb.ExecuteResponse(done=done))

    async def _enter(self, phase: str, told: pb.Progress.Phase.ValueType) -> None:
        self._run.phase = phase
        if self._start.progress:
            await self._send(pb.ExecuteResponse(progress=pb.Progress(phase=told)))

    def _remove_home(self) -> None:
        for name in _BUNDLE_FILES:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._home / name)
        try:
            self._home.rmdir()
        except OSError:  # something unforeseen is in it
            remove_tree(self._home)

    # Before the command

    async def _prepare(self, stack: contextlib.AsyncExitStack, incoming: Incoming) -> WarmRoot:
        """Open the image and take the upload at the same time."""
        start = self._start
        image = OpenImage(
            image=start.image,
            tag=start.tag,
            os=start.platform_os,
            architecture=start.platform_arch,
            variant=start.platform_variant,
            force_local_fetch=start.force_local_fetch,
        )

        async def open_image() -> WarmRoot:
            with self._timed("image_us"):
                warm = await stack.enter_async_context(self._node.roots.taking(image, self._wanted_root()))
            warm.on_lost = lambda: self._run.end(warm.hold.loss())  # whatever it is doing then, be it the upload
            if warm.hold.lost:
                raise warm.hold.loss()
            return warm

        if start.no_upload:
            return await open_image()
        stack.push_async_callback(self._close_staging)  # below the root, and used by the upload: closed after both
        opening = asyncio.create_task(open_image(), name=f"open image of {self._run.run_id}")
        receiving = asyncio.create_task(self._receive(incoming), name=f"upload of {self._run.run_id}")
        try:
            await asyncio.wait([opening, receiving], return_when=asyncio.FIRST_EXCEPTION)
            for task in (receiving, opening):
                if task.done():
                    task.result()  # the error that ended the wait, or nothing
            return await opening
        finally:
            await _settled(opening)
            await _settled(receiving)

    async def _receive(self, incoming: Incoming) -> None:
        with self._timed("upload_us"):
            await incoming.upload(self._staging)

    async def _close_staging(self) -> None:
        if self._staging.entries:
            await asyncio.to_thread(self._staging.close)

    async def _make_root(self, warm: WarmRoot) -> MountedRoot:
        if not self._staging.entries:
            return warm.root
        with self._timed("root_us"):
            if self._start.upload_mode == pb.UPLOAD_COPY:
                await to_its_end(self._staging.place_into, warm.root.path, self._ids.first if self._ids else 0)
                return warm.root
            # Of a root with shifted owners one without: the staging directory gets the image's own.
            view = await warm.mount(root_request(read_only=True)) if self._shift else warm.root
            await to_its_end(self._staging.settle, view.path)
            return await warm.mount(self._wanted_root([self._staging.directory]))

    def _wanted_root(self, extra_dirs: Sequence[Path] = ()) -> MountRoot:
        return root_request(extra_dirs, ids=self._shift, disk_bytes=self._run.wanted.disk_mb << 20)

    async def _connect(self, stack: contextlib.AsyncExitStack) -> RunNetwork:
        start, networks = self._start, self._node.networks
        mode, _ = networks.check(start.network, start.egress_allow)
        if mode == pb.NETWORK_NONE and self._ids is not None:
            # One that belongs to the user namespace, so that the run can have a /sys of its own: made by the runtime.
            return RunNetwork(NEW_NETWORK, {})
        network = networks.network(start.network, start.egress_allow, start.hostname)
        return await stack.enter_async_context(network)

    # The command

    async def _execute(self, warm: WarmRoot, root: MountedRoot, network: RunNetwork, incoming: Incoming) -> pb.Result:
        """The command from its look-up to its end, with its output sent on."""
        start, node = self._start, self._node
        place = Place(
            root.path,
            f"image {start.image}",
            "" if self._staging.entries else warm.manifest_digest,
            self._ids.first if self._ids else 0,
        )
        prepared = node.commands.recall(start, warm.settings, place)
        if prepared is None:
            prepared = await asyncio.to_thread(node.commands.prepare, start, warm.settings, place)
        timeout = start.timeout_ms / 1000 or node.settings.default_timeout
        subject = Subject(prepared.process.argv[0], place.where, timeout, start.memory_mb << 20)
        if not prepared.command.executable:
            return self._finish(cannot_run(subject, prepared.command))
        if network.address:  # names matter: the runtime makes what it has to mount on
            self._made_by_runtime = [path for path in network.files if path in prepared.missing]
        else:
            files = {path: file for path, file in network.files.items() if path not in prepared.missing}
            network = replace(network, files=files)
        outputs = Outputs(start.max_output_bytes, text=not start.bytes_only)

        async def output(source: str, data: bytes) -> None:
            message = outputs.message(source, data)
            if message is not None:
                await self._send(message)
            else:
                await asyncio.sleep(0)  # what is dropped waits for nobody, and others want their turn

        stdio = self._stdio()
        feeding = self._feed(incoming, stdio)
        try:
            await self._enter(RUNNING, pb.Progress.PHASE_RUNNING)
            with self._timed("run_us"):
                ended = await run_container(
                    node.runtime, self._job(prepared, root, network, stdio, timeout), output, lambda: None
                )
        finally:
            if feeding is not None:
                await _settled(feeding)
            stdio.close()
        result = self._finish(result_of(subject, ended))
        outputs.report(result)
        return result

    def _feed(self, incoming: Incoming, stdio: Stdio) -> "asyncio.Task[None] | None":
        """Standard input, if there is any; input that makes no sense ends the run."""
        if not self._start.stdin:
            return None

        def ended(task: "asyncio.Task[None]") -> None:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._run.end(as_afs_error(error))

        feeding = asyncio.create_task(incoming.feed(stdio), name=f"input of {self._run.run_id}")
        feeding.add_done_callback(ended)
        return feeding

    def _stdio(self) -> Stdio:
        start = self._start
        if not start.tty:
            return Pipes(stdin=start.stdin)
        size = start.terminal_size
        socket = self._node.runtime.state_dir / f"{self._run.run_id}.sock"
        return Terminal(socket, Window(size.rows or 24, size.columns or 80))

    def _job(self, prepared: Prepared, root: MountedRoot, network: RunNetwork, stdio: Stdio, timeout: float) -> Job:
        start, node = self._start, self._node
        size = start.terminal_size
        terminal = (size.rows or 24, size.columns or 80) if start.tty else None
        sandbox = Sandbox(
            node.runtime.max_files,
            start.hostname or DEFAULT_HOSTNAME,
            network=network.path,
            ids=self._ids,
            seccomp=node.isolation.seccomp if prepared.has_32bit else node.isolation.native,
            terminal=terminal,
            files=tuple((str(source), path) for path, source in network.files.items()),
        )
        config = runtime_config(prepared.process, str(root.path), sandbox)
        wanted = self._run.wanted
        limits = Limits(wanted.cpu_millis / 1000, wanted.memory_mb << 20, self._run.pids)
        grace = start.term_grace_ms / 1000 or node.settings.term_grace
        return Job(self._run.run_id, self._home, config, limits, timeout, grace, stdio)

    def _forget_made_files(self, root: MountedRoot) -> None:
        """The runtime made what it had to mount on; the run did not."""
        assert root.upper is not None
        for path in self._made_by_runtime:
            with open_root(root.upper) as fd:
                found = stat_inside(fd, path)
                if found is not None and stat.S_ISREG(found.st_mode) and not found.st_size:
                    remove_inside(fd, path)

    async def _check_reads(self, warm: WarmRoot, *, written: bool) -> None:
        """An I/O error of ours may have become the command's exit code."""
        try:
            await warm.hold.check(written=written)
        except AfsError:
            warm.spoiled = True
            raise

    def _finish(self, result: pb.Result) -> pb.Result:
        result.timings.CopyFrom(self._timings)
        result.node_id = self._node.node_id
        return result

    async def _send_diff(self, name: str, root: MountedRoot, done: pb.Done) -> None:
        self._forget_made_files(root)
        assert root.upper is not None
        with self._timed("diff_us"):
            await self._send(pb.ExecuteResponse(tar_header=pb.TarHeader(name=name)))
            diff = Diff(root.upper, root.lower, self._diff_options)
            async with contextlib.aclosing(diff.stream()) as chunks:
                async for chunk in chunks:
                    await self._send(pb.ExecuteResponse(tar_chunk=pb.TarChunk(data=chunk)))
            done.diff_bytes, done.diff_entries, done.diff_error = diff.bytes, diff.entries, diff.error


async def _settled(task: "asyncio.Task[Any]") -> None:
    """Cancel *task* if it runs and wait until it has cleaned up; its outcome is somebody else's business."""
    if not task.done():
        task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()

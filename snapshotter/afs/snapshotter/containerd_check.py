"""``afs_snapshotter check``: finds what is wrong between containerd and its snapshotter by using both.

What it makes in containerd is in a namespace that nobody else uses, and is removed whatever happens. Only a SIGKILL leaves
it there; the next check removes it then. The names of things contain the pid of the check, which tells whether it lives.
"""

import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from afs.core.errors import AfsError, FailedPrecondition, Internal, NotFound, Unavailable
from afs.snapshotter.containerd_ctr import Ctr, connect, last_error
from afs.snapshotter.containerd_image import archive, machine

_IMAGE = "afs.invalid/check:"
_MINE = re.compile(rf"(?:{re.escape(_IMAGE)})?afs-check-(\d+)")
_START = "start it, or say where it is with --containerd-address"
_CONFIGURE = "`afs_snapshotter config --write` and a restart of containerd help"
_LOGS = "the logs of containerd and of afs_snapshotter say more"


class Target(NamedTuple):
    """What is checked."""

    name: str
    """containerd's name for the snapshotter."""
    socket: Path | None
    """Where the snapshotter serves; None for one of containerd itself."""
    containerd: Path
    namespace: str
    timeout: float


class Step(NamedTuple):
    """How one step went; *detail* is what there is to say of it, the cause if it failed."""

    name: str
    ok: bool
    detail: str


class Check:
    """One check; *steps* are those made so far, and each is given to *show* when it has ended."""

    def __init__(self, target: Target, show: Callable[[Step], None] | None = None, pid: int | None = None) -> None:
        self.steps: list[Step] = []
        self._target = target
        self._show = show
        self._ctr = Ctr(target.containerd, target.namespace, target.timeout)
        self._id = f"afs-check-{os.getpid() if pid is None else pid}"
        self._made_namespace = self._may_remove = False

    def run(self) -> None:
        """Make all steps; the error of the first one that fails, with what helps against it."""
        name, namespace = self._target.name, self._target.namespace
        if self._target.socket is not None:
            with self._step(f"afs_snapshotter serves on {self._target.socket}"):
                self._ask_snapshotter(self._target.socket)
        with self._step(f"containerd serves on {self._target.containerd}") as details:
            connect(self._target.containerd, "containerd", _START)
            details.append(self._ctr.version())
        with self._step(f"containerd has the snapshotter {name}") as details:
            self._find_plugin(details)
        try:
            with self._step(f"the namespace {namespace} is free"):
                self._take_namespace()
            self._try_image()
        except AfsError as error:
            if not self._may_remove:
                raise
            try:
                self._clean_up()
            except AfsError as another:
                raise type(error)(f"{error.line}; besides, {another.line}") from None
            raise
        self._clean_up()

    def _clean_up(self) -> None:
        with self._step("all of it is removed again"):
            self._remove(self._id)

    @contextmanager
    def _step(self, name: str) -> Iterator[list[str]]:
        details: list[str] = []
        try:
            yield details
        except AfsError as error:
            self._note(Step(name, ok=False, detail=error.line))
            raise
        self._note(Step(name, ok=True, detail=", ".join(details)))

    def _note(self, step: Step) -> None:
        self.steps.append(step)
        if self._show is not None:
            self._show(step)

    def _ask_snapshotter(self, path: Path) -> None:
        """See that it is a snapshotter which answers: it knows no snapshot of this check's name."""
        import grpc

        from afs.proto.containerd.snapshots_pb2 import StatSnapshotRequest
        from afs.proto.containerd.snapshots_pb2_grpc import SnapshotsStub

        connect(path, "afs_snapshotter", "start it, or say where it is with --address")
        with grpc.insecure_channel(f"unix:{path}") as channel:
            try:
                SnapshotsStub(channel).Stat(
                    StatSnapshotRequest(snapshotter=self._target.name, key=self._id),
                    timeout=self._target.timeout,
                    metadata=(("containerd-namespace", self._target.namespace),),
                )
            except grpc.RpcError as error:
                code = error.code()
                if code is grpc.StatusCode.UNIMPLEMENTED:
                    raise Unavailable(f"what serves on {path} is no snapshotter") from None
                if code is not grpc.StatusCode.NOT_FOUND:
                    raise Unavailable(f"the snapshotter on {path} answers {code.name}: {error.details()}") from None

    def _find_plugin(self, details: list[str]) -> None:
        name, socket = self._target.name, self._target.socket
        plugins = self._ctr.snapshotters()
        plugin = plugins.get(name)
        if plugin is None:
            raise NotFound(f"containerd knows no snapshotter {name}, only {', '.join(sorted(plugins))}; {_CONFIGURE}")
        if plugin.error:
            raise FailedPrecondition(f"containerd could not start its plugin {name}: {plugin.error}")
        address = plugin.exports.get("address", "").removeprefix("unix://")
        if socket is not None and address and Path(address) != socket:
            raise FailedPrecondition(
                f"containerd asks for {name} at {address}, and not at {socket}; change the one or the other, and restart it"
            )
        if root := plugin.exports.get("root"):
            details.append(f"root {root}")
        elif socket is not None:
            details.append("without a root: CRI cannot say how full its file system is (containerd 1.6 cannot be told)")

    def _take_namespace(self) -> None:
        """Make the namespace, or take it if it is empty or what is in it was left by a check that is dead."""
        if self._target.namespace not in self._ctr.call("namespaces", "ls", "--quiet").split():
            self._ctr.call("namespaces", "create", self._target.namespace)
            self._made_namespace = self._may_remove = True
            return
        there = set(self._ctr.call("images", "ls", "--quiet").split())
        there |= set(self._ctr.call("containers", "ls", "--quiet").split())
        for found in sorted(there):
            mine = _MINE.fullmatch(found)
            if mine is None or Path("/proc", mine[1]).exists():
                whose = "others" if mine is None else "another check, which runs"
                raise FailedPrecondition(
                    f"containerd's namespace {self._target.namespace} has {found} of {whose}; give a free one with --namespace"
                )
        for kind, left in {
            "snapshots": self._snapshots(),
            "blobs": self._ctr.call("content", "ls", "--quiet").split(),
            "leases": self._ctr.call("leases", "ls", "--quiet").split(),
        }.items():
            if left and not there:  # of a pull that is under way, perhaps
                raise FailedPrecondition(
                    f"containerd's namespace {self._target.namespace} has {kind} of others; give a free one with --namespace"
                )
        self._may_remove = True
        for container in sorted({found.removeprefix(_IMAGE) for found in there}):
            self._remove(container, keep_namespace=True)
            self._made_namespace = True

    def _try_image(self) -> None:
        name, image, line = self._target.name, _IMAGE + self._id, f"{self._id} runs\n"
        with self._step("an image can be unpacked into it"):
            tar = archive(machine(platform.machine()), image, line.encode())
            answer = self._ctr.ask("images", "import", "--snapshotter", name, "-", stdin=tar)
            if answer.returncode:
                said = last_error(answer)
                # Before anything is unpacked, the transfer service looks for the snapshotter in its list.
                helps = _CONFIGURE if "no unpack platforms" in said else _LOGS
                raise Internal(f"importing an image with the snapshotter {name} failed: {said}; {helps}")
        with self._step("a container starts from it"), tempfile.TemporaryDirectory(prefix="afs-check-") as directory:
            options = ["--rm", "--snapshotter", name, "--cgroup", f"/{self._target.namespace}-{self._id}"]
            answer = self._ctr.ask("run", *options, "--fifo-dir", directory, image, self._id)
            if answer.returncode:
                raise Internal(f"running a container failed: {last_error(answer)}; {_LOGS}")
            if answer.stdout != line.encode():
                raise Internal(f"a container ran, but printed {answer.stdout!r} instead of {line!r}; {_LOGS}")

    def _snapshots(self) -> list[str]:
        """The names of the namespace's snapshots; they may contain single spaces."""
        listed = self._ctr.call("snapshots", "--snapshotter", self._target.name, "ls").splitlines()[1:]
        return [re.split(r"\s{2,}", line)[0] for line in listed if line.strip()]

    def _remove(self, container: str, *, keep_namespace: bool = False) -> None:
        """Remove what the check *container* made. Internal if something stays."""
        ask, snapshotter = self._ctr.ask, ("snapshots", "--snapshotter", self._target.name)
        # What is not there fails to be removed. Whether all is gone is asked in the end, by what containerd itself thinks.
        ask("tasks", "rm", "--force", container)
        ask("containers", "rm", container)
        ask("images", "rm", "--sync", _IMAGE + container)
        for lease in self._ctr.call("leases", "ls", "--quiet").split():  # of an import that was killed
            ask("leases", "rm", "--sync", lease)
        left = self._snapshots()
        while left:  # those without children first: each round removes at least one, or it is the last round
            for key in left:
                ask(*snapshotter, "rm", key)
            before, left = left, self._snapshots()
            if len(left) >= len(before):
                raise Internal(f"{self._target.name} does not remove its snapshots {', '.join(left)}; {_LOGS}")
        for digest in self._ctr.call("content", "ls", "--quiet").split():
            ask("content", "rm", digest)
        if self._made_namespace and not keep_namespace:
            self._ctr.call("namespaces", "rm", self._target.namespace)

"""An image with programs that try to get out of their container, and a run of any start request."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afs.core.rpc import channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from tests.testbed import build, images, oci, tars

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

PROGRAM = Path(__file__).with_name("escape.c")
USER = 1000


@dataclass(frozen=True)
class EscapeImage:
    """The busybox image with `/bin/escape`, and `/bin/escape-setuid`, the same setuid-root.

    Tags: `latest`; `user` for user 1000; `cwd` with a working directory for each descriptor, `cwd3` to `cwd15`; `dev`,
    `proc` and `sys`, in which that directory is a symlink to `trap`.
    """

    layout: Path
    trap: Path

    def reference(self, tag: str = "latest") -> str:
        """The image as AFS commands name it."""
        return f"oci:{self.layout}:{tag}"


def compiled(cache_dir: Path) -> Path:
    """The program, static, for any root."""
    key = hashlib.sha256(PROGRAM.read_bytes()).hexdigest()[:12]

    def write(directory: Path) -> None:
        argv = ["gcc", "-Wall", "-Wextra", "-Werror", "-O1", "-static", "-o", str(directory / "escape"), str(PROGRAM)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return build.cached(cache_dir, "escape", key, write) / "escape"


def escape_image(cache_dir: Path, directory: Path, *, trap: Path, marker: Path) -> EscapeImage:
    """Make the image in *directory*. *marker* is a file outside that `/marker-link` and the `passwd` tag's users are in."""
    program = compiled(cache_dir).read_bytes()
    busybox = images.busybox(cache_dir)
    layout = oci.copy_layout(busybox.layout, directory)
    builder = oci.LayoutBuilder(layout)
    layer = builder.add_layer(
        tars.directory("bin")
        + tars.file("bin/escape", program, mode=0o755)
        + tars.file("bin/escape-setuid", program, mode=0o4755)
        + tars.directory("escape", mode=0o777)
        + tars.symlink("marker-link", str(marker))
        + tars.END,
        "plain",
    )
    base = [*busybox.layers, layer]
    settings: dict[str, Any] = {"Env": ["PATH=/bin"]}
    builder.add_image("latest", base, settings)
    builder.add_image("user", base, {**settings, "User": str(USER)})
    for number in range(3, 16):
        builder.add_image(f"cwd{number}", base, {**settings, "WorkingDir": f"/proc/self/fd/{number}"})
    for name in ("dev", "proc", "sys"):
        over = builder.add_layer(tars.symlink(name, str(trap)) + tars.END, "plain")
        builder.add_image(name, [*base, over], settings)
    users = builder.add_layer(tars.directory("etc") + tars.symlink("etc/passwd", str(marker)) + tars.END, "plain")
    builder.add_image("passwd", [*base, users], {**settings, "User": "intruder"})
    return EscapeImage(layout, trap)


@dataclass
class Ran:
    """What came of a run."""

    result: pb.Result = field(default_factory=pb.Result)
    stdout: bytes = b""
    stderr: bytes = b""
    diff: bytes = b""

    def members(self) -> Mapping[str, tarfile.TarInfo]:
        """The entries of the diff by name."""
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(self.diff))) as tar:
            return {member.name: member for member in tar}


async def execute(address: str, start: pb.StartRequest) -> Ran:
    """Run *start* without an upload at a proxy or an afslet. Raises grpc.aio.AioRpcError."""
    found = Ran()

    async def requests() -> AsyncIterator[pb.ExecuteRequest]:
        yield pb.ExecuteRequest(start=start)

    async with channel(address) as opened:
        async for response in AfsletStub(opened).Execute(requests()):
            match response.WhichOneof("payload"):
                case "log" if response.log.source == "stdout":
                    found.stdout += response.log.data
                case "log":
                    found.stderr += response.log.data
                case "result":
                    found.result = response.result
                case "tar_chunk":
                    found.diff += response.tar_chunk.data
                case _:
                    pass
    return found


def execute_now(address: str, image: str, command: list[str], **fields: Any) -> Ran:
    """:func:`execute` of a small request, from a test that is not on an event loop."""
    small: dict[str, Any] = {"cpu_cores": 1, "memory_mb": 256, "timeout_ms": 60_000}
    return asyncio.run(execute(address, pb.StartRequest(image=image, command=command, **small | fields)))

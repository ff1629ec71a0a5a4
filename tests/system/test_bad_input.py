"""Everything that can be wrong with a request: one line that names cause and object, the right code, nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import os
import re
import signal
import socket
import tarfile
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import pytest

from tests.testbed import oci, tars
from tests.testbed.oldclient import DIR, SYMLINK, OldClient, begin, chunk, end, start

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage
    from tests.testbed.registry import Registry

pytestmark = pytest.mark.root
Code = grpc.StatusCode


@dataclass
class Lab:
    """Makes images that are wrong in one way; each layer's content is new to the cluster, so nothing is cached."""

    directory: Path
    busybox: BusyboxImage
    registry: Registry
    closed_port: int

    def builder(self) -> oci.LayoutBuilder:
        """A layout of its own."""
        return oci.LayoutBuilder(self.directory / "layout")

    def image(self, tag: str = "bad") -> str:
        """The name of an image in that layout."""
        return f"oci:{self.directory / 'layout'}:{tag}"

    def tar(self, name: str = "file") -> bytes:
        """A tar that no other test has."""
        return tars.tar_of({name: os.urandom(4096)})

    def with_layer(self, damage: Callable[[oci.LayoutBuilder, oci.Layer], oci.Layer]) -> str:
        """An image of one gzip layer after *damage*."""
        builder = self.builder()
        builder.add_image("bad", [damage(builder, builder.add_layer(self.tar()))])
        return self.image()

    def with_config(self, **config: Any) -> str:
        """The busybox image with another configuration."""
        oci.copy_layout(self.busybox.layout, self.directory / "layout")
        self.builder().add_image("bad", self.busybox.layers, {"Env": ["PATH=/bin"], **config})
        return self.image()


@pytest.fixture
def lab(tmp_path: Path, busybox_image: BusyboxImage, session_registry: Registry) -> Iterator[Lab]:
    with socket.socket() as bound:  # bound but not listening: the port refuses, and nobody else gets it
        bound.bind(("127.0.0.1", 0))
        yield Lab(tmp_path, busybox_image, session_registry, bound.getsockname()[1])


def other_bytes(builder: oci.LayoutBuilder, layer: oci.Layer) -> oci.Layer:
    """A blob that is a sound gzip of another tar."""
    oci.blob_path(builder.directory, layer.digest).write_bytes(gzip.compress(tars.tar_of({"other": b"x"})))
    return layer


def flipped_byte(builder: oci.LayoutBuilder, layer: oci.Layer) -> oci.Layer:
    """One wrong bit in the compressed data."""
    blob = oci.blob_path(builder.directory, layer.digest)
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)
    return layer


def truncated(builder: oci.LayoutBuilder, layer: oci.Layer) -> oci.Layer:
    """A gzip that ends early, with a digest to match: the fault is the pusher's."""
    digest = builder.add_blob(oci.blob_path(builder.directory, layer.digest).read_bytes()[:-100])
    return oci.Layer(layer.diff_id, digest, layer.size - 100, layer.media_type, layer.tar_size)


def other_diff_id(builder: oci.LayoutBuilder, layer: oci.Layer) -> oci.Layer:
    """A config that promises another tar."""
    return oci.Layer(f"sha256:{os.urandom(32).hex()}", layer.digest, layer.size, layer.media_type, layer.tar_size)


def blob_missing(builder: oci.LayoutBuilder, layer: oci.Layer) -> oci.Layer:
    """A manifest whose layer is not in the layout."""
    oci.blob_path(builder.directory, layer.digest).unlink()
    return layer


def no_tar(builder: oci.LayoutBuilder, layer: oci.Layer) -> oci.Layer:
    """A sound gzip of something that is no tar."""
    return builder.add_layer(os.urandom(2048))


def config_damaged(lab: Lab) -> str:
    """An image whose config is not what its digest says."""
    lab.with_layer(lambda _, layer: layer)
    stored = oci.read_image(lab.directory / "layout", "bad")
    oci.blob_path(lab.directory / "layout", stored.config_digest).write_text("{}")
    return lab.image()


class Bad(NamedTuple):
    """An image that cannot be run: how to make its name, the code, afs_cli's exit code, what the message must have."""

    make: Callable[[Lab], str]
    code: grpc.StatusCode
    exit_code: int
    message: str
    command: tuple[str, ...] = ("true",)


IMAGES = {
    "layout without the tag": Bad(
        lambda lab: f"oci:{lab.busybox.layout}:nope",
        *(Code.NOT_FOUND, 66, r"image oci:\S+:nope not found: no such tag; the layout has: arm64only, docker, "),
    ),
    "layout missing": Bad(
        lambda lab: f"oci:{lab.directory}/nowhere:x",
        *(Code.NOT_FOUND, 66, r"image oci:\S+/nowhere:x not found: no \S+/nowhere on node node[12]"),
    ),
    "archive missing": Bad(
        lambda lab: f"docker-archive:{lab.directory}/no.tar",
        *(Code.NOT_FOUND, 66, r"image docker-archive:\S+/no.tar not found: no \S+/no.tar on node node[12]"),
    ),
    "registry without the repository": Bad(
        lambda lab: f"{lab.registry.address}/nowhere:x",
        *(Code.NOT_FOUND, 66, r"image 127\.0\.0\.1:\d+/nowhere:x not found: \w+ .* \(HTTP 404 for "),
    ),
    "registry without the tag": Bad(
        lambda lab: f"{lab.registry.address}/busybox:nope",
        *(Code.NOT_FOUND, 66, r"image 127\.0\.0\.1:\d+/busybox:nope not found: \w+ .* \(HTTP 404 for "),
    ),
    "registry without the digest": Bad(
        lambda lab: f"{lab.registry.address}/busybox@sha256:{'0' * 64}",
        *(Code.NOT_FOUND, 66, r"image 127\.0\.0\.1:\d+/busybox@sha256:0+ not found: \w+ "),
    ),
    "registry unreachable": Bad(
        lambda lab: f"127.0.0.1:{lab.closed_port}/some/image:v1",
        *(Code.UNAVAILABLE, 69, r"registry 127\.0\.0\.1:\d+ is unreachable: .*refused"),
    ),
    "platform missing in the index": Bad(
        lambda lab: f"oci:{lab.busybox.layout}:arm64only",
        *(Code.FAILED_PRECONDITION, 67, r"image oci:\S+:arm64only has no platform linux/amd64; it has: linux/arm64/v8"),
    ),
    "name makes no sense": Bad(
        lambda lab: "Not An Image", Code.INVALID_ARGUMENT, 64, r"not an image name: 'Not An Image'"
    ),
    "digest makes no sense": Bad(lambda lab: "some/image@sha256:12", Code.INVALID_ARGUMENT, 64, r"sha256:12"),
    "layer is not what its digest says": Bad(
        lambda lab: lab.with_layer(other_bytes), Code.DATA_LOSS, 65, r"image oci:\S+: .*sha256:\w+.* expected sha256:"
    ),
    "layer has a wrong bit": Bad(
        lambda lab: lab.with_layer(flipped_byte), Code.DATA_LOSS, 65, r"image oci:\S+: corrupt layer"
    ),
    "layer is truncated": Bad(
        lambda lab: lab.with_layer(truncated), Code.DATA_LOSS, 65, r"image oci:\S+: corrupt layer.* (truncated|ends)"
    ),
    "layer is not what the config says": Bad(
        lambda lab: lab.with_layer(other_diff_id), Code.DATA_LOSS, 65, r"image oci:\S+: .*sha256:\w+.* expected sha256:"
    ),
    "layer is no tar": Bad(lambda lab: lab.with_layer(no_tar), Code.DATA_LOSS, 65, r"image oci:\S+: corrupt layer"),
    "layer is missing": Bad(
        lambda lab: lab.with_layer(blob_missing), Code.DATA_LOSS, 65, r"image oci:\S+ is corrupt: the blob of layer sha256:"
    ),
    "config is damaged": Bad(config_damaged, Code.DATA_LOSS, 65, r"image oci:\S+ is corrupt: its config should be sha256:"),
    "unknown user": Bad(
        lambda lab: lab.with_config(User="nobody-here"),
        *(Code.INVALID_ARGUMENT, 64, r"image oci:\S+: user 'nobody-here' is not in its /etc/passwd"),
    ),
    "unknown group": Bad(
        lambda lab: lab.with_config(User="app:nogroup-here"),
        *(Code.INVALID_ARGUMENT, 64, r"image oci:\S+: group 'nogroup-here' is not in its /etc/group"),
    ),
    "working directory is a file": Bad(
        lambda lab: lab.with_config(WorkingDir="/etc/passwd"),
        *(Code.INVALID_ARGUMENT, 64, r"image oci:\S+: its working directory /etc/passwd is not a directory"),
    ),
    "nothing to run": Bad(
        lambda lab: lab.with_config(),
        *(Code.INVALID_ARGUMENT, 64, r"image oci:\S+ has neither Entrypoint nor Cmd: give a command", ()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
async def test_image_that_cannot_run(shared_cluster: RealCluster, lab: Lab, name: str) -> None:
    case = IMAGES[name]
    image = case.make(lab)
    cli = asyncio.create_task(asyncio.to_thread(shared_cluster.cli, "execute", "--image", image, "--", *case.command))
    async with OldClient(shared_cluster.proxy) as client:
        reply = await client.execute(start(image, *case.command))
    assert reply.code is case.code, reply
    assert re.search(case.message, reply.details), reply.details
    assert "\n" not in reply.details
    done = await cli
    assert (done.returncode, done.stdout) == (case.exit_code, "")
    assert re.fullmatch(r"afs_cli: .*\n", done.stderr), done.stderr
    assert re.search(case.message, done.stderr), done.stderr


class Outcome(NamedTuple):
    """A command that cannot do its work: exit code, message, new fields' outcome as JSON shows it."""

    command: tuple[str, ...]
    exit_code: int
    message: str
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


SCRIPT = b"#!/bin/sh\necho script\n"
COMMANDS = {
    "not found": Outcome(("no-such-command",), 127, r"command 'no-such-command' not found in image oci:"),
    "path not found": Outcome(("/no/such",), 127, r"command '/no/such' not found in image oci:\S+$"),
    "not executable": Outcome(
        ("/etc/passwd",), 126, r"command '/etc/passwd' in image \S+ cannot be executed: it has no execute permission$"
    ),
    "directory": Outcome(("/etc",), 126, r"command '/etc' in image \S+ cannot be executed: it is a directory$"),
    "interpreter missing": Outcome(
        ("/up/missing",),
        127,
        r"command '/up/missing' not found in image \S+: its interpreter /no/interpreter is missing$",
    ),
    "no format": Outcome(
        ("/up/format",), 126, r"command '/up/format' in image \S+ cannot be executed: it is neither program nor script$"
    ),
    "timeout": Outcome(("sleep", "1000"), 124, r"command 'sleep' timed out after 0.3 s$", {"timeout_ms": 300}),
    "out of memory": Outcome(
        ("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"),
        *(137, r"command 'dd' ran out of memory: the limit is 64 MiB", {"memory_mb": 64}),
    ),
    "child out of memory": Outcome(
        ("sh", "-c", "dd if=/dev/zero of=/dev/null bs=200M count=1; exit $?"),
        *(137, r"command 'sh' ran out of memory: the limit is 64 MiB", {"memory_mb": 64}),
    ),
    # The kernel's own signal: of those of its children the first process of a namespace sees only what it has a handler for.
    "signal": Outcome(("sh", "-c", "ulimit -t 1; while :; do :; done"), 137, r"command 'sh' was ended by signal 9"),
}


def flags(options: dict[str, Any]) -> list[str]:
    """afs_cli's flags for fields of the start request."""
    found = [f"--timeout={options['timeout_ms']}ms"] if "timeout_ms" in options else []
    return [*found, f"--memory-mb={options.get('memory_mb', 256)}"]


@pytest.mark.parametrize("name", COMMANDS)
async def test_command_that_does_not_end_well(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path, name: str
) -> None:
    case, image = COMMANDS[name], busybox_image.reference
    files = {"up/missing": b"#!/no/interpreter\n", "up/format": b"\0no program\n"}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
        (tmp_path / path).chmod(0o755)
    arguments = ["execute", "--image", image, f"--dir={tmp_path}", *flags(case.options), "--", *case.command]
    cli = asyncio.create_task(asyncio.to_thread(shared_cluster.cli, *arguments))
    upload = [
        request
        for path, content in files.items()
        for request in (begin(path, mode=0o755), chunk(content), end())
    ]  # fmt: skip
    async with OldClient(shared_cluster.proxy) as client:
        reply = await client.execute(start(image, *case.command, **case.options), *upload)
    assert reply.code is Code.OK, reply
    assert (reply.result.exit_code, reply.result.success) == (case.exit_code, False), reply.result
    assert re.match(case.message, reply.result.error), reply.result.error
    assert reply.responses[-1].HasField("done")
    done = await cli
    assert done.returncode == case.exit_code
    assert re.search(f"^afs_cli: {case.message}", done.stderr, re.MULTILINE), done.stderr


TIMEOUTS = {
    "SIGTERM ignored": "trap '' TERM; while :; do sleep 1000; done",
    "SIGTERM handled": "trap 'echo bye; exit 9' TERM; sleep 1000 & wait",
    "children hold stdout": "sleep 1000 & setsid sleep 1000 & sleep 1000 & wait",
    "output without end": "yes & sleep 1000",
}


async def test_whatever_the_command_does_a_timeout_ends_it(
    shared_cluster: RealCluster, busybox_image: BusyboxImage
) -> None:
    async with OldClient(shared_cluster.proxy) as client:
        requests = [start(busybox_image.reference, "sh", "-c", text, timeout_ms=300) for text in TIMEOUTS.values()]
        replies = await asyncio.gather(*map(client.execute, requests))
    for name, reply in zip(TIMEOUTS, replies, strict=True):
        assert reply.code is Code.OK, (name, reply)
        assert (reply.result.exit_code, reply.result.error) == (124, "command 'sh' timed out after 0.3 s"), name
    assert replies[1].output() == "bye\n"


async def test_children_do_not_keep_a_run_alive(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    command = ("sh", "-c", "setsid sleep 1000 & echo started; exit 3")
    async with OldClient(shared_cluster.proxy) as client:
        reply = await client.execute(start(busybox_image.reference, *command), timeout=20.0)
    assert (reply.result.exit_code, reply.output()) == (3, "started\n")


UPLOADS = {
    "parent": ([begin("../x")], "upload of '../x' refused: the path leads outside the container's root"),
    "absolute": ([begin("/etc/x")], "upload of '/etc/x' refused: the path is absolute; it has to be relative to"),
    "parent inside": ([begin("a/../../x")], "upload of 'a/../../x' refused: the path leads outside"),
    "parent inside that stays": ([begin("a/../x")], "upload of 'a/../x' refused: the path leads outside"),
    "only parent": ([begin("..", DIR)], "upload of '..' refused: the path leads outside"),
    "empty": ([begin("")], "upload of '' refused: not a path"),
    "empty directory": ([begin("", DIR)], "upload of '' refused: not a path"),
    "dot": ([begin(".")], "upload of '.' refused: not a file name"),
    "dot symlink": ([begin(".", SYMLINK, symlink_target="x")], "upload of '.' refused: a symlink needs a name"),
    "symlink without target": ([begin("l", SYMLINK)], "upload of 'l' refused: a symlink needs a name and a target"),
    "NUL": ([begin("a\0b")], r"upload of 'a\x00b' refused: not a path"),
    "long": ([begin("n" * 256)], "upload of '" + "n" * 256 + "' refused: the path is too long"),
    "through absolute symlink": (
        [begin("l", SYMLINK, symlink_target="/"), begin("l/x")],
        "upload of 'l/x' refused: it goes through an uploaded ",
    ),
    "through relative symlink": (
        [begin("d/l", SYMLINK, symlink_target="../.."), begin("d/l/x/y")],
        "upload of 'd/l/x/y' refused: it goes through an uploaded ",
    ),
    "directory over symlink": (
        [begin("l", SYMLINK, symlink_target="/tmp"), begin("l", DIR)],
        "upload of 'l' refused: an uploaded file is in the way",
    ),
    "file over directory": ([begin("d", DIR), begin("d")], "upload of 'd' refused: an uploaded directory is in the way"),
    "through file": ([begin("f"), end(), begin("f/x")], "upload of 'f/x' refused: it goes through an uploaded file"),
    "ended in a file": ([begin("half"), chunk(b"x")], "upload of 'half' refused: the upload ended in the middle of it"),
    "file not ended": ([begin("a"), begin("b")], "upload of 'b' refused: the file before it was not ended"),
    "chunk first": ([chunk(b"x")], "file_chunk without file_begin"),
    "chunk in directory": ([begin("d", DIR), chunk(b"x")], "file_chunk without file_begin"),
    "end first": ([end()], "file_end without file_begin"),
    "unknown type": ([begin("x", 7)], "upload of 'x' refused: unknown type 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", UPLOADS)
async def test_upload_that_is_refused(shared_cluster: RealCluster, busybox_image: BusyboxImage, name: str) -> None:
    requests, message = UPLOADS[name]
    async with OldClient(shared_cluster.proxy) as client:
        reply = await client.execute(start(busybox_image.reference, "true"), *requests)
    assert (reply.code, reply.kinds) == (Code.INVALID_ARGUMENT, ["accepted"])
    assert reply.details.startswith(message)


async def test_upload_through_the_image_s_symlinks_stays_inside(
    shared_cluster: RealCluster, lab: Lab, busybox_image: BusyboxImage
) -> None:
    """Whatever an image's symlink says, its target is inside the container's root."""
    oci.copy_layout(busybox_image.layout, lab.directory / "layout")
    builder = lab.builder()
    trap = builder.add_layer(tars.tar_of({"out": "../../../../../../tmp", "abs": str(lab.directory)}))
    builder.add_image("bad", [*busybox_image.layers, trap], {"Env": ["PATH=/bin"]})
    async with OldClient(shared_cluster.proxy) as client:
        reply = await client.execute(
            start(lab.image(), "sh", "-c", f"cat /tmp/x-afs; ls -d /abs{lab.directory} {lab.directory}"),
            *(begin("out/x-afs"), chunk(b"inside\n"), end(), begin("abs/y-afs"), end()),
        )
    assert reply.code is Code.OK or reply.code is Code.INVALID_ARGUMENT, reply
    if reply.code is Code.OK:
        assert reply.output().startswith("inside\n"), reply
    assert not (lab.directory / "y-afs").exists()
    assert not os.path.exists("/tmp/x-afs")


async def test_client_cancels_in_the_middle_of_an_upload(
    shared_cluster: RealCluster, busybox_image: BusyboxImage
) -> None:
    async with OldClient(shared_cluster.proxy) as client:
        call = client.open()
        for request in (start(busybox_image.reference, "true"), begin("f"), chunk(b"x" * 100_000)):
            await call.write(request)
        assert (await call.read()).accepted.accepted
        call.cancel()


async def test_client_half_closes_and_cancels_while_the_command_runs(
    shared_cluster: RealCluster, busybox_image: BusyboxImage
) -> None:
    request = start(busybox_image.reference, "sh", "-c", "echo here; sleep 1000")
    async with OldClient(shared_cluster.proxy) as client, client.running(request):
        pass


@contextlib.contextmanager
def killed(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """SIGKILL at the end of the block."""
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def test_cli_killed_in_the_middle_of_an_upload(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(4 << 30)
    upload = f"--dir={tmp_path}"
    with killed(shared_cluster.popen_cli("execute", "--image", busybox_image.reference, upload, "--", "true")) as cli:
        deadline = time.monotonic() + 20
        while not any(list(node.directory.glob("afslet/runs/*/upload/big")) for node in shared_cluster.nodes):
            assert cli.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)  # the file of another process appears without an event for us
        assert cli.poll() is None


def test_cli_killed_while_the_command_runs(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    command = ["sh", "-c", "echo here; sleep 1000"]
    with killed(shared_cluster.popen_cli("execute", "--image", busybox_image.reference, "--", *command)) as cli:
        assert cli.stdout is not None
        assert cli.stdout.readline() == "here\n"
        assert shared_cluster.busy()


async def test_a_tree_deeper_than_python_recurses(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    """One command must not be able to turn its own result into a fault, nor the node's clean-up into a crash."""
    script = "d=$(printf 'd/%.0s' $(seq 1500)); mkdir -p /$d && echo deep > /$d/file"
    async with shared_cluster.client() as client:
        result = await client.run(busybox_image.reference, ["sh", "-c", script])
    assert result.ok, result.stderr
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(result.diff or b""))) as tar:
        assert "d/" * 1500 + "file" in tar.getnames()


def test_options_behind_the_command_are_the_command_s(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    image = ("--image", busybox_image.reference)
    done = shared_cluster.cli("execute", *image, "echo", "--json", "--timeout", "5s")
    assert (done.returncode, done.stdout) == (0, "--json --timeout 5s\n")
    done = shared_cluster.cli("execute", *image, "--tiemout", "5s", "--", "true")
    assert done.returncode == 64
    assert "--tiemout" in done.stderr

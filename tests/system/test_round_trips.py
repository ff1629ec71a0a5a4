"""Files to runs and back through every service: the diff is a layer, and the image with it is the run's root."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from afs.client.files import upload_stream
from afs.client.uploads import Upload
from afs.core.errors import InvalidArgument
from afs.core.rpc import EOF, calling, channel
from afs.proto.v1 import afslet_pb2 as pb
from afs.proto.v1.afslet_pb2_grpc import AfsletStub
from tests.testbed import oci

if TYPE_CHECKING:
    from tests.testbed.cluster import RealCluster
    from tests.testbed.images import BusyboxImage

pytestmark = pytest.mark.root

# Everything of a root but what is mounted into it. The sizes of directories are their file systems'.
LIST = r"""
cd /
find . -xdev -mindepth 1 \( -path ./dev -o -path ./proc -o -path ./sys \) -prune -o -type d -exec stat -c '%n %F %a %u %g %Y' {} +
find . -xdev -mindepth 1 \( -path ./dev -o -path ./proc -o -path ./sys \) -prune -o ! -type d -exec stat -c '%N %F %a %u %g %s %Y %t %T %h' {} +
find . -xdev \( -path ./dev -o -path ./proc -o -path ./sys \) -prune -o -type f -exec md5sum {} +
"""
CHANGE = r"""
set -e
echo new > /data/new.txt; echo more >> /data/replaced.txt; rm /data/hello.txt
rm -r /opt/old; mkdir /opt/old; echo fresh > /opt/old/fresh
rm -r /home; echo 'now a file' > /home
mkdir -p /deep/er/and/deeper; ln -s ../nowhere /deep/link
head -c 300000 /dev/urandom > /deep/random; ln /deep/random /deep/er/twin; chown 12:34 /deep/random
chmod 4711 /deep/er/twin; touch -d '2001-02-03 04:05:06' /deep/er/and
mkfifo -m 600 /deep/fifo; test -n "$SHIFTED" || mknod /deep/null c 1 3
chmod 1777 /var/tmp; mv /etc/passwd /etc/moved
dd if=/dev/zero of=/deep/sparse bs=1 count=1 seek=5000000 2>/dev/null
name=$(printf '%0200d' 7); mkdir /deep/$name; echo long > /deep/$name/$name
if [ -e /up ]; then rm /up/removed; echo changed >> /up/changed; fi
"""


@dataclass
class Ran:
    """What a run gave."""

    stdout: bytes
    header: str | None
    diff: bytes
    done: pb.Done
    result: pb.Result

    def members(self) -> list[str]:
        """Names in the diff."""
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(self.diff))) as tar:
            return tar.getnames()


async def run(running: RealCluster, image: str, script: str, upload: Path | None = None, **fields: Any) -> Ran:
    """A run of a shell script, with the fields of its start request."""
    start = pb.StartRequest(image=image, command=["sh", "-c", script], cpu_cores=1, memory_mb=256, **fields)
    ran = Ran(b"", None, b"", pb.Done(), pb.Result())
    async with channel(running.proxy) as opened:
        call = AfsletStub(opened).Execute()
        await call.write(pb.ExecuteRequest(start=start))
        with calling("AFS"):
            while (response := await call.read()) is not EOF:
                assert isinstance(response, pb.ExecuteResponse)
                match response.WhichOneof("payload"):
                    case "accepted":
                        if upload is not None:
                            async for message in upload_stream(upload, "/up", entries=response.accepted.upload_entries):
                                await call.write(message)
                        await call.done_writing()
                    case "log":
                        ran.stdout += response.log.data
                    case "result":
                        ran.result = response.result
                    case "tar_header":
                        ran.header = response.tar_header.name
                    case "tar_chunk":
                        ran.diff += response.tar_chunk.data
                    case "done":
                        ran.done = response.done
    return ran


def with_layer(image: BusyboxImage, blob: bytes, tar: bytes, media_type: str, at: Path) -> str:
    """The image with one more layer, as the client got it."""
    builder = oci.LayoutBuilder(at)
    for layer in image.layers:
        shutil.copy(oci.blob_path(image.layout, layer.digest), oci.blob_path(at, layer.digest))
    found = oci.Layer(
        f"sha256:{hashlib.sha256(tar).hexdigest()}", builder.add_blob(blob), len(blob), media_type, len(tar)
    )
    builder.add_image("t", [*image.layers, found])
    return f"oci:{at}:t"


@pytest.mark.parametrize(
    ("kind", "shifted"),
    [(pb.DIFF_GZIP, False), (pb.DIFF_ZSTD, False), (pb.DIFF_GZIP, True)],
    ids=["gzip", "zstd", "user-namespace"],
)
@pytest.mark.parametrize("mode", [None, pb.UPLOAD_LAYER, pb.UPLOAD_COPY], ids=["nothing", "layer", "copy"])
async def test_the_image_with_the_diff_is_the_run_s_root(
    shared_cluster: RealCluster,
    busybox_image: BusyboxImage,
    tmp_path: Path,
    kind: pb.DiffFormat.ValueType,
    mode: pb.UploadMode.ValueType | None,
    shifted: bool,
) -> None:
    space = pb.USER_NAMESPACE_ON if shifted else pb.USER_NAMESPACE_OFF
    upload = None
    if mode is not None:
        upload = tmp_path / "upload"
        upload.mkdir()
        for name in ("removed", "changed", "same"):
            (upload / name).write_text(name)
    fields: dict[str, Any] = {"user_namespace": space, "env": ["SHIFTED=1"] if shifted else []}
    image = busybox_image.reference
    ran = await run(shared_cluster, image, CHANGE + LIST, upload, diff_format=kind, upload_mode=mode or 0, **fields)
    assert ran.result.success, ran
    assert ran.done.diff_error == ""
    assert ran.done.diff_bytes == len(ran.diff)
    if kind == pb.DIFF_ZSTD:
        tar, name, media = zstandard.ZstdDecompressor().decompressobj().decompress(ran.diff), "zst", "zstd"
    else:
        tar, name, media = gzip.decompress(ran.diff), "gz", "gzip"
    assert ran.header == f"writable-upper.tar.{name}"
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = archive.getnames()
    assert ran.done.diff_entries == len(members)
    reference = with_layer(
        busybox_image, ran.diff, tar, f"application/vnd.oci.image.layer.v1.tar+{media}", tmp_path / "image"
    )
    # With a layer of uploads the image alone is not what the run saw: what it left unchanged comes from there again.
    again = tmp_path / "again"
    if mode == pb.UPLOAD_LAYER:
        assert {"up/.wh.removed", "up/changed"} <= set(members)
        assert "up/same" not in members
        again.mkdir()
        shutil.copy2(tmp_path / "upload" / "same", again / "same")
    elif mode == pb.UPLOAD_COPY:
        assert {"up/same", "up/changed"} <= set(members)
        assert not [member for member in members if member.startswith("up/.wh.")]
    seen = await run(shared_cluster, reference, LIST, again if again.exists() else None, **fields)
    assert lines(seen.stdout, mode) == lines(ran.stdout, mode)
    assert len(lines(ran.stdout, mode)) > 40


def lines(listing: bytes, mode: int | None) -> list[str]:
    """A listing, sorted; /up itself is another directory when a second upload lies over it."""
    found = listing.decode(errors="surrogateescape").splitlines()
    return sorted(line for line in found if mode != pb.UPLOAD_LAYER or not line.startswith("./up directory"))


async def test_patterns_and_limits(shared_cluster: RealCluster, busybox_image: BusyboxImage) -> None:
    script = "mkdir /a; echo 1 > /a/x.py; echo 2 > /a/x.log; echo 3 > /b.py; rm /data/hello.txt; head -c 50000 /dev/urandom > /z"
    image = busybox_image.reference
    chosen = await run(shared_cluster, image, script, diff_include=["*.py", "/data"], diff_exclude=["/b.*"])
    assert chosen.members() == ["a", "a/x.py", "data", "data/.wh.hello.txt"]
    assert (chosen.done.diff_entries, chosen.done.diff_error) == (4, "")
    assert chosen.done.timings.diff_us > 0
    small = await run(shared_cluster, image, script, diff_max_bytes=20_000)
    assert small.members() == ["a", "a/x.log", "a/x.py", "b.py", "data", "data/.wh.hello.txt"]
    assert small.done.diff_error == "the diff is larger than 20000 bytes: it ends before 'z'"
    none = await run(shared_cluster, image, script, diff_format=pb.DIFF_NONE)
    assert (none.header, none.diff, none.done.diff_entries) == (None, b"", 0)
    with pytest.raises(InvalidArgument, match=r"diff_exclude '\[a' has a \[ without \]"):
        await run(shared_cluster, image, script, diff_exclude=["[a"])


async def test_an_upload_over_what_the_image_has(
    shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("x")
    image = busybox_image.reference
    shown = await run(shared_cluster, image, "stat -c '%U %Y' /up/x", tmp_path, upload_mode=pb.UPLOAD_COPY)
    assert shown.stdout == f"root {int((tmp_path / 'x').stat().st_mtime)}\n".encode()
    assert shown.members() == ["up", "up/x"]
    (tmp_path / "file").write_text("x")
    async with shared_cluster.client() as client:
        result = await client.run(
            image, ["cat", "/data/hello.txt"], upload=[Upload(tmp_path / "x", "data/in/x"), Upload(tmp_path, "/y")]
        )
        assert result.ok, result
        result = await client.run(
            image, ["ls", "/data/in", "/y"], upload=[Upload(tmp_path / "x", "data/in/x"), Upload(tmp_path, "/y")]
        )
        assert result.stdout == b"/data/in:\nx\n\n/y:\nfile\nx\n"


@pytest.mark.slow
async def test_memory_stays_bounded(shared_cluster: RealCluster, busybox_image: BusyboxImage, tmp_path: Path) -> None:
    """1 GiB there and back; no service ever has more than some messages of it."""
    (tmp_path / "up").mkdir()
    with (tmp_path / "up" / "big").open("wb") as file:
        file.truncate(1 << 30)
    image = busybox_image.reference
    await run(shared_cluster, image, "true")
    services = [
        process for process in shared_cluster.cluster.processes() if "afslet" in process.name or process.name == "proxy"
    ]
    pids = [process.popen.pid for process in services]
    before = [peak(pid) for pid in pids]
    ran = await run(
        shared_cluster, image, "cp /up/big /copy; stat -c %s /copy", tmp_path / "up", upload_mode=pb.UPLOAD_COPY
    )
    assert ran.stdout == b"%d\n" % (1 << 30)
    assert ran.done.diff_entries == 3
    assert {
        name: grown for name, grown in zip(pids, map(grown_since, pids, before), strict=True) if grown > 64 << 20
    } == {}


def peak(pid: int) -> int:
    """The largest resident size in bytes of a process from now on, which is its size now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return grown_since(pid, 0)


def grown_since(pid: int, before: int) -> int:
    """How much the peak is above a size."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 - before

"""Messages of uploads: in any size and number they give the same files, and never much of them is in memory."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from typing_extensions import override

from afs.afslet.placing import UploadRefused
from afs.afslet.receiving import receive
from afs.afslet.upload import Staging
from afs.client.files import upload_messages, upload_stream
from afs.core.errors import InvalidArgument
from afs.proto.v1 import afslet_pb2 as pb
from tests.testbed.treediff import assert_same, look

pytestmark = pytest.mark.root  # uploads belong to root


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    """A staging directory that does not exist yet."""
    made = Staging(tmp_path / "staging")
    yield made
    made.close()
    assert not made.directory.exists()


async def sent(*messages: pb.ExecuteRequest) -> AsyncIterator[pb.ExecuteRequest]:
    """Messages as they come from the wire."""
    for message in messages:
        yield message


def begin(path: str, kind: pb.FileType.ValueType = pb.FILE_TYPE_FILE) -> pb.ExecuteRequest:
    """The start of an entry."""
    return pb.ExecuteRequest(file_begin=pb.FileEntryBegin(path=path, type=kind))


def chunk(data: bytes) -> pb.ExecuteRequest:
    """Content."""
    return pb.ExecuteRequest(file_chunk=pb.FileChunk(data=data))


END = pb.ExecuteRequest(file_end=pb.FileEntryEnd())


def make_tree(top: Path) -> None:
    """Small and large files, directories and links, in a source with whole seconds."""
    for number in range(300):
        path = top / f"d{number // 50}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 40))
    (top / "large").write_bytes(os.urandom(7_000_000))
    (top / "edge").write_bytes(bytes(1 << 16))
    (top / "over").write_bytes(bytes((1 << 16) + 1))
    (top / "empty").touch()
    (top / "hollow").mkdir(mode=0o1777)
    (top / "link").symlink_to("d0/f1")
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, (1000, 1000), follow_symlinks=False)


@pytest.mark.parametrize("entries", [False, True], ids=["one-by-one", "entries"])
async def test_what_is_sent_arrives(tmp_path: Path, staging: Staging, entries: bool) -> None:
    source, image = tmp_path / "source", tmp_path / "image"
    make_tree(source)
    image.mkdir()
    progress: list[int] = []
    taken: list[int] = []
    messages = upload_stream([(source, "/")], entries=entries, progress=taken.append)
    assert await receive(messages, staging, progress.append) is False
    staging.settle(image)
    assert_same(
        {path: one for path, one in look(staging.directory).items() if path != b"."},
        {path: one for path, one in look(source).items() if path != b"."},
    )
    total = sum(path.stat().st_size for path in source.rglob("*") if path.is_file() and not path.is_symlink())
    assert progress == sorted(progress)
    assert progress[-1] == taken[-1] == staging.bytes == total


def test_small_files_share_messages(tmp_path: Path) -> None:
    make_tree(tmp_path)
    shared = list(upload_messages(tmp_path, entries=True))
    assert len(shared) < 25 < 900 < len(list(upload_messages(tmp_path)))
    assert max(message.ByteSize() for message in shared) < (1 << 20) + 100


async def test_an_upload_without_files_makes_nothing(staging: Staging) -> None:
    assert await receive(sent(), staging) is False
    assert await receive(sent(pb.ExecuteRequest(upload_end=True)), staging) is True
    assert staging.entries == 0
    assert not staging.directory.exists()


async def test_what_follows_the_end_is_left(staging: Staging) -> None:
    size = pb.ExecuteRequest(terminal_size=pb.TerminalSize(rows=1, columns=2))
    requests = sent(
        begin("f"), chunk(b"x"), size, END, pb.ExecuteRequest(upload_end=True), pb.ExecuteRequest(stdin=b"in")
    )
    others: list[pb.ExecuteRequest] = []
    assert await receive(requests, staging, other=others.append) is True
    assert others == [size]
    assert (await anext(requests)).stdin == b"in"
    assert (staging.directory / "f").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([pb.ExecuteRequest(start=pb.StartRequest())], "a second start"),
        ([pb.ExecuteRequest()], "a request without payload"),
        ([chunk(b"x")], "file_chunk without file_begin"),
        ([begin("f"), chunk(bytes(3_000_000)), begin("g")], "the file before it was not ended"),
        ([begin("f"), chunk(bytes(3_000_000))], "the upload ended in the middle of it"),
        ([begin("f"), chunk(bytes(3_000_000)), pb.ExecuteRequest(upload_end=True)], "ended in the middle"),
        ([begin("x", 7)], "unknown type 7"),  # type: ignore[arg-type]
    ],
)
async def test_messages_out_of_order(staging: Staging, messages: list[pb.ExecuteRequest], error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        await receive(sent(*messages), staging)


@pytest.mark.parametrize("path", ["/abs", "../up", "a/../../b", "", "link/x", "dir"])
async def test_hostile_entries(staging: Staging, path: str) -> None:
    entries = [
        pb.UploadEntry(begin=pb.FileEntryBegin(path="link", type=pb.FILE_TYPE_SYMLINK, symlink_target="/tmp")),
        pb.UploadEntry(begin=pb.FileEntryBegin(path="dir", type=pb.FILE_TYPE_DIR)),
        pb.UploadEntry(begin=pb.FileEntryBegin(path=path, type=pb.FILE_TYPE_FILE), data=b"x"),
    ]
    with pytest.raises(UploadRefused):
        await receive(sent(pb.ExecuteRequest(entries=entries)), staging)
    with pytest.raises(UploadRefused, match="only files have data"):
        with_data = pb.UploadEntry(begin=pb.FileEntryBegin(path="d", type=pb.FILE_TYPE_DIR), data=b"x")
        await receive(sent(pb.ExecuteRequest(entries=[with_data])), staging)


class _Slow(Staging):
    """Counts what was received and not yet written; writing waits for the test."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.go = threading.Event()
        self.size = 0

    @override
    def write(self, data: bytes) -> None:
        self.go.wait()
        self.size += len(data)


async def test_a_slow_disk_holds_the_client_back(tmp_path: Path) -> None:
    staging = _Slow(tmp_path / "staging")
    taken = 0
    waiting = asyncio.Event()

    async def requests() -> AsyncIterator[pb.ExecuteRequest]:
        nonlocal taken
        yield begin("f")
        for _ in range(1024):
            taken += 1
            if taken == 3:
                waiting.set()
            yield chunk(bytes(1 << 20))
        yield END

    task = asyncio.ensure_future(receive(requests(), staging))
    await waiting.wait()
    for _ in range(1000):  # everything that can run without the disk has
        await asyncio.sleep(0)
    assert taken <= 4  # of 1 MiB each
    staging.go.set()
    await task
    assert staging.size == 1 << 30
    staging.close()


async def test_a_cancelled_upload_is_not_written_to_any_more(tmp_path: Path) -> None:
    staging = _Slow(tmp_path / "staging")

    async def requests() -> AsyncIterator[pb.ExecuteRequest]:
        yield begin("f")
        yield chunk(bytes(1 << 20))
        await asyncio.Event().wait()

    task = asyncio.ensure_future(receive(requests(), staging))
    for _ in range(100):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    staging.go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    staging.close()

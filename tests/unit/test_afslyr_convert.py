"""The conversion as a whole: determinism, digests, and nothing left after a failure."""

import errno
import hashlib
import io
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from afs.core.errors import Cancelled
from afs.layerstore.afslyr import reader
from afs.layerstore.afslyr.convert import Converted, Limits, convert
from afs.layerstore.afslyr.errors import CorruptLayer, DigestMismatch, LayerLimit
from afs.layerstore.afslyr.writer import LayerWriter
from tests.testbed import tars

TAR = tars.every_kind_tar()
DIFF_ID = "sha256:" + hashlib.sha256(TAR).hexdigest()
OTHER = "sha256:" + "0" * 64
# Changes only with the version of the format: peers compare files by it.
GOLDEN_ROOT = "sha256:4decccc060fad1d11117a1b9e23a95c834d7683cbd34a566f3d09de6ae8cb901"


def digest(data: bytes) -> str:
    """The sha256 digest of *data*."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def made(blob: bytes, out: Path) -> Converted:
    """*blob* converted."""
    return convert(io.BytesIO(blob).read, out)


def test_all_encodings_give_the_same_bytes(tmp_path: Path) -> None:
    blobs = [TAR, tars.gzipped(TAR), zstandard.ZstdCompressor().compress(TAR)]
    found = [made(blob, tmp_path / str(index)) for index, blob in enumerate(blobs)]
    contents = {(tmp_path / str(index)).read_bytes() for index in range(3)}
    assert len(contents) == 1
    assert [result.blob_digest for result in found] == [digest(blob) for blob in blobs]
    assert [result.blob_size for result in found] == [len(blob) for blob in blobs]
    assert {result.diff_id for result in found} == {DIFF_ID}
    assert {result.root_digest for result in found} == {GOLDEN_ROOT}


def test_what_convert_says_is_what_the_file_says(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = convert(io.BytesIO(TAR).read, out, diff_id=DIFF_ID, blob_digest=DIFF_ID)
    with out.open("rb") as file:
        layout, table = reader.verify_layer(file.fileno())
    data = out.read_bytes()
    assert (layout.diff_id, table.root_digest) == (result.diff_id, result.root_digest)
    assert len(data) == result.file_size == layout.file_size
    assert data[layout.tar_offset : layout.tar_offset + layout.tar_length] == TAR
    assert result.tar_size == len(TAR)


def test_short_reads_change_nothing(tmp_path: Path) -> None:
    source = io.BytesIO(tars.gzipped(TAR))
    result = convert(lambda count: source.read(min(count, 777)), tmp_path / "out")
    assert result.root_digest == GOLDEN_ROOT


def damaged(blob: bytes) -> bytes:
    """*blob* with a wrong bit in the middle."""
    at = len(blob) // 2
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


def failing(error: BaseException) -> Callable[[int], bytes]:
    """A source that raises *error* after some data."""
    blocks = [TAR[:200_000], TAR[200_000:400_000]]

    def read(_: int) -> bytes:
        if not blocks:
            raise error
        return blocks.pop(0)

    return read


ZIP = tars.gzipped(TAR)


@pytest.mark.parametrize(
    ("blob", "error", "message"),
    [
        (ZIP[:-1], CorruptLayer, "truncated"),
        (ZIP[: len(ZIP) // 2], CorruptLayer, "truncated"),
        (damaged(ZIP), CorruptLayer, None),
        (ZIP + b"x", CorruptLayer, "garbage"),
        (TAR[: len(TAR) // 2 - 100], CorruptLayer, "truncated"),
        (b"this is no tar" * 100, CorruptLayer, "not a tar header"),
        (tars.header("x", b"Z"), CorruptLayer, "unsupported"),
        (tars.hard_link("a", "b"), CorruptLayer, "missing"),
    ],
)
def test_bad_blobs_leave_nothing(tmp_path: Path, blob: bytes, error: type[Exception], message: str | None) -> None:
    check_failure(tmp_path, io.BytesIO(blob).read, error, message)


def check_failure(
    tmp_path: Path,
    read: Callable[[int], bytes],
    error: type[BaseException],
    message: str | None = None,
    limits: Limits = Limits(),  # noqa: B008  # frozen
    **expected: str,
) -> BaseException:
    """A conversion must fail with *error* and leave neither file nor thread."""
    with pytest.raises(error, match=message) as caught:
        convert(read, tmp_path / "out", limits=limits, **expected)  # type: ignore[arg-type]  # digests only
    assert list(tmp_path.iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("afslyr")]
    return caught.value


@pytest.mark.parametrize("error", [OSError(errno.EPIPE, "gone"), ValueError("odd"), KeyboardInterrupt(), SystemExit(3)])
def test_errors_of_the_source_pass_through(tmp_path: Path, error: BaseException) -> None:
    assert check_failure(tmp_path, failing(error), type(error)) is error
    # not hidden by a digest either
    assert check_failure(tmp_path, failing(error), type(error), blob_digest=OTHER) is error


def test_digest_mismatches_name_both(tmp_path: Path) -> None:
    found = check_failure(tmp_path, io.BytesIO(ZIP).read, DigestMismatch, "uncompressed tar", diff_id=OTHER)
    assert isinstance(found, DigestMismatch)
    assert (found.expected, found.actual) == (OTHER, DIFF_ID)
    check_failure(tmp_path, io.BytesIO(ZIP).read, DigestMismatch, "the blob's", diff_id=OTHER, blob_digest=OTHER)


@pytest.mark.parametrize("blob", [damaged(ZIP), ZIP[:-50], ZIP + b"x", b"no tar" * 1000])
def test_a_wrong_blob_digest_is_told_before_what_it_caused(tmp_path: Path, blob: bytes) -> None:
    found = check_failure(tmp_path, io.BytesIO(blob).read, DigestMismatch, "the blob's", blob_digest=digest(ZIP))
    assert isinstance(found, DigestMismatch)
    assert found.actual == digest(blob)


def test_the_blob_digest_covers_what_follows_the_stream(tmp_path: Path) -> None:
    blob = ZIP + bytes(1_000_000)
    assert convert(io.BytesIO(blob).read, tmp_path / "out", blob_digest=digest(blob)).blob_size == len(blob)


@pytest.mark.parametrize(
    "limits",
    [
        Limits(max_tar_bytes=100_000),
        Limits(max_entries=10),
        Limits(max_extras_bytes=1000),
        Limits(max_metadata_bytes=100),
    ],
    ids=["tar", "entries", "extras", "metadata"],
)
def test_limits_leave_nothing(tmp_path: Path, limits: Limits) -> None:
    check_failure(tmp_path, io.BytesIO(ZIP).read, LayerLimit, "limit", limits)


def test_the_metadata_limit_counts_what_the_blocks_of_directories_leave_empty(tmp_path: Path) -> None:
    """Two names of 255 bytes do not fit into one block of 512."""
    names = [f"{number:0255}" for number in range(100)]
    blob = b"".join(tars.pax([("path", name)]) + tars.file("x") for name in names) + tars.END
    made(blob, tmp_path / "layer")
    with (tmp_path / "layer").open("rb") as file:
        layout, _ = reader.read_layer(file.fileno())
    (tmp_path / "layer").unlink()
    size = layout.erofs_end - layout.meta_offset
    check_failure(tmp_path, io.BytesIO(blob).read, LayerLimit, "metadata", Limits(max_metadata_bytes=size - 4096))


def test_a_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    blob = tars.gzipped(tars.header("zeros", size=1 << 30) + bytes(100 << 20))
    check_failure(tmp_path, io.BytesIO(blob).read, LayerLimit, "tar", Limits(max_tar_bytes=5 << 20))


def test_a_sparse_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    blob = tars.old_gnu_sparse("huge", [], 1 << 50) + tars.END
    check_failure(tmp_path, io.BytesIO(blob).read, LayerLimit, "sparse")


def test_cancelling_leaves_nothing(tmp_path: Path) -> None:
    calls = iter(range(1000))
    with pytest.raises(Cancelled):
        convert(io.BytesIO(TAR).read, tmp_path / "out", cancelled=lambda: next(calls) > 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["append", "finish"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LayerWriter, step, full)
    found = check_failure(tmp_path, io.BytesIO(ZIP).read, OSError, "No space")
    assert isinstance(found, OSError)
    assert found.errno == errno.ENOSPC


def test_an_existing_file_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        made(TAR, out)
    assert out.read_bytes() == b"mine"


def test_a_bomb_can_be_cancelled(tmp_path: Path) -> None:
    """All of it is read at once; what it becomes is not."""
    asked = itertools.count()
    blob = zstandard.compress(tars.header("zeros", size=1 << 30) + bytes(64 << 20))
    with pytest.raises(Cancelled):
        convert(io.BytesIO(blob).read, tmp_path / "out", cancelled=lambda: next(asked) > 20)
    assert list(tmp_path.iterdir()) == []
    assert next(asked) < 40

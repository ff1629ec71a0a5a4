"""Good inputs to start from, one set per target, made from the test bed's tars."""

import io
from pathlib import Path
from tempfile import TemporaryDirectory

import zstandard

from afs.core.errors import NotFound, Unavailable
from afs.layerstore.afslyr import layout as lay
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.chunkwire import ANSWER_SIZE, Question, pack_chunk, pack_error, pack_question
from afs.layerstore.traces import Chunk, Trace
from tests.fuzz.targets import TRACED_IMAGE, TRACED_LAYERS
from tests.testbed import tars


def small_tars() -> list[bytes]:
    """Tars of a few entries each, which together have every dialect and kind; and the one with all of them."""
    pieces = [(0, b"start"), (1024, b"m" * 700), (5000, b"end")]
    found = [
        tars.tar_of({"d": None, "d/f": b"data", "l": "d/f"}),
        tars.tar_of({"a/b/c": b"implied", "a/b": None, "../x": b"", "/y/./z": b"1"}),
        tars.file("f", b"1") + tars.hard_link("g", "f") + tars.file("f", b"2") + tars.END,
        tars.hard_link("early", "late") + tars.file("late", b"x") + tars.END,
        tars.symlink("s", "d") + tars.directory("d/") + tars.file("s/x", b"through") + tars.END,
        tars.file("d/.wh.x") + tars.file("d/.wh..wh..opq") + tars.file(".wh..wh.aufs") + tars.END,
        tars.header("null", b"3", major=1, minor=3) + tars.header("pipe", b"6") + tars.header("l", b"V") + tars.END,
        tars.gnu_long("n" * 150) + tars.gnu_long("t" * 150, b"K") + tars.symlink("x", "y") + tars.END,
        tars.pax([("path", "p" * 120), ("mtime", "1.5"), ("uid", "7"), ("size", "1")])
        + tars.file("x", b"1")
        + tars.END,
        tars.pax([("comment", "c"), ("mtime", "-3.25")], b"g") + tars.file("f") + tars.END,
        tars.pax([("SCHILY.xattr.user.a", b"\0=\n"), ("LIBARCHIVE.xattr.user.b", "eA")]) + tars.file("x") + tars.END,
        tars.pax([("SCHILY.xattr.system.posix_acl_access", tars.ACL)]) + tars.directory("acl/") + tars.END,
        tars.file("big", uid=0xFFFFFFF0, mtime=-5) + tars.header("star", b"7", mtime=1 << 34) + tars.END,
        tars.old_gnu_sparse("s", pieces, 6000) + tars.END,
        tars.old_gnu_sparse("m", [(number * 600, b"x") for number in range(30)], 20_000) + tars.END,
        b"",
        tars.END,
    ]
    found += [tars.pax_sparse("s", pieces, 6000, version) + tars.END for version in ("0.0", "0.1", "1.0")]
    return found


def files() -> list[bytes]:
    """Layer files of the small tars."""
    with TemporaryDirectory() as directory:
        made = []
        for number, tar in enumerate(small_tars()):
            path = Path(directory, str(number))
            convert(io.BytesIO(tar).read, path)
            made.append(path.read_bytes())
        return made


def _indexes() -> list[bytes]:
    """Number of inodes and metadata of each layer file."""
    found = []
    for data in files():
        layout = lay.parse_header(data[: lay.HEADER_SIZE], len(data))
        # The target has one fixed layout in front of the metadata, so addresses of directories have to move with it.
        target = lay.make_layout(layout.diff_id, 1 << 20, 1 << 16, layout.erofs_end - layout.meta_offset)
        found.append(data[1040:1048] + _moved(data, layout, target))
    return found


def _moved(data: bytes, old: lay.Layout, new: lay.Layout) -> bytes:
    """The metadata of *data* with block addresses for the layout *new*."""
    metadata = bytearray(data[old.meta_offset : old.erofs_end])
    shift = (new.meta_offset - old.meta_offset) // lay.BLOCK_SIZE
    for at in range(0, len(metadata) - 64, 32):
        form, mode = metadata[at], int.from_bytes(metadata[at + 4 : at + 6], "little")
        address = int.from_bytes(metadata[at + 16 : at + 20], "little")
        in_metadata = old.meta_offset <= address * lay.BLOCK_SIZE < old.erofs_end
        if form == 1 and mode & 0o170000 in (0o040000, 0o120000) and in_metadata:
            metadata[at + 16 : at + 20] = (address + shift).to_bytes(4, "little")
    return bytes(metadata)


def _traces() -> list[bytes]:
    one, two, three, _ = TRACED_LAYERS
    orders = [
        [],
        [(one, 0)],
        [*((two, number) for number in range(40)), (one, 7), *((two, number) for number in range(60, 70))],
        [(three, 5), (one, 5), (two, 5), (three, 4), (three, 2), (three, 3), (one, 6)],
    ]
    return [Trace(TRACED_IMAGE, tuple(Chunk(*chunk) for chunk in order)).encode() for order in orders]


def _chunks() -> list[bytes]:
    questions = [
        pack_question(Question(TRACED_LAYERS[1], index, was_bad)) for index, was_bad in ((0, False), (7, True))
    ]
    errors = [pack_error(error) for error in (NotFound("no chunk"), Unavailable("go away"), ValueError("x" * 5000))]
    return [*questions, pack_chunk(900) + b"data", *errors, *(error[ANSWER_SIZE:] for error in errors)]


def seeds(target: str) -> list[bytes]:
    """Inputs for *target* of tests.fuzz.targets."""
    found = small_tars()
    match target:
        case "tar":
            return found
        case "inflate":
            packed = [tars.gzipped(tar) for tar in found[:4]] + [zstandard.compress(tar) for tar in found[:4]]
            several = packed[0] + packed[1] + bytes(100), packed[4] + b"\x50\x2a\x4d\x18\x04\0\0\0skip" + packed[5]
            return [*packed, *several, found[0]]
        case "index":
            return _indexes()
        case "header":
            return [data[: lay.HEADER_SIZE] + data[-lay.FOOTER_SIZE :] for data in files()]
        case "file":
            return files()
        case "records" | "maps":
            headers = [tar[512:1536] for tar in found if tar[156:157] in b"xg"]
            blocks = [tar[:2048] for tar in found if tar[156:157] == b"S"]
            text = [tars.padded(b"2\n0\n5\n1024\n700\n"), tars.records([("GNU.sparse.map", "0,5,1024,7")])]
            return [*headers, *(data.rstrip(b"\0") for data in headers), *blocks, *text]
        case "trace":
            return _traces()
        case "chunk":
            return _chunks()
    raise ValueError(f"no target {target}")

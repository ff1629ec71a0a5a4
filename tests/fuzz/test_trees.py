"""Arbitrary trees through tar, conversion and index, compared with a model and with Python's tarfile."""

import io
import os
import stat
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import example, given, note
from hypothesis import strategies as st

from afs.layerstore.afslyr.check import check_layer
from afs.layerstore.afslyr.convert import convert
from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.index import IndexReader, read_index
from afs.layerstore.afslyr.tarheader import HARD_LINK
from afs.layerstore.afslyr.tarstream import ByteStream, entries
from tests.fuzz.effort import examples
from tests.fuzz.model import Model, Operation, Refused, Tree
from tests.testbed import tars

# Few names, so that entries meet. Some are longer than a header's field.
NAMES = st.sampled_from([b"a", b"b", b"c", b"d.d", b"-", b"\xff\xfe", b"n" * 120, b"m" * 255])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)
ODD_PATHS = st.tuples(st.sampled_from([b"", b"", b"", b"/", b"./", b"../", b"x/../"]), PATHS).map(b"".join)
SHORT = st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=3).map(b"/".join)
IDS = st.sampled_from([0, 1, 1000, 0o7777777, 0o10000000, 0xFFFFFFFE])
TIMES = st.one_of(st.sampled_from([0, 1, -1, 1 << 33, -(1 << 40)]), st.integers(0, 1 << 34))
XATTRS = st.dictionaries(
    st.sampled_from([b"user.a", b"user.bb", b"trusted.t", b"security.capability", b"trusted.overlay.redirect"]),
    st.binary(max_size=40),
    max_size=3,
)


@st.composite
def plain(draw: st.DrawFn) -> Operation:
    """A file, directory, symlink, hard link, device or fifo, in any dialect that can say it."""
    kind = draw(st.sampled_from(["file", "file", "directory", "directory", "symlink", "hard link", "device", "fifo"]))
    dialect = draw(st.sampled_from(["ustar", "v7", "pax", "gnu", "prefix"]))
    path = draw(ODD_PATHS)
    if dialect == "prefix" and len(path) > 99:
        dialect = "gnu"
    link = b""
    if kind == "hard link":
        link = draw(PATHS)
    elif kind == "symlink":
        link = draw(st.one_of(ODD_PATHS, st.integers(1, 4095).map(lambda size: ((b"t" * 50 + b"/") * size)[:size])))
    return Operation(
        kind,  # type: ignore[arg-type]  # one of the literals
        path,
        dialect,  # type: ignore[arg-type]
        mode=draw(st.integers(0, 0o7777)),
        uid=draw(IDS),
        gid=draw(IDS),
        mtime=draw(TIMES),
        nanoseconds=draw(st.integers(0, tars.NS - 1)) if dialect == "pax" else 0,
        data=draw(st.binary(max_size=1200)) if kind == "file" else b"",
        link=link,
        device=draw(st.tuples(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))) if kind == "device" else (0, 0),
        xattrs=tuple(draw(XATTRS).items()) if kind != "hard link" else (),
    )


@st.composite
def sparse(draw: st.DrawFn) -> Operation:
    """A sparse file in any of GNU's formats."""
    pieces, at = [], 0
    for gap, data in draw(st.lists(st.tuples(st.integers(1, 2000), st.binary(min_size=1, max_size=600)), max_size=30)):
        pieces.append((at + gap, data))
        at += gap + len(data)
    size = at + draw(st.integers(0, 3000))
    which = draw(st.sampled_from(["old", "0.0", "0.1", "1.0"]))
    return Operation("sparse", draw(SHORT), pieces=tuple(pieces), size=size, sparse=which)  # type: ignore[arg-type]


WHITEOUTS = st.builds(
    lambda parent, name: Operation("whiteout", parent + b".wh." + name),
    st.one_of(st.just(b""), SHORT.map(lambda path: path + b"/")),
    st.sampled_from([b"a", b"b", b"zz"]),
)
OPAQUES = SHORT.map(lambda path: Operation("opaque", path + b"/.wh..wh..opq"))
GLOBALS = st.sampled_from([0, 42, 1_700_000_000]).map(lambda mtime: Operation("global", b"", mtime=mtime))
OPERATIONS = st.lists(st.one_of(plain(), plain(), plain(), sparse(), WHITEOUTS, OPAQUES, GLOBALS), max_size=12)


def seen(fd: int, index: IndexReader) -> Tree:
    """What the index says, in the form of the model's answer."""
    found: Tree = {}
    names: dict[int, list[bytes]] = {}
    for item in index.walk():
        inode, path = item.inode, item.place.path or b"."
        kind = stat.S_IFMT(inode.mode)
        names.setdefault(inode.nid, []).append(path)
        found[path] = tars.Expected(
            mode=inode.mode,
            uid=inode.uid,
            gid=inode.gid,
            mtime_ns=inode.mtime_ns,
            content=os.pread(fd, inode.size, inode.offset) if kind == stat.S_IFREG else b"",
            target=index.readlink(inode.nid) if kind == stat.S_IFLNK else None,
            device=(os.major(inode.rdev), os.minor(inode.rdev)),
            nlink=1 if inode.is_directory else inode.nlink,
            xattrs={name.decode(): value for name, value in inode.xattrs.items()},
        )
    for paths in names.values():
        for path in paths:
            if path != min(paths):
                found[path] = replace(found[path], same_as=min(paths))
    return found


def converted(tar: bytes) -> Tree:
    """*tar* converted, checked and read back."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "layer")
        convert(io.BytesIO(tar).read, out)
        with out.open("rb") as file:
            fd = file.fileno()
            layout, _ = check_layer(fd)
            return seen(fd, read_index(fd, layout))


@examples(120)
@given(OPERATIONS)
@example([Operation("hard link", b"a", link=b"b"), Operation("hard link", b"b", link=b"c"), Operation("file", b"c")])
@example([Operation("symlink", b"a", link=b"b"), Operation("file", b"a/c", data=b"x"), Operation("whiteout", b".wh.b")])
@example([Operation("file", b"a", data=b"x"), Operation("hard link", b"a/b", link=b"a")])
def test_what_comes_out_is_what_the_model_says(operations: list[Operation]) -> None:
    tar = b"".join(operation.tar() for operation in operations) + tars.END
    model = Model()
    try:
        for operation in operations:
            model.apply(operation)
        wanted = model.finish()
    except Refused as reason:
        note(f"the model refuses it: {reason}")
        wanted = None
    try:
        found = converted(tar)
    except CorruptLayer as reason:
        note(f"the converter refuses it: {reason}")
        found = None
    assert found == wanted


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=60)
MEMBERS = st.lists(
    st.tuples(
        st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]),
        TEXT,
        st.binary(max_size=600),
        st.integers(0, 0o7777),
        st.integers(0, 1 << 31),
        st.integers(0, 1 << 33),
    ),
    max_size=6,
)


@examples(80)
@given(MEMBERS, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_tarfile_sees_the_same_members(members: list[tuple[bytes, str, bytes, int, int, int]], form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for kind, name, data, mode, owner, mtime in members:
            info = tarfile.TarInfo(f"d/{name}")
            info.type, info.mode, info.uid, info.gid, info.mtime = kind, mode, owner, owner, mtime
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            info.linkname = f"to/{name}" if kind == tarfile.SYMTYPE else ""
            info.devmajor, info.devminor = (mode & 0xFF, owner & 0xFFF) if kind == tarfile.CHRTYPE else (0, 0)
            tar.addfile(info, io.BytesIO(data))
    ours = [
        (entry.name.rstrip(b"/"), entry.type, entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.size, entry.link)
        for entry in entries(ByteStream(iter([buffer.getvalue()])))
    ]
    kinds = {
        tarfile.REGTYPE: stat.S_IFREG,
        tarfile.DIRTYPE: stat.S_IFDIR,
        tarfile.SYMTYPE: stat.S_IFLNK,
        tarfile.LNKTYPE: HARD_LINK,
        tarfile.FIFOTYPE: stat.S_IFIFO,
        tarfile.CHRTYPE: stat.S_IFCHR,
    }
    buffer.seek(0)
    with tarfile.open(fileobj=buffer) as tar:
        theirs = [
            (
                os.fsencode(info.name),
                kinds[info.type],
                info.mode,
                info.uid,
                info.gid,
                int(info.mtime) * tars.NS,
                info.size,
                os.fsencode(info.linkname),
            )
            for info in tar
        ]
    assert ours == theirs

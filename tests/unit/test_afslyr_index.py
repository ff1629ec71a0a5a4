"""The reader of the EROFS index: what the converter wrote, and what nobody should have."""

import io
import itertools
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from afs.layerstore.afslyr import reader, xattrs
from afs.layerstore.afslyr.convert import Limits, convert
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit
from afs.layerstore.afslyr.index import ROOT, SLOT, SUPERBLOCK_SIZE, IndexReader, read_index
from afs.layerstore.afslyr.layout import Layout
from tests.testbed import tars


@dataclass
class Made:
    """A converted tar: the whole file and its parts."""

    data: bytes
    layout: Layout

    @property
    def metadata(self) -> bytearray:
        """A copy, to be damaged."""
        return bytearray(self.data[self.layout.meta_offset : self.layout.erofs_end])

    @property
    def superblock(self) -> bytes:
        """The EROFS superblock."""
        return self.data[1024 : 1024 + SUPERBLOCK_SIZE]

    def reader(self, metadata: bytes | bytearray | None = None) -> IndexReader:
        """A reader of the index, or of *metadata* in its place."""
        return IndexReader(self.layout, self.superblock, self.metadata if metadata is None else metadata)


def made(tmp_path: Path, tar: bytes) -> Made:
    """*tar* converted."""
    out = tmp_path / "layer.afslyr"
    convert(io.BytesIO(tar).read, out)
    data = out.read_bytes()
    out.unlink()
    return Made(data, reader.layout_from_bytes(data, len(data)))


@pytest.fixture
def small(tmp_path: Path) -> Made:
    """Nids: root 0, d 2, f and l 4, s 6 (its target is inline), d/x 9."""
    tar = tars.tar_of({"d": None, "d/x": b"xx", "f": b"data"})[:-1024] + tars.hard_link("l", "f")
    return made(tmp_path, tar + tars.symlink("s", "target") + tars.END)


def test_every_kind_of_entry_is_read_back(tmp_path: Path) -> None:
    tar, expected = tars.every_kind()
    layer = made(tmp_path, tar)
    index = layer.reader()
    seen = {}
    for found in index.walk():
        path, inode = found.place.path or b".", found.inode
        kind = stat.S_IFMT(inode.mode)
        seen[path] = tars.Expected(
            mode=inode.mode,
            uid=inode.uid,
            gid=inode.gid,
            mtime_ns=inode.mtime_ns,
            content=layer.data[inode.offset : inode.offset + inode.size] if kind == stat.S_IFREG else b"",
            target=index.readlink(inode.nid) if kind == stat.S_IFLNK else None,
            device=(os.major(inode.rdev), os.minor(inode.rdev)),
            nlink=1 if kind == stat.S_IFDIR else inode.nlink,
            xattrs={name.decode(): value for name, value in inode.xattrs.items()},
        )
    assert seen.keys() == expected.keys()
    for path, wanted in expected.items():
        assert seen[path] == replace(wanted, same_as=None), path


def test_lookup_finds_what_readdir_lists_and_no_more(tmp_path: Path) -> None:
    names = sorted({b"%s%d" % (b"x" * (number * 7 % 200), number) for number in range(2000)} | {b"!", b"-", b"~"})
    index = made(tmp_path, b"".join(tars.file(name[:99]) for name in names) + tars.END).reader()
    listed = list(index.readdir(ROOT))
    assert [entry.name for entry in listed] == sorted({name[:99] for name in names})
    for entry in listed:
        assert index.lookup(ROOT, entry.name) == entry
        for absent in (entry.name + b"\0", entry.name[:-1] + b"\1", b"", b"\xff"):
            assert index.lookup(ROOT, absent) is None
    parent = index.lookup(ROOT, b"..")
    assert parent is not None
    assert parent.nid == ROOT


def test_read_index_takes_metadata_up_to_the_limit(tmp_path: Path) -> None:
    layer = made(tmp_path, tars.tar_of({f"d{number}": None for number in range(100)}))
    path = tmp_path / "again"
    path.write_bytes(layer.data)
    with path.open("rb") as file:
        assert read_index(file.fileno(), layer.layout).inodes == 101
        with pytest.raises(LayerLimit):
            read_index(file.fileno(), layer.layout, Limits(max_metadata_bytes=4096))


def test_questions_that_make_no_sense(small: Made) -> None:
    index = small.reader()
    for nid in (-1, 1 << 40, len(small.metadata) // SLOT - 1):
        with pytest.raises(CorruptLayer, match=f"inode {nid} "):
            index.inode(nid)
    with pytest.raises(CorruptLayer, match="inode 4 is no directory"):
        list(index.readdir(4))
    with pytest.raises(CorruptLayer, match="inode 4 is no directory"):
        index.lookup(4, b"x")
    with pytest.raises(CorruptLayer, match="inode 4 is no symlink"):
        index.readlink(4)


def field(nid: int, at: int, form: str, value: int) -> Callable[[bytearray], None]:
    """A change of an inode."""
    return lambda data: struct.pack_into(form, data, nid * SLOT + at, value)


def entry(name: bytes, at: int, form: str, value: int) -> Callable[[bytearray], None]:
    """A change of the first directory entry that is called *name*: offset *at* of its 12 bytes."""

    def change(data: bytearray) -> None:
        for block in range(0, len(data), 512):
            count = int.from_bytes(data[block + 8 : block + 10], "little") // 12
            for number in range(count if count < 42 else 0):
                where = block + 12 * number
                begin = block + int.from_bytes(data[where + 8 : where + 10], "little")
                if data[begin : begin + len(name)] == name and data[where + 11] == 0:
                    struct.pack_into(form, data, where + at, value)
                    return
        raise AssertionError(name)

    return change


def swap(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    """Other bytes in the place of *old*."""

    def change(data: bytearray) -> None:
        assert data.count(old) == 1
        at = data.index(old)
        data[at : at + len(old)] = new

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (field(4, 0, "<H", 0), "mode 0o100644 and format 0"),  # a compact inode
        (field(4, 0, "<H", 3), "format 3"),  # compressed
        (field(4, 0, "<H", 5), "format 5"),  # inline data of a regular file
        (field(4, 4, "<H", stat.S_IFSOCK | 0o644), "mode 0o140644"),
        (field(4, 6, "<H", 1), "reserved"),
        (field(4, 56, "<Q", 1), "reserved"),
        (field(4, 40, "<I", 10**9), "nanoseconds"),
        (field(4, 44, "<I", 0), "0 links"),
        (field(4, 44, "<I", 1), "more names than links"),
        (field(4, 44, "<I", 3), "fewer names than links"),
        (field(4, 8, "<Q", 1 << 62), "neither tar nor extras"),
        (field(4, 16, "<I", 0xFFFFFFFF), "neither tar nor extras"),
        (field(4, 16, "<I", 1), "neither tar nor extras"),  # the header area
        (field(4, 2, "<H", 0xFFFF), "bytes of metadata wanted"),
        (field(4, 2, "<H", 1), "header that is not zero"),
        (field(4, 2, "<H", 2), "header that is not zero"),
        (field(4, 4, "<H", stat.S_IFIFO | 0o644), "4 bytes of data"),
        (field(4, 4, "<H", stat.S_IFCHR | 0o644), "4 bytes of data"),
        (field(6, 8, "<Q", 0), "inline target of 0 bytes"),
        (field(6, 8, "<Q", 600), "inline target of 600 bytes"),
        (field(6, 16, "<I", 9), "inline target"),
        (field(2, 8, "<Q", 0), "outside of the metadata"),
        (field(2, 8, "<Q", 1 << 40), "outside of the metadata"),
        (field(2, 16, "<I", 8), "outside of the metadata"),  # the tar
        (field(2, 44, "<I", 3), "3 links and 0 subdirectories"),
        (field(2, 8, "<Q", 11), "has its names at"),
        (entry(b"x", 0, "<Q", 1 << 60), "outside of the metadata"),
        (entry(b"x", 0, "<Q", 0), "more names than links"),  # a cycle
        (entry(b"x", 0, "<Q", 2), "more names than links"),
        (entry(b"f", 10, "<B", 2), "not of the type"),
        (entry(b"f", 10, "<B", 6), "of type 6"),
        (entry(b"f", 11, "<B", 1), "of type 1"),
        (entry(b"f", 8, "<H", 500), "bad name"),
        (entry(b"f", 8, "<H", 0), "bad name"),
        (entry(b".", 0, "<Q", 4), '"." leads elsewhere'),
        (entry(b"..x", 0, "<Q", 2), '".." leads elsewhere'),
        (swap(b"...dfls", b"...dgls"), None),
        (swap(b"...dfls", b"...dals"), '"a" is not in order'),
        (swap(b"...dfls", b"...ddls"), '"d" is not in order'),
        (swap(b"...dfls", b"...d/ls"), "bad name"),
        (swap(b"...dfls", b"...d\0ls"), "bad name"),
        (swap(b"...dfls", b"~..dfls"), "more names than links"),
        (swap(b"...x", b"!..x"), "more names than links"),
        (swap(b"target", b"tar\0et"), None),
    ],
    ids=(f"damage{number}" for number in itertools.count()),
)
def test_damaged_metadata(small: Made, change: Callable[[bytearray], None], message: str | None) -> None:
    assert len(list(small.reader().walk())) == 6
    data = small.metadata
    change(data)
    if message is None:  # names and targets are free, but a target has no NUL
        index = small.reader(data)
        assert len(list(index.walk())) == 6
        if b"tar\0et" in data:
            with pytest.raises(CorruptLayer, match="NUL"):
                index.readlink(6)
        return
    with pytest.raises(CorruptLayer, match=message) as caught:
        list(small.reader(data).walk())
    assert caught.value.layer == small.layout.diff_id


def test_a_superblock_must_belong_to_the_header(small: Made) -> None:
    for at in (0, 4, 8, 12, 13, 14, 36, 40, 44, 48, 64, 80, 96, 127):
        bad = bytearray(small.superblock)
        bad[at] ^= 1
        with pytest.raises(CorruptLayer, match="superblock"):
            IndexReader(small.layout, bytes(bad), small.metadata)
    bad = bytearray(small.superblock)
    bad[16] += 1
    with pytest.raises(CorruptLayer, match="5 inodes, the superblock says 6"):
        list(IndexReader(small.layout, bytes(bad), small.metadata).walk())
    for metadata in (small.metadata[:-1], small.metadata + b"\0", b""):
        with pytest.raises(CorruptLayer, match="bytes of metadata"):
            small.reader(metadata)
    with pytest.raises(CorruptLayer, match="superblock has 127"):
        IndexReader(small.layout, small.superblock[:-1], small.metadata)


def test_directories_that_share_their_blocks_are_refused(tmp_path: Path) -> None:
    """Thousands of directories with the blocks of one large one would make a walk of hours out of a small file."""
    big = {f"big/{number:04}": b"" for number in range(1000)}
    layer = made(tmp_path, tars.tar_of({**big, **{f"many/{number:04}": None for number in range(1000)}}))
    index, data = layer.reader(), layer.metadata
    large = index.lookup(ROOT, b"big")
    many = index.lookup(ROOT, b"many")
    assert large is not None
    assert many is not None
    for child in index.readdir(many.nid):
        start = large.nid * SLOT
        data[child.nid * SLOT + 8 : child.nid * SLOT + 20] = data[start + 8 : start + 20]
    steps = 0
    with pytest.raises(CorruptLayer):
        for _ in layer.reader(data).walk():
            steps += 1
    assert steps <= 2 * 2003


def test_a_directory_without_dots_is_refused(small: Made) -> None:
    data = small.metadata
    swap(b"...x", b"!..x")(data)
    with pytest.raises(CorruptLayer, match=r'lacks "\."'):
        list(small.reader(data).readdir(2))


GOOD = xattrs.encode({b"user.a": b"1", b"security.capability": b"22222", b"system.posix_acl_access": b""})


def test_extended_attributes_round_trip() -> None:
    assert xattrs.encode(xattrs.decode(GOOD)) == GOOD
    assert xattrs.decode(GOOD)[b"security.capability"] == b"22222"


@pytest.mark.parametrize("at", range(len(GOOD)))
def test_damaged_extended_attributes_are_refused_or_others(at: int) -> None:
    for bit in range(8):
        bad = GOOD[:at] + bytes([GOOD[at] ^ 1 << bit]) + GOOD[at + 1 :]
        try:
            found = xattrs.decode(bad)
        except ValueError:
            continue
        assert xattrs.encode(found) == bad

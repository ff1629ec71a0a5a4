"""Generated layers, one for each thing that tars can say in many ways; the same bytes each time.

Unlike `tars.every_kind` they hold what other unpackers take too, kind by kind, so that trees can be compared with theirs.
Every directory has an entry of its own, the root included, unless a layer is about their absence.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Unpack

from tests.testbed import layermarks, tars
from tests.testbed.tars import (
    END,
    FileFields,
    directory,
    file,
    gnu_long,
    hard_link,
    header,
    padded,
    pax,
    pax_sparse,
    root,
    symlink,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LONG = "/".join(letter * 70 for letter in "xyz")
_USER_OBJ, _USER, _GROUP_OBJ, _GROUP, _MASK, _OTHER = 1, 2, 4, 8, 16, 32
_NOBODY = 0xFFFFFFFF
_BORDERS = (*range(360, 460, 4), 880, 944, 948)
"""Lengths of attributes: with the inode and what else stands there, around whole blocks."""


def again(name: str, target: str, **fields: Unpack[FileFields]) -> bytes:
    """A hard link whose header says what that of its target says, as GNU tar writes them."""
    return header(name, b"1", link=target, **fields)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL as its xattr holds it: version 2, then tag, permissions and id each."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def names() -> bytes:
    """Long names in every dialect, names that are not UTF-8, of 255 bytes, with `./`, `//` and `/` in front."""
    out = [root()]
    for prefix in ("gnu", "pax", "ustar"):
        parts = f"{prefix}/{_LONG}".split("/")
        for depth in range(1, len(parts) + 1):
            name = "/".join(parts[:depth]) + "/"
            out.append(gnu_long(name) + directory(name[:99], mtime=depth))
    out.append(gnu_long(f"gnu/{_LONG}/file") + file("gnu", b"gnu"))
    out.append(pax([("path", f"pax/{_LONG}/file")]) + file("pax", b"pax"))
    split = f"ustar/{_LONG}"[:150].rpartition("/")[0]
    out.append(header("file", b"0", size=5, prefix=split.encode()) + padded(b"ustar"))
    out.append(directory(b"\xff\xfe dir/", mtime=3) + file(b"\xff\xfe dir/\xe9", b"latin", mtime=4))
    out.append(gnu_long(b"\xe9" * 200) + file("x", b"long latin"))
    # 255 bytes: the most that a name may have
    out.append(pax([("path", "n" * 255)]) + file("x", b"n"))
    out.append(gnu_long("d" * 255 + "/") + directory("x", mtime=5))
    out.append(pax([("path", "d" * 255 + "/" + "é" * 127)]) + file("x", b"d"))
    odd = (
        b"./dotted",
        b"././twice",
        b"/absolute",
        b"pax//double",
        b"gnu/./inner",
        b"gnu/../up",
        b" space ",
        b"new\nline",
    )
    out += [file(name, name, mtime=number) for number, name in enumerate(odd)]
    out += [file(name, name) for name in (b"back\\slash", b"co:lon,com=ma", b".hidden", b"...", b"..data", b"\x01\x7f")]
    return b"".join(out) + END


def numbers() -> bytes:
    """Owners up to 32 bits, times up to far ahead and with nanoseconds, sizes; octal, base-256 and PAX."""
    out = [root()]
    for value in (0, 1, 0xFFFF, 0x10000, 0o7777777, 0o10000000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE):
        out.append(file(f"owner-{value}", uid=value, gid=0xFFFFFFFE - value))
        out.append(pax([("uid", str(value)), ("gid", str(value))]) + file(f"pax-owner-{value}"))
    times = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 32, 1 << 33, 0o77777777777)
    out += [file(f"time{value}", mtime=value) for value in times]
    for text in ("1700000000.123456789", "2147483648.5", "8589934592.000000001", "12.", "3.1"):
        out.append(pax([("mtime", text)]) + file(f"pax-time-{text}"))
    out.append(pax([("mtime", "5.000000001")]) + directory("pax-dir/") + pax([("mtime", "6.5")]) + symlink("link", "x"))
    out.append(pax([("size", "4")]) + header("pax-size", b"0") + padded(b"size"))
    big = header("base256-size", b"0", size=5)
    out.append(tars.with_checksum(big[:124] + tars.base256(5, 12) + big[136:]) + padded(b"large"))
    return b"".join(out) + END


def before_1970() -> bytes:
    """Negative times in base-256 and PAX, also with fractions."""
    out = [root()]
    out += [file(f"time{value}", mtime=value) for value in (-1, -5, -(1 << 31), -(1 << 33))]
    out += [directory("dir/", mtime=-7), symlink("link", "dir", mtime=-8)]
    out += [pax([("mtime", text)]) + file(f"pax{text}") for text in ("-1.25", "-3", "-0.000000001")]
    return b"".join(out) + END


# As GNU tar makes them: pieces of whole blocks but for the last one, which is empty where a hole ends the file.
_SPARSE: Mapping[str, tuple[list[tuple[int, bytes]], int]] = {
    "both": ([(0, b"start".ljust(512)), (4096, b"m" * 1024), (99_840, b"end".ljust(512)), (120_000, b"")], 120_000),
    "late": ([(5120, b"late" * 200)], 5920),
    "many": ([*((n * 3072, b"%04d" % n * 128) for n in range(60)), (200_000, b"")], 200_000),
    "hole": ([(9000, b"")], 9000),
    "whole": ([(0, b"whole" * 300)], 1500),
}


def pax_sparse_files() -> bytes:
    """Sparse files of GNU's PAX formats with holes at the start, in the middle and at the end; also none, and nothing else."""
    out = [root()]
    for tag, found in _SPARSE.items():
        out += [pax_sparse(f"{tag}-{version}", *found, version) for version in ("0.0", "0.1", "1.0")]
    out.append(file("behind", b"what follows stands where it should"))
    return b"".join(out) + END


def old_sparse_files() -> bytes:
    """The same files in old GNU headers, with and without extension headers."""
    out = [root(), *(tars.old_gnu_sparse(tag, *found) for tag, found in _SPARSE.items())]
    out.append(file("behind", b"what follows stands where it should"))
    return b"".join(out) + END


def unaligned_sparse_files() -> bytes:
    """Pieces of odd lengths one right behind the other, and none at the end: GNU tar pads each and needs the last one."""
    pieces = [(0, b"start"), (4096, b"m" * 700), (100_000, b"end")]
    return (
        root() + b"".join(pax_sparse(v, pieces, 120_000, v) for v in ("0.0", "0.1", "1.0")) + file("behind", b"b") + END
    )


def attributes() -> bytes:
    """ACLs, capabilities, user and trusted attributes, and bodies of all lengths around the borders of blocks."""
    access = acl(
        (_USER_OBJ, 7, _NOBODY), (_USER, 6, 1000), (_GROUP_OBJ, 5, _NOBODY), (_GROUP, 4, 70000), (_MASK, 7, _NOBODY),
        (_OTHER, 4, _NOBODY),
    )  # fmt: skip
    default = acl((_USER_OBJ, 7, _NOBODY), (_GROUP_OBJ, 5, _NOBODY), (_OTHER, 0, _NOBODY))
    out = [root()]
    one, both = ("SCHILY.xattr.system.posix_acl_access", access), ("SCHILY.xattr.system.posix_acl_default", default)
    out.append(pax([one]) + file("acl", b"a", mode=0o774))
    out.append(pax([one, both]) + directory("acls/", 0o774, mtime=1))
    out.append(pax([both]) + directory("acl-default/", mtime=2) + file("acl-default/inside", mode=0o600))
    out.append(pax([("SCHILY.xattr.security.capability", tars.CAPABILITY)]) + file("capability", b"c", mode=0o755))
    rooted = struct.pack("<IIIIII", 0x03000001, 1 << 10, 0, 0, 0, 1000)  # version 3: of a user namespace
    out.append(pax([("SCHILY.xattr.security.capability", rooted)]) + file("capability3", b"c", mode=0o755))
    out.append(pax([("SCHILY.xattr.user.bin", b"\0\n=\xff"), ("SCHILY.xattr.user.text", "t")]) + file("user"))
    out.append(pax([("SCHILY.xattr.user.on-directory", "d")]) + directory("user-dir/", mtime=3))
    out.append(
        pax([(f"SCHILY.xattr.user.{'n' * 250}", b"L" * 3000), ("SCHILY.xattr.user.b", b"M" * 4000)]) + file("large")
    )
    out.append(pax([("SCHILY.xattr.user.largest", b"X" * 65535)]) + file("largest"))
    out.append(pax([(f"SCHILY.xattr.user.{n:03}", b"%d" % n) for n in range(300)]) + file("three-hundred"))
    out += [pax([("SCHILY.xattr.user.v", b"v" * length)]) + file(f"border-{length}", b"b") for length in _BORDERS]
    return b"".join(out) + END


def trusted() -> bytes:
    """Attributes of the kind `trusted`, which symlinks and fifos may have too, with bodies of many lengths."""
    out = [root(), pax([("SCHILY.xattr.trusted.file", "f")]) + file("file")]
    out.append(pax([("SCHILY.xattr.trusted.fifo", "f")]) + header("fifo", b"6", mode=0o600))
    out += [pax([("SCHILY.xattr.trusted.v", b"v" * size)]) + symlink(f"link-{size}", "t" * 40) for size in _BORDERS]
    return b"".join(out) + END


def overlay_xattrs() -> bytes:
    """Attributes by which overlayfs would hide files and redirect lookups, and one that EROFS has no index for."""
    names = ("trusted.overlay.opaque", "trusted.overlay.redirect", "user.overlay.opaque", "system.nfs4_acl")
    found: tars.Records = [(f"SCHILY.xattr.{name}", "y") for name in names]
    return root() + pax(found) + directory("dir/", mtime=1) + END


def empty_xattr() -> bytes:
    """An attribute without a value, which is not the same as none."""
    return root() + pax([("SCHILY.xattr.user.empty", "")]) + file("file") + END


def libarchive() -> bytes:
    """Attributes as bsdtar writes them."""
    return root() + pax([("LIBARCHIVE.xattr.user.a%20b", "bGliAA")]) + file("file") + END


def links() -> bytes:
    """Symlinks with targets from 1 to 4095 bytes, those around block borders closely; GNU and PAX long targets."""
    out = [root()]
    lengths = (1, 2, 99, 100, 101, *range(384, 520, 8), *range(508, 516), *range(1022, 1027), 2047, 2048, 4094, 4095)
    for number, length in enumerate(dict.fromkeys(lengths)):
        target = ("../target/" * 410)[:length]
        long = pax([("linkpath", target)]) if number % 2 else gnu_long(target, b"K")
        out.append(long + symlink(f"link-{length}", target[:100], mtime=number))
    out.append(
        symlink("dangling", "nowhere")
        + symlink("self", "self")
        + symlink("up", "../../../../up")
        + symlink("root", "/")
    )
    out.append(symlink(b"not-utf8", b"\xff\xfe"))
    return b"".join(out) + END


def hard_links() -> bytes:
    """Hard links to what came before, to every kind that can have them, and to names that are replaced later."""
    out = [root(), directory("a/", mtime=1), directory("b/", mtime=2)]
    shared: FileFields = {"mode": 0o640, "uid": 5, "mtime": 9}
    out.append(file("a/one", b"shared", **shared))
    out += [
        again("a/two", "a/one", **shared),
        again("b/three", "./a/two", **shared),
        again("four", "/b/three", **shared),
    ]
    out += [symlink("a/link", "one", mtime=3), again("b/link", "a/link", mode=0o777, mtime=3)]
    out += [header("a/null", b"3", major=1, minor=3), again("b/null", "a/null")]
    out += [header("a/pipe", b"6"), again("b/pipe", "a/pipe")]
    long = f"a/{'t' * 200}"
    out += [gnu_long(long) + file("x", b"long", mtime=4), gnu_long(long, b"K") + again("b/gnu", "x", mtime=4)]
    out.append(pax([("linkpath", long)]) + again("b/pax", "x", mtime=4))
    # The second name keeps the old inode.
    out += [file("a/replaced", b"old"), again("b/kept", "a/replaced"), file("a/replaced", b"new", mtime=6)]
    out += [file("empty"), again("b/empty", "empty")]
    return b"".join(out) + END


def link_headers() -> bytes:
    """A hard link whose header says something else than that of the file."""
    return root() + file("one", b"1", mode=0o600, uid=5, mtime=7) + hard_link("two", "one") + END


def forward_links() -> bytes:
    """Hard links whose targets come later, also through each other."""
    out = [root(), hard_link("first", "last"), hard_link("second", "first"), file("last", b"data", mode=0o600, mtime=5)]
    return b"".join([*out, hard_link("third", "second")]) + END


def duplicates() -> bytes:
    """Names that come twice, as another kind each time; the last one counts."""
    kinds: dict[str, Callable[[str, int], bytes]] = {
        "file": lambda name, time: file(name, b"%d" % time, mode=0o600 + time, mtime=time),
        "dir": lambda name, time: directory(name + "/", 0o700 + time, mtime=time),
        "link": lambda name, time: symlink(name, f"target{time}", mtime=time),
        "null": lambda name, time: header(name, b"3", major=1, minor=time, mtime=time),
        "pipe": lambda name, time: header(name, b"6", mtime=time),
    }
    out = [root()]
    for first, make in kinds.items():
        for second, replace in kinds.items():
            if (first, second) == ("dir", "link"):
                continue  # see dir_to_link
            out += [make(f"{first}-{second}", 1), replace(f"{first}-{second}", 2)]
    # A directory that comes again keeps what is in it; one that becomes a file and a directory again does not.
    out += [directory("kept/", 0o700, mtime=1), file("kept/child", b"k"), directory("kept/", 0o711, uid=9, mtime=2)]
    out += [directory("lost/", mtime=1), file("lost/child", b"l"), file("lost", b"f"), directory("lost/", mtime=3)]
    xattr = pax([("SCHILY.xattr.user.first", "1")])
    out += [xattr + file("attributes", b"1"), file("attributes", b"2"), xattr + directory("dir-attributes/", mtime=1)]
    return b"".join(out) + END


def dir_to_link() -> bytes:
    """Directories that become symlinks."""
    out = [root(), directory("to/", mtime=1), directory("empty/", mtime=2), symlink("empty", "nowhere", mtime=3)]
    out += [directory("full/", 0o700, mtime=4), file("full/child", b"l"), symlink("full", "to", mtime=5)]
    return b"".join(out) + END


def devices() -> bytes:
    """Devices of all number ranges, fifos, and what only root may make."""
    out = [root()]
    for major, minor in ((1, 3), (0, 1), (8, 255), (8, 256), (259, 70000), (4095, 1048575)):
        out.append(header(f"char-{major}-{minor}", b"3", mode=0o666, major=major, minor=minor, mtime=1))
        out.append(header(f"block-{major}-{minor}", b"4", mode=0o660, gid=6, major=major, minor=minor, mtime=2))
    out.append(header("fifo", b"6", mode=0o622, uid=5, mtime=3))
    return b"".join(out) + END


def modes() -> bytes:
    """All 12 bits of files' and directories' modes, with owners, as chown clears setuid bits."""
    out = [root()]
    for mode in (0, 0o1, 0o400, 0o644, 0o755, 0o777, 0o1777, 0o2755, 0o4755, 0o6755, 0o7777, 0o4000, 0o2070):
        out.append(file(f"file-{mode:o}", b"x", mode=mode, uid=1000, gid=1001, mtime=1))
        out.append(directory(f"dir-{mode:o}/", mode, uid=1000, gid=1001, mtime=2))
    # Bits above the permissions, as old tars store the whole st_mode
    out.append(file("whole-mode", mode=0o100640) + directory("whole-dir/", 0o40750, mtime=3))
    return b"".join(out) + END


def borders() -> bytes:
    """Directories that fill blocks of 512 bytes exactly, and miss that by a byte; and many inodes of all lengths."""
    out = [root()]
    # "." and ".." take 27 bytes of the first block, every entry 12 and its name.
    for first in (*range(200, 256), 1):
        out.append(directory(f"dir-{first}/", mtime=first))
        inside = ("a" * first, ("b" * (512 - 27 - 24 - first))[:255], "c" * 255, "d" * 233)
        out += [pax([("path", f"dir-{first}/{name}")]) + file("x", mtime=len(name)) for name in inside]
    out.append(directory("sorted/", mtime=1))
    out += [
        file(b"sorted/" + name, name)
        for name in (b"!", b"-", b".a", b"..a", b"/".join([b"~"]), b"\x80", b"a", b"A", b"aa")
    ]
    return b"".join(out) + END


def through_links() -> bytes:
    """Entries whose directories are symlinks of the same layer: relative, absolute, out of the root, through each other."""
    out = [root(), directory("real/", mtime=1), directory("real/inner/", mtime=2), directory("other/", mtime=3)]
    targets = {"relative": "real", "absolute": "/real", "outside": "../../../real", "other/back": "../real/inner"}
    out += [symlink(name, target, mtime=4) for name, target in targets.items()] + [
        symlink("twice", "other/back", mtime=5)
    ]
    out += [file(f"{name}/{name.replace('/', '-')}", b"via", mtime=6) for name in (*targets, "twice", "absolute/inner")]
    out.append(again("other/linked", "twice/twice", mtime=6))
    # Directories have the times of their entries only if those come last: others set them as they go.
    return b"".join([*out, directory("real/", mtime=1), directory("real/inner/", mtime=2), END])


def trailing() -> bytes:
    """What stands behind the end marker is part of the tar and of nothing else."""
    return root() + file("real", b"r") + END + file("behind", b"the end") + b"garbage" * 1000


def global_comment() -> bytes:
    """A global record as `git archive` writes it."""
    return global_header([("comment", "0" * 40)]) + root() + file("a", b"a") + END


def global_times() -> bytes:
    """Global records that say something about files; those of a file's own come first."""
    out = [root(), global_header([("mtime", "42"), ("uid", "7")]), file("all"), pax([("mtime", "43")]) + file("own")]
    return b"".join(out) + END


def global_header(found: tars.Records) -> bytes:
    """A header for all that follows, under the name that git gives it."""
    data = tars.records(found)
    return header("pax_global_header", b"g", size=len(data)) + padded(data)


def odd_types() -> bytes:
    """Types that few tars hold: contiguous files, a volume label, a GNU dump directory."""
    label, dump = header("label", b"V"), header("dump/", b"D", mode=0o755, size=4, mtime=1) + padded(b"Ya\0\0")
    return root() + label + header("seven", b"7", size=3, mtime=2) + padded(b"777") + dump + file("dump/a", b"a") + END


def empty() -> bytes:
    """Two blocks of zeros: what a command that changes nothing leaves."""
    return END


def nothing() -> bytes:
    """Not a byte."""
    return b""


KINDS: Mapping[str, Callable[[], bytes]] = {
    make.__name__: make
    for make in (
        *(names, numbers, before_1970, pax_sparse_files, old_sparse_files, unaligned_sparse_files),
        *(attributes, trusted, overlay_xattrs, empty_xattr, libarchive),
        *(links, hard_links, link_headers, forward_links, duplicates, dir_to_link, devices, modes, borders),
        *(
            layermarks.base,
            layermarks.whiteouts,
            layermarks.remade,
            layermarks.remade_late,
            layermarks.stray,
            layermarks.marks_alone,
            layermarks.file_then_dir,
            layermarks.opaque_root,
            layermarks.implied,
            through_links,
            layermarks.merged_usr,
            layermarks.unmerged_usr,
        ),
        *(trailing, global_comment, global_times, odd_types, empty, nothing),
    )
}
"""The small ones, by name."""

"""Tars for tests, written header by header: deterministic, and free to be odd or wrong."""

import base64
import gzip
import stat
import struct
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

BLOCK = 512
END = bytes(2 * BLOCK)
NS = 1_000_000_000

Records = list[tuple[str | bytes, str | bytes]]


class Fields(TypedDict, total=False):
    """Header fields that any file has: owner and time in seconds."""

    uid: int
    gid: int
    mtime: int


class FileFields(Fields, total=False):
    """The same, and the mode's low 12 bits."""

    mode: int


def to_bytes(text: str | bytes) -> bytes:
    """*text* as bytes, UTF-8."""
    return text.encode() if isinstance(text, str) else text


def octal(value: int, width: int) -> bytes:
    """A numeric field, base-256 where octal does not reach."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return base256(value, width)


def base256(value: int, width: int) -> bytes:
    """A numeric field as GNU tar writes large and negative numbers."""
    marker = 0x80 if value >= 0 else 0xFF
    return bytes([marker]) + (value & ((1 << 8 * (width - 1)) - 1)).to_bytes(width - 1, "big")


def with_checksum(block: bytes) -> bytes:
    """*block* with its checksum set."""
    total = sum(block[:148]) + sum(block[156:]) + 8 * 32
    return block[:148] + b"%06o\0 " % total + block[156:]


def header(
    name: str | bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 0,
    link: str | bytes = b"",
    major: int = 0,
    minor: int = 0,
    magic: bytes = b"ustar\00000",
    prefix: bytes = b"",
) -> bytes:
    """One header block. Names are cut to their fields."""
    numbers = b"".join([octal(mode, 8), octal(uid, 8), octal(gid, 8), octal(size, 12), octal(mtime, 12)])
    devices = octal(major, 8) + octal(minor, 8)
    fields = to_bytes(name), numbers, kind, to_bytes(link), magic, devices, prefix
    return with_checksum(struct.pack("100s48s8xc100s8s64x16s155s12x", *fields))


def padded(data: bytes) -> bytes:
    """*data* up to a whole number of blocks."""
    return data + bytes(-len(data) % BLOCK)


def file(name: str | bytes, data: bytes = b"", **fields: Unpack[FileFields]) -> bytes:
    """A regular file."""
    return header(name, b"0", size=len(data), **fields) + padded(data)


def directory(name: str | bytes, mode: int = 0o755, **fields: Unpack[Fields]) -> bytes:
    """A directory."""
    return header(name, b"5", mode=mode, **fields)


def symlink(name: str | bytes, target: str | bytes, **fields: Unpack[Fields]) -> bytes:
    """A symbolic link."""
    return header(name, b"2", mode=0o777, link=target, **fields)


def hard_link(name: str | bytes, target: str | bytes) -> bytes:
    """A hard link."""
    return header(name, b"1", link=target)


def records(pairs: Records) -> bytes:
    """PAX records."""
    out = b""
    for key, value in pairs:
        body = b" " + to_bytes(key) + b"=" + to_bytes(value) + b"\n"
        length = len(body) + 1
        while len(b"%d" % length) + len(body) != length:
            length += 1
        out += b"%d" % length + body
    return out


def pax(pairs: Records, kind: bytes = b"x") -> bytes:
    """An extended header: for the next entry ('x') or all that follow ('g')."""
    data = records(pairs)
    return header("PaxHeaders/x", kind, size=len(data)) + padded(data)


def gnu_long(name: str | bytes, kind: bytes = b"L") -> bytes:
    """A GNU long name ('L') or link target ('K') for the next entry."""
    data = to_bytes(name) + b"\0"
    return header("././@LongLink", kind, size=len(data), magic=b"ustar  \0") + padded(data)


def old_gnu_sparse(name: str | bytes, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    """An 'S' entry, with extension headers for more than four pieces."""
    stored = b"".join(data for _, data in pieces)
    pairs = [octal(at, 12) + octal(len(data), 12) for at, data in pieces]
    block = header(name, b"S", size=len(stored), magic=b"ustar  \0")
    first = b"".join(pairs[:4]).ljust(96, b"\0") + bytes([len(pairs) > 4]) + octal(size, 12)
    block = with_checksum(block[:386] + first + block[495:])
    rest = pairs[4:]
    while rest:
        block += (b"".join(rest[:21]).ljust(504, b"\0") + bytes([len(rest) > 21])).ljust(BLOCK, b"\0")
        rest = rest[21:]
    return block + padded(stored)


def pax_sparse(name: str, pieces: list[tuple[int, bytes]], size: int, version: str) -> bytes:
    """A sparse file in GNU's PAX format "0.0", "0.1" or "1.0"."""
    stored = b"".join(data for _, data in pieces)
    numbers = [str(number) for at, data in pieces for number in (at, len(data))]
    if version == "1.0":
        table = padded("".join(f"{line}\n" for line in [str(len(pieces)), *numbers]).encode())
        major: Records = [("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", name)]
        return pax([*major, ("GNU.sparse.realsize", str(size))]) + file("GNUSparseFile.0/x", table + stored)
    pairs: Records = [("GNU.sparse.size", str(size)), ("GNU.sparse.numblocks", str(len(pieces)))]
    if version == "0.1":
        return pax([*pairs, ("GNU.sparse.name", name), ("GNU.sparse.map", ",".join(numbers))]) + file("G/x", stored)
    for at, data in pieces:
        pairs += [("GNU.sparse.offset", str(at)), ("GNU.sparse.numbytes", str(len(data)))]
    return pax(pairs) + file(name, stored)


def root() -> bytes:
    """The entry of the root, with attributes that no unpacker would give it by itself."""
    return directory("./", 0o751, uid=1, gid=2, mtime=1_700_000_000)


def tar_of(files: dict[str, bytes | str | None]) -> bytes:
    """A tar: bytes are files' contents, a str is a symlink's target, None makes a directory."""
    return b"".join(_entry(name, what) for name, what in files.items()) + END


def _entry(name: str, what: bytes | str | None) -> bytes:
    if what is None:
        return directory(name)
    return symlink(name, what) if isinstance(what, str) else file(name, what)


def gzipped(data: bytes) -> bytes:
    """*data* as gzip, without a time."""
    return gzip.compress(data, 6, mtime=0)


@dataclass(frozen=True)
class Expected:
    """What a path of :func:`every_kind` must look like once it is mounted; ``same_as`` names another path of its inode."""

    mode: int  # with the type
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    content: bytes = b""
    target: bytes | None = None
    device: tuple[int, int] = (0, 0)
    nlink: int = 1
    xattrs: dict[str, bytes] = field(default_factory=dict)
    same_as: bytes | None = None


REG, DIR, LNK = stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)  # cap_net_raw=ep, capabilities(7)
# Version 2: user::rwx user:1000:rwx group::r-x mask::rwx other::r-x, posix_acl_xattr(5)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, perm, who)
    for tag, perm, who in [
        (1, 7, 0xFFFFFFFF),
        (2, 7, 1000),
        (4, 5, 0xFFFFFFFF),
        (16, 7, 0xFFFFFFFF),
        (32, 5, 0xFFFFFFFF),
    ]
)
OPAQUE = {"trusted.overlay.opaque": b"y"}
_PIECES = [(0, b"start"), (4096, b"m" * 700), (100_000, b"end")]
_MANY = [(n * 3000, b"%04d" % n) for n in range(60)]


def _spread(pieces: list[tuple[int, bytes]], size: int) -> bytes:
    out = bytearray(size)
    for at, data in pieces:
        out[at : at + len(data)] = data
    return bytes(out)


class _Collection:
    """Tar bytes and what they should become, side by side."""

    def __init__(self) -> None:
        self.tar = b""
        self.expected: dict[bytes, Expected] = {}

    def add(self, path: str | bytes, data: bytes, expected: Expected) -> None:
        self.tar += data
        self.expected[to_bytes(path)] = expected

    def plain_kinds(self) -> None:
        add = self.add
        add(
            ".",
            directory("./", 0o751, uid=1, gid=2, mtime=1_600_000_000),
            Expected(DIR | 0o751, 1, 2, 1_600_000_000 * NS),
        )
        add("dir", directory("dir/", 0o1777, uid=3, mtime=5), Expected(DIR | 0o1777, 3, 0, 5 * NS))
        add("dir/empty", file("dir/empty"), Expected(REG | 0o644))
        add("dir/setuid", file("./dir/setuid", b"su", mode=0o6755), Expected(REG | 0o6755, content=b"su"))
        big = bytes(range(256)) * 9000
        add("big", file("/big", big, uid=1000, gid=1000, mtime=7), Expected(REG | 0o644, 1000, 1000, 7 * NS, big))
        add("null", header("null", b"3", mode=0o666, major=1, minor=3), Expected(stat.S_IFCHR | 0o666, device=(1, 3)))
        disk = Expected(stat.S_IFBLK | 0o660, gid=6, device=(259, 70000))
        add("disk", header("disk", b"4", mode=0o660, gid=6, major=259, minor=70000), disk)
        add("fifo", header("fifo", b"6", mode=0o600), Expected(stat.S_IFIFO | 0o600))
        add("seven", header("seven", b"7", size=3) + padded(b"777"), Expected(REG | 0o644, content=b"777"))
        add("v7", header("v7", b"\0", size=2, magic=b"") + padded(b"v7"), Expected(REG | 0o644, content=b"v7"))
        add("v7dir", header("v7dir/", b"\0", mode=0o700, magic=b""), Expected(DIR | 0o700))
        add("a/b/c/implied", file("a/b/c/implied", b"i"), Expected(REG | 0o644, content=b"i"))
        for path in ("a", "a/b", "a/b/c"):
            self.expected[path.encode()] = Expected(DIR | 0o755)
        self.tar += header("label", b"V")

    def names(self) -> None:
        add, long = self.add, "long/" + "/".join(["d" * 80] * 3)
        add(long + "/g", gnu_long(long + "/g") + file(long + "/g", b"gnu"), Expected(REG | 0o644, content=b"gnu"))
        add(long + "/p", pax([("path", long + "/p")]) + file("x", b"pax"), Expected(REG | 0o644, content=b"pax"))
        prefix = header("name", b"0", size=1, prefix=long[:150].encode()) + padded(b"u")
        add(long[:150] + "/name", prefix, Expected(REG | 0o644, content=b"u"))
        add(b"\xff\xfe \xe9", file(b"\xff\xfe \xe9", b"latin"), Expected(REG | 0o644, content=b"latin"))
        add("n" * 255, pax([("path", "n" * 255)]) + file("x"), Expected(REG | 0o644))
        for sort_before_dot in ("many/!", "many/-", "many/.a", "many/~"):
            add(sort_before_dot, file(sort_before_dot), Expected(REG | 0o644))
        for number in range(200):
            add(
                f"many/file{number}",
                file(f"many/file{number}", b"%d" % number),
                Expected(REG | 0o644, content=b"%d" % number),
            )
        for length in (1, 300, 448, 449, 511, 512, 513, 2000, 4095):
            target = "t" * length
            entry = pax([("linkpath", target)]) + symlink(f"links/{length}", "x")
            add(f"links/{length}", entry, Expected(LNK | 0o777, target=target.encode()))
        target = "../" * 50 + "etc"
        add(
            "links/gnu",
            gnu_long(target, b"K") + symlink("links/gnu", target),
            Expected(LNK | 0o777, target=target.encode()),
        )
        add("links/through", symlink("links/through", "../dir"), Expected(LNK | 0o777, target=b"../dir"))
        add("dir/via", file("links/through/via", b"via"), Expected(REG | 0o644, content=b"via"))
        add("confined", file("../../confined", b"in"), Expected(REG | 0o644, content=b"in"))

    def numbers(self) -> None:
        add, owner = self.add, 0xFFFFFFF0
        add("num/owner", file("num/owner", uid=owner, gid=3_000_000), Expected(REG | 0o644, owner, 3_000_000))
        add("num/old", file("num/old", mtime=-5), Expected(REG | 0o644, mtime_ns=-5 * NS))
        add("num/far", file("num/far", mtime=1 << 34), Expected(REG | 0o644, mtime_ns=(1 << 34) * NS))
        entry = pax([("mtime", "1700000000.123456789"), ("uid", "4000000000"), ("gid", "7")]) + file("num/ns")
        add("num/ns", entry, Expected(REG | 0o644, 4_000_000_000, 7, 1_700_000_000_123_456_789))
        entry = pax([("mtime", "-1.25")]) + file("num/negative")
        add("num/negative", entry, Expected(REG | 0o644, mtime_ns=-1_250_000_000))
        entry = pax([("size", "4")]) + header("num/size", b"0") + padded(b"size")
        add("num/size", entry, Expected(REG | 0o644, content=b"size"))

    def attributes(self) -> None:
        add = self.add
        found: Records = [
            ("SCHILY.xattr.user.text", "v"),
            ("SCHILY.xattr.user.empty", ""),
            ("SCHILY.xattr.user.bin", b"\0\n=\xff"),
        ]
        found += [("SCHILY.xattr.trusted.t", "t"), ("SCHILY.xattr.security.capability", CAPABILITY)]
        found += [("SCHILY.xattr.trusted.overlay.redirect", "/etc"), ("SCHILY.xattr.user.overlay.opaque", "y")]
        found += [("SCHILY.xattr.system.nfs4_acl", "x")]
        kept = {"user.text": b"v", "user.empty": b"", "user.bin": b"\0\n=\xff", "trusted.t": b"t"}
        kept["security.capability"] = CAPABILITY
        add("x/file", pax(found) + file("x/file", b"data"), Expected(REG | 0o644, content=b"data", xattrs=kept))
        acls: Records = [("SCHILY.xattr.system.posix_acl_access", ACL), ("SCHILY.xattr.system.posix_acl_default", ACL)]
        both = {"system.posix_acl_access": ACL, "system.posix_acl_default": ACL}
        add("x/acl", pax(acls) + directory("x/acl", 0o775), Expected(DIR | 0o775, xattrs=both))
        encoded = base64.b64encode(b"lib\0").rstrip(b"=")
        entry = pax([("LIBARCHIVE.xattr.user.a%20b", encoded)]) + file("x/libarchive")
        add("x/libarchive", entry, Expected(REG | 0o644, xattrs={"user.a b": b"lib\0"}))
        large = {"user." + "n" * 250: b"L" * 3000, "user.b": b"M" * 4000}
        pairs: Records = [("SCHILY.xattr." + key, value) for key, value in large.items()]
        add("x/large", pax(pairs) + file("x/large"), Expected(REG | 0o644, xattrs=large))
        entry = pax([("SCHILY.xattr.trusted.l", "l")]) + symlink("x/link", "to")
        add("x/link", entry, Expected(LNK | 0o777, target=b"to", xattrs={"trusted.l": b"l"}))

    def sparse(self) -> None:
        content = _spread(_PIECES, 120_000)
        self.add("sparse/old", old_gnu_sparse("sparse/old", _PIECES, 120_000), Expected(REG | 0o644, content=content))
        many = _spread(_MANY, 200_000)
        self.add("sparse/many", old_gnu_sparse("sparse/many", _MANY, 200_000), Expected(REG | 0o644, content=many))
        for version in ("0.0", "0.1", "1.0"):
            name = f"sparse/{version}"
            self.add(name, pax_sparse(name, _PIECES, 120_000, version), Expected(REG | 0o644, content=content))
        self.add("sparse/hole", old_gnu_sparse("sparse/hole", [], 5000), Expected(REG | 0o644, content=bytes(5000)))
        whole = [(0, b"whole" * 300)]
        self.add(
            "sparse/whole", pax_sparse("sparse/whole", whole, 1500, "1.0"), Expected(REG | 0o644, content=whole[0][1])
        )
        self.tar += old_gnu_sparse("sparse/replaced", _PIECES, 120_000)
        self.add("sparse/replaced", file("sparse/replaced", b"new"), Expected(REG | 0o644, content=b"new"))

    def hard_links(self) -> None:
        shared = Expected(REG | 0o640, 5, content=b"shared", nlink=3)
        self.add("hl/early", hard_link("hl/early", "hl/target"), replace(shared, same_as=b"hl/target"))
        self.add("hl/target", file("hl/target", b"shared", mode=0o640, uid=5), shared)
        self.add("hl/late", hard_link("hl/late", "./hl/early"), replace(shared, same_as=b"hl/target"))
        old = Expected(REG | 0o644, content=b"old", nlink=2)
        self.tar += file("hl/replaced", b"old")
        self.add("hl/one", hard_link("hl/one", "hl/replaced"), old)
        self.add("hl/two", hard_link("hl/two", "hl/one"), replace(old, same_as=b"hl/one"))
        self.add("hl/replaced", file("hl/replaced", b"new"), Expected(REG | 0o644, content=b"new"))
        self.add("hl/sym", symlink("hl/sym", "s"), Expected(LNK | 0o777, target=b"s", nlink=2))
        self.add(
            "hl/sym2", hard_link("hl/sym2", "hl/sym"), Expected(LNK | 0o777, target=b"s", nlink=2, same_as=b"hl/sym")
        )
        zero = Expected(stat.S_IFCHR | 0o644, device=(1, 5), nlink=2)
        self.add("hl/zero", header("hl/zero", b"3", major=1, minor=5), zero)
        self.add("hl/zero2", hard_link("hl/zero2", "hl/zero"), replace(zero, same_as=b"hl/zero"))

    def duplicates(self) -> None:
        self.tar += directory("dup/dir", 0o700) + file("dup/dir/kept", b"k")
        self.add("dup/dir", directory("dup/dir", 0o711, uid=9), Expected(DIR | 0o711, 9))
        self.expected[b"dup/dir/kept"] = Expected(REG | 0o644, content=b"k")
        self.tar += file("dup/file", b"first")
        self.add("dup/file", file("dup/file", b"second"), Expected(REG | 0o644, content=b"second"))
        self.tar += directory("dup/was-dir") + file("dup/was-dir/lost", b"l")
        self.add("dup/was-dir", symlink("dup/was-dir", "x"), Expected(LNK | 0o777, target=b"x"))
        self.tar += file("dup/was-file", b"f")
        self.add("dup/was-file", directory("dup/was-file", 0o750), Expected(DIR | 0o750))

    def whiteouts(self) -> None:
        white = Expected(stat.S_IFCHR)
        self.add("wh/gone", file("wh/.wh.gone"), white)
        self.add(
            "wh/opaque",
            file("wh/opaque/.wh..wh..opq") + directory("wh/opaque", 0o701),
            Expected(DIR | 0o701, xattrs=OPAQUE),
        )
        self.add("wh/both", file("wh/.wh.both") + directory("wh/both"), Expected(DIR | 0o755, xattrs=OPAQUE))
        self.add("wh/after", directory("wh/after") + file("wh/.wh.after"), Expected(DIR | 0o755, xattrs=OPAQUE))
        self.add("wh/real", file("wh/real", b"r") + file("wh/.wh.real"), Expected(REG | 0o644, content=b"r"))
        self.tar += file(".wh..wh.aufs") + directory(".wh..wh.plnk") + file(".wh..wh.plnk/1.2", b"plink")
        self.add("wh/plink", hard_link("wh/plink", ".wh..wh.plnk/1.2"), Expected(REG | 0o644, content=b"plink"))


def every_kind() -> tuple[bytes, dict[bytes, Expected]]:
    """A tar with every kind of entry, and what each path must become. Implied directories stand among them."""
    made = _Collection()
    made.plain_kinds()
    made.names()
    made.numbers()
    made.attributes()
    made.sparse()
    made.hard_links()
    made.duplicates()
    made.whiteouts()
    made.tar += pax([("comment", "global"), ("mtime", "42")], b"g")
    made.add("global", file("global", b"g"), Expected(REG | 0o644, mtime_ns=42 * NS, content=b"g"))
    implied = {path.rpartition(b"/")[0] for path in made.expected} - {b""}
    while missing := implied - made.expected.keys():
        for path in missing:
            made.expected[path] = Expected(DIR | 0o755)
        implied |= {path.rpartition(b"/")[0] for path in missing} - {b""}
    return made.tar + END + b"trailing garbage is part of the tar", made.expected


def every_kind_tar() -> bytes:
    """The tar of :func:`every_kind`."""
    return every_kind()[0]

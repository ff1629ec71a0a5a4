"""The tar parser: dialects, limits and broken input."""

import contextlib
import io
import random
import stat
import tarfile

import pytest

from afs.layerstore.afslyr import pax
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit
from afs.layerstore.afslyr.limits import Limits
from afs.layerstore.afslyr.tarheader import Entry, number
from afs.layerstore.afslyr.tarstream import MAX_RECORD, ByteStream, entries
from tests.testbed import tars


def parse(tar: bytes, step: int = 1 << 20) -> list[Entry]:
    """All entries of *tar*, handed over in blocks of *step* bytes."""
    return list(entries(ByteStream(tar[at : at + step] for at in range(0, len(tar), step))))


@pytest.mark.parametrize("step", [1, 511, 512, 513, 10_000])
def test_block_sizes_do_not_matter(step: int) -> None:
    tar = tars.every_kind_tar()
    tar = tar if step > 1 else tar[:200_000]
    if step == 1:
        tar = tars.gnu_long("x" * 300) + tars.file("x", b"d" * 700) + tars.END
    assert parse(tar, step) == parse(tar)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_pythons_tarfile(form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for number_, name in enumerate(["a", "d" * 60 + "/" + "n" * 90, "ü/é"]):
            info = tarfile.TarInfo(name)
            info.size, info.mode, info.mtime, info.uid = 5, 0o4711, 100 + number_, 7
            out.addfile(info, io.BytesIO(b"12345"))
    found = parse(buffer.getvalue())
    assert [entry.name for entry in found] == [b"a", b"d" * 60 + b"/" + b"n" * 90, "ü/é".encode()]
    assert [(entry.mode, entry.uid, entry.size, entry.mtime_ns // tars.NS) for entry in found] == [
        (0o4711, 7, 5, 100 + index) for index in range(3)
    ]
    assert all(buffer.getvalue()[entry.offset : entry.offset + 5] == b"12345" for entry in found)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (b"0000644\0", 0o644),
        (b"   644 \0", 0o644),
        (b"644\0junk", 0o644),
        (bytes(8), 0),
        (b" " * 8, 0),
        (tars.base256(1 << 40, 12), 1 << 40),
        (tars.base256(-1, 12), -1),
        (tars.base256(-(1 << 40), 12), -(1 << 40)),
    ],
)
def test_numbers(field: bytes, value: int) -> None:
    assert number(field) == value


@pytest.mark.parametrize("field", [b"0000899\0", b"-000001\0", b"0x00010\0", b"1_0\0\0\0\0\0", b"6 4\0\0\0\0\0"])
def test_bad_numbers(field: bytes) -> None:
    with pytest.raises(ValueError, match=r"octal|literal"):
        number(field)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"1", 10**9),
        (b"1.5", 15 * 10**8),
        (b"-1.5", -15 * 10**8),
        (b"0.0000000019", 1),
        (b"-0.0000000011", -2),
        (b"2.", 2 * 10**9),
    ],
)
def test_pax_times_round_down(text: bytes, value: int) -> None:
    assert pax.time_ns(text) == value


@pytest.mark.parametrize("text", [b"", b".5", b"1e5", b"+1", b"nan", b"1.2.3", b"9" * 30])
def test_bad_pax_times(text: bytes) -> None:
    with pytest.raises(ValueError, match="time"):
        pax.time_ns(text)


def test_signed_checksums_count() -> None:
    block = bytearray(tars.header(b"\xe9\xff", size=0))
    signed = sum(b - 256 if b > 127 else b for b in block[:148] + block[156:]) + 256
    block[148:156] = b"%06o\0 " % signed
    assert parse(bytes(block) + tars.END)[0].name == b"\xe9\xff"


@pytest.mark.parametrize("pairs", [[(f"key{n}", "v") for n in range(17)], [("comment", "c" * (64 << 10))]])
def test_global_records_are_few(pairs: tars.Records) -> None:
    """They are merged into every entry: without a bound some kilobytes make a tar of hours."""
    assert parse(tars.pax(pairs[:16], b"x") + tars.file("a") + tars.END)
    with pytest.raises(CorruptLayer, match="global records"):
        parse(tars.pax(pairs[:9], b"g") + tars.pax(pairs[9:], b"g") + tars.file("a") + tars.END)


def test_pax_overrides_and_global_defaults() -> None:
    tar = (
        tars.pax([("uid", "5"), ("gid", "6")], b"g")
        + tars.file("a")
        + tars.pax([("uid", "7"), ("gid", "")])
        + tars.file("b", gid=9)
        + tars.file("c")
        + tars.END
    )
    assert [(entry.uid, entry.gid) for entry in parse(tar)] == [(5, 6), (7, 9), (5, 6)]


def test_star_keeps_times_in_the_prefix() -> None:
    block = bytearray(tars.header("name", prefix=b"dir"))
    block[476:500] = b"00000000001\x0000000000002\0"
    block[508:512] = b"tar\0"
    assert parse(tars.with_checksum(bytes(block)) + tars.END)[0].name == b"dir/name"


@pytest.mark.parametrize(
    "end", [b"", bytes(512), tars.END, tars.END + b"garbage"], ids=["none", "one", "two", "garbage"]
)
def test_ends(end: bytes) -> None:
    assert len(parse(tars.file("a", b"data") + end)) == 1


def test_sizes_of_links_and_directories_mean_nothing() -> None:
    tar = (
        b"".join(tars.header("x", kind, size=5000, link="y") for kind in (b"1", b"2", b"5", b"3"))
        + tars.file("z")
        + tars.END
    )
    found = parse(tar)
    assert [entry.size for entry in found] == [0] * 5
    assert found[-1].name == b"z"


@pytest.mark.parametrize(
    ("tar", "message"),
    [
        (tars.file("a", b"x" * 600)[:-1], "truncated in the data"),
        (tars.file("a", b"x" * 600)[:600], "truncated in the data"),
        (tars.file("a")[:300], "truncated: 300 bytes"),
        (tars.pax([("path", "x")])[:700], "truncated in an extended"),
        (tars.pax([("path", "x")]), "between"),
        (tars.file("a") + bytes(512) + tars.file("b"), "lone zero block"),
        (b"x" * 512, "not a tar header"),
        (b"\x01" + tars.file("a")[1:], "bad checksum"),
        (tars.header("a", b"Z") + tars.END, "unsupported tar entry type"),
        (tars.header("a", b"M") + tars.END, "unsupported tar entry type"),
        (tars.header("a", size=-512) + tars.END, "negative size"),
        (tars.file("a") + tars.header("x", b"x") + tars.END, "between"),
        (tars.header("a", b"x", size=MAX_RECORD + 1), "extended header of"),
        (tars.header("a", b"L", size=1 << 40), "extended header of"),
        (tars.pax([("path", "a\0b")]) + tars.file("a"), "NUL"),
        (tars.pax([("linkpath", "a\0b")]) + tars.header("a", b"2"), "NUL"),
        (tars.pax_sparse("a\0b", [(0, b"x" * 512)], 1024, "1.0"), "NUL"),
        (tars.pax([("uid", "-5")]) + tars.file("a"), "not a number"),
        (tars.pax([("mtime", "x")]) + tars.file("a"), "not a time"),
        (tars.pax([("LIBARCHIVE.xattr.user.x", "%%%")]) + tars.file("a"), "ase64|base64|Incorrect|Invalid"),
        (tars.header("x", b"x", size=9) + tars.padded(b"99 a=b\nxx"), "malformed"),
        (tars.header("x", b"x", size=4) + tars.padded(b"abcd"), "without a length"),
        (tars.pax([("GNU.sparse.size", "10"), ("GNU.sparse.map", "0,4,2,4")]) + tars.file("a", b"x" * 8), "ascending"),
        (tars.pax([("GNU.sparse.size", "10"), ("GNU.sparse.map", "0,4")]) + tars.file("a", b"x" * 8), "covers"),
        (tars.pax([("GNU.sparse.size", "10"), ("GNU.sparse.map", "0,40")]) + tars.file("a", b"x" * 40), "ascending"),
        (tars.pax([("GNU.sparse.size", "10"), ("GNU.sparse.map", "0")]) + tars.file("a"), "odd"),
        (tars.pax([("GNU.sparse.size", "9"), ("GNU.sparse.major", "2")]) + tars.file("a"), "version"),
        (
            tars.pax([("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.realsize", "9")])
            + tars.file("a", b"9" * 600 + b"\n"),
            "too long|not a number",
        ),
    ],
)
def test_broken_tars_are_refused(tar: bytes, message: str) -> None:
    with pytest.raises(CorruptLayer, match=message):
        parse(tar)


def test_errors_name_the_entry() -> None:
    with pytest.raises(CorruptLayer, match=r'"bad\\nZ"') as caught:
        parse(tars.header("bad\nZ", b"Z"))
    assert caught.value.entry == b"bad\nZ"
    assert "\n" not in str(caught.value)


def test_random_damage_never_raises_anything_else() -> None:
    chance = random.Random(3)  # noqa: S311 - not for secrets
    whole = tars.every_kind_tar()
    starts = [at for at in range(0, len(whole), 512) if b"ustar" in whole[at + 257 : at + 263]]
    for _ in range(400):
        tar = bytearray(whole)
        at = chance.choice(starts)
        tar[at + chance.randrange(512)] = chance.randrange(256)
        tar[at : at + 512] = tars.with_checksum(bytes(tar[at : at + 512]))
        with contextlib.suppress(CorruptLayer):
            parse(bytes(tar))


def test_types() -> None:
    found = {entry.name: entry.type for entry in parse(tars.every_kind_tar())}
    assert found[b"v7dir/"] == stat.S_IFDIR
    assert found[b"seven"] == stat.S_IFREG
    assert b"label" not in found


def test_a_trailing_slash_makes_a_directory_of_old_headers_alone() -> None:
    """As in Go's archive/tar, and so in containerd."""
    found = parse(tars.header("old/", b"\0", magic=b"") + tars.header("new/") + tars.END)
    assert [stat.S_ISDIR(entry.type) for entry in found] == [True, False]


def test_a_size_without_data_is_not_looked_at() -> None:
    (link,) = parse(tars.header("l", b"2", link="t", size=-512) + tars.END)
    assert (link.type, link.size) == (stat.S_IFLNK, 0)


def test_own_attributes_win_over_global_ones_however_they_are_written() -> None:
    globally = tars.pax([("LIBARCHIVE.xattr.user.a", "Zw"), ("SCHILY.xattr.user.b", "g")], kind=b"g")
    own = tars.pax([("SCHILY.xattr.user.a", "own"), ("LIBARCHIVE.xattr.user.%62", "b3du")])
    first, second = parse(globally + own + tars.file("first") + tars.file("second") + tars.END)
    assert first.xattrs == {b"user.a": b"own", b"user.b": b"own"}
    assert second.xattrs == {b"user.a": b"g", b"user.b": b"g"}


@pytest.mark.parametrize(
    "tar", [tars.header("d/", b"5") * 5, tars.pax([(f"k{n}", "v") for n in range(9)]) + tars.file("a")]
)
def test_headers_and_records_are_limited(tar: bytes) -> None:
    limits = Limits(max_headers=4)
    with pytest.raises(LayerLimit, match="headers"):
        list(entries(ByteStream(iter([tar + tars.END])), limits=limits))

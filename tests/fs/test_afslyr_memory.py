"""The memory of a conversion, read from a fresh process: bounded for the bytes of a layer, linear in its entries."""

import gzip
import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import zstandard

from tests.testbed import capabilities, tars

MIB = 1 << 20
LIMIT = 150 * MIB
PER_ENTRY = 400
_FILE = 1 << 30  # bytes of one file in the large layers
_PART = 64 * MIB
# Prints the peak of its own memory: ru_maxrss would start with that of the process that forked, VmHWM starts anew.
_CONVERT = """
import re, sys
from pathlib import Path
from afs.layerstore.afslyr.convert import convert
made = convert(sys.stdin.buffer.read1, Path(sys.argv[1]))
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
print(made.entries, made.tar_size, peak)
"""


def peak_of(blob: Iterable[bytes], out: Path) -> tuple[int, int, int]:
    """Convert `blob` in a new process: entries, size of the tar and peak of memory, both in bytes."""
    argv: list[str | Path] = [sys.executable, "-c", _CONVERT, out]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for part in blob:
            child.stdin.write(part)
        child.stdin.close()
        entries, size, peak = map(int, child.stdout.read().split())
    assert child.returncode == 0
    return entries, size, peak


def large(files: int, compress: Callable[[bytes], bytes]) -> Iterator[bytes]:
    """A layer with files of a GiB, in parts compressed one by one: half zeros, half what compresses by a fifth."""
    text = bytes(itertools.islice(itertools.cycle(range(251)), 1000)) * 67109
    parts = [compress(bytes(_PART)), compress(text[:_PART])]
    for number in range(files):
        yield compress(tars.header(f"file{number}", size=_FILE))
        for part in range(_FILE // _PART):
            yield parts[part % 2]
    yield compress(tars.END)


def check_large(files: int, compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Convert a layer of GiBs and look at the memory; the file is removed at once."""
    free = shutil.disk_usage(tmp_path).free
    if free < (files + 1) * _FILE:
        capabilities.unavailable(f"{files + 1} GiB of disk: {tmp_path} has {free >> 30}")
    try:
        entries, size, peak = peak_of(large(files, compress), tmp_path / "layer")
    finally:
        (tmp_path / "layer").unlink(missing_ok=True)
    assert (entries, size) == (files, files * (_FILE + tars.BLOCK) + len(tars.END))
    print(f"{size >> 30} GiB: {peak / MIB:.1f} MiB")
    assert peak <= LIMIT


def gzip_fast(data: bytes) -> bytes:
    """A gzip member."""
    return gzip.compress(data, 1, mtime=0)


def zstd_fast(data: bytes) -> bytes:
    """A zstd frame with a window of 8 MiB, as level 19 has it: what a frame needs is the reader's to hold."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=23)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(data)


@pytest.mark.parametrize("compress", [gzip_fast, zstd_fast])
def test_the_bytes_of_a_layer_cost_no_memory(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    check_large(1, compress, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_gib_cost_no_memory(tmp_path: Path) -> None:
    check_large(10, gzip_fast, tmp_path)


def small_files(count: int) -> Iterator[bytes]:
    """A plain tar of files with a block of data each, a thousand in a directory.

    Sizes and times differ, as real ones do, and names are longer than nine tenths of those of a Debian with numpy: each
    byte of a name costs about three in memory.
    """
    data = bytes(tars.BLOCK)
    template = bytearray(
        tars.file("directory0000/test_module_of_package_0000000.py", mtime=1_700_000_000)[: tars.BLOCK]
    )
    changing = (slice(9, 13), slice(37, 44), slice(124, 135), slice(136, 147))
    for field in changing:
        template[field] = bytes(field.stop - field.start)
    blank = sum(template[:148]) + sum(template[156:]) + 8 * 32
    for first in range(0, count, 1000):
        yield tars.directory(f"directory{first // 1000:04}/", mtime=1_700_000_000)
        part = bytearray()
        for number in range(first, first + 1000):
            digits = b"%04d%07d%011o%011o" % (first // 1000, number, 257 + number % 256, 1_600_000_000 + number)
            at = 0
            for field in changing:
                template[field] = digits[at : (at := at + field.stop - field.start)]
            template[148:156] = b"%06o\0 " % (blank + sum(digits))
            part += template
            part += data
        yield bytes(part)
    yield tars.END


def check_entries(count: int, tmp_path: Path) -> None:
    """Convert that many files and look at the memory."""
    entries, _, peak = peak_of(small_files(count), tmp_path / "layer")
    assert entries == count + count // 1000
    print(f"{entries} entries: {peak / MIB:.1f} MiB")
    assert peak <= LIMIT + PER_ENTRY * entries


def test_a_hundred_thousand_entries(tmp_path: Path) -> None:
    check_entries(100_000, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_million_entries(tmp_path: Path) -> None:
    check_entries(1_000_000, tmp_path)

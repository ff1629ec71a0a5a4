"""Reads one file and tells what it got: a program of its own, as a job on a mounted root is.

    python readprogram.py MODE FILE SEED

A line per piece: offset, length and sha256. It ends with exit code 5 at the first I/O error, or by SIGBUS where a mapped
page cannot be had. `whole`: from begin to end; `random`: 64 preads anywhere; `mapped`: all pages through mmap in random
order, and again, each time from below the page cache, until the standard input is at its end.
"""

import errno
import hashlib
import mmap
import os
import random
import select
import sys

PIECE = 1 << 16
PREADS = 64
IO_ERROR_STATUS = 5


def tell(offset: int, data: bytes) -> None:
    """One line."""
    print(offset, len(data), hashlib.sha256(data).hexdigest(), flush=True)


def whole(fd: int, _: random.Random) -> None:
    """Every piece, in order."""
    offset = 0
    while data := os.read(fd, PIECE):
        tell(offset, data)
        offset += len(data)


def anywhere(fd: int, rng: random.Random) -> None:
    """Pieces of any length."""
    size = os.fstat(fd).st_size
    for _ in range(PREADS):
        offset = rng.randrange(size)
        tell(offset, os.pread(fd, rng.randint(1, 2 * PIECE), offset))


def mapped(fd: int, rng: random.Random) -> None:
    """Every piece, again and again."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
        while True:
            for offset in rng.sample(range(0, size, PIECE), -(-size // PIECE)):
                tell(offset, memory[offset : offset + PIECE])
            memory.madvise(mmap.MADV_DONTNEED)
            os.posix_fadvise(fd, 0, size, os.POSIX_FADV_DONTNEED)
            if select.select([0], [], [], 0)[0]:
                return


def main() -> None:
    """See the module."""
    mode, path, seed = sys.argv[1:]
    fd = os.open(path, os.O_RDONLY)
    rng = random.Random(seed)  # noqa: S311 - not for secrets
    try:
        {"whole": whole, "random": anywhere, "mapped": mapped}[mode](fd, rng)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        sys.exit(IO_ERROR_STATUS)


if __name__ == "__main__":
    main()

"""What is in a layer: counts and the largest files, from its index."""

import heapq
import stat
from dataclasses import dataclass

from afs.layerstore.afslyr import xattrs
from afs.layerstore.afslyr.index import Found, IndexReader

LARGEST = 10


@dataclass(slots=True)
class Counts:
    """How many names there are of each kind, the root included; every name counts once.

    ``files`` to ``whiteouts`` add up to ``entries``. ``hard_links`` are further names of inodes that were counted already.
    """

    entries: int = 0
    files: int = 0
    directories: int = 0
    symlinks: int = 0
    hard_links: int = 0
    devices: int = 0
    fifos: int = 0
    whiteouts: int = 0
    opaque_directories: int = 0
    inodes: int = 0
    inodes_with_xattrs: int = 0


@dataclass(frozen=True, slots=True)
class Contents:
    """Counts, and (path, bytes) of the largest regular files, the largest first."""

    counts: Counts
    largest: tuple[tuple[bytes, int], ...]


def contents(index: IndexReader) -> Contents:
    """Go through all of *index*. Raises CorruptLayer for one that nobody should mount."""
    counts = Counts()
    heap: list[tuple[int, int, Found]] = []  # by size; of equal ones the first stays
    for found in index.walk():
        _count(counts, found)
        if found.first and stat.S_ISREG(found.inode.mode):
            item = found.inode.size, -counts.entries, found
            if len(heap) < LARGEST:
                heapq.heappush(heap, item)
            else:
                heapq.heappushpop(heap, item)
    largest = tuple((found.place.path, size) for size, _, found in sorted(heap, reverse=True))
    return Contents(counts, largest)


def _count(counts: Counts, found: Found) -> None:
    inode = found.inode
    counts.entries += 1
    if not found.first:
        counts.hard_links += 1
        return
    counts.inodes += 1
    counts.inodes_with_xattrs += bool(inode.xattrs)
    match stat.S_IFMT(inode.mode):
        case stat.S_IFREG:
            counts.files += 1
        case stat.S_IFDIR:
            counts.directories += 1
            counts.opaque_directories += inode.xattrs.get(xattrs.OPAQUE) == b"y"
        case stat.S_IFLNK:
            counts.symlinks += 1
        case stat.S_IFIFO:
            counts.fifos += 1
        case stat.S_IFCHR if not inode.rdev:
            counts.whiteouts += 1
        case _:
            counts.devices += 1

"""How large a layer may be. A hostile one must not take a node's disk, memory or time."""

from dataclasses import dataclass

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Going beyond one raises LayerLimit. Sizes in bytes.

    ``max_entries`` bounds the tar's entries, and the names that they make, implied parents and replaced ones among them;
    ``max_depth`` the directories above an entry; ``max_extras_bytes`` the expanded sparse files; ``max_metadata_bytes`` the
    index, which is held in memory; all in all that is 300 bytes per file with a name of 20 bytes, 1400 per directory, for that
    has a block of its own; ``max_extents`` the pieces of all sparse files; ``max_headers`` the headers of the tar, extended ones
    among them, and the records in those; ``max_path_steps`` the components gone through to find parents and hard links, which
    symlinks can make tens of thousands per entry.
    """

    max_tar_bytes: int = 64 << 30
    max_entries: int = 4_000_000
    max_depth: int = 1024
    max_extras_bytes: int = 16 << 30
    max_metadata_bytes: int = 1024 * _MIB
    max_extents: int = 1_000_000
    max_headers: int = 40_000_000
    max_path_steps: int = 200_000_000


DEFAULT_LIMITS = Limits()

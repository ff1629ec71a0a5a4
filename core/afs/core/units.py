"""Sizes and durations as people write them."""

import re

from afs.core.errors import InvalidArgument

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b?)", re.IGNORECASE)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_duration(text: str) -> float:
    """``30s``, ``1m30s``, ``250ms``, ``2h`` or a plain number of seconds, as seconds; InvalidArgument otherwise."""
    rest, total = text.strip(), 0.0
    if not rest:
        raise InvalidArgument("a duration is empty")
    while rest:
        match = _DURATION.match(rest)
        if match is None or (match[2] is None and match[0] != text.strip()):
            raise InvalidArgument(f"not a duration: {text!r}; write it like 30s, 1m30s or 250ms")
        total += float(match[1]) * _SECONDS[match[2] or "s"]
        rest = rest[match.end() :]
    return total


def parse_size(text: str) -> int:
    """``10GiB``, ``512M``, ``4096``, as bytes. All suffixes are powers of 1024, as du and runc read them."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"not a size: {text!r}; write it like 512M or 10GiB")
    return int(float(match[1]) * 1024 ** _POWER[match[2].lower()])


def format_size(count: float) -> str:
    """*count* bytes for people: ``0 B``, ``12.3 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"

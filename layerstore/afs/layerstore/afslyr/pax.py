"""PAX extended headers: POSIX pax(1), "pax Extended Header", and the vendor keys that layers really carry."""

import base64
import re
from urllib.parse import unquote_to_bytes

Records = list[tuple[bytes, bytes]]

_TIME = re.compile(rb"(-?)(\d{1,20})(?:\.(\d*))?")
_NANO = 1_000_000_000
_SCHILY = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."


def parse_records(data: bytes) -> Records:
    """The records ``LENGTH KEY=VALUE\\n`` of one extended header, in order. ValueError if they are malformed."""
    records: Records = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 12)
        digits = data[at:space] if space > at else b""
        if not digits.isdigit():
            raise ValueError("PAX record without a length")
        end = at + int(digits)
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end > len(data) or end <= space + 1 or data[end - 1 : end] != b"\n" or not equals or not key:
            raise ValueError("malformed PAX record")
        records.append((key, value))
        at = end
    return records


def time_ns(value: bytes) -> int:
    """A PAX time (decimal seconds, perhaps negative or fractional) in nanoseconds, rounded down. ValueError otherwise."""
    match = _TIME.fullmatch(value)
    if match is None:
        raise ValueError(f"not a time: {value[:40]!r}")
    fraction = match[3] or b""
    total = int(match[2]) * _NANO + int(fraction[:9].ljust(9, b"0"))
    if not match[1]:
        return total
    return -total - bool(fraction[9:].strip(b"0"))


def integer(value: bytes) -> int:
    """A decimal number of at most 20 digits. ValueError otherwise."""
    if not value.isdigit() or len(value) > 20:
        raise ValueError(f"not a number: {value[:40]!r}")
    return int(value)


def xattrs(records: dict[bytes, bytes]) -> dict[bytes, bytes] | None:
    """The extended attributes among *records*, or None.

    star's and GNU tar's ``SCHILY.xattr.NAME`` holds raw bytes, libarchive's ``LIBARCHIVE.xattr.NAME`` a URL-encoded name
    and base64; the raw one counts where both stand. ValueError for bad base64 and for NULs in a name.
    """
    found: dict[bytes, bytes] = {}
    for key, value in records.items():
        if key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            name = unquote_to_bytes(key[len(_LIBARCHIVE) :])
            if _SCHILY + name not in records:
                # libarchive leaves out the padding
                found[name] = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    if any(b"\0" in name or not name for name in found):
        raise ValueError("bad name of an extended attribute")
    return found or None

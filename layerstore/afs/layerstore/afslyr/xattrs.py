"""Extended attributes in EROFS inodes (kernel fs/erofs/erofs_fs.h, "erofs_xattr_entry"): inline, none shared."""

import struct

OPAQUE = b"trusted.overlay.opaque"

_INDEXES = (
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)
# POSIX ACLs have an index each and an empty name.
_WHOLE = {b"system.posix_acl_access": 2, b"system.posix_acl_default": 3}
# overlayfs steers itself by these: a layer that set them could redirect lookups or hide files of other layers.
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")

_PREFIXES = {index: name for name, index in (*_INDEXES, *_WHOLE.items())}

_ENTRY = struct.Struct("<BBH")
_BODY_HEADER = bytes(12)  # name filter 0, shared count 0, reserved
_MAX_NAME, _MAX_VALUE = 255, 65535
_MAX_BODY = 4 * 65000  # the kernel counts the body in words of 4 bytes and 16 bits; some room for the opaque mark


def _split(name: bytes) -> tuple[int, bytes] | None:
    """Prefix index and the rest of *name*, or None if EROFS has no index for it."""
    if name in _WHOLE:
        return _WHOLE[name], b""
    for prefix, index in _INDEXES:
        if name.startswith(prefix):
            return index, name[len(prefix) :]
    return None


def body_of(found: dict[bytes, bytes]) -> bytes:
    """The body, as :func:`encode` makes it, of those of *found* that a layer keeps.

    It keeps none of overlayfs's own, and none without an EROFS prefix.

    ValueError for what EROFS cannot hold: names over 255 bytes behind the prefix or empty, values over 65535 bytes, more
    than 260,000 bytes on one inode.
    """
    result: dict[bytes, bytes] = {}
    for name, value in found.items():
        split = _split(name)
        if split is None or name.startswith(_OVERLAY):
            continue
        if len(split[1]) > _MAX_NAME or not (split[1] or name in _WHOLE):
            raise ValueError(f"extended attribute name of {len(split[1])} bytes")
        if len(value) > _MAX_VALUE:
            raise ValueError(f"extended attribute value of {len(value)} bytes, at most {_MAX_VALUE} possible")
        result[name] = value
    body = encode(result)
    if len(body) > _MAX_BODY:
        raise ValueError(f"more than {_MAX_BODY} bytes of extended attributes")
    return body


def encode(attributes: dict[bytes, bytes]) -> bytes:
    """The inline xattr body of an inode, sorted by name; empty without attributes. Length a multiple of 4 bytes."""
    if not attributes:
        return b""
    body = bytearray(_BODY_HEADER)
    for name in sorted(attributes):
        split = _split(name)
        if split is None:
            continue
        index, rest = split
        value = attributes[name]
        body += _ENTRY.pack(len(rest), index, len(value)) + rest + value
        body += bytes(-len(body) % 4)
    return bytes(body)


def decode(body: bytes) -> dict[bytes, bytes]:
    """The attributes in the inline xattr *body* of an inode; ValueError unless :func:`encode` could have made it."""
    if body[: len(_BODY_HEADER)] != _BODY_HEADER:
        raise ValueError("extended attributes with a header that is not zero")
    found: dict[bytes, bytes] = {}
    at = len(_BODY_HEADER)
    while at < len(body):
        name_size, index, value_size = _ENTRY.unpack_from(body, at)  # the body is a multiple of 4 bytes
        at += _ENTRY.size
        prefix = _PREFIXES.get(index)
        end = at + name_size + value_size
        if prefix is None or end > len(body) or bool(name_size) == (prefix in _WHOLE):
            raise ValueError(f"extended attribute of type {index} with {name_size} and {value_size} bytes")
        found[prefix + body[at : at + name_size]] = body[at + name_size : end]
        at = end + -end % 4
    if encode(found) != body:
        raise ValueError("extended attributes out of order")
    return found


def count_field(body: bytes) -> int:
    """``i_xattr_icount`` of an inode with this *body*."""
    return (len(body) - len(_BODY_HEADER)) // 4 + 1 if body else 0

"""sha256 digests as OCI writes them, and containerd's chain ids."""

import hashlib
import re
from collections.abc import Iterable

from afs.core.errors import InvalidArgument

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def check_digest(text: str) -> str:
    """Return *text* if it is ``sha256:`` and 64 lower-case hex digits, else raise InvalidArgument.

    Digests become file names, so everything that comes from a manifest, a peer or a user passes here first.
    """
    if not _DIGEST.fullmatch(text):
        raise InvalidArgument(f"not a sha256 digest: {text!r}")
    return text


def is_digest(text: str) -> bool:
    """Whether *text* is a well-formed sha256 digest."""
    return _DIGEST.fullmatch(text) is not None


def sha256_digest(data: bytes) -> str:
    """The digest of *data*, with its ``sha256:`` prefix."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def hex_of(digest: str) -> str:
    """The 64 hex digits of a checked digest."""
    return check_digest(digest).removeprefix("sha256:")


def chained(parent: str, diff_id: str) -> str:
    """The chain id of a layer on the one with chain id *parent*, "" for none (OCI image spec, config.md, "Layer ChainID")."""
    return sha256_digest(f"{parent} {check_digest(diff_id)}".encode()) if parent else check_digest(diff_id)


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The chain id of every layer, bottom first."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append(chained(chain[-1] if chain else "", diff_id))
    return chain

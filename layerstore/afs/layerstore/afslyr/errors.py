"""What can be wrong with a layer."""

from afs.core.errors import DataLoss, ResourceExhausted


def printable(name: bytes) -> str:
    """A file name from a tar for people: UTF-8 where it is, escapes where it is not, at most about 200 characters."""
    text = name.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:201])
    return text if len(text) <= 200 else text[:200] + "..."


class CorruptLayer(DataLoss):
    """A blob, a tar or an ``.afslyr`` file is not what its digest or its format says.

    ``layer`` is a file name or diff_id, ``entry`` the tar entry and ``chunk`` the chunk index, where they are known.
    """

    def __init__(
        self, reason: str, *, layer: str | None = None, entry: bytes | None = None, chunk: int | None = None
    ) -> None:
        self.reason, self.layer, self.entry, self.chunk = reason, layer, entry, chunk
        parts = ["corrupt layer" if layer is None else f"corrupt layer {layer}"]
        if chunk is not None:
            parts.append(f"chunk {chunk}")
        if entry is not None:
            parts.append(f'entry "{printable(entry)}"')
        super().__init__(": ".join([*parts, reason]))


class DigestMismatch(CorruptLayer):
    """Bytes were read whole, yet their digest (``actual``) is not the one that was asked for (``expected``)."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        self.expected, self.actual = expected, actual
        super().__init__(f"{what} is {actual}, expected {expected}")


class LayerLimit(ResourceExhausted):
    """A layer is larger than the configuration allows; ``what`` says in which respect, ``limit`` is the number."""

    def __init__(self, what: str, limit: int, unit: str = "") -> None:
        self.what, self.limit = what, limit
        super().__init__(f"layer has more than {limit}{' ' if unit else ''}{unit} of {what}, the configured limit")

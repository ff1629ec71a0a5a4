"""Layer files that are whole by their own table, and lie."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from afs.layerstore.afslyr import layout as lay
from afs.layerstore.afslyr import reader

if TYPE_CHECKING:
    from pathlib import Path


class Forged:
    """A layer file whose bytes can be changed so that table and footer match again: what a lying peer would send."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.layout = reader.layout_from_bytes(bytes(self.data), len(self.data))

    def seal(self) -> int:
        """Make the table right, write the file and open it."""
        layout = self.layout
        table = b"".join(
            hashlib.sha256(self.data[at : min(at + lay.CHUNK_SIZE, layout.erofs_end)]).digest()
            for at in range(0, layout.erofs_end, lay.CHUNK_SIZE)
        )
        root = hashlib.sha256(table).digest()
        self.path.write_bytes(self.data[: layout.erofs_end] + table + lay.pack_footer(layout, root))
        return os.open(self.path, os.O_RDONLY)

"""What is known of snapshots, in SQLite: names, parents, labels, times, and which layer mounts are in use.

A method is a transaction, and durable when it returns: containerd makes its own record durable as soon as it is answered,
and a snapshot that it knows and we do not makes every pull of the image fail from then on. So WAL with synchronous=FULL:
one fsync(2) for a change. Methods block; one thread calls them all.

Names, keys and labels are the client's; nothing of them becomes the name of a file. A snapshot's files are in a directory
with the number of its row, which no later row gets. (A transaction that fails gives its number back.)

If the disk is full nothing can be written, so nothing removed, so nothing freed. A file beside the database keeps some room,
which :meth:`Metadata.remove` gives up in that case.
"""

import contextlib
import enum
import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from afs.core.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from afs.snapshotter.snapshots.clusterlayer import ClusterLayer

log = logging.getLogger(__name__)
_VERSION = 1
_RESERVE = 1 << 20  # bytes
_SCHEMA = f"""
BEGIN;
CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    parent INTEGER REFERENCES snapshots (id),
    kind INTEGER NOT NULL,
    created INTEGER NOT NULL, -- nanoseconds since 1970
    updated INTEGER NOT NULL,
    labels TEXT NOT NULL, -- a JSON object
    layer TEXT, -- JSON, see ClusterLayer; NULL: the snapshot has a directory
    size INTEGER, -- bytes and inodes of a committed directory; NULL: not yet counted
    inodes INTEGER
) STRICT;
CREATE INDEX children ON snapshots (parent);
CREATE TABLE layer_mounts ( -- that an active snapshot or view needs
    snapshot INTEGER NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    diff_id TEXT NOT NULL,
    path TEXT NOT NULL,
    boot TEXT NOT NULL -- id of the boot that they were made in
) STRICT;
CREATE INDEX layer_mounts_of ON layer_mounts (snapshot);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_COLUMNS = "s.id, s.name, COALESCE(p.name, ''), s.kind, s.created, s.updated, s.labels, s.layer, s.size, s.inodes"
_FROM = "FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent"
_ERRORS = {
    sqlite3.SQLITE_CORRUPT: DataLoss,
    sqlite3.SQLITE_NOTADB: DataLoss,
    sqlite3.SQLITE_FULL: ResourceExhausted,
}
_Row = tuple[int, str, str, int, int, int, str, str | None, int | None, int | None]


class Kind(enum.IntEnum):
    """As in the API."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A row; *parent* is a name, "" for none. Times in nanoseconds since 1970; *size* in bytes, None if not counted."""

    id: int
    name: str
    parent: str
    kind: Kind
    created: int
    updated: int
    labels: Mapping[str, str]
    layer: ClusterLayer | None
    size: int | None
    inodes: int | None


@dataclass(frozen=True, slots=True)
class LayerMount:
    """A layer mount that a snapshot needs."""

    diff_id: str
    path: str


def _snapshot(row: _Row) -> Snapshot:
    id_, name, parent, kind, created, updated, labels, layer, size, inodes = row
    found = None if layer is None else ClusterLayer.from_json(layer)
    return Snapshot(id_, name, parent, Kind(kind), created, updated, json.loads(labels), found, size, inodes)


class Metadata:
    """The database *file*, made if it is not there. DataLoss if it is damaged, FailedPrecondition if it is of a later version."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._reserve = file.with_name(f"{file.name}-reserve")
        with self.errors():
            self._db = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            try:
                self._open()
            except BaseException:
                self._db.close()
                raise

    def _open(self) -> None:
        # One process has it, so it needs no index of the log that processes share: that file needs room on the disk at each start.
        self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > _VERSION:
            raise FailedPrecondition(f"{self._file} is of version {version}, of a later afs_snapshotter than this one")
        if version == 0:
            self._db.executescript(_SCHEMA)
        (found,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise DataLoss(f"{self._file} is damaged: {found}")
        self.keep_reserve()

    def keep_reserve(self) -> None:
        """Take the room for removals, if it is to be had."""
        try:
            with self._reserve.open("ab") as file:
                os.posix_fallocate(file.fileno(), 0, _RESERVE)
        except OSError as error:
            log.warning("no reserve for removals on a full disk: %s", error)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Around all that is done with it: what SQLite reports becomes DataLoss, ResourceExhausted or Internal."""
        try:
            yield
        except sqlite3.Error as error:
            kind = _ERRORS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, Internal)
            raise kind(f"{self._file}: {error}") from error

    def close(self) -> None:
        """Write the log into the database and close it."""
        self._db.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield self._db
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk ends it
                self._db.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _relaxed(self) -> Iterator[None]:
        """What is written in the block may be gone after a crash of the machine."""
        self._db.execute("PRAGMA synchronous = NORMAL")
        try:
            yield
        finally:
            self._db.execute("PRAGMA synchronous = FULL")

    # Looking

    def stat(self, name: str) -> Snapshot:
        """The snapshot of that name; NotFound."""
        row = self._db.execute(f"SELECT {_COLUMNS} {_FROM} WHERE s.name = ?", (name,)).fetchone()
        if row is None:
            raise NotFound(f"snapshot {name} does not exist")
        return _snapshot(row)

    def snapshots(self, reference: tuple[str, str] | None = None) -> list[Snapshot]:
        """All of them, or those that have a label *reference* with that value, the oldest first."""
        where, values = "", cast("tuple[str, ...]", ())
        if reference is not None:
            where = (
                "WHERE s.id IN (SELECT s2.id FROM snapshots s2, json_each(s2.labels) l WHERE l.key = ? AND l.value = ?)"
            )
            values = reference
        return [_snapshot(row) for row in self._db.execute(f"SELECT {_COLUMNS} {_FROM} {where} ORDER BY s.id", values)]

    def chain(self, name: str) -> list[Snapshot]:
        """The snapshot of that name and all below it, topmost first; NotFound."""
        found = [self.stat(name)]
        while found[-1].parent:
            found.append(self.stat(found[-1].parent))
        return found

    def ids(self) -> set[int]:
        """Of all snapshots."""
        return {id_ for (id_,) in self._db.execute("SELECT id FROM snapshots")}

    # Changing

    def create(
        self,
        kind: Kind,
        name: str,
        parent: str,
        labels: Mapping[str, str],
        *,
        parent_id: int | None = None,
        layer: ClusterLayer | None = None,
        make: Callable[[int], None] = lambda _: None,
        mounts: Sequence[LayerMount] = (),
        boot: str = "",
    ) -> Snapshot:
        """A new snapshot, AlreadyExists if *name* is taken, on *parent* ("" for none), which has to be a committed one.

        NotFound if the parent does not have the number *parent_id*, if that is given: what is below a number never changes.
        *make* makes the files of the number that it gets; before the transaction is committed, so that there is no row
        without files: fsync(2) of the log writes what is before it in the file system's journal, too, on ext4 and xfs. *mounts*
        as for :meth:`add_mounts`.
        """
        now = time.time_ns()
        with self._transaction() as db:
            above = self._parent(parent)
            if parent_id is not None and above != parent_id:
                raise NotFound(f"parent {parent} is another snapshot now")
            try:
                cursor = db.execute(
                    "INSERT INTO snapshots (name, parent, kind, created, updated, labels, layer) VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (name, above, kind, now, now, json.dumps(dict(labels)), layer and layer.to_json()),
                )
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"snapshot {name} exists already") from None
            id_ = cursor.lastrowid
            assert id_ is not None
            self._insert_mounts(id_, mounts, boot)
            make(id_)
        return Snapshot(id_, name, parent, kind, now, now, dict(labels), layer, None, None)

    def _parent(self, name: str) -> int | None:
        if not name:
            return None
        parent = self.stat(name)
        if parent.kind is not Kind.COMMITTED:
            raise InvalidArgument(f"parent {name} is not a committed snapshot")
        return parent.id

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> Snapshot:
        """Turn the active snapshot *key* into the committed one *name*; its labels and times are new, its mounts gone.

        *parent*, if given, is that of a snapshot that was made without one.
        """
        now = time.time_ns()
        with self._transaction() as db:
            active = self.stat(key)
            if active.kind is not Kind.ACTIVE:
                raise FailedPrecondition(f"snapshot {key} is not active")
            if parent and parent != active.parent:
                self._reparent(active, parent)
            try:
                db.execute(
                    "UPDATE snapshots SET name = ?, kind = ?, created = ?, updated = ?, labels = ? WHERE id = ?",
                    (name, Kind.COMMITTED, now, now, json.dumps(dict(labels)), active.id),
                )
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"snapshot {name} exists already") from None
            db.execute("DELETE FROM layer_mounts WHERE snapshot = ?", (active.id,))
        return Snapshot(
            active.id, name, parent or active.parent, Kind.COMMITTED, now, now, dict(labels), None, None, None
        )

    def _reparent(self, active: Snapshot, parent: str) -> None:
        if active.parent:
            raise InvalidArgument(f"snapshot {active.name} has the parent {active.parent}, which cannot be changed")
        found = self.stat(parent)
        if found.kind is not Kind.COMMITTED:
            raise FailedPrecondition(f"parent {parent} is not a committed snapshot")
        self._db.execute("UPDATE snapshots SET parent = ? WHERE id = ?", (found.id, active.id))

    def remove(self, name: str) -> Snapshot:
        """Forget a snapshot; FailedPrecondition if others are on it. What was removed."""
        try:
            return self._remove(name)
        except sqlite3.OperationalError:
            if not self._reserve.exists():
                raise
            self._reserve.unlink()
            return self._remove(name)

    def _remove(self, name: str) -> Snapshot:
        with self._transaction() as db:
            found = self.stat(name)
            if db.execute("SELECT 1 FROM snapshots WHERE parent = ?", (found.id,)).fetchone():
                # Clients look for "remove" in this message.
                raise FailedPrecondition(f"cannot remove snapshot {name}: it has children")
            db.execute("DELETE FROM snapshots WHERE id = ?", (found.id,))
        return found

    def set_labels(self, name: str, change: Callable[[Mapping[str, str]], Mapping[str, str]]) -> Snapshot:
        """Give the snapshot the labels that *change* makes of those it has; its time of change is now."""
        with self._transaction() as db:
            found = self.stat(name)
            labels = json.dumps(dict(change(found.labels)))
            db.execute("UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", (labels, time.time_ns(), found.id))
        return self.stat(name)

    def set_layer(self, name: str, labels: Mapping[str, str], layer: ClusterLayer) -> None:
        """Replace what is known of a layer of the cluster."""
        with self._transaction() as db:
            db.execute(
                "UPDATE snapshots SET labels = ?, layer = ?, updated = ? WHERE name = ? AND layer IS NOT NULL",
                (json.dumps(dict(labels)), layer.to_json(), time.time_ns(), name),
            )

    def set_usage(self, id_: int, size: int, inodes: int) -> None:
        """What a committed snapshot's directory takes. Not durable at once: it can be counted again."""
        with self._relaxed(), self._transaction() as db:
            db.execute("UPDATE snapshots SET size = ?, inodes = ? WHERE id = ?", (size, inodes, id_))

    # Layer mounts

    def add_mounts(self, name: str, id_: int, mounts: Sequence[LayerMount], boot: str) -> None:
        """Remember what the snapshot needs besides what it has; NotFound if it is gone."""
        with self._transaction():
            if self.stat(name).id != id_:
                raise NotFound(f"snapshot {name} is another one now")
            self._insert_mounts(id_, mounts, boot)

    def _insert_mounts(self, id_: int, mounts: Iterable[LayerMount], boot: str) -> None:
        self._db.executemany(
            "INSERT INTO layer_mounts VALUES (?, ?, ?, ?)", [(id_, one.diff_id, one.path, boot) for one in mounts]
        )

    def set_mounts(self, id_: int, mounts: Sequence[LayerMount], boot: str) -> None:
        """A snapshot needs these and no others. Not durable at once, as above."""
        with self._relaxed(), self._transaction() as db:
            db.execute("DELETE FROM layer_mounts WHERE snapshot = ?", (id_,))
            self._insert_mounts(id_, mounts, boot)

    def mounts(self, boot: str) -> dict[int, list[LayerMount]]:
        """What snapshots need, oldest first, by number; what earlier boots had is forgotten."""
        with self._transaction() as db:
            db.execute("DELETE FROM layer_mounts WHERE boot <> ?", (boot,))
            rows = db.execute("SELECT snapshot, diff_id, path FROM layer_mounts ORDER BY rowid").fetchall()
        found: dict[int, list[LayerMount]] = {}
        for id_, diff_id, path in rows:
            found.setdefault(id_, []).append(LayerMount(diff_id, path))
        return found

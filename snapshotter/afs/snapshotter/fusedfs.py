"""The file system of an ``afs_fused``: every layer as one file, and every layer's tree, read from its index.

======================  ==========================================================================================
``f/<hex>``             the layer as one read-only file, for an EROFS mount on top of it
``t/<hex>/...``         the layer's tree, as EROFS shows it
``u/<hex>/...``         the same, with ``trusted.overlay.*`` as ``user.overlay.*``, for overlays mounted with ``userxattr``
======================  ==========================================================================================

``<hex>`` is that of the diff_id. A layer is opened when its name is first looked up.

Inode numbers need no table: they are made of the layer's slot, the view, and the nid in its index. So a name of a hard link
leads to the same inode, and what the kernel remembers costs nothing here. Slots are never used twice, because the kernel
may ask about a number until it forgot it.

State, on one event loop: ``_layers`` has the layers by slot, ``_slots`` slots by diff_id, ``_files`` the open files by inode
number. A layer stays until the kernel has forgotten all inodes of it; its files are closed before, when nobody uses them.

Names and attributes may be kept for ever, for layers never change. That is also said of names that are not there.

Permissions are the kernel's business (``default_permissions``, and ACLs with ``enable_acl``): it has modes and owners, and
need not ask for every access. ``allow_other`` lets other users than root in, which containers run as. ``f``, ``t`` and ``u``
themselves are root's alone: others get at a tree where it is mounted.
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable
from typing import Any, TypeVar, cast

import pyfuse3
from typing_extensions import override

from afs.core.digests import is_digest
from afs.core.errors import DataLoss
from afs.layerstore.afslyr.errors import CorruptLayer
from afs.layerstore.afslyr.index import ROOT, Dirent, IndexReader, Inode
from afs.layerstore.afslyr.tree import MAX_NAME
from afs.layerstore.afslyr.xattrs import OPAQUE
from afs.layerstore.fillwire import FillClient, FillError
from afs.snapshotter.fusedlayer import ServedLayer

log = logging.getLogger(__name__)
OPTIONS = frozenset({"allow_other", "default_permissions", "subtype=afs", "ro"})
_FOREVER_S = 365 * 86400.0
_SLOT_BITS = 40
_VIEW_BITS = 38  # nids have 36 bits at most: 2 TiB of layer, 32 bytes each
_NID_MASK = (1 << _VIEW_BITS) - 1
_FILE, _TREE, _USER_TREE = 0, 1, 2  # views
_VIEWS = {b"f": _FILE, b"t": _TREE, b"u": _USER_TREE}
_FIRST_VIEW = pyfuse3.ROOT_INODE + 1  # the directory of view v is inode _FIRST_VIEW + v
_FAILURES = (FillError, OSError, ValueError, DataLoss)
_DOTS = (b".", b"..")
_BLOCK_SHIFT, _BLOCK_MASK = 8, 255  # an index block of 512 bytes has at most 39 entries
_OVERLAY = (b"trusted.overlay.", b"user.overlay.")
_USER_OPAQUE = b"user.overlay.opaque"
Handler = TypeVar("Handler", bound=Callable[..., Any])


def _answered(handler: Handler) -> Handler:
    """*handler*, whose first argument is an inode, with every exception an I/O error to the reader.

    pyfuse3's asyncio mode ends a task of the session at any other exception than FUSEError, without a word and without an
    answer to the kernel: the reader would hang for ever, even when it is killed.
    """

    @functools.wraps(handler)
    async def answered(self: "LayerFiles", inode: int, *args: Any) -> Any:
        self.pending += 1
        try:
            return await handler(self, inode, *args)
        except pyfuse3.FUSEError:
            raise
        except _FAILURES as error:
            self.layer(inode).complain(error)
            raise pyfuse3.FUSEError(errno.EIO) from error
        except Exception as error:
            log.exception("%s", handler)
            raise pyfuse3.FUSEError(errno.EIO) from error
        finally:
            self.pending -= 1

    return cast("Handler", answered)


class _OpenFile:
    """*size* bytes at *offset* of the layer file, opened *opens* times."""

    __slots__ = ("layer", "offset", "opens", "size")

    def __init__(self, layer: ServedLayer, offset: int, size: int) -> None:
        self.layer, self.offset, self.size, self.opens = layer, offset, size, 0


class LayerFiles(pyfuse3.Operations):
    """The file system; *client* asks the layerstore, *faults* is a directory with a byte per failed read of a layer."""

    enable_acl = True

    def __init__(self, client: FillClient, faults: str) -> None:
        super().__init__()
        self._client = client
        self._faults = faults
        self._layers: dict[int, ServedLayer] = {}
        self._slots: dict[str, int] = {}
        self._files: dict[int, _OpenFile] = {}
        self._last_slot = 0
        self.pending = 0  # requests that are being answered; they wait for somebody, or it would be none

    @property
    def layers(self) -> list[ServedLayer]:
        """Those that the kernel knows."""
        return list(self._layers.values())

    def layer(self, inode: int) -> ServedLayer:
        """The layer of an inode in it; FUSEError if the kernel asks about one that it forgot."""
        layer = self._layers.get(inode >> _SLOT_BITS)
        if layer is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return layer

    def release_layer(self, diff_id: str) -> None:
        """Nobody has the tree of a layer mounted any more."""
        slot = self._slots.get(diff_id)
        if slot is not None:
            self._layers[slot].release()

    # Names

    @override
    @_answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: Any) -> pyfuse3.EntryAttributes:
        if parent_inode >> _SLOT_BITS:
            layer = self.layer(parent_inode)
            index = layer.index or await layer.open_index()
            entry = index.find(index.inode(parent_inode & _NID_MASK), name)
            if entry is None:
                return _absent()
            attributes = _attributes(parent_inode & ~_NID_MASK, _inode_of(index, entry))
            layer.lookups += 1
            return attributes
        if name in _DOTS:
            return _top_attributes(parent_inode if name == b"." else pyfuse3.ROOT_INODE)
        if parent_inode == pyfuse3.ROOT_INODE:
            return _top_attributes(_FIRST_VIEW + _VIEWS[name]) if name in _VIEWS else _absent()
        return await self._look_up_layer(parent_inode - _FIRST_VIEW, name)

    async def _look_up_layer(self, view: int, name: bytes) -> pyfuse3.EntryAttributes:
        """What stands for a whole layer; opens it."""
        diff_id = "sha256:" + os.fsdecode(name)
        if not is_digest(diff_id):
            return _absent()
        layer = self._layers.get(self._slots.get(diff_id, 0))
        if layer is None:
            self._last_slot += 1
            layer = ServedLayer(diff_id, self._last_slot, self._client, self._faults)
            self._layers[layer.slot] = layer
            self._slots[diff_id] = layer.slot
        layer.lookups += 1  # at once, so that it stays while this waits
        try:
            base = layer.slot << _SLOT_BITS | view << _VIEW_BITS
            if view != _FILE:
                index = layer.index or await layer.open_index()
                return _attributes(base, index.inode(ROOT))
            await layer.open()
            return _file_attributes(base, layer.size)
        except _FAILURES as error:
            self._forgotten(layer, 1)
            log.warning("cannot open layer %s: %s", diff_id, error)
            number = getattr(error, "errno", None)
            raise pyfuse3.FUSEError(errno.ENOENT if number == errno.ENOENT else errno.EIO) from error
        except BaseException:
            self._forgotten(layer, 1)
            raise

    @override
    async def forget(self, inode_list: Any) -> None:
        for inode, count in inode_list:  # has no answer, so nothing may be raised
            layer = self._layers.get(inode >> _SLOT_BITS)
            if layer is not None:
                self._forgotten(layer, count)

    def _forgotten(self, layer: ServedLayer, count: int) -> None:
        layer.lookups -= count
        if layer.lookups <= 0:
            del self._layers[layer.slot], self._slots[layer.diff_id]
            layer.close()

    # Attributes

    @override
    @_answered
    async def getattr(self, inode: int, ctx: Any) -> pyfuse3.EntryAttributes:
        if not inode >> _SLOT_BITS:
            return _top_attributes(inode)
        layer = self.layer(inode)
        if _is_file(inode):
            return _file_attributes(inode, layer.size)
        index = layer.index or await layer.open_index()
        return _attributes(inode & ~_NID_MASK, index.inode(inode & _NID_MASK))

    @override
    @_answered
    async def readlink(self, inode: int, ctx: Any) -> bytes:
        layer = self.layer(inode)
        index = layer.index or await layer.open_index()
        return index.readlink(inode & _NID_MASK)

    @override
    @_answered
    async def getxattr(self, inode: int, name: bytes, ctx: Any) -> bytes:
        value = (await self._xattrs(inode)).get(name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    @override
    @_answered
    async def listxattr(self, inode: int, ctx: Any) -> list[bytes]:
        return list(await self._xattrs(inode))

    async def _xattrs(self, inode: int) -> dict[bytes, bytes]:
        """The attributes that are shown. Of overlayfs's own a right layer has the opaque mark alone, another one more."""
        if not inode >> _SLOT_BITS or _is_file(inode):
            return {}
        layer = self.layer(inode)
        index = layer.index or await layer.open_index()
        found = index.inode(inode & _NID_MASK).xattrs
        if not found:
            return found
        shown = {name: value for name, value in found.items() if not name.startswith(_OVERLAY)}
        if OPAQUE in found:
            shown[_USER_OPAQUE if inode >> _VIEW_BITS & 3 == _USER_TREE else OPAQUE] = found[OPAQUE]
        return shown

    @override
    async def statfs(self, ctx: Any) -> pyfuse3.StatvfsData:
        # Of the whole file system: pyfuse3 does not say which inode is meant. Overlayfs needs the longest name.
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = 4096
        data.f_namemax = MAX_NAME
        return data

    # Contents

    @override
    @_answered
    async def open(self, inode: int, flags: int, ctx: Any) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise pyfuse3.FUSEError(errno.EROFS)
        layer = self.layer(inode)
        layer.hold()
        try:
            await layer.open()
            file = self._files.get(inode) or await _open_file(layer, inode)
            file = self._files.setdefault(inode, file)  # another open may have been quicker
            file.opens += 1
        except BaseException:
            layer.drop()
            raise
        # Layers never change, so pages stay valid over close and reopen.
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @override
    @_answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        file = self._files[fh]
        count = min(size, file.size - off)
        return await file.layer.read(file.offset + off, count) if count > 0 else b""

    @override
    @_answered
    async def release(self, fh: int) -> None:
        file = self._files[fh]
        file.opens -= 1
        if not file.opens:
            del self._files[fh]
        file.layer.drop()

    @override
    @_answered
    async def opendir(self, inode: int, ctx: Any) -> int:
        return inode

    @override
    @_answered
    async def releasedir(self, fh: int) -> None:
        pass

    @override
    @_answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """Positions are a block of the directory and an entry in it, so any reader goes on anywhere at once."""
        if not fh >> _SLOT_BITS:
            return  # names of layers are known to those who mount them
        layer = self.layer(fh)
        index = layer.index or await layer.open_index()
        base = fh & ~_NID_MASK
        directory = index.inode(fh & _NID_MASK)
        number, skip = start_id >> _BLOCK_SHIFT, start_id & _BLOCK_MASK
        told = 0
        while entries := index.block(directory, number):
            for position, entry in enumerate(entries[skip:], skip + 1):
                dots = entry.name in _DOTS
                attributes = _stub_attributes(base, entry) if dots else _attributes(base, _inode_of(index, entry))
                if not pyfuse3.readdir_reply(token, entry.name, attributes, number << _BLOCK_SHIFT | position):
                    layer.lookups += told
                    return
                told += not dots
            number, skip = number + 1, 0
        layer.lookups += told  # only now: after an error the kernel is told of none


async def _open_file(layer: ServedLayer, inode: int) -> _OpenFile:
    if _is_file(inode):
        return _OpenFile(layer, 0, layer.size)
    index = layer.index or await layer.open_index()
    found = index.inode(inode & _NID_MASK)
    if not stat.S_ISREG(found.mode):
        raise CorruptLayer(f"inode {found.nid} of mode {found.mode:#o} is opened", layer=layer.diff_id)
    return _OpenFile(layer, found.offset, found.size)


def _is_file(inode: int) -> bool:
    return inode >> _VIEW_BITS & 3 == _FILE


def _inode_of(index: IndexReader, entry: Dirent) -> Inode:
    inode = index.inode(entry.nid)
    if stat.S_IFMT(inode.mode) != entry.kind:
        reason = f"inode {entry.nid} is not of the type that its name says"
        raise CorruptLayer(reason, layer=index.layout.diff_id, entry=entry.name)
    return inode


def _absent() -> pyfuse3.EntryAttributes:
    """The answer that there is no such name, which the kernel may keep."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = 0
    entry.entry_timeout = _FOREVER_S
    return entry


def _top_attributes(inode: int) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.entry_timeout = entry.attr_timeout = _FOREVER_S
    entry.st_mode = stat.S_IFDIR | 0o500
    entry.st_nlink = 2
    return entry


def _file_attributes(inode: int, size: int) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = inode
    entry.entry_timeout = entry.attr_timeout = _FOREVER_S
    entry.st_mode = stat.S_IFREG | 0o400
    entry.st_size = size
    entry.st_blocks = -(-size // 512)
    return entry


def _attributes(base: int, inode: Inode) -> pyfuse3.EntryAttributes:
    """*inode* in the tree whose root is inode number *base*. EROFS keeps one time, and shows it as all three."""
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = base | inode.nid
    entry.entry_timeout = entry.attr_timeout = _FOREVER_S
    entry.st_mode = inode.mode
    entry.st_nlink = inode.nlink
    entry.st_uid = inode.uid
    entry.st_gid = inode.gid
    entry.st_rdev = inode.rdev
    entry.st_size = inode.size
    entry.st_blocks = -(-inode.size // 512)
    entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = inode.mtime_ns
    return entry


def _stub_attributes(base: int, entry: Dirent) -> pyfuse3.EntryAttributes:
    """What the kernel needs of ``.`` and ``..``, which it does not remember: number and type."""
    stub = pyfuse3.EntryAttributes()
    stub.st_ino = base | entry.nid
    stub.st_mode = entry.kind
    return stub

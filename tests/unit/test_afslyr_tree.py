"""The tree that a sequence of entries leaves."""

import stat
from collections.abc import Callable

import pytest

from afs.layerstore.afslyr import xattrs
from afs.layerstore.afslyr.errors import CorruptLayer, LayerLimit
from afs.layerstore.afslyr.inodes import ROOT, Inodes
from afs.layerstore.afslyr.limits import Limits
from afs.layerstore.afslyr.tarheader import HARD_LINK, Entry
from afs.layerstore.afslyr.tree import build, encode_device, split_path

OPAQUE = {b"trusted.overlay.opaque": b"y"}


class Node:
    """One inode of *inodes*."""

    def __init__(self, inodes: Inodes, number: int) -> None:
        self._inodes, self.number = inodes, number
        self.mode, self.size, self.addr = inodes.mode[number], inodes.size[number], inodes.addr[number]
        body = inodes.xattrs.get(number)
        self.xattrs = xattrs.decode(body) if body is not None else None

    @property
    def children(self) -> "dict[bytes, Node]":
        """By name; of a file none."""
        found = self._inodes.children.get(self.number, {})
        return {name: Node(self._inodes, number) for name, number in found.items()}


def reg(name: str, size: int = 0) -> Entry:
    """A regular file."""
    return Entry(name.encode(), stat.S_IFREG, size=size)


def folder(name: str, mode: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name.encode(), stat.S_IFDIR, mode)


def sym(name: str, target: str) -> Entry:
    """A symlink."""
    return Entry(name.encode(), stat.S_IFLNK, link=target.encode())


def hard(name: str, target: str) -> Entry:
    """A hard link."""
    return Entry(name.encode(), HARD_LINK, link=target.encode())


def tree(*entries: Entry, limits: Limits | None = None) -> Node:
    """The root after *entries*."""
    return Node(build(entries, limits or Limits()).inodes, ROOT)


def names(node: Node, prefix: str = "") -> set[str]:
    """All paths below *node*."""
    found: set[str] = set()
    for name, child in node.children.items():
        path = prefix + name.decode()
        found |= {path} | names(child, path + "/")
    return found


def at(root: Node, path: str) -> Node:
    """The node at *path*."""
    node = root
    for part in path.split("/"):
        node = node.children[part.encode()]
    return node


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        (b"/a//b/./c/", [b"a", b"b", b"c"]),
        (b"../../etc", [b"etc"]),
        (b"a/../..//b", [b"b"]),
        (b"", []),
        (b"./", []),
        (b"/..", []),
        (b"...", [b"..."]),
    ],
)
def test_paths_are_cleaned_and_confined(path: bytes, parts: list[bytes]) -> None:
    assert split_path(path) == parts


@pytest.mark.parametrize("name", ["/x", "./x", "../x", "a/../x", "a/b/../../../x", "x", ".//x"])
def test_every_spelling_of_a_name_is_one_file(name: str) -> None:
    assert names(tree(reg(name))) == {"x"}


def test_parents_through_symlinks_stay_in_the_root() -> None:
    root = tree(folder("real"), sym("link", "../../real"), sym("abs", "/real/sub"), reg("link/a"), reg("abs/b"))
    assert names(root) == {"real", "link", "abs", "real/a", "real/sub", "real/sub/b"}


def test_a_replaced_symlink_is_followed_no_more() -> None:
    root = tree(folder("one"), folder("two"), sym("l", "one"), reg("l/a"), sym("l", "two"), reg("l/b"))
    assert names(root) == {"one", "two", "l", "one/a", "two/b"}


def test_a_symlink_loop_on_the_way_is_refused() -> None:
    with pytest.raises(CorruptLayer, match="too many symlinks"):
        tree(sym("a", "b"), sym("b", "a"), reg("a/x"))


def test_a_file_as_parent_is_refused() -> None:
    with pytest.raises(CorruptLayer, match="not a directory"):
        tree(reg("a"), reg("a/b"))


def test_a_repeated_directory_keeps_its_children_and_takes_attributes() -> None:
    root = tree(folder("d", 0o700), reg("d/x"), folder("d/", 0o711))
    assert names(root) == {"d", "d/x"}
    assert stat.S_IMODE(at(root, "d").mode) == 0o711


def test_a_file_replaces_a_directory_and_its_children() -> None:
    assert names(tree(reg("d/x"), reg("d"), folder("d"))) == {"d"}


@pytest.mark.parametrize(
    "entries",
    [
        [reg("d/.wh.x"), folder("d/x"), reg("d/x/y")],
        [folder("d/x"), reg("d/x/y"), reg("d/.wh.x")],
        [reg("d/x/y"), reg("d/.wh.x")],
        [reg("d/.wh.x"), reg("d/x"), folder("d/x"), reg("d/x/y")],
    ],
)
def test_a_directory_and_its_whiteout_make_an_opaque_directory(entries: list[Entry]) -> None:
    root = tree(*entries)
    assert names(root) == {"d", "d/x", "d/x/y"}
    assert at(root, "d/x").xattrs == OPAQUE


@pytest.mark.parametrize("order", [lambda x: x, reversed], ids=["before", "after"])
def test_a_real_file_wins_over_its_whiteout(order: Callable[[list[Entry]], list[Entry]]) -> None:
    root = tree(*order([reg(".wh.x"), reg("x", 5)]))
    assert at(root, "x").size == 5


def test_whiteouts_become_devices_and_opaque_marks() -> None:
    root = tree(reg(".wh.gone"), reg("d/.wh..wh..opq"), folder("d", 0o700), reg(".wh..wh..opq"), reg(".wh..wh.aufs"))
    assert names(root) == {"gone", "d"}
    assert (at(root, "gone").mode, at(root, "gone").addr) == (stat.S_IFCHR, 0)
    assert at(root, "d").xattrs == OPAQUE
    assert root.xattrs == OPAQUE


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh."])
def test_whiteouts_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(CorruptLayer, match="whiteout"):
        tree(reg(name))


def test_overlayfs_attributes_are_dropped() -> None:
    entry = folder("d")
    entry.xattrs = {b"trusted.overlay.redirect": b"/x", b"user.overlay.opaque": b"y", b"user.a": b"1", b"system.x": b""}
    assert at(tree(entry), "d").xattrs == {b"user.a": b"1"}


def test_hard_links_in_any_order_are_one_inode() -> None:
    root = tree(hard("c", "b"), hard("b", "a"), reg("a", 3), hard("d", "c"), hard("a", "a"))
    assert len({at(root, name).number for name in "abcd"}) == 1


def test_a_hard_link_keeps_what_was_replaced() -> None:
    root = tree(reg("a", 1), hard("b", "a"), reg("a", 2))
    assert (at(root, "a").size, at(root, "b").size) == (2, 1)


def test_a_replaced_early_hard_link_does_not_come_back() -> None:
    root = tree(hard("b", "a"), reg("b", 7), reg("a", 1))
    assert at(root, "b").size == 7


def test_a_long_chain_of_early_links_is_fast() -> None:
    count = 50_000
    root = tree(*(hard(f"n{number}", f"n{number + 1}") for number in range(count)), reg(f"n{count}"))
    assert at(root, "n0").number == at(root, f"n{count}").number


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([hard("b", "nowhere")], 'entry "b": target "nowhere" of the hard link is missing'),
        ([hard("a", "b"), hard("b", "a")], "is missing"),
        ([hard("a", "a")], "is missing"),
        ([folder("d"), hard("a", "d")], "is a directory"),
        ([hard("a", "d"), folder("d")], "is a directory"),
        ([hard("a", "/")], "is a directory"),
        ([hard("a", ".wh.x"), reg(".wh.x")], "is missing"),
    ],
)
def test_bad_hard_links_name_both_ends(entries: list[Entry], message: str) -> None:
    with pytest.raises(CorruptLayer, match=message):
        tree(*entries)


def odd(name: str = "x", kind: int = stat.S_IFREG, **fields: object) -> Entry:
    """An entry with odd fields."""
    return Entry(name.encode(), kind, **fields)  # type: ignore[arg-type]  # whatever the test wants


@pytest.mark.parametrize(
    "entry",
    [
        odd("n" * 256),
        odd("n" * 256 + "/x"),
        odd(".wh." + "n" * 256),
        odd(uid=-1),
        odd(gid=0xFFFFFFFF),
        odd(mtime_ns=1 << 100),
        odd(kind=stat.S_IFLNK),
        odd(kind=stat.S_IFLNK, link=b"t" * 4096),
        odd(kind=stat.S_IFCHR, devmajor=4096),
        odd(kind=stat.S_IFBLK, devminor=1 << 20),
        odd(xattrs={b"user." + b"n" * 256: b""}),
        odd(xattrs={b"user.": b""}),
        odd(xattrs={b"user.a": bytes(65536)}),
        odd(xattrs={b"user.%d" % number: bytes(65535) for number in range(4)}),
        odd("/"),
    ],
)
def test_what_erofs_cannot_hold_is_refused(entry: Entry) -> None:
    with pytest.raises(CorruptLayer):
        tree(entry)


@pytest.mark.parametrize(
    ("limits", "entries"),
    [
        (Limits(max_entries=3), [reg("a"), reg("b"), reg("c"), reg("d")]),
        (Limits(max_entries=3), [reg("a/b/c/d")]),
        (Limits(max_entries=3), [reg(".wh.a"), reg(".wh.b"), reg(".wh.c"), reg(".wh.d")]),
        (Limits(max_depth=3), [reg("a/b/c/d")]),
        (Limits(max_metadata_bytes=1000), [sym("a", "t" * 1000)]),
        (Limits(max_metadata_bytes=1000), [folder("a"), folder("b")]),
        (Limits(max_entries=2), [folder("a"), folder("a"), folder("a")]),
        (Limits(max_entries=2), [reg("a/.wh..wh..opq"), reg("a/.wh..wh..opq"), reg("a/.wh..wh..opq")]),
        (Limits(max_path_steps=1000), [folder("d"), sym("s", "d/" * 999), *[hard(f"h{n}", "s/x") for n in range(2)]]),
        (Limits(max_path_steps=1000), [sym("s", "./" * 400), *[reg("s/" + "/" * n + "x") for n in range(1, 5)]]),
        (Limits(max_path_steps=1000), [reg("./" * n + "f") for n in range(600, 602)]),
        (Limits(max_path_steps=1000), [folder("./" * 1100)]),
        (Limits(max_path_steps=1000), [reg("f"), hard("g", "./" * 1001 + "f")]),
        (Limits(max_metadata_bytes=1000), [odd(xattrs={b"user.a": bytes(1000)})]),
        (Limits(max_extents=1), [odd(size=9, sparse=((0, 1), (3, 1)))]),
    ],
)
def test_limits(limits: Limits, entries: list[Entry]) -> None:
    with pytest.raises(LayerLimit, match="limit"):
        tree(*entries, limits=limits)


def test_device_numbers_are_the_kernels() -> None:
    assert encode_device(1, 3) == 0x103
    assert encode_device(259, 70000) == (70000 & 0xFF) | 259 << 8 | (70000 & ~0xFF) << 12


def test_a_sparse_file_that_no_kernel_could_show_is_refused() -> None:
    entry = reg("x", 1 << 63)
    entry.sparse = ((0, 512),)
    with pytest.raises(CorruptLayer, match='"x": size is out of range'):
        tree(entry)


def test_odd_spellings_of_a_directory_are_not_remembered() -> None:
    """A name may have a megabyte, and a tar many of them."""
    builder = build([reg("d/" + "/" * number + "f") for number in range(5000, 5100)])
    assert sum(len(path) for path in builder._parents) < 5000


def test_equal_attributes_of_many_files_take_memory_once() -> None:
    labelled = [reg("a"), reg("b")]
    for entry in labelled:
        entry.xattrs = {b"security.selinux": bytes(1000)}
    builder = build(labelled)
    first, second = builder.inodes.xattrs.values()
    assert first is second


def test_a_bad_link_is_told_in_bounded_words() -> None:
    with pytest.raises(CorruptLayer) as caught:
        tree(hard("h", "\x1b[31m" + "x" * 100_000))
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)

"""Generated layers about what lies below them: whiteouts, opaque directories, directories without entries."""

from __future__ import annotations

from tests.testbed.tars import END, directory, file, root, symlink


def base() -> bytes:
    """What `whiteouts` works on."""
    out = [root()]
    for name in ("before", "after", "between", "alone", "deep", "deep/er", "both", "late", "gone-dir", "gone-dir/sub"):
        out += [directory(f"{name}/", 0o750, uid=7, mtime=11), file(f"{name}/lower", b"l", mtime=12)]
    out += [
        file("gone", b"g"),
        symlink("gone-link", "gone"),
        file("kept", b"k", mtime=13),
        directory("to-file/", mtime=1),
    ]
    out += [file("to-file/inside", b"i"), file("to-dir", b"f"), file("changed", b"old"), file("deep/er/gone", b"g")]
    return b"".join(out) + END


def whiteouts() -> bytes:
    """Whiteouts and opaque directories over `base`: their marks before, behind and between their entries."""
    opaque = ".wh..wh..opq"
    out = [root()]
    out += [file(f"before/{opaque}"), directory("before/", mtime=1), file("before/new", b"n")]
    out += [directory("after/", mtime=2), file("after/new", b"n"), file(f"after/{opaque}")]
    out += [
        directory("between/", mtime=3),
        file("between/new", b"n"),
        file(f"between/{opaque}"),
        file("between/also", b"a"),
    ]
    out += [
        directory("deep/", mtime=4),
        directory("deep/er/", mtime=5),
        file("deep/er/.wh.gone"),
        file("deep/er/new", b"n"),
    ]
    out += [file(".wh.gone"), file(".wh.gone-link"), file(".wh.gone-dir"), file("changed", b"new", mtime=6)]
    out += [file("to-file", b"file"), directory("to-dir/", mtime=7), file("to-dir/inside", b"i"), file("added", b"a")]
    return b"".join(out) + END


def remade() -> bytes:
    """Directories of `base` that are removed and made anew: what the lower layer has there must not show."""
    out = [root(), file(".wh.both"), directory("both/", mtime=8), file("both/upper", b"u")]
    return b"".join(out) + END


def remade_late() -> bytes:
    """The same with the whiteout last."""
    out = [
        root(),
        directory("late/", mtime=8),
        file("late/upper", b"u"),
        file(".wh.late"),
        file(".wh.kept"),
        file("kept"),
    ]
    return b"".join(out) + END


def stray() -> bytes:
    """Whiteouts of what no layer has, in directories that no other layer has."""
    out = [root(), directory("fresh/", mtime=1), file("fresh/.wh.gone"), file("fresh/a", b"a"), file(".wh.nothing")]
    return b"".join(out) + END


def marks_alone() -> bytes:
    """Marks in directories that have no other entry, over `base`, which has `alone`."""
    opaque = ".wh..wh..opq"
    return root() + file("new/dir/.wh.x") + file(f"fresh/{opaque}") + file(f"alone/{opaque}") + END


def file_then_dir() -> bytes:
    """A name of `base` that becomes a file and a directory again."""
    return root() + file("late", b"f") + directory("late/", mtime=9) + file("late/new", b"n") + END


def opaque_root() -> bytes:
    """A layer that hides all that lies below it."""
    return root() + file("only", b"this", mtime=1) + file(".wh..wh..opq") + END


def implied() -> bytes:
    """Files whose directories have no entries of their own."""
    return file("usr/bin/tool", b"t", mode=0o755, mtime=5) + file("deep/er/new", b"n", mtime=6) + END


def merged_usr() -> bytes:
    """A base as Debian's, where `bin` is a symlink."""
    return root() + directory("usr/", mtime=1) + directory("usr/bin/", 0o711, mtime=2) + symlink("bin", "usr/bin") + END


def unmerged_usr() -> bytes:
    """A layer that knows nothing of its base's symlink `bin`."""
    return root() + file("bin/tool", b"t", mode=0o755, mtime=3) + END

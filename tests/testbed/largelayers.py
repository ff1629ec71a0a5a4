"""Generated layers of many files, and random ones."""

from __future__ import annotations

import random

from tests.testbed.tars import END, directory, file, hard_link, header, root, symlink

TIME = 1_700_000_000
MANY = 200_000
SOURCES = 20_000


def many() -> bytes:
    """A directory of 200,000 files."""
    out = [root(), directory("many/", mtime=1)]
    # Formatting a header takes longer than all else here; name and checksum are the only fields that change.
    template = bytearray(file("many/" + "0" * 6, mtime=2))
    blank = sum(template[:148]) + sum(template[156:]) + 8 * 32 - 6 * ord("0")
    for number in range(MANY):
        digits = b"%06d" % number
        template[5:11] = digits
        template[148:156] = b"%06o\0 " % (blank + sum(digits))
        out.append(bytes(template))
    return b"".join(out) + END


def random_layer(chance: random.Random) -> bytes:
    """Some entries of all types under few names, so that they meet: parents are symlinks or come late, names come twice."""
    out, files = [root()], [b""]
    for number in range(chance.randint(2, 14)):
        name = b"/".join(chance.choice((b"a", b"b", b"c")) for _ in range(chance.randint(1, 3)))
        kind = chance.choice("fffdddsslp")
        if kind == "f":
            out.append(file(name, b"%d" % number, mtime=number))
            files.append(name)
        elif kind == "d":
            out.append(directory(name + b"/", 0o700 + number, mtime=number))
        elif kind == "s":
            target = chance.choice(("a", "b", "../a", "/c", "a/b", "../../b", "."))
            out.append(symlink(name, target, mtime=number))
        elif kind == "p":
            out.append(header(name, b"6", mtime=number))
        elif earlier := chance.choice(files):
            out.append(hard_link(name, earlier))
    return b"".join(out) + END


def sources() -> bytes:
    """A source tree of 20,000 files of up to 3000 bytes, in 400 directories."""
    chance = random.Random(20)  # noqa: S311 - it makes text
    words = chance.randbytes(1 << 16).hex().encode()
    out = [root()]
    for package in range(20):
        out.append(directory(f"package{package}/", mtime=TIME + package))
        out += [directory(f"package{package}/sub{sub}/", mtime=TIME + sub) for sub in range(20)]
    for number in range(SOURCES):
        start, size = chance.randrange(1 << 16), chance.randrange(3000)
        name = f"package{number % 20}/sub{number // 20 % 20}/module{number:05}.py"
        out.append(file(name, words[start : start + size], mode=0o644 | number % 2 * 0o111, mtime=TIME + number))
    return b"".join(out) + END

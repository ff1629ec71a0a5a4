"""Patterns of paths as gitignore(5) has them, for choosing what of a root comes back.

A pattern without ``/`` but at its end means a name at any depth; another one is a path from the root. ``*``, ``?`` and
``[...]`` match within a name, ``**`` as a whole name any number of directories; a ``/`` at the end means directories only, a
``!`` at the start takes back what patterns before it say. The last pattern that matches decides.

The patterns come from clients, so matching must not take exponential time: every name is matched by a regular expression
without backtracking (atomic groups), and of several ``**`` only the last one is ever tried again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from afs.core.errors import InvalidArgument

MAX_PATTERNS = 1000
MAX_PATTERN = 4096  # characters
_CLASSES = {
    "alnum": "0-9A-Za-z", "alpha": "A-Za-z", "blank": r" \t", "cntrl": r"\x00-\x1f\x7f", "digit": "0-9", "graph": "!-~",
    "lower": "a-z", "print": " -~", "punct": r"!-/:-@\[-`{-~", "space": r" \t\n\r\f\v", "upper": "A-Z", "xdigit": "0-9A-Fa-f",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Pattern:
    names: tuple["re.Pattern[str] | None", ...]  # None for **
    anchored: bool
    directories_only: bool
    taken_back: bool

    def matches(self, path: str, is_directory: bool) -> bool:
        if self.directories_only and not is_directory:
            return False
        if not self.anchored:
            name = self.names[0]
            return name is not None and name.match(path, path.rfind("/") + 1) is not None
        return _match(self.names, path.split("/"))


class Globs:
    """A list of patterns. InvalidArgument, naming *what* they are, for one that cannot be understood."""

    def __init__(self, patterns: Sequence[str], what: str = "pattern") -> None:
        if len(patterns) > MAX_PATTERNS:
            raise InvalidArgument(f"{len(patterns)} patterns of {what} are more than {MAX_PATTERNS}")
        self._patterns = [_parse(pattern, what) for pattern in reversed(patterns)]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def match(self, path: str, is_directory: bool) -> bool:
        """Whether *path*, relative to the root, is meant by itself; what is below it is the caller's matter."""
        for pattern in self._patterns:
            if pattern.matches(path, is_directory):
                return not pattern.taken_back
        return False


def _parse(pattern: str, what: str) -> _Pattern:
    text, taken_back = pattern, False
    if text.startswith("!"):
        text, taken_back = text[1:], True
    directories_only = text.endswith("/")
    text = text.rstrip("/")
    anchored = "/" in text
    text = text.lstrip("/")
    parts = text.split("/")
    if not text or "\0" in text or len(text) > MAX_PATTERN or any(part in ("", ".", "..") for part in parts):
        raise InvalidArgument(f"{what} {pattern[:80]!r} is not a pattern of paths in the root")
    names = tuple(None if part == "**" else _name(part, pattern, what) for part in parts)
    if names == (None,):  # all there is
        names, anchored = (re.compile(r"(?s:.)+"),), False
    return _Pattern(names, anchored, directories_only, taken_back)


def _name(part: str, pattern: str, what: str) -> "re.Pattern[str]":
    """A regular expression for one name."""
    pieces, position = [""], 0  # what stands between the stars
    while position < len(part):
        character = part[position]
        position += 1
        if character == "*":
            if len(pieces) == 1 or pieces[-1]:
                pieces.append("")
        elif character == "?":
            pieces[-1] += "(?s:.)"
        elif character == "[":
            found, position = _set(part, position, pattern, what)
            pieces[-1] += found
        elif character == "\\":
            if position == len(part):
                raise InvalidArgument(f"{what} {pattern[:80]!r} ends in a backslash")
            pieces[-1] += re.escape(part[position])
            position += 1
        else:
            pieces[-1] += re.escape(character)
    return re.compile(_without_backtracking(pieces))


def _without_backtracking(pieces: Sequence[str]) -> str:
    """What follows a star is taken at the first place where it is found, the last piece at the end."""
    first, *others = pieces
    if not others:
        return rf"{first}\Z"
    *inner, last = others
    return first + "".join(rf"(?>(?s:.)*?{piece})" for piece in inner) + rf"(?s:.)*{last}\Z"


def _set(part: str, start: int, pattern: str, what: str) -> tuple[str, int]:
    """The set that begins behind a ``[``, and where it ends."""
    position, members, negated = start, list[str](), False
    if part[position : position + 1] in ("!", "^"):
        negated, position = True, position + 1
    first = True
    while position < len(part) and (first or part[position] != "]"):
        first = False
        if part.startswith("[:", position) and (end := part.find(":]", position)) > 0:
            if (name := part[position + 2 : end]) not in _CLASSES:
                raise InvalidArgument(f"{what} {pattern[:80]!r} has an unknown class {name!r}")
            members.append(_CLASSES[name])
            position = end + 2
            continue
        low, position = _member(part, position)
        if part[position : position + 1] == "-" and part[position + 1 : position + 2] not in ("", "]"):
            high, position = _member(part, position + 1)
            if low <= high:
                members.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            members.append(re.escape(low))
    if position >= len(part):
        raise InvalidArgument(f"{what} {pattern[:80]!r} has a [ without ]")
    if not members:  # only ranges from high to low
        return ("(?s:.)" if negated else "(?!)"), position + 1
    return f"[{'^' if negated else ''}{''.join(members)}]", position + 1


def _member(part: str, position: int) -> tuple[str, int]:
    if part[position] == "\\" and position + 1 < len(part):
        position += 1
    return part[position], position + 1


def _match(names: Sequence["re.Pattern[str] | None"], parts: Sequence[str]) -> bool:
    """Whether *names* mean the path of *parts*; ``**`` at the end means at least one name, elsewhere none will do."""
    at = part = 0
    again: tuple[int, int] | None = None
    while part < len(parts):
        name = names[at] if at < len(names) else None
        if at < len(names) and name is None:
            if at == len(names) - 1:
                return True
            again, at = (at + 1, part), at + 1
        elif name is not None and name.match(parts[part]):
            at, part = at + 1, part + 1
        elif again is not None:  # let the last ** take one name more
            again = (again[0], again[1] + 1)
            at, part = again
        else:
            return False
    return at == len(names)

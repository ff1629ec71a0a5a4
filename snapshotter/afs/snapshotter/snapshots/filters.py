"""containerd's filter expressions, as List takes them (its package filters).

    filter   := selector (',' selector)*          all of them
    selector := path [operator value]             without operator: the field is there
    path     := field ('.' field)*
    field    := quoted | [A-Za-z0-9_-]+
    operator := '==' | '!=' | '~=' | '@='         '~=' searches a regular expression, '@=' a text
    value    := quoted | anything without ',' and white space

Quoted is a Go string in double quotes, slashes or bars. Of several filters one has to match; the empty one matches
everything. Unlike containerd, which lets it match nothing, a wrong regular expression is an error.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from afs.core.errors import InvalidArgument

Fields = Callable[[Sequence[str]], str | None]
"""Value of the field that a path leads to, None if there is none."""

_FIELD = re.compile(r"[A-Za-z0-9_-]+")
_OPERATOR = re.compile(r"[=!~@]+")
_VALUE = re.compile(r"[^\s,]+")
_SPACE = re.compile(r"\s*")
_QUOTES = '"/|'
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\\"/|])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.?))", re.DOTALL
)
_SIMPLE = dict(zip("abfnrtv\\", "\a\b\f\n\r\t\v\\", strict=True))


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition. *operator* is "" for presence; *pattern* is there for ``~=``."""

    path: tuple[str, ...]
    operator: str = ""
    value: str = ""
    pattern: re.Pattern[str] | None = None

    def matches(self, fields: Fields) -> bool:
        """Whether the fields meet it; as in containerd an absent field is "" for all operators but ``==``."""
        found = fields(self.path)
        if self.pattern is not None:
            return self.pattern.search(found or "") is not None
        if self.operator == "!=":
            return (found or "") != self.value
        if self.operator == "@=":
            return self.value in (found or "")
        return found is not None and (not self.operator or found == self.value)


Filter = tuple[Selector, ...]


def parse_filters(texts: Iterable[str]) -> list[Filter]:
    """Parse them; InvalidArgument names the one that is wrong, and where."""
    return [_Parser(text).parse() for text in texts]


def matches(filters: Sequence[Filter], fields: Fields) -> bool:
    """Whether one of *filters* does; without any, everything does."""
    return not filters or any(all(selector.matches(fields) for selector in one) for one in filters)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def parse(self) -> Filter:
        if not self._text:
            return ()
        selectors = [self._selector()]
        while self._peek():
            if self._peek() != ",":
                raise self._wrong("there is no comma")
            self._at += 1
            selectors.append(self._selector())
        return tuple(selectors)

    def _selector(self) -> Selector:
        path = [self._field()]
        while self._peek() == ".":
            self._at += 1
            path.append(self._field())
        if self._peek() in ("", ","):
            return Selector(tuple(path))
        operator = self._take(_OPERATOR)
        if operator not in ("==", "!=", "~=", "@="):
            raise self._wrong(f"{operator or self._peek()!r} is no operator")
        value = self._value()
        if operator != "~=":
            return Selector(tuple(path), operator, value)
        try:
            return Selector(tuple(path), operator, value, re.compile(value))
        except re.error as error:
            raise self._wrong(f"{value!r} is no regular expression: {error}") from None

    def _field(self) -> str:
        if (quote := self._peek()) and quote in _QUOTES:
            return self._quoted()
        if not (name := self._take(_FIELD)):
            raise self._wrong("a field is missing")
        return name

    def _value(self) -> str:
        if (quote := self._peek()) and quote in _QUOTES:
            return self._quoted()
        if not (value := self._take(_VALUE)):
            raise self._wrong("a value is missing")
        return value

    def _quoted(self) -> str:
        quote, text = self._peek(), self._between(self._peek())
        found, at = bytearray(), 0
        for match in _ESCAPE.finditer(text):
            found += text[at : match.start()].encode() + self._unescaped(match, quote)
            at = match.end()
        return (found + text[at:].encode()).decode("utf-8", "replace")

    def _unescaped(self, match: re.Match[str], quote: str) -> bytes:
        simple, byte, short, long, octal, _ = match.groups()
        if simple in _SIMPLE:
            return _SIMPLE[simple].encode()
        if simple == quote:
            return quote.encode()
        try:
            if byte or octal:
                return bytes([int(byte, 16) if byte else int(octal, 8)])
            if short or long:
                return chr(int(short or long, 16)).encode()
        except (ValueError, OverflowError):  # no byte, no character
            pass
        raise self._wrong(f"{match.group()!r} is no escape")

    def _between(self, quote: str) -> str:
        """What is between two of them, where a backslash keeps one from being the end."""
        start = at = self._at + 1
        while at < len(self._text) and self._text[at] not in (quote, "\n"):
            at += 2 if self._text[at] == "\\" else 1
        if self._text[at : at + 1] != quote:
            raise self._wrong("a quote is not closed")
        self._at = at + 1
        return self._text[start:at]

    def _peek(self) -> str:
        self._take(_SPACE)
        return self._text[self._at : self._at + 1]

    def _take(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found.group()

    def _wrong(self, why: str) -> InvalidArgument:
        return InvalidArgument(f"filter {self._text!r}: {why} at character {self._at + 1}")

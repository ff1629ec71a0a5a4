"""containerd's filter expressions, as List takes them (pkg/filters of containerd).

    filter   := selector (',' selector)*          all of them
    selector := path [operator value]             without operator: the field is there
    path     := field ('.' field)*
    field    := quoted | [A-Za-z0-9_]+
    operator := '==' | '!=' | '~='                '~=' searches a regular expression
    value    := quoted | anything without ',' and white space

Quoted is a Go string in double quotes; behind ``~=`` also in ``/`` or ``|``, where nothing but the quote is escaped. Of
several filters one has to match; the empty one matches everything.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from afs.core.errors import InvalidArgument

Fields = Callable[[Sequence[str]], str | None]
"""Value of the field that a path leads to, None if there is none."""

_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_VALUE = re.compile(r"[^\s,]+")
_SPACE = re.compile(r"\s*")
_ESCAPE = re.compile(
    r"\\(?:([abfnrtv\\'\"])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.?))", re.DOTALL
)
_SIMPLE = dict(zip("abfnrtv\\'\"", "\a\b\f\n\r\t\v\\'\"", strict=True))


@dataclass(frozen=True, slots=True)
class Selector:
    """One condition. *operator* is "" for presence; *pattern* is there for ``~=``."""

    path: tuple[str, ...]
    operator: str = ""
    value: str = ""
    pattern: re.Pattern[str] | None = None

    def matches(self, fields: Fields) -> bool:
        """Whether the fields meet it; as in containerd an absent field is "" for ``!=`` and ``~=``."""
        found = fields(self.path)
        if self.pattern is not None:
            return self.pattern.search(found or "") is not None
        if self.operator == "!=":
            return (found or "") != self.value
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
        if operator not in ("==", "!=", "~="):
            raise self._wrong(f"{operator or self._peek()!r} is no operator")
        value = self._value(also="/|" if operator == "~=" else "")
        if operator != "~=":
            return Selector(tuple(path), operator, value)
        try:
            return Selector(tuple(path), operator, value, re.compile(value))
        except re.error as error:
            raise self._wrong(f"{value!r} is no regular expression: {error}") from None

    def _field(self) -> str:
        if self._peek() == '"':
            return self._quoted()
        if not (name := self._take(_FIELD)):
            raise self._wrong("a field is missing")
        return name

    def _value(self, also: str) -> str:
        if (quote := self._peek()) and quote in '"' + also:
            return self._quoted() if quote == '"' else self._raw(quote)
        if not (value := self._take(_VALUE)):
            raise self._wrong("a value is missing")
        return value

    def _quoted(self) -> str:
        return _unquote(self._between('"'), self._wrong)

    def _raw(self, quote: str) -> str:
        return self._between(quote).replace("\\" + quote, quote)

    def _between(self, quote: str) -> str:
        """What is between two of them, where a backslash keeps one from being the end."""
        start = at = self._at + 1
        while at < len(self._text) and self._text[at] != quote:
            at += 2 if self._text[at] == "\\" else 1
        if at >= len(self._text):
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


def _unquote(text: str, wrong: Callable[[str], InvalidArgument]) -> str:
    def replace(match: re.Match[str]) -> str:
        simple, *numbers, octal, other = match.groups()
        if simple:
            return _SIMPLE[simple]
        try:
            if octal:
                return chr(int(octal, 8))
            digits = next(number for number in numbers if number)
            return chr(int(digits, 16))
        except (StopIteration, ValueError, OverflowError):
            raise wrong(f"\\{other} is no escape") from None

    return _ESCAPE.sub(replace, text)

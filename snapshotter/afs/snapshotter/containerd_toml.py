"""Changes a TOML file in place: what is not changed stays as it is, byte for byte, comments and order and all.

The text is taken apart into statements (a table's header, a key with its value, a line that says nothing), for which
:mod:`tomllib` itself decides where each ends. New keys come behind the last one of their table, new tables at the end.
Nothing relies on that being right: the result is parsed and compared with what the change should have given, and a file
whose spelling is beyond this (keys of a table that is written inline, say) is refused.
"""

import copy
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from afs.core.errors import FailedPrecondition
from afs.snapshotter.containerd_settings import Entries, Entry, Keys, Plan, Setting, lookup

_KEY_PART = r"""(?:"(?:[^"\\]|\\.)*"|'[^']*'|[A-Za-z0-9_-]+)"""
_KEY = re.compile(rf"\s*{_KEY_PART}(?:[ \t]*\.[ \t]*{_KEY_PART})*[ \t]*=[ \t]*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(slots=True)
class _Statement:
    text: str  # with its line ends
    table: Keys = ()  # that it opens or stands in
    keys: Keys = ()  # from the top, if it gives a value
    opens: bool = False  # a header

    @property
    def indent(self) -> str:
        return self.text[: len(self.text) - len(self.text.lstrip(" \t"))]


@dataclass(frozen=True, slots=True)
class Edited:
    """The new text, and what is new in it, a line each; no lines, and the same text, if all was there."""

    text: str
    changes: list[str] = field(default_factory=list)


def parse(text: str, name: str) -> dict[str, Any]:
    """The content of a file called *name*; FailedPrecondition if it is not TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FailedPrecondition(f"{name} is not TOML: {error}") from None


def edit(text: str, plan: Plan, *, force: bool = False) -> Edited:
    """*text*, which is TOML, with everything that *plan* asks for.

    FailedPrecondition if somebody chose another value, unless *force* is true, and if the change cannot be made.
    """
    before = tomllib.loads(text)
    wanted, changes, conflicts = copy.deepcopy(before), [], []
    editor = _Editor(text)
    for setting in plan.settings:
        found = lookup(before, setting.keys)
        if found == setting.value and type(found) is type(setting.value):
            continue
        shown = f"{dotted(setting.keys)} is {literal(found)}, not {literal(setting.value)}"
        if found is not None and found not in setting.defaults and not force:
            conflicts.append(f"{shown}; --force changes it" + (f", {setting.instead}" if setting.instead else ""))
            continue
        changes.append(
            f"{dotted(setting.keys)} = {literal(setting.value)}"
            + (f" (was {literal(found)})" if found is not None else "")
        )
        _place(wanted, setting.keys[:-1])[setting.keys[-1]] = setting.value
        if found is None:
            editor.insert(setting)
        else:
            editor.replace(setting)
    if conflicts:
        raise FailedPrecondition("; ".join(conflicts))
    for entries in plan.lists:
        for entry in _missing(lookup(before, entries.keys), entries):
            changes.append(f"an entry for {entry.name} in {dotted(entries.keys)}")
            _place(wanted, entries.keys[:-1]).setdefault(entries.keys[-1], []).append(dict(entry.values))
            editor.append(entries, entry)
    return Edited(_checked(editor.text(), wanted), changes)


def dotted(keys: Keys) -> str:
    """*keys* as TOML writes them."""
    return ".".join(key if _BARE.fullmatch(key) else literal(key) for key in keys)


def literal(value: object) -> str:
    """*value* as TOML writes it; for messages also tables and lists, as JSON does."""
    # JSON's strings are TOML's, but for surrogate pairs, which are not written with ensure_ascii off, and for DEL.
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007f")


def _missing(found: object, entries: Entries) -> list[Entry]:
    """The entries to add to the list *found*, in their order."""
    if found is None:
        return list(entries.entries)
    if not isinstance(found, list):
        raise FailedPrecondition(f"{dotted(entries.keys)} is {literal(found)}, not a list of tables")
    ours = entries.entries[-1]
    there = [item.get(entries.key) for item in found if isinstance(item, Mapping)]
    return [] if ours.name in there else [ours]


def _place(config: dict[str, Any], table: Keys) -> dict[str, Any]:
    """The table *table* of *config*, made if it is not there."""
    for number, key in enumerate(table, 1):
        config = config.setdefault(key, {})
        if not isinstance(config, dict):
            raise FailedPrecondition(f"{dotted(table[:number])} is not a table")
    return config


def _checked(text: str, wanted: dict[str, Any]) -> str:
    try:
        same = tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise FailedPrecondition(
            "it is written in a way that AFS cannot extend (inline tables, perhaps); add what `config` prints by hand"
        )
    return text


class _Editor:
    """The statements of a file while they change."""

    def __init__(self, text: str) -> None:
        self._newline = "\r\n" if "\r\n" in text else "\n"
        self._statements = _split(text)

    def text(self) -> str:
        """The file as it is now."""
        return "".join(statement.text for statement in self._statements)

    def insert(self, setting: Setting) -> None:
        """Add a key that is not there to its table, which may not be there either."""
        table = setting.keys[:-1]
        last = self._last(table)
        if last is None and table:
            self._open(f"[{dotted(table)}]", table)
            last = len(self._statements) - 1
        indent = "" if last is None else self._statements[last].indent
        # Comments at the top of the file may be about all of it; a first key comes behind them.
        at = self._top() if last is None else last + 1
        # A table may be given by dotted keys: then what follows them is in the table that they stand in.
        stands_in = () if last is None else self._statements[last].table
        key = dotted(setting.keys[len(stands_in) :])
        lines = [f"{indent}# {setting.why}", f"{indent}{key} = {literal(setting.value)}"]
        self._put(at, lines, stands_in, setting.keys)

    def replace(self, setting: Setting) -> None:
        """Give a key another value and leave the rest of its line alone."""
        for statement in self._statements:
            if statement.keys == setting.keys and (key := _KEY.match(statement.text)):
                rest = statement.text[_value_end(statement.text, key.end()) :]
                statement.text = f"{key[0]}{literal(setting.value)}{rest}"

    def append(self, entries: Entries, entry: Entry) -> None:
        """Add a table to a list of tables, which may not be there."""
        for statement in self._statements:
            if statement.keys == entries.keys:  # an array, written as a value
                _append_inline(statement, entry)
                return
        lines = [f"{dotted((key,))} = {literal(value)}" for key, value in entry.values.items()]
        header, last = f"[[{dotted(entries.keys)}]]", self._last(entries.keys, below=True)
        if last is None:
            self._open(header, entries.keys, f"# {entry.why}")
            self._put(len(self._statements), lines, entries.keys, (*entries.keys, ""))
            return
        opened = next(
            statement for statement in self._statements if statement.opens and statement.table == entries.keys
        )
        inside = self._statements[last].indent
        self._put(last + 1, [""], entries.keys)
        self._put(last + 2, [f"{opened.indent}# {entry.why}", f"{opened.indent}{header}"], entries.keys, opens=True)
        self._put(last + 3, [inside + line for line in lines], entries.keys, (*entries.keys, ""))

    def _last(self, table: Keys, *, below: bool = False) -> int | None:
        """The number of the last statement that opens *table* or gives a value in it; with *below*, or in one inside it."""
        found = None
        for number, statement in enumerate(self._statements):
            where = statement.table if statement.opens else statement.keys[:-1]
            if (statement.opens or statement.keys) and (where[: len(table)] if below else where) == table:
                found = number
        return found

    def _top(self) -> int:
        """Behind the comments that the file begins with, if an empty line ends them."""
        for number, statement in enumerate(self._statements):
            if statement.keys or statement.opens:
                break
            if not statement.text.strip():
                return number + 1
        return 0

    def _open(self, header: str, table: Keys, *above: str) -> None:
        if self._statements:
            if not self._statements[-1].text.endswith("\n"):
                self._statements[-1].text += self._newline
            self._put(len(self._statements), [""], ())
        self._put(len(self._statements), [*above, header], table, opens=True)

    def _put(self, at: int, lines: list[str], table: Keys, keys: Keys = (), *, opens: bool = False) -> None:
        if at and not self._statements[at - 1].text.endswith("\n"):
            self._statements[at - 1].text += self._newline
        text = "".join(line + self._newline for line in lines)
        self._statements.insert(at, _Statement(text, table, keys, opens))


def _split(text: str) -> list[_Statement]:
    """The statements of *text*, which is TOML; their texts make it up again."""
    statements: list[_Statement] = []
    table: Keys = ()
    pending = ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):  # splitlines() knows more line ends than TOML does
        pending += line
        try:
            parsed = tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue  # in a value of several lines
        stripped = pending.lstrip()
        if stripped.startswith("["):
            table = _path(parsed)
            statements.append(_Statement(pending, table, opens=True))
        elif parsed and (key := _KEY.match(pending)):
            keys = (*table, *_path(tomllib.loads(f"{key[0]}0")))
            statements.append(_Statement(pending, table, keys))
        else:
            statements.append(_Statement(pending, table))
        pending = ""
    return statements


def _path(parsed: dict[str, Any]) -> Keys:
    """The keys that lead through tables of one key each."""
    keys: list[str] = []
    found: object = parsed
    while isinstance(found, dict) and found:
        [(key, found)] = found.items()
        keys.append(key)
        if isinstance(found, list):
            found = found[0]
    return tuple(keys)


def _value_end(text: str, start: int) -> int:
    """Where the value ends that begins at *start*: before the white space, the comment and the line end behind it."""
    for end in range(start + 1, len(text) + 1):
        rest = text[end:].lstrip(" \t")
        if rest[:1] in ("", "#", "\r", "\n"):
            try:
                tomllib.loads(f"x = {text[start:end]}")
            except tomllib.TOMLDecodeError:
                continue
            return end
    raise FailedPrecondition(f"cannot tell where the value ends in {text.strip()!r}")


def _append_inline(statement: _Statement, entry: Entry) -> None:
    """Add *entry* to the array of inline tables that *statement* gives."""
    key = _KEY.match(statement.text)
    start = key.end() if key else 0
    end = _value_end(statement.text, start)
    body, rest = statement.text[start : end - 1], statement.text[end - 1 :]
    table = "{ " + ", ".join(f"{dotted((name,))} = {literal(value)}" for name, value in entry.values.items()) + " }"
    several = "\n" in body
    end_line = "\n" if several else ""
    # After nothing, after a comma, after a table; after a table with a comment behind it.
    separators = ("\n  ", ",\n  ", "\n  , ") if several else ("" if body.strip() == "[" else " ", ", ")
    for separator in separators:
        text = f"{statement.text[:start]}{body.rstrip()}{separator}{table}{end_line}{rest}"
        try:
            tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            continue
        statement.text = text
        return

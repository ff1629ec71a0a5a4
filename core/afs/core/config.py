"""One frozen dataclass describes a service's configuration; flags, environment, TOML and help all come from it.

Order: ``--config FILE.toml`` < environment ``AFS_<SERVICE>_<FIELD>`` < flags. A field is declared with :func:`setting`.
Supported types: str, int, float, bool, Path, tuple[str, ...]; sizes and durations are fields with their parser.
"""

import dataclasses
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import click

from afs.core.errors import InvalidArgument

ConfigT = TypeVar("ConfigT")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


def setting(default: Any, help: str, parse: Callable[[str], Any] | None = None) -> Any:
    """A field with its *default* and *help*; *parse* turns text (flags, environment, TOML strings) into the value."""
    return dataclasses.field(default=default, metadata={"help": help, "parse": parse})


def _flag(field: dataclasses.Field[Any]) -> str:
    # A tuple is given by repeating a flag in the singular: afslets -> --afslet
    name = field.name.removesuffix("s") if isinstance(field.default, tuple) else field.name
    return "--" + name.replace("_", "-")


def _from_text(field: dataclasses.Field[Any], kind: type, text: str) -> object:
    parse = field.metadata.get("parse")
    if parse is not None:
        try:
            return parse(text)
        except InvalidArgument as error:
            raise InvalidArgument(f"{field.name}: {error.line}") from None
    if kind is bool:
        if text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        raise InvalidArgument(f"{field.name}: {text!r} is neither true nor false")
    if isinstance(field.default, tuple):
        return tuple(part for part in text.split(",") if part)
    try:
        return kind(text)
    except ValueError:
        raise InvalidArgument(f"{field.name}: {text!r} is not a {kind.__name__}") from None


def _from_toml(field: dataclasses.Field[Any], kind: type, value: object) -> object:
    if isinstance(value, str):
        return _from_text(field, kind, value)
    if isinstance(field.default, tuple) and isinstance(value, list):
        return tuple(str(part) for part in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InvalidArgument(f"{field.name}: {value!r} is not a {kind.__name__}")
    return value


def load(
    cls: type[ConfigT], service: str, *, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]
) -> ConfigT:
    """Build *cls* from the three sources; unknown TOML keys and bad values raise InvalidArgument with the field's name."""
    table: dict[str, object] = {}
    if file is not None:
        try:
            table = tomllib.loads(file.read_text(encoding="utf-8")).get(service, {})
        except OSError as error:
            raise InvalidArgument(f"cannot read configuration {file}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"configuration {file} is not TOML: {error}") from error
    if not isinstance(table, dict):
        raise InvalidArgument(f"configuration {file}: {service!r} is not a table")
    fields = {field.name: field for field in dataclasses.fields(cast("Any", cls))}
    if unknown := sorted(table.keys() - fields.keys()):
        raise InvalidArgument(f"configuration {file}: [{service}] has no setting {unknown[0]!r}")
    hints, values = get_type_hints(cls), {}
    for name, field in fields.items():
        variable = f"AFS_{service}_{name}".upper()
        given = flags.get(name)
        if given is not None and given != ():
            # A type with a parser of its own arrives as text from click too.
            values[name] = _from_text(field, hints[name], given) if isinstance(given, str) else given
        elif variable in environ:
            values[name] = _from_text(field, hints[name], environ[variable])
        elif name in table:
            values[name] = _from_toml(field, hints[name], table[name])
    return cls(**values)


def options(cls: type, service: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A click decorator that adds ``--config`` and a flag for every field of *cls*."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        hints = get_type_hints(cls)
        for field in reversed(dataclasses.fields(cls)):
            many = isinstance(field.default, tuple)
            if hints[field.name] is bool:
                declared = f"{_flag(field)}/--no-{_flag(field)[2:]}"
                option = click.option(declared, field.name, default=None, help=field.metadata["help"])
            else:
                shown = ",".join(cast("tuple[str, ...]", field.default)) if many else field.default
                text = (
                    f"{field.metadata['help']} [default: {shown}]"
                    if shown not in ("", None)
                    else field.metadata["help"]
                )
                kind = tuple_type = str if many or field.metadata.get("parse") else hints[field.name]
                kind = click.Path(path_type=Path) if tuple_type is Path else tuple_type
                option = click.option(_flag(field), field.name, type=kind, multiple=many, default=None, help=text)
            function = option(function)
        variable = f"AFS_{service}_CONFIG".upper()
        return click.option(
            "--config",
            "config_file",
            type=click.Path(path_type=Path),
            envvar=[variable, "AFS_CONFIG"],
            help="TOML file.",
        )(function)

    return decorate


def from_command_line(cls: type[ConfigT], service: str, flags: dict[str, object]) -> ConfigT:
    """:func:`load` with what click collected and this process's environment; only ``main`` functions call it."""
    file = flags.pop("config_file", None)
    return load(cls, service, file=cast("Path | None", file), environ=os.environ, flags=flags)

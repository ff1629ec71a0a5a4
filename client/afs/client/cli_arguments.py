"""What afs_cli's arguments mean: names of local images, directories with a place, environments."""

import os
from pathlib import Path

from afs.client.uploads import Upload
from afs.core.errors import InvalidArgument


def split_dir(given: str) -> Upload:
    """``DIR`` or ``DIR:/PREFIX``."""
    path, colon, prefix = given.rpartition(":")
    if colon and prefix.startswith("/") and not Path(given).is_dir():
        return Upload(Path(path), prefix)
    return Upload(Path(given), "/")


def split_file(given: str) -> Upload:
    """``FILE``, ``FILE:/PATH`` or ``FILE:/DIRECTORY/``."""
    source, to = given, "/"
    path, colon, place = given.rpartition(":")
    if colon and place.startswith("/") and not Path(given).is_file():
        source, to = path, place
    if not Path(source).is_file():
        raise InvalidArgument(f"cannot upload {source}: not a file")
    return Upload(Path(source), to + Path(source).name if to.endswith("/") else to)


def image_name(image: str) -> str:
    """Local sources get an absolute path: the server has another working directory."""
    scheme, colon, rest = image.partition(":")
    if not colon or scheme not in ("oci", "docker-archive") or rest.startswith("/"):
        return image
    path, at, digest = rest.partition("@")
    if not at:
        path, tag = (rest, "") if os.path.exists(rest) else rest.rpartition(":")[::2] if ":" in rest else (rest, "")
        return f"{scheme}:{os.path.abspath(path)}" + (f":{tag}" if tag else "")
    return f"{scheme}:{os.path.abspath(path)}@{digest}"


def environment(entries: tuple[str, ...]) -> dict[str, str]:
    """``NAME=value``, or ``NAME`` to pass this process's on."""
    found = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or (not equals and name not in os.environ):
            raise InvalidArgument(f"--env {entry!r} is not NAME=value")
        found[name] = value if equals else os.environ[name]
    return found


def labels(entries: tuple[str, ...]) -> dict[str, str]:
    """``KEY=value``."""
    found = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not key or not equals:
            raise InvalidArgument(f"--label {entry!r} is not KEY=value")
        found[key] = value
    return found


def platform(text: str) -> tuple[str, str, str]:
    """``OS/ARCH[/VARIANT]``."""
    os_name, _, rest = text.partition("/")
    architecture, _, variant = rest.partition("/")
    return os_name, architecture, variant

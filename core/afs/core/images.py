"""Image names, as users write them, and platforms.

``alpine:3.20``, ``ghcr.io/org/app@sha256:...``, ``127.0.0.1:5000/swe:v1``, ``oci:DIR[:tag]``, ``docker-archive:FILE[:tag]``.
The rules for registry names are those of the distribution project's reference grammar.
"""

import platform as host_platform
import re
from dataclasses import dataclass

from typing_extensions import override

from afs.core.digests import check_digest, is_digest
from afs.core.errors import InvalidArgument

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_HUB = "docker.io"
LOCAL_SCHEMES = ("oci", "docker-archive")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A parsed image name. ``str()`` is canonical: equal images of one source have equal names.

    *scheme* is ``registry``, ``oci`` or ``docker-archive``; *location* is ``host/repository`` or an absolute path;
    exactly one of *tag* and *digest* is set for a registry, at most one for a local source.
    """

    scheme: str
    location: str
    tag: str = ""
    digest: str = ""

    @override
    def __str__(self) -> str:
        name = self.location if self.scheme == "registry" else f"{self.scheme}:{self.location}"
        if self.digest:
            return f"{name}@{self.digest}"
        return f"{name}:{self.tag}" if self.tag else name

    @property
    def registry(self) -> str:
        """``host[:port]`` of a registry image."""
        return self.location.partition("/")[0]

    @property
    def repository(self) -> str:
        """The name inside the registry."""
        return self.location.partition("/")[2]

    @property
    def is_local(self) -> bool:
        """Whether the source is a file or directory of one node."""
        return self.scheme in LOCAL_SCHEMES


@dataclass(frozen=True, slots=True)
class Platform:
    """An OCI platform; *variant* may be empty."""

    os: str
    architecture: str
    variant: str = ""

    @override
    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


def host() -> Platform:
    """The platform of this machine."""
    machine = host_platform.machine()
    return Platform("linux", _MACHINES.get(machine, machine))


def parse_platform(os: str, architecture: str, variant: str) -> Platform:
    """A platform in which empty parts mean this machine's."""
    here = host()
    return Platform(os or here.os, architecture or here.architecture, variant)


def parse_image(name: str, tag: str = "") -> ImageRef:
    """Parse an image *name*; a *tag* given apart (a tag or a digest) must not contradict one in the name.

    Raises InvalidArgument with the offending name.
    """
    if not name:
        raise InvalidArgument("no image given")
    scheme, colon, rest = name.partition(":")
    if colon and scheme in LOCAL_SCHEMES:
        return _parse_local(name, scheme, rest, tag)
    return _parse_registry(name, tag)


def _parse_local(name: str, scheme: str, rest: str, tag: str) -> ImageRef:
    path, tag, digest = _split(name, rest, tag)
    if not path.startswith("/"):
        raise InvalidArgument(f"image {name!r}: the path must be absolute")
    path = path.rstrip("/") or "/"
    if ":" in path.rpartition("/")[2]:
        # Without a tag behind it the colon would make another image of the canonical name.
        raise InvalidArgument(f"image {name!r}: the last part of the path must not hold a colon")
    # As below: a digest decides alone.
    return ImageRef(scheme, path, "" if digest else tag, digest)


def _split(name: str, rest: str, tag: str) -> tuple[str, str, str]:
    """*rest* of *name* as (location, tag, digest), with a *tag* given apart in its place."""
    location, at, digest = rest.partition("@")
    head, colon, last = location.rpartition(":")
    inner = ""
    if colon and "/" not in last:
        location, inner = head, last
        if not inner:
            raise InvalidArgument(f"image {name!r}: there is no tag behind the colon")
    if at and not is_digest(digest):
        raise InvalidArgument(f"image {name!r}: {digest!r} is not a sha256 digest")
    if tag.startswith("sha256:"):
        if at and tag != digest:
            raise InvalidArgument(f"image {name!r} and tag {tag!r} name two digests")
        digest, tag = check_digest(tag), ""
    if tag and inner and tag != inner:
        raise InvalidArgument(f"image {name!r} and tag {tag!r} name two tags")
    tag = inner or tag
    if tag and not _TAG.fullmatch(tag):
        raise InvalidArgument(f"image {name!r}: {tag!r} is not a tag")
    return location, tag, digest


def _parse_registry(name: str, tag: str) -> ImageRef:
    rest, tag, digest = _split(name, name, tag)
    first, slash, path = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first.startswith("[")):
        host_name, repository = first, path
    else:
        host_name, repository = _HUB, rest
    host_name = _HUB if host_name == f"index.{_HUB}" else host_name
    if host_name == _HUB and "/" not in repository:  # as Docker does
        repository = f"library/{repository}"
    if not _HOST.fullmatch(host_name) or not _REPOSITORY.fullmatch(repository):
        raise InvalidArgument(f"not an image name: {name!r}")
    location = f"{host_name}/{repository}"
    if digest:
        # A digest decides alone; keeping the tag beside it would give one image two names.
        return ImageRef("registry", location, digest=digest)
    return ImageRef("registry", location, tag=tag or "latest")

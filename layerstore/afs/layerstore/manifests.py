"""Reading indexes, manifests and configs (OCI image spec 1.1; Docker image manifest version 2, schema 2)."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from afs.core.digests import check_digest, is_digest, sha256_digest
from afs.core.errors import InvalidArgument
from afs.core.images import ImageRef, Platform
from afs.layerstore.errors import CorruptImage, NotAnImage, PlatformMissing
from afs.layerstore.platforms import normalized, preferred

log = logging.getLogger(__name__)
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
# What layers of file systems are, as OCI and Docker name it; whether they are compressed, and how, their bytes tell.
_LAYER_TYPES = frozenset(
    (
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
    )
)
_EMPTY_CONFIG = "application/vnd.oci.empty.v1+json"
_MAX_DEPTH = 3  # of indexes in indexes; more is a loop or a joke
_MAX_DOCUMENTS = 16  # that are read to find one manifest
MAX_MANIFEST = 4 << 20  # what registries accept at most
MAX_CONFIG = 8 << 20
MAX_LAYERS = 500  # overlayfs takes 500 lower directories


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image. *blob_size* is in bytes, compressed."""

    diff_id: str
    blob_digest: str
    blob_size: int
    media_type: str


@dataclass(frozen=True, slots=True)
class Image:
    """A resolved image. *manifest* and *config* are the exact bytes; *layers* is derived from them, bottom first."""

    key: str
    manifest_digest: str
    manifest: bytes
    config: bytes
    layers: tuple[Layer, ...]
    resolved_unix: int
    index: bytes = b""  # the index that the name led to, if it did

    def is_pinned_by(self, digest: str) -> bool:
        """Whether a reference by *digest* can only mean this image."""
        if digest == self.manifest_digest:
            return True
        return sha256_digest(self.index) == digest and f'"{self.manifest_digest}"'.encode() in self.index


class NamedImage(NamedTuple):
    """An image, and what it was asked for by."""

    ref: ImageRef
    platform: Platform
    image: Image


# Blocking: (reference: tag or digest, "" for the only one) -> manifest or index bytes.
GetManifest = Callable[[str], bytes]
# Blocking: (digest, most bytes to read) -> a small blob.
GetBlob = Callable[[str, int], bytes]


def image_key(name: str, platform: Platform) -> str:
    """What the cluster files an image under."""
    return f"{name} {platform}"


def parse_json(image: str, what: str, data: bytes) -> dict[str, Any]:
    """*data* as a JSON object; CorruptImage otherwise."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptImage(image, f"{what} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptImage(image, f"{what} is not a JSON object")
    return value


def resolve(
    image: str, reference: str, platform: Platform, get_manifest: GetManifest, get_blob: GetBlob, now: int
) -> Image:
    """Follow *reference* through indexes to the manifest for *platform* and read its config. Blocking.

    Every byte that a digest names is checked against it. *now* is seconds since the epoch.
    """
    top = get_manifest(reference)
    if is_digest(reference):
        _check(image, "manifest", top, reference)
    search = _Search(image, platform, get_manifest)
    for data, sure in search.candidates(top, 0):
        try:
            config = get_blob(_config_digest(image, parse_json(image, "manifest", data)), MAX_CONFIG)
            return build_image(image, platform, data, config, now, top if data is not top else b"")
        except (PlatformMissing, NotAnImage) as error:
            if sure:
                raise
            log.info("passing over an entry of its index that names no platform: %s", error.line)
    raise PlatformMissing(image, str(platform), sorted({str(found) for found in search.available}))


class _Search:
    """Finds the manifests for one platform below an index."""

    def __init__(self, image: str, wanted: Platform, get_manifest: GetManifest) -> None:
        self._image = image
        self._order = preferred(wanted)
        self._get_manifest = get_manifest
        self._left = _MAX_DOCUMENTS
        self.available: list[Platform] = []  # that the indexes name

    def candidates(self, data: bytes, depth: int) -> Iterator[tuple[bytes, bool]]:
        """The manifests in *data*, the best first, each with whether an index, or the image's name, chose this one."""
        document = parse_json(self._image, "manifest", data)
        if not _is_index(self._image, document):
            yield data, depth == 0
            return
        if depth == _MAX_DEPTH:
            raise CorruptImage(self._image, "its indexes are nested too deeply")
        for entry, chosen in self._choose(document):
            if not self._left:
                raise CorruptImage(self._image, f"its indexes lead to more than {_MAX_DOCUMENTS} documents")
            self._left -= 1
            digest = _digest(self._image, entry)
            found = self._get_manifest(digest)
            _check(self._image, "manifest", found, digest, entry.get("size"))
            for candidate, sure in self.candidates(found, depth + 1):
                yield candidate, sure or chosen

    def _choose(self, index: dict[str, Any]) -> list[tuple[dict[str, Any], bool]]:
        """The descriptors to try: the best for the platform (True), or else those that name none (False)."""
        nameless: list[dict[str, Any]] = []
        matching: list[tuple[int, dict[str, Any]]] = []
        for entry in _objects(self._image, index, "manifests"):
            if entry.get("mediaType") not in (*MANIFEST_TYPES, *INDEX_TYPES, None):
                continue  # artifacts beside the image
            given = entry.get("platform")
            if not isinstance(given, dict):
                nameless.append(entry)
                continue
            found = _platform(given)
            if "unknown" in (found.os, found.architecture):  # build attestations
                continue
            self.available.append(found)
            if (plain := normalized(found)) in self._order:
                matching.append((self._order.index(plain), entry))
        if matching:
            return [(min(matching, key=lambda match: match[0])[1], True)]
        return [(entry, False) for entry in nameless]


def build_image(
    image: str, platform: Platform, manifest: bytes, config: bytes, resolved_unix: int, index: bytes = b""
) -> Image:
    """Check a manifest and its config against each other and *platform*, and list the layers."""
    document = parse_json(image, "manifest", manifest)
    config_digest = _config_digest(image, document)
    _check(image, "config", config, config_digest, document["config"].get("size"))
    parsed = parse_json(image, "config", config)
    found = _platform(parsed)
    if normalized(found) not in preferred(platform):
        raise PlatformMissing(image, str(platform), [str(found)])
    layers = _layers(image, document, parsed)
    return Image(image_key(image, platform), sha256_digest(manifest), manifest, config, layers, resolved_unix, index)


def _check(image: str, what: str, data: bytes, digest: str, size: object = None) -> None:
    """Compare *data* with its descriptor; a *size* that is missing does not count, the digest says it all."""
    if (actual := sha256_digest(data)) != digest:
        raise CorruptImage(image, f"its {what} should be {digest} but is {actual}")
    if size is not None and size != len(data):
        raise CorruptImage(image, f"its {what} {digest} has {len(data)} bytes, but {size!r} by its descriptor")


def _is_index(image: str, document: dict[str, Any]) -> bool:
    listed = "manifests" in document
    if listed and ("config" in document or "layers" in document):  # whoever reads it the other way sees another image
        raise CorruptImage(image, "one document is an index and a manifest at once")
    return document.get("mediaType") in INDEX_TYPES or listed


def _platform(given: dict[str, Any]) -> Platform:
    return Platform(str(given.get("os", "")), str(given.get("architecture", "")), str(given.get("variant", "")))


def _objects(image: str, document: dict[str, Any], field: str) -> list[dict[str, Any]]:
    value = document.get(field)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise CorruptImage(image, f"{field!r} is not a list of descriptors")
    return value


def _digest(image: str, descriptor: dict[str, Any]) -> str:
    try:
        return check_digest(str(descriptor.get("digest", "")))
    except InvalidArgument as error:
        raise CorruptImage(image, error.line) from None


def _config_digest(image: str, document: dict[str, Any]) -> str:
    given = str(document.get("mediaType", ""))
    if document.get("schemaVersion") == 1 or given.startswith("application/vnd.docker.distribution.manifest.v1"):
        raise NotAnImage(image, "its manifest is of Docker's schema 1, which registries gave up; push it again")
    if given and given not in MANIFEST_TYPES:
        raise NotAnImage(image, f"its manifest is of type {given}")
    config = document.get("config")
    if not isinstance(config, dict):
        raise CorruptImage(image, "its manifest has no config")
    media_type = config.get("mediaType")
    if media_type not in CONFIG_TYPES:
        artifact = document.get("artifactType")
        if artifact and media_type == _EMPTY_CONFIG:
            raise NotAnImage(image, f"it is an artifact of type {artifact}")
        raise NotAnImage(image, f"its config is of type {media_type}")
    return _digest(image, config)


def _layers(image: str, manifest: dict[str, Any], config: dict[str, Any]) -> tuple[Layer, ...]:
    rootfs = config.get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    descriptors = _objects(image, manifest, "layers")
    if not isinstance(diff_ids, list) or len(diff_ids) != len(descriptors):
        raise CorruptImage(
            image, f"config and manifest disagree on the number of layers ({len(descriptors)} in the manifest)"
        )
    if len(descriptors) > MAX_LAYERS:
        raise CorruptImage(image, f"it has {len(descriptors)} layers, more than {MAX_LAYERS}")
    layers = []
    for diff_id, descriptor in zip(diff_ids, descriptors, strict=True):
        media_type, size = str(descriptor.get("mediaType", "")), descriptor.get("size")
        if media_type not in _LAYER_TYPES:
            raise NotAnImage(image, f"layer {descriptor.get('digest')} is of type {media_type}, {_why_not(media_type)}")
        if not is_digest(str(diff_id)) or type(size) is not int or not 0 <= size < 1 << 62:
            raise CorruptImage(image, f"layer {descriptor.get('digest')} has a bad diff_id or size")
        layers.append(Layer(str(diff_id), _digest(image, descriptor), size, media_type))
    return tuple(layers)


def _why_not(media_type: str) -> str:
    if "nondistributable" in media_type or "foreign" in media_type:
        return "which registries do not hold"
    if media_type.endswith("+encrypted"):
        return "which needs a key to read"
    return "which is no layer of a file system"

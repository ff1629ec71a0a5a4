"""Reading indexes, manifests and configs (OCI image spec 1.1; Docker image manifest version 2, schema 2)."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from afs.core.digests import check_digest, is_digest, sha256_digest
from afs.core.errors import InvalidArgument
from afs.core.images import Platform
from afs.layerstore.errors import CorruptImage, NotAnImage, PlatformMissing

INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
CONFIG_TYPES = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
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
    data = get_manifest(reference)
    if is_digest(reference):
        _check(image, "manifest", data, reference)
    document = parse_json(image, "manifest", data)
    index = data if _is_index(document) else b""
    for _ in range(4):  # an index may point to an index; more than a few is a loop or a joke
        if not _is_index(document):
            break
        digest = _choose(image, document, platform)
        data = get_manifest(digest)
        _check(image, "manifest", data, digest)
        document = parse_json(image, "manifest", data)
    else:
        raise CorruptImage(image, "its indexes are nested too deeply")
    config_digest = _config_digest(image, document)
    config = get_blob(config_digest, MAX_CONFIG)
    return build_image(image, platform, data, config, now, index)


def build_image(
    image: str, platform: Platform, manifest: bytes, config: bytes, resolved_unix: int, index: bytes = b""
) -> Image:
    """Check a manifest and its config against each other and *platform*, and list the layers."""
    document = parse_json(image, "manifest", manifest)
    config_digest = _config_digest(image, document)
    _check(image, "config", config, config_digest)
    parsed = parse_json(image, "config", config)
    found = Platform(str(parsed.get("os", "")), str(parsed.get("architecture", "")), str(parsed.get("variant", "")))
    if not _matches(found, platform):
        raise PlatformMissing(image, str(platform), [str(found)])
    layers = _layers(image, document, parsed)
    return Image(image_key(image, platform), sha256_digest(manifest), manifest, config, layers, resolved_unix, index)


def _check(image: str, what: str, data: bytes, digest: str) -> None:
    if (actual := sha256_digest(data)) != digest:
        raise CorruptImage(image, f"its {what} should be {digest} but is {actual}")


def _is_index(document: dict[str, Any]) -> bool:
    return document.get("mediaType") in INDEX_TYPES or ("manifests" in document and "config" not in document)


def _matches(found: Platform, wanted: Platform) -> bool:
    if (found.os, found.architecture) != (wanted.os, wanted.architecture):
        return False
    # arm64 has one variant, and images name it or not.
    return not wanted.variant or found.variant in ("", wanted.variant)


def _choose(image: str, index: dict[str, Any], wanted: Platform) -> str:
    """The digest of the manifest for *wanted*; an exact variant wins over none."""
    available: list[Platform] = []
    best: tuple[bool, str] | None = None
    for entry in _objects(image, index, "manifests"):
        given = entry.get("platform")
        if not isinstance(given, dict):
            given = {}
        found = Platform(str(given.get("os", "")), str(given.get("architecture", "")), str(given.get("variant", "")))
        if found.os == "unknown":  # build attestations
            continue
        available.append(found)
        if _matches(found, wanted) and (best is None or (found.variant == wanted.variant and not best[0])):
            best = (found.variant == wanted.variant, _digest(image, entry))
    if best is None:
        raise PlatformMissing(image, str(wanted), sorted({str(found) for found in available}))
    return best[1]


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
    if document.get("schemaVersion") == 1:
        raise NotAnImage(image, "its manifest is of Docker's schema 1, which registries gave up; push it again")
    config = document.get("config")
    if not isinstance(config, dict):
        raise CorruptImage(image, "its manifest has no config")
    media_type = config.get("mediaType")
    if media_type not in CONFIG_TYPES:
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
        media_type, size = str(descriptor.get("mediaType", "")), descriptor.get("size", 0)
        if "nondistributable" in media_type or "foreign" in media_type:
            raise NotAnImage(
                image, f"layer {descriptor.get('digest')} is of type {media_type}, which registries do not hold"
            )
        if not is_digest(str(diff_id)) or type(size) is not int or not 0 <= size < 1 << 62 or not media_type.isascii():
            raise CorruptImage(image, f"layer {descriptor.get('digest')} has a bad diff_id or size")
        layers.append(Layer(str(diff_id), _digest(image, descriptor), size, media_type))
    return tuple(layers)

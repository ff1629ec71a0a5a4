"""Writes and reads OCI image layouts and `docker save` archives, with the same bytes for the same input.

Rules come from the OCI image-spec: image-layout.md, manifest.md, image-index.md, config.md and layer.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import zstandard

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Compression = Literal["gzip", "zstd", "plain"]
Platform = tuple[str, str, str]
"""os, architecture, variant; the variant is "" where there is none."""
TarSource = bytes | Path

AMD64: Platform = ("linux", "amd64", "")
ARM64: Platform = ("linux", "arm64", "v8")
CREATED = "2024-01-01T00:00:00Z"
"""The date in every config: a clock here would change every digest."""

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
REF_NAME = "org.opencontainers.image.ref.name"

_OCI_LAYER = {
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    "plain": "application/vnd.oci.image.layer.v1.tar",
}
_DOCKER_LAYER = {
    _OCI_LAYER["gzip"]: "application/vnd.docker.image.rootfs.diff.tar.gzip",
    _OCI_LAYER["plain"]: "application/vnd.docker.image.rootfs.diff.tar",
}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Layer:
    """A layer blob in a layout; `size` is the blob's, `tar_size` the uncompressed tar's, in bytes."""

    diff_id: str
    digest: str
    size: int
    media_type: str
    tar_size: int


@dataclass(frozen=True)
class Descriptor:
    """What points to a manifest or an index."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None

    def as_json(self) -> dict[str, Any]:
        """The descriptor as image-spec's descriptor.md writes it."""
        out: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.platform is not None:
            out["platform"] = _platform_json(self.platform)
        return out


@dataclass(frozen=True)
class StoredImage:
    """An image as `read_image` finds it in a layout; layers lie bottom up."""

    layout: Path
    tag: str
    manifest: Descriptor
    config_digest: str
    config: Mapping[str, Any] = field(repr=False)
    layers: tuple[Layer, ...]

    @property
    def diff_ids(self) -> tuple[str, ...]:
        """The layers' diff ids, bottom up."""
        return tuple(layer.diff_id for layer in self.layers)


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class _Plain:
    def compress(self, data: bytes, /) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def _compressor(compression: Compression, level: int) -> _Compressor:
    if compression == "gzip":
        return zlib.compressobj(level, zlib.DEFLATED, 31)  # zlib's own gzip header has mtime 0 and no name
    if compression == "zstd":
        return zstandard.ZstdCompressor(level=3).compressobj()
    return _Plain()


class LayoutBuilder:
    """Fills an OCI layout directory; every method leaves a valid layout behind."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._tags: dict[str, Descriptor] = {}
        (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        self._write_index()

    def add_blob(self, data: bytes) -> str:
        """Store `data` under its digest, which is returned."""
        digest = hashlib.sha256(data).hexdigest()
        (self._blobs / digest).write_bytes(data)
        return f"sha256:{digest}"

    def add_layer(self, tar: TarSource, compression: Compression = "gzip", level: int = 6) -> Layer:
        """Compress a tar into a blob, a MiB at a time; `level` is for gzip only."""
        diff, blob = hashlib.sha256(), hashlib.sha256()
        packer = _compressor(compression, level)
        tar_size = size = 0
        with _open(tar) as source, tempfile.NamedTemporaryFile(dir=self._blobs, delete=False) as out:
            while chunk := source.read(_CHUNK):
                diff.update(chunk)
                tar_size += len(chunk)
                packed = packer.compress(chunk)
                blob.update(packed)
                size += out.write(packed)
            packed = packer.flush()
            blob.update(packed)
            size += out.write(packed)
            os.fchmod(out.fileno(), 0o644)
        Path(out.name).rename(self._blobs / blob.hexdigest())
        return Layer(
            diff_id=f"sha256:{diff.hexdigest()}",
            digest=f"sha256:{blob.hexdigest()}",
            size=size,
            media_type=_OCI_LAYER[compression],
            tar_size=tar_size,
        )

    def add_image(
        self,
        tag: str | None,
        layers: Sequence[Layer],
        config: Mapping[str, Any] | None = None,
        platform: Platform = AMD64,
        *,
        docker: bool = False,
    ) -> Descriptor:
        """Write config and manifest; without a tag the image is reachable through an index only.

        Raises:
            ValueError: `docker` with a zstd layer, which Docker's schema 2 has no media type for.

        """
        if docker:
            layers = [_docker_layer(layer) for layer in layers]
        config_digest = self.add_blob(_json(image_config([layer.diff_id for layer in layers], config, platform)))
        manifest_type = DOCKER_MANIFEST if docker else OCI_MANIFEST
        manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": manifest_type,
                "config": {
                    "mediaType": DOCKER_CONFIG if docker else OCI_CONFIG,
                    "digest": config_digest,
                    "size": self._size(config_digest),
                },
                "layers": [{"mediaType": la.media_type, "digest": la.digest, "size": la.size} for la in layers],
            }
        )
        return self._tag(tag, Descriptor(manifest_type, self.add_blob(manifest), len(manifest), platform))

    def add_index(self, tag: str, images: Mapping[Platform, Descriptor], *, docker: bool = False) -> Descriptor:
        """Write an index (docker: a manifest list) over images added before, in the order given."""
        entries = [replace(image, platform=platform).as_json() for platform, image in images.items()]
        media_type = DOCKER_INDEX if docker else OCI_INDEX
        data = _json({"schemaVersion": 2, "mediaType": media_type, "manifests": entries})
        return self._tag(tag, Descriptor(media_type, self.add_blob(data), len(data)))

    def _size(self, digest: str) -> int:
        return (self._blobs / digest.partition(":")[2]).stat().st_size

    def _tag(self, tag: str | None, descriptor: Descriptor) -> Descriptor:
        if tag is not None:
            self._tags[tag] = descriptor
            self._write_index()
        return descriptor

    def _write_index(self) -> None:
        manifests = [d.as_json() | {"annotations": {REF_NAME: tag}} for tag, d in self._tags.items()]
        body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
        (self.directory / "index.json").write_bytes(_json(body))


def image_config(diff_ids: Sequence[str], config: Mapping[str, Any] | None, platform: Platform) -> dict[str, Any]:
    """An image config (image-spec config.md) with fixed dates; `config` has Env, Cmd, Entrypoint, User, ..."""
    return {
        "created": CREATED,
        **_platform_json(platform),
        "config": dict(config or {}),
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [{"created": CREATED, "created_by": f"testbed layer {n}"} for n in range(len(diff_ids))],
    }


def docker_archive(
    path: Path,
    tags: Sequence[str],
    tars: Sequence[TarSource],
    config: Mapping[str, Any] | None = None,
    platform: Platform = AMD64,
) -> tuple[str, ...]:
    """Write what `docker save` writes (manifest.json, a config, layer.tar files); returns the diff ids, bottom up."""
    diff_ids = []
    names = []
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        for tar in tars:
            digest = _sha256(tar)
            diff_ids.append(f"sha256:{digest}")
            names.append(f"{digest}/layer.tar")
            with _open(tar) as source:
                out.addfile(_member(names[-1], source.seek(0, os.SEEK_END)), _rewound(source))
        body = _json(image_config(diff_ids, config, platform))
        config_name = f"{hashlib.sha256(body).hexdigest()}.json"
        entry = {"Config": config_name, "RepoTags": list(tags), "Layers": names}
        for name, data in ((config_name, body), ("manifest.json", _json([entry]))):
            out.addfile(_member(name, len(data)), io.BytesIO(data))
    return tuple(diff_ids)


def blob_path(layout: Path, digest: str) -> Path:
    """Where a layout keeps a blob."""
    return layout.joinpath("blobs", *digest.split(":", 1))


def load_json(layout: Path, digest: str) -> dict[str, Any]:
    """A blob of a layout, parsed."""
    data: dict[str, Any] = json.loads(blob_path(layout, digest).read_bytes())
    return data


def find_tag(layout: Path, tag: str) -> Descriptor:
    """What a tag of a layout points to.

    Raises:
        KeyError: the layout has no such tag.

    """
    for entry in json.loads((layout / "index.json").read_bytes())["manifests"]:
        if entry.get("annotations", {}).get(REF_NAME) == tag:
            return _descriptor(entry)
    raise KeyError(tag)


def read_image(layout: Path, tag: str, platform: Platform = AMD64) -> StoredImage:
    """Find a tag's image; an index is searched for `platform`, a plain manifest is taken as it is.

    Raises:
        KeyError: no such tag, or an index without that platform.

    """
    found = find_tag(layout, tag)
    if found.media_type in (OCI_INDEX, DOCKER_INDEX):
        entries = [_descriptor(entry) for entry in load_json(layout, found.digest)["manifests"]]
        by_platform = {entry.platform: entry for entry in entries}
        found = by_platform[platform]
    manifest = load_json(layout, found.digest)
    config = load_json(layout, manifest["config"]["digest"])
    layers = tuple(
        Layer(diff_id, entry["digest"], entry["size"], entry["mediaType"], tar_size=-1)
        for diff_id, entry in zip(config["rootfs"]["diff_ids"], manifest["layers"], strict=True)
    )
    return StoredImage(layout, tag, found, manifest["config"]["digest"], config, layers)


def _descriptor(entry: dict[str, Any]) -> Descriptor:
    found = entry.get("platform")
    platform = (found["os"], found["architecture"], found.get("variant", "")) if found else None
    return Descriptor(entry["mediaType"], entry["digest"], entry["size"], platform)


def _docker_layer(layer: Layer) -> Layer:
    if layer.media_type not in _DOCKER_LAYER:
        raise ValueError(f"Docker's schema 2 has no media type for {layer.media_type}")
    return replace(layer, media_type=_DOCKER_LAYER[layer.media_type])


def _platform_json(platform: Platform) -> dict[str, str]:
    system, architecture, variant = platform
    return {"os": system, "architecture": architecture} | ({"variant": variant} if variant else {})


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _open(tar: TarSource) -> BinaryIO:
    return io.BytesIO(tar) if isinstance(tar, bytes) else tar.open("rb")


def _rewound(source: BinaryIO) -> BinaryIO:
    source.seek(0)
    return source


def _sha256(tar: TarSource) -> str:
    with _open(tar) as source:
        digest = hashlib.sha256()
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _member(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def copy_layout(source: Path, target: Path) -> Path:
    """A private copy of a layout, for tests that damage one; returns `target`."""
    shutil.copytree(source, target)
    return target

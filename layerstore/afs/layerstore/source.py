"""Where images come from. A source is blocking and runs in threads; one instance serves one image name."""

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol, cast

from afs.core.digests import check_digest, hex_of, is_digest, sha256_digest
from afs.core.errors import InvalidArgument
from afs.core.images import ImageRef
from afs.layerstore.errors import CorruptImage, ImageNotFound
from afs.layerstore.manifests import MAX_MANIFEST, Layer, parse_json

Read = Callable[[int], bytes]


class Source(Protocol):
    """One image's source; every method blocks. Digests are checked by the callers."""

    def get_manifest(self, reference: str) -> bytes:
        """Manifest or index by tag or digest; "" means the only or default one."""
        ...

    def get_blob(self, digest: str, limit: int) -> bytes:
        """A small blob of at most *limit* bytes."""
        ...

    def open_layer(self, layer: Layer) -> AbstractContextManager[Read]:
        """The layer's blob as a ``read(n)`` that returns b"" at the end."""
        ...


def _read_small(path: Path, image: str, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise CorruptImage(image, f"{path} is missing") from None
    if len(data) > limit:
        raise CorruptImage(image, f"{path} is larger than {limit} bytes")
    return data


class LayoutSource:
    """An OCI image layout directory (OCI image spec, image-layout.md)."""

    def __init__(self, ref: ImageRef) -> None:
        self._name = str(ref)
        self._dir = Path(ref.location)

    def _blob(self, digest: str) -> Path:
        return self._dir / "blobs" / "sha256" / hex_of(digest)

    def get_manifest(self, reference: str) -> bytes:
        return _read_small(
            self._blob(reference if is_digest(reference) else self._lookup(reference)), self._name, MAX_MANIFEST
        )

    def _lookup(self, tag: str) -> str:
        index = self._dir / "index.json"
        if not index.is_file():
            raise ImageNotFound(self._name, f"{self._dir} is not an OCI image layout (it has no index.json)")
        entries = parse_json(self._name, "index.json", _read_small(index, self._name, MAX_MANIFEST)).get("manifests")
        entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        names = [
            cast("dict[str, Any]", e.get("annotations") or {}).get("org.opencontainers.image.ref.name") for e in entries
        ]
        found = [entry for entry, name in zip(entries, names, strict=True) if name == tag] if tag else entries
        if len(found) != 1:
            choice = ", ".join(sorted(str(name) for name in names if name)) or "none"
            raise ImageNotFound(self._name, f"{'no such tag' if tag else 'no tag given'}; the layout has: {choice}")
        return check_digest(str(found[0].get("digest", "")))

    def get_blob(self, digest: str, limit: int) -> bytes:
        return _read_small(self._blob(digest), self._name, limit)

    @contextlib.contextmanager
    def open_layer(self, layer: Layer) -> Iterator[Read]:
        try:
            file = self._blob(layer.blob_digest).open("rb", buffering=0)
        except FileNotFoundError:
            raise CorruptImage(self._name, f"the blob of layer {layer.blob_digest} is missing") from None
        with file:
            yield cast("Read", file.read)


class ArchiveSource:
    """A ``docker save`` archive: manifest.json, a config and layers, plain or compressed.

    The archive has no OCI manifest, so one is made from manifest.json; a layer's blob digest is the one in its path
    (Docker 25 and later) or its diff_id, because older archives hold plain tars.
    """

    def __init__(self, ref: ImageRef) -> None:
        self._name = str(ref)
        self._path = ref.location
        self._tag = ref.tag

    @contextlib.contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self._path, "r:") as archive:
                yield archive
        except FileNotFoundError:
            raise ImageNotFound(self._name, f"no file {self._path}") from None
        except tarfile.TarError as error:
            raise CorruptImage(self._name, f"not a docker-archive: {error}") from None

    def _member(self, archive: tarfile.TarFile, name: str) -> IO[bytes]:
        try:
            file = archive.extractfile(name)
        except KeyError:
            file = None
        if file is None:
            raise CorruptImage(self._name, f"the archive has no {name}")
        return file

    def _entry(self, archive: tarfile.TarFile) -> dict[str, Any]:
        import json

        try:
            entries = json.load(self._member(archive, "manifest.json"))
            matching = [
                e for e in entries if not self._tag or any(t.endswith(f":{self._tag}") for t in e.get("RepoTags") or [])
            ]
        except (ValueError, TypeError, AttributeError) as error:
            raise CorruptImage(self._name, f"manifest.json makes no sense: {error}") from None
        if len(matching) != 1:
            tags = sorted(tag for entry in entries for tag in entry.get("RepoTags") or [])
            raise ImageNotFound(self._name, f"the archive has: {', '.join(tags) or 'no tags'}")
        return cast("dict[str, Any]", matching[0])

    def _paths(self, archive: tarfile.TarFile) -> tuple[bytes, list[tuple[str, str]]]:
        """The config, and for every layer (blob digest, path in the archive)."""
        entry = self._entry(archive)
        config = self._member(archive, str(entry.get("Config"))).read()
        diff_ids = parse_json(self._name, "config", config).get("rootfs", {}).get("diff_ids", [])
        paths = [str(path) for path in entry.get("Layers", [])]
        if len(paths) != len(diff_ids):
            raise CorruptImage(self._name, "manifest.json and config disagree on the number of layers")
        digests = []
        for diff_id, path in zip(diff_ids, paths, strict=True):
            named = f"sha256:{os.path.basename(path)}"
            digests.append(named if path.startswith("blobs/sha256/") and is_digest(named) else str(diff_id))
        return config, list(zip(digests, paths, strict=True))

    def get_manifest(self, reference: str) -> bytes:
        import json

        with self._open() as archive:
            config, layers = self._paths(archive)
            sizes = [archive.getmember(path).size for _, path in layers]
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": sha256_digest(config),
                "size": len(config),
            },
            "layers": [
                {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size}
                for (digest, _), size in zip(layers, sizes, strict=True)
            ],
        }
        return json.dumps(document, sort_keys=True).encode()

    def get_blob(self, digest: str, limit: int) -> bytes:
        with self._open() as archive:
            return self._paths(archive)[0]

    @contextlib.contextmanager
    def open_layer(self, layer: Layer) -> Iterator[Read]:
        with self._open() as archive:
            for digest, path in self._paths(archive)[1]:
                if digest == layer.blob_digest:
                    with self._member(archive, path) as file:
                        yield file.read
                    return
        raise CorruptImage(self._name, f"the archive has no layer {layer.blob_digest}")


def local_source(ref: ImageRef) -> Source:
    """The source of an ``oci:`` or ``docker-archive:`` image."""
    if ref.scheme == "oci":
        return LayoutSource(ref)
    if ref.scheme == "docker-archive":
        return ArchiveSource(ref)
    raise InvalidArgument(f"{ref} is not a local image")

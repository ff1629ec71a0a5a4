"""Where images come from. A source is blocking and runs in threads; one instance serves one image name."""

import contextlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Protocol, cast

from afs.core.digests import hex_of, is_digest, sha256_digest
from afs.core.errors import InvalidArgument
from afs.core.images import ImageRef
from afs.layerstore.errors import CorruptImage, ImageNotFound
from afs.layerstore.manifests import MAX_CONFIG, MAX_MANIFEST, Layer, parse_json

Read = Callable[[int], bytes]


class Source(Protocol):
    """One image's source; every method blocks. Digests are checked by the callers, too."""

    def get_manifest(self, reference: str) -> bytes:
        """Manifest or index by tag or digest; "" means the only or default one."""
        ...

    def current_digest(self, reference: str) -> str:
        """The digest of what :meth:`get_manifest` would return, if that can be told for less; else ""."""
        ...

    def get_blob(self, digest: str, limit: int) -> bytes:
        """A small blob of at most *limit* bytes."""
        ...

    def open_layer(self, layer: Layer) -> AbstractContextManager[Read]:
        """The layer's blob as a ``read(n)`` that returns b"" at the end."""
        ...

    def distrust(self) -> bool:
        """What :meth:`open_layer` gave was not the layer: ask somebody else from now on. False if there is nobody."""
        ...


def open_regular(path: Path | str, image: str) -> IO[bytes]:
    """Open a file that a client named. Only a regular one: opening a device may do things, a fifo may block for ever."""
    try:
        found = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ImageNotFound(image, f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise ImageNotFound(image, f"{path} is not a regular file")
        return open(f"/proc/self/fd/{found}", "rb", buffering=0)
    finally:
        os.close(found)


def _read_small(path: Path, image: str, limit: int) -> bytes:
    if not path.exists():
        raise CorruptImage(image, f"{path} is missing")
    with open_regular(path, image) as file:
        return _read_limited(file, str(path), image, limit)


def _read_limited(file: IO[bytes], name: str, image: str, limit: int) -> bytes:
    data = bytearray()
    while chunk := file.read(limit + 1 - len(data)):
        data += chunk
        if len(data) > limit:
            raise CorruptImage(image, f"{name} is larger than {limit} bytes")
    return bytes(data)


class _Local:
    """What all local sources have in common: there is nobody else to ask."""

    def current_digest(self, reference: str) -> str:
        return ""

    def distrust(self) -> bool:
        return False


class LayoutSource(_Local):
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
        names = [_ref_name(entry) for entry in entries]
        found = [entry for entry, name in zip(entries, names, strict=True) if name == tag] if tag else entries
        if len(found) != 1:
            choice = ", ".join(sorted(str(name) for name in names if name)) or "none"
            raise ImageNotFound(self._name, f"{'no such tag' if tag else 'no tag given'}; the layout has: {choice}")
        digest = str(found[0].get("digest", ""))
        if not is_digest(digest):
            raise CorruptImage(self._name, f"index.json names {digest!r}, which is no digest")
        return digest

    def get_blob(self, digest: str, limit: int) -> bytes:
        return _read_small(self._blob(digest), self._name, limit)

    @contextlib.contextmanager
    def open_layer(self, layer: Layer) -> Iterator[Read]:
        if not self._blob(layer.blob_digest).exists():
            raise CorruptImage(self._name, f"the blob of layer {layer.blob_digest} is missing")
        with open_regular(self._blob(layer.blob_digest), self._name) as file:
            yield file.read


def _ref_name(entry: dict[str, Any]) -> str | None:
    annotations = entry.get("annotations")
    name = annotations.get("org.opencontainers.image.ref.name") if isinstance(annotations, dict) else None
    return name if isinstance(name, str) else None


class ArchiveSource(_Local):
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
            with open_regular(self._path, self._name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                yield archive
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
            with self._member(archive, "manifest.json") as file:
                entries = json.loads(_read_limited(file, "manifest.json", self._name, MAX_MANIFEST))
        except (ValueError, RecursionError) as error:
            raise CorruptImage(self._name, f"manifest.json is not JSON: {error}") from None
        entries = _list(self._name, "manifest.json", entries, dict)
        tags = [_list(self._name, "RepoTags", entry.get("RepoTags") or [], str) for entry in entries]
        matching = [
            entry
            for entry, names in zip(entries, tags, strict=True)
            if not self._tag or any(name.endswith(f":{self._tag}") for name in names)
        ]
        if len(matching) != 1:
            found = ", ".join(sorted(name for names in tags for name in names))
            raise ImageNotFound(self._name, f"the archive has: {found or 'no tags'}")
        return cast("dict[str, Any]", matching[0])

    def _paths(self, archive: tarfile.TarFile) -> tuple[bytes, list[tuple[str, str]]]:
        """The config, and for every layer (blob digest, path in the archive)."""
        entry = self._entry(archive)
        with self._member(archive, str(entry.get("Config"))) as file:
            config = _read_limited(file, "the config", self._name, MAX_CONFIG)
        rootfs = parse_json(self._name, "config", config).get("rootfs")
        diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
        diff_ids = _list(self._name, "diff_ids", diff_ids or [], str)
        paths = _list(self._name, "Layers", entry.get("Layers") or [], str)
        if len(paths) != len(diff_ids):
            raise CorruptImage(self._name, "manifest.json and config disagree on the number of layers")
        digests = []
        for diff_id, path in zip(diff_ids, paths, strict=True):
            named = f"sha256:{os.path.basename(path)}"
            digests.append(named if path.startswith("blobs/sha256/") and is_digest(named) else diff_id)
        return config, list(zip(digests, paths, strict=True))

    def _size(self, archive: tarfile.TarFile, name: str) -> int:
        with self._member(archive, name) as file:  # follows links: older archives hold a layer once
            return file.seek(0, os.SEEK_END)

    def get_manifest(self, reference: str) -> bytes:
        import json

        with self._open() as archive:
            config, layers = self._paths(archive)
            sizes = [self._size(archive, path) for _, path in layers]
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


def _list(image: str, what: str, value: object, kind: type) -> list[Any]:
    """*value* as a list of *kind*; CorruptImage otherwise."""
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise CorruptImage(image, f"{what} is not a list of {kind.__name__}")
    return value


def local_source(ref: ImageRef) -> Source:
    """The source of an ``oci:`` or ``docker-archive:`` image."""
    if ref.scheme == "oci":
        return LayoutSource(ref)
    if ref.scheme == "docker-archive":
        return ArchiveSource(ref)
    raise InvalidArgument(f"{ref} is not a local image")

"""Images in local files: OCI layouts and docker-archives."""

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from afs.core.digests import sha256_digest
from afs.core.errors import InvalidArgument
from afs.core.images import Platform, parse_image
from afs.layerstore.errors import CorruptImage, ImageNotFound
from afs.layerstore.manifests import Image, Layer, resolve
from afs.layerstore.source import ArchiveSource, LayoutSource, Source, local_source
from tests.testbed import oci, tars

AMD64 = Platform("linux", "amd64")
TARS = [tars.tar_of({"a": b"1"}), tars.tar_of({"b": b"2"})]


def resolved(name: str) -> tuple[Source, Image]:
    """The source of an image and what it consists of."""
    ref = parse_image(name)
    source = local_source(ref)
    return source, resolve(name, ref.digest or ref.tag, AMD64, source.get_manifest, source.get_blob, 0)


def read(source: Source, layer: Layer) -> bytes:
    """A layer's blob."""
    with source.open_layer(layer) as read_some:
        return b"".join(iter(lambda: read_some(1000), b""))


@pytest.fixture
def layout(tmp_path: Path) -> oci.LayoutBuilder:
    """A layout with one image of two layers, tagged v1."""
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("v1", [builder.add_layer(tar) for tar in TARS])
    return builder


# Layouts


def test_a_layout_by_tag_digest_or_alone(layout: oci.LayoutBuilder) -> None:
    source, image = resolved(f"oci:{layout.directory}:v1")
    assert isinstance(source, LayoutSource)
    assert [tars_diff(tar) for tar in TARS] == [layer.diff_id for layer in image.layers]
    assert [sha256_digest(read(source, layer)) for layer in image.layers] == [la.blob_digest for la in image.layers]
    assert resolved(f"oci:{layout.directory}")[1].manifest == image.manifest
    assert resolved(f"oci:{layout.directory}@{image.manifest_digest}")[1].manifest == image.manifest


def tars_diff(tar: bytes) -> str:
    """The diff_id of a tar."""
    return sha256_digest(tar)


def test_a_layout_says_what_it_has(layout: oci.LayoutBuilder, tmp_path: Path) -> None:
    layout.add_image("v2", [])
    for name, message in (
        (f"oci:{layout.directory}:v3", "no such tag; the layout has: v1, v2"),
        (f"oci:{layout.directory}", "no tag given; the layout has: v1, v2"),
        (f"oci:{tmp_path}/none:v1", f"{tmp_path}/none is not an OCI image layout (it has no index.json)"),
        (f"oci:{tmp_path}", f"{tmp_path} is not an OCI image layout (it has no index.json)"),
    ):
        with pytest.raises(ImageNotFound, match=f"^{re.escape(f'image {name} not found: {message}')}$"):
            resolved(name)


def test_an_empty_layout(tmp_path: Path) -> None:
    oci.LayoutBuilder(tmp_path / "x")
    with pytest.raises(ImageNotFound, match="the layout has: none"):
        resolved(f"oci:{tmp_path}/x:v1")


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (b"{", CorruptImage, "index.json is not JSON"),
        (b"[]", CorruptImage, "index.json is not a JSON object"),
        (b"{}", ImageNotFound, "the layout has: none"),
        (b'{"manifests": 3}', ImageNotFound, "the layout has: none"),
        (b'{"manifests": [3, {"annotations": ["x"]}]}', ImageNotFound, "no such tag"),
        (
            b'{"manifests": [{"digest": "../x", "annotations": {"org.opencontainers.image.ref.name": "v1"}}]}',
            CorruptImage,
            "index.json names '../x', which is no digest",
        ),
    ],
)
def test_bad_layouts(layout: oci.LayoutBuilder, index: bytes, error: type[Exception], message: str) -> None:
    (layout.directory / "index.json").write_bytes(index)
    with pytest.raises(error, match=message):
        resolved(f"oci:{layout.directory}:v1")


def test_missing_blobs_are_told(layout: oci.LayoutBuilder) -> None:
    name = f"oci:{layout.directory}:v1"
    source, image = resolved(name)
    blob = oci.blob_path(layout.directory, image.layers[1].blob_digest)
    blob.unlink()
    with pytest.raises(CorruptImage, match=f"the blob of layer {image.layers[1].blob_digest} is missing"):
        read(source, image.layers[1])
    oci.blob_path(layout.directory, sha256_digest(image.config)).unlink()
    with pytest.raises(CorruptImage, match=r"blobs/sha256/[0-9a-f]{64} is missing"):
        resolved(name)


def test_small_blobs_are_bounded(layout: oci.LayoutBuilder) -> None:
    source, image = resolved(f"oci:{layout.directory}:v1")
    digest = sha256_digest(image.config)
    assert source.get_blob(digest, len(image.config)) == image.config
    with pytest.raises(CorruptImage, match=f"is larger than {len(image.config) - 1} bytes"):
        source.get_blob(digest, len(image.config) - 1)


# Archives


def archive_of(path: Path, members: dict[str, bytes | str]) -> Path:
    """A tar of files; a str is a symlink's target."""
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                out.addfile(info)
            else:
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    return path


def config_of(*diff_ids: str) -> bytes:
    """A config for archives made by hand."""
    return json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": diff_ids}}).encode()


def test_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "saved.tar"
    diff_ids = oci.docker_archive(path, ["app:v1", "other:v2"], TARS, {"Cmd": ["x"]})
    for name in (f"docker-archive:{path}", f"docker-archive:{path}:v1", f"docker-archive:{path}:v2"):
        source, image = resolved(name)
        assert isinstance(source, ArchiveSource)
        assert tuple(layer.diff_id for layer in image.layers) == diff_ids
        assert [read(source, layer) for layer in image.layers] == TARS
        assert [layer.blob_size for layer in image.layers] == [len(tar) for tar in TARS]
        assert json.loads(image.config)["config"] == {"Cmd": ["x"]}


def test_an_archive_of_newer_docker_names_blobs(tmp_path: Path) -> None:
    packed, config = tars.gzipped(TARS[0]), config_of(sha256_digest(TARS[0]))
    blob = f"blobs/sha256/{sha256_digest(packed)[7:]}"
    manifest = [{"Config": "c.json", "RepoTags": None, "Layers": [blob]}]
    path = archive_of(tmp_path / "x", {blob: packed, "c.json": config, "manifest.json": json.dumps(manifest).encode()})
    source, image = resolved(f"docker-archive:{path}")
    (layer,) = image.layers
    assert (layer.blob_digest, layer.diff_id) == (sha256_digest(packed), sha256_digest(TARS[0]))
    assert read(source, layer) == packed


def test_an_old_archive_links_equal_layers(tmp_path: Path) -> None:
    diff_id = sha256_digest(TARS[0])
    manifest = [{"Config": "c.json", "RepoTags": ["a:v1"], "Layers": ["x/layer.tar", "y/layer.tar"]}]
    members: dict[str, bytes | str] = {"x/layer.tar": TARS[0], "y/layer.tar": "../x/layer.tar"}
    members |= {"c.json": config_of(diff_id, diff_id), "manifest.json": json.dumps(manifest).encode()}
    source, image = resolved(f"docker-archive:{archive_of(tmp_path / 'x', members)}")
    assert [layer.blob_size for layer in image.layers] == [len(TARS[0])] * 2
    assert read(source, image.layers[1]) == TARS[0]


def test_an_archive_says_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "saved.tar"
    oci.docker_archive(path, ["app:v1"], TARS)
    with pytest.raises(ImageNotFound, match=f"^image docker-archive:{path}:v9 not found: the archive has: app:v1$"):
        resolved(f"docker-archive:{path}:v9")
    with pytest.raises(ImageNotFound, match=f"cannot open {tmp_path}/none"):
        resolved(f"docker-archive:{tmp_path}/none")
    source, image = resolved(f"docker-archive:{path}")
    stranger = Layer(image.layers[0].diff_id, "sha256:" + "0" * 64, 1, "x")
    with pytest.raises(CorruptImage, match="the archive has no layer sha256:0000"):
        read(source, stranger)


MANIFEST = [{"Config": "c.json", "RepoTags": ["a:v1"], "Layers": ["l"]}]


@pytest.mark.parametrize(
    ("manifest", "config", "message"),
    [
        (b"{", {}, "manifest.json is not JSON"),
        ({"a": 1}, {}, "manifest.json is not a list of dict"),
        ([1], {}, "manifest.json is not a list of dict"),
        ([{"RepoTags": [1]}], {}, "RepoTags is not a list of str"),
        ([{"RepoTags": ["a:v1"]}], {}, "the archive has no None"),
        ([{**MANIFEST[0], "Config": "none"}], {}, "the archive has no none"),
        ([{**MANIFEST[0], "Layers": 3}], {}, "Layers is not a list of str"),
        (MANIFEST, [], "config is not a JSON object"),
        (MANIFEST, {"rootfs": []}, "disagree on the number of layers"),
        (MANIFEST, {"rootfs": {"diff_ids": "x"}}, "diff_ids is not a list of str"),
        (MANIFEST, {"rootfs": {"diff_ids": ["a", "b"]}}, "disagree on the number of layers"),
        (MANIFEST, {"rootfs": {"diff_ids": ["sha256:" + "0" * 64]}}, "the archive has no l$"),
        (MANIFEST, b"no", "config is not JSON"),
    ],
)
def test_bad_archives(tmp_path: Path, manifest: object, config: object, message: str) -> None:
    members: dict[str, bytes | str] = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode()
        for name, value in (("manifest.json", manifest), ("c.json", config))
    }
    path = archive_of(tmp_path / "x", members)
    with pytest.raises(CorruptImage, match=f"^image docker-archive:{path}:v1 is corrupt: .*{message}"):
        resolved(f"docker-archive:{path}:v1")


def test_what_is_no_archive(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"not a tar at all" * 100)
    with pytest.raises(CorruptImage, match="not a docker-archive: "):
        resolved(f"docker-archive:{path}")
    archive_of(path, {"other": b""})
    with pytest.raises(CorruptImage, match=r"the archive has no manifest.json"):
        resolved(f"docker-archive:{path}")


def test_a_truncated_archive_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "saved.tar"
    oci.docker_archive(path, ["app:v1"], [tars.tar_of({"big": b"x" * 100_000})])
    source, image = resolved(f"docker-archive:{path}")
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(CorruptImage):
        read(source, image.layers[0])


def test_a_registry_is_not_local() -> None:
    with pytest.raises(InvalidArgument, match=r"docker.io/library/alpine:latest is not a local image"):
        local_source(parse_image("alpine"))

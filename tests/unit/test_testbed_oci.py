"""The writer of OCI layouts and `docker save` archives."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from typing import TYPE_CHECKING

import pytest
import zstandard

from tests.testbed import oci

if TYPE_CHECKING:
    from pathlib import Path


def make_tar(name: str = "hello.txt", data: bytes = b"hello\n") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def unpacked(blob: bytes, compression: oci.Compression) -> bytes:
    if compression == "gzip":
        return gzip.decompress(blob)
    if compression == "zstd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(blob)
    return blob


@pytest.mark.parametrize("compression", ["gzip", "zstd", "plain"])
def test_one_tar_has_one_diff_id_in_every_encoding(tmp_path: Path, compression: oci.Compression) -> None:
    tar = make_tar(data=b"x" * 3_000_000)
    layer = oci.LayoutBuilder(tmp_path).add_layer(tar, compression)
    blob = oci.blob_path(tmp_path, layer.digest).read_bytes()
    assert unpacked(blob, compression) == tar
    assert (layer.diff_id, layer.tar_size) == (sha256(tar), len(tar))
    assert (layer.digest, layer.size) == (sha256(blob), len(blob))


def test_a_tar_from_a_file_and_from_memory_give_the_same_layer(tmp_path: Path) -> None:
    tar = make_tar(data=bytes(range(256)) * 10_000)
    source = tmp_path / "layer.tar"
    source.write_bytes(tar)
    builder = oci.LayoutBuilder(tmp_path / "layout")
    assert builder.add_layer(tar) == builder.add_layer(source)


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        builder = oci.LayoutBuilder(tmp_path / name)
        image = builder.add_image("latest", [builder.add_layer(make_tar())], {"Cmd": ["/x"]})
        builder.add_index("multi", {oci.AMD64: image, oci.ARM64: image})
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 6
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()


def test_a_tag_reads_back_as_it_was_written(tmp_path: Path) -> None:
    builder = oci.LayoutBuilder(tmp_path)
    layers = [builder.add_layer(make_tar("a")), builder.add_layer(make_tar("b"), "zstd")]
    builder.add_image("v1", layers, {"Env": ["A=b"], "Cmd": ["/x"]}, ("linux", "arm", "v7"))
    image = oci.read_image(tmp_path, "v1")
    assert image.diff_ids == tuple(layer.diff_id for layer in layers)
    assert [layer.digest for layer in image.layers] == [layer.digest for layer in layers]
    assert image.config["config"] == {"Env": ["A=b"], "Cmd": ["/x"]}
    assert image.manifest.platform == ("linux", "arm", "v7")
    assert image.config["variant"] == "v7"
    with pytest.raises(KeyError, match="v2"):
        oci.read_image(tmp_path, "v2")


def test_an_index_is_searched_by_platform(tmp_path: Path) -> None:
    builder = oci.LayoutBuilder(tmp_path)
    amd64 = builder.add_image(None, [builder.add_layer(make_tar("amd64"))])
    arm64 = builder.add_image(None, [builder.add_layer(make_tar("arm64"))], platform=oci.ARM64)
    builder.add_index("multi", {oci.AMD64: amd64, oci.ARM64: arm64})
    assert oci.read_image(tmp_path, "multi").manifest.digest == amd64.digest
    assert oci.read_image(tmp_path, "multi", oci.ARM64).manifest.digest == arm64.digest
    with pytest.raises(KeyError):
        oci.read_image(tmp_path, "multi", ("linux", "riscv64", ""))


def test_docker_media_types(tmp_path: Path) -> None:
    builder = oci.LayoutBuilder(tmp_path)
    image = builder.add_image("docker", [builder.add_layer(make_tar())], docker=True)
    manifest = oci.load_json(tmp_path, image.digest)
    assert manifest["mediaType"] == oci.DOCKER_MANIFEST
    assert manifest["config"]["mediaType"] == oci.DOCKER_CONFIG
    assert manifest["layers"][0]["mediaType"] == "application/vnd.docker.image.rootfs.diff.tar.gzip"
    with pytest.raises(ValueError, match="no media type"):
        builder.add_image("docker", [builder.add_layer(make_tar(), "zstd")], docker=True)


def test_a_docker_archive_holds_its_layers(tmp_path: Path) -> None:
    tars = [make_tar("a"), make_tar("b")]
    second = tmp_path / "b.tar"
    second.write_bytes(tars[1])
    diff_ids = oci.docker_archive(tmp_path / "saved.tar", ["app:1"], [tars[0], second], {"Cmd": ["/x"]})
    assert diff_ids == tuple(map(sha256, tars))
    with tarfile.open(tmp_path / "saved.tar") as saved:

        def read(name: str) -> bytes:
            member = saved.extractfile(name)
            assert member is not None
            return member.read()

        (entry,) = json.loads(read("manifest.json"))
        assert entry["RepoTags"] == ["app:1"]
        assert [read(name) for name in entry["Layers"]] == tars
        config = read(entry["Config"])
    assert entry["Config"] == f"{hashlib.sha256(config).hexdigest()}.json"
    assert json.loads(config)["rootfs"]["diff_ids"] == list(diff_ids)

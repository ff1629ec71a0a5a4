"""The images of the testbed, unpacked by umoci as a witness from outside."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.testbed import build, capabilities, layertar, oci

if TYPE_CHECKING:
    from pathlib import Path

    from tests.testbed.images import BusyboxImage, DebianImage, EveryKindImage

pytestmark = pytest.mark.root


def unpack(layout: Path, tag: str, bundle: Path) -> Path:
    capabilities.require("umoci")
    build.run(["umoci", "unpack", "--image", f"{layout}:{tag}", bundle])
    return bundle / "rootfs"


def test_busybox_unpacks_to_its_facts(busybox_image: BusyboxImage, tmp_path: Path) -> None:
    root = unpack(busybox_image.layout, "gzip", tmp_path / "bundle")
    for path, data in busybox_image.present.items():
        assert (root / path[1:]).read_bytes() == data
    for path in busybox_image.absent:
        assert not (root / path[1:]).exists()
    assert (root / "tmp").stat().st_mode & 0o7777 == 0o1777
    home = (root / "home/app").stat()
    assert (home.st_uid, home.st_gid) == busybox_image.user[:2]
    assert subprocess.run(["chroot", root, "/bin/true"], check=False).returncode == 0


def test_busybox_has_one_set_of_diff_ids_in_all_encodings(busybox_image: BusyboxImage) -> None:
    images = [oci.read_image(busybox_image.layout, tag) for tag in ("latest", "gzip", "entry", "multi", "docker")]
    assert len({image.diff_ids for image in images}) == 1
    assert [layer.media_type.rpartition("+")[2] for layer in images[0].layers][:2] == ["gzip", "zstd"]
    arm64 = oci.read_image(busybox_image.layout, "arm64only", oci.ARM64)
    assert arm64.diff_ids[:3] == images[0].diff_ids
    assert arm64.config["architecture"] == "arm64"
    with pytest.raises(KeyError):
        oci.read_image(busybox_image.layout, "arm64only")


def test_every_kind_is_one_layer_with_expectations(every_kind_image: EveryKindImage) -> None:
    (layer,) = every_kind_image.layers
    assert oci.blob_path(every_kind_image.layout, layer.digest).stat().st_size == layer.size
    assert len(every_kind_image.expected) > 20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_debian_unpacks(debian_image: DebianImage, tmp_path: Path) -> None:
    root = unpack(debian_image.layout, debian_image.tag, tmp_path / "bundle")
    for path in debian_image.present:
        assert (root / path[1:]).exists()
    release = subprocess.run(["chroot", root, "cat", "/etc/debian_version"], check=True, capture_output=True, text=True)
    assert release.stdout.startswith("12.")
    assert (root / "etc/resolv.conf").read_text() == ""


def test_an_overlay_diff_becomes_whiteouts(tmp_path: Path) -> None:
    """umoci applies what we wrote to the lower layer, and the merged tree has to come out."""
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for path in ("gone/deep/file", "kept/file", "replaced/old", "renamed"):
        (lower / path).parent.mkdir(parents=True, exist_ok=True)
        (lower / path).write_text(path)
    for name in ("bin", "lib", "lib64", "usr/bin"):
        (lower / name).mkdir(parents=True)
    build.run(["cp", "/bin/busybox", lower / "bin/sh"])
    for applet in ("rm", "mv", "mkdir"):
        (lower / "bin" / applet).symlink_to("sh")
    for name in ("proc", "dev", "tmp", "run", "etc/apt"):
        (lower / name).mkdir(parents=True)
    (lower / "etc/resolv.conf").touch()
    commands = "rm -r /gone; rm -r /replaced; mkdir /replaced; echo new >/replaced/new; mv /renamed /kept/renamed"
    build.run_in_overlay(commands, [lower], upper)
    builder = oci.LayoutBuilder(tmp_path / "layout")
    layers = []
    for tree in (lower, upper):
        layertar.write_layer(tree, tmp_path / "layer.tar")
        layers.append(builder.add_layer(tmp_path / "layer.tar"))
    builder.add_image("latest", layers)
    root = unpack(builder.directory, "latest", tmp_path / "bundle")
    assert not (root / "gone").exists()
    assert not (root / "renamed").exists()
    assert sorted(path.name for path in (root / "replaced").iterdir()) == ["new"]
    assert sorted(path.name for path in (root / "kept").iterdir()) == ["file", "renamed"]
    assert (root / "etc/resolv.conf").read_text() == ""

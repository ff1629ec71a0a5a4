"""From a reference to an image: indexes, platforms, and manifests that make no sense."""

import json
from collections.abc import Mapping
from typing import Any

import pytest

from afs.core.digests import sha256_digest
from afs.core.images import Platform
from afs.layerstore.errors import CorruptImage, NotAnImage, PlatformMissing
from afs.layerstore.manifests import Image, build_image, image_key, resolve
from afs.layerstore.platforms import preferred
from tests.testbed import oci

AMD64 = Platform("linux", "amd64")
NAME = "registry.example.com/app:v1"
D1, D2 = (f"sha256:{number:064d}" for number in (1, 2))
Json = dict[str, Any]


class Source:
    """Documents by digest and tag; the real thing's contract without a network."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []

    def add(self, document: object, tag: str = "") -> str:
        """Store *document* and return its digest."""
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = sha256_digest(data)
        self.blobs[digest] = data
        if tag:
            self.blobs[tag] = data
        return digest

    def config(self, platform: Platform = AMD64, diff_ids: object = (D1,), **changes: object) -> str:
        """An image config."""
        given = {"os": platform.os, "architecture": platform.architecture}
        if platform.variant:
            given["variant"] = platform.variant
        return self.add({**given, "rootfs": {"type": "layers", "diff_ids": diff_ids}, **changes})

    def manifest(self, config: str, *, tag: str = "", layers: object = None, **changes: object) -> str:
        """A manifest with one layer."""
        size = len(self.blobs.get(config, b""))
        return self.add(manifest_of(config, layers, size=size, **changes), tag)

    def image(self, platform: Platform = AMD64, tag: str = "", **config: object) -> str:
        """An image of one layer; its manifest's digest."""
        return self.manifest(self.config(platform, **config), tag=tag)

    def index(self, images: Mapping[str, Platform | None], tag: str = "", media_type: str = oci.OCI_INDEX) -> str:
        """An index of manifests by digest."""
        entries: list[Json] = []
        for digest, platform in images.items():
            entry: Json = {"mediaType": oci.OCI_MANIFEST, "digest": digest, "size": len(self.blobs.get(digest, b""))}
            if platform is not None:
                entry["platform"] = {"os": platform.os, "architecture": platform.architecture}
                if platform.variant:
                    entry["platform"]["variant"] = platform.variant
            entries.append(entry)
        return self.add({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}, tag)

    def get(self, reference: str, limit: int = 1 << 20) -> bytes:
        """For `resolve`."""
        self.asked.append(reference)
        return self.blobs[reference]

    def resolve(self, reference: str = "v1", platform: Platform = AMD64) -> Image:
        """What *reference* leads to."""
        return resolve(NAME, reference, platform, self.get, self.get, 77)


GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def manifest_of(config: str, layers: object = None, size: int = 1, **changes: object) -> Json:
    """A manifest document."""
    return {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": {"mediaType": oci.OCI_CONFIG, "digest": config, "size": size},
        "layers": layers if layers is not None else [{"mediaType": GZIP, "digest": D2, "size": 5}],
        **changes,
    }


@pytest.fixture
def source() -> Source:
    """An empty source."""
    return Source()


def test_a_plain_manifest(source: Source) -> None:
    digest = source.image(tag="v1")
    image = source.resolve()
    assert (image.key, image.manifest_digest, image.resolved_unix) == (f"{NAME} linux/amd64", digest, 77)
    (layer,) = image.layers
    assert (layer.diff_id, layer.blob_digest, layer.blob_size) == (D1, D2, 5)
    assert image.index == b""
    assert image.key == image_key(NAME, AMD64)


@pytest.mark.parametrize("media_type", [oci.OCI_INDEX, oci.DOCKER_INDEX])
def test_an_index_is_followed(source: Source, media_type: str) -> None:
    wanted, other = source.image(), source.image(Platform("linux", "s390x"))
    index = source.index({other: Platform("linux", "s390x"), wanted: AMD64}, "v1", media_type)
    image = source.resolve()
    assert image.manifest_digest == wanted
    assert sha256_digest(image.index) == index
    assert other not in source.asked


def test_an_index_may_lead_to_an_index(source: Source) -> None:
    wanted = source.image()
    inner = source.index({wanted: AMD64})
    source.index({inner: AMD64}, "v1")
    assert source.resolve().manifest_digest == wanted


def test_indexes_without_end_are_refused(source: Source) -> None:
    digest = source.image()
    for _ in range(4):
        digest = source.index({digest: AMD64}, "v1")
    with pytest.raises(CorruptImage, match="its indexes are nested too deeply"):
        source.resolve()


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("v8", "v7"), ("v7", "v7"), ("v6", "v6"), ("", "v7")],
)
def test_the_nearest_older_variant_wins(source: Source, wanted: str, found: str) -> None:
    images = {Platform("linux", "arm", v): source.image(Platform("linux", "arm", v)) for v in ("v5", "v6", "v7")}
    source.index({digest: platform for platform, digest in images.items()}, "v1")
    image = source.resolve(platform=Platform("linux", "arm", wanted))
    assert image.manifest_digest == images[Platform("linux", "arm", found)]


def test_no_variant_beats_another_one(source: Source) -> None:
    arm = Platform("linux", "arm64")
    plain, v9 = source.image(arm), source.image(Platform("linux", "arm64", "v9"))
    source.index({v9: Platform("linux", "arm64", "v9"), plain: arm}, "v1")
    assert source.resolve(platform=Platform("linux", "arm64", "v8")).manifest_digest == plain
    assert source.resolve(platform=arm).manifest_digest == plain
    assert source.resolve(platform=Platform("linux", "arm64", "v9")).manifest_digest == v9


def test_a_missing_platform_names_those_that_are_there(source: Source) -> None:
    arm = Platform("linux", "arm64", "v8")
    attestation = Platform("unknown", "unknown")
    source.index({source.image(arm): arm, D1: attestation, source.image(Platform("linux", "riscv64")): None}, "v1")
    with pytest.raises(PlatformMissing) as caught:
        source.resolve()
    assert caught.value.line == f"image {NAME} has no platform linux/amd64; it has: linux/arm64/v8"
    source.image(arm, tag="single")
    with pytest.raises(PlatformMissing, match=r"has no platform linux/amd64; it has: linux/arm64/v8$"):
        source.resolve("single")
    with pytest.raises(PlatformMissing, match=r"has no platform linux/arm64/v7; it has: linux/arm64/v8$"):
        source.resolve("single", Platform("linux", "arm64", "v7"))


def test_an_empty_index(source: Source) -> None:
    source.index({}, "v1")
    with pytest.raises(PlatformMissing, match="it has: none"):
        source.resolve()


# Digests


def test_every_document_is_checked_against_its_digest(source: Source) -> None:
    config = source.config()
    digest = source.manifest(config)
    index = source.index({digest: AMD64}, "v1")
    good = dict(source.blobs)
    for broken, what in ((index, "manifest"), (digest, "manifest"), (config, "config")):
        source.blobs = {**good, broken: good[broken] + b" "}
        actual = sha256_digest(good[broken] + b" ")
        with pytest.raises(CorruptImage) as caught:
            source.resolve(index)
        assert caught.value.line == f"image {NAME} is corrupt: its {what} should be {broken} but is {actual}"
    source.blobs = good
    assert source.resolve(index).manifest_digest == digest


def test_what_pins_an_image(source: Source) -> None:
    manifest, other = source.image(), source.image(Platform("linux", "s390x"))
    index = source.index({manifest: AMD64, other: Platform("linux", "s390x")}, "v1")
    image = source.resolve()
    assert image.is_pinned_by(manifest)
    assert image.is_pinned_by(index)
    assert not image.is_pinned_by(other)
    assert not image.is_pinned_by(D1)
    assert not image.is_pinned_by(sha256_digest(b""))
    foreign = source.blobs[source.index({other: Platform("linux", "s390x")})]
    lying = build_image(NAME, AMD64, image.manifest, image.config, 0, foreign)
    assert not lying.is_pinned_by(sha256_digest(foreign))
    assert lying.is_pinned_by(manifest)


# What makes no sense


def test_schema_1_is_told(source: Source) -> None:
    source.add({"schemaVersion": 1, "name": "x", "fsLayers": []}, "v1")
    with pytest.raises(NotAnImage, match=f"^{NAME} is not an image that can run: .*schema 1"):
        source.resolve()


def test_an_artifact_is_told(source: Source) -> None:
    config = {"mediaType": "application/vnd.example.config", "digest": D1, "size": 2}
    source.add({**manifest_of(D1), "config": config}, "v1")
    with pytest.raises(NotAnImage, match=r"its config is of type application/vnd.example.config"):
        source.resolve()


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ],
)
def test_layers_that_registries_do_not_hold_are_told(source: Source, media_type: str) -> None:
    layers = [{"mediaType": media_type, "digest": D2, "size": 5}]
    source.manifest(source.config(), tag="v1", layers=layers)
    with pytest.raises(NotAnImage, match=f"layer {D2} is of type {media_type}".replace("+", r"\+")):
        source.resolve()


@pytest.mark.parametrize(
    ("media_type", "why"),
    [
        (f"{GZIP}+encrypted", "which needs a key to read"),
        ("application/vnd.in-toto+json", "which is no layer of a file system"),
        ("", "which is no layer of a file system"),
    ],
)
def test_layers_of_other_types_are_told(source: Source, media_type: str, why: str) -> None:
    source.manifest(source.config(), tag="v1", layers=[{"mediaType": media_type, "digest": D2, "size": 5}])
    with pytest.raises(NotAnImage) as caught:
        source.resolve()
    assert caught.value.line == f"{NAME} is not an image that can run: layer {D2} is of type {media_type}, {why}"


@pytest.mark.parametrize("size", [0, -1, "399", 399.5, True])
def test_a_size_that_is_not_the_content_s_is_told(source: Source, size: object) -> None:
    config = source.config()
    manifest = manifest_of(config)
    source.add({**manifest, "config": {**manifest["config"], "size": size}}, "v1")
    length = len(source.blobs[config])
    with pytest.raises(CorruptImage, match=f"its config {config} has {length} bytes, but {size!r} by its descriptor"):
        source.resolve()
    digest = source.image()
    entry = {"mediaType": oci.OCI_MANIFEST, "digest": digest, "size": size, "platform": {"os": "linux"}}
    entry["platform"] = {"os": "linux", "architecture": "amd64"}
    source.add({"mediaType": oci.OCI_INDEX, "manifests": [entry]}, "v1")
    with pytest.raises(CorruptImage, match=f"its manifest {digest} has .* bytes, but {size!r} by its descriptor"):
        source.resolve()


def test_inline_data_is_not_needed(source: Source) -> None:
    config = source.config()
    manifest = manifest_of(config, size=len(source.blobs[config]))
    manifest["config"]["data"] = "bm90IHdoYXQgaXQgc2F5cw=="
    source.add(manifest, "v1")
    assert source.resolve().config == source.blobs[config]


def test_a_document_of_two_kinds_is_refused(source: Source) -> None:
    index = json.loads(source.blobs[source.index({source.image(): AMD64})])
    others: list[Json] = [manifest_of(source.config()), {"layers": []}]
    for more in others:
        source.add({**more, **index}, "v1")
        with pytest.raises(CorruptImage, match="one document is an index and a manifest at once"):
            source.resolve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"}, "schema 1"),
        (
            {"mediaType": "application/vnd.oci.artifact.manifest.v1+json"},
            "its manifest is of type application/vnd.oci.art",
        ),
        (
            {
                "artifactType": "application/vnd.example.sbom",
                "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": D1, "size": 2},
            },
            "it is an artifact of type application/vnd.example.sbom",
        ),
    ],
)
def test_manifests_of_other_kinds_are_told(source: Source, changes: Json, message: str) -> None:
    source.add({**manifest_of(D1), **changes}, "v1")
    with pytest.raises(NotAnImage, match=f"^{NAME} is not an image that can run: .*{message}"):
        source.resolve()


# Entries that an index says little about


def test_entries_without_a_platform_are_looked_into(source: Source) -> None:
    arm, wanted = source.image(Platform("linux", "arm64")), source.image()
    artifact = source.add({**manifest_of(D1), "config": {"mediaType": "x", "digest": D1, "size": 1}})
    source.index({artifact: None, arm: None, wanted: None}, "v1")
    assert source.resolve().manifest_digest == wanted
    source.index({arm: None, source.index({wanted: AMD64}): None}, "v1")
    assert source.resolve().manifest_digest == wanted


def test_a_platform_wins_over_none(source: Source) -> None:
    first, wanted = source.image(), source.image(Variant="x")
    source.index({first: None, wanted: AMD64}, "v1")
    assert source.resolve().manifest_digest == wanted
    assert first not in source.asked


def test_an_index_of_strangers_is_not_followed_for_ever(source: Source) -> None:
    others = {source.image(Platform("linux", "s390x"), n=number): None for number in range(17)}
    source.index(others, "v1")
    with pytest.raises(CorruptImage, match="its indexes lead to more than 16 documents"):
        source.resolve()


def test_attestations_and_artifacts_of_an_index_are_passed_over(source: Source) -> None:
    wanted = source.image()
    entries = [
        {
            "mediaType": oci.OCI_MANIFEST,
            "digest": D1,
            "size": 1,
            "platform": {"os": "unknown", "architecture": "unknown"},
        },
        {"mediaType": "application/vnd.example", "digest": D2, "size": 1},
        {"mediaType": oci.OCI_MANIFEST, "digest": wanted, "size": len(source.blobs[wanted])},
    ]
    source.add({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": entries}, "v1")
    assert source.resolve().manifest_digest == wanted
    assert source.asked == ["v1", wanted, json.loads(source.blobs[wanted])["config"]["digest"]]


def platforms(*names: str) -> list[Platform]:
    """Written like arm/v7."""
    return [Platform("linux", *name.split("/")) for name in names]


@pytest.mark.parametrize(
    ("wanted", "order"),
    [
        ("amd64", ["amd64", "386"]),
        ("amd64/v3", ["amd64/v3", "amd64/v2", "amd64", "386"]),
        ("arm", ["arm/v7", "arm/v6", "arm/v5"]),
        ("arm/v6", ["arm/v6", "arm/v5"]),
        ("armhf", ["arm/v7", "arm/v6", "arm/v5"]),
        ("arm64", ["arm64", "arm/v8", "arm/v7", "arm/v6", "arm/v5"]),
        ("aarch64/v8", ["arm64", "arm/v8", "arm/v7", "arm/v6", "arm/v5"]),
        ("arm64/v8.2", ["arm64/v8.2", "arm64/v8.1", "arm64", "arm/v8", "arm/v7", "arm/v6", "arm/v5"]),
        ("s390x", ["s390x"]),
        ("riscv64/odd", ["riscv64/odd"]),
    ],
)
def test_the_order_is_containerd_s(wanted: str, order: list[str]) -> None:
    assert preferred(*platforms(wanted)) == platforms(*order)


def test_the_newest_arm_runs_what_older_ones_do() -> None:
    found = preferred(Platform("linux", "arm64", "v9.1"))
    v8 = [f"arm64/v8.{number}" for number in range(6, 0, -1)]
    assert found == platforms("arm64/v9.1", "arm64/v9", *v8, "arm64", "arm/v8", "arm/v7", "arm/v6", "arm/v5")


def test_a_manifest_that_an_older_processor_needs_is_taken(source: Source) -> None:
    source.image(Platform("linux", "arm", "v6"), tag="single")
    assert source.resolve("single", Platform("linux", "arm", "v7")).key.endswith("linux/arm/v7")
    with pytest.raises(PlatformMissing, match=r"has no platform linux/arm/v5; it has: linux/arm/v6$"):
        source.resolve("single", Platform("linux", "arm", "v5"))


GOOD_LAYER = {"mediaType": GZIP, "digest": D2, "size": 5}


@pytest.mark.parametrize(
    ("layers", "diff_ids", "message"),
    [
        ([GOOD_LAYER], [], r"disagree on the number of layers \(1 in the manifest\)"),
        ([GOOD_LAYER], [D1, D2], "disagree on the number of layers"),
        ([], [D1], r"disagree on the number of layers \(0 in the manifest\)"),
        ([GOOD_LAYER], None, "disagree on the number of layers"),
        ([GOOD_LAYER], ["x"], f"layer {D2} has a bad diff_id or size"),
        ([GOOD_LAYER | {"size": -1}], [D1], "has a bad diff_id or size"),
        ([GOOD_LAYER | {"size": "5"}], [D1], "has a bad diff_id or size"),
        ([GOOD_LAYER | {"size": None}], [D1], "has a bad diff_id or size"),
        ([GOOD_LAYER | {"digest": "../../x"}], [D1], "not a sha256 digest: '../../x'"),
        (["x"], [D1], "'layers' is not a list of descriptors"),
        ({}, [D1], "'layers' is not a list of descriptors"),
    ],
)
def test_layers_that_make_no_sense(source: Source, layers: object, diff_ids: object, message: str) -> None:
    source.manifest(source.config(diff_ids=diff_ids), tag="v1", layers=layers)
    with pytest.raises(CorruptImage, match=message):
        source.resolve()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"", "manifest is not JSON"),
        (b"<html>", "manifest is not JSON"),
        (b"\xff", "manifest is not JSON"),
        ([], "manifest is not a JSON object"),
        ({}, "its manifest has no config"),
        ({"config": []}, "its manifest has no config"),
        ({"config": {"mediaType": oci.OCI_CONFIG}}, "not a sha256 digest: ''"),
        ({"mediaType": oci.OCI_INDEX}, "'manifests' is not a list of descriptors"),
        ({"manifests": [1]}, "'manifests' is not a list of descriptors"),
        (
            {"manifests": [{"platform": {"os": "linux", "architecture": "amd64"}, "digest": "/etc/passwd"}]},
            "not a sha256 digest: '/etc/passwd'",
        ),
    ],
)
def test_manifests_that_make_no_sense(source: Source, document: object, message: str) -> None:
    source.add(document, "v1")
    with pytest.raises(CorruptImage, match=f"^image {NAME} is corrupt: {message}"):
        source.resolve()


@pytest.mark.parametrize(("config", "message"), [(b"no", "config is not JSON"), ([], "config is not a JSON object")])
def test_configs_that_make_no_sense(source: Source, config: object, message: str) -> None:
    source.manifest(source.add(config), tag="v1")
    with pytest.raises(CorruptImage, match=message):
        source.resolve()


def test_an_image_without_layers_is_legal(source: Source) -> None:
    source.manifest(source.config(diff_ids=[]), tag="v1", layers=[])
    assert source.resolve().layers == ()

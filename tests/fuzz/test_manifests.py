"""Manifests, indexes, configs and Docker's file of credentials, of arbitrary JSON: an answer or a typed error."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from afs.core.digests import is_digest, sha256_digest
from afs.core.errors import AfsError
from afs.core.images import Platform
from afs.layerstore import manifests
from afs.layerstore.errors import RegistryMisconfigured
from afs.layerstore.registrycredentials import CredentialFile
from tests.fuzz.effort import examples

NAME = "registry.example/hostile:v1"
PLATFORM = Platform("linux", "amd64")
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
D1 = "sha256:" + "1" * 64
TEXT = st.text(st.characters(), max_size=8)  # lone surrogates too: JSON can say them
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just(D1)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
AUTHS = st.one_of(TEXT, st.binary(max_size=12).map(lambda data: base64.b64encode(data).decode()))
DIGESTS = st.one_of(st.just(D1), st.just("sha256:" + "F" * 64), st.just("../../etc"), JSON)


def close_to(good: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """*good* with some of its fields replaced or missing; a strategy among its values is drawn from."""

    def one(value: Any) -> st.SearchStrategy[Any]:
        usual = value if isinstance(value, st.SearchStrategy) else st.just(value)
        return st.one_of(usual, usual, usual, JSON)

    return st.fixed_dictionaries({}, optional={key: one(value) for key, value in good.items()})


PLATFORMS = close_to({"os": "linux", "architecture": "amd64", "variant": "v8"})
LAYERS = st.lists(close_to({"mediaType": LAYER_TYPE, "digest": DIGESTS, "size": 5}), max_size=3)
CONFIGS = close_to(
    {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": close_to({"type": "layers", "diff_ids": st.lists(DIGESTS, max_size=3)}),
    }
)
DESCRIPTORS = st.lists(close_to({"digest": DIGESTS, "platform": PLATFORMS, "size": 1}), max_size=3)
INDEXES = close_to({"mediaType": manifests.INDEX_TYPES[0], "manifests": DESCRIPTORS})


def dumped(value: Any) -> bytes:
    """*value* as JSON; NaN and Infinity too, as Python writes and reads them."""
    return json.dumps(value).encode()


def image_or_error(manifest: bytes, config: bytes) -> manifests.Image | None:
    """What build_image makes of the two; any error must be one of ours."""
    try:
        image = manifests.build_image(NAME, PLATFORM, manifest, config, 0)
    except AfsError:
        return None
    for layer in image.layers:
        assert is_digest(layer.diff_id)
        assert is_digest(layer.blob_digest)
        assert 0 <= layer.blob_size < 1 << 62
    return image


@examples(200)
@given(CONFIGS, LAYERS, st.one_of(st.just(manifests.CONFIG_TYPES[0]), JSON))
def test_manifests_and_configs(config: dict[str, Any], layers: list[dict[str, Any]], media_type: Any) -> None:
    data = dumped(config)
    descriptor = {"mediaType": media_type, "digest": sha256_digest(data), "size": len(data)}
    image_or_error(dumped({"schemaVersion": 2, "config": descriptor, "layers": layers}), data)


@examples(100)
@given(st.one_of(JSON, close_to({"schemaVersion": 2, "config": JSON, "layers": LAYERS, "manifests": JSON})), JSON)
def test_any_json(manifest: Any, config: Any) -> None:
    image_or_error(dumped(manifest), dumped(config))


@examples(100)
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_any_bytes(manifest: bytes, config: bytes) -> None:
    image_or_error(manifest, config)


@examples(200)
@given(INDEXES, st.one_of(st.just(b"{}"), JSON.map(dumped), INDEXES.map(dumped)))
def test_indexes(index: dict[str, Any], inner: bytes) -> None:
    asked: list[str] = []

    def get_manifest(reference: str) -> bytes:
        asked.append(reference)
        return dumped(index) if len(asked) == 1 else inner

    def get_blob(digest: str, most: int) -> bytes:
        raise AssertionError("no config can have this digest")

    with pytest.raises(AfsError) as caught:
        manifests.resolve(NAME, "v1", PLATFORM, get_manifest, get_blob, 0)
    assert len(asked) <= 6
    assert caught.value.line


@examples(150)
@given(
    st.one_of(
        JSON,
        close_to(
            {
                "auths": close_to(
                    {
                        "registry.example": close_to(
                            {"auth": AUTHS, "username": TEXT, "password": TEXT, "registrytoken": TEXT}
                        )
                    },
                ),
            }
        ),
    )
)
def test_docker_config(tmp_path_factory: pytest.TempPathFactory, config: Any) -> None:
    path = tmp_path_factory.mktemp("docker") / "config.json"
    path.write_bytes(dumped(config))
    try:
        found = CredentialFile(path).find("registry.example")
    except RegistryMisconfigured:
        return
    for header in (found.basic, found.registry_token):
        assert header.isascii()
        assert not header or header.isprintable()


def test_a_good_one_is_an_image() -> None:
    config = dumped({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": [D1]}})
    descriptor = {"mediaType": manifests.CONFIG_TYPES[0], "digest": sha256_digest(config)}
    found = image_or_error(
        dumped({"config": descriptor, "layers": [{"digest": D1, "size": 1, "mediaType": LAYER_TYPE}]}), config
    )
    assert found is not None
    assert len(found.layers) == 1
    deep = b"[" * 100_000
    assert image_or_error(deep, deep) is None

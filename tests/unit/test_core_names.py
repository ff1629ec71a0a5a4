"""Names and numbers as people write them: images, digests, platforms, sizes and durations."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afs.core.digests import chain_ids, check_digest, hex_of, is_digest, sha256_digest
from afs.core.errors import InvalidArgument
from afs.core.images import ImageRef, Platform, host, parse_image, parse_platform
from afs.core.units import format_size, parse_duration, parse_size

REPEATABLE = settings(derandomize=True, deadline=None, database=None)
A, B, C = (f"sha256:{number:064d}" for number in (1, 2, 3))


# Digests


def test_chain_ids_are_those_of_sha256sum() -> None:
    """The constants come from ``printf '%s %s' CHAIN DIFF_ID | sha256sum``."""
    second = "sha256:e0213565073dd272477933ef550455db21856966e444074f1492aef0939305ac"
    third = "sha256:af4149e65a6923bb39782a876ce40a7c3b08fc85ec732e9efcc661d9399016d0"
    assert chain_ids([A, B, C]) == [A, second, third]
    assert chain_ids([]) == []


def test_the_digest_of_nothing_is_known() -> None:
    empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_digest(b"") == empty
    assert hex_of(empty) == empty[7:]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "0" * 64,
        A[:-1],
        A + "0",
        A.upper(),
        A + "\n",
        " " + A,
        "sha512:" + "0" * 128,
        "sha256:" + "g" * 64,
    ],
)
def test_what_is_no_digest_is_refused(text: str) -> None:
    assert not is_digest(text)
    for check in (check_digest, hex_of):
        with pytest.raises(InvalidArgument, match=re.escape(f"not a sha256 digest: {text!r}")):
            check(text)


# Images

LONG_TAG = "t" * 128


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("alpine", "", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "", "docker.io/library/alpine:3.20"),
        ("alpine", "3.20", "docker.io/library/alpine:3.20"),
        ("alpine:3.20", "3.20", "docker.io/library/alpine:3.20"),
        ("org/app", "", "docker.io/org/app:latest"),
        ("docker.io/alpine", "", "docker.io/library/alpine:latest"),
        ("docker.io/library/alpine", "", "docker.io/library/alpine:latest"),
        ("index.docker.io/alpine", "", "docker.io/library/alpine:latest"),
        ("index.docker.io/org/app", "", "docker.io/org/app:latest"),
        ("registry.example.com/org/app:v1", "", "registry.example.com/org/app:v1"),
        ("example.com/app", "", "example.com/app:latest"),
        ("localhost/app", "", "localhost/app:latest"),
        ("localhost:5000/app:v1", "", "localhost:5000/app:v1"),
        ("127.0.0.1:5000/swe:v1", "", "127.0.0.1:5000/swe:v1"),
        ("[::1]:5000/app", "", "[::1]:5000/app:latest"),
        ("host:5000/a/b/c", "x", "host:5000/a/b/c:x"),
        ("a/b__c-d.e_f/g--h", "", "docker.io/a/b__c-d.e_f/g--h:latest"),
        (f"alpine@{A}", "", f"docker.io/library/alpine@{A}"),
        (f"alpine:3.20@{A}", "", f"docker.io/library/alpine@{A}"),
        (f"alpine@{A}", "3.20", f"docker.io/library/alpine@{A}"),
        (f"alpine@{A}", A, f"docker.io/library/alpine@{A}"),
        ("alpine", A, f"docker.io/library/alpine@{A}"),
        ("alpine:3.20", A, f"docker.io/library/alpine@{A}"),
        (f"app:{LONG_TAG}", "", f"docker.io/library/app:{LONG_TAG}"),
        ("app:_x.Y-1", "", "docker.io/library/app:_x.Y-1"),
        ("oci:/dir", "", "oci:/dir"),
        ("oci:/dir/", "", "oci:/dir"),
        ("oci:/", "", "oci:/"),
        ("oci:/dir:v1", "", "oci:/dir:v1"),
        ("oci:/dir", "v1", "oci:/dir:v1"),
        ("oci:/dir:v1", "v1", "oci:/dir:v1"),
        ("oci:/with:colon/dir:v1", "", "oci:/with:colon/dir:v1"),
        ("oci:/with space/ü", "", "oci:/with space/ü"),
        (f"oci:/dir@{A}", "", f"oci:/dir@{A}"),
        (f"oci:/dir:v1@{A}", "", f"oci:/dir@{A}"),
        (f"oci:/dir@{A}", "v1", f"oci:/dir@{A}"),
        ("oci:/dir", A, f"oci:/dir@{A}"),
        ("docker-archive:/a/save.tar", "", "docker-archive:/a/save.tar"),
        ("docker-archive:/a/save.tar:v1", "", "docker-archive:/a/save.tar:v1"),
        # These begin like a scheme and are registry images all the same.
        ("docker:/x", "", None),
        ("oci/app", "", "docker.io/oci/app:latest"),
        ("oci", "", "docker.io/library/oci:latest"),
    ],
)
def test_image_names(name: str, tag: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(InvalidArgument):
            parse_image(name, tag)
        return
    ref = parse_image(name, tag)
    assert str(ref) == expected
    assert parse_image(expected) == ref
    assert bool(ref.tag) + bool(ref.digest) == 1 or (ref.is_local and not ref.tag + ref.digest)


@pytest.mark.parametrize(
    ("name", "tag", "message"),
    [
        ("", "", "no image given"),
        ("Alpine", "", "not an image name: 'Alpine'"),
        ("al pine", "", "not an image name"),
        ("a//b", "", "not an image name"),
        ("/a", "", "not an image name"),
        ("a/", "", "not an image name"),
        ("../a", "", "not an image name"),
        ("example.com/../a", "", "not an image name"),
        ("example.com/", "", "not an image name"),
        ("example.com:port/a", "", "not an image name"),
        ("ex_ample.com/a", "", "not an image name"),
        ("http://example.com/a", "", "not an image name"),
        ("-a", "", "not an image name"),
        ("a.", "", "not an image name"),
        ("alpine:", "", "there is no tag behind the colon"),
        ("alpine:bad tag", "", "'bad tag' is not a tag"),
        ("alpine:.x", "", "'.x' is not a tag"),
        ("alpine", "a/b", "'a/b' is not a tag"),
        (f"app:{LONG_TAG}t", "", "is not a tag"),
        ("alpine@", "", "'' is not a sha256 digest"),
        ("alpine@sha256:12", "", "'sha256:12' is not a sha256 digest"),
        (f"alpine@{A}x", "", "is not a sha256 digest"),
        (f"a@{A}@{A}", "", "is not a sha256 digest"),
        ("alpine", "sha256:12", "not a sha256 digest"),
        ("alpine:1", "2", "image 'alpine:1' and tag '2' name two tags"),
        (f"alpine@{A}", B, f"image 'alpine@{A}' and tag '{B}' name two digests"),
        ("oci:dir", "", "image 'oci:dir': the path must be absolute"),
        ("oci:", "", "the path must be absolute"),
        ("oci:dir:v1", "", "the path must be absolute"),
        ("docker-archive:save.tar", "", "the path must be absolute"),
        ("oci:/dir:", "", "there is no tag behind the colon"),
        ("oci:/dir:a b", "", "'a b' is not a tag"),
        ("oci:/dir:v1", "v2", "name two tags"),
        (f"oci:/dir@{A}", B, "name two digests"),
        ("oci:/dir@x", "", "'x' is not a sha256 digest"),
        ("oci:/dir:v1/", "", "must not hold a colon"),
        ("oci:/dir:x:v1", "", "must not hold a colon"),
    ],
)
def test_bad_image_names(name: str, tag: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(message)):
        parse_image(name, tag)


def test_parts_of_a_registry_name() -> None:
    ref = parse_image("127.0.0.1:5000/org/app:v1")
    assert (ref.registry, ref.repository, ref.tag, ref.digest) == ("127.0.0.1:5000", "org/app", "v1", "")
    assert not ref.is_local
    assert parse_image("docker-archive:/x").is_local


COMPONENT = st.from_regex(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*", fullmatch=True)
HOST = st.one_of(
    st.just("docker.io"),
    st.just("localhost"),
    st.from_regex(r"[a-z0-9]{1,9}\.[a-z]{2,3}(:[1-9][0-9]{0,4})?", fullmatch=True),
    st.from_regex(r"\[[0-9a-f:]{2,9}\](:[1-9][0-9]{0,4})?", fullmatch=True),
)
TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
DIGEST = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)


@REPEATABLE
@given(st.one_of(st.just(""), HOST), st.lists(COMPONENT, min_size=1, max_size=3), st.one_of(st.just(""), TAG), DIGEST)
def test_canonical_names_of_registry_images_are_stable(host_name: str, path: list[str], tag: str, digest: str) -> None:
    name = "/".join([*([host_name] if host_name else []), *path])
    for given_name in (name, f"{name}:{tag}" if tag else name, f"{name}@{digest}"):
        try:
            ref = parse_image(given_name)
        except InvalidArgument:  # a first part with a dot and an underscore is a bad host
            assert not host_name
            assert "." in path[0]
            continue
        assert parse_image(str(ref)) == ref
        assert str(parse_image(str(ref))) == str(ref)


@REPEATABLE
@given(st.sampled_from(["oci", "docker-archive"]), st.text(min_size=1, max_size=20), st.one_of(st.just(""), TAG))
def test_canonical_names_of_local_images_are_stable(scheme: str, path: str, tag: str) -> None:
    try:
        ref = parse_image(f"{scheme}:/{path}", tag)
    except InvalidArgument:
        return
    assert parse_image(str(ref)) == ref


@REPEATABLE
@given(st.text(max_size=60), st.text(max_size=20))
def test_any_text_is_an_image_or_an_invalid_argument(name: str, tag: str) -> None:
    try:
        ref = parse_image(name, tag)
    except InvalidArgument as error:
        assert "\n" not in error.line  # noqa: PT017 - both ends are fine
    else:
        assert isinstance(ref, ImageRef)


# Platforms


def test_platforms() -> None:
    here = host()
    assert here.os == "linux"
    assert here.architecture not in ("x86_64", "aarch64")
    assert parse_platform("", "", "") == here
    assert parse_platform("", "arm", "v7") == Platform("linux", "arm", "v7")
    assert str(Platform("linux", "arm64", "v8")) == "linux/arm64/v8"
    assert str(Platform("linux", "amd64")) == "linux/amd64"


# Units


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("1m30s", 90),
        ("250ms", 0.25),
        ("2h", 7200),
        ("1d", 86400),
        ("1d2h3m4s5ms", 93784.005),
        ("15", 15),
        ("0.5", 0.5),
        ("1.5m", 90),
        (" 3s ", 3),
        ("0", 0),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "s", "-1s", "1x", "1m30", "1 s", "1s 2s", "1e3", "inf", "nan", ".5s"])
def test_bad_durations(text: str) -> None:
    with pytest.raises(InvalidArgument, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("512M", 512 << 20), ("10GiB", 10 << 30), ("1.5k", 1536), ("2 TB", 2 << 40), ("0", 0), ("7b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1x", "G", "1 2", "1GG", "0x10"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(InvalidArgument, match=re.escape(f"not a size: {text!r}")):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (2 << 40, "2.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
    ],
)
def test_sizes_for_people(count: float, text: str) -> None:
    assert format_size(count) == text


@REPEATABLE
@given(st.integers(min_value=0, max_value=1 << 50))
def test_a_size_survives_as_plain_number(count: int) -> None:
    assert parse_size(str(count)) == count

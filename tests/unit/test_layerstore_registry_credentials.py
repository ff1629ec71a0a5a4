"""Docker's configuration file, credential helpers, and the tokens that credentials buy."""

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afs.core.images import parse_image
from afs.layerstore.errors import RegistryDenied, RegistryMisconfigured, RegistryUnreachable
from afs.layerstore.registry import Registries
from afs.layerstore.registryauth import parse_challenge
from afs.layerstore.registrycredentials import NONE, CredentialFile, Credentials
from afs.layerstore.registryoptions import RegistryOptions
from tests.testbed import oci, tars
from tests.testbed.faults import PASSWORD, TOKEN, USER, Fault, FaultServer

HOST = "registry.example.com:5000"
HUB = "https://index.docker.io/v1/"


def auth(name: str = "me", password: str = "secret") -> dict[str, str]:  # noqa: S107
    """An entry of ``auths`` as `docker login` writes it."""
    return {"auth": base64.b64encode(f"{name}:{password}".encode()).decode()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., CredentialFile]:
    """Write a configuration file."""

    def do(document: Any = None, **members: Any) -> CredentialFile:
        text = document if isinstance(document, str) else json.dumps(members)
        (tmp_path / "config.json").write_text(text)
        return CredentialFile(tmp_path / "config.json", helper_timeout=10)

    return do


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a credential helper, a shell script, on PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def make(name: str, script: str) -> None:
        path = tmp_path / "bin" / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


# The file


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (auth("me", "a:b"), Credentials("me", "a:b")),
        ({"username": "me", "password": "secret"}, Credentials("me", "secret")),
        ({**auth("x", "y"), "username": "me", "password": "p"}, Credentials("x", "y")),
        ({**auth("0000", ""), "identitytoken": "id"}, Credentials("0000", "", "id")),
        ({"registrytoken": "reg"}, Credentials(registry_token="reg")),
        ({"email": "x@example.com"}, NONE),
        ({}, NONE),
    ],
)
def test_entries(write: Callable[..., CredentialFile], entry: object, found: Credentials) -> None:
    assert write(auths={HOST: entry}).find(HOST) == found


@pytest.mark.parametrize("key", [HUB, "docker.io", "index.docker.io", "registry-1.docker.io"])
def test_the_names_of_docker_hub(write: Callable[..., CredentialFile], key: str) -> None:
    file = write(auths={key: auth(), "other": auth("other")})
    assert file.find("registry-1.docker.io") == Credentials("me", "secret")
    assert file.find("docker.io") == Credentials("me", "secret")


def test_the_key_of_docker_login_wins(write: Callable[..., CredentialFile]) -> None:
    assert write(auths={"docker.io": auth("x"), HUB: auth()}).find("docker.io").username == "me"


@pytest.mark.parametrize("key", [f"https://{HOST}/v1/", f"http://{HOST}", f"{HOST}/v2/"])
def test_keys_of_old_files(write: Callable[..., CredentialFile], key: str) -> None:
    assert write(auths={"https://[bad": auth("x"), key: auth()}).find(HOST) == Credentials("me", "secret")


def test_credentials_are_a_registry_s_own(write: Callable[..., CredentialFile]) -> None:
    file = write(auths={HOST: auth(), HUB: auth()})
    for other in ("registry.example.com", "registry.example.com:5001", "example.com"):
        assert file.find(other) == NONE


def test_no_file(tmp_path: Path) -> None:
    assert CredentialFile(None).find(HOST) == CredentialFile(tmp_path / "missing").find(HOST) == NONE


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{", "is not JSON: Expecting property name"),
        ("[]", "is not a JSON object"),
        ('{"auths": []}', "has a 'auths' that is not an object"),
        ('{"credHelpers": []}', "has a 'credHelpers' that is not an object"),
        ('{"auths": {"HOST": 3}}', "has an entry for HOST that is not an object of strings"),
        ('{"auths": {"HOST": {"auth": 3}}}', "has an entry for HOST that is not an object of strings"),
        ('{"auths": {"HOST": {"auth": "%%%"}}}', "has an 'auth' for HOST that is not base64 of NAME:PASSWORD"),
        ('{"auths": {"HOST": {"auth": "YQ=="}}}', "has an 'auth' for HOST that is not base64 of NAME:PASSWORD"),
        ('{"credsStore": "../x"}', "names '../x', which is no credential helper"),
        ('{"credsStore": 3}', "names 3, which is no credential helper"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(write: Callable[..., CredentialFile], text: str, cause: str) -> None:
    file = write(text.replace("HOST", HOST))
    with pytest.raises(RegistryMisconfigured) as caught:
        file.find(HOST)
    expected = f"this node's settings for registry {HOST} cannot be used: {file.path} {cause.replace('HOST', HOST)}"
    assert caught.value.line.startswith(expected)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(RegistryMisconfigured, match="cannot be read: Is a directory"):
        CredentialFile(tmp_path).find(HOST)


# Helpers


def test_a_helper_is_asked(
    write: Callable[..., CredentialFile], helper: Callable[[str, str], None], tmp_path: Path
) -> None:
    helper("one", f'[ "$1" = get ] && cat > {tmp_path}/asked && echo \'{{"Username": "u", "Secret": "s"}}\'')
    assert write(credsStore="one").find(HOST) == Credentials("u", "s")
    assert (tmp_path / "asked").read_text() == HOST
    write(credsStore="one").find("registry-1.docker.io")
    assert (tmp_path / "asked").read_text() == HUB


def test_the_order_is_docker_s(write: Callable[..., CredentialFile], helper: Callable[[str, str], None]) -> None:
    helper("one", 'echo \'{"Username": "one", "Secret": "s"}\'')
    helper("store", 'echo \'{"Username": "store", "Secret": "s"}\'')
    file = write(auths={HOST: auth(), "other": auth()}, credsStore="store", credHelpers={HOST: "one"})
    assert file.find(HOST).username == "one"
    assert file.find("other").username == "store"
    assert write(auths={HOST: auth()}, credHelpers={"x": "one"}).find(HOST).username == "me"


def test_a_helper_s_identity_token(write: Callable[..., CredentialFile], helper: Callable[[str, str], None]) -> None:
    helper("one", 'echo \'{"ServerURL": "x", "Username": "<token>", "Secret": "s"}\'')
    assert write(credsStore="one").find(HOST) == Credentials(identity_token="s")


def test_what_a_helper_lacks_may_be_in_the_file(
    write: Callable[..., CredentialFile], helper: Callable[[str, str], None]
) -> None:
    helper("one", "echo credentials not found in native keychain; exit 1")
    assert write(credsStore="one").find(HOST) == NONE
    assert write(credsStore="one", auths={HOST: auth()}).find(HOST).username == "me"


@pytest.mark.parametrize(
    ("script", "cause"),
    [
        ("echo no vault here >&2; exit 3", "that failed: docker-credential-one: status 3: no vault here"),
        ("exit 1", "that failed: docker-credential-one: status 1: no message"),
        ('echo \'{"Username": "hidden"}\'', "whose answer has no Username and Secret: docker-credential-one"),
        ("echo hidden", "whose answer has no Username and Secret: docker-credential-one"),
    ],
)
def test_a_helper_that_fails_is_told(
    write: Callable[..., CredentialFile], helper: Callable[[str, str], None], script: str, cause: str
) -> None:
    helper("one", script)
    with pytest.raises(RegistryMisconfigured) as caught:
        write(credsStore="one").find(HOST)
    assert caught.value.line.endswith(f"config.json names a credential helper {cause}")
    assert "hidden" not in caught.value.line


def test_a_missing_helper_is_told(write: Callable[..., CredentialFile], helper: Callable[[str, str], None]) -> None:
    with pytest.raises(
        RegistryMisconfigured, match=f"{HOST} .*the credential helper docker-credential-none, which is not"
    ):
        write(credHelpers={HOST: "none"}).find(HOST)


def test_a_helper_that_hangs_is_killed_with_its_children(
    write: Callable[..., CredentialFile], helper: Callable[[str, str], None], tmp_path: Path
) -> None:
    helper("one", "sleep 1000 & echo $! > $0.pid; wait")
    file = write(credsStore="one")
    with pytest.raises(RegistryMisconfigured, match=r"docker-credential-one get did not answer within 0.3 s"):
        CredentialFile(file.path, helper_timeout=0.3).find(HOST)
    child = (tmp_path / "bin" / "docker-credential-one.pid").read_text().strip()
    end = time.monotonic() + 10
    while (Path("/proc") / child).exists() and "Z" not in (Path("/proc") / child / "stat").read_text():
        assert time.monotonic() < end


# Tokens


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with an image v1."""
    builder = oci.LayoutBuilder(tmp_path_factory.mktemp("layout"))
    builder.add_image("v1", [builder.add_layer(tars.tar_of({"a": b"x"}))])
    return builder.directory


@pytest.fixture
def opened() -> Iterator[list[Registries]]:
    """Closed afterwards."""
    found: list[Registries] = []
    yield found
    for registries in found:
        registries.close()


@pytest.fixture
def registries(opened: list[Registries], tmp_path: Path) -> Callable[..., Registries]:
    """Registries that read the file that `write` wrote."""

    def make(**options: Any) -> Registries:
        given = RegistryOptions(**{"docker_config": tmp_path / "config.json", "backoff": 0.0, **options})
        opened.append(Registries(given))
        return opened[-1]

    return make


def get(registries: Registries, server: FaultServer, repository: str = "app") -> bytes:
    """A manifest."""
    return registries.source(parse_image(f"{server.address}/{repository}:v1")).get_manifest("v1")


def test_a_token_is_shared_and_lives_as_long_as_it_says(
    layout: Path,
    write: Callable[..., CredentialFile],
    registries: Callable[..., Registries],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for expires_in, life in ((300, 300), (None, 60)):
        with FaultServer(layout, auth="token", expires_in=expires_in) as server:
            write(auths={server.address: auth(USER, PASSWORD)})
            opened = registries()
            get(opened, server)
            get(opened, server)
            assert server.count("/token") == 1
            assert server.count("/manifests/") == 3  # refused once
            now += life - 1
            get(opened, server)
            assert server.count("/token") == 1
            now += 2
            get(opened, server)
            assert server.count("/token") == 2
            get(opened, server, "other")
            assert server.count("/token") == 3


def test_threads_that_are_refused_together_ask_once(
    layout: Path, write: Callable[..., CredentialFile], registries: Callable[..., Registries]
) -> None:
    with FaultServer(layout, auth="token") as server:
        write(auths={server.address: auth(USER, PASSWORD)})
        opened, gate = registries(), threading.Event()
        server.add(Fault("/token", gate=gate))
        threads = [threading.Thread(target=get, args=(opened, server)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while server.count("/manifests/") < 4:
            gate.wait(0.01)
        gate.set()
        for thread in threads:
            thread.join()
        assert server.count("/token") == 1


def test_a_token_is_good_in_another_process(
    layout: Path, write: Callable[..., CredentialFile], registries: Callable[..., Registries]
) -> None:
    with FaultServer(layout, auth="token") as server:
        write(auths={server.address: auth(USER, PASSWORD)})
        first, second = registries(), registries()
        get(first, server)
        grants = json.loads(json.dumps(first.authorizer.export("app")))
        assert first.authorizer.export("other") == []
        second.authorizer.learn([tuple(grant) for grant in grants])
        get(second, server)
        assert server.count("/token") == 1
        assert server.count("/manifests/") == 3


def test_an_identity_token_buys_tokens(
    layout: Path, write: Callable[..., CredentialFile], registries: Callable[..., Registries]
) -> None:
    with FaultServer(layout, auth="token", identity_token="refresh me") as server:
        write(auths={server.address: {**auth("x", "y"), "identitytoken": "refresh me"}})
        get(registries(), server)
        (asked,) = server.requests("/token")
        assert asked.method == "POST"
        assert b"service=testbed&scope=repository%3Aapp%3Apull&client_id=afs&refresh_token=refresh+me" in asked.body
        write(auths={server.address: {"identitytoken": "stale"}})
        with pytest.raises(RegistryDenied, match="the token service answered HTTP 401"):
            get(registries(), server)


def test_a_registry_token_is_used_as_it_is(
    layout: Path, write: Callable[..., CredentialFile], registries: Callable[..., Registries]
) -> None:
    with FaultServer(layout, auth="token") as server:
        write(auths={server.address: {"registrytoken": TOKEN}})
        get(registries(), server)
        assert server.count("/token") == 0


def test_a_new_login_counts_at_once(
    layout: Path, write: Callable[..., CredentialFile], registries: Callable[..., Registries]
) -> None:
    with FaultServer(layout, auth="basic") as server:
        write(auths={server.address: auth("old", "password")})
        opened = registries()
        with pytest.raises(RegistryDenied):
            get(opened, server)
        write(auths={server.address: auth(USER, PASSWORD)})
        get(opened, server)
        get(opened, server, "other")  # one name and password for all repositories: no second refusal
        assert [request.headers.get("authorization") is None for request in server.requests()].count(True) == 1


def test_a_helper_gives_access(
    layout: Path,
    write: Callable[..., CredentialFile],
    helper: Callable[[str, str], None],
    registries: Callable[..., Registries],
) -> None:
    helper("one", f'echo \'{{"Username": "{USER}", "Secret": "{PASSWORD}"}}\'')
    with FaultServer(layout, auth="token") as server:
        write(credHelpers={server.address: "one"})
        get(registries(), server)


def test_a_busy_token_service_is_no_refusal(
    layout: Path, write: Callable[..., CredentialFile], registries: Callable[..., Registries]
) -> None:
    with FaultServer(layout, auth="token") as server:
        write(auths={server.address: auth(USER, PASSWORD)})
        server.add(Fault("/token", times=2, status=503))
        get(registries(), server)
        server.add(Fault("/token", status=503))
        with pytest.raises(RegistryUnreachable, match="the token service answered HTTP 503"):
            get(registries(), server)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("Negotiate", {"negotiate": {}}),
        ("Negotiate YWJj==, basic", {"negotiate": {"ywjj": "="}, "basic": {}}),
        ('Basic realm="x"', {"basic": {"realm": "x"}}),
        ("basic", {"basic": {}}),
        (
            'Bearer realm="https://a/t",service="b, c",scope="repository:x:pull,push"',
            {"bearer": {"realm": "https://a/t", "service": "b, c", "scope": "repository:x:pull,push"}},
        ),
        (
            'Basic realm="say \\"hi\\"", Bearer Realm="https://a/t", service=plain',
            {"basic": {"realm": 'say "hi"'}, "bearer": {"realm": "https://a/t", "service": "plain"}},
        ),
        ('Basic realm=", Bearer realm=x"', {"basic": {"realm": ", Bearer realm=x"}}),
    ],
)
def test_challenges(text: str, found: dict[str, dict[str, str]]) -> None:
    assert parse_challenge(text) == found


@pytest.mark.timeout(10)  # with a regular expression that backtracks each takes minutes
@pytest.mark.parametrize("text", ["Bearer " + "a" * 60_000, '"' + '\\"' * 30_000, 'Basic a="' + "\\" * 60_000])
def test_a_challenge_of_any_length_takes_no_time(
    layout: Path, registries: Callable[..., Registries], text: str
) -> None:
    for length in (8 << 10, len(text)):
        parse_challenge(text[:length])
    with FaultServer(layout) as server:
        server.add(Fault("manifests", status=401, headers={"WWW-Authenticate": text}))
        with pytest.raises(RegistryDenied):
            get(registries(), server)

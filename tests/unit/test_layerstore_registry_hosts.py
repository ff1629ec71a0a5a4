"""containerd's hosts.toml and Docker's certificate files: what they mean, and that mirrors, TLS and headers follow."""

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from afs.core.images import parse_image
from afs.layerstore.errors import (
    CorruptImage,
    ImageNotFound,
    RegistryDenied,
    RegistryMisconfigured,
    RegistryUnreachable,
)
from afs.layerstore.registry import Registries, RegistrySource
from afs.layerstore.registryhosts import Host, Tls, hosts_of
from afs.layerstore.registryoptions import RegistryOptions
from tests.testbed import oci, tars
from tests.testbed.certificates import Certificates, make_certificates
from tests.testbed.faults import Fault, FaultServer

NAME = "registry.example.com:5000"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a registry's hosts.toml; returns the directory of all."""

    def do(text: str, name: str = NAME) -> Path:
        directory = tmp_path / "certs.d" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "hosts.toml").write_text(text)
        return directory.parent

    return do


def hosts(root: Path | None, registry: str = NAME, **options: Any) -> tuple[Host, ...]:
    """Whom to ask."""
    return hosts_of(registry, RegistryOptions(hosts_dir=root, **options))


# Which directory


def test_without_a_directory(tmp_path: Path) -> None:
    for root in (None, tmp_path / "missing", tmp_path):
        assert hosts(root) == (Host("https", NAME),)
        assert hosts(root, "docker.io") == (Host("https", "registry-1.docker.io"),)
        assert hosts(root, "127.0.0.1:5000") == (Host("http", "127.0.0.1:5000"),)


def test_the_order_of_directories_is_containerd_s(write: Write) -> None:
    root = write('server = "https://s0"', "_default")
    for number, name in enumerate(("_default", NAME, "registry.example.com_5000_")):
        write(f'server = "https://s{number}"', name)
        assert hosts(root)[0].netloc == f"s{number}"
    assert hosts(root, "other.example.com")[0].netloc == "s0"
    assert hosts(root, "[::1]")[0].netloc == "s0"


# What a file means


def test_everything_at_once(write: Write) -> None:
    root = write("""
        server = "https://upstream.example.com"
        ca = "/etc/ca.pem"
        [host."https://second.example.com:8443/base"]
          capabilities = ["pull"]
          ca = ["a.crt", "/b.crt"]
          client = [["c.cert", "c.key"], ["d.pem", ""], "e.pem"]
          dial_timeout = "1s"
          proxy = "http://proxy:3128"
          [host."https://second.example.com:8443/base".header]
            x-one = "1"
            x-two = ["2", "3"]
        [host."http://first.example.com"]
          capabilities = ["pull", "Resolve", "push"]
          override_path = true
        [host."http://third.example.com:5000/v2/cache/"]
          skip_verify = true
          override_path = true
        [host."fourth.example.com/v2"]
    """)
    here = root / NAME
    second, first, third, fourth, server = hosts(root)
    assert second == Host(
        "https",
        "second.example.com:8443",
        "/base/v2",
        NAME,
        resolves=False,
        tls=Tls(
            (here / "a.crt", Path("/b.crt")),
            ((here / "c.cert", here / "c.key"), (here / "d.pem", here / "d.pem"), (here / "e.pem", here / "e.pem")),
        ),
        headers=(("x-one", "1"), ("x-two", "2, 3")),
        dial_timeout=1.0,
        proxy="http://proxy:3128",
    )
    assert first == Host("http", "first.example.com", "", NAME)
    assert third == Host("either", "third.example.com:5000", "/v2/cache", NAME, tls=Tls(skip_verify=True))
    assert fourth == Host("https", "fourth.example.com", "/v2", NAME)
    assert server == Host("https", "upstream.example.com", "/v2", NAME, tls=Tls((Path("/etc/ca.pem"),)))
    assert "1" not in repr(second.headers) or "x-one" not in repr(second)


def test_without_server_the_registry_is_asked_last(write: Write) -> None:
    root = write('[host."https://mirror.example.com"]', "docker.io")
    mirror, server = hosts(root, "docker.io")
    assert (mirror.netloc, mirror.namespace) == ("mirror.example.com", "docker.io")
    assert server == Host("https", "registry-1.docker.io")


@pytest.mark.parametrize("server", ["https://docker.io", "registry-1.docker.io"])
def test_docker_hub_by_its_names(write: Write, server: str) -> None:
    (host,) = hosts(write(f'server = "{server}"', "docker.io"), "docker.io")
    assert host == Host("https", "registry-1.docker.io")


def test_docker_s_files(tmp_path: Path) -> None:
    directory = tmp_path / NAME
    directory.mkdir()
    for name in ("ca.crt", "b.crt", "one.cert", "one.key", "two.cert", "other.key", "readme"):
        (directory / name).write_text("")
    (host,) = hosts(tmp_path)
    assert host.tls.authorities == (directory / "b.crt", directory / "ca.crt")
    one, two = directory / "one.cert", directory / "two.cert"
    assert host.tls.clients == ((one, directory / "one.key"), (two, two))
    (directory / "hosts.toml").write_text("\n")  # an empty one does not count
    assert hosts(tmp_path) == (host,)
    (directory / "hosts.toml").write_text("skip_verify = false\n")
    assert hosts(tmp_path)[0].tls == Tls()


def test_settings_for_all(write: Write) -> None:
    root = write('[host."https://mirror:5000"]\n[host."https://other:5000"]')
    authorities = (Path("/ca.pem"),)
    mirror, other, server = hosts(root, insecure=("mirror:5000", NAME), authorities=authorities)
    assert mirror.tls == Tls(authorities, skip_verify=True)
    assert other.tls == Tls(authorities)
    assert (server.scheme, server.tls) == ("either", Tls(authorities, skip_verify=True))
    assert hosts(root, plain_http=(NAME,))[-1].scheme == "http"


def test_loopback_speaks_tls_where_it_is_set_up(write: Write) -> None:
    name = "127.0.0.1:5000"
    for text, scheme in (('ca = "x"', "https"), ("skip_verify = true", "either"), ("", "http")):
        assert hosts(write(text, name), name)[0].scheme == scheme
    assert hosts(None, name, insecure=(name,))[0].scheme == "either"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("server = ", "it is not TOML: "),
        ("\udcff", "it is not TOML: "),
        ("servers = 'x'", "unknown key 'servers'"),
        ("[host.'https://m']\nskip_verfy = true", "host 'https://m': unknown key 'skip_verfy'"),
        ("server = 3", "'server' is not a string"),
        ("server = 'ftp://x'", "'ftp://x' is not the URL of a server"),
        ("server = 'https://x:port'", "'https://x:port' is not the URL of a server"),
        ("server = 'https://user:pw@x'", "is not the URL of a server"),
        ("[host.'https://m?x']", "host 'https://m?x': 'https://m?x' is not the URL of a server"),
        ("host = 3", "'host' is not a table"),
        ("[host]\nx = 3", "host 'x': not a table"),
        ("capabilities = ['pul']", "unknown capability 'pul'"),
        ("capabilities = 'pull'", "'capabilities' is not a list of strings"),
        ("ca = 3", "'ca' is not a list of strings"),
        ("client = 3", "'client' is neither a path nor a list"),
        ("client = [['a']]", "'client' has an entry that is no pair of certificate and key"),
        ("client = [3]", "'client' is not a list of strings"),
        ("skip_verify = 'yes'", "'skip_verify' is neither true nor false"),
        ("override_path = 1", "'override_path' is neither true nor false"),
        ("header = 3", "'header' is not a table"),
        ("[header]\nx = 3", "'header x' is not a list of strings"),
        ('[header]\nx = "a\\nb"', "header 'x' has characters that no header can have"),
        ("[header]\n'x y' = 'a'", "header 'x y' has characters that no header can have"),
        ("dial_timeout = 5", "'dial_timeout' is 5, not a time"),
        ("dial_timeout = 'soon'", "'dial_timeout' is 'soon', not a time"),
        ("proxy = 'socks5://x'", "'proxy' is not the URL of an http or https proxy"),
    ],
)
def test_a_bad_file_is_told(tmp_path: Path, text: str, cause: str) -> None:
    directory = tmp_path / NAME
    directory.mkdir()
    file = directory / "hosts.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RegistryMisconfigured) as caught:
        hosts(tmp_path)
    assert caught.value.line.startswith(f"this node's settings for registry {NAME} cannot be used: {file}: ")
    assert cause in caught.value.line


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    (tmp_path / NAME / "hosts.toml").mkdir(parents=True)
    with pytest.raises(RegistryMisconfigured, match=r"cannot read .*/hosts.toml: Is a directory"):
        hosts(tmp_path)


# Mirrors


TAR = tars.tar_of({"a": b"x" * 5000})


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with an image v1."""
    builder = oci.LayoutBuilder(tmp_path_factory.mktemp("layout"))
    builder.add_image("v1", [builder.add_layer(TAR, "plain")])
    return builder.directory


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Callable[..., RegistrySource]]:
    """Make a source of NAME/app:v1 whose settings are in the test's directory; its connections are closed afterwards."""
    opened: list[Registries] = []

    def make(name: str = f"{NAME}/app:v1", **options: Any) -> RegistrySource:
        given = {"hosts_dir": tmp_path / "certs.d", "backoff": 0.0, **options}
        opened.append(Registries(RegistryOptions(**given)))
        return opened[-1].source(parse_image(name))

    yield make
    for registries in opened:
        registries.close()


def test_tags_are_resolved_only_by_those_who_may(
    layout: Path, write: Write, source: Callable[..., RegistrySource]
) -> None:
    with FaultServer(layout) as mirror, FaultServer(layout) as server:
        write(f'server = "{server.url}"\n[host."{mirror.url}"]\ncapabilities = ["pull"]')
        opened = source()
        manifest = opened.get_manifest("v1")
        digest = oci.find_tag(layout, "v1").digest
        assert opened.get_manifest(digest) == manifest
        assert opened.current_digest("v1") == digest
        assert server.count("manifests/v1") == 2
        assert server.count("manifests/sha256") == 0
        (asked,) = mirror.requests()
        assert asked.path == f"/v2/app/manifests/{digest}?ns=registry.example.com%3A5000"


def test_a_file_without_anybody_who_may_is_told(write: Write, source: Callable[..., RegistrySource]) -> None:
    write('server = "http://127.0.0.1:1"\ncapabilities = ["push"]')
    with pytest.raises(RegistryMisconfigured, match="names no host with the capability to resolve"):
        source().get_manifest("v1")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("manifests", status=404),
        Fault("manifests", status=401),
        Fault("manifests", status=403),
        Fault("manifests", status=429, headers={"Retry-After": "30"}),
        Fault("manifests", status=503),
        Fault("manifests", reset=True),
        Fault("manifests", cut=20),
        Fault("manifests", corrupt=5),
    ],
    ids=["404", "401", "403", "429", "503", "reset", "cut", "corrupt"],
)
def test_a_mirror_that_fails_is_left(
    layout: Path,
    write: Write,
    source: Callable[..., RegistrySource],
    caplog: pytest.LogCaptureFixture,
    fault: Fault,
) -> None:
    with FaultServer(layout) as mirror, FaultServer(layout) as server:
        write(f'server = "{server.url}"\n[host."{mirror.url}"]')
        mirror.add(fault)
        digest = oci.find_tag(layout, "v1").digest
        assert source().get_manifest(digest) == oci.blob_path(layout, digest).read_bytes()
        assert 1 <= mirror.count("GET") <= 2
        assert server.count("GET") == 1
        assert f"{mirror.address} cannot give {digest} of {NAME}/app:v1: " in caplog.text
        assert "asking the next host" in caplog.text


def test_the_last_error_counts_and_names_the_others(
    layout: Path, write: Write, source: Callable[..., RegistrySource]
) -> None:
    with FaultServer(layout) as mirror, FaultServer(layout) as server:
        write(f'server = "{server.url}"\n[host."http://127.0.0.1:1"]\n[host."{mirror.url}"]')
        mirror.add(Fault("manifests", corrupt=1))
        kinds = {404: ImageNotFound, 403: RegistryDenied, 500: RegistryUnreachable}
        digest = oci.find_tag(layout, "v1").digest
        for status, kind in kinds.items():
            server.clear()
            server.add(Fault("manifests", status=status))
            with pytest.raises(kind) as caught:
                source().get_manifest(digest)
            line = caught.value.line
            assert f"(HTTP {status} for " in line
            assert "; before it, 127.0.0.1:1: " in line
            assert f"; before it, {mirror.address}: its manifest should be {digest} but is sha256:" in line
            assert f"{NAME}/app:v1" in line
        server.clear()
        server.add(Fault("manifests", corrupt=1))
        with pytest.raises(CorruptImage):
            source().get_manifest(digest)


def test_credentials_are_each_host_s_own(
    layout: Path, write: Write, source: Callable[..., RegistrySource], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    with FaultServer(layout) as mirror, FaultServer(layout, auth="token") as server:
        write(f'server = "{server.url}"\n[host."{mirror.url}"]')
        config.write_text(f'{{"auths": {{"{server.address}": {{"username": "afs", "password": "testbed"}}}}}}')
        mirror.add(Fault("manifests", status=401, headers={"WWW-Authenticate": 'Basic realm="x"'}))
        source(docker_config=config).get_manifest("v1")
        assert not any("authorization" in request.headers for request in mirror.requests())


def test_headers_go_to_their_host_only(layout: Path, write: Write, source: Callable[..., RegistrySource]) -> None:
    with FaultServer(layout) as other, FaultServer(layout) as server:
        write(
            f'server = "{server.url}"\n[header]\nX-Secret = "s"\nAuthorization = "Basic Zm9v"\nAccept = "x"\nUSER-agent = "own"'
        )
        digest = oci.find_tag(layout, "v1").digest
        server.add(
            Fault(f"manifests/{digest}", status=302, headers={"Location": f"{other.url}/v2/x/manifests/{digest}"})
        )
        opened = source()
        opened.get_manifest("v1")
        opened.get_manifest(digest)
        for request in server.requests():
            assert (request.headers["x-secret"], request.headers["authorization"]) == ("s", "Basic Zm9v")
            assert request.headers["user-agent"] == "own"
            assert oci.OCI_INDEX in request.headers["accept"]  # what the client has to know is its own
        (asked,) = other.requests()
        assert not {"x-secret", "authorization"} & asked.headers.keys()
        assert "accept" in asked.headers


def test_a_change_counts_at_once(layout: Path, write: Write, source: Callable[..., RegistrySource]) -> None:
    with FaultServer(layout) as server:
        write('server = "http://127.0.0.1:1"')
        opened = source()
        with pytest.raises(RegistryUnreachable, match="Connection refused"):
            opened.get_manifest("v1")
        write(f'server = "{server.url}"')
        assert opened._registries.source(parse_image(f"{NAME}/app:v1")).get_manifest("v1")


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Of an authority that nobody trusts."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def context(certificates: Certificates, *, client: bool = False) -> ssl.SSLContext:
    """A server's; *client*: it wants certificates."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.load_cert_chain(*certificates.server)
    if client:
        made.verify_mode = ssl.CERT_REQUIRED
        # With 1.3 the handshake is over for the client before the server looks at its certificate; a server that closes
        # at once may do so before its alert is read.
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        made.load_verify_locations(certificates.authority)
    return made


@pytest.fixture
def tls_server(layout: Path, certificates: Certificates) -> Iterator[FaultServer]:
    """A registry with a certificate of that authority."""
    with FaultServer(layout, tls=context(certificates)) as running:
        yield running
    assert not running.errors


def test_an_authority_is_trusted_where_it_is_given(
    tls_server: FaultServer,
    certificates: Certificates,
    write: Write,
    source: Callable[..., RegistrySource],
    tmp_path: Path,
) -> None:
    write(f'server = "{tls_server.url}"')
    with pytest.raises(RegistryUnreachable) as caught:
        source().get_manifest("v1")
    line = caught.value.line
    assert line.startswith(
        f"registry {tls_server.address} is unreachable: image {NAME}/app:v1: its certificate is not "
    )
    assert "unable to get local issuer certificate" in line
    assert "--registry-ca FILE" in line
    assert tls_server.connections == 1  # another try would not help
    assert source(authorities=(certificates.authority,)).get_manifest("v1")
    assert source(insecure=(tls_server.address,)).get_manifest("v1")
    write(f'server = "{tls_server.url}"\nca = "{certificates.authority}"')
    assert source().get_manifest("v1")
    write(f'server = "{tls_server.url}"\nskip_verify = true')
    assert source().get_manifest("v1")
    write("", tls_server.address)
    (tmp_path / "certs.d" / tls_server.address / "ca.crt").write_bytes(certificates.authority.read_bytes())
    assert source(f"{tls_server.address}/app:v1").get_manifest("v1")


def test_an_authority_that_changes_counts_at_once(
    tls_server: FaultServer,
    certificates: Certificates,
    write: Write,
    source: Callable[..., RegistrySource],
    tmp_path: Path,
) -> None:
    root = write(f'server = "{tls_server.url}"\nca = "ca.pem"')
    (other := tmp_path / "other").mkdir()
    file = root / NAME / "ca.pem"
    file.write_bytes(make_certificates(other).authority.read_bytes())
    opened = source()
    with pytest.raises(RegistryUnreachable, match="certificate is not trusted"):
        opened.get_manifest("v1")
    file.write_bytes(certificates.authority.read_bytes())
    assert opened.get_manifest("v1")
    file.write_text("nonsense")
    with pytest.raises(RegistryMisconfigured, match=r"ca.pem holds no certificate that can be used: "):
        opened.get_manifest("v1")
    file.unlink()
    with pytest.raises(RegistryMisconfigured, match=r"cannot read .*/ca.pem: No such file"):
        opened.get_manifest("v1")


def test_a_certificate_for_another_name_is_told(
    tls_server: FaultServer, certificates: Certificates, write: Write, source: Callable[..., RegistrySource]
) -> None:
    write(f'server = "https://127.0.0.2:{tls_server.port}"\nca = "{certificates.authority}"')
    with FaultServer(tls_server.layout) as upstream:
        write(
            f'server = "{upstream.url}"\n[host."https://127.0.0.1:{tls_server.port}"]\nca = "{certificates.authority}"'
        )
        assert source().get_manifest("v1")
        assert upstream.count() == 0


def test_a_client_s_certificate(
    layout: Path, certificates: Certificates, write: Write, source: Callable[..., RegistrySource], tmp_path: Path
) -> None:
    with FaultServer(layout, tls=context(certificates, client=True)) as server:
        base = f'server = "{server.url}"\nca = "{certificates.authority}"\n'
        write(base)
        with pytest.raises(RegistryUnreachable) as caught:
            source().get_manifest("v1")
        assert "it breaks TLS off; perhaps it wants a client certificate (client in hosts.toml): " in caught.value.line
        certificate, key = certificates.client
        write(f'{base}client = [["{certificate}", "{key}"]]')
        assert source().get_manifest("v1")
        both = tmp_path / "both.pem"
        both.write_bytes(certificate.read_bytes() + key.read_bytes())
        write(f'{base}client = "{both}"')
        assert source().get_manifest("v1")
        directory = tmp_path / "certs.d" / server.address
        directory.mkdir()
        for name, path in (("ca.crt", certificates.authority), ("client.cert", certificate), ("client.key", key)):
            (directory / name).write_bytes(path.read_bytes())
        assert source(f"{server.address}/app:v1").get_manifest("v1")
        write(f'{base}client = [["{certificate}", "{certificates.server[1]}"]]')
        with pytest.raises(
            RegistryMisconfigured, match=r"client.cert holds no certificate that can be used: .*MISMATCH"
        ):
            source().get_manifest("v1")


def test_an_insecure_registry_may_do_without_tls(
    layout: Path, source: Callable[..., RegistrySource], caplog: pytest.LogCaptureFixture
) -> None:
    with FaultServer(layout) as server:
        opened = source(f"{server.address}/app:v1", insecure=(server.address,))
        assert opened.get_manifest("v1")
        assert opened.get_manifest("v1")
        assert caplog.text.count(f"registry {server.address} speaks no TLS: using http") == 1
        assert server.connections == 2  # one for the attempt


def test_a_registry_without_tls_is_told(layout: Path, write: Write, source: Callable[..., RegistrySource]) -> None:
    with FaultServer(layout) as server:
        write(f'server = "https://{server.address}"')
        with pytest.raises(RegistryUnreachable, match="it does not speak TLS; if it is to be so, see --plain-http"):
            source().get_manifest("v1")


# Redirects


def redirect(server: FaultServer, location: str, status: int = 307) -> None:
    """Let *server* redirect whoever asks for the manifest."""
    server.clear()
    server.add(Fault("manifests", status=status, headers={"Location": location}))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_credentials_stay_with_their_server(
    layout: Path, source: Callable[..., RegistrySource], tmp_path: Path, status: int
) -> None:
    config = tmp_path / "config.json"
    with FaultServer(layout, auth="basic") as server, FaultServer(layout) as other:
        config.write_text(f'{{"auths": {{"{server.address}": {{"username": "afs", "password": "testbed"}}}}}}')
        opened = source(f"{server.address}/app:v1", docker_config=config)
        opened.get_manifest("v1")
        redirect(server, f"{other.url}/v2/x/manifests/v1", status)  # another port is another server
        opened.get_manifest("v1")
        assert server.requests()[-1].headers["authorization"].startswith("Basic ")
        (asked,) = other.requests()
        assert "authorization" not in asked.headers
        # and whoever was redirected to and refuses gets none either
        other.add(Fault("manifests", status=401, headers={"WWW-Authenticate": 'Basic realm="x"'}))
        with pytest.raises(RegistryDenied):
            opened.get_manifest("v1")
        assert not any("authorization" in request.headers for request in other.requests())


def test_credentials_follow_within_a_server(
    layout: Path, source: Callable[..., RegistrySource], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    with FaultServer(layout, auth="basic") as server:
        config.write_text(f'{{"auths": {{"{server.address}": {{"username": "afs", "password": "testbed"}}}}}}')
        server.add(Fault("app/manifests", status=307, headers={"Location": "/v2/x/manifests/v1"}))
        with pytest.raises(RegistryDenied):  # the fault comes before the server asks for credentials
            source(f"{server.address}/app:v1").get_manifest("v1")
        server.clear()
        opened = source(f"{server.address}/app:v1", docker_config=config)
        opened.get_manifest("v1")
        server.add(Fault("app/manifests", status=307, headers={"Location": "/v2/x/manifests/v1"}))
        assert opened.get_manifest("v1")


def test_from_https_to_http_only_if_told(
    tls_server: FaultServer,
    layout: Path,
    write: Write,
    source: Callable[..., RegistrySource],
    certificates: Certificates,
) -> None:
    with FaultServer(layout) as other:
        redirect(tls_server, f"{other.url}/v2/x/manifests/v1?signature=hidden")
        write(f'server = "{tls_server.url}"\nca = "{certificates.authority}"')
        with pytest.raises(RegistryUnreachable) as caught:
            source().get_manifest("v1")
        assert f"it redirects from https to {other.url}/v2/x/manifests/v1, in the clear" in caught.value.line
        assert "hidden" not in caught.value.line
        assert other.count() == 0
        assert source(insecure=(tls_server.address,)).get_manifest("v1")


@pytest.mark.parametrize("location", ["ftp://x/y", "file:///etc/passwd", "http://[x", "http://x:99999/"])
def test_other_redirects_are_refused(layout: Path, source: Callable[..., RegistrySource], location: str) -> None:
    with FaultServer(layout) as server:
        redirect(server, location)
        with pytest.raises(RegistryUnreachable, match="it redirects to something that is not an http URL"):
            source(f"{server.address}/app:v1").get_manifest("v1")


def test_redirects_without_end(layout: Path, source: Callable[..., RegistrySource]) -> None:
    with FaultServer(layout) as server:
        redirect(server, "/v2/app/manifests/v1")
        with pytest.raises(RegistryUnreachable, match="more than 10 redirects"):
            source(f"{server.address}/app:v1").get_manifest("v1")
        assert server.count() == 11


def test_a_token_service_in_the_clear_gets_no_credentials(
    tls_server: FaultServer,
    layout: Path,
    write: Write,
    source: Callable[..., RegistrySource],
    certificates: Certificates,
) -> None:
    with FaultServer(layout, auth="token") as other:
        challenge = f'Bearer realm="{other.url}/token",service="x"'
        tls_server.add(Fault("manifests", status=401, headers={"WWW-Authenticate": challenge}))
        write(f'server = "{tls_server.url}"\nca = "{certificates.authority}"')
        with pytest.raises(
            RegistryDenied, match=f"its token service {other.url}/token would get credentials in the clear"
        ):
            source().get_manifest("v1")
        assert other.count() == 0

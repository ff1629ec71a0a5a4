"""Which requests go through a proxy, and that they do."""

import http.client
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from typing_extensions import override

from afs.core.images import parse_image
from afs.layerstore.errors import RegistryMisconfigured, RegistryUnreachable
from afs.layerstore.registry import Registries
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registryproxies import Proxies, proxies_from
from tests.testbed import oci, tars
from tests.testbed.certificates import make_certificates
from tests.testbed.faults import FaultServer

PROXIES = Proxies("http://p:1", "https://s:2", "")


def test_the_environment_in_both_cases() -> None:
    assert proxies_from({}) == Proxies()
    assert proxies_from({"HTTP_PROXY": "a", "https_proxy": "b", "no_proxy": "c"}) == Proxies("a", "b", "c")
    assert proxies_from({"HTTP_PROXY": "a", "http_proxy": "b", "HTTPS_PROXY": "", "https_proxy": "c"}) == Proxies(
        "a", "c"
    )


def test_the_scheme_decides() -> None:
    assert PROXIES.choose("http", "example.com", 80) == "http://p:1"
    assert PROXIES.choose("https", "example.com", 443) == "https://s:2"
    assert Proxies(https="s:2").choose("https", "example.com", 443) == "http://s:2"
    assert Proxies(https="s:2").choose("http", "example.com", 80) == ""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "LOCALHOST"])
def test_loopback_is_direct(host: str) -> None:
    assert PROXIES.choose("http", host, 80) == ""


@pytest.mark.parametrize(
    ("no_proxy", "direct", "proxied"),
    [
        ("*", ["example.com", "1.2.3.4"], []),
        ("example.com", ["example.com", "a.example.com", "EXAMPLE.com", "a.b.example.com."], ["notexample.com", "com"]),
        (".example.com", ["a.example.com"], ["example.com", "aexample.com"]),
        ("*.example.com", ["a.example.com"], ["example.com"]),
        ("x.org, example.com:5000 ,,", ["x.org"], ["example.com"]),
        ("example.com:80", ["example.com", "a.example.com"], ["1.2.3.4"]),
        ("1.2.3.4", ["1.2.3.4"], ["1.2.3.5", "example.com"]),
        ("1.2.3.4:80", ["1.2.3.4"], ["1.2.3.5"]),
        ("1.2.3.4:81", [], ["1.2.3.4"]),
        ("10.0.0.0/8,2001:db8::/32", ["10.1.2.3", "2001:db8::5", "[2001:db8::5]"], ["11.0.0.1", "2001:db9::1"]),
        ("2001:db8::5", ["2001:db8::5"], ["2001:db8::6"]),
        ("[2001:db8::5]:80", ["2001:db8::5"], ["2001:db8::6"]),
        ("10.0.0.0/99,:80,/", [], ["10.0.0.1", "example.com"]),
    ],
)
def test_no_proxy(no_proxy: str, direct: list[str], proxied: list[str]) -> None:
    proxies = Proxies("http://p:1", no_proxy=no_proxy)
    assert [host for host in direct + proxied if not proxies.choose("http", host, 80)] == direct


# Through a proxy


class Proxy(ThreadingHTTPServer):
    """A proxy that knows one name, ``registry.test``, as an address on loopback; for http URLs and CONNECT."""

    def __init__(self, credentials: str = "") -> None:
        self.target = 0
        self.credentials = credentials
        self.seen: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are part of some tests."""


class _Handler(BaseHTTPRequestHandler):
    @property
    def proxy(self) -> Proxy:
        return cast("Proxy", self.server)

    def _allowed(self) -> bool:
        self.proxy.seen.append(f"{self.command} {self.path}")
        if not self.proxy.credentials or self.headers["Proxy-Authorization"] == self.proxy.credentials:
            return True
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        if not self._allowed():
            return
        parts = urlsplit(self.path)
        assert parts.hostname == "registry.test"
        upstream = http.client.HTTPConnection("127.0.0.1", self.proxy.target)
        upstream.request("GET", f"{parts.path}?{parts.query}", headers=dict(self.headers))
        answer = upstream.getresponse()
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        upstream.close()

    def do_CONNECT(self) -> None:
        if not self._allowed():
            return
        with socket.create_connection(("127.0.0.1", self.proxy.target)) as upstream:
            self.send_response(200)
            self.end_headers()
            pair = {self.connection: upstream, upstream: self.connection}
            while True:
                for ready in select.select(list(pair), [], [])[0]:
                    if not (data := ready.recv(1 << 16)):
                        return
                    pair[ready].sendall(data)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def proxy() -> Iterator[Callable[..., Proxy]]:
    """Start proxies."""
    started: list[tuple[Proxy, threading.Thread]] = []

    def start(credentials: str = "") -> Proxy:
        made = Proxy(credentials)
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        started.append((made, thread))
        return made

    yield start
    for made, thread in started:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """A layout with an image v1."""
    builder = oci.LayoutBuilder(tmp_path / "layout")
    builder.add_image("v1", [builder.add_layer(tars.tar_of({"a": b"x"}))])
    return builder.directory


def get(name: str, proxies: Proxies, **options: Any) -> bytes:
    """A manifest."""
    registries = Registries(RegistryOptions(proxies=proxies, backoff=0, **options))
    try:
        return registries.source(parse_image(name)).get_manifest("v1")
    finally:
        registries.close()


def test_http_through_a_proxy(layout: Path, proxy: Callable[..., Proxy]) -> None:
    through = proxy("Basic bWU6c0BjcmV0")
    with FaultServer(layout) as server:
        through.target = server.port
        plain = ("registry.test:5000",)
        assert get("registry.test:5000/app:v1", Proxies(f"http://me:s%40cret@{through.address}"), plain_http=plain)
        assert through.seen == ["GET http://registry.test:5000/v2/app/manifests/v1"]
        with pytest.raises(RegistryUnreachable) as caught:
            get("registry.test:5000/app:v1", Proxies(f"http://me:wrong@{through.address}"), plain_http=plain)
        assert caught.value.line.endswith(f"proxy http://{through.address} wants credentials (HTTP 407)")


def test_https_through_a_proxy(layout: Path, proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates.server)
    through, strict = proxy(), proxy("Basic x")
    with FaultServer(layout, tls=context) as server:
        through.target = server.port
        proxies = Proxies(https=through.address)
        assert get("registry.test:5000/app:v1", proxies, insecure=("registry.test:5000",))
        assert through.seen == ["CONNECT registry.test:5000"]
        with pytest.raises(
            RegistryUnreachable, match=f"is not trusted: .* .through proxy http://{through.address}.; trust"
        ):
            get("registry.test:5000/app:v1", proxies)
        with pytest.raises(RegistryUnreachable) as caught:
            get("registry.test:5000/app:v1", Proxies(https=f"http://me:hidden@{strict.address}"))
        assert "407" in caught.value.line
        assert caught.value.line.endswith(f"(through proxy http://{strict.address})")
        assert "hidden" not in caught.value.line
        assert len(strict.seen) == 1  # another try would not help


def test_a_host_s_own_proxy(layout: Path, proxy: Callable[..., Proxy], tmp_path: Path) -> None:
    through = proxy()
    (tmp_path / "registry.test").mkdir()
    (tmp_path / "registry.test" / "hosts.toml").write_text(
        f'server = "http://registry.test"\nproxy = "http://{through.address}"'
    )
    with FaultServer(layout) as server:
        through.target = server.port
        assert get("registry.test/app:v1", Proxies(no_proxy="*"), hosts_dir=tmp_path)
    assert len(through.seen) == 1


def test_a_proxy_that_is_down_is_named() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(RegistryUnreachable, match=f"Connection refused .through proxy http://{address}.$"):
            get("registry.test/app:v1", Proxies(https=f"http://{address}"))


@pytest.mark.parametrize("proxy_url", ["socks5://x:1", "http://x:port"])
def test_a_proxy_that_cannot_be_used_is_told(proxy_url: str) -> None:
    with pytest.raises(RegistryMisconfigured, match=f"{proxy_url} is not the URL of an http or https proxy"):
        get("registry.test/app:v1", Proxies(https=proxy_url))

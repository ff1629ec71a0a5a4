"""Registries for tests: Debian's docker-registry, which keeps a log of requests, and one that fails on demand."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import tempfile
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode, urlsplit

from tests.testbed import oci
from tests.testbed.daemon import Daemon
from tests.testbed.faults import Fault, FaultServer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from tests.testbed.netns import Host

__all__ = ["PASSWORD", "USER", "Fault", "FaultServer", "PushError", "Registry", "Request", "push"]

USER, PASSWORD = "afs", "testbed"
_HTPASSWD = "afs:$2b$04$abcdefghijklmnopqrstuudThVL1armuiY8VgGZrRxruguZVrmDti\n"
"""The registry takes bcrypt only, which the standard library cannot compute."""
_ACCESS = re.compile(r'^\S+ - \S* \[[^]]*\] "(\S+) (\S+) HTTP/[\d.]+" (\d{3}) (\d+) "[^"]*" "([^"]*)"')
_MARK_AGENT = "testbed-mark"


class PushError(Exception):
    """A registry refused a blob or a manifest."""


@dataclass(frozen=True)
class Request:
    """One line of the registry's access log."""

    method: str
    path: str
    """With the query."""
    status: int
    size: int
    """Of the response's body, in bytes."""
    user_agent: str

    @property
    def digest(self) -> str | None:
        """The digest in the path, if the request is for a blob or a manifest by digest."""
        found = re.search(r"/(?:blobs|manifests)/(sha256:[0-9a-f]{64})", self.path)
        return found.group(1) if found else None


class Registry:
    """Debian's docker-registry on a free port of the loopback interface, with storage of its own.

    Args:
        auth: ask for basic authentication as USER with PASSWORD.
        certificate: paths of a certificate and its key; the registry then speaks TLS.
        client_authority: path of the certificate that clients' certificates must be signed with.
        mirror_of: URL of another registry; this one then passes on what that one has, and keeps it.
        host: a host in a network namespace of its own to run on. Its other methods but start and stop talk to the registry,
            so they are called there, too.

    """

    def __init__(
        self,
        *,
        auth: bool = False,
        certificate: tuple[Path, Path] | None = None,
        client_authority: Path | None = None,
        mirror_of: str | None = None,
        host: Host | None = None,
    ) -> None:
        self._host = "127.0.0.1" if host is None else host.address
        self._prefix = [] if host is None else host.prefix
        self._auth = auth
        self._certificate = certificate
        self._client_authority = client_authority
        self._mirror_of = mirror_of
        self._directory: Path | None = None
        self._daemon: Daemon | None = None
        self._since = 0
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Host and port, as they begin an image's name."""
        return f"{self._host}:{self.port}"

    @property
    def pid(self) -> int:
        """The registry's pid."""
        return self._running().pid

    def start(self) -> None:
        """Start and wait until it listens, up to 20 s; storage is empty.

        Raises:
            DaemonError: it did not start.

        """
        self._directory = Path(tempfile.mkdtemp(prefix="afs-test-registry-"))
        config = self._directory / "config.yml"
        config.write_text(json.dumps(self._config(self._directory)))  # JSON is YAML
        self._daemon = Daemon([*self._prefix, "docker-registry", "serve", config])
        try:
            self._daemon.start()
            self.port = int(self._daemon.wait_for(rf"listening on {re.escape(self._host)}:(\d+)").group(1))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Terminate the registry and remove its storage."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None
        if self._directory is not None:
            shutil.rmtree(self._directory)
            self._directory = None

    def push(self, layout: Path, tag: str, repository: str, as_tag: str | None = None) -> str:
        """Push a layout's tag; returns the name to pull it by, HOST:PORT/REPOSITORY:TAG."""
        as_tag = as_tag or tag
        credentials = (USER, PASSWORD) if self._auth else None
        push(self.address, layout, tag, repository, as_tag, credentials=credentials, tls=self._certificate is not None)
        return f"{self.address}/{repository}:{as_tag}"

    def requests(self, method: str | None = None, pattern: str = "") -> list[Request]:
        """Requests answered since the last `forget`, oldest first, whose path has the regular expression `pattern`."""
        daemon = self._running()
        mark = f"/v2/?{uuid.uuid4().hex}"
        with _Client(self.address, tls=self._certificate is not None) as client:
            client.request("GET", mark, headers={"User-Agent": _MARK_AGENT})
        daemon.wait_for(re.escape(mark), start=self._since)  # the log is in order, so all before it is there, too
        found = []
        for line in daemon.lines()[self._since :]:
            match = _ACCESS.match(line)
            if match is None or match.group(5) == _MARK_AGENT:
                continue
            request = Request(match.group(1), match.group(2), int(match.group(3)), int(match.group(4)), match.group(5))
            if (method is None or request.method == method) and re.search(pattern, request.path):
                found.append(request)
        return found

    def forget(self) -> None:
        """Let `requests` and `blob_fetches` begin from here."""
        self.requests()
        self._since = len(self._running().lines())

    def blob_fetches(self) -> Counter[str]:
        """How often each blob was fetched from its beginning (GET, 200) since the last `forget`, by digest.

        Requests for a range (206) go on with one of these: where it broke off, or in pieces because it was slow.
        """
        gets = self.requests("GET", "/blobs/sha256:")
        return Counter(request.digest for request in gets if request.digest and request.status == 200)

    def _running(self) -> Daemon:
        if self._daemon is None:
            raise RuntimeError("the registry is not running")
        return self._daemon

    def _config(self, directory: Path) -> dict[str, Any]:
        http_section: dict[str, Any] = {"addr": f"{self._host}:0", "secret": "testbed"}
        if self._certificate is not None:
            tls: dict[str, Any] = {"certificate": str(self._certificate[0]), "key": str(self._certificate[1])}
            if self._client_authority is not None:
                tls["clientcas"] = [str(self._client_authority)]
            http_section["tls"] = tls
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"accesslog": {"disabled": False}, "level": "info", "formatter": "text"},
            "storage": {"filesystem": {"rootdirectory": str(directory / "data")}, "delete": {"enabled": True}},
            "http": http_section,
        }
        if self._mirror_of is not None:
            config["proxy"] = {"remoteurl": self._mirror_of}
        if self._auth:
            (directory / "htpasswd").write_text(_HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "testbed", "path": str(directory / "htpasswd")}}
        return config


def push(
    address: str,
    layout: Path,
    tag: str,
    repository: str,
    as_tag: str | None = None,
    *,
    credentials: tuple[str, str] | None = None,
    tls: bool = False,
) -> None:
    """Push a layout's tag, an index with all it points to, by the OCI distribution-spec's "Push".

    Raises:
        PushError: the registry answered something else than the specification has.

    """
    with _Client(address, credentials, tls=tls) as client:
        _push_manifest(client, layout, oci.find_tag(layout, tag), repository, as_tag or tag)


def _push_manifest(client: _Client, layout: Path, found: oci.Descriptor, repository: str, reference: str) -> None:
    body = oci.load_json(layout, found.digest)
    for child in body.get("manifests", ()):
        descriptor = oci.Descriptor(child["mediaType"], child["digest"], child["size"])
        _push_manifest(client, layout, descriptor, repository, child["digest"])
    for blob in [body[key] for key in ("config",) if key in body] + body.get("layers", []):
        _push_blob(client, oci.blob_path(layout, blob["digest"]), repository, blob["digest"])
    data = oci.blob_path(layout, found.digest).read_bytes()
    target = f"/v2/{repository}/manifests/{reference}"
    client.expect(201, "PUT", target, data, {"Content-Type": found.media_type})


def _push_blob(client: _Client, blob: Path, repository: str, digest: str) -> None:
    if client.request("HEAD", f"/v2/{repository}/blobs/{digest}")[0] == 200:
        return
    headers = client.expect(202, "POST", f"/v2/{repository}/blobs/uploads/", b"")
    where = urlsplit(headers["location"])
    query = "&".join(part for part in (where.query, urlencode({"digest": digest})) if part)
    sizes = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.stat().st_size)}
    client.expect(201, "PUT", f"{where.path}?{query}", blob, sizes)


class _Client:
    """One connection to a registry."""

    def __init__(self, address: str, credentials: tuple[str, str] | None = None, *, tls: bool = False) -> None:
        self._connection = _connection(address, tls=tls)
        self._headers = {"User-Agent": "testbed-push"}
        if credentials is not None:
            import base64

            self._headers["Authorization"] = f"Basic {base64.b64encode(':'.join(credentials).encode()).decode()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._connection.close()

    def request(
        self, method: str, target: str, body: bytes | Path | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body; a Path is sent from its file."""
        all_headers = self._headers | dict(headers or {})
        if isinstance(body, Path):
            with body.open("rb") as source:
                self._connection.request(method, target, source, all_headers)
        else:
            self._connection.request(method, target, body, all_headers)
        response = self._connection.getresponse()
        data = response.read()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, data

    def expect(
        self, status: int, method: str, target: str, body: bytes | Path, headers: Mapping[str, str] | None = None
    ) -> dict[str, str]:
        """The response's headers; raises PushError unless its status is `status`."""
        got, answer, data = self.request(method, target, body, headers)
        if got != status:
            raise PushError(f"{method} {target}: {got}, not {status}: {data[:500]!r}")
        return answer


def _connection(address: str, *, tls: bool) -> http.client.HTTPConnection:
    if not tls:
        return http.client.HTTPConnection(address, timeout=60)
    import ssl

    context = ssl.create_default_context()
    context.check_hostname = False  # the certificate is the test's own, and the address is loopback
    context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(address, timeout=60, context=context)

"""A registry that serves an OCI layout and fails as told: wrong status, wrong bytes, wrong lengths, broken connections."""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal, Self, cast
from urllib.parse import parse_qs

from tests.testbed import oci

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    from typing_extensions import override
else:

    def override(method: Any) -> Any:
        """typing.override came with Python 3.12."""
        return method


TOKEN = "testbed-token"
USER, PASSWORD = "afs", "testbed"
_GATE_TIMEOUT = 60.0


@dataclass(frozen=True)
class Fault:
    """What goes wrong for requests whose "METHOD /path" has the regular expression `pattern`.

    Attributes:
        times: how many requests it hits before it is used up; None is all.
        status: answer with this status and `body`.
        body: replaces the body.
        headers: added to the response.
        truncate: send this many bytes of the body, with a Content-Length to match: a well-formed short answer.
        cut: send this many bytes, then close the connection; the Content-Length is the full one.
        reset: close with a TCP reset where `cut` says, or before the status line without `cut`.
        corrupt: flip the bits of the byte at this offset of the body.
        content_length: claim this length.
        gate: wait (60 s at most) until it is set, before the first byte of the answer or, with `cut`, where that says.
        stall: send this many bytes of the body, then nothing until the server stops or the client goes away.
        rate: bytes per second of the body, for each connection by itself.
        ignore_range: answer 200 with the whole body, whatever range was asked for.

    """

    pattern: str
    times: int | None = None
    status: int | None = None
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    truncate: int | None = None
    cut: int | None = None
    reset: bool = False
    corrupt: int | None = None
    content_length: int | None = None
    gate: threading.Event | None = None
    stall: int | None = None
    rate: int | None = None
    ignore_range: bool = False


@dataclass(frozen=True)
class Seen:
    """One request that the server got, with header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def digest(self) -> str | None:
        """The digest in the path, if any."""
        found = re.search(r"sha256:[0-9a-f]{64}", self.path)
        return found.group(0) if found else None


@dataclass
class _Answer:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class FaultServer:
    """Serves the tags and blobs of one layout under any repository name, from a thread per connection.

    Args:
        layout: the OCI layout directory; read anew for each request.
        auth: "basic", or "token" as registries with a token service do it, for USER with PASSWORD.
        ranges: honour Range requests with 206; otherwise the whole body is sent with 200.
        tls: speak TLS with this context.
        identity_token: what the token service takes in place of a password, by a POST of OAuth 2.
        expires_in: life of a token in seconds; None leaves that out of the answer.

    """

    def __init__(
        self,
        layout: Path,
        *,
        auth: Literal["none", "basic", "token"] = "none",
        ranges: bool = True,
        tls: ssl.SSLContext | None = None,
        identity_token: str | None = None,
        expires_in: int | None = 300,
    ) -> None:
        self.layout = layout
        self.auth = auth
        self.ranges = ranges
        self.tls = tls
        self.identity_token = identity_token
        self.expires_in = expires_in
        self.stopping = threading.Event()
        self.connections = 0
        """How many were accepted so far."""
        self.errors: list[BaseException] = []
        """What went wrong in the server itself; broken connections are not counted."""
        self._lock = threading.Lock()
        self._faults: list[tuple[Fault, list[int]]] = []
        self._seen: list[Seen] = []
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Host and port, as they begin an image's name."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Scheme, host and port."""
        return f"{'http' if self.tls is None else 'https'}://{self.address}"

    def start(self) -> None:
        """Listen on a free loopback port; requests are answered from now on."""
        self._server = _Server(self)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fault server")
        self._thread.start()

    def stop(self) -> None:
        """Close all connections and join all threads."""
        if self._server is None or self._thread is None:
            return
        with self._lock:
            gates = [fault.gate for fault, _ in self._faults if fault.gate is not None]
        self._server.shutdown()
        self.stopping.set()
        for gate in gates:
            gate.set()
        self._server.close_connections()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    def add(self, *faults: Fault) -> None:
        """Program faults; for one request the first that matches and is not used up counts."""
        with self._lock:
            self._faults.extend((fault, [0]) for fault in faults)

    def clear(self) -> None:
        """Forget all faults; those that wait at a gate go on waiting for it."""
        with self._lock:
            self._faults.clear()

    def requests(self, pattern: str = "") -> list[Seen]:
        """Requests so far whose "METHOD /path" has `pattern`; one is counted before it is answered."""
        with self._lock:
            return [seen for seen in self._seen if re.search(pattern, f"{seen.method} {seen.path}")]

    def count(self, pattern: str = "") -> int:
        """How many requests so far have `pattern` in their "METHOD /path"."""
        return len(self.requests(pattern))

    def take(self, seen: Seen) -> Fault | None:
        """Count a request and pick its fault; for the handler."""
        with self._lock:
            self._seen.append(seen)
            for fault, used in self._faults:
                fresh = fault.times is None or used[0] < fault.times
                if fresh and re.search(fault.pattern, f"{seen.method} {seen.path}"):
                    used[0] += 1
                    return fault
        return None

    def answer(self, seen: Seen) -> _Answer:
        """The right answer to a request; for the handler."""
        path = seen.path.partition("?")[0]
        if path == "/token":
            return self._token(seen)
        if not self._allowed(seen):
            return self._unauthorized(path)
        if path == "/v2/":
            return _json_answer(200, {})
        found = re.fullmatch(r"/v2/(.+)/(manifests|blobs)/([^/]+)", path)
        if found is None:
            return _error(404, "NAME_UNKNOWN")
        return self._manifest(found.group(3)) if found.group(2) == "manifests" else self._blob(found.group(3), seen)

    def _manifest(self, reference: str) -> _Answer:
        try:
            if reference.startswith("sha256:"):
                digest = reference
                media_type = str(oci.load_json(self.layout, digest)["mediaType"])
            else:
                found = oci.find_tag(self.layout, reference)
                digest, media_type = found.digest, found.media_type
            body = oci.blob_path(self.layout, digest).read_bytes()
        except (KeyError, FileNotFoundError):
            return _error(404, "MANIFEST_UNKNOWN")
        return _Answer(200, body, {"Content-Type": media_type, "Docker-Content-Digest": digest})

    def _blob(self, digest: str, seen: Seen) -> _Answer:
        try:
            body = oci.blob_path(self.layout, digest).read_bytes()
        except FileNotFoundError:
            return _error(404, "BLOB_UNKNOWN")
        headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": digest}
        if self.ranges:
            headers["Accept-Ranges"] = "bytes"
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", seen.headers.get("range", ""))
        if found is None or not self.ranges:
            return _Answer(200, body, headers)
        first = int(found.group(1))
        last = min(int(found.group(2) or len(body) - 1), len(body) - 1)
        if first > last:
            return _Answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return _Answer(206, body[first : last + 1], headers)

    def _allowed(self, seen: Seen) -> bool:
        if self.auth == "none":
            return True
        expected = _basic() if self.auth == "basic" else f"Bearer {TOKEN}"
        return seen.headers.get("authorization") == expected

    def _unauthorized(self, path: str) -> _Answer:
        challenge = 'Basic realm="testbed"'
        if self.auth == "token":
            found = re.fullmatch(r"/v2/(.+)/(?:manifests|blobs)/[^/]+", path)
            scope = f',scope="repository:{found.group(1)}:pull"' if found else ""
            challenge = f'Bearer realm="{self.url}/token",service="testbed"{scope}'
        answer = _error(401, "UNAUTHORIZED")
        answer.headers["WWW-Authenticate"] = challenge
        return answer

    def _token(self, seen: Seen) -> _Answer:
        if seen.method == "POST":
            form = {name: values[0] for name, values in parse_qs(seen.body.decode()).items()}
            right = form.get("grant_type") == "refresh_token" and self.identity_token is not None
            if not right or form.get("refresh_token") != self.identity_token or not form.get("scope"):
                return _error(401, "UNAUTHORIZED")
            return _json_answer(200, {"access_token": TOKEN, "expires_in": self.expires_in})
        if seen.headers.get("authorization") != _basic():
            return _error(401, "UNAUTHORIZED")
        life = {} if self.expires_in is None else {"expires_in": self.expires_in}
        return _json_answer(200, {"token": TOKEN, "access_token": TOKEN, **life})


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close joins them
    block_on_close = True

    def __init__(self, owner: FaultServer) -> None:
        self.owner = owner
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    @override
    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = super().get_request()
        self.owner.connections += 1
        if self.owner.tls is not None:  # the handshake comes with the first read, in the connection's thread
            connection = self.owner.tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        with self._open_lock:
            self._open.add(connection)
        return connection, peer

    @override
    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        import sys

        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, (ConnectionError, TimeoutError, ssl.SSLError)):
            self.owner.errors.append(error)

    def close_connections(self) -> None:
        """Wake handlers that wait for the next request of a kept connection."""
        with self._open_lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:  # the peer was faster
                    continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        owner = self._server().owner
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.command, self.path, headers, self.rfile.read(int(headers.get("content-length", 0))))
        fault = owner.take(seen) or Fault("")
        if fault.ignore_range:
            headers.pop("range", None)
        if fault.gate is not None and fault.cut is None:
            fault.gate.wait(_GATE_TIMEOUT)
        if fault.reset and fault.cut is None:
            self._reset()
            return
        answer = owner.answer(seen) if fault.status is None else _Answer(fault.status, b"")
        self._send(answer, fault)

    do_HEAD = do_GET
    do_POST = do_GET

    def _send(self, answer: _Answer, fault: Fault) -> None:
        body = answer.body if fault.body is None else fault.body
        if fault.corrupt is not None and fault.corrupt < len(body):
            body = body[: fault.corrupt] + bytes([body[fault.corrupt] ^ 0xFF]) + body[fault.corrupt + 1 :]
        if fault.truncate is not None:
            body = body[: fault.truncate]
        length = len(body) if fault.content_length is None else fault.content_length
        self.send_response(answer.status)
        for name, value in (answer.headers | dict(fault.headers)).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(body[: fault.cut if fault.cut is not None else fault.stall], fault.rate)
        if fault.stall is not None:
            self.wfile.flush()
            self._server().owner.stopping.wait(_GATE_TIMEOUT)
            self.close_connection = True
        if fault.cut is not None and fault.gate is not None:
            self.wfile.flush()
            fault.gate.wait(_GATE_TIMEOUT)
        if fault.cut is not None and fault.reset:
            self._reset()
        if fault.cut is not None or length != len(body):
            self.close_connection = True

    def _server(self) -> _Server:
        return cast("_Server", self.server)

    def _send_body(self, body: bytes, rate: int | None) -> None:
        if rate is None:
            self.wfile.write(body)
            return
        step = max(rate // 200, 1)
        for start in range(0, len(body), step):
            if self._server().owner.stopping.wait(step / rate):
                return
            self.wfile.write(body[start : start + step])

    def _reset(self) -> None:
        """Close with RST: SO_LINGER with a time of zero."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `requests` has what a log would have."""


def _basic() -> str:
    return f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"


def _json_answer(status: int, body: object) -> _Answer:
    return _Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"})


def _error(status: int, code: str) -> _Answer:
    return _json_answer(status, {"errors": [{"code": code, "message": code.lower()}]})

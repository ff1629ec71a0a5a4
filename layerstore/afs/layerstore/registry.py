"""Pulling from an OCI distribution registry over HTTP with urllib3. Blocking: callers run it in threads.

OCI distribution spec 1.1; token authentication as the distribution project documents it. urllib3 follows redirects
and drops Authorization when the host changes; it honours Retry-After.
"""

import base64
import contextlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Retry, Timeout

from afs.core.images import ImageRef
from afs.layerstore.errors import CorruptImage, ImageNotFound, RegistryDenied, RegistryUnreachable
from afs.layerstore.manifests import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST, Layer
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.source import Read

_SMALL_TIMEOUT_S = 45.0  # for a manifest, config or token, beyond the first byte
_MAX_TOKEN = 1 << 20
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_ALIASES = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_RETRIES = Retry(
    total=3, connect=2, read=2, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False,
    backoff_max=5, retry_after_max=30,
)  # fmt: skip


def make_pool(options: RegistryOptions) -> urllib3.PoolManager:
    """The connection pool that all sources of a process share."""
    agent = f"{options.user_agent} ({options.node_id})" if options.node_id else options.user_agent
    return urllib3.PoolManager(
        num_pools=20,
        maxsize=8,
        retries=_RETRIES.new(backoff_factor=options.backoff),
        timeout=Timeout(connect=5, read=30),
        headers={"User-Agent": agent},
    )


class RegistrySource:
    """One image in a registry."""

    def __init__(self, ref: ImageRef, pool: urllib3.PoolManager, options: RegistryOptions) -> None:
        self._name = str(ref)
        self._ref = ref
        self._pool = pool
        self._options = options
        plain = ref.registry in options.plain_http or _LOOPBACK.fullmatch(ref.registry)
        host = _ALIASES.get(ref.registry, ref.registry)
        self._base = f"{'http' if plain else 'https'}://{host}/v2/{ref.repository}"
        self._authorization: str | None = None

    def get_manifest(self, reference: str) -> bytes:
        accept = ", ".join(MANIFEST_TYPES + INDEX_TYPES)
        url = f"{self._base}/manifests/{reference}"
        with self._get(url, {"Accept": accept}) as response:
            return self._read_all(response, MAX_MANIFEST, url)

    def get_blob(self, digest: str, limit: int) -> bytes:
        url = f"{self._base}/blobs/{digest}"
        with self._get(url, {}) as response:
            return self._read_all(response, limit, url)

    @contextlib.contextmanager
    def open_layer(self, layer: Layer) -> Iterator[Read]:
        with self._get(f"{self._base}/blobs/{layer.blob_digest}", {}) as response:

            def read(count: int) -> bytes:
                try:
                    return response.read(count, decode_content=False)
                except (HTTPError, OSError) as error:
                    cause = f"reading layer {layer.blob_digest} failed: {_cause(error)}"
                    raise RegistryUnreachable(self._ref.registry, cause) from None

            yield read

    @contextlib.contextmanager
    def _get(self, url: str, headers: Mapping[str, str]) -> Iterator[urllib3.BaseHTTPResponse]:
        response = self._request(url, headers)
        if response.status == 401:
            response.drain_conn()  # first: what follows may fail, and the connection is good for more
            self._authorization = self._authorize(response)
            response = self._request(url, headers)
        try:
            self._check(response, url)
            yield response
        finally:
            # A body read to its end goes back to the pool; anything else must not be reused.
            if response.closed or getattr(response, "length_remaining", 1) == 0:
                response.release_conn()
            else:
                response.close()

    def _request(self, url: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        sent = {**cast("dict[str, str]", self._pool.headers), **headers}
        if self._authorization:
            sent["Authorization"] = self._authorization
        try:
            return self._pool.request("GET", url, headers=sent, preload_content=False)
        except (HTTPError, OSError) as error:
            raise RegistryUnreachable(self._ref.registry, _cause(error)) from None

    def _check(self, response: urllib3.BaseHTTPResponse, url: str) -> None:
        if response.status == 200:
            return
        detail = f"{_error_detail(response)} (HTTP {response.status} for {url})"
        if response.status == 404:
            raise ImageNotFound(self._name, detail)
        if response.status in (401, 403):
            raise RegistryDenied(self._name, detail)
        raise RegistryUnreachable(self._ref.registry, detail)

    def _read_all(self, response: urllib3.BaseHTTPResponse, limit: int, url: str) -> bytes:
        data, end = bytearray(), time.monotonic() + _SMALL_TIMEOUT_S
        try:
            while chunk := response.read1(1 << 16, decode_content=True):  # what is there: a trickle meets the deadline
                data += chunk
                if len(data) > limit:
                    raise CorruptImage(self._name, f"{url} is larger than {limit} bytes")
                if time.monotonic() > end:
                    raise RegistryUnreachable(self._ref.registry, f"{url} comes too slowly")
        except (HTTPError, OSError) as error:
            raise RegistryUnreachable(self._ref.registry, f"reading {url} failed: {_cause(error)}") from None
        return bytes(data)

    def _authorize(self, response: urllib3.BaseHTTPResponse) -> str | None:
        """The Authorization header that the challenge of a 401 asks for."""
        challenge = response.headers.get("WWW-Authenticate", "")
        kind, fields = challenge.partition(" ")[0].lower(), dict(_CHALLENGE.findall(challenge))
        basic = self._credentials()
        if kind == "basic":
            return basic
        if kind != "bearer" or "realm" not in fields:
            return None
        query = {
            "service": fields.get("service", ""),
            "scope": fields.get("scope", f"repository:{self._ref.repository}:pull"),
        }
        try:
            answer = self._pool.request(
                "GET",
                fields["realm"],
                fields=query,
                headers={"Authorization": basic} if basic else None,
                preload_content=False,
            )
        except (HTTPError, OSError) as error:
            raise RegistryUnreachable(
                self._ref.registry, f"its token service does not answer: {_cause(error)}"
            ) from None
        with contextlib.closing(answer):
            if answer.status != 200:
                raise RegistryDenied(self._name, f"the token service answered HTTP {answer.status}")
            data = self._read_all(answer, _MAX_TOKEN, fields["realm"])
        try:
            document = json.loads(data)
            token = document.get("token") or document["access_token"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            token = None
        if not isinstance(token, str) or not token.isprintable() or not token.isascii():
            raise RegistryDenied(self._name, "the token service's answer holds no token")
        return f"Bearer {token}"

    def _credentials(self) -> str | None:
        """``Basic ...`` from Docker's configuration file, if it has the registry."""
        path = self._options.docker_config
        if path is None or not path.is_file():
            return None
        host = "https://index.docker.io/v1/" if self._ref.registry == "docker.io" else self._ref.registry
        try:
            auths: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("auths") or {}
            entry: dict[str, str] = auths.get(host) or {}
            if "auth" in entry:
                return f"Basic {entry['auth']}"
            if "username" in entry:
                pair = f"{entry['username']}:{entry.get('password', '')}"
                return f"Basic {base64.b64encode(pair.encode()).decode()}"
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise RegistryDenied(self._name, f"cannot read credentials from {path}: {error}") from None
        return None


def _error_detail(response: urllib3.BaseHTTPResponse) -> str:
    """The registry's own words: ``errors[0].message`` of the distribution spec, else the HTTP reason."""
    try:
        first = json.loads(response.read(1 << 16, decode_content=True))["errors"][0]
        return f"{first.get('code', '')} {first.get('message', '')}".strip()
    except (HTTPError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return response.reason or "error"


def _cause(error: BaseException) -> str:
    """The innermost reason, without urllib3's object addresses."""
    reason = getattr(error, "reason", None)
    while isinstance(reason, BaseException):
        error, reason = reason, getattr(reason, "reason", None)
    text = str(error)
    if "object at 0x" in text or "Connection(" in text:
        text = text.partition(": ")[2] or text
    return " ".join(text.split()) or type(error).__name__

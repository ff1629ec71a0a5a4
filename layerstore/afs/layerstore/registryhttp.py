"""HTTP to registries with urllib3: pools of connections, TLS, proxies, redirects, and another try where that may help.

urllib3's own retries and redirects are off: it follows from https to http, keeps a registry's own headers across hosts,
and cannot be told to stop waiting.

State and locks. One :class:`Http` serves all threads of a process. ``_pools`` and ``_plain`` change under ``_lock``;
pools of connections are safe by themselves. An :class:`Answer` belongs to the thread that asked; only
:meth:`Answer.interrupt` may be called by another one.
"""

import contextlib
import http
import json
import logging
import os
import random
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, InsecureRequestWarning, InvalidHeader
from urllib3.util import Retry, Timeout, make_headers

from afs.layerstore.errors import RegistryMisconfigured
from afs.layerstore.registryconnections import POOLS, Exchange
from afs.layerstore.registryfailures import NoTls, RequestFailed, failure, innermost, shown, without_query
from afs.layerstore.registryhosts import Host, Tls
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registrystop import Stop
from afs.layerstore.registryurls import joined, origin

log = logging.getLogger(__name__)
TRIES = 4
_BUSY = frozenset((408, 429, 500, 502, 503, 504))
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MOST_REDIRECTS = 10
_MOST_PAUSE_S = 30.0  # between two tries, whatever Retry-After says
_MOST_BACKOFF_S = 5.0
_PATIENCE_S = 45.0  # for all pauses of one request
_HEAD_TIMEOUT_S = 45.0  # from a request to the end of its answer's head, with connecting and redirects
_SMALL_BODY = 64 << 10  # worth reading to keep the connection
_ASIDE_S = 5.0  # for a body that only says more, or nothing
_MOST_POOLS = 64


@dataclass(slots=True)
class Answer:
    """A response whose body is not read yet. *url* is where it came from in the end, *crossed* whether from elsewhere."""

    response: urllib3.BaseHTTPResponse
    url: str
    crossed: bool
    exchange: Exchange

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.response.status

    def header(self, name: str) -> str:
        """A header's value, or ""."""
        return str(self.response.headers.get(name, ""))

    def read(self, count: int) -> bytes:
        """The next bytes of the body as they were sent, those that are there, b"" at its end. Raises RequestFailed."""
        try:
            # Not read(): given a chunk of length -1, http.client reads all that comes into memory.
            data = self.response.read1(count, decode_content=False)
        except (HTTPError, OSError) as error:
            raise RequestFailed(innermost(error)) from None
        if len(data) > count:  # that of such a chunk, too
            raise RequestFailed("its chunks make no sense")
        return data

    def read_all(self, limit: int, end: float) -> bytes | None:
        """The whole body, None if it is longer than *limit* bytes; *end* is on the monotonic clock. Raises RequestFailed."""
        data = bytearray()
        try:
            with self.exchange.until(end):
                while chunk := self.response.read1(1 << 16, decode_content=True):  # what is there
                    data += chunk
                    if len(data) > limit:
                        return None
                    if time.monotonic() > end:
                        break
        except (HTTPError, OSError) as error:
            if time.monotonic() < end:
                raise RequestFailed(f"reading it failed: {innermost(error)}") from None
        if time.monotonic() >= end:
            raise RequestFailed("it comes too slowly", again=False)
        return bytes(data)

    def detail(self) -> str:
        """The registry's own words, ``errors[0]`` of the distribution spec, else the HTTP reason; then the status."""
        try:
            data = self.read_all(_SMALL_BODY, time.monotonic() + _ASIDE_S)
            first = json.loads(data or b"")["errors"][0]
            said = " ".join(f"{first.get('code', '')} {first.get('message', '')}".split())[:500]
        except (RequestFailed, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = ""
        said = said or self.response.reason or _reason(self.status)
        return f"{said} (HTTP {self.status} for {without_query(self.url)})"

    def discard(self) -> None:
        """Read a body that is not wanted if it is small, to keep the connection, and close."""
        if 0 < (self._left() or 0) <= _SMALL_BODY:
            with contextlib.suppress(RequestFailed):  # then close() closes the connection
                self.read_all(_SMALL_BODY, time.monotonic() + _ASIDE_S)
        self.close()

    def close(self) -> None:
        """Give the connection back if the body was read to its end; close it otherwise, without waiting for anything."""
        self.exchange.release()
        if not self.response.closed and self._left() == 0:
            with contextlib.suppress(HTTPError, OSError):
                self.response.read(decode_content=False)  # waits for nothing; http.client has to see the end
        if self.response.closed:
            self.response.release_conn()
        else:
            self.response.close()

    def _left(self) -> int | None:
        """Bytes of the body that were not read yet, None if nobody knows."""
        return cast("int | None", getattr(self.response, "length_remaining", None))

    def interrupt(self) -> None:
        """Wake the thread that reads the body: it gets an error."""
        self.exchange.wake()


class Http:
    """Sends requests; blocking."""

    def __init__(self, options: RegistryOptions) -> None:
        self._options = options
        agent = f"{options.user_agent} ({options.node_id})" if options.node_id else options.user_agent
        self._headers = {"User-Agent": agent}
        # It logs URLs, and the queries of redirects hold signatures. What goes wrong is in our errors.
        logging.getLogger("urllib3").setLevel(logging.ERROR)
        self._lock = threading.Lock()
        self._pools: dict[tuple[object, ...], urllib3.PoolManager] = {}
        self._plain: set[str] = set()  # of those whose scheme is "either": who speaks http

    def close(self) -> None:
        """Close idle connections."""
        with self._lock:
            for pool in self._pools.values():
                pool.clear()
            self._pools.clear()

    def request(
        self,
        method: str,
        host: Host,
        target: str,
        headers: Mapping[str, str],
        secrets: Mapping[str, str],
        *,
        tries: int = TRIES,
        stop: Stop | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """Ask *host* for *target*: a path with its query, or a whole URL. A final answer may have any status.

        *secrets* are headers that only the server in *target* may see, whatever it redirects to. Broken connections
        get up to *tries* requests; busy servers, too, if that is ``TRIES``, else somebody else is to be asked. *stop*
        ends all of it, waiting for an answer's head too. Raises RequestFailed, RegistryMisconfigured.
        """
        stop = stop or Stop()
        waited = 0.0
        for attempt in range(1, tries + 1):
            if stop.is_set():
                raise _given_up()
            try:
                answer = self._follow(method, host, target, headers, secrets, body, stop)
                if answer.status not in _BUSY or attempt == tries or tries < TRIES:
                    return answer
                cause, pause = f"HTTP {answer.status}", self._pause(attempt, answer.header("Retry-After"))
                if waited + pause > _PATIENCE_S:
                    return answer
                answer.discard()
            except RequestFailed as error:
                if stop.is_set():
                    raise _given_up() from None
                if not error.again or attempt == tries:
                    raise
                cause, pause = error.cause, self._pause(attempt)
            log.info("%s %s: %s; trying again in %.1f s", method, host.netloc, cause, pause)
            waited += pause
            if stop.wait(pause):
                raise _given_up()
        raise AssertionError  # the last try returned or raised

    def _pause(self, attempt: int, retry_after: str = "") -> float:
        """Seconds until the next try: what the server asks for, else longer each time and not in step with others."""
        if retry_after:
            # Python makes no number of 5000 digits, and no date of the year 99999.
            with contextlib.suppress(
                InvalidHeader, ValueError, OverflowError
            ):  # seconds or an HTTP date (RFC 9110, 10.2.3); nonsense is ignored
                return float(min(Retry().parse_retry_after(retry_after), _MOST_PAUSE_S))
        return self.backoff(attempt)

    def backoff(self, attempt: int) -> float:
        """Seconds before another try after *attempt* ones."""
        most: float = min(self._options.backoff * 2 ** (attempt - 1), _MOST_BACKOFF_S)
        return most * random.uniform(0.5, 1.0)  # noqa: S311 - not for secrets

    def base(self, host: Host) -> str:
        """``scheme://netloc`` of *host*, as it turned out."""
        scheme = host.scheme
        if scheme == "either":
            scheme = "http" if host.netloc in self._plain else "https"
        return f"{scheme}://{host.netloc}"

    def _follow(
        self,
        method: str,
        host: Host,
        target: str,
        headers: Mapping[str, str],
        secrets: Mapping[str, str],
        body: bytes | None,
        stop: Stop,
    ) -> Answer:
        """One request and the redirects that it leads to."""
        url = urljoin(self.base(host), target)
        sent, crossed = _merged(self._headers, secrets, headers), False
        end = time.monotonic() + _HEAD_TIMEOUT_S
        for _ in range(_MOST_REDIRECTS + 1):
            try:
                answer = self._send(method, host, url, sent, body, Exchange(stop, end))
            except NoTls:
                if host.scheme != "either" or origin(url) != origin(f"https://{host.netloc}"):
                    raise
                log.warning("registry %s speaks no TLS: using http", host.netloc)
                url = urljoin(f"http://{host.netloc}", target)
                sent.pop("authorization", None)  # that was granted to https
                continue
            except RequestFailed:
                self._speaks_plain(host, url, answers=False)
                raise
            self._speaks_plain(host, url, answers=answer.status not in _REDIRECTS)
            answer.crossed = crossed
            location = answer.header("Location") if answer.status in _REDIRECTS else ""
            if not location or body is not None:
                return answer
            answer.discard()
            url, before = _redirected(url, location, host), url
            if origin(url) != origin(before):  # another port or scheme is another server, too
                sent, crossed = _merged(self._headers, headers), True
        raise RequestFailed(f"more than {_MOST_REDIRECTS} redirects", again=False)

    def _speaks_plain(self, host: Host, url: str, *, answers: bool) -> None:
        """If *url* is by http because TLS failed: go on so as long as it *answers* there."""
        if host.scheme == "either" and origin(url) == origin(f"http://{host.netloc}"):
            with self._lock:
                (self._plain.add if answers else self._plain.discard)(host.netloc)

    def _send(
        self, method: str, host: Host, url: str, headers: Mapping[str, str], body: bytes | None, exchange: Exchange
    ) -> Answer:
        scheme, name, port = origin(url)
        proxy = host.proxy or self._options.proxies.choose(scheme, name, port)
        try:
            pool = self._pool(host, proxy, tls=scheme == "https")
            with exchange.requesting():
                # The read time-out is for each piece that comes: a body as a whole may take its time.
                response = pool.urlopen(
                    method,
                    url,
                    headers=dict(headers),
                    body=body,
                    retries=False,
                    redirect=False,
                    preload_content=False,
                    timeout=Timeout(connect=host.dial_timeout, read=self._options.stall_s),
                )
        except (HTTPError, OSError, ssl.SSLError) as error:
            if exchange.woken:
                raise _late() from None
            raise failure(error, host.netloc, host.scheme, url, proxy) from None
        if exchange.woken:
            response.close()
            raise _late()
        if response.status == 407:
            response.close()
            raise RequestFailed(f"proxy {shown(proxy)} wants credentials (HTTP 407)", again=False)
        return Answer(response, url, False, exchange)

    def _pool(self, host: Host, proxy: str, *, tls: bool) -> urllib3.PoolManager:
        """Connections with the host's TLS settings through *proxy*; the files' identity is part of the key."""
        if not tls:  # reading the system's authorities takes 0.1 s: not for http
            host = replace(host, tls=Tls())
        files = (*host.tls.authorities, *(path for pair in host.tls.clients for path in pair))
        try:
            stamps = tuple(_stamp(path) for path in files)
        except OSError as error:
            raise RegistryMisconfigured(host.netloc, f"cannot read {error.filename}: {error.strerror}") from None
        key = (tls, host.tls, stamps, proxy)
        with self._lock:
            if key not in self._pools:
                if len(self._pools) >= _MOST_POOLS:  # files that changed leave pools behind; those in use live on
                    for pool in self._pools.values():
                        pool.clear()
                    self._pools.clear()
                self._pools[key] = self._make_pool(host, proxy, tls=tls)
            return self._pools[key]

    def _make_pool(self, host: Host, proxy: str, *, tls: bool) -> urllib3.PoolManager:
        context = make_context(host.netloc, host.tls) if tls else None
        size = max(16, self._options.connections)  # the threads that resolve images are 16
        if not proxy:
            manager = urllib3.PoolManager(num_pools=20, maxsize=size, ssl_context=context)
            manager.pool_classes_by_scheme = POOLS
            return manager
        parts = urlsplit(proxy)
        user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}" if parts.username else None
        try:
            manager = urllib3.ProxyManager(
                shown(proxy), num_pools=20, maxsize=size, ssl_context=context,
                proxy_headers=make_headers(proxy_basic_auth=user),
            )  # fmt: skip
        except (HTTPError, ValueError):
            raise RegistryMisconfigured(
                host.netloc, f"{shown(proxy)} is not the URL of an http or https proxy"
            ) from None
        manager.pool_classes_by_scheme = POOLS
        return manager


def make_context(netloc: str, tls: Tls) -> ssl.SSLContext:
    """What TLS connections to *netloc* need; RegistryMisconfigured for files that are no certificates."""
    # Without verification the system's authorities need not be read.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if tls.skip_verify else ssl.create_default_context()
    # From Python 3.13 on, authorities without some extensions are refused, as people make them for private registries.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    path: Path | None = None
    try:
        for path in tls.authorities:
            context.load_verify_locations(cafile=path)
        for path, key in tls.clients:  # OpenSSL keeps one of each kind of key, the last
            context.load_cert_chain(path, key)
    except OSError as error:  # ssl.SSLError is one
        raise RegistryMisconfigured(netloc, f"{path} holds no certificate that can be used: {error}") from None
    if tls.skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        urllib3.disable_warnings(InsecureRequestWarning)  # once for each connection; the operator asked for it
    return context


def _merged(*mappings: Mapping[str, str]) -> dict[str, str]:
    """Headers in lower case, so that a later one replaces an earlier one however it is written."""
    return {name.lower(): value for mapping in mappings for name, value in mapping.items()}


def _stamp(path: Path) -> tuple[int, ...]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _redirected(url: str, location: str, host: Host) -> str:
    try:
        target = joined(url, location)
    except ValueError:
        raise RequestFailed("it redirects to something that is not an http URL", again=False) from None
    if origin(url).scheme == "https" and origin(target).scheme == "http" and not host.tls.skip_verify:
        raise RequestFailed(f"it redirects from https to {without_query(target)}, in the clear", again=False)
    return target


def _given_up() -> RequestFailed:
    return RequestFailed("it was given up", again=False)


def _late() -> RequestFailed:
    return RequestFailed(f"no answer within {_HEAD_TIMEOUT_S:.0f} s", again=False)


def _reason(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "error"

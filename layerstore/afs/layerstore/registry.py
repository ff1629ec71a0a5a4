"""Pulling from OCI distribution registries and their mirrors. Blocking: callers run it in threads.

OCI distribution spec 1.1. Whom to ask, and with which settings, is :mod:`afs.layerstore.registryhosts`'s; requests are
:mod:`afs.layerstore.registryhttp`'s, authorization :mod:`afs.layerstore.registryauth`'s and the bodies of layers
:mod:`afs.layerstore.registrydownload`'s. Here is what is asked of whom: each mirror in its order, then the registry.
A mirror that fails in any way is left with a line in the log.
"""

import contextlib
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar
from urllib.parse import quote

from afs.core.digests import is_digest, sha256_digest
from afs.core.errors import AfsError
from afs.core.images import ImageRef
from afs.layerstore.errors import (
    CorruptImage,
    ImageNotFound,
    RegistryDenied,
    RegistryMisconfigured,
    RegistryUnreachable,
)
from afs.layerstore.manifests import INDEX_TYPES, MANIFEST_TYPES, MAX_MANIFEST, Layer, parse_json
from afs.layerstore.registryauth import AuthorizationFailed, Authorizer
from afs.layerstore.registrycredentials import CredentialFile
from afs.layerstore.registrydownload import reading
from afs.layerstore.registryfailures import RequestFailed, without_query
from afs.layerstore.registryhosts import Host, hosts_of
from afs.layerstore.registryhttp import TRIES, Answer, Http
from afs.layerstore.registryoptions import RegistryOptions
from afs.layerstore.registrystop import Stop
from afs.layerstore.source import Read

log = logging.getLogger(__name__)
_ACCEPT = {"Accept": ", ".join(MANIFEST_TYPES + INDEX_TYPES)}
_SMALL_TIMEOUT_S = 45.0  # for a manifest or config, beyond the first byte
_MIRROR_TRIES = 2  # a connection that was kept may have gone stale; with all else, the next host does better
_NO_RANGES = frozenset((400, 501))  # of servers that should ignore what they do not know, but refuse it
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
T = TypeVar("T")


class Registries:
    """What all sources of a process share: connections and tokens. Usable from threads."""

    def __init__(self, options: RegistryOptions) -> None:
        self.options = options
        self.http = Http(options)
        self.authorizer = Authorizer(self.http, CredentialFile(options.docker_config))

    def source(self, ref: ImageRef, stop: Stop | None = None) -> "RegistrySource":
        """The source of one image; *stop* ends its requests for manifests and configs. Raises RegistryMisconfigured."""
        return RegistrySource(ref, self, stop or Stop())

    def close(self) -> None:
        """Close idle connections."""
        self.http.close()


class _HostFailed(Exception):
    """One host cannot be used; *kind* is the error that this is if no other one can."""

    def __init__(self, kind: type[AfsError], cause: str) -> None:
        self.kind, self.cause = kind, cause
        super().__init__(cause)


class RegistrySource:
    """One image in a registry."""

    def __init__(self, ref: ImageRef, registries: Registries, stop: Stop) -> None:
        self._name = str(ref)
        self._ref = ref
        self._registries = registries
        self._stop = stop
        self._hosts = hosts_of(ref.registry, registries.options)
        self._served: list[Host] = []  # whose bytes the last layer was made of, in this order
        self._failed: set[Host] = set()  # who could not give it
        self._distrusted: set[Host] = set()

    def get_manifest(self, reference: str) -> bytes:
        """See :class:`afs.layerstore.source.Source`."""

        def ask(host: Host, tries: int) -> bytes:
            return self._small(host, "manifests", reference, MAX_MANIFEST, tries)

        return self._first(self._able("pull" if is_digest(reference) else "resolve"), reference, ask)

    def current_digest(self, reference: str) -> str:
        """See :class:`afs.layerstore.source.Source`. A HEAD request: Docker Hub does not count them."""

        def ask(host: Host, tries: int) -> str:
            target = self._target(host, "manifests", reference)
            with contextlib.closing(self.send("HEAD", host, target, dict(_ACCEPT), tries)) as answer:
                if answer.status == 429:  # a GET would only make it worse
                    raise refusal(answer)
                digest = answer.header("Docker-Content-Digest") if answer.status == 200 else ""
                return digest if is_digest(digest) else ""  # a GET tells what is wrong

        return self._first(self._able("resolve"), reference, ask)

    def get_blob(self, digest: str, limit: int) -> bytes:
        """See :class:`afs.layerstore.source.Source`."""

        def ask(host: Host, tries: int) -> bytes:
            return self._small(host, "blobs", digest, limit, tries)

        return self._first(self._able("pull"), digest, ask)

    @contextlib.contextmanager
    def open_layer(self, layer: Layer) -> Iterator[Read]:
        """See :class:`afs.layerstore.source.Source`."""
        hosts = [host for host in self._able("pull") if host not in self._distrusted]
        self._served, self._failed = [], set()
        options = self._registries.options
        with reading(_LayerBlob(self, hosts, layer), options.connections, options.parallel_from) as read:
            yield read

    def distrust(self) -> bool:
        """See :class:`afs.layerstore.source.Source`."""
        before = len(self._distrusted)
        # Of several, the last one gets a chance to show that it alone is good.
        self._distrusted.update(self._failed, self._served[:-1] if len(self._served) > 1 else self._served)
        left = any(host not in self._distrusted for host in self._able("pull"))
        return left and len(self._distrusted) > before  # nobody is asked for a layer of no bytes

    # Hosts

    def _able(self, capability: str) -> list[Host]:
        found = [host for host in self._hosts if (host.pulls if capability == "pull" else host.resolves)]
        if not found:
            cause = f"its hosts.toml names no host with the capability to {capability}"
            raise RegistryMisconfigured(self._ref.registry, cause)
        return found

    def _first(self, hosts: Sequence[Host], what: str, ask: Callable[[Host, int], T]) -> T:
        """What the first of *hosts* answers that can; ask(host, tries) raises _HostFailed."""
        failures: list[tuple[Host, _HostFailed]] = []
        for host in hosts:
            try:
                return ask(host, TRIES if host is hosts[-1] else _MIRROR_TRIES)
            except _HostFailed as failure:
                failures.append((host, failure))
                if host is not hosts[-1]:
                    self.log_failure(host, what, failure.cause)
        raise self.error(failures)

    def log_failure(self, host: Host, what: str, cause: str) -> None:
        """Say that the next host is asked."""
        log.warning("%s cannot give %s of %s: %s; asking the next host", host.netloc, what, self._name, cause)

    def error(self, failures: "Sequence[tuple[Host, _HostFailed]]") -> AfsError:
        """The last failure as an error, with the causes of those before."""
        host, failure = failures[-1]
        before = "".join(f"; before it, {mirror.netloc}: {other.cause}" for mirror, other in failures[:-1])
        if failure.kind is RegistryUnreachable:
            name = self._ref.registry if not host.namespace else host.netloc
            return RegistryUnreachable(name, f"image {self._name}: {failure.cause}{before}")
        if failure.kind is ImageNotFound:
            return ImageNotFound(self._name, failure.cause + before)
        if failure.kind is RegistryDenied:
            return RegistryDenied(self._name, failure.cause + before)
        return CorruptImage(self._name, failure.cause + before)

    # Requests

    def _small(self, host: Host, kind: str, reference: str, limit: int, tries: int) -> bytes:
        """A manifest or a small blob, whose digest is checked if it has one."""
        data, named = self._whole_body(host, kind, reference, limit, tries)
        what = "manifest" if kind == "manifests" else "config"
        if not is_digest(reference):  # a portal that wants a login says 200, too
            try:
                parse_json(self._name, what, data)
            except CorruptImage as error:
                cause = error.line.removeprefix(f"image {self._name} is corrupt: ")
                raise _HostFailed(CorruptImage, cause) from None
        wanted = reference if is_digest(reference) else named
        if is_digest(wanted) and (actual := sha256_digest(data)) != wanted:
            raise _HostFailed(CorruptImage, f"its {what} should be {wanted} but is {actual}")
        return data

    def _whole_body(self, host: Host, kind: str, reference: str, limit: int, tries: int) -> tuple[bytes, str]:
        """As :meth:`_body`; the last host is asked again if a body breaks off."""
        for attempt in itertools.count(1):
            try:
                return self._body(host, kind, reference, limit, tries)
            except RequestFailed as error:
                if not error.again or attempt == tries or tries < TRIES or self._stop.wait(self.http.backoff(attempt)):
                    raise _HostFailed(RegistryUnreachable, error.cause) from None
        raise AssertionError  # counting has no end

    def _body(self, host: Host, kind: str, reference: str, limit: int, tries: int) -> tuple[bytes, str]:
        """The body of one answer, and the digest that it names or ""; raises RequestFailed if it breaks off."""
        headers = dict(_ACCEPT) if kind == "manifests" else {}
        end = time.monotonic() + _SMALL_TIMEOUT_S
        target = self._target(host, kind, reference)
        with contextlib.closing(self.send("GET", host, target, headers, tries)) as answer:
            if answer.status != 200:
                raise refusal(answer)
            try:
                data = answer.read_all(limit, end)
            except RequestFailed as error:
                raise RequestFailed(f"{without_query(answer.url)}: {error.cause}", again=error.again) from None
            if data is None:
                raise _HostFailed(CorruptImage, f"{without_query(answer.url)} is larger than {limit} bytes")
            return data, answer.header("Docker-Content-Digest")

    def _target(self, host: Host, kind: str, reference: str) -> str:
        # A mirror may stand in for several registries: containerd tells it which one is meant, and so do we.
        query = f"?ns={quote(host.namespace, safe='')}" if host.namespace else ""
        return f"{host.path}/{self._ref.repository}/{kind}/{reference}{query}"

    def layer_target(self, host: Host, layer: Layer) -> str:
        """The path of a layer's blob at *host*."""
        return self._target(host, "blobs", layer.blob_digest)

    def send(
        self,
        method: str,
        host: Host,
        target: str,
        headers: dict[str, str],
        tries: int,
        stop: Stop | None = None,
    ) -> Answer:
        """An answer of any status but a 401 that credentials help against. Raises _HostFailed, RegistryMisconfigured."""
        stop = stop or self._stop
        http, authorizer, repository = self._registries.http, self._registries.authorizer, self._ref.repository
        known = authorizer.known(host, repository)
        try:
            secrets = {name.lower(): value for name, value in host.headers}
            if known:
                secrets["authorization"] = known
            answer = http.request(method, host, target, headers, secrets, tries=tries, stop=stop)
            if answer.status != 401 or answer.crossed:  # who was redirected to gets no credentials of ours
                return answer
            challenge = answer.header("WWW-Authenticate")
            try:
                renewed = authorizer.renew(host, repository, known, challenge, stop)
            except BaseException:
                answer.discard()
                raise
            if not renewed:
                return answer
            answer.discard()
            secrets["authorization"] = renewed
            return http.request(method, host, target, headers, secrets, tries=tries, stop=stop)
        except RequestFailed as error:
            raise _HostFailed(RegistryUnreachable, error.cause) from None
        except AuthorizationFailed as error:
            raise _HostFailed(RegistryDenied if error.denied else RegistryUnreachable, error.cause) from None

    def failed(self, host: Host) -> None:
        """Remember that *host* could not give the layer."""
        self._failed.add(host)

    def served(self, host: Host) -> None:
        """Remember that bytes of the layer come from *host*."""
        if host not in self._served:
            self._served.append(host)

    @property
    def http(self) -> Http:
        """For the pauses between tries."""
        return self._registries.http


def refusal(answer: Answer) -> _HostFailed:
    """What an answer means that is not the wanted one; reads its body."""
    kinds: dict[int, type[AfsError]] = {404: ImageNotFound, 401: RegistryDenied, 403: RegistryDenied}
    return _HostFailed(kinds.get(answer.status, RegistryUnreachable), answer.detail())


class _LayerBlob:
    """A layer's blob for :mod:`afs.layerstore.registrydownload`.

    ``_number`` (whom to ask), ``_failures`` and ``_direct`` (where a host redirected to, whole URLs) change under ``_lock``.
    """

    def __init__(self, source: RegistrySource, hosts: Sequence[Host], layer: Layer) -> None:
        self.size = layer.blob_size
        self._source = source
        self._hosts = hosts
        self._layer = layer
        self._lock = threading.Lock()
        self._number = 0
        self._failures: list[tuple[Host, _HostFailed]] = []
        self._direct: dict[int, str] = {}

    def open(self, start: int, end: int, stop: Stop) -> tuple[int, Answer]:
        """As the protocol says."""
        while True:
            with self._lock:
                number = self._number
            host = self._hosts[number]
            try:
                answer = self._ask(number, host, start, end, stop)
            except _HostFailed as failure:
                if stop.is_set():  # the reader went away: no fault of the host
                    raise RequestFailed(failure.cause, again=False) from None
                self._leave(number, failure)
                continue
            with self._lock:
                self._source.served(host)
            return number, answer

    def give_up(self, number: int, cause: str) -> None:
        """As the protocol says."""
        self._leave(
            number, _HostFailed(RegistryUnreachable, f"reading layer {self._layer.blob_digest} failed: {cause}")
        )

    def pause(self, attempt: int) -> float:
        """As the protocol says."""
        return self._source.http.backoff(attempt)

    def _leave(self, number: int, failure: _HostFailed) -> None:
        with self._lock:
            if number != self._number:  # another thread did
                return
            self._failures.append((self._hosts[number], failure))
            self._source.failed(self._hosts[number])
            if number + 1 == len(self._hosts):
                raise self._source.error(self._failures)
            self._number += 1
        self._source.log_failure(self._hosts[number], f"layer {self._layer.blob_digest}", failure.cause)

    def _ask(self, number: int, host: Host, start: int, end: int, stop: Stop) -> Answer:
        headers = {} if (start, end) == (0, self.size) else {"Range": f"bytes={start}-{end - 1}"}
        answer = self._get(number, host, headers, stop)
        if headers and answer.status in _NO_RANGES:
            answer.discard()
            answer = self._get(number, host, {}, stop)
        try:
            self._check(answer, start)
        except BaseException:
            answer.close()
            raise
        if answer.crossed:
            with self._lock:
                self._direct[number] = answer.url
        return answer

    def _get(self, number: int, host: Host, headers: dict[str, str], stop: Stop) -> Answer:
        answer = self._ask_directly(number, host, headers, stop)
        if answer is not None:
            return answer
        target = self._source.layer_target(host, self._layer)
        tries = TRIES if host is self._hosts[-1] else _MIRROR_TRIES
        return self._source.send("GET", host, target, headers, tries, stop)

    def _ask_directly(self, number: int, host: Host, headers: dict[str, str], stop: Stop) -> Answer | None:
        """The answer of the store that *host* redirected to before: it need not be asked for each piece.

        None if it redirected nowhere, or if that URL is no good any more: such URLs expire.
        """
        with self._lock:
            url = self._direct.get(number)
        if url is None:
            return None
        try:
            answer = self._source.http.request("GET", host, url, headers, {}, tries=1, stop=stop)
        except RequestFailed as error:
            cause = error.cause
        else:
            if answer.status in (200, 206):
                return answer
            cause = f"HTTP {answer.status}"
            answer.close()
        log.info("%s redirected to what is no good any more: %s", host.netloc, cause)
        with self._lock:
            self._direct.pop(number, None)
        return None

    def _check(self, answer: Answer, start: int) -> None:
        """That the answer has what was asked for, as long as the manifest says."""
        if answer.status == 206:
            found = _CONTENT_RANGE.fullmatch(answer.header("Content-Range").strip())
            length = answer.header("Content-Length")
            if found is None or int(found[1]) != start or length not in ("", str(int(found[2]) + 1 - start)):
                raise _HostFailed(RegistryUnreachable, "it answers with another range than it was asked for")
            total = found[3]
        elif answer.status == 200:
            total = answer.header("Content-Length") or "*"
        elif answer.status == 416:
            total = answer.header("Content-Range").rpartition("/")[2] or "fewer"
        else:
            raise refusal(answer)
        if answer.status == 416 or total not in ("*", str(self.size)):
            blob = f"layer {self._layer.blob_digest} should have {self.size} bytes"
            raise _HostFailed(CorruptImage, f"{blob} but has {total} at {without_query(answer.url)}")

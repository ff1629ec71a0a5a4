"""Authorization for registries: tokens, as the distribution project documents them, and basic authentication.

State and locks: ``_granted`` maps (server's URL, repository) to what was granted last, under ``_lock``. Whoever needs a new
grant holds the lock of its key meanwhile, so threads that are refused together ask once.
"""

import json
import re
import threading
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode
from weakref import WeakValueDictionary

from afs.layerstore.registrycredentials import CredentialFile, Credentials
from afs.layerstore.registryfailures import RequestFailed, without_query
from afs.layerstore.registryhosts import Host
from afs.layerstore.registryhttp import Answer, Http
from afs.layerstore.registrystop import Stop
from afs.layerstore.registryurls import origin

_MAX_TOKEN = 1 << 20
_TIMEOUT_S = 45.0
_DEFAULT_LIFE_S = 60.0  # of a token that does not say, by the distribution project's documentation
_MOST_LIFE_S = 3e7
_MOST_CHALLENGE = 8 << 10  # characters; real ones have a few hundred
# A word, and a value if it is a parameter. Possessive, so that a hostile header takes no longer than its length.
_ITEM = re.compile(r'([^\s,="]++)(?:\s*+=\s*+(?:"((?:[^"\\]++|\\.)*+)"|([^\s,"]++)))?+')
_ANY_REPOSITORY = ""


class AuthorizationFailed(Exception):
    """The token service refuses or does not make sense; *denied* tells which of PermissionDenied and Unavailable it is."""

    def __init__(self, cause: str, *, denied: bool = True) -> None:
        self.cause, self.denied = cause, denied
        super().__init__(cause)


@dataclass(frozen=True, slots=True, repr=False)
class Grant:
    """The value of an Authorization header, good until *expires* on the monotonic clock, which processes share."""

    header: str
    expires: float


class Authorizer:
    """What this process was granted; all methods but :meth:`known` block."""

    def __init__(self, http: Http, credentials: CredentialFile) -> None:
        self._http = http
        self._credentials = credentials
        self._lock = threading.Lock()
        self._granted: dict[tuple[str, str], Grant] = {}
        self._asking: WeakValueDictionary[tuple[str, str], threading.Lock] = WeakValueDictionary()  # while in use

    def known(self, host: Host, repository: str) -> str:
        """The Authorization header for pulls of *repository* from *host*, or "" if one has to be asked for."""
        now, server = time.monotonic(), self._http.base(host)
        with self._lock:
            for name in (repository, _ANY_REPOSITORY):
                grant = self._granted.get((server, name))
                if grant is not None and now < grant.expires:
                    return grant.header
        return ""

    def export(self, repository: str) -> list[tuple[str, str, str, float]]:
        """What is known for *repository*, for another process of this machine; see :meth:`learn`."""
        with self._lock:
            return [
                (server, name, grant.header, grant.expires)
                for (server, name), grant in self._granted.items()
                if name in (repository, _ANY_REPOSITORY)
            ]

    def learn(self, grants: list[tuple[str, str, str, float]]) -> None:
        """Take over what another process was granted."""
        with self._lock:
            for server, name, header, expires in grants:
                known = self._granted.get((server, name))
                if known is None or known.expires < expires:
                    self._granted[server, name] = Grant(header, expires)

    def renew(self, host: Host, repository: str, refused: str, challenge: str, stop: Stop) -> str:
        """The header that answers a 401 with this *challenge* (WWW-Authenticate) to the header *refused*; "" if none can.

        Raises AuthorizationFailed, RegistryMisconfigured.
        """
        server = self._http.base(host)
        with self._lock:
            asking = self._asking.setdefault((server, repository), threading.Lock())
        if not asking.acquire(timeout=stop.left()):
            raise AuthorizationFailed("its token service does not answer", denied=False)
        try:
            known = self.known(host, repository)
            if known and known != refused:  # another thread was faster
                return known
            name, grant = self._ask(host, repository, parse_challenge(challenge), stop)
            with self._lock:
                self._forget(server, repository, refused)
                # A token service may say the same again; a name and password that were refused are so for good.
                if grant is None or (grant.header == refused and name == _ANY_REPOSITORY):
                    return ""
                self._granted[server, name] = grant
                return grant.header
        finally:
            asking.release()

    def _forget(self, server: str, repository: str, refused: str) -> None:
        """Drop what expired, and what was refused."""
        names, now = (repository, _ANY_REPOSITORY), time.monotonic()
        self._granted = {
            (where, name): grant
            for (where, name), grant in self._granted.items()
            if now < grant.expires and not (where == server and name in names and grant.header == refused)
        }

    def _ask(
        self, host: Host, repository: str, challenges: dict[str, dict[str, str]], stop: Stop
    ) -> tuple[str, Grant | None]:
        """What a grant is for, a repository or any, and the grant."""
        credentials = self._credentials.find(host.netloc)
        bearer = challenges.get("bearer", {})
        if "realm" in bearer:
            if credentials.registry_token:
                return repository, Grant(f"Bearer {credentials.registry_token}", time.monotonic() + _DEFAULT_LIFE_S)
            return repository, self._token(host, repository, bearer, credentials, stop)
        if "basic" in challenges and credentials.basic:
            return _ANY_REPOSITORY, Grant(credentials.basic, float("inf"))  # until it is refused
        return repository, None

    def _token(
        self, host: Host, repository: str, challenge: dict[str, str], credentials: Credentials, stop: Stop
    ) -> Grant:
        realm = challenge["realm"]
        url = self._http.base(host)
        try:
            service, registry = origin(realm), origin(url)
        except ValueError:
            raise AuthorizationFailed("it names a token service that is not an http URL") from None
        if registry.scheme == "https" and service.scheme != "https" and not host.tls.skip_verify:
            raise AuthorizationFailed(f"its token service {without_query(realm)} would get credentials in the clear")
        scope = challenge.get("scope") or f"repository:{repository}:pull"
        asked = {"service": challenge["service"]} if challenge.get("service") else {}
        secrets = {name.lower(): value for name, value in host.headers} if service == registry else {}
        started = time.monotonic()
        try:
            if credentials.identity_token:
                answer = self._refresh(
                    host, realm, {**asked, "scope": scope}, secrets, credentials.identity_token, stop
                )
            else:
                if credentials.basic:
                    secrets["authorization"] = credentials.basic
                query = urlencode([*asked.items(), *(("scope", one) for one in scope.split())])
                target = f"{realm}{'&' if '?' in realm else '?'}{query}"
                answer = self._http.request("GET", host, target, {}, secrets, stop=stop)
            try:
                return _grant(answer, realm, started)
            finally:
                answer.close()
        except RequestFailed as error:
            raise AuthorizationFailed(f"its token service does not answer: {error.cause}", denied=False) from None

    def _refresh(
        self, host: Host, realm: str, query: dict[str, str], secrets: dict[str, str], identity_token: str, stop: Stop
    ) -> Answer:
        """Token for token, OAuth 2 (RFC 6749, section 6)."""
        form = {
            "grant_type": "refresh_token",
            **query,
            "client_id": "afs",
            "refresh_token": identity_token,
        }
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        return self._http.request("POST", host, realm, headers, secrets, body=urlencode(form).encode(), stop=stop)


def _grant(answer: Answer, realm: str, started: float) -> Grant:
    """The token in the service's answer."""
    if answer.status != 200:
        denied = answer.status != 429 and answer.status < 500
        raise AuthorizationFailed(f"the token service answered HTTP {answer.status}", denied=denied)
    data = answer.read_all(_MAX_TOKEN, started + _TIMEOUT_S)
    life: Any = None
    try:
        document: Any = json.loads(data or b"")
        token = document.get("token") or document["access_token"]
        life = document.get("expires_in")
    except (ValueError, KeyError, AttributeError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.isprintable() or not token.isascii():
        raise AuthorizationFailed(f"the token service's answer holds no token ({without_query(realm)})")
    seconds = float(min(life, _MOST_LIFE_S)) if isinstance(life, (int, float)) and life > 0 else _DEFAULT_LIFE_S
    return Grant(f"Bearer {token}", started + seconds)


def parse_challenge(text: str) -> dict[str, dict[str, str]]:
    """The challenges in a WWW-Authenticate header (RFC 9110, section 11.6.1) by scheme, with their parameters.

    Schemes and names of parameters are in lower case. Nothing is found in a header longer than 8 KiB.
    """
    found: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    for item in _ITEM.finditer(text) if len(text) <= _MOST_CHALLENGE else ():
        name, quoted, plain = item.groups()
        if quoted is not None:
            parameters[name.lower()] = re.sub(r"\\(.)", r"\1", quoted)
        elif plain is not None:
            parameters[name.lower()] = plain
        else:
            parameters = {}
            found.setdefault(name.lower(), parameters)
    return found

"""Whom to ask for a registry's images, and how: containerd's ``hosts.toml``, or Docker's certificate files.

The layout and its meaning are containerd's (docs/hosts.md and core/remotes/docker/config/hosts.go there): for
``registry.example.com:5000`` the first of the directories ``registry.example.com_5000_``, ``registry.example.com:5000``
and ``_default`` that exists. In it is ``hosts.toml``, or without that ``*.crt`` (authorities) and ``*.cert`` with
``*.key`` (client certificates) as for Docker. What differs: a file that cannot be used is an error, where containerd
goes on without it, and so is a key that it does not know.

Nothing is cached: a file is 0.1 ms to read and parse, once for each image and layer, and so a change counts at once.
"""

import re
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from afs.core.errors import InvalidArgument
from afs.core.units import parse_duration
from afs.layerstore.errors import RegistryMisconfigured
from afs.layerstore.registryoptions import RegistryOptions

DIAL_TIMEOUT_S = 5.0
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_ALIASES = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}
_HOST_KEYS = frozenset(
    ("capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout", "proxy")
)
_CAPABILITIES = frozenset(("pull", "resolve", "push"))
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class Tls:
    """*authorities* are trusted besides the system's; *clients* are (certificate, key) files, the same if it has both."""

    authorities: tuple[Path, ...] = ()
    clients: tuple[tuple[Path, Path], ...] = ()
    skip_verify: bool = False


@dataclass(frozen=True, slots=True)
class Host:
    """One server to ask. *scheme* is ``http``, ``https``, or ``either``: https, but http if no TLS is spoken there.

    *namespace* is the registry that it stands in for, or empty if it is that registry itself. *proxy* is its own one.
    """

    scheme: str
    netloc: str
    path: str = "/v2"
    namespace: str = ""
    resolves: bool = True
    pulls: bool = True
    tls: Tls = Tls()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # may hold secrets
    dial_timeout: float = DIAL_TIMEOUT_S
    proxy: str = field(default="", repr=False)


def hosts_of(registry: str, options: RegistryOptions) -> tuple[Host, ...]:
    """Whom to ask for images of *registry* (``host[:port]``), in this order; blocking. Raises RegistryMisconfigured."""
    directory = _directory(registry, options.hosts_dir)
    if directory is None:
        hosts = [_server(registry, Tls(), options)]
    else:
        try:
            hosts = _Directory(registry, directory, options).read()
        except OSError as error:
            raise RegistryMisconfigured(
                registry, f"cannot read {error.filename or directory}: {error.strerror}"
            ) from None
    return tuple(_with_options(host, registry, options) for host in hosts)


def _directory(registry: str, root: Path | None) -> Path | None:
    if root is None:
        return None
    name, colon, port = registry.rpartition(":")
    names = [f"{name}_{port}_"] if colon and not registry.endswith("]") else []
    try:
        return next((root / name for name in (*names, registry, "_default") if (root / name).is_dir()), None)
    except OSError as error:
        raise RegistryMisconfigured(registry, f"cannot read {root}: {error.strerror}") from None


def _server(registry: str, tls: Tls, options: RegistryOptions) -> Host:
    """The registry itself, where no file says otherwise."""
    netloc = _ALIASES.get(registry, registry)
    if registry in options.plain_http:
        scheme = "http"
    elif registry in options.insecure:
        scheme = "either"
    elif _LOOPBACK.fullmatch(registry):
        scheme = "http" if tls == Tls() else "either" if tls.skip_verify else "https"
    else:
        scheme = "https"
    return Host(scheme, netloc, tls=tls)


def _with_options(host: Host, registry: str, options: RegistryOptions) -> Host:
    """*host* with what holds for all: the namespace of a mirror, more authorities, the list of insecure ones."""
    mirror = host.netloc not in (registry, _ALIASES.get(registry))
    insecure = host.netloc in options.insecure or (not mirror and registry in options.insecure)
    tls = Tls(host.tls.authorities + options.authorities, host.tls.clients, host.tls.skip_verify or insecure)
    return replace(host, namespace=registry if mirror else "", tls=tls)


class _Directory:
    """One registry's directory."""

    def __init__(self, registry: str, directory: Path, options: RegistryOptions) -> None:
        self._registry = registry
        self._directory = directory
        self._file = directory / "hosts.toml"
        self._options = options

    def read(self) -> list[Host]:
        """Its hosts; raises OSError for what cannot be read, RegistryMisconfigured for what makes no sense."""
        try:
            data = self._file.read_bytes()
        except FileNotFoundError:
            data = b""
        if not data.strip():
            return [_server(self._registry, self._docker_files(), self._options)]
        try:
            document = tomllib.loads(data.decode())
        except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are ones
            self._fail(f"it is not TOML: {error}")
        mirrors = document.pop("host", {})
        server = document.pop("server", "")
        if not isinstance(mirrors, dict):
            self._fail("'host' is not a table")
        hosts = [self._host(str(url), table, f"host {url!r}: ") for url, table in mirrors.items()]
        if not isinstance(server, str):
            self._fail("'server' is not a string")
        return [*hosts, self._host(server, document, "")]

    def _docker_files(self) -> Tls:
        names = sorted(path for path in self._directory.iterdir() if path.is_file())
        clients = []
        for path in names:
            if path.suffix == ".cert":
                key = path.with_suffix(".key")
                clients.append((path, key if key in names else path))
        return Tls(tuple(path for path in names if path.suffix == ".crt"), tuple(clients))

    def _host(self, url: str, table: Any, where: str) -> Host:
        if not isinstance(table, dict):
            self._fail(f"{where}not a table")
        if unknown := sorted(table.keys() - _HOST_KEYS):
            self._fail(f"{where}unknown key {unknown[0]!r}")
        capabilities = self._capabilities(table.get("capabilities"), where)
        tls = Tls(
            self._authorities(table.get("ca"), where),
            self._clients(table.get("client"), where),
            self._bool(table, "skip_verify", where),
        )
        override = self._bool(table, "override_path", where)
        host = self._parse(url, tls, where, override=override) if url else _server(self._registry, tls, self._options)
        return replace(
            host,
            resolves={"pull", "resolve"} <= capabilities,
            pulls="pull" in capabilities,
            tls=tls,
            headers=self._headers(table.get("header"), where),
            dial_timeout=self._dial_timeout(table.get("dial_timeout"), where),
            proxy=self._proxy(table.get("proxy"), where),
        )

    def _parse(self, url: str, tls: Tls, where: str, *, override: bool) -> Host:
        text = url if "://" in url else f"https://{url}"
        try:
            parts = urlsplit(text)
            port = parts.port
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        except ValueError:
            parts, port, valid = urlsplit(""), None, False
        if not valid or parts.query or parts.fragment:
            self._fail(f"{where}{url!r} is not the URL of a server")
        path = parts.path.rstrip("/")
        if not override and not path.endswith("/v2"):
            path += "/v2"
        # As containerd: TLS settings for an http URL are taken to mean that TLS may be spoken there.
        scheme = "either" if parts.scheme == "http" and tls != Tls() and port != 80 else parts.scheme
        return Host(scheme, _ALIASES.get(parts.netloc, parts.netloc), path)

    def _capabilities(self, value: Any, where: str) -> frozenset[str]:
        if not value and value in (None, []):
            return _CAPABILITIES
        found = frozenset(text.lower() for text in self._strings(value, "capabilities", where))
        if unknown := sorted(found - _CAPABILITIES):
            self._fail(f"{where}unknown capability {unknown[0]!r}")
        return found

    def _authorities(self, value: Any, where: str) -> tuple[Path, ...]:
        names = [] if value is None else [value] if isinstance(value, str) else self._strings(value, "ca", where)
        return tuple(self._directory / name for name in names)

    def _clients(self, value: Any, where: str) -> tuple[tuple[Path, Path], ...]:
        entries = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(entries, list):
            self._fail(f"{where}'client' is neither a path nor a list")
        found = []
        for entry in entries:
            names = [entry, ""] if isinstance(entry, str) else self._strings(entry, "client", where)
            if len(names) != 2 or not names[0]:
                self._fail(f"{where}'client' has an entry that is no pair of certificate and key")
            found.append((self._directory / names[0], self._directory / (names[1] or names[0])))
        return tuple(found)

    def _headers(self, value: Any, where: str) -> tuple[tuple[str, str], ...]:
        if value is None:
            return ()
        if not isinstance(value, dict):
            self._fail(f"{where}'header' is not a table")
        found = []
        for name, given in value.items():
            text = given if isinstance(given, str) else ", ".join(self._strings(given, f"header {name}", where))
            if not _HEADER_NAME.fullmatch(name) or not text.isprintable() or not text.isascii():
                self._fail(f"{where}header {name!r} has characters that no header can have")
            found.append((name, text))
        return tuple(found)

    def _dial_timeout(self, value: Any, where: str) -> float:
        if value is None:
            return DIAL_TIMEOUT_S
        try:
            seconds = parse_duration(value) if isinstance(value, str) else 0.0
        except InvalidArgument:
            seconds = 0.0
        if seconds <= 0:
            self._fail(f"{where}'dial_timeout' is {value!r}, not a time such as \"5s\"")
        return seconds

    def _proxy(self, value: Any, where: str) -> str:
        if value is None:
            return ""
        if not isinstance(value, str) or not re.fullmatch(r"https?://[^/?#]+/?", value):
            self._fail(f"{where}'proxy' is not the URL of an http or https proxy")
        return value

    def _bool(self, table: dict[str, Any], key: str, where: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            self._fail(f"{where}{key!r} is neither true nor false")
        return value

    def _strings(self, value: Any, key: str, where: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self._fail(f"{where}{key!r} is not a list of strings")
        return value

    def _fail(self, cause: str) -> NoReturn:
        raise RegistryMisconfigured(self._registry, f"{self._file}: {cause}")

"""Which proxy a request goes through: the rules of HTTP_PROXY, HTTPS_PROXY and NO_PROXY as Go's programs follow them.

These are what Docker and containerd do with the same variables (golang.org/x/net/http/httpproxy).
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Proxies:
    """*http* and *https* are URLs for requests of that scheme, with credentials if they are needed, or empty.

    *no_proxy* lists, with commas between them, who is asked directly: ``*``, a domain with all below it, ``.domain`` for
    those below it only, an address, a CIDR block; all but the first and the last may have a port.
    """

    http: str = ""
    https: str = ""
    no_proxy: str = ""

    def choose(self, scheme: str, host: str, port: int) -> str:
        """The proxy's URL for a request to *host*, or "" to ask it directly. Loopback addresses are never proxied."""
        proxy = self.https if scheme == "https" else self.http
        if not proxy or _is_direct(self.no_proxy, host.strip("[]").lower().rstrip("."), port):
            return ""
        return proxy if "://" in proxy else f"http://{proxy}"


def proxies_from(environ: Mapping[str, str]) -> Proxies:
    """What the environment says; upper case wins."""

    def find(name: str) -> str:
        return environ.get(name) or environ.get(name.lower()) or ""

    return Proxies(find("HTTP_PROXY"), find("HTTPS_PROXY"), find("NO_PROXY"))


def _is_direct(no_proxy: str, host: str, port: int) -> bool:
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    return any(_covers(entry.strip().lower(), host, address, port) for entry in no_proxy.split(","))


def _covers(entry: str, host: str, address: "ipaddress.IPv4Address | ipaddress.IPv6Address | None", port: int) -> bool:
    """Whether one *entry* of NO_PROXY means *host*."""
    if entry == "*":
        return True
    if "/" in entry:
        try:
            return address is not None and address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False  # no CIDR block: no host name has a slash
    name, wanted = entry, ""
    if _address(entry) is None and ":" in entry:
        name, _, wanted = entry.rpartition(":")
    if not name or (wanted and wanted != str(port)):
        return False
    if (literal := _address(name.strip("[]"))) is not None:
        return literal == address
    name = name.removeprefix("*")
    return host.endswith(name) if name.startswith(".") else host == name or host.endswith(f".{name}")


def _address(text: str) -> "ipaddress.IPv4Address | ipaddress.IPv6Address | None":
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None

"""Where afslets and other proxies are: addresses as they stand, and names that DNS turns into addresses, again and again.

A name gives all of its IPv4 addresses, or all IPv6 ones if it has none of the former: a host with both is one node, not two.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from afs.core.errors import InvalidArgument

log = logging.getLogger(__name__)
Resolve = Callable[[str, int], Awaitable[list[str]]]
_DNS = "dns:///"


@dataclass(frozen=True, slots=True)
class Target:
    """One setting. *name* is empty for what is an address already."""

    text: str
    name: str = ""
    port: int = 0


def parse_target(text: str) -> Target:
    """``HOST:PORT``, ``dns:///NAME:PORT`` or ``unix:PATH``; InvalidArgument."""
    if text.startswith("unix:"):
        return Target(text)
    host, colon, port = text.removeprefix(_DNS).rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidArgument(f"not an address: {text!r}; write HOST:PORT, dns:///NAME:PORT or unix:PATH")
    if not text.startswith(_DNS) and (host == "localhost" or _is_address(host)):
        return Target(text)
    return Target(text, host, int(port))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


async def resolve(name: str, port: int) -> list[str]:
    """All addresses of *name* as ``ADDRESS:PORT``, by getaddrinfo(3) in a thread; OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(name, port, type=socket.SOCK_STREAM)
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    four = [f"{host}:{port}" for family, host in addresses if family is socket.AF_INET]
    return four or [f"[{host}]:{port}" for family, host in addresses if family is socket.AF_INET6]


class Endpoints:
    """Turns settings into addresses. What a name meant last stands while it cannot be resolved."""

    def __init__(self, targets: Iterable[str], resolve: Resolve = resolve) -> None:
        self._targets = [parse_target(text) for text in targets]
        self._resolve = resolve
        self._last: dict[str, list[str]] = {}
        self.errors: dict[str, str] = {}

    @property
    def has_names(self) -> bool:
        """Whether looking again may give something else."""
        return any(target.name for target in self._targets)

    async def look(self) -> list[str]:
        """All addresses now, each once, in the order of the settings."""
        names = [target for target in self._targets if target.name]
        if names:
            await asyncio.gather(*(self._look_up(target) for target in names))
        found: dict[str, None] = {}
        for target in self._targets:
            addresses = self._last.get(target.text, []) if target.name else [target.text]
            found.update(dict.fromkeys(addresses))
        return list(found)

    async def _look_up(self, target: Target) -> None:
        try:
            addresses = await self._resolve(target.name, target.port)
        except (OSError, UnicodeError) as error:  # UnicodeError: IDNA refuses the name
            if target.text not in self.errors:
                log.warning("%s cannot be resolved: %s", target.text, error)
            self.errors[target.text] = f"{target.text} cannot be resolved: {error}"
        else:
            self.errors.pop(target.text, None)
            self._last[target.text] = addresses

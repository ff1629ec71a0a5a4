"""The other proxies: how many runs wait and run there, asked over HTTP and added up.

State, on one event loop: the last sums, asked anew when they are older than a second; whoever comes meanwhile shares the
question. A proxy that finds itself among its peers, as behind one DNS name, knows itself by its id.
"""

import asyncio
import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from afs.core.errors import AfsError, Unavailable
from afs.proxy import httpd
from afs.proxy.endpoints import Endpoints

_TIMEOUT_S = 1.0
_FRESH_S = 1.0


@dataclass(frozen=True, slots=True)
class Peers:
    """What the others said. *answering* are addresses, *unreachable* says why by address."""

    queued: int = 0
    running: int = 0
    answering: list[str] = field(default_factory=list)
    unreachable: dict[str, str] = field(default_factory=dict)


class PeerWatch:
    """*own_id* is what this proxy's ``/status`` tells as ``id``."""

    def __init__(self, addresses: Iterable[str], own_id: str = "") -> None:
        self.own_id = own_id or secrets.token_hex(8)
        self._addresses = list(addresses)
        self._endpoints = Endpoints(self._addresses)
        self._asking: asyncio.Task[Peers] | None = None
        self._asked_at = 0.0

    async def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def ask(self) -> Peers:
        """The others' sums, at most a second old."""
        if not self._addresses:
            return Peers()
        if self._asking is None or time.monotonic() - self._asked_at > _FRESH_S:
            self._asking = asyncio.create_task(self._ask_all(), name="other proxies")
            self._asked_at = time.monotonic()
        return await asyncio.shield(self._asking)

    async def _ask_all(self) -> Peers:
        addresses = await self._endpoints.look()
        told = await asyncio.gather(*(self._ask_one(address) for address in addresses))
        unreachable = dict(self._endpoints.errors)
        answering, queued, running = [], 0, 0
        for address, answer in zip(addresses, told, strict=True):
            if isinstance(answer, AfsError):
                unreachable[address] = answer.line
            elif answer is not None:
                answering.append(address)
                queued, running = queued + answer[0], running + answer[1]
        return Peers(queued, running, answering, unreachable)

    async def _ask_one(self, address: str) -> tuple[int, int] | AfsError | None:
        try:
            document = json.loads(await httpd.get(address, "/status?local=1", _TIMEOUT_S))
            if document["id"] == self.own_id:
                return None
            return int(document["queue"]["queued"]), int(document["queue"]["running"])
        except AfsError as error:
            return error
        except (ValueError, TypeError, KeyError) as error:
            return Unavailable(f"{address} is no afs_proxy: {type(error).__name__}: {error}")

"""The network of a run: none, a port of a bridge, or the node's own; within what the operator allows. See docs/networks.md.

State: everything here belongs to the event loop; what blocks runs in threads: one that makes namespaces
(:mod:`afs.afslet.netns`), one that sets up the bridge and its ports, and four that remove ports
(:mod:`afs.afslet.bridge`), where most of the time is waiting in the kernel: 45 runs a second instead of 20. The
bridge is made for the first run that wants it, under a lock. A number stands for an address; it is taken before its port
is made and given back only after the port is gone, even when a run is cancelled in between, so nothing awaits its
thread's end without :func:`_to_the_end`.
"""

import asyncio
import ipaddress
import logging
import os
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, TypeVarTuple

from afs.afslet.bridge import MAX_PORTS, Bridge, BridgeSettings
from afs.afslet.egress import parse_entries
from afs.afslet.netnames import clear_network, names_of
from afs.afslet.netns import Pool
from afs.afslet.netroutes import choose_block
from afs.afslet.requests import Egress
from afs.core.errors import InvalidArgument, PermissionDenied, ResourceExhausted
from afs.proto.v1 import afslet_pb2 as pb

log = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")
MODES: dict[str, int] = {"none": pb.NETWORK_NONE, "bridge": pb.NETWORK_BRIDGE, "host": pb.NETWORK_HOST}
_NAMES = {mode: name for name, mode in MODES.items()}
HOSTS, RESOLV_CONF = "/etc/hosts", "/etc/resolv.conf"


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    """The operator's policy for networks of runs: the settings of afslet with these names, which tell what each is."""

    network_default: str
    networks_allowed: tuple[str, ...]
    network_pool: int
    bridge_subnet: str
    egress_allow: tuple[str, ...]
    egress_deny: tuple[str, ...]
    egress_connections: int
    name_servers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunNetwork:
    """What the runtime has to be told. *path* leads to the network namespace to join; None: the node's own.

    *files* are to be mounted read-only over files of the container: its path to ours.
    """

    path: str | None
    files: Mapping[str, Path]
    address: str = ""  # on the bridge


class Networks:
    """The networks of the afslet *name* (its `cgroup_parent`); files for runs are below *directory*, which exists."""

    def __init__(self, settings: NetworkSettings, name: str, directory: Path) -> None:
        """InvalidArgument if a setting makes no sense."""
        self._settings = settings
        self._name = name
        self._directory = directory
        self._default = _mode(settings.network_default, "network_default")
        self._allowed = {_mode(mode, "networks_allowed") for mode in settings.networks_allowed}
        if self._default not in self._allowed:
            raise InvalidArgument(f"network_default {settings.network_default} is not one of networks_allowed")
        self._bridge_settings = _bridge_settings(settings)
        self._pool = Pool(settings.network_pool)
        self._bridge: Bridge | None = None
        self._free: deque[int] = deque()  # the longest unused first: what is late for an ended run finds nobody
        self._ports = 0
        self._making = asyncio.Lock()
        self._attaching = ThreadPoolExecutor(1, "afs-attach")
        self._detaching = ThreadPoolExecutor(4, "afs-detach")

    async def start(self) -> None:
        """Remove what an earlier afslet of this name left. FailedPrecondition if the bridge's subnet cannot be had."""
        if await asyncio.to_thread(clear_network, self._name):
            log.warning("removed the bridge network that an earlier afslet left")
        if pb.NETWORK_BRIDGE in self._allowed:
            choose_block(self._bridge_settings.subnet, 0)
        (self._directory / "hosts").write_text(_hosts("127.0.0.1", "afs"), encoding="ascii")
        self._pool.start()

    async def close(self) -> None:
        """Give back everything; no run is left."""
        self._pool.close()
        for threads in (self._attaching, self._detaching):
            threads.shutdown()
        if self._bridge is not None:
            await asyncio.to_thread(clear_network, self._name)
            self._bridge = None

    def check(self, mode: int, egress: Sequence[str]) -> tuple[int, list[Egress]]:
        """The mode that a run gets and where it may connect to; PermissionDenied, InvalidArgument."""
        mode = mode or self._default
        if mode not in self._allowed:
            allowed = ",".join(self._settings.networks_allowed)
            raise PermissionDenied(
                f"network mode {_NAMES.get(mode, mode)} is not allowed on this node: networks_allowed={allowed}"
            )
        if egress and mode != pb.NETWORK_BRIDGE:
            raise InvalidArgument(f"egress_allow makes no sense with network mode {_NAMES.get(mode, mode)}")
        return mode, parse_entries(egress)

    @asynccontextmanager
    async def network(self, mode: int, egress: Sequence[str], hostname: str) -> AsyncIterator[RunNetwork]:
        """A network for one run, gone at the end. PermissionDenied, InvalidArgument, ResourceExhausted, Unavailable."""
        mode, targets = self.check(mode, egress)
        if mode == pb.NETWORK_HOST:
            yield RunNetwork(None, {path: Path(path) for path in (HOSTS, RESOLV_CONF) if os.path.exists(path)})
            return
        namespace = await self._pool.take()
        try:
            path = f"/proc/{os.getpid()}/fd/{namespace}"
            if mode == pb.NETWORK_BRIDGE:
                async with self._port(namespace, targets, hostname) as (address, files):
                    yield RunNetwork(path, files, address)
            elif hostname in ("", "afs"):
                yield RunNetwork(path, {HOSTS: self._directory / "hosts"})
            else:
                hosts = self._write("hosts", _hosts("127.0.0.1", hostname))
                try:
                    yield RunNetwork(path, {HOSTS: hosts})
                finally:
                    hosts.unlink()
        finally:
            os.close(namespace)

    @asynccontextmanager
    async def _port(
        self, namespace: int, egress: list[Egress], hostname: str
    ) -> AsyncIterator[tuple[str, dict[str, Path]]]:
        bridge = await self._made_bridge()
        if self._ports >= MAX_PORTS or not self._free:
            raise ResourceExhausted(f"all {self._ports} ports of the node's bridge network are in use")
        number = self._free.popleft()
        self._ports += 1
        written: list[Path] = []
        try:
            await _to_the_end(self._attaching, bridge.attach, number, namespace, egress)
            address = str(bridge.address(number))
            written.append(self._write("hosts", _hosts(address, hostname or "afs")))
            written.append(self._write("resolv", "".join(f"nameserver {server}\n" for server in bridge.servers)))
            yield address, dict(zip((HOSTS, RESOLV_CONF), written, strict=True))
        finally:
            for path in written:
                path.unlink()
            try:
                await _to_the_end(self._detaching, self._detach, bridge, number)
            finally:
                self._ports -= 1

    def _detach(self, bridge: Bridge, number: int) -> None:
        bridge.detach(number)
        self._free.append(number)  # not after a failure: then it stays out of use

    async def _made_bridge(self) -> Bridge:
        async with self._making:
            if self._bridge is None:
                bridge = Bridge(names_of(self._name), self._bridge_settings)
                try:
                    await _to_the_end(self._attaching, bridge.make)
                except BaseException:
                    await _to_the_end(self._attaching, clear_network, self._name)
                    raise
                self._bridge = bridge
                self._free.extend(bridge.numbers)
            return self._bridge

    def _write(self, kind: str, text: str) -> Path:
        path = self._directory / f"{kind}-{secrets.token_hex(8)}"
        path.write_text(text, encoding="ascii")
        return path


def _mode(name: str, where: str) -> int:
    if name not in MODES:
        raise InvalidArgument(f"{where}: {name!r} is not one of {', '.join(MODES)}")
    return MODES[name]


def _bridge_settings(settings: NetworkSettings) -> BridgeSettings:
    try:
        subnet = ipaddress.IPv4Network(settings.bridge_subnet)
        for server in settings.name_servers:
            ipaddress.IPv4Address(server)
    except ValueError as error:
        raise InvalidArgument(f"bridge_subnet or name_servers: {error}") from None
    if not 8 <= subnet.prefixlen <= 29:
        raise InvalidArgument(f"bridge_subnet {subnet} must have 8 to 29 bits")
    for entries in (settings.egress_allow, settings.egress_deny):
        parse_entries(entries)
    return BridgeSettings(
        subnet, settings.egress_allow, settings.egress_deny, settings.name_servers, settings.egress_connections
    )


def _hosts(address: str, hostname: str) -> str:
    return f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{hostname}\n"


async def _to_the_end(threads: ThreadPoolExecutor, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """Call *function* in a thread; who is cancelled meanwhile waits for its end first, so it is known what there is."""
    future = asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if (failure := future.exception()) is not None:
            log.error("%s", failure)
        raise cancelled
    return future.result()

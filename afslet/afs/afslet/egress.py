"""Where runs on a bridge may connect to, as nftables rules.

Every packet of a run is judged by the rules as they are, never by what an earlier packet of its connection was: a run
that gets the address of an ended one inherits nothing. Judged is the address that the run asked for, before anybody
translates it (kube-proxy, published ports of Docker). A run costs one transaction when it comes and one when it goes.
What is denied is refused and not dropped, so programs need not wait; resets, because ICMP errors have a rate limit.

By nft(8) and not by pyroute2, which has nftables' expressions but not its language: sets of concatenations, reject and
connection limits would be bytes put together by hand, while a transaction by nft takes 2 ms.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from afs.afslet.netnames import ANY_BRIDGE, FORWARDERS, Names
from afs.afslet.requests import Egress, parse_egress
from afs.core.errors import InvalidArgument
from afs.core.run import run

DENIED = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "168.63.129.16",  # Azure's wire server
    "169.254.0.0/16",
    "169.254.169.254",  # metadata of most clouds: by itself, so that a wider entry that allows does not open it
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
_REFUSE = "goto refuse"
_DNS = 53


def parse_entries(entries: Iterable[str]) -> list[Egress]:
    """ADDRESS[/BITS][:PORT] each, of IPv4; InvalidArgument."""
    parsed = []
    for entry in entries:
        egress = parse_egress(entry)
        if egress.network.version != 4:
            raise InvalidArgument(f"egress {entry!r}: runs have IPv4 only")
        parsed.append(egress)
    return parsed


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows and denies; the most specific entry counts, of equal ones that which allows."""

    allow: Sequence[Egress]
    deny: Sequence[Egress]

    def allowed(self) -> list[ipaddress.IPv4Network]:
        """Where runs get only because it is allowed."""
        return [entry.network for entry in self.allow if isinstance(entry.network, ipaddress.IPv4Network)]

    def rules(self) -> list[str]:
        """In their order; what none of them matches is allowed."""
        verdicts = [(entry, _REFUSE) for entry in self.deny] + [(entry, "accept") for entry in self.allow]
        specific = sorted(verdicts, key=lambda item: (-item[0].network.prefixlen, not item[0].port, item[1] == _REFUSE))
        return [f"{_match(entry)} {verdict}" for entry, verdict in specific]


def make_policy(
    allow: Iterable[str], deny: Iterable[str], attached: Iterable[ipaddress.IPv4Network], servers: Iterable[str]
) -> Policy:
    """The operator's entries over what is denied by itself; *servers* answer names. InvalidArgument."""
    names = [Egress(ipaddress.ip_network(server), _DNS) for server in servers]
    near = [Egress(network, 0) for network in attached]
    return Policy(parse_entries(allow) + names, parse_entries([*DENIED, *deny]) + near)


def _match(entry: Egress) -> str:
    port = f" meta l4proto {{ tcp, udp }} th dport {entry.port}" if entry.port else ""
    return f"ip daddr {entry.network}{port}"


class Rules:
    """The tables of one bridge network. Blocking; each method is one transaction: CommandFailed."""

    def __init__(self, names: Names, connections: int) -> None:
        self._names = names
        self._connections = connections

    def make(
        self, block: ipaddress.IPv4Network, gateway: ipaddress.IPv4Address, policy: Policy, switched: Iterable[str]
    ) -> None:
        """Both tables; no run is in them. *switched* are the interfaces that forward for us only."""
        bridge, table = self._names.bridge, self._names.table
        elements = ", ".join(f'"{interface}"' for interface in sorted(switched))
        filled = f"elements = {{ {elements} }};" if elements else ""
        rules = "\n".join(policy.rules())
        _nft(f"""
table inet {table} {{
  set {FORWARDERS} {{ type ifname; {filled} }}
  map runs {{ type ipv4_addr : verdict; }}
  chain refuse {{
    meta l4proto tcp reject with tcp reset
    reject with icmpx admin-prohibited
  }}
  chain operator {{
    {rules}
    accept
  }}
  chain egress {{
    meta nfproto != ipv4 drop
    ct direction reply drop
    ct state invalid drop
    fib daddr type local {_REFUSE}
    fib daddr type != unicast drop
    ip saddr vmap @runs
    drop
  }}
  chain prerouting {{ type filter hook prerouting priority mangle; iifname "{bridge}" goto egress; }}
  chain input {{ type filter hook input priority filter - 1; iifname "{bridge}" drop; }}
  chain forward {{
    type filter hook forward priority filter - 1;
    oifname "{bridge}" ct state established accept
    oifname "{bridge}" ct state related meta l4proto icmp accept
    oifname "{bridge}" drop
    iifname @{FORWARDERS} oifname != "{ANY_BRIDGE}*" drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat;
    ip saddr {block} oifname != "{bridge}" masquerade
  }}
}}
table bridge {table} {{
  set ports {{ type ifname . ether_addr . ipv4_addr; }}
  chain port {{
    ether type ip iifname . ether saddr . ip saddr @ports accept
    ether type arp arp daddr ip {gateway} iifname . ether saddr . arp saddr ip @ports iifname . arp saddr ether . arp saddr ip @ports accept
    drop
  }}
  chain prerouting {{ type filter hook prerouting priority dstnat; iifname "{self._names.ports}*" goto port; }}
}}
""")

    def add(self, number: int, address: ipaddress.IPv4Address, mac: str, egress: Sequence[Egress]) -> None:
        """Let the run of an address out, to *egress* only if there is any."""
        chain = f"inet {self._names.table} run{number}"
        lines = [f"add chain {chain}", f"add rule {chain} ct state new ct count over {self._connections} {_REFUSE}"]
        lines += [f"add rule {chain} {_match(entry)} goto operator" for entry in egress]
        lines += [f"add rule {chain} {_REFUSE if egress else 'goto operator'}"]
        lines += [f"add element {element}" for element in self._elements(number, address, mac)]
        _nft("\n".join(lines))

    def remove(self, number: int, address: ipaddress.IPv4Address, mac: str) -> None:
        """Undo :meth:`add`."""
        chain = f"inet {self._names.table} run{number}"
        lines = [f"delete element {element}" for element in self._elements(number, address, mac)]
        _nft("\n".join([*lines, f"flush chain {chain}", f"delete chain {chain}"]))

    def _elements(self, number: int, address: ipaddress.IPv4Address, mac: str) -> tuple[str, str]:
        port = f'"{self._names.port(number)}" . {mac} . {address}'
        return (
            f"inet {self._names.table} runs {{ {address} : goto run{number} }}",
            f"bridge {self._names.table} ports {{ {port} }}",
        )


def _nft(text: str) -> None:
    run(["nft", "-f", "-"], stdin=f"{text}\n".encode())

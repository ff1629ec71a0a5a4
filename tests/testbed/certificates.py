"""Certificates for tests, made with openssl: an authority, servers on loopback, clients."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Certificates:
    """Paths of PEM files; `server` and `client` are (certificate, key), signed by `authority`."""

    authority: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]


def make_certificates(directory: Path) -> Certificates:
    """An authority of its own, a server's certificate for 127.0.0.1 and localhost, and a client's; 0.1 s."""
    authority, key = directory / "ca.crt", directory / "ca.key"
    _openssl("req", "-x509", *_KEY, "-keyout", key, "-out", authority, "-days", "2", "-subj", "/CN=AFS testbed")
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    made = []
    for name, extension in (("server", names), ("client", "extendedKeyUsage=clientAuth")):
        pair = directory / f"{name}.cert", directory / f"{name}.key"
        arguments = ("-keyout", pair[1], "-out", pair[0], "-subj", f"/CN={name}", "-addext", extension)
        _openssl("req", "-x509", *_KEY, "-CA", authority, "-CAkey", key, "-days", "2", *arguments)
        made.append(pair)
    return Certificates(authority, made[0], made[1])


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

"""The smallest image that runs: one layer with one static program, which prints a line and exits with 0.

The program is put together here from machine code, so that the check needs neither a compiler nor a registry. It makes two
system calls, write(1, line, length) and exit(0); the line says which check made it. ELF as in elf(5).
"""

import hashlib
import io
import json
import struct
import tarfile
from typing import NamedTuple

from afs.core.errors import Unimplemented

PROGRAM_PATH = "check"
_BASE = 0x400000
_ELF_HEADER, _PROGRAM_HEADER = 64, 56


class Machine(NamedTuple):
    """A kind of processor: as uname(2) calls it, as OCI does, and as ELF does."""

    uname: str
    oci: str
    elf: int


_MACHINES = {machine.uname: machine for machine in (Machine("x86_64", "amd64", 62), Machine("aarch64", "arm64", 183))}


def machine(uname: str) -> Machine:
    """The kind of processor that uname(2) calls *uname*; Unimplemented if there is no program for it."""
    if uname not in _MACHINES:
        raise Unimplemented(f"there is no tiny program for {uname} machines, only for {' and '.join(_MACHINES)}")
    return _MACHINES[uname]


def program(kind: Machine, line: bytes) -> bytes:
    """A static ELF file that prints *line*, of at most 65535 bytes, and exits with 0."""
    body = (_x86_64(len(line)) if kind.uname == "x86_64" else _aarch64(len(line))) + line
    size = _ELF_HEADER + _PROGRAM_HEADER + len(body)
    entry = _BASE + _ELF_HEADER + _PROGRAM_HEADER
    # 64 bits, little-endian, version 1; an executable; its program headers follow at once, and there are no sections.
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = ident + struct.pack("<HHIQQQIHHHHHH", 2, kind.elf, 1, entry, _ELF_HEADER, 0, 0, 64, 56, 1, 0, 0, 0)
    # One segment to load, readable and executable: all of the file. Pages of 64 KiB are the largest that Linux has.
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return header + segment + body


def _x86_64(length: int) -> bytes:
    return b"".join(
        [
            b"\xbf\x01\x00\x00\x00",  # mov edi, 1
            b"\x48\x8d\x35" + struct.pack("<i", 21),  # lea rsi, [rip + 21]: behind the 21 bytes that follow
            b"\xba" + struct.pack("<I", length),  # mov edx, length
            b"\xb8\x01\x00\x00\x00",  # mov eax, 1 (write)
            b"\x0f\x05",  # syscall
            b"\x31\xff",  # xor edi, edi
            b"\xb8\x3c\x00\x00\x00",  # mov eax, 60 (exit)
            b"\x0f\x05",  # syscall
        ]
    )


def _aarch64(length: int) -> bytes:
    def movz(register: int, value: int) -> int:
        return 0xD2800000 | value << 5 | register

    supervisor_call = 0xD4000001  # svc #0
    words = [
        movz(0, 1),
        0x10000000 | 7 << 5 | 1,  # adr x1, . + 28: behind the 7 instructions from here on
        movz(2, length),
        movz(8, 64),  # write
        supervisor_call,
        movz(0, 0),
        movz(8, 93),  # exit
        supervisor_call,
    ]
    return struct.pack("<8I", *words)


def archive(kind: Machine, name: str, line: bytes) -> bytes:
    """A tar of an OCI image layout with one image, called *name* in full, that prints *line*."""
    layer = _tar({PROGRAM_PATH: program(kind, line)}, mode=0o755)
    blobs: dict[str, bytes] = {}
    config = {
        "architecture": kind.oci,
        "os": "linux",
        "config": {"Entrypoint": [f"/{PROGRAM_PATH}"]},
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _add(blobs, "application/vnd.oci.image.config.v1+json", _json(config)),
        "layers": [_add(blobs, "application/vnd.oci.image.layer.v1.tar", layer)],
    }
    described = _add(blobs, "application/vnd.oci.image.manifest.v1+json", _json(manifest))
    described["annotations"] = {"io.containerd.image.name": name}
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json({"schemaVersion": 2, "manifests": [described]}),
    }
    return _tar(files | {f"blobs/sha256/{digest.partition(':')[2]}": blob for digest, blob in blobs.items()})


def _add(blobs: dict[str, bytes], media_type: str, blob: bytes) -> dict[str, object]:
    """Add *blob* to *blobs* and give its descriptor."""
    digest = _digest(blob)
    blobs[digest] = blob
    return {"mediaType": media_type, "digest": digest, "size": len(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _tar(files: dict[str, bytes], mode: int = 0o644) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()

#!/usr/bin/env python3
"""Generate the Python stubs beside their .proto files; ``--check`` only compares and fails on a difference."""

import filecmp
import os
import pathlib
import sys
import tempfile

from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parent
SOURCES = {PROTO: "afs/proto", PROTO.parent: "tests/testbed"}
"""Where imports begin, and the directory below it with packages of .proto files; what tests alone need is not installed."""


def generate(root: pathlib.Path, below: str, out: pathlib.Path) -> None:
    protos = sorted(str(path.relative_to(root)) for path in root.glob(f"{below}/*/*.proto"))
    include = pathlib.Path(protoc.__file__).parent / "_proto"
    # protoc finds its plugins on PATH, and they are installed beside this interpreter.
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    plugins = ["--mypy_opt=quiet", "--mypy_grpc_opt=quiet"]
    plugins += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{root}", f"-I{include}", *plugins, *protos]):
        raise SystemExit("protoc failed")


def stale(root: pathlib.Path, below: str) -> list[str]:
    """The stubs that differ from what the .proto files give, are missing, or have none."""
    with tempfile.TemporaryDirectory() as temporary:
        out = pathlib.Path(temporary)
        generate(root, below, out)
        made = {path.relative_to(out) for path in out.rglob("*_pb2*")}
        committed = {
            path.relative_to(root) for path in (root / below).rglob("*_pb2*") if path.suffix in (".py", ".pyi")
        }
        different = [path for path in made & committed if not filecmp.cmp(out / path, root / path, shallow=False)]
        return sorted(map(str, [*(made ^ committed), *different]))


def main() -> None:
    if "--check" not in sys.argv[1:]:
        for root, below in SOURCES.items():
            generate(root, below, root)
        return
    if found := [path for root, below in SOURCES.items() for path in stale(root, below)]:
        raise SystemExit(f"stubs are not what the .proto files give, run make stubs: {', '.join(found)}")


if __name__ == "__main__":
    main()

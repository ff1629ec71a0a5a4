#!/usr/bin/env python3
"""Generate the Python stubs beside their .proto files; ``--check`` only compares and fails on a difference."""

import filecmp
import os
import pathlib
import sys
import tempfile

from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent


def generate(out: pathlib.Path) -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("afs/proto/*/*.proto"))
    include = pathlib.Path(protoc.__file__).parent / "_proto"
    # protoc finds its plugins on PATH, and they are installed beside this interpreter.
    os.environ["PATH"] = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    plugins = ["--mypy_opt=quiet", "--mypy_grpc_opt=quiet"]
    plugins += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{include}", *plugins, *protos]):
        raise SystemExit("protoc failed")


def main() -> None:
    if "--check" not in sys.argv[1:]:
        generate(ROOT)
        return
    with tempfile.TemporaryDirectory() as temporary:
        out = pathlib.Path(temporary)
        generate(out)
        made = {path.relative_to(out) for path in out.rglob("*_pb2*")}
        committed = {path.relative_to(ROOT) for path in ROOT.rglob("*_pb2*") if path.suffix in (".py", ".pyi")}
        stale = sorted(map(str, made ^ committed))
        stale += sorted(
            str(path) for path in made & committed if not filecmp.cmp(out / path, ROOT / path, shallow=False)
        )
        if stale:
            raise SystemExit(f"stubs are not what the .proto files give, run make stubs: {', '.join(stale)}")


if __name__ == "__main__":
    main()

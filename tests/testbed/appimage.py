"""Images that nobody has seen before, for tests of lazy pulls: busybox, some incompressible files, and a layer that changes both."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.testbed import oci, tars
from tests.testbed.images import BUSYBOX

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

MIB = 1 << 20
DIFF_ID_ANNOTATION = "containerd.io/snapshot/afs.diff-id"
"""On a layer's descriptor: containerd passes it on to the snapshotter as a label."""
TAG = "latest"
_REPLACED, _REMOVED = "data/replaced", "data/removed"


@dataclass(frozen=True)
class AppImage:
    """An image in a layout under TAG; layers lie bottom up."""

    layout: Path
    layers: tuple[oci.Layer, ...]
    files: Mapping[str, bytes] = field(repr=False)
    """What can be read in it, by absolute path: the incompressible files and some small ones."""
    gone: tuple[str, ...] = (f"/{_REMOVED}",)

    @property
    def chain_ids(self) -> list[str]:
        """Of the layers, bottom up."""
        return chain_ids(layer.diff_id for layer in self.layers)

    @property
    def blobs(self) -> set[str]:
        """Digests of the layers."""
        return {layer.digest for layer in self.layers}

    @property
    def check(self) -> str:
        """A shell script that reads everything and prints `listing`."""
        gone = "".join(f"test ! -e {path}; " for path in self.gone)
        return f"{gone}sha256sum {' '.join(sorted(self.files))}"

    @property
    def listing(self) -> str:
        """What the files' contents make `check` print."""
        digests = {path: hashlib.sha256(data).hexdigest() for path, data in self.files.items()}
        return "".join(f"{digests[path]}  {path}\n" for path in sorted(digests))


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The chain ids of layers, bottom up (OCI image-spec, config.md, "Layer ChainID")."""
    found: list[str] = []
    for diff_id in diff_ids:
        both = f"{found[-1]} {diff_id}".encode() if found else b""
        found.append(f"sha256:{hashlib.sha256(both).hexdigest()}" if found else diff_id)
    return found


def app_image(directory: Path, rng: random.Random, mib: int = 8, *, annotated: bool = False) -> AppImage:
    """Three layers (gzip, zstd, plain) with `mib` files of a MiB, all different from those of any other image.

    With `annotated`, the descriptors of layers tell their diff ids.
    """
    unique = rng.randbytes(16).hex().encode()
    big = {f"big/{number:02}": rng.randbytes(MIB) for number in range(mib)}
    small = {_REPLACED: b"old " + unique, _REMOVED: b"removed"}
    top = {_REPLACED: b"new " + unique, "data/.wh.removed": b"", "top": b"top " + unique}
    builder = oci.LayoutBuilder(directory)
    layers = [
        builder.add_layer(_system(unique), level=1),
        builder.add_layer(_files({**big, **small}), "zstd"),
        builder.add_layer(_files(top), "plain"),
    ]
    _add(builder, layers, annotated=annotated)
    found = {**big, _REPLACED: top[_REPLACED], "top": top["top"], "id": unique}
    return AppImage(directory, tuple(layers), {f"/{name}": data for name, data in found.items()})


def on_top(base: AppImage, directory: Path, tar: bytes, files: Mapping[str, bytes]) -> AppImage:
    """The same image with a layer more, which makes of its contents `files`."""
    builder = oci.LayoutBuilder(oci.copy_layout(base.layout, directory))
    layers = (*base.layers, builder.add_layer(tar))
    _add(builder, layers)
    return AppImage(directory, layers, files)


def grown(base: AppImage, directory: Path, rng: random.Random) -> AppImage:
    """The same image with a layer more, which has a new file."""
    data = rng.randbytes(MIB)
    return on_top(base, directory, _files({"more": data}), {**base.files, "/more": data})


def tall_image(directory: Path, rng: random.Random, layers: int) -> AppImage:
    """So many layers, each with a file of its own and one that they all have; the second layer is the last one as well."""
    builder = oci.LayoutBuilder(directory)
    unique = rng.randbytes(16).hex().encode()
    own = {f"own/{number:03}": b"%s %d" % (unique, number) for number in range(1, layers - 1)}
    made = [builder.add_layer(_system(unique), level=1)]
    made += [builder.add_layer(_files({name: data, "all": data}), "plain") for name, data in own.items()]
    made.append(made[1])
    _add(builder, made)
    files = {**own, "all": next(iter(own.values())), "id": unique}
    return AppImage(directory, tuple(made), {f"/{name}": data for name, data in files.items()}, gone=())


def archive(image: AppImage, path: Path, layers: Iterable[oci.Layer]) -> None:
    """Write an image as an OCI archive (a tar of its layout) without the blobs of any but these of its layers.

    For a client that has all else of them, as who commits a container does.
    """
    descriptor = oci.find_tag(image.layout, TAG)
    manifest = oci.load_json(image.layout, descriptor.digest)
    wanted = {descriptor.digest, manifest["config"]["digest"]} | {layer.digest for layer in layers}
    with tarfile.open(path, "w") as out:
        for name in ("oci-layout", "index.json", *(f"blobs/{digest.replace(':', '/')}" for digest in wanted)):
            out.add(image.layout / name, name)


def pause_image(directory: Path) -> Path:
    """A layout whose TAG does nothing until it is killed: what keeps a pod's namespaces."""
    builder = oci.LayoutBuilder(directory)
    # A shell waits without a clock; busybox's sleep takes no "forever".
    _add(builder, [builder.add_layer(_system(b"pause"), level=1)], command=["/bin/sh", "-c", "sleep 1000000000 & wait"])
    return directory


def _files(files: Mapping[str, bytes]) -> bytes:
    return tars.tar_of(dict(files))


def _system(unique: bytes) -> bytes:
    applets = subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split()
    out = [tars.root(), tars.directory("bin/"), tars.directory("tmp/", 0o1777), tars.directory("etc/")]
    out += [tars.file("bin/busybox", BUSYBOX.read_bytes(), mode=0o755), tars.file("id", unique)]
    out += [tars.symlink(f"bin/{applet}", "busybox") for applet in sorted(set(applets) - {"busybox"})]
    return b"".join(out) + tars.END


def _add(
    builder: oci.LayoutBuilder,
    layers: Sequence[oci.Layer],
    *,
    annotated: bool = False,
    command: Sequence[str] = ("/bin/sh",),
) -> None:
    """Tag an image; an annotated one is the only entry of an index, for LayoutBuilder's own images have no annotations."""
    config = {"Env": ["PATH=/bin"], "Cmd": list(command)}
    image = builder.add_image(None if annotated else TAG, layers, config)
    if not annotated:
        return
    manifest: dict[str, Any] = oci.load_json(builder.directory, image.digest)
    for entry, layer in zip(manifest["layers"], layers, strict=True):
        entry["annotations"] = {DIFF_ID_ANNOTATION: layer.diff_id}
    data = json.dumps(manifest).encode()
    builder.add_index(TAG, {oci.AMD64: oci.Descriptor(image.media_type, builder.add_blob(data), len(data))})

"""Options of overlay mounts."""

from pathlib import Path

import pytest

from afs.core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from afs.snapshotter.overlay import mount_overlay, options
from afs.snapshotter.roots import RootRequest

ALWAYS = "index=off,redirect_dir=off,metacopy=off"


def test_options() -> None:
    assert options([Path("/a"), Path("/b")], None, None) == f"lowerdir=/a:/b,{ALWAYS}"
    assert options([Path("/a")], Path("/u"), Path("/w")) == f"lowerdir=/a,upperdir=/u,workdir=/w,volatile,{ALWAYS}"


def test_separators_are_escaped() -> None:
    assert options([Path("/a:b"), Path("/c,d"), Path("/e\\f")], None, None).startswith(
        "lowerdir=/a\\:b:/c\\,d:/e\\\\f,"
    )


def test_too_many_layers_are_told(tmp_path: Path) -> None:
    lower = [Path(f"/run/afs/layer/{number}") for number in range(300)]
    with pytest.raises(ResourceExhausted, match=f"^300 layers are too many for one mount at {tmp_path}: mount options"):
        mount_overlay(tmp_path, lower)


def test_directories_that_a_client_names(tmp_path: Path) -> None:
    request = RootRequest([str(tmp_path)], target=str(tmp_path))
    assert (request.extra_dirs, request.target) == ((tmp_path,), tmp_path)
    with pytest.raises(InvalidArgument, match=r"^'x' is not an absolute path$"):
        RootRequest(["x"])
    with pytest.raises(FailedPrecondition, match=f"^{tmp_path}/none is not a directory$"):
        RootRequest(target=f"{tmp_path}/none")

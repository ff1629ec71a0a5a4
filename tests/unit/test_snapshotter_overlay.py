"""Options of overlay mounts, and what is refused before the kernel is asked."""

from pathlib import Path

import pytest

from afs.core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from afs.snapshotter import overlay
from afs.snapshotter.rootmount import RootRequest

ALWAYS = [("index", "off"), ("redirect_dir", "off"), ("metacopy", "off")]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlay, "in_user_namespace", lambda: False)
    assert overlay.settings(writable=False) == ALWAYS
    assert overlay.settings(writable=True) == [*ALWAYS, ("volatile", None)]
    monkeypatch.setattr(overlay, "in_user_namespace", lambda: True)
    inside = [("index", "off"), ("redirect_dir", "nofollow"), ("metacopy", "off")]
    assert overlay.settings(writable=True) == [*inside, ("volatile", None), ("userxattr", None)]


def test_too_many_layers_are_told(tmp_path: Path) -> None:
    lower = [Path(f"/run/afs/layer/{number}") for number in range(501)]
    with pytest.raises(
        ResourceExhausted, match=f"^501 layers are too many for one mount at {tmp_path}: overlayfs takes"
    ):
        overlay.mount_overlay(tmp_path, lower)


def test_directories_that_a_client_names(tmp_path: Path) -> None:
    request = RootRequest([str(tmp_path)], target=str(tmp_path))
    assert (request.extra_dirs, request.target) == ((tmp_path,), tmp_path)
    with pytest.raises(InvalidArgument, match=r"^'x' is not an absolute path$"):
        RootRequest(["x"])
    with pytest.raises(FailedPrecondition, match=f"^{tmp_path}/none is not a directory$"):
        RootRequest(target=f"{tmp_path}/none")

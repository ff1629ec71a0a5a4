"""What containerd's configuration has to say about AFS, for each release of containerd and version of its file.

Three things: that there is a snapshotter (a *proxy plugin*), that the transfer service unpacks for it, and that CRI, which
Kubernetes speaks, uses it and tells it the names of images. Sections and keys moved between releases; what was true of
them was read in containerd's sources and tried with its programs (1.6, 1.7, 2.0, 2.1, 2.3, 2.4).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from afs.core.errors import FailedPrecondition, InvalidArgument
from afs.snapshotter.containerd_version import Release

Keys = tuple[str, ...]

OLD_CRI = ("plugins", "io.containerd.grpc.v1.cri")
CRI_IMAGES = ("plugins", "io.containerd.cri.v1.images")
TRANSFER = ("plugins", "io.containerd.transfer.v1.local")
DEFAULT_SNAPSHOTTER = "overlayfs"
BUILT_IN = {"aufs", "blockfile", "btrfs", "devmapper", "erofs", "native", DEFAULT_SNAPSHOTTER, "zfs"}
# nerdctl takes a snapshotter whose name contains one of these for that project's, and pulls into theirs.
_TAKEN_BY_NERDCTL = ("stargz", "nydus", "soci", "overlaybd", "cvmfs-snapshotter")
_NAME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")  # containerd's rule for identifiers
_VERSIONS = {
    2: "Version 2, of containerd 1: sections have the full names of plugins.",
    3: "Version 3, of containerd 2.0: CRI has a section of its own for images.",
    4: "Version 4, of containerd 2.3: what the daemon itself listens on is among the plugins.",
}
_CRI_PLUGINS = {"cri", OLD_CRI[1], CRI_IMAGES[1]}


@dataclass(frozen=True, slots=True)
class Snapshotter:
    """The snapshotter as containerd is to know it."""

    name: str
    address: Path
    """Its socket."""
    root: Path


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the file."""

    keys: Keys
    value: str | bool | int
    why: str
    defaults: tuple[object, ...] = ()
    """Values that mean no more than that nobody chose one: they give way without being asked."""
    instead: str = ""
    """What to do for those who want to keep another value."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One table in a list of tables; *name* is what says that it is there already."""

    values: Mapping[str, str | bool]
    why: str
    name: str


@dataclass(frozen=True, slots=True)
class Entries:
    """A list of tables that has to contain the last of *entries*; all of them where there is no list yet."""

    keys: Keys
    key: str
    """The key that an entry's name stands at."""
    entries: tuple[Entry, ...]


@dataclass(slots=True)
class Plan:
    """What a file is to have, in the order in which it is written; *notes* are for whoever asked."""

    settings: list[Setting] = field(default_factory=list)
    lists: list[Entries] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_name(name: str) -> str:
    """*name* if a proxy plugin of AFS may be called so; InvalidArgument else."""
    if not _NAME.fullmatch(name) or len(name) > 76:
        raise InvalidArgument(
            f"not a name for a snapshotter: {name!r}; letters and digits, with single . _ - between them"
        )
    if name in BUILT_IN:
        raise InvalidArgument(f"the name {name!r} is that of a snapshotter of containerd itself")
    for taken in _TAKEN_BY_NERDCTL:
        if taken in name:
            raise InvalidArgument(
                f"the name {name!r} contains {taken!r}: nerdctl would pull into that project's snapshotter"
            )
    return name


def file_version(config: Mapping[str, Any], release: Release) -> int:
    """The version of a file with the content *config*: 2, 3 or 4. FailedPrecondition for one that cannot be extended."""
    version = config.get("version", release.config_version if not config else 1)
    if version == 1:
        how = (
            "`containerd config migrate` prints it as a newer one"
            if release.major > 1
            else f'give it `version = 2`, and plugins their full names ("{OLD_CRI[1]}" for "cri")'
        )
        raise FailedPrecondition(f"version 1 of containerd's configuration, as it has no other `version`: {how}")
    if not isinstance(version, int) or version not in _VERSIONS:
        raise FailedPrecondition(f"version {version!r} of containerd's configuration, which AFS does not know")
    if version > release.config_version:
        raise FailedPrecondition(
            f"version {version} of containerd's configuration, which containerd {release} does not read"
        )
    return version


def plan(release: Release, config: Mapping[str, Any], snapshotter: Snapshotter, *, cri: bool) -> Plan:
    """What a file with the content *config* has to have; empty for a new file. FailedPrecondition as :func:`file_version`."""
    version, wanted = file_version(config, release), Plan()
    if "version" not in config:
        wanted.settings.append(Setting(("version",), version, _VERSIONS[version]))
    _add_proxy(wanted, release, snapshotter)
    if release.has_transfer:
        _add_transfer(wanted, release, config, snapshotter.name)
    if cri and (off := sorted(_CRI_PLUGINS & _disabled(config))):
        wanted.notes.append(f"{off[0]} is in disabled_plugins and stays there: CRI was not configured")
    elif cri:
        _add_cri(wanted, release, version, config, snapshotter.name)
    return wanted


def _add_proxy(wanted: Plan, release: Release, snapshotter: Snapshotter) -> None:
    name, keys = snapshotter.name, ("proxy_plugins", snapshotter.name)
    other = "another --name adds a second snapshotter"
    wanted.settings += [
        Setting((*keys, "type"), "snapshot", f"AFS as a snapshotter: ctr ... --snapshotter {name}", instead=other),
        Setting((*keys, "address"), str(snapshotter.address), "The socket of afs_snapshotter.", instead=other),
    ]
    if release.has_exports:
        exports = (*keys, "exports")
        wanted.settings += [
            Setting((*exports, "root"), str(snapshotter.root), "The file system whose space CRI reports for images."),
            Setting(
                (*exports, "enable_remote_snapshot_annotations"),
                "true",
                "Have the transfer service (from 2.1 on) say which image and layer it pulls. A string, as all exports.",
            ),
        ]


def _add_transfer(wanted: Plan, release: Release, config: Mapping[str, Any], name: str) -> None:
    if TRANSFER[1] in _disabled(config):
        wanted.notes.append(f"{TRANSFER[1]} is in disabled_plugins and stays there: clients have to pull by themselves")
        return
    again = "A list here replaces containerd's own, so what that has is in it again."
    entries = [
        Entry(
            {"platform": "linux", "snapshotter": DEFAULT_SNAPSHOTTER, "differ": "walking"}, again, DEFAULT_SNAPSHOTTER
        )
    ]
    if release.unpacks_erofs:
        erofs: dict[str, str | bool] = {
            "platform": "linux(+erofs)",
            "snapshotter": "erofs",
            "differ": "erofs",
            "optional": True,
        }
        entries.append(Entry(erofs, "For images that say they are of EROFS; left out where that cannot be.", "erofs"))
    ours = "Without it a pull by the transfer service has nobody to unpack for AFS, and fails."
    entries.append(Entry({"platform": "linux", "snapshotter": name, "differ": "walking"}, ours, name))
    wanted.lists.append(Entries((*TRANSFER, "unpack_config"), "snapshotter", tuple(entries)))


def _add_cri(wanted: Plan, release: Release, version: int, config: Mapping[str, Any], name: str) -> None:
    keep = "--no-cri leaves CRI alone"
    values: list[tuple[str, str | bool, str, tuple[object, ...]]] = [
        ("snapshotter", name, "Containers of Kubernetes (CRI) start from AFS.", ("", DEFAULT_SNAPSHOTTER))
    ]
    if not release.cri_pulls_by_transfer:
        why = "Say which image and layer is pulled; by default CRI does not."
        values.append(("disable_snapshot_annotations", False, why, (True,)))
    elif _pulls_locally(config):
        why = "Other settings have CRI pull without the transfer service, and then it says so only if told to."
        values.append(("disable_snapshot_annotations", False, why, (True,)))
    old = (*OLD_CRI, "containerd")
    if release.major == 1:
        wanted.settings += [Setting((*old, key), value, why, gives, keep) for key, value, why, gives in values]
        return
    wanted.settings += [Setting((*CRI_IMAGES, key), value, why, gives, keep) for key, value, why, gives in values]
    if version < release.config_version:
        # containerd 2 takes the old section's keys over into the new one, but these only if the old one has `runtimes` as
        # well. So the new section has to have them, and the old one must not say otherwise.
        there = lookup(config, old)
        wanted.settings += [
            Setting((*old, key), value, why, gives, keep)
            for key, value, why, gives in values
            if isinstance(there, Mapping) and key in there
        ]


def _pulls_locally(config: Mapping[str, Any]) -> bool:
    """Whether something in the file makes CRI of containerd 2.1 or later pull as earlier ones do."""
    tables = [lookup(config, keys) for keys in (CRI_IMAGES, OLD_CRI, (*OLD_CRI, "containerd"))]
    for table in tables:
        if not isinstance(table, Mapping):
            continue
        switches = ("use_local_image_pull", "discard_unpacked_layers", "image_pull_with_sync_fs")
        registry = table.get("registry")
        if (
            any(table.get(key) for key in switches)
            or table.get("max_concurrent_downloads", 3) != 3
            or (isinstance(registry, Mapping) and any(registry.get(key) for key in ("mirrors", "configs", "auths")))
        ):
            return True
    return False


def _disabled(config: Mapping[str, Any]) -> set[str]:
    plugins = config.get("disabled_plugins")
    return {name for name in plugins if isinstance(name, str)} if isinstance(plugins, list) else set()


def lookup(config: Mapping[str, Any], keys: Keys) -> object:
    """What stands at *keys*, None if nothing does."""
    found: object = config
    for key in keys:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found

"""Parts of containerd 1.6's configuration, in TOML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Cri:
    """The CRI plugin as tests want it; see `cri_plugin`."""

    sandbox_image: str
    """Its process keeps a pod's namespaces; CRI pulls it like any other."""
    snapshotter: str = "overlayfs"


def proxy_plugin(socket: Path, name: str = "afs") -> str:
    """A snapshotter that serves at a socket."""
    return f"""
[proxy_plugins.{name}]
  type = "snapshot"
  address = "{socket}"
"""


def cri_plugin(settings: Cri, directory: Path) -> str:
    """The CRI plugin, with all that it would write elsewhere below `directory`.

    Pods are on the machine's network, so there are no network plugins. Cgroups are plain directories, not systemd's slices,
    and where they are is up to each pod. Snapshots get the labels from which a lazy snapshotter learns what it is asked for.
    """
    plugin = 'plugins."io.containerd.grpc.v1.cri"'
    return f"""
[{plugin}]
  sandbox_image = "{settings.sandbox_image}"
  stats_collect_period = 1
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[{plugin}.cni]
  bin_dir = "{directory}/cni/bin"
  conf_dir = "{directory}/cni/net.d"
[{plugin}.containerd]
  snapshotter = "{settings.snapshotter}"
  disable_snapshot_annotations = false
  default_runtime_name = "runc"
[{plugin}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{plugin}.containerd.runtimes.runc.options]
  Root = "{directory}/runc"
  SystemdCgroup = false
"""

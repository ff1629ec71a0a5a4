"""A test as the kubelet: the part of Kubernetes' CRI that containerd serves on its own socket."""

from tests.testbed.cri.client import Kubelet

__all__ = ["Kubelet"]

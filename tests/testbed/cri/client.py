"""A client of containerd's CRI plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import grpc

from tests.testbed.cri import runtime_pb2 as pb
from tests.testbed.cri.runtime_pb2_grpc import ImageServiceStub, RuntimeServiceStub

if TYPE_CHECKING:
    from types import TracebackType

    from tests.testbed.containerd import Containerd

_TIMEOUT = 60.0


class Kubelet:
    """Pulls images and runs pods through a containerd's CRI plugin; calls block, and errors are grpc.RpcError.

    Pods are on the machine's network, in cgroups below the one that containerd removes at its end.
    """

    def __init__(self, containerd: Containerd) -> None:
        self._channel = grpc.insecure_channel(f"unix:{containerd.socket}")
        self._runtime = RuntimeServiceStub(self._channel)
        self._images = ImageServiceStub(self._channel)
        self._cgroup_parent = f"/{containerd.namespace}"
        self._pods: dict[str, pb.PodSandboxConfig] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._channel.close()

    def conditions(self) -> dict[str, bool]:
        """RuntimeReady and NetworkReady."""
        answer = self._runtime.Status(pb.StatusRequest(), timeout=_TIMEOUT)
        return {condition.type: condition.status for condition in answer.status.conditions}

    def pull(self, image: str) -> str:
        """Pull an image; returns its id."""
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image))
        return self._images.PullImage(request, timeout=_TIMEOUT).image_ref

    def images(self) -> list[pb.Image]:
        """All that containerd knows."""
        return list(self._images.ListImages(pb.ListImagesRequest(), timeout=_TIMEOUT).images)

    def remove_image(self, image: str) -> None:
        """Remove an image, and at once what it alone needed."""
        self._images.RemoveImage(pb.RemoveImageRequest(image=pb.ImageSpec(image=image)), timeout=_TIMEOUT)

    def image_filesystem(self) -> pb.FilesystemUsage:
        """What images take, as of the last time that containerd counted; it does so once a second."""
        (found,) = self._images.ImageFsInfo(pb.ImageFsInfoRequest(), timeout=_TIMEOUT).image_filesystems
        return found

    def run_pod(self, name: str) -> str:
        """Run a pod without containers; returns its id."""
        options = pb.NamespaceOption(network=pb.NODE)
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=name, namespace="tests"),
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=self._cgroup_parent,
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=options),
            ),
        )
        pod: str = self._runtime.RunPodSandbox(pb.RunPodSandboxRequest(config=config), timeout=_TIMEOUT).pod_sandbox_id
        self._pods[pod] = config
        return pod

    def run(self, pod: str, name: str, image: str, *command: str) -> str:
        """Create and start a container in a pod; returns its id."""
        security = pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(network=pb.NODE))
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=image),
            command=command,
            linux=pb.LinuxContainerConfig(security_context=security),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=self._pods[pod])
        container: str = self._runtime.CreateContainer(request, timeout=_TIMEOUT).container_id
        self._runtime.StartContainer(pb.StartContainerRequest(container_id=container), timeout=_TIMEOUT)
        return container

    def execute(self, container: str, *command: str) -> tuple[int, bytes, bytes]:
        """Run a command in a container; its exit code, output and errors."""
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=int(_TIMEOUT))
        answer = self._runtime.ExecSync(request, timeout=_TIMEOUT)
        return answer.exit_code, answer.stdout, answer.stderr

    def status(self, container: str) -> pb.ContainerStatus:
        """How a container is."""
        return self._runtime.ContainerStatus(pb.ContainerStatusRequest(container_id=container), timeout=_TIMEOUT).status

    def remove(self, container: str) -> None:
        """Kill and remove a container."""
        self._runtime.StopContainer(pb.StopContainerRequest(container_id=container), timeout=_TIMEOUT)
        self._runtime.RemoveContainer(pb.RemoveContainerRequest(container_id=container), timeout=_TIMEOUT)

    def remove_pod(self, pod: str) -> None:
        """Stop and remove a pod with all its containers."""
        self._runtime.StopPodSandbox(pb.StopPodSandboxRequest(pod_sandbox_id=pod), timeout=_TIMEOUT)
        self._runtime.RemovePodSandbox(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), timeout=_TIMEOUT)
        del self._pods[pod]

    def remove_all(self) -> None:
        """Remove the pods that are left, and all images."""
        for pod in list(self._pods):
            self.remove_pod(pod)
        for image in self.images():
            self.remove_image(image.id)

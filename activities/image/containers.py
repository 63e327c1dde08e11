"""Containers that builds of earlier versions have left: their steps ran in them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import docker
import docker.errors

from activities.contract.errors import DockerUnavailableError
from activities.contract.scope import BuildScope
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover
from activities.image.docker_daemon import docker_errors

BUILD_LABEL = "template-manager.build-id"
LEASE_LABEL = "template-manager.lease"
DATA_DIR_LABEL = "template-manager.data-dir"
POLL_SECONDS = 0.05


def remove_containers(client: docker.APIClient, scope: BuildScope) -> None:
    """Kill and remove the build's containers of this lease and earlier ones."""
    found = client.containers(all=True, filters={"label": f"{BUILD_LABEL}={scope.build_id}"})
    for container in found:
        if int(container["Labels"].get(LEASE_LABEL, 0)) > scope.lease.number:
            continue
        remove_container(client, container["Id"])


def leftover_containers(client: docker.APIClient, data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the containers of builds of this host. Raises DockerUnavailableError."""
    own = f"{DATA_DIR_LABEL}={data_dir.root}"
    with docker_errors():
        listed = client.containers(all=True, filters={"label": [BUILD_LABEL, own]})
    for container in listed:
        labels, names = container["Labels"], container["Names"]
        yield Leftover(
            "container",
            names[0].lstrip("/") if names else container["Id"][:12],
            partial(_remove_leftover, client, container["Id"]),
            labels[BUILD_LABEL],
            int(labels.get(LEASE_LABEL, 0)),
            float(container["Created"]),
        )


def remove_container(client: docker.APIClient, container_id: str) -> None:
    """Kill and remove a container with its volumes; one that is gone is fine."""
    for _ in range(50):
        try:
            client.remove_container(container_id, force=True, v=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            if error.status_code != 409:  # its removal is already in progress
                raise
        time.sleep(POLL_SECONDS)
    raise DockerUnavailableError(f"container {container_id[:12]} cannot be removed")


def _remove_leftover(client: docker.APIClient, container_id: str) -> None:
    with docker_errors():
        remove_container(client, container_id)


# What Docker gives to containers whose image says nothing.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

"""This host's Docker daemon, and how its failures become ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import docker
import docker.errors
import requests
from pydantic import Field

from activities.contract.errors import DockerUnavailableError
from activities.contract.model import Model

TIMEOUT_SECONDS = 60
DEFAULT_ADDRESS = "unix:///var/run/docker.sock"


def make_docker_client() -> docker.APIClient:
    """Return a client for the daemon that `DOCKER_HOST` names (default: the local socket)."""
    with docker_errors():
        return docker.from_env(timeout=TIMEOUT_SECONDS).api


@contextmanager
def docker_errors() -> Iterator[None]:
    """Turn the Docker SDK's errors into DockerUnavailableError."""
    try:
        yield
    except docker.errors.APIError as error:
        raise DockerUnavailableError(f"Docker refused a call: {error.explanation}") from error
    except (requests.RequestException, docker.errors.DockerException) as error:
        address = os.environ.get("DOCKER_HOST") or DEFAULT_ADDRESS
        raise DockerUnavailableError(f"Docker cannot be reached at {address}: {error}") from error


class ContainerConfig(Model):
    """How dockerd would run an image. Empty fields may be null."""

    env: tuple[str, ...] | None = Field(None, alias="Env")
    user: str | None = Field(None, alias="User")
    working_dir: str | None = Field(None, alias="WorkingDir")
    entrypoint: tuple[str, ...] | None = Field(None, alias="Entrypoint")
    cmd: tuple[str, ...] | None = Field(None, alias="Cmd")


class Layers(Model):
    """The layers of an image, by digest."""

    digests: tuple[str, ...] | None = Field(None, alias="Layers")


class InspectedImage(Model):
    """What `docker inspect` tells of an image, as far as it is read."""

    image_id: str = Field(alias="Id")
    size_bytes: int = Field(alias="Size")
    layers: Layers = Field(alias="RootFS")
    config: ContainerConfig | None = Field(None, alias="Config")

    @property
    def layer_count(self) -> int:
        """How many layers it has."""
        return len(self.layers.digests or ())


def find_image(client: docker.APIClient, name: str) -> InspectedImage | None:
    """Return what dockerd tells of an image; None when it does not have it."""
    try:
        found = client.inspect_image(name)  # type: ignore[no-untyped-call]  # its stub has no types
    except docker.errors.NotFound:
        return None
    return InspectedImage.model_validate(found)

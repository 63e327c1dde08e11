"""This host's Docker daemon, and how its failures become ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path

import docker
import docker.errors
import requests
from pydantic import Field

from activities.contract.errors import (
    DockerRefusedError,
    DockerUnavailableError,
    HostDiskFullError,
    TemplateManagerError,
    TooManyLayersError,
)
from activities.contract.model import Model

TIMEOUT_SECONDS = 60
DEFAULT_ADDRESS = "unix:///var/run/docker.sock"
MAX_LAYERS = 125  # of dockerd's layer store, whatever the storage driver could do
# Not 404, 409, 423, 429: what is missing, busy or in the way now need not be so the next time.
REFUSALS = frozenset(
    {
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.UNAUTHORIZED,
        HTTPStatus.FORBIDDEN,
        HTTPStatus.METHOD_NOT_ALLOWED,
        HTTPStatus.NOT_ACCEPTABLE,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.NOT_IMPLEMENTED,
    }
)


def make_docker_client() -> docker.APIClient:
    """Return a client for the daemon that `DOCKER_HOST` names (default: the local socket)."""
    with docker_errors():
        return docker.from_env(timeout=TIMEOUT_SECONDS).api


@contextmanager
def docker_errors() -> Iterator[None]:
    """Turn the Docker SDK's errors into ours.

    DockerUnavailableError may pass; DockerRefusedError, TooManyLayersError and HostDiskFullError
    would come again.
    """
    try:
        yield
    except docker.errors.APIError as error:
        raise _error_of(error) from error
    except (requests.RequestException, docker.errors.DockerException) as error:
        address = os.environ.get("DOCKER_HOST") or DEFAULT_ADDRESS
        raise DockerUnavailableError(f"Docker cannot be reached at {address}: {error}") from error


def _error_of(error: docker.errors.APIError) -> TemplateManagerError:
    message = f"Docker refused a call: {error.explanation}"
    known = error_in_words(str(error.explanation), message)
    if known is not None:
        return known
    kind = DockerRefusedError if error.status_code in REFUSALS else DockerUnavailableError
    return kind(message)


def error_in_words(said: str, message: str) -> TemplateManagerError | None:
    """Return the error that dockerd tells by words alone, in a 500 or in the midst of a pull."""
    text = said.lower()
    if "no space left" in text:
        return HostDiskFullError(message)
    if "max depth exceeded" in text:
        return TooManyLayersError(f"{message} (its limit is {MAX_LAYERS} layers)")
    return None


def require_layers_taken(reference: str, count: int) -> None:
    """Refuse an image of more layers than dockerd takes. Raises TooManyLayersError."""
    if count > MAX_LAYERS:
        raise TooManyLayersError(f"{reference} has {count} layers; Docker takes {MAX_LAYERS}")


class RegistrySettings(Model):
    """How dockerd speaks to one registry."""

    secure: bool = Field(default=True, alias="Secure")


class RegistryConfig(Model):
    """How dockerd speaks to registries, by `host[:port]`."""

    by_name: dict[str, RegistrySettings] | None = Field(None, alias="IndexConfigs")


class DaemonInfo(Model):
    """What `docker info` tells, as far as it is read."""

    directory: Path = Field(Path("/var/lib/docker"), alias="DockerRootDir")
    """Where it keeps images."""
    registries: RegistryConfig | None = Field(None, alias="RegistryConfig")

    @property
    def insecure_registries(self) -> frozenset[str]:
        """The registries that it is told to speak plain HTTP to."""
        known = (self.registries and self.registries.by_name) or {}
        return frozenset(name for name, settings in known.items() if not settings.secure)


def daemon_info(client: docker.APIClient) -> DaemonInfo:
    """Ask dockerd about itself."""
    return DaemonInfo.model_validate(client.info())


class HealthCheck(Model):
    """What an image says of how its health is checked."""

    test: tuple[str, ...] | None = Field(None, alias="Test")


class ContainerConfig(Model):
    """How dockerd would run an image. Empty fields may be null."""

    env: tuple[str, ...] | None = Field(None, alias="Env")
    user: str | None = Field(None, alias="User")
    working_dir: str | None = Field(None, alias="WorkingDir")
    entrypoint: tuple[str, ...] | None = Field(None, alias="Entrypoint")
    cmd: tuple[str, ...] | None = Field(None, alias="Cmd")
    healthcheck: HealthCheck | None = Field(None, alias="Healthcheck")
    volumes: dict[str, dict[str, str]] | None = Field(None, alias="Volumes")
    """By their paths; nothing more is said of one."""


class GraphDriver(Model):
    """Where a storage driver keeps an image."""

    name: str = Field("", alias="Name")
    data: dict[str, str] | None = Field(None, alias="Data")


class Layers(Model):
    """The layers of an image, by digest."""

    digests: tuple[str, ...] | None = Field(None, alias="Layers")


class InspectedImage(Model):
    """What `docker inspect` tells of an image, as far as it is read."""

    image_id: str = Field(alias="Id")
    size_bytes: int = Field(alias="Size")
    layers: Layers = Field(alias="RootFS")
    config: ContainerConfig | None = Field(None, alias="Config")
    storage: GraphDriver = Field(default=GraphDriver(), alias="GraphDriver")

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

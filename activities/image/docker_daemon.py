"""This host's Docker daemon, and how its failures become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import docker
import docker.errors
import requests

from activities.contract.errors import DockerUnavailableError

TIMEOUT_SECONDS = 60


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
        raise DockerUnavailableError(f"Docker cannot be reached: {error}") from error

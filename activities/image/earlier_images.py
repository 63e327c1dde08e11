"""Images that hosts of earlier versions have made, of steps and of templates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import docker
import docker.errors

from activities.disk.leftovers import Leftover
from activities.image.docker_daemon import docker_errors

STEP_REPOSITORY = "template-manager/step"
TEMPLATE_REPOSITORY = "template-manager/template"


def earlier_images(client: docker.APIClient, made_before: float) -> Iterator[Leftover]:
    """Yield those that were made before then: builds of these versions may still want the others.

    Raises DockerUnavailableError.
    """
    with docker_errors():
        repositories = (STEP_REPOSITORY, TEMPLATE_REPOSITORY)
        listed = [image for name in repositories for image in client.images(name=name)]
    for image in listed:
        if image["Created"] < made_before:
            names = image["RepoTags"]
            yield Leftover("image", names[0], partial(_untag, client, names), bytes=image["Size"])


def _untag(client: docker.APIClient, names: list[str]) -> None:
    # A tag alone: Docker keeps what a container or another image needs.
    with docker_errors(), contextlib.suppress(docker.errors.NotFound):
        for name in names:
            client.remove_image(name)

"""Image builders as tests have them: on files of their own, and without what they leave."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import docker

STORAGE = """\
[storage]
driver = "vfs"
graphroot = "{place}/graph"
runroot = "{place}/run"
"""
REGISTRIES = """\
[[registry]]
location = "{registry}"
insecure = true
"""


def buildah_environment(place: Path, registry: str) -> dict[str, str]:
    """Return variables for buildah and podman that any machine can run with, even in a container.

    Their images are kept in `place`; bases may come from `registry` by plain HTTP.
    """
    place.mkdir(parents=True, exist_ok=True)
    (place / "storage.conf").write_text(STORAGE.format(place=place))
    (place / "registries.conf").write_text(REGISTRIES.format(registry=registry))
    return {
        "BUILDAH_ISOLATION": "chroot",
        "STORAGE_DRIVER": "vfs",
        "CONTAINERS_STORAGE_CONF": str(place / "storage.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(place / "registries.conf"),
    }


def forget_images(registry: str) -> None:
    """Take the names away that a registry of ours has given to images in Docker."""
    client = docker.from_env()
    try:
        for image in client.api.images():
            for name in [*(image["RepoTags"] or ()), *(image["RepoDigests"] or ())]:
                if name.startswith(f"{registry}/"):
                    with suppress(docker.errors.ImageNotFound):
                        client.api.remove_image(name)
    finally:
        client.close()

"""The name of a container image, as Docker reads it. Nothing else takes such a name apart."""

from __future__ import annotations

import re
from dataclasses import dataclass

DOCKER_HUB = "docker.io"
DOCKER_HUB_API = "registry-1.docker.io"
DEFAULT_TAG = "latest"

_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
# The grammar of github.com/distribution/reference, without its length checks.
_GRAMMAR = re.compile(
    rf"(?P<name>(?:{_HOST}(?:\.{_HOST})*(?::[0-9]+)?/)?{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?",
    re.ASCII,
)


class ImageReferenceError(ValueError):
    """The text is not the name of an image."""


@dataclass(frozen=True)
class ImageReference:
    """Which image of which registry."""

    registry: str
    """A host, perhaps with a port: never '', and `docker.io` for Docker's own."""
    repository: str
    tag: str | None = None
    digest: str | None = None
    """`sha256:…`; it wins over a tag."""

    @classmethod
    def parse(cls, text: str) -> ImageReference:
        """Read `[registry/]repository[:tag][@digest]`.

        The first part is a registry if it has a dot or a port or is `localhost`; else the image is
        Docker Hub's, and below `library/` if it has one part only. Raises ImageReferenceError.
        """
        found = _GRAMMAR.fullmatch(text)
        if found is None:
            raise ImageReferenceError(f"{text!r} is not the name of an image")
        return cls(*_split(found["name"]), found["tag"], found["digest"])

    @property
    def name(self) -> str:
        """`registry/repository`, without a version."""
        return f"{self.registry}/{self.repository}"

    @property
    def short_name(self) -> str:
        """The last part of the repository."""
        return self.repository.rpartition("/")[2]

    @property
    def version(self) -> str:
        """What to ask the registry for: the digest, else the tag, which is `latest` if not told."""
        return self.digest or self.tag or DEFAULT_TAG

    def at(self, digest: str) -> str:
        """Return the name pinned to a digest."""
        return f"{self.name}@{digest}"

    def __str__(self) -> str:
        return f"{self.name}{'@' if self.digest else ':'}{self.version}"


def _split(name: str) -> tuple[str, str]:
    """Return registry and repository of a name without tag and digest."""
    head, slash, rest = name.partition("/")
    if not slash or not ("." in head or ":" in head or head == "localhost"):
        head, rest = DOCKER_HUB, name
    if head in ("index.docker.io", DOCKER_HUB_API):
        head = DOCKER_HUB
    if head == DOCKER_HUB and "/" not in rest:
        rest = f"library/{rest}"
    return head, rest

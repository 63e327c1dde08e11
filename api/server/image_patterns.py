"""Patterns of images that a caller may use: registry and repository are matched apart.

`[registry/]repository[:tag][@digest]`, read as the name of an image is, with `*`, `?` and `[…]` as
in a shell. A registry's part never matches a piece of a repository, nor the other way round.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

from activities.contract.image_reference import DOCKER_HUB, ImageReference, ImageReferenceError

WILD = frozenset("*?[")


@dataclass(frozen=True)
class ImagePattern:
    """Which images of which registries. What it does not say of the version may be any."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> ImagePattern:
        """Read a pattern. Raises ValueError when it names nothing."""
        if text == "*":
            return cls("*", "*")
        name, _, digest = text.partition("@")
        head, slash, rest = name.partition("/")
        if not slash or not _is_registry(head):
            head, rest = DOCKER_HUB, name
        repository, _, tag = rest.partition(":")
        if not head or not repository:
            raise _wrong(text)
        if not WILD.intersection(head + repository):
            head, repository = _as_of_images(head, repository, text)
        elif not slash:
            repository = f"library/{repository}"
        return cls(head.lower(), repository, tag, digest)

    def matches(self, image: ImageReference) -> bool:
        """Whether an image is one of these.

        A digest that the image names counts instead of its tag: a pattern with a tag alone does
        not match it, since the tag may be of another image.
        """
        if not fnmatch.fnmatchcase(image.registry.lower(), self.registry):
            return False
        if not fnmatch.fnmatchcase(image.repository, self.repository):
            return False
        if self.digest:
            return fnmatch.fnmatchcase(image.digest or "", self.digest)
        if self.tag:
            return image.digest is None and fnmatch.fnmatchcase(image.version, self.tag)
        return True


def _as_of_images(registry: str, repository: str, text: str) -> tuple[str, str]:
    """Return registry and repository as those of an image are: by one name, with `library/`."""
    try:
        plain = ImageReference.parse(f"{registry}/{repository}")
    except ImageReferenceError:
        raise _wrong(text) from None
    return plain.registry, plain.repository


def _wrong(text: str) -> ValueError:
    return ValueError(f"{text!r} is no pattern of images: write registry/repository")


def _is_registry(head: str) -> bool:
    return head == "localhost" or bool(WILD.union(".:").intersection(head))

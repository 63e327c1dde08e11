"""What is done to a base image, as in a Dockerfile.

`Run`, `Copy`, `Add`, `Env`, `Arg`, `Workdir`, `User`.

The persisted form is `PersistedStep` for all of them, with the arguments by position as E2B's
clients send them. An argument that was left out is None and one that was sent empty is '': both
mean the same, but the identity of a config and the keys of kept images tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import Field, TypeAdapter, model_serializer, model_validator

from activities.contract.model import Model

MAX_STEP_CHARS = 100


class Meaning(StrEnum):
    """Whose words the steps of a request are: some of them mean other things to E2B."""

    DOCKER = "docker"
    E2B = "e2b"


class PersistedStep(Model):
    """A step as it stands in histories, in the bucket and in the keys of what it has made."""

    kind: str
    args: tuple[str, ...]
    force: bool = False
    files_sha256: str = ""
    """Only a COPY and an ADD have it."""


class _Step(Model):
    """Base of all steps."""

    ARGUMENTS: ClassVar[tuple[str, ...]]
    """Its fields in the order of the persisted arguments."""

    kind: str
    force: bool = False
    """Run it and all later steps, whatever has been kept of an earlier build."""

    @property
    def args(self) -> tuple[str, ...]:
        """Its arguments by position."""
        given: list[str | None] = [getattr(self, name) for name in self.ARGUMENTS]
        while given[-1] is None:
            given.pop()
        return tuple(argument or "" for argument in given)

    def persisted(self) -> PersistedStep:
        """Return its persisted form."""
        return PersistedStep(kind=self.kind, args=self.args, force=self.force)

    @model_serializer
    def _to_persisted(self) -> PersistedStep:
        return self.persisted()

    @model_validator(mode="before")
    @classmethod
    def _from_persisted(cls, data: object) -> object:
        if not isinstance(data, dict) or "args" not in data:
            return data
        rest = {name: value for name, value in data.items() if name != "args"}
        return {**cls._by_name(data["args"]), **rest}

    @classmethod
    def _by_name(cls, args: Sequence[str]) -> dict[str, object]:
        if len(args) > len(cls.ARGUMENTS):
            raise ValueError(f"takes at most {len(cls.ARGUMENTS)} arguments")
        return dict(zip(cls.ARGUMENTS, args, strict=False))

    def __str__(self) -> str:
        """Return it on one line, for people."""
        text = " ".join([self.kind, *(arg for arg in self.args if arg)])
        line = " ".join(text.split())
        return line if len(line) <= MAX_STEP_CHARS else f"{line[: MAX_STEP_CHARS - 1]}…"


class _Variables(_Step):
    """Base of the steps that set variables. The persisted arguments are name, value, name, …"""

    variables: tuple[tuple[str, str], ...]
    """Names and values in the order given; of a name that comes twice, the last value counts."""

    @property
    def args(self) -> tuple[str, ...]:
        """Name, value, name, value, …"""
        return tuple(part for pair in self.variables for part in pair)

    @classmethod
    def _by_name(cls, args: Sequence[str]) -> dict[str, object]:
        return {"variables": tuple(zip(args[::2], args[1::2], strict=True))}


class Run(_Step):
    """Run a command by the image's `/bin/sh -c`; by its `bash -l -c`, as E2B means it."""

    ARGUMENTS = ("command", "user")

    kind: Literal["RUN"] = "RUN"
    command: str
    user: str | None = None
    """Instead of the `User` so far."""


class _FilesStep(_Step):
    """Base of the steps that put files into the image."""

    ARGUMENTS = ("source", "destination", "owner", "mode")

    source: str
    """A path or glob in the tar."""
    destination: str
    """Relative to the working directory."""
    owner: str | None = None
    """`user[:group]`, names or numbers; root if not told, as E2B means it the `User` so far."""
    mode: str | None = None
    """Octal; as in the tar if not told."""
    files_sha256: str
    """Names the tar in the bucket: `files/<files_sha256>.tar`."""

    def persisted(self) -> PersistedStep:
        """Return its persisted form."""
        return super().persisted().model_copy(update={"files_sha256": self.files_sha256})


class Copy(_FilesStep):
    """Put files into the image."""

    kind: Literal["COPY"] = "COPY"


class Add(_FilesStep):
    """Put files into the image: what of them is a tar, unpacked. To E2B it is as `Copy`."""

    kind: Literal["ADD"] = "ADD"


class Env(_Variables):
    """Set environment variables, which stay in the template."""

    kind: Literal["ENV"] = "ENV"


class Arg(_Variables):
    """Set variables for later `Run`s only."""

    kind: Literal["ARG"] = "ARG"


class Workdir(_Step):
    """Change the working directory, and make it."""

    ARGUMENTS = ("path",)

    kind: Literal["WORKDIR"] = "WORKDIR"
    path: str


class User(_Step):
    """Change the user of later `Run`s and of the template; as E2B means it, one that is made if the
    image lacks it."""

    ARGUMENTS = ("name", "sudo")

    kind: Literal["USER"] = "USER"
    name: str
    sudo: Literal["", "true", "false"] | None = None
    """Whether `sudo` asks the user for no password, in an image that has it."""


ImageStep = Annotated[Run | Copy | Add | Env | Arg | Workdir | User, Field(discriminator="kind")]
_IMAGE_STEP: TypeAdapter[ImageStep] = TypeAdapter(ImageStep)


def image_step(persisted: PersistedStep) -> ImageStep:
    """Return the step of a persisted form. Raises ValueError when its arguments do not fit."""
    return _IMAGE_STEP.validate_python(persisted.model_dump())

"""What steps leave for those after them besides files: environment, user, working directory."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import assert_never

from pydantic import Field

from activities.contract.image_steps import (
    Add,
    Arg,
    Copy,
    Env,
    ImageStep,
    Meaning,
    Run,
    User,
    Workdir,
)
from activities.contract.model import Model
from activities.contract.results import ImageConfig, PulledImage

E2B_USER, E2B_DIRECTORY = "user", "/home/user"
"""What E2B's steps begin with in an image, whatever its config says."""
# `$NAME` and `${NAME}`, and as Docker also reads them `${NAME:-word}` and `${NAME:+word}`.
VARIABLE = re.compile(
    r"\\\$|\$(?:(?P<name>[A-Za-z_]\w*)"
    r"|\{(?P<braced>[A-Za-z_]\w*)(?::(?P<sign>[-+])(?P<word>[^{}]*))?\})",
    re.ASCII,
)
# One variable may be as long as the kernel lets one be (MAX_ARG_STRLEN), and all twice as long.
MAX_VALUE_CHARS = 131_072
MAX_VARIABLES_CHARS = 262_144


class TooLongError(ValueError):
    """Variables have become longer than is allowed; the message says which and the limit."""


class StepContext(Model):
    """What holds before a step."""

    environment: dict[str, str] = Field(default_factory=dict)
    arguments: dict[str, str] = Field(default_factory=dict)
    """Of ARG: for later steps, and never in the template."""
    user: str = ""
    working_dir: str = "/"

    @classmethod
    def of_image(cls, image: PulledImage, meaning: Meaning) -> StepContext:
        """Return what holds before the first step."""
        config = image.config
        context = cls(
            environment=config.variables,
            user=config.user,
            working_dir=config.working_dir or "/",
        )
        if meaning is Meaning.DOCKER or image.base is not None:
            return context
        return context.model_copy(update={"user": E2B_USER, "working_dir": E2B_DIRECTORY})

    @property
    def variables(self) -> dict[str, str]:
        """Return what a RUN finds in its environment; of ARG and ENV the latter counts."""
        return {**self.arguments, **self.environment}

    def after(self, step: ImageStep) -> StepContext:
        """Return what holds after a step. Raises TooLongError."""
        match step:
            case Env():
                told = self._with(self.environment, step)
                return self.model_copy(update={"environment": told})
            case Arg():
                told = self._with(self.arguments, step)
                return self.model_copy(update={"arguments": told})
            case User():
                return self.model_copy(update={"user": self.expanded(step.name)})
            case Workdir():
                return self.model_copy(update={"working_dir": self.path(step.path)})
            case Run() | Copy() | Add():
                return self
            case _:
                assert_never(step)

    def expanded(self, text: str) -> str:
        """Return an argument with its variables replaced by what they are so far.

        One that is not set is empty; `\\$` is a dollar sign. Raises TooLongError.
        """
        return _expanded(text, self.variables)

    def resolved(self, step: Run | Copy | Add) -> Run | Copy | Add:
        """Return a step with what its variables stand for; a RUN's are its shell's affair.

        The destination is absolute. Raises TooLongError.
        """
        if isinstance(step, Run):
            return step
        told = {
            "source": self.expanded(step.source),
            "destination": self.path(step.destination),
            "owner": step.owner and self.expanded(step.owner),
        }
        return step.model_copy(update=told)

    def path(self, path: str) -> str:
        """Return an absolute path; one that must be a directory ends with a slash.

        Raises TooLongError.
        """
        path = self.expanded(path)
        whole = posixpath.normpath(posixpath.join("/", self.working_dir, path))
        if whole.startswith("//"):
            whole = whole[1:]
        if len(whole) > MAX_VALUE_CHARS:  # now: each relative one makes it longer
            raise TooLongError(
                f"a path would have {len(whole)} characters; the limit is {MAX_VALUE_CHARS}"
            )
        return f"{whole.rstrip('/')}/" if path.endswith(("/", "/.")) or path == "." else whole

    def _with(self, known: Mapping[str, str], step: Env | Arg) -> dict[str, str]:
        """Return variables with those of a step, whose values see what was set before it."""
        told = dict(known)
        for name, value in step.variables:
            told[name] = self.expanded(value)
            chars = sum(len(each) + len(told[each]) for each in told)
            if chars > MAX_VARIABLES_CHARS:
                raise TooLongError(
                    f"{step.kind} {name}: the variables would have {chars} characters; the limit "
                    f"is {MAX_VARIABLES_CHARS}"
                )
        return told


def config_after(
    image: PulledImage, steps: tuple[ImageStep, ...], meaning: Meaning = Meaning.DOCKER
) -> ImageConfig:
    """Return what an image's config has become when all steps are done. Raises TooLongError."""
    context = StepContext.of_image(image, meaning)
    for step in steps:
        context = context.after(step)
    return image.config.model_copy(
        update={
            "env": tuple(f"{name}={value}" for name, value in context.environment.items()),
            "user": context.user,
            "working_dir": context.working_dir,
        }
    )


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    pieces, chars, end = list[str](), len(text), 0
    for found in VARIABLE.finditer(text):
        value = _value(found, variables)
        chars += len(value)
        if chars > MAX_VALUE_CHARS:  # now: each may be as long again as all there is
            raise TooLongError(
                f"a value would have {chars} characters; the limit is {MAX_VALUE_CHARS}"
            )
        pieces += [text[end : found.start()], value]
        end = found.end()
    return "".join([*pieces, text[end:]])


def _value(found: re.Match[str], variables: Mapping[str, str]) -> str:
    name = found["name"] or found["braced"]
    if name is None:
        return "$"
    value = variables.get(name, "")
    if found["sign"] is None or (found["sign"] == "-" and value):
        return value
    is_word = not value if found["sign"] == "-" else bool(value)
    return _expanded(found["word"], variables) if is_word else ""

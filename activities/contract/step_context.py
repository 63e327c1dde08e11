"""What steps leave for those after them besides files: environment, user, working directory."""

from __future__ import annotations

import posixpath
from typing import assert_never

from pydantic import Field

from activities.contract.image_steps import Arg, Copy, Env, ImageStep, Run, User, Workdir
from activities.contract.model import Model
from activities.contract.results import ImageConfig


class StepContext(Model):
    """What holds before a step."""

    environment: dict[str, str] = Field(default_factory=dict)
    arguments: dict[str, str] = Field(default_factory=dict)
    """Of ARG: for later steps, and never in the template."""
    user: str = ""
    working_dir: str = "/"

    @classmethod
    def of_image(cls, config: ImageConfig) -> StepContext:
        """Return what holds before the first step."""
        return cls(
            environment=dict(v.split("=", 1) for v in config.env if "=" in v),
            user=config.user,
            working_dir=config.working_dir or "/",
        )

    @property
    def variables(self) -> dict[str, str]:
        """Return what a RUN finds in its environment; of ARG and ENV the latter counts."""
        return {**self.arguments, **self.environment}

    def after(self, step: ImageStep) -> StepContext:
        """Return what holds after a step."""
        match step:
            case Env():
                told = {**self.environment, **dict(step.variables)}
                return self.model_copy(update={"environment": told})
            case Arg():
                told = {**self.arguments, **dict(step.variables)}
                return self.model_copy(update={"arguments": told})
            case User():
                return self.model_copy(update={"user": step.name})
            case Workdir():
                return self.model_copy(update={"working_dir": self.path(step.path)})
            case Run() | Copy():
                return self
            case _:
                assert_never(step)

    def path(self, path: str) -> str:
        """Return an absolute path; one that must be a directory ends with a slash."""
        whole = posixpath.normpath(posixpath.join("/", self.working_dir, path))
        if whole.startswith("//"):
            whole = whole[1:]
        return f"{whole.rstrip('/')}/" if path.endswith(("/", "/.")) or path == "." else whole


def config_after(config: ImageConfig, steps: tuple[ImageStep, ...]) -> ImageConfig:
    """Return what an image's config has become when all steps are done."""
    context = StepContext.of_image(config)
    for step in steps:
        context = context.after(step)
    return config.model_copy(
        update={
            "env": tuple(f"{name}={value}" for name, value in context.environment.items()),
            "user": context.user,
            "working_dir": context.working_dir,
        }
    )

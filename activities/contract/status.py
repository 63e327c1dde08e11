"""What is told of a build: its log, state, timeline, failure and result."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Generic, Literal, TypeVar

from pydantic import Field

from activities.contract.model import Model
from activities.contract.names import Step
from activities.contract.requests import TemplateConfig
from activities.contract.results import (
    BuildCheckpoints,
    PublishedTemplate,
    PulledImage,
    Verification,
)

T = TypeVar("T")


class LogLevel(StrEnum):
    """Level of a build log line; the order is that of severity."""

    DEBUG = "debug"
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class LogEntry(Model):
    """One line of a build log."""

    timestamp: datetime
    level: LogLevel
    message: str
    step: Step | None = None
    step_number: int | None = Field(default=None, exclude_if=lambda number: number is None)
    """Of the request's step that it is about, from 1 on."""
    fields: dict[str, str] = Field(default_factory=dict)


class Told(Model, Generic[T]):
    """What a step answers where steps are whole: its result, with the last lines of its log."""

    result: T
    lines: tuple[LogEntry, ...] = ()


class Progress(Model):
    """How far a running step is. Travels as heartbeat detail."""

    what: str
    done: int = 0
    total: int = 0
    unit: Literal["bytes", "files", "layers", "attempts", ""] = ""
    per_second: float = 0.0
    """How much is done in a second, since `what` began; 0 when that is not known."""


class BuildState(StrEnum):
    """The state of a build as its search attribute `BuildState` and the API tell it."""

    BUILDING = "building"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class BuildFailure(Model):
    """Why a build failed, in words that say what to do next."""

    error_type: str
    message: str
    step: Step | None = None
    step_number: int | None = Field(default=None, exclude_if=lambda number: number is None)
    """Of the request's step that failed, from 1 on."""
    hint: str = ""
    log_tail: tuple[str, ...] = ()


Outcome = Literal["running", "done", "failed", "cancelled", "rewound"]


class StepRecord(Model):
    """One row of a build's timeline."""

    step: Step
    started: datetime
    ended: datetime | None = None
    reused: bool = False
    host: str | None = None
    outcome: Outcome = "running"

    @property
    def seconds(self) -> float | None:
        """How long it took, or None while it runs."""
        return (self.ended - self.started).total_seconds() if self.ended else None


class BuildStatus(Model):
    """What the workflow's query `status` answers, and what the archive keeps of it."""

    config: TemplateConfig
    state: BuildState
    step: Step
    host: str | None
    lease_number: int | None
    done: BuildCheckpoints
    timeline: tuple[StepRecord, ...]
    failure: BuildFailure | None = None
    published: PublishedTemplate | None = None
    is_login_left_out: bool = Field(default=False, exclude_if=lambda left_out: not left_out)
    """In an archive: whether the config had a registry login, which is not kept there."""
    waits_for_turn: bool = Field(default=False, exclude_if=lambda waits: not waits)
    """Whether its tenant runs as many builds as it may."""


class BuildResult(Model):
    """What a finished `BuildTemplate` returns."""

    published: PublishedTemplate
    timeline: tuple[StepRecord, ...]
    image: PulledImage
    verification: Verification
    rootfs_size_mb: int
    agent_version: str = ""

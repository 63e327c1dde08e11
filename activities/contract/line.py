"""A tenant's own line: which of its builds run, and which wait for their turn."""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from activities.contract.model import Model
from activities.contract.names import BuildId, TenantName

MAX_IN_LINE = 5_000
"""Builds of a tenant that wait for their turn: what a workflow can carry into its next run."""


class TenantTerms(Model):
    """What the limits of a build's tenant mean for it. Written into it when it is created."""

    takes_turns: bool = False
    """Whether it waits for its turn among its tenant's before it waits for a host."""
    build_seconds: float | None = None
    """How long it may take, from the moment when a host takes it."""
    template_mb: int | None = None
    """Disk and memory of its template, in MiB."""


class RunningLimits(Model):
    """What a tenant's running builds may use together; None is no limit."""

    builds: int | None = None
    vcpus: int | None = None
    memory_mb: int | None = None

    @property
    def limit_anything(self) -> bool:
        """Whether a build may ever have to wait for its turn."""
        return (self.builds, self.vcpus, self.memory_mb) != (None, None, None)


class LinedBuild(Model):
    """A build in its tenant's line."""

    build_id: BuildId
    since: datetime
    """When it first asked for its turn: it keeps its place when it asks again."""
    vcpu_count: int
    memory_mb: int
    is_batch: bool = Field(default=False, exclude_if=lambda batch: not batch)
    """Whether all others of its tenant go before it."""


class TenantLineState(Model):
    """A tenant's line: what its workflow begins with, carries on, and tells when asked."""

    tenant: TenantName
    limits: RunningLimits = RunningLimits()
    running: tuple[LinedBuild, ...] = ()
    """Those whose turn it is."""
    waiting: tuple[LinedBuild, ...] = ()
    """In the order in which their turns come."""
    look_seconds: float = Field(default=60, exclude_if=lambda seconds: seconds == 60)
    """How often the line looks for builds that ended without a word, and at its limits."""


class EnterLineInput(Model):
    """Input of `enter_line`."""

    tenant: TenantName
    build: LinedBuild


class EnteringBuild(Model):
    """What `enter_line` signals to the line."""

    build: LinedBuild
    limits: RunningLimits
    """As they are now."""


class LookAtLineInput(Model):
    """Input of `look_at_line`."""

    tenant: TenantName
    running: tuple[BuildId, ...]


class LineLook(Model):
    """What `look_at_line` has seen."""

    limits: RunningLimits
    """As they are now."""
    ended: tuple[BuildId, ...]
    """Those that run no more, although they did not say so."""

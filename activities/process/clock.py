"""The wall clock, with its zone."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> datetime:
    """Return the wall clock with its zone. Not for workflow code: use `workflow.now()` there."""
    return datetime.now(UTC)

"""The file that tells a supervisor of processes that this one is ready."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from activities.process.settings import Settings


@contextmanager
def shown_as_ready(settings: Settings) -> Iterator[None]:
    """Keep the settings' `ready_file`, if any, while the body runs: also an error removes it."""
    if settings.ready_file is None:
        yield
        return
    settings.ready_file.touch()
    try:
        yield
    finally:
        settings.ready_file.unlink(missing_ok=True)

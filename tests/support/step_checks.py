"""What long work asks between two pieces: go on, or stop because the step was cancelled."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count


class Stopped(Exception):
    """Stands for a step that was cancelled."""


def go_on() -> None:
    """Never stops anything."""


def stop_at(call: int) -> Callable[[], None]:
    """Return a check that lets work go on until that call of it, which raises Stopped."""
    calls = count(1)

    def check() -> None:
        if next(calls) == call:
            raise Stopped

    return check

"""Layers that are held on their way into the bucket, until a test lets them go on."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import pytest

from activities.store.layers import LayerObjects
from activities.template import layering
from activities.template.layering import LayerMaker

POINTS = {
    "parts": (layering, "compose_tree"),
    "data": (LayerMaker, "_recorded"),
    "header": (LayerObjects, "commit"),
}
"""What of a layer is in the bucket, and what brings the next of it."""


def held_at(monkeypatch: pytest.MonkeyPatch, point: str) -> tuple[Event, Event]:
    """Hold the first layer that comes to a point: told by one event, until the other is set."""
    place, name = POINTS[point]
    go_on: Callable[..., object] = getattr(place, name)
    reached, released = Event(), Event()

    def wait(*arguments: object, **named: object) -> object:
        if not reached.is_set():
            reached.set()
            assert released.wait(60)
        return go_on(*arguments, **named)

    monkeypatch.setattr(place, name, wait)
    return reached, released

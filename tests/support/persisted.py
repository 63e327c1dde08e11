"""Documents that an earlier version has written: `tests/unit/activities/contract/persisted`."""

from __future__ import annotations

from pathlib import Path

PERSISTED = Path(__file__).parents[1] / "unit" / "activities" / "contract" / "persisted"


def text_of(name: str) -> str:
    return (PERSISTED / name).read_text().rstrip("\n")


def lines_of(name: str) -> list[str]:
    return text_of(name).split("\n")

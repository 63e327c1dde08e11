"""Recorded histories must still replay against the current code.

A failure here means that builds which are running during an upgrade would be stuck: guard the
change with `workflow.patched`. The histories are recorded by `tests/replay/record.py`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from api.cli.replay import history_from_file
from workflows.replay import replay

HISTORIES = sorted((Path(__file__).parent / "histories").glob("*.json"))


def test_there_is_a_history_of_every_kind() -> None:
    kinds = {path.stem for path in HISTORIES}
    builds = ("success", "failure", "cancel", "host_lost", "retry", "reset", "steps")
    assert kinds >= {
        *builds,
        *(f"whole_{kind}" for kind in builds),
        "on_template",
        "warm_refused",
        "ahead",
        "ahead_cancel",
        "delete",
        "turn",
        "tenant_line",
        "tenant_removal",
    }


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
async def test_a_recorded_history_replays(path: Path) -> None:
    verdict = await replay(history_from_file(path))
    assert verdict.fits, verdict.difference


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_a_history_has_no_path_of_the_machine_that_recorded_it(path: Path) -> None:
    files = re.findall(r'File \\"(.*?)\\"', path.read_text())
    assert [file for file in files if not file.startswith("/opt/template-manager/")] == []


async def test_a_history_that_does_not_fit_is_told_with_its_event(tmp_path: Path) -> None:
    text = (HISTORIES[0].parent / "success.json").read_text()
    foreign = tmp_path / "foreign.json"
    foreign.write_text(text.replace('"name": "pull_image"', '"name": "push_image"'))
    verdict = await replay(history_from_file(foreign))
    assert not verdict.fits
    events = history_from_file(foreign).events
    names = {
        e.event_id: e.activity_task_scheduled_event_attributes.activity_type.name for e in events
    }
    asked_for = [
        names[number] for number in range(verdict.event_id or 0, len(events)) if names[number]
    ]
    assert asked_for[0] == "push_image"


def test_a_file_that_is_no_history_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a workflow history"):
        history_from_file(path)

"""What a retry reads in the histories of builds that earlier versions have run."""

from __future__ import annotations

from pathlib import Path

import pytest
from temporalio.contrib.pydantic import pydantic_data_converter

from activities.contract.status import BuildState
from api.cli.replay import history_from_file
from api.server.history import ARCHIVE_ACTIVITY, input_in, status_in

HISTORIES = Path(__file__).parents[3] / "replay" / "histories"
ENDS = {
    "success": BuildState.COMPLETED,
    "failure": BuildState.FAILED,
    "cancel": BuildState.CANCELLED,
    "host_lost": BuildState.COMPLETED,
    "retry": BuildState.COMPLETED,
    "steps": BuildState.COMPLETED,
    "reset": BuildState.COMPLETED,
}


@pytest.mark.parametrize(("name", "end"), ENDS.items())
async def test_an_old_history_tells_the_request_and_how_the_build_ended(
    name: str, end: BuildState
) -> None:
    events = history_from_file(HISTORIES / f"{name}.json").events
    build = await input_in(events[0], pydantic_data_converter)
    scheduled = {
        event.activity_task_scheduled_event_attributes.activity_type.name: event for event in events
    }
    status = await status_in(scheduled[ARCHIVE_ACTIVITY], pydantic_data_converter)
    assert status.config == build.config
    assert status.state is end
    assert status.done.image is not None

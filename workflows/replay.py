"""Does a build's recorded history still fit the code that is here?"""

from __future__ import annotations

from dataclasses import dataclass

from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowHistory
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Replayer

from workflows.worker import WORKFLOWS, sandbox


@dataclass(frozen=True)
class Verdict:
    """What a replay showed. `event_id` is where history and code part, if they do."""

    fits: bool
    events: int
    event_id: int | None = None
    difference: str = ""


async def replay(history: WorkflowHistory) -> Verdict:
    """Run a history against the current code; nothing is executed."""
    difference = await _difference(history)
    events = len(history.events)
    if difference is None:
        return Verdict(fits=True, events=events)
    event_id = await _first_difference(history)
    return Verdict(fits=False, events=events, event_id=event_id, difference=difference)


async def _difference(history: WorkflowHistory) -> str | None:
    replayer = Replayer(
        workflows=WORKFLOWS,
        data_converter=pydantic_data_converter,
        workflow_runner=sandbox(),
    )
    result = await replayer.replay_workflow(history, raise_on_replay_failure=False)
    return None if result.replay_failure is None else str(result.replay_failure)


async def _first_difference(history: WorkflowHistory) -> int:
    """Return the id of the first event that the code's decisions do not lead to.

    The SDK tells what differs but not always where. Every workflow task is a place where a history
    may end, so the shortest beginning that does not fit is found by halving.
    """
    ends = [
        number
        for number, event in enumerate(history.events)
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_SCHEDULED and number > 0
    ]
    ends.append(len(history.events))
    low, high = 0, len(ends) - 1
    while low < high:
        middle = (low + high) // 2
        beginning = WorkflowHistory(history.workflow_id, history.events[: ends[middle]])
        if await _difference(beginning) is None:
            low = middle + 1
        else:
            high = middle
    return _decision_event(history, ends[low - 1] if low else 0)


def _decision_event(history: WorkflowHistory, start: int) -> int:
    """Return the first event from index `start` that follows a workflow task's completion."""
    completed = False
    for event in history.events[start:]:
        if completed:
            return event.event_id
        completed = event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
    return history.events[-1].event_id

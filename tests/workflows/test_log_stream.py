"""The lines of a step reach its workflow in order and once, by few signals and with its result."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from datetime import timedelta
from pathlib import Path

import pytest
from temporalio import activity, workflow
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, WorkflowFailureError
from temporalio.contrib.workflow_streams import WorkflowStream, WorkflowStreamClient
from temporalio.exceptions import ApplicationError
from temporalio.worker import UnsandboxedWorkflowRunner

from activities.contract.names import LOG_TOPIC, Step
from activities.contract.status import LogEntry, Told
from activities.disk.data_dir import DataDir
from activities.process.temporal import make_worker
from activities.step import log_stream
from activities.step.build_log import open_build_log
from activities.step.log_stream import LinesWithResult, Streamed, pause_seconds

LINES = 12
ALL = [f"line {number}" for number in range(LINES)]
LARGE = "x" * 4000


class Talker:
    """An activity that logs line after line, in a thread as blocking steps do."""

    def __init__(self, directory: Path, *, whole: bool) -> None:
        self._data_dir = DataDir(directory)
        self._whole = whole

    @activity.defn(name="talk")
    async def talk(self, how: str) -> int:
        build_id = (activity.info().workflow_id or "").removeprefix("talk-")
        async with open_build_log(
            self._data_dir, build_id, Step.ROOTFS, last_with_result=self._whole
        ) as log:
            for line in ALL:
                text = f"{line} {LARGE}" if how == "large" else line
                await asyncio.to_thread(log.info, text)
                await asyncio.sleep(0.25 if how == "slow" else 0)
            if how == "fails":
                raise ApplicationError("as asked", non_retryable=True)
        return LINES


@workflow.defn(name="Listens")
class Listens:
    """Hears an activity."""

    @workflow.init
    def __init__(self, how: str) -> None:
        self._topic = WorkflowStream().topic(LOG_TOPIC, type=LogEntry)

    @workflow.run
    async def run(self, how: str) -> int:
        told: Told[int] | int = await workflow.execute_activity(
            "talk",
            how,
            result_type=Told[int] | int,  # type: ignore[arg-type] # either is what it answers
            start_to_close_timeout=timedelta(seconds=60),
        )
        if isinstance(told, int):
            return told
        for entry in told.lines:
            self._topic.publish(entry)
        return told.result


async def heard(
    client: Client, directory: Path, how: str, *, whole: bool = True
) -> tuple[list[str], int]:
    """Return the lines in the workflow's stream, and how many signals brought them."""
    name = f"talk-{uuid.uuid4()}"
    worker = make_worker(
        client,
        name,
        [Talker(directory, whole=whole).talk],
        workflows=[Listens],
        workflow_runner=UnsandboxedWorkflowRunner(),
        interceptors=[LinesWithResult()],
    )
    async with asyncio.timeout(60), worker:
        handle = await client.start_workflow(Listens.run, how, id=name, task_queue=name)
        with contextlib.suppress(WorkflowFailureError):
            assert await handle.result() == LINES
        stream = WorkflowStreamClient.create(client, name).topic(LOG_TOPIC, type=LogEntry)
        lines = [item.data.message async for item in stream.subscribe()]
        events = (await handle.fetch_history()).events
    signal = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED
    return lines, [event.event_type for event in events].count(signal)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_stream, "FIRST_PAUSE_SECONDS", 0.4)
    monkeypatch.setattr(log_stream, "LONGER_BY_SECONDS", 0.2)


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, nothing is sent before the step has ended."""
    monkeypatch.setattr(log_stream, "FIRST_PAUSE_SECONDS", 50)
    monkeypatch.setattr(log_stream, "LONGEST_PAUSE_SECONDS", 50)


@pytest.mark.usefixtures("long_pauses")
async def test_a_short_step_costs_no_signal(client: Client, tmp_path: Path) -> None:
    assert await heard(client, tmp_path, "quick") == (ALL, 0)


@pytest.mark.usefixtures("long_pauses")
async def test_a_workflow_of_an_earlier_version_gets_them_by_signal(
    client: Client, tmp_path: Path
) -> None:
    assert await heard(client, tmp_path, "quick", whole=False) == (ALL, 1)


@pytest.mark.usefixtures("short_pauses")
async def test_a_long_step_is_heard_while_it_works(client: Client, tmp_path: Path) -> None:
    lines, signals = await heard(client, tmp_path, "slow")
    assert lines == ALL
    assert 1 <= signals < LINES


@pytest.mark.usefixtures("long_pauses")
async def test_the_lines_of_a_step_that_fails_are_there_before_it_does(
    client: Client, tmp_path: Path
) -> None:
    assert await heard(client, tmp_path, "fails") == (ALL, 1)


@pytest.mark.usefixtures("long_pauses")
async def test_too_much_for_a_result_or_a_signal_is_sent_in_parts(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_stream, "MAX_CHARS_WITH_RESULT", 10_000)
    monkeypatch.setattr(log_stream, "MAX_BATCH_CHARS", 20_000)
    lines, signals = await heard(client, tmp_path, "large")
    assert [line.split(" x")[0] for line in lines] == ALL
    assert signals >= 3  # of four lines each


def test_lines_wait_longer_the_more_batches_there_were_but_not_for_ever() -> None:
    pauses = [pause_seconds(batches) for batches in range(100)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1, 5)


def test_what_was_streamed_is_remembered_whichever_version_wrote_it(tmp_path: Path) -> None:
    file = tmp_path / "x.streamed"
    assert Streamed.read(file) == Streamed(0, 0, 0)
    Streamed(3, 70, 2).write(file)
    assert Streamed.read(file) == Streamed(3, 70, 2)
    file.write_text("[3, 70]")
    assert Streamed.read(file) == Streamed(3, 70, 0)
    for damaged in ("", "7", '{"a": 1}', "[1, 2, 3, 4]", "["):
        file.write_text(damaged)
        assert Streamed.read(file) == Streamed(0, 0, 0)

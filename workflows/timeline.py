"""The steps that a build has gone through, with their times and outcomes."""

from __future__ import annotations

from temporalio import workflow

from activities.contract.names import Step
from activities.contract.status import Outcome, StepRecord


class Timeline:
    """Records when each step started and how it ended."""

    def __init__(self) -> None:
        self._records: list[StepRecord] = []

    @property
    def records(self) -> tuple[StepRecord, ...]:
        """All records in order."""
        return tuple(self._records)

    @property
    def step(self) -> Step:
        """The step that runs or ran last."""
        return self._records[-1].step if self._records else Step.LEASE

    def begin(self, step: Step, host: str | None) -> None:
        """Record that a step starts now."""
        self._records.append(StepRecord(step=step, started=workflow.now(), host=host))

    def end(self, outcome: Outcome, *, reused: bool = False) -> StepRecord:
        """Record how the running step ended."""
        record = self._records[-1].model_copy(
            update={"ended": workflow.now(), "outcome": outcome, "reused": reused}
        )
        self._records[-1] = record
        return record

    def stop_running(self, outcome: Outcome) -> None:
        """End the running step, if one runs."""
        if self._records and self._records[-1].ended is None:
            self.end(outcome)

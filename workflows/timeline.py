"""The steps that a build has gone through, for its status, its log and the Web UI."""

from __future__ import annotations

from temporalio import workflow

from activities.contract.names import Step
from activities.contract.requests import TemplateConfig
from activities.contract.scope import HostLease
from activities.contract.status import BuildFailure, BuildState, StepRecord


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

    def end(self, outcome: str, *, reused: bool = False) -> StepRecord:
        """Record how the running step ended."""
        record = self._records[-1].model_copy(
            update={"ended": workflow.now(), "outcome": outcome, "reused": reused}
        )
        self._records[-1] = record
        return record

    def stop_running(self, outcome: str) -> None:
        """End the running step, if one runs."""
        if self._records and self._records[-1].ended is None:
            self.end(outcome)


def details_markdown(
    config: TemplateConfig,
    state: BuildState,
    lease: HostLease | None,
    timeline: Timeline,
    failure: BuildFailure | None,
) -> str:
    """Return what the Temporal Web UI shows as the workflow's current details."""
    lines = [
        f"**{config.template_id}** · `{config.image}` · {state}",
        "",
        f"Build `{config.build_id}` · {config.vcpu_count} vCPU · {config.memory_mb} MiB memory · "
        f"{config.disk_size_mb} MiB free disk · host {lease.host if lease else '(waiting)'}",
        "",
        "| step | outcome | since | seconds | host |",
        "| --- | --- | --- | --- | --- |",
        *(_row(record) for record in timeline.records),
    ]
    if failure is not None:
        lines += ["", f"**{failure.error_type}**: {failure.message}"]
        lines += [f"*What to do:* {failure.hint}"] if failure.hint else []
        lines += ["", "```", *failure.log_tail, "```"] if failure.log_tail else []
    return "\n".join(lines)


def _row(record: StepRecord) -> str:
    outcome = f"{record.outcome} (reused)" if record.reused else record.outcome
    seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
    started = record.started.strftime("%H:%M:%S")
    return f"| {record.step} | {outcome} | {started} | {seconds} | {record.host or ''} |"

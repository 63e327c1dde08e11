"""What a build tells of itself: its log, timeline, search attributes and the Web UI's details."""

from __future__ import annotations

from collections.abc import Callable

from temporalio import workflow
from temporalio.common import SearchAttributeUpdate
from temporalio.contrib.workflow_streams import WorkflowStream

from activities.contract.errors import failure_of
from activities.contract.inputs import BuildInput
from activities.contract.names import LOG_TOPIC, Step
from activities.contract.search_attributes import BUILD_STATE, BUILD_STEP, KVM_HOST
from activities.contract.status import BuildFailure, BuildState, LogEntry, LogLevel, StepRecord
from workflows.markdown import block, code, escaped
from workflows.timeline import Timeline

# Before it, each value to be found by was told alone, and steps were not whole.
LEAN = "lean"


class Telling:
    """Tells of one build. `host` says which host holds it now, if one does."""

    def __init__(
        self, build: BuildInput, stream: WorkflowStream, host: Callable[[], str | None]
    ) -> None:
        self.state = BuildState.BUILDING
        self.failure: BuildFailure | None = None
        self.timeline = Timeline()
        self._build = build
        self._host = host
        self._values: list[SearchAttributeUpdate[str]] = []
        self._log = stream.topic(LOG_TOPIC, type=LogEntry)

    def begin(self, step: Step, host: str | None) -> None:
        """Tell that a step starts now."""
        self.timeline.begin(step, host)
        self._find_by(BUILD_STEP.value_set(step), later=step in (Step.LEASE, Step.RELEASE))
        self.say(f"{step}: started" + (f" on {host}" if host else ""))
        self._show()

    def done(self, *, reused: bool) -> None:
        """Tell that the running step has succeeded."""
        record = self.timeline.end("done", reused=reused)
        how = "reused" if reused else "done"
        self.say(f"{record.step}: {how} in {record.seconds:.1f} s")
        self._show()

    def kept(self, step: Step, host: str | None) -> None:
        """Tell that an earlier run has left what a step makes."""
        if step in (record.step for record in self.timeline.records):
            return  # this run made it, and has told so
        self.timeline.begin(step, host)
        self.timeline.end("done", reused=True)
        self.say(f"{step}: reused from an earlier run of this build")

    def held(self, host: str, lease_number: int) -> None:
        """Tell which host holds the build from now on."""
        if self.timeline.step is Step.LEASE:
            self.timeline.stop_running("done")
        self._find_by(KVM_HOST.value_set(host), later=True)
        self.say(f"host {host} holds the build (lease {lease_number})")

    def warn(self, message: str) -> None:
        """Write a warning into the build's log."""
        self.say(message, LogLevel.WARN)

    def say(
        self, message: str, level: LogLevel = LogLevel.INFO, step_number: int | None = None
    ) -> None:
        """Write a line into the build's log, perhaps about a step of the request."""
        entry = LogEntry(
            timestamp=workflow.now(),
            level=level,
            message=message,
            step=self.timeline.step,
            step_number=step_number,
        )
        self._log.publish(entry)

    def hear(self, entry: LogEntry) -> None:
        """Write a line of a step into the build's log."""
        self._log.publish(entry)

    def failed(self, failure: BuildFailure) -> None:
        """Tell why the build fails."""
        self.failure = failure
        number = failure.step_number
        self.say(f"{failure.error_type}: {failure.message}", LogLevel.ERROR, number)
        if failure.hint:
            self.say(f"what to do: {failure.hint}", LogLevel.ERROR, number)
        self._show()

    def cancelling(self, failure: BuildFailure) -> None:
        """Tell that the build is being cancelled."""
        self.failure = failure
        self.enter(BuildState.CANCELLING)

    def undo_failed(self, name: str, error: BaseException) -> None:
        """Tell that a compensation did not come through."""
        self.warn(f"could not {name}: {failure_of(error).message}; left to the host's sweep")

    def enter(self, state: BuildState) -> None:
        """Tell the build's new state."""
        self.state = state
        self._find_by(BUILD_STATE.value_set(state))
        self.say(f"build is {state}")
        self._show()

    def _find_by(self, value: SearchAttributeUpdate[str], *, later: bool = False) -> None:
        """Let the build be found by a value: now, or with the next one, which is not far."""
        self._values.append(value)
        if later and workflow.patched(LEAN):
            return
        workflow.upsert_search_attributes(self._values)
        self._values = []

    def _show(self) -> None:
        host, timeline = self._host(), self.timeline
        workflow.set_current_details(
            details_markdown(self._build, self.state, host, timeline, self.failure)
        )


def details_markdown(
    build: BuildInput,
    state: BuildState,
    host: str | None,
    timeline: Timeline,
    failure: BuildFailure | None,
) -> str:
    """Return what the Temporal Web UI shows as the workflow's current details."""
    config = build.config
    lines = [
        f"**{config.template_id}** · {code(config.source.described)} · {state}",
        "",
        f"Build `{config.build_id}` · {config.vcpu_count} vCPU · {config.memory_mb} MiB memory · "
        f"{config.disk_size_mb} MiB free disk · network {code(str(build.network))} · "
        f"host {host or '(waiting)'}",
        "",
        "| step | outcome | since | seconds | host |",
        "| --- | --- | --- | --- | --- |",
        *(_row(record) for record in timeline.records),
    ]
    if failure is not None:
        lines += ["", f"**{escaped(failure.error_type)}**: {code(failure.message)}"]
        lines += ["", f"*What to do:* {escaped(failure.hint)}"] if failure.hint else []
        lines += ["", *block(failure.log_tail)] if failure.log_tail else []
    return "\n".join(lines)


def failure_text(failure: BuildFailure) -> str:
    """Return a failure as the Web UI shows it: cause, last lines and the next thing to do."""
    parts = [f"{failure.step}: {failure.message}" if failure.step else failure.message]
    parts += ["last lines:", *failure.log_tail] if failure.log_tail else []
    parts += [f"what to do: {failure.hint}"] if failure.hint else []
    return "\n".join(parts)


def _row(record: StepRecord) -> str:
    outcome = f"{record.outcome} (reused)" if record.reused else record.outcome
    seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
    started = record.started.strftime("%H:%M:%S")
    return f"| {record.step} | {outcome} | {started} | {seconds} | {record.host or ''} |"

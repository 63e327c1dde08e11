from __future__ import annotations

import inspect

import pytest
from temporalio.exceptions import (
    ActivityError,
    ApplicationError,
    RetryState,
    TimeoutError,
    TimeoutType,
)

from activities.contract import errors
from activities.contract.errors import (
    InternalFaultError,
    ReadyTimeoutError,
    RegistryUnavailableError,
    TemplateManagerError,
    error_type_of,
    failure_of,
)
from activities.contract.names import Step

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, TemplateManagerError) and value is not TemplateManagerError
]


def wrapped(cause: BaseException) -> ActivityError:
    error = ActivityError(
        "activity failed",
        scheduled_event_id=1,
        started_event_id=2,
        identity="",
        activity_type="wait_until_ready",
        activity_id="1",
        retry_state=RetryState.TIMEOUT,
    )
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_survives_the_way_through_temporal(kind: type[TemplateManagerError]) -> None:
    error = kind("what happened", step=Step.BOOT, log_tail=["last line"])
    wire = error.to_application_error()
    assert wire.type == kind.__name__
    assert wire.non_retryable is not kind.retryable
    assert failure_of(wrapped(wire)) == error.failure()
    assert error_type_of(wrapped(wire)) == kind.__name__


def test_a_user_is_told_what_to_do_next() -> None:
    handled_by_the_workflow = {
        "CheckpointLostError",
        "LeaseLostError",
        "HostRestartingError",
        "HostDrainingError",
    }
    bases = {"HostFaultError"}
    without = {kind.__name__ for kind in CLASSES if not kind.hint}
    assert without == handled_by_the_workflow | bases


def test_the_log_tail_is_bounded() -> None:
    error = ReadyTimeoutError("x", log_tail=["y" * 10_000] * 100)
    assert len(error.log_tail) == errors.LOG_TAIL_LINES
    assert all(len(line) == errors.LOG_TAIL_LINE_CHARS for line in error.log_tail)


def test_retry_after_is_honoured() -> None:
    wire = RegistryUnavailableError("429", retry_after_seconds=7).to_application_error()
    assert wire.next_retry_delay is not None
    assert wire.next_retry_delay.total_seconds() == 7


def test_a_timeout_says_which_activity_and_which_limit() -> None:
    cause = TimeoutError("timed out", type=TimeoutType.START_TO_CLOSE, last_heartbeat_details=[])
    failure = failure_of(wrapped(cause), Step.BOOT)
    assert failure.error_type == "StepTimeoutError"
    assert "wait_until_ready" in failure.message
    assert "start_to_close" in failure.message
    assert failure.step is Step.BOOT


@pytest.mark.parametrize("kind", [*TimeoutType], ids=lambda kind: kind.name)
def test_each_limit_is_told_in_words_with_what_to_do(kind: TimeoutType) -> None:
    cause = TimeoutError("timed out", type=kind, last_heartbeat_details=[])
    failure = failure_of(wrapped(cause), Step.BOOT)
    assert failure.message.startswith("wait_until_ready ")
    assert failure.message.endswith(f" ({kind.name.lower()})")
    assert "template-manager hosts" in failure.hint


def test_an_unknown_error_still_tells_its_kind_and_whose_fault_it_is() -> None:
    failure = failure_of(wrapped(ApplicationError("boom", type="KeyError")), Step.PULL)
    assert (failure.error_type, failure.message) == ("KeyError", "a fault of ours: KeyError: boom")
    assert failure.hint == InternalFaultError.hint
    assert failure_of(ValueError(), Step.PULL).message == "a fault of ours: ValueError"

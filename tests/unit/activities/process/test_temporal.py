"""What an activity raises reaches Temporal in one form, with the truth in it."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput

from activities.contract.errors import (
    ImageNotFoundError,
    InternalFaultError,
    TemplateManagerError,
    failure_of,
)
from activities.process.temporal import FAULT_ATTEMPTS, ErrorInterceptor


class Raising(ActivityInboundInterceptor):
    """Stands for an activity that fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def execute_activity(self, input: ExecuteActivityInput) -> object:
        raise self.error


async def raised(error: Exception, attempt: int = 1) -> ApplicationError:
    environment = ActivityEnvironment()
    environment.info = replace(environment.info, attempt=attempt)
    chain = ErrorInterceptor().intercept_activity(Raising(error))

    async def activity() -> object:
        return await chain.execute_activity(ExecuteActivityInput(activity, [], None, {}))

    with pytest.raises(ApplicationError) as caught:
        await environment.run(activity)
    return caught.value


async def test_a_mistake_of_ours_says_so_and_is_not_tried_for_ever() -> None:
    first = await raised(KeyError("init"))
    assert (first.type, first.non_retryable) == ("InternalFaultError", False)
    last = await raised(KeyError("init"), FAULT_ATTEMPTS)
    assert last.non_retryable
    failure = failure_of(last)
    assert failure.message == "a fault of ours: KeyError: 'init'"
    assert "Web UI" in failure.hint
    assert isinstance(last.__cause__, KeyError)


async def test_what_the_machine_refuses_may_work_the_next_time() -> None:
    refused = await raised(OSError(errno.EMFILE, "Too many open files"), FAULT_ATTEMPTS)
    assert (refused.type, refused.non_retryable) == ("InternalFaultError", False)
    assert "Too many open files" in failure_of(refused).message


async def test_our_own_errors_go_through_as_they_are() -> None:
    own: TemplateManagerError = ImageNotFoundError("no such image")
    assert (await raised(own)).type == "ImageNotFoundError"
    assert not issubclass(ImageNotFoundError, InternalFaultError)
    wire = ApplicationError("x", type="Other")
    assert await raised(wire) is wire

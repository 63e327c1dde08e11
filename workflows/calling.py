"""Calling an activity: by its method, with the input that it takes, as the table says.

A wrong input for a method is an error of types, here and nowhere else: no workflow calls Temporal's
`execute_activity…` itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TypeVar, cast, get_type_hints

from temporalio import workflow
from temporalio.common import Priority

from activities.contract.errors import InputTooLargeError
from activities.contract.requests import TEMPORAL_BYTES, BuildOptions
from activities.contract.status import LogEntry, Told
from workflows.policies import POLICIES

S = TypeVar("S")
A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")

# For what belongs to no build.
DEFAULTS = BuildOptions()


async def call(
    method: Callable[[S, A], Awaitable[T]],
    argument: A,
    *,
    queue: str,
    summary: str,
    options: BuildOptions = DEFAULTS,
    wait_seconds: float | None = None,
    total_seconds: float | None = None,
    priority: Priority | None = None,
    hear: Callable[[LogEntry], None] | None = None,
) -> T:
    """Run an activity to its end. `wait_seconds` and `total_seconds` replace the table's `wait` and
    `total`. `priority` says who is first when several wait in one queue; `hear` is told the lines
    that the activity answers with.

    Raises ActivityError, and CancelledError when the workflow is cancelled; ApplicationError when
    the input is too large.
    """
    _require_small(method.__name__, argument)
    config = _config(method.__name__, queue, summary, options)
    if wait_seconds is not None:
        config["schedule_to_start_timeout"] = timedelta(seconds=wait_seconds)
    if total_seconds is not None:
        config["schedule_to_close_timeout"] = timedelta(seconds=total_seconds)
    if priority is not None:
        config["priority"] = priority
    if hear is None:
        result: T = await workflow.execute_activity_method(method, argument, **config)
        return result
    told = await workflow.execute_activity(
        method.__name__, argument, result_type=_told_by(method), **config
    )
    if not isinstance(told, Told):  # it had nothing more to say
        return cast(T, told)
    for entry in told.lines:
        hear(entry)
    return cast(T, told.result)


def _told_by(method: Callable[[S, A], Awaitable[T]]) -> type[object]:
    """Return the type of a method's result, with or without lines."""
    result = get_type_hints(method)["return"]
    either = Told[result] | result  # type: ignore[valid-type] # known when it runs
    return cast(type[object], either)


async def call_with_two(
    method: Callable[[S, A, B], Awaitable[T]],
    first: A,
    second: B,
    *,
    queue: str,
    summary: str,
    options: BuildOptions = DEFAULTS,
) -> T:
    """Run an activity that takes two inputs, as `call` does."""
    _require_small(method.__name__, first, second)
    result: T = await workflow.execute_activity_method(
        method,
        args=[first, second],
        **_config(method.__name__, queue, summary, options),
    )
    return result


def _require_small(name: str, *inputs: object) -> None:
    """Raise the failure of an activity that could never begin.

    With its input Temporal would refuse the whole workflow task, again and again: the build would
    keep its host, and no cancel would get through.
    """
    size_bytes = workflow.payload_converter().to_payloads_wrapper(inputs).ByteSize()
    if size_bytes > TEMPORAL_BYTES:
        told = f"the input of {name} would have {size_bytes} bytes; at most {TEMPORAL_BYTES} go"
        raise InputTooLargeError(told).to_application_error()


def _config(name: str, queue: str, summary: str, options: BuildOptions) -> workflow.ActivityConfig:
    config = POLICIES[name].config(options)
    config["task_queue"], config["summary"] = queue, summary
    return config

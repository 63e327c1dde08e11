"""How this project talks to Temporal: connection, workers, search attributes, errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import structlog
from temporalio import activity
from temporalio.api.operatorservice.v1 import (
    AddSearchAttributesRequest,
    ListSearchAttributesRequest,
)
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.envconfig import ClientConfig, ClientConnectConfig
from temporalio.exceptions import FailureError
from temporalio.runtime import Runtime
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
    PollerBehaviorSimpleMaximum,
    Worker,
    WorkerTuner,
    WorkflowRunner,
)
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner

from activities.contract.errors import (
    InternalFaultError,
    TemplateManagerError,
    TemporalUnavailableError,
    fault_of,
)
from activities.contract.search_attributes import SEARCH_ATTRIBUTES
from activities.process.logging import fields_of_activity
from activities.process.tracing import client_interceptors

# Cancellation reaches an activity with a heartbeat's answer, so heartbeats must not be held back
# long; and a stopping worker gives its activities this long to let go.
MAX_HEARTBEAT_THROTTLE = timedelta(seconds=2)
GRACEFUL_SHUTDOWN = timedelta(seconds=10)
# A fifth of them are for workflows that are new to the worker. The SDK's own default, 5, has tasks
# wait for each other when steps of many builds end at once.
WORKFLOW_TASK_POLLS = 20

# What only a mistake in this program raises, and how often its activity is tried all the same.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)
FAULT_ATTEMPTS = 3

_log = structlog.get_logger(__name__)


def _config() -> ClientConnectConfig:
    config = ClientConfig.load_client_connect_config()
    config.setdefault("target_host", "127.0.0.1:7233")
    return config


def temporal_address() -> str:
    """Return where Temporal is, by the environment and the profile."""
    return str(_config()["target_host"])


async def connect(identity: str, *, lazy: bool = False, runtime: Runtime | None = None) -> Client:
    """Connect as `TEMPORAL_ADDRESS` and its sisters say (default 127.0.0.1:7233).

    With `lazy` the connection is made at the first call, so that a server can start while
    Temporal is away. Raises TemporalUnavailableError, unless `lazy`.
    """
    config = _config()
    try:
        return await Client.connect(
            **config,
            data_converter=pydantic_data_converter,
            identity=identity,
            lazy=lazy,
            runtime=runtime,
            interceptors=client_interceptors(),
        )
    except RuntimeError as error:
        if not is_connect_error(error):
            raise
        raise TemporalUnavailableError(
            f"Temporal cannot be reached at {config['target_host']}"
        ) from error


def is_connect_error(error: BaseException) -> bool:
    """Whether the SDK could not connect: it has no type of its own for it."""
    return isinstance(error, RuntimeError) and str(error).startswith("Failed client connect")


async def missing_search_attributes(client: Client) -> dict[str, int]:
    """Return those of our search attributes that the namespace does not know, with their types.

    Raises RPCError when Temporal is away.
    """
    listed = await client.operator_service.list_search_attributes(
        ListSearchAttributesRequest(namespace=client.namespace)
    )
    return {
        key.name: int(key.indexed_value_type)
        for key in SEARCH_ATTRIBUTES
        if key.name not in listed.custom_attributes
    }


async def register_search_attributes(client: Client) -> None:
    """Make sure that the namespace knows our search attributes. Safe to call at every start.

    Raises RPCError when Temporal is away or the caller may not change the namespace.
    """
    missing = await missing_search_attributes(client)
    if not missing:
        return
    try:
        await client.operator_service.add_search_attributes(
            AddSearchAttributesRequest(
                namespace=client.namespace,
                search_attributes=missing,  # type: ignore[arg-type] # the stub wants its enum
            )
        )
    except RPCError as error:  # another process was quicker
        if error.status is not RPCStatusCode.ALREADY_EXISTS:
            raise


def make_worker(
    client: Client,
    task_queue: str,
    activities: Sequence[Callable[..., object]],
    *,
    workflows: Sequence[type] = (),
    workflow_runner: WorkflowRunner | None = None,
    tuner: WorkerTuner | None = None,
    interceptors: Sequence[Interceptor] = (),
) -> Worker:
    """Return a worker that obeys cancellations soon, and gives its activities time to let go."""
    return Worker(
        client,
        task_queue=task_queue,
        activities=activities,
        workflows=workflows,
        workflow_runner=workflow_runner or SandboxedWorkflowRunner(),
        interceptors=[ErrorInterceptor(), *interceptors],
        tuner=tuner,
        workflow_task_poller_behavior=PollerBehaviorSimpleMaximum(WORKFLOW_TASK_POLLS),
        max_heartbeat_throttle_interval=MAX_HEARTBEAT_THROTTLE,
        graceful_shutdown_timeout=GRACEFUL_SHUTDOWN,
    )


class ErrorInterceptor(Interceptor):
    """Gives our own errors their wire form, and every process log line its build and step."""

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:
        """Wrap the activity inbound chain."""
        return _ErrorActivityInterceptor(next)


class _ErrorActivityInterceptor(ActivityInboundInterceptor):
    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # as the SDK says it
        info = activity.info()
        argument = input.args[0] if input.args else None
        fields = fields_of_activity(
            info.workflow_id or "", info.activity_type, info.attempt, argument
        )
        with structlog.contextvars.bound_contextvars(**fields):
            began = time.monotonic()
            _log.info("activity started")
            try:
                result = await super().execute_activity(input)
            except TemplateManagerError as error:
                _log.warning(
                    "activity failed",
                    error_type=type(error).__name__,
                    error=error.message,
                    seconds=_since(began),
                )
                raise error.to_application_error() from error
            except asyncio.CancelledError:
                _log.info("activity cancelled", seconds=_since(began))
                raise
            except FailureError:  # in its wire form already
                raise
            except Exception as error:
                _log.exception("activity failed by a fault of ours", seconds=_since(began))
                raise _fault(error, info.attempt).to_application_error() from error
            _log.info("activity done", seconds=_since(began))
            return result


def _fault(error: Exception, attempt: int) -> InternalFaultError:
    """Return what an unforeseen error is told as. What is a mistake in a program comes again."""
    fault = fault_of(error)
    fault.retryable = attempt < FAULT_ATTEMPTS or not isinstance(error, MISTAKES)
    return fault


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)

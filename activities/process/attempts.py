"""Whether an attempt of an activity is still waited for.

An attempt that was held up until Temporal has given up on it goes on when it wakes up, beside a
later one or long after it: it must ask before it does what only the last may do.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from datetime import timedelta

from temporalio import activity

RPC_LIMIT = timedelta(seconds=10)

IsAwaited = Callable[[], Coroutine[None, None, bool]]


def this_attempt() -> IsAwaited:
    """Return what tells, from anywhere, whether its workflow still waits for this very attempt.

    Call it in the activity. What is returned raises RPCError when Temporal does not answer.
    """
    info, client = activity.info(), activity.client()
    assert info.workflow_id is not None
    workflow = client.get_workflow_handle(info.workflow_id, run_id=info.workflow_run_id)

    async def is_awaited() -> bool:
        described = await workflow.describe(rpc_timeout=RPC_LIMIT)
        awaited = described.raw_description.pending_activities
        attempts = [(each.activity_id, each.attempt) for each in awaited]
        return (info.activity_id, info.attempt) in attempts

    return is_awaited

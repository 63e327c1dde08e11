"""Record the histories that `test_replay.py` replays: `python -m tests.replay.record [KIND…]`.

Run it only when a new kind of history is needed. An old history stays as it is: it stands for the
builds that are running while the workers are upgraded. Those that no kind here names are of code
from before steps were whole. Stack traces are written as if the repository were at
/opt/template-manager.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from temporalio.client import Client, WorkflowFailureError, WorkflowHandle

from activities.contract.errors import (
    CheckpointLostError,
    HostDrainingError,
    ReadyTimeoutError,
    StorageUnavailableError,
)
from activities.contract.image_steps import Run
from activities.contract.inputs import BuildInput
from activities.contract.line import (
    EnteringBuild,
    LinedBuild,
    RunningLimits,
    TenantLineState,
    TenantTerms,
)
from activities.contract.names import (
    WORKFLOW_TASK_QUEUE,
    Step,
    delete_tenant_workflow_id,
    delete_workflow_id,
    tenant_line_workflow_id,
)
from activities.contract.search_attributes import SEARCH_ATTRIBUTES
from activities.contract.sources import FromTemplate
from activities.contract.tenant_removal import TenantRemoval
from activities.process.clock import utc_now
from tests.support.recording_host import Journal, RecordingHost, running_stack
from tests.support.resetting import reset_before
from tests.support.temporal_server import start_temporal
from tests.support.workflow_runs import OPTIONS, Handle, config, delete, delete_of, start
from workflows.build_template import BuildTemplate
from workflows.delete_tenant import DeleteTenant
from workflows.tenant_line import TenantLine

DIRECTORY = Path(__file__).parent / "histories"
REPOSITORY = Path(__file__).parents[2]
# What stands in a stack trace in the place of this machine's own paths.
NEUTRAL = {sys.prefix: "/opt/template-manager/.venv", str(REPOSITORY): "/opt/template-manager"}


@asynccontextmanager
async def one_host(client: Client) -> AsyncIterator[RecordingHost]:
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal())
    async with running_stack(client, host):
        yield host


async def _end(handle: Handle) -> Handle:
    with contextlib.suppress(WorkflowFailureError):
        await handle.result()
    return handle


async def success(client: Client) -> Handle:
    async with one_host(client):
        return await _end(await start(client))


async def on_earlier_host(client: Client) -> Handle:
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal(), whole_steps=False)
    async with running_stack(client, host):
        return await _end(await start(client))


async def failure(client: Client) -> Handle:
    async with one_host(client) as host:
        host.journal.fail("wait_until_ready", ReadyTimeoutError("not ready", log_tail=["line"]))
        return await _end(await start(client))


async def cancel(client: Client) -> Handle:
    async with one_host(client) as host:
        started = host.journal.hang("upload_artifact memfile")
        handle = await start(client)
        await started.wait()
        await handle.cancel()
        return await _end(handle)


async def host_lost(client: Client) -> Handle:
    first, second = (RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal()) for _ in range(2))
    second.journal.next_lease = 10
    started = first.journal.hang("wait_until_ready")
    async with running_stack(client, first):
        handle = await start(client)
        await started.wait()
        first.silent.set()
        first.journal.hanging.clear()
    async with running_stack(client, second):
        return await _end(handle)


async def retry(client: Client) -> Handle:
    async with one_host(client) as host:
        host.journal.fail("upload_artifact memfile", *[StorageUnavailableError("503")] * 2)
        failed = await _end(await start(client))
        status = await failed.query(BuildTemplate.status)
        build = BuildInput(config=status.config, options=OPTIONS, done=status.done)
        return await _end(await start(client, build))


async def steps(client: Client) -> Handle:
    done = (Run(command="make"),)
    async with one_host(client):
        return await _end(
            await start(client, BuildInput(config=config(steps=done), options=OPTIONS))
        )


async def warm_refused(client: Client) -> Handle:
    """A build that asks a host with its layers first, which has no free slot."""
    async with one_host(client) as host:
        host.journal.fail("hold_host_if_free", HostDrainingError("the host has no free slot"))
        build = BuildInput(config=config(), options=OPTIONS, warm_host=host.name)
        return await _end(await start(client, build))


async def ahead(client: Client) -> Handle:
    """Layers go up beside the steps of two hosts, of which the first is lost."""
    first, second = (
        RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal(), sends_ahead=True) for _ in range(2)
    )
    second.journal.next_lease = 10
    started = first.journal.hang("run_steps")
    sending = first.journal.hang("send_layers")
    async with running_stack(client, first):
        build = BuildInput(config=config(steps=(Run(command="make"),)), options=OPTIONS)
        handle = await start(client, build)
        await asyncio.gather(started.wait(), sending.wait())
        first.silent.set()
        first.journal.hanging.clear()
    second.journal.fail("send_layers", StorageUnavailableError("503"))
    async with running_stack(client, second):
        return await _end(handle)


async def ahead_cancel(client: Client) -> Handle:
    """A build that is cancelled while its layers go up beside the boot."""
    host = RecordingHost(f"h-{uuid.uuid4().hex[:8]}", Journal(), sends_ahead=True)
    started, sending = host.journal.hang("wait_until_ready"), host.journal.hang("send_layers")
    async with running_stack(client, host):
        handle = await start(client)
        await asyncio.gather(started.wait(), sending.wait())
        await handle.cancel()
        return await _end(handle)


async def on_template(client: Client) -> Handle:
    """Steps on a template, whose disk is gone when they begin."""
    source, done = FromTemplate(build_id=str(uuid.uuid4())), (Run(command="make"),)
    async with one_host(client) as host:
        host.journal.fail("run_steps", CheckpointLostError("gone", step=Step.PULL))
        build = BuildInput(config=config(source=source, steps=done), options=OPTIONS)
        return await _end(await start(client, build))


async def turn(client: Client) -> Handle:
    """A build that waits for its turn among those of its tenant, and then for a host."""
    async with one_host(client):
        terms = TenantTerms(takes_turns=True)
        build = BuildInput(config=config(tenant="acme"), options=OPTIONS, terms=terms)
        return await _end(await start(client, build))


async def tenant_line(client: Client) -> WorkflowHandle[Any, Any]:
    """The line of a tenant that two builds have come to, the second in vain."""
    state = TenantLineState(tenant="beta", look_seconds=0.3)
    line = tenant_line_workflow_id("beta")
    handle = await client.start_workflow(
        TenantLine.run, state, id=line, task_queue=WORKFLOW_TASK_QUEUE
    )
    async with one_host(client):
        build = BuildInput(
            config=config(tenant="beta"), options=OPTIONS, terms=TenantTerms(takes_turns=True)
        )
        await _end(await start(client, build))
        gone = LinedBuild(build_id=str(uuid.uuid4()), since=utc_now(), vcpu_count=1, memory_mb=1)
        await handle.signal(
            TenantLine.enter, EnteringBuild(build=gone, limits=RunningLimits(builds=1))
        )
        await handle.result()
    return handle


async def tenant_removal(client: Client) -> WorkflowHandle[Any, Any]:
    """A tenant with three builds, one of which is still found when it has been deleted."""
    async with one_host(client) as host:
        host.journal.builds = {str(uuid.uuid4()) for _ in range(3)}
        host.journal.sticky_builds = {min(host.journal.builds)}
        handle = await client.start_workflow(
            DeleteTenant.run,
            TenantRemoval(tenant="acme"),
            id=delete_tenant_workflow_id("acme"),
            task_queue=WORKFLOW_TASK_QUEUE,
        )
        await handle.result()
        return handle


async def reset(client: Client) -> Handle:
    """To before the verification: the new run begins with the old one's events."""
    async with one_host(client) as host:
        handle = await _end(await start(client))
        host.journal.published = None
        await reset_before(client, handle.id, "verify_snapshot")
        return await _end(client.get_workflow_handle_for(BuildTemplate.run, handle.id))


async def deletion(client: Client) -> WorkflowHandle[Any, Any]:
    async with one_host(client) as host:
        what = delete_of(host.name, own_image="127.0.0.1:5000/web:1")
        await delete(client, what)
        handle = client.get_workflow_handle(delete_workflow_id(what.build_id))
        await handle.result()
        return handle


KINDS: dict[str, Callable[[Client], Awaitable[WorkflowHandle[Any, Any]]]] = {
    "delete": deletion,
    "turn": turn,
    "tenant_line": tenant_line,
    "tenant_removal": tenant_removal,
    "whole_success": success,
    "whole_failure": failure,
    "whole_cancel": cancel,
    "whole_host_lost": host_lost,
    "whole_retry": retry,
    "whole_steps": steps,
    "whole_reset": reset,
    "whole_on_earlier_host": on_earlier_host,
    "on_template": on_template,
    "warm_refused": warm_refused,
    "ahead": ahead,
    "ahead_cancel": ahead_cancel,
}


def without_own_paths(history: str) -> str:
    """Return a history without the paths of the machine that records it."""
    for own, neutral in NEUTRAL.items():
        history = history.replace(f"{own}/", f"{neutral}/")
    return history


async def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    async with await start_temporal(search_attributes=SEARCH_ATTRIBUTES) as environment:
        for kind, record in KINDS.items():
            if kind not in (sys.argv[1:] or KINDS):
                continue
            handle = await record(environment.client)
            history = await handle.fetch_history()
            text = without_own_paths(history.to_json())
            (DIRECTORY / f"{kind}.json").write_text(text + "\n")
            print(f"{kind}: {len(history.events)} events")


if __name__ == "__main__":
    asyncio.run(main())

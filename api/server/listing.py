"""Lists of the caller's builds, from Temporal's visibility store. It lags behind by a moment: a
build is addressed by its id, never looked for in a list."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from temporalio.client import Client, WorkflowExecution, WorkflowExecutionStatus

from activities.contract.names import TENANT_NAME, Step, build_of_workflow, delete_workflow_id
from activities.contract.search_attributes import (
    BUILD_ID,
    BUILD_STATE,
    BUILD_STEP,
    BUILDS,
    IMAGE_MEMO,
    KVM_HOST,
    RUNNING_BUILDS,
    SIZE_MEMO,
    TEMPLATE_ID,
)
from activities.contract.status import BuildState
from activities.process.sealing import Sealer
from api.errors import ApiError, Violation, invalid_argument
from api.pb import template_manager_pb2 as pb
from api.server.finding import RPC_LIMIT
from api.server.tenancy import condition_of, is_visible_workflow, tenant_of, visible_condition
from api.server.validation import TEMPLATE_ID as TEMPLATE_ID_PATTERN
from api.server.view import CLOSED_STATES
from api.server.waiting import WaitingLine

DEFAULT_PAGE, MAX_PAGE = 50, 100
MARK_BYTES = 16

_CONDITIONS = {
    BuildState.BUILDING: "(ExecutionStatus='Running' AND BuildState!='cancelling')",
    BuildState.CANCELLING: "(ExecutionStatus='Running' AND BuildState='cancelling')",
    BuildState.COMPLETED: "ExecutionStatus='Completed'",
    BuildState.FAILED: "ExecutionStatus IN ('Failed', 'Terminated', 'TimedOut')",
    BuildState.CANCELLED: "ExecutionStatus='Canceled'",
}
ROOM_RETRY_SECONDS = 10.0


@dataclass(frozen=True)
class ListedBuild:
    """One build of a list."""

    build_id: str
    template_id: str
    state: BuildState
    step: str
    host: str
    image: str
    started: datetime
    ended: datetime | None
    workflow_id: str
    run_id: str
    tenant: str
    size: tuple[int, int, int] = (0, 0, 0)
    """vCPUs, memory and free disk space (MiB), as they were asked for; 0 when nobody knows."""
    builds_before: int | None = None
    """Of one that waits for a host: how many wait for longer."""

    @property
    def waits_for_host(self) -> bool:
        """Whether no host has taken it, as far as the visibility store knows."""
        return self.state is BuildState.BUILDING and self.step in ("", Step.LEASE)


@dataclass(frozen=True)
class Page:
    """A page of builds, latest first."""

    builds: tuple[ListedBuild, ...]
    next_page_token: str


class BuildListing:
    """Lists builds that Temporal remembers; deleted ones and earlier runs are left out."""

    def __init__(self, client: Client, line: WaitingLine, sealer: Sealer) -> None:
        """`sealer` marks the tokens of pages, so that no others get to Temporal."""
        self._client = client
        self._line = line
        self._sealer = sealer

    async def page(self, query: str, page_size: int, page_token: str) -> Page:
        """Return a page of what `query` (see `list_query`) finds.

        Raises ApiError INVALID_ARGUMENT for a token that is not ours.
        """
        found = self._client.list_workflows(
            query,
            page_size=min(page_size or DEFAULT_PAGE, MAX_PAGE),
            next_page_token=self._opened_token(page_token, query),
            rpc_timeout=RPC_LIMIT,
        )
        await found.fetch_next_page()
        builds = [
            build
            for build in _latest_runs(found.current_page or ())
            if await is_visible_workflow(build)  # the query says so, too
        ]
        deleted = await self._deletes([build.id for build in builds])
        listed = [
            await _listed(build)
            for build in builds
            if not _is_deleted(build, deleted.get(delete_workflow_id(_build_id(build))))
        ]
        placed = await self._with_places(listed)
        return Page(tuple(placed), self._page_token(found.next_page_token, query))

    def _page_token(self, temporals_token: bytes | None, query: str) -> str:
        """Return a token that is good for this query only: Temporal does not check its own, and
        takes long over one that it cannot read."""
        if not temporals_token:
            return ""
        return base64.urlsafe_b64encode(self._mark(query, temporals_token)).decode()

    def _opened_token(self, token: str, query: str) -> bytes | None:
        if not token:
            return None
        try:
            opened = base64.b64decode(token, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            opened = b""
        if opened != self._mark(query, opened[MARK_BYTES:]):
            told = "must be the next_page_token of this request's page before"
            raise invalid_argument([Violation("page_token", told)])
        return opened[MARK_BYTES:]

    def _mark(self, query: str, temporals_token: bytes) -> bytes:
        told = json.dumps([query, temporals_token.hex()]).encode()
        return self._sealer.mark(told)[:MARK_BYTES] + temporals_token

    async def _with_places(self, builds: list[ListedBuild]) -> list[ListedBuild]:
        """Add to those that wait how many are before them."""
        if not any(build.waits_for_host for build in builds):
            return builds
        places = await self._line.places()
        return [
            replace(build, builds_before=places.get(build.workflow_id))
            if build.waits_for_host
            else build
            for build in builds
        ]

    async def require_room(self, most: int) -> None:
        """Raise ApiError RESOURCE_EXHAUSTED when `most` builds are running; 0 is no limit.

        Temporal's count lags a little, so that a burst may get somewhat further.
        """
        if most == 0:
            return
        running = await self._client.count_workflows(RUNNING_BUILDS, rpc_timeout=RPC_LIMIT)
        if running.count < most:
            return
        raise ApiError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "TOO_MANY_BUILDS",
            f"{most} builds are running, and this service allows no more",
            hint="Wait for a build to end (template-manager list --state building).",
            retry_after_seconds=ROOM_RETRY_SECONDS,
        )

    async def _deletes(self, workflow_ids: Sequence[str]) -> dict[str, WorkflowExecution]:
        if not workflow_ids:
            return {}
        names = ", ".join(
            f"'{delete_workflow_id(build_of_workflow(name))}'" for name in workflow_ids
        )
        query = f"WorkflowType='DeleteTemplate' AND WorkflowId IN ({names})"
        deletes: dict[str, WorkflowExecution] = {}
        async for delete in self._client.list_workflows(query, rpc_timeout=RPC_LIMIT):
            deletes.setdefault(delete.id, delete)  # the latest comes first
        return deletes


def list_query(request: pb.TemplateBuildListRequest) -> str:
    """Return the visibility query for a request of the current caller.

    Raises ApiError INVALID_ARGUMENT, so that nothing of a request gets into a query unchecked.
    """
    parts = [BUILDS, *filter(None, [visible_condition()])]
    violations = []
    if request.template_id:
        parts.append(f"TemplateId='{request.template_id}'")
        if not TEMPLATE_ID_PATTERN.fullmatch(request.template_id):
            violations.append(Violation("template_id", "must be 1 to 63 of a-z, 0-9 and -"))
    if request.tenant:
        parts.append(condition_of(request.tenant))
        if not TENANT_NAME.fullmatch(request.tenant):
            violations.append(Violation("tenant", "must be 1 to 63 of a-z, 0-9 and -"))
    states = [state for state in BuildState if state in request.states]
    if unknown := set(request.states) - set(BuildState):
        known = ", ".join(BuildState)
        violations.append(Violation("states", f"{', '.join(sorted(unknown))}: use {known}"))
    if states:
        parts.append("(" + " OR ".join(_CONDITIONS[state] for state in states) + ")")
    for field, sign in (("started_after", ">="), ("started_before", "<")):
        if request.HasField(field):
            moment: Timestamp = getattr(request, field)
            parts.append(f"StartTime {sign} '{moment.ToJsonString()}'")
    if violations:
        raise invalid_argument(violations)
    return " AND ".join(parts)


def _latest_runs(found: Sequence[WorkflowExecution]) -> list[WorkflowExecution]:
    latest: dict[str, WorkflowExecution] = {}
    for execution in found:
        latest.setdefault(execution.id, execution)
    return list(latest.values())


def _is_deleted(build: WorkflowExecution, delete: WorkflowExecution | None) -> bool:
    if delete is None or delete.start_time < build.start_time:
        return False
    done = (WorkflowExecutionStatus.RUNNING, WorkflowExecutionStatus.COMPLETED)
    return delete.status in done and build.status is not WorkflowExecutionStatus.RUNNING


async def _listed(build: WorkflowExecution) -> ListedBuild:
    attributes, memo = build.typed_search_attributes, await build.memo()
    vcpu_count, memory_mb, disk_size_mb = memo.get(SIZE_MEMO, (0, 0, 0))
    running = BuildState(attributes.get(BUILD_STATE) or BuildState.BUILDING)
    return ListedBuild(
        build_id=_build_id(build),
        template_id=attributes.get(TEMPLATE_ID) or "",
        state=CLOSED_STATES.get(build.status, running) if build.status else running,
        step=attributes.get(BUILD_STEP) or "",
        host=attributes.get(KVM_HOST) or "",
        image=str(memo.get(IMAGE_MEMO, "")),
        started=build.start_time,
        ended=build.close_time,
        workflow_id=build.id,
        run_id=build.run_id,
        tenant=await tenant_of(build),
        size=(vcpu_count, memory_mb, disk_size_mb),
    )


def _build_id(build: WorkflowExecution) -> str:
    return build.typed_search_attributes.get(BUILD_ID) or build_of_workflow(build.id)

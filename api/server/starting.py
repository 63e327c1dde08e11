"""Starting builds: new ones, those that a request has started before, and failed ones again."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import grpc
import structlog
from temporalio.client import Client
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.exceptions import WorkflowAlreadyStartedError

from activities.contract.errors import TemplateNotFoundError
from activities.contract.inputs import BuildInput
from activities.contract.names import WORKFLOW_TASK_QUEUE, build_workflow_id
from activities.contract.requests import TemplateConfig
from activities.contract.results import BuildCheckpoints
from activities.contract.search_attributes import (
    BUILD_ID,
    BUILD_STATE,
    CONFIG_SHA256_MEMO,
    IMAGE,
    IMAGE_MEMO,
    SIZE_MEMO,
    TEMPLATE_ID,
    TENANT,
    TENANT_MEMO,
)
from activities.contract.sources import FromImage, FromTemplate, Source
from activities.contract.status import BuildState
from activities.process.settings import Settings
from api.errors import (
    RETRY_SECONDS,
    ApiError,
    Violation,
    failed_precondition,
    temporal_unavailable,
)
from api.server.access import require_image
from api.server.copied_files import CopiedFiles
from api.server.ending import BuildEnder
from api.server.finding import RPC_LIMIT, BuildFinder
from api.server.history import BuildHistory
from api.server.naming import TemplateNaming
from api.server.template_bucket import TemplateBucket
from api.server.tenant_room import TenantRoom
from api.server.validation import ValidRequest, config_sha256, options_for, require_same_config
from api.server.view import BuildView, state_of_description
from api.server.warm_hosts import WarmHosts
from workflows.build_template import BuildTemplate

CREATE_ATTEMPTS = 3
MAX_BASES = 100  # templates on templates: more than that go round in a circle

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class StartedBuild:
    """The build that answers a create request. `run_id` is empty when Temporal has forgotten it."""

    build_id: str
    workflow_id: str
    run_id: str


class BuildStarter:
    """Starts builds, once for each request however often that is sent."""

    def __init__(
        self,
        client: Client,
        bucket: TemplateBucket,
        settings: Settings,
        *,
        finder: BuildFinder,
        ender: BuildEnder,
        room: TenantRoom,
        naming: TemplateNaming,
        warm: WarmHosts,
    ) -> None:
        self._client = client
        self._settings = settings
        self._files = CopiedFiles(bucket, settings)
        self._finder = finder
        self._history = BuildHistory(client)
        self._ender = ender
        self._room = room
        self._naming = naming
        self._warm = warm

    async def create(self, valid: ValidRequest) -> StartedBuild:
        """Start a build, or find the one that this request has started before.

        Raises ApiError ALREADY_EXISTS when the build id has another config or is another tenant's,
        FAILED_PRECONDITION while the earlier build is being cancelled or the base is not published
        yet, NOT_FOUND when there is no such base or files of a COPY, INVALID_ARGUMENT when these
        are more than a host takes, PERMISSION_DENIED when the caller may not use the image or its
        tenant not the network, RESOURCE_EXHAUSTED when its tenant has no room for it.
        """
        source = valid.config.source
        if isinstance(source, FromImage):
            require_image(source.reference)
        if valid.cache_scope:
            # Whatever the client calls them, these bytes are what it asks for.
            valid = replace(valid, config=await self._files.found(valid.config, valid.cache_scope))
        for _ in range(CREATE_ATTEMPTS):
            existing = await self._existing(valid)
            if isinstance(existing, StartedBuild):
                return existing
            if isinstance(source, FromTemplate):
                await self._require_base(source.build_id, valid.config.tenant)
            await self._files.found(valid.config)
            network = self._room.network_of(valid.config, self._settings.default_network)
            terms = await self._room.require(valid.config)
            await self._finder.claim_id(valid.config.build_id, valid.config.tenant)
            build = BuildInput(
                config=valid.config,
                options=valid.options,
                terms=terms,
                fairness_weight=self._room.weight_of(valid.config.tenant),
                network=network,
                warm_host=await self._warm.find(valid.config),
            )
            with contextlib.suppress(WorkflowAlreadyStartedError):  # another call was quicker
                return await self._start(build, existing)
        raise _busy(valid.config.build_id)

    async def retry(self, build_id: str, template_id: str = "") -> StartedBuild:
        """Start a failed build again, with what it has finished.

        Its limits are the settings' of now, but for those that its request asked for.

        Raises ApiError FAILED_PRECONDITION when it has not failed, or when its registry's login is
        not known any more, PERMISSION_DENIED when the caller may not use its image or its tenant
        its network any more, RESOURCE_EXHAUSTED when its tenant has no room for it.
        """
        view = await self._finder.view(build_id, template_id)
        if view.state is not BuildState.FAILED:
            raise _not_failed(view)
        config = await self._config_of(view)
        require_image(await self._image_of(config.source))
        again = BuildInput(
            config=config,
            options=options_for(config, self._settings),
            done=await self._done_of(view),
            terms=await self._room.require(config),
            fairness_weight=self._room.weight_of(config.tenant),
            network=self._room.network_of(config, self._settings.default_network),
        )
        try:
            return await self._start(again)
        except WorkflowAlreadyStartedError:
            raise _busy(build_id) from None

    async def _config_of(self, view: BuildView) -> TemplateConfig:
        """Return what was asked for, with the registry's login: no archive has that."""
        started = await self._history.started_with(view)
        if started is not None:
            return started.config
        if view.lacks_login:
            raise _login_forgotten(view)
        if view.config is None:
            raise _no_worker()
        return view.config

    async def _done_of(self, view: BuildView) -> BuildCheckpoints:
        if view.done is not None:
            return view.done
        status = await self._history.final_status(view)
        if status is None:
            raise _no_worker()
        return status.done

    async def _existing(self, valid: ValidRequest) -> StartedBuild | WorkflowIDReusePolicy:
        """Return the build that answers the request; when one is to be started, after what."""
        build_id = valid.config.build_id
        await self._finder.require_id(build_id, valid.config.tenant)
        described = await self._finder.describe(build_id)
        if described is None:
            # Another call may start it meanwhile, with another config, and it may be over by then.
            return await self._existing_in_bucket(valid) or WorkflowIDReusePolicy.REJECT_DUPLICATE
        state = state_of_description(described)
        if state is BuildState.CANCELLING:
            raise _being_cancelled(build_id)
        if state is BuildState.CANCELLED:
            return WorkflowIDReusePolicy.ALLOW_DUPLICATE_FAILED_ONLY
        if await self._finder.was_deleted(build_id, described):
            await self._ender.finish_delete(build_id)
            return WorkflowIDReusePolicy.ALLOW_DUPLICATE
        require_same_config(valid.config, await described.memo_value(CONFIG_SHA256_MEMO, ""))
        return StartedBuild(build_id, described.id, described.run_id)

    async def _existing_in_bucket(self, valid: ValidRequest) -> StartedBuild | None:
        view = await self._finder.forgotten(valid.config.build_id)
        if view is None or view.config is None or view.state is BuildState.CANCELLED:
            return None
        require_same_config(valid.config, config_sha256(view.config))
        return StartedBuild(view.build_id, view.workflow_id, "")

    async def _require_base(self, base_id: str, tenant: str) -> None:
        """Let a base be a template that is published, of the same tenant, and of an image that the
        caller may use."""
        base = await self._finder.template(base_id)
        if base is None or base.config.tenant != tenant:
            raise _no_base(base_id, await self._finder.find(base_id))
        require_image(await self._image_of(base.config.source))

    async def _image_of(self, source: Source) -> str | None:
        """Return the image, or that under templates that stand on templates; None when one has
        gone."""
        for _ in range(MAX_BASES):
            if isinstance(source, FromImage):
                return source.reference
            base = await self._finder.template(source.build_id)
            if base is None:
                return None
            source = base.config.source
        return None

    async def _start(
        self,
        build: BuildInput,
        after: WorkflowIDReusePolicy = WorkflowIDReusePolicy.ALLOW_DUPLICATE,
    ) -> StartedBuild:
        config, image = build.config, build.config.source.described
        await self._naming.await_build(config)
        handle = await self._client.start_workflow(
            BuildTemplate.run,
            build,
            id=build_workflow_id(config.build_id),
            task_queue=WORKFLOW_TASK_QUEUE,
            # Not USE_EXISTING: that would take a build of another config for the same.
            id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
            id_reuse_policy=after,
            memo={
                CONFIG_SHA256_MEMO: config_sha256(config),
                IMAGE_MEMO: image,
                SIZE_MEMO: [config.vcpu_count, config.memory_mb, config.disk_size_mb],
                TENANT_MEMO: config.tenant,
            },
            search_attributes=TypedSearchAttributes(
                [
                    SearchAttributePair(TEMPLATE_ID, config.template_id),
                    SearchAttributePair(BUILD_ID, config.build_id),
                    SearchAttributePair(IMAGE, image),
                    SearchAttributePair(BUILD_STATE, BuildState.BUILDING),
                    SearchAttributePair(TENANT, config.tenant),
                ]
            ),
            static_summary=f"{config.template_id} · {image}",
            rpc_timeout=RPC_LIMIT,
        )
        _log.info(
            "build started",
            build_id=config.build_id,
            template_id=config.template_id,
            tenant=config.tenant,
            again=build.done is not None,
        )
        return StartedBuild(config.build_id, handle.id, handle.first_execution_run_id or "")


def _no_base(base_id: str, view: BuildView | None) -> ApiError:
    if view is not None and not view.is_closed:
        return failed_precondition(
            "BASE_NOT_READY",
            f"template {base_id} is still being built",
            f"Wait until it is completed: template-manager status {base_id} --watch",
            retry_after_seconds=RETRY_SECONDS,
        )
    return ApiError(
        grpc.StatusCode.NOT_FOUND,
        "BASE_NOT_FOUND",
        f"there is no template {base_id} to build on",
        hint=TemplateNotFoundError.hint,
        violations=[Violation("template.from_template.build_id", "must be a completed build's")],
    )


def _not_failed(view: BuildView) -> ApiError:
    hints = {
        BuildState.COMPLETED: "Use the template, or build another one under a new build id.",
        BuildState.CANCELLED: "Create it again (template-manager build --build-id …).",
    }
    return failed_precondition(
        "BUILD_NOT_FAILED",
        f"build {view.build_id} is {view.state}: only a failed build can be retried",
        hints.get(view.state, "Wait until it has ended; cancel it if it hangs."),
    )


def _no_worker() -> ApiError:
    return temporal_unavailable("no worker answers for this build")


def _login_forgotten(view: BuildView) -> ApiError:
    return failed_precondition(
        "REGISTRY_LOGIN_FORGOTTEN",
        f"build {view.build_id} used a registry login, or secret variables, which Temporal has "
        "forgotten with the build",
        "Create it again under a new build id, with the registry's credentials (template-manager "
        "build --registry-user …) and the secret variables.",
    )


def _being_cancelled(build_id: str) -> ApiError:
    return failed_precondition(
        "BUILD_BEING_CANCELLED",
        f"build {build_id} is being cancelled",
        "Create it again when the cancel has finished.",
        retry_after_seconds=RETRY_SECONDS,
    )


def _busy(build_id: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.ABORTED,
        "BUILD_CHANGES",
        f"build {build_id} is being started and ended by other calls",
        hint="Send the request again.",
        retry_after_seconds=RETRY_SECONDS,
    )

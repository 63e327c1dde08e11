"""Builds and deletes started straight in Temporal, small and with short time limits."""

from __future__ import annotations

import uuid
from typing import Any

from temporalio.client import Client, WithStartWorkflowOperation, WorkflowHandle
from temporalio.common import WorkflowIDConflictPolicy

from activities.contract.inputs import BuildInput, DeleteTemplateInput
from activities.contract.names import WORKFLOW_TASK_QUEUE, build_workflow_id, delete_workflow_id
from activities.contract.requests import BuildOptions, TemplateConfig
from activities.contract.results import DeletedTemplate
from activities.contract.sources import FromImage
from activities.contract.status import BuildResult
from workflows.build_template import BuildTemplate
from workflows.delete_template import DeleteTemplate

Handle = WorkflowHandle[BuildTemplate, BuildResult]

OPTIONS = BuildOptions(
    heartbeat_timeout_seconds=3,
    lease_grace_seconds=4,
    lease_wait_seconds=20,
    teardown_timeout_seconds=10,
    retry_attempts=2,
    retry_initial_seconds=0.1,
    retry_maximum_seconds=0.2,
)


def config(**changes: Any) -> TemplateConfig:
    values: dict[str, Any] = {
        "template_id": "web",
        "build_id": str(uuid.uuid4()),
        "source": FromImage(reference="127.0.0.1:5000/web:1"),
        "memory_mb": 512,
        "vcpu_count": 1,
        "disk_size_mb": 512,
        "kernel_version": "6.1",
        "firecracker_version": "v1.13.1",
        "start_command": "serve",
        "ready_command": "check",
    }
    return TemplateConfig(**(values | changes))


async def start(client: Client, build: BuildInput | None = None) -> Handle:
    build = build or BuildInput(config=config(), options=OPTIONS)
    return await client.start_workflow(
        BuildTemplate.run,
        build,
        id=build_workflow_id(build.config.build_id),
        task_queue=WORKFLOW_TASK_QUEUE,
    )


def delete_of(host: str, **changes: object) -> DeleteTemplateInput:
    values: dict[str, object] = {
        "template_id": "web",
        "build_id": str(uuid.uuid4()),
        "host": host,
        "late_arrival_seconds": 1,
    }
    return DeleteTemplateInput.model_validate(values | changes)


async def delete(client: Client, what: DeleteTemplateInput) -> DeletedTemplate:
    operation = WithStartWorkflowOperation(
        DeleteTemplate.run,
        what,
        id=delete_workflow_id(what.build_id),
        task_queue=WORKFLOW_TASK_QUEUE,
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
    )
    return await client.execute_update_with_start_workflow(
        DeleteTemplate.wait_deleted, start_workflow_operation=operation
    )

"""A running API over real parts, for tests: only a KVM host's activities are replaced."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc
from devstack.stack import Stack
from grpc_health.v1 import health_pb2, health_pb2_grpc
from temporalio.client import Client
from temporalio.contrib.workflow_streams import WorkflowStreamClient
from temporalio.service import RPCError

from activities.contract.names import LOG_TOPIC, build_workflow_id, delete_workflow_id
from activities.contract.status import LogEntry, LogLevel
from activities.process.clock import utc_now
from activities.process.settings import Settings
from api.client.client import TemplateClient
from api.pb import template_manager_pb2 as pb
from api.server.server import ApiServer
from tests.support.recording_host import Journal, RecordingHost
from tests.support.workflow_runs import OPTIONS

SECRET_KEYS = "k1:" + "A" * 43 + "="


def template_of(**changes: Any) -> pb.TemplateConfig:
    values: dict[str, Any] = {
        "template_id": "web",
        "build_id": str(uuid.uuid4()),
        "from_image": "127.0.0.1:5000/web:1",
        "memory_mb": 512,
        "vcpu_count": 1,
        "disk_size_mb": 512,
        "start_command": "serve",
        "ready_command": "check",
    }
    return pb.TemplateConfig(**(values | changes))


@dataclass
class Api:
    """A running API, its client, and the host that its builds run on."""

    server: ApiServer
    client: TemplateClient
    temporal: Client
    host: RecordingHost
    settings: Settings
    ids: list[str] = field(default_factory=list)

    @property
    def journal(self) -> Journal:
        return self.host.journal

    def template(self, **changes: Any) -> pb.TemplateConfig:
        template = template_of(**changes)
        self.ids.append(template.build_id)
        return template

    async def completed(self, **changes: Any) -> str:
        """Build a template and wait for it."""
        created = await self.client.create(self.template(**changes))
        await self.ended(created.build_id)
        return created.build_id

    async def running_until(self, activity: str, **changes: Any) -> str:
        """Start a build that hangs in an activity."""
        started = self.journal.hang(activity)
        created = await self.client.create(self.template(**changes))
        await asyncio.wait_for(started.wait(), 20)
        return created.build_id

    async def end_everything(self) -> None:
        """Leave no build running: the recording host has room for one."""
        self.journal.hanging.clear()
        for build_id in self.ids:
            for workflow_id in (build_workflow_id(build_id), delete_workflow_id(build_id)):
                with contextlib.suppress(RPCError):
                    await self.temporal.get_workflow_handle(workflow_id).terminate()

    async def ended(self, build_id: str) -> pb.TemplateBuildStatusResponse:
        """Wait until a build has closed."""
        with contextlib.suppress(Exception):
            handle = self.temporal.get_workflow_handle(build_workflow_id(build_id))
            await asyncio.wait_for(handle.result(), 20)
        return await self.client.status(build_id)


def forget(journal: Journal) -> None:
    """Make a journal as good as new; the activities that write to it run on."""
    journal.published = None
    for record in (journal.calls, journal.arguments, journal.failures, journal.hanging):
        record.clear()


def settings_for(storage: Stack, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "api_address": "127.0.0.1:0",
        "bucket": storage.environment.bucket,
        "build": OPTIONS,
        "secret_keys": SECRET_KEYS,
        "drain_seconds": 3,
    }
    return Settings(**(values | changes))


async def health_of(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="TemplateService"))
        return int(answer.status)


async def serving(address: str, expected: bool, limit_seconds: float = 15) -> None:
    """Wait until the health service says SERVING, or no longer does."""
    wanted = health_pb2.HealthCheckResponse.SERVING
    async with asyncio.timeout(limit_seconds):
        while (await health_of(address) == wanted) is not expected:
            await asyncio.sleep(0.1)


async def messages(api: Api, build_id: str, **options: Any) -> list[str]:
    return [line.entry.message async for line in api.client.logs(build_id, **options)]


async def publish(temporal: Client, build_id: str, *texts: str, level: LogLevel) -> None:
    """Publish log lines as a step does."""
    stream = WorkflowStreamClient.create(
        temporal, build_workflow_id(build_id), batch_interval=timedelta(milliseconds=50)
    )
    async with stream:
        topic = stream.topic(LOG_TOPIC, type=LogEntry)
        for text in texts:
            topic.publish(LogEntry(timestamp=utc_now(), level=level, message=text))

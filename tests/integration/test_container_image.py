"""The container image of the API and the workflow worker: built, and at work."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import docker
import images
import psutil
import pytest
from devstack.environment import REPOSITORY
from devstack.ports import free_port
from devstack.stack import Stack
from docker.models.containers import Container

from api.client.client import TemplateClient
from tests.support.recording_host import Journal, RecordingHost, running_host
from tests.support.running_api import SECRET_KEYS, serving, template_of
from tests.support.temporal_server import start_temporal

pytestmark = [pytest.mark.counts_nothing, pytest.mark.comes_first]

TAG = "template-manager:test"


@pytest.fixture(scope="module")
def client() -> Iterator[docker.DockerClient]:
    with Stack(only=("docker",)), contextlib.closing(docker.from_env(timeout=600)) as connected:
        yield connected


@pytest.fixture(scope="module")
def image(client: docker.DockerClient) -> Iterator[str]:
    """Built as the Dockerfile says, on a base that is made here."""
    base = images.make("python", lambda _: None)
    events = client.api.build(
        path=str(REPOSITORY),
        tag=TAG,
        buildargs={"BASE_IMAGE": base},
        network_mode="host",
        rm=True,
        decode=True,
    )
    told = [event.get("error") or event.get("stream", "") for event in events]
    assert "Successfully tagged" in "".join(told), "".join(told)
    yield TAG
    client.images.remove(TAG, noprune=True)


@contextlib.contextmanager
def container(
    client: docker.DockerClient, image: str, *command: str, **environment: str
) -> Iterator[Container]:
    """Run one as a cautious operator does: without root, capabilities or a writable disk."""
    running = client.containers.run(
        image,
        list(command),
        detach=True,
        network_mode="host",
        read_only=True,
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        environment=environment,
    )
    try:
        yield running
    finally:
        print(running.logs().decode())
        running.remove(force=True)


def run(client: docker.DockerClient, image: str, *command: str) -> tuple[int, str]:
    """Run a command to its end; its exit code and what it said."""
    with container(client, image, *command) as running:
        code = running.wait()["StatusCode"]
        return code, running.logs().decode()


def healthy(running: Container, limit_seconds: float = 60) -> None:
    """Wait for what the image's own HEALTHCHECK says."""
    deadline = time.monotonic() + limit_seconds
    while running.attrs["State"].get("Health", {}).get("Status") != "healthy":
        assert running.status != "exited", running.logs().decode()
        assert time.monotonic() < deadline, running.attrs["State"]
        time.sleep(0.3)
        running.reload()


async def test_api_and_worker_run_in_containers(
    client: docker.DockerClient, image: str, storage: Stack
) -> None:
    async with await start_temporal() as temporal:
        address = f"127.0.0.1:{free_port()}"
        environment = {
            "TEMPORAL_ADDRESS": temporal.client.service_client.config.target_host,
            "STORAGE_EMULATOR_HOST": storage.variables["STORAGE_EMULATOR_HOST"],
            "TEMPLATE_MANAGER_BUCKET": storage.environment.bucket,
            "TEMPLATE_MANAGER_SECRET_KEYS": SECRET_KEYS,
        }
        health = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        with (
            container(
                client,
                image,
                "api",
                "--listen",
                address,
                TEMPLATE_MANAGER_HEALTH_ADDRESS=health[0],
                **environment,
            ) as api,
            container(
                client, image, "worker", TEMPLATE_MANAGER_HEALTH_ADDRESS=health[1], **environment
            ) as worker,
        ):
            for running in (api, worker):
                await asyncio.to_thread(healthy, running)
                assert psutil.Process(running.attrs["State"]["Pid"]).uids().real == 10001
            await serving(address, True)
            journal = Journal()
            async with (
                running_host(temporal.client, RecordingHost("recording-host", journal)),
                TemplateClient(address) as caller,
            ):
                build_id = (await caller.create(template_of())).build_id
                lines = [line.entry.message async for line in caller.logs(build_id, follow=True)]
                assert (await caller.status(build_id)).state == "completed", lines
            assert "publish_template" in journal.calls
            worker.stop(timeout=30)
            worker.reload()
            assert worker.attrs["State"]["ExitCode"] == 0  # SIGTERM drains it


def test_it_listens_for_others_only_with_tls(client: docker.DockerClient, image: str) -> None:
    code, said = run(client, image, "api", "--listen", "0.0.0.0:5008")
    assert code == 2
    assert "Give --tls-cert and --tls-key" in said.replace("\n", " ")


def test_without_a_command_it_tells_what_there_is(client: docker.DockerClient, image: str) -> None:
    code, said = run(client, image)
    assert code == 0
    assert "worker" in said

"""`template-manager doctor`, on this machine as it is and with everything missing."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from devstack.environment import environment
from devstack.stack import Stack
from google.protobuf.message import Message
from temporalio.api.taskqueue.v1 import TaskQueuePartitionMetadata
from temporalio.api.workflowservice.v1 import (
    GetSystemInfoResponse,
    ListTaskQueuePartitionsResponse,
)
from temporalio.client import Client

from activities.host.doctor import check_fair_share
from tests.support.command_line import cli

pytestmark = pytest.mark.counts_host


def findings(out: str) -> dict[str, dict[str, str]]:
    return {finding["what"]: finding for finding in json.loads(out)["findings"]}


async def test_a_machine_that_is_ready(storage: Stack, temporal: Client) -> None:
    stack = environment()
    env = {
        **storage.variables,
        "TEMPORAL_ADDRESS": str(temporal.service_client.config.target_host),
        "TEMPLATE_MANAGER_KERNELS_DIR": str(stack.kernels),
        "TEMPLATE_MANAGER_DEFAULT_KERNEL_VERSION": stack.kernel_version or "",
        "TEMPLATE_MANAGER_FIRECRACKER_DIR": str(stack.firecracker.parent.parent),
    }
    ended = await cli("doctor", "--json", env=env)
    assert ended.code == 0, ended.out
    assert {finding["state"] for finding in findings(ended.out).values()} <= {"ok", "warning"}
    guest = findings(ended.out)["guest"]
    assert guest["state"] == "ok"
    assert "the kernel boots: its first line came after" in guest["told"]
    # Of the stand-in.
    assert findings(ended.out)["jailer"]["told"] == "Firecracker runs without its jailer"
    assert findings(ended.out)["jail"]["told"] == "not used"
    seccomp = findings(ended.out)["seccomp"]
    assert seccomp["state"] == "warning"
    assert "Firecracker makes any system call" in seccomp["told"]


@pytest.mark.parametrize(
    ("vmm", "told", "remedy"),
    [
        ("echo no KVM here >&2; exit 3", "exit code 3: no KVM here", "Read Firecracker's message"),
        ("exit 0", "exit code 0", "Read Firecracker's message"),
        # As the jailer says it, which copies Firecracker.
        ("echo No space left on device >&2; exit 1", "exit code 1: No space left", "Free space"),
    ],
)
async def test_a_guest_that_does_not_boot_is_told(
    vmm: str, told: str, remedy: str, tmp_path: Path
) -> None:
    """That /dev/kvm opens is not enough."""
    kernel = tmp_path / "kernels" / "k" / "vmlinux.bin"
    firecracker = tmp_path / "vmms" / "v" / "firecracker"
    for path in (kernel, firecracker):
        path.parent.mkdir(parents=True)
    kernel.write_bytes(b"\x7fELF")
    said = "case $1 in --version) echo Firecracker v1.0.0;; *) " + vmm + ";; esac"
    firecracker.write_text(f"#!/bin/sh\n{said}\n")
    firecracker.chmod(0o755)
    env = {
        "TEMPLATE_MANAGER_KERNELS_DIR": str(tmp_path / "kernels"),
        "TEMPLATE_MANAGER_DEFAULT_KERNEL_VERSION": "k",
        "TEMPLATE_MANAGER_FIRECRACKER_DIR": str(tmp_path / "vmms"),
        "TEMPLATE_MANAGER_DEFAULT_FIRECRACKER_VERSION": "v",
    }
    guest = findings((await cli("doctor", "--json", env=env)).out)["guest"]
    assert guest["state"] == "wrong"
    assert f"the VMM ended at once: {told}" in guest["told"]
    assert guest["remedy"].startswith(remedy)


async def test_what_is_missing_is_told_with_what_mends_it() -> None:
    env = {
        "DOCKER_HOST": "unix:///no/docker.sock",
        "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9",
        "TEMPORAL_ADDRESS": "127.0.0.1:9",
        "TEMPLATE_MANAGER_BUSYBOX_PATH": "/no/busybox",
        "TEMPLATE_MANAGER_DATA_DIR": "/proc/no/data",
        "TEMPLATE_MANAGER_FIRECRACKER_DIR": "/no/firecracker",
        "TEMPLATE_MANAGER_KERNELS_DIR": "/no/kernels",
        "TEMPLATE_MANAGER_SECRET_KEYS": "",
    }
    ended = await cli("doctor", "--json", env=env)
    assert ended.code == 1
    found = findings(ended.out)
    wrong = {what for what, finding in found.items() if finding["state"] == "wrong"}
    assert wrong == {
        "Docker",
        "busybox",
        "guest kernel",
        "Firecracker",
        "disk",
        "bucket",
        "Temporal",
    }
    assert found["secret keys"]["state"] == "warning"
    assert all(found[what]["remedy"] for what in [*wrong, "secret keys"])
    assert "apt-get install busybox-static" in found["busybox"]["remedy"]


@pytest.mark.parametrize(
    ("version", "partitions", "state"),
    [
        ("1.28.3", 1, "warning"),
        ("1.29.0", 1, "ok"),
        ("1.32.0", 1, "ok"),
        ("2.0.0", 1, "ok"),
        ("", 1, "warning"),
        ("1.32.0", 4, "warning"),
        ("1.32.0", None, "ok"),
    ],
)
async def test_a_server_that_cannot_serve_tenants_in_turns_is_told(
    version: str, partitions: int | None, state: str
) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((SomeTemporal(version, partitions),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        client = await Client.connect(f"127.0.0.1:{port}")
        finding = await check_fair_share(client)
    finally:
        await server.stop(0)
    assert finding.state == state
    assert ("has 4 partitions" in finding.told) is (partitions == 4)


class SomeTemporal(grpc.GenericRpcHandler):
    """Answers as a server of some version, with a queue of so many parts, or that tells of none."""

    def __init__(self, version: str, partitions: int | None) -> None:
        parts = [TaskQueuePartitionMetadata()] * (partitions or 0)
        self._answers: dict[str, Message] = {
            "GetSystemInfo": GetSystemInfoResponse(server_version=version)
        }
        if partitions is not None:
            self._answers["ListTaskQueuePartitions"] = ListTaskQueuePartitionsResponse(
                activity_task_queue_partitions=parts
            )

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        told = self._answers.get(str(details.method).rpartition("/")[2])
        if told is None:
            return None

        async def answer(request: bytes, context: object) -> bytes:
            return told.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(answer)

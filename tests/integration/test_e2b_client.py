"""A control plane that was written for E2B's service drives ours unchanged."""

from __future__ import annotations

import asyncio
import json
import struct
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from activities.contract.errors import ImageStepError
from tests.support.running_api import Api

pytestmark = pytest.mark.counts_nothing

CLIENT = Path(__file__).parents[1] / "support" / "e2b_client.py"


async def seen_by_a_client(api: Api, when: str, build_id: str) -> dict[str, Any]:
    """Let a control plane of that time build a template; return what it has seen."""
    api.ids.append(build_id)
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        str(CLIENT),
        when,
        api.server.address,
        "e2b-template",
        build_id,
        stdout=asyncio.subprocess.PIPE,
    )
    answer, _ = await asyncio.wait_for(client.communicate(), 120)
    assert client.returncode == 0
    seen: dict[str, Any] = json.loads(answer)
    return seen


FOUND = {"roles": ["TemplateBuilder"], "status": 0, "named": True, "statuses": [1, 0]}


async def test_a_client_of_april_2025_creates_asks_and_deletes(api: Api) -> None:
    build_id = str(uuid.uuid4())
    assert await seen_by_a_client(api, "2025-04", build_id) == {
        "found": FOUND,
        "health": 0,
        "status": "Completed",
        "rootfs_size": 1,
        "after_delete": "NOT_FOUND",
    }
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert pull.image == f"{api.settings.registry}/e2b-template:{build_id}"


async def test_a_client_of_august_2026_creates_asks_and_deletes(api: Api) -> None:
    build_id = str(uuid.uuid4())
    assert await seen_by_a_client(api, "2026-08", build_id) == {
        "found": FOUND,
        "health": 0,
        "present": [False, True],
        "status": "Completed",
        "reason": ["", ""],
        "rootfs_size": 1,
        "made_for": ["vmlinux-6.1", "v1.13.1"],
        "log": {
            "lines": True,
            "steps": ["base", "finalize"],
            "backward": True,
            "warnings": True,
            "late": True,
            "nothing": 0,
        },
        "after_delete": "NOT_FOUND",
    }
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert pull.image == f"{api.settings.registry}/e2b-template:{build_id}"


@pytest.mark.parametrize(("when", "fails"), [("2025-04", "pull_image"), ("2026-08", "run_steps")])
async def test_a_build_that_fails_is_told_with_the_number_of_its_step(
    api: Api, when: str, fails: str
) -> None:
    api.journal.fail(fails, ImageStepError("it ended with 1", step_number=2))
    seen = await seen_by_a_client(api, when, str(uuid.uuid4()))
    assert (seen["status"], seen["after_delete"]) == ("Failed", "NOT_FOUND")
    assert seen.get("reason", ["it ended with 1", "2"]) == ["it ended with 1", "2"]


def frame(kind: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """Return a frame of HTTP/2 for the connection as a whole (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, 0) + payload


@pytest.mark.whole
async def test_a_connection_that_is_kept_alive_for_minutes_is_kept(api: Api) -> None:
    """E2B's control plane pings every 10 s while it asks nothing, for as long as it runs."""
    settings, ping, goaway, acknowledged = 4, 6, 7, 1
    host, _, port = api.server.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings))
    answered = 0
    for _ in range(13):
        await asyncio.sleep(10)
        writer.write(frame(ping, b"as E2B's"))
        while True:
            head = await asyncio.wait_for(reader.readexactly(9), 60)
            length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            payload = await reader.readexactly(length)
            assert kind != goaway, payload
            if kind == settings and not flags:
                writer.write(frame(settings, flags=acknowledged))
            if kind == ping and flags & acknowledged:
                answered += 1
                break
            if kind == ping:  # its own
                writer.write(frame(ping, payload, acknowledged))
    assert answered == 13
    writer.close()

"""A control plane that was written for E2B's service drives ours unchanged."""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from pathlib import Path

import pytest

from tests.support.running_api import Api

pytestmark = pytest.mark.counts_nothing

CLIENT = Path(__file__).parents[1] / "support" / "e2b_client.py"


async def test_an_e2b_client_creates_asks_and_deletes(api: Api) -> None:
    build_id = str(uuid.uuid4())
    api.ids.append(build_id)
    client = await asyncio.create_subprocess_exec(
        sys.executable,
        str(CLIENT),
        api.server.address,
        "e2b-template",
        build_id,
        stdout=asyncio.subprocess.PIPE,
    )
    answer, _ = await asyncio.wait_for(client.communicate(), 40)
    assert client.returncode == 0
    assert json.loads(answer) == {
        "found": {
            "roles": ["TemplateBuilder"],
            "status": 0,
            "named": True,
            "statuses": [1, 0],
        },
        "health": 0,
        "status": "Completed",
        "rootfs_size": 1,
        "after_delete": "NOT_FOUND",
    }
    [pull] = [argument for name, argument in api.journal.arguments if name == "pull_image"]
    assert pull.image == f"{api.settings.registry}/e2b-template:{build_id}"

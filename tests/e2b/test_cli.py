"""E2B's own command line, `@e2b/cli`, lists and deletes templates of this service."""

from __future__ import annotations

import json
import shutil
import subprocess
import uuid
from pathlib import Path

import pytest
from devstack.environment import REPOSITORY

from tests.support.e2b_sdk import VERSIONS, Sdk, sdk_of
from tests.support.real_stack import Product

pytestmark = [pytest.mark.counts_host, pytest.mark.whole]

PROGRAM = REPOSITORY / ".e2b" / "cli" / "node_modules" / ".bin" / "e2b"


def e2b(sdk: Sdk, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with the two variables, and a home in which nobody has logged in."""
    node = shutil.which("node")
    if node is None or not PROGRAM.exists():
        pytest.fail("E2B's command line is not here: `make test-e2b` installs it where npm is")
    given = {"E2B_API_URL": sdk.url, "E2B_API_KEY": sdk.key, "HOME": str(home)}
    return subprocess.run(
        [node, PROGRAM, *arguments],
        env=given,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


async def test_templates_are_listed_and_deleted(
    product: Product, image: str, tmp_path: Path
) -> None:
    name, sdk = f"t-{uuid.uuid4().hex[:8]}", sdk_of(product, VERSIONS[-1])
    await sdk.run(
        tmp_path,
        f"""
        template = Template().from_image("{image}").set_user("root")
        Template.build(template, "{name}", **SMALL)
        """,
    )
    listed = e2b(sdk, tmp_path, "template", "list", "--format", "json")
    assert listed.returncode == 0, listed.stderr
    found = [each for each in json.loads(listed.stdout) if name in each["names"]]
    assert [each["buildStatus"] for each in found] == ["ready"]
    shown = e2b(sdk, tmp_path, "template", "list")
    assert name in shown.stdout
    deleted = e2b(sdk, tmp_path, "template", "delete", "--yes", found[0]["templateID"])
    assert deleted.returncode == 0, deleted.stderr
    listed = e2b(sdk, tmp_path, "template", "list", "--format", "json")
    assert name not in listed.stdout

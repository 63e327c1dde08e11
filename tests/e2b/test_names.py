"""A template that E2B's SDK has named, in every command that takes a build's id."""

from __future__ import annotations

import json
import signal
import uuid
from pathlib import Path

import pytest

from tests.support.e2b_sdk import VERSIONS, sdk_of
from tests.support.real_stack import Product, nothing_left

pytestmark = [pytest.mark.counts_host, pytest.mark.whole]


async def test_every_command_takes_the_name_and_the_tag(
    product: Product, image: str, tmp_path: Path
) -> None:
    name = f"t-{uuid.uuid4().hex[:8]}"
    written = f"{name}:stable"
    with nothing_left(product):
        [built] = await sdk_of(product, VERSIONS[-1]).run(
            tmp_path,
            f"""
            template = Template().from_image("{image}").set_user("root")
            tell(build=Template.build(template, "{name}", tags=["stable"], **SMALL).build_id)
            """,
        )
        build_id = built["build"]
        told = {
            ("status", written, "--json"): build_id,
            ("status", written): build_id,
            ("logs", written): "build is completed",
            ("retry", written, "--json"): build_id,  # it is refused, by the id
            ("replay", written, "--json"): '"fits": true',
            ("tag", written, f"{name}:live"): build_id,
            ("pull", written, str(tmp_path / "pulled"), "--json"): build_id,
        }
        for command, answer in told.items():
            ended = product.cli(*command)
            assert answer in ended.out + ended.err, (command, ended)
            assert (ended.code == 0) == (command[0] != "retry"), (command, ended)
        _require_it_runs(product, written)
        above = ("build", "--from-template", written, "--memory", "256", "--follow", "--json")
        ended = product.cli(*above, seconds=900)
        assert (ended.code, ended.json["state"]) == (0, "completed"), ended
        assert product.cli("delete", ended.json["build_id"]).code == 0
        deleted = product.cli("delete", written, "--json")
        assert deleted.json["build_id"] == build_id
        assert set(deleted.json["names"]) == {name, written, f"{name}:live"}
        assert product.cli("cancel", written).code == 2  # there is none any more


def _require_it_runs(product: Product, written: str) -> None:
    with product.started("run", written, "--json") as process:
        assert process.stdout is not None
        told = json.loads("".join(process.stdout.readline() for _ in range(5)))
        assert told["resume_ms"] > 0
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0

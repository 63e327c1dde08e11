"""Cancel, delete, retry and reset at every step; bad days of disks and storage."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from activities.contract.names import build_workflow_id
from tests.support.chaos import STEPS, ChaosProduct
from tests.support.real_stack import nothing_left
from tests.support.resetting import reset_before
from tests.support.small_disk import small_disk

pytestmark = pytest.mark.timeout(400)
FULL = pytest.mark.full
STEPS_TO_STOP = [
    pytest.param(step, marks=FULL) for step in STEPS if step not in ("release", "publish")
]
TRIES = 3


@pytest.mark.parametrize("step", STEPS_TO_STOP)
def test_cancel(product: ChaosProduct, step: str) -> None:
    """It stops within seconds, all is undone, and the same id can be built again at once."""
    with nothing_left(product):
        for _ in range(TRIES):
            build_id = product.new_build_for(step)
            took: list[float] = []
            if product.hit(build_id, step, lambda: took.append(_cancel(product, build_id))):  # noqa: B023 # called before the next round
                break
        else:
            raise AssertionError(f"{step} was over each time before it could be hit")
        assert took[0] < 15
        assert product.status(build_id)["state"] == "cancelled"
        assert product.objects(f"{build_id}/") == []
        product.build(product.image, "--build-id", build_id)
        assert product.ended_somehow(build_id)["state"] == "completed"
        product.require_template(build_id)
        assert product.cli("delete", build_id).code == 0


def _cancel(product: ChaosProduct, build_id: str) -> float:
    began = time.monotonic()
    ended = product.cli("cancel", build_id)
    assert ended.code == 0, ended.err
    return time.monotonic() - began


@pytest.mark.parametrize(
    "step",
    [
        step if step == "ready" else pytest.param(step, marks=FULL)
        for step in ("rootfs", "sending", "ready", "upload")
    ],
)
def test_delete_while_it_is_built(product: ChaosProduct, step: str) -> None:
    with nothing_left(product):
        build_id = product.new_build_for(step)
        ended: list[int] = []
        hit = product.hit(
            build_id, step, lambda: ended.append(product.cli("delete", build_id).code)
        )
        assert hit
        assert ended == [0]
        assert product.cli("status", build_id).code == 2


FAULTS: dict[str, Mapping[str, Any]] = {
    "503": {"kind": "status", "operation": "upload", "count": 6},
    "429": {"kind": "status", "status": 429, "operation": "compose", "count": 3},
    "reset": {"kind": "reset", "operation": "upload", "after_bytes": 10_000, "count": 4},
    "lost answers": {"kind": "lost_response", "operation": "(upload|compose|delete)", "count": 6},
    "truncated": {"kind": "truncate", "after_bytes": 20, "count": 5},
    "wrong checksums": {"kind": "wrong_crc", "operation": "upload", "count": 2},
    "errors in bodies": {"kind": "error_body", "count": 5},
}


@pytest.mark.parametrize("fault", [pytest.param(fault, marks=FULL) for fault in FAULTS])
def test_a_bad_day_of_the_storage(product: ChaosProduct, fault: str) -> None:
    """Retried where it can help; what is published is whole."""
    with nothing_left(product):
        build_id = product.new_build("--force")
        with product.stack.faults(FAULTS[fault]):
            status = product.ended_somehow(build_id)
        assert status["state"] == "completed", status
        product.require_template(build_id)
        assert product.cli("delete", build_id).code == 0


@FULL
def test_a_bucket_that_refuses_is_a_failure_that_a_retry_continues(product: ChaosProduct) -> None:
    with nothing_left(product):
        refused = {"kind": "status", "status": 403, "operation": "compose", "count": None}
        with product.stack.faults(refused):
            build_id = product.new_build()
            status = product.ended_somehow(build_id)
        assert status["state"] == "failed"
        assert status["reason"]["error_type"] == "StorageDeniedError"
        assert product.objects(f"{build_id}/metadata.json") == []
        reused = _retried(product, build_id)
        assert {"pull_image", "build_rootfs", "boot_and_snapshot", "verify"} <= reused
        assert product.cli("delete", build_id).code == 0


@FULL
def test_a_registry_that_is_away_is_a_failure_that_a_retry_continues(
    product: ChaosProduct,
) -> None:
    with nothing_left(product):
        product.forget_image()
        product.stack.stop("registry")
        try:
            build_id = product.new_build()
            status = product.ended_somehow(build_id)
        finally:
            product.stack.restart("registry")
        assert status["reason"]["error_type"] == "RegistryUnavailableError", status
        _retried(product, build_id)
        assert product.cli("delete", build_id).code == 0


def _retried(product: ChaosProduct, build_id: str) -> set[str]:
    """Retry a failed build to its end; returns the steps that were reused."""
    again = product.cli("retry", build_id)
    assert again.code == 0, again.err
    status = product.ended_somehow(build_id)
    assert status["state"] == "completed", status
    product.require_template(build_id)
    return {row["step"] for row in status["timeline"] if row.get("reused")}


@FULL
def test_a_disk_that_fills_in_the_middle(product: ChaosProduct, tmp_path: Path) -> None:
    """The root file system fits, its memory does not: a typed error, and a retry when it does."""
    with small_disk(tmp_path, 500) as data, product.only_host_on(data):
        (data / "ballast").write_bytes(bytes(350 << 20))
        with nothing_left(product, data):
            build_id = product.new_build()
            status = product.ended_somehow(build_id)
            assert status["state"] == "failed", status
            assert status["reason"]["error_type"] in ("HostDiskFullError", "VmmError"), status
            (data / "ballast").unlink()
            again = product.cli("retry", build_id)
            assert again.code == 0, again.err
            assert product.ended_somehow(build_id)["state"] == "completed"
            assert product.cli("delete", build_id).code == 0


@pytest.mark.parametrize(
    "step",
    [
        step if step == "verify" else pytest.param(step, marks=FULL)
        for step in ("pull", "rootfs", "sending", "start", "verify", "upload", "publish")
    ],
)
def test_reset(product: ChaosProduct, step: str) -> None:
    """Temporal's Reset, to just before a step: the result is right again."""
    with nothing_left(product):
        build_id = product.new_build_for(step)
        assert product.ended_somehow(build_id)["state"] == "completed"
        run_id = asyncio.run(_reset(product, build_id, STEPS[step]))
        assert run_id
        status = product.ended_somehow(build_id)
        assert status["state"] == "completed", status
        product.require_template(build_id)
        assert product.cli("delete", build_id).code == 0


async def _reset(product: ChaosProduct, build_id: str, activity: str) -> str:
    return await reset_before(await product.temporal(), build_workflow_id(build_id), activity)

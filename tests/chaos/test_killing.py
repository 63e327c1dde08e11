"""Whatever dies, whenever: a build completes or fails with the true cause; nothing is left."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.chaos import TRUE_CAUSES, Cell, ChaosProduct
from tests.support.real_stack import nothing_left

TRIES = 6  # at hitting a step that may be over before we see it


@pytest.mark.timeout(400)
def test_a_killed_process(product: ChaosProduct, cell: Cell, record_property: Any) -> None:
    for _ in range(TRIES):
        with nothing_left(product):
            build_id = product.new_build_for(cell.step)
            hit = product.hit(build_id, cell.step, lambda: product.kill(cell.process))
            if hit:
                product.bring_back(cell.process)
            status = product.ended_somehow(build_id)
            _require_right_end(product, cell, build_id, status)
            assert product.cli("delete", build_id).code == 0
        if hit:
            record_property("ended", _told(status))
            return
    raise AssertionError(f"{cell.step} was over each time before it could be hit")


def _require_right_end(
    product: ChaosProduct, cell: Cell, build_id: str, status: dict[str, Any]
) -> None:
    if status["state"] == "completed":
        product.require_template(build_id)
        return
    assert status["state"] == "failed", status
    assert status["reason"]["error_type"] in TRUE_CAUSES.get(cell.process, ()), status["reason"]
    retried = product.cli("retry", build_id)
    assert retried.code == 0, retried.err
    assert product.ended_somehow(build_id)["state"] == "completed"
    product.require_template(build_id)


def _told(status: dict[str, Any]) -> str:
    if status["state"] == "completed":
        return "completed"
    return f"{status['reason']['error_type']}, completed by a retry"

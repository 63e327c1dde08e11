"""Layers are deleted and swept while others rely on them, and who does it is killed meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from temporalio.service import RPCError

from activities.contract.names import delete_workflow_id
from activities.process.sweep_schedule import PREFIX
from tests.support.chaos import ChaosProduct
from tests.support.command_line import Ended
from tests.support.real_stack import nothing_left

pytestmark = [pytest.mark.timeout(900), pytest.mark.full]

TRIES = 6  # at hitting a step that may be over before we see it
SWEEPS = 3


def completed(product: ChaosProduct, build_id: str) -> str:
    status = product.ended_somehow(build_id, seconds=400)
    assert status["state"] == "completed", status
    return build_id


def delete(product: ChaosProduct, *build_ids: str) -> None:
    for build_id in build_ids:
        ended = product.cli("delete", build_id)
        assert ended.code == 0, ended.err


def hit(product: ChaosProduct, step: str, start: Callable[[], str], act: Callable[[], None]) -> str:
    """Start builds until one is hit in that step; returns which."""
    for _ in range(TRIES):
        build_id = start()
        if product.hit(build_id, step, act):
            return build_id
        delete(product, completed(product, build_id))
    raise AssertionError(f"{step} was over each time before it could be hit")


def kill_amid(product: ChaosProduct, build_id: str, deleting: Future[Ended]) -> None:
    """Kill the worker when it removes the objects of a build, or has just done so."""

    async def wait() -> None:
        handle = (await product.temporal()).get_workflow_handle(delete_workflow_id(build_id))
        while not deleting.done():
            try:
                if (await handle.describe()).raw_description.pending_activities:
                    return
            except RPCError:  # it has not begun
                pass
            await asyncio.sleep(0.01)

    asyncio.run(wait())
    product.kill("worker")
    product.bring_back("worker")


@pytest.mark.parametrize("step", ["start", "upload", "publish"])
def test_a_parent_is_deleted_while_a_child_is_built(product: ChaosProduct, step: str) -> None:
    with nothing_left(product):
        parent = completed(product, product.new_build())
        with ThreadPoolExecutor(1) as pool:  # its end waits for the delete
            child = hit(
                product,
                step,
                lambda: product.build_from("--from-template", parent),
                lambda: kill_amid(product, parent, pool.submit(product.cli, "delete", parent)),
            )
        delete(product, parent)  # whatever came of the first
        completed(product, child)
        product.require_template(child)
        delete(product, child)


def test_two_are_deleted_at_once_and_the_third_stays_whole(product: ChaosProduct) -> None:
    with nothing_left(product):
        builds = [completed(product, product.new_build()) for _ in range(3)]
        with ThreadPoolExecutor(2) as pool:
            deleting = [pool.submit(product.cli, "delete", build) for build in builds[:2]]
            kill_amid(product, builds[0], deleting[0])
        delete(product, *builds[:2])
        product.require_template(builds[2])
        delete(product, builds[2])


def test_the_bucket_is_swept_while_layers_are_uploaded(product: ChaosProduct) -> None:
    async def sweep() -> None:
        handle = (await product.temporal()).get_schedule_handle(f"{PREFIX}bucket")
        for _ in range(SWEEPS):
            await handle.trigger()
            await asyncio.sleep(0.5)

    def act() -> None:
        asyncio.run(sweep())
        product.kill("worker")
        product.bring_back("worker")

    with nothing_left(product):
        build_id = hit(product, "upload", product.new_build, act)
        completed(product, build_id)
        product.require_template(build_id)
        delete(product, build_id)

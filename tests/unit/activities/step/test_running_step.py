"""How far a step is, and how fast it goes."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from temporalio.testing import ActivityEnvironment

from activities.contract.errors import HostDiskFullError
from activities.contract.names import Step
from activities.contract.status import Progress
from activities.disk.data_dir import DataDir
from activities.process.settings import Settings
from activities.step.build_log import BuildLog
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from tests.support.held_build import hold


async def step_in(directory: Path) -> RunningStep:
    scope = hold(directory, 1).scope
    log = BuildLog(directory / "log.jsonl", Step.UPLOAD)
    return RunningStep(LeaseLedger(DataDir(directory)), scope, log, Step.UPLOAD)


async def test_speed_is_measured_from_the_beginning_of_what_is_done(tmp_path: Path) -> None:
    step = await step_in(tmp_path)
    step.progress("uploading memfile", 100, 1000, "bytes")
    began = time.monotonic()
    time.sleep(0.1)
    step.progress("uploading memfile", 300, 1000, "bytes")
    assert step.latest is not None
    assert 0 < step.latest.per_second <= 200 / 0.1
    assert step.latest.per_second >= 0.5 * 200 / (time.monotonic() - began)
    step.progress("uploading snapfile", 500, 1000, "bytes")
    assert step.latest.per_second == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
async def test_a_full_disk_is_told_as_such_wherever_it_is_met(tmp_path: Path, number: int) -> None:
    held = hold(tmp_path, 1)
    settings = Settings(data_dir=tmp_path)

    async def work() -> None:
        async with running_step(settings, held.ledger, held.scope, Step.BOOT):
            raise OSError(number, os.strerror(number), "manifest.json")

    with pytest.raises(HostDiskFullError, match=r"manifest\.json") as error:
        await ActivityEnvironment().run(work)
    assert error.value.step is Step.BOOT


async def test_another_fault_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    held = hold(tmp_path, 1)

    async def work() -> None:
        async with running_step(Settings(data_dir=tmp_path), held.ledger, held.scope, Step.BOOT):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output"):
        await ActivityEnvironment().run(work)


def test_what_an_earlier_host_tells_has_no_speed() -> None:
    old = '{"what": "uploading memfile, 35 MiB/s", "done": 1, "total": 2, "unit": "bytes"}'
    assert Progress.model_validate_json(old).per_second == 0

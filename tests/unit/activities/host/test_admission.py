from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from unittest.mock import Mock

import pytest
from temporalio.worker import SlotReserveContext

from activities.contract.errors import HostDrainingError
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.host.admission import Admission
from activities.step.ledger import LeaseLedger

CONTEXT = Mock(spec=SlotReserveContext)
"""It is not looked at."""


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    made = Admission(LeaseLedger(DataDir(tmp_path)), 2, Room((tmp_path,), 0))
    made.open = True
    return made


async def test_a_host_that_was_closed_refuses_a_build_that_was_on_its_way(
    admission: Admission,
) -> None:
    await admission.close()
    with pytest.raises(HostDrainingError):
        async with admission.room_for(str(uuid.uuid4()), is_new=True):
            pass


async def test_a_closed_host_takes_up_its_own_builds(admission: Admission) -> None:
    await admission.close()
    async with admission.room_for(str(uuid.uuid4()), is_new=False):
        pass


async def test_closing_waits_for_a_build_that_is_being_entered(admission: Admission) -> None:
    async with admission.room_for(str(uuid.uuid4()), is_new=True):
        closing = asyncio.create_task(admission.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
    await asyncio.wait_for(closing, 1)


async def test_closing_does_not_wait_for_ever(
    admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.host.admission.CLOSE_SECONDS", 0.05)
    async with admission.room_for(str(uuid.uuid4()), is_new=True):
        await asyncio.wait_for(admission.close(), 1)
    assert not admission.open


async def test_a_full_host_takes_no_new_build_and_goes_on_with_its_own(tmp_path: Path) -> None:
    full = Admission(LeaseLedger(DataDir(tmp_path)), 2, Room((tmp_path,), 1 << 60))
    full.open = True
    with pytest.raises(HostDrainingError, match=r"takes no new builds: .* MiB free"):
        async with full.room_for(str(uuid.uuid4()), is_new=True):
            pass
    async with full.room_for(str(uuid.uuid4()), is_new=False):
        pass
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(full.reserve_slot(CONTEXT), 0.5)


async def test_a_host_with_room_hands_out_its_slots(admission: Admission) -> None:
    for _ in range(2):
        await asyncio.wait_for(admission.reserve_slot(CONTEXT), 5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(admission.reserve_slot(CONTEXT), 0.5)


async def test_a_slot_that_becomes_free_is_seen_at_once(
    admission: Admission, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("activities.host.admission.POLL_SECONDS", 60)
    ledger = LeaseLedger(DataDir(tmp_path))
    held = [str(uuid.uuid4()) for _ in range(2)]
    for build_id in held:
        ledger.put(
            build_id=build_id, template_id="t", workflow_id="w", number=1, lifetime_seconds=60
        )
    waiting = asyncio.create_task(admission.reserve_slot(CONTEXT))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    ledger.remove(held[0], 1)
    admission.look_again()
    await asyncio.wait_for(waiting, 5)
    assert admission.free == 0

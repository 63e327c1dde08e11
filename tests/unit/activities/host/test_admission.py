from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from unittest.mock import Mock

import pytest
from temporalio.testing import ActivityEnvironment
from temporalio.worker import SlotReserveContext

from activities.contract.errors import HostDrainingError
from activities.contract.inputs import HoldHostInput
from activities.contract.scope import VmShape
from activities.disk.data_dir import DataDir
from activities.disk.room import Room
from activities.host.admission import Admission
from activities.host.memory import HostMemory
from activities.step.ledger import LeaseLedger

CONTEXT = Mock(spec=SlotReserveContext)
"""It is not looked at."""
MEMORY = HostMemory(total_mb=4096, overhead_mb=256, steps_mb=1024)


@pytest.fixture
def admission(tmp_path: Path) -> Admission:
    made = Admission(LeaseLedger(DataDir(tmp_path)), 2, Room((tmp_path,), 0))
    made.open = True
    return made


def asking(memory_mb: int, *, runs_steps: bool = False) -> HoldHostInput:
    shape = VmShape(memory_mb=memory_mb, vcpu_count=1, kernel_version="k", firecracker_version="f")
    return HoldHostInput(
        build_id=str(uuid.uuid4()),
        template_id="t",
        lifetime_seconds=60,
        shape=shape if memory_mb else None,
        runs_steps=runs_steps,
    )


@pytest.mark.parametrize(
    ("hold", "memory_mb"),
    [
        (asking(512), 512 + 256),
        (asking(512, runs_steps=True), 1024 + 256),
        (asking(2048, runs_steps=True), 2048 + 256),
        (asking(0, runs_steps=True), 0),
    ],
    ids=["a boot", "small steps", "large steps", "an earlier version"],
)
def test_a_build_takes_what_its_largest_vm_takes(hold: HoldHostInput, memory_mb: int) -> None:
    assert MEMORY.of_build(hold) == memory_mb


async def test_a_build_waits_for_memory_and_not_for_a_slot_alone(tmp_path: Path) -> None:
    ledger = LeaseLedger(DataDir(tmp_path))
    admission = Admission(ledger, 3, Room((), 0), MEMORY)
    admission.open = True

    async def enter(build_id: str, memory_mb: int) -> None:
        async with admission.room_for(build_id, is_new=True, memory_mb=memory_mb):
            ledger.put(
                build_id=build_id,
                template_id="t",
                workflow_id="w",
                number=1,
                lifetime_seconds=60,
                memory_mb=memory_mb,
            )

    first, second = str(uuid.uuid4()), str(uuid.uuid4())
    environment = ActivityEnvironment()
    await environment.run(enter, first, 5000)  # too large for the host, and alone
    waiting = asyncio.ensure_future(environment.run(enter, second, 1000))
    await asyncio.sleep(0.5)
    assert not waiting.done()
    ledger.remove(first, 1)
    await asyncio.wait_for(waiting, 10)
    await environment.run(enter, str(uuid.uuid4()), 3096)  # up to the last MiB
    assert ledger.count() == 2


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


async def test_a_new_build_does_not_wait_for_a_slot_of_one_host(admission: Admission) -> None:
    """Its permit may be of before a build came that needed none; another host may be free."""
    await hold_builds(admission, 2)
    for if_free in (False, True):
        with pytest.raises(HostDrainingError, match="no free slot"):
            async with admission.room_for(str(uuid.uuid4()), is_new=True, if_free=if_free):
                pass


async def test_a_build_that_asks_for_a_free_slot_does_not_wait(tmp_path: Path) -> None:
    """Neither for memory, nor behind a build that does."""
    admission = Admission(LeaseLedger(DataDir(tmp_path)), 2, Room((), 0), MEMORY)
    admission.open = True
    async with admission.room_for(str(uuid.uuid4()), is_new=True, memory_mb=4096, if_free=True):
        with pytest.raises(HostDrainingError, match="taking another"):
            async with admission.room_for(str(uuid.uuid4()), is_new=True, if_free=True):
                pass
    await hold_builds(admission, 1)
    with pytest.raises(HostDrainingError, match="no free slot"):
        async with admission.room_for(str(uuid.uuid4()), is_new=True, memory_mb=4096, if_free=True):
            pass


async def hold_builds(admission: Admission, count: int) -> None:
    """Have so many builds held that have come without a permit."""
    for _ in range(count):
        build_id = str(uuid.uuid4())
        async with admission.room_for(build_id, is_new=True, if_free=True):
            admission._ledger.put(
                build_id=build_id,
                template_id="t",
                workflow_id="w",
                number=1,
                lifetime_seconds=60,
                memory_mb=1,
            )


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

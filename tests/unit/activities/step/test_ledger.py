from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from activities.contract.errors import LeaseLostError
from activities.contract.scope import BuildScope, HostLease
from activities.disk.data_dir import DataDir
from activities.step import ledger as leases
from activities.step.ledger import LeaseLedger

BUILD = "11111111-1111-4111-8111-111111111111"


@pytest.fixture
def ledger(tmp_path: Path) -> LeaseLedger:
    return LeaseLedger(DataDir(tmp_path))


def hold(ledger: LeaseLedger, number: int, lifetime: float = 60) -> None:
    ledger.put(
        build_id=BUILD,
        template_id="web",
        workflow_id="template-build-x",
        number=number,
        lifetime_seconds=lifetime,
    )


def scope(number: int) -> BuildScope:
    return BuildScope(build_id=BUILD, template_id="web", lease=HostLease(host="h1", number=number))


def test_a_held_build_may_go_on(ledger: LeaseLedger) -> None:
    hold(ledger, 7)
    ledger.require(scope(7))
    assert ledger.count() == 1


def test_a_renewed_lease_keeps_the_memory_that_it_counts_for(ledger: LeaseLedger) -> None:
    entry = ledger.put(
        build_id=BUILD,
        template_id="web",
        workflow_id="w",
        number=7,
        lifetime_seconds=60,
        memory_mb=768,
    )
    ledger.renew(entry)
    assert [entry.memory_mb for entry in ledger.entries()] == [768]


def test_a_build_that_is_not_held_may_not(ledger: LeaseLedger) -> None:
    with pytest.raises(LeaseLostError, match="does not hold"):
        ledger.require(scope(7))


def test_an_earlier_lease_is_fenced_off(ledger: LeaseLedger) -> None:
    hold(ledger, 8)
    with pytest.raises(LeaseLostError, match="replaced by 8"):
        ledger.require(scope(7))


def test_a_deadline_that_passed_while_frozen_is_seen(
    ledger: LeaseLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold(ledger, 7, lifetime=90)
    now = leases.boottime()
    monkeypatch.setattr(leases, "boottime", lambda: now + 91)
    with pytest.raises(LeaseLostError, match="expired"):
        ledger.require(scope(7))


def test_a_reboot_ends_every_lease(ledger: LeaseLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    hold(ledger, 7)
    monkeypatch.setattr(leases, "current_boot_id", lambda: "another boot")
    with pytest.raises(LeaseLostError, match="expired"):
        ledger.require(scope(7))


def test_releasing_an_old_lease_leaves_a_newer_one(ledger: LeaseLedger) -> None:
    hold(ledger, 8)
    ledger.remove(BUILD, 7)
    assert ledger.count() == 1
    ledger.remove(BUILD, 8)
    assert ledger.count() == 0


def test_a_half_written_entry_counts_as_a_slot_but_gives_no_right(
    ledger: LeaseLedger, tmp_path: Path
) -> None:
    (tmp_path / "leases" / BUILD).write_text('{"build')
    assert ledger.count() == 1
    assert ledger.entries() == []


def test_an_entry_that_cannot_be_read_gives_its_slot_back(
    ledger: LeaseLedger, tmp_path: Path
) -> None:
    hold(ledger, 7)
    (tmp_path / "leases" / "22222222-2222-4222-8222-222222222222").touch()
    (tmp_path / "leases" / f"{BUILD}.4711.tmp").write_bytes(
        (tmp_path / "leases" / BUILD).read_bytes()
    )
    assert ledger.count() == 2
    for leftover in ledger.leftovers():
        if leftover.number is None:
            leftover.remove()
    assert [entry.number for entry in ledger.entries()] == [7]
    assert [path.name for path in (tmp_path / "leases").iterdir()] == [BUILD]


def test_a_full_disk_costs_no_lease_before_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot that does not fit fills the disk for a moment."""
    ledger = LeaseLedger(DataDir(tmp_path))
    hold(ledger, 1)
    before = ledger.get(BUILD)
    assert before is not None

    def no_room(self: Path, data: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", no_room)
        ledger.renew(before)
    ledger.require(scope(1))
    assert ledger.get(BUILD) == before
    ledger.renew(before)
    after = ledger.get(BUILD)
    assert after is not None and after.deadline > before.deadline

"""How much is left of a disk, told with both numbers."""

from __future__ import annotations

from pathlib import Path

from activities.contract.units import MIB
from activities.disk.room import Room

PIB = 1 << 50


def test_a_disk_with_room_lacks_nothing(tmp_path: Path) -> None:
    assert not Room((tmp_path,), 0).lacking()
    assert not Room((), PIB).lacking(PIB)


def test_what_stays_free_and_what_is_wanted_are_added(tmp_path: Path) -> None:
    for kept, wanted in ((PIB, 0), (0, PIB), (PIB // 2, PIB // 2)):
        told = Room((tmp_path,), kept).lacking(wanted)
        assert told.startswith(f"{tmp_path} has ")
        assert told.endswith(f" of {PIB // MIB} MiB free")


def test_a_disk_that_is_not_seen_counts_for_nothing(tmp_path: Path) -> None:
    assert not Room((tmp_path / "elsewhere",), PIB).lacking()

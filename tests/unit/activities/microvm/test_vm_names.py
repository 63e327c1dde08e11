"""Names of VMs that no build owns: they tell whose process they end with."""

from __future__ import annotations

import os
import subprocess
import sys

from activities.contract.names import parse_vm_name
from activities.microvm.vm_names import is_left_by_passing, passing_name
from activities.microvm.vm_supervisor import start_ticks

NAMING = "from activities.microvm.vm_names import passing_name; print(passing_name())"


def test_a_name_is_left_over_when_its_process_has_ended() -> None:
    assert not is_left_by_passing(passing_name())
    ended = subprocess.run(
        [sys.executable, "-c", NAMING], capture_output=True, text=True, check=True
    )
    assert is_left_by_passing(ended.stdout.strip())


def test_another_process_of_the_same_number_does_not_own_it() -> None:
    pid = os.getpid()
    ticks = start_ticks(pid)
    assert not is_left_by_passing(f"tm-run-{pid}-{ticks}-0a1b2c3d")
    assert is_left_by_passing(f"tm-run-{pid}-{ticks - 1}-0a1b2c3d")


def test_the_name_of_an_earlier_version_tells_the_number_alone() -> None:
    assert not is_left_by_passing(f"tm-run-{os.getpid()}-12345678")
    assert is_left_by_passing(f"tm-run-{2**22 + 1}-12345678")  # more than the kernel gives


def test_no_other_name_is_a_passing_one() -> None:
    for name in ("", "tm-run-", "tm-run-1", "tm-run-x-1", "lo", "tm-run-1-2-3-4"):
        assert not is_left_by_passing(name)
    assert parse_vm_name(passing_name()) is None

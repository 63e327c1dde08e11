from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from activities.contract.errors import MachineUnfitError, VmmError
from activities.microvm.resumable import (
    SnapshotTraits,
    require_resumable,
    snapshot_format,
    traits_here,
    vmm_version,
)

HERE = SnapshotTraits("1.16.1", "10.0.0", "x86_64", "A CPU")
FIRECRACKER = Path("/fc-versions/v1.16.1/firecracker")


@pytest.mark.parametrize(
    "made",
    [
        HERE,
        replace(HERE, vmm_version="1.16.0"),  # another release of the same format
        replace(HERE, architecture=""),  # of before it was told
        replace(HERE, snapshot_format=""),
    ],
)
def test_what_can_be_resumed(made: SnapshotTraits) -> None:
    require_resumable(made, HERE, FIRECRACKER)


def test_a_newer_minor_format_reads_an_older_one_and_not_the_other_way_round() -> None:
    older, newer = replace(HERE, snapshot_format="10.1.0"), replace(HERE, snapshot_format="10.2.3")
    require_resumable(older, newer, FIRECRACKER)
    with pytest.raises(MachineUnfitError, match=r"10\.2\.3.*10\.1\.0"):
        require_resumable(newer, older, FIRECRACKER)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            replace(HERE, vmm_version="1.13.1", snapshot_format="8.0.0"),
            "made by Firecracker 1.13.1 (snapshot format 8.0.0); "
            f"{FIRECRACKER} is 1.16.1, which reads 10.0.0",
        ),
        (
            replace(HERE, vmm_version="1.16.1-qemu", snapshot_format="10.0.0-qemu"),
            "made by Firecracker 1.16.1-qemu (snapshot format 10.0.0-qemu)",
        ),
        (
            replace(HERE, vmm_version="1.16.0", snapshot_format=""),
            f"made by Firecracker 1.16.0; {FIRECRACKER} is 1.16.1",
        ),
        (replace(HERE, architecture="aarch64"), "made on aarch64; this machine is x86_64"),
        (replace(HERE, cpu_model="Another"), "on the CPU model Another; this machine's is A CPU"),
    ],
)
def test_what_cannot_is_refused_by_name(made: SnapshotTraits, told: str) -> None:
    with pytest.raises(MachineUnfitError) as error:
        require_resumable(made, HERE, FIRECRACKER)
    assert told in error.value.message
    assert error.value.hint


def program(place: Path, text: str) -> Path:
    path = place / "firecracker"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_firecracker_is_asked_for_version_and_format(tmp_path: Path) -> None:
    said = 'case $1 in --version) echo "Firecracker v1.16.1";; *) echo v10.0.0;; esac; echo exiting'
    firecracker = program(tmp_path, said)
    here = traits_here(firecracker)
    assert (here.vmm_version, here.snapshot_format) == ("1.16.1", "10.0.0")
    assert here.architecture and here.cpu_model
    assert snapshot_format(firecracker, "1.16.1") == "10.0.0"
    assert snapshot_format(firecracker, "1.16.0") == ""  # it has been replaced since
    assert snapshot_format(tmp_path / "nothing", "1.16.1") == ""


@pytest.mark.parametrize("said", ["exit 1", "echo nonsense", "printf '\\377'", ":"])
def test_one_that_does_not_tell_its_format_has_none(tmp_path: Path, said: str) -> None:
    firecracker = program(
        tmp_path, f'case $1 in --version) echo "Firecracker v1.16.1";; *) {said};; esac'
    )
    assert snapshot_format(firecracker, "1.16.1") == ""


def test_one_that_does_not_tell_its_version_is_no_firecracker(tmp_path: Path) -> None:
    with pytest.raises(VmmError, match="--version does not work"):
        vmm_version(program(tmp_path, "exit 3"))

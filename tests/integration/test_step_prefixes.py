"""The same steps give the same files, whatever has been done before and whatever is killed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from devstack.registry import Registry

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.errors import VmmError
from activities.contract.image_steps import Copy, ImageStep, Run, User, Workdir
from activities.contract.names import Step, VmPurpose
from activities.contract.results import PulledImage
from activities.contract.scope import VmRef
from activities.disk.ext4 import check_filesystem
from activities.store.bucket import Bucket
from tests.support.file_trees import Entry
from tests.support.step_checks import go_on
from tests.support.step_host import StepHost, base_of
from tests.support.vm_host import vm_host

pytestmark = pytest.mark.counts_host

# Tells what an earlier step has left besides files, and leaves it to the next.
TELL = (
    "{ busybox ps | busybox grep -c '[s]leep 1111'; busybox ls -A /dev/shm; "
    "busybox mount | busybox grep -c /mnt; busybox hostname; } >>log; "
    "busybox sleep 1111 & echo x >/dev/shm/x; busybox hostname other; "
    "busybox mkdir -p /mnt && busybox mount -t tmpfs none /mnt && echo y >/mnt/y"
)
WORK = 4
"""Pieces of work that leave a checkpoint: two RUNs, a COPY, and the end."""


@pytest_asyncio.fixture
async def host(tmp_path: Path, empty_bucket: Bucket) -> AsyncIterator[StepHost]:
    async with vm_host(tmp_path / "data") as made:
        yield StepHost(made, empty_bucket, tmp_path)


def steps_of(host: StepHost) -> Sequence[ImageStep]:
    return (
        Workdir(path="/srv"),
        Run(command=f"{TELL}; echo $((1 + 1)) >two; busybox ln two also; busybox chmod 751 ."),
        Copy(source=".", destination="copied", owner="web", files_sha256=host.files(a__b="b")),
        User(name="web"),
        Run(command=f"{TELL}; busybox id >>log; busybox rm -rf copied/a", user="root"),
    )


def files_of(host: StepHost, made: RootfsCheckpoint) -> dict[str, Entry]:
    """Return what a disk has, without the times at which it was written."""
    check_filesystem(host.disk(made), go_on)
    return {name: replace(entry, mtime_ns=0) for name, entry in host.tree(made).items()}


def checkpoints(host: StepHost) -> set[Path]:
    """Return all disks that there are."""
    return {
        kept.path for kept in host.host.bench.store.all() if kept.path.parent.name == Step.ROOTFS
    }


async def test_files_are_the_same_from_every_prefix_of_checkpoints(
    host: StepHost, registry: Registry
) -> None:
    base, steps = await base_of(host, registry), steps_of(host)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    await host.bare(base, vm)
    kept = checkpoints(host)
    expected = files_of(host, await host.build(base, *steps, vm=vm))
    made = sorted(checkpoints(host) - kept, key=lambda path: path.stat().st_mtime)
    assert len(made) == WORK
    for left in range(1, WORK):
        for path in made[left:]:
            shutil.rmtree(path)
        assert files_of(host, await host.build(base, *steps, vm=vm)) == expected, left


async def test_files_are_the_same_when_each_step_is_killed_once(
    host: StepHost, registry: Registry
) -> None:
    base, steps = await base_of(host, registry), steps_of(host)
    expected = files_of(host, await host.build(base, *steps))
    for path in checkpoints(host):
        shutil.rmtree(path)
    vm = host.host.vm(purpose=VmPurpose.BOOT)
    await host.bare(base, vm)
    bare, killed = checkpoints(host), 0
    for done in range(WORK):
        killed += await killed_after(host, base, steps, vm, bare, done)
    assert killed >= WORK - 1  # the end may be too quick
    assert files_of(host, await host.build(base, *steps, vm=vm)) == expected


async def killed_after(
    host: StepHost,
    base: PulledImage,
    steps: Sequence[ImageStep],
    vm: VmRef,
    bare: set[Path],
    done: int,
) -> bool:
    """Kill the VMM that runs when so many pieces of work are done; whether that ended the build."""
    task = asyncio.ensure_future(host.build(base, *steps, vm=vm))
    process = host.host.process(vm)
    while not task.done():
        if len(checkpoints(host) - bare) == done and process.is_running():
            with suppress(KeyError, ProcessLookupError):  # it has just ended
                os.kill(process._pids()["vmm"][0], signal.SIGKILL)
                break
        await asyncio.sleep(0.02)
    with suppress(VmmError):
        await task
        return False
    return True

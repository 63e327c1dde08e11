"""Dropping what a build has on a host."""

from __future__ import annotations

import uuid
from pathlib import Path

from temporalio.testing import ActivityEnvironment

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.names import ArtifactName, Step
from activities.contract.scope import BuildScope, HostLease
from activities.disk.data_dir import DataDir
from activities.step.build_log import open_build_log
from activities.step.checkpoints import CheckpointStore, fingerprint
from activities.step.discarding import HostCheckpointActivities
from activities.step.work_directories import work_directory
from tests.support.step_checks import go_on

KEY = fingerprint(Step.ROOTFS)


def scope_of_a_build() -> BuildScope:
    lease = HostLease(host="h1", number=1)
    return BuildScope(build_id=str(uuid.uuid4()), template_id="web", lease=lease)


async def test_the_checkpoint_stays_for_others_and_the_rest_goes(tmp_path: Path) -> None:
    data_dir = DataDir(tmp_path)
    store = CheckpointStore(data_dir, "h1")
    ended, other = scope_of_a_build(), scope_of_a_build()
    with store.making(Step.ROOTFS, KEY, ended, 1, go_on) as work:
        (work / "rootfs.ext4").write_bytes(b"x")
        kept = RootfsCheckpoint(fingerprint=KEY, host="h1")
        made = store.publish(work, kept, ended, names=(ArtifactName.ROOTFS,), check=go_on)
    store.require(made, other.build_id)
    for scope in (ended, other):
        work_directory(data_dir, scope, "rootfs", "1").mkdir(parents=True)
        async with open_build_log(data_dir, scope.build_id, Step.ROOTFS) as log:
            log.info("a line")
    data_dir.unfinished_checkpoint(Step.ROOTFS, "a" * 64, ended, 1).mkdir()

    activities = HostCheckpointActivities(data_dir, store)
    for _ in range(2):  # it may run twice
        await ActivityEnvironment().run(activities.discard_checkpoints, ended.build_id)

    left = {path for path in tmp_path.rglob("*") if ended.build_id in str(path)}
    assert left == set()
    assert store.find(RootfsCheckpoint, KEY, other.build_id, go_on)
    assert data_dir.log(other.build_id).exists()
    assert work_directory(data_dir, other, "rootfs", "1").exists()

"""The checkpoints of this host as activities: find a snapshot, drop what a build has."""

from __future__ import annotations

import asyncio
import shutil

from temporalio import activity

from activities.contract.checkpoints import SnapshotCheckpoint
from activities.contract.inputs import FindSnapshotInput
from activities.contract.interface import CheckpointActivities
from activities.contract.names import Step
from activities.disk.data_dir import DataDir
from activities.microvm.microvm import require_host, snapshot_fingerprint
from activities.process.settings import Settings
from activities.step.build_log import remove_build_log
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step


class HostCheckpointActivities(CheckpointActivities):
    """Implements the activities on checkpoints. See `interface` for the contract."""

    def __init__(self, settings: Settings, ledger: LeaseLedger, store: CheckpointStore) -> None:
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._store = store

    @activity.defn(name="find_snapshot")
    async def find_snapshot(self, find: FindSnapshotInput, /) -> SnapshotCheckpoint | None:
        """Return the snapshot that an earlier build of the same inputs left, if it is whole."""
        async with running_step(self._data_dir, self._ledger, find.scope, Step.BOOT) as running:
            return await running.in_thread(self._find, find, running)

    @activity.defn(name="discard_checkpoints")
    async def discard_checkpoints(self, build_id: str, /) -> None:
        """Drop the build's references, its work directories and its log on this host."""
        await asyncio.to_thread(self._discard, build_id)

    def _find(self, find: FindSnapshotInput, running: RunningStep) -> SnapshotCheckpoint | None:
        require_host(self._settings, find.shape)
        key = snapshot_fingerprint(self._settings, find.rootfs, find.shape)
        return self._store.find(SnapshotCheckpoint, key, find.scope.build_id, running.check)

    def _discard(self, build_id: str) -> None:
        self._store.release(build_id)
        shutil.rmtree(self._data_dir.work_of(build_id), ignore_errors=True)
        remove_build_log(self._data_dir, build_id)

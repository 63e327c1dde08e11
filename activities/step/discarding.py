"""Dropping all that a build has on this host, when it is cancelled or its template deleted."""

from __future__ import annotations

import asyncio
import shutil

from temporalio import activity

from activities.contract.interface import CheckpointActivities
from activities.disk.data_dir import DataDir
from activities.step.build_log import remove_build_log
from activities.step.checkpoints import CheckpointStore


class HostCheckpointActivities(CheckpointActivities):
    """Implements the activities on checkpoints. See `interface` for the contract."""

    def __init__(self, data_dir: DataDir, store: CheckpointStore) -> None:
        self._data_dir = data_dir
        self._store = store

    @activity.defn(name="discard_checkpoints")
    async def discard_checkpoints(self, build_id: str, /) -> None:
        """Drop the build's references, its work directories and its log on this host."""
        await asyncio.to_thread(self._discard, build_id)

    def _discard(self, build_id: str) -> None:
        self._store.release(build_id)
        shutil.rmtree(self._data_dir.work_of(build_id), ignore_errors=True)
        remove_build_log(self._data_dir, build_id)

"""Sweeping a host: which left-overs are looked at, and in which order they go.

The rooms that make things find what is left of them, and `orphans` decides whose it is.
"""

from __future__ import annotations

import asyncio
import time

import docker
from temporalio import activity

from activities.contract.inputs import SweepInput
from activities.contract.interface import HostSweepActivities
from activities.contract.results import SweepReport
from activities.contract.units import MIB
from activities.disk.child_cgroups import leftover_child_cgroups
from activities.disk.data_dir import DataDir
from activities.disk.leftovers import Leftover
from activities.disk.locks import leftover_locks
from activities.disk.loop_devices import leftover_loop_devices
from activities.host.doctor import leftover_disk_probes
from activities.host.orphans import Describe, Owners, remove_all
from activities.image.containers import leftover_containers
from activities.image.earlier_images import earlier_images
from activities.image.layer_marks import LayerMarks
from activities.image.pulled_images import PulledImages
from activities.microvm.network import leftover_networks
from activities.microvm.vm_process import leftover_supervisors, leftover_vms
from activities.process.metrics import count_sweep
from activities.process.settings import Settings
from activities.step.build_log import leftover_logs
from activities.step.checkpoints import CheckpointStore
from activities.step.ledger import LeaseLedger
from activities.step.work_directories import leftover_work
from activities.store.lease_numbers import LeaseObjects


class HostSweep(HostSweepActivities):
    """Sweeps this host. See `interface` for the contract."""

    def __init__(  # noqa: PLR0917 # what a host has, in the order in which it is assembled
        self,
        settings: Settings,
        ledger: LeaseLedger,
        store: CheckpointStore,
        leases: LeaseObjects,
        docker_client: docker.APIClient,
        describe: Describe,
    ) -> None:
        self._settings = settings
        self._data_dir = DataDir(settings.data_dir)
        self._ledger = ledger
        self._store = store
        self._leases = leases
        self._docker = docker_client
        self._pulled = PulledImages(self._data_dir)
        self._describe = describe
        self._lock = asyncio.Lock()

    @activity.defn(name="sweep_host")
    async def sweep_host(self, sweep: SweepInput, /) -> SweepReport:
        """Remove what no live build owns, then evict checkpoints that are old or too many."""
        report = await self.sweep(sweep)
        count_sweep(activity.metric_meter(), report)
        return report

    async def sweep(self, sweep: SweepInput) -> SweepReport:
        """Find orphans and, unless it is a dry run, remove them.

        Raises DockerUnavailableError, StorageUnavailableError and TemporalUnavailableError; then
        nothing has been removed.
        """
        async with self._lock:
            found = await asyncio.to_thread(self._list)
            owners = Owners(self._describe, self._leases)
            orphans = await owners.orphans(found, 2 * self._settings.build.lease_grace_seconds)
            orphans += await self._evictable(owners)
            return await asyncio.to_thread(remove_all, orphans, dry_run=sweep.dry_run)

    def _list(self) -> list[Leftover]:
        # The processes come first: a VM's directory and netns go only when it is dead.
        return [
            *leftover_vms(self._data_dir),
            *leftover_supervisors(self._data_dir),
            *leftover_child_cgroups(),
            *leftover_networks(self._data_dir),
            *leftover_containers(self._docker, self._data_dir),
            *leftover_loop_devices(self._data_dir),
            *self._store.unfinished(),
            *leftover_work(self._data_dir),
            *self._ledger.leftovers(),
            *self._store.references(),
            *leftover_logs(self._data_dir),
            *leftover_locks(self._data_dir),
            *self._pulled.drafts(),
            *leftover_disk_probes(self._data_dir),
        ]

    async def _evictable(self, owners: Owners) -> list[Leftover]:
        """Return the cache's share: what is too old, and checkpoints that are too many."""
        kept = await asyncio.to_thread(self._store.all)
        running = await owners.running(user for checkpoint in kept for user in checkpoint.users)
        unused_since = time.time() - self._settings.checkpoint_max_age_hours * 3600
        max_bytes = self._settings.checkpoint_max_mb * MIB
        checkpoints = self._store.evictable(
            kept, running, max_bytes=max_bytes, unused_since=unused_since
        )
        return [*checkpoints, *await asyncio.to_thread(self._old_images, unused_since)]

    def _old_images(self, unused_since: float) -> list[Leftover]:
        return [
            *self._pulled.old(self._docker, unused_since),
            *LayerMarks(self._data_dir).old(unused_since),
            *earlier_images(self._docker, unused_since),
        ]

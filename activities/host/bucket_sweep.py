"""Sweeping the bucket: which left-overs are looked at. The rooms that make them find them."""

from __future__ import annotations

import asyncio
import time

from temporalio import activity

from activities.contract.inputs import SweepInput
from activities.contract.interface import BucketSweepActivities
from activities.contract.results import SweepReport
from activities.disk.leftovers import Leftover
from activities.host.orphans import Describe, Owners, remove_all
from activities.store.bucket import Bucket
from activities.store.files import leftover_files
from activities.store.layer_leftovers import leftover_layers, leftover_uses
from activities.store.lease_numbers import LeaseObjects
from activities.store.probe import leftover_probes
from activities.store.stored import count_stored
from activities.template.upload import leftover_parts


class BucketSweep(BucketSweepActivities):
    """Sweeps the bucket. See `interface` for the contract."""

    def __init__(
        self,
        bucket: Bucket,
        describe: Describe,
        *,
        late_arrival_seconds: float,
        most_files_bytes: int,
        layer_max_age_hours: float,
    ) -> None:
        """`late_arrival_seconds` is how long a host without its lease can still write,
        `most_files_bytes` the limit of a COPY's tar, and `layer_max_age_hours` how long a layer
        stays that nobody needs."""
        self._layer_max_age_hours = layer_max_age_hours
        self._most_files_bytes = most_files_bytes
        self._late_arrival_seconds = late_arrival_seconds
        self._bucket = bucket
        self._leases = LeaseObjects(bucket)
        self._describe = describe

    @activity.defn(name="sweep_bucket")
    async def sweep_bucket(self, sweep: SweepInput, /) -> SweepReport:
        """Remove parts, leases and references of builds that can no longer use them, and layers
        that nobody needs; count what is stored."""
        if not sweep.dry_run:
            await asyncio.to_thread(count_stored, self._bucket)
        found = await asyncio.to_thread(self._list)
        owners = Owners(self._describe, self._leases)
        orphans = await owners.orphans(found, self._late_arrival_seconds)
        return await asyncio.to_thread(remove_all, orphans, dry_run=sweep.dry_run)

    def _list(self) -> list[Leftover]:
        unused_since = time.time() - self._layer_max_age_hours * 3600
        return [
            *leftover_parts(self._bucket),
            *self._leases.leftovers(),
            *leftover_files(self._bucket, self._most_files_bytes),
            *leftover_probes(self._bucket),
            *leftover_uses(self._bucket),
            *leftover_layers(self._bucket, unused_since),
        ]

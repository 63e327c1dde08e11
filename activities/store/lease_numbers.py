"""Lease numbers: the generations of the objects `.leases/<build_id>` in the bucket.

The bucket decides who holds a build, because it is what a frozen host could harm. Generations only
grow, also over a delete, so a later lease always has the higher number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial

from activities.contract.errors import LeaseLostError, PreconditionFailedError
from activities.contract.names import HostName
from activities.disk.leftovers import Leftover
from activities.process.clock import utc_now
from activities.store.bucket import Bucket
from activities.store.objects import LEASES, lease_name, parse_object_name

RACES = 4


class LeaseObjects:
    """Takes, checks and gives back leases. Blocking."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    def take(self, build_id: str, host: HostName, workflow_id: str, held: int | None) -> int:
        """Return the lease number of a build that this host is asked to hold.

        `held` is the number in the host's own ledger: while it is still the current one, the
        lease goes on under it. Otherwise the object is rewritten and every earlier number is
        outdated. Raises LeaseLostError when others keep taking it, StorageUnavailableError and
        StorageDeniedError.
        """
        body = {"host": host, "workflow_id": workflow_id, "taken": utc_now().isoformat()}
        name, content = lease_name(build_id), json.dumps(body).encode()
        # Most builds are held for the first time: that costs one call, for which a slot waits.
        generation = 0 if held is None else self.current(build_id) or 0
        for _ in range(RACES):
            if generation == held:
                return generation
            try:
                return self._bucket.write_object(
                    name, content, if_generation_match=generation
                ).generation
            except PreconditionFailedError:
                generation = self.current(build_id) or 0
        raise LeaseLostError(f"another host is taking build {build_id}")

    def current(self, build_id: str) -> int | None:
        """Return the latest lease number of a build; None when nobody holds it."""
        found = self._bucket.stat_object(lease_name(build_id))
        return found.generation if found else None

    def is_current(self, build_id: str, number: int) -> bool:
        """Whether that lease number is still the latest."""
        return self.current(build_id) == number

    def require_current(self, build_id: str, number: int) -> None:
        """Go on or not. Raises LeaseLostError when another host has the build by now."""
        if not self.is_current(build_id, number):
            raise LeaseLostError(f"build {build_id} has been given to another host")

    def release(self, build_id: str, number: int) -> None:
        """Give a lease back. A later one is left alone."""
        self._bucket.delete_object(lease_name(build_id), number)

    def leftovers(self) -> Iterator[Leftover]:
        """Yield all leases. Raises StorageUnavailableError and StorageDeniedError."""
        for stored, written_at in self._bucket.list_dated(prefix=LEASES):
            if named := parse_object_name(stored.name):
                yield Leftover(
                    named.kind,
                    stored.name,
                    partial(self.release, named.build_id, stored.generation),
                    named.build_id,
                    stored.generation,
                    written_at,
                    stored.size_bytes,
                )

    def bury(self, build_id: str, check: Callable[[], None] = lambda: None) -> int:
        """Outdate every lease of a deleted build by a tombstone; returns its generation.

        `check` ends it by raising: what is outdated had been taken before. Raises LeaseLostError
        when one is taken at this very moment: by a new build, perhaps.
        """
        body = json.dumps({"deleted": utc_now().isoformat()}).encode()
        generation = self.current(build_id) or 0
        check()
        try:
            return self._bucket.write_object(
                lease_name(build_id), body, if_generation_match=generation
            ).generation
        except PreconditionFailedError as error:
            raise LeaseLostError(f"another host is taking build {build_id}") from error

    def unbury(self, build_id: str, generation: int) -> bool:
        """Remove the tombstone; False when a new build has already taken its place."""
        return self._bucket.delete_object(lease_name(build_id), generation)

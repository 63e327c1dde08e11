"""Layers that go up while their build goes on: a host that is lost then takes little with it.

The disks of a build come to be on its host one after the other. Each is sent while the next step,
or the boot, works on a copy of it. Nothing relies on that: the upload sends what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

from temporalio import activity

from activities.contract.checkpoints import DiskKey, RootfsCheckpoint
from activities.contract.inputs import SendLayersInput
from activities.contract.interface import LayerActivities
from activities.contract.names import Step
from activities.instructions.plan import chain_of, plan
from activities.process.settings import Settings
from activities.step.checkpoints import CheckpointStore
from activities.step.layer_disks import layer_of
from activities.step.ledger import LeaseLedger
from activities.step.running_step import RunningStep, running_step
from activities.store.lease_numbers import LeaseObjects
from activities.template.layering import LayerMaker, Stacked, Upload

LOOK_SECONDS = 0.5
"""Between looks for the next disk."""
IDLE_SECONDS = 60.0
"""So long nobody makes one: then none comes any more. Between two steps it takes moments."""
AGAIN_SECONDS = 5.0
"""Between looks for a layer that another build is making, while steps are at work."""
TRIES = 12


class BucketLayerActivities(LayerActivities):
    """Sends layers of this host's disks. See `interface` for the contract."""

    def __init__(
        self,
        settings: Settings,
        ledger: LeaseLedger,
        store: CheckpointStore,
        leases: LeaseObjects,
        maker: LayerMaker,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._leases = leases
        self._maker = maker

    @activity.defn(name="send_layers")
    async def send_layers(self, send: SendLayersInput, /) -> int:
        """Make layers of disks while others are made of them; return of how many it has."""
        attempt = activity.info().attempt
        async with running_step(self._settings, self._ledger, send.scope, Step.UPLOAD) as running:
            return await running.in_thread(self._send, send, attempt, running)

    def _send(self, send: SendLayersInput, attempt: int, running: RunningStep) -> int:
        chain, scope = self._chain(send), send.scope

        def require_current() -> None:
            running.check()
            self._leases.require_current(scope.build_id, scope.lease.number)

        upload = Upload(scope, attempt, running, require_current, is_ahead=True)
        top: Stacked | None = None
        done = tries = 0
        while (here := self._await_next(chain, done, running)) > done:
            top, sent = self._maker.ahead(chain[done:here], top, upload)
            done += sent
            if done < here:
                tries += 1
                if here == len(chain) or tries == TRIES or self._maker.is_whole(chain[done]):
                    self._leave(chain[done:], running)
                    break
                running.stop.wait(AGAIN_SECONDS)
        return done

    @staticmethod
    def _leave(chain: Sequence[DiskKey], running: RunningStep) -> None:
        running.log.info(
            f"layer {layer_of(chain[0])} is another build's: it and what is on it go up with the "
            "template"
        )

    def _chain(self, send: SendLayersInput) -> tuple[DiskKey, ...]:
        if send.steps is None:
            return send.chain
        return chain_of(send.steps, plan(self._settings, send.steps))

    def _await_next(self, chain: Sequence[DiskKey], done: int, running: RunningStep) -> int:
        """Wait for a disk after the first `done`; return how many there are up to the last here.

        That is `done` when none comes any more.
        """
        is_here = partial(self._here, chain, done)
        self._wait(lambda: is_here() > done, chain[done:], running)
        return is_here()

    def _here(self, chain: Sequence[DiskKey], done: int) -> int:
        is_there = partial(self._store.is_there, RootfsCheckpoint)
        numbers = range(len(chain), done, -1)
        return next((n for n in numbers if is_there(chain[n - 1].fingerprint)), done)

    def _wait(
        self, is_over: Callable[[], bool], awaited: Sequence[DiskKey], running: RunningStep
    ) -> None:
        """Wait until something is so, or nobody makes one of these disks any more."""
        made_at = time.monotonic()
        while awaited and not is_over() and time.monotonic() - made_at < IDLE_SECONDS:
            running.check()
            running.stop.wait(LOOK_SECONDS)
            if any(self._store.is_being_made(Step.ROOTFS, key.fingerprint) for key in awaited):
                made_at = time.monotonic()

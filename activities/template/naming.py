"""Moving the tags of a name to a build that has been published."""

from __future__ import annotations

import asyncio

from temporalio import activity

from activities.contract.inputs import MoveTagsInput
from activities.contract.interface import NameActivities
from activities.contract.results import MovedTags
from activities.store.bucket import Bucket
from activities.store.names import TenantNames


class BucketNameActivities(NameActivities):
    """Moves tags in the bucket. See `interface` for the contract."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @activity.defn(name="move_tags")
    async def move_tags(self, move: MoveTagsInput, /) -> MovedTags:
        """Let tags stand for a published build, all at once, unless a later request has them."""
        return await asyncio.to_thread(self._move, move)

    def _move(self, move: MoveTagsInput) -> MovedTags:
        names = TenantNames(self._bucket, move.tenant)
        moved = names.assign(move.name, move.build_id, move.tags, asked=move.asked)
        return MovedTags(kept=moved.kept)

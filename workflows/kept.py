"""What the steps of a build have left so far: a step that finds its part here is skipped."""

from __future__ import annotations

from typing import TypedDict, Unpack

from activities.contract.checkpoints import RootfsCheckpoint, SnapshotCheckpoint
from activities.contract.names import Step
from activities.contract.results import (
    BuildCheckpoints,
    PublishedTemplate,
    PulledImage,
    UploadedArtifact,
    Verification,
)


class Left(TypedDict, total=False):
    """What a step can leave, by the names of `BuildCheckpoints`."""

    image: PulledImage
    image_is_on_host: bool
    rootfs: RootfsCheckpoint
    snapshot: SnapshotCheckpoint
    verification: Verification
    uploads: dict[str, UploadedArtifact]


class Kept:
    """The state of a build. A retry begins with what its failed run has left."""

    def __init__(self, done: BuildCheckpoints | None) -> None:
        self.done = done or BuildCheckpoints()
        self.published: PublishedTemplate | None = None

    def keep(self, **left: Unpack[Left]) -> None:
        """Remember what a step has left."""
        self.done = self.done.model_copy(update=dict(left))

    def settle_on(self, host: str) -> None:
        """Forget what is on another host than this one."""
        if self.done.host != host:
            self.done = self.done.on_other_host().model_copy(update={"host": host})

    def go_back_to(self, step: Step) -> None:
        """Forget what `step` and all later ones have left."""
        self.done = self.done.before(step)

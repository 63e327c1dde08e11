"""Steps in containers: what workers of earlier versions ask for, and no host does any more."""

from __future__ import annotations

from temporalio import activity

from activities.contract.errors import EarlierWorkerError
from activities.contract.inputs import BuildImageInput
from activities.contract.interface import ImageStepActivities
from activities.contract.results import PulledImage


class EarlierStepActivities(ImageStepActivities):
    """Says that it does not, at once: what is not served at all is tried again and again."""

    @activity.defn(name="build_image")
    async def build_image(self, build: BuildImageInput, /) -> PulledImage:
        """Raise EarlierWorkerError."""
        raise EarlierWorkerError(
            f"{len(build.steps)} steps are to run in containers; this host runs them in VMs"
        )

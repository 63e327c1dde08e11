"""What must fail in mypy. Nothing here is run.

`mypy --strict` warns of a `type: ignore` that nothing needs: when one of these calls becomes legal,
the check of types fails, and says on which line.
"""

from __future__ import annotations

from activities.contract.image_steps import Run
from activities.contract.inputs import BuildImageInput, PullImageInput, WaitUntilReadyInput
from activities.contract.interface import DeletionActivities, ImageActivities, MicrovmActivities
from activities.contract.results import DeletedTemplate, PulledImage
from workflows.calling import call, call_with_two
from workflows.kept import Kept
from workflows.leased_host import LeasedHost


async def wrong_inputs(host: LeasedHost, pull: PullImageInput, wait: WaitUntilReadyInput) -> None:
    """An activity is called with the input of another one."""
    await host.run(ImageActivities.pull_image, pull, "right")
    await host.run(ImageActivities.pull_image, wait, "wrong")  # type: ignore[arg-type] # expected
    await host.run(MicrovmActivities.wait_until_ready, pull, "")  # type: ignore[arg-type] # expected
    await call(ImageActivities.pull_image, wait, queue="", summary="")  # type: ignore[arg-type] # expected
    host.undo("kill VM", MicrovmActivities.kill_vm, pull)  # type: ignore[arg-type] # expected


async def wrong_result(host: LeasedHost, pull: PullImageInput) -> DeletedTemplate:
    """An activity's result is taken for another one's."""
    return await host.run(ImageActivities.pull_image, pull, "")  # type: ignore[arg-type] # expected


async def wrong_order(deleted: DeletedTemplate) -> None:
    """The two inputs of an activity change places."""
    late = DeletionActivities.remove_late_arrivals
    await call_with_two(late, deleted, "id", queue="", summary="")
    await call_with_two(late, "id", deleted, queue="", summary="")  # type: ignore[arg-type] # expected


def wrong_parts(kept: Kept, image: PulledImage) -> None:
    """What is kept has a typo in its name, or another step's type."""
    kept.keep(image=image)
    kept.keep(imgae=image)  # type: ignore[call-arg] # expected
    kept.keep(verification=image)  # type: ignore[arg-type] # expected


def wrong_in_a_model(pull: PullImageInput, image: PulledImage) -> None:
    """A model is made of another type, or of what is no member of its union."""
    Run(command="make")
    Run(command=3)  # type: ignore[arg-type] # expected
    right, wrong = (Run(command="make"),), (pull,)
    BuildImageInput(scope=pull.scope, base=image, steps=right, timeout_seconds=1)
    BuildImageInput(scope=pull.scope, base=image, steps=wrong, timeout_seconds=1)  # type: ignore[arg-type] # expected

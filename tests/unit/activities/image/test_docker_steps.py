from __future__ import annotations

from activities.contract.image_steps import PersistedStep, image_step
from activities.image.docker_steps import ImageState
from tests.support.persisted import lines_of

BUILD = "11111111-1111-4111-8111-111111111111"


def test_what_an_earlier_version_has_made_of_a_step_is_found_again() -> None:
    steps = [
        image_step(PersistedStep.model_validate_json(line))
        for line in lines_of("image_steps.jsonl")
    ]
    base = ImageState(
        image_id="sha256:" + "b" * 64,
        key="sha256:" + "a" * 64,
        environment={},
        user="",
        working_dir="/",
    )
    keys = [base.next_key(step, BUILD) for step in steps]
    assert keys == lines_of("image_step_keys.txt")

from __future__ import annotations

import pytest

from activities.contract.image_steps import Copy, Env, ImageStep, PersistedStep, Run, image_step


@pytest.mark.parametrize(
    ("step", "told"),
    [
        (Run(command="make \\\n  install", user=""), "RUN make \\ install"),
        (Copy(source="a", destination="/b", owner="", mode="", files_sha256=""), "COPY a /b"),
        (Env(variables=(("A", "1"), ("B", "2"))), "ENV A 1 B 2"),
        (Run(command="x" * 200), "RUN " + "x" * 95 + "…"),
    ],
)
def test_people_see_a_step_on_one_line(step: ImageStep, told: str) -> None:
    assert str(step) == told


def test_a_mode_without_an_owner_keeps_its_place() -> None:
    step = Copy(source="a", destination="/b", mode="0644", files_sha256="5" * 64)
    assert step.args == ("a", "/b", "", "0644")
    assert image_step(step.persisted()) == step.model_copy(update={"owner": ""})


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        ("VOLUME", ("/data",)),
        ("USER", ("web", "maybe")),
        ("RUN", ()),
        ("RUN", ("a", "b", "c")),
        ("ENV", ("A",)),
        ("COPY", ("a",)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kind: str, args: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        image_step(PersistedStep(kind=kind, args=args))

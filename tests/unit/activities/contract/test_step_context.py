from __future__ import annotations

import pytest

from activities.contract.image_steps import Arg, Env, ImageStep, Run, User, Workdir
from activities.contract.results import ImageConfig
from activities.contract.step_context import StepContext, config_after

CONFIG = ImageConfig(env=("A=1", "B=x=y", "odd"), user="web", working_dir="/srv", cmd=("serve",))


def after(*steps: ImageStep) -> StepContext:
    context = StepContext.of_image(CONFIG)
    for step in steps:
        context = context.after(step)
    return context


def test_it_begins_with_the_images_config() -> None:
    context = after()
    assert context.environment == {"A": "1", "B": "x=y"}
    assert (context.user, context.working_dir) == ("web", "/srv")
    assert StepContext.of_image(ImageConfig()).working_dir == "/"


def test_arguments_are_for_later_runs_and_env_counts_more() -> None:
    context = after(Arg(variables=(("A", "of ARG"), ("C", "3"))), Env(variables=(("D", "4"),)))
    assert context.variables == {"A": "1", "B": "x=y", "C": "3", "D": "4"}
    assert "C" not in context.environment


def test_a_relative_working_directory_is_below_the_last() -> None:
    assert after(Workdir(path="a"), Workdir(path="../b/")).working_dir == "/srv/b/"
    assert after(Workdir(path="/x"), Run(command=":"), User(name="1:2")).user == "1:2"


@pytest.mark.parametrize(
    ("path", "absolute"),
    [(".", "/srv/"), ("a", "/srv/a"), ("a/", "/srv/a/"), ("//b", "/b"), ("/", "/"), ("../..", "/")],
)
def test_paths_are_absolute_and_say_what_must_be_a_directory(path: str, absolute: str) -> None:
    assert after().path(path) == absolute


def test_an_images_config_after_its_steps_keeps_what_no_step_changes() -> None:
    changed = config_after(CONFIG, (Env(variables=(("A", "2"),)), User(name=""), Workdir(path="/")))
    assert changed == ImageConfig(env=("A=2", "B=x=y"), user="", working_dir="/", cmd=("serve",))

from __future__ import annotations

import pytest

from activities.contract.checkpoints import RootfsCheckpoint
from activities.contract.image_steps import Arg, Copy, Env, ImageStep, Meaning, Run, User, Workdir
from activities.contract.results import ImageConfig, PulledImage, TemplateBase
from activities.contract.step_context import (
    MAX_VALUE_CHARS,
    MAX_VARIABLES_CHARS,
    StepContext,
    TooLongError,
    config_after,
)
from tests.support.example_template import pulled_image

CONFIG = ImageConfig(env=("A=1", "B=x=y", "odd"), user="web", working_dir="/srv", cmd=("serve",))


def image(config: ImageConfig = CONFIG) -> PulledImage:
    return pulled_image().model_copy(update={"config": config})


def after(*steps: ImageStep) -> StepContext:
    context = StepContext.of_image(image(), Meaning.DOCKER)
    for step in steps:
        context = context.after(step)
    return context


def test_it_begins_with_the_images_config() -> None:
    context = after()
    assert context.environment == {"A": "1", "B": "x=y"}
    assert (context.user, context.working_dir) == ("web", "/srv")
    assert StepContext.of_image(image(ImageConfig()), Meaning.DOCKER).working_dir == "/"


def test_to_e2b_an_image_begins_with_its_user_and_a_template_with_its_own() -> None:
    context = StepContext.of_image(image(), Meaning.E2B)
    assert (context.user, context.working_dir) == ("user", "/home/user")
    assert context.environment == {"A": "1", "B": "x=y"}
    base = TemplateBase(disk=RootfsCheckpoint(fingerprint="f" * 64, host="h"))
    on_template = StepContext.of_image(image().model_copy(update={"base": base}), Meaning.E2B)
    assert (on_template.user, on_template.working_dir) == ("web", "/srv")


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
    changed = config_after(
        image(), (Env(variables=(("A", "2"),)), User(name=""), Workdir(path="/"))
    )
    assert changed == ImageConfig(env=("A=2", "B=x=y"), user="", working_dir="/", cmd=("serve",))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$A", "1"),
        ("/x:${B}:$A$B", "/x:x=y:1x=y"),
        ("$NONE|${NONE}|", "||"),
        (r"\$A costs $5", "$A costs $5"),
        ("${NONE:-none} ${A:-none} ${A:+some} ${NONE:+some}", "none 1 some "),
        ("${NONE:-is $A}", "is 1"),
        ("$(id) `id` ${A ${1} $ü %s", "$(id) `id` ${A ${1} $ü %s"),
    ],
)
def test_variables_stand_for_what_was_set_so_far(text: str, value: str) -> None:
    assert after(Env(variables=(("C", text),))).environment["C"] == value
    assert after(Arg(variables=(("C", text),))).arguments["C"] == value


def test_the_values_of_one_step_see_what_was_before_it() -> None:
    context = after(Env(variables=(("A", "2"), ("C", "$A"))), Arg(variables=(("D", "$A$C"),)))
    assert context.variables == {"A": "2", "B": "x=y", "C": "1", "D": "21"}


def test_names_and_paths_have_variables_too() -> None:
    context = after(Env(variables=(("WHO", "me"),)), User(name="$WHO"), Workdir(path="/home/$WHO"))
    assert (context.user, context.working_dir) == ("me", "/home/me")
    copy = Copy(source="$WHO/*", destination="to/", owner="$WHO:$A", files_sha256="0" * 64)
    resolved = context.resolved(copy)
    assert resolved.args == ("me/*", "/home/me/to/", "me:1")
    assert context.resolved(Run(command="echo $WHO")) == Run(command="echo $WHO")


def test_variables_that_double_in_each_step_come_to_an_end() -> None:
    double = Env(variables=(("A", "$A$A"),))
    with pytest.raises(TooLongError, match=f"the limit is {MAX_VALUE_CHARS}"):
        after(*[double] * 100)
    many = tuple((f"A{number}", "$A" * 16_000) for number in range(100))
    with pytest.raises(TooLongError, match=f"ENV A16: .* limit is {MAX_VARIABLES_CHARS}"):
        after(Env(variables=many))


def test_a_directory_that_grows_in_each_step_comes_to_an_end() -> None:
    deeper = Workdir(path="a/" * 16_000)
    with pytest.raises(TooLongError, match=f"the limit is {MAX_VALUE_CHARS}"):
        after(*[deeper] * 100)

"""The table of policies has a row for each activity, and their names stay."""

from __future__ import annotations

import inspect
from datetime import timedelta

import pytest
from temporalio import activity
from temporalio.workflow import ActivityCancellationType

from activities.contract import interface
from activities.contract.requests import BuildOptions
from workflows.policies import POLICIES

# Persisted: a history that was recorded yesterday asks for these.
NAMES = [
    "hold_host",
    "hold_host_if_free",
    "release_host",
    "tell_host",
    "pull_image",
    "import_template",
    "build_image",
    "build_rootfs",
    "run_steps",
    "send_layers",
    "find_snapshot",
    "set_up_network",
    "start_vm",
    "wait_until_ready",
    "snapshot_vm",
    "verify_snapshot",
    "upload_artifact",
    "upload_artifacts",
    "publish_template",
    "move_tags",
    "archive_log",
    "clean_up_rootfs",
    "tear_down_network",
    "kill_vm",
    "discard_upload",
    "discard_checkpoints",
    "delete_objects",
    "delete_image_tag",
    "remove_late_arrivals",
    "sweep_host",
    "sweep_bucket",
]


def activities_of_the_contract() -> dict[str, str]:
    """Return method names by the names under which Temporal knows them."""
    classes = [each for _, each in inspect.getmembers(interface, inspect.isclass)]
    methods = {name for each in classes for name in getattr(each, "__abstractmethods__", ())}
    owners = {name: each for each in classes for name in methods if name in vars(each)}
    return {
        # Its own, but the only place where the SDK keeps the name.
        str(activity._Definition.must_from_callable(vars(owner)[name]).name): name
        for name, owner in owners.items()
    }


def test_each_activity_has_its_row_and_no_row_is_left_over() -> None:
    assert set(POLICIES) == set(activities_of_the_contract())


def test_each_activity_of_the_contract_is_one_that_a_room_must_implement() -> None:
    """One that is not abstract would be missed above, and would need no row."""
    classes = [each for _, each in inspect.getmembers(interface, inspect.isclass)]
    registered = {
        name
        for each in classes
        if each.__module__ == interface.__name__
        for name, method in vars(each).items()
        if callable(method) and activity._Definition.from_callable(method) is not None
    }
    assert registered == set(activities_of_the_contract().values()) == set(POLICIES)


def test_the_names_of_activities_are_those_in_recorded_histories() -> None:
    assert set(activities_of_the_contract()) >= set(NAMES)


def test_an_activity_is_named_as_its_method() -> None:
    assert all(name == method for name, method in activities_of_the_contract().items())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_an_undo_is_an_activity_that_is_tried_as_long_as_its_total_allows(name: str) -> None:
    undo = POLICIES[name].undo
    if undo is None or undo == "release_host":  # a host that is away is swept
        return
    assert POLICIES[undo].attempts == 0
    assert POLICIES[undo].total is not None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_attempt_is_limited(name: str) -> None:
    config = POLICIES[name].config(BuildOptions())
    assert timedelta(0) < (config["start_to_close_timeout"] or timedelta(0)) <= timedelta(days=30)
    assert config["retry_policy"] is not None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_what_beats_is_awaited_when_it_is_cancelled(name: str) -> None:
    config = POLICIES[name].config(BuildOptions(heartbeat_timeout_seconds=7))
    waits = ActivityCancellationType.WAIT_CANCELLATION_COMPLETED
    assert (config.get("cancellation_type") is waits) == POLICIES[name].heartbeat
    assert (config.get("heartbeat_timeout") == timedelta(seconds=7)) == POLICIES[name].heartbeat


def test_the_options_of_a_build_set_its_limits() -> None:
    options = BuildOptions(pull_timeout_seconds=11, retry_attempts=3, lease_wait_seconds=17)
    pull = POLICIES["pull_image"].config(options)
    assert pull["start_to_close_timeout"] == timedelta(seconds=11)
    assert pull["retry_policy"] and pull["retry_policy"].maximum_attempts == 3
    hold = POLICIES["hold_host"].config(options)
    assert hold["schedule_to_start_timeout"] == timedelta(seconds=17)

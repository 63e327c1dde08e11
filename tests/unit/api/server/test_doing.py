"""What a build does now is told in words, whatever activity it is."""

from __future__ import annotations

import inspect

from activities.contract import interface
from api.server.view import DOING, HOLDS

OF_NO_BUILD = {"tell_host", "sweep_host", "sweep_bucket"}
OF_A_TENANT = {
    "look_at_line",
    "find_builds_of_tenant",
    "delete_build_of_tenant",
    "delete_objects_of_tenant",
}
OF_A_DELETE = {"delete_objects", "delete_image_tag", "remove_late_arrivals"}


def test_every_activity_of_a_build_is_told_in_words() -> None:
    activities = {
        name
        for _, room in inspect.getmembers(interface, inspect.isclass)
        for name, method in inspect.getmembers(room, inspect.isfunction)
        if inspect.iscoroutinefunction(method)
    }
    others = OF_NO_BUILD | OF_A_TENANT | OF_A_DELETE | HOLDS
    assert set(DOING) == activities - others

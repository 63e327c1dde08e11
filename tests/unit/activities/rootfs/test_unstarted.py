from __future__ import annotations

from activities.contract.results import ImageConfig
from activities.rootfs.rootfs import unstarted


def test_what_an_image_would_start_is_told() -> None:
    told = unstarted(ImageConfig(entrypoint=("/bin/run it",), cmd=("-f",)))
    assert "start command `image` is: '/bin/run it' -f" in told


def test_an_image_without_a_command_is_told() -> None:
    assert "the image has none" in unstarted(ImageConfig())
    assert "the image has none" in unstarted(ImageConfig(entrypoint=("",)))

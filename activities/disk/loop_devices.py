"""Loop devices: files of this host's disk that are mounted, or were when somebody was killed."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from activities.disk.data_dir import DataDir, is_made_by, maker_of
from activities.disk.leftovers import Leftover, made_at
from activities.disk.programs import child_environment


def loop_devices() -> list[tuple[Path, str]]:
    """Return the loop devices in use with the paths of their files."""
    found = []
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = entry.read_text()
        except OSError:  # detached while we looked
            continue
        found.append((Path("/dev") / entry.parent.parent.name, backing.strip()))
    return found


def loop_devices_of(build_id: str) -> list[Path]:
    """Return the loop devices whose files are in unfinished checkpoints of a build."""
    return [device for device, backing in loop_devices() if is_made_by(build_id, backing)]


def leftover_loop_devices(data_dir: DataDir) -> Iterator[Leftover]:
    """Yield the loop devices on unfinished checkpoints of this host."""
    for device, backing in loop_devices():
        maker = maker_of(backing)
        if maker and data_dir.contains(backing):
            made = made_at(Path(backing.removesuffix(" (deleted)")))
            yield Leftover(
                "loop device", str(device), partial(detach_loop_device, device), *maker, made
            )


def detach_loop_device(device: Path) -> None:
    """Detach a loop device; one that is still mounted goes when it is unmounted."""
    subprocess.run(
        ["losetup", "--detach", device], check=False, capture_output=True, env=child_environment()
    )

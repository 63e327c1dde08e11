"""What of `metadata.json` is E2B's: its orchestrator reads these keys, ours beside them are ours.

Without `version` 2 it takes a template for one of its own first kind, forgets user, directory,
variables and start command, and builds nothing on it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import islice

from pydantic import Field

from activities.contract.model import Model
from activities.contract.requests import IMAGE_COMMAND, Commands
from activities.contract.results import ImageConfig, UsedBlocks
from activities.contract.sources import FromTemplate
from activities.store.headers import BLOCK_BYTES

VERSION = 2
ROOT = "root"
MAX_PREFETCH_BLOCKS = 8192
"""32 MiB of memory: each is a number and a word of a file that is read often."""


class TemplateKeys(Model):
    """What was built, and what resumes it: the names of directories on the hosts."""

    build_id: str
    kernel_version: str
    firecracker_version: str


class ContextKeys(Model):
    """As whom, where and with what commands run in a sandbox unless they say otherwise."""

    user: str
    workdir: str
    env_vars: dict[str, str]


class StartKeys(Model):
    """What runs in the template."""

    start_command: str
    ready_command: str
    context: ContextKeys


class FromTemplateKeys(Model):
    """The template that it was built on."""

    alias: str
    build_id: str


class MemoryPrefetchKeys(Model):
    """Blocks of the memory that a resumed guest uses first: their numbers and, for each, how."""

    indices: tuple[int, ...]
    access_types: tuple[str, ...]
    """`r` or `w`."""
    block_size: int
    """In bytes."""


class PrefetchKeys(Model):
    """What is to be fetched before a resumed guest asks for it."""

    memory: MemoryPrefetchKeys


class E2bKeys(Model):
    """All of these keys, at the top level."""

    version: int = VERSION
    template: TemplateKeys
    context: ContextKeys
    start: StartKeys | None = Field(default=None, exclude_if=lambda start: start is None)
    from_image: str | None = Field(default=None, exclude_if=lambda image: image is None)
    from_template: FromTemplateKeys | None = Field(
        default=None, exclude_if=lambda template: template is None
    )
    prefetch: PrefetchKeys | None = Field(
        default=None, exclude_if=lambda prefetch: prefetch is None
    )


def context_of(image: ImageConfig, env: dict[str, str]) -> ContextKeys:
    """Return the context that an image's config, and what the request adds to it, mean.

    The group of a `user:group` is left out: E2B's agent looks the whole word up.
    """
    return ContextKeys(
        user=image.user.partition(":")[0] or ROOT,
        workdir=image.working_dir or "/",
        env_vars=image.variables | env,
    )


def start_of(commands: Commands, image: ImageConfig, context: ContextKeys) -> StartKeys | None:
    """Return what runs, in words for a shell; None when nothing does."""
    start = commands.start
    if start == IMAGE_COMMAND:
        start = shlex.join([*image.entrypoint, *image.cmd])
    if not start and not commands.ready:
        return None
    return StartKeys(start_command=start, ready_command=commands.ready, context=context)


def base_keys(source: FromTemplate) -> FromTemplateKeys:
    """Return the template that was built on; its alias is '' where none was given."""
    return FromTemplateKeys(alias=source.alias, build_id=source.build_id)


def prefetch_of(used: Sequence[UsedBlocks]) -> PrefetchKeys | None:
    """Return which blocks are worth reading before a resumed guest asks for them, in order.

    They are `MAX_PREFETCH_BLOCKS` at most; None when nothing is known.
    """
    blocks = ((block, each.access) for each in used for block in _blocks(each))
    told = tuple(islice(blocks, MAX_PREFETCH_BLOCKS))
    if not told:
        return None
    indices, access_types = zip(*told, strict=True)
    memory = MemoryPrefetchKeys(indices=indices, access_types=access_types, block_size=BLOCK_BYTES)
    return PrefetchKeys(memory=memory)


def _blocks(used: UsedBlocks) -> range:
    return range(used.first, used.first + used.length)

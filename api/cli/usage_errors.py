"""How a command ends that was called wrongly, or that nobody listens to any more."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from typer import BadParameter
from typer import Exit as CommandEnd

from api.cli.console import Exit
from api.cli.help_text import CommandPanels

if TYPE_CHECKING:
    from typer._click import Context

# What pydantic, which reads the options' values, says of a wrong one, by its beginning.
WORDS = {
    "Input should be a valid integer": "must be a whole number",
    "Input should be a valid datetime": "must be a time such as 2026-11-01 or 2026-11-01T08:30",
}


class AllCommands(CommandPanels):
    """The group of all commands."""

    def make_context(self, *arguments: Any, **options: Any) -> Context:  # as the base takes them
        """Read the options before the command; --help writes here already."""
        with _unread():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Context) -> object:
        """Run a command; a value that it cannot have is told in plain words."""
        try:
            with _unread():
                return super().invoke(ctx)
        except BadParameter as error:
            error.message = in_plain_words(error.message)
            raise


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    """End with `Exit.UNREAD` when nobody reads what is written: no build has failed by that."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would try to write once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CommandEnd(Exit.UNREAD) from None


def in_plain_words(message: str) -> str:
    """Return what is wrong with a value as somebody would say it who has not written the code."""
    for told, plain in WORDS.items():
        if message.startswith(told):
            return plain
    return message.removeprefix("Value error, ").replace("Input should be", "must be")

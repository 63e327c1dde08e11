"""How a command ends that was called wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer import BadParameter

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

    def invoke(self, ctx: Context) -> object:
        """Run a command; a value that it cannot have is told in plain words."""
        try:
            return super().invoke(ctx)
        except BadParameter as error:
            error.message = in_plain_words(error.message)
            raise


def in_plain_words(message: str) -> str:
    """Return what is wrong with a value as somebody would say it who has not written the code."""
    for told, plain in WORDS.items():
        if message.startswith(told):
            return plain
    return message.removeprefix("Value error, ").replace("Input should be", "must be")

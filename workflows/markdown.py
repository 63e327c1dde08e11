"""Text as it is put into Markdown, which Temporal's Web UI shows: it stays text.

What somebody else wrote goes into code (`code`, `block`), where nothing becomes a link, an image or
HTML, not even an address that stands there bare. `escaped` is for words of our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from activities.contract.text import one_line, readable

_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_TICKS = re.compile("`+")
MIN_FENCE = 3


def escaped(text: str) -> str:
    """Return a text whose every character stands for itself."""
    return _PUNCTUATION.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """Return a text as code within a line; '' for an empty one."""
    line = one_line(text)
    if not line:
        return ""
    ticks = "`" * (_longest_run(line) + 1)
    gap = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{gap}{line}{gap}{ticks}"


def block(lines: Sequence[str]) -> list[str]:
    """Return lines as a block of code."""
    shown = [readable(part) for line in lines for part in line.split("\n")]
    fence = "`" * max(MIN_FENCE, 1 + max(map(_longest_run, shown), default=0))
    return [fence, *shown, fence]


def _longest_run(text: str) -> int:
    return max(map(len, _TICKS.findall(text)), default=0)

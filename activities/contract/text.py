"""Text that somebody else wrote: made harmless where bytes become text.

A tenant writes to consoles, into images and files, and answers as a registry. What is read of it
goes through `readable` (one line) or `one_line` (a message of several) before it gets anywhere:
what is left can be shown by a terminal, and stands on one line of whatever holds it.
"""

from __future__ import annotations

import re

UNPRINTABLE = "\N{REPLACEMENT CHARACTER}"
MAX_MESSAGE_CHARS = 4_096

# Of terminals (ECMA-48), in their forms of 7 and 8 bits: control sequences, strings such as titles
# and clipboards, and other escapes. A string ends at any other escape, as in terminals: else one
# whose end does not come would be looked for again from each further beginning within it.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[PX^_\]]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c|(?=\x1b)|\Z)"
    r"|\x1b[ -/]*[0-~]"
)


def without_escapes(text: str) -> str:
    """Return a text without what only steers a terminal."""
    return _ESCAPES.sub("", text)


def printable(text: str) -> str:
    """Return a text in which all that is no character to be shown is U+FFFD.

    That is controls, but for tabs, all line ends but for none, and what turns the direction of
    writing or has no width: such as hides what a line says.
    """
    if text.isprintable():
        return text
    return "".join(c if c == "\t" or c.isprintable() else UNPRINTABLE for c in text)


def printable_lines(text: str) -> str:
    """Return a text of perhaps several lines, each of which is `printable`."""
    if text.isprintable():
        return text
    return "\n".join(map(printable, text.split("\n")))


def readable(line: str) -> str:
    """Return what a terminal would show of a line: no escapes, and the last of a progress bar.

    What is no character that can be shown becomes U+FFFD. Takes time by its length alone.
    """
    plain = without_escapes(line)
    if "\r" in plain:
        plain = next((part for part in reversed(plain.split("\r")) if part), "")
    return printable(plain)


def one_line(text: str, most_chars: int = MAX_MESSAGE_CHARS) -> str:
    """Return a message of perhaps several lines as a readable one of at most `most_chars` and a
    word on how much was cut."""
    lines = (readable(line).strip() for line in text.split("\n"))
    return cut(" ".join(line for line in lines if line), most_chars)


def cut(text: str, most_chars: int, gone: int = 0) -> str:
    """Return a text, or its beginning and how much of it was cut.

    `gone` is how much more of it there was that is not in `text`.
    """
    left_out = max(len(text) - most_chars, 0) + gone
    if not left_out:
        return text
    return f"{text[:most_chars]}… [{left_out} more characters cut]"

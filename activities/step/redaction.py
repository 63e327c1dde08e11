"""Secrets in what others write: found as they are, and put out of sight.

Only exact values are found: what encodes a secret, or takes it apart, tells it.
"""

from __future__ import annotations

from activities.contract.text import readable

REDACTED = "[secret]"
# A shorter line of a secret, or a shorter piece of one at a cut, stands in other texts, too.
SHORTEST_LINE = 4


class Redaction:
    """Secrets, and texts without them. Adding and reading by several threads is safe."""

    def __init__(self) -> None:
        self._secrets: tuple[str, ...] = ()

    def add(self, secret: str) -> None:
        """Put `secret` out of sight from now on, and each line of it, also as a log shows them."""
        lines = [line for line in secret.splitlines() if len(line.strip()) >= SHORTEST_LINE]
        forms = {secret, *lines, *map(readable, lines)}
        if "\n" not in secret:
            forms.add(readable(secret))
        # The longest first: a shorter one may be a part of it.
        known = {form for form in (*self._secrets, *forms) if form}
        self._secrets = tuple(sorted(known, key=len, reverse=True))

    def readable(self, text: str) -> str:
        """Return a text as it may be told, without the secrets, however they read in it."""
        return self.apply(readable(self.apply(text)))

    def apply(self, text: str, *, is_begun: bool = False, is_cut: bool = False) -> str:
        """Return a text without the secrets.

        One that `is_begun` may begin inside a secret, one that `is_cut` may end inside one.
        """
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        for secret in self._secrets:
            if is_begun:
                text = _without_beginning(text, secret)
            if is_cut:
                text = _without_end(text, secret)
        return text


def _without_beginning(text: str, secret: str) -> str:
    for length in _lengths(text, secret):
        if text.startswith(secret[-length:]):
            return REDACTED + text[length:]
    return text


def _without_end(text: str, secret: str) -> str:
    for length in _lengths(text, secret):
        if text.endswith(secret[:length]):
            return text[:-length] + REDACTED
    return text


def _lengths(text: str, secret: str) -> range:
    """Return how long a piece of a secret may be that stands at an end of a text."""
    return range(min(len(secret) - 1, len(text)), SHORTEST_LINE - 1, -1)

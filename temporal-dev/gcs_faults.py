"""Faults that the GCS proxy injects on request: rules, their matching and their life."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

KINDS = {
    "status": "answer `status` (default 503, with Retry-After `retry_after`), without forwarding",
    "error_body": "answer 200 with an error in the body, without forwarding",
    "reset": "reset the connection after `after_bytes` of the request's body; nothing is stored",
    "lost_response": "forward and commit, then reset the connection instead of answering",
    "truncate": "close after `after_bytes` of the response's body, announced in full",
    "wrong_crc": "forward, but falsify the crc32c in the answer (body and X-Goog-Hash)",
    "slow": "wait `delay` seconds, then pass at most `bytes_per_second` in each direction",
}


class BadRule(ValueError):
    """A rule that makes no sense; the message says why."""


@dataclass
class Rule:
    """One fault: which requests it strikes, how often, and what it does to them."""

    kind: str
    method: str = ".*"
    path: str = ""
    operation: str = ".*"
    skip: int = 0
    count: int | None = 1
    status: int = 503
    retry_after: float | None = 0
    after_bytes: int = 0
    delay: float = 0
    bytes_per_second: float | None = None
    hits: int = field(default=0, compare=False)

    def matches(self, method: str, path: str, operation: str) -> bool:
        """Whether the rule is meant for this request; method and operation match in full."""
        return bool(
            re.fullmatch(self.method, method)
            and re.fullmatch(self.operation, operation)
            and re.search(self.path, path)
        )

    def strike(self) -> bool:
        """Count a matching request; True if this one is struck."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.count is not None and self.hits >= self.count:
            return False
        self.hits += 1
        return True


class Rules:
    """The rules in force. The first that strikes a request wins."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []

    def add(self, documents: Iterable[dict[str, Any]]) -> None:
        """Add rules from JSON documents: all of them or, if one is bad, none."""
        self._rules += [parse(document) for document in documents]

    def clear(self) -> None:
        """Forget every rule."""
        self._rules = []

    def as_json(self) -> list[dict[str, Any]]:
        """Every rule with the number of its hits so far."""
        return [dataclasses.asdict(rule) for rule in self._rules]

    def pick(self, method: str, path: str, operation: str) -> Rule | None:
        """The fault for this request, if any."""
        for rule in self._rules:
            if rule.matches(method, path, operation) and rule.strike():
                return rule
        return None


def parse(document: Any) -> Rule:
    """Build a rule; unknown fields, kinds and bad patterns are refused."""
    if not isinstance(document, dict):
        raise BadRule("a rule is a JSON object")
    known = {f.name for f in dataclasses.fields(Rule)} - {"hits"}
    if unknown := set(document) - known:
        raise BadRule(f"unknown fields {sorted(unknown)}; known are {sorted(known)}")
    if document.get("kind") not in KINDS:
        raise BadRule(f"kind is one of {sorted(KINDS)}, not {document.get('kind')!r}")
    rule = Rule(**document)
    for pattern in (rule.method, rule.path, rule.operation):
        try:
            re.compile(pattern)
        except re.error as error:
            raise BadRule(f"bad pattern {pattern!r}: {error}") from None
    return rule

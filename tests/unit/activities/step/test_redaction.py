from __future__ import annotations

import pytest

from activities.step.redaction import REDACTED, Redaction

SECRET = "hunter2-of-npm"


def redaction(*secrets: str) -> Redaction:
    made = Redaction()
    for secret in secrets:
        made.add(secret)
    return made


def test_every_occurrence_is_put_out_of_sight() -> None:
    made = redaction(SECRET, "")
    assert made.apply(f"{SECRET}:{SECRET}") == f"{REDACTED}:{REDACTED}"
    assert made.apply("nothing") == "nothing"


def test_the_longer_secret_comes_first() -> None:
    assert redaction("hunter", SECRET).apply(SECRET) == REDACTED


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_each_line_of_a_secret_counts(end: str) -> None:
    key = end.join(["-----BEGIN KEY-----", "abcdefgh", "}", "-----END KEY-----", ""])
    made = redaction(key)
    assert made.apply("abcdefgh") == REDACTED
    assert made.apply("{ }") == "{ }"
    assert made.apply(f"a{key}b") == f"a{REDACTED}b"


def test_a_secret_is_found_as_a_log_shows_it() -> None:
    assert redaction("tab\x07bell").apply("tab\N{REPLACEMENT CHARACTER}bell") == REDACTED


def test_pieces_of_a_secret_at_a_cut_are_put_out_of_sight() -> None:
    made = redaction(SECRET)
    for length in range(4, len(SECRET)):
        beginning, end = SECRET[:length], SECRET[-length:]
        assert made.apply(f"x {beginning}", is_cut=True) == f"x {REDACTED}"
        assert made.apply(f"{end} x", is_begun=True) == f"{REDACTED} x"
        assert made.apply(f"x {beginning}") == f"x {beginning}"  # all of it is told: no secret

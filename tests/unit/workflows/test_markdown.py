"""What tenants write stays text in the Markdown that Temporal's Web UI shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hypothesis import given
from markdown_it import MarkdownIt
from markdown_it.token import Token

from activities.contract.inputs import BuildInput
from activities.contract.status import BuildFailure, BuildState
from tests.support.example_template import template_config
from tests.support.hostile_text import hostile_text
from workflows.markdown import block, code, escaped
from workflows.telling import details_markdown
from workflows.timeline import Timeline

# The most that a reader of Markdown makes of it: GitHub's form, with HTML and bare addresses.
READER = MarkdownIt("gfm-like", {"html": True})
ACTIVE = {"link_open", "image", "html_inline", "html_block"}


def tokens(markdown: str) -> Iterator[Token]:
    def all_of(found: Iterable[Token]) -> Iterator[Token]:
        for token in found:
            yield token
            yield from all_of(token.children or ())

    return all_of(READER.parse(markdown))


def active(markdown: str) -> set[str]:
    """Return what of a page is more than text."""
    return {token.type for token in tokens(markdown)} & ACTIVE


def test_the_reader_finds_what_is_active() -> None:
    page = "[a](http://b.example) ![a](http://b.example/a) <b> http://b.example\n\n<div>\n"
    assert active(page) == ACTIVE


@given(hostile_text)
def test_code_is_one_piece_of_code(text: str) -> None:
    kinds = [token.type for token in tokens(f"before {code(text)} after")]
    assert kinds.count("code_inline") == (1 if code(text) else 0)
    assert not {*kinds} & ACTIVE


@given(hostile_text, hostile_text)
def test_a_block_is_one_block(first: str, second: str) -> None:
    markdown = "\n".join(["before", "", *block([first, second]), "", "after"])
    kinds = [token.type for token in tokens(markdown)]
    assert kinds.count("fence") == 1
    assert kinds.count("paragraph_open") == 2
    assert not {*kinds} & ACTIVE


def test_words_of_ours_stand_as_they_are() -> None:
    words = "Set TEMPLATE_MANAGER_MAX_ROOTFS_MB (CLI: --disk) <version> *now*."
    shown = "".join(token.content for token in tokens(escaped(words)) if token.type != "inline")
    assert shown == words


@given(hostile_text, hostile_text)
def test_a_failed_builds_page_is_inert(message: str, line: str) -> None:
    failure = BuildFailure(
        error_type="StartCommandError", message=message, hint="Do <this>.", log_tail=(line, message)
    )
    build = BuildInput(config=template_config())
    page = details_markdown(build, BuildState.FAILED, "kvm-1", Timeline(), failure)
    assert not active(page)
    found = [token.type for token in tokens(page)]
    assert found.count("fence") == 1
    assert found.count("table_open") == 1

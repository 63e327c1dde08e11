"""What stands for a build: its id, or a tag of a name."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from activities.contract.references import (
    TemplateReference,
    build_id_or_reference,
    tag_name,
    template_name,
)

BUILD = "4f2c6f0e-5d1c-4c8e-9d43-0a7c6a1b2c3d"


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("web", TemplateReference("", "web", "default")),
        ("web:stable", TemplateReference("", "web", "stable")),
        ("my_web-2:V1.0", TemplateReference("", "my_web-2", "V1.0")),
        ("acme/web:stable", TemplateReference("acme", "web", "stable")),
        ("a" * 128 + ":" + "t" * 128, TemplateReference("", "a" * 128, "t" * 128)),
        (BUILD, BUILD),
        (BUILD.upper(), BUILD),
    ],
)
def test_a_reference_is_read(text: str, means: object) -> None:
    assert build_id_or_reference(text) == means


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "web:",
        ":stable",
        "-web",
        "_web",
        "Web",
        "web.html",
        "a/b/web",
        "/web",
        "ACME/web",
        "../web",
        "web:sta/ble",
        "web:-x",
        "web:.",
        "web:a:b",
        "web\n",
        "web:a\0",
        "wéb",
        "web:٣",
        "a" * 129,
        "a:" + "t" * 129,
        f"{BUILD}:stable",
        f"web:{BUILD}",
        f"{{{BUILD}}}",
    ],
    ids=ascii,
)
def test_what_can_stand_for_nothing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="name:tag"):
        build_id_or_reference(text)


@given(st.text(max_size=30))
def test_any_text_is_a_reference_that_reads_as_it_is_written_or_none(text: str) -> None:
    try:
        found = build_id_or_reference(text)
    except ValueError:
        return
    if isinstance(found, str):
        assert uuid.UUID(found)
    else:
        assert TemplateReference.parse(str(found)) == found
        assert template_name(found.name).isascii() and tag_name(found.tag).isascii()

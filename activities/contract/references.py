"""What people call templates: a name, and tags of it that stand for published builds.

`name:tag` may be written wherever a build id is taken; `name` alone is its tag `default`, and
`tenant/name:tag` says whose it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

from activities.contract.names import TENANT_NAME, canonical_build_id

DEFAULT_TAG = "default"
MAX_TAGS_AT_ONCE = 16
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,127}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
WRONG_NAME = "must be 1 to 128 of a-z, 0-9, _ and -, none of the last two first, and no UUID"
WRONG_TAG = "must be 1 to 128 letters, digits, ., _ and -, no . or - first, and no UUID"
WRONG_REFERENCE = "must be a build's id, a UUID, or a template's name:tag"


def template_name(value: str) -> str:
    """Return a template's name. Raises ValueError for what can be none."""
    if not _NAME.fullmatch(value) or _is_build_id(value):
        raise ValueError(WRONG_NAME)
    return value


def tag_name(value: str) -> str:
    """Return a tag's name. Raises ValueError for what can be none."""
    if not _TAG.fullmatch(value) or _is_build_id(value):
        raise ValueError(WRONG_TAG)
    return value


TemplateName = Annotated[str, AfterValidator(template_name)]
TagName = Annotated[str, AfterValidator(tag_name)]


@dataclass(frozen=True)
class TemplateReference:
    """A tag of a name, as somebody has written it."""

    tenant: str
    """'' where it is left out."""
    name: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> TemplateReference:
        """Read `[tenant/]name[:tag]`. Raises ValueError."""
        whole, has_tag, tag = text.partition(":")
        tenant, has_tenant, name = whole.rpartition("/")
        if has_tenant and not TENANT_NAME.fullmatch(tenant):
            raise ValueError(WRONG_REFERENCE)
        try:
            return cls(tenant, template_name(name), tag_name(tag) if has_tag else DEFAULT_TAG)
        except ValueError:
            raise ValueError(WRONG_REFERENCE) from None

    def __str__(self) -> str:
        """Write it as people do."""
        return f"{self.tenant}/{self.name}:{self.tag}" if self.tenant else f"{self.name}:{self.tag}"


def build_id_or_reference(text: str) -> str | TemplateReference:
    """Return the canonical build id, or what else stands for a build. Raises ValueError."""
    try:
        return canonical_build_id(text)
    except ValueError:
        return TemplateReference.parse(text)


def stands_for_a_build(text: str) -> bool:
    """Whether a text may be written where a build's id is taken; there may be none of it."""
    try:
        build_id_or_reference(text)
    except ValueError:
        return False
    return True


def _is_build_id(value: str) -> bool:
    try:
        canonical_build_id(value)
    except ValueError:
        return False
    return True

"""What a template is made of: `FromImage`, a container image, or `FromTemplate`, another template.

The persisted form is `PersistedSource`, whose fields stand among those of the `TemplateConfig`.
"""

from __future__ import annotations

from pydantic import Field, model_serializer

from activities.contract.model import Model
from activities.contract.names import BuildId
from activities.contract.registry_logins import RegistryLogin


class PersistedSource(Model):
    """A source as it stands in histories and in the bucket."""

    image: str
    """For a template as base: `template <build id>`."""
    image_is_default: bool = False
    registry_auth: RegistryLogin | None = None
    from_template: BuildId | None = None
    base_alias: str = Field(default="", exclude_if=lambda alias: not alias)

    def source(self) -> Source:
        """Return what it stands for."""
        if self.from_template is not None:
            return FromTemplate(build_id=self.from_template, alias=self.base_alias)
        return FromImage(
            reference=self.image, is_own=self.image_is_default, login=self.registry_auth
        )


class FromImage(Model):
    """A container image of a registry."""

    reference: str
    """As the user wrote it; `ImageReference.parse` takes it apart."""
    is_own: bool = False
    """Whether it is the service's own `<registry>/<template_id>:<build_id>`, perhaps at a digest;
    only then may delete remove its tag."""
    login: RegistryLogin | None = None

    @property
    def own_tag(self) -> str | None:
        """The tag that delete removes: without the digest, for a registry forgets names."""
        return self.reference.partition("@")[0] if self.is_own else None

    @property
    def described(self) -> str:
        """What people see."""
        return self.reference

    @model_serializer
    def _to_persisted(self) -> PersistedSource:
        return PersistedSource(
            image=self.described, image_is_default=self.is_own, registry_auth=self.login
        )


class FromTemplate(Model):
    """The root file system of a published template."""

    build_id: BuildId
    """The template's."""
    alias: str = ""
    """The name, and the tag, by which the request has called it; '' where it was called by its id
    alone. It has told which build that is, and is kept to be told of."""

    @property
    def described(self) -> str:
        """What people see."""
        return f"template {self.build_id}"

    @model_serializer
    def _to_persisted(self) -> PersistedSource:
        return PersistedSource(
            image=self.described, from_template=self.build_id, base_alias=self.alias
        )


Source = FromImage | FromTemplate

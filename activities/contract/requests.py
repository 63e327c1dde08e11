"""What a user asks for: the image, what is done to it, the machine, and the limits."""

from __future__ import annotations

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from activities.contract.image_steps import ImageStep, Meaning
from activities.contract.model import Model
from activities.contract.names import (
    DEFAULT_TENANT,
    BuildId,
    PlainName,
    TemplateId,
    TenantName,
)
from activities.contract.network_policy import NetworkPolicy
from activities.contract.references import TagName, TemplateName
from activities.contract.registry_logins import Sealed
from activities.contract.scope import BuildScope, HostLease, VmShape
from activities.contract.sources import FromImage, FromTemplate, PersistedSource, Source
from activities.contract.units import MIB

# As a start command: what the image itself would run.
IMAGE_COMMAND = "image"
MAX_IMAGE_STEPS = 100
TEMPORAL_BYTES = 2 * MIB
"""Temporal's own limit for what an activity is given, and for what it answers."""
MAX_CONFIG_BYTES = MIB
"""Of a request, as JSON: beside it an activity may be given an image's config, layers and more."""


class Commands(Model):
    """What a template runs once it has booted."""

    start: str = ""
    ready: str = ""
    start_meaning: Meaning | None = Field(default=None, exclude_if=lambda meaning: meaning is None)
    """Whose words the start command is; None is the words of the build that runs it."""
    ready_meaning: Meaning | None = Field(default=None, exclude_if=lambda meaning: meaning is None)

    def meant_by(self, meaning: Meaning) -> Commands:
        """Return them with whose words they are, where that is not said yet."""
        return self.model_copy(
            update={
                "start_meaning": self.start_meaning or meaning,
                "ready_meaning": self.ready_meaning or meaning,
            }
        )


class TemplateConfig(Model):
    """A validated request for one template. Its limits are enforced by `api.server.validation`.

    In its persisted form the fields of `PersistedSource` stand in the place of `source`.
    """

    template_id: TemplateId
    build_id: BuildId
    source: Source
    memory_mb: int
    vcpu_count: int
    disk_size_mb: int
    kernel_version: PlainName
    firecracker_version: PlainName
    start_command: str = ""
    ready_command: str = ""
    env: dict[str, str] = Field(default_factory=dict)
    huge_pages: bool = False
    force: bool = False
    team_id: str = ""
    """What the request calls its team, where that is not the tenant; it has no effect."""
    steps: tuple[ImageStep, ...] = ()
    """What is done to the image before it becomes a template."""
    ready_timeout_seconds: float | None = None
    """For this template, instead of the one in the options."""
    tenant: TenantName = Field(
        default=DEFAULT_TENANT, exclude_if=lambda tenant: tenant == DEFAULT_TENANT
    )
    """Whose build it is, by the caller's token; never by what the request says of itself."""
    is_batch: bool = Field(default=False, exclude_if=lambda batch: not batch)
    """Whether its tenant's other builds go before it; it says nothing about the template."""
    secret_env: dict[str, Sealed] = Field(default_factory=dict, exclude_if=lambda env: not env)
    """Variables of the steps alone, each sealed for this build and its name."""
    name: TemplateName | None = Field(default=None, exclude_if=lambda name: name is None)
    """The template's; None is none."""
    tags: tuple[TagName, ...] = Field(default=(), exclude_if=lambda tags: not tags)
    """Of the name: they move to this build when it is published."""
    meaning: Meaning = Field(
        default=Meaning.DOCKER, exclude_if=lambda meaning: meaning is Meaning.DOCKER
    )
    """Whose words its steps and commands are."""
    keep_failed: bool = Field(default=False, exclude_if=lambda keep: not keep)
    """Whether the disk of a step that fails is kept; it says nothing of the template."""

    network: NetworkPolicy | None = Field(default=None, exclude_if=lambda network: network is None)
    """What steps and start command may reach; None is what the service gives by default."""

    @property
    def shape(self) -> VmShape:
        """The VM that is to boot, without what it may reach."""
        return VmShape(
            memory_mb=self.memory_mb,
            vcpu_count=self.vcpu_count,
            kernel_version=self.kernel_version,
            firecracker_version=self.firecracker_version,
            huge_pages=self.huge_pages,
        )

    def scope(self, lease: HostLease) -> BuildScope:
        """Whose work it is on the host of a lease."""
        return BuildScope(
            build_id=self.build_id, template_id=self.template_id, lease=lease, tenant=self.tenant
        )

    @property
    def runs_steps(self) -> bool:
        """Whether VMs do something to its disk before it is booted."""
        return self.has_steps or isinstance(self.source, FromTemplate)

    @property
    def has_steps(self) -> bool:
        """Whether something is done to its image: to have E2B's user in it, too."""
        return bool(self.steps) or self.meaning is Meaning.E2B

    @property
    def has_secrets(self) -> bool:
        """Whether there is something sealed in it."""
        login = self.source.login if isinstance(self.source, FromImage) else None
        return login is not None or bool(self.secret_env)

    def without_secrets(self) -> TemplateConfig:
        """Return it as it may be kept for long: without what is sealed."""
        source = self.source
        if isinstance(source, FromImage):
            source = source.model_copy(update={"login": None})
        return self.model_copy(update={"source": source, "secret_env": {}})

    def commands_on(self, base: Commands | None) -> Commands:
        """Return what is run: the request's own, and of what it leaves out its base's.

        A start command comes without the base's ready command: that asks another program.
        """
        if self.start_command or base is None:
            return Commands(start=self.start_command, ready=self.ready_command)
        if not self.ready_command:
            return base
        own = {"ready": self.ready_command, "ready_meaning": None}
        return base.model_copy(update=own)

    @model_validator(mode="before")
    @classmethod
    def _from_persisted(cls, data: object) -> object:
        if not isinstance(data, dict) or "image" not in data:
            return data
        return {**data, "source": PersistedSource.model_validate(data).source()}

    @model_serializer(mode="wrap")
    def _to_persisted(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        fields = dump(self)
        ids = {name: fields.pop(name) for name in ("template_id", "build_id")}
        persisted = {**ids, **fields.pop("source"), **fields}
        for name in ("from_template", "ready_timeout_seconds"):  # where they have always stood
            if name in persisted:
                persisted[name] = persisted.pop(name)
        return persisted


class BuildOptions(Model):
    """Time limits of a build, in seconds. Tests shorten them; users get the settings' values."""

    heartbeat_timeout_seconds: float = 30
    lease_grace_seconds: float = 60
    lease_wait_seconds: float = 24 * 3600
    """How long a build waits for a host with a free slot."""
    pull_timeout_seconds: float = 1800
    provision_timeout_seconds: float = 300
    image_step_timeout_seconds: float = 3600
    rootfs_timeout_seconds: float = 3600
    ready_timeout_seconds: float = 300
    upload_timeout_seconds: float = 3600
    teardown_timeout_seconds: float = 600
    max_hosts: int = 5
    """How many hosts a build may lose before it fails."""
    retry_attempts: int = 5
    retry_initial_seconds: float = 1
    retry_maximum_seconds: float = 30

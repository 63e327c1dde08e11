"""What a user asks for: the image, what is done to it, the machine, and the limits."""

from __future__ import annotations

from pydantic import Field

from activities.contract.image_steps import ImageStep
from activities.contract.model import Model
from activities.contract.names import BuildId, PlainName, TemplateId
from activities.contract.registry_logins import RegistryLogin

# As a start command: what the image itself would run.
IMAGE_COMMAND = "image"
MAX_IMAGE_STEPS = 100


class TemplateConfig(Model):
    """A validated request for one template. Its limits are enforced by `api.server.validation`."""

    template_id: TemplateId
    build_id: BuildId
    image: str
    image_is_default: bool = False
    """True when the image is the service's own `<registry>/<template_id>:<build_id>`; only then
    may delete remove its tag."""
    registry_auth: RegistryLogin | None = None
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
    steps: tuple[ImageStep, ...] = ()
    """What is done to the image before it becomes a template."""
    from_template: BuildId | None = None
    """The template whose root file system is the base, instead of `image`."""
    ready_timeout_seconds: float | None = None
    """For this template, instead of the one in the options."""


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

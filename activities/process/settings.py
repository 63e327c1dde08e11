"""The one place for settings: environment variables `TEMPLATE_MANAGER_…`.

Temporal's own connection is not here: `temporalio.envconfig` reads `TEMPORAL_…` and the same TOML
profiles as Temporal's CLI. The bucket's emulator, if any, is Google's own `STORAGE_EMULATOR_HOST`,
and Docker's socket Docker's own `DOCKER_HOST`.
"""

from __future__ import annotations

import socket
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, StringConstraints
from pydantic_settings import BaseSettings, SettingsConfigDict

from activities.contract.image_reference import ImageReference
from activities.contract.names import HostName, PlainName
from activities.contract.requests import BuildOptions

# What a frozen host may still have under way when its lease has run out.
LONGEST_UPLOAD_REQUEST_SECONDS = 60


RegistryHost = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]+(:[0-9]+)?$")]
"""`host` or `host:port`."""
ImagePrefix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9.-]+(:[0-9]+)?(/[^/:@]+)*$")]
"""A registry, or a path of repositories in it."""


def _default_host() -> HostName:
    return socket.gethostname().replace("_", "-")[:63] or "host"


class Settings(BaseSettings):
    """Settings of the API, the workers and the hosts. Sizes: `_mb` is MiB, times are seconds."""

    model_config = SettingsConfigDict(env_prefix="TEMPLATE_MANAGER_", extra="ignore")

    # Every process
    log_format: Literal["json", "console"] = "json"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    ready_file: Path | None = None
    """Created when the process is ready to serve, removed when it ends."""
    metrics_address: str = ""
    """Where Prometheus finds this process, such as 127.0.0.1:9464; '' is nowhere."""
    health_address: str = ""
    """Where /livez and /readyz are served, such as 127.0.0.1:9465; "" is nowhere."""
    bucket: str = "template-manager-dev"
    insecure_registries: tuple[str, ...] = ()
    """Registries (`host:port`) that speak plain HTTP, as a JSON list; hosts go by Docker's own."""
    internal_registries: tuple[IPv4Network | IPv6Network | RegistryHost, ...] = ()
    """Registries of the inside that may be called: `host`, `host:port` and networks.

    An operator who sets `registry` has named it, too.
    """
    registry_mirrors: dict[RegistryHost, ImagePrefix] = {}
    """What is asked instead of a registry (`docker.io`) by builds that do not log in to it."""
    host_login_registries: tuple[ImagePrefix, ...] = ()
    """Registries, or paths in them, that get the host's own credentials: `docker login`, Google."""
    secret_keys: SecretStr = SecretStr("")
    """Comma-separated `<key id>:<base64 of 32 bytes>`; the first seals, all open."""
    tenants_file: Path | None = None
    """What each tenant may use, see `activities.process.tenants_file`; API and workers read it."""
    registry_seconds: Annotated[float, Field(ge=1)] = 60
    """What asking a registry for an image may take, all its answers but the layers together."""
    sweep_interval_seconds: Annotated[float, Field(ge=1)] = 600
    layer_max_age_hours: Annotated[float, Field(ge=0)] = 7 * 24
    """Of the workers: layers in the bucket that nobody needs, nor has used since, are removed."""

    # API
    api_address: str = "127.0.0.1:5008"
    tls_cert: Path | None = None
    """The API's certificate chain (PEM); with `tls_key` it speaks TLS."""
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    """The API takes only clients with a certificate of this authority (mTLS)."""
    tokens_file: Path | None = None
    """Bearer tokens, see `api.server.access`."""
    no_authentication: bool = False
    """Whether all who can connect may do everything, also at an address that others can reach."""
    calls_per_second: Annotated[float, Field(gt=0)] = 50
    """For each token, or each address when there are no tokens."""
    calls_burst: Annotated[int, Field(ge=1)] = 200
    calls_at_once: Annotated[int, Field(ge=1)] = 1000
    """So many calls of one token, or address, may be running: who follows a log stays."""
    max_request_kb: Annotated[int, Field(ge=256, le=1536)] = 1024
    """How large a request may be, to the gRPC API and to REST; Temporal takes 2 MiB."""
    request_seconds: Annotated[float, Field(gt=0)] = 30
    """So long head and body of a REST request may take to come, and its answer to be read, each."""
    max_running_builds: Annotated[int, Field(ge=0)] = 0
    """A create or retry above it is RESOURCE_EXHAUSTED; 0 is no limit."""
    registry: str = "127.0.0.1:5000"
    """Where images without `from_image` are: `<registry>/<template_id>:<build_id>`."""
    default_network: Literal["internet", "none"] = "internet"
    """What steps and start commands may reach whose requests do not say; less where the tenant may
    not so much."""
    default_kernel_version: PlainName = "vmlinux-6.1"
    default_firecracker_version: PlainName = "v1.13.1"
    rest_address: str = "127.0.0.1:5009"
    """Where `template-manager rest` listens; the TLS files are for it, too."""
    drain_seconds: float = 20
    web_ui_address: str = "http://127.0.0.1:8233"

    # Limits of a build, handed to the workflow as its options
    build: BuildOptions = BuildOptions()

    # KVM host
    host: HostName = Field(default_factory=_default_host)
    host_slots: Annotated[int, Field(ge=1, le=1000)] = 2
    host_memory_mb: Annotated[int, Field(ge=0)] = 0
    """What the VMs of all builds may take together; 0 is what the machine has but for a tenth."""
    data_dir: Path = Path("/var/lib/template-manager")
    kernels_dir: Path = Path("/fc-kernels")
    firecracker_dir: Path = Path("/fc-versions")
    guest_agent_path: Path | None = None
    require_guest_agent: bool = False
    """Of the API and the hosts: without an agent, and its version, nothing is built."""
    busybox_path: Path = Path("/bin/busybox")
    """A static busybox; Debian's package busybox-static has it."""
    dns_server: Annotated[str, StringConstraints(pattern=r"^[0-9A-Fa-f.:]+$")] = "8.8.8.8"
    denied_networks: tuple[IPv4Network, ...] = ()
    """What no guest may reach besides the host and what is not public, as a JSON list."""
    kernel_arguments: Annotated[str, StringConstraints(pattern=r"^[ -~]*$", max_length=1000)] = ""
    """What guest kernels are given besides what we say; of two words for a thing the last holds."""
    equal_pages_once: bool = True
    """Whether a memory file's equal pages are one in the bucket: not for an orchestrator of E2B's
    that is older than June 2026, which would pause such sandboxes with wrong memory."""
    use_jailer: bool = True
    """Whether Firecracker runs in its jailer, where one lies beside it."""
    vm_first_user: Annotated[int, Field(ge=1000, lt=2**32 - 100_000)] = 30_000
    """Each VMM runs as a user, and group, of its own from this number on; none needs an account."""
    vm_users: Annotated[int, Field(ge=1, le=100_000)] = 1000
    """How many of these numbers there are: as many VMs may run on the machine."""
    vm_overhead_mb: Annotated[int, Field(ge=16)] = 256
    """What a VMM may take besides its guest's memory."""
    min_free_disk_mb: Annotated[int, Field(ge=0)] = 2048
    """Stays free on the disks of DATA_DIR and of Docker: a host with less takes no new build, and a
    pull that would leave less is given up."""
    drive_mb_per_second: Annotated[int, Field(ge=0)] = 0
    """How much a guest may read and write of each of its disks; 0 is no limit."""
    drive_ops_per_second: Annotated[int, Field(ge=0)] = 0
    """How often it may; 0 is no limit."""
    resume_seconds: Annotated[float, Field(ge=1, le=600)] = 30
    """How long a resumed guest may take to answer a ping."""
    max_console_mb: Annotated[int, Field(ge=1, le=1024)] = 16
    """What is kept of a guest's console: of its own lines, and again of its commands' output."""
    max_log_line_chars: Annotated[int, Field(ge=256, le=16 * 1024)] = 4096
    """How long a line of a build's log may be; the rest of it is cut, and told."""
    max_step_log_mb: Annotated[int, Field(ge=1, le=1024)] = 8
    """What a step of a build may log, its warnings and errors besides."""
    max_live_log_lines: Annotated[int, Field(ge=100, le=20_000)] = 5000
    """How much of a build's log is told while it runs, and kept by Temporal; then there is only
    the file. Of both that comes first."""
    max_live_log_mb: Annotated[int, Field(ge=1, le=32)] = 16
    disk_check_seconds: Annotated[int, Field(ge=1)] = 600
    """What e2fsck may take for a disk; a guest may have written it."""
    max_rootfs_mb: int = 64 * 1024
    max_image_mb: Annotated[int, Field(ge=1)] = 16 * 1024
    """Of all layers of an image, as they are sent."""
    max_unpacked_image_mb: Annotated[int, Field(ge=1)] = 64 * 1024
    """Of all layers that are fetched, holes of sparse files included."""
    max_image_entries: Annotated[int, Field(ge=1)] = 2_000_000
    """Files, directories and links that an image may have."""
    max_image_path_bytes: Annotated[int, Field(ge=1, le=4090)] = 4000
    """How long a path in an image may be; the kernel takes 4095."""
    tree_memory_mb: Annotated[int, Field(ge=256)] = 1024
    """What a child process may take that reads or copies an image's files."""
    max_files_mb: Annotated[int, Field(ge=1)] = 10 * 1024
    """Limit of the tar that a COPY's files come in."""
    image_step_memory_mb: Annotated[int, Field(ge=128)] = 1024
    """What the VM of one step has, unless the template has more."""
    checkpoint_max_age_hours: Annotated[float, Field(ge=0)] = 7 * 24
    """Checkpoints that no build has used for longer are removed."""
    checkpoint_max_mb: Annotated[int, Field(ge=0)] = 200 * 1024
    """When all checkpoints of a host take more, those unused for longest are removed."""
    accepted_cves: tuple[str, ...] = ()
    """Holes of this host's tools with which it starts all the same, as a JSON list of CVEs."""
    restart_grace_seconds: float = 5
    """How long a restarted host waits for its own builds before it takes new ones."""

    # Uploads
    upload_chunk_mb: Annotated[int, Field(ge=1, le=1024)] = 32
    upload_workers: Annotated[int, Field(ge=1, le=64)] = 4

    @property
    def late_arrival_seconds(self) -> float:
        """Return after how long a host that has lost a build can no longer write to the bucket."""
        limits = self.build
        return (
            limits.heartbeat_timeout_seconds
            + limits.lease_grace_seconds
            + LONGEST_UPLOAD_REQUEST_SECONDS
        )

    @property
    def allowed_inside(self) -> tuple[IPv4Network | IPv6Network | RegistryHost, ...]:
        """Return all that an operator has named of the inside."""
        own = (self.registry,) if "registry" in self.model_fields_set else ()
        named = (*own, *self.registry_mirrors.values())
        return (*self.internal_registries, *(name.partition("/")[0] for name in named))

    def lends_host_login_to(self, reference: ImageReference) -> bool:
        """Whether the host's own credentials may be used for that image."""
        return any(
            f"{reference.name}/".startswith(f"{prefix}/") for prefix in self.host_login_registries
        )

    def kernel_path(self, version: PlainName) -> Path:
        """Return where the kernel of that version must be on a host."""
        return self.kernels_dir / version / "vmlinux.bin"

    def firecracker_path(self, version: PlainName) -> Path:
        """Return where the Firecracker of that version must be on a host."""
        return self.firecracker_dir / version / "firecracker"


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """Read the settings once per process."""
    return Settings()

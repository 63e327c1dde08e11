"""A stack's place, addresses and the environment of the product's processes."""

from __future__ import annotations

import base64
import dataclasses
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from devstack import processes
from devstack.ports import StackPorts
from devstack.processes import ProcessFiles

HERE = Path(__file__).resolve().parents[1]
"""`temporal-dev/`."""
REPOSITORY = HERE.parent
DOCKER_SOCKET = "/var/run/docker.sock"
DEFAULT_STATE_DIR = "/var/lib/template-manager-dev"
DEFAULT_BUCKET = "template-manager-dev"
FIRECRACKER_VERSION = "v1.13.1"


# What a developer sets for the product reaches it, unless the stack itself decides it.
APP_PREFIXES = ("TEMPLATE_MANAGER_", "TEMPORAL_")


def state_dir() -> Path:
    """Where the dev stack keeps everything."""
    return Path(os.environ.get("TEMPLATE_MANAGER_DEV_DIR", DEFAULT_STATE_DIR))


@dataclass(frozen=True)
class StackEnvironment:
    """A stack's place and addresses, from which the product's environment follows."""

    state_dir: Path
    ports: StackPorts
    bucket: str = DEFAULT_BUCKET
    kernels_dir: Path | None = None
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def files(self, name: str) -> ProcessFiles:
        """Record, log and ready mark of one of its processes."""
        return ProcessFiles.under(self.state_dir, name)

    @property
    def kernels(self) -> Path:
        """The guest kernels: its own, or those of another stack (they take time to make)."""
        return self.kernels_dir or self.state_dir / "fc-kernels"

    @property
    def kernel_version(self) -> str | None:
        """The guest kernel that is ready, if one is."""
        mark = self.state_dir / "run" / "kernel-version"
        version = mark.read_text().strip() if mark.exists() else ""
        return version if version and (self.kernels / version / "vmlinux.bin").exists() else None

    @property
    def firecracker(self) -> Path:
        """The launcher that the product takes for Firecracker."""
        return self.state_dir / "fc-versions" / FIRECRACKER_VERSION / "firecracker"

    def variables(self) -> dict[str, str]:
        """What the product's processes, its CLI and Temporal's and Google's clients need."""
        prefix = "TEMPLATE_MANAGER_"
        values = {
            "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{self.ports.gcs}",
            "TEMPORAL_ADDRESS": f"127.0.0.1:{self.ports.temporal}",
            f"{prefix}API_ADDRESS": f"127.0.0.1:{self.ports.api}",
            f"{prefix}BUCKET": self.bucket,
            f"{prefix}DATA_DIR": str(self.state_dir / "data"),
            f"{prefix}DEFAULT_FIRECRACKER_VERSION": FIRECRACKER_VERSION,
            # Guests send nothing off this machine unless a build asks (`--network internet`)
            # or whoever starts the stack wants it so for all of them.
            f"{prefix}DEFAULT_NETWORK": os.environ.get(f"{prefix}DEFAULT_NETWORK", "none"),
            f"{prefix}FIRECRACKER_DIR": str(self.firecracker.parent.parent),
            # Registries of this machine: the stack's own, and those that tests run.
            f"{prefix}INTERNAL_REGISTRIES": '["127.0.0.0/8"]',
            f"{prefix}KERNELS_DIR": str(self.kernels),
            f"{prefix}REST_ADDRESS": f"127.0.0.1:{self.ports.rest}",
            f"{prefix}REGISTRY": f"127.0.0.1:{self.ports.registry}",
            f"{prefix}SECRET_KEYS": secret_keys(self.state_dir),
            # The emulator stores a part in memory: small ones go through it faster.
            f"{prefix}UPLOAD_CHUNK_MB": "8",
            f"{prefix}WEB_UI_ADDRESS": f"http://127.0.0.1:{self.ports.temporal_ui}",
        }
        if version := self.kernel_version:
            values[f"{prefix}DEFAULT_KERNEL_VERSION"] = version
        return values | dict(self.overrides)


def secret_keys(directory: Path) -> str:
    """The key that seals registry passwords, made at first use and readable by its owner only."""
    path = directory / "secret-keys"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        key = base64.b64encode(secrets.token_bytes(32)).decode()
        processes.write_atomically(path, f"k1:{key}\n", mode=0o600)
    return path.read_text().strip()


def environment(ports: StackPorts | None = None) -> StackEnvironment:
    """The stack of this machine, as the environment variables describe it."""
    bucket = os.environ.get("TEMPLATE_MANAGER_BUCKET", DEFAULT_BUCKET)
    return StackEnvironment(state_dir(), ports or StackPorts.from_environment(), bucket)

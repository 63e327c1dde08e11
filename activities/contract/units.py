"""Units of size. Fields that end with `_mb` are in MiB, as everywhere in E2B's API."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

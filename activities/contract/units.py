"""Units of size. Fields that end with `_mb` are in MiB, as everywhere in E2B's API."""

from __future__ import annotations

MIB = 1024 * 1024

"""The base of everything that is sent or kept."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Model(BaseModel):
    """Base of all models here: immutable. Unknown fields are ignored, so that workers of two
    versions can talk to each other during an upgrade."""

    model_config = ConfigDict(frozen=True)

"""How large an image's config may be: it goes through Temporal, to one activity after the other."""

from __future__ import annotations

from activities.contract.errors import ImageUnusableError
from activities.contract.results import MAX_IMAGE_CONFIG_BYTES, ImageConfig


def require_small_config(config: ImageConfig, whose: str) -> None:
    """Raise ImageUnusableError for a config that is too large; `whose` names it in the message."""
    if config.kept_bytes > MAX_IMAGE_CONFIG_BYTES:
        raise ImageUnusableError(
            f"the config of {whose} (variables, command and the like) has {config.kept_bytes} "
            f"bytes; at most {MAX_IMAGE_CONFIG_BYTES} are taken",
            hint="Put what is so long into files of the image.",
        )

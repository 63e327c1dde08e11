"""The login of registries that want one."""

from __future__ import annotations

USER = "robot"
PASSWORD = "s3cret-pass-word-1234"
# Of the user and password above, by bcrypt: the only form that docker-registry reads.
HTPASSWD = f"{USER}:$2b$04$VrQMl5EQRxMnyzstjuvi9uoOacZkFwiD58Y5YCm7NLIFoqF7XHyzi\n"

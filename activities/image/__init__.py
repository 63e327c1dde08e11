"""Container images: registries, this host's dockerd, and steps on top of an image.

Imports what is below. The only room, with `rootfs`, that talks to Docker.
"""

"""Work on real things: images, disks, VMs, the bucket. A room for each, in floors; imports go down.

contract ← process, disk ← store ← step ← image ← rootfs, microvm ← template ← host. Nothing here
knows `workflows` or `api`.
"""

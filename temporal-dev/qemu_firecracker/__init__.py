"""A stand-in for Firecracker with QEMU behind it, for machines without working KVM.

It takes Firecracker's command line and speaks its API; it needs nothing but Python and QEMU. It
plays one version, `FIRECRACKER_VERSION`, and what it cannot do it refuses, naming itself;
docs/firecracker.md has the differences. From the outside in:

- `cli`: arguments, exit codes, the loop that serves one request after the other
- `http`: HTTP on the unix socket, as Firecracker's own server speaks it
- `api`: from a request to an action
- `schema`: the JSON bodies, as strict as Firecracker's
- `machine`: what is allowed when; the life of one VM
- `qemu`, `qmp`: the QEMU process and its control connection
- `mmds`, `mmds_link`: the metadata service, and a guest's connection to it
- `memory`, `snapfile`, `clock`, `serial`, `files`, `tap`, `log`: one thing of the real world each
"""

FIRECRACKER_VERSION = "1.16.1"

# The mark goes into the metadata of templates: the real one cannot resume them.
VERSION = f"{FIRECRACKER_VERSION}-qemu"

"""A stand-in for Firecracker with QEMU behind it, for machines without working KVM.

It takes Firecracker's command line and speaks its API; it needs nothing but Python and QEMU. What
it cannot do it refuses, naming it. From the outside in:

- `cli`: arguments, exit codes, the loop that serves one request after the other
- `api`: HTTP on the unix socket, from a request to an action
- `schema`: the JSON bodies, as strict as Firecracker's
- `machine`: what is allowed when; the life of one VM
- `qemu`, `qmp`: the QEMU process and its control connection
- `memory`, `snapfile`, `files`, `tap`, `log`: one thing of the real world each
"""

VERSION = "1.13.1-qemu"

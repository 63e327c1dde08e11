"""The bucket: its one client, the names and formats of its objects, and reading templates back.

Imports `contract`, `process` and `disk`. Knows nothing of hosts' steps, Docker or VMs.
"""

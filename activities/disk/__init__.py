"""The host's disk and kernel: paths, sparse files, locks, mounts, ext4, namespaces.

Imports `contract`. Knows neither Temporal nor the bucket, and no build but by its id.
"""

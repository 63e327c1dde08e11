"""A VM's life: network, VMM process, console, clock, snapshot, resume.

Imports what is below `image`. Knows neither Docker nor the bucket.
"""

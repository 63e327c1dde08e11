"""An image as an ext4 that boots: flattening, provisioning, and what we put into a guest.

Imports `image` and what is below. Does not know VMs or templates.
"""

"""An image as an ext4 that boots: looking into it, flattening it, and what we put into a guest.

Imports `image` and what is below. Does not know VMs or templates.
"""

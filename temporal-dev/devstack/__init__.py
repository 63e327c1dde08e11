"""What stands in for production on one machine, for developers and tests.

Knows the product by its command line and settings, but for `workbench`, which tests single rooms.
"""

"""The gRPC server: checks requests, starts and ends workflows, tells of builds.

Imports `activities.contract`, `.process`, `.store`, the workflows that it starts, and no client.
"""

"""The gRPC server: checks requests, starts and ends workflows, tells of builds.

Imports `activities.contract`, `.process`, `.store` and the workflows that it starts.
"""

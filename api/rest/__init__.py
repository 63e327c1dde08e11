"""The REST API that E2B's SDKs speak: a client of our gRPC API that translates between both.

Imports `api.client` and what is below. Keeps nothing: what it must know again is in the ids.
"""

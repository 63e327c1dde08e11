"""A client of the gRPC API, with its credentials and errors in words.

Imports `api.pb`, `api.errors` and `api.pem`.
"""

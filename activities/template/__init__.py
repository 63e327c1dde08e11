"""A template in the bucket: upload, publish, undo, delete.

Imports what is below. Does not know where its files come from but by their checkpoint.
"""

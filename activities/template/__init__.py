"""A template in the bucket: layers, upload, publish, undo, delete; and its disk, to build upon.

Imports what is below. Does not know where its files come from but by their checkpoint.
"""

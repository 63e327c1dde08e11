"""The steps of a request, each done by a microVM on the disk that becomes the template's.

Imports what is below. Does not know where the first disk comes from, nor templates.
"""

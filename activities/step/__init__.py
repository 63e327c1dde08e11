"""A step at work on a host: its lease, its heartbeat, its log, and what it leaves for the next.

Imports what is below. Does not know what any step does.
"""

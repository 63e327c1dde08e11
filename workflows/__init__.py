"""The durable builds: deterministic workflows, their limits, undos and what they tell.

Sees `activities.contract` alone and does no I/O.
"""

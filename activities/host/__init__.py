"""A KVM host as a whole: its worker, holds, admission, facts, doctor and sweep.

The top floor: it puts the other rooms together, and nothing imports it but the command line.
"""

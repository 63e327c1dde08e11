"""What `api`, `workflows` and `activities` agree on: names, requests, inputs, results, errors.

Plain data: imports nothing of ours, does no I/O, and is all that `workflows` sees.
What is here is written into histories, the bucket and hosts' disks: it is compatibility data.
"""

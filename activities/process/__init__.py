"""What every process of ours needs: settings, logs, traces, metrics, health, Temporal, secrets.

Imports `contract`. Knows nothing of images, disks, VMs or templates.
"""

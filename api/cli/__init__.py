"""The command line. The only room that starts programs: the server, the worker, the host.

Commands load what they start only when they start it, so that `--help` is quick.
"""

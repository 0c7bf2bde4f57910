"""A real two-node Kubernetes on one Linux machine, for development and tests.

Stdlib only, so that `python3 -m cluster up` works before any virtual environment exists. See `cluster/README.md`.
"""

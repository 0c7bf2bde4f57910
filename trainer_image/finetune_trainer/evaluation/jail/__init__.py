"""Runs one untrusted program: `python -m finetune_trainer.evaluation.jail`, a request on stdin, a verdict on stdout.

Two processes: a small supervisor (`__main__`) that watches, kills and reports, and a child (`inmate`) that takes every right
from itself and then becomes the program. Nothing here needs a privilege, so it works in a pod of uid 1000 without
capabilities and without user namespaces. Standard library only.
"""

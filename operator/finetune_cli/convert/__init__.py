"""`finetune convert`: a LLaMA-Factory configuration becomes a FineTuneJob, every key accounted for.

`keys` is the table of all keys, `rules` translates those that have a counterpart, `datasets` and `deepspeed` resolve the files
that a configuration names, `emit` writes the manifest, `page` the documentation. Nothing here reads the cluster or needs more
than PyYAML.
"""

from finetune_cli.convert.command import main

__all__ = ["main"]

"""Logging of the trainer: one readable line an event, and silence from libraries that have nothing to say."""

import logging
import sys
import time
import warnings

QUIET = (
    "DeepSpeed",
    "deepspeed",
    "transformers",
    "peft",
    "accelerate",
    "urllib3",
    "httpx",
    "huggingface_hub",
    "filelock",
    "wandb",
)


def setup_logging(rank: int | None) -> None:
    """Lines go to stderr with a UTC time; of the ranks only the first tells more than warnings.

    Args:
        rank: the global rank; None in the supervisor.
    """
    who = "supervisor" if rank is None else f"rank {rank}"
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank in (None, 0) else logging.WARNING,
        format=f"%(asctime)s.%(msecs)03dZ {who} %(levelname)s %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
        force=True,
    )
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    for text in (".*barrier.*device.*", ".*torch.distributed.*", ".*lr_scheduler.*", ".*use_reentrant.*", ".*TF32.*"):
        warnings.filterwarnings("ignore", message=text)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)

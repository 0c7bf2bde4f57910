"""`python -m finetune_operator`: see `--help`."""

import gc
import logging
import os
import sys

from finetune_operator.config import resolve_config
from finetune_operator.shell.run import run


def main() -> int:
    """Runs the operator; returns its exit code."""
    config = resolve_config(sys.argv[1:], os.environ)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLevelName(config.log_level)))
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    # What was imported never becomes garbage, and objects of the API come and go by the hundred.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    return run(config)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m finetune_operator`: see `--help`."""

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
    return run(config)


if __name__ == "__main__":
    sys.exit(main())

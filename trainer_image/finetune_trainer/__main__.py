"""Runs one pod's share of a job: `python -m finetune_trainer --launch launch.json`.

`finetune run` starts the same command on one's own machine, with `--termination-log report.json`, since /dev/termination-log
exists in containers only, and `--http-host 127.0.0.1`.
"""

import signal
import sys

_early: list[int] = []
# As process 1 of a container, SIGTERM is ignored until a handler stands: it stands before anything heavy is imported.
for _signal in (signal.SIGTERM, signal.SIGINT):
    signal.signal(_signal, lambda number, _frame: _early.append(number))

from finetune_trainer.supervisor import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], stop_requests=_early))

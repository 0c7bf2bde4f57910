"""Does what an environment variable says: ends well, or waits to be told to stop and takes a moment to save."""

import json
import os
import signal
import sys
import time
from pathlib import Path

arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
report = Path(arguments["--termination-log"])
launch = json.loads(Path(arguments["--launch"]).read_text())
stops: list[int] = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda n, _: stops.append(n))
print("started", arguments["--http-host"], os.environ.get("GREETING"), os.getpid(), flush=True)
if os.environ["STUB"] == "wait":
    while not stops:
        time.sleep(0.01)
    # A killed parent's signal comes once for each of its threads that was handed the child on the way.
    assert set(stops) == {signal.SIGTERM}, "a terminal's Ctrl-C comes through `finetune run` alone"
    time.sleep(0.3)
    report.write_text(json.dumps({"reason": "Terminated", "message": "saved", "step": 7, "lastCheckpointStep": 7}))
    print("saved", flush=True)
    sys.exit(143)
report.write_text(json.dumps({"step": 9, "totalSteps": 9, "baseEvalLoss": 2.5, "evalLoss": 1.5}))

"""`make down`: removes what the other targets started. Standard library only."""

import json
import sys
from collections.abc import Sequence

from demo import ours
from demo.commands import CommandError, run
from demo.kube import Kubectl
from demo.preflight import cache_dir
from demo.setup import NAMESPACE


def down(arguments: Sequence[str]) -> int:
    """Removes the cluster or, from a cluster that was there before, everything of ours; returns the exit status.

    Args:
        arguments: of `python3 -m cluster down`, such as `--purge`.
    """
    log = cache_dir() / "log" / "down.log"
    cluster = [sys.executable, "-m", "cluster"]
    try:
        info = json.loads(run([*cluster, "info"], log))
        if info["provider"] == "kubeconfig" and info["running"]:
            binary = run([*cluster, "tool", "kubectl"], log).strip()
            for kept in ours.remove(Kubectl(binary, info["kubeconfig"], NAMESPACE, log)):
                print(f"down: kept {kept}")
        run([*cluster, "down", *arguments], log)
        kept = "" if "--purge" in arguments else f"; what was built and downloaded stays in {cache_dir()}"
        print(f"down: nothing of ours runs any more{kept}")
    except CommandError as error:
        print(f"failed: {error}\n  log: {log}", file=sys.stderr)
        return 1
    return 0

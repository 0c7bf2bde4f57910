"""The demo proper, in the project's environment: sets up, trains, and shows what came out. Start it with `make demo`."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from demo import commands
from demo.board import TableBoard
from demo.kube import Kubectl
from demo.lines import LineBoard, duration
from demo.ours import RELEASE
from demo.preflight import cache_dir
from demo.setup import NAMESPACE, Setup
from demo.steps import run_all
from demo.volume import CLAIM

EXAMPLE = "examples/smollm2-lora.yaml"
JOB = "smollm2-lora"
TRAINING_USUAL = "5 min"


def main() -> int:
    """Runs the demo and returns its exit status."""
    commands.end_with_parent()
    console = Console(highlight=False)
    console.print(
        "finetune-operator demo: a cluster, the operator, and a FineTuneJob that trains SmolLM2-135M-Instruct.\n"
        f"Logs: {cache_dir() / 'log' / 'demo'}\n",
        soft_wrap=True,
    )
    started = time.monotonic()
    setup = Setup()
    try:
        steps = setup.steps()
        with TableBoard(console) if console.is_terminal else LineBoard() as board:
            run_all(steps, board)
        console.print(f"\nset up in {duration(time.monotonic() - started)}")
        return _train(console, setup.kubectl(cache_dir() / "log" / "demo" / "job.log"), started)
    except commands.CommandError as error:
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        print(f"\nfailed: {error}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        commands.end_all()
        print("\nstopped; run `make demo` again to go on, or `make down` to remove everything", file=sys.stderr)
        return 130


def _train(console: Console, kubectl: Kubectl, started: float) -> int:
    old = kubectl.find("finetunejob", JOB)
    if old is not None and old.get("status", {}).get("state") in ("Complete", "Failed"):
        console.print(f"deleting the job of an earlier run: kubectl delete finetunejob {JOB}")
        kubectl("delete", "finetunejob", JOB, "--wait=true")
    console.print(f"kubectl apply -f {EXAMPLE}    (usually {TRAINING_USUAL})\n")
    kubectl("apply", "-f", EXAMPLE)
    begun = time.monotonic()
    # Its own process, as a user starts it; the bar needs the terminal.
    status = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "follow", JOB, "--namespace", NAMESPACE],
        env={**os.environ, "KUBECONFIG": kubectl.kubeconfig},
        check=False,
    ).returncode
    job = kubectl.find("finetunejob", JOB) or {}
    if status:
        message = job.get("status", {}).get("message", "")
        print(f"\nfailed: the job is not Complete: {message}", file=sys.stderr)
        print(f"  hint: kubectl -n {NAMESPACE} describe finetunejob {JOB}", file=sys.stderr)
        return 1
    now = time.monotonic()
    console.print(f"\ntrained in {duration(now - begun)}, {duration(now - started)} in all\n")
    console.print(_losses(job))
    console.print(_next(kubectl, job), markup=False, soft_wrap=True)
    return 0


def _losses(job: dict[str, Any]) -> Table:
    progress = job["status"]["progress"]
    base, tuned = float(progress["baseEvalLoss"]), float(progress["evalLoss"])
    table = Table(title="held-out loss (nats a token, lower is better)", title_justify="left")
    for column in ("SmolLM2-135M-Instruct", "tuned", "change"):
        table.add_column(column, justify="right")
    table.add_row(f"{base:.4f}", f"{tuned:.4f}", f"{tuned - base:+.4f} ({(tuned - base) / base:+.1%})")
    return table


def _next(kubectl: Kubectl, job: dict[str, Any]) -> str:
    output = job["status"]["plan"]["outputUri"]
    found = _on_this_machine(kubectl, output.removeprefix("pvc://").partition("/")[2])
    where = f"The adapter: {output}" + (f", here {found}" if found else "")
    alias = "" if shutil.which("kubectl") == kubectl.binary else f"  alias kubectl={kubectl.binary}\n"
    metrics = f"/api/v1/namespaces/{NAMESPACE}/services/{RELEASE}-metrics:8080/proxy/metrics"
    return (
        f"\nNext:\n  export KUBECONFIG={kubectl.kubeconfig}\n{alias}"
        f"  kubectl config set-context --current --namespace={NAMESPACE}\n"
        "  kubectl get finetunejobs -o wide\n"
        f"  kubectl describe finetunejob {JOB}\n"
        f"  kubectl logs -l finetune.dev/job-name={JOB}\n"
        f"  kubectl get --raw {metrics}\n"
        "  kubectl explain finetunejob.spec.training\n"
        f"\n{where}\n"
        "\nOther jobs to apply are in examples/. `make down` removes the cluster."
    )


def _on_this_machine(kubectl: Kubectl, folder: str) -> Path | None:
    """The exported folder, where the cluster's volumes are folders of this machine."""
    claim = kubectl.find("persistentvolumeclaim", CLAIM) or {}
    volume = kubectl.find("persistentvolume", claim.get("spec", {}).get("volumeName", "")) or {}
    path = volume.get("spec", {}).get("hostPath", {}).get("path")
    found = Path(path) / folder if path else None
    return found if found is not None and found.is_dir() else None


if __name__ == "__main__":
    sys.exit(main())

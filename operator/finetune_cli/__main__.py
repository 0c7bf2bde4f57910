"""Entry point of `finetune` (also `python -m finetune_cli`).

Each command's module is imported only when it is used: `run` works without the Kubernetes client, `follow` without the trainer.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from finetune_cli import convert_options
from finetune_cli.errors import CliError

EXTRAS = {"convert": "cli", "follow": "cli", "run": "trainer"}
"""The extra with which each command's packages are installed."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    parser = argparse.ArgumentParser(prog="finetune", description="Work with FineTuneJobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_follow(commands)
    _add_run(commands)
    convert_options.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        module = importlib.import_module(f"finetune_cli.{options.command}")
    except ModuleNotFoundError as error:
        extra = EXTRAS[options.command]
        print(
            f"finetune: `{error.name}` is not installed: pip install 'finetune-operator[{extra}]' (or `pip install "
            f"'.[{extra}]'` in a checkout)",
            file=sys.stderr,
        )
        return 2
    try:
        status: int = module.main(options)
    except CliError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _add_follow(commands: Any) -> None:
    parser = commands.add_parser(
        "follow",
        help="show a job's progress until it has finished",
        description="Shows step, loss, tokens/s and the time left until the job is Complete (exit 0) or Failed (exit 1).",
    )
    parser.add_argument("name", help="name of the FineTuneJob")
    parser.add_argument("-n", "--namespace", help="its namespace; default: the kubeconfig's")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up (exit 2) when the job has not finished after so long"
    )


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="run a job on this machine, without Kubernetes",
        description="Runs the job of a manifest on this machine's GPUs or CPU: same checks, same trainer, same checkpoints, same"
        " recovery as in a cluster. Ctrl-C saves a checkpoint and leaves; the same command goes on from there."
        " Exit status: 0 Complete, 1 Failed, 2 not to be run as it is, 130 interrupted.",
    )
    parser.add_argument("file", help="YAML file with one FineTuneJob; `-` is standard input")
    parser.add_argument(
        "--volume",
        action="append",
        default=[],
        metavar="CLAIM=FOLDER",
        help="the folder that stands for `pvc://CLAIM`; repeat for several",
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME[/KEY]=FILE",
        help="the file that holds a Secret's value; without KEY: `token`",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu"), default="auto", help="auto: the GPUs if there are any, else the CPU"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew where an earlier run stands; its checkpoints are kept, its output is replaced at the end",
    )


if __name__ == "__main__":
    sys.exit(main())

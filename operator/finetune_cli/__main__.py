"""Entry point of `finetune` (also `python -m finetune_cli`)."""

import argparse
import sys
from collections.abc import Sequence

from finetune_cli import convert_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status."""
    parser = argparse.ArgumentParser(prog="finetune", description="Work with FineTuneJobs.")
    commands = parser.add_subparsers(dest="command", required=True)
    follow_parser = commands.add_parser(
        "follow",
        help="show a job's progress until it has finished",
        description="Shows step, loss, tokens/s and the time left until the job is Complete (exit 0) or Failed (exit 1).",
    )
    follow_parser.add_argument("name", help="name of the FineTuneJob")
    follow_parser.add_argument("-n", "--namespace", help="its namespace; default: the kubeconfig's")
    follow_parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="give up (exit 2) when the job has not finished after so long"
    )
    convert_options.add_parser(commands)
    options = parser.parse_args(arguments)
    if options.command == "convert":
        from finetune_cli import convert  # needs PyYAML only, `follow` the Kubernetes client

        return convert.main(options)
    from finetune_cli import follow

    try:
        return follow.run(options.name, options.namespace, options.timeout)
    except KeyboardInterrupt:
        print("\nstopped watching; the job goes on", file=sys.stderr)
        return 130
    except follow.FollowError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

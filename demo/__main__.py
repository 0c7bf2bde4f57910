"""`python3 -m demo [demo | run | assets | test | lint | down]`: checks the machine, then hands over.

Standard library only, since it runs before anything is installed.
"""

import os
import sys

from demo import checks, commands, environment, local, preflight, teardown


def main() -> int:
    """Runs the demo, the job on this machine, the tests or the linters, and returns the exit status."""
    what, *arguments = sys.argv[1:] or ["demo"]
    if what not in ("demo", "run", "assets", "test", "lint", "down"):
        print(
            "usage: python3 -m demo [demo | run [FINETUNE_RUN_OPTION...] | assets FOLDER | test [PYTEST_OPTION...] | lint"
            f" | down [--purge]], got `{what}`",
            file=sys.stderr,
        )
        return 2
    commands.end_with_parent()
    if what == "lint":
        return checks.lint_only()
    if what == "down":
        return teardown.down(arguments)
    if what == "run":
        return local.main(arguments)
    if what == "assets":
        return local.prepare(arguments)
    problems = preflight.problems()
    if problems:
        print(f"make {what} cannot run here yet:\n", file=sys.stderr)
        print("\n".join(f"  - {problem}" for problem in problems), file=sys.stderr)
        return 2
    if what == "test":
        return checks.test(arguments)
    return _demo(arguments)


def _demo(arguments: list[str]) -> int:
    try:
        python = environment.prepare(["--no-dev", "--extra", "cli"])
    except environment.PrepareError as error:
        print(error, file=sys.stderr)
        return 1
    # Returns only by an exception: the demo proper takes this process' place.
    return os.execv(python, [str(python), "-m", "demo.run", *arguments])


if __name__ == "__main__":
    sys.exit(main())

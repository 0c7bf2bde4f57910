"""`python3 -m demo`: checks the machine, prepares the Python environment, and goes on inside it.

Standard library only, since it runs before anything is installed.
"""

import os
import sys

from demo import environment, preflight


def main() -> None:
    """Never returns: replaces this process by the demo proper, in the project's environment."""
    problems = preflight.problems()
    if problems:
        print("The demo cannot run here yet:\n", file=sys.stderr)
        print("\n".join(f"  - {problem}" for problem in problems), file=sys.stderr)
        sys.exit(2)
    try:
        python = environment.prepare(["--extra", "cli"])
    except environment.PrepareError as error:
        sys.exit(str(error))
    os.execv(python, [str(python), "-m", "demo.run", *sys.argv[1:]])


if __name__ == "__main__":
    main()

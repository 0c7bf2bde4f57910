"""Progress on stderr. stdout belongs to a command's result, which scripts read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    """Prints one line of progress."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(what: str, usually: str | None = None) -> Iterator[None]:
    """Announces a step before it runs, and says how long it took.

    Args:
        what: The step, in the present participle: `building the Kubernetes binary`.
        usually: How long it usually takes, where a reader would otherwise wonder whether it hangs.
    """
    say(f"- {what}" + (f" (usually {usually})" if usually else ""))
    start = time.monotonic()
    yield
    say(f"  done in {time.monotonic() - start:.1f} s")

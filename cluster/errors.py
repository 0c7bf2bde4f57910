"""The one exception that this package raises for a failure that its user can act on."""

from __future__ import annotations

from pathlib import Path


class ClusterError(Exception):
    """A step failed.

    Args:
        message: What failed, with the value that was given.
        hint: What to do about it.
        log: Where the failing step wrote its output.
    """

    def __init__(self, message: str, *, hint: str | None = None, log: Path | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        self.log = log

    def report(self) -> str:
        """Returns the message with its hint and log, each on a line of its own."""
        lines = [f"error: {self}"]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        if self.log:
            lines.append(f"log: {self.log}")
        return "\n".join(lines)

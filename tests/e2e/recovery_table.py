"""The table of what each disturbance cost."""

from typing import NamedTuple


class Row(NamedTuple):
    """One disturbance."""

    disturbance: str
    reason: str
    detection_seconds: float
    """From the disturbance until the status shows the next attempt; for the operator itself, until it is ready again."""
    running_seconds: float
    """From the disturbance until all pods of the next attempt run."""
    training_seconds: float
    """From the disturbance until the next attempt has done its first step: the downtime."""
    lost_steps: int
    """Steps that were done and had to be done again."""


def render(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| disturbance | reason | detected (s) | gang running again (s) | training again (s) | lost steps |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.disturbance} | {row.reason} | {row.detection_seconds:.1f} | {row.running_seconds:.1f} "
        f"| {row.training_seconds:.1f} | {row.lost_steps} |"
        for row in rows
    ]
    return "\n".join(lines)

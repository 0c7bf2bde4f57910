"""The table of what each disturbance cost."""

from typing import NamedTuple


class Row(NamedTuple):
    """One disturbance."""

    disturbance: str
    reason: str
    detection_seconds: float | None
    """From the disturbance to the operator's record of it (whole seconds: Kubernetes' timestamps)."""
    downtime_seconds: float
    """From the disturbance until all pods of the next attempt run."""
    lost_steps: int | None


def render(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| disturbance | reason | detection (s) | gang running again (s) | lost steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        detection = "-" if row.detection_seconds is None else f"{row.detection_seconds:.0f}"
        lines.append(
            f"| {row.disturbance} | {row.reason} | {detection} | {row.downtime_seconds:.1f} | {row.lost_steps} |"
        )
    return "\n".join(lines)

"""What a finished job left behind, in a form that can be compared for equality."""

from typing import NamedTuple


class Result(NamedTuple):
    """The parts of a result that must not depend on how the run went."""

    weights_sha256: str
    loss: str
    """The last step's loss, every digit."""
    eval_loss: str
    base_eval_loss: str

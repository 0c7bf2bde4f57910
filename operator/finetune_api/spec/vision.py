"""`spec.vision`: what is trained of a model that sees, beside its language model."""

from finetune_api.base import ApiModel, PositiveDecimal


class VisionSpec(ApiModel):
    freeze_tower: bool = True
    """The vision tower stays as it is. False trains it whole, whatever the method, at the learning rate of the rest."""
    projector_learning_rate: PositiveDecimal | None = None
    """Trains the projector between tower and language model whole, whatever the method, at this peak learning rate, a decimal
    in quotes; its course is the schedule's. Absent: the projector stays as it is."""

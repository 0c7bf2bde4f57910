"""Which activations are kept for the backward pass, and where."""

from typing import Any

from finetune_api.spec import ActivationCheckpointing as Mode
from finetune_trainer.errors import ConfigError

_SAVED_OPERATORS = ("mm", "addmm", "linear", "_scaled_mm", "gemm_4bit", "int8_scaled_mm")
"""Names without namespace of what SelectiveOp keeps, beside every operator with `attention` or `attn` in its name.

Products of batches of matrices (`bmm`) are not kept: eager attention's scores grow with the square of the length, and Gemma 3n
adds to its own in place.
"""
SELECTED_LAYER_DISTANCE = 2
"""SelectiveLayer recomputes every second layer."""


def check_recomputation(config: Any, mode: Mode, *, reentrant: bool) -> None:
    """Refuses what would give wrong gradients; to be called before the weights are read.

    Layers that take keys and values of an earlier one get them through a dict beside the layers' inputs. The reentrant form
    differentiates inputs and parameters only, so the earlier layer would miss the later ones' part of its gradient.

    Args:
        config: the model's, of transformers.
        mode: what is recomputed.
        reentrant: whether ZeRO-3 partitions the parameters.

    Raises:
        ConfigError: naming what to set instead.
    """
    text = config.get_text_config()
    shares = any("reuse" in (sharing or "") for sharing in getattr(text, "kv_sharing_modes", ()))
    if reentrant and mode is not Mode.NONE and shares:
        raise ConfigError(
            f"training.activationCheckpointing: {mode} with `deepspeed.zeroStage: 3` would give wrong gradients: layers of a "
            f"{text.model_type} share keys and values; use `training.activationCheckpointing: None`, or `deepspeed.zeroStage` "
            "0, 1 or 2"
        )


def checkpoint_activations(model: Any, mode: Mode, *, reentrant: bool) -> None:
    """Recomputes activations in the backward pass instead of keeping them.

    Under ZeRO-3 the reentrant form is needed: the other one compares shapes of parameters, which are empty once released.
    The reentrant form in turn needs an input that requires a gradient, which a frozen embedding does not give; and it cannot
    choose operators.

    Args:
        model: a transformers model, or one with adapters.
        mode: what is recomputed.
        reentrant: whether ZeRO-3 partitions the parameters.
    """
    if mode is Mode.NONE:
        return
    if reentrant:
        model.enable_input_require_grads()
    kwargs: dict[str, Any] = {"use_reentrant": reentrant}
    if mode is Mode.SELECTIVE_OP:
        assert not reentrant, "refused before"
        kwargs["context_fn"] = _selective_contexts
    every = SELECTED_LAYER_DISTANCE if mode is Mode.SELECTIVE_LAYER else 1
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=kwargs, every_n_layers=every, offload=mode is Mode.FULL_OFFLOAD
    )


def _selective_contexts() -> Any:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(_policy())  # type: ignore[no-untyped-call]


def _policy() -> Any:
    """What is kept of one layer's forward pass.

    A kept result that is changed in place would be changed once more in the backward pass. torch sees that by the tensor's
    version, which a linear layer's `_unsafe_view` does not carry on, so storages are compared here.
    """
    import torch
    from torch.utils.checkpoint import CheckpointPolicy

    storages: set[int] = set()

    def policy(context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> Any:
        result = context.op_output
        results = result if isinstance(result, tuple) else (result,)
        touched = {each.untyped_storage()._cdata for each in results if isinstance(each, torch.Tensor)}
        if is_kept(str(operator)):
            storages.update(touched)
            return CheckpointPolicy.MUST_SAVE
        if operator._schema.is_mutable and storages & touched:
            raise ConfigError(
                f"training.activationCheckpointing: {Mode.SELECTIVE_OP} cannot be used with this model, whose {operator} changes "
                f"a kept result in place; use `{Mode.SELECTIVE_LAYER}` or `{Mode.FULL}`"
            )
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def is_kept(operator: str) -> bool:
    """Whether SelectiveOp keeps the result of an operator, told by its name, such as `aten.mm.default`."""
    name = operator.split(".")[1] if operator.count(".") >= 1 else operator
    return name in _SAVED_OPERATORS or "attention" in name or "attn" in name

"""What a job leaves behind: `spec.checkpoint`, `output`, `tracking`, `cache`; and `recovery`."""

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, FileSize, VolumeUri
from finetune_api.spec.common import SecretKeyRef, Short


class CheckpointSpec(ApiModel):
    uri: VolumeUri | None = None
    """Folder in which each job gets one of its own, on a volume that all pods of the job can write. Absent: `checkpoints`
    beside the folder `output.uri`."""
    every_steps: Annotated[int, Field(ge=1)] = 100
    """Save after every so many steps."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Keep so many of the newest complete checkpoints."""
    on_termination: bool = True
    """On SIGTERM (suspension, eviction, drain) save before leaving."""
    background: bool = True
    """Training stands still only while the state is copied to host memory, which needs room for the state once more; it is
    written while training goes on. False waits until it is written."""


class RecoverySpec(ApiModel):
    backoff_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Restarts after failures of the job itself; more, and it is Failed. What the platform does (eviction, a lost node,
    preemption, suspension) is not counted."""
    hang_timeout_seconds: Annotated[int, Field(ge=10, le=86400)] | None = None
    """A rank that gives no sign of life for so long while it trains, evaluates or saves is hung, and the gang restarts. Longer
    than the slowest step, and than the first one with its compilation. Absent: the operator's (`trainer.hangTimeoutSeconds` of
    the chart)."""


class OutputSpec(ApiModel):
    uri: VolumeUri
    """Folder that receives the adapter (LoRA, QLoRA) or the model (Full, Freeze), in Hugging Face layout: `pvc://claim/path`, or
    `file:///path` with `finetune run` (in a pod that is the container's own file system, and goes with it)."""
    merge_adapter: bool = False
    """Also write the whole model with the adapter merged into its weights, into the subfolder `merged`. Only for
    `method: LoRA`."""
    max_shard_size: FileSize = "5GB"
    """Files of a whole model are at most so large; more than one comes with an index, as transformers writes it."""


class WandbSpec(ApiModel):
    project: Short
    """Project in Weights & Biases."""
    entity: Short | None = None
    """User or team that owns the project. Absent: the default of the credentials' owner."""
    run_name: Short | None = None
    """Name of the run. Absent: the job's name."""
    credentials_ref: SecretKeyRef | None = None
    """API key. Absent: only for offline runs (`WANDB_MODE: offline` in `trainer.env`)."""


class TensorBoardSpec(ApiModel):
    uri: VolumeUri
    """Folder in which each job gets one of its own for its event files."""


class ProfilerSpec(ApiModel):
    uri: VolumeUri
    """Folder in which each job gets one of its own, with a folder for each attempt and a trace for each rank."""
    wait: Annotated[int, Field(ge=0, le=1000000)] = 5
    """Steps of an attempt before the profiler is started; compilation is among them."""
    warmup: Annotated[int, Field(ge=0, le=100)] = 1
    """Steps with the profiler on that are not kept."""
    active: Annotated[int, Field(ge=1, le=100)] = 3
    """Steps that are kept."""


class TrackingSpec(ApiModel):
    wandb: WandbSpec | None = None
    """Weights & Biases."""
    tensor_board: TensorBoardSpec | None = None
    """TensorBoard event files."""
    profiler: ProfilerSpec | None = None
    """A trace of a few steps by PyTorch's profiler, for Perfetto, TensorBoard or Holistic Trace Analysis."""


class CacheSpec(ApiModel):
    uri: VolumeUri
    """Folder for `hf://` downloads, tokenised data and compiled code, shared by jobs; each file is downloaded once. The code is
    run, so jobs that share it trust each other. Not inside `output.uri`."""

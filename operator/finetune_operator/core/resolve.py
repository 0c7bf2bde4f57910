"""From a job's spec to what its pods run: every default decided, every URI a path, nothing left to find."""

import json
from dataclasses import dataclass
from datetime import date
from hashlib import sha256

from finetune_api.job import FineTuneJob
from finetune_api.launch import (
    UNDATED,
    HubSource,
    JobIdentity,
    LaunchAdapter,
    LaunchBenchmark,
    LaunchCheckpoint,
    LaunchDataset,
    LaunchDeepSpeed,
    LaunchFreeze,
    LaunchGeneration,
    LaunchModel,
    LaunchOutput,
    LaunchProfiler,
    LaunchQuantization,
    LaunchSchedulerParameters,
    LaunchSelection,
    LaunchSpec,
    LaunchTensorBoard,
    LaunchTracking,
    LaunchTraining,
    LaunchVision,
    LaunchWandb,
    PathSource,
    Rendezvous,
)
from finetune_api.spec import (
    AdapterSpec,
    DatasetSpec,
    FineTuneJobSpec,
    FreezeSpec,
    GenerationSpec,
    Method,
    ModelSpec,
    OutputSpec,
    QuantizationSpec,
    Scheduler,
    SchedulerParametersSpec,
    SecretKeyRef,
    TrackingSpec,
    TrainerSpec,
    TrainingSpec,
    VisionSpec,
)
from finetune_api.status import PlanStatus
from finetune_operator.core.names import attempt_name
from finetune_operator.core.observe import ObservedJob, parse_time
from finetune_operator.core.quantity import cpus, file_size
from finetune_operator.core.settings import PlanConfig
from finetune_operator.core.volumes import Mounts, child, local_path, plan_mounts, sibling

SCRATCH = "/scratch"
"""HOME of the trainer: an emptyDir of each pod."""
_LEARNING_RATES = {Method.LORA: "2e-4", Method.QLORA: "2e-4", Method.FULL: "2e-5", Method.FREEZE: "2e-5"}
_WARMUP_RATIO = "0.03"
_MIN_LR_RATES = {Scheduler.COSINE_WITH_MIN_LR: "0.1"}
_HUB = "hf://"
_HUB_DATASETS = "hf://datasets/"
_DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True)
class Resolved:
    """One attempt, fully decided."""

    launch: LaunchSpec
    plan: PlanStatus
    mounts: Mounts


def choose(job: FineTuneJob, config: PlanConfig) -> PlanStatus:
    """What is chosen where the spec leaves a choice, and what follows from it.

    Chosen once: what stands in status stays for all attempts, but for what `spec.trainer` says, which may change between them.
    """
    spec, earlier = job.spec, job.status.plan
    world_size = spec.trainer.num_nodes * spec.trainer.num_proc_per_node
    accumulation = spec.training.global_batch_size // (spec.training.micro_batch_size * world_size)
    if earlier is not None:
        image = spec.trainer.image or earlier.image
        changes = {"image": image, "world_size": world_size, "gradient_accumulation_steps": accumulation}
        return earlier.model_copy(update=changes)
    checkpoints = spec.checkpoint.uri or sibling(spec.output.uri, "checkpoints")
    return PlanStatus(
        image=spec.trainer.image or config.trainer_image,
        world_size=world_size,
        micro_batch_size=spec.training.micro_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=spec.training.learning_rate or _LEARNING_RATES[spec.method],
        checkpoint_uri=child(checkpoints, _own_folder(job)),
        output_uri=spec.output.uri,
    )


def resolve(job: FineTuneJob, attempt: int, config: PlanConfig) -> Resolved:
    """Resolves one attempt of a job.

    Args:
        job: the job; `status.plan`, if it is there, decides what was chosen.
        attempt: the attempt's number, from 1.
        config: the installation's settings.
    """
    spec = job.spec
    plan = choose(job, config)
    cache_uri = spec.cache.uri if spec.cache else config.cache_uri
    data = [*spec.datasets.train, *spec.datasets.evaluation]
    mounts = plan_mounts(
        spec,
        read=[spec.model.uri, *(dataset.uri for dataset in data)],
        write=[plan.checkpoint_uri, plan.output_uri, *([cache_uri] if cache_uri else []), *_tracking_uris(spec)],
    )
    launch = LaunchSpec(
        job=JobIdentity(namespace=job.metadata.namespace, name=job.metadata.name, uid=job.metadata.uid),
        created_on=_created_on(job),
        attempt=attempt,
        num_nodes=spec.trainer.num_nodes,
        num_proc_per_node=spec.trainer.num_proc_per_node,
        threads_per_process=threads_per_process(spec),
        rendezvous=Rendezvous(host=_rendezvous_host(job, attempt), port=config.rendezvous_port),
        http_port=config.http_port,
        termination_grace_seconds=config.termination_grace_seconds,
        communication_timeout_seconds=config.communication_timeout_seconds,
        hang_timeout_seconds=spec.recovery.hang_timeout_seconds or config.hang_timeout_seconds,
        model=_model(spec.model, plan, mounts),
        train=[_dataset(dataset, mounts) for dataset in spec.datasets.train],
        evaluation=[_dataset(dataset, mounts) for dataset in spec.datasets.evaluation if dataset.benchmark is None],
        method=spec.method,
        adapter=_adapter(spec.adapter or AdapterSpec()) if spec.method in (Method.LORA, Method.QLORA) else None,
        training=_training(spec, plan),
        deepspeed=LaunchDeepSpeed(
            zero_stage=spec.deepspeed.zero_stage,
            offload_optimizer=spec.deepspeed.offload_optimizer,
            offload_parameters=spec.deepspeed.offload_parameters,
            config=spec.deepspeed.config,
        ),
        checkpoint=LaunchCheckpoint(
            dir=local_path(plan.checkpoint_uri),
            every_steps=spec.checkpoint.every_steps,
            keep=spec.checkpoint.keep,
            on_termination=spec.checkpoint.on_termination,
            background=spec.checkpoint.background,
        ),
        output_dir=local_path(plan.output_uri),
        cache_dir=local_path(cache_uri) if cache_uri else f"{SCRATCH}/hub",
        freeze=_freeze(spec.freeze or FreezeSpec()) if spec.method is Method.FREEZE else None,
        quantization=_quantization(spec.quantization or QuantizationSpec()) if spec.method is Method.QLORA else None,
        vision=_vision(spec.vision) if spec.vision else None,
        output=_output(spec.output),
        tracking=_tracking(spec.tracking or TrackingSpec(), job, mounts),
        benchmarks=_benchmarks(spec, mounts),
        generation=_generation(spec.evaluation.generation),
        selection=LaunchSelection(
            metric=spec.evaluation.metric,
            export_best=spec.evaluation.export_best,
            early_stopping_patience=spec.evaluation.early_stopping_patience,
            early_stopping_min_delta=float(spec.evaluation.early_stopping_min_delta or "0"),
        ),
    )
    return Resolved(launch=launch, plan=plan, mounts=mounts)


def made_from_another(job: ObservedJob, trainer: TrainerSpec) -> bool:
    """Whether a child Job was made from another `spec.trainer`. One that an older operator made does not tell: it was not."""
    return job.trainer not in (None, trainer_digest(trainer))


def trainer_digest(trainer: TrainerSpec) -> str:
    """Tells one `spec.trainer` from another. Defaults are left out, or a new field would make all of them other ones."""
    said = trainer.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def threads_per_process(spec: FineTuneJobSpec) -> int:
    """CPU threads of one rank: the pod's CPUs shared by its ranks, at least 1. Fixed by the spec, since sums depend on it."""
    resources = spec.trainer.resources_per_node
    quantity = resources.limits.get("cpu") or resources.requests.get("cpu")
    available = cpus(quantity) if quantity is not None else None
    return max(1, int(available / spec.trainer.num_proc_per_node)) if available else 1


def _created_on(job: FineTuneJob) -> date:
    created = parse_time(job.metadata.creation_timestamp)
    return created.date() if created else UNDATED


def _rendezvous_host(job: FineTuneJob, attempt: int) -> str:
    if job.spec.trainer.num_nodes == 1:
        return "localhost"
    name = attempt_name(job.metadata.name, attempt)
    return f"{name}-0.{name}.{job.metadata.namespace}.svc"


def _source(uri: str, revision: str | None, ref: SecretKeyRef | None, mounts: Mounts) -> PathSource | HubSource:
    if not uri.startswith(_HUB):
        return PathSource(path=local_path(uri))
    is_dataset = uri.startswith(_HUB_DATASETS)
    org, name, *path = uri.removeprefix(_HUB_DATASETS if is_dataset else _HUB).split("/", 2)
    return HubSource(
        repo_id=f"{org}/{name}",
        repo_type="dataset" if is_dataset else "model",
        revision=revision or _DEFAULT_REVISION,
        path=path[0].strip("/") if path else "",
        token_file=mounts.token_file(ref),
    )


def _model(model: ModelSpec, plan: PlanStatus, mounts: Mounts) -> LaunchModel:
    revision = plan.model_revision or model.revision
    source = _source(model.uri, revision, model.credentials_ref, mounts)
    return LaunchModel(uri=model.uri, source=source, chat_template=model.chat_template)


def _dataset(dataset: DatasetSpec, mounts: Mounts) -> LaunchDataset:
    return LaunchDataset(
        uri=dataset.uri,
        source=_source(dataset.uri, dataset.revision, dataset.credentials_ref, mounts),
        format=dataset.format,
        max_samples=dataset.max_samples,
        split=dataset.split,
        columns=dataset.columns,
        tags=dataset.tags,
        weight=float(dataset.weight) if dataset.weight is not None else None,
    )


def _adapter(adapter: AdapterSpec) -> LaunchAdapter:
    return LaunchAdapter(
        rank=adapter.rank,
        alpha=adapter.alpha if adapter.alpha is not None else 2 * adapter.rank,
        dropout=float(adapter.dropout),
        target_modules=adapter.target_modules,
        variant=adapter.variant,
        lora_plus_ratio=None if adapter.lora_plus_ratio is None else float(adapter.lora_plus_ratio),
    )


def _freeze(freeze: FreezeSpec) -> LaunchFreeze:
    return LaunchFreeze(
        trainable_layers=freeze.trainable_layers,
        trainable_modules=freeze.trainable_modules,
        extra_modules=freeze.extra_modules,
    )


def _quantization(quantization: QuantizationSpec) -> LaunchQuantization:
    return LaunchQuantization(bits=quantization.bits, double_quantization=quantization.double_quantization)


def _vision(vision: VisionSpec) -> LaunchVision:
    rate = vision.projector_learning_rate
    return LaunchVision(freeze_tower=vision.freeze_tower, projector_learning_rate=None if rate is None else float(rate))


def _scheduler_parameters(training: TrainingSpec) -> LaunchSchedulerParameters:
    given = training.scheduler_parameters or SchedulerParametersSpec()
    return LaunchSchedulerParameters(
        num_cycles=given.num_cycles or 1,
        min_lr_rate=float(given.min_lr_rate or _MIN_LR_RATES.get(training.scheduler, "0")),
        lr_end=float(given.lr_end or "1e-7"),
        power=float(given.power or "1"),
        timescale=given.timescale,
        num_decay_steps=given.num_decay_steps,
    )


def _warmup_ratio(training: TrainingSpec) -> float:
    return float(training.warmup_ratio or _WARMUP_RATIO) if training.warmup_steps is None else 0.0


def _training(spec: FineTuneJobSpec, plan: PlanStatus) -> LaunchTraining:
    training = spec.training
    neither = training.epochs is None and training.max_steps is None
    return LaunchTraining(
        max_length=training.max_length,
        packing=training.packing,
        global_batch_size=training.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        epochs=1 if neither else training.epochs,
        max_steps=training.max_steps,
        learning_rate=float(plan.learning_rate),
        scheduler=training.scheduler,
        warmup_ratio=_warmup_ratio(training),
        weight_decay=float(training.weight_decay),
        max_grad_norm=float(training.max_grad_norm),
        precision=training.precision,
        activation_checkpointing=training.activation_checkpointing,
        seed=training.seed,
        eval_every_steps=training.eval_every_steps,
        optimizer=training.optimizer,
        adam_beta1=float(training.adam_beta1),
        adam_beta2=float(training.adam_beta2),
        adam_epsilon=float(training.adam_epsilon),
        warmup_steps=training.warmup_steps,
        scheduler_parameters=_scheduler_parameters(training),
        overlong=training.overlong,
        train_on_prompt=training.train_on_prompt,
        mask_history=training.mask_history,
        group_by_length=training.group_by_length,
        attention=training.attention,
        liger_kernel=training.liger_kernel,
        compile=training.compile,
        loader_workers=training.loader_workers,
    )


def _own_folder(job: FineTuneJob) -> str:
    """A name that no other job has, not even a later one of the same name."""
    return f"{job.metadata.name}-{job.metadata.uid[:8]}"


def _output(output: OutputSpec) -> LaunchOutput:
    return LaunchOutput(merge_adapter=output.merge_adapter, max_shard_bytes=file_size(output.max_shard_size))


def _tracking_uris(spec: FineTuneJobSpec) -> list[str]:
    tracking = spec.tracking or TrackingSpec()
    return [tracker.uri for tracker in (tracking.tensor_board, tracking.profiler) if tracker is not None]


def _tracking(tracking: TrackingSpec, job: FineTuneJob, mounts: Mounts) -> LaunchTracking:
    wandb, board, profiler = tracking.wandb, tracking.tensor_board, tracking.profiler

    def own(uri: str) -> str:
        return local_path(child(uri, _own_folder(job)))

    return LaunchTracking(
        wandb=None
        if wandb is None
        else LaunchWandb(
            project=wandb.project,
            entity=wandb.entity,
            run_name=wandb.run_name or job.metadata.name,
            token_file=mounts.token_file(wandb.credentials_ref),
        ),
        tensor_board=None if board is None else LaunchTensorBoard(dir=own(board.uri)),
        profiler=None
        if profiler is None
        else LaunchProfiler(dir=own(profiler.uri), wait=profiler.wait, warmup=profiler.warmup, active=profiler.active),
    )


def _benchmarks(spec: FineTuneJobSpec, mounts: Mounts) -> list[LaunchBenchmark]:
    return [
        LaunchBenchmark(
            uri=dataset.uri,
            source=_source(dataset.uri, dataset.revision, dataset.credentials_ref, mounts),
            benchmark=dataset.benchmark,
            max_samples=dataset.max_samples,
        )
        for dataset in spec.datasets.evaluation
        if dataset.benchmark is not None
    ]


def _generation(generation: GenerationSpec) -> LaunchGeneration:
    return LaunchGeneration(
        samples=generation.samples,
        temperature=float(generation.temperature),
        top_p=float(generation.top_p),
        max_new_tokens=generation.max_new_tokens,
        batch_size=generation.batch_size,
        k=generation.k,
        timeout_seconds=generation.timeout_seconds,
    )

"""The steps of a rank's start, in order: claim, locate, load data, build the engine, resume; and the export at the end.

Each is a plain function of what the steps before it made; `rank.run` puts them together. Heavy libraries are imported where
they are needed, so that a wrong path or a taken output folder is told within the first seconds.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finetune_api.launch import HubSource, LaunchBenchmark, LaunchDataset, LaunchSpec
from finetune_trainer import model as models
from finetune_trainer import vision
from finetune_trainer.claims import AttemptClaim, claim_output
from finetune_trainer.config import fingerprint
from finetune_trainer.data.arrange import make_order, make_rows
from finetune_trainer.data.batches import Rows
from finetune_trainer.data.cache import cached_store
from finetune_trainer.data.chat_templates import end_of_turn
from finetune_trainer.data.order import RowOrder
from finetune_trainer.data.report import log_reports, padding_share
from finetune_trainer.data.store import TokenStore, read_meta
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.distributed import World, limit_waits
from finetune_trainer.errors import writing
from finetune_trainer.hub import config_ahead, go_offline, local_path, resolve_revision
from finetune_trainer.manifest import Progress
from finetune_trainer.readahead import read_ahead
from finetune_trainer.startup import Startup, compiler_imported, import_libraries
from finetune_trainer.state import StateWriter
from finetune_trainer.tracking.background import Tracking
from finetune_trainer.tracking.base import RunFacts, Tracker, run_config
from finetune_trainer.tracking.board import TensorBoardTracker
from finetune_trainer.tracking.weights_and_biases import WandbTracker
from finetune_trainer.versions import versions

log = logging.getLogger("finetune_trainer")


@dataclass(frozen=True)
class Sources:
    """Local paths of everything that is read."""

    model: Path
    model_revision: str | None
    train: list[tuple[LaunchDataset, Path]]
    evaluation: list[tuple[LaunchDataset, Path]]
    benchmarks: list[tuple[LaunchBenchmark, Path]]


@dataclass(frozen=True)
class Data:
    tokenizer: Any
    end_of_turn: str | None
    """The token that ends an answer in the training data; None if it is not one token, or there are only texts."""
    train: Rows
    train_digest: str
    evaluation: Rows | None
    order: RowOrder
    report: dict[str, Any]
    """For `train` and `evaluation` what became of each data set's records, and `padding_share`."""
    benchmarks: Any
    """`evaluation.benchmark.Benchmarks`, or None."""


def claim(spec: LaunchSpec, world: World) -> AttemptClaim | None:
    """Claims the checkpoint and output folders for this attempt; rank 0 does it, and all ranks learn of a refusal."""

    def work() -> AttemptClaim | None:
        if not world.is_first:
            return None
        claim_output(spec)
        return AttemptClaim.take(spec)

    claims = world.together(work)
    return claims[0] if world.is_first else None


def locate(spec: LaunchSpec, world: World) -> Sources:
    """Resolves revisions on rank 0, downloads on the first rank of each node, and returns local paths on all."""
    datasets = [*spec.train, *spec.evaluation]
    everything: list[LaunchDataset | LaunchBenchmark] = [*datasets, *spec.benchmarks]
    named = [(spec.model.source, spec.model.uri, "model"), *((d.source, d.uri, "datasets") for d in everything)]

    def resolve() -> list[str | None]:
        return [resolve_revision(*item) for item in named] if world.is_first else []

    commits = world.together(resolve)[0]
    cache_dir = Path(spec.cache_dir)

    def paths() -> list[Path]:
        return [
            local_path(source, commit, cache_dir, uri, field)
            for (source, uri, field), commit in zip(named, commits, strict=True)
        ]

    if world.is_first_of_node:
        check_before_download(spec, commits[0], world)
        found = paths()
        if isinstance(spec.model.source, HubSource):  # else the supervisor reads it already
            read_ahead(found[0])
    world.wait_for_node("located", world.is_first_of_node)
    found = found if world.is_first_of_node else paths()
    world.wait_for_all("located")
    go_offline()
    data = list(zip(datasets, found[1 : len(datasets) + 1], strict=True))
    benchmarks = list(zip(spec.benchmarks, found[len(datasets) + 1 :], strict=True))
    return Sources(found[0], commits[0], data[: len(spec.train)], data[len(spec.train) :], benchmarks)


def check_before_download(spec: LaunchSpec, commit: str | None, world: World) -> None:
    """Refuses a hub's model that cannot fit before it is downloaded; its files' headers are looked at afterwards all the same."""
    folder = config_ahead(spec.model.source, commit, Path(spec.cache_dir), spec.model.uri)
    if folder is None:
        return
    from finetune_trainer.memory import check_memory, shapes_of_config

    check_memory(shapes_of_config(folder), spec, world.device)


def load_data(
    spec: LaunchSpec,
    sources: Sources,
    world: World,
    scratch: Path,
    beat: Callable[[], None],
    took: Callable[[str], None] = lambda phase: None,
) -> Data:
    """Tokenises on the first rank of each node, or finds it done in the cache; all ranks map the same arrays."""
    from finetune_trainer.memory import check_memory, read_shapes

    training = spec.training
    config = models.check_model_folder(sources.model, spec.model.uri)
    models.check_max_length(config, training.max_length, spec.model.uri)
    check_memory(read_shapes(sources.model), spec, world.device)
    import_libraries()  # not sooner: what is wrong until here is told at once
    took("imports")
    from finetune_trainer.kernels import pad_to

    tokenizer = models.load_tokenizer(sources.model, spec)
    image = vision.image_input(sources.model, config, tokenizer, spec)
    parts = {name: data for name, data in (("train", sources.train), ("evaluation", sources.evaluation)) if data}
    where = scratch / "data"
    if world.is_first_of_node:
        where.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(
            tokenizer,
            spec.model.uri,
            train_on_prompt=training.train_on_prompt,
            mask_history=training.mask_history,
            image=image,
        )
        for name, datasets in parts.items():
            folder = cached_store(
                Path(spec.cache_dir), where / name, datasets, encoder, training.max_length, training.overlong, beat
            )
            (where / f"{name}.path").write_text(str(folder), encoding="utf-8")
    world.wait_for_node("tokenised", world.is_first_of_node)
    rows: dict[str, Rows] = {}
    metas: dict[str, dict[str, Any]] = {}
    for name in parts:
        folder = Path((where / f"{name}.path").read_text(encoding="utf-8"))
        store, metas[name] = TokenStore.load(folder), read_meta(folder)
        samples = make_rows(spec, name, store, metas[name]["reports"])
        rows[name] = Rows(store, samples, packed=training.packing, pad_to=pad_to(spec, world.device), image=image)
    order = make_order(spec, rows["train"], metas["train"]["reports"])
    padding = padding_share(rows["train"].row_lengths, order, training.micro_batch_size)
    report = {name: meta["reports"] for name, meta in metas.items()} | {"padding_share": round(padding, 6)}
    for name in parts:
        log_reports(name, metas[name]["reports"])
        log.info(
            "%s: %d samples in %d rows, %d tokens",
            name,
            len(rows[name].store),
            len(rows[name]),
            len(rows[name].store.ids),
        )
    log.info("train: %.1f %% of the tokens that are computed are padding", 100 * padding)
    benchmarks = load_benchmarks(spec, sources, tokenizer, world, scratch, models.position_limit(config))
    digest = metas["train"]["digest"]
    chats = any(dataset["conversations"] for dataset in report["train"])
    end = end_of_turn(tokenizer) if chats else None
    return Data(tokenizer, end, rows["train"], digest, rows.get("evaluation"), order, report, benchmarks)


def load_benchmarks(
    spec: LaunchSpec, sources: Sources, tokenizer: Any, world: World, scratch: Path, position_limit: int | None
) -> Any:
    """Reads the problems and proves the sandbox, before anything heavy is loaded; None without benchmarks."""
    if not sources.benchmarks:
        return None
    from finetune_trainer.evaluation.benchmark import Benchmarks, open_sandbox
    from finetune_trainer.evaluation.problems import read_problems

    return Benchmarks(
        problems={
            b.benchmark: read_problems(path, b.benchmark, b.uri, b.max_samples) for b, path in sources.benchmarks
        },
        generation=spec.generation,
        tokenizer=tokenizer,
        sandbox=open_sandbox(scratch),
        world=world,
        seed=spec.training.seed,
        workers=spec.threads_per_process,
        position_limit=position_limit,
    )


def build_engine(
    spec: LaunchSpec, sources: Sources, world: World, took: Callable[[str], None] = lambda phase: None
) -> Any:
    """Loads the model and wraps it."""
    from finetune_trainer import engine as ds
    from finetune_trainer import kernels
    from finetune_trainer.deepspeed_block import check_block
    from finetune_trainer.device import warn_of_slow_precision
    from finetune_trainer.quirks import tame_deepspeed
    from finetune_trainer.shards import check_mergeable

    tame_deepspeed()
    config = ds.deepspeed_config(spec)
    check_block(spec.deepspeed.config, config, cuda=world.device.type == "cuda")
    with compiler_imported(spec.training.compile):
        model = models.load_model(sources.model, spec, config)
    took("weights")
    if spec.output.merge_adapter:
        check_mergeable(model)
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    log.info("%s parameters are trained", f"{trainable:,}")
    warn_of_slow_precision(world.device, spec.training.precision)
    kernels.prepare(model, spec, world.device)
    world.wait_for_all("model loaded")
    engine = ds.build_engine(model, spec, config)
    limit_waits(spec)
    kernels.finish(engine, spec, world.device)
    return engine


def prepare_training(
    spec: LaunchSpec,
    sources: Sources,
    data: Data,
    engine: Any,
    world: World,
    own_claim: AttemptClaim | None,
    status: StateWriter,
    stop_requested: Callable[[], bool],
    startup: Startup,
) -> Any:
    """Resumes, if there is something to resume from, and returns the loop, ready to run."""
    from finetune_trainer.checkpoint import Checkpoints
    from finetune_trainer.device import DeviceFacts
    from finetune_trainer.journal import Journal
    from finetune_trainer.loop import Training
    from finetune_trainer.profiler import StepProfiler

    root = Path(spec.checkpoint.dir)
    print_of_run = fingerprint(spec, model_revision=sources.model_revision, train_digest=data.train_digest)
    metric = spec.selection.metric
    checkpoints = Checkpoints(root, spec.checkpoint.keep, world, own_claim, print_of_run, spec.attempt, metric)
    order = data.order
    resumed = checkpoints.restore(engine)
    progress = resumed or Progress()
    facts = asdict(progress)
    facts.pop("last_eval_step")
    facts.pop("metrics")
    status.beat(
        total_steps=order.total_steps,
        resumed_from_step=progress.step,
        last_checkpoint_step=progress.step if resumed else None,
        epoch=round(order.epoch_after(progress.step), 4),
        metrics=progress.newest_metrics(),
        **facts,
    )
    return Training(
        spec=spec,
        world=world,
        engine=engine,
        rows=data.train,
        eval_rows=data.evaluation,
        benchmarks=data.benchmarks,
        order=order,
        checkpoints=checkpoints,
        progress=progress,
        status=status,
        journal=Journal(root, spec.attempt, progress.step) if world.is_first else None,
        stop_requested=stop_requested,
        device_facts=DeviceFacts(world.device),
        startup=startup,
        profiler=StepProfiler(spec.tracking.profiler, spec.attempt, world.rank),
        tracking=start_tracking(spec, progress.step + 1 if resumed else 0, first=world.is_first),
    )


def start_tracking(spec: LaunchSpec, first_step: int, *, first: bool) -> Tracking:
    """Starts the job's trackers on rank 0; nothing here waits for them."""
    trackers: list[Tracker] = []
    if first and spec.tracking.wandb is not None:
        trackers.append(WandbTracker(spec.tracking.wandb))
    if first and spec.tracking.tensor_board is not None:
        trackers.append(TensorBoardTracker(Path(spec.tracking.tensor_board.dir)))
    return Tracking(trackers, RunFacts(spec.job.uid, spec.attempt, first_step, run_config(spec)))


def export(spec: LaunchSpec, training: Any, data: Data, sources: Sources, started: float) -> None:
    """Writes the output folder on rank 0; every rank helps to gather the weights."""
    from finetune_trainer.export import set_ends, write_output

    world: World = training.world
    own_claim: AttemptClaim | None = training.checkpoints.claim
    world.together(lambda: own_claim.check() if own_claim else None)
    exported_step = training.choose_result()
    progress: Progress = training.progress
    result = {
        **asdict(progress),
        "exported_step": exported_step,
        "model_uri": spec.model.uri,
        "model_revision": sources.model_revision,
        "attempt": spec.attempt,
        "seconds": round(time.perf_counter() - started, 1),
        "startup_seconds": training.status.state.startup,
        "versions": versions(),
        "data": data.report,
    }
    if world.is_first:
        set_ends(training.engine.module, data.tokenizer, spec, data.end_of_turn)
    with writing("output.uri", Path(spec.output_dir)):
        write_output(training.engine, data.tokenizer, sources.model, spec, result, own_claim)

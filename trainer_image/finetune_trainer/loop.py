"""The training loop, top to bottom: evaluate the base, then step, report, evaluate, save, until the last step."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from finetune_api.launch import LaunchSpec
from finetune_api.reports import Activity
from finetune_trainer import engine as ds
from finetune_trainer.checkpoint import Checkpoints
from finetune_trainer.data.batches import Rows
from finetune_trainer.data.order import RowOrder
from finetune_trainer.device import DeviceFacts
from finetune_trainer.distributed import World
from finetune_trainer.errors import NonFiniteLossError, TerminatedError, TrainerError
from finetune_trainer.evaluation.benchmark import Benchmarks
from finetune_trainer.evaluation.best import best_step, evaluations_without_improvement
from finetune_trainer.journal import Journal
from finetune_trainer.manifest import Progress
from finetune_trainer.prefetch import Prefetcher
from finetune_trainer.profiler import StepProfiler
from finetune_trainer.schedule import learning_rate
from finetune_trainer.startup import Startup
from finetune_trainer.state import StateWriter
from finetune_trainer.step import Prepared, StepResult, evaluate, micro_batches, own_rows, train_step
from finetune_trainer.tracking.background import Tracking

SPEED_SMOOTHING = 0.2
"""Weight of the newest step in the step time that the ETA is computed from."""
LOG_INTERVAL_SECONDS = 1.0
"""Steps that follow each other faster share a line."""
TRACKED = (
    "loss",
    "learning_rate",
    "grad_norm",
    "epoch",
    "tokens_per_second",
    "samples_per_second",
    "memory_used_bytes",
    "memory_peak_bytes",
    "checkpoint_stall_seconds",
    "data_wait_seconds",
)
"""What trackers are told of each step."""
log = logging.getLogger("finetune_trainer")


@dataclass
class Training:
    """Everything that the loop works with."""

    spec: LaunchSpec
    world: World
    engine: Any
    rows: Rows
    eval_rows: Rows | None
    benchmarks: Benchmarks | None
    order: RowOrder
    checkpoints: Checkpoints
    progress: Progress
    status: StateWriter
    journal: Journal | None
    """Rank 0's."""
    stop_requested: Callable[[], bool]
    device_facts: DeviceFacts
    startup: Startup
    tracking: Tracking
    profiler: StepProfiler
    step_seconds: float | None = None
    logged_at: float = 0.0
    batches: Prefetcher[Prepared] | None = None

    def run(self) -> None:
        """Trains to the last step; at its end the newest checkpoint is the final state.

        Raises:
            TerminatedError: a pod was asked to stop; a checkpoint has been saved if the job wants one.
            NonFiniteLossError: the loss or the gradient norm is not finite.
        """
        try:
            self._run()
        except NonFiniteLossError:
            # All ranks are here: what was staged before the accident is still worth its place on the volume.
            with contextlib.suppress(TrainerError):
                self._finish_save()
            raise

    def _run(self) -> None:
        total = self.order.total_steps
        if self.progress.last_eval_step is None or self._eval_due(self.progress.step):
            self._evaluate()
        self.startup.took("evaluation")
        while self.progress.step < total and not self._stopped_early():
            step = self.progress.step + 1
            started = time.perf_counter()
            result = self._step(step)
            self.startup.stepped()
            self._report(result, time.perf_counter() - started)
            self.profiler.step()
            self._note_saved()
            if result.stop:
                self._leave()
            if self._eval_due(step):
                self._evaluate()
            is_best = best_step(self.progress.metrics, self.spec.selection.metric) == step
            due = step % self.spec.checkpoint.every_steps == 0 or step == total
            if due or is_best or self._stopped_early():
                self._save()
        self.profiler.finish()
        self._finish_save()

    def choose_result(self) -> int:
        """Loads the best checkpoint if that is to be the result. Returns the step of what will be exported."""
        selection, step = self.spec.selection, self.progress.step
        best = best_step(self.progress.metrics, selection.metric)
        notes = []
        if step < self.order.total_steps:
            notes.append(
                f"Stopped early after {step} of {self.order.total_steps} steps: {selection.metric} has not improved in "
                f"{selection.early_stopping_patience} evaluations."
            )
        if selection.export_best and best is not None:
            if best != step:
                self.checkpoints.load_step(self.engine, best)
                notes.append(f"The output is the checkpoint of step {best}, the best by {selection.metric}.")
            step = best
        notes += [self.progress.note, self.journal.replay.verdict if self.journal is not None else ""]
        note = " ".join(filter(None, notes))
        if note:
            log.info("%s", note)
        self.status.beat(note=note)
        return step

    def _stopped_early(self) -> bool:
        selection = self.spec.selection
        if selection.early_stopping_patience is None:
            return False
        since = evaluations_without_improvement(
            self.progress.metrics, selection.metric, selection.early_stopping_min_delta
        )
        return since >= selection.early_stopping_patience

    def _step(self, step: int) -> StepResult:
        training = self.spec.training
        rate = learning_rate(step, self.order.total_steps, training)
        self.status.beat(Activity.TRAINING, learning_rate=rate)
        ds.set_learning_rate(self.engine, rate)
        if self.batches is None:
            plan = self._micro_batch_rows(step)
            self.batches = micro_batches(self.engine, self.rows, self.world.device, plan, training.loader_workers)
        result = train_step(
            self.engine,
            self.rows,
            self.order.rows(step),
            self.world,
            step=step,
            seed=training.seed,
            micro_batch_size=training.micro_batch_size,
            max_grad_norm=training.max_grad_norm,
            stop_requested=self._must_leave,
            beat=self.status.beat,
            batches=self.batches,
        )
        if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
            raise NonFiniteLossError(f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}")
        return result

    def _micro_batch_rows(self, first: int) -> Iterator[Sequence[int | None]]:
        """This rank's rows from a step on, to the end of training."""
        size = self.spec.training.micro_batch_size
        for step in range(first, self.order.total_steps + 1):
            yield from own_rows(self.order.rows(step), self.world, size)

    def _report(self, result: StepResult, seconds: float) -> None:
        progress, state = self.progress, self.status.state
        progress.step += 1
        progress.samples_total += result.num_samples
        progress.tokens_total += result.num_tokens
        progress.loss = result.loss
        previous = self.step_seconds or seconds
        self.step_seconds = previous + SPEED_SMOOTHING * (seconds - previous)
        self.status.beat(
            step=progress.step,
            epoch=round(self.order.epoch_after(progress.step), 4),
            loss=result.loss,
            grad_norm=result.grad_norm,
            samples_per_second=result.num_samples / seconds,
            tokens_per_second=result.num_tokens / seconds,
            eta_seconds=(self.order.total_steps - progress.step) * self.step_seconds,
            samples_total=progress.samples_total,
            tokens_total=progress.tokens_total,
            data_wait_seconds=state.data_wait_seconds + result.data_wait_seconds,
            **self.device_facts.read(),
        )
        if self.journal is not None:
            self.journal.write(
                progress.step, loss=result.loss, grad_norm=result.grad_norm, tokens=result.num_tokens, seconds=seconds
            )
        self.tracking.log(progress.step, **{name: getattr(state, name) for name in TRACKED})
        now = time.monotonic()
        if now - self.logged_at < LOG_INTERVAL_SECONDS and progress.step < self.order.total_steps:
            return
        self.logged_at = now
        log.info(
            "step %d/%d  loss %.4f  grad norm %.3f  lr %.2e  %.0f tokens/s",
            progress.step,
            self.order.total_steps,
            result.loss,
            result.grad_norm,
            state.learning_rate,
            result.num_tokens / seconds,
        )

    def _eval_due(self, step: int) -> bool:
        """Also true after a resume at a step whose evaluation was cut short."""
        if self.progress.last_eval_step == step:
            return False
        every = self.spec.training.eval_every_steps
        return step == self.order.total_steps or (step > 0 and every is not None and step % every == 0)

    def _evaluate(self) -> None:
        """Measures everything at this step and only then takes note: an evaluation that is cut short is done again."""
        step, progress = self.progress.step, self.progress
        values: dict[str, float] = {}
        if self.eval_rows is not None or self.benchmarks is not None:
            self.status.beat(Activity.EVALUATING)
        if self.eval_rows is not None:
            values |= self._held_out(self.eval_rows, step)
        if self.benchmarks is not None:
            scores = self.benchmarks.run(self.engine, step, self._must_leave, self.status.beat)
            if scores is None:
                self._leave()
            values |= scores
            log.info("step %d  %s", step, "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        ds.release_gathered(self.engine)
        if "EvalLoss" in values:
            progress.eval_loss = values["EvalLoss"]
            self.tracking.log(step, eval_loss=progress.eval_loss)
            if progress.last_eval_step is None:
                progress.base_eval_loss = progress.eval_loss
                self.tracking.log(step, base_eval_loss=progress.base_eval_loss)
        progress.last_eval_step = step
        if values:
            progress.metrics.append({"step": step, "values": values})
            self.status.beat(
                eval_loss=progress.eval_loss, base_eval_loss=progress.base_eval_loss, metrics=progress.newest_metrics()
            )
        if values and self.journal is not None:
            facts = (
                {"eval_loss": values["EvalLoss"], "eval_loss_hex": values["EvalLoss"].hex()} if self.eval_rows else {}
            )
            self.journal.event(step, **facts, metrics=values)

    def _held_out(self, rows: Rows, step: int) -> dict[str, float]:
        found = evaluate(
            self.engine,
            rows,
            self.world,
            micro_batch_size=self.spec.training.micro_batch_size,
            stop_requested=self._must_leave,
            beat=self.status.beat,
            workers=self.spec.training.loader_workers,
        )
        if found is None:
            self._leave()
        if not math.isfinite(found.loss):
            raise NonFiniteLossError(f"step {step}: held-out loss {found.loss}")
        log.info("step %d  held-out loss %.4f  token accuracy %.4f", step, found.loss, found.token_accuracy)
        return {"EvalLoss": found.loss, "TokenAccuracy": found.token_accuracy}

    def _save(self) -> None:
        started = time.perf_counter()
        self.status.beat(Activity.CHECKPOINTING)
        self.checkpoints.save(self.engine, self.progress, self.status.beat)
        if not self.spec.checkpoint.background:
            self.checkpoints.wait(self.status.beat)
        self._stood_still(started)

    def _finish_save(self) -> None:
        """Waits until the newest checkpoint counts."""
        started = time.perf_counter()
        self.status.beat(Activity.CHECKPOINTING)
        self.checkpoints.wait(self.status.beat)
        self._stood_still(started)

    def _stood_still(self, since: float) -> None:
        seconds = time.perf_counter() - since
        total = self.status.state.checkpoint_stall_seconds + seconds
        self.status.beat(Activity.TRAINING, checkpoint_stall_seconds=total)
        if self.journal is not None:
            self.journal.event(self.progress.step, checkpoint_stall_seconds=round(seconds, 4))
        self._note_saved()

    def _note_saved(self) -> None:
        """Publishes a checkpoint once it counts."""
        state, saved = self.status.state, self.checkpoints.newest
        if saved is None or saved.step == state.last_checkpoint_step:
            return
        log.info("step %d  checkpoint saved in %.2f s", saved.step, saved.seconds)
        self.status.beat(
            last_checkpoint_step=saved.step,
            last_checkpoint_time=saved.time,
            checkpoints=self.checkpoints.num_saved,
        )

    def _must_leave(self) -> bool:
        """Asked to stop, or unable to save: all ranks then come to `_leave` at the same step."""
        return self.stop_requested() or self.checkpoints.failed

    def _leave(self) -> NoReturn:
        """All ranks are here at the same step: one pod was asked to stop, or a save has failed, which is told here."""
        self._finish_save()
        step = self.progress.step
        if not self.spec.checkpoint.on_termination:
            raise TerminatedError(f"asked to stop; left after step {step} without saving (onTermination: false)")
        if step == 0:
            raise TerminatedError("asked to stop before the first step: nothing to save yet")
        if self.status.state.last_checkpoint_step != step:
            self._save()
            self._finish_save()
        raise TerminatedError(f"asked to stop; saved and left after step {step}")

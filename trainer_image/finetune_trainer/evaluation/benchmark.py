"""One evaluation on benchmarks: every problem is generated for, its programs run, and pass@k computed; all ranks share the work.

What is generated in one batch does not depend on the number of ranks, and neither does the result.
"""

import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune_api.launch import LaunchGeneration
from finetune_api.spec import BenchmarkName
from finetune_trainer.adapters import unwrap
from finetune_trainer.attention import plain_attention
from finetune_trainer.data.chat_templates import end_ids, end_of_turn
from finetune_trainer.distributed import World
from finetune_trainer.errors import ConfigError
from finetune_trainer.evaluation.generate import Prompt, Sampling, generate
from finetune_trainer.evaluation.pass_at_k import mean_pass_at_k
from finetune_trainer.evaluation.problems import FENCE, Problem, is_complete
from finetune_trainer.evaluation.sandbox import Limits, Sandbox, SandboxError, Verdict, find_protection

WAIT_SECONDS = 0.05
AGREE_TOKENS = 8
"""Ranks with whole weights agree to go on after so many tokens: in lockstep, each token would take as long as the slowest's."""
SHOWN_REASONS = 5
LOG_INTERVAL_SECONDS = 20.0
log = logging.getLogger("finetune_trainer")


def metric_name(benchmark: str, k: int) -> str:
    """For example `HumanEvalPassAt1`: the name in status, metrics and results."""
    return f"{benchmark}PassAt{k}"


def open_sandbox(folder: Path) -> Sandbox:
    """A sandbox that has passed its self-test.

    Raises:
        ConfigError: programs cannot be run safely on this machine.
    """
    try:
        protection = find_protection()
        sandbox = Sandbox(folder, protection)
        sandbox.check()
    except SandboxError as error:
        raise ConfigError(f"datasets.evaluation: benchmark: nothing will be run without a sandbox: {error}") from error
    log.info("sandbox: %s", protection.describe())
    return sandbox


@dataclass(frozen=True)
class _Sample:
    benchmark: int
    problem: int
    number: int
    prompt: Prompt


@dataclass
class Benchmarks:
    """The benchmarks of a job, ready to be run between two steps."""

    problems: dict[BenchmarkName, list[Problem]]
    generation: LaunchGeneration
    tokenizer: Any
    sandbox: Sandbox
    world: World
    seed: int
    workers: int
    """Programs that run at the same time on this rank."""
    position_limit: int | None
    """The model's; None if it has none."""
    stopped: bool = field(default=False, init=False)

    def run(
        self, engine: Any, step: int, stop_requested: Callable[[], bool], beat: Callable[[], None]
    ) -> dict[str, float] | None:
        """Runs them all; all ranks call it.

        Returns:
            pass@k by name, the same on all ranks; None if any rank was asked to leave before the end.

        Raises:
            SandboxError: a program could not be run at all.
        """
        started = time.perf_counter()
        self.stopped = False
        samples = list(self._samples(step))
        pool = ThreadPoolExecutor(max_workers=self.workers, thread_name_prefix="sandbox")
        pending: dict[tuple[int, int, int], Future[Verdict]] = {}
        engine.eval()
        try:
            # Texts grow by a token at a time: what is compiled and what wants whole sequences stands aside.
            with plain_attention(unwrap(engine)), torch.compiler.set_stance("force_eager"):
                self._generate(engine, samples, pool, pending, stop_requested, beat)
            if not self.stopped:
                self._wait(pending, stop_requested, beat)
        finally:
            engine.train()
            pool.shutdown(wait=False, cancel_futures=True)
        if self.stopped:
            return None
        found = self.world.together(lambda: {key: future.result() for key, future in pending.items()})
        verdicts = {key: verdict for part in found for key, verdict in part.items()}
        log.info("benchmarks: %d programs in %.1f s", len(samples), time.perf_counter() - started)
        return self._scores(verdicts)

    def _samples(self, step: int) -> Iterator[_Sample]:
        limit = (self.position_limit or 2**31) - 1
        for index, (name, problems) in enumerate(self.problems.items()):
            for at, problem in enumerate(problems):
                ids = self._encode(problem)
                if len(ids) > limit:
                    log.warning(
                        "%s: the prompt of %s has %d tokens and counts as failed", name, problem.task_id, len(ids)
                    )
                    continue
                for number in range(self.generation.samples):
                    seed = (self.seed, step, index, at, number)
                    if self.tokenizer.chat_template:
                        prompt = Prompt(ids, (FENCE,), seed, is_complete)
                    else:
                        prompt = Prompt(ids, problem.stops, seed)
                    yield _Sample(index, at, number, prompt)

    def _encode(self, problem: Problem) -> list[int]:
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": problem.question}]
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(problem.prompt)["input_ids"]
        return ids

    def _generate(
        self,
        engine: Any,
        samples: list[_Sample],
        pool: ThreadPoolExecutor,
        pending: dict[tuple[int, int, int], Future[Verdict]],
        stop_requested: Callable[[], bool],
        beat: Callable[[], None],
    ) -> None:
        """Batches of prompts of like length, dealt out in turn; a rank without one takes part with a token of its own."""
        generation, size = self.generation, self.generation.batch_size
        order = sorted(samples, key=lambda s: (-len(s.prompt.ids), s.benchmark, s.problem, s.number))
        batches = [order[at : at + size] for at in range(0, len(order), size)]
        idle = _Sample(0, 0, 0, Prompt([0], (), (0,)))
        every = 1 if self.world.size == 1 or engine.zero_optimization_stage() == 3 else AGREE_TOKENS
        calls = itertools.count(1)

        def go_on(unfinished: bool) -> bool:
            beat()
            if next(calls) % every:
                return True
            unfinished_ranks, stops = self.world.sum([float(unfinished), float(stop_requested())])
            self.stopped = stops > 0
            return unfinished_ranks > 0 and not self.stopped

        said, end_ids = time.monotonic(), self._end_ids(engine)
        for first in range(0, len(batches), self.world.size):
            index = first + self.world.rank
            batch = batches[index] if index < len(batches) else []
            # The same on all ranks: the longest prompt of the round decides, and it is the first batch's.
            room = (self.position_limit or 2**31) - len(batches[first][0].prompt.ids)
            sampling = Sampling(generation.temperature, generation.top_p, min(generation.max_new_tokens, room))
            texts = generate(
                engine,
                [sample.prompt for sample in batch] or [idle.prompt],
                self.tokenizer,
                sampling,
                device=self.world.device,
                end_ids=end_ids,
                go_on=go_on if batch else lambda _: go_on(False),
            )
            if self.stopped:
                return
            for sample, text in zip(batch, texts, strict=False):
                key = (sample.benchmark, sample.problem, sample.number)
                pending[key] = pool.submit(self._judge, sample, text)
            if time.monotonic() - said > LOG_INTERVAL_SECONDS:
                said = time.monotonic()
                written = min((first + self.world.size) * size, len(samples))
                log.info("benchmarks: %d of %d programs are written", written, len(samples))

    def _end_ids(self, engine: Any) -> frozenset[int]:
        """The tokenizer's end of text, the template's end of a turn, and those of the model's own generation configuration."""
        config = getattr(unwrap(engine), "generation_config", None)
        turn = end_of_turn(self.tokenizer)
        own = (self.tokenizer.eos_token_id, self.tokenizer.convert_tokens_to_ids(turn) if turn else None)
        return frozenset([*end_ids(config), *(i for i in own if i is not None)])

    def _judge(self, sample: _Sample, text: str) -> Verdict:
        problem = list(self.problems.values())[sample.benchmark][sample.problem]
        chat = bool(self.tokenizer.chat_template)
        program = problem.programs_of_answer(text) if chat else problem.program_of_continuation(text)
        return self.sandbox.run(program, Limits.of(self.generation.timeout_seconds))

    def _wait(
        self, pending: dict[Any, Future[Verdict]], stop_requested: Callable[[], bool], beat: Callable[[], None]
    ) -> None:
        """Together, so that no rank sits in a collective while another one runs programs."""
        while True:
            beat()
            left = sum(not future.done() for future in pending.values())
            unfinished, stops = self.world.sum([float(left), float(stop_requested())])
            self.stopped = stops > 0
            if self.stopped or not unfinished:
                return
            time.sleep(WAIT_SECONDS)

    def _scores(self, verdicts: dict[tuple[int, int, int], Verdict]) -> dict[str, float]:
        scores = {}
        for index, (name, problems) in enumerate(self.problems.items()):
            own = {key: verdict for key, verdict in verdicts.items() if key[0] == index}
            passed = Counter(problem for (_, problem, _), verdict in own.items() if verdict.passed)
            correct = [passed[problem] for problem in range(len(problems))]
            for k in self.generation.k:
                scores[metric_name(name, k)] = mean_pass_at_k(self.generation.samples, correct, k)
            reasons = Counter(verdict.reason.split(":")[0] for verdict in own.values() if not verdict.passed)
            shown = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(SHOWN_REASONS))
            log.info("%s: %d of %d programs passed; the others: %s", name, sum(correct), len(own), shown or "none")
        return scores

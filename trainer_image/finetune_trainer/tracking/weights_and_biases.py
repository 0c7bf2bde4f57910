"""Weights & Biases, through its own client.

The client starts a process of its own (`wandb-core`), which ends by itself within a second of this one, however that ends.
"""

from pathlib import Path
from typing import Any

from finetune_api.launch import LaunchWandb
from finetune_trainer.tracking.base import RunFacts

INIT_SECONDS = 60


class WandbTracker:
    """All attempts of a job are one run, whose id is the job's UID."""

    name = "tracking.wandb"

    def __init__(self, settings: LaunchWandb) -> None:
        self._settings = settings
        self._run: Any = None

    def start(self, facts: RunFacts) -> None:
        import wandb

        # Given here, the key gets into no environment and no file. The client must not look at the process's output, the
        # machine or the code: only what is logged leaves the pod.
        settings = wandb.Settings(
            api_key=self._api_key(),
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            init_timeout=INIT_SECONDS,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
        )
        self._run = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            name=self._settings.run_name,
            id=facts.uid,
            resume="allow",
            config=facts.config,
            settings=settings,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        # A step that the run already has is dropped by the client: a resumed attempt computes the same values again.
        self._run.log(values, step=step)

    def finish(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)

    def _api_key(self) -> str | None:
        file = self._settings.token_file
        return None if file is None else Path(file).read_text(encoding="utf-8").strip()

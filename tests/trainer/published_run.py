"""A converted job run by `finetune run` on this machine, and what it leaves, for tests of the published configurations."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.trainer import jobs
from tests.trainer.conftest import Assets
from tests.trainer.hub import TOKEN
from tests.trainer.published import change
from tests.trainer.test_local import Machine


class Published(Machine):
    """A converted job in a folder of its own: volume `data` is the folder, Secrets are files in it."""

    def __init__(self, folder: Path, server: jobs.ForkServer, assets: Assets, body: dict[str, Any], hook: str) -> None:
        super().__init__(folder, server, assets)
        (folder / "token").write_text(TOKEN)
        (folder / "key").write_text("0123456789abcdef0123456789abcdef01234567")
        self.facts_folder = folder / "facts"
        self.facts_folder.mkdir()
        variables = {"TEST_HOOK": hook, "TEST_FACTS": self.facts_folder, "WANDB_MODE": "offline", "WANDB_DIR": folder}
        env = [{"name": name, "value": str(value)} for name, value in variables.items()]
        self.body = change(body, {"trainer.env": env, "cache.uri": "pvc://data/cache"})
        self.volumes = [f"data={folder}"]
        self.secrets = [f"hub/token={folder / 'token'}", f"wandb/api-key={folder / 'key'}"]

    @property
    def output(self) -> Path:
        return self.folder / self.body["spec"]["output"]["uri"].removeprefix("pvc://data/")

    @property
    def runs(self) -> Path:
        """The folder in which the run is kept, beside its checkpoints."""
        return next(self.output.parent.glob("checkpoints/*.run"))

    @property
    def log(self) -> str:
        return (self.runs / "attempt-1.log").read_text(errors="replace")

    @property
    def launch(self) -> dict[str, Any]:
        launch: dict[str, Any] = json.loads((self.runs / "attempt-1.launch.json").read_text())
        return launch

    def result(self) -> "Result":
        """What a finished run has left."""
        checkpoints = Path(self.launch["checkpoint"]["dir"])
        lines = [json.loads(line) for line in (checkpoints / "journal.jsonl").read_text().splitlines()]
        ranks = sorted(self.facts_folder.glob("rank-*.json"))
        return Result(self, checkpoints, lines, [json.loads(path.read_text()) for path in ranks])


@dataclass(frozen=True)
class Result:
    """A finished run."""

    machine: Published
    checkpoints: Path
    lines: list[dict[str, Any]]
    """Of the journal."""
    ranks: list[dict[str, Any]]
    """What each rank wrote down, see `facts_hook`."""

    @property
    def launch(self) -> dict[str, Any]:
        return self.machine.launch

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "loss" in line]

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "metrics" in line]

    @property
    def adapter(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.machine.output / "adapter_config.json").read_text())
        return config

    def tensors(self) -> dict[str, Any]:
        """The exported adapter."""
        from safetensors.torch import load_file

        return load_file(self.machine.output / "adapter_model.safetensors")

    def optimizer_state(self, *names: str) -> list[Any]:
        """What all ranks keep under these names (`master`, `exp_avg`, `exp_avg_sq`) in the newest checkpoint."""
        from safetensors.torch import load_file

        files = max(self.checkpoints.glob("step-*")).glob("rank-*")
        tensors = [item for file in files for item in load_file(file).items()]
        return [tensor for name, tensor in tensors if name.partition(".")[2] in names]

    def samples(self) -> Iterator[tuple[str, str]]:
        """The tokenised training samples as text, and the part of each that is learnt."""
        from transformers import AutoTokenizer

        tokenizer, store = AutoTokenizer.from_pretrained(self.machine.output), self.store()
        for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True):
            ids, targets = store.ids[begin:end], store.targets[begin:end]
            yield tokenizer.decode(ids), tokenizer.decode(ids[targets])

    def store(self) -> Any:
        from finetune_trainer.data.store import TokenStore

        (folder,) = (self.machine.folder / "cache" / "tokens").iterdir()
        return TokenStore.load(folder)

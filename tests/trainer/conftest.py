"""Shared by the trainer's tests: one fork server, one tiny model and its data for the whole session."""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Importing torch and its friends from source takes a minute of CPU time: keep their bytecode, outside the checkout.
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "finetune-operator"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(CACHE / "pycache")
sys.dont_write_bytecode = False
os.environ.update({"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"})

import pytest  # noqa: E402

from tests.trainer import jobs, tiny  # noqa: E402
from tests.trainer.hub import Hub  # noqa: E402


@dataclass(frozen=True)
class Assets:
    model: Path
    train: Path
    evaluation: Path


@pytest.fixture(scope="session")
def server(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[jobs.ForkServer]:
    os.environ["HF_ENDPOINT"] = hub.url  # huggingface_hub reads it when it is imported
    server = jobs.ForkServer(tmp_path_factory.mktemp("fork"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    folder = tmp_path_factory.mktemp("assets")
    return Assets(
        tiny.make_model(folder / "model"),
        tiny.write_jsonl(folder / "train.jsonl", tiny.chats(40, seed=1)),
        tiny.write_jsonl(folder / "eval.jsonl", tiny.chats(10, seed=2)),
    )


@pytest.fixture(scope="session")
def hub(assets: Assets) -> Iterator[Hub]:
    """Serves the tiny model as team/tiny and team/gated, its data as the data set team/chats."""
    hub = Hub()
    (assets.model / "pytorch_model.bin").write_bytes(b"a twin that nobody needs")
    hub.repositories = {
        "models/team/tiny": assets.model,
        "models/team/gated": assets.model,
        "datasets/team/chats": assets.train.parent,
    }
    hub.gated.add("models/team/gated")
    yield hub
    hub.stop()


StartPod = Callable[..., jobs.Pod]


@pytest.fixture
def start(server: jobs.ForkServer, assets: Assets, tmp_path: Path) -> StartPod:
    """Starts a one-node job on the tiny model; keyword arguments change its launch file."""

    def start(folder: Path = tmp_path, **changes: Any) -> jobs.Pod:
        spec = jobs.launch(folder, assets.model, assets.train, assets.evaluation, **changes)
        return jobs.Pod(folder, spec, server)

    return start

"""hf:// sources, against a small server that speaks the hub's API."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from finetune_api.launch import HubSource
from finetune_trainer.errors import HubUnavailableError
from finetune_trainer.hub import _hub_errors, _marker
from tests.trainer import jobs
from tests.trainer.conftest import Assets
from tests.trainer.hub import COMMIT, TOKEN, Hub


def source(repo: str = "team/tiny", kind: str = "model", **more: Any) -> dict[str, Any]:
    return {"kind": "Hub", "repoId": repo, "repoType": kind, "revision": "main", "path": "", "tokenFile": None, **more}


def client(
    what: dict[str, Any], cache: Path, endpoint: str, largest_file: int = resource.RLIM_INFINITY
) -> subprocess.Popen[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command = [sys.executable, "-m", "tests.trainer.hub_client", json.dumps(what), str(cache)]
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, preexec_fn=limit)


def result(process: subprocess.Popen[str]) -> dict[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    answer: dict[str, str] = json.loads(out.splitlines()[-1])
    return answer


@pytest.fixture
def token(tmp_path: Path) -> str:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    return str(file)


def test_two_processes_download_each_file_once(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    both = [client(source(), tmp_path / "cache", hub.url) for _ in range(2)]
    answers = [result(process) for process in both]
    assert answers[0] == answers[1]
    assert answers[0]["commit"] == COMMIT
    names = {path.name for path in Path(answers[0]["path"]).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "pytorch_model.bin" not in names
    downloads = {what: count for what, count in hub.asked.items() if what.startswith("GET team/tiny/resolve")}
    assert downloads and set(downloads.values()) == {1}


def test_a_file_of_a_dataset_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    answer = result(client(source("team/chats", "dataset", path="train.jsonl"), tmp_path / "cache", hub.url))
    assert Path(answer["path"]).name == "train.jsonl"
    assert [p.name for p in Path(answer["path"]).parent.iterdir()] == ["train.jsonl"]


def test_gated_with_token(hub: Hub, tmp_path: Path, token: str) -> None:
    answer = result(client(source("team/gated", tokenFile=token), tmp_path / "cache", hub.url))
    assert answer["commit"] == COMMIT


REFUSED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "gated": (source("team/gated"), "ConfigError", ["credentialsRef", "hf://team/gated", "gated"]),
    "unknown": (source("team/none"), "ConfigError", ["model.uri", "hf://team/none", "does not exist"]),
    "revision": (source(revision="v9"), "ConfigError", ["model.revision", "`v9`"]),
    "path": (source("team/chats", "dataset", path="none.jsonl"), "ConfigError", ["none.jsonl"]),
    "token-file": (source(tokenFile="/none/token"), "ConfigError", ["credentialsRef", "token file"]),
}


@pytest.mark.parametrize(("what", "reason", "parts"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_name_the_field(hub: Hub, tmp_path: Path, what: dict[str, Any], reason: str, parts: list[str]) -> None:
    answer = result(client(what, tmp_path / "cache", hub.url))
    assert answer["reason"] == reason
    for part in parts:
        assert part in answer["message"]


def test_a_download_that_was_cut_off_is_done_again(hub: Hub, tmp_path: Path) -> None:
    path = Path(result(client(source(), tmp_path / "cache", hub.url))["path"])
    (marker,) = (tmp_path / "cache" / "complete").iterdir()
    marker.write_text("")  # a full disk, or a kill between opening and writing
    (path / "config.json").unlink()
    assert Path(result(client(source(), tmp_path / "cache", hub.url))["path"]) == path
    assert (path / "config.json").is_file() and marker.read_text()


def test_a_download_that_was_cleared_away_is_done_again(hub: Hub, tmp_path: Path) -> None:
    path = Path(result(client(source(), tmp_path / "cache", hub.url))["path"])
    shutil.rmtree(tmp_path / "cache" / "hub")
    assert Path(result(client(source(), tmp_path / "cache", hub.url))["path"]) == path
    assert (path / "config.json").is_file()


@pytest.mark.parametrize("kind", ["full", "a file"])
def test_a_cache_that_cannot_be_written_is_not_the_hubs_fault(hub: Hub, tmp_path: Path, kind: str) -> None:
    cache = tmp_path / "cache"
    if kind == "a file":
        cache.write_text("in the way")
    answer = result(client(source(), cache, hub.url, largest_file=2000))
    assert answer["reason"] == "StorageError", answer
    assert answer["message"].startswith(f"cache.uri: {cache} cannot be written: ")


def test_every_path_of_a_repository_is_marked_by_itself(tmp_path: Path) -> None:
    paths = ["", "a/b", "a--b", f"{'x' * 200}/{'y' * 200}"]
    names = {_marker(HubSource(**source(path=path)), COMMIT, tmp_path).name for path in paths}
    assert len(names) == len(paths) and max(map(len, names)) < 200


@pytest.mark.parametrize(
    "error",
    [
        OSError("Consistency check failed: file should be of size 7 but has size 5"),
        ConnectionResetError(104, "Connection reset by peer"),
        TimeoutError(110, "Connection timed out"),
    ],
    ids=["cut", "reset", "timed-out"],
)
def test_errors_of_connections_are_the_hubs(error: OSError) -> None:
    with pytest.raises(HubUnavailableError), _hub_errors(HubSource(**source()), "hf://a/b", "model"):
        raise error


def test_a_hub_that_stops_answering_between_files_is_waited_for() -> None:
    with (
        pytest.raises(HubUnavailableError, match="no hub answered"),
        _hub_errors(HubSource(**source()), "hf://a/b", "model"),
    ):
        raise LocalEntryNotFoundError("the file's head answered 503 until retries were used up")


def test_no_hub_and_a_hub_out_of_order(hub: Hub, tmp_path: Path) -> None:
    nobody = client(source(), tmp_path / "cache", f"http://127.0.0.1:{jobs.free_port()}")
    hub.failing = True
    try:
        broken = client(source(), tmp_path / "cache", hub.url)
        for answer in (result(nobody), result(broken)):
            assert answer["reason"] == "HubUnavailable", answer
            assert "hf://team/tiny" in answer["message"]
    finally:
        hub.failing = False


def test_a_job_from_the_hub_pins_the_commit(hub: Hub, server: jobs.ForkServer, assets: Assets, tmp_path: Path) -> None:
    spec = jobs.launch(tmp_path, assets.model, assets.train, numProcPerNode=2, training__microBatchSize=1)
    spec["training"]["maxSteps"] = 2
    spec["model"].update(uri="hf://team/tiny", source=source())
    data = source("team/chats", "dataset", path="train.jsonl")
    spec["train"][0] |= {"uri": "hf://datasets/team/chats/train.jsonl", "source": data, "maxSamples": 8}
    pod = jobs.Pod(tmp_path, spec, server)
    report = pod.done()
    assert report["modelRevision"] == COMMIT
    assert (
        json.loads((tmp_path / "output" / "adapter_config.json").read_text())["base_model_name_or_path"] == "team/tiny"
    )
    hub.asked.clear()
    again = jobs.next_attempt(spec)
    again["model"]["source"]["revision"] = COMMIT
    assert jobs.Pod(tmp_path, again, server).done()["resumedFromStep"] == 2
    assert not [what for what in hub.asked if "resolve" in what], "nothing is downloaded a second time"

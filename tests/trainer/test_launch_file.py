"""The launch file of an operator that is newer than the trainer, as a job has that outlives an upgrade."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.config import read_launch
from finetune_trainer.errors import ConfigError
from tests.trainer import jobs


def launch(folder: Path) -> dict[str, Any]:
    return jobs.launch(folder, Path("/model"), Path("/data/train.jsonl"))


def written(folder: Path, spec: dict[str, Any]) -> Path:
    file = folder / "launch.json"
    file.write_text(json.dumps(spec))
    return file


def test_what_the_trainer_does_not_know_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = launch(tmp_path)
    known = read_launch(written(tmp_path, spec))
    spec["nextField"] = {"a": 1}
    spec["training"]["nextField"] = True
    spec["train"][0]["source"]["nextField"] = None
    file = written(tmp_path, spec)
    assert read_launch(file, warn=False) == known
    assert caplog.records == []
    assert read_launch(file) == known
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for path in ("nextField", "training.nextField", "train.0.source.nextField"):
        assert f" {path}" in record.getMessage()


def test_a_wrong_value_is_told_beside_what_is_unknown(tmp_path: Path) -> None:
    spec = launch(tmp_path) | {"nextField": 1, "method": "Next"}
    with pytest.raises(ConfigError, match="method: ") as refusal:
        read_launch(written(tmp_path, spec))
    assert "nextField" not in str(refusal.value)


@pytest.mark.parametrize(("version", "image"), [(2, "too old"), (0, "too new")])
def test_another_version_says_which_image_does_not_fit(tmp_path: Path, version: int, image: str) -> None:
    with pytest.raises(ConfigError, match=image):
        read_launch(written(tmp_path, launch(tmp_path) | {"schemaVersion": version, "nextField": 1}))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_what_is_no_launch_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "launch.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="not a launch file"):
        read_launch(file)

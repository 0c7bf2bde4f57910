"""The command line, and the small parts that the cases do not show."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_cli.__main__ import main
from finetune_cli.convert.conversion import decimal
from finetune_cli.convert.source import SourceError, read_source
from finetune_cli.convert.uris import job_name, join

MINIMAL = "model_name_or_path: org/model\ndataset: a\ndataset_dir: {a: {file_name: a.json}}\noutput_dir: out\ndo_train: true\n"
OPTIONS = ["--data-uri", "pvc://data", "--output-uri", "pvc://data"]
_ONLY_YAML = """
import sys
for name in ("kubernetes", "rich", "pydantic", "kopf", "torch"):
    sys.modules[name] = None
from finetune_cli.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "train.yaml"
    path.write_text(MINIMAL)
    return path


def test_it_needs_no_package_but_pyyaml(config: Path) -> None:
    command = [sys.executable, "-c", _ONLY_YAML, "convert", str(config), *OPTIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["metadata"] == {"name": "out"}


def test_a_template_is_read_from_its_file(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jinja = config.parent / "chat.jinja"
    jinja.write_text("{% for message in messages %}\n{{ message['content'] }}\n{% endfor %}\n")
    assert main(["convert", str(config), *OPTIONS, "--chat-template", str(jinja)]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["spec"]["model"]["chatTemplate"] == jinja.read_text()


def test_json_is_read_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my_run.json"
    path.write_text('{\n\t"model_name_or_path": "org/model",\n\t"learning_rate": 1e-4,\n\t"lora_rnak": 8\n}\n')
    assert main(["convert", str(path), *OPTIONS]) == 2
    assert f"{path}:4: `lora_rnak` is no key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: No such file or directory"),
        ("", "is a mapping of keys to values"),
        ("- a\n- b\n", "is a mapping of keys to values"),
        ("a: [\n", "not valid YAML"),
        ("a: !!python/object:os.system {}\n", ":1: not valid YAML here: the tag"),
        ("a: !!python/name:os.system\n", ":1: not valid YAML: could not determine a constructor"),
    ],
    ids=["absent", "empty", "list", "broken", "object", "scalar-object"],
)
def test_what_is_no_configuration(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.yaml"
    if text is not None:
        path.write_text(text)
    assert main(["convert", str(path), *OPTIONS]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template, path = tmp_path / "template.jinja", tmp_path / "train.yaml"
    template.write_bytes(b"\xff\xfe")
    path.write_text(f"model_name_or_path: a/b\nstage: sft\ndataset: x\noutput_dir: o\ndeepspeed: {'a' * 300}.json\n")
    assert main(["convert", str(path), *OPTIONS, "--chat-template", str(template)]) == 2
    assert f"--chat-template {template}: cannot be read" in capsys.readouterr().err
    assert main(["convert", str(path), *OPTIONS]) == 2
    assert "aaa.json` beside the configuration" in capsys.readouterr().err


@pytest.mark.parametrize("attribute", ["columns", "tags"])
def test_a_data_set_of_another_shape_is_refused(
    attribute: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("model_name_or_path: a/b\nstage: sft\ndataset: x\ndataset_dir: .\noutput_dir: o\n")
    (tmp_path / "dataset_info.json").write_text(json.dumps({"x": {"file_name": "x.json", attribute: ["a"]}}))
    assert main(["convert", str(path), *OPTIONS]) == 2
    assert f"`{attribute}` must be a mapping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("warmup_steps: .inf", "`warmup_steps` must be a number"),
        ("save_steps: .inf", "`save_steps` must be a number"),
        ("learning_rate: .nan", "`learning_rate` must be a number"),
        (f"learning_rate: {'9' * 400}", "`learning_rate` must be a number"),
        ("lora_rank: .inf", "`lora_rank` must be a whole number"),
        ("interleave_probs: [.inf]\nmix_strategy: interleave_under", "must be 1 numbers above 0"),
        (
            "lr_scheduler_type: polynomial\nlr_scheduler_kwargs: {power: .inf}",
            "`power: Infinity` has no field",
        ),
        ("deepspeed: {gradient_clipping: null}", "must be a number or `auto`, got `null`"),
        ("deepspeed: {gradient_clipping: .inf}", "must be a number or `auto`, got `Infinity`"),
        ("deepspeed: {train_batch_size: many}", "must be a number or `auto`, got `many`"),
    ],
)
def test_what_is_no_number(line: str, message: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.write_text(f"{MINIMAL}{line}\n")
    assert main(["convert", str(config), *OPTIONS]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--name", "Tune"], "lower-case letters"),
        (["--name", "a" * 51], "at most 50"),
        (["--num-nodes", "0"], "above 0"),
        (["--model-uri", "/models/a"], "must begin with hf:// or pvc:// or file://"),
        (["--data-uri", "s3://bucket"], "must begin with pvc:// or file://"),
    ],
)
def test_wrong_options(option: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["convert", str(config), *option])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stem", "output_dir", "name"),
    [
        ("qwen3_lora_sft", "saves/x", "qwen3-lora-sft"),
        ("sft", "saves/qwen3-4b/lora/sft", "qwen3-4b-lora-sft"),
        ("config", "/mnt/outputs/My Run!", "my-run"),
        ("train", None, "train"),
        ("7b", "saves/x", "job-7b"),
        ("train", "saves/../7b", "job-7b"),
        ("a" * 60, None, "a" * 50),
        ("\u6a21\u578b", "saves", "finetune"),
    ],
)
def test_job_name(stem: str, output_dir: str | None, name: str) -> None:
    assert job_name(stem, output_dir) == name


@pytest.mark.parametrize(
    ("prefix", "path", "uri"),
    [
        ("pvc://data/runs/", "saves/a", "pvc://data/runs/saves/a"),
        ("pvc://data", "/mnt/a/", "pvc://data/mnt/a"),
        ("pvc://data", "./a/../b", "pvc://data/b"),
        ("file:///", "a", "file:///a"),
        ("pvc://data", ".", "pvc://data"),
        ("pvc://data", "../a", None),
    ],
)
def test_join(prefix: str, path: str, uri: str | None) -> None:
    assert join(prefix, path) == uri


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (5e-5, "0.00005"),
        (1e-8, "1e-8"),
        (0.999, "0.999"),
        (1.0, "1"),
        (0.0, "0"),
        (1.23456e-5, "1.23456e-5"),
        (16, "16"),
    ],
)
def test_decimal(number: float, text: str) -> None:
    assert decimal(number) == text
    assert float(text) == number


def test_numbers_dates_and_lines_are_read_as_llama_factory_does(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("a: 1e-4\nb: 2026-11-25\nbase: &base\n  c: 1\nd:\n  <<: *base\n  e: [x, {f: no}]\n")
    source = read_source(path, "file.yaml")
    expected: dict[str, Any] = {"a": 1e-4, "b": "2026-11-25", "base": {"c": 1}, "d": {"c": 1, "e": ["x", {"f": False}]}}
    assert source.data == expected
    assert [source.at("a"), source.at("d", "e", 1, "f"), source.at("d", "zzz"), source.at("zzz")] == [
        "file.yaml:1",
        "file.yaml:7",
        "file.yaml:5",
        "file.yaml",
    ]


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_text("d:\n  e: 1\n  e: 2\n")
    with pytest.raises(SourceError, match=r"file.yaml:3: `e` stands here and on line 2"):
        read_source(path)

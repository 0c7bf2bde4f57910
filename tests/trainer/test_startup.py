"""The start: its phases, what is read ahead, where weights go, and that compiled code is kept and never stale."""

import ctypes
import json
import mmap
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer import adapters, lora_linear, model, readahead, versions
from finetune_trainer import compile as regional
from tests.trainer import jobs
from tests.trainer.conftest import Assets, StartPod

PHASES = {
    "supervisor", "imports", "gang", "sources", "data", "weights", "engine", "resume", "evaluation", "first_step", "compile",
}  # fmt: skip


def test_the_phases_add_up_to_the_first_step(start: StartPod, tmp_path: Path) -> None:
    before = time.monotonic()
    pod = start(training__maxSteps=2000)
    state = pod.wait_for(lambda state: state.step >= 1)
    waited = time.monotonic() - before
    assert set(state.startup) == PHASES and all(seconds >= 0 for seconds in state.startup.values())
    assert state.startup["compile"] == 0
    assert 0.5 * waited < sum(state.startup.values()) < waited + 0.1, "clock ticks are 10 ms"
    values = dict(line.rsplit(" ", 1) for line in pod.get("/metrics").splitlines() if not line.startswith("#"))
    assert float(values['finetune_startup_seconds{phase="weights",rank="0"}']) == state.startup["weights"]
    pod.terminate()
    pod.wait()


def test_the_result_tells_the_start(start: StartPod, tmp_path: Path) -> None:
    pod = start(training__maxSteps=2)
    pod.done()
    result = json.loads((tmp_path / "output" / "train_result.json").read_text())
    assert set(result["startup_seconds"]) == PHASES
    assert 0 < sum(result["startup_seconds"].values()) < 60


def resident(file: Path) -> float:
    """Share of a file's pages that are in memory."""
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as pages:
        count = -(-len(pages) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * count)()
        held = ctypes.c_char.from_buffer(pages)
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(len(pages)), found) == 0
        del held
        return sum(page & 1 for page in found) / count


def test_weights_are_read_ahead_if_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readahead, "BLOCK_BYTES", 1 << 20)
    files = [tmp_path / f"model-{n}.safetensors" for n in range(3)]
    other = tmp_path / "consolidated.safetensors"
    for file in [*files, other]:
        with file.open("wb") as stream:
            stream.write(os.urandom(5 << 20))
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {str(n): file.name for n, file in enumerate(files)}}))
    if resident(files[0]) > 0.5:
        pytest.skip("this file system keeps its pages")
    monkeypatch.setattr(readahead, "_free_memory", lambda: 25 << 20)
    assert readahead.read_ahead(tmp_path) == [], "15 MiB are more than half of what is free"
    monkeypatch.setattr(readahead, "_free_memory", lambda: 40 << 20)
    for thread in readahead.read_ahead(tmp_path):
        thread.join()
    assert [resident(file) for file in files] == [1.0] * 3
    assert resident(other) < 0.5, "no weights that are loaded"
    index.write_text("{")
    assert readahead.read_ahead(tmp_path) == []
    assert readahead.read_ahead(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("stage", "cuda", "expected"), [(0, True, {"": 3}), (2, True, {"": 3}), (3, True, None), (0, False, None)]
)
def test_weights_go_straight_to_the_device(
    stage: int, cuda: bool, expected: Any, assets: Assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for ZeRO-3, which hands out each rank's part."""
    import transformers

    from finetune_api.launch import LaunchSpec

    told: dict[str, Any] = {}

    def from_pretrained(*_args: Any, **kwargs: Any) -> Any:
        told.update(kwargs)
        raise ValueError("seen")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    spec = LaunchSpec.model_validate(
        jobs.launch(tmp_path, assets.model, assets.train, deepspeed__zeroStage=stage, training__precision="FP32")
    )
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}
    with pytest.raises(model.ConfigError, match="seen"):
        model.load_model(assets.model, spec, config)
    assert told.get("device_map") == expected


def test_compiled_code_can_be_cached(assets: Assets) -> None:
    """Of layers whose adapters are our own operators; torch keeps no graph with something that it does not know."""
    from peft import LoraConfig, get_peft_model
    from torch._functorch._aot_autograd.autograd_cache import check_cacheable
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(assets.model, dtype=torch.float32)
    trained = get_peft_model(llama, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert lora_linear.install(trained)
    targets: list[str] = []

    def compiler(graph: Any, _inputs: Any) -> Any:
        targets.extend(str(node.target) for node in graph.graph.nodes)
        check_cacheable(graph)
        return graph.forward

    torch._dynamo.reset()
    regional.compile_layers(adapters.unwrap(trained), whole=True, backend=compiler)
    trained(input_ids=torch.zeros((1, 8), dtype=torch.int64), use_cache=False).logits.sum().backward()
    assert any("finetune" in target for target in targets), "the operators are part of the graph"


def test_cached_code_of_an_older_trainer_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch does not look into our operators: with the same graph it would take an older one's gradient."""
    package = shutil.copytree(Path(versions.__file__).parent, tmp_path / "finetune_trainer")
    monkeypatch.setattr(versions, "__file__", str(package / "versions.py"))
    digests = []
    for change in (lambda: None, lambda: None, lambda: (package / "lora_linear.py").write_text("# changed")):
        change()
        versions.code_digest.cache_clear()
        digests.append(versions.code_digest())
    versions.code_digest.cache_clear()
    assert digests[0] == digests[1] != digests[2]

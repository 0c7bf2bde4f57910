"""Two published configurations convert and train: every key of their LLaMA-Factory files has its effect.

`finetune convert`, then `finetune run` on two ranks with ZeRO-3, on tiny models of the same architecture. Each file's keys and
the checks below are the same set; a check gets the finished run and the value that stands in the file.
"""

import json
import math
import multiprocessing
import struct
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from finetune_api.launch import LaunchSpec
from finetune_cli.errors import CliError
from finetune_trainer.memory import GIB, host_memory, needed, read_shapes
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets
from tests.trainer.hub import COMMIT, Hub
from tests.trainer.published import change, convert, make_llama, questions, source
from tests.trainer.published_run import Published, Result
from tests.trainer.test_benchmarks import MBPP, odd_problem
from tests.trainer.test_memory import LLAMA_2_70B
from tests.trainer.test_tracking import wandb_records

LLAMA, CODE = "llama2-70b-lora-zero3", "codellama-34b"
ON_VOLUMES = ("--data-uri", "pvc://data/sets", "--output-uri", "pvc://data/runs")
SECRETS = ("--hub-secret", "hub", "--wandb-secret", "wandb/api-key")
TWO = ("--num-proc-per-node", "2")
SDPA = {"training.attention": "SDPA"}
"""FlashAttention 2 is for GPUs."""
SMALLER: dict[str, dict[str, Any]] = {
    LLAMA: SDPA,
    CODE: {
        **SDPA,
        "deepspeed.zeroStage": 3,
        # DeepSpeed's default is on: with the one run it is asked for, with the other it is not wanted.
        "deepspeed.config": {"zero_optimization": {"memory_efficient_linear": False}},
        "training.evalEverySteps": 2,
        "checkpoint.everySteps": 1,
        "evaluation.generation": {"maxNewTokens": 4},
    },
}
"""All that the runs change in the converted jobs."""
RECORDS = {LLAMA: 32, CODE: 64}
COLUMNS = {LLAMA: ("instruction", "input", "output"), CODE: ("question", "context", "answer")}
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
STATE = ("master", "exp_avg", "exp_avg_sq")
RANKS = 2
Make = Callable[..., Published]


@pytest.fixture(scope="module")
def models(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Hub:
    """The hub with what the configurations name: tiny models, and a few problems of each benchmark."""
    folder = tmp_path_factory.mktemp("published")
    hub.repositories |= {
        "models/meta-llama/Llama-2-70b-hf": make_llama(folder / "llama"),
        "models/codellama/CodeLlama-34b-Python-hf": make_llama(folder / "codellama"),
        "datasets/openai/openai_humaneval": folder / "humaneval",
        "datasets/google-research-datasets/mbpp": folder / "mbpp",
    }
    hub.gated.add("models/meta-llama/Llama-2-70b-hf")
    tiny.write_jsonl(folder / "humaneval" / "test.jsonl", [odd_problem(n) for n in range(3)])
    tiny.write_jsonl(folder / "mbpp" / "test.jsonl", MBPP)
    return hub


@pytest.fixture(scope="module")
def make(models: Hub, server: jobs.ForkServer, assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a converted job with its data; `changes` as in `change`."""

    def make(case: str, *options: str, **changes: Any) -> Published:
        body = change(convert(case, *ON_VOLUMES, *SECRETS, *(options or TWO)), changes)
        folder = tmp_path_factory.mktemp(case) / "run"
        machine = Published(folder, server, assets, body, "tests.trainer.facts_hook")
        kind = CODE if case == CODE else LLAMA
        words = 2 * source(case)["cutoff_len"]  # the first record is too long
        records = questions(RECORDS[kind], COLUMNS[kind], longest=words)
        (folder / "sets").mkdir()
        (folder / "sets" / "alpaca_en_demo.json").write_text(json.dumps(records))
        tiny.write_jsonl(folder / "sets" / "code.jsonl", [{**record, "system": "Be brief."} for record in records])
        return machine

    return make


@pytest.fixture(scope="module")
def runs(make: Make) -> Callable[[str], Result]:
    """The finished run of a configuration; it is trained when it is first asked for."""
    started: dict[str, Published] = {}

    def run(case: str) -> Result:
        if case not in started:
            started[case] = make(case, **SMALLER[case])
            assert started[case].run() == 0, started[case].log
        return started[case].result()

    return run


Check = Callable[[Result, Any], None]


def hub_model(run: Result, value: Any) -> None:
    result = json.loads((run.machine.output / "train_result.json").read_text())
    assert result["model_uri"] == f"hf://{value}" and result["model_revision"] == COMMIT
    assert run.adapter["base_model_name_or_path"] == value


def supervised(run: Result, _: Any) -> None:
    """Answers are learnt, and nothing else."""
    assert all(text.endswith(f" [/INST]{learnt}") for text, learnt in list(run.samples())[1:])


def trains(run: Result, _: Any) -> None:
    assert [line["step"] for line in run.steps] == list(range(1, len(run.steps) + 1))
    assert all(float(tensor.abs().max()) > 0 for name, tensor in run.tensors().items() if "lora_B" in name)


def adapters_only(run: Result, _: Any) -> None:
    assert all(".lora_A." in name or ".lora_B." in name for name in run.ranks[0]["trained"])
    assert not (run.machine.output / "model.safetensors").exists()


def rank(run: Result, value: Any) -> None:
    assert run.adapter["r"] == value
    shapes = {name: tensor.shape for name, tensor in run.tensors().items()}
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {value}
    assert {shape[1] for name, shape in shapes.items() if "lora_B" in name} == {value}


def alpha(run: Result, value: Any) -> None:
    assert run.adapter["lora_alpha"] == value
    assert run.ranks[0]["scaling"] == [value / run.adapter["r"]]


def dropout(run: Result, value: Any) -> None:
    inputs = run.ranks[0]["dropout_inputs"]
    assert inputs > 10_000
    deviation = math.sqrt(value * (1 - value) / inputs)
    assert run.ranks[0]["dropped"] / inputs == pytest.approx(value, abs=5 * deviation)


def all_linear(run: Result, _: Any) -> None:
    assert {name.split(".")[-3] for name in run.tensors()} == LINEAR
    assert not [name for name in run.ranks[0]["trained"] if "lm_head" in name or "embed" in name]


def llama_turns(run: Result, _: Any) -> None:
    text, learnt = list(run.samples())[1]
    assert text.startswith("<s>[INST] ") and text.endswith(f" [/INST]{learnt}") and learnt.endswith(" </s>")
    assert text.count("<s>") == 1


def code_turns(run: Result, _: Any) -> None:
    llama_turns(run, _)
    assert all(text.startswith("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n") for text, _ in list(run.samples())[1:])


def data(run: Result, _: Any) -> None:
    kind = CODE if "codellama" in run.machine.body["metadata"]["name"] else LLAMA
    first, second, third = COLUMNS[kind]
    records = questions(RECORDS[kind], COLUMNS[kind], longest=2 * run.launch["training"]["maxLength"])
    texts = [text for text, _ in run.samples()]
    for text, record in zip(texts[1:], records[1:], strict=True):
        assert f"{record[first]}\n\n{record[second]} [/INST] {record[third]} </s>" in text


def length(run: Result, value: Any) -> None:
    assert (
        int(run.store().lengths.max())
        == value
        == max(width for _, width in run.ranks[0]["batches"] + run.ranks[1]["batches"])
    )
    assert "(truncated 1, split 0)" in run.machine.log


def place(run: Result, value: Any) -> None:
    assert run.machine.output == run.machine.folder / "runs" / value
    assert (run.machine.output / "adapter_model.safetensors").is_file()


def micro_batch(run: Result, value: Any) -> None:
    assert {rows for facts in run.ranks for rows, _ in facts["batches"]} == {value}


def accumulation(run: Result, value: Any) -> None:
    assert [len(facts["batches"]) for facts in run.ranks] == [value * len(run.steps)] * RANKS


def peak_rate(run: Result, value: Any) -> None:
    assert max(run.ranks[0]["rates"]) == float(value) and f"lr {float(value):.2e}" in run.machine.log


def epochs(run: Result, value: Any) -> None:
    rows = sum(rows for facts in run.ranks for rows, _ in facts["batches"])
    assert rows == value * len(run.store())


def cosine(run: Result, _: Any) -> None:
    """One step of warm-up, see `warmup`; then the first half of a cosine."""
    rates = run.ranks[0]["rates"]
    left = len(rates) - 1
    assert rates[1:] == pytest.approx([1e-4 * (1 + math.cos(math.pi * n / left)) / 2 for n in range(left)])


def warmup(run: Result, value: Any) -> None:
    """The first of three steps is a tenth of them, rounded up: without warm-up the second would be lower."""
    rates = run.ranks[0]["rates"]
    assert math.ceil(value * len(rates)) == 1 and rates[0] == rates[1] == 1e-4


def mixed_precision(run: Result, _: Any) -> None:
    assert run.ranks[0]["dtypes"] == ["torch.bfloat16"]
    assert {kind for kind, _, _ in run.ranks[0]["masters"]} == {"torch.float32"} == set(run.ranks[0]["moments"])
    assert saved_types(run) == {"torch.float32"}


def pure_bf16(run: Result, _: Any) -> None:
    assert run.ranks[0]["dtypes"] == ["torch.bfloat16"]
    assert {kind for kind, _, _ in run.ranks[0]["masters"]} == {"torch.bfloat16"} == set(run.ranks[0]["moments"])
    assert saved_types(run) == {"torch.bfloat16"}


def saved_types(run: Result) -> set[str]:
    return {str(tensor.dtype) for tensor in run.optimizer_state(*STATE)}


def attention(run: Result, _: Any) -> None:
    """What was asked for is refused on a CPU, see below; the run was changed to SDPA."""
    assert run.ranks[0]["attention"] == "sdpa" and run.launch["training"]["attention"] == "SDPA"


def liger(run: Result, _: Any) -> None:
    """Its kernels are for GPUs: the trainer says so, and there puts them on this kind of model."""
    assert run.launch["training"]["ligerKernel"] is True
    assert "ligerKernel: Liger's kernels are for GPUs" in run.machine.log
    child = multiprocessing.get_context("fork").Process(
        target=_apply_liger
    )  # it changes transformers for a whole process
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _apply_liger() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from finetune_trainer.liger import apply

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    apply(model, torch.device("cuda"), compiled=False)
    layer = model.model.layers[0]
    for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm, model.model.norm):
        assert "Liger" in module.forward.__func__.__qualname__


def zero_3(run: Result, _: Any) -> None:
    assert {facts["zero_stage"] for facts in run.ranks} == {3}


def partitioned(run: Result, _: Any) -> None:
    """Each rank holds half of every weight."""
    for facts in run.ranks:
        assert facts["held"] == {name: math.ceil(size / RANKS) for name, size in facts["whole"].items()}


def optimizer_on_cpu(run: Result, _: Any) -> None:
    for facts in run.ranks:
        trained = sum(facts["whole"][name] for name in facts["trained"])
        assert facts["optimizer"] == "DeepSpeedCPUAdam" and facts["offloaded_to"] == "cpu"
        assert [(device, size) for _, device, size in facts["masters"]] == [("cpu", trained // RANKS)]


def linear(run: Result, value: Any) -> None:
    assert value is True and run.ranks[0]["linear"] == "zero3_linear_wrap"


def wandb(run: Result, _: Any) -> None:
    history = wandb_of(run)["history"]
    assert [history[line["step"]]["loss"] for line in run.steps] == [line["loss"] for line in run.steps]


def wandb_project(run: Result, value: Any) -> None:
    assert wandb_of(run)["project"] == value


def wandb_name(run: Result, value: Any) -> None:
    assert wandb_of(run)["name"] == value


def wandb_of(run: Result) -> dict[str, Any]:
    """What the offline run would upload."""
    (file,) = run.machine.folder.glob("wandb/offline-run-*/*.wandb")
    return wandb_records(file)


def benchmarks(run: Result, value: Any) -> None:
    """Each is measured at each evaluation, and every program has been run."""
    assert value == "humaneval,mbpp"
    measured = {"HumanEvalPassAt1", "MBPPPassAt1"}
    assert run.evaluations and all(set(line["metrics"]) == measured for line in run.evaluations)
    for name, problems in (("HumanEval", 3), ("MBPP", len(MBPP))):
        assert run.machine.log.count(f"of {problems} programs passed") >= len(run.evaluations), name


def evaluated(run: Result, _: Any) -> None:
    """Every second step of four, and before the first; the file's 200 is in the job as it was converted, see below."""
    assert [line["step"] for line in run.evaluations] == [0, 2, 4]


def saved(run: Result, _: Any) -> None:
    assert "step 3  checkpoint saved" in run.machine.log or "step 4  checkpoint saved" in run.machine.log


def kept(run: Result, value: Any) -> None:
    assert [path.name for path in sorted(run.checkpoints.glob("step-*"))] == [f"step-{n:08d}" for n in (2, 3, 4)][
        -value:
    ]


COMMON: dict[str, Check] = {
    "model_name_or_path": hub_model,
    "stage": supervised,
    "do_train": trains,
    "finetuning_type": adapters_only,
    "lora_rank": rank,
    "lora_alpha": alpha,
    "lora_target": all_linear,
    "dataset": data,
    "cutoff_len": length,
    "output_dir": place,
    "per_device_train_batch_size": micro_batch,
    "gradient_accumulation_steps": accumulation,
    "learning_rate": peak_rate,
    "num_train_epochs": epochs,
    "flash_attn": attention,
    "enable_liger_kernel": liger,
}
CHECKS: dict[str, dict[str, Check]] = {
    LLAMA: {
        **COMMON,
        "lora_dropout": dropout,
        "template": llama_turns,
        "lr_scheduler_type": cosine,
        "warmup_ratio": warmup,
        "bf16": mixed_precision,
        "deepspeed_config.stage": zero_3,
        "deepspeed_config.partition_weights": partitioned,
        "deepspeed_config.cpu_offload": optimizer_on_cpu,
        "deepspeed_config.memory_efficient_linear": linear,
        "use_wandb": wandb,
        "wandb_project": wandb_project,
        "wandb_run_name": wandb_name,
    },
    CODE: {
        **COMMON,
        "template": code_turns,
        "pure_bf16": pure_bf16,
        "eval_dataset": benchmarks,
        "eval_strategy": evaluated,
        "eval_steps": evaluated,
        "save_steps": saved,
        "save_total_limit": kept,
    },
}


def keys(case: str) -> dict[str, Any]:
    """A file's keys, those of `deepspeed_config` by dotted path, with their values."""
    found: dict[str, Any] = {}
    for name, value in source(case).items():
        found |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return found


@pytest.mark.parametrize("case", CHECKS)
def test_every_key_has_a_check(case: str) -> None:
    assert set(CHECKS[case]) == set(keys(case))


@pytest.mark.parametrize(("case", "key"), [(case, key) for case, checks in CHECKS.items() for key in checks])
def test_a_key_has_its_effect(case: str, key: str, runs: Callable[[str], Result]) -> None:
    CHECKS[case][key](runs(case), keys(case)[key])


def test_what_the_second_run_did_not_want(runs: Callable[[str], Result]) -> None:
    """The other side of keys that are on in the first one."""
    facts = runs(CODE).ranks[0]
    assert facts["linear"] == "linear" and facts["optimizer"] == "AdamW" and facts["offloaded_to"] is None
    assert facts["dropped"] == 0 and facts["zero_stage"] == 3
    assert facts["layer_calls"] == 2 * len(facts["batches"]), (
        "computed again in the backward pass, as LLaMA-Factory's default"
    )
    assert facts["weight_decay"] == [0.0] and facts["rates"] == pytest.approx([1e-4, 0.75e-4, 0.5e-4, 0.25e-4])


@pytest.mark.parametrize(
    ("case", "place", "names"),
    [(LLAMA, "host", STATE), (CODE, "optimizer", STATE[1:])],
    ids=["mixed-precision-offloaded", "pure-bf16"],
)
def test_the_optimizer_takes_the_bytes_that_were_counted_before(
    case: str, place: str, names: tuple[str, ...], runs: Callable[[str], Result]
) -> None:
    """In pure bf16 the masters are the weights themselves."""
    run = runs(case)
    (downloaded,) = (run.machine.folder / "cache" / "hub").glob("models--*/snapshots/*")
    need = needed(read_shapes(downloaded), LaunchSpec.model_validate(run.launch))
    assert getattr(need, place) * RANKS == sum(tensor.nbytes for tensor in run.optimizer_state(*names))


@pytest.mark.parametrize("case", CHECKS)
def test_flash_attention_2_reaches_the_trainer_which_refuses_it_on_a_cpu(
    case: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job as it was converted, unchanged but for where it runs."""
    machine = make(case)
    assert machine.run() == 1
    assert machine.launch["training"]["attention"] == "FlashAttention2"
    said = capsys.readouterr().out
    assert "training.attention: FlashAttention2 needs an NVIDIA GPU; possible here: Auto, " in said
    if case == CODE:
        assert machine.launch["training"]["evalEverySteps"] == machine.launch["checkpoint"]["everySteps"] == 200


def test_the_first_stage_trains_every_weight(make: Make) -> None:
    from safetensors.torch import load_file

    machine = make("llama2-70b-full", **SDPA)
    assert machine.run() == 0, machine.log
    run = machine.result()
    facts = run.ranks[0]
    (downloaded,) = (machine.folder / "cache" / "hub").glob("models--*/snapshots/*/model.safetensors")
    before, after = load_file(downloaded), load_file(machine.output / "model.safetensors")
    changed = {name.split(".")[-2] for name in before if bool((after[name] != before[name]).any())}
    assert changed >= {"lm_head", "embed_tokens", *LINEAR}, "at this rate bf16 shows no change of norms"
    assert facts["trained"] == list(facts["whole"]) and facts["held"] == facts["whole"], "nothing is partitioned"
    assert facts["rates"] == [1e-5] and len(run.steps) == 1 and facts["optimizer"] == "AdamW"
    wandb_name(run, "full")


def test_the_second_stage_trains_small_adapters_without_zero(make: Make) -> None:
    machine = make("llama2-70b-lora-r8", **SDPA)
    assert machine.run() == 0, machine.log
    run = machine.result()
    rank(run, 8)
    alpha(run, 16)
    assert {name.split(".")[-3] for name in run.tensors()} == {"q_proj", "v_proj"}
    assert run.ranks[0]["held"] == run.ranks[0]["whole"] and len(run.steps) == 3 and run.ranks[0]["dropped"] == 0
    assert "engine: DeepSpeed, ZeRO stage 0, optimizer AdamW" in machine.log
    wandb_name(run, "lora-r8")


@pytest.mark.parametrize(
    ("case", "needs"),
    [
        ("llama2-70b-full", "68.98 billion parameters, 68.98 billion of them trained, cannot fit on 8 ranks"),
        ("llama2-70b-lora-r8", "68.98 billion parameters, 0.02 billion of them trained, cannot fit on 8 ranks"),
        (LLAMA, "68.98 billion parameters, 0.83 billion of them trained, cannot fit on 8 ranks"),
    ],
)
def test_finetune_run_says_what_the_real_model_needs(
    case: str, needs: str, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with the header of Llama-2-70B and a hole in place of its weights; on 8 ranks, as it was converted."""
    machine = make(case, "--num-proc-per-node", "8", "--model-uri", "pvc://data/llama-2-70b")
    hollow_model(make_llama(machine.folder / "llama-2-70b"))
    assert machine.run() == 1
    said = capsys.readouterr().out
    assert (
        f"Failed (ConfigError): model.uri: pvc://data/llama-2-70b: {needs}; a node with 8 of them needs at least"
        in said
    )
    assert f"this one has {host_memory() / GIB:.1f} GiB" in said and "Correct the field named in the message" in said


def hollow_model(folder: Path) -> None:
    """Puts Llama-2-70B's shapes in place of a folder's weights: 137 GB of nothing, which take no room."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in LLAMA_2_70B.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_a_machine_without_the_secrets_says_which_options_are_missing(make: Make) -> None:
    machine = make(LLAMA)
    machine.secrets = []
    with pytest.raises(CliError, match=r"add `--secret hub=FILE`(.|\n)*add `--secret wandb/api-key=FILE`"):
        machine.run()

"""Fused arithmetic against the plain: the head's cross-entropy, LoRA's products, compiled layers, prefetching."""

import copy
import math
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainer import adapters, lora_linear, losses
from finetune_trainer import compile as regional
from finetune_trainer.adamw import CompiledAdamW
from finetune_trainer.inputs import Inputs
from finetune_trainer.losses import FusedHead, cross_entropy_sum, linear_cross_entropy
from finetune_trainer.prefetch import Prefetcher
from tests.trainer import jobs
from tests.trainer.conftest import Assets, StartPod

IDS = torch.arange(4, 40).view(2, 18)


def with_grad(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("train_head", [True, False], ids=["full", "frozen-head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_cross_entropy_is_the_plain_one(dtype: torch.dtype, train_head: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = with_grad(2, 17, 8, dtype=dtype), with_grad(50, 8, dtype=dtype, grad=train_head)
    targets = torch.randint(0, 50, (2, 17))
    targets[0, 3:7] = losses.IGNORE
    plain = linear_cross_entropy(hidden, weight, targets)
    inputs = [hidden, weight] if train_head else [hidden]
    expected = torch.autograd.grad(plain * 0.25, inputs)
    chunked = linear_cross_entropy(hidden, weight, targets, chunk_bytes=5 * 50 * 4)
    got = torch.autograd.grad(chunked * 0.25, inputs)
    assert chunked.dtype == torch.float32 and chunked.item() == pytest.approx(plain.item(), rel=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 0.1)
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, targets, chunk_bytes=1).item() == pytest.approx(
            plain.item(), rel=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_adamw_is_torchs_to_rounding(dtype: torch.dtype) -> None:
    """Over steps with and without clipping, with weights that it leaves to torch, and another rate each time."""
    torch.manual_seed(0)
    shapes = [(4, 1024), (8, 512), (3, 1024), (100,), (2, 512), (1024, 4)]
    start = [torch.randn(shape).to(dtype) for shape in shapes]
    gradients = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(4)]
    results = []
    for kind in (partial(torch.optim.AdamW, fused=True), partial(CompiledAdamW, large=1024)):
        weights = [torch.nn.Parameter(weight.clone()) for weight in start]
        weights[-1].data = weights[-1].data.t().contiguous().t()  # not in order: torch's
        groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6)
        for step, these in enumerate(gradients):
            for weight, gradient in zip(weights, these, strict=True):
                weight.grad = gradient.clone()
            weights[1].grad = None if step == 1 else weights[1].grad
            if step > 1:
                optimizer.grad_scale = torch.tensor(2.5)  # type: ignore[attr-defined]
            optimizer.param_groups[0]["lr"] *= 0.7
            optimizer.step()
            assert [w.grad is None for w in weights] == [step == 1 and n == 1 for n in range(len(weights))]
        state = [optimizer.state[weight] for weight in weights]
        results.append(
            [(w.detach(), s["exp_avg"], s["exp_avg_sq"], s["step"]) for w, s in zip(weights, state, strict=True)]
        )
    tolerance = 1e-6 if dtype is torch.float32 else 1.6e-2  # bf16: rounding of four steps
    for ours, theirs in zip(*reversed(results), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance / 10)


def llama(assets: Assets) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(assets.model, dtype=torch.float32)


def trial(model: Any) -> FusedHead | None:
    zeros = torch.zeros((1, 2), dtype=torch.int64)
    arguments = {"input_ids": zeros, "use_cache": False, "logits_to_keep": torch.tensor([0, 1])}
    return losses.install(model, model, arguments, zeros, liger=False)


def test_a_head_that_computes_losses_changes_no_bit(assets: Assets) -> None:
    keep, targets = torch.arange(3, 17), IDS[:, 4:].contiguous()
    grads = []
    for fuse in (False, True):
        model = llama(assets)
        head = trial(model) if fuse else None
        inputs = Inputs({"input_ids": IDS, "use_cache": False, "logits_to_keep": keep}, targets)
        if head is None:
            loss = cross_entropy_sum(model(**inputs.arguments).logits, targets)
        else:
            with head.computing(targets):
                loss = model(**inputs.arguments).logits.view(())
            assert model(input_ids=IDS).logits.shape == (2, 18, model.config.vocab_size), "an ordinary head again"
        (loss * 0.1).backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 4.0}),
    ],
)
def test_models_that_change_their_logits_take_the_plain_path(
    kind: str, extra: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **extra))
    caplog.set_level("INFO", logger="finetune_trainer")
    assert trial(model) is None
    assert f"from all logits ({type(model).__name__} changes them after its head)" in caplog.text
    assert model(input_ids=torch.zeros((1, 3), dtype=torch.int64)).logits.shape == (1, 3, 64)


def lora(assets: Assets, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(assets.model))
    return with_adapters(base.to(dtype), dropout)


def qlora(assets: Assets, dtype: torch.dtype, *, double: bool = True, dropout: float = 0.0) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(
        assets.model, dtype=dtype, quantization_config=four, device_map={"": "cpu"}
    )
    return with_adapters(base, dropout)


def with_adapters(base: Any, dropout: float) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def gradients(model: Any, ids: torch.Tensor = IDS) -> list[torch.Tensor]:
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "make",
    [lora, partial(lora, dropout=0.3), qlora, partial(qlora, double=False), partial(qlora, dropout=0.3)],
    ids=["lora", "dropout", "qlora", "single", "qlora-dropout"],
)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 6e-2)])
def test_adapters_in_place_compute_what_peft_computes(
    assets: Assets, make: Any, dtype: torch.dtype, rtol: float
) -> None:
    plain, fused = make(assets, dtype), make(assets, dtype)
    names = [name for name, _ in fused.named_parameters()]
    assert lora_linear.install(fused) is True
    assert [name for name, _ in fused.named_parameters()] == names
    torch.manual_seed(5)
    expected = gradients(plain)
    torch.manual_seed(5)
    got = gradients(fused)
    assert len(got) == 1 + 2 * 7 * 2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))
    with fused.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        assert torch.equal(fused(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_gradients_of_adapters_do_not_depend_on_what_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, inner = torch.randn(5, 8), torch.randn(5, 6)
    weights, a, b, grads = ([torch.randn(*shape) for _ in range(3)] for shape in ((4, 8), (2, 8), (4, 2), (5, 4)))
    found = lora_linear._backward(grads, [x], inner, weights, a, b, [0.7] * 3, [], 0, 0, False, True)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new_empty(*args).fill_(math.nan))
    again = lora_linear._backward(grads, [x], inner, weights, a, b, [0.7] * 3, [], 0, 0, False, True)
    assert all(torch.equal(one, two) for one, two in zip(found, again, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_save_less_for_the_backward_pass(assets: Assets, dropout: float) -> None:
    def saved(model: Any) -> int:
        sizes: dict[tuple[int, int], int] = {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr(), tensor._version] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        total = sum(sizes.values())
        del loss
        return total

    plain = lora(assets, dropout=dropout)
    fused = copy.deepcopy(plain)
    lora_linear.install(fused)
    assert saved(fused) <= saved(plain)


def test_other_adapters_keep_pefts_way(assets: Assets) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(assets), LoraConfig(r=2, use_dora=True, target_modules=["q_proj"]))
    assert lora_linear.install(model) is False
    assert not any(hasattr(module, "lora_group") for module in model.modules())


@pytest.mark.parametrize("make", [lora, partial(lora, dropout=0.3), qlora], ids=["lora", "dropout", "qlora"])
def test_recomputed_layers_compile_as_one_graph_and_compute_the_same(assets: Assets, make: Any) -> None:
    """With the compiler's front and autograd's tracing; only the code generator is left out."""
    expected = gradients(make(assets, torch.float32))
    model = make(assets, torch.float32)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    lora_linear.install(model)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    assert regional.compile_layers(adapters.unwrap(model), whole=True, backend=compiler) == 2
    for a, b in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert len(graphs) == 1, "all layers run the same code"


@pytest.mark.parametrize("workers", [1, 4])
def test_batches_come_in_the_order_of_the_plan_whatever_their_threads_do(workers: int) -> None:
    barrier = threading.Barrier(workers)
    begun: list[int] = []

    def build(rows: Sequence[int | None]) -> list[Any]:
        number = rows[0] or 0
        begun.append(number)
        if number <= workers:
            barrier.wait(20)  # so many are built at the same time
        if number == 13:
            raise ValueError("13")
        time.sleep(0.002 * (-number % 4))
        return list(rows)

    batches = Prefetcher(build, ([number, None] for number in range(1, 14)), workers)
    for number in range(1, 13):
        assert batches.take() == [number, None]
        assert max(begun) <= number + workers, "not more ahead than there are workers"
    with pytest.raises(ValueError, match="13"):
        batches.take()
    batches.close()
    assert sorted(begun) == list(range(1, 14))


def test_liger_on_a_cpu_says_that_it_does_nothing(start: StartPod, tmp_path: Path) -> None:
    pods = [start(tmp_path / str(on), training__ligerKernel=on, training__maxSteps=2) for on in (True, False)]
    reports = [pod.done() for pod in pods]
    assert "ligerKernel: Liger's kernels are for GPUs" in pods[0].log
    assert reports[0]["evalLoss"] == reports[1]["evalLoss"]


def test_the_compile_cache_is_beside_the_downloads(tmp_path: Path, assets: Assets) -> None:
    from finetune_api.launch import LaunchSpec
    from finetune_trainer.gang import rank_environment
    from finetune_trainer.versions import code_digest

    spec = LaunchSpec.model_validate(jobs.launch(tmp_path, assets.model, assets.train))
    environment = rank_environment(spec, 0, 0, tmp_path / "scratch")
    assert environment["TORCHINDUCTOR_CACHE_DIR"].startswith(spec.cache_dir)
    assert environment["TRITON_CACHE_DIR"].startswith(spec.cache_dir)
    assert environment["TORCH_COMPILE_CACHE_KEY_TAG"] == code_digest()
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1", "as many as the rank has CPUs"

"""The table: every key of LLaMA-Factory's training, and what becomes of it."""

from finetune_cli.convert.keys import data, habits, launch, method, model, trainer, training
from finetune_cli.convert.table import Key

GROUPS: dict[str, tuple[Key, ...]] = {
    "Model": model.MODEL,
    "Quantisation": model.QUANTIZATION,
    "Images, videos, audio": model.PROCESSOR,
    "Stage and method": method.METHOD,
    "Freeze": method.FREEZE,
    "LoRA and OFT": method.LORA,
    "Data": data.DATA,
    "Batches, length of training, place of the result": training.BATCH,
    "Optimisation": training.OPTIMIZATION,
    "Precision, memory, speed": training.COMPUTE,
    "Evaluation": training.EVALUATION,
    "Generated text": data.GENERATION,
    "Saving": training.SAVING,
    "Tracking": training.TRACKING,
    "Keys that people write although LLaMA-Factory refuses them": habits.HABITS,
    "Other keys of transformers' trainer": trainer.REFUSED + trainer.NO_EFFECT,
    "Other optimizers": method.OPTIMIZERS,
    "Preference training": method.PREFERENCE,
    "SwanLab": method.SWANLAB,
    "Ray and launching": launch.LAUNCH,
    "Export": model.EXPORT,
    "Inference engines and KTransformers": model.ENGINES,
    "Benchmarks of LLaMA-Factory": data.BENCHMARK,
    "Megatron": launch.MEGATRON,
}
"""As the documentation shows it."""

KEYS: dict[str, Key] = {key.name: key for group in GROUPS.values() for key in group}
assert len(KEYS) == sum(map(len, GROUPS.values())), "a key stands twice in the table"

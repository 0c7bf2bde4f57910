"""Writes docs/llama-factory.md from the table: `python -m finetune_cli.convert.page [--check]`."""

import sys
from pathlib import Path

from finetune_cli.convert.config import show
from finetune_cli.convert.keys import GROUPS, KEYS
from finetune_cli.convert.table import Fate, Key
from finetune_cli.convert.templates import BY_NAME, OWN, REASONING, SEEING, TOKENIZERS, WITHOUT_FUNCTIONS

PATH = Path(__file__).resolve().parents[3] / "docs" / "llama-factory.md"

_HEAD = """<!-- Generated from operator/finetune_cli/convert by `make generate`. Do not edit. -->

# From LLaMA-Factory

```
finetune convert config.yaml --data-uri pvc://CLAIM/data --output-uri pvc://CLAIM/runs --num-proc-per-node 8 | kubectl apply -f -
```

turns a LLaMA-Factory YAML into a FineTuneJob. The manifest goes to standard output, notes and refusals to standard error;
the notes also stand in a comment at the top of the manifest. Exit status 0: converted; 2: refused, with all reasons at once.

- Every key below is translated, accepted with a note because it cannot have an effect, or refused with file, line and what to
  use. None is dropped silently, and an unknown one is refused with the nearest known name.
- LLaMA-Factory's defaults are written out, so that the job computes what LLaMA-Factory would with the same file.
- A LLaMA-Factory file does not say how many GPUs there are: `--num-nodes` and `--num-proc-per-node` do. The global batch is
  `per_device_train_batch_size` x `gradient_accumulation_steps` x both.
- Paths of this machine become URIs: `--model-uri` for the model, `--data-uri` for the folder that holds what `dataset_dir`
  holds, `--output-uri` for the folder below which `output_dir` lies. `pvc://CLAIM/PATH` is a volume of the cluster,
  `file:///PATH` this machine's disk, for `finetune run`.
- Secrets never stand in the file: `--hub-secret NAME[/KEY]`, `--wandb-secret NAME[/KEY]`.

## What is not the same

- Warm-up: transformers spends the first step at a learning rate of 0; here the first step learns and the last step of warm-up is
  at the peak.
- The order of records is another random one (`seed` decides it), and it is exact across restarts.
- With `packing: true` samples in one row never see each other; in LLaMA-Factory only with `neat_packing: true`.
- Evaluation also runs before the first step.
- Alpaca's `instruction` and `input` are joined with an empty line between them; in LLaMA-Factory with a line break.
- Records with a `system`, `tools` or `images` key, and Alpaca's with `history`: LLaMA-Factory reads them only if `columns` names
  them, here they always count (but for `system` beside `messages`).
- Vision beside an adapter: LLaMA-Factory puts adapters into an unfrozen tower and never trains the projector; here both are
  trained whole or not at all, and only if `mm_projector_lr` asks for it.
- Records whose turns are out of order or that have no answer: LLaMA-Factory skips them with a warning; here they are errors, or
  trained where the template takes them.
- Functions: llama3's are in the first user turn as Llama 3.1's own template has them, in LLaMA-Factory in the system turn;
  chatml's are Hermes 2's `<tool_call>`, in LLaMA-Factory lines of `Action:`.
- The line break behind `<|im_end|>` is no target here; in LLaMA-Factory it is learnt with the answer.

## Data sets

Names in `dataset` and `eval_dataset` are looked up in `dataset_info.json` of `dataset_dir` (beside the configuration, then in the
working directory). `file_name`, `hf_hub_url` (with `folder` and `split`), `formatting` (alpaca, sharegpt, openai), `columns`,
`tags` and `num_samples` are translated. Refused: ModelScope, Modelers, scripts, object stores, subsets, `ranking` and its
columns, videos and audio, and `tools` with a template that has no form for them. `eval_dataset: humaneval,mbpp` are the
benchmarks, although LLaMA-Factory has none of these names. An absolute `file_name` stays where it is with `--data-uri file://`,
and is refused with `pvc://`; parts of a split (`train[:10%]`) are refused.
"""


def render() -> str:
    """The whole page."""
    counts = {fate: sum(key.fate is fate for key in KEYS.values()) for fate in Fate}
    total = ", ".join(f"{number} {fate.value}" for fate, number in counts.items())
    lines = [_HEAD]
    lines += ["## Chat templates", "", f"- By name: {_list((*BY_NAME, 'codellama'))}."]
    lines += [f"- The tokenizer's own is used, with a note: {_list(sorted(TOKENIZERS))}."]
    lines += [
        "- Of these, some leave out the thoughts of earlier turns: then several turns need `mask_history: true`, or"
    ]
    lines += [f"  `--chat-template` with a template that keeps them: {_list(sorted(REASONING))}."]
    lines += [f"- No form for functions (`tools`): {_list(WITHOUT_FUNCTIONS)}."]
    lines += [f"- Only with `--chat-template`: {_list(sorted(OWN))}."]
    lines += [f"- Refused, models that see or hear in another way than LLaVA-1.5: {_list(sorted(SEEING))}.", ""]
    lines += [f"## All {len(KEYS)} keys", "", f"{total}.", ""]
    for title, keys in GROUPS.items():
        lines += [f"### {title}", "", "| key | default | what becomes of it |", "| --- | --- | --- |"]
        lines += [f"| `{key.name}` | {_default(key)} | {_cell(_fate(key))} |" for key in keys]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _list(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _default(key: Key) -> str:
    return "" if key.default is None else f"`{_cell(show(key.default))}`"


def _fate(key: Key) -> str:
    match key.fate:
        case Fate.TRANSLATED:
            return f"→ {_fields(key.to)}" + (f": {key.text}" if key.text else "")
        case Fate.NO_EFFECT:
            return f"no effect: {key.text}"
        case Fate.PART:
            return f"no effect: {key.text} (`{key.part_of}`)"
        case Fate.REFUSED:
            return f"refused: {key.text}; instead: {key.instead}"


def _fields(to: str) -> str:
    """Paths of fields in backquotes, words as they are."""
    return ", ".join(field if " " in field else f"`{field}`" for field in to.split(", "))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Writes the page, or with `--check` says whether it is stale."""
    text = render()
    if PATH.exists() and PATH.read_text() == text:
        return 0
    if "--check" in arguments:
        print("stale, run `make generate`: docs/llama-factory.md")
        return 1
    PATH.write_text(text)
    print("wrote: docs/llama-factory.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

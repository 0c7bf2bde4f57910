"""Options of `finetune convert`. Apart from the converter, so that the other commands work without what it imports."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

NAME_LENGTH = 50
"""Characters that a job's name may have."""
_JOB_NAME = re.compile(r"^[a-z]([-a-z0-9]*[a-z0-9])?$")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "convert",
        help="turn a LLaMA-Factory YAML into a FineTuneJob",
        description="Writes a FineTuneJob to standard output (`| kubectl apply -f -`), notes and refusals to standard error."
        " Exit 0: converted; 2: refused. docs/llama-factory.md says what becomes of every key.",
    )
    text: Callable[[str], str] = str
    parser.add_argument("config", type=Path, help="LLaMA-Factory's training configuration")
    parser.add_argument("--name", type=_name, help="the job's name; default: from the file's name or `output_dir`")
    parser.add_argument("-n", "--namespace", type=text, help="the job's namespace; default: kubectl's")
    parser.add_argument("--num-nodes", type=_count, default=1, help="pods; default 1")
    parser.add_argument(
        "--num-proc-per-node", type=_count, default=1, help="GPUs, and processes, of each pod; default 1"
    )
    parser.add_argument(
        "--model-uri", type=_uri("hf", "pvc", "file"), help="the model, in place of `model_name_or_path`"
    )
    parser.add_argument("--data-uri", type=_uri("pvc", "file"), help="the folder that holds what `dataset_dir` holds")
    parser.add_argument("--output-uri", type=_uri("pvc", "file"), help="the folder below which `output_dir` lies")
    parser.add_argument("--cache-uri", type=_uri("pvc", "file"), help="the folder that keeps downloads from the hub")
    parser.add_argument(
        "--benchmark-uri", type=_uri("pvc", "file"), help="the folder with humaneval.jsonl and mbpp.jsonl"
    )
    parser.add_argument(
        "--chat-template", help="a name, a file with a Jinja template, or `tokenizer` for the tokenizer's own"
    )
    parser.add_argument("--hub-secret", metavar="NAME[/KEY]", help="Secret with the token for `hf://`")
    parser.add_argument("--wandb-secret", metavar="NAME[/KEY]", help="Secret with the API key of Weights & Biases")


def _name(text: str) -> str:
    if not _JOB_NAME.match(text) or len(text) > NAME_LENGTH:
        raise argparse.ArgumentTypeError(
            f"must be at most {NAME_LENGTH} lower-case letters, digits and `-`, beginning with a letter, got `{text}`"
        )
    return text


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got `{text}`")
    return int(text)


def _uri(*schemes: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if not any(text.startswith(f"{scheme}://") for scheme in schemes):
            raise argparse.ArgumentTypeError(f"must begin with {' or '.join(f'{s}://' for s in schemes)}, got `{text}`")
        return text

    return check

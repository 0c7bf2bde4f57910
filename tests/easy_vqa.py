"""Real images and questions: easy-VQA (MIT), as the package `easy-vqa` ships them, 64x64 pixels each."""

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

QUESTION = "<image>\n{}"


def write(target: Path, packages: Path | None = None, *, train: int, held_out: int) -> Path:
    """Writes `train.jsonl`, `heldout.jsonl` and their images into a folder, paths being relative to it.

    Questions for yes or no are left out: what is asked for, shape or colour, is in the image alone.

    Args:
        target: is made.
        packages: a folder with the installed package; None: this environment's.
        train: images to train on.
        held_out: images of the package's test part.
    """
    root = Path(str(metadata.distribution("easy-vqa").locate_file(""))) if packages is None else packages
    data = root / "easy_vqa" / "data"
    for name, part, count in (("train", "train", train), ("heldout", "test", held_out)):
        images = target / "images" / name
        images.mkdir(parents=True)
        lines = []
        for question, answer, number in json.loads((data / part / "questions.json").read_text(encoding="utf-8")):
            if number >= count or answer in ("yes", "no"):
                continue
            shutil.copyfile(data / part / "images" / f"{number}.png", images / f"{number}.png")
            lines.append(json.dumps(record(question, answer, f"images/{name}/{number}.png")))
        (target / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def record(question: str, answer: str, *images: Any) -> dict[str, Any]:
    """A record of format Messages."""
    user = {"role": "user", "content": QUESTION.format(question) if images else question}
    return {"messages": [user, {"role": "assistant", "content": answer}], "images": list(images)}

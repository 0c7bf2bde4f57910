"""Models of LLaVA's kind: what they read, what they compute, what is trained.

The model is small and random, its tower too; the images and questions are easy-VQA's.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finetune_api.launch import LaunchDataset, LaunchFreeze, LaunchSpec, LaunchVision
from finetune_api.spec import Attention, Overlong
from finetune_trainer import engine, vision
from finetune_trainer.adapters import freeze
from finetune_trainer.attention import Choice, use
from finetune_trainer.data.batches import IGNORE, Rows
from finetune_trainer.data.images import ImageInput
from finetune_trainer.data.packing import pack_rows, single_rows
from finetune_trainer.data.store import TokenStore, build_store, read_meta
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.errors import ConfigError, DataError
from finetune_trainer.kernels import _ATTRIBUTE, Kernels
from finetune_trainer.memory import num_trained, read_shapes, shapes_of_config
from finetune_trainer.model import load_model, load_tokenizer
from finetune_trainer.optimizers import RATE_MULTIPLIER, parameter_groups
from finetune_trainer.quirks import tame_deepspeed
from finetune_trainer.step import loss_sum
from tests import easy_vqa
from tests.trainer import jobs, tiny

CPU = torch.device("cpu")
TOKENS = 16
"""Of an image."""
TRAINED: dict[str, Any] = {"vision": {"freezeTower": False, "projectorLearningRate": 0.002}}


@dataclass(frozen=True)
class Seeing:
    model: Path
    data: Path
    """`train.jsonl`, `heldout.jsonl`; `mixed.jsonl`, where two of three records have no image."""

    def spec(self, data: str = "train.jsonl", **changes: Any) -> LaunchSpec:
        changes = {"training__precision": "FP32", **changes}
        return LaunchSpec.model_validate(jobs.launch(Path("/nowhere"), self.model, self.data / data, **changes))

    def image(self, **changes: Any) -> ImageInput:
        config = json.loads((self.model / "config.json").read_text())
        spec = self.spec(**changes)
        image = vision.image_input(self.model, config, load_tokenizer(self.model, spec), spec)
        assert image is not None
        return image

    def encoder(self, **options: Any) -> Encoder:
        return Encoder(load_tokenizer(self.model, self.spec()), "x", image=self.image(), **options)

    def load(self, **changes: Any) -> Any:
        tame_deepspeed()
        return load_model(self.model, self.spec(**changes), {})


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    folder = tmp_path_factory.mktemp("seeing")
    data = easy_vqa.write(folder / "data", train=60, held_out=6)
    asked = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    chats = tiny.chats(60, seed=3)
    mixed = [
        record for number, chat in enumerate(chats) for record in ([chat, asked[number]] if number % 2 else [chat])
    ]
    tiny.write_jsonl(data / "mixed.jsonl", mixed)
    return Seeing(tiny.make_llava(folder / "model"), data)


def store_of(
    seeing: Seeing, file: Path, max_length: int = 120, overlong: Overlong = Overlong.TRUNCATE, **options: Any
) -> TokenStore:
    dataset = LaunchDataset.model_validate(jobs.dataset(file))
    return build_store([(dataset, file)], seeing.encoder(**options), max_length, lambda: None, overlong=overlong)


def rows_of(seeing: Seeing, store: TokenStore, *, blank: bool = False) -> Rows:
    return Rows(store, single_rows(len(store)), packed=False, image=replace(seeing.image(), blank=blank))


# What is read


def test_an_image_takes_the_models_tokens_and_none_is_a_target(seeing: Seeing) -> None:
    store = store_of(seeing, seeing.data / "heldout.jsonl", train_on_prompt=True)
    image = seeing.image()
    first = store.ids[: store.offsets[1]]
    at = np.flatnonzero(first == image.token)
    assert at.tolist() == list(range(at[0], at[0] + TOKENS))
    targets = store.targets[: store.offsets[1]]
    assert not targets[at].any() and targets[1 : at[0]].all() and targets[at[-1] + 1 :].all()
    text = load_tokenizer(seeing.model, seeing.spec()).decode([*first[: at[0]], *first[at[-1] + 1 :]])
    record = json.loads((seeing.data / "heldout.jsonl").read_text().splitlines()[0])
    turns = [turn["content"].removeprefix("<image>") for turn in record["messages"]]
    assert text == f"<|im_start|>user\n{turns[0]}<|im_end|>\n<|im_start|>assistant\n{turns[1]}<|im_end|>\n"


def forms(folder: Path) -> dict[str, Any]:
    """One image in every form that a record may have it in."""
    import PIL.Image

    pixels = PIL.Image.effect_noise((64, 64), 80).convert("RGB")
    pixels.save(folder / "a.png")
    content = (folder / "a.png").read_bytes()
    return {
        "a path": ["a.png"],
        "one, no list": "a.png",
        "a whole path": [str(folder / "a.png")],
        "a struct's path": [{"bytes": None, "path": "a.png"}],
        "bytes": [content],
        "a struct's bytes": [{"bytes": content, "path": "elsewhere.png"}],
        "one struct": {"bytes": content, "path": None},
    }


PATHS = ["a path", "one, no list", "a whole path", "a struct's path"]
BYTES = ["bytes", "a struct's bytes", "one struct"]  # which JSON has not


@pytest.mark.parametrize(
    ("kind", "form"),
    [("jsonl", form) for form in PATHS] + [(kind, form) for kind in ("parquet", "arrow") for form in PATHS + BYTES],
)
def test_images_come_from_paths_and_bytes(seeing: Seeing, tmp_path: Path, form: str, kind: str) -> None:
    import datasets

    record = easy_vqa.record("what is it?", "noise", None) | {"images": forms(tmp_path)[form]}
    file = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        tiny.write_jsonl(file, [record])
    elif kind == "parquet":
        datasets.Dataset.from_list([record]).to_parquet(file)
    else:
        datasets.Dataset.from_list([record]).save_to_disk(tmp_path / "saved")
        file = next((tmp_path / "saved").glob("*.arrow"))
        if ("path" in form and form != "a whole path") or form == "one, no list":
            (tmp_path / "a.png").rename(file.parent / "a.png")
    store = store_of(seeing, file)
    found = rows_of(seeing, store).batch([0])
    import PIL.Image

    original = tmp_path / "a.png" if (tmp_path / "a.png").exists() else file.parent / "a.png"
    expected = seeing.image().process(PIL.Image.open(original))
    assert found.pixel_values is not None
    assert np.array_equal(found.pixel_values.numpy(), expected[None])


def _png(color: str = "red") -> bytes:
    import PIL.Image

    content = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), color).save(content, "png")
    return content.getvalue()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too few placeholders": (
        easy_vqa.record("q", "a") | {"images": ["a.png"]},
        r":1: the turns have 0 times `<image>` and the record has 1 images",
    ),
    "too few images": (
        easy_vqa.record("q", "a", "a.png") | {"images": []},
        r":1: the turns have 1 times `<image>` and the record has 0 images",
    ),
    "no column": ({"messages": easy_vqa.record("q", "a", "a.png")["messages"]}, "has 0 images"),
    "no file": (
        easy_vqa.record("q", "a", "no.png"),
        r":1: `images\[0\]`: there is no file .*no\.png; a path begins at the data file's folder",
    ),
    "a number": (
        easy_vqa.record("q", "a", 7),
        r":1: `images\[0\]` must be a path, the bytes of an image file.*got int",
    ),
    "an empty struct": (
        easy_vqa.record("q", "a", {"bytes": None, "path": None}),
        r"`images\[0\]` must be a path",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_images_are_named_with_file_and_line(seeing: Seeing, tmp_path: Path, name: str) -> None:
    record, says = WRONG[name]
    (tmp_path / "a.png").write_bytes(_png())
    file = tiny.write_jsonl(tmp_path / "data.jsonl", [record])
    with pytest.raises(DataError, match=says):
        store_of(seeing, file)


@pytest.mark.parametrize("content", [b"no image", _png()[:40], b""], ids=["other", "cut", "empty"])
def test_an_image_that_cannot_be_decoded_is_named_when_it_is_wanted(
    seeing: Seeing, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "a.png").write_bytes(content)
    store = store_of(seeing, tiny.write_jsonl(tmp_path / "data.jsonl", [easy_vqa.record("q", "a", "a.png")]))
    with pytest.raises(DataError, match=r"data\.jsonl:1: the image .*a\.png cannot be decoded"):
        rows_of(seeing, store).batch([0])


@pytest.mark.parametrize(("mode", "form"), [("I;16", "png"), ("I", "tiff"), ("F", "tiff")])
def test_an_image_of_more_than_8_bits_per_channel_is_refused(
    seeing: Seeing, tmp_path: Path, mode: str, form: str
) -> None:
    import PIL.Image

    PIL.Image.new(mode, (8, 8), 9).save(tmp_path / "a", form)
    store = store_of(seeing, tiny.write_jsonl(tmp_path / "data.jsonl", [easy_vqa.record("q", "a", "a")]))
    says = rf"data\.jsonl:1: the image .*a has mode {mode}, .*; convert it to 8 bits per channel"
    with pytest.raises(DataError, match=says):
        rows_of(seeing, store).batch([0])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_image_becomes_rgb_whatever_the_processor_says(seeing: Seeing, tmp_path: Path, mode: str) -> None:
    import PIL.Image

    model = tmp_path / "model"
    shutil.copytree(seeing.model, model)
    config = json.loads((model / "processor_config.json").read_text())
    processed(do_convert_rgb=None)(config)
    (model / "processor_config.json").write_text(json.dumps(config))
    image = PIL.Image.effect_noise((64, 64), 80).convert(mode)
    expected = seeing.image().process(image)
    assert np.array_equal(replace(seeing, model=model).image().process(image), expected)


def test_a_model_that_does_not_see_refuses_images_and_a_vision_block(seeing: Seeing) -> None:
    encoder = Encoder(tiny.make_tokenizer(), "x")
    dataset = LaunchDataset.model_validate(jobs.dataset(seeing.data / "train.jsonl"))
    with pytest.raises(DataError, match=r"train\.jsonl:1: the record has images, and x cannot see"):
        build_store([(dataset, seeing.data / "train.jsonl")], encoder, 64, lambda: None)
    with pytest.raises(ConfigError, match=r"vision: .* is a model of type llama, which has no vision tower"):
        vision.image_input(seeing.model, {"model_type": "llama"}, None, seeing.spec(**TRAINED))


LLAVA_HF = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Of LLaVA-1.5's repositories: of a plain text it shows nothing."""


def test_a_template_that_wants_parts_gets_them(seeing: Seeing) -> None:
    tokenizer = load_tokenizer(seeing.model, seeing.spec())
    tokenizer.chat_template = LLAVA_HF
    encoder = Encoder(tokenizer, "x", image=seeing.image())
    dataset = LaunchDataset.model_validate(jobs.dataset(seeing.data / "heldout.jsonl"))
    store = build_store([(dataset, seeing.data / "heldout.jsonl")], encoder, 120, lambda: None)
    record = json.loads((seeing.data / "heldout.jsonl").read_text().splitlines()[0])
    ids, targets = store.ids[: store.offsets[1]], store.targets[: store.offsets[1]]
    question = record["messages"][0]["content"].removeprefix("<image>\n")
    answer = record["messages"][1]["content"]
    assert (
        tokenizer.decode(ids).replace("<image>" * TOKENS, "<image>")
        == f"USER: <image>\n{question} ASSISTANT: {answer} "
    )
    assert tokenizer.decode(ids[targets]).strip() == answer


def test_a_template_that_hides_images_is_refused(seeing: Seeing) -> None:
    tokenizer = load_tokenizer(seeing.model, seeing.spec())
    tokenizer.chat_template = tiny.CHATML.replace("message['content']", "message['content'].replace('<image>', '')")
    encoder = Encoder(tokenizer, "x", image=seeing.image())
    dataset = LaunchDataset.model_validate(jobs.dataset(seeing.data / "heldout.jsonl"))
    with pytest.raises(ConfigError, match=r"the template shows 0 of the 1 images of .*:1"):
        build_store([(dataset, seeing.data / "heldout.jsonl")], encoder, 120, lambda: None)


def _long(words: int, *, image_last: bool = False) -> list[dict[str, Any]]:
    """Two questions, one with an image, each with an answer of so many words."""
    answer = " ".join(["red"] * words)
    turns = ["<image>\nwhat?", "why?"]
    return [
        {
            "messages": [
                message
                for text in (reversed(turns) if image_last else turns)
                for message in ({"role": "user", "content": text}, {"role": "assistant", "content": answer})
            ],
            "images": ["a.png"],
        }
    ]


@pytest.mark.parametrize(
    ("overlong", "image_last", "kept"),
    [
        (Overlong.TRUNCATE, False, True),
        (Overlong.TRUNCATE, True, False),
        (Overlong.TRUNCATE_SHARE, False, True),
        (Overlong.TRUNCATE_SHARE, True, False),
        (Overlong.SPLIT, False, False),
        (Overlong.DROP, False, False),
    ],
)  # fmt: skip
def test_a_long_sample_keeps_its_images_whole_or_goes(
    seeing: Seeing, tmp_path: Path, overlong: Overlong, image_last: bool, kept: bool
) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    short = easy_vqa.record("q", "a", "a.png")
    file = tiny.write_jsonl(tmp_path / "data.jsonl", [*_long(60, image_last=image_last), short])
    dataset = LaunchDataset.model_validate(jobs.dataset(file))
    store = build_store(
        [(dataset, file)], seeing.encoder(), 100, lambda: None, overlong=overlong, folder=tmp_path / "s"
    )
    (report,) = read_meta(tmp_path / "s")["reports"]
    assert (report["read"], report["used"], report["images"]) == (2, 1 + kept, 1 + kept)
    assert report["image_cut"] == (not kept and overlong is not Overlong.DROP)
    assert report["dropped"] == (overlong is Overlong.DROP)
    counts = [
        int((store.ids[a:b] == seeing.image().token).sum())
        for a, b in zip(store.offsets, store.offsets[1:], strict=False)
    ]
    assert counts == [TOKENS] * (1 + kept)
    assert store.images is not None and len(store.images) == 1 + kept


def test_an_image_longer_than_a_row_says_why_nothing_is_left(seeing: Seeing) -> None:
    with pytest.raises(
        DataError, match=r"(\d+) of \1 are longer than training\.maxLength = 12 tokens and would lose an image"
    ):
        store_of(seeing, seeing.data / "heldout.jsonl", max_length=12)


def test_the_identity_of_data_has_its_images(seeing: Seeing, tmp_path: Path) -> None:
    digests = set()
    for number, source in enumerate(("a.png", "b.png", "a.png")):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(_png())
        digests.add(
            store_of(seeing, tiny.write_jsonl(folder / "d.jsonl", [easy_vqa.record("q", "a", source)])).digest()
        )
    assert len(digests) == 2, "another image is other data, another folder is not"


def processed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["image_processor"].update(changes)


BROKEN: dict[str, tuple[str, Callable[[dict[str, Any]], Any], str]] = {
    "other size": (
        "processor_config.json",
        processed(crop_size={"height": 32, "width": 32}),
        "makes 32x32 pixels of an image of .* and the vision tower takes 64x64",
    ),
    "no crop": ("processor_config.json", processed(do_center_crop=False), "makes 64x128 pixels"),
    "other token": (
        "config.json",
        lambda config: config.update(image_token_index=5),
        "image_token_index is 5; tokenizer and model have to belong together",
    ),
    "other tower": (
        "config.json",
        lambda config: config["vision_config"].update(model_type="vit"),
        "a vision tower of type vit; allowed are clip_vision_model",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_whose_parts_do_not_fit_is_told_before_it_is_loaded(seeing: Seeing, tmp_path: Path, name: str) -> None:
    file, change, says = BROKEN[name]
    folder = tmp_path / "model"
    shutil.copytree(seeing.model, folder)
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=says):
        replace(seeing, model=folder).image()
    (folder / "processor_config.json").unlink()
    if file == "processor_config.json":
        with pytest.raises(ConfigError, match="has no image processor"):
            replace(seeing, model=folder).image()


# What is computed


def test_a_siglip_tower_gives_what_transformers_gives(seeing: Seeing, tmp_path: Path) -> None:
    """It has no vector beside those of the patches, and LLaVA takes its last layer here."""
    other = replace(seeing, model=tiny.make_llava(tmp_path / "model", siglip=True))
    assert other.image().tokens_per_image == TOKENS
    model = other.load(method="Full", adapter=None, **TRAINED)
    batch = rows_of(other, store_of(other, seeing.data / "heldout.jsonl")).batch([0, 1, 2])
    logits = plain(other)(input_ids=batch.input_ids, pixel_values=batch.pixel_values).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    loss = loss_sum(model, batch, CPU) / batch.num_targets
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_texts_alone_train_a_model_that_sees(seeing: Seeing, tmp_path: Path) -> None:
    store = store_of(seeing, tiny.write_jsonl(tmp_path / "texts.jsonl", tiny.chats(4, seed=1)))
    assert store.images is not None and len(store.images) == 0
    for blank in (False, True):
        batch = rows_of(seeing, store, blank=blank).batch([0, None, 1])
        assert (batch.pixel_values is not None) == blank
        loss_sum(seeing.load(), batch, CPU).backward()


def test_its_decoder_layers_compile(seeing: Seeing) -> None:
    from finetune_trainer.compile import compile_layers

    batch = rows_of(seeing, store_of(seeing, seeing.data / "heldout.jsonl")).batch([0, 1])
    model = seeing.load()
    expected = loss_sum(model, batch, CPU).item()
    assert compile_layers(model.get_base_model(), whole=True, backend="aot_eager") == 2
    assert loss_sum(model, batch, CPU).item() == pytest.approx(expected, rel=1e-6)


def plain(seeing: Seeing) -> Any:
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(seeing.model, dtype=torch.float32, attn_implementation="sdpa")


def test_loss_and_gradients_are_those_of_plain_transformers(seeing: Seeing) -> None:
    """Pixels, expansion, places and masks, against the library's own processor, model and loss."""
    import PIL.Image
    from transformers import AutoProcessor

    records = [json.loads(line) for line in (seeing.data / "heldout.jsonl").read_text().splitlines()[:4]]
    processor = AutoProcessor.from_pretrained(seeing.model)
    texts = [processor.tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in records]
    images = [PIL.Image.open(seeing.data / r["images"][0]) for r in records]
    theirs = processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right")

    ours = seeing.load(method="Full", adapter=None, **TRAINED)
    store = store_of(seeing, seeing.data / "heldout.jsonl")
    batch = rows_of(seeing, store).batch(list(range(4)))
    width = batch.input_ids.shape[1]
    assert torch.equal(theirs["pixel_values"], batch.pixel_values)
    for row, length in enumerate(batch.sequence_lengths[batch.sequence_lengths > 20][:4]):
        assert torch.equal(theirs["input_ids"][row, :length], batch.input_ids[row, :length])
    labels = torch.cat([torch.full((4, 1), IGNORE), batch.labels[:, :-1]], dim=1)
    reference = plain(seeing)
    expected = reference(
        input_ids=theirs["input_ids"][:, :width],
        attention_mask=theirs["attention_mask"][:, :width],
        pixel_values=theirs["pixel_values"],
        labels=labels,
    ).loss
    loss = loss_sum(ours, batch, CPU) / batch.num_targets
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    theirs_by_name = {name: parameter.grad for name, parameter in reference.named_parameters()}
    largest = max(float(grad.abs().max()) for grad in theirs_by_name.values() if grad is not None)
    for name, parameter in ours.named_parameters():
        other = theirs_by_name[name]
        assert parameter.requires_grad == (other is not None), "the tower's last layer, of which LLaVA takes nothing"
        if other is not None:
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("attention", [Attention.SDPA, Attention.EAGER, Attention.VARLEN])
def test_packed_and_mixed_losses_are_the_separate_ones(seeing: Seeing, attention: Attention) -> None:
    model = seeing.load().eval()
    use(model.get_base_model(), Choice(attention, "test"))
    setattr(model.get_base_model(), _ATTRIBUTE, Kernels(Choice(attention, "test")))
    assert model.config.vision_config._attn_implementation == "sdpa", "the tower's attention is not causal"
    store = store_of(seeing, seeing.data / "mixed.jsonl")
    alone = rows_of(seeing, store)
    packed = Rows(store, pack_rows(store.lengths, 200), packed=True, image=seeing.image())
    reference = seeing.load().eval()
    with torch.no_grad():
        for row in range(3):
            samples = [int(s) for s in packed.samples[row]]
            separate = sum(loss_sum(reference, alone.batch([s]), CPU).item() for s in samples)
            assert loss_sum(model, packed.batch([row]), CPU).item() == pytest.approx(separate, rel=5e-6)
            assert loss_sum(model, alone.batch([*samples, None]), CPU).item() == pytest.approx(separate, rel=5e-6)


def test_a_blank_image_goes_nowhere_and_gives_gradients_of_zero(seeing: Seeing) -> None:
    model = seeing.load(method="Full", adapter=None, **TRAINED)
    store = store_of(seeing, seeing.data / "mixed.jsonl")
    texts = [s for s in range(len(store)) if store.images is not None and not store.images.of(s)][:2]
    with_blank, without = (rows_of(seeing, store, blank=blank).batch(texts) for blank in (True, False))
    assert without.pixel_values is None
    assert with_blank.pixel_values is not None and with_blank.pixel_values.shape == (1, 3, 64, 64)
    losses = [loss_sum(model, batch, CPU) for batch in (with_blank, without)]
    assert losses[0].item() == losses[1].item()
    losses[0].backward()
    seen = [p for n, p in model.named_parameters() if vision.part_of(n) and p.grad is not None]
    assert len(seen) > 20 and all(not p.grad.any() for p in seen if p.grad is not None)


def test_pictures_matter_to_the_loss_and_in_their_order(seeing: Seeing) -> None:
    model = seeing.load().eval()
    rows = rows_of(seeing, store_of(seeing, seeing.data / "train.jsonl"))
    batch = rows.batch([0, 20])
    assert batch.pixel_values is not None and not torch.equal(batch.pixel_values[0], batch.pixel_values[1])
    swapped = replace(batch, pixel_values=batch.pixel_values.flip(0))
    with torch.no_grad():
        assert loss_sum(model, batch, CPU).item() != loss_sum(model, swapped, CPU).item()


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("mode", ["Full", "SelectiveOp", "SelectiveLayer"])
def test_recomputation_changes_no_gradient_and_leaves_a_frozen_tower_alone(
    seeing: Seeing, mode: str, trained: bool
) -> None:
    block = TRAINED if trained else {}
    store = store_of(seeing, seeing.data / "heldout.jsonl")
    batch = rows_of(seeing, store).batch([0, 1])

    def gradients(**changes: Any) -> tuple[dict[str, torch.Tensor], int]:
        model = seeing.load(**block, **changes)
        calls: list[int] = []
        tower = model.get_base_model().model.vision_tower
        layer = next(m for n, m in tower.named_modules() if n.endswith("layers.0.mlp"))
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
        loss_sum(model, batch, CPU).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, len(calls)

    expected, once = gradients()
    found, count = gradients(training__activationCheckpointing=mode)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (once, count) == (1, 2 if trained else 1)


# What is trained


def trained_parts(model: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "lora" if ".lora_" in name else "whole"
            found.setdefault(vision.part_of(name) or "language_model", set()).add(kind)
    return found


ADAPTED: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "all": ({}, {"language_model": {"lora"}}),
    "names that the tower has too": ({"adapter__targetModules": ["q_proj", "v_proj"]}, {"language_model": {"lora"}}),
    "a named layer of the projector": (
        {"adapter__targetModules": ["q_proj", "multi_modal_projector.linear_1"]},
        {"language_model": {"lora"}, vision.PROJECTOR: {"lora"}},
    ),
    "tower": (
        {"vision": {"freezeTower": False, "projectorLearningRate": None}},
        {"language_model": {"lora"}, vision.TOWER: {"whole"}},
    ),
    "projector": (
        {"vision": {"freezeTower": True, "projectorLearningRate": 1e-3}},
        {"language_model": {"lora"}, vision.PROJECTOR: {"whole"}},
    ),
    "an adapter in the tower alone": (
        {"adapter__targetModules": ["vision_tower.encoder.layers.0.mlp.fc1"]},
        {vision.TOWER: {"lora"}},
    ),
    "both, dora": (
        {**TRAINED, "adapter__variant": "DoRA"},
        {"language_model": {"lora"}, vision.TOWER: {"whole"}, vision.PROJECTOR: {"whole"}},
    ),
    "full": (jobs.FULL, {"language_model": {"whole"}}),
    "full and all": (
        {**jobs.FULL, **TRAINED},
        {"language_model": {"whole"}, vision.TOWER: {"whole"}, vision.PROJECTOR: {"whole"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTED)
def test_what_is_trained(seeing: Seeing, name: str) -> None:
    changes, expected = ADAPTED[name]
    model = seeing.load(**changes)
    found = trained_parts(model)
    assert found == expected
    assert seeing.image(**changes).blank == bool(found.keys() - {"language_model"})
    if name == "a named layer of the projector":
        assert {
            n.split(".lora_")[0].split(".")[-1]
            for n, p in model.named_parameters()
            if p.requires_grad and vision.part_of(n)
        } == {"linear_1"}
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["all", "names that the tower has too", "tower", "projector", "full", "full and all"])
def test_memory_is_reckoned_for_what_is_trained(seeing: Seeing, name: str) -> None:
    """From the headers of the files, whose names are older than the model's, as from the configuration."""
    changes, expected = ADAPTED[name]
    model = seeing.load(**changes)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    if "whole" in expected.get(vision.TOWER, ()):  # its unused layer is reckoned with
        unused = ("post_layernorm", ".encoder.layers.2.")
        trained |= {
            n: p.numel() for n, p in model.named_parameters() if vision.part_of(n) and any(u in n for u in unused)
        }
    for shapes in (read_shapes(seeing.model), shapes_of_config(seeing.model)):
        assert num_trained(shapes, seeing.spec(**changes)) == sum(trained.values())


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["fc1"], r"adapter\.targetModules: fc1 does not fit .*; its linear layers are .*q_proj"),
        (["q_proj", "fc1"], r"adapter\.targetModules: fc1 does not fit .*; its linear layers are .*q_proj"),
        (
            ["multi_modal_projector.linear_1"],
            r"names a layer in multi_modal_projector, which `vision\.projectorLearningRate` trains",
        ),
    ],
)
def test_an_adapter_where_it_cannot_be(seeing: Seeing, targets: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        seeing.load(**TRAINED, adapter__targetModules=targets)


def test_frozen_layers_are_the_language_models(seeing: Seeing) -> None:
    """Its layers are as many as the tower's here, whose list comes first."""
    from transformers import LlavaForConditionalGeneration

    config = LlavaForConditionalGeneration.from_pretrained(seeing.model).config
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers
    model = LlavaForConditionalGeneration(config)
    freeze(model, LaunchFreeze(trainable_layers=1, trainable_modules=["mlp"], extra_modules=["norm"]), "x")
    vision.choose_trained(model, LaunchVision(freeze_tower=False, projector_learning_rate=None))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    language = {n for n in names if vision.part_of(n) is None}
    assert language == {f"model.language_model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up", "down")} | {
        "model.language_model.norm.weight"
    }
    assert {vision.part_of(n) for n in names - language} == {vision.TOWER}
    with pytest.raises(ConfigError, match="has no module `vision_tower` there"):
        freeze(model, LaunchFreeze(trainable_layers=1, trainable_modules=["All"], extra_modules=["vision_tower"]), "x")


def test_tower_and_projector_are_not_quantised(seeing: Seeing) -> None:
    for bits in (4, 8):
        model = seeing.load(method="QLoRA", quantization={"bits": bits, "doubleQuantization": True}, **TRAINED)
        kinds: dict[str, set[str]] = {}
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lora_" not in name:
                kinds.setdefault("head" if "lm_head" in name else vision.part_of(name) or "language_model", set()).add(
                    type(module).__name__
                )
        quantised = "Linear4bit" if bits == 4 else "Linear8bitLt"
        assert kinds == {
            vision.TOWER: {"Linear"},
            vision.PROJECTOR: {"Linear"},
            "language_model": {quantised},
            "head": {"Linear"},
        }
        assert trained_parts(model)[vision.PROJECTOR] == {"whole"}


def test_weights_trained_in_bf16_have_float32_masters(seeing: Seeing) -> None:
    """Adapters alone are their own masters; with a tower or projector beside them DeepSpeed keeps a copy of both."""
    for block, wrapped in (({}, False), (TRAINED, True)):
        spec = seeing.spec(**block, training__precision="BF16")
        assert ("bf16" in engine.deepspeed_config(spec), engine.zero_stage(spec)) == (wrapped, int(wrapped))


def test_the_projector_learns_at_its_own_rate(seeing: Seeing) -> None:
    changes = {**TRAINED, "adapter__loraPlusRatio": 4.0, "training__learningRate": 0.01, "training__weightDecay": 0.1}
    model = seeing.load(**changes)
    groups = parameter_groups(model, seeing.spec(**changes))
    of = {id(p): group for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = of[id(parameter)]
        expected = 4.0 if ".lora_B." in name else 0.2 if vision.part_of(name) == vision.PROJECTOR else 1.0
        assert group[RATE_MULTIPLIER] == pytest.approx(expected), name
        assert group["weight_decay"] == (0.1 if parameter.dim() >= 2 else 0.0), name
    assert len(groups) == 5

"""Images: placeholders, pixels, where they come from, and what is refused."""

import base64
import io
import itertools

import numpy as np
import pytest
import torch
from data_helpers import make_config, make_tokenizer, numbered, write_jsonl
from pairs import build_pair
from test_data_masks import GEMMA4

from joint_train import Gemma4WithDrafter
from joint_train.data import DataError, build_loader

Image = pytest.importorskip("PIL.Image")
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil  # noqa: E402

# Of the tiny pair's vision tower; 70 is the fewest soft tokens that the processor allows.
SIZES = dict(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70)
TRAINED = "a cat<turn|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    Gemma4ImageProcessorPil(**SIZES).save_pretrained(folder)
    tokenizer = make_tokenizer(GEMMA4)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image>", "<image|>"]})
    tokenizer.name_or_path = str(folder)
    tokenizer.image_token, tokenizer.boi_token, tokenizer.eoi_token = "<|image|>", "<|image>", "<image|>"
    for name in ("image", "boi", "eoi"):
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{name}_token")))
    return tokenizer


def picture(seed: int, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(*parts: dict) -> dict:
    content = [*parts, {"type": "text", "text": "what is it?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]}


def batches(tmp_path, tokenizer, examples, count=1, **options):
    path = write_jsonl(tmp_path / "a.jsonl", examples)
    cfg = make_config(tmp_path, [path], **{"max_length": 256, "mixture": "epoch", "shuffle": False, **options})
    return list(itertools.islice(iter(build_loader(cfg, tokenizer, "train", 0, 1)), count))


def test_placeholders_are_those_of_the_text_with_the_image_written_out(tmp_path, tokenizer):
    image = picture(0)
    image.save(tmp_path / "cat.png")
    (batch,) = batches(tmp_path, tokenizer, [ask({"type": "image", "path": "cat.png"})])
    count = int(Gemma4ImageProcessorPil(**SIZES)([image])["num_soft_tokens_per_image"][0])
    messages = ask({"type": "image"})["messages"]
    text = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) + TRAINED + "\n"
    ids = tokenizer(text.replace("<|image|>", f"<|image>{'<|image|>' * count}<image|>"), add_special_tokens=False)
    used = batch["document_ids"][0] == 1
    assert batch["input_ids"][0, used].tolist() == ids["input_ids"]
    assert tokenizer.decode(batch["labels"][batch["labels"] != -100]) == TRAINED
    assert batch["mm_token_type_ids"].tolist() == (batch["input_ids"] == tokenizer.image_token_id).long().tolist()
    assert batch["mm_token_type_ids"].sum() == count


@pytest.mark.parametrize("chunk", [64, 1])
def test_pixels_are_the_processors_in_the_order_of_the_rows(tmp_path, tokenizer, monkeypatch, chunk):
    monkeypatch.setattr("joint_train.data.tokenise.CHUNK_RECORDS", chunk)
    for seed in range(3):
        picture(seed, (40 + 30 * seed, 30)).save(tmp_path / f"{seed}.png")
    parts = [{"type": "image", "image": f"{tmp_path}/{seed}.png"} for seed in range(3)]
    examples = [ask(parts[0], parts[1]), *numbered(1), ask(parts[2])]
    (batch,) = batches(tmp_path, tokenizer, examples, max_length=320, num_workers=1)
    expected = Gemma4ImageProcessorPil(**SIZES)(
        images=[picture(seed, (40 + 30 * seed, 30)) for seed in range(3)], return_tensors="pt"
    )
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert torch.equal(batch["image_position_ids"], expected["image_position_ids"])
    assert batch["mm_token_type_ids"].sum() == expected["num_soft_tokens_per_image"].sum()


def test_a_photograph_that_was_held_sideways_is_turned(tmp_path, tokenizer):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90°
    picture(0, (90, 30)).save(tmp_path / "cat.png", exif=exif)
    (batch,) = batches(tmp_path, tokenizer, [ask({"type": "image", "path": "cat.png"})])
    upright = picture(0, (90, 30)).rotate(-90, expand=True)
    expected = Gemma4ImageProcessorPil(**SIZES)(images=[upright], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])


def test_batches_with_and_without_images(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("joint_train.data.tokenise.CHUNK_RECORDS", 1)
    picture(0).save(tmp_path / "cat.png")
    examples = [*numbered(1), ask({"type": "image", "path": "cat.png"})]
    without, with_image = batches(tmp_path, tokenizer, examples, count=2, packing=False)
    assert "pixel_values" in with_image
    assert not {"pixel_values", "image_position_ids", "mm_token_type_ids"} & without.keys()


def test_no_part_of_an_image_is_a_target(tmp_path, tokenizer):
    picture(0).save(tmp_path / "cat.png")
    (batch,) = batches(tmp_path, tokenizer, [ask({"type": "image", "path": "cat.png"})], train_on="all")
    image = torch.isin(
        batch["input_ids"],
        torch.tensor([tokenizer.image_token_id, tokenizer.boi_token_id, tokenizer.eoi_token_id]),
    )
    assert (batch["labels"][image] == -100).all()
    assert (batch["labels"][~image & (batch["document_ids"] > 0)] != -100).all()


FORMS = [
    "path", "file url", "data url", "image_url", "value", "source", "base64", "listed", "one listed", "no marker",
    "in the message", "parquet",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_where_images_may_be(tmp_path, tokenizer, form):
    data = png(picture(5))
    (tmp_path / "cat.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    if form == "parquet":
        datasets = pytest.importorskip("datasets")
        question = [{"type": "image", "text": None}, {"type": "text", "text": "what?"}]
        prompt = [{"role": "user", "content": question}]
        example = {"prompt": prompt, "response": "a cat", "images": [{"bytes": data, "path": None}]}
        datasets.Dataset.from_list([example]).to_parquet(tmp_path / "a.parquet")
        cfg = make_config(tmp_path, [str(tmp_path / "a.parquet")], max_length=256)
        batch = next(iter(build_loader(cfg, tokenizer, "train", 0, 1)))
    else:
        example = {
            "path": ask({"type": "image", "path": "cat.png"}),
            "file url": ask({"type": "image", "url": f"file://{tmp_path}/cat.png"}),
            "data url": ask({"type": "image", "url": url}),
            "image_url": ask({"type": "image_url", "image_url": {"url": url}}),
            "value": ask({"type": "image_url", "value": "cat.png"}),
            "source": ask({"type": "image", "source": {"type": "base64", "data": url.split(",")[1]}}),
            "base64": ask({"type": "image", "image": url.split(",")[1]}),
            "no marker": {**ask(), "image": "cat.png"},
            "in the message": {"messages": [{**ask()["messages"][0], "images": ["cat.png"]}, ask()["messages"][1]]},
            "listed": {**ask({"type": "image"}), "images": ["cat.png"]},
            "one listed": {**ask({"type": "image"}), "image": "cat.png"},
        }[form]
        (batch,) = batches(tmp_path, tokenizer, [example])
    expected = Gemma4ImageProcessorPil(**SIZES)(images=[picture(5)], return_tensors="pt")
    assert torch.equal(batch["pixel_values"][:1], expected["pixel_values"])
    ids = batch["input_ids"][0].tolist()
    assert ids.index(tokenizer.image_token_id) < ids.index(tokenizer("what", add_special_tokens=False)["input_ids"][0])


BAD = {
    "missing": (ask({"type": "image", "path": "dog.png"}), "dog.png can't be read: FileNotFoundError"),
    "cut off": (ask({"type": "image", "path": "cut.png"}), "cut.png can't be read"),
    "no image": (ask({"type": "image", "path": "text.png"}), "text.png can't be read: UnidentifiedImageError"),
    "fetched": (ask({"type": "image", "url": "https://x/cat.png"}), "nothing is fetched while training"),
    "not base64": (ask({"type": "image", "url": "data:image/png;base64,@"}), "isn't base64"),
    "too few": ({**ask({"type": "image"}, {"type": "image"}), "images": ["cat.png"]}, "1 images for 2 places"),
    "too many": ({**ask({"type": "image"}), "images": ["cat.png"] * 2}, "2 images for 1 places"),
    "none": (ask({"type": "image"}), "a message has a place for an image, but the record has no image"),
    "audio": (ask({"type": "audio", "path": "a.wav"}), "content of type 'audio' can't be trained on"),
    "unknown base64": (ask({"type": "image", "image": "Qk" + "A" * 9000}), r"QkA+… \(9,\d+ characters\) can't be read"),
    "a pointer": (ask({"type": "image", "path": "pointer.png"}), "pointer.png is a Git LFS pointer, not the file"),
    "Gemma 3's marker": (
        ask({"type": "text", "text": "<start_of_image>"}),
        "a marker of another model family: write <im",
    ),
    "Qwen's marker": (
        ask({"type": "text", "text": "<|vision_start|><|image_pad|>"}),
        "a marker of another model family",
    ),
    "Phi's marker": (ask({"type": "text", "text": "<|image_1|>"}), "a marker of another model family"),
    "placeholder in the text": (ask({"type": "text", "text": "<|image|>"}), "0 images, and 1 placeholders"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_images_are_named_or_skipped(tmp_path, tokenizer, case):
    example, message = BAD[case]
    picture(0).save(tmp_path / "cat.png")
    (tmp_path / "cut.png").write_bytes(png(picture(0))[:500])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{message}"):
        batches(tmp_path, tokenizer, [*numbered(1), example], num_workers=int(case == "missing"))
    (batch,) = batches(tmp_path, tokenizer, [*numbered(1), example], on_error="skip")
    assert batch["document_ids"].max() == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_changes_during_a_run_is_named(tmp_path, tokenizer, workers):
    picture(0).save(tmp_path / "cat.png")
    path = write_jsonl(tmp_path / "a.jsonl", [ask({"type": "image", "path": "cat.png"})])
    loader = build_loader(make_config(tmp_path, [path], max_length=256, num_workers=workers), tokenizer, "train", 0, 1)
    picture(0, (900, 30)).save(tmp_path / "cat.png")
    with pytest.raises(DataError, match=r"a.jsonl:1: image .*cat.png has \d+ tokens now, and had \d+") as raised:
        next(iter(loader))
    assert "Traceback" not in str(raised.value)


def test_markers_stand_for_the_images_beside_them(tmp_path, tokenizer):
    """LLaMA-Factory's way: <image> in the text, and the images in a column."""
    for seed in range(2):
        picture(seed).save(tmp_path / f"{seed}.png")
    messages = [{"role": "user", "content": "<image>what is it?<image>"}, {"role": "assistant", "content": "a cat"}]
    examples = [{"messages": messages, "images": ["0.png", "1.png"]}]
    image = {"type": "image"}
    written = [image, {"type": "text", "text": "what is it?"}, image]
    examples.append({"messages": [{"role": "user", "content": written}, messages[1]], "images": ["0.png", "1.png"]})
    with_markers, with_parts = batches(tmp_path, tokenizer, examples, count=2, packing=False)
    assert with_markers.keys() == with_parts.keys() and "pixel_values" in with_parts
    assert all(torch.equal(with_markers[key], with_parts[key]) for key in with_parts)
    with pytest.raises(DataError, match="a.jsonl:1: 1 images for 2 places in the messages"):
        batches(tmp_path, tokenizer, [{"messages": messages, "images": ["0.png"]}])
    plain = make_tokenizer(GEMMA4)
    with pytest.raises(DataError, match="a.jsonl:1: 2 images, and the tokenizer 'tiny' declares no tokens for them"):
        batches(tmp_path, plain, examples)


@pytest.mark.parametrize("overlong", ["truncate", "split"])
def test_no_image_is_cut_in_two(tmp_path, tokenizer, overlong):
    picture(0).save(tmp_path / "cat.png")
    image = {"type": "image", "path": "cat.png"}
    path = write_jsonl(tmp_path / "a.jsonl", [ask(*[image] * 5)])
    cfg = make_config(tmp_path, [path], overlong=overlong, max_length=180, train_on="all", mixture="epoch")
    loader = build_loader(cfg, tokenizer, "train", 0, 1)
    rows = loader.sequence.count_rows()
    assert rows == (1 if overlong == "truncate" else 3)
    total = 0
    for batch in itertools.islice(iter(loader), rows):
        ids = batch["input_ids"][0]
        counts = [int((ids == token).sum()) for token in (tokenizer.boi_token_id, tokenizer.eoi_token_id)]
        assert counts[0] == counts[1] == len(batch.get("pixel_values", []))
        total += counts[0]
    assert total == (2 if overlong == "truncate" else 5)


def test_the_pair_trains_on_packed_images_as_on_unpacked_ones(tmp_path, tokenizer):
    """The same losses and gradients, the vision tower's included, whether documents share a row or not."""
    base, drafter = build_pair("multimodal", vocab_size=400, vocab_size_per_layer_input=400)
    base.config.image_token_id, base.config.boi_token_id = tokenizer.image_token_id, tokenizer.boi_token_id
    base.config.audio_token_id = base.config.video_token_id = 399
    model = Gemma4WithDrafter(base, drafter, drafter_num_steps=2)
    for seed in range(2):
        picture(seed).save(tmp_path / f"{seed}.png")
    examples = [ask({"type": "image", "path": f"{seed}.png"}) for seed in range(2)] + numbered(2)
    sums = []
    for packing, rows in ((True, 1), (False, 4)):
        (batch,) = batches(tmp_path, tokenizer, examples, packing=packing, micro_batch_size=rows, max_length=320)
        batch.pop("source")
        model.zero_grad()
        out = model(**batch, weights=torch.ones(3))
        out.loss.backward()
        sums.append((out.stats.loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=1e-5, atol=1e-5)
    assert any("vision_tower" in name for name in sums[0][1])
    for name, gradient in sums[0][1].items():
        error = (gradient - sums[1][1][name]).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: {error}"


def test_a_measured_prompt_has_the_tokens_and_pictures_of_training_and_its_text_is_the_bases(tmp_path, tokenizer):
    """What `evaluate` gives the base is the beginning of the trained row, and decoding sees the picture."""
    from transformers import GenerationConfig

    from joint_train.evaluate.decoding import decode, pictures_of
    from joint_train.evaluate.measure import measure
    from joint_train.evaluate.prompts import load_prompts

    example = {**ask({"type": "image"}), "images": [str(tmp_path / "p.png")]}
    (tmp_path / "p.png").write_bytes(png(picture(3)))
    path = write_jsonl(tmp_path / "a.jsonl", [example])
    (prompt,) = load_prompts(str(path), tokenizer)
    (batch,) = batches(tmp_path, tokenizer, [example])
    length = len(prompt.ids)
    assert batch["input_ids"][0, :length].tolist() == prompt.ids
    assert (batch["labels"][0, :length] == -100).all() and batch["labels"][0, length] != -100
    assert torch.equal(batch["mm_token_type_ids"][:, :length], prompt.inputs["mm_token_type_ids"])
    for name in ("pixel_values", "image_position_ids"):
        assert torch.equal(batch[name], prompt.inputs[name])

    base, drafter = build_pair("31b", vocab_size=len(tokenizer) + 8)
    base.config.image_token_id = base.model.config.image_token_id = tokenizer.image_token_id
    base.generation_config, drafter.generation_config = GenerationConfig(pad_token_id=0), GenerationConfig()
    seen = []
    hook = base.register_forward_hook(lambda module, args, out: seen.append(out.logits[0, -1]))
    plain = decode(base, None, prompt.ids, 0, 4, **pictures_of(prompt))
    blind = decode(base, None, prompt.ids, 0, 4)
    with_picture, without = seen[: len(plain.ids)], seen[len(plain.ids) : len(plain.ids) + len(blind.ids)]
    hook.remove()
    for step, logits in enumerate(with_picture):  # against whole forwards, without a cache
        ids = torch.tensor([prompt.ids + plain.ids[:step]])
        types = torch.nn.functional.pad(prompt.inputs["mm_token_type_ids"], (0, step))
        pixels = {name: prompt.inputs[name] for name in ("pixel_values", "image_position_ids")}
        with torch.no_grad():
            out = base(input_ids=ids, mm_token_type_ids=types, use_cache=False, **pixels)
        assert torch.allclose(out.logits[0, -1], logits, atol=1e-4)
    assert (with_picture[0] - without[0]).abs().max() > 0.1  # the picture matters
    found = measure(base, drafter, tokenizer, [prompt], [2], 6, ignore_eos=True)
    assert found["speculative"][0]["differences"] == [] and found["speculative"][0]["tokens"] == 6

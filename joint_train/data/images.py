"""Images in conversations: found, checked and counted when a source is tokenised, made into pixels when a row is read.

The template writes one placeholder token for an image; here it becomes a begin token, as many placeholders as the
image has soft tokens, and an end token. None of them is ever a target. The cache holds where the images of a document
are, not their pixels: these are made in the loader's worker processes, for the rows of a batch only.
"""

import base64
import binascii
import io
import os
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np

from joint_train.data import notices
from joint_train.data.template import IMAGE, Document
from joint_train.errors import DataError
from joint_train.files import is_lfs_pointer

FIELDS = ("image", "path", "url", "image_url", "bytes", "source", "value")
KINDS = ("image", "image_url", "input_image")
MARKER = "<image>"
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 150_000_000  # 12,000 by 12,000 fit; decoding and resizing that takes 2 to 3 GB of a worker's memory
# What stands for media in the texts of some formats, where it begins or ends a line: elsewhere it is what it says, as
# in a question about HTML.
MARKERS = re.compile(r"^[ \t]*<(image|audio|video)>|<(image|audio|video)>[ \t]*$", re.MULTILINE)
# Those of other model families, wherever they stand: nothing else looks like them.
OTHERS = re.compile(
    r"<img>[^<\n]*</img>|<\|image_\d+\|>|<\|vision_(?:start|end)\|>|<\|(?:image|video|audio)_pad\|>|<start_of_image>|"
    r"<image_soft_token>|<image_placeholder>|<ImageHere>|<im_start>|<im_patch>|<ref-object>|<bbox>|<\|audio_\d+\|>|<\|AUDIO\|>"
)
# What the files of pictures begin with, in base64.
BASE64 = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR")
SHOWN = 100


def take(
    messages: list[dict], listed: Any, folder: str, counts: Counter[str] | None = None
) -> tuple[list[dict], list[str | bytes]]:
    """Take the images out of the messages, which keep a part ``{"type": "image"}`` for each.

    Args:
        messages: with images in their parts (``image``, ``path``, ``url``, ``image_url``, ``bytes``, ``source`` or
            ``value``), or with parts or markers ``<image>`` where those go that are listed beside them. If there is no
            place at all, those that are listed come before the first question.
        listed: the example's ``images`` or ``image`` column.
        folder: that paths are relative to.
        counts: of what is worth knowing, by the kinds of :mod:`joint_train.data.notices`.

    Returns:
        The messages, and each image in order: a file's path, or the bytes of one.

    Raises:
        DataError: an image that can't be had, or as many images as there are places for them it is not.
    """
    found = []
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    for index, message in enumerate(messages):
        if listed:
            message = messages[index] = _with_places(message)
        _refuse_markers(message, index)
        if isinstance(message.get("content"), list):
            parts = []
            for part in message["content"]:
                if part["type"] in KINDS:
                    found.append(next((part[field] for field in FIELDS if part.get(field) is not None), None))
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    parts.append(part)
                else:
                    raise DataError(f"message {index}: content of type {part['type']!r} can't be trained on")
            messages[index] = {**message, "content": parts}
    if listed and not found:
        first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise DataError(f"{len(listed)} images, and no question that they could belong to")
        content = messages[first]["content"]
        text = [{"type": "text", "text": content}] if isinstance(content, str) else content
        messages[first] = {**messages[first], "content": [{"type": "image"} for _ in listed] + text}
        found = [None] * len(listed)
        if counts is not None:
            counts[notices.PICTURES_FIRST] += 1
    if listed and all(image is None for image in found):
        if len(listed) != len(found):
            raise DataError(f"{len(listed)} images for {len(found)} places in the messages")
        found = listed
    return messages, [_reference(image, folder) for image in found]


def _with_places(message: dict) -> dict:
    """A message with a part for each of its markers."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not any(MARKER in part["text"] for part in parts if part["type"] == "text"):
        return message
    placed: list[dict] = []
    for part in parts:
        if part["type"] != "text":
            placed.append(part)
            continue
        for index, text in enumerate(part["text"].split(MARKER)):
            placed += [{"type": "image"}] if index else []
            placed += [{"type": "text", "text": text}] if text.strip() else []
    return {**message, "content": placed}


def _refuse_markers(message: dict, index: int) -> None:
    content = message["content"]
    for text in [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]:
        if "<" in text and (other := OTHERS.search(text)):
            raise DataError(
                f"message {index} has {_shorten(other.group())}, a marker of another model family: write <image> and "
                f"give the "
                "images in a column images"
            )
        for match in MARKERS.finditer(text) if "<" in text else ():
            kind = match.group(1) or match.group(2)
            if f"</{kind}>" not in text:
                raise DataError(
                    f"message {index} has a marker <{kind}>, "
                    + (
                        "but the record has no images: give them in a column images, or take the marker out"
                        if kind == "image"
                        else "but audio and video can't be trained on: leave the row out"
                    )
                )


def _reference(image: Any, folder: str) -> str | bytes:
    if isinstance(image, dict):  # Parquet's images are {bytes, path}; an image_url is {url}; Anthropic's are {data}
        fields = ("bytes", "path", "url", "data")
        image = next((image[field] for field in fields if image.get(field) is not None), None)
    if image is None:
        raise DataError("a message has a place for an image, but the record has no image")
    if isinstance(image, bytes):
        return image
    if hasattr(image, "save"):  # datasets decodes images
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()
    if not isinstance(image, str):
        raise DataError(f"an image is a path or bytes, not {type(image).__name__}")
    if image.startswith("data:") or image.startswith(BASE64):
        try:
            return base64.b64decode(image.split(",", 1)[1] if image.startswith("data:") else image, validate=True)
        except (IndexError, binascii.Error) as error:
            raise DataError(f"an image whose data URL isn't base64: {error}") from None
    if image.startswith(("http://", "https://")):
        raise DataError(f"image {_shorten(image)}: nothing is fetched while training; download it and give its path")
    return os.path.join(folder, os.path.expanduser(image.removeprefix("file://")))


def name_of(reference: str | bytes) -> str:
    """The name of an image for messages."""
    return _shorten(reference) if isinstance(reference, str) else f"of {len(reference)} bytes"


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text):,} characters)"


@lru_cache(maxsize=2)
def _processor(folder: str):
    try:
        from PIL import Image  # noqa: F401
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise DataError("images need the pillow package: pip install 'joint-train[data]'") from error
    try:
        # Pillow's resizing is the same on every machine; torchvision may be missing.
        return AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (OSError, ValueError) as error:
        raise DataError(f"the data has images, and {folder} has no image processor: {error}") from error


def pixels(reference: str | bytes, folder: str) -> dict[str, np.ndarray]:
    """An image as the model takes it.

    Args:
        reference: path, or the bytes of a file.
        folder: of the model, with the configuration of its image processor.

    Returns:
        ``pixel_values`` ``[patches, values]`` float32, ``image_position_ids`` ``[patches, 2]`` int64 (-1: padding), and
        ``num_soft_tokens_per_image``.

    Raises:
        DataError: it doesn't decode.
    """
    processor = _processor(folder)
    from PIL import Image, ImageOps

    try:
        opened = io.BytesIO(reference) if isinstance(reference, bytes) else reference
        with Image.open(opened, formats=IMAGE_FORMATS) as image:  # others run programs, or were never looked at
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"image {name_of(reference)} has {image.width} x {image.height} pixels, and at most "
                    f"{MAX_PIXELS:,} are decoded: make it smaller"
                )
            upright = ImageOps.exif_transpose(image).convert("RGB")
        out = processor(images=[upright], return_tensors="np")
    except DataError:
        raise
    except Exception as error:  # decoders raise errors of many kinds
        if isinstance(reference, str) and is_lfs_pointer(reference):
            raise DataError(
                f"image {name_of(reference)} is a Git LFS pointer, not the file: run git lfs pull"
            ) from None
        raise DataError(
            f"image {name_of(reference)} can't be read: {type(error).__name__}: {_shorten(str(error))}"
        ) from None
    return {key: np.asarray(value[0]) for key, value in out.items()}


def of_messages(example: dict[str, Any], count: int) -> list[str | bytes]:
    """The images in the first messages of an example."""
    if not (references := example.get("images")):
        return []
    parts = [part for message in example["messages"][:count] for part in message["content"]]
    return references[: sum(isinstance(part, dict) and part["type"] == "image" for part in parts)]


def expand(
    document: Document, references: list[str | bytes], tokenizer
) -> tuple[Document, list[tuple[int, int, str | bytes]]]:
    """Put as many placeholders as an image has soft tokens in the place of each one.

    Args:
        document: with one placeholder for each image.
        references: its images, in order.

    Returns:
        The longer document, and (position of the begin token, soft tokens, path or bytes) of each image.

    Raises:
        DataError: an image doesn't decode, or the template hasn't one placeholder for each.
    """
    tokens, flags = document.tokens, document.flags
    placeholder = getattr(tokenizer, "image_token_id", None)
    places = np.flatnonzero(tokens == placeholder) if placeholder is not None else np.empty(0, dtype=np.int64)
    if references and (placeholder is None or getattr(tokenizer, "boi_token_id", None) is None):
        raise DataError(
            f"{len(references)} images, and the tokenizer {tokenizer.name_or_path!r} declares no tokens for them "
            "(image_token, boi_token, eoi_token): set data.tokenizer to the released one of the multimodal model"
        )
    if len(places) != len(references):
        raise DataError(f"{len(references)} images, and {len(places)} placeholders for them in the rendered text")
    if not references:
        return document, []
    begin, end = tokenizer.boi_token_id, tokenizer.eoi_token_id
    token_parts, flag_parts, found, last, length = [], [], [], 0, 0
    for place, reference in zip(places.tolist(), references, strict=True):
        count = int(pixels(reference, tokenizer.name_or_path)["num_soft_tokens_per_image"])
        token_parts += [tokens[last:place], np.array([begin, *[placeholder] * count, end], dtype=np.int32)]
        flag_parts += [flags[last:place], np.full(count + 2, IMAGE, dtype=np.uint8)]
        found.append((length + place - last, count, reference))
        length += place - last + count + 2
        last = place + 1
    tokens, flags = np.concatenate([*token_parts, tokens[last:]]), np.concatenate([*flag_parts, flags[last:]])
    return document._replace(tokens=tokens, flags=flags), found

"""The spec of a task, from `NAME[0-4]@key=value` or from the keys of a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.text import LENGTH

MAX_CLASSES = 100_000
SAMPLED: Final = "sampled"
"""The `data` of a task that the model itself writes."""
_NAME = re.compile(r"^(?P<source>[^\[\]]+)(\[(?P<classes>[^\[\]]*)\])?$")


class TaskSpec(BaseModel):
    """The data of a task, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        description="NAME, or a path to an .npz, .csv, .parquet or an image folder; [0-4,7] after it keeps classes."
    )
    target: str | None = Field(
        None, description="Label column of a table, or the column to predict; for an .npz of sounds, the labels (y)."
    )
    text: tuple[str, ...] = Field(
        (),
        description="Columns of a table that hold sentences, or prompts (next-token); A+B on a command line. Makes a "
        "CSV a text task. For text-to-image: the column with captions.",
    )
    tokenizer: str | None = Field(
        None,
        description="For text and captions: a folder, package:NAME/FOLDER, a name on the Hub, or `words`; by default "
        "the model's own.",
    )
    length: int | None = Field(
        None,
        ge=1,
        description=f"For text: tokens a sentence; null: {LENGTH}, 128 for files of texts and rows, 16 for captions, "
        "or as many as the model's pipeline has.",
    )
    kind: Literal["classification", "regression", "denoising", "text-to-image", "next-token"] = Field(
        "classification",
        description="What is predicted: a class, a number of a CSV (regression), the noise of images (denoising), the "
        "same with their captions (text-to-image), or the next token of a text (next-token).",
    )
    caption: str = Field(
        "{}", description="For text-to-image: the caption of a class, such as `a photo of {}`; {} is its name."
    )
    caption_dropout: float = Field(
        0.1, ge=0, lt=1, description="For text-to-image: the share of captions that are left out in training."
    )
    autoencoder: str | None = Field(
        None,
        description="For text-to-image: a folder of a diffusers pipeline or AutoencoderKL, whose latents take the "
        "place of the images; by default the model's own.",
    )
    measure: Literal["nll", "exact", "choices"] | None = Field(
        None,
        description="For next-token, the score: negative log-likelihood a token (nll), the share of answers that "
        "greedy decoding reproduces (exact), or of right choices (choices); null: choices if there is such a column, "
        "else nll.",
    )
    loss_on: Literal["answer", "all"] = Field(
        "answer", description="For next-token with prompts: whether the answer counts for the loss, or everything."
    )
    schedule: str | None = Field(
        None,
        description="For images with noise: linear (null), scaled_linear, squaredcos_cap_v2, sigmoid, flow (flow "
        "matching), or a diffusers folder.",
    )
    timesteps: tuple[int, ...] = Field(
        (),
        description="For images with noise: the time steps that are drawn, A+B on a command line; none: all of the "
        "schedule.",
    )
    sampled: int | None = Field(
        None, ge=2, description="For next-token: rows that the model itself writes, instead of `data`."
    )
    drop: tuple[str, ...] = Field((), description="Columns of a CSV to leave out; A+B on a command line.")
    encoding: Literal["onehot", "ordinal"] = Field(
        "onehot", description="How text columns of a CSV become numbers: onehot or ordinal."
    )
    bins: int | None = Field(
        None, ge=2, le=100, description="Number of classes of a CSV: ranges of a numeric target, equally full."
    )
    fill: bool = Field(
        False, description="Empty cells of a CSV become 0, or a separate text; regression always does that."
    )
    rows: int | None = Field(None, ge=2, description="Train on this many first rows of a CSV, test on the rest.")
    image_size: int | None = Field(None, ge=1, description="Resize images to this many pixels a side.")
    channels: int | None = Field(None, description="Make images grey (1) or colour (3).")
    invert: bool = Field(False, description="Invert the pixels of images: 255 - x.")
    train_limit: int | None = Field(None, ge=1, description="Train on only about this many samples.")
    test_limit: int | None = Field(None, ge=1, description="Score on only about this many test samples.")
    test_fraction: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Test share where the source has no split; 0 (regression): test on the training rows.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of that split.")

    @model_validator(mode="before")
    @classmethod
    def _of_the_model(cls, values: object) -> object:
        """`{sampled: 2000}` alone names no data and no kind."""
        if isinstance(values, dict) and values.get("sampled") is not None:
            return {"data": SAMPLED, "kind": "next-token", **values}
        return values

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if (self.data == SAMPLED) != (self.sampled is not None) or (self.sampled and self.kind != "next-token"):
            raise ValueError(f"data: {SAMPLED} is written by the model itself, {SAMPLED}: ROWS with kind: next-token")
        return self

    @field_validator("drop", "text", "timesteps", mode="before")
    @classmethod
    def _columns(cls, value: object) -> object:
        return tuple(filter(None, value.split("+"))) if isinstance(value, str) else value


def parse_spec(text: str) -> TaskSpec:
    """Reads a task from its text on a command line: `NAME[0-4]@key=value,key=value`.

    Raises:
        HoldfastError: for an unknown key (with a suggestion) or a value of the wrong type.

    Example:
        >>> spec = parse_spec("digits[0-4]@image_size=16,channels=3")
        >>> spec.data, spec.image_size, spec.channels
        ('digits[0-4]', 16, 3)
    """
    data, settings = _parted(text)
    values = {}
    for item in filter(None, settings.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise HoldfastError(f"Task {text!r}: {item!r} has no '='; write NAME@key=value,key=value.")
        if key not in TaskSpec.model_fields or key == "data":
            raise unknown(f"setting in task {text!r}:", key, set(TaskSpec.model_fields) - {"data"})
        values[key] = value
    try:
        return TaskSpec.model_validate({"data": data, **values})
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]} is {first['input']!r}: " if first["loc"] else ""  # or several settings together
        raise HoldfastError(f"Task {text!r}: {where}{first['msg']}.") from error


def _parted(text: str) -> tuple[str, str]:
    """The data and the settings; an existing path may contain an `@`."""
    ends = [i for i, sign in enumerate(text) if sign == "@"]
    for end in (len(text), *reversed(ends)):
        data = text[:end]
        if "@" in data and (_exists(data) or (data.endswith("]") and _exists(data.rpartition("[")[0]))):
            return text[:end], text[end + 1 :]
    data, _, settings = text.partition("@")
    return data, settings


def _exists(path: str) -> bool:
    try:
        return bool(path) and Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # a name too long, a null byte, an unknown user
        return False


def split_off(data: str) -> tuple[str, str | None]:
    """Returns the source and the classes in brackets after it; an existing path may itself end in brackets.

    Raises:
        HoldfastError: for other brackets.

    Example:
        >>> split_off("digits[0-4]")
        ('digits', '0-4')
    """
    data = data.strip()
    if _exists(data):
        return data, None
    before, bracket, classes = data.rpartition("[")
    if bracket and data.endswith("]") and _exists(before):
        return before, classes[:-1]
    match = _NAME.match(data)
    if match is None:
        raise HoldfastError(f"Task {data!r} is not a name; expected NAME or NAME[0-4,7].")
    return match["source"], match["classes"]


def parse_classes(text: str, classes: str) -> list[int]:
    """Returns the numbers of classes in brackets; `text` is the whole task, for messages.

    Raises:
        HoldfastError: for text that is not a number or a range.

    Example:
        >>> parse_classes("digits[0-2,7]", "0-2,7")
        [0, 1, 2, 7]
    """
    numbers: list[int] = []
    for part in classes.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if match is None:
            raise HoldfastError(f"Task {text!r}: {part!r} is not a class or a range; write [0-4] or [0,3,5-7].")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise HoldfastError(f"Task {text!r}: the range {part!r} runs backwards.")
        if last - first >= MAX_CLASSES:
            raise HoldfastError(
                f"Task {text!r}: the range {part!r} names {last - first + 1} classes; expected at most {MAX_CLASSES}."
            )
        numbers.extend(range(first, last + 1))
    return numbers

"""From a name to a task: the embedded default, the data folder, then the library that knows the name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.audio import is_sounds, load_sounds
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.denoising import DenoisingTask, Schedule
from holdfast.tasks.downloads import DOWNLOADS, TEXTS, download, download_text
from holdfast.tasks.image_folder import load_folder
from holdfast.tasks.npz_files import load_npz
from holdfast.tasks.paths import DATA_VARIABLE, place
from holdfast.tasks.synthetic_text import PHRASES, load_phrases
from holdfast.tasks.text import LENGTH, TextTask
from holdfast.tasks.tokenizers import Tokenizer, load_tokenizer

MAX_CLASSES = 100_000
_NAME = re.compile(r"^(?P<source>[^\[\]]+)(\[(?P<classes>[^\[\]]*)\])?$")


class TaskSpec(BaseModel):
    """Which data a task is over, as a recipe writes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(
        description="NAME, or a path to an .npz, .csv, .parquet or an image folder; [0-4,7] behind it keeps classes."
    )
    target: str | None = Field(
        None, description="Label column of a table, or the column to predict; of an .npz of sounds, the labels (y)."
    )
    text: tuple[str, ...] = Field(
        (), description="Columns of a table that hold sentences; A+B on a command line. Makes a CSV a text task."
    )
    tokenizer: str | None = Field(
        None,
        description="Of text: a folder, package:NAME/FOLDER, a name on the Hub, or `words`. By default that of an "
        "hf: model.",
    )
    length: int | None = Field(None, ge=1, description=f"Of text: tokens a sentence; null: {LENGTH}.")
    kind: Literal["classification", "regression", "denoising"] = Field(
        "classification",
        description="What is predicted: a class, of a CSV also a number (regression), of noised images the noise.",
    )
    schedule: str | None = Field(
        None,
        description="Of denoising: linear (null), scaled_linear, squaredcos_cap_v2, sigmoid, or a diffusers folder.",
    )
    drop: tuple[str, ...] = Field((), description="Columns of a CSV to leave out; A+B on a command line.")
    encoding: Literal["onehot", "ordinal"] = Field(
        "onehot", description="How text columns of a CSV become numbers: onehot or ordinal."
    )
    bins: int | None = Field(
        None, ge=2, le=100, description="Classes of a CSV are so many ranges of a numeric target, equally full."
    )
    fill: bool = Field(
        False, description="Empty cells of a CSV become 0, or a text of their own; regression always does that."
    )
    rows: int | None = Field(None, ge=2, description="Train on the first so many rows of a CSV, test on the rest.")
    image_size: int | None = Field(None, ge=1, description="Resize images to this many pixels a side.")
    channels: int | None = Field(None, description="Make images grey (1) or colour (3).")
    train_limit: int | None = Field(None, ge=1, description="Train on about this many samples only.")
    test_limit: int | None = Field(None, ge=1, description="Score on about this many test samples only.")
    test_fraction: float = Field(
        0.25,
        ge=0,
        lt=1,
        description="Test share where the source has no split; 0 (regression): test on the training rows.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of that split.")

    @field_validator("drop", "text", mode="before")
    @classmethod
    def _columns(cls, value: object) -> object:
        return tuple(filter(None, value.split("+"))) if isinstance(value, str) else value


def parse_spec(text: str) -> TaskSpec:
    """Reads a task as people write it on a command line: `NAME[0-4]@key=value,key=value`.

    Raises:
        HoldfastError: for an unknown key (with a suggestion) or a value of the wrong type.

    Example:
        >>> spec = parse_spec("digits[0-4]@image_size=16,channels=3")
        >>> spec.data, spec.image_size, spec.channels
        ('digits[0-4]', 16, 3)
    """
    data, settings = _parted(text)
    found = {}
    for item in filter(None, settings.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise HoldfastError(f"Task {text!r}: {item!r} has no '='; write NAME@key=value,key=value.")
        if key not in TaskSpec.model_fields or key == "data":
            raise unknown(f"setting in task {text!r}:", key, set(TaskSpec.model_fields) - {"data"})
        found[key] = value
    try:
        return TaskSpec.model_validate({"data": data, **found})
    except ValidationError as error:
        first = error.errors()[0]
        raise HoldfastError(f"Task {text!r}: {first['loc'][0]} is {first['input']!r}: {first['msg']}.") from error


def _parted(text: str) -> tuple[str, str]:
    """The data and the settings; a path that exists may hold an `@` itself."""
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


def _split_off(data: str) -> tuple[str, str | None]:
    """The source and the classes in brackets behind it; a path that exists may end in brackets itself."""
    data = data.strip()
    if _exists(data):
        return data, None
    before, bracket, classes = data.rpartition("[")
    if bracket and data.endswith("]") and _exists(before):
        return before, classes[:-1]
    match = _NAME.match(data)
    if match is None:
        raise HoldfastError(f"Task {data!r} is no name; expected NAME or NAME[0-4,7].")
    return match["source"], match["classes"]


def load_task(task: str | TaskSpec, *, data_dir: Path | str | None = None) -> ArrayTask:
    """Loads a task by name or path.

    A name is looked up among the embedded data (`digits`, `phrases-topic`), then here, then as `NAME.npz`,
    `NAME.parquet`, `NAME.csv` or a folder `NAME` in the data folder, then downloaded by torchvision or Hugging Face's
    datasets if one of them knows it. A setting that its source has no use for is refused.

    Args:
        task: `digits`, `digits[0-4]`, `cifar10`, `path/to/data.npz`, `table.csv@target=label`, ... or a `TaskSpec`.
        data_dir: the data folder; by default the environment variable `HOLDFAST_DATA`, else none. Downloads are kept
            there, or in `~/.cache/holdfast`.

    Raises:
        HoldfastError: if nothing has that name (the message names every way to provide it), or the data is unusable.

    Example:
        >>> task = load_task("digits[5-9]")
        >>> task.name, task.num_outputs, task.input_shape
        ('digits[5-9]', 5, (1, 8, 8))
    """
    spec = parse_spec(task) if isinstance(task, str) else task
    source, classes = _split_off(spec.data)
    if spec.schedule is not None and spec.kind != "denoising":
        raise HoldfastError(f"Task {spec.data!r}: schedule is for kind=denoising, and its kind is {spec.kind}.")
    folder = _folder(data_dir)
    if is_text(spec, data_dir=data_dir):
        loaded: ArrayTask = _load_text(source, spec, folder)
    else:
        _refuse_text_settings(spec)
        loaded = _load(source, spec, folder)
    _refuse_idle_split(spec, loaded)
    if spec.kind == "denoising":
        loaded = DenoisingTask.of(loaded, None if spec.schedule is None else Schedule.named(spec.schedule))
    if classes is not None:
        loaded = _chosen(loaded, spec.data, classes)
    # What limits leave out need not be resized.
    if spec.train_limit is not None:
        loaded = loaded.limit_train(spec.train_limit, spec.seed)
    if spec.test_limit is not None:
        loaded = loaded.limit_test(spec.test_limit, spec.seed)
    if spec.image_size is not None or spec.channels is not None:
        loaded = loaded.as_images(spec.image_size, spec.channels)
    return loaded


def is_text(task: str | TaskSpec, *, data_dir: Path | str | None = None) -> bool:
    """Says whether a task's data are sentences, which need a tokenizer; see `load_task`."""
    spec = parse_spec(task) if isinstance(task, str) else task
    try:
        source, _ = _split_off(spec.data)
    except HoldfastError:  # loading says so
        return False
    if source in PHRASES or source in EMBEDDED:
        return source in PHRASES
    path = _place(source, _folder(data_dir))
    return source in TEXTS if path is None else _holds_text(path, spec)


def _holds_text(path: Path, spec: TaskSpec) -> bool:
    return path.is_file() and (path.suffix == ".parquet" or (path.suffix == ".csv" and bool(spec.text)))


def _folder(data_dir: Path | str | None) -> Path | None:
    chosen = data_dir if data_dir is not None else os.environ.get(DATA_VARIABLE)
    if not chosen:
        return None
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        source = "--data-dir" if data_dir is not None else f"${DATA_VARIABLE}"
        raise HoldfastError(f"The data folder {str(folder)!r} (from {source}) does not exist.")
    return folder


def _refuse_text_settings(spec: TaskSpec) -> None:
    for key in ("text", "tokenizer", "length"):
        if getattr(spec, key):
            raise HoldfastError(
                f"Task {spec.data!r}: {key} is for text, and its data is none; expected a .parquet file, a .csv file "
                f"with `text`, or one of {', '.join((*PHRASES, *TEXTS))}."
            )


def _load_text(source: str, spec: TaskSpec, folder: Path | None) -> TextTask:
    if spec.kind != "classification" or spec.image_size is not None or spec.channels is not None:
        raise HoldfastError(f"Task {spec.data!r}: text is for classification; leave kind, image_size and channels out.")
    tokenizer, length = _tokenizer(spec, folder), spec.length or LENGTH
    _refuse_idle(spec, "text", "drop", "encoding", "bins", "fill", "rows")
    if source in PHRASES:
        _refuse_idle(spec, source, "text", "target")
        _check_alone(source)
        return load_phrases(source, tokenizer, length)
    path = _place(source, folder)
    if path is None:
        _refuse_idle(spec, source, "text", "target")
        return download_text(source, folder, tokenizer=tokenizer, length=length)
    from holdfast.tasks.text_files import load_text  # with pandas, which most tasks do not need

    return load_text(
        path,
        tokenizer=tokenizer,
        length=length,
        text=spec.text,
        target=spec.target,
        test_fraction=spec.test_fraction,
        seed=spec.seed,
    )


def _tokenizer(spec: TaskSpec, folder: Path | None) -> Tokenizer:
    if spec.tokenizer is None:
        raise HoldfastError(
            f"Task {spec.data!r} is text and needs a tokenizer: {spec.data}@tokenizer=FOLDER, or the recipe's key. The "
            "model's own is taken where the model is named hf:FOLDER; `words` needs no file."
        )
    return load_tokenizer(spec.tokenizer.removeprefix("hf:"), folder)


def _load(source: str, spec: TaskSpec, folder: Path | None) -> ArrayTask:
    if spec.test_fraction == 0 and spec.kind != "regression":
        raise HoldfastError(f"Task {spec.data!r}: test_fraction is 0; for {spec.kind} it must be above 0.")
    kind = DenoisingTask if spec.kind == "denoising" else ArrayTask
    if source in EMBEDDED:
        if spec.kind == "regression":
            raise HoldfastError(f"Task {spec.data!r}: regression is for a CSV; {source} holds classes.")
        _refuse_idle(spec, source, *_OF_TABLES)
        _check_alone(source)
        return EMBEDDED[source]()
    path = _place(source, folder)
    if path is not None:
        if spec.kind == "regression" and path.suffix != ".csv":
            raise HoldfastError(f"Task {spec.data!r}: regression is for a CSV; {path.name!r} holds classes.")
        if path.is_dir():
            _refuse_idle(spec, "a folder", *_OF_TABLES)
            return load_folder(
                path,
                image_size=spec.image_size,
                channels=spec.channels,
                test_fraction=spec.test_fraction,
                seed=spec.seed,
                limits=(spec.train_limit, spec.test_limit),
                kind=kind,
            )
        if path.suffix == ".npz":
            return _load_npz(path, spec, kind)
        if path.suffix == ".csv":
            return _load_table(path, spec)
        raise HoldfastError(f"{str(path)!r}: data is read from .npz, .csv, .parquet or a folder of images.")
    if source in DOWNLOADS:
        if spec.kind == "regression":
            raise HoldfastError(f"Task {spec.data!r}: regression is for a CSV; {source} holds classes.")
        _refuse_idle(spec, source, *_OF_TABLES)
        return download(source, folder, image_size=spec.image_size, channels=spec.channels)
    if "/" in source or source.endswith((".npz", ".csv", ".parquet")):
        raise HoldfastError(f"No data at {source!r}: the file does not exist.")
    ways = f"put {source}.npz into " + (
        f"{str(folder)!r}" if folder else f"a folder named by --data-dir or ${DATA_VARIABLE}"
    )
    here = [p.stem for kind in ("npz", "parquet") for p in folder.glob(f"*.{kind}")] if folder else []
    known = unknown("task", source, [*EMBEDDED, *PHRASES, *DOWNLOADS, *TEXTS, *here])
    raise HoldfastError(f"{known} For data of your own, {ways}, or give a path.")


def _load_table(path: Path, spec: TaskSpec) -> ArrayTask:
    from holdfast.tasks.tabular import load_csv, load_csv_regression  # with pandas, which most tasks do not need

    idle = ("image_size", "channels", *(("bins",) if spec.kind == "regression" else ()))
    _refuse_idle(spec, "a table", *idle)
    if spec.kind == "regression":
        return load_csv_regression(
            path,
            spec.target,
            drop=spec.drop,
            encoding=spec.encoding,
            rows=spec.rows,
            test_fraction=spec.test_fraction,
            seed=spec.seed,
        )
    return load_csv(
        path,
        spec.target,
        drop=spec.drop,
        encoding=spec.encoding,
        bins=spec.bins,
        fill=spec.fill,
        rows=spec.rows,
        test_fraction=spec.test_fraction,
        seed=spec.seed,
    )


def _load_npz(path: Path, spec: TaskSpec, kind: type[ArrayTask]) -> ArrayTask:
    sounds = is_sounds(path)
    _refuse_idle(spec, "an .npz", *(key for key in _OF_TABLES if key != "target" or not sounds))
    if sounds:
        return load_sounds(path, spec.target, test_fraction=spec.test_fraction, seed=spec.seed, kind=kind)
    return load_npz(path, kind)


def _place(source: str, folder: Path | None) -> Path | None:
    """The file or folder of a name, see `place`; what is here without a suffix must be a folder."""
    return place(
        source,
        folder if folder is not None else "",
        endings=(".npz", ".parquet", ".csv", ""),
        is_there=lambda p: p.is_dir() or (p.is_file() and bool(p.suffix)),
    )


def _check_alone(source: str) -> None:
    if Path(source).is_dir():
        raise HoldfastError(f"{source!r} is both embedded data and a folder here; write ./{source} for the folder.")


_OF_TABLES = ("target", "drop", "encoding", "bins", "fill", "rows")


def _refuse_idle(spec: TaskSpec, what: str, *keys: str) -> None:
    """Refuses settings that have no effect on such data, unless they are at their default."""
    for key in keys:
        if getattr(spec, key) != TaskSpec.model_fields[key].default:
            raise HoldfastError(f"Task {spec.data!r}: {key} has no effect on {what}; leave it out.")


def _refuse_idle_split(spec: TaskSpec, task: ArrayTask) -> None:
    if task.drawn:
        return
    _refuse_idle(spec, "data that has its own split", "test_fraction")
    if spec.train_limit is None and spec.test_limit is None:
        _refuse_idle(spec, "data from which nothing is drawn", "seed")


def _chosen(task: ArrayTask, text: str, classes: str) -> ArrayTask:
    """Numbers in brackets are names, where all classes are called by numbers; else they are positions from 0 on."""
    wanted = _parse_classes(text, classes)
    if not all(re.fullmatch(r"\d{1,9}", name) for name in task.class_names):
        return task.subset(wanted)
    numbers = [int(name) for name in task.class_names]
    if numbers == list(range(len(numbers))) or len(set(numbers)) < len(numbers):
        return task.subset(wanted)
    missing = [c for c in wanted if c not in numbers]
    if missing:
        raise HoldfastError(
            f"Task {text!r}: there is no class called {missing[0]}; its classes are {', '.join(task.class_names[:20])}."
        )
    return task.subset([numbers.index(c) for c in wanted], wanted)


def _parse_classes(text: str, classes: str) -> list[int]:
    found: list[int] = []
    for part in classes.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        if match is None:
            raise HoldfastError(f"Task {text!r}: {part!r} is no class or range of classes; write [0-4] or [0,3,5-7].")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise HoldfastError(f"Task {text!r}: the range {part!r} runs backwards.")
        if last - first >= MAX_CLASSES:
            raise HoldfastError(
                f"Task {text!r}: the range {part!r} names {last - first + 1} classes; expected at most {MAX_CLASSES}."
            )
        found.extend(range(first, last + 1))
    return found


def _digits() -> ArrayTask:
    """scikit-learn's 8x8 digits (1,797 images); every fourth image of each class is for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = np.round(raw.images * (255 / 16)).astype(np.uint8)
    rank = np.zeros(len(x), dtype=int)
    for c in range(10):
        rank[raw.target == c] = np.arange(np.sum(raw.target == c))
    test = rank % 4 == 3
    names = [str(c) for c in range(10)]
    task = ArrayTask("digits", x[~test], raw.target[~test], x[test], raw.target[test], names)
    return task.noted("embedded data of scikit-learn")


EMBEDDED: dict[str, Callable[[], ArrayTask]] = {"digits": _digits}
"""Data that comes with the dependencies."""

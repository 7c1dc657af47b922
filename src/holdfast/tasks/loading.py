"""Loads a task by its name: a named task, a file or folder, or a data set that a library downloads."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.errors import HoldfastError, unknown
from holdfast.tasks.audio import is_sounds, load_sounds
from holdfast.tasks.base import Task
from holdfast.tasks.builtin import TASKS, is_sentences, takes
from holdfast.tasks.caption_sources import METADATA, has_captions
from holdfast.tasks.classification import ArrayTask
from holdfast.tasks.denoising import DenoisingTask
from holdfast.tasks.downloads import DOWNLOADS, TEXTS, download, download_text
from holdfast.tasks.image_folder import load_folder
from holdfast.tasks.in_memory import InMemoryTask
from holdfast.tasks.latents import load_autoencoder
from holdfast.tasks.npz_files import load_npz
from holdfast.tasks.paths import DATA_VARIABLE, cache_folder, data_folder, place
from holdfast.tasks.schedule import Schedule
from holdfast.tasks.spec import TaskSpec, parse_classes, parse_spec, split_off
from holdfast.tasks.text import LENGTH
from holdfast.tasks.text_to_image import LENGTH as CAPTION
from holdfast.tasks.text_to_image import TextToImageTask
from holdfast.tasks.tokenizers import WORDS, Tokenizer, load_tokenizer


def list_tasks() -> list[str]:
    """Returns the names that `load_task` takes without a file of yours; some data sets are downloaded on first use.

    Example:
        >>> names = list_tasks()
        >>> "digits" in names, "cifar10" in names, "phrases-mood" in names
        (True, True, True)
    """
    return sorted({*TASKS, *DOWNLOADS, *TEXTS})


def load_task(task: str | TaskSpec, *, data_dir: Path | str | None = None) -> Task:
    """Loads a task by name or path.

    A name is looked up among the named tasks (`digits`, `phrases-topic`; see `list_tasks`), then in the current folder,
    then as `NAME.npz`, `NAME.parquet`, `NAME.csv` or a folder `NAME` in the data folder, then downloaded by torchvision
    or Hugging Face's datasets if one of them has it. A setting without effect on its source is refused.

    Args:
        task: `digits`, `digits[0-4]`, `cifar10`, `path/to/data.npz`, `table.csv@target=label`, ... or a `TaskSpec`.
        data_dir: the data folder; by default the environment variable `HOLDFAST_DATA`, if set. Downloads are kept
            there, or in `~/.cache/holdfast`.

    Raises:
        HoldfastError: if the name is unknown (the message names every way to provide it), or the data is unusable.

    Example:
        >>> task = load_task("digits[5-9]")
        >>> task.name, task.num_outputs, task.input_shape
        ('digits[5-9]', 5, (1, 8, 8))
    """
    spec = parse_spec(task) if isinstance(task, str) else task
    source, classes = split_off(spec.data)
    spec = _with_kind(spec, source, _folder(data_dir))
    for key, kinds in _OF_KINDS.items():
        if getattr(spec, key) != TaskSpec.model_fields[key].default and spec.kind not in kinds:
            raise HoldfastError(
                f"Task {spec.data!r}: {key} is for kind={' or '.join(kinds)}, and its kind is {spec.kind}."
            )
    folder = _folder(data_dir)
    if is_text(spec, data_dir=data_dir):
        loaded = _load_text(source, spec, folder)
    else:
        _refuse_text_settings(spec)
        loaded = _load(source, spec, folder)
    if not isinstance(loaded, InMemoryTask):
        narrowed = ("kind", "seed", "test_fraction", "train_limit", "test_limit", "image_size", "channels", "invert")
        _refuse_idle(spec, f"{loaded.described}, which is not over arrays in memory", *narrowed)
        if classes is not None:
            raise HoldfastError(f"Task {spec.data!r}: {source} is not over arrays in memory; leave [...] out.")
        return loaded
    return _narrowed(loaded, spec, classes, folder)


def _captioned(spec: TaskSpec, folder: Path | None) -> dict[str, Any]:
    """Arguments of a text-to-image task."""
    tokenizer = load_tokenizer((spec.tokenizer or WORDS).removeprefix("hf:"), folder)
    return {
        "template": spec.caption, "tokenizer": tokenizer, "length": spec.length or tokenizer.length or CAPTION,
        "dropout": spec.caption_dropout, "schedule": _schedule(spec), "timesteps": spec.timesteps,
    }  # fmt: skip


def _schedule(spec: TaskSpec) -> Schedule | None:
    return None if spec.schedule is None else Schedule.named(spec.schedule)


def _narrowed(loaded: InMemoryTask, spec: TaskSpec, classes: str | None, folder: Path | None) -> InMemoryTask:
    """The part of a source that the spec describes."""
    if not loaded.drawn:
        _refuse_idle(spec, "data that has its own split", "test_fraction")
        if spec.train_limit is None and spec.test_limit is None:
            _refuse_idle(spec, "data from which nothing is drawn", "seed")
    if spec.kind in _NOISED and not isinstance(loaded, TextToImageTask):  # which a file with captions is already
        loaded = DenoisingTask.of(loaded, _schedule(spec), spec.timesteps)
    if classes is not None:
        if not isinstance(loaded, ArrayTask):
            raise HoldfastError(f"Task {spec.data!r}: {spec.kind} has no classes to choose from; leave [...] out.")
        loaded = _chosen(loaded, spec.data, classes)
    # Limits before resizing, which then takes less time.
    if spec.train_limit is not None:
        loaded = loaded.limit_train(spec.train_limit, spec.seed)
    if spec.test_limit is not None:
        loaded = loaded.limit_test(spec.test_limit, spec.seed)
    if spec.image_size is not None or spec.channels is not None:
        loaded = loaded.as_images(spec.image_size, spec.channels)
    loaded = loaded.inverted() if spec.invert else loaded
    if spec.kind != "text-to-image":
        return loaded
    # After resizing: small images may have fewer pixels than a caption needs.
    if not isinstance(loaded, TextToImageTask):
        loaded = TextToImageTask.captioned(loaded, **_captioned(spec, folder))
    if spec.autoencoder is None:
        return loaded
    return loaded.in_latents(load_autoencoder(spec.autoencoder, folder), cache_folder(folder))


def is_text(task: str | TaskSpec, *, data_dir: Path | str | None = None) -> bool:
    """Returns whether a task's data are sentences, which need a tokenizer; see `load_task`."""
    spec = parse_spec(task) if isinstance(task, str) else task
    try:
        source, _ = split_off(spec.data)
    except HoldfastError:  # `load_task` raises it again
        return False
    folder = _folder(data_dir)
    if _with_kind(spec, source, folder).kind == "next-token":
        return True
    if source in TASKS:
        return is_sentences(source)
    path = _place(source, folder)
    if path is None:
        return source in TEXTS
    return path.is_file() and spec.kind != "text-to-image" and _holds_sentences(path, bool(spec.text))


def _holds_sentences(path: Path, named: bool) -> bool:
    """Whether a file is a table of sentences; `named`: the spec says which columns hold them."""
    return (path.suffix == ".csv" and named) or (path.suffix == ".parquet" and (named or not has_captions(path)))


def _with_kind(spec: TaskSpec, source: str, folder: Path | None) -> TaskSpec:
    """The spec with the only kind that its file can have: texts and rows of JSON are for language models."""
    if spec.kind != "classification":
        return spec
    if source in TASKS:
        return spec.model_copy(update={"kind": "next-token"}) if source in SPOKEN else spec
    path = _place(source, folder)
    spoken = path is not None and path.suffix in (".txt", ".jsonl")
    return spec.model_copy(update={"kind": "next-token"}) if spoken else spec


def _folder(data_dir: Path | str | None) -> Path | None:
    folder = data_folder(data_dir)
    if folder is not None and not folder.is_dir():
        source = "--data-dir" if data_dir is not None else f"${DATA_VARIABLE}"
        raise HoldfastError(f"The data folder {str(folder)!r} (from {source}) does not exist.")
    return folder


def _refuse_text_settings(spec: TaskSpec) -> None:
    for key in () if spec.kind == "text-to-image" else ("text", "tokenizer", "length"):
        if getattr(spec, key):
            raise HoldfastError(
                f"Task {spec.data!r}: {key} is for text, and its data is not text; expected a .parquet file, a .csv "
                f"file with `text`, or one of {', '.join((*filter(is_sentences, TASKS), *TEXTS))}."
            )


def _load_text(source: str, spec: TaskSpec, folder: Path | None) -> Task:
    if spec.kind not in ("classification", "next-token") or spec.image_size is not None or spec.channels is not None:
        raise HoldfastError(
            f"Task {spec.data!r}: text is for classification, or for kind=next-token; leave another kind, image_size "
            "and channels out."
        )
    if spec.tokenizer is None:
        raise HoldfastError(
            f"Task {spec.data!r} is text and needs a tokenizer: {spec.data}@tokenizer=FOLDER, or the recipe's key. "
            "With a model hf:FOLDER its own is used; `words` needs no file."
        )
    tokenizer, length = load_tokenizer(spec.tokenizer.removeprefix("hf:"), folder), spec.length or LENGTH
    _refuse_idle(spec, "text", "invert", "drop", "encoding", "bins", "fill", "rows")
    if source in TASKS and is_sentences(source):
        if spec.kind == "next-token" and source not in SPOKEN:
            raise HoldfastError(
                f"Task {spec.data!r}: its kind is next-token, and {source} has classes; for a language model there are "
                f"{' and '.join(SPOKEN)}, or files."
            )
        scored = takes(source, "measure")
        _refuse_idle(spec, source, "text", "target", "loss_on", *(() if scored else ("measure",)))
        _check_alone(source)
        chosen = {"measure": spec.measure} if spec.measure is not None else {}
        return TASKS[source](tokenizer=tokenizer, length=length, **chosen)
    if spec.kind == "next-token":
        return _load_next_token(source, spec, folder, tokenizer)
    path = _place(source, folder)
    if path is None:
        _refuse_idle(spec, source, "text", "target")
        return download_text(source, folder, tokenizer=tokenizer, length=length)
    from holdfast.tasks.text_files import load_text  # with pandas, which most tasks do not need

    drawn: dict[str, Any] = {"test_fraction": spec.test_fraction, "seed": spec.seed}
    return load_text(path, tokenizer=tokenizer, length=length, text=spec.text, target=spec.target, **drawn)


def _load_next_token(source: str, spec: TaskSpec, folder: Path | None, tokenizer: Tokenizer) -> Task:
    from holdfast.tasks.next_token_files import load_next_token

    path = _place(source, folder)
    if path is None or path.suffix not in TEXT_SUFFIXES:
        found = (
            f"{str(path)!r} is another kind of file"
            if path is not None
            else "there is no such file here or in the data folder"
        )
        raise HoldfastError(f"Task {spec.data!r}: next-token reads a file of {', '.join(TEXT_SUFFIXES)}, and {found}.")
    settings = spec.model_dump(include={"length", "text", "target", "measure", "loss_on", "test_fraction", "seed"})
    return load_next_token(path, tokenizer=tokenizer, **settings)


def _load(source: str, spec: TaskSpec, folder: Path | None) -> Task:
    if spec.test_fraction == 0 and spec.kind != "regression":
        raise HoldfastError(f"Task {spec.data!r}: test_fraction is 0; for {spec.kind} it must be above 0.")
    if source in TASKS:
        _refuse_for_table(spec, source)
        _check_alone(source)
        return TASKS[source]()
    path = _place(source, folder)
    if path is not None:
        return _load_path(path, spec, folder)
    if source in DOWNLOADS:
        _refuse_for_table(spec, source)
        return download(source, folder, image_size=spec.image_size, channels=spec.channels)
    if "/" in source or source.endswith((".npz", *TEXT_SUFFIXES)):
        raise HoldfastError(f"No data at {source!r}: the file does not exist.")
    data_folder = repr(str(folder)) if folder else f"a folder named by --data-dir or ${DATA_VARIABLE}"
    files = [p.stem for ending in ("npz", "parquet") for p in folder.glob(f"*.{ending}")] if folder else []
    known = unknown("task", source, [*list_tasks(), *files])
    raise HoldfastError(f"{known} For data of your own, put {source}.npz into {data_folder}, or give a path.")


def _load_path(path: Path, spec: TaskSpec, folder: Path | None) -> InMemoryTask:
    if spec.kind == "text-to-image":
        return _load_captioned(path, spec, folder)
    if spec.kind == "regression" and path.suffix != ".csv":
        raise HoldfastError(f"Task {spec.data!r}: regression is for a CSV; {path.name!r} holds classes.")
    if path.suffix == ".csv":
        return _load_table(path, spec)
    try:
        return _load_images(path, spec)
    except HoldfastError as error:
        if not has_captions(path) or (path.is_dir() and spec.kind != "classification"):
            raise
        raise HoldfastError(
            f"{error} It holds images with captions, which are for kind=text-to-image: {spec.data}@kind=text-to-image "
            "(kind: in a recipe)."
        ) from error


def _load_captioned(path: Path, spec: TaskSpec, folder: Path | None) -> InMemoryTask:
    """Images with captions, or with classes whose names are captions."""
    if path.is_file() and path.name in METADATA:
        raise HoldfastError(f"{str(path)!r} lists the images of a folder; give the folder: {str(path.parent)!r}.")
    make = partial(TextToImageTask, **_captioned(spec, folder))
    if path.suffix == ".npz" and not is_sounds(path):
        _refuse_idle(spec, "an .npz", *_OF_TABLES, "text")
        return load_npz(path, DenoisingTask, captioned=make)
    if path.suffix != ".parquet" and not has_captions(path):
        _refuse_idle(spec, f"{path.name}, which has no list of images with captions", "text")
        return _load_images(path, spec)
    from holdfast.tasks.captions import load_captions  # with pandas, which most tasks do not need

    _refuse_idle(spec, "images with captions", *_OF_TABLES)
    settings = spec.model_dump(include={"text", "image_size", "channels", "test_fraction", "seed"})
    return load_captions(path, make=make, limits=(spec.train_limit, spec.test_limit), **settings)


def _load_images(path: Path, spec: TaskSpec) -> InMemoryTask:
    """Arrays, or a folder of images (or sounds, which become images) by class."""
    kind = DenoisingTask if spec.kind in _NOISED else ArrayTask  # which needs no labels
    drawn: dict[str, Any] = {"test_fraction": spec.test_fraction, "seed": spec.seed}
    if path.is_dir():
        _refuse_idle(spec, "a folder", *_OF_TABLES)
        limits = (spec.train_limit, spec.test_limit)
        return load_folder(path, image_size=spec.image_size, channels=spec.channels, limits=limits, kind=kind, **drawn)
    if path.suffix == ".npz":
        sounds = is_sounds(path)
        _refuse_idle(spec, "an .npz", *(key for key in _OF_TABLES if key != "target" or not sounds))
        return load_sounds(path, spec.target, kind=kind, **drawn) if sounds else load_npz(path, kind)
    if path.suffix == ".parquet":
        raise HoldfastError(
            f"{str(path)!r} has a column of images, and {spec.kind} reads an .npz or a folder of images."
        )
    if spec.kind == "text-to-image":
        raise HoldfastError(f"{str(path)!r}: images with captions are read from .npz, .parquet or a folder.")
    raise HoldfastError(f"{str(path)!r}: data is read from .npz, .csv, .parquet or a folder of images.")


def _refuse_for_table(spec: TaskSpec, source: str) -> None:
    """Refuses settings of tables for another source."""
    if spec.kind == "regression":
        raise HoldfastError(f"Task {spec.data!r}: regression is for a CSV; {source} holds classes.")
    _refuse_idle(spec, source, *_OF_TABLES, "text")


def _load_table(path: Path, spec: TaskSpec) -> InMemoryTask:
    from holdfast.tasks.tabular import load_csv, load_csv_regression  # with pandas, which most tasks do not need

    _refuse_idle(spec, "a table", "image_size", "channels", "invert", *(("bins",) if spec.kind == "regression" else ()))
    settings = spec.model_dump(include={"drop", "encoding", "rows", "test_fraction", "seed"})
    if spec.kind == "regression":
        return load_csv_regression(path, spec.target, **settings)
    return load_csv(path, spec.target, bins=spec.bins, fill=spec.fill, **settings)


def _place(source: str, folder: Path | None) -> Path | None:
    """The file or folder of a name, see `place`; a name without a suffix must be a folder."""
    return place(
        source,
        folder if folder is not None else "",
        endings=(".npz", ".parquet", ".csv", ".jsonl", ".txt", ""),
        is_there=lambda p: p.is_dir() or (p.is_file() and bool(p.suffix)),
    )


def _check_alone(source: str) -> None:
    if Path(source).is_dir():
        raise HoldfastError(f"{source!r} is both a named task and a folder here; write ./{source} for the folder.")


SPOKEN = ("made-up-facts", "phrases")
"""Named tasks for language models."""

TEXT_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
"""Files that become tasks of language models."""

_NOISED = ("denoising", "text-to-image")
_OF_KINDS = {
    "schedule": _NOISED, "timesteps": _NOISED, "caption": _NOISED[1:], "caption_dropout": _NOISED[1:],
    "autoencoder": _NOISED[1:],
    "measure": ("next-token",), "loss_on": ("next-token",),
}  # fmt: skip
"""The kinds of tasks that have a setting, for those that others lack."""

_OF_TABLES = ("target", "drop", "encoding", "bins", "fill", "rows")


def _refuse_idle(spec: TaskSpec, what: str, *keys: str) -> None:
    """Refuses settings without effect on such data, unless they have their default."""
    for key in keys:
        if getattr(spec, key) != TaskSpec.model_fields[key].default:
            raise HoldfastError(f"Task {spec.data!r}: {key} has no effect on {what}; leave it out.")


def _chosen(task: ArrayTask, text: str, classes: str) -> ArrayTask:
    """Numbers in brackets are names if all classes have numbers as names; otherwise they are positions from 0 on."""
    wanted = parse_classes(text, classes)
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

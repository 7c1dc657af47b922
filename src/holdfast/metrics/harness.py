"""Tasks of lm-evaluation-harness as measures of what a language model can do (extra `lm-eval`).

The harness asks for log-likelihoods and for text; `harness_model` answers for a model of Holdfast as the harness itself
does for a model of transformers.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from holdfast.errors import HoldfastError
from holdfast.models import CausalModel, SplitModel
from holdfast.runtime.documents import read_yaml
from holdfast.runtime.run import Run
from holdfast.tasks import Tokenizer

HARNESS: Final = "lm-eval:"
"""What the name of a measure begins with; then the name of a task of the harness, or a file of one."""

BATCH = 8
"""Requests that are answered at once."""


@dataclass(frozen=True)
class HarnessScore:
    """One number that a task of the harness gives.

    Attributes:
        task: its name; a group of tasks gives one for each.
        metric: such as `acc`, or `exact_match, strict`, with the name of a filter.
        value: None if it is not finite.
    """

    task: str
    metric: str
    value: float | None


def check_measure(measure: str) -> None:
    """Refuses what is not a measure, before any work is done.

    Raises:
        HoldfastError: if the name has another form, lm_eval is not installed, or there is no such file or task.
    """
    name = measure.removeprefix(HARNESS)
    if name == measure or not name:
        raise HoldfastError(
            f"The measure {measure!r} is unknown; expected {HARNESS}TASK, a task of lm-evaluation-harness, or "
            f"{HARNESS}FILE.yaml, one of your own."
        )
    _package()
    if not _is_file(name):
        known = _manager().all_tasks
        if name not in known:
            raise HoldfastError(
                f"The measure {measure!r}: lm-evaluation-harness has no task {name!r}; see `lm-eval ls tasks`, or give "
                "a file that ends in .yaml."
            )
        return
    _read(name)


def harness_scores(model: SplitModel, tokenizer: Tokenizer, measure: str, *, run: Run) -> list[HarnessScore]:
    """Evaluates a model on a task of the harness.

    Args:
        model: on any device; it is not changed.
        tokenizer: its own.
        measure: `lm-eval:TASK`, or `lm-eval:FILE.yaml`. Relative `data_files` in the file are looked up beside it.
        run: device and seed.

    Returns:
        Every number that the harness reports, except standard errors.

    Raises:
        HoldfastError: see `check_measure`; or if the harness fails.
    """
    package, name = _package(), measure.removeprefix(HARNESS)
    local = _is_file(name)
    tasks = [_read(name) if local else name]
    with run.seeded("measure", measure), _own_randomness(), _quiet(), torch.no_grad():
        lm = harness_model(model.clone().to(run.device), tokenizer)
        try:
            found = package.simple_evaluate(
                lm, tasks=tasks, task_manager=_manager(defaults=not local), bootstrap_iters=0, log_samples=False,
                random_seed=run.seed, numpy_random_seed=run.seed, torch_random_seed=run.seed,
                fewshot_random_seed=run.seed,
            )["results"]  # fmt: skip
        except Exception as error:  # tasks may be anything, and may need a network
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise HoldfastError(f"The measure {measure!r} failed: {type(error).__name__}: {reason}.") from error
    return [
        HarnessScore(task, _metric(key), float(value) if math.isfinite(value) else None)
        for task, values in found.items()
        for key, value in values.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    ]


def harness_model(model: SplitModel, tokenizer: Tokenizer) -> Any:
    """Returns a model as an `lm_eval.api.model.LM`.

    Args:
        model: a causal language model; the harness keeps it, and puts it in evaluation mode.
        tokenizer: its own.

    Raises:
        HoldfastError: if it is not a causal language model, or lm_eval is not installed.
    """
    if not isinstance(model, CausalModel):
        raise HoldfastError(f"{model.name} is not a causal language model, which tasks of lm-evaluation-harness need.")
    _package()
    network: Any = model.network
    # The harness ties weights again; an attack may have given the model a head of its own.
    network.tie_weights = _leave
    fast = copy.deepcopy(tokenizer.fast)  # the harness may set its padding token
    return _harness_class()(model.eval(), pretrained=network, tokenizer=fast, batch_size=BATCH, max_length=_room(model))


def _room(model: CausalModel) -> int:
    """Tokens of a request; those of a prompt before it count as well."""
    return model.context - (0 if model.prefix is None else len(model.prefix))


def _leave(*_: Any, **__: Any) -> None:
    """Ties nothing."""


@lru_cache(maxsize=1)
def _harness_class() -> Any:
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):  # type: ignore[misc]
        """The harness's model of transformers, which answers as a `CausalModel`, after its prompt if it has one."""

        def __init__(self, split: CausalModel, **settings: Any) -> None:
            super().__init__(**settings)
            self.split = split

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            logits: Tensor = self.split(inps)
            return logits

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **more: Any) -> Tensor:
            prefix = self.split.prefix
            if prefix is None:
                plain: Tensor = super()._model_generate(context, max_length, stop, **more)
                return plain
            before = prefix.to(context).expand(len(context), -1)
            mask = more.pop("attention_mask")
            more["attention_mask"] = torch.cat([torch.ones_like(before, dtype=mask.dtype), mask], 1)
            written = super()._model_generate(
                torch.cat([before, context], 1), max_length + before.shape[1], stop, **more
            )
            after: Tensor = written[:, before.shape[1] :]
            return after

    return HarnessModel


def _package() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise HoldfastError(
            f'Measures {HARNESS}... need lm-evaluation-harness; pip install "holdfast[lm-eval]".'
        ) from error
    return lm_eval


@lru_cache(maxsize=2)
def _manager(defaults: bool = True) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _read(name: str) -> dict[str, Any]:
    """The settings of a task in a file, whose relative `data_files` become absolute.

    Tags such as !function, which would run code beside the file, are refused.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise HoldfastError(f"The measure {HARNESS}{name}: the file does not exist.")
    config: dict[str, Any] = read_yaml(path.read_text(encoding="utf-8"), f"The measure {HARNESS}{name}")
    if not isinstance(config, dict) or not isinstance(config.get("task"), str):
        raise HoldfastError(
            f"The measure {HARNESS}{name}: it has no `task`, the name of a task of lm-evaluation-harness."
        )
    given = (config.get("dataset_kwargs") or {}).get("data_files")
    if given is None:
        return config
    return {**config, "dataset_kwargs": {**config["dataset_kwargs"], "data_files": _beside(path.parent, given)}}


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {key: _beside(folder, each) for key, each in files.items()}
    if isinstance(files, list):
        return [_beside(folder, each) for each in files]
    return str((folder / files).resolve()) if "://" not in str(files) else files


def _metric(key: str) -> str:
    name, _, kind = key.partition(",")
    return name if kind in ("", "none") else f"{name}, {kind}"


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keeps the state of Python's and NumPy's global generators, which the harness seeds."""
    state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002


@contextmanager
def _quiet() -> Iterator[None]:
    """Shows neither the progress bars of the harness nor its warnings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)

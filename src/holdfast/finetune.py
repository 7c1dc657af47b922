"""The one fine-tuning loop: defenses simulate it, adversaries run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel
from holdfast.tasks import Task

Initialisation = Literal["direct", "head"]
Scope = Literal["all", "head"]
OptimizerFactory = Callable[[Iterable[nn.Parameter], float, float], torch.optim.Optimizer]


def _sgd(**fixed: Any) -> OptimizerFactory:
    return lambda params, lr, decay: torch.optim.SGD(params, lr=lr, weight_decay=decay, **fixed)


OPTIMIZERS: Final[dict[str, OptimizerFactory]] = {
    "sgd": _sgd(fused=True),
    "momentum": _sgd(momentum=0.9, fused=True),
    "nesterov": _sgd(momentum=0.9, nesterov=True, fused=True),
    "adagrad": lambda params, lr, decay: torch.optim.Adagrad(params, lr=lr, weight_decay=decay),
    "adadelta": lambda params, lr, decay: torch.optim.Adadelta(params, lr=lr, weight_decay=decay),
    "adam": lambda params, lr, decay: torch.optim.Adam(params, lr=lr, weight_decay=decay, fused=True),
    "adamw": lambda params, lr, decay: torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True),
}
"""Optimizers by name: (parameters, learning rate, weight decay) -> optimizer. Momentum is 0.9, as usual."""


@dataclass(frozen=True)
class Strategy:
    """How somebody fine-tunes: the phi of SOPHON, section 2.2.

    The paper's three are direct+all, initFC+all (`initialisation="head", scope="all"`) and initFC+FC (both "head").

    Attributes:
        initialisation: start from the whole model ("direct") or with a freshly initialised head ("head").
        scope: which parameters move: all, or the head alone. With the head alone the body stays in evaluation mode.
        optimizer: a name of `OPTIMIZERS`.
        learning_rate: constant, above 0.
        batch_size: samples a step; capped at the size of the training split.
        weight_decay: at least 0.

    Raises:
        HoldfastError: for an unknown name or a number out of range.
    """

    initialisation: Initialisation = "direct"
    scope: Scope = "all"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    batch_size: int = 50
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        for name, known in (("initialisation", ("direct", "head")), ("scope", ("all", "head"))):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if not self.learning_rate > 0:
            raise HoldfastError(f"learning_rate is {self.learning_rate}; expected a number above 0.")
        if self.batch_size < 1:
            raise HoldfastError(f"batch_size is {self.batch_size}; expected at least 1.")
        if not self.weight_decay >= 0:
            raise HoldfastError(f"weight_decay is {self.weight_decay}; expected at least 0.")


def not_applicable(strategy: Strategy, model: SplitModel, task: Task) -> str | None:
    """Says why a strategy cannot start on a model and a task, or None if it can."""
    if strategy.initialisation == "direct" and model.num_outputs < task.num_outputs:
        return f"it keeps the head, which has {model.num_outputs} outputs, and the task has {task.num_outputs} classes"
    return None


def prepare(model: SplitModel, strategy: Strategy, task: Task) -> list[nn.Parameter]:
    """Puts a model where a strategy starts from, in place.

    A fresh head has one output a class and is drawn from torch's global generator.

    Returns:
        The parameters that the strategy moves.

    Raises:
        HoldfastError: if the strategy is not applicable.
    """
    reason = not_applicable(strategy, model, task)
    if reason is not None:
        raise HoldfastError(f"{strategy} cannot be run on {task.name!r}: {reason}.")
    if strategy.initialisation == "head":
        model.reset_head(task.num_outputs)
    model.requires_grad_(strategy.scope == "all")
    model.head.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def finetune(
    model: SplitModel, task: Task, strategy: Strategy, *, generator: torch.Generator, device: torch.device
) -> Iterator[Tensor]:
    """Fine-tunes a model in place, endlessly: take as many steps as you want.

    Before every step the model is put in training mode (with a frozen body: the body in evaluation mode), so that the
    caller may score it in between.

    Args:
        model: already where the strategy starts from (see `prepare`).
        task: the data and the loss.
        strategy: optimizer, learning rate, batch size and scope.
        generator: draws the batches.
        device: where model and data are.

    Yields:
        The training loss of each step, a detached scalar, after the step.
    """
    optimizer = OPTIMIZERS[strategy.optimizer](
        [p for p in model.parameters() if p.requires_grad], strategy.learning_rate, strategy.weight_decay
    )
    for batch in task.batches("train", strategy.batch_size, generator=generator, device=device):
        model.train(strategy.scope == "all")
        loss = task.loss(model, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield loss.detach()

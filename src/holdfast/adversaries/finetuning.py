"""Fine-tuning as an adversary: a strategy, undo moves before it, and options during training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from holdfast import training
from holdfast.adversaries.base import KINDS, Adversary, keep_head
from holdfast.adversaries.undo import moves
from holdfast.adversaries.undo.moves import UNDO
from holdfast.adversaries.undo.thaw import bake
from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy


@KINDS.register("finetuning")
@dataclass(frozen=True)
class FineTuning(Adversary):
    """Fine-tuning with one strategy, optionally after moves that undo what a defense may have done.

    Attributes:
        strategy: initialisation, trained weights and optimizer.
        name: by default made from the settings, with the SOPHON paper's words for initialisation and scope.
        undo: moves of `UNDO` to make before training, in this order. With scope "all", "thaw" is always made.
        burn_in: number of first steps at ten times the learning rate.
        replay: weight of the loss on the benign task, through the head of the released model. Needs the benign task.

    Raises:
        HoldfastError: for an unknown move, or a number out of range.

    Example:
        >>> FineTuning(Strategy("head", "all", "adam", 1e-3)).name
        'initFC+all adam 0.001 b50'
        >>> FineTuning(Strategy("head"), undo=("equalise", "recalibrate"), burn_in=5, replay=0.5).name
        'initFC+all adam 0.001 b50, equalise, recalibrate, burn-in 5, replay 0.5'
    """

    strategy: Strategy
    name: str = field(default="")
    undo: tuple[str, ...] = ()
    burn_in: int = 0
    replay: float = 0.0

    def __post_init__(self) -> None:
        for move in self.undo:
            UNDO.lookup(move)
        if self.burn_in < 0:
            raise HoldfastError(f"burn_in is {self.burn_in}; expected at least 0.")
        if not 0 <= self.replay < float("inf"):
            raise HoldfastError(f"replay is {self.replay}; expected a weight of at least 0.")
        object.__setattr__(self, "name", self.name or self._default_name())

    def _default_name(self) -> str:
        s = self.strategy
        start = "initFC" if s.initialisation == "head" else s.initialisation
        scope = "FC" if s.scope == "head" else s.scope
        name = f"{start}+{scope} {s.optimizer} {s.learning_rate:g} b{s.batch_size}"
        name += f" wd{s.weight_decay:g}" if s.weight_decay else ""
        name += f" {s.gradient}" if s.gradient != "raw" else ""
        name += f" r{s.rank}" if s.rank != Strategy().rank else ""
        name += f" {s.precision}" if s.precision != "float32" else ""
        name += f" cosine{s.schedule_steps}" if s.schedule == "cosine" else ""
        name += f" warmup{s.warmup}" if s.warmup else ""
        options = [f"burn-in {self.burn_in}"] if self.burn_in else []
        options += [f"replay {self.replay:g}"] if self.replay else []
        return ", ".join([name, *self.undo, *options])

    @property
    def batch_size(self) -> int:  # type: ignore[override]
        """Samples per step."""
        return self.strategy.batch_size

    @property
    def trains_head_in_place(self) -> bool:
        """See `Adversary.trains_head_in_place`."""
        return self.strategy.initialisation == "direct"

    def not_applicable(self, model: SplitModel, task: Task) -> str | None:
        """See `Adversary.not_applicable`."""
        return training.not_applicable(self.strategy, model, task) or moves.not_applicable(self.undo, model, task)

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`."""
        with _named_errors(self.name, model):
            penalty = self._start(model, task, benign, generator, device)
        yield torch.zeros((), device=device)
        work = training.finetune(
            model, task, self.strategy, generator=generator, device=device, burn_in=self.burn_in, penalty=penalty
        )
        while True:
            with _named_errors(self.name, model):
                loss = next(work)
            yield loss

    def _start(
        self, model: SplitModel, task: Task, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Callable[[], Tensor] | None:
        """Makes the undo moves, initialises the model, and returns the loss on the benign task, if there is one."""
        renews = self.strategy.renews
        thaws = (self.undo or self.strategy.scope == "all") and "thaw" not in self.undo
        undo = [UNDO[name] for name in (*(("thaw",) if thaws else ()), *self.undo)]
        needs_fresh = self.strategy.needs_fresh_model
        reference = model.fresh() if needs_fresh or any(move.needs_reference for move in undo) else None
        if reference is not None:
            bake(reference)  # its layers are compared with those of a thawed model
        for move in undo:
            if move.of_features and renews and reference is not None:
                training.renew_blocks(model, self.strategy, reference)  # features are those of the new blocks
            move(model, model if reference is None else reference, task, generator, device)
        keep_head(model)
        penalty = None
        if self.replay:
            if benign is None:
                raise HoldfastError(f"{self.name} mixes in benign data; give the model's own task (`benign`).")
            penalty = _Replay(model, benign, self.strategy.batch_size, self.replay, generator, device)
        training.prepare(model, self.strategy, task, reference)
        for move in undo:
            move.finish(model)
        return penalty

    def config(self) -> dict[str, Any]:
        """See `Adversary.config`."""
        options = {"undo": list(self.undo), "burn_in": self.burn_in, "replay": self.replay}
        return {"kind": "finetuning", **self.strategy.settings(), **{k: v for k, v in options.items() if v}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the adversary that has this `config`.

        Raises:
            HoldfastError: for an unknown setting.
        """
        own = {k: config[k] for k in ("undo", "burn_in", "replay") if k in config}
        rest = {k: v for k, v in config.items() if k not in own and k != "kind"}
        known = Strategy.__dataclass_fields__
        for key in rest:
            if key not in known:
                raise unknown("setting of fine-tuning", key, [*known, "undo", "burn_in", "replay"])
        return cls(Strategy(**rest), **{**own, "undo": tuple(own.get("undo", ()))})


class _Replay:
    """The weighted loss on the benign task through a frozen copy of the head."""

    def __init__(
        self,
        model: SplitModel,
        benign: Task,
        size: int,
        weight: float,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self.model, self.benign, self.weight = model, benign, weight
        self.head = copy.deepcopy(model.head).requires_grad_(False)
        self.batches = benign.batches("train", size, generator=generator, device=device)

    def __call__(self) -> Tensor:
        own = self.model.head
        norms = [m for m in self.model.modules() if isinstance(m, torch.nn.modules.batchnorm._NormBase)]
        momenta = [m.momentum for m in norms]
        self.model.put_head(self.head)
        for norm in norms:  # running statistics must be those of the restricted task, which is scored
            norm.momentum = 0.0
        try:
            return self.weight * self.benign.loss(self.model, next(self.batches))
        finally:
            self.model.put_head(own)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


@contextmanager
def _named_errors(adversary: str, model: SplitModel) -> Iterator[None]:
    """Turns any exception of a user's network into a HoldfastError that names adversary and model."""
    try:
        yield
    except (HoldfastError, StopIteration):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HoldfastError(f"{adversary} cannot be run on {model.name}: {type(error).__name__}: {reason}") from error

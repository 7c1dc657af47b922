"""Fine-tuning as an adversary: a strategy, undo moves before it, and options during training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from holdfast import training
from holdfast.adversaries.augmentation import Augmentation, no_images
from holdfast.adversaries.base import KINDS, Adversary, keep_head
from holdfast.adversaries.benign_data import BenignTraining
from holdfast.adversaries.distillation import distil, start_anew
from holdfast.adversaries.undo import moves
from holdfast.adversaries.undo.moves import UNDO
from holdfast.adversaries.undo.thaw import bake
from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import Strategy

OPTIONS = ("undo", "burn_in", "replay", "anchor", "benign_first", "benign_floor", "distil_first", "augment")
"""Settings of `FineTuning` besides its strategy; in results only if they are not the default."""

BENIGN = ("replay", "anchor", "benign_first", "benign_floor", "distil_first")
"""Those of them that use benign data."""

OF_BODY = ("anchor", "benign_first", "benign_floor", "distil_first")
"""Those of them that train or watch the body."""


@KINDS.register("finetuning")
@dataclass(frozen=True)
class FineTuning(Adversary):
    """Fine-tuning with one strategy, optionally after moves that undo what a defense may have done.

    Attributes:
        strategy: initialisation, trained weights and optimizer.
        name: by default made from the settings, with the SOPHON paper's words for initialisation and scope.
        undo: moves of `UNDO` to make before training, in this order. With scope "all", "thaw" is always made.
        burn_in: number of first steps on the restricted task at ten times the learning rate.
        replay: weight of the loss on the benign task, through the head of the released model.
        anchor: weight of the distance between the outputs of the model under attack, through the same head, and those
            of the model as received, on benign inputs; see `Task.distance`, for classes the KL divergence. It keeps the
            model from collapsing.
        benign_first: number of steps on the benign task alone, through the same head, before the restricted task. The
            adversary pays for them: they count as steps of the budget, and at these budgets nothing of the restricted
            task is learned yet. The optimizer then starts anew; schedule and burn-in count from there.

        benign_floor: share of the benign score that must be kept. A step after which the model, through the same head,
            has less of the score that it had at first (on some benign training samples) is taken back, and the rate is
            halved; after six such steps the attack stops. So it stops where the model would collapse.
        distil_first: number of first steps in which a fresh network of the same architecture learns to give the
            features of the released one, on benign and on restricted inputs, without labels; it takes its place in the
            attack. The steps count as those of `benign_first` do, which come after them.
        augment: settings of timm's RandAugment for restricted images, such as "rand-m9-n2"; empty: none.

    All from `replay` to `distil_first` need the benign task. Those that are about the body are refused with scope
    "head", which leaves it as it is: `anchor`, `benign_first`, `benign_floor` and `distil_first`.

    Raises:
        HoldfastError: for an unknown move, a number out of range, or an option that has no effect.

    Example:
        >>> FineTuning(Strategy("head", "all", "adam", 1e-3)).name
        'initFC+all adam 0.001 b50'
        >>> FineTuning(Strategy("head"), undo=("equalise", "recalibrate"), burn_in=5, replay=0.5).name
        'initFC+all adam 0.001 b50, equalise, recalibrate, burn-in 5, replay 0.5'
        >>> FineTuning(Strategy("head", schedule="cosine", schedule_steps=90), anchor=1.0, benign_first=10).name
        'initFC+all adam 0.001 b50 cosine90, anchor 1, benign-first 10'
        >>> FineTuning(Strategy("head"), benign_floor=0.9, distil_first=20, augment="rand-m9-n2").name
        'initFC+all adam 0.001 b50, benign-floor 0.9, distil-first 20, rand-m9-n2'
    """

    strategy: Strategy
    name: str = field(default="")
    undo: tuple[str, ...] = ()
    burn_in: int = 0
    replay: float = 0.0
    anchor: float = 0.0
    benign_first: int = 0
    benign_floor: float = 0.0
    distil_first: int = 0
    augment: str = ""

    def __post_init__(self) -> None:
        for move in self.undo:
            UNDO.lookup(move)
        for name in ("burn_in", "benign_first", "distil_first"):
            if getattr(self, name) < 0:
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected at least 0.")
        for name in ("replay", "anchor"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected a weight of at least 0.")
        if not 0 <= self.benign_floor <= 1:
            raise HoldfastError(f"benign_floor is {self.benign_floor}; expected a share from 0 to 1.")
        for name in OF_BODY if self.strategy.scope == "head" else ():
            if getattr(self, name):
                raise HoldfastError(f"{name} trains the body, and scope 'head' leaves it as it is; choose another one.")
        if self.augment:
            Augmentation(self.augment, torch.Generator())  # refuses what timm does not understand
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
        name += f" {s.schedule}{s.schedule_steps}" if s.schedule != "constant" else ""
        name += f" warmup{s.warmup}" if s.warmup else ""
        name += f" in parts of {s.micro_batch}" if s.micro_batch else ""
        name += f" sam{s.sharpness:g}" if s.sharpness else ""
        options = [f"burn-in {self.burn_in}"] if self.burn_in else []
        options += [f"replay {self.replay:g}"] if self.replay else []
        options += [f"anchor {self.anchor:g}"] if self.anchor else []
        options += [f"benign-first {self.benign_first}"] if self.benign_first else []
        options += [f"benign-floor {self.benign_floor:g}"] if self.benign_floor else []
        options += [f"distil-first {self.distil_first}"] if self.distil_first else []
        options += [self.augment] if self.augment else []
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
        reason = training.not_applicable(self.strategy, model, task) or moves.not_applicable(self.undo, model, task)
        if reason is None and self.augment:
            reason = no_images(task)
        if reason is None and self.distil_first and (cause := model.not_renewable()) is not None:
            reason = f"a fresh network should learn its features, and {cause}"
        return reason

    def run(
        self, model: SplitModel, task: Task, *, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> Iterator[Tensor]:
        """See `Adversary.run`."""
        with named_errors(self.name, model):
            if benign is None and any(getattr(self, option) for option in BENIGN):
                raise HoldfastError(f"{self.name} uses benign data; give the model's own task (`benign`).")
            beside, teacher = self.start(model, task, benign, generator, device)
        yield torch.zeros((), device=device)
        if teacher is not None and benign is not None:
            size = self.strategy.batch_size
            first = distil(model, teacher, (benign, task), batch_size=size, generator=generator, device=device)
            yield from self.caught(islice(first, self.distil_first), model)
        if beside is not None and self.benign_first:
            yield from self.caught(beside.first(self.benign_first), model)
        change = Augmentation(self.augment, generator) if self.augment else None
        penalty = beside.penalty if beside is not None and (self.replay or self.anchor) else None

        def train(optimizer: Optimizer | None, factor: Callable[[], float] | None) -> Iterator[Tensor]:
            return training.finetune(
                model, task, self.strategy, generator=generator, device=device, burn_in=self.burn_in, penalty=penalty,
                optimizer=optimizer, factor=factor, change=change,
            )  # fmt: skip

        held = beside is not None and self.benign_floor
        work = beside.hold(self.benign_floor, train) if beside is not None and held else train(None, None)
        yield from self.caught(work, model)

    def caught(self, work: Iterator[Tensor], model: SplitModel) -> Iterator[Tensor]:
        """Yields what some training yields; errors in it name this adversary and the model."""
        while True:
            with named_errors(self.name, model):
                loss = next(work, None)
            if loss is None:
                return
            yield loss

    def start(
        self, model: SplitModel, task: Task, benign: Task | None, generator: torch.Generator, device: torch.device
    ) -> tuple[BenignTraining | None, SplitModel | None]:
        """Makes the undo moves and initialises the model, in place.

        Returns:
            The training on benign data, and the teacher of a distillation; None for what this attack does not have.
        """
        released = model.clone().eval().requires_grad_(False) if self.anchor else None
        teacher = start_anew(model) if self.distil_first else None
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
        beside = None
        if benign is not None and any(getattr(self, option) for option in BENIGN):
            beside = BenignTraining(
                model, released, benign, self.strategy, replay=self.replay, anchor=self.anchor, generator=generator,
                device=device,
            )  # fmt: skip
        training.prepare(model, self.strategy, task, reference)
        for move in undo:
            move.finish(model)
        return beside, teacher

    def config(self) -> dict[str, Any]:
        """See `Adversary.config`."""
        options = {name: getattr(self, name) for name in OPTIONS} | {"undo": list(self.undo)}
        return {"kind": "finetuning", **self.strategy.settings(), **{k: v for k, v in options.items() if v}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Returns the adversary that has this `config`.

        Raises:
            HoldfastError: for an unknown setting.
        """
        own = {k: config[k] for k in OPTIONS if k in config}
        rest = {k: v for k, v in config.items() if k not in own and k != "kind"}
        known = Strategy.__dataclass_fields__
        for key in rest:
            if key not in known:
                raise unknown("setting of fine-tuning", key, [*known, *OPTIONS])
        return cls(Strategy(**rest), **{**own, "undo": tuple(own.get("undo", ()))})


@contextmanager
def named_errors(adversary: str, model: SplitModel) -> Iterator[None]:
    """Turns any exception of a user's network into a HoldfastError that names adversary and model."""
    try:
        yield
    except (HoldfastError, StopIteration):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise HoldfastError(f"{adversary} cannot be run on {model.name}: {type(error).__name__}: {reason}") from error

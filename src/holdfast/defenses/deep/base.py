"""What defenses share that train the last blocks of a network by a term on its features: Eq. 11 for deep networks.

    min over theta, omega:  L(omega, theta; D_P) + sum_i lambda_i R_i(Z_P(theta), Z_H(theta), Y_H)

theta are the weights of the last blocks of the body, omega those of the head, Z the features that the head receives,
and R_i what a defense says. The blocks before are frozen, and what they answer is computed once (`holdfast.models.
prefix`). The network is in evaluation mode throughout: the features that are regularized are those that a probe gets,
BatchNorm's statistics stay the original's, and nothing is dropped out.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from holdfast.defenses.base import Record
from holdfast.defenses.deep.frozen_prefix import FrozenPrefix, Trained
from holdfast.defenses.trainer import GuardedDefense, Immunization
from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel, check_feature_width, check_fits
from holdfast.results import Event
from holdfast.runtime.devices import autocast
from holdfast.runtime.distributed import process_group
from holdfast.runtime.run import Run
from holdfast.tasks import Batch, Task
from holdfast.training import OPTIMIZERS, Precision

BALANCED_ON = 8
"""Batches whose gradients' norms are averaged to balance the terms."""
_STATISTICS = 2000
"""Benign samples by which the scale of each feature is measured."""


class Seen(NamedTuple):
    """What a term is computed from: a batch of each task.

    Attributes:
        benign: features, shape (N, D), in the network's precision.
        restricted: likewise, shape (M, D).
        labels: of the restricted samples, shape (M,).
    """

    benign: Tensor
    restricted: Tensor
    labels: Tensor


@dataclass
class DeepDefense(GuardedDefense):
    """A defense that trains the last blocks of a network and its head, and freezes the rest.

    A round is one step on a batch of each task. Each task's samples come in epochs, so that the longer one dictates how
    long an epoch is and the shorter one is cycled through, as the paper pairs them.

    Attributes:
        iterations: steps.
        epochs: replaces `iterations`: passes over the shorter of both sets, as the paper counts them (ResNet-18: 3,
            ViT: 2). The record says how many steps that was.
        blocks: how many of the last blocks of the body are trained (see `SplitModel.blocks`; the paper: the last two
            of a ResNet-18, the last one of a ViT). The head is trained as well.
        batch_size: benign samples a step.
        restricted_batch: restricted samples a step; None: as many.
        optimizer: a name of `holdfast.training.OPTIMIZERS`; the paper's is "nesterov".
        learning_rate: at the start.
        schedule: "cosine": it falls to 0 along a cosine; "constant".
        head_weight_decay: of the head alone; the body has none (the paper's numbers).
        label_smoothing: of the benign cross-entropy.
        distillation: weight of the distance of the benign outputs from the original's; 0: none.
        temperature: of distillation.
        matching: weight of the squared distance of the benign features from the original's, each feature in units of
            its standard deviation, averaged over features; 0: none.
        mixing: weight of the same distance on mixtures of pairs of benign samples, which holds the features in more
            places than the samples themselves do; 0: none. What is mixed is what enters the first block that is
            trained, or inputs where that cannot be had. Token ids have no mixtures. None: 1, or 0 for token ids.
        benign_loss: whether the body is trained by the benign loss; without it, only the head is.
        precision: of forward and backward passes; see `Strategy.precision`. Terms are always computed in float64.
        cache_gib: keep what the frozen blocks answer if it takes at most so much memory; 0: never.
        guard: watch for non-finite values, after which it goes back and halves the rate, and for the benign score. A
            low score on the way is no reason to go back, because the loss repairs it; but only a good state is
            returned.
    """

    iterations: int = 400
    epochs: float | None = None
    blocks: int = 1
    batch_size: int = 64
    restricted_batch: int | None = None
    optimizer: str = "nesterov"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    head_weight_decay: float = 2e-5
    label_smoothing: float = 0.1
    distillation: float = 0.0
    temperature: float = 2.0
    matching: float = 0.0
    mixing: float | None = 0.0
    benign_loss: bool = True
    precision: Precision = "float32"
    cache_gib: float = 4.0
    guard_every: int = 50
    max_benign_drop: float = 0.02

    terms: ClassVar[tuple[str, ...]]
    """Names of the regularizers."""
    classes: ClassVar[bool] = False
    """Whether the restricted task must be a classification."""
    spectral: ClassVar[bool] = False
    """Whether it looks at the smallest singular values of features, which bfloat16 has only as rounding."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in ("cosine", "constant"):
            raise unknown("schedule", self.schedule, ("cosine", "constant"))
        if self.precision not in get_args(Precision):
            raise unknown("precision", self.precision, get_args(Precision))
        if self.spectral and self.precision != "float32":
            raise HoldfastError(
                f"{self.name}: precision is {self.precision}; the smallest singular values of features in it are its "
                "rounding. Set precision to float32."
            )
        self.refuse_below_one("blocks", "batch_size")
        if self.restricted_batch is not None and self.restricted_batch < 2:
            raise HoldfastError(f"{self.name}: restricted_batch is {self.restricted_batch}; expected at least 2.")
        self.refuse_not_above_zero("learning_rate", "temperature", "epochs")
        self.refuse_negative("head_weight_decay", "distillation", "matching", "mixing", "cache_gib")
        if not 0 <= self.label_smoothing < 1:
            raise HoldfastError(
                f"{self.name}: label_smoothing is {self.label_smoothing}; expected a share of at least 0 and below 1."
            )

    def refuse_negative(self, *names: str) -> None:
        """Refuses fields that are no finite numbers of at least 0; None is let through."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise HoldfastError(f"{self.name}: {name} is {value}; expected a number of at least 0.")

    @abstractmethod
    def regularizers(self, seen: Seen) -> dict[str, Tensor]:
        """Returns the value of each of the `terms`, a scalar with its graph; smaller is what the defender wants."""

    @abstractmethod
    def weights(self) -> dict[str, tuple[float | None, float]]:
        """Returns for each of the `terms` its weight, or None and a multiple.

        None: the term is balanced, so that at the start its gradient by the body has the norm of the benign loss's,
        times the multiple (appendix C.2 of the paper).
        """

    def immunize(self, model: SplitModel, benign: Task, restricted: Task, *, run: Run) -> tuple[SplitModel, Record]:
        """Trains the last blocks of a copy of the model; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` steps and a second call continues from there, to
        the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, or the folder holds the state of another immunization.
        """
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        if self.mixing and _of_token_ids(benign):
            raise HoldfastError(
                f"{self.name}: mixing is {self.mixing}, and the inputs of {benign.name!r} are token ids, of which "
                "there are no mixtures; set mixing to 0."
            )
        for task in (benign, restricted):
            check_feature_width(model, task)
        if self.classes and not restricted.labels_are_classes:
            raise HoldfastError(
                f"{self.name}: it simulates a probe that tells classes apart, and {restricted.described} has none; "
                "give it a task of classification."
            )
        count = len(model.blocks())
        if count < self.blocks:
            raise HoldfastError(
                f"{self.name}: blocks is {self.blocks} and the body of {model.name} has {count}; expected at most that."
            )
        settled = self.resolved(benign).counted(benign, restricted)
        immunized, record = _Immunization(settled, model, benign, restricted, run).finish()
        if self.epochs is not None:
            message = f"{self.epochs:g} epochs of the shorter set are {settled.iterations} steps"
            record.events.insert(0, Event(iteration=0, message=message))
        return immunized, record

    def resolved(self, benign: Task) -> DeepDefense:
        """See `Defense.resolved`."""
        return replace(self, mixing=0.0 if _of_token_ids(benign) else 1.0) if self.mixing is None else self

    def counted(self, benign: Task, restricted: Task) -> DeepDefense:
        """Returns itself with `iterations` instead of `epochs`."""
        if self.epochs is None:
            return self
        sizes = {
            round((1 - self.holdout) * benign.size("train")): self.batch_size,
            restricted.size("train"): self.restricted_batch or self.batch_size,
        }
        shorter = min(sizes)
        steps = math.ceil(self.epochs * max(1, shorter // min(sizes[shorter], shorter)))
        return replace(self, epochs=None, iterations=steps)


class _Immunization(Immunization[DeepDefense]):
    """One run; a round is a step."""

    rate_name = "learning_rate"

    def __init__(self, config: DeepDefense, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        self.title = config.name
        self.series = ("benign_loss", *config.terms)
        self.shown = self.series
        self.lambdas: dict[str, float] = {}
        self.free = {n: p.requires_grad for n, p in model.network.named_parameters()}
        self.original = model.clone().to(run.device).eval()
        super().__init__(config, model, benign, restricted, run, rate=config.learning_rate)
        self.model.eval()

    def finish(self) -> tuple[SplitModel, Record]:
        """See `Immunization.finish`; parameters are as free as they were."""
        self._check_head_alone()
        model, record = super().finish()
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(self.free[name])
        return model, record

    # What is trained, and what is kept of the rest.

    @cached_property
    def entrance(self) -> FrozenPrefix:
        """Where training begins."""
        tasks = Trained(self.benign, self.held_out, self.restricted)
        return FrozenPrefix(self.original, self.config.blocks, tasks, self.config.cache_gib, self.say)

    def score_held_out(self) -> float:
        """See `Immunization.score_held_out`."""
        return self.entrance.score_held_out(self.model)

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `Immunization.make_optimizers`; the head alone has weight decay."""
        body, head = self.body(), [p for p in self.model.head.parameters() if p.requires_grad]
        trained = {id(p) for p in (*body, *head)}
        for parameter in self.model.network.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if not body:
            raise HoldfastError(
                f"{self.config.name}: the last {self.config.blocks} blocks of {self.model.name} have no parameter that "
                "may be trained; un-freeze some (requires_grad_), or raise blocks."
            )
        groups: list[Any] = [{"params": body, "weight_decay": 0.0}]
        if head:
            groups.append({"params": head, "weight_decay": self.config.head_weight_decay})
        return {"optimizer": OPTIMIZERS[self.config.optimizer](groups, self.rate, 0.0)}

    def body(self) -> list[nn.Parameter]:
        """Returns the parameters of the last blocks that the model's owner left free."""
        blocks = self.model.blocks()[-self.config.blocks :]
        names = {f"{name}.{own}" for block in blocks for name, m in block for own, _ in m.named_parameters()}
        return [p for n, p in self.model.network.named_parameters() if n in names and self.free[n]]

    # A step.

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """A step on the next batch of each task."""
        if not self.lambdas:
            self.lambdas = process_group().broadcast_object(self._balance())
        optimizer = self.optimizers["optimizer"]
        for group in optimizer.param_groups:
            group["lr"] = self.rate * self._share()
        benign, restricted = map(self.entrance.enter, next(self.pairs))
        self.model.eval()
        outputs = self._outputs(benign)
        losses = self._losses(benign, restricted, *outputs)
        total = sum((self.lambdas[n] * v for n, v in losses.items() if n in self.lambdas), losses["benign_loss"])
        total = total + self._held(benign, *outputs, generator)
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.pool_gradients()
        optimizer.step()
        return {name: [float(value.detach())] for name, value in losses.items()}

    def _share(self) -> float:
        """Of the learning rate, at this round."""
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * self.round / self.config.iterations))

    @cached_property
    def pairs(self) -> Iterator[tuple[Batch, Batch]]:
        """The batches from here on; made anew, they go on where they were."""
        return itertools.islice(self._pairs("batches"), self.round, None)

    def _pairs(self, purpose: str) -> Iterator[tuple[Batch, Batch]]:
        config, (benign, _, restricted) = self.config, self.entrance.tasks
        sizes = {"benign": config.batch_size, "restricted": config.restricted_batch or config.batch_size}
        streams = [
            task.batches(
                "train",
                size,
                generator=self.run.generator(*process_group().own(config.name, purpose, role)),
                device=self.run.device,
            )
            for (role, size), task in zip(sizes.items(), (benign, restricted), strict=True)
        ]
        return zip(*streams, strict=False)

    def _outputs(self, benign: Batch) -> tuple[Tensor, Tensor]:
        """Logits and features of a benign batch."""
        with autocast(self.run.device, self.config.precision == "bf16"):
            return self.entrance.runner(self.model).with_features(benign.x)

    def _losses(self, benign: Batch, restricted: Batch, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """The benign loss and each term, with their graphs."""
        config = self.config
        with autocast(self.run.device, config.precision == "bf16"):
            _, theirs = self.entrance.runner(self.model).with_features(restricted.x)
            if not config.benign_loss:
                logits = self._head_alone(features)
        loss = self._benign_loss(logits.to(self.model.dtype), benign)
        finite = bool(features.isfinite().all()) and bool(theirs.isfinite().all())
        if not finite:  # for the guard to see, and not for a decomposition to stumble over
            return {"benign_loss": loss, **dict.fromkeys(config.terms, theirs.sum() * math.nan)}
        return {"benign_loss": loss, **config.regularizers(Seen(features, theirs, restricted.y))}

    def _head_alone(self, features: Tensor) -> Tensor:
        head = self.model.head
        inputs = features.detach() if isinstance(head, nn.Linear) else features.detach()[..., None, None]
        outputs: Tensor = head(inputs.to(head.weight.dtype))
        return outputs.flatten(1)

    def _check_head_alone(self) -> None:
        """Refuses to train the head by its own outputs where they are not the logits."""
        if self.config.benign_loss:
            return
        batch = self.entrance.enter(next(iter(self.entrance.tasks.benign.sweep("train", 4, device=self.run.device))))
        with torch.no_grad():
            logits, features = self.entrance.runner(self.model).with_features(batch.x)
            if not torch.allclose(self._head_alone(features).to(logits), logits, rtol=1e-3, atol=1e-5):
                raise HoldfastError(
                    f"{self.config.name}: what {self.model.name} makes of its head's outputs is not the outputs "
                    "themselves, so that the head cannot be trained alone; set benign_loss to true."
                )

    def _benign_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.benign.smoothed_loss_of(logits, batch, self.config.label_smoothing)

    # Holding what the model does.

    def _held(self, benign: Batch, logits: Tensor, features: Tensor, generator: torch.Generator) -> Tensor | float:
        """How far benign outputs and features are from the original's."""
        config = self.config
        total: Tensor | float = 0.0
        ours, theirs = self.entrance.runner(self.model), self.entrance.runner(self.original)
        if config.distillation or config.matching:
            with autocast(self.run.device, config.precision == "bf16"), torch.no_grad():
                wanted, kept = theirs.with_features(benign.x)
            if config.distillation:
                total = total + config.distillation * self._distance(logits.float(), wanted.float())
            total = total + config.matching * self._apart(features, kept)
        if config.mixing:
            share = torch.rand(len(benign.x), *[1] * (benign.x.dim() - 1), generator=generator).to(benign.x)
            other = benign.x[torch.randperm(len(benign.x), generator=generator).to(benign.x.device)]
            mixed = share * benign.x + (1 - share) * other
            with autocast(self.run.device, config.precision == "bf16"):
                features = ours.with_features(mixed)[1]
                with torch.no_grad():
                    kept = theirs.with_features(mixed)[1]
            total = total + config.mixing * self._apart(features, kept)
        return total

    def _distance(self, outputs: Tensor, wanted: Tensor) -> Tensor:
        return self.benign.distance(outputs, wanted, self.config.temperature)

    def _apart(self, features: Tensor, wanted: Tensor) -> Tensor:
        return ((features.float() - wanted.float()) / self.spread).square().mean()

    @cached_property
    def spread(self) -> Tensor:
        """Standard deviation of each of the original's features on benign samples; of dead ones, the mean of all."""
        run, found, seen = self.entrance.runner(self.original), [], 0
        with torch.no_grad():
            for batch in self.entrance.tasks.benign.sweep("train", 250, device=self.run.device):
                found.append(run.with_features(self.entrance.enter(batch).x)[1].float())
                seen += len(batch.x)
                if seen >= _STATISTICS:
                    break
        deviation = torch.cat(found).std(0)
        mean = deviation.mean().clamp_min(torch.finfo(deviation.dtype).tiny)
        return torch.where(deviation > 1e-3 * mean, deviation, mean)

    # Weights of the terms.

    def _balance(self) -> dict[str, float]:
        """The weight of each term; see `DeepDefense.weights`."""
        weights = self.config.weights()
        if all(given is not None for given, _ in weights.values()):
            return {name: float(given or 0.0) for name, (given, _) in weights.items()}
        self.model.eval()
        norms: dict[str, list[float]] = {}
        for pair in itertools.islice(self._pairs("balance"), BALANCED_ON):
            benign, restricted = map(self.entrance.enter, pair)
            logits, features = self._outputs(benign)
            losses = self._losses(benign, restricted, logits, features)
            losses["benign_loss"] = self._benign_loss(logits.to(self.model.dtype), benign)
            for name, value in losses.items():
                norms.setdefault(name, []).append(_norm(value, self.body()))
        sizes = {name: _mean_of_finite(values) for name, values in norms.items()}
        found = {}
        for name, (given, multiple) in weights.items():
            for other in (name, "benign_loss") if given is None else ():
                if not sizes[other] > 0:
                    raise HoldfastError(
                        f"{self.config.name}: the gradient of {other} by the last {self.config.blocks} blocks has norm "
                        f"{sizes[other]:g} at the start, so that {name} cannot be balanced; give its lambda."
                    )
            found[name] = multiple * sizes["benign_loss"] / sizes[name] if given is None else given
        told = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        self.say(f"weights by gradient norms: {told}")
        return found

    # The guard, and a state to continue from.

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `Immunization.saved`."""
        return {}, {"lambdas": self.lambdas}

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """See `Immunization.restore_own`."""
        self.lambdas = dict(values["lambdas"])

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`: only what is released must be good."""
        if self.last:
            self.restore_good()
            self.say(f"{why}: the last good state is the result")
            self.record.completed = self.changed
        return self.last


def _of_token_ids(task: Task) -> bool:
    return not next(task.sweep("train", 1, device=torch.device("cpu"))).x.is_floating_point()


def _norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """Norm of a gradient; parameters that the value does not depend on add nothing."""
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return math.hypot(*(float(g.norm()) for g in found if g is not None))


def _mean_of_finite(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan

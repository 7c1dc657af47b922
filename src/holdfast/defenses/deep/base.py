"""Defenses that train the last blocks of a network by a term on its features: Eq. 11 of the paper for deep networks.

    min over theta, omega:  L(omega, theta; D_P) + sum_i lambda_i R_i(Z_P(theta), Z_H(theta), Y_H)

theta are the weights of the last blocks of the body, omega those of the head, Z the features that the head receives,
and R_i the terms of a defense. The earlier blocks are frozen, and their outputs are computed once
(`holdfast.models.activation_cache`). The network is always in evaluation mode: features are those that a probe
receives, BatchNorm keeps the original's statistics, and dropout is off.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.deep.frozen_prefix import FrozenPrefix, Trained
from holdfast.defenses.deep.preservation import Preservation
from holdfast.defenses.deep.settings import DeepSettings, FeatureBatch
from holdfast.defenses.trainer import Immunization
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, check_feature_width, check_fits
from holdfast.results import Event
from holdfast.runtime.devices import autocast
from holdfast.runtime.distributed import process_group
from holdfast.runtime.run import Run
from holdfast.tasks import Batch, Task
from holdfast.training import OPTIMIZERS

BALANCED_ON = 8
"""Number of batches over which gradient norms are averaged to balance the terms."""


@dataclass
class DeepDefense(DeepSettings):
    """A defense that trains the last blocks of a network and its head, and freezes the rest; see `DeepSettings`."""

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Trains the last blocks of a copy of the model; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` steps. A second call continues from there and
        gives the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, or the folder holds the state of another immunization.
        """
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        if self.mixing and _of_token_ids(benign):
            raise HoldfastError(
                f"{self.name}: mixing is {self.mixing}, but the inputs of {benign.name!r} are token ids, which cannot "
                "be mixed; set mixing to 0."
            )
        for task in (benign, restricted):
            check_feature_width(model, task)
        if self.classes and not restricted.labels_are_classes:
            raise HoldfastError(
                f"{self.name} simulates a probe for classes, and {restricted.described} has none; use a "
                "classification task."
            )
        count = len(model.blocks())
        if count < self.blocks:
            raise HoldfastError(
                f"{self.name}: blocks is {self.blocks} and the body of {model.name} has {count}; expected at most that."
            )
        config = self.resolved(benign).with_steps(benign, restricted)
        immunized, record = _Immunization(config, model, benign, restricted, run).finish()
        if self.epochs is not None:
            message = f"{self.epochs:g} epochs of the shorter set are {config.iterations} steps"
            record.events.insert(0, Event(iteration=0, message=message))
        return immunized, record

    def resolved(self, benign: Task) -> DeepDefense:
        """See `Defense.resolved`."""
        return replace(self, mixing=0.0 if _of_token_ids(benign) else 1.0) if self.mixing is None else self

    def with_steps(self, benign: Task, restricted: Task) -> DeepDefense:
        """Returns the defense with `iterations` instead of `epochs`."""
        if self.epochs is None:
            return self
        sizes = {
            round((1 - self.holdout) * benign.size("train")): self.batch_size,
            restricted.size("train"): self.restricted_batch or self.batch_size,
        }
        shorter = min(sizes)
        steps = math.ceil(self.epochs * max(1, shorter // min(sizes[shorter], shorter)))
        return replace(self, epochs=None, iterations=steps)


class _Immunization(Immunization[DeepSettings]):
    """One run; a round is a step."""

    rate_name = "learning_rate"

    def __init__(self, config: DeepSettings, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        self.title = config.name
        self.series = ("benign_loss", *config.terms)
        self.shown = self.series
        self.lambdas: dict[str, float] = {}
        self.trainable = {n: p.requires_grad for n, p in model.network.named_parameters()}
        self.original = model.clone().to(run.device).eval()
        super().__init__(config, model, benign, restricted, run, rate=config.learning_rate)
        self.model.eval()

    def finish(self) -> tuple[SplitModel, DefenseRecord]:
        """See `Immunization.finish`; parameters require gradients as before."""
        self._check_head_alone()
        model, record = super().finish()
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(self.trainable[name])
        return model, record

    @cached_property
    def preservation(self) -> Preservation:
        """The distance of benign outputs and features from the original's."""
        return Preservation(self.config, self.config.precision, self.original, self.frozen, self.benign)

    @cached_property
    def frozen(self) -> FrozenPrefix:
        """The frozen blocks, and the tasks as the trained blocks receive them."""
        tasks = Trained(self.benign, self.held_out, self.restricted)
        return FrozenPrefix(self.original, self.config.blocks, tasks, self.config.cache_gib, self.say)

    def score_held_out(self) -> float:
        return self.frozen.score_held_out(self.model)

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `Immunization.make_optimizers`; only the head has weight decay."""
        body, head = self.body(), [p for p in self.model.head.parameters() if p.requires_grad]
        trained = {id(p) for p in (*body, *head)}
        for parameter in self.model.network.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        if not body:
            raise HoldfastError(
                f"{self.config.name}: all parameters in the last {self.config.blocks} blocks of {self.model.name} are "
                "frozen; unfreeze some (requires_grad_), or raise blocks."
            )
        groups: list[Any] = [{"params": body, "weight_decay": 0.0}]
        if head:
            groups.append({"params": head, "weight_decay": self.config.head_weight_decay})
        return {"optimizer": OPTIMIZERS[self.config.optimizer](groups, self.rate, 0.0)}

    def body(self) -> list[nn.Parameter]:
        """Returns the parameters of the last blocks that the given model did not freeze."""
        blocks = self.model.blocks()[-self.config.blocks :]
        names = {f"{name}.{own}" for block in blocks for name, m in block for own, _ in m.named_parameters()}
        return [p for n, p in self.model.network.named_parameters() if n in names and self.trainable[n]]

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """A step on the next batch of each task."""
        if not self.lambdas:
            self.lambdas = process_group().broadcast_object(self._balance())
        optimizer = self.optimizers["optimizer"]
        cosine = 0.5 * (1 + math.cos(math.pi * self.round / self.config.iterations))
        for group in optimizer.param_groups:
            group["lr"] = self.rate * (1.0 if self.config.schedule == "constant" else cosine)
        benign, restricted = map(self.frozen.enter, next(self.pairs))
        self.model.eval()
        outputs = self._outputs(benign)
        losses = self._losses(benign, restricted, *outputs)
        total = sum((self.lambdas[n] * v for n, v in losses.items() if n in self.lambdas), losses["benign_loss"])
        total = total + self.preservation.penalty(self.model, benign, *outputs, generator)
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        self.average_gradients()
        optimizer.step()
        return {name: [float(value.detach())] for name, value in losses.items()}

    @cached_property
    def pairs(self) -> Iterator[tuple[Batch, Batch]]:
        """The batches from this round on; a resumed run continues with the next ones."""
        return itertools.islice(self._pairs("batches"), self.round, None)

    def _pairs(self, purpose: str) -> Iterator[tuple[Batch, Batch]]:
        config, (benign, _, restricted) = self.config, self.frozen.tasks
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
            return self.frozen.runner(self.model).with_features(benign.x)

    def _losses(self, benign: Batch, restricted: Batch, logits: Tensor, features: Tensor) -> dict[str, Tensor]:
        """The benign loss and each term, with their graphs."""
        config = self.config
        with autocast(self.run.device, config.precision == "bf16"):
            _, restricted_features = self.frozen.runner(self.model).with_features(restricted.x)
            if not config.benign_loss:
                logits = self._head_alone(features)
        loss = self._benign_loss(logits.to(self.model.dtype), benign)
        finite = bool(features.isfinite().all()) and bool(restricted_features.isfinite().all())
        if not finite:  # nan for the guard to notice; a decomposition would raise an error
            return {"benign_loss": loss, **dict.fromkeys(config.terms, restricted_features.sum() * math.nan)}
        return {"benign_loss": loss, **config.regularizers(FeatureBatch(features, restricted_features, restricted.y))}

    def _head_alone(self, features: Tensor) -> Tensor:
        head = self.model.head
        inputs = features.detach() if isinstance(head, nn.Linear) else features.detach()[..., None, None]
        outputs: Tensor = head(inputs.to(head.weight.dtype))
        return outputs.flatten(1)

    def _check_head_alone(self) -> None:
        """Refuses to train the head alone if its outputs are not the logits."""
        if self.config.benign_loss:
            return
        batch = self.frozen.enter(next(iter(self.frozen.tasks.benign.sweep("train", 4, device=self.run.device))))
        with torch.no_grad():
            logits, features = self.frozen.runner(self.model).with_features(batch.x)
            if not torch.allclose(self._head_alone(features).to(logits), logits, rtol=1e-3, atol=1e-5):
                raise HoldfastError(
                    f"{self.config.name}: {self.model.name} changes its head's outputs before it returns them, so "
                    "the head cannot be trained alone; set benign_loss to true."
                )

    def _benign_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        return self.benign.smoothed_loss_of(logits, batch, self.config.label_smoothing)

    def _balance(self) -> dict[str, float]:
        """The weight of each term; see `DeepSettings.weights`."""
        weights = self.config.weights()
        if all(given is not None for given, _ in weights.values()):
            return {name: float(given or 0.0) for name, (given, _) in weights.items()}
        self.model.eval()
        norms: dict[str, list[float]] = {}
        for pair in itertools.islice(self._pairs("balance"), BALANCED_ON):
            benign, restricted = map(self.frozen.enter, pair)
            logits, features = self._outputs(benign)
            losses = self._losses(benign, restricted, logits, features)
            losses["benign_loss"] = self._benign_loss(logits.to(self.model.dtype), benign)
            for name, value in losses.items():
                norms.setdefault(name, []).append(_norm(value, self.body()))
        finite = {name: [norm for norm in values if math.isfinite(norm)] for name, values in norms.items()}
        sizes = {name: sum(values) / len(values) if values else math.nan for name, values in finite.items()}
        balanced = {}
        for name, (given, multiple) in weights.items():
            for other in (name, "benign_loss") if given is None else ():
                if not sizes[other] > 0:
                    raise HoldfastError(
                        f"{self.config.name}: the gradient of {other} by the last {self.config.blocks} blocks has norm "
                        f"{sizes[other]:g} at the start, so {name} cannot be balanced; give its lambda."
                    )
            balanced[name] = multiple * sizes["benign_loss"] / sizes[name] if given is None else given
        self.say("weights by gradient norms: " + ", ".join(f"{name} {value:.3g}" for name, value in balanced.items()))
        return balanced

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"lambdas": self.lambdas}

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.lambdas = dict(values["lambdas"])

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`; only the final state must be good."""
        if self.go_back_at_the_end(why):
            self.record.completed = self.guard.changed
        return self.last


def _of_token_ids(task: Task) -> bool:
    return not next(task.sweep("train", 1, device=torch.device("cpu"))).x.is_floating_point()


def _norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return math.hypot(*(float(g.norm()) for g in grads if g is not None))

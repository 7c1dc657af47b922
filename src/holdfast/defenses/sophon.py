"""SOPHON: non-fine-tunable learning for classification (Deng et al., IEEE S&P 2024, Algorithm 1).

Two kinds of loops alternate. A *suppression* loop (FTS) lets simulated adversaries fine-tune a copy of the model and
moves the model so that they do worse; a *reinforcement* loop (NTR) is ordinary training on the benign task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from holdfast.defenses.base import Record
from holdfast.defenses.guarded import GuardedDefense, Immunization
from holdfast.defenses.simulation import Simulation
from holdfast.errors import HoldfastError, unknown
from holdfast.execution import Run
from holdfast.finetune import Strategy, not_applicable
from holdfast.models import SplitModel, check_fits
from holdfast.suppression import LOSSES
from holdfast.tasks import Task


@dataclass
class Sophon(GuardedDefense):
    """SOPHON's hyper-parameters; defaults are the paper's (section 5.1.1) unless said otherwise.

    Attributes:
        loss: suppression loss: "ice" (Eq. 11), "klu" (Eq. 13), or "ce-ascent", the unstable baseline.
        iterations: Iter, rounds of suppression and reinforcement.
        suppression_loops: l_FTS, per round.
        reinforcement_loops: l_NTR, per round.
        suppression_lr: alpha, of the suppression loops' Adam.
        reinforcement_lr: beta, of the reinforcement loops' Adam.
        tasks: N, simulated adversaries a suppression loop (the paper: one per GPU, three).
        steps: K, steps that each of them takes.
        gamma: weights of Eq. 4, one a step; None: all 1 (the paper does not give them).
        initialisations: how simulated adversaries start; one is drawn for each.
        optimizers: theirs; one is drawn for each.
        learning_rates: theirs; one is drawn for each.
        batch_sizes: theirs; one is drawn for each.
        reinforcement_batch: samples a reinforcement loop (the paper does not give it).
        clip: the meta-gradient's norm is clipped to this (published code; the value is ours); None: never.
        guard: watch for non-finite values and for the benign score; without it, a non-finite value ends the defense.
        guard_every: rounds between two looks at the benign score.
        max_benign_drop: how far the held-out benign score may fall below the original's before the guard goes back to
            the last good state and halves `suppression_lr`.
        max_rollbacks: the guard gives up after as many; the last good state is then the result.
        holdout: share of the benign training data kept back for the guard.

    Raises:
        HoldfastError: for a value out of range.
    """

    name: ClassVar[str] = "sophon"
    citation: ClassVar[str] = (
        "Deng et al., SOPHON: Non-Fine-Tunable Learning to Restrain Task Transferability For Pre-trained Models, "
        "IEEE S&P 2024"
    )

    loss: Literal["ice", "klu", "ce-ascent"] = "ice"
    suppression_loops: int = 1
    reinforcement_loops: int = 1
    suppression_lr: float = 3e-4
    reinforcement_lr: float = 5e-4
    tasks: int = 1
    steps: int = 50
    gamma: tuple[float, ...] | None = None
    initialisations: tuple[Literal["direct", "head"], ...] = ("direct", "head")
    optimizers: tuple[str, ...] = ("adam",)
    learning_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    batch_sizes: tuple[int, ...] = (50, 100, 150, 200, 250)
    reinforcement_batch: int = 200
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise unknown("suppression loss", self.loss, LOSSES)
        self.refuse_below_one("suppression_loops", "tasks", "steps", "reinforcement_batch")
        self.refuse_not_above_zero("suppression_lr", "reinforcement_lr", "clip")
        if self.gamma is not None and not all(map(math.isfinite, self.gamma)):
            raise HoldfastError(f"sophon: gamma is {self.gamma}; expected finite numbers.")
        for name in ("initialisations", "optimizers", "learning_rates", "batch_sizes"):
            if not getattr(self, name):
                raise HoldfastError(f"sophon: {name} is empty; give at least one.")
        if self.gamma is not None and len(self.gamma) != self.steps:
            raise HoldfastError(
                f"sophon: gamma has {len(self.gamma)} weights and there are {self.steps} steps; give one a step."
            )
        self.phi()  # refuses unknown optimizers and rates or sizes out of range now, not in the middle of the work

    def phi(self) -> list[Strategy]:
        """Returns every fine-tuning setting that may be simulated: the paper's Phi.

        Raises:
            HoldfastError: for a start of the body, whose meta-gradient would be another one.
        """
        for start in self.initialisations:
            if start not in ("direct", "head"):
                raise unknown("initialisation", start, ("direct", "head"))
        return [
            Strategy(initialisation, "all", optimizer, rate, size)
            for initialisation in self.initialisations
            for optimizer in self.optimizers
            for rate in self.learning_rates
            for size in self.batch_sizes
        ]

    def immunize(self, model: SplitModel, benign: Task, restricted: Task, *, run: Run) -> tuple[SplitModel, Record]:
        """Runs Algorithm 1; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` rounds and a second call continues from there,
        to the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, or the folder holds the state of another immunization.
        """
        if benign.kind != "classification" or restricted.kind != "classification":
            raise HoldfastError(f"sophon: {self.loss} is for classification; got {benign.kind} and {restricted.kind}.")
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        for strategy in self.phi():
            reason = not_applicable(strategy, model, restricted)
            if reason is not None:
                raise HoldfastError(
                    f"sophon: {reason}, so '{strategy.initialisation}' cannot be simulated; set initialisations to "
                    "[head]."
                )
        return _Immunization(self, model, benign, restricted, run).finish()


class _Immunization(Immunization[Sophon]):
    """One run of Algorithm 1."""

    title = "SOPHON"
    series = ("suppression_loss", "reinforcement_loss")
    rate_name = "suppression_lr"

    def __init__(self, config: Sophon, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        super().__init__(config, model, benign, restricted, run, rate=config.suppression_lr)
        self.simulation = Simulation(self.model, LOSSES[config.loss])

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `Immunization.make_optimizers`; the guard halves the suppressor's rate alone."""
        return {
            name: torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=rate, fused=True)
            for name, rate in (("suppressor", self.rate), ("reinforcer", self.config.reinforcement_lr))
        }

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """Suppression loops, then reinforcement loops."""
        config, reinforcer, reinforcement = self.config, self.optimizers["reinforcer"], []
        suppression = [self._suppress(generator) for _ in range(config.suppression_loops)]
        batches = self.benign.batches("train", config.reinforcement_batch, generator=generator, device=self.run.device)
        self.training_mode()
        for _ in range(config.reinforcement_loops):
            loss = self.benign.loss(self.model, next(batches))
            reinforcer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            reinforcer.step()
            reinforcement.append(float(loss.detach()))
        return {"suppression_loss": suppression, "reinforcement_loss": reinforcement}

    def _suppress(self, generator: torch.Generator) -> float:
        config, phi = self.config, self.config.phi()
        self.simulation.zero()
        losses = []
        for _ in range(config.tasks):
            strategy = phi[int(torch.randint(len(phi), (), generator=generator))]
            losses.append(
                self.simulation.run(self.restricted, strategy, config.steps, config.gamma, generator=generator)
            )
        for parameter, gradient in zip(self.model.parameters(), self.simulation.gradients(), strict=True):
            parameter.grad = gradient
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizers["suppressor"].step()
        return sum(losses) / len(losses)

    def too_low(self, why: str) -> None:
        """See `Immunization.too_low`: suppression went too far."""
        self.go_back(why)

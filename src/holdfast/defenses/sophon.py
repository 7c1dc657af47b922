"""SOPHON: non-fine-tunable learning for classification (Deng et al., IEEE S&P 2024, Algorithm 1).

Two kinds of loops alternate. A *suppression* loop (FTS) lets simulated adversaries fine-tune a copy of the model and
moves the model so that they do worse; a *reinforcement* loop (NTR) is ordinary training on the benign task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from holdfast.defenses.base import Defense, Record
from holdfast.defenses.simulation import Simulation
from holdfast.errors import HoldfastError, unknown
from holdfast.execution import (
    Run,
    derive_seed,
    fingerprint,
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_tensors,
)
from holdfast.finetune import Strategy, not_applicable
from holdfast.models import SplitModel, check_fits
from holdfast.results import Event
from holdfast.suppression import LOSSES
from holdfast.tasks import Task


@dataclass
class Sophon(Defense):
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
    iterations: int = 800
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
    guard: bool = True
    guard_every: int = 10
    max_benign_drop: float = 0.05
    max_rollbacks: int = 20
    holdout: float = 0.1

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown("suppression loss", self.loss, LOSSES)
        for name in (
            "iterations",
            "suppression_loops",
            "tasks",
            "steps",
            "reinforcement_batch",
            "guard_every",
            "max_rollbacks",
        ):
            if getattr(self, name) < 1:
                raise HoldfastError(f"sophon: {name} is {getattr(self, name)}; expected at least 1.")
        for name in ("suppression_lr", "reinforcement_lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise HoldfastError(f"sophon: {name} is {value}; expected a number above 0.")
        if not 0 <= self.max_benign_drop <= 1:
            raise HoldfastError(f"sophon: max_benign_drop is {self.max_benign_drop}; expected a share from 0 to 1.")
        if self.gamma is not None and not all(map(math.isfinite, self.gamma)):
            raise HoldfastError(f"sophon: gamma is {self.gamma}; expected finite numbers.")
        for name in ("initialisations", "optimizers", "learning_rates", "batch_sizes"):
            if not getattr(self, name):
                raise HoldfastError(f"sophon: {name} is empty; give at least one.")
        if self.gamma is not None and len(self.gamma) != self.steps:
            raise HoldfastError(
                f"sophon: gamma has {len(self.gamma)} weights and there are {self.steps} steps; give one a step."
            )
        if not 0 < self.holdout < 1:
            raise HoldfastError(f"sophon: holdout is {self.holdout}; expected a share between 0 and 1.")
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


class _Immunization:
    """The state of one run of Algorithm 1: what a checkpoint holds, and the guard's memory."""

    def __init__(self, config: Sophon, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        self.config, self.run, self.restricted = config, run, restricted
        self.benign, self.held_out = benign.holdout(config.holdout, derive_seed(run.seed, "sophon", "holdout"))
        self.model = model.clone().to(run.device)
        self.simulation = Simulation(self.model, LOSSES[config.loss])
        self.suppressor, self.reinforcer = (
            self._adam(config.suppression_lr),
            self._adam(config.reinforcement_lr),
        )
        self.record = Record(
            history={k: [] for k in ("iteration", "suppression_loss", "reinforcement_loss", "benign_score")}
        )
        self.round, self.rollbacks, self.rate = 0, 0, config.suppression_lr
        self.belongs_to = fingerprint(
            [
                config.config(),
                run.seed,
                model.facts().sha256,
                benign.facts().sha256,
                restricted.facts().sha256,
            ]
        )
        self.original_score = self.held_out.score(self.model)
        self.good = self._snapshot()

    def _adam(self, rate: float) -> torch.optim.Adam:
        return torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=rate, fused=True)

    def finish(self) -> tuple[SplitModel, Record]:
        self._resume()
        config = self.config
        with self.run.progress("Immunizing (SOPHON)", config.iterations, self.round) as bar:
            while self.round < config.iterations and self.record.completed:
                with self.run.seeded("sophon", self.round, self.rollbacks) as generator:
                    sound = self._one_round(generator)
                self.round += 1
                last = self.round == config.iterations
                if not sound:
                    self._not_finite()
                if not sound or self.round % config.guard_every == 0 or last:
                    score = self._look() if sound else math.nan
                    self._save()
                    bar.tick(f"benign {score:.3f}, restricted {config.loss} {self._last('suppression_loss')}")
                else:
                    bar.tick()
        self.model.eval()
        return self.model, self.record

    def _one_round(self, generator: torch.Generator) -> bool:
        """Suppression loops, then reinforcement loops; False as soon as anything is not finite."""
        config, suppression, reinforcement = self.config, [], []
        for _ in range(config.suppression_loops):
            suppression.append(self._suppress(generator))
        batches = self.benign.batches("train", config.reinforcement_batch, generator=generator, device=self.run.device)
        self._training_mode()
        for _ in range(config.reinforcement_loops):
            loss = self.benign.loss(self.model, next(batches))
            self.reinforcer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.reinforcer.step()
            reinforcement.append(float(loss.detach()))
        history = self.record.history
        history["iteration"].append(self.round + 1)
        history["suppression_loss"].append(_mean(suppression))
        history["reinforcement_loss"].append(_mean(reinforcement))
        history["benign_score"].append(None)
        finite = all(map(math.isfinite, suppression + reinforcement))
        return finite and all(bool(p.isfinite().all()) for p in self.model.parameters())

    def _training_mode(self) -> None:
        """Training mode, but for normalisations whose parameters are frozen: their statistics are frozen with them."""
        self.model.train()
        for module in self.model.modules():
            own = list(module.parameters(recurse=False))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and own and not any(p.requires_grad for p in own):
                module.eval()

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
        self.suppressor.step()
        return sum(losses) / len(losses)

    def _look(self) -> float:
        """The guard: keeps a good state, goes back to the last one otherwise; returns the score it saw."""
        config = self.config
        score = self.held_out.score(self.model)
        self.record.history["benign_score"][-1] = score if math.isfinite(score) else None
        floor = self.original_score - config.max_benign_drop
        if score >= floor:
            self.good = self._snapshot()
        elif config.guard:
            self._go_back(f"held-out benign score {score:.3f} is under the floor {floor:.3f}")
        return score

    def _not_finite(self) -> None:
        if self.config.guard:
            self._go_back("a loss or a weight is not finite")
        else:
            self._say("a loss or a weight is not finite; the guard is off, so this is where it ends")
            self.record.completed = False

    def _go_back(self, why: str) -> None:
        self.rollbacks += 1
        self._restore(self.good)
        if self.rollbacks >= self.config.max_rollbacks:
            self._say(f"{why}: back to the last good state; gave up after {self.rollbacks} times")
            self.record.completed = False
            return
        self.rate /= 2
        self.suppressor = self._adam(self.rate)
        self.reinforcer = self._adam(self.config.reinforcement_lr)
        self._say(f"{why}: back to the last good state, suppression_lr halved to {self.rate:.3g}")

    def _say(self, message: str) -> None:
        self.record.events.append(Event(iteration=self.round, message=message))
        self.run.say(f"round {self.round}: {message}")

    def _last(self, series: str) -> str:
        value = self.record.history[series][-1]
        return "not finite" if value is None else f"{value:.3f}"

    def _snapshot(self) -> dict[str, Tensor]:
        return {n: v.detach().clone() for n, v in self.model.network.state_dict().items()}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        self.model.network.load_state_dict(dict(state))

    def _save(self) -> None:
        path = self.run.path("immunization.safetensors")
        if path is None:
            return
        tensors = {f"model/{n}": v for n, v in self._snapshot().items()}
        tensors |= {f"good/{n}": v for n, v in self.good.items()}
        for label, optimizer in (("suppressor", self.suppressor), ("reinforcer", self.reinforcer)):
            tensors |= {f"{label}/{n}": v for n, v in optimizer_tensors(optimizer).items()}
        meta = {
            "belongs_to": self.belongs_to, "round": self.round, "rollbacks": self.rollbacks, "rate": self.rate,
            "history": self.record.history, "events": [e.model_dump() for e in self.record.events],
            "completed": self.record.completed,
        }  # fmt: skip
        save_tensors(path, tensors, meta)

    def _resume(self) -> None:
        path = self.run.path("immunization.safetensors")
        if path is None or not path.exists():
            return
        tensors, meta = load_tensors(path)
        if meta.get("belongs_to") != self.belongs_to:
            raise HoldfastError(
                f"{str(path)!r} is the state of another immunization (model, data, seed or settings differ): states "
                "are never mixed. Choose another folder with --out."
            )
        self._restore(_under(tensors, "model"))
        self.good = {n: v.to(self.run.device) for n, v in _under(tensors, "good").items()}
        self.round, self.rollbacks, self.rate = meta["round"], meta["rollbacks"], meta["rate"]
        self.suppressor = self._adam(self.rate)
        for label, optimizer in (("suppressor", self.suppressor), ("reinforcer", self.reinforcer)):
            restore_optimizer(optimizer, _under(tensors, label))
        self.record = Record(meta["history"], [Event(**e) for e in meta["events"]], meta["completed"])
        self.run.say(f"Immunization: continuing after {self.round} of {self.config.iterations} rounds")


def _under(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{label}/"): v for n, v in tensors.items() if n.startswith(f"{label}/")}


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values) if values else math.nan
    return mean if math.isfinite(mean) else None

"""SOPHON: non-fine-tunable learning for classification and generation (Deng et al., IEEE S&P 2024, Algorithm 1).

Two kinds of loops alternate. A *suppression* loop (FTS) lets simulated adversaries fine-tune a copy of the model and
moves the model so that they do worse; a *reinforcement* loop (NTR) is ordinary training on the benign task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from holdfast.defenses.base import Record
from holdfast.defenses.sophon.exact import MOMENTUM, ExactSimulation
from holdfast.defenses.sophon.pool import Population
from holdfast.defenses.sophon.simulation import Seen, Simulation, whole
from holdfast.defenses.trainer import GuardedDefense, Immunization
from holdfast.errors import HoldfastError, unknown
from holdfast.losses import LOSSES, Objective
from holdfast.models import SplitModel, check_fits
from holdfast.runtime.devices import autocast
from holdfast.runtime.distributed import process_group
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import Batch, Task
from holdfast.training import ADAPTED, Initialisation, Precision, Scope, Strategy, not_applicable


@dataclass
class Sophon(GuardedDefense):
    """SOPHON's hyper-parameters; defaults are the paper's (section 5.1.1) unless said otherwise.

    Attributes:
        loss: suppression loss. Of classifiers "ice" (Eq. 11), "klu" (Eq. 13), or "ce-ascent", the unstable baseline; of
            denoisers "dos" (Eq. 16), or "mse-ascent", the unstable one; "none", if there is a `probe_weight`. By
            default ("auto"), "ice" for classifiers and "dos" for denoisers.
        iterations: Iter, rounds of suppression and reinforcement.
        suppression_loops: l_FTS, per round.
        reinforcement_loops: l_NTR, per round.
        suppression_lr: alpha, of the suppression loops' Adam.
        reinforcement_lr: beta, of the reinforcement loops' Adam.
        joint_weight: add the meta-gradient, times this, to that of the reinforcement loss in each of its loops, and
            take one step with both, instead of one with each of two Adams. These divide by the size of their own
            gradients, so that suppression moves each weight as far, whatever it costs the benign task. Ours; None: two,
            as in the paper.
        tasks: N, simulated adversaries a suppression loop (the paper: one per GPU, three).
        steps: K, steps that each of them takes.
        gamma: weights of Eq. 4, one a step; None: all 1 (the paper does not give them).
        initialisations: how simulated adversaries start; one is drawn for each. The paper simulates "direct" and
            "head"; "last-block" and "last-half" are ours (see `Strategy`).
        scopes: what they train; the paper: everything.
        optimizers: theirs; one is drawn for each. The paper simulates Adam.
        learning_rates: theirs; one is drawn for each.
        batch_sizes: theirs; one is drawn for each.
        strategies: the whole of Phi, written out; then the five settings above are not looked at. Ours.
        population: simulated adversaries that are kept side by side and take turns, at least `tasks`; None: as many.
        lifetime: loops that one of them goes on for, `steps` a loop, before a new one is drawn in its place; 1: none
            is continued, as in the paper.
        disjoint: simulated adversaries learn from one half of the defender's data and are evaluated on the other, so
            that what they learned by heart does not count; False: both on all of it, as in the paper.
        probe_weight: of `ridge_probe` on the simulated adversaries' features, beside the suppression loss; 0: none, as
            in the paper.
        probe_ridge: see `ridge_probe`.
        probe_batch: samples that this probe is fitted on.
        distillation: weight of KL(original || model) on benign batches, of denoisers of the squared difference of their
            answers, beside the reinforcement loss; 0: none, as in the paper.
        temperature: of that distillation.
        second_order: the exact meta-gradient instead of the first-order one: for a small K, without Adam's relatives.
        precision: of forward and backward passes: "float32", or "bf16" where torch's autocast deems it safe.
        compile: let torch.compile make the forward passes: worth its start-up time for long runs.
        reinforcement_batch: samples a reinforcement loop (the paper does not give it).
        clip: the meta-gradient's norm is clipped to this (published code; the value is ours); None: never.
        guard: watch for non-finite values and for the benign score; without it, a non-finite value ends the defense.
        guard_every: rounds between two looks at the benign score.
        max_benign_drop: how far the held-out benign score may fall below the original's before the guard goes back to
            the last good state and halves `suppression_lr`; of a denoiser, by which share the error may rise. An
            original that was trained on what is held out here scores higher there than on test data, and falls further.
        recovery_loops: reinforcement loops by which the guard first tries to bring the score back; 0: none.
        max_rollbacks: the guard gives up after as many; the last good state is then the result.
        holdout: share of the benign training data kept back for the guard.
        ema: decay, a round, of an average of the weights, which is then the result; see `GuardedDefense`.

    Raises:
        HoldfastError: for a value out of range.
    """

    name: ClassVar[str] = "sophon"
    citation: ClassVar[str] = (
        "Deng et al., SOPHON: Non-Fine-Tunable Learning to Restrain Task Transferability For Pre-trained Models, "
        "IEEE S&P 2024"
    )

    loss: Literal["auto", "ice", "klu", "ce-ascent", "dos", "mse-ascent", "none"] = "auto"
    suppression_loops: int = 1
    reinforcement_loops: int = 1
    suppression_lr: float = 3e-4
    reinforcement_lr: float = 5e-4
    joint_weight: float | None = None
    tasks: int = 1
    steps: int = 50
    gamma: tuple[float, ...] | None = None
    initialisations: tuple[Initialisation, ...] = ("direct", "head")
    scopes: tuple[Scope, ...] = ("all",)
    optimizers: tuple[str, ...] = ("adam",)
    learning_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    batch_sizes: tuple[int, ...] = (50, 100, 150, 200, 250)
    strategies: tuple[Strategy, ...] | None = None
    population: int | None = None
    lifetime: int = 1
    disjoint: bool = False
    probe_weight: float = 0.0
    probe_ridge: float = 0.01
    probe_batch: int = 250
    reinforcement_batch: int = 200
    distillation: float = 0.0
    temperature: float = 2.0
    recovery_loops: int = 0
    clip: float | None = 1.0
    second_order: bool = False
    precision: Precision = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in (*LOSSES, "auto", "none"):
            raise unknown("suppression loss", self.loss, [*LOSSES, "auto", "none"])
        self.refuse_below_one("suppression_loops", "tasks", "steps", "reinforcement_batch", "lifetime", "probe_batch")
        self.refuse_not_above_zero(
            "suppression_lr", "reinforcement_lr", "joint_weight", "clip", "probe_ridge", "temperature"
        )
        for name in ("probe_weight", "distillation", "recovery_loops"):
            if not 0 <= getattr(self, name) < math.inf:
                raise HoldfastError(f"sophon: {name} is {getattr(self, name)}; expected a number of at least 0.")
        if self.precision not in get_args(Precision):
            raise unknown("precision", self.precision, get_args(Precision))
        for broken, message in self._impossible():
            if broken:
                raise HoldfastError(f"sophon: {message}.")
        phi = self.phi()  # refuses unknown names and rates or sizes out of range now, not in the middle of the work
        if self.second_order:
            self._check_second_order(phi)

    def _impossible(self) -> list[tuple[bool, str]]:
        """What cannot be, or would do nothing, and how to mend it."""
        gamma, population = self.gamma, self.population
        empty = [n for n in ("initialisations", "scopes", "optimizers", "learning_rates", "batch_sizes")
                 if not getattr(self, n)]  # fmt: skip
        return [
            (bool(empty), f"{', '.join(empty)} is empty; give at least one"),
            (
                self.loss == "none" and not self.probe_weight,
                "loss is 'none' and probe_weight is 0, so nothing is suppressed; give one",
            ),
            (
                self.joint_weight is not None and (self.suppression_loops > 1 or self.reinforcement_loops < 1),
                "joint_weight is for one suppression loop and at least one reinforcement loop a round; set them, or "
                "leave it out",
            ),
            (self.probe_batch < 2, f"probe_batch is {self.probe_batch}; a probe needs at least 2 samples"),
            (
                self.recovery_loops > 0 and not self.guard,
                "recovery_loops are the guard's, which is off; set guard, or leave them out",
            ),
            (
                population is not None and self.lifetime == 1,
                f"population is {population} and lifetime 1, so that nobody lives on; set lifetime to 2 or more, or "
                "leave population out",
            ),
            (
                population is not None and population < self.tasks,
                f"population is {population} and tasks {self.tasks}: each loop needs as many adversaries",
            ),
            (
                gamma is not None and not (all(0 <= g < math.inf for g in gamma) and any(gamma)),
                f"gamma is {gamma}; expected finite numbers of at least 0, and one above it",
            ),
            (
                gamma is not None and len(gamma) != self.steps,
                f"gamma has {len(gamma or ())} weights and there are {self.steps} steps; give one a step",
            ),
        ]

    def _check_second_order(self, phi: list[Strategy]) -> None:
        for strategy in phi:
            plain = strategy.gradient == "raw" and strategy.precision == "float32"
            if strategy.optimizer not in MOMENTUM or strategy.scope != "all" or not plain:
                raise HoldfastError(
                    f"sophon: the exact meta-gradient is for adversaries that train everything with "
                    f"{', '.join(MOMENTUM)}, by the raw gradient, in float32; got {strategy}. Set optimizers, or "
                    "second_order: false."
                )
        if self.lifetime > 1 or self.probe_weight or self.precision != "float32" or self.compile:
            raise HoldfastError(
                "sophon: the exact meta-gradient goes without lifetime, probe_weight, bf16 and compile; leave them out."
            )

    def phi(self) -> list[Strategy]:
        """Returns every fine-tuning setting that may be simulated: the paper's Phi.

        Raises:
            HoldfastError: for adapters, which the released model does not have.
        """
        if self.strategies is not None:
            phi = list(self.strategies)
        else:
            phi = [
                Strategy(initialisation, scope, optimizer, rate, size)
                for initialisation in self.initialisations
                for scope in self.scopes
                for optimizer in self.optimizers
                for rate in self.learning_rates
                for size in self.batch_sizes
            ]
        if not phi:
            raise HoldfastError("sophon: strategies is empty; give at least one, or leave it out.")
        if any(strategy.scope in ADAPTED for strategy in phi):
            raise HoldfastError(
                "sophon: adapters (lora) cannot be simulated: they are not in the model that is immunized. Scope 'all' "
                "is the stronger adversary."
            )
        return phi

    def check_kinds(self, benign: Task, restricted: Task) -> None:
        """Refuses tasks of kinds that do not go together, or not with the losses.

        Raises:
            HoldfastError: saying which, and what to set.
        """
        fitting = restricted.suppression_losses
        if not fitting or benign.suppression_losses != fitting:
            raise HoldfastError(
                f"sophon: no suppression loss fits both {benign.described} and {restricted.described}; expected "
                "classification or denoising, the same for both."
            )
        if self.loss in LOSSES and self.loss not in fitting:
            raise HoldfastError(
                f"sophon: the loss {self.loss!r} is not for {restricted.described}; set loss to {' or '.join(fitting)}."
            )
        if self.probe_weight and restricted.no_features is not None:
            raise HoldfastError(
                f"sophon: probe_weight is the weight of probes on features, and {restricted.no_features}; set it to 0."
            )

    def resolved(self, benign: Task) -> Sophon:
        """See `Defense.resolved`."""
        if self.loss != "auto" or not benign.suppression_losses:  # `check_kinds` refuses a task without
            return self
        settings: dict[str, Any] = {"loss": benign.suppression_losses[0]}
        return replace(self, **settings)

    def immunize(self, model: SplitModel, benign: Task, restricted: Task, *, run: Run) -> tuple[SplitModel, Record]:
        """Runs Algorithm 1; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` rounds and a second call continues from there,
        to the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, or the folder holds the state of another immunization.
        """
        self.check_kinds(benign, restricted)
        if self.precision == "bf16" and model.dtype == torch.float64:
            raise HoldfastError(
                f"sophon: precision is bf16 and {model.name} computes in float64, which autocast leaves alone; set "
                "precision: float32."
            )
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        for strategy in self.phi():
            reason = not_applicable(strategy, model, restricted)
            if reason is not None:
                raise HoldfastError(
                    f"sophon: {reason}, so a start from '{strategy.initialisation}' that trains '{strategy.scope}' "
                    "cannot be simulated; leave it out of initialisations and scopes (or strategies)."
                )
        return _Immunization(self.resolved(benign), model, benign, restricted, run).finish()


class _Immunization(Immunization[Sophon]):
    """One run of Algorithm 1."""

    title = "SOPHON"
    series = ("suppression_loss", "reinforcement_loss", "simulated_score", "gradient_passes")
    shown = ("suppression_loss", "simulated_score")

    def __init__(self, config: Sophon, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        joint = config.joint_weight
        super().__init__(config, model, benign, restricted, run, rate=config.suppression_lr if joint is None else joint)
        self.rate_name = "suppression_lr" if joint is None else "joint_weight"
        self.population = Population(
            self.model,
            Objective(LOSSES.get(config.loss), config.probe_weight, config.probe_ridge, config.probe_batch),
            config.phi(),
            size=config.population or config.tasks,
            lifetime=config.lifetime,
            devices=_devices(run.device) if config.tasks > 1 else (),
            kind=ExactSimulation if config.second_order else Simulation,
            bf16=config.precision == "bf16",
            compiled=config.compile,
        )
        self.learned, self.evaluated = (
            self.restricted.halves(derive_seed(run.seed, "sophon", "disjoint"))
            if config.disjoint
            else (self.restricted, self.restricted)
        )
        self.teacher = model.clone().to(run.device).eval() if config.distillation else None

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `Immunization.make_optimizers`; the guard halves the suppressor's rate alone."""
        rates = {"suppressor": self.rate, "reinforcer": self.config.reinforcement_lr}
        if self.config.joint_weight is not None:
            del rates["suppressor"]
        return {
            name: torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=rate, fused=True)
            for name, rate in rates.items()
        }

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """Suppression loops, then reinforcement loops."""
        config = self.config
        seen = [s for _ in range(config.suppression_loops) for s in self._suppress(generator)]
        waiting = [] if config.joint_weight is None else [p.grad for p in self.model.parameters()]
        return {
            "suppression_loss": [s.loss for s in seen],
            "reinforcement_loss": self._reinforce(config.reinforcement_loops, generator, waiting),
            "simulated_score": [s.score for s in seen],
            "gradient_passes": [self._passes()],
        }

    def _reinforce(self, loops: int, generator: torch.Generator, waiting: Sequence[Tensor | None] = ()) -> list[float]:
        config, optimizer, losses = self.config, self.optimizers["reinforcer"], []
        batches = self.benign.batches("train", config.reinforcement_batch, generator=generator, device=self.run.device)
        self.training_mode()
        for _ in range(loops):
            with autocast(self.run.device, config.precision == "bf16"):
                loss = self._reinforcement_loss(next(batches))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.pool_gradients()
            self._join(waiting)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    @torch.no_grad()
    def _join(self, waiting: Sequence[Tensor | None]) -> None:
        """Adds the meta-gradient that waits for a step, if there is one; see `Sophon.joint_weight`."""
        for parameter, gradient in zip(self.model.parameters(), waiting, strict=False):
            if gradient is not None and parameter.requires_grad:
                own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = own.add_(gradient, alpha=self.rate)

    def _passes(self) -> int:
        """Forward and backward passes of a round; what the guard and validation do is not among them."""
        config = self.config
        evaluations = config.steps * (config.loss != "none") + (config.probe_weight > 0)
        return config.suppression_loops * config.tasks * (config.steps + evaluations) + config.reinforcement_loops

    def _suppress(self, generator: torch.Generator) -> list[Seen]:
        config = self.config
        seen = self.population.loop(
            self.learned, config.tasks, config.steps, config.gamma, generator=generator, evaluation=self.evaluated
        )
        for parameter, gradient in zip(self.model.parameters(), self.population.gradients(), strict=True):
            parameter.grad = gradient
        self.pool_gradients()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if config.joint_weight is None:
            self.optimizers["suppressor"].step()
        return seen

    def _reinforcement_loss(self, batch: Batch) -> Tensor:
        """L_beta, and how far the model's answers are from the original's."""
        if self.teacher is None:
            return self.benign.loss(self.model, batch)
        with torch.no_grad():
            wanted = whole(self.teacher(batch.x))
        outputs = whole(self.model(batch.x))
        distance = self.benign.distance(outputs, wanted, self.config.temperature)
        return self.benign.loss_of(outputs, batch) + self.config.distillation * distance

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """See `Immunization.saved`."""
        return self.population.saved()

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """See `Immunization.restore_own`."""
        self.population.restore(self.learned, tensors, values)

    def forget(self) -> None:
        """See `Immunization.forget`."""
        self.population.clear()

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`: suppression went too far; perhaps reinforcement alone makes up for it."""
        config = self.config
        if config.recovery_loops:
            with self.run.seeded(
                *process_group().own("sophon", "recovery", self.round, self.record.rollbacks)
            ) as generator:
                self._reinforce(config.recovery_loops, generator)
            process_group().sync_buffers(self.model)
            self.record.history["gradient_passes"][-1] = self._passes() + config.recovery_loops
            score = self.benign_score()
            if self.acceptable(score):
                self.say(f"{why}: brought back to {score:.3f} by {config.recovery_loops} reinforcement loops")
                self.keep(score)
                return True
        self.go_back(why)
        return True


def _devices(chosen: torch.device) -> list[torch.device]:
    """Where simulated adversaries run: one a device, as in the paper, if a kind of device was chosen and not one."""
    count = torch.cuda.device_count() if chosen.type == "cuda" and chosen.index is None else 1
    return [torch.device("cuda", i) for i in range(count)] if count > 1 else [chosen]

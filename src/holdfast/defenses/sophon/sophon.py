"""SOPHON: non-fine-tunable learning for classification and generation (Deng et al., IEEE S&P 2024, Algorithm 1).

A round alternates two kinds of loops, in the paper's words. A *suppression* loop (FTS) simulates adversaries that
fine-tune copies of the model, and takes one step after which they do worse. A *reinforcement* loop (NTR) is one step of
ordinary training on the benign task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.guard import GuardedDefense
from holdfast.defenses.registry import register_defense
from holdfast.defenses.sophon.exact import ExactSimulation
from holdfast.defenses.sophon.frozen_blocks import behind_frozen_blocks, check_trained_blocks
from holdfast.defenses.sophon.population import Population
from holdfast.defenses.sophon.sampling import SamplingStates
from holdfast.defenses.sophon.settings import ReinforcementSettings, SimulationSettings, SuppressionSettings
from holdfast.defenses.sophon.simulation import Simulation, SimulationOutcome, full_precision
from holdfast.defenses.sophon.small_images import on_small_images
from holdfast.defenses.trainer import Immunization
from holdfast.errors import HoldfastError
from holdfast.losses import LOSSES, Objective
from holdfast.models import SplitModel, check_fits
from holdfast.runtime.devices import autocast
from holdfast.runtime.distributed import process_group
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import Batch, Task, TextToImageTask
from holdfast.training import Precision


@register_defense
@dataclass
class Sophon(SimulationSettings, SuppressionSettings, ReinforcementSettings, GuardedDefense):
    """SOPHON, with its hyper-parameters in groups.

    Each group is documented in its class; recipes and the constructor name every hyper-parameter directly:

    - the simulated adversaries: `SimulationSettings`;
    - suppression, the step against them: `SuppressionSettings`;
    - reinforcement, the training on the benign task: `ReinforcementSettings`;
    - the guard on the benign score, averaging and validation: `GuardedDefense`. The guard halves `suppression_lr`
      (or `joint_weight`).

    Attributes:
        precision: of forward and backward passes: "float32", or "bf16" where torch's autocast considers it safe.
        compile: compile the forward passes with torch.compile; worth its start-up time in long runs.
        blocks: how many of the last blocks of the body are trained, by the defense and by its simulated adversaries
            (see `SplitModel.blocks`), beside the head. The outputs of the blocks before them are computed once, which
            saves their share of every step. An adversary of the released model trains all blocks, so the frozen ones
            give away what they know. Ours; None: all, as in the paper.
        cache_gib: refuse `blocks` if those outputs need more memory than this.
        small_rounds: the first rounds, on images of `small_size`: with half as many pixels a side they cost about a
            quarter. The guard, its recovery and validation use full images. Ours; 0: none, as in the paper.
        small_size: pixels a side of the images in these rounds; for networks that take images of any size.

    Raises:
        HoldfastError: for a value out of range.

    Example:
        >>> Sophon(steps=20, suppression_lr=1e-3, guard_every=5).config()["suppression_lr"]
        0.001
    """

    name: ClassVar[str] = "sophon"
    citation: ClassVar[str] = (
        "Deng et al., SOPHON: Non-Fine-Tunable Learning to Restrain Task Transferability For Pre-trained Models, "
        "IEEE S&P 2024"
    )

    title: ClassVar[str] = "SOPHON"
    """The name in the progress display."""

    sampling_default: ClassVar[float] = 0.0
    """What `sampling` is for a denoiser that draws images, if it is None."""

    precision: Precision = "float32"
    compile: bool = False
    blocks: int | None = None
    cache_gib: float = 8.0
    small_rounds: int = 0
    small_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("precision", get_args(Precision))
        self.refuse_below_one("blocks")
        self.refuse_not_above_zero("cache_gib")
        self.refuse_negative("small_rounds")
        self.refuse_below_one("small_size")
        if bool(self.small_rounds) != (self.small_size is not None):
            raise HoldfastError(
                f"{self.name}: small_rounds is {self.small_rounds} and small_size is {self.small_size}; give both, or "
                "leave both out."
            )
        self.require(lambda value: value < self.iterations, f"fewer than the {self.iterations} rounds", "small_rounds")
        if self.blocks is not None:
            self._check_frozen(self.blocks)
        if self.joint_weight is not None and (self.suppression_loops > 1 or self.reinforcement_loops < 1):
            raise HoldfastError(
                f"{self.name}: joint_weight needs one suppression loop and at least one reinforcement loop a round; "
                "set them, or leave it out."
            )
        if self.recovery_loops > 0 and not self.guard:
            raise HoldfastError(f"{self.name}: recovery_loops need the guard, which is off; set guard, or drop them.")
        if self.second_order and (
            self.lifetime > 1 or self.probe_weight or self.precision != "float32" or self.compile
        ):
            raise HoldfastError(
                f"{self.name}: the exact meta-gradient cannot be combined with lifetime, probe_weight, bf16 or "
                "compile; leave them out."
            )

    def _check_frozen(self, blocks: int) -> None:
        """Refuses settings that would change or read blocks that are frozen."""
        mixed = next((s for s in self.phi() if s.initialisation in ("last-half", "shrink-perturb")), None)
        if mixed is not None:
            raise HoldfastError(
                f"{self.name}: blocks is {blocks}, and a start from '{mixed.initialisation}' may change frozen blocks; "
                "leave one of both out."
            )
        if self.small_rounds:
            raise HoldfastError(
                f"{self.name}: blocks keeps the outputs of frozen blocks, which small_rounds would need for two sizes; "
                "leave one of both out."
            )
        if blocks == 1 and any(s.initialisation == "last-block" for s in self.phi()):
            raise HoldfastError(
                f"{self.name}: blocks is 1, and a start from 'last-block' starts the only trained block anew, so "
                "nothing is left to suppress; leave it out, or set blocks to 2 or more."
            )
        if self.probe_weight and self.probe_depth > blocks:
            raise HoldfastError(
                f"{self.name}: probe_depth is {self.probe_depth}, and blocks is {blocks}; frozen blocks cannot be "
                "changed by a probe, so expected at most that."
            )

    def check_kinds(self, benign: Task, restricted: Task) -> None:
        """Refuses kinds of tasks that do not fit together, or that do not fit the losses.

        Raises:
            HoldfastError: with the tasks' kinds and the setting to change.
        """
        fitting = restricted.suppression_losses
        if not fitting or benign.suppression_losses != fitting:
            raise HoldfastError(
                f"{self.name}: no suppression loss fits both {benign.described} and {restricted.described}; expected "
                "classification or denoising, the same for both."
            )
        if self.loss in LOSSES and self.loss not in fitting:
            raise HoldfastError(
                f"{self.name}: the loss {self.loss!r} is not for {restricted.described}; set loss to "
                f"{' or '.join(fitting)}."
            )
        if self.max_timestep is not None:
            schedule = restricted.sampling_schedule
            if schedule is None:
                raise HoldfastError(
                    f"{self.name}: max_timestep is {self.max_timestep}, and {restricted.described} does not have all "
                    "time steps of a noise schedule; leave it out."
                )
            if self.max_timestep >= schedule.steps:
                raise HoldfastError(
                    f"{self.name}: max_timestep is {self.max_timestep}; expected 0 to {schedule.steps - 1}, the time "
                    f"steps of {restricted.described}."
                )
        if self.sampling and benign.sampling_schedule is None:
            raise HoldfastError(
                f"{self.name}: sampling is {self.sampling:g}, and a model of {benign.described} draws no samples; "
                "leave it out."
            )

    def resolved(self, benign: Task) -> Sophon:
        """See `Defense.resolved`."""
        settings: dict[str, Any] = {}
        if self.loss == "auto" and benign.suppression_losses:  # `check_kinds` refuses a task without losses
            settings["loss"] = self.preferred_loss(benign)
        if self.sampling is None:
            settings["sampling"] = self.sampling_default if benign.sampling_schedule is not None else 0.0
        return replace(self, **settings)

    def preferred_loss(self, benign: Task) -> str:
        """Returns the suppression loss that "auto" stands for."""
        return benign.suppression_losses[0]

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Runs Algorithm 1; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` rounds. A second call continues from there and
        gives the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, or the folder holds the state of another immunization.
        """
        self.check_kinds(benign, restricted)
        if self.precision == "bf16" and model.dtype == torch.float64:
            raise HoldfastError(
                f"{self.name}: precision is bf16, but {model.name} computes in float64, which autocast does not "
                "change; set precision: float32."
            )
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        reason = model.not_probed(self.probe_depth) if self.probe_weight else None
        if reason is not None:
            raise HoldfastError(f"{self.name}: {model.name}: {reason}. Set probe_depth, or probe_weight: 0.")
        self.check_starts(model, restricted)
        config = self.resolved(benign)
        if self.blocks is None:
            return _Immunization(config, model, benign, restricted, run).finish()
        check_trained_blocks(self, self.blocks, model, benign)
        device_model = model.clone().to(run.device)
        left = behind_frozen_blocks(self, self.blocks, self.cache_gib, device_model, benign, restricted)
        immunized, record = _Immunization(config, *left, run).finish()
        result = left.whole(immunized)
        for own, given in zip(result.parameters(), model.parameters(), strict=True):
            own.requires_grad_(given.requires_grad)
        return result, record


SAMPLING = "sampling/"
"""Prefix of the tensors of `SamplingStates` in a checkpoint."""


class _Immunization(Immunization[Sophon]):
    """One run of Algorithm 1."""

    series = ("suppression_loss", "reinforcement_loss", "simulated_score", "gradient_passes")
    shown = ("suppression_loss", "simulated_score")

    def __init__(self, config: Sophon, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        joint = config.joint_weight
        super().__init__(config, model, benign, restricted, run, rate=config.suppression_lr if joint is None else joint)
        self.title = config.title
        self.rate_name = "suppression_lr" if joint is None else "joint_weight"
        self.population = Population(
            self.model,
            Objective(
                LOSSES.get(config.loss), config.probe_weight, config.probe_ridge, config.probe_batch, config.probe_depth
            ),
            config.phi(),
            size=config.population or config.tasks,
            lifetime=config.lifetime,
            devices=_devices(run.device) if config.tasks > 1 else (),
            kind=ExactSimulation if config.second_order else Simulation,
            head_gradient=config.head_gradient,
            bf16=config.precision == "bf16",
            compiled=config.compile,
        )
        self.learned, self.evaluated = (
            self.restricted.halves(derive_seed(run.seed, "sophon", "disjoint"))
            if config.disjoint
            else (self.restricted, self.restricted)
        )
        if config.max_timestep is not None:
            self.evaluated = self.evaluated.with_timesteps(range(config.max_timestep + 1))
        self.small = _on_small_images(config, self.model, self.benign, self.learned, self.evaluated)
        self.original = model.clone().to(run.device).eval() if config.distillation or config.sampling else None
        self.states: SamplingStates | None = None

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """See `Immunization.make_optimizers`; the guard halves only the suppressor's rate."""
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
        full = self.benign, self.learned, self.evaluated
        benign, *restricted = full if self.small is None or self.round >= config.small_rounds else self.small
        outcomes = [o for _ in range(config.suppression_loops) for o in self._suppress(generator, *restricted)]
        waiting = [] if config.joint_weight is None else [p.grad for p in self.model.parameters()]
        return {
            "suppression_loss": [o.loss for o in outcomes],
            "reinforcement_loss": self._reinforce(benign, config.reinforcement_loops, generator, waiting),
            "simulated_score": [o.score for o in outcomes],
            "gradient_passes": [self._passes()],
        }

    def _reinforce(
        self, benign: Task, loops: int, generator: torch.Generator, waiting: Sequence[Tensor | None] = ()
    ) -> list[float]:
        config, optimizer, losses = self.config, self.optimizers["reinforcer"], []
        batches = benign.batches("train", config.reinforcement_batch, generator=generator, device=self.run.device)
        self.training_mode()
        for _ in range(loops):
            with autocast(self.run.device, config.precision == "bf16"):
                loss = self._reinforcement_loss(next(batches))
                if config.sampling:
                    loss = loss + config.sampling * self._sampling_loss(generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.average_gradients()
            self._join(waiting)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    @torch.no_grad()
    def _join(self, waiting: Sequence[Tensor | None]) -> None:
        """Adds the meta-gradient to the gradient of the joint step; see `SuppressionSettings.joint_weight`."""
        for parameter, gradient in zip(self.model.parameters(), waiting, strict=False):
            if gradient is not None and parameter.requires_grad:
                own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = own.add_(gradient, alpha=self.rate)

    def _passes(self) -> int:
        """Forward and backward passes of a round, without those of the guard and of validation."""
        config = self.config
        evaluated = sum(weight > 0 for weight in config.step_weights)
        evaluations = evaluated * (config.loss != "none") + (config.probe_weight > 0)
        return config.suppression_loops * config.tasks * (config.steps + evaluations) + config.reinforcement_loops

    def _suppress(self, generator: torch.Generator, learned: Task, evaluated: Task) -> list[SimulationOutcome]:
        config = self.config
        outcomes = self.population.simulate(
            learned, config.tasks, config.steps, config.step_weights, generator=generator, evaluation=evaluated
        )
        for parameter, gradient in zip(self.model.parameters(), self.population.gradients(), strict=True):
            parameter.grad = gradient
        self.average_gradients()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if config.joint_weight is None:
            self.optimizers["suppressor"].step()
        return outcomes

    def _reinforcement_loss(self, batch: Batch) -> Tensor:
        """L_beta, plus the weighted distance of the model's outputs from the original's."""
        if not self.config.distillation:
            return self.benign.loss(self.model, batch)
        outputs, distance = self._distance(batch.x, batch.y)
        return self.benign.loss_of(outputs, batch) + self.config.distillation * distance

    def _distance(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The model's outputs, and how far they are from the original's; with targets, of those that count."""
        assert self.original is not None
        with torch.no_grad():
            wanted = full_precision(self.original(x))
        outputs = full_precision(self.model(x))
        own, kept = (each if y is None else self.benign.counted(each, y)[0] for each in (outputs, wanted))
        return outputs, self.benign.distance(own, kept, self.config.temperature)

    def _sampling_loss(self, generator: torch.Generator) -> Tensor:
        """The distance on states that the model passes while it draws images; these go one step on."""
        if self.states is None:
            self.states = self._new_states(generator)
            assert self.original is not None
            self.states.spread(self.original, generator)
        outputs, distance = self._distance(self.states.inputs())
        self.states.advance(outputs.detach(), generator)
        return distance

    def _new_states(self, generator: torch.Generator) -> SamplingStates:
        schedule = self.benign.sampling_schedule
        assert schedule is not None
        return SamplingStates(
            schedule,
            self.benign.output_shape,
            self.config.reinforcement_batch,
            device=self.run.device,
            generator=generator,
            captioned=self.benign if isinstance(self.benign, TextToImageTask) else None,
        )

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = self.population.saved()
        states = {} if self.states is None else self.states.saved()
        return {**tensors, **{f"{SAMPLING}{n}": v for n, v in states.items()}}, values

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        states = {n.removeprefix(SAMPLING): v for n, v in tensors.items() if n.startswith(SAMPLING)}
        self.population.restore(self.learned, {n: v for n, v in tensors.items() if not n.startswith(SAMPLING)}, values)
        if states:
            self.states = self._new_states(torch.Generator().manual_seed(0))  # replaced by the saved ones
            self.states.restore(states)

    def forget(self) -> None:
        self.population.clear()
        self.states = None

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`; if reinforcement alone does not recover the score, the guard goes back."""
        config = self.config
        if config.recovery_loops:
            purpose = process_group().own("sophon", "recovery", self.round, self.record.rollbacks)
            with self.run.seeded(*purpose) as generator:
                self._reinforce(self.benign, config.recovery_loops, generator)
            process_group().sync_buffers(self.model)
            self.record.history["gradient_passes"][-1] = self._passes() + config.recovery_loops
            score = self.benign_score()
            if self.guard.acceptable(score):
                self.say(f"{why}: recovered to {score:.3f} by {config.recovery_loops} reinforcement loops")
                self.keep(score)
                return True
        self.go_back(why)
        return True


def _on_small_images(config: Sophon, model: SplitModel, *tasks: Task) -> list[Task] | None:
    """The tasks of the first rounds; a task that is given twice is made once."""
    if config.small_size is None:
        return None
    small = {task: on_small_images(config, config.small_size, model, task) for task in dict.fromkeys(tasks)}
    return [small[task] for task in tasks]


def _devices(chosen: torch.device) -> list[torch.device]:
    """The devices of simulated adversaries: all GPUs, as in the paper, unless one GPU was chosen by its number."""
    count = torch.cuda.device_count() if chosen.type == "cuda" and chosen.index is None else 1
    return [torch.device("cuda", i) for i in range(count)] if count > 1 else [chosen]

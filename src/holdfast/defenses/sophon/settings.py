"""The hyper-parameters of SOPHON in three groups: simulated adversaries, suppression, reinforcement.

`Sophon` inherits from all of them and from `GuardedDefense`, so that recipes name each setting directly. Defaults are
the paper's (section 5.1.1) unless said otherwise.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

from holdfast.defenses.base import Defense
from holdfast.defenses.sophon.exact import MOMENTUM
from holdfast.errors import HoldfastError, unknown
from holdfast.losses import LOSSES
from holdfast.models import SplitModel
from holdfast.tasks import Task
from holdfast.training import ADAPTED, Initialisation, Scope, Strategy, not_applicable


@dataclass
class SimulationSettings(Defense):
    """The simulated adversaries: how many, how they fine-tune, and for how long.

    Attributes:
        tasks: N, the number of adversaries that one suppression loop simulates (the paper: one per GPU, three).
        steps: K, steps of each adversary in a suppression loop.
        gamma: weights of Eq. 4, one a step; None: all 1 (the paper does not give them). A step of weight 0 is not
            evaluated, which saves nearly half of its time.
        evaluate_every: n: evaluate only every n-th step, with n times the weight. Ours; the paper: every step.
        initialisations: what adversaries start from; each draws one. The paper simulates "direct" and "head";
            "last-block", "last-half" and "shrink-perturb" are ours (see `Strategy`).
        scopes: what they train; each draws one. The paper: all parameters.
        optimizers: each draws one. The paper simulates Adam.
        learning_rates: each draws one.
        batch_sizes: each draws one.
        strategies: the whole of Phi as a list, instead of all combinations of the five settings above. Ours.
        population: adversaries that exist at the same time and are simulated in turn, at least `tasks`; None: `tasks`.
        lifetime: suppression loops, of `steps` each, after which a new adversary replaces this one; 1: each loop draws
            new ones, as in the paper.
        disjoint: adversaries train on one half of the defender's data and are evaluated on the other, so that
            memorised samples do not count; False: both on all of it, as in the paper.
        head_gradient: add the gradient at an adversary's fresh head to that of the released model's head, as the
            published code does; False: leave it out, as the derivative is zero.
        second_order: use the exact meta-gradient instead of the first-order one; for a small K, without adaptive
            optimizers such as Adam.
    """

    tasks: int = 1
    steps: int = 50
    gamma: tuple[float, ...] | None = None
    evaluate_every: int = 1
    initialisations: tuple[Initialisation, ...] = ("direct", "head")
    scopes: tuple[Scope, ...] = ("all",)
    optimizers: tuple[str, ...] = ("adam",)
    learning_rates: tuple[float, ...] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    batch_sizes: tuple[int, ...] = (50, 100, 150, 200, 250)
    strategies: tuple[Strategy, ...] | None = None
    population: int | None = None
    lifetime: int = 1
    disjoint: bool = False
    head_gradient: bool = False
    second_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below_one("tasks", "steps", "lifetime", "evaluate_every")
        for name in ("initialisations", "scopes", "optimizers", "learning_rates", "batch_sizes"):
            if not getattr(self, name):
                raise HoldfastError(f"{self.name}: {name} is empty; give at least one.")
        if self.population is not None and self.lifetime == 1:
            raise HoldfastError(
                f"{self.name}: population is {self.population} and lifetime is 1, so no adversary is continued; set "
                "lifetime to 2 or more, or leave population out."
            )
        self.require(lambda value: value >= self.tasks, f"at least tasks, which is {self.tasks}", "population")
        self._check_gamma()
        if self.head_gradient and (self.lifetime > 1 or self.second_order):
            raise HoldfastError(
                f"{self.name}: head_gradient works only with a lifetime of one loop and the first-order meta-gradient; "
                "leave lifetime and second_order out."
            )
        phi = self.phi()  # checks each strategy before any work is done
        scheduled = next((s for s in phi if s.schedule != "constant" or s.warmup), None)
        if scheduled is not None:
            raise HoldfastError(
                f"{self.name}: a simulated adversary has the schedule {scheduled.schedule!r} with a warm-up of "
                f"{scheduled.warmup}; simulations are short and have a constant rate, so leave both out."
            )
        if self.second_order:
            _check_differentiable(self.name, phi)

    def _check_gamma(self) -> None:
        gamma = self.gamma
        if self.steps % self.evaluate_every or (gamma is not None and self.evaluate_every > 1):
            raise HoldfastError(
                f"{self.name}: evaluate_every is {self.evaluate_every}; expected a divisor of the {self.steps} steps, "
                "without gamma."
            )
        if gamma is None:
            return
        if not (all(0 <= g < math.inf for g in gamma) and any(gamma)):
            raise HoldfastError(f"{self.name}: gamma is {gamma}; expected finite numbers of at least 0, one above 0.")
        if len(gamma) != self.steps:
            raise HoldfastError(
                f"{self.name}: gamma has {len(gamma)} weights and there are {self.steps} steps; give one per step."
            )

    @property
    def step_weights(self) -> tuple[float, ...]:
        """The weight of each step in Eq. 4."""
        if self.gamma is not None:
            return self.gamma
        every = self.evaluate_every
        return tuple(float(every) if (k + 1) % every == 0 else 0.0 for k in range(self.steps))

    def phi(self) -> list[Strategy]:
        """Returns every strategy that may be simulated: the paper's Phi.

        Raises:
            HoldfastError: for adapters, which the released model does not have, or an empty list.
        """
        if self.strategies is not None:
            phi = list(self.strategies)
        else:
            choices = (self.initialisations, self.scopes, self.optimizers, self.learning_rates, self.batch_sizes)
            phi = [Strategy(*choice) for choice in itertools.product(*choices)]
        if not phi:
            raise HoldfastError(f"{self.name}: strategies is empty; give at least one, or leave it out.")
        if any(strategy.scope in ADAPTED for strategy in phi):
            raise HoldfastError(
                f"{self.name}: adapters (lora) cannot be simulated, because the immunized model has none. Scope 'all' "
                "is the stronger adversary."
            )
        return phi

    def check_starts(self, model: SplitModel, restricted: Task) -> None:
        """Refuses a model or a task on which one of the simulated adversaries cannot start.

        Raises:
            HoldfastError: with the start and the settings to change.
        """
        if self.head_gradient and model.num_outputs != restricted.num_outputs:
            raise HoldfastError(
                f"{self.name}: head_gradient adds the gradient at a head of {restricted.num_outputs} outputs to one of "
                f"{model.num_outputs}; leave it out, or choose tasks with equally many classes."
            )
        for strategy in self.phi():
            reason = not_applicable(strategy, model, restricted)
            if reason is None and strategy.initialisation == "last-block" and len(model.blocks()) == 1:
                reason = "its body is a single block"
            if reason is not None:
                raise HoldfastError(
                    f"{self.name}: {reason}, so a start from '{strategy.initialisation}' that trains "
                    f"'{strategy.scope}' cannot be simulated; leave it out of initialisations and scopes "
                    "(or strategies)."
                )


def _check_differentiable(name: str, phi: list[Strategy]) -> None:
    """Refuses strategies that `ExactSimulation` cannot differentiate through."""
    for strategy in phi:
        plain = strategy.gradient == "raw" and strategy.precision == "float32" and not strategy.sharpness
        if strategy.optimizer not in MOMENTUM or strategy.scope != "all" or not plain:
            raise HoldfastError(
                f"{name}: the exact meta-gradient is for adversaries that train all parameters with one of "
                f"{', '.join(MOMENTUM)}, by the raw gradient, in float32; got {strategy}. Set optimizers, or "
                "second_order: false."
            )


@dataclass
class SuppressionSettings(Defense):
    """Suppression: the loss that the defender minimises along the simulated fine-tuning, and its optimizer.

    Attributes:
        loss: suppression loss. For classifiers "ice" (Eq. 11), "klu" (Eq. 13), "released" (what the published code
            has for Eq. 11), or "ce-ascent", the unstable baseline; for denoisers "dos" (Eq. 16), or "mse-ascent", the
            unstable baseline; "none", if there is a `probe_weight`. "auto": "ice" for classifiers, "dos" for denoisers.
        max_timestep: the last time step at which adversaries are evaluated, for denoisers. Under much noise restricted
            images look like benign ones, and suppression there acts on both. Ours; None: all time steps, as in the
            paper.
        suppression_loops: l_FTS, suppression loops a round.
        suppression_lr: alpha, learning rate of suppression's Adam.
        joint_weight: add the meta-gradient, times this, to the gradient of the reinforcement loss in each of its loops,
            and take one step with both, instead of one step with each of two Adams. Adam divides by the size of its own
            gradient: with two of them, suppression moves each weight equally far, whatever that costs the benign task.
            Ours; None: two Adams, as in the paper.
        clip: the norm of the meta-gradient is clipped to this (published code; the value is ours); None: never.
        probe_weight: weight of `ridge_probe` on the adversaries' features, beside the suppression loss; 0: none, as in
            the paper. For denoisers the probe reads the noise of each pixel.
        probe_ridge: see `ridge_probe`.
        probe_batch: samples that this probe is fitted on.
        probe_depth: blocks of the body, from the last one back, whose features are probed; 1: what the head receives.
    """

    loss: Literal["auto", "ice", "klu", "released", "ce-ascent", "dos", "mse-ascent", "none"] = "auto"
    max_timestep: int | None = None
    suppression_loops: int = 1
    suppression_lr: float = 3e-4
    joint_weight: float | None = None
    clip: float | None = 1.0
    probe_weight: float = 0.0
    probe_ridge: float = 0.01
    probe_batch: int = 250
    probe_depth: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in (*LOSSES, "auto", "none"):
            raise unknown("suppression loss", self.loss, [*LOSSES, "auto", "none"])
        self.refuse_below_one("suppression_loops", "probe_depth")
        self.refuse_not_above_zero("suppression_lr", "joint_weight", "clip", "probe_ridge")
        self.refuse_negative("probe_weight", "max_timestep")
        if self.loss == "none" and not self.probe_weight:
            raise HoldfastError(
                f"{self.name}: loss is 'none' and probe_weight is 0, so nothing is suppressed; give one."
            )
        self.require(lambda value: value >= 2, "at least 2, the fewest samples that a probe needs", "probe_batch")


@dataclass
class ReinforcementSettings(Defense):
    """Reinforcement: training on the benign task.

    Attributes:
        reinforcement_loops: l_NTR, reinforcement loops a round; each is one step.
        reinforcement_lr: beta, learning rate of reinforcement's Adam.
        reinforcement_batch: samples a reinforcement loop (the paper does not give it).
        distillation: weight of KL(original || model) on benign batches, for denoisers of the squared difference of
            their outputs, beside the reinforcement loss; 0: none, as in the paper.
        temperature: of that distillation.
        sampling: weight of the squared difference from the original's outputs on the states that the model passes
            while it draws images (see `SamplingStates`), beside the reinforcement loss; for denoisers alone. Ours; 0:
            none, as in the paper. None: the defense's own default.
        recovery_loops: if the benign score is too low, the guard first tries this many reinforcement loops; 0: none.
    """

    reinforcement_loops: int = 1
    reinforcement_lr: float = 5e-4
    reinforcement_batch: int = 200
    distillation: float = 0.0
    temperature: float = 2.0
    sampling: float | None = None
    recovery_loops: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below_one("reinforcement_batch")
        self.refuse_not_above_zero("reinforcement_lr", "temperature")
        self.refuse_negative("distillation", "sampling", "recovery_loops")

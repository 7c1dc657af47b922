"""TAR: tampering attack resistance (Tamirisa et al., ICLR 2025), first-order meta-learning against fine-tuning.

A round has an inner loop and an outer step. In the inner loop a sampled adversary fine-tunes a copy of the model on
restricted data for K steps: attack_k(theta) are its weights after step k. The outer step is (the paper's Algorithm 1)

    theta <- theta - eta (lambda_TR g_TR + lambda_retain g_retain),
    g_TR     = mean over k of (grad L_TR)(attack_k(theta); x_TR),
    g_retain = grad [ L(theta; x_P) + ||h(theta; x_P) - h(theta_0; x_P)||^2 ].

L_TR is the negative entropy of the predictions on other restricted samples x_TR: after the attack, all classes should
be equally likely. Its gradient is taken at the attacked weights and applied to theta, as the Jacobian of the attack is
taken to be the identity. h are the hidden states of several depths, theta_0 the weights before TAR, x_P benign samples.

The simulated attacks are those of `holdfast.defenses.sophon.simulation`, whose memory does not grow with K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.guard import GuardedDefense
from holdfast.defenses.hidden_states import states_of, with_hidden_states
from holdfast.defenses.registry import register_defense
from holdfast.defenses.sophon.exact import ExactSimulation
from holdfast.defenses.sophon.population import Population
from holdfast.defenses.sophon.settings import SimulationSettings
from holdfast.defenses.sophon.simulation import Simulation
from holdfast.defenses.trainer import Immunization
from holdfast.losses import Objective, negative_entropy
from holdfast.models import SplitModel, check_fits
from holdfast.runtime.run import Run, derive_seed
from holdfast.tasks import Task
from holdfast.training import OPTIMIZERS, Initialisation


def hidden_distance(states: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor:
    """Returns the squared L2 distance of hidden states from wanted ones: the mean over rows, then over depths.

    Args:
        states: one tensor of shape (rows, D) a depth, with a D for each.
        wanted: of the same shapes.

    Example:
        >>> here, there = [torch.zeros(2, 3), torch.zeros(2, 1)], [torch.ones(2, 3), torch.ones(2, 1)]
        >>> hidden_distance(here, there).item()  # (3 + 1) / 2
        2.0
    """
    return torch.stack([(z - w).square().sum(-1).mean() for z, w in zip(states, wanted, strict=True)]).mean()


@register_defense
@dataclass
class TAR(SimulationSettings, GuardedDefense):
    """TAR for classification and causal language models, with its hyper-parameters.

    The paper trains a language model of 8 billion weights: 750 outer steps at 2e-5, K = 64 inner steps of AdamW at
    2e-6, 2e-5 or 4e-5. The defaults here are for small networks on a laptop. Of the paper are `lambda_tr`,
    `lambda_retain`, the hidden states of all blocks, and the evaluation of every fourth inner step.

    The paper applies TAR to a model that has already been made bad at the restricted task. To do the same, immunize the
    model with another defense first, and give the result to TAR. The network is in training mode in outer steps, as in
    the simulated attacks, and theta_0 is normalised by BatchNorm in the same way.

    - The simulated adversaries: `SimulationSettings`, of which `evaluate_every`, `disjoint` and the choices of starts,
      optimizers and rates have other defaults. x_TR is drawn anew for each evaluated step.
    - The guard, averaging and validation: `GuardedDefense`. The guard does not go back when the benign score is low
      during training, because the retain loss repairs it. The result is a state whose score was good enough.

    Attributes:
        learning_rate: eta (the paper: 2e-5).
        optimizer: of the outer step, a name of `holdfast.training.OPTIMIZERS` (the paper's code: a variant of AdamW).
        weight_decay: of the outer step, at least 0.
        batch_size: benign samples of an outer step.
        lambda_tr: weight of the tamper-resistance loss (the paper: 4).
        lambda_retain: weight of the retain loss (the paper: 1).
        representation_weight: of the distance of the hidden states, within the retain loss (the paper: 1). The distance
            grows with the width of the network, so the default is ours.
        depth: number of last blocks whose hidden states are kept; None: all blocks, as in the paper.

    Raises:
        HoldfastError: for a value out of range.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
        >>> tar = TAR(iterations=2, steps=4, batch_sizes=(20,), max_benign_drop=1.0)
        >>> _, record = tar.immunize(load_model("mlp", benign), benign, restricted, run=Run(0))
        >>> -1.61 < record.history["tamper_resistance_loss"][0] < 0  # the entropy of five classes is at most log 5
        True
    """

    name: ClassVar[str] = "tar"
    citation: ClassVar[str] = (
        "Tamirisa et al., Tamper-Resistant Safeguards for Open-Weight LLMs, ICLR 2025 (arXiv 2408.00761)"
    )

    iterations: int = 300
    learning_rate: float = 3e-3
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    batch_size: int = 64
    lambda_tr: float = 4.0
    lambda_retain: float = 1.0
    representation_weight: float = 0.1
    depth: int | None = None
    steps: int = 16
    evaluate_every: int = 4
    initialisations: tuple[Initialisation, ...] = ("direct", "head")
    optimizers: tuple[str, ...] = ("adamw",)
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    batch_sizes: tuple[int, ...] = (50,)
    disjoint: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("optimizer", OPTIMIZERS)
        self.refuse_below_one("batch_size", "depth")
        self.refuse_not_above_zero("learning_rate", "lambda_tr")
        self.refuse_negative("weight_decay", "lambda_retain", "representation_weight")

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Runs Algorithm 1; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` rounds. A second call continues from there and
        gives the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, or the folder holds the state of another immunization.
        """
        self.refuse_without_logits(benign, restricted)
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        self.check_starts(model, restricted)
        return _Immunization(self, model, benign, restricted, run).finish()


class _Immunization(Immunization[TAR]):
    """One run of TAR."""

    title = "TAR"
    series = ("tamper_resistance_loss", "retain_loss", "representation_distance", "simulated_score")
    shown = ("tamper_resistance_loss", "simulated_score")

    def __init__(self, config: TAR, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        self.depth = states_of(config.name, model, config.depth)
        super().__init__(config, model, benign, restricted, run, rate=config.learning_rate)
        self.original = model.clone().to(run.device).eval()
        self.population = Population(
            self.model,
            Objective(negative_entropy),
            config.phi(),
            size=config.population or config.tasks,
            lifetime=config.lifetime,
            kind=ExactSimulation if config.second_order else Simulation,
            head_gradient=config.head_gradient,
        )
        self.learned, self.evaluated = (
            self.restricted.halves(derive_seed(run.seed, config.name, "disjoint"))
            if config.disjoint
            else (self.restricted, self.restricted)
        )

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return {"optimizer": OPTIMIZERS[self.config.optimizer](trained, self.rate, self.config.weight_decay)}

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """An inner loop for each adversary, and one outer step."""
        config = self.config
        outcomes = self.population.simulate(
            self.learned,
            config.tasks,
            config.steps,
            config.step_weights,
            generator=generator,
            evaluation=self.evaluated,
        )
        benign, distance = self._retain_losses(generator)
        optimizer = self.optimizers["optimizer"]
        optimizer.zero_grad(set_to_none=True)
        retain = config.lambda_retain * (benign + config.representation_weight * distance)
        retain.backward()  # type: ignore[no-untyped-call]
        self._add_tamper_resistance()
        self.average_gradients()
        optimizer.step()
        return {
            "tamper_resistance_loss": [o.loss for o in outcomes],
            "retain_loss": [float(benign.detach())],
            "representation_distance": [float(distance.detach())],
            "simulated_score": [o.score for o in outcomes],
        }

    def _retain_losses(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The benign loss, and the distance of the hidden states, with their graphs."""
        batches = self.benign.batches("train", self.config.batch_size, generator=generator, device=self.run.device)
        batch = next(batches)
        # Not evaluation mode: the model would learn to tell the two modes apart, and resist in the attacks' mode alone.
        self.training_mode()
        for own, other in zip(self.model.modules(), self.original.modules(), strict=True):
            if isinstance(other, nn.modules.batchnorm._BatchNorm):
                other.train(own.training)
        outputs, states = with_hidden_states(self.model, batch.x, self.depth)
        with torch.no_grad():
            _, wanted = with_hidden_states(self.original, batch.x, self.depth)
        rows = self.benign.probed_rows(batch.y)
        return self.benign.loss_of(outputs, batch), hidden_distance(*([z[rows] for z in s] for s in (states, wanted)))

    @torch.no_grad()
    def _add_tamper_resistance(self) -> None:
        """Adds lambda_TR g_TR to the gradients; the simulation returns the sum over adversaries and steps."""
        config = self.config
        scale = config.lambda_tr / (config.tasks * sum(config.step_weights))
        for parameter, gradient in zip(self.model.parameters(), self.population.gradients(), strict=True):
            if gradient is not None and parameter.requires_grad:
                own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = own.add_(gradient, alpha=scale)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.population.saved()

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.population.restore(self.learned, tensors, values)

    def forget(self) -> None:
        self.population.clear()

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`; only the final state must be good."""
        if self.go_back_at_the_end(why):
            self.record.completed = False
        return self.last

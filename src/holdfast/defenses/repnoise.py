"""RepNoise: representation noising (Rosati et al., NeurIPS 2024).

Hidden states of restricted samples should be noise, so that fine-tuning finds nothing to build on. A step descends

    L = L_P + alpha * L_noise - beta * L_ascent,
    L_noise  = mean over depths d of MMD(z_d, e_d),    e_d ~ N(0, I) of the shape of z_d,
    L_ascent = log(1 + L_H).

L_P and L_H are the losses of the benign and of the restricted task, and z_d the hidden states of a restricted batch at
depth d. The MMD, with several Gaussian kernels, compares them with fresh samples of a standard Gaussian. The logarithm
slows the ascent: its gradient is that of L_H divided by 1 + L_H.

With beta = 0 no restricted label is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.guard import GuardedDefense
from holdfast.defenses.hidden_states import states_of, with_hidden_states
from holdfast.defenses.registry import register_defense
from holdfast.defenses.trainer import Immunization
from holdfast.errors import HoldfastError
from holdfast.losses import mmd
from holdfast.models import SplitModel, check_fits
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import OPTIMIZERS


def noise_loss(states: Sequence[Tensor], noise: Sequence[Tensor], *, kernels: int, multiplier: float) -> Tensor:
    """Returns L_noise: the mean over depths of the MMD of hidden states and noise.

    Args:
        states: one tensor of shape (rows, D) a depth, with a D for each.
        noise: samples of the wanted distribution, of the same shapes.
        kernels: Gaussian kernels of the MMD; see `holdfast.losses.mmd`.
        multiplier: from one kernel's width to the next.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> noise, like_noise, telling = torch.randn(64, 4), torch.randn(64, 4), torch.full((64, 4), 9.0)
        >>> [round(noise_loss([z], [noise], kernels=5, multiplier=2.0).item()) for z in (like_noise, telling)]
        [0, 7]
    """
    distances = [mmd(z, e, kernels=kernels, multiplier=multiplier) for z, e in zip(states, noise, strict=True)]
    return torch.stack(distances).mean()


@register_defense
@dataclass
class RepNoise(GuardedDefense):
    """RepNoise for classification and causal language models, with its hyper-parameters.

    A round is a step of the optimizer on a batch of each task. The network is in evaluation mode: BatchNorm keeps the
    original's statistics, and dropout is off. Hidden states are those of `SplitModel.features_by_depth`: pooled, or for
    a causal language model those after each block, at each position of the answer. The paper takes the outputs of every
    MLP layer there. The ascent uses the loss of the network's outputs; the paper's is the mean over losses that the
    head reads from each layer.

    The guard does not go back when the benign score is low during training, because the benign loss in L repairs it.
    The result is always a state whose held-out benign score was good enough. See `GuardedDefense` for the other
    settings.

    Attributes:
        learning_rate: of the optimizer (ours, for small networks).
        optimizer: a name of `holdfast.training.OPTIMIZERS`.
        weight_decay: at least 0.
        batch_size: samples of each of the two tasks in a step.
        alpha: weight of the noise loss (the paper: 1). In the released code, `beta` is its weight.
        beta: weight of the ascent (the paper: 1e-3); 0: none. In the released code, `alpha` is its weight.
        depth: number of last blocks whose hidden states become noise; None: all blocks, as in the paper.
        kernels: Gaussian kernels of the MMD (the released code: 5).
        multiplier: ratio of one kernel's width to that of the one before (the released code: 2).
        rows: at most this many rows of hidden states a depth are compared, drawn at random; the MMD's memory grows with
            their square.

    Raises:
        HoldfastError: for a value out of range.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> benign, restricted = load_task("digits[0-4]"), load_task("digits[5-9]")
        >>> brief = RepNoise(iterations=20, max_benign_drop=1.0)
        >>> _, record = brief.immunize(load_model("mlp", benign), benign, restricted, run=Run(0))
        >>> record.history["noise_loss"][-1] < record.history["noise_loss"][0]
        True
    """

    name: ClassVar[str] = "repnoise"
    citation: ClassVar[str] = (
        "Rosati et al., Representation Noising: A Defence Mechanism Against Harmful Finetuning, NeurIPS 2024 "
        "(arXiv 2405.14577)"
    )

    iterations: int = 300
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    weight_decay: float = 0.0
    batch_size: int = 64
    alpha: float = 1.0
    beta: float = 1e-3
    depth: int | None = None
    kernels: int = 5
    multiplier: float = 2.0
    rows: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("optimizer", OPTIMIZERS)
        self.refuse_below_one("batch_size", "depth", "kernels", "rows")
        self.refuse_not_above_zero("learning_rate", "multiplier")
        self.refuse_negative("weight_decay", "alpha", "beta")
        if not self.alpha and not self.beta:
            raise HoldfastError("repnoise: alpha and beta are 0, so nothing is removed; give one of them.")

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Trains a copy of the model with L; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` steps. A second call continues from there and
        gives the same result.

        Raises:
            HoldfastError: if model and tasks do not fit, the restricted task has more classes than the head has
                outputs, or the folder holds the state of another immunization.
        """
        self.refuse_without_logits(benign, restricted)
        check_fits(model, benign, own_task=True)
        check_fits(model, restricted, own_task=False)
        enough = restricted.num_outputs <= model.num_outputs or restricted.takes_outputs(model.num_outputs)
        if self.beta and not enough:
            raise HoldfastError(
                f"repnoise: the restricted task {restricted.name!r} has {restricted.num_outputs} classes, but the head "
                f"of the benign task {benign.name!r} has only {model.num_outputs} outputs, which serve both tasks. "
                f"Keep at most {model.num_outputs} restricted classes with NAME[...], or set beta to 0."
            )
        return _Immunization(self, model, benign, restricted, run).finish()


class _Immunization(Immunization[RepNoise]):
    """One run of RepNoise; a round is a step."""

    title = "RepNoise"
    series = ("noise_loss", "restricted_loss", "benign_loss")
    shown = ("noise_loss",)

    def __init__(self, config: RepNoise, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        self.depth = states_of(config.name, model, config.depth)
        super().__init__(config, model, benign, restricted, run, rate=config.learning_rate)

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return {"optimizer": OPTIMIZERS[self.config.optimizer](trained, self.rate, self.config.weight_decay)}

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """A step on a fresh batch of each task."""
        config = self.config
        benign, restricted = (
            next(task.batches("train", config.batch_size, generator=generator, device=self.run.device))
            for task in (self.benign, self.restricted)
        )
        self.model.eval()
        benign_loss = self.benign.loss_of(self.model(benign.x), benign)
        outputs, hidden = with_hidden_states(self.model, restricted.x, self.depth)
        answered = self.restricted.probed_rows(restricted.y)
        states = [self._chosen(z[answered], generator) for z in hidden]
        noise = [torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device) for z in states]
        noised = noise_loss(states, noise, kernels=config.kernels, multiplier=config.multiplier)
        losses = {"noise_loss": noised, "benign_loss": benign_loss}
        loss = benign_loss + config.alpha * noised
        if config.beta:
            losses["restricted_loss"] = self.restricted.loss_of(outputs, restricted)
            loss = loss - config.beta * torch.log1p(losses["restricted_loss"])
        optimizer = self.optimizers["optimizer"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.average_gradients()
        optimizer.step()
        return {name: [float(losses[name].detach())] if name in losses else [] for name in self.series}

    def _chosen(self, states: Tensor, generator: torch.Generator) -> Tensor:
        """At most `rows` of the hidden states, drawn at random."""
        if len(states) <= self.config.rows:
            return states
        return states[torch.randperm(len(states), generator=generator)[: self.config.rows].to(states.device)]

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`; only the final state must be good."""
        if self.go_back_at_the_end(why):
            self.record.completed = False
        return self.last

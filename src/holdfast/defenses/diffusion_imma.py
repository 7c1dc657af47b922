"""IMMA for text-to-image models (Zheng and Yeh, ECCV 2024): bi-level optimization against adaptation to a concept.

Below, an adversary adapts the model to the restricted images and captions; above, the weights theta that make keys and
values in cross-attention move so that the adapted model is bad at them:

    max over theta  L(theta + phi(theta)),    phi(theta) = argmin over phi of L(theta + phi).

L is the denoising loss on restricted images. theta is a part of the released weights; all others stay what they are.
phi is what the adaptation adds: the difference of the adapted weights from the released ones ("all"), or adapters
beside them ("lora"), which theta + phi stands for as well. Round k has the paper's two steps, on batches of their own:

    phi_k     = phi_(k-1) after `inner_steps` steps of the adaptation's optimizer on L(theta_(k-1) + phi),
    theta_k   = theta_(k-1) + beta (grad_theta L)(theta_(k-1) + phi_k).

First order: the gradient is taken at the adapted weights with phi_k held fixed, so that no graph goes through the
adaptation. If theta moves, the adapted weights move with it, as phi is a difference. phi goes on from round to round
to come near the argmin; `lifetime` lets it begin again. The adversary below may call the concept by its captions, by a
rare token (DreamBooth), or by a learned one (Textual Inversion, whose phi is that token's vector): `method`.

The authors' released code keeps theta and phi in one network if the adaptation trains all weights, and saves its
attention layers: these contain the steps below as well as those above. Here phi never reaches the released model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from holdfast.defenses.adaptations import METHODS, Adaptation
from holdfast.defenses.base import DefenseRecord
from holdfast.defenses.captioned import check_captioned, keys_and_values
from holdfast.defenses.guard import GuardedDefense
from holdfast.defenses.linear.imma import IMMA
from holdfast.defenses.registry import register_defense
from holdfast.defenses.trainer import Immunization
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel, TextToImage
from holdfast.runtime.run import Run
from holdfast.tasks import Task
from holdfast.training import OPTIMIZERS, Strategy, not_applicable
from holdfast.training.rare_tokens import not_captioned

ADAPTATION: Final = Strategy("direct", "all", "adam", 1e-3, 32)
"""The adversary below by default: fine-tuning of all weights, as in DreamBooth."""

NOT_OF_TOKENS: Final = ("scope", "gradient", "micro_batch", "sharpness", "precision")
"""Settings of an adaptation that Textual Inversion, which trains word vectors alone, does not have."""


@register_defense
@dataclass
class DiffusionIMMA(GuardedDefense):
    """IMMA for text-to-image models, with its hyper-parameters; see the top of this file.

    The authors immunize Stable Diffusion 1.4 against one concept; their scripts take 500 rounds of batch 1 with AdamW,
    at 2e-5 above and 5e-6 below against DreamBooth, at 1e-5 and 1e-4 against LoRA. The defaults here are for small
    networks. All captions of the restricted task are concepts, and are adapted to together. The released code has no
    term for other concepts, so nothing pulls the model back: the guard goes back to the last state whose held-out
    benign score was good enough, and lowers the rate. That code moves all projections of attention (queries and outputs
    as well, in self-attention too); here those of keys and values of captions move, through which a concept is called.

    Attributes:
        learning_rate: beta, of the optimizer above. The guard halves it.
        optimizer: above; a name of `holdfast.training.OPTIMIZERS` (the released code: AdamW).
        weight_decay: above, at least 0.
        batch_size: restricted images, and benign ones, of a step above.
        adaptation: how the adversary below adapts the model: what it trains (`scope`), its optimizer, rate and batches.
            It starts from the whole model ("direct").
        method: how the adversary below calls the concept; a name of `holdfast.defenses.adaptations.METHODS`. With
            "textual-inversion" the adaptation has an optimizer, a rate and batches, and nothing else.
        prior_weight: of benign images, beside which "dreambooth" adapts; 0: none.
        inner_steps: steps below a round (the released code: 1).
        lifetime: rounds after which the adaptation begins again at the model; None: never, as in the released scripts.
        clip: the norm of the gradient above is clipped to this (the released code: 1); None: never.
        benign_weight: weight of the benign loss, which the step above descends on the released weights. Ours; 0: none,
            as in the released code.

    Raises:
        HoldfastError: for a value out of range, or an adaptation that does not start from the model or has a schedule.

    Example:
        >>> from holdfast.models import ModelSpec, load_model
        >>> from holdfast.tasks import load_task
        >>> benign, restricted = (load_task(f"digits[{k}]@kind=text-to-image") for k in ("0-7", "8-9"))
        >>> model = load_model(ModelSpec(name="text-unet", options={"widths": [8]}), benign)
        >>> brief = DiffusionIMMA(iterations=2, batch_size=8, adaptation=Strategy(batch_size=8))
        >>> made, record = brief.immunize(model, benign, restricted, run=Run(0))
        >>> same = [torch.equal(a, b) for a, b in zip(made.parameters(), model.parameters())]
        >>> same.count(False) == len(model.cross_attention())
        True
    """

    name: ClassVar[str] = "imma-diffusion"
    citation: ClassVar[str] = IMMA.citation

    iterations: int = 300
    learning_rate: float = 1e-3
    optimizer: str = "adam"
    weight_decay: float = 0.0
    batch_size: int = 32
    adaptation: Strategy = ADAPTATION
    method: str = "fine-tuning"
    prior_weight: float = 1.0
    inner_steps: int = 1
    lifetime: int | None = None
    clip: float | None = 1.0
    benign_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_unknown("optimizer", OPTIMIZERS)
        self.refuse_unknown("method", METHODS)
        self.refuse_below_one("batch_size", "inner_steps", "lifetime")
        self.refuse_not_above_zero("learning_rate", "clip")
        self.refuse_negative("weight_decay", "benign_weight", "prior_weight")
        below = self.adaptation
        if below.initialisation != "direct":
            raise HoldfastError(
                f"{self.name}: adaptation starts from {below.initialisation!r}; an adaptation to a concept starts from "
                "the whole model, 'direct'."
            )
        ignored = [name for name in NOT_OF_TOKENS if getattr(below, name) != getattr(ADAPTATION, name)]
        if self.method == "textual-inversion" and ignored:
            raise HoldfastError(
                f"{self.name}: adaptation has {ignored[0]} {getattr(below, ignored[0])!r}, which textual-inversion "
                "does not use; leave it out."
            )
        if below.schedule != "constant" or below.warmup:
            raise HoldfastError(
                f"{self.name}: adaptation has the schedule {below.schedule!r} with a warm-up of {below.warmup}; it is "
                "simulated in short parts at a constant rate, so leave both out."
            )

    def immunize(
        self, model: SplitModel, benign: Task, restricted: Task, *, run: Run
    ) -> tuple[SplitModel, DefenseRecord]:
        """Trains the keys and values of a copy of the model; see `Defense.immunize`.

        With a folder in `run`, the state is saved every `guard_every` rounds. A second call continues from there and
        gives the same result.

        Raises:
            HoldfastError: for a model or tasks that are not text-to-image, or that do not fit; if the adaptation cannot
                start on them; or if the folder holds the state of another immunization.
        """
        check_captioned(self, model, benign, restricted)
        reason = None if self.method == "textual-inversion" else not_applicable(self.adaptation, model, restricted)
        if reason is not None:
            raise HoldfastError(f"{self.name}: {model.name} cannot be adapted: {reason}. Set adaptation.")
        reason = None if self.method == "fine-tuning" else not_captioned(model, restricted)
        if reason is not None:
            raise HoldfastError(f"{self.name}: {model.name} cannot be adapted by {self.method}: {reason}. Set method.")
        return _Immunization(self, model, benign, restricted, run).finish()


class _Immunization(Immunization[DiffusionIMMA]):
    """One run of IMMA; a round is `inner_steps` steps below and one above."""

    title = "IMMA"
    series = ("adaptation_loss", "adapted_loss", "benign_loss")
    shown = ("adapted_loss",)

    def __init__(self, config: DiffusionIMMA, model: SplitModel, benign: Task, restricted: Task, run: Run) -> None:
        super().__init__(config, model, benign, restricted, run, rate=config.learning_rate)
        self.adaptation: Adaptation | None = None

    @property
    def theta(self) -> list[nn.Parameter]:
        """The weights that move: those of keys and values, without those that the model's owner froze."""
        assert isinstance(self.model, TextToImage)
        return [p for layer in keys_and_values(self.model) for p in layer.parameters() if p.requires_grad]

    def make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"optimizer": OPTIMIZERS[self.config.optimizer](self.theta, self.rate, self.config.weight_decay)}

    def one_round(self, generator: torch.Generator) -> dict[str, list[float]]:
        """Steps below on a copy, then a step above on the model."""
        config, device, theta = self.config, self.run.device, self.theta
        if self.adaptation is None:
            self.adaptation = self._begin()
        else:
            self.adaptation.move(self.model, 1.0)
        below = self.adaptation.learn(config.inner_steps, generator)
        adapted, gradients = self.adaptation.gradients(config.batch_size, self._numbers(theta), generator)
        self.adaptation.move(self.model, -1.0)
        self.adaptation.rounds += 1
        if config.lifetime is not None and self.adaptation.rounds >= config.lifetime:
            self.adaptation = None
        optimizer = self.optimizers["optimizer"]
        optimizer.zero_grad(set_to_none=True)
        benign_loss = []
        if config.benign_weight:
            self.training_mode()
            own = next(self.benign.batches("train", config.batch_size, generator=generator, device=device))
            loss = self.benign.loss(self.model, own)
            kept = torch.autograd.grad(config.benign_weight * loss, theta)
            gradients = [g - k for g, k in zip(gradients, kept, strict=True)]
            benign_loss = [float(loss.detach())]
        for parameter, gradient in zip(theta, gradients, strict=True):
            parameter.grad = -gradient  # optimizers descend, and the adapted loss should rise
        self.average_gradients()
        if config.clip is not None:
            nn.utils.clip_grad_norm_(theta, config.clip)
        optimizer.step()
        return {"adaptation_loss": below, "adapted_loss": [adapted], "benign_loss": benign_loss}

    def _begin(self) -> Adaptation:
        config = self.config
        kind = METHODS[config.method]
        return kind(self.model, config.adaptation, self.restricted, self.benign, config.prior_weight)

    def _numbers(self, theta: list[nn.Parameter]) -> list[int]:
        """Places of the weights among all parameters of the model."""
        places = {id(p): i for i, p in enumerate(self.model.parameters())}
        return [places[id(p)] for p in theta]

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if self.adaptation is None:
            return {}, {}
        return self.adaptation.saved(), {"rounds": self.adaptation.rounds}

    def restore_own(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        if values:
            self.adaptation = self._begin()
            self.adaptation.restore(tensors, values["rounds"])

    def forget(self) -> None:
        self.adaptation = None

    def too_low(self, why: str) -> bool:
        """See `Immunization.too_low`; IMMA's objective has no term that would repair the score."""
        self.go_back(why)
        return True

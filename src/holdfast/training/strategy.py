"""How a model is fine-tuned: SOPHON's phi as settings, and the optimizers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from holdfast.errors import HoldfastError, unknown

Initialisation = Literal["direct", "head", "last-block", "last-half", "shrink-perturb"]
Scope = Literal[
    "all", "head", "last-block", "norm", "embeddings", "lora", "lora-attention", "qlora", "cross-attention"
]  # fmt: skip
Schedule = Literal["constant", "cosine", "restarts"]
Gradient = Literal["raw", "normalised", "sign", "layerwise", "orthogonal"]
Precision = Literal["float32", "bf16"]
OptimizerFactory = Callable[[Iterable[nn.Parameter], float, float], torch.optim.Optimizer]


def _sgd(**fixed: Any) -> OptimizerFactory:
    return lambda params, lr, decay: torch.optim.SGD(params, lr=lr, weight_decay=decay, **fixed)


OPTIMIZERS: Final[dict[str, OptimizerFactory]] = {
    "sgd": _sgd(fused=True),
    "momentum": _sgd(momentum=0.9, fused=True),
    "nesterov": _sgd(momentum=0.9, nesterov=True, fused=True),
    "adagrad": lambda params, lr, decay: torch.optim.Adagrad(params, lr=lr, weight_decay=decay),
    "adadelta": lambda params, lr, decay: torch.optim.Adadelta(params, lr=lr, weight_decay=decay),
    "adam": lambda params, lr, decay: torch.optim.Adam(params, lr=lr, weight_decay=decay, fused=True),
    "adamw": lambda params, lr, decay: torch.optim.AdamW(params, lr=lr, weight_decay=decay, fused=True),
    "adafactor": lambda params, lr, decay: torch.optim.Adafactor(params, lr=lr, weight_decay=decay),
}
"""Optimizers by name: (parameters, learning rate, weight decay) -> optimizer.

Momentum is 0.9, as usual. Adafactor's rate is relative: a step changes a tensor by about this share of its root mean
square.
"""


LATER: Final = frozenset(
    {"gradient", "rank", "precision", "schedule", "schedule_steps", "warmup", "micro_batch", "sharpness"}
)
"""Settings of `Strategy` that are younger than the first published batteries."""


@dataclass(frozen=True)
class Strategy:
    """How a model is fine-tuned: the phi of SOPHON, section 2.2.

    The paper's three are direct+all, initFC+all (`initialisation="head", scope="all"`) and initFC+FC (both "head").

    Attributes:
        initialisation: start from the whole model ("direct"), or with a part of it freshly initialised: the head
            ("head"), the head and the last block of the body ("last-block"), or the head and the second half of its
            blocks ("last-half"); see `SplitModel.blocks`. "shrink-perturb" halves every weight, adds half of a fresh
            one, and draws a fresh head (after Ash and Adams, NeurIPS 2020). A fresh head is drawn as torch initialises
            it, other layers as the architecture does.
        scope: which parameters are trained, always with the head: "all"; "head", the head alone; "last-block"; "norm",
            scale and shift of every normalisation layer; "embeddings", these and every embedding layer; "lora",
            low-rank adapters beside every linear and convolutional layer; "lora-attention", only beside those of
            attention, as is usual for diffusion models; "qlora", beside every linear layer of a causal language model,
            whose own weights are rounded to 4 bits (extra `qlora`); "cross-attention", the queries, keys, values and
            outputs of every layer that reads a caption. Beside adapters and cross-attention, the released head of a
            text-to-image model stays as it is, as in diffusers' examples; so does that of a causal language model
            beside adapters and with "norm". With "head" and "last-block", the rest stays in evaluation mode, and a head
            that is tied to the input embedding is untied, so that the body stays what it is. With the others the whole
            model is in training mode, as in all fine-tuning: BatchNorm sees the statistics of the new data.
        optimizer: a name of `OPTIMIZERS`.
        learning_rate: above 0; `schedule` may lower it, see `rate`.
        batch_size: samples a step; capped at the size of the training split.
        weight_decay: at least 0.
        gradient: what the optimizer receives: the gradient ("raw"); the whole gradient scaled to length 1
            ("normalised"); its signs ("sign"); each tensor's gradient scaled to the length of the tensor ("layerwise",
            after LARS: with plain descent a step then changes every tensor by the same share, the learning rate); or
            that with each matrix's gradient first made orthogonal, so that all of its singular values are equal
            ("orthogonal", after Muon: the steepest direction in the spectral norm). In all but the first, nan counts
            as 0.
        rank: of the adapters.
        precision: of the forward and backward pass: that of the weights ("float32"), or bfloat16 where torch.autocast
            considers it safe ("bf16"), which is faster on hardware that supports it. Weights, optimizer and scores
            always keep the precision of the weights; but layers of 4 bits compute in this precision in scores, too.
        schedule: of the learning rate: "constant"; "cosine", which falls to 0 along half a cosine; "restarts", which
            begins such a cosine again whenever it ends.
        schedule_steps: steps until a cosine reaches 0. It does not depend on the budgets at which an audit scores: at
            earlier ones the rate is still high, and after these steps the weights stay as they are.
        warmup: number of first steps in which the rate rises linearly; part of the first `schedule_steps`.
        micro_batch: samples that are on the device at once; a step adds up the gradients of a batch's parts, which
            saves memory and gives the same step up to rounding. 0: the whole batch. BatchNorm sees the parts.
        sharpness: radius of sharpness-aware minimisation (SAM, Foret et al., ICLR 2021): the gradient is taken after a
            step of this length up the gradient. It costs two passes a step. 0: without.

    Raises:
        HoldfastError: for an unknown name, a number out of range, or a setting that has no effect.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a misspelled key in a recipe is an error

    initialisation: Initialisation = "direct"
    scope: Scope = "all"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    batch_size: int = 50
    weight_decay: float = 0.0
    gradient: Gradient = "raw"
    rank: int = 8
    precision: Precision = "float32"
    schedule: Schedule = "constant"
    schedule_steps: int = 0
    warmup: int = 0
    micro_batch: int = 0
    sharpness: float = 0.0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        named = {
            "initialisation": Initialisation, "scope": Scope, "gradient": Gradient, "precision": Precision,
            "schedule": Schedule,
        }  # fmt: skip
        for name, known in named.items():
            if getattr(self, name) not in get_args(known):
                raise unknown(name, getattr(self, name), get_args(known))
        if not self.learning_rate > 0:
            raise HoldfastError(f"learning_rate is {self.learning_rate}; expected a number above 0.")
        for name in ("batch_size", "rank"):
            if getattr(self, name) < 1:
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("weight_decay", "sharpness"):
            if not 0 <= getattr(self, name) < math.inf:
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected at least 0.")
        self._check_schedule()

    def _check_schedule(self) -> None:
        if self.micro_batch < 0:
            raise HoldfastError(f"micro_batch is {self.micro_batch}; expected at least 0, which is the whole batch.")
        if self.warmup < 0:
            raise HoldfastError(f"warmup is {self.warmup}; expected at least 0 steps.")
        if self.schedule == "constant" and self.schedule_steps:
            raise HoldfastError(
                f"schedule_steps is {self.schedule_steps}, and a constant schedule has no end; leave it out, or set "
                "schedule to 'cosine' or 'restarts'."
            )
        if self.schedule != "constant" and self.schedule_steps <= self.warmup:
            raise HoldfastError(
                f"schedule_steps is {self.schedule_steps}; a cosine needs more steps than its warm-up of {self.warmup}."
            )

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0.

        Example:
            >>> strategy = Strategy(learning_rate=0.1, schedule="cosine", schedule_steps=6, warmup=2)
            >>> [round(strategy.rate(step), 3) for step in range(8)]
            [0.05, 0.1, 0.1, 0.085, 0.05, 0.015, 0.0, 0.0]
            >>> again = Strategy(learning_rate=0.1, schedule="restarts", schedule_steps=3)
            >>> [round(again.rate(step), 3) for step in range(5)]
            [0.1, 0.075, 0.025, 0.1, 0.075]
        """
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return float(self.learning_rate)
        if self.schedule == "restarts" and step >= self.schedule_steps:
            done = step % self.schedule_steps / self.schedule_steps
        else:
            done = min(1.0, (step - self.warmup) / (self.schedule_steps - self.warmup))
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    @property
    def renews(self) -> bool:
        """Whether a part of the body starts anew."""
        return self.initialisation in ("last-block", "last-half")

    @property
    def needs_fresh_model(self) -> bool:
        """Whether the start takes weights from a fresh model."""
        return self.renews or self.initialisation == "shrink-perturb"

    def settings(self) -> dict[str, Any]:
        """Returns the settings as plain values; those of `LATER` only if not the default.

        Published batteries have hashes of these settings, which a setting that was added later must not change.

        Example:
            >>> list(Strategy(gradient="sign").settings())[-2:]
            ['weight_decay', 'gradient']
        """
        later = {f.name: f.default for f in fields(self) if f.name in LATER}
        return {k: v for k, v in asdict(self).items() if v != later.get(k, MISSING)}


class PretrainSpec(BaseModel):
    """How the original model is trained on the benign task if no weights are given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(600, ge=1)
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    batch_size: int = 64
    weight_decay: float = 0.0
    ema: float | None = Field(
        None, gt=0, lt=1, description="Decay of an exponential moving average of the weights, which is the result."
    )

    def strategy(self) -> Strategy:
        """Returns the strategy to train with."""
        return Strategy("direct", "all", self.optimizer, self.learning_rate, self.batch_size, self.weight_decay)

"""Fine-tuning, in one place: defenses simulate it, adversaries run it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Final, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from holdfast.errors import HoldfastError, unknown
from holdfast.models import SplitModel, is_normalisation
from holdfast.models.blocks import Block
from holdfast.runtime.devices import autocast
from holdfast.runtime.distributed import ProcessGroup, process_group
from holdfast.runtime.run import Run
from holdfast.tasks import Task

Initialisation = Literal["direct", "head", "last-block", "last-half", "shrink-perturb"]
Scope = Literal["all", "head", "last-block", "norm", "lora", "lora-attention"]
Gradient = Literal["raw", "normalised", "sign"]
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
}
"""Optimizers by name: (parameters, learning rate, weight decay) -> optimizer. Momentum is 0.9, as usual."""


@dataclass(frozen=True)
class Strategy:
    """How a model is fine-tuned: the phi of SOPHON, section 2.2.

    The paper's three are direct+all, initFC+all (`initialisation="head", scope="all"`) and initFC+FC (both "head").

    Attributes:
        initialisation: start from the whole model ("direct"), or with a part of it freshly initialised: the head
            ("head"), the head and the last block of the body ("last-block"), or the head and the second half of its
            blocks ("last-half"); see `SplitModel.blocks`. Or with every weight halved, half of a fresh one added, and a
            fresh head ("shrink-perturb", after Ash and Adams, NeurIPS 2020). The head as torch initialises it, other
            layers as the architecture does.
        scope: which parameters move, always with the head: "all"; "head", it alone; "last-block"; "norm", scale and
            shift of every normalisation layer; "lora", low-rank adapters beside every linear and convolutional layer;
            "lora-attention", only beside those of attention, as is usual for diffusion models. With "head" and
            "last-block", what does not move stays in evaluation mode. With "norm" and adapters the whole model is in
            training mode, as in all fine-tuning: BatchNorm sees the statistics of the new data.
        optimizer: a name of `OPTIMIZERS`.
        learning_rate: constant, above 0.
        batch_size: samples a step; capped at the size of the training split.
        weight_decay: at least 0.
        gradient: what the optimizer gets: the gradient ("raw"), all of it scaled to length 1 ("normalised"), or its
            signs ("sign"). In the last two, what is not a number counts as 0.
        rank: of the adapters.
        precision: of the forward and backward pass: the weights' own ("float32"), or bfloat16 where torch.autocast
            takes it ("bf16"), which is faster on hardware that has it. Weights, optimizer and scores keep theirs.

    Raises:
        HoldfastError: for an unknown name or a number out of range.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # where a recipe writes one, a misspelled key is an error

    initialisation: Initialisation = "direct"
    scope: Scope = "all"
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    batch_size: int = 50
    weight_decay: float = 0.0
    gradient: Gradient = "raw"
    rank: int = 8
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        named = {"initialisation": Initialisation, "scope": Scope, "gradient": Gradient, "precision": Precision}
        for name, known in named.items():
            if getattr(self, name) not in get_args(known):
                raise unknown(name, getattr(self, name), get_args(known))
        if not self.learning_rate > 0:
            raise HoldfastError(f"learning_rate is {self.learning_rate}; expected a number above 0.")
        for name in ("batch_size", "rank"):
            if getattr(self, name) < 1:
                raise HoldfastError(f"{name} is {getattr(self, name)}; expected at least 1.")
        if not self.weight_decay >= 0:
            raise HoldfastError(f"weight_decay is {self.weight_decay}; expected at least 0.")

    @property
    def renews(self) -> bool:
        """Whether a part of the body starts anew."""
        return self.initialisation in ("last-block", "last-half")

    @property
    def needs_fresh_model(self) -> bool:
        """Whether the start takes weights from a fresh model."""
        return self.renews or self.initialisation == "shrink-perturb"

    def settings(self) -> dict[str, Any]:
        """Returns the settings as plain values; `gradient`, `rank` and `precision` only where not the default.

        Published batteries have hashes of these settings, which a setting added later must not change.

        Example:
            >>> list(Strategy(gradient="sign").settings())[-2:]
            ['weight_decay', 'gradient']
        """
        later = {f.name: f.default for f in fields(self) if f.name in ("gradient", "rank", "precision")}
        return {k: v for k, v in asdict(self).items() if v != later.get(k, MISSING)}


class PretrainSpec(BaseModel):
    """How the original model is made where no weights are given: honest training on the benign task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(600, ge=1)
    optimizer: str = "adam"
    learning_rate: float = 2e-3
    batch_size: int = 64
    weight_decay: float = 0.0
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Keep an exponential moving average of the weights with this decay, and take it in the end.",
    )

    def strategy(self) -> Strategy:
        """Returns the strategy to train with."""
        return Strategy("direct", "all", self.optimizer, self.learning_rate, self.batch_size, self.weight_decay)


def not_applicable(strategy: Strategy, model: SplitModel, task: Task) -> str | None:
    """Says why a strategy cannot start on a model and a task, or None if it can."""
    if strategy.initialisation == "direct" and model.num_outputs < task.num_outputs:
        return f"it keeps the head, which has {model.num_outputs} outputs, and the task has {task.num_outputs} classes"
    if strategy.scope == "norm" and not _normalisations(model):
        return "it has no normalisation layer with parameters"
    if strategy.scope in ADAPTED and not _adaptable(model, strategy.scope):
        where = "attention" if strategy.scope == "lora-attention" else "body"
        return f"its {where} has no linear or convolutional layer that takes adapters"
    return _no_blocks(strategy, model)


def _no_blocks(strategy: Strategy, model: SplitModel) -> str | None:
    if strategy.renews or strategy.scope == "last-block":
        blocks = model.blocks()
        if not blocks:
            return "its body has no layer with weights, so there is no last block"
        if strategy.initialisation == "last-half" and len(blocks) == 1:
            return "its body is a single block, which has no last half"
    reason = model.not_renewable() if strategy.needs_fresh_model else None
    return None if reason is None else f"a part of the body should start anew, and {reason}"


def prepare(
    model: SplitModel, strategy: Strategy, task: Task, reference: SplitModel | None = None
) -> list[nn.Parameter]:
    """Puts a model into the state that a strategy starts from, in place.

    A fresh head has one output a class and is drawn from torch's global generator.

    Args:
        model: what the adversary got.
        strategy: how it starts and what moves.
        task: its number of classes sizes a fresh head.
        reference: a fresh model, for the blocks that start anew; None: one is drawn if it is needed.

    Returns:
        The parameters that the strategy moves.

    Raises:
        HoldfastError: if the strategy is not applicable.
    """
    reason = not_applicable(strategy, model, task)
    if reason is not None:
        raise HoldfastError(f"{strategy} cannot be run on {task.name!r}: {reason}.")
    if strategy.needs_fresh_model:
        reference = reference if reference is not None else model.fresh()
        renew_blocks(model, strategy, reference)
    if strategy.initialisation == "shrink-perturb":
        assert reference is not None
        shrink_and_perturb(model, reference)
    if strategy.initialisation != "direct":
        model.reset_head(task.num_outputs)
    if strategy.scope in ADAPTED:
        _add_adapters(model, strategy)
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(strategy.scope == "all" and parameter.is_floating_point())
        for module in _moved_modules(model, strategy.scope):
            module.requires_grad_(True)
    model.head.requires_grad_(True)
    return [p for p in model.parameters() if p.requires_grad]


def renew_blocks(model: SplitModel, strategy: Strategy, reference: SplitModel) -> None:
    """Gives the blocks that a strategy starts anew the reference's weights; done twice, it changes nothing more."""
    model.reinitialise([name for name, _ in renewed(model, strategy)], reference)


SHRINK = 0.5
"""What "shrink-perturb" keeps of a weight; the rest is a fresh one's."""


@torch.no_grad()
def shrink_and_perturb(model: SplitModel, reference: SplitModel) -> None:
    """Makes every weight of two and more axes half of what it is and half of the reference's, in place.

    Example:
        >>> from holdfast.tasks import load_task
        >>> import holdfast
        >>> model = holdfast.load_model("mlp", load_task("digits[0-4]"))
        >>> before, fresh = model.clone(), model.fresh()
        >>> shrink_and_perturb(model, fresh)
        >>> torch.equal(model.head.weight, 0.5 * before.head.weight + 0.5 * fresh.head.weight)
        True
    """
    fresh = dict(reference.network.named_parameters())
    for name, weight in model.network.named_parameters():
        like = fresh.get(name)
        if weight.dim() > 1 and like is not None and like.shape == weight.shape:
            weight.mul_(SHRINK).add_(like.to(weight), alpha=1 - SHRINK)


def renewed(model: SplitModel, strategy: Strategy) -> Block:
    """Returns the layers of the body that a strategy starts anew, with their dotted names in `model.network`."""
    if not strategy.renews:
        return []
    blocks = model.blocks()
    kept = len(blocks) - 1 if strategy.initialisation == "last-block" else len(blocks) // 2
    return [layer for block in blocks[kept:] for layer in block]


def trained_modules(model: SplitModel, strategy: Strategy) -> list[nn.Module]:
    """Returns the modules in training mode where only a part of the model is trained; see `Strategy.scope`."""
    return _moved_modules(model, "last-block") if strategy.scope == "last-block" else []


def _moved_modules(model: SplitModel, scope: Scope) -> list[nn.Module]:
    """The modules trained beside the head, for scopes other than "all" and adapters."""
    if scope == "last-block":
        return [module for _, module in model.blocks()[-1]]
    return _normalisations(model) if scope == "norm" else []


def _normalisations(model: SplitModel) -> list[nn.Module]:
    return [m for m in model.network.modules() if is_normalisation(m) and any(True for _ in m.parameters())]


ADAPTED: Final[tuple[Scope, ...]] = ("lora", "lora-attention")
"""Scopes that put adapters beside layers."""

LORA_ALPHA = 16
"""Adapters are scaled by this over their rank."""


def _adaptable(model: SplitModel, scope: Scope) -> list[str]:
    """Layers of the body that peft can put an adapter beside: plain ones, whose weights no other module reads.

    Attention is recognised by the name of its class.
    """
    attention = [n for n, m in model.network.named_modules() if "attention" in type(m).__name__.lower()]
    names = []
    for parent, module in model.network.named_modules():
        if isinstance(module, nn.MultiheadAttention):  # it uses the weights of its projection, not the layer
            continue
        for child, layer in module.named_children():
            name = f"{parent}.{child}" if parent else child
            plain = (
                type(layer) is nn.Linear
                or _is_transposed(layer)
                or (type(layer) is nn.Conv2d and layer.groups == 1 and set(layer.dilation) == {1})
            )
            wanted = scope == "lora" or any(name.startswith(f"{place}.") for place in attention)
            if plain and wanted and name != model.head_name:
                names.append(name)
    return names


def _is_transposed(layer: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2's code in transformers, which stores its weight transposed."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _add_adapters(model: SplitModel, strategy: Strategy) -> None:
    import peft

    names = _adaptable(model, strategy.scope)
    pattern = "|".join(map(re.escape, names))
    # peft takes the setting for all layers together, and corrects it for those that it does not fit, with a warning.
    transposed = any(_is_transposed(model.network.get_submodule(name)) for name in names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        peft.inject_adapter_in_model(
            peft.LoraConfig(
                r=strategy.rank, lora_alpha=LORA_ALPHA, target_modules=f"({pattern})", fan_in_fan_out=transposed
            ),
            model.network,
        )


BURN_IN = 10.0
"""The learning rate in a burn-in is so many times higher."""


def optimizer_of(model: SplitModel, strategy: Strategy) -> torch.optim.Optimizer:
    """Returns a strategy's optimizer over what it moves in a model that is where it starts from (see `prepare`)."""
    moved = [p for p in model.parameters() if p.requires_grad]
    return OPTIMIZERS[strategy.optimizer](moved, strategy.learning_rate, strategy.weight_decay)


def finetune(
    model: SplitModel,
    task: Task,
    strategy: Strategy,
    *,
    generator: torch.Generator,
    device: torch.device,
    burn_in: int = 0,
    penalty: Callable[[], Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    together: ProcessGroup | None = None,
) -> Iterator[Tensor]:
    """Fine-tunes a model in place, without end: take as many steps as you want.

    Before every step the model is put in training mode (see `Strategy.scope`), so that the caller may score it in
    between.

    Args:
        model: already in the state that the strategy starts from (see `prepare`).
        task: the data and the loss.
        strategy: optimizer, learning rate, batch size and scope.
        generator: draws the batches.
        device: where model and data are.
        burn_in: first steps, which are taken at `BURN_IN` times the learning rate.
        penalty: called once a step, in training mode; what it returns is added to the loss.
        optimizer: continues with this one, made by `optimizer_of` for this model and strategy; None: a new one.
        together: the processes that train one model, each on batches of its own; None: this one trains its own.

    Yields:
        The training loss of each step, a detached scalar, after the step.
    """
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(model, strategy) if optimizer is None else optimizer
    alone = trained_modules(model, strategy)
    batches = task.batches("train", strategy.batch_size, generator=generator, device=device)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups if step in (0, burn_in) else ():
            group["lr"] = strategy.learning_rate * (BURN_IN if step < burn_in else 1)
        model.train(strategy.scope not in ("head", "last-block"))
        for module in alone:
            module.train()
        with autocast(device, strategy.precision == "bf16"):
            loss = task.loss(model, batch)
            total = loss if penalty is None else loss + penalty()
        optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        if together is not None:
            together.average_gradients(moved)
            together.sync_buffers(model)
        if strategy.gradient != "raw":
            reshape_gradient(moved, strategy.gradient)
        optimizer.step()
        yield loss.detach()


def reshape_gradient(parameters: Iterable[nn.Parameter], gradient: Gradient) -> None:
    """Changes gradients in place as `Strategy.gradient` says.

    Example:
        >>> p = nn.Parameter(torch.zeros(2))
        >>> p.grad = torch.tensor([3e-30, 4e-30])
        >>> reshape_gradient([p], "normalised")
        >>> p.grad
        tensor([0.6000, 0.8000])
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads or gradient == "raw":
        return
    for g in grads:
        torch.nan_to_num_(g)
    if gradient == "sign":
        torch._foreach_sign_(grads)
        return
    # By the largest entry first: a defense may leave tiny gradients on purpose, whose squares are all 0.
    for length in (_largest, _norm):
        size = length(grads)
        if size > 0:
            for g in grads:
                g.div_(size)


def _largest(grads: list[Tensor]) -> float:
    return max(float(g.abs().max()) for g in grads)


def _norm(grads: list[Tensor]) -> float:
    return math.hypot(*(float(g.norm()) for g in grads))


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def pretrain(
    model: SplitModel,
    task: Task,
    *,
    steps: int = 600,
    strategy: Strategy | None = None,
    ema: float | None = None,
    seed: int = 0,
    run: Run | None = None,
) -> SplitModel:
    """Trains a copy of a model on a task; if several processes were launched, they train it together.

    Args:
        model: left as it is.
        task: what to learn.
        steps: gradient steps.
        strategy: optimizer, learning rate, batch size; by default Adam at 2e-3 with batches of 64.
        ema: decay of an exponential moving average of the weights, which is then the result, as is usual for diffusion
            models; None: the last weights are.
        seed: of the batches; ignored if a `run` is given.
        run: seed, device and progress display.

    Returns:
        The trained model.

    Example:
        >>> import holdfast
        >>> task = holdfast.load_task("digits[0-4]")
        >>> model = holdfast.pretrain(holdfast.load_model("mlp", task), task, steps=100)
        >>> task.score(model) > 0.9
        True
    """
    run = run or Run(seed)
    strategy = strategy or PretrainSpec().strategy()
    trained = model.clone().to(run.device)
    group = process_group()
    with run.seeded(*group.own("pretrain")) as generator, run.progress("Training the original", steps) as bar:
        training = finetune(trained, task, strategy, generator=generator, device=run.device, together=group)
        average = None if ema is None else _averaged(trained, ema)
        for _ in range(steps):
            next(training)
            if average is not None:
                average.update_parameters(trained)
            bar.tick()
    if average is not None:
        trained.load_state_dict(average.module.state_dict())
    group.broadcast_state(trained)
    return trained.eval()

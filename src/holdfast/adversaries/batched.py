"""Many fine-tuning adversaries of one small architecture, trained together as one batch.

A step of a small network is mostly overhead. Here the weights of many members are stacked along a new first axis, and
one step moves all of them: each on its own batch, at its own learning rate, as if it were alone.

Images lie as (N, members x channels, H, W), channels last, and a convolution is one with a group for each member;
vectors lie as (members, N, features), and a linear layer is a batched product. `torch.func.vmap` would write the same
in fewer lines, but puts the members elsewhere in memory, and on a CPU is hardly faster than one by one
(`benchmarks/audit.py` measures both). So the layers that are known are written out below, and a model with any other
is never stacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import Field, dataclass, fields
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adversaries.base import Adversary, Trace, benign_score_after
from holdfast.adversaries.finetuning import FineTuning
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.models.families.builtin import CNN, MLP
from holdfast.results import Curve, Role
from holdfast.runtime.run import Run
from holdfast.tasks import ArrayTask, Batch, Task
from holdfast.training import OPTIMIZERS, Strategy

ELEMENTWISE: Final = frozenset({"sgd", "momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw"})
"""Optimizers whose update of a number depends on its own history alone: they cannot tell that weights are stacked."""

DECOUPLED: Final = frozenset({"adamw"})
"""Those whose weight decay shrinks the weights instead of adding to the gradients."""

SAMEWISE: Final = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
ONLY: Final[dict[type[nn.Module], bool]] = {
    nn.Conv2d: True, nn.BatchNorm2d: True, nn.MaxPool2d: True, nn.AvgPool2d: True, nn.AdaptiveAvgPool2d: True,
    nn.Linear: False,
}  # fmt: skip
"""Layers that are known for images (True) or for vectors (False) only."""

SMALL: Final = 1_000_000
"""Weights and batch values up to which a step is mostly overhead; larger models gain nothing by being stacked."""


@dataclass(frozen=True)
class Member:
    """One attack: what `Adversary.attack` is called with."""

    adversary: Adversary
    model: SplitModel
    task: Task
    role: Role
    seed: int


def stackable(adversary: Adversary, model: SplitModel) -> bool:
    """Says whether an attack may be trained together with others.

    The adversary must be plain fine-tuning of everything or of the head; the model must be small and a chain of layers
    that are known here, ending in its linear head. Dropout, hooks, tied weights, and whatever else could make a layer
    do something of its own, are reasons to train it alone.

    Example:
        >>> adversary = FineTuning(Strategy())
        >>> stackable(adversary, SplitModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), head="2"))
        True
        >>> stackable(adversary, SplitModel(nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)), head="2"))
        False
    """
    return _plain(adversary) and any(_flows(model, images=images) for images in (True, False))


def _plain(adversary: Adversary) -> bool:
    """Whether it is fine-tuning without anything beside its six settings."""
    if type(adversary) is not FineTuning:
        return False
    strategy = adversary.strategy
    known = {"initialisation", "scope", "optimizer", "learning_rate", "batch_size", "weight_decay"}
    others: list[tuple[object, Field[Any]]] = [(strategy, f) for f in fields(strategy) if f.name not in known]
    others += [(adversary, f) for f in fields(adversary) if f.name not in {"strategy", "name"}]
    return (
        strategy.scope in ("all", "head", "norm")
        and strategy.optimizer in ELEMENTWISE
        and all(getattr(owner, field.name) == field.default for owner, field in others)
    )


def _layers(model: SplitModel) -> list[tuple[str, nn.Module]]:
    """Names and modules of a chain, in the order in which data passes; a module that is no known chain is one layer."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if type(module) in (nn.Sequential, CNN, MLP):  # both of ours pass data through their children in order
            for child, inner in module.named_children():
                yield from walk(f"{name}.{child}", inner)
        else:
            yield name, module

    return list(walk("network", model.network))


def _flows(model: SplitModel, *, images: bool) -> bool:
    """Whether a small model is a chain of known layers for such inputs, and nothing else."""
    layers, own = _layers(model), [*model.parameters()]
    tied = len(own) != len([*model.named_parameters(remove_duplicate=False)])
    alike = len({(p.dtype, p.device) for p in own}) == 1
    if type(model) is not SplitModel or layers[-1][1] is not model.head or tied or not alike or not _inert(model):
        return False
    for _, layer in layers:
        if not _usual(layer) or (type(layer) in ONLY and images != ONLY[type(layer)]):
            return False
        images = images and type(layer) is not nn.Flatten
    return not images and sum(p.numel() for p in own) <= SMALL


def _usual(layer: nn.Module) -> bool:
    """Whether a layer, with its settings, is among those that are written out below."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros"
    if type(layer) is nn.BatchNorm2d:
        return layer.momentum is not None and layer.track_running_stats
    if type(layer) is nn.MaxPool2d:
        return not layer.return_indices
    if type(layer) is nn.Flatten:
        return layer.start_dim == 1 and layer.end_dim == -1
    return type(layer) in SAMEWISE or type(layer) in ONLY


def _inert(model: SplitModel) -> bool:
    """Whether modules and weights are what their classes make them: no hooks, nor anything else of their own."""
    for module in model.modules():
        own = {n for n, _ in module.named_parameters(recurse=False)}
        buffers = {n for n, _ in module.named_buffers(recurse=False)}
        statistics = {"running_mean", "running_var", "num_batches_tracked"}
        expected = {"mean", "std"} if module is model else statistics if type(module) is nn.BatchNorm2d else set()
        hooked = any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
        strange = any(callable(v) or isinstance(v, Tensor) for v in _settings(module).values())
        lacking = isinstance(module, nn.Linear | nn.Conv2d) and "weight" not in own
        if hooked or strange or lacking or not buffers <= expected or not own <= {"weight", "bias"}:
            return False
        for weight in module.parameters(recurse=False):
            if type(weight) is not nn.Parameter or weight._backward_hooks or weight._post_accumulate_grad_hooks:
                return False
    return model.precision is None


def _settings(module: nn.Module) -> dict[str, Any]:
    """What was set on a module itself, such as a stride; a SplitModel's factory is not used by an attack."""
    return {k: v for k, v in vars(module).items() if k[0] != "_" and k not in ("training", "factory")}


def stacks(members: Sequence[Member], limit: int = 32) -> list[list[Member]]:
    """Groups attacks that can be trained together; who cannot be is alone.

    The groups depend on the members and their order alone, and so does the order in them.

    Args:
        members: attacks.
        limit: members a group, at most.

    Returns:
        Groups, in the order of their first members.

    Example:
        >>> from holdfast.models import load_model
        >>> from holdfast.tasks import load_task
        >>> task = load_task("digits[0-4]")
        >>> model = load_model("mlp", task)
        >>> members = [
        ...     Member(FineTuning(Strategy("head", "all", optimizer, rate)), model, task, "immunized", 0)
        ...     for optimizer in ("adam", "momentum") for rate in (1e-3, 1e-2)
        ... ]
        >>> [[m.adversary.name for m in group] for group in stacks(members)]
        [['initFC+all adam 0.001 b50', 'initFC+all adam 0.01 b50'],
         ['initFC+all momentum 0.001 b50', 'initFC+all momentum 0.01 b50']]
    """
    groups: list[list[Member]] = []
    open_groups: dict[tuple[Any, ...], list[Member]] = {}
    for member in members:
        key = _key(member)
        group = None if key is None else open_groups.get(key)
        if group is None or len(group) >= limit:
            group = []
            groups.append(group)
            if key is not None:
                open_groups[key] = group
        group.append(member)
    return groups


def _key(member: Member) -> tuple[Any, ...] | None:
    """What members of one stack have in common; None for who must be alone."""
    adversary, model, task = member.adversary, member.model, member.task
    parts = ("loss", "loss_of", "outcomes", "outcomes_of", "_entered")
    own = any(getattr(type(task), name, None) is not getattr(ArrayTask, name) for name in parts)
    if own or not _plain(adversary) or not _flows(model, images=len(task.input_shape) == 3):
        return None
    assert isinstance(adversary, FineTuning)
    strategy = adversary.strategy
    batch_size = min(strategy.batch_size, task.size("train"))
    large = batch_size * math.prod(task.input_shape) > SMALL
    if batch_size < 2 or large or adversary.not_applicable(model, task) is not None:  # BatchNorm refuses one sample
        return None
    outputs = model.num_outputs if strategy.initialisation == "direct" else task.num_outputs
    chain = [(name, type(layer).__name__, _settings(layer)) for name, layer in _layers(model)[:-1]]
    tensors = [(n, tuple(v.shape), v.dtype) for n, v in model.state_dict().items() if not n.startswith(_head(model))]
    scale = [None if v is None else v.flatten().tolist() for v in (model.mean, model.std)]
    return (
        strategy.optimizer, strategy.scope, batch_size, outputs, task.input_shape, task.size("test"),
        model.head.weight.dtype, model.head.weight.shape[1], model.head.bias is None, repr((chain, tensors, scale)),
    )  # fmt: skip


def _head(model: SplitModel) -> str:
    return f"network.{model.head_name}."


def attack_together(
    members: Sequence[Member], *, budgets: Sequence[int], run: Run, score_benign: Task | None = None
) -> list[Curve]:
    """Runs the attacks of one group as one batch; the curves are those of `Adversary.attack`, up to rounding.

    Every member makes the random choices that it makes alone. One that diverges leaves the others as they are.

    Args:
        members: a group of `stacks`.
        budgets: steps at which to score, ascending.
        run: seed and device.
        score_benign: the models' own task, to be scored in the end for all but fresh models, which never knew it; None:
            it is not.

    Returns:
        A curve for each member.

    Raises:
        HoldfastError: if the members are no group of `stacks`.
    """
    if len(members) == 1:
        m = members[0]
        return [
            m.adversary.attack(
                m.model, m.task, budgets=budgets, run=run, role=m.role, seed=m.seed, benign=score_benign,
                score_benign=score_benign is not None and m.role != "scratch",
            )
        ]  # fmt: skip
    keys = [_key(m) for m in members]
    if None in keys or len(set(keys)) != 1:
        names = sorted({m.adversary.name for m in members})
        raise HoldfastError(f"These attacks cannot be trained together: {', '.join(names)}; group them with stacks().")
    traces = [Trace() for _ in members]
    since: list[Tensor] = []
    stack = _Stack(members, run)
    with run.seeded("attack together"):  # nothing is drawn here; it keeps cuDNN deterministic
        for step in range(budgets[-1] + 1):
            if step:
                since.append(stack.step())
            if step in budgets:
                losses = torch.stack(since).unbind(1) if since else [None] * len(members)
                for trace, outcomes, loss in zip(traces, stack.outcomes(), losses, strict=True):
                    trace.note(outcomes, loss)
                since = []
        after = stack.benign_scores(score_benign)
    return [
        t.curve(m.adversary, m.task, m.role, m.seed, budgets, score)
        for t, m, score in zip(traces, members, after, strict=True)
    ]


class _Stack:
    """The members' models and optimizer as stacked tensors."""

    def __init__(self, members: Sequence[Member], run: Run) -> None:
        models, strategies = [_prepared(m, run) for m in members], [_strategy(m) for m in members]
        first = models[0]
        self._members, self._models, self._run = members, models, run
        self._layers = _pool_first(_layers(first))
        self._scale = first.mean, first.std
        self._training = strategies[0].scope != "head"
        self._batches = _batches(members, run)
        self._size = min(strategies[0].batch_size, members[0].task.size("train"))
        states = [m.state_dict() for m in models]
        self._tensors = {name: _stacked([s[name] for s in states]) for name in states[0]}
        self._moving = [self._tensors[n].requires_grad_(True) for n, p in first.named_parameters() if p.requires_grad]
        # The optimizer moves shadows that start at zero, by learning rate 1: what they hold after a step is the update,
        # and each member scales its own. No optimizer of ELEMENTWISE looks at the weights but for their decay.
        self._shadows = [nn.Parameter(torch.zeros_like(p)) for p in self._moving]
        self._optimizer = OPTIMIZERS[strategies[0].optimizer](self._shadows, 1.0, 0.0)
        self._decoupled = strategies[0].optimizer in DECOUPLED
        decays = [s.weight_decay for s in strategies]
        self._rates = [_alongside(p, [s.learning_rate for s in strategies]) for p in self._moving]
        self._decays = [_alongside(p, decays) for p in self._moving] if any(decays) else None
        # The C library gives a large block back to the system when it is freed, and a step that gets it anew waits for
        # its pages; freeing one of the largest size that it ever keeps makes it keep all below (glibc; else nothing).
        torch.empty(32 * 10**6, dtype=torch.uint8)

    @torch.no_grad()
    def outcomes(self) -> list[Tensor]:
        """Returns every member's `Task.audit_outcomes` as it is now."""
        tasks = [m.task for m in self._members]
        sweeps = {id(t): t.sweep("test", self._size, device=self._run.device) for t in tasks}
        parts = []
        for found in zip(*sweeps.values(), strict=True):
            x = dict(zip(sweeps, (batch.x for batch in found), strict=True))
            parts.append(self._logits(torch.stack([x[id(t)] for t in tasks]), training=False))
        whole = torch.cat(parts, dim=1)
        return [task.audit_outcomes(_Known(logits)) for task, logits in zip(tasks, whole, strict=True)]

    @torch.no_grad()
    def benign_scores(self, benign: Task | None) -> list[float | None]:
        """Returns every member's `benign_score_after` as it is now, each taken out of the stack."""
        found: list[float | None] = []
        for i, (member, model) in enumerate(zip(self._members, self._models, strict=True)):
            if benign is None or member.role == "scratch":
                found.append(None)
                continue
            model.load_state_dict({name: stacked[i] for name, stacked in self._tensors.items()})
            found.append(benign_score_after(member.adversary, member.model, model, benign))
        return found

    def step(self) -> Tensor:
        """Moves every member by one step; returns their training losses, shape (members,)."""
        x, y = next(self._batches)
        logits = self._logits(x, training=self._training)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(len(x), -1).mean(1)
        losses.sum().backward()  # type: ignore[no-untyped-call]  # no member's loss depends on another's weights
        with torch.no_grad():
            self._update()
        return losses.detach()

    def _update(self) -> None:
        for k, (value, shadow) in enumerate(zip(self._moving, self._shadows, strict=True)):
            shadow.grad, value.grad = value.grad, None
            if self._decays is not None and self._decoupled:
                value.mul_(1 - self._rates[k] * self._decays[k])
            elif self._decays is not None:
                assert shadow.grad is not None
                shadow.grad.addcmul_(self._decays[k], value)
        self._optimizer.step()
        for value, shadow, rate in zip(self._moving, self._shadows, self._rates, strict=True):
            value.addcmul_(rate, shadow)
            shadow.zero_()

    def _logits(self, x: Tensor, *, training: bool) -> Tensor:
        """Logits of shape (members, N, classes) for inputs of shape (members, N, ...)."""
        count, (mean, std) = len(x), self._scale
        x = x.to(self._moving[0].dtype)
        if mean is not None and std is not None:
            x = (x - mean) / std
        if x.dim() == 5:  # to (N, members x channels, H, W), channels last in memory
            x = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        for name, layer in self._layers:
            own = {key: self._tensors.get(f"{name}.{key}") for key in ("weight", "bias", "running_mean", "running_var")}
            x = _pass(layer, own, x, count, training)
        return x


class _Known(nn.Module):
    """Stands for a member's model where a task scores it: its logits for the whole split are known, in order."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.logits: Tensor
        self.given = 0

    def forward(self, x: Tensor) -> Tensor:
        self.given += len(x)
        return self.logits[self.given - len(x) : self.given]


def _pass(layer: nn.Module, own: dict[str, Tensor | None], x: Tensor, count: int, training: bool) -> Tensor:
    """One layer of all members; `own` are its stacked weights and statistics."""
    if isinstance(layer, nn.Linear):
        weight, bias = own["weight"], own["bias"]
        assert weight is not None
        return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
    if isinstance(layer, nn.Flatten):
        if x.dim() == 3:
            return x
        apart = x.permute(0, 2, 3, 1).reshape(
            len(x), *x.shape[2:], count, -1
        )  # so that gradients are channels last, too
        return apart.permute(3, 0, 4, 1, 2).flatten(2)
    side_by_side = {key: None if v is None else v.flatten(0, 1) for key, v in own.items()}
    weight, bias = side_by_side["weight"], side_by_side["bias"]
    if isinstance(layer, nn.Conv2d):
        assert weight is not None
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups * count)
    if isinstance(layer, nn.BatchNorm2d):
        mean, var = side_by_side["running_mean"], side_by_side["running_var"]
        return F.batch_norm(x, mean, var, weight, bias, training, layer.momentum or 0.0, layer.eps)
    passed: Tensor = layer(x)  # without weights: it does not know that there are many
    return passed


def _pool_first(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Lets max-pooling go before a ReLU that it follows: values and gradients are the same, of fewer numbers."""
    ordered = list(layers)
    for k in range(len(ordered) - 1):
        if type(ordered[k][1]) is nn.ReLU and type(ordered[k + 1][1]) is nn.MaxPool2d:
            ordered[k], ordered[k + 1] = ordered[k + 1], ordered[k]
    return ordered


def _strategy(member: Member) -> Strategy:
    assert isinstance(member.adversary, FineTuning)
    return member.adversary.strategy


def _prepared(member: Member, run: Run) -> SplitModel:
    """The member's copy of its model where it starts from, with the draws of `Adversary.attack`."""
    model = member.model.clone().to(run.device)
    with run.seeded("attack", member.adversary.name, member.seed) as generator:
        next(member.adversary.run(model, member.task, benign=None, generator=generator, device=run.device))
    return model


def _batches(members: Sequence[Member], run: Run) -> Iterator[Batch]:
    """Yields everybody's next batch, stacked. An adversary sees the same ones in each role: they are drawn once."""
    keys = [(m.adversary.name, m.seed, id(m.task)) for m in members]
    streams = {
        key: m.task.batches(
            "train", m.adversary.batch_size, generator=run.generator("attack", *key[:2]), device=run.device
        )
        for key, m in zip(keys, members, strict=True)
    }
    while True:
        drawn = {key: next(stream) for key, stream in streams.items()}
        yield Batch(torch.stack([drawn[k].x for k in keys]), torch.stack([drawn[k].y for k in keys]))


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """A new tensor with a first axis for members; convolutions' weights are channels last, as their images are."""
    if values[0].dim() != 4:
        return torch.stack(list(values))
    return torch.stack([v.permute(0, 2, 3, 1) for v in values]).permute(0, 1, 4, 2, 3)


def _alongside(value: Tensor, numbers: Sequence[float]) -> Tensor:
    """One number for each member, shaped to be multiplied with a stacked tensor."""
    return torch.tensor(numbers, dtype=value.dtype, device=value.device).view(-1, *[1] * (value.dim() - 1))

"""Many fine-tuning adversaries of one small architecture, trained together as one batch.

A training step of a small network is mostly overhead. So the weights of many members are stacked along a new first
axis, and one step updates all of them, each with its own batch and learning rate.

Images have shape (N, members x channels, H, W), channels last, and a convolution has one group per member. Vectors have
shape (members, N, features), and a linear layer is a batched product. `torch.func.vmap` would need fewer lines, but its
memory layout makes it hardly faster on a CPU than training one by one (`benchmarks/audit.py` measures both). So the
supported layers are written out below, and models with other layers are not stacked.
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
from holdfast.adversaries.undo.moves import UNDO
from holdfast.errors import HoldfastError
from holdfast.models import SplitModel
from holdfast.models.families.builtin import CNN, MLP
from holdfast.results import Curve, Role
from holdfast.runtime.run import Run
from holdfast.tasks import ArrayTask, Batch, Task
from holdfast.training import OPTIMIZERS, Strategy

ELEMENTWISE: Final = frozenset({"sgd", "momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw"})
"""Optimizers that update each number from its own history alone, so that stacking does not change the update."""

DECOUPLED: Final = frozenset({"adamw"})
"""Optimizers whose weight decay shrinks the weights instead of adding to the gradients."""

ANY_INPUT: Final = (nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
NEEDS_IMAGES: Final[dict[type[nn.Module], bool]] = {
    nn.Conv2d: True, nn.BatchNorm2d: True, nn.MaxPool2d: True, nn.AvgPool2d: True, nn.AdaptiveAvgPool2d: True,
    nn.Linear: False,
}  # fmt: skip
"""Layers that are supported for images (True) or vectors (False) only."""

SMALL: Final = 1_000_000
"""Weights, and values in a batch, up to which a step is mostly overhead; above it stacking gains nothing."""


@dataclass(frozen=True)
class Member:
    """The arguments of one `Adversary.attack`.

    Attributes:
        repaired: whether it may be stacked after undo moves that change weights alone; figures then differ by rounding.
    """

    adversary: Adversary
    model: SplitModel
    task: Task
    role: Role
    seed: int
    repaired: bool = False


def stackable(adversary: Adversary, model: SplitModel) -> bool:
    """Returns whether an attack may be trained together with others.

    The adversary must be plain fine-tuning of all weights, the norm layers or the head. The model must be small, and a
    chain of supported layers that ends in its linear head. Models with dropout, hooks, tied weights or custom code are
    trained alone.

    Example:
        >>> adversary = FineTuning(Strategy())
        >>> stackable(adversary, SplitModel(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), head="2"))
        True
        >>> stackable(adversary, SplitModel(nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 2)), head="2"))
        False
    """
    return _is_plain(adversary, repaired=False) and any(_is_chain(model, images=images) for images in (True, False))


def _is_plain(adversary: Adversary, *, repaired: bool) -> bool:
    """Whether an adversary is fine-tuning with no options but its six basic settings, and some moves."""
    if type(adversary) is not FineTuning or not all(repaired and UNDO[move].weights_only for move in adversary.undo):
        return False
    strategy = adversary.strategy
    basic = {"initialisation", "scope", "optimizer", "learning_rate", "batch_size", "weight_decay"}
    others: list[tuple[object, Field[Any]]] = [(strategy, f) for f in fields(strategy) if f.name not in basic]
    others += [(adversary, f) for f in fields(adversary) if f.name not in {"strategy", "name", "undo"}]
    return (
        strategy.scope in ("all", "head", "norm")
        and strategy.optimizer in ELEMENTWISE
        and all(getattr(owner, field.name) == field.default for owner, field in others)
    )


def _layers(model: SplitModel) -> list[tuple[str, nn.Module]]:
    """Names and modules of a chain, in forward order."""

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if type(module) in (nn.Sequential, CNN, MLP):  # CNN and MLP call their children in order, too
            for child, inner in module.named_children():
                yield from walk(f"{name}.{child}", inner)
        else:
            yield name, module

    return list(walk("network", model.network))


def _is_chain(model: SplitModel, *, images: bool) -> bool:
    """Whether a model is small and nothing but a chain of supported layers for such inputs."""
    layers, parameters = _layers(model), [*model.parameters()]
    tied = len(parameters) != len([*model.named_parameters(remove_duplicate=False)])
    alike = len({(p.dtype, p.device) for p in parameters}) == 1
    if type(model) is not SplitModel or layers[-1][1] is not model.head or tied or not alike or not _unmodified(model):
        return False
    for _, layer in layers:
        if not _supported(layer) or NEEDS_IMAGES.get(type(layer), images) != images:
            return False
        images = images and type(layer) is not nn.Flatten
    return not images and sum(p.numel() for p in parameters) <= SMALL


def _supported(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros"
    if type(layer) is nn.BatchNorm2d:
        return layer.momentum is not None and layer.track_running_stats
    if type(layer) is nn.MaxPool2d:
        return not layer.return_indices
    if type(layer) is nn.Flatten:
        return layer.start_dim == 1 and layer.end_dim == -1
    return type(layer) in ANY_INPUT or type(layer) in NEEDS_IMAGES


def _unmodified(model: SplitModel) -> bool:
    """Whether all modules and weights are as their classes create them, without hooks or added attributes."""
    for module in model.modules():
        weights = {n for n, _ in module.named_parameters(recurse=False)}
        buffers = {n for n, _ in module.named_buffers(recurse=False)}
        statistics = {"running_mean", "running_var", "num_batches_tracked"}
        expected = {"mean", "std"} if module is model else statistics if type(module) is nn.BatchNorm2d else set()
        hooked = any(hooks for name, hooks in vars(module).items() if name.endswith("_hooks"))
        added = any(callable(v) or isinstance(v, Tensor) for v in _settings(module).values())
        lacking = isinstance(module, nn.Linear | nn.Conv2d) and "weight" not in weights
        if hooked or added or lacking or not buffers <= expected or not weights <= {"weight", "bias"}:
            return False
        for weight in module.parameters(recurse=False):
            if type(weight) is not nn.Parameter or weight._backward_hooks or weight._post_accumulate_grad_hooks:
                return False
    return model.precision is None


def _settings(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module, such as a stride, without a SplitModel's factory, which attacks do not use."""
    return {k: v for k, v in vars(module).items() if k[0] != "_" and k not in ("training", "factory")}


def stacks(members: Sequence[Member], limit: int = 32) -> list[list[Member]]:
    """Groups attacks that can be trained together; each of the others is a group of one.

    The groups, and the order in them, depend only on the members and their order.

    Args:
        members: the attacks.
        limit: largest size of a group.

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
    """What members of one stack have in common; None for an attack that cannot be stacked."""
    adversary, model, task = member.adversary, member.model, member.task
    methods = ("loss", "loss_of", "outcomes", "outcomes_of", "_entered")
    overridden = any(getattr(type(task), name, None) is not getattr(ArrayTask, name) for name in methods)
    if (
        overridden
        or not _is_plain(adversary, repaired=member.repaired)
        or not _is_chain(model, images=len(task.input_shape) == 3)
    ):
        return None
    strategy = _strategy(member)
    batch_size = min(strategy.batch_size, task.size("train"))
    large = batch_size * math.prod(task.input_shape) > SMALL
    if batch_size < 2 or large or adversary.not_applicable(model, task) is not None:  # BatchNorm refuses one sample
        return None
    outputs = model.num_outputs if strategy.initialisation == "direct" else task.num_outputs
    chain = [(name, type(layer).__name__, _settings(layer)) for name, layer in _layers(model)[:-1]]
    head, state = f"network.{model.head_name}.", model.state_dict()
    tensors = [(n, tuple(v.shape), v.dtype) for n, v in state.items() if not n.startswith(head)]
    scale = [None if v is None else v.flatten().tolist() for v in (model.mean, model.std)]
    return (
        strategy.optimizer, strategy.scope, batch_size, outputs, task.input_shape, task.size("test"),
        model.head.weight.dtype, model.head.weight.shape[1], model.head.bias is None, repr((chain, tensors, scale)),
    )  # fmt: skip


def attack_together(
    members: Sequence[Member], *, budgets: Sequence[int], run: Run, score_benign: Task | None = None
) -> list[Curve]:
    """Runs the attacks of one group as one batch; returns the curves of `Adversary.attack`, up to rounding.

    Every member makes the same random choices as alone. A member that diverges does not affect the others.

    Args:
        members: a group of `stacks`.
        budgets: steps at which to score, ascending.
        run: seed and device.
        score_benign: the benign task, on which all members but those from scratch are scored at the end; None: no
            scores.

    Returns:
        A curve for each member.

    Raises:
        HoldfastError: if the members are not a group of `stacks`.
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
    with run.seeded("attack together"):  # for deterministic cuDNN; nothing is drawn here
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
        models, generators = zip(*(_prepared(m, run) for m in members), strict=True)
        strategies, first = [_strategy(m) for m in members], models[0]
        self._members, self._models, self._run = members, models, run
        self._layers = _pool_first(_layers(first))
        self._scale = first.mean, first.std
        self._training = strategies[0].scope != "head"
        self._batches = _batches(members, generators, run)
        self._size = min(strategies[0].batch_size, members[0].task.size("train"))
        states = [m.state_dict() for m in models]
        self._tensors = {name: _stacked([s[name] for s in states]) for name in states[0]}
        self._trained = [self._tensors[n].requires_grad_(True) for n, p in first.named_parameters() if p.requires_grad]
        # The optimizer updates zeros at learning rate 1, so that they become the update, which each member then scales
        # by its own rate. No optimizer of ELEMENTWISE uses the weights, except for weight decay.
        self._updates = [nn.Parameter(torch.zeros_like(p)) for p in self._trained]
        self._optimizer = OPTIMIZERS[strategies[0].optimizer](self._updates, 1.0, 0.0)
        self._decoupled = strategies[0].optimizer in DECOUPLED
        decays = [s.weight_decay for s in strategies]
        self._rates = [_per_member(p, [s.learning_rate for s in strategies]) for p in self._trained]
        self._decays = [_per_member(p, decays) for p in self._trained] if any(decays) else None
        # glibc returns large freed blocks to the system, and a step that allocates one again waits for its pages.
        # Freeing one block of the largest size that glibc ever keeps makes it keep all smaller blocks, too.
        torch.empty(32 * 10**6, dtype=torch.uint8)

    @torch.no_grad()
    def outcomes(self) -> list[Tensor]:
        """Returns the current `Task.audit_outcomes` of every member."""
        tasks = [m.task for m in self._members]
        sweeps = {id(t): t.sweep("test", self._size, device=self._run.device) for t in tasks}
        parts = []
        for batches in zip(*sweeps.values(), strict=True):
            x = dict(zip(sweeps, (batch.x for batch in batches), strict=True))
            parts.append(self._logits(torch.stack([x[id(t)] for t in tasks]), training=False))
        logits = torch.cat(parts, dim=1)
        return [task.audit_outcomes(_KnownLogits(own)) for task, own in zip(tasks, logits, strict=True)]

    @torch.no_grad()
    def benign_scores(self, benign: Task | None) -> list[float | None]:
        """Returns the current `benign_score_after` of every member; None for members from scratch."""
        scores: list[float | None] = []
        for i, (member, model) in enumerate(zip(self._members, self._models, strict=True)):
            if benign is None or member.role == "scratch":
                scores.append(None)
                continue
            model.load_state_dict({name: stacked[i] for name, stacked in self._tensors.items()})
            scores.append(benign_score_after(member.adversary, member.model, model, benign))
        return scores

    def step(self) -> Tensor:
        """Trains every member for one step; returns their training losses, shape (members,)."""
        x, y = next(self._batches)
        logits = self._logits(x, training=self._training)
        losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(len(x), -1).mean(1)
        losses.sum().backward()  # type: ignore[no-untyped-call]  # no member's loss depends on another's weights
        with torch.no_grad():
            self._update()
        return losses.detach()

    def _update(self) -> None:
        for k, (weight, update) in enumerate(zip(self._trained, self._updates, strict=True)):
            update.grad, weight.grad = weight.grad, None
            if self._decays is not None and self._decoupled:
                weight.mul_(1 - self._rates[k] * self._decays[k])
            elif self._decays is not None:
                assert update.grad is not None
                update.grad.addcmul_(self._decays[k], weight)
        self._optimizer.step()
        for weight, update, rate in zip(self._trained, self._updates, self._rates, strict=True):
            weight.addcmul_(rate, update)
            update.zero_()

    def _logits(self, x: Tensor, *, training: bool) -> Tensor:
        """Logits of shape (members, N, classes) for inputs of shape (members, N, ...)."""
        count, (mean, std) = len(x), self._scale
        x = x.to(self._trained[0].dtype)
        if mean is not None and std is not None:
            x = (x - mean) / std
        if x.dim() == 5:  # to (N, members x channels, H, W), channels last in memory
            x = x.transpose(0, 1).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        for name, layer in self._layers:
            keys = ("weight", "bias", "running_mean", "running_var")
            x = _forward(layer, {key: self._tensors.get(f"{name}.{key}") for key in keys}, x, count, training)
        return x


class _KnownLogits(nn.Module):
    """Returns the next rows of precomputed logits, so that a task can score a member of the stack."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.logits: Tensor
        self.position = 0

    def forward(self, x: Tensor) -> Tensor:
        self.position += len(x)
        return self.logits[self.position - len(x) : self.position]


def _forward(layer: nn.Module, tensors: dict[str, Tensor | None], x: Tensor, count: int, training: bool) -> Tensor:
    """Returns the outputs of a layer of all members; `tensors` are its stacked weights and statistics."""
    if isinstance(layer, nn.Linear):
        weight, bias = tensors["weight"], tensors["bias"]
        assert weight is not None
        return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
    if isinstance(layer, nn.Flatten):
        if x.dim() == 3:
            return x
        # This order of the axes makes gradients channels last, too.
        separate = x.permute(0, 2, 3, 1).reshape(len(x), *x.shape[2:], count, -1)
        return separate.permute(3, 0, 4, 1, 2).flatten(2)
    joined = {key: None if v is None else v.flatten(0, 1) for key, v in tensors.items()}
    weight, bias = joined["weight"], joined["bias"]
    if isinstance(layer, nn.Conv2d):
        assert weight is not None
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups * count)
    if isinstance(layer, nn.BatchNorm2d):
        mean, var = joined["running_mean"], joined["running_var"]
        return F.batch_norm(x, mean, var, weight, bias, training, layer.momentum or 0.0, layer.eps)
    outputs: Tensor = layer(x)  # layers without weights work on stacked inputs as they are
    return outputs


def _pool_first(layers: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Moves max-pooling before the ReLU that precedes it: the same values and gradients from fewer numbers."""
    ordered = list(layers)
    for k in range(len(ordered) - 1):
        if type(ordered[k][1]) is nn.ReLU and type(ordered[k + 1][1]) is nn.MaxPool2d:
            ordered[k], ordered[k + 1] = ordered[k + 1], ordered[k]
    return ordered


def _strategy(member: Member) -> Strategy:
    assert isinstance(member.adversary, FineTuning)
    return member.adversary.strategy


def _prepared(member: Member, run: Run) -> tuple[SplitModel, torch.Generator]:
    """Returns a copy of the member's model before its first step, and the generator that draws its batches next."""
    model = member.model.clone().to(run.device)
    with run.seeded("attack", member.adversary.name, member.seed) as generator:
        next(member.adversary.run(model, member.task, benign=None, generator=generator, device=run.device))
    return model, generator


def _batches(members: Sequence[Member], generators: Sequence[torch.Generator], run: Run) -> Iterator[Batch]:
    """Yields the next batch of every member, stacked; batches that several roles share are drawn once."""
    keys = [
        (m.adversary.name, m.seed, id(m.task), g.get_state().numpy().tobytes())
        for m, g in zip(members, generators, strict=True)
    ]
    streams = {
        key: m.task.batches("train", m.adversary.batch_size, generator=generator, device=run.device)
        for key, m, generator in zip(keys, members, generators, strict=True)
    }
    while True:
        drawn = {key: next(stream) for key, stream in streams.items()}
        yield Batch(torch.stack([drawn[k].x for k in keys]), torch.stack([drawn[k].y for k in keys]))


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Stacks tensors along a first axis for members; weights of convolutions are channels last, like the images."""
    if values[0].dim() != 4:
        return torch.stack(list(values))
    return torch.stack([v.permute(0, 2, 3, 1) for v in values]).permute(0, 1, 4, 2, 3)


def _per_member(value: Tensor, numbers: Sequence[float]) -> Tensor:
    """Returns one number per member, shaped to be multiplied with a stacked tensor."""
    return torch.tensor(numbers, dtype=value.dtype, device=value.device).view(-1, *[1] * (value.dim() - 1))

"""Simulated fine-tuning and the first-order meta-gradient of SOPHON (section 4.1.2).

The paper's objective, Eq. 4, is the sum over adversaries i and steps k of gamma_ik L(phi_ik), where phi_ik are the
parameters of adversary i after k simulated steps from theta. Fine-tuning maps theta to phi_ik; taking the Jacobian of
this map as the identity, the gradient with respect to theta is about the sum of gamma_ik (grad L)(phi_ik).

So nothing needs the graph of the earlier steps: each gradient is added to a buffer and dropped, and memory does not
grow with K. For a part that was initialised anew, the head or the last blocks, the Jacobian with respect to the
released one is exactly zero: such simulations add no gradient to it. A parameter that none of the simulations reached
has no gradient at all, rather than one of zeros, with which Adam would still move it by the moments of earlier loops.

A simulated adversary may live for several loops. Between them theta moves, and the adversary with it: kept is how far
it has come, phi - theta, which is what a Jacobian of the identity says. So long horizons cost K steps a loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.errors import HoldfastError
from holdfast.losses import Objective, SuppressionLoss, ridge_probe
from holdfast.models import SplitModel
from holdfast.runtime.devices import autocast
from holdfast.runtime.storage import optimizer_tensors, restore_optimizer
from holdfast.tasks import Task
from holdfast.training import Strategy, finetune, optimizer_of, prepare, renewed, trained_modules


class Seen(NamedTuple):
    """What a simulation saw: the mean suppression loss of its steps, and the adversary's score at the end."""

    loss: float
    score: float


@dataclass
class Simulated:
    """A simulated adversary.

    Attributes:
        model: its copy of the model. While it rests, what it shares with the model is stored as the difference.
        head: the head that the copy came with; a fresh one may be in its place.
        strategy: how it fine-tunes.
        optimizer: its own, with its moments.
        shared: indices of the parameters that it did not start anew; those of the model get a gradient.
        loops: for how many loops it has lived.
        life: after how many of them it ends.
    """

    model: SplitModel
    head: nn.Module
    strategy: Strategy
    optimizer: torch.optim.Optimizer
    shared: list[int]
    loops: int = 0
    life: int = 1


class Simulation:
    """Simulated fine-tuning and the first-order meta-gradient, in buffers that are made once.

    Where blocks of the body start anew, a fresh model is drawn for each adversary.

    Args:
        model: the model being immunized; never written to.
        objective: what the defender minimises; or its suppression loss alone.
        bf16: compute in bfloat16 where torch's autocast deems it safe.
        compiled: let torch.compile make the adversaries' forward passes.
        device: where adversaries live and the gradient is collected; None: with the model.
    """

    def __init__(
        self,
        model: SplitModel,
        objective: Objective | SuppressionLoss,
        *,
        bf16: bool = False,
        compiled: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.device = device if device is not None else model.device
        self.objective = objective if isinstance(objective, Objective) else Objective(objective)
        self.bf16, self.compiled = bf16, compiled
        self.gradient = [torch.zeros_like(p, device=self.device) for p in model.parameters()]
        self._reached: set[int] = set()
        self._state = list(model.network.state_dict().values())
        self._free = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
        self._spare: tuple[SplitModel, nn.Module] | None = None

    def zero(self) -> None:
        """Empties the gradient buffer."""
        torch._foreach_zero_(self.gradient)
        self._reached.clear()

    def gradients(self) -> list[Tensor | None]:
        """Returns the meta-gradient of each parameter; None where no simulation since `zero` reached it."""
        return [g if i in self._reached else None for i, g in enumerate(self.gradient)]

    def take(self, other: Simulation) -> None:
        """Adds the gradient that another simulation of the same model has collected on its device."""
        self._accumulate(dict(enumerate(other.gradients())), 1.0)

    def start(self, strategy: Strategy, task: Task) -> Simulated:
        """Returns a new adversary where its strategy starts from; fresh parts are drawn from torch's global generator.

        It reuses the memory of the one that was given to `release`, if any.
        """
        copy, head = self._spare if self._spare is not None else self._copy()
        self._spare = None
        copy.put_head(head)
        for own, source in zip(copy.network.state_dict().values(), self._state, strict=True):
            own.copy_(source)
        fresh = {id(p) for _, layer in renewed(copy, strategy) for p in layer.parameters()}
        if strategy.initialisation != "direct":
            fresh |= {id(p) for p in head.parameters()}
        shared = [i for i, p in enumerate(copy.parameters()) if i in self._free and id(p) not in fresh]
        prepare(copy, strategy, task)
        return Simulated(copy, head, strategy, optimizer_of(copy, strategy), shared)

    def release(self, adversary: Simulated) -> None:
        """Ends an adversary's life; the next one gets its memory."""
        self._spare = adversary.model, adversary.head

    def _copy(self) -> tuple[SplitModel, nn.Module]:
        copy = self.model.clone().to(self.device)
        head = {id(p) for p in copy.head.parameters()}
        body = (p for n, m in copy.network.named_modules() if m is not copy.head for p in m.parameters(recurse=False))
        if any(id(p) in head for p in body):
            raise HoldfastError(
                f"{copy.name}: its head shares weights with its body, and a simulated adversary could not start the "
                "one anew without the other; untie them."
            )
        if self.compiled:
            copy.network.compile()
        return copy, copy.head

    def run(
        self,
        task: Task,
        strategy: Strategy,
        steps: int,
        gamma: tuple[float, ...] | None,
        *,
        generator: torch.Generator,
        evaluation: Task | None = None,
    ) -> Seen:
        """Simulates one adversary that lives for this loop alone, and adds its weighted gradients to the buffer.

        Args:
            task: defender's half of the restricted task; fine-tuning batches R and evaluation batches T come from it.
            strategy: how the adversary fine-tunes.
            steps: K.
            gamma: one weight a step, or None for 1.
            generator: draws R and T.
            evaluation: where T comes from instead, so that what the adversary learned by heart does not count.

        Returns:
            The mean suppression loss over the K steps, not finite if any step's was not, and the adversary's score on
            the last batch T.
        """
        adversary = self.start(strategy, task)
        seen = self._simulate(adversary, task, steps, gamma, generator, evaluation or task)
        self.release(adversary)
        return seen

    def go_on(
        self,
        adversary: Simulated,
        task: Task,
        steps: int,
        gamma: tuple[float, ...] | None,
        *,
        generator: torch.Generator,
        evaluation: Task | None = None,
    ) -> Seen:
        """As `run`, with an adversary that is new or at rest, and that is put to rest afterwards."""
        if adversary.loops:
            self._move(adversary, 1.0)
            self._refresh(adversary)
        seen = self._simulate(adversary, task, steps, gamma, generator, evaluation or task)
        self._move(adversary, -1.0)
        adversary.loops += 1
        return seen

    def _simulate(
        self,
        adversary: Simulated,
        task: Task,
        steps: int,
        gamma: tuple[float, ...] | None,
        generator: torch.Generator,
        evaluation: Task,
    ) -> Seen:
        model, strategy, objective = adversary.model, adversary.strategy, self.objective
        parameters = list(model.parameters())
        frozen = [p for i in adversary.shared if not (p := parameters[i]).requires_grad]
        unseen = evaluation.batches("train", strategy.batch_size, generator=generator, device=self.device)
        training = finetune(
            model, task, strategy, generator=generator, device=self.device, optimizer=adversary.optimizer
        )
        weights = gamma if gamma is not None else (1.0,) * steps
        total = torch.zeros((), device=self.device)
        # Without autocast's cache: it holds weights as they were before the step.
        with autocast(self.device, self.bf16, cache=False):
            for k in range(steps):
                next(training)
                if objective.loss is not None:
                    batch = next(unseen)
                    with _free(frozen):
                        logits = whole(model(batch.x))
                        total += self._add(adversary, objective.loss(logits, batch.y), weights[k])
            if objective.loss is None:
                batch = next(unseen)
                with torch.no_grad():
                    logits = whole(model(batch.x))
            score = evaluation.score_of(logits, batch)
            if objective.probe_weight:
                probed = next(
                    evaluation.batches("train", objective.probe_batch, generator=generator, device=self.device)
                )
                if len(torch.unique(probed.y)) > 1:  # a batch of one class has nothing to tell apart
                    with _free(frozen):
                        share = ridge_probe(whole(model.features(probed.x)), probed.y, objective.ridge)
                        weight = objective.probe_weight
                        total += weight * steps * self._add(adversary, share, weight * sum(weights))
        return Seen(float(total) / steps, score)

    def _add(self, adversary: Simulated, loss: Tensor, weight: float) -> Tensor:
        """Adds the gradient of a loss at an adversary to the buffer; returns the loss without its graph."""
        parameters = list(adversary.model.parameters())
        grads = torch.autograd.grad(loss, [parameters[i] for i in adversary.shared], allow_unused=True)
        self._accumulate(dict(zip(adversary.shared, grads, strict=True)), weight)
        return loss.detach()

    def _accumulate(self, grads: Mapping[int, Tensor | None], weight: float) -> None:
        found = {i: g.to(self.device) for i, g in grads.items() if g is not None}
        self._reached.update(found)
        if found:
            torch._foreach_add_([self.gradient[i] for i in found], list(found.values()), alpha=weight)

    @torch.no_grad()
    def _move(self, adversary: Simulated, sign: float) -> None:
        """Adds the model's parameters to those that the adversary shares with it, or takes them away."""
        parameters, own = list(self.model.parameters()), list(adversary.model.parameters())
        for i in adversary.shared:
            own[i].add_(parameters[i].to(self.device), alpha=sign)

    def _refresh(self, adversary: Simulated) -> None:
        """Where only a part is trained, the rest is in evaluation mode, with the statistics of today's model."""
        model = adversary.model
        trained = {id(b) for m in trained_modules(model, adversary.strategy) for b in m.buffers()}
        if adversary.strategy.scope in ("head", "last-block"):
            theirs = dict(self.model.network.named_buffers())
            for name, buffer in model.network.named_buffers():
                if id(buffer) not in trained and name in theirs:
                    buffer.copy_(theirs[name])

    def saved(self, adversary: Simulated) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Returns the tensors and counts from which `restored` makes an adversary at rest again."""
        tensors = {f"model/{n}": v for n, v in adversary.model.network.state_dict().items()}
        tensors |= {f"optimizer/{n}": v for n, v in optimizer_tensors(adversary.optimizer).items()}
        return tensors, {"loops": adversary.loops, "life": adversary.life}

    def restored(
        self, strategy: Strategy, task: Task, tensors: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> Simulated:
        """Returns an adversary as it was `saved`."""
        adversary = self.start(strategy, task)
        own = adversary.model.network.state_dict()
        for name, value in tensors.items():
            if name.startswith("model/"):
                own[name.removeprefix("model/")].copy_(value)
        moments = {n.removeprefix("optimizer/"): v for n, v in tensors.items() if n.startswith("optimizer/")}
        restore_optimizer(adversary.optimizer, moments)
        adversary.loops, adversary.life = counts["loops"], counts["life"]
        return adversary


@contextmanager
def _free(parameters: Sequence[Tensor]) -> Iterator[None]:
    """What the adversary does not train still has a meta-gradient."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def whole(values: Tensor) -> Tensor:
    """Returns half-precision values in float32, in which losses are computed, and others as they are."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values

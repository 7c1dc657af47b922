"""Simulated fine-tuning and the first-order meta-gradient of SOPHON (section 4.1.2).

The paper's objective, Eq. 4, is the sum over adversaries i and steps k of gamma_ik L(phi_ik), where phi_ik are the
parameters of adversary i after k simulated steps from theta. Fine-tuning maps theta to phi_ik; taking the Jacobian of
this map as the identity, the gradient with respect to theta is about the sum of gamma_ik (grad L)(phi_ik).

So the graph of earlier steps is not needed: each gradient is added to a buffer and dropped, and memory does not grow
with K. For a part that was initialised anew, the head or the last blocks, the Jacobian with respect to the released
part is exactly zero: such simulations add no gradient to it. If a start mixes every weight with a fresh one
("shrink-perturb"), the Jacobian of these weights is the share that is kept. A parameter that no simulation reached has
no gradient (None). With a gradient of zeros, Adam would still move it, by the moments of earlier loops.

A simulated adversary may continue for several suppression loops. Between them theta moves, and the adversary moves with
it: the difference phi - theta is kept, as a Jacobian of the identity implies. A long horizon thus costs only K steps a
loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from holdfast.losses import Objective, SuppressionLoss, ridge_probe
from holdfast.models import SplitModel
from holdfast.runtime.devices import autocast
from holdfast.runtime.storage import optimizer_tensors, restore_optimizer
from holdfast.tasks import Task
from holdfast.training import SHRINK, Strategy, finetune, optimizer_of, prepare, renewed, trained_modules


class SimulationOutcome(NamedTuple):
    """The mean suppression loss over the steps of a simulation, and the adversary's score at the end."""

    loss: float
    score: float


@dataclass
class SimulatedAdversary:
    """A simulated adversary.

    Attributes:
        model: its copy of the model. Between two loops, the parameters that it shares with the model are stored as
            differences from the model's.
        head: the original head of the copy; a fresh one may replace it.
        strategy: how it fine-tunes.
        optimizer: its own, with its moments.
        shared: indices of the parameters that did not start anew, and the share of each that was kept; the gradient
            reaches these parameters of the model.
        loops_done: number of suppression loops in which it was simulated.
        max_loops: after this many, another adversary replaces it.
    """

    model: SplitModel
    head: nn.Module
    strategy: Strategy
    optimizer: torch.optim.Optimizer
    shared: dict[int, float]
    loops_done: int = 0
    max_loops: int = 1


class Simulation:
    """Simulated fine-tuning and the first-order meta-gradient, in buffers that are made once.

    If blocks of the body start anew, a fresh model is drawn for each adversary.

    Args:
        model: the model being immunized; never written to.
        objective: what the defender minimises; or its suppression loss alone.
        bf16: compute in bfloat16 where torch's autocast considers it safe.
        compiled: compile the adversaries' forward passes with torch.compile.
        head_gradient: see `SimulationSettings.head_gradient`.
        device: of the adversaries and of the gradient buffer; None: the model's.
    """

    def __init__(
        self,
        model: SplitModel,
        objective: Objective | SuppressionLoss,
        *,
        bf16: bool = False,
        compiled: bool = False,
        head_gradient: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.device = device if device is not None else model.device
        self.objective = objective if isinstance(objective, Objective) else Objective(objective)
        self.bf16, self.compiled, self.head_gradient = bf16, compiled, head_gradient
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
        """Returns the meta-gradient of each parameter; None if no simulation has reached it since `zero`."""
        return [g if i in self._reached else None for i, g in enumerate(self.gradient)]

    def add_gradient_of(self, other: Simulation) -> None:
        """Adds the gradient that another simulation of the same model has collected on its device."""
        self._accumulate(dict(enumerate(other.gradients())), 1.0)

    def start(self, strategy: Strategy, task: Task) -> SimulatedAdversary:
        """Returns a new adversary in the state that its strategy starts from.

        Fresh parts are drawn from torch's global generator. The memory of a released adversary is reused.
        """
        copy, head = self._spare if self._spare is not None else self._copy()
        self._spare = None
        copy.put_head(head)
        for own, source in zip(copy.network.state_dict().values(), self._state, strict=True):
            own.copy_(source)
        fresh = {id(p) for _, layer in renewed(copy, strategy) for p in layer.parameters()}
        if strategy.initialisation != "direct" and not self.head_gradient:
            fresh |= {id(p) for p in head.parameters()} - self._tied
        kept = SHRINK if strategy.initialisation == "shrink-perturb" else 1.0
        shared = {
            i: kept if p.dim() > 1 else 1.0
            for i, p in enumerate(copy.parameters())
            if i in self._free and id(p) not in fresh
        }
        prepare(copy, strategy, task)
        return SimulatedAdversary(copy, head, strategy, optimizer_of(copy, strategy), shared)

    def release(self, adversary: SimulatedAdversary) -> None:
        """Gives an adversary's memory to the next one."""
        self._spare = adversary.model, adversary.head

    def _copy(self) -> tuple[SplitModel, nn.Module]:
        copy = self.model.clone().to(self.device)
        body = (m for m in copy.network.modules() if m is not copy.head)
        in_body = {id(p) for m in body for p in m.parameters(recurse=False)}
        # A weight that the head shares with the body stays in the body when an adversary starts the head anew.
        self._tied = {id(p) for p in copy.head.parameters()} & in_body
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
    ) -> SimulationOutcome:
        """Simulates one adversary for a single loop, and adds its weighted gradients to the buffer.

        Args:
            task: defender's half of the restricted task; fine-tuning batches R and evaluation batches T come from it.
            strategy: how the adversary fine-tunes.
            steps: K.
            gamma: one weight per step, or None for 1.
            generator: draws R and T.
            evaluation: draw T from this task instead, so that samples that the adversary memorised do not count.

        Returns:
            The mean suppression loss over the steps that count, not finite if any step's was not, and the adversary's
            score on the last batch T.
        """
        adversary = self.start(strategy, task)
        outcome = self._simulate(adversary, task, steps, gamma, generator, evaluation or task)
        self.release(adversary)
        return outcome

    def advance(
        self,
        adversary: SimulatedAdversary,
        task: Task,
        steps: int,
        gamma: tuple[float, ...] | None,
        *,
        generator: torch.Generator,
        evaluation: Task | None = None,
    ) -> SimulationOutcome:
        """Like `run`, for an adversary that is new or was advanced before, and can be advanced again."""
        if adversary.loops_done:
            self._move(adversary, 1.0)
            self._update_statistics(adversary)
        outcome = self._simulate(adversary, task, steps, gamma, generator, evaluation or task)
        self._move(adversary, -1.0)
        adversary.loops_done += 1
        return outcome

    def _simulate(
        self,
        adversary: SimulatedAdversary,
        task: Task,
        steps: int,
        gamma: tuple[float, ...] | None,
        generator: torch.Generator,
        evaluation: Task,
    ) -> SimulationOutcome:
        model, strategy, objective = adversary.model, adversary.strategy, self.objective
        parameters = list(model.parameters())
        frozen = [p for i in adversary.shared if not (p := parameters[i]).requires_grad]
        unseen = evaluation.batches("train", strategy.batch_size, generator=generator, device=self.device)
        training = finetune(
            model, task, strategy, generator=generator, device=self.device, optimizer=adversary.optimizer
        )
        weights = gamma if gamma is not None else (1.0,) * steps
        evaluated = sum(weight > 0 for weight in weights)
        total = torch.zeros((), device=self.device)
        # Without autocast's cache, which holds weights from before the step.
        with autocast(self.device, self.bf16, cache=False):
            for k in range(steps):
                next(training)
                if objective.loss is not None and weights[k] > 0:
                    batch = next(unseen)
                    with _requiring_gradients(frozen):
                        logits = full_precision(model(batch.x))
                        total += self._add(adversary, objective.loss(*evaluation.counted(logits, batch.y)), weights[k])
            if objective.loss is None:
                batch = next(unseen)
                with torch.no_grad():
                    logits = full_precision(model(batch.x))
            score = evaluation.score_of(logits, batch)
            if objective.probe_weight:
                probed = next(
                    evaluation.batches("train", objective.probe_batch, generator=generator, device=self.device)
                )
                targets = evaluation.probe_targets(probed.y)
                if len(torch.unique(targets)) > 1:  # a probe needs two classes
                    with _requiring_gradients(frozen):
                        depths = model.features_by_depth(probed.x, objective.probe_depth)
                        rows = evaluation.probed_rows(probed.y)
                        shares = [ridge_probe(full_precision(z)[rows], targets, objective.ridge) for z in depths]
                        share = torch.stack(shares).mean()
                        weight = objective.probe_weight
                        total += weight * evaluated * self._add(adversary, share, weight * sum(weights))
        return SimulationOutcome(float(total) / evaluated, score)

    def _add(self, adversary: SimulatedAdversary, loss: Tensor, weight: float) -> Tensor:
        """Adds the gradient of a loss at an adversary to the buffer; returns the loss without its graph."""
        parameters = list(adversary.model.parameters())
        grads = torch.autograd.grad(loss, [parameters[i] for i in adversary.shared], allow_unused=True)
        self._collect(adversary, grads, weight)
        return loss.detach()

    def _collect(self, adversary: SimulatedAdversary, grads: Sequence[Tensor | None], weight: float) -> None:
        """Adds gradients of the shared parameters to the buffer, each times the share that was kept."""
        kept = adversary.shared.items()
        scaled = {i: g if g is None or share == 1 else share * g for (i, share), g in zip(kept, grads, strict=True)}
        self._accumulate(scaled, weight)

    def _accumulate(self, grads: Mapping[int, Tensor | None], weight: float) -> None:
        reached = {i: g.to(self.device) for i, g in grads.items() if g is not None}
        self._reached.update(reached)
        if reached:
            torch._foreach_add_([self.gradient[i] for i in reached], list(reached.values()), alpha=weight)

    @torch.no_grad()
    def _move(self, adversary: SimulatedAdversary, sign: float) -> None:
        """Adds the model's shared parameters to the adversary's (sign 1), or subtracts them (sign -1)."""
        parameters, own = list(self.model.parameters()), list(adversary.model.parameters())
        for i, share in adversary.shared.items():
            own[i].add_(parameters[i].to(self.device), alpha=sign * share)

    def _update_statistics(self, adversary: SimulatedAdversary) -> None:
        """Copies the model's statistics into the parts that stay in evaluation mode while another part is trained."""
        model, strategy = adversary.model, adversary.strategy
        if strategy.scope in ("head", "last-block"):
            trained = {id(b) for m in trained_modules(model, strategy) for b in m.buffers()}
            current = dict(self.model.network.named_buffers())
            for name, buffer in model.network.named_buffers():
                if id(buffer) not in trained and name in current:
                    buffer.copy_(current[name])

    def saved(self, adversary: SimulatedAdversary) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Returns the tensors and counts from which `restored` makes an adversary again, between two loops."""
        tensors = {f"model/{n}": v for n, v in adversary.model.network.state_dict().items()}
        tensors |= {f"optimizer/{n}": v for n, v in optimizer_tensors(adversary.optimizer).items()}
        return tensors, {"loops": adversary.loops_done, "life": adversary.max_loops}  # names of the format

    def restored(
        self, strategy: Strategy, task: Task, tensors: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> SimulatedAdversary:
        """Returns the adversary that was `saved`."""
        adversary = self.start(strategy, task)
        own = adversary.model.network.state_dict()
        for name, value in tensors.items():
            if name.startswith("model/"):
                own[name.removeprefix("model/")].copy_(value)
        moments = {n.removeprefix("optimizer/"): v for n, v in tensors.items() if n.startswith("optimizer/")}
        restore_optimizer(adversary.optimizer, moments)
        adversary.loops_done, adversary.max_loops = counts["loops"], counts["life"]
        return adversary


@contextmanager
def _requiring_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Lets parameters that the adversary does not train have a meta-gradient."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def full_precision(values: Tensor) -> Tensor:
    """Returns half-precision values in float32, in which losses are computed, and other values unchanged."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values

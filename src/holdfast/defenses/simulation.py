"""Simulated fine-tuning and the first-order meta-gradient of SOPHON (section 4.1.2).

The paper's objective, Eq. 4, is the sum over adversaries i and steps k of gamma_ik L(phi_ik), where phi_ik are the
parameters of adversary i after k simulated steps from theta. Fine-tuning maps theta to phi_ik; taking the Jacobian of
this map as the identity, the gradient with respect to theta is about the sum of gamma_ik (grad L)(phi_ik).

So nothing needs the graph of the earlier steps: each gradient is added to a buffer and dropped, and memory does not
grow with K. For a head that was initialised anew, the Jacobian with respect to the released head is exactly zero: such
simulations add no gradient to it. A parameter that none of the simulations reached has no gradient at all, rather than
one of zeros, with which Adam would still move it by the moments of earlier loops.
"""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.finetune import Strategy, finetune, prepare
from holdfast.models import SplitModel
from holdfast.suppression import SuppressionLoss
from holdfast.tasks import Task


class Simulation:
    """Simulated fine-tuning and the first-order meta-gradient, in buffers that are made once.

    Args:
        model: the model being immunized; never written to.
        loss: suppression loss, minimised by the defender.
    """

    def __init__(self, model: SplitModel, loss: SuppressionLoss) -> None:
        self.model = model
        self.loss = loss
        self.gradient = [torch.zeros_like(p) for p in model.parameters()]
        self._reached: set[int] = set()
        self._state = list(model.network.state_dict().values())
        self._copy = model.clone()
        self._head = self._copy.head
        head = {id(p) for p in model.head.parameters()}
        self._free = [i for i, p in enumerate(model.parameters()) if p.requires_grad]
        self._free_in_body = [i for i, p in enumerate(model.parameters()) if p.requires_grad and id(p) not in head]

    def zero(self) -> None:
        """Empties the gradient buffer."""
        torch._foreach_zero_(self.gradient)
        self._reached.clear()

    def gradients(self) -> list[Tensor | None]:
        """Returns the meta-gradient of each parameter; None where no simulation since `zero` reached it."""
        return [g if i in self._reached else None for i, g in enumerate(self.gradient)]

    def _adversary(self, strategy: Strategy, task: Task) -> SplitModel:
        """The copy that the simulated adversary trains: parameters and buffers as in the model, in reused memory."""
        copy = self._copy
        copy.put_head(self._head)  # the last simulation may have left another one there
        for own, source in zip(copy.network.state_dict().values(), self._state, strict=True):
            own.copy_(source)
        prepare(copy, strategy, task)
        return copy

    def run(
        self,
        task: Task,
        strategy: Strategy,
        steps: int,
        gamma: tuple[float, ...] | None,
        *,
        generator: torch.Generator,
    ) -> float:
        """Simulates one adversary and adds its weighted gradients to the buffer.

        Args:
            task: defender's half of the restricted task; fine-tuning batches R and evaluation batches T come from it.
            strategy: how the adversary fine-tunes.
            steps: K.
            gamma: one weight a step, or None for 1.
            generator: draws R and T.

        Returns:
            The mean suppression loss over the K steps; not finite if any step's was not.
        """
        device = self.gradient[0].device
        adversary = self._adversary(strategy, task)
        parameters = list(adversary.parameters())
        moved = self._free if strategy.initialisation == "direct" else self._free_in_body
        at = [parameters[i] for i in moved]
        evaluation = task.batches("train", strategy.batch_size, generator=generator, device=device)
        training = finetune(adversary, task, strategy, generator=generator, device=device)
        total = torch.zeros((), device=device)
        for k in range(steps):
            next(training)
            batch = next(evaluation)
            loss = self.loss(adversary(batch.x), batch.y)
            grads = torch.autograd.grad(loss, at, allow_unused=True)
            self._accumulate(moved, grads, 1.0 if gamma is None else gamma[k])
            total += loss.detach()
        return float(total) / steps

    def _accumulate(self, moved: list[int], grads: tuple[Tensor | None, ...], weight: float) -> None:
        found = {i: g for i, g in zip(moved, grads, strict=True) if g is not None}
        self._reached.update(found)
        torch._foreach_add_([self.gradient[i] for i in found], list(found.values()), alpha=weight)

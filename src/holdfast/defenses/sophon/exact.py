"""The exact meta-gradient of SOPHON's Eq. 4, through the graph of all simulated steps: for small K, and for tests.

With phi_k = phi_(k-1) - eta v_k and v_k = mu v_(k-1) + grad L(phi_(k-1)), every term gamma_k L_alpha(phi_k) depends on
theta through all earlier steps: its gradient has Hessian-vector products, and its graph grows with K. SOPHON and our
default therefore use the first-order gradient.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from holdfast.defenses.sophon.simulation import SimulatedAdversary, Simulation, SimulationOutcome
from holdfast.tasks import Batch, Task

MOMENTUM: Final = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}
"""Optimizers with a differentiable step, and their momentum. Adaptive ones such as Adam divide by a root, which has no
derivative where a gradient is 0."""


class ExactSimulation(Simulation):
    """`Simulation` with the exact gradient of Eq. 4. Adversaries train all parameters, with one of `MOMENTUM`."""

    def _simulate(
        self,
        adversary: SimulatedAdversary,
        task: Task,
        steps: int,
        gamma: tuple[float, ...] | None,
        generator: torch.Generator,
        evaluation: Task,
    ) -> SimulationOutcome:
        strategy, loss = adversary.strategy, self.objective.loss
        assert loss is not None
        loss_module = _LossModule(adversary.model, task).train()
        named = {n: p for n, p in loss_module.named_parameters() if p.requires_grad}
        unseen = evaluation.batches("train", strategy.batch_size, generator=generator, device=self.device)
        training = task.batches("train", strategy.batch_size, generator=generator, device=self.device)
        momentum = MOMENTUM[strategy.optimizer]
        phi: dict[str, Tensor] = dict(named)
        velocity = {n: torch.zeros_like(p) for n, p in named.items()}
        objective = total = torch.zeros((), device=self.device)
        for k in range(steps):
            with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivative
                training_loss = functional_call(loss_module, phi, next(training))
                grads = torch.autograd.grad(training_loss, list(phi.values()), create_graph=True, allow_unused=True)
            for (n, value), gradient in zip(list(phi.items()), grads, strict=True):
                decay = strategy.weight_decay * value
                decayed = decay if gradient is None else gradient + decay
                velocity[n] = momentum * velocity[n] + decayed
                step = decayed + momentum * velocity[n] if strategy.optimizer == "nesterov" else velocity[n]
                phi[n] = value - strategy.learning_rate * step
            batch = next(unseen)
            logits = functional_call(adversary.model, {n.removeprefix("model."): v for n, v in phi.items()}, batch.x)
            suppression_loss = loss(*evaluation.counted(logits, batch.y))
            total = total + suppression_loss.detach()
            objective = objective + (1.0 if gamma is None else gamma[k]) * suppression_loss
        parameters = list(adversary.model.parameters())
        grads = torch.autograd.grad(objective, [parameters[i] for i in adversary.shared], allow_unused=True)
        self._collect(adversary, grads, 1.0)
        return SimulationOutcome(float(total) / steps, evaluation.score_of(logits, batch))


class _LossModule(nn.Module):
    """The loss on a batch as a module, so that its parameters can be replaced by functions of theta."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.task.loss(self.model, Batch(x, y))

"""IMMA (Zheng and Yeh, ECCV 2024) for linear probes: the adversary's training is differentiated through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.defenses.linear.base import GradientDescent, IterativeDefense, LinearProblem, _Descent
from holdfast.defenses.registry import register_defense
from holdfast.errors import HoldfastError


@register_defense
@dataclass
class IMMA(IterativeDefense):
    """Bi-level optimization: a probe descends the restricted loss below; theta raises its final loss above.

    Below, w_0 = 0 and w_{j+1} = w_j - eta grad_w L(D_H, w_j, theta) with eta = 1 / lambda_max(H_H(theta)); above, theta
    ascends L(D_H, w_J(theta), theta), back-propagated through every w_j. The step size is part of the adversary and is
    not differentiated, so theta cannot exploit it.

    Attributes:
        inner_steps: J, the simulated probe's steps.
    """

    name: ClassVar[str] = "imma"
    citation: ClassVar[str] = (
        "Zheng, Yeh, IMMA: Immunizing Text-to-Image Models against Malicious Adaptation, ECCV 2024"
    )

    inner_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_below_one("inner_steps")

    def start(self, problem: LinearProblem, theta: Tensor, generator: torch.Generator) -> _Descent:
        """See `IterativeDefense.start`.

        Raises:
            HoldfastError: if the restricted task has no targets.
        """
        if not problem.frontier.restricted.target.shape[1]:
            raise HoldfastError("imma simulates a probe, and the restricted task has no targets for it.")
        return _Bilevel(self, problem, theta)


class _Bilevel(GradientDescent):
    def __init__(self, defense: IMMA, problem: LinearProblem, theta: Tensor) -> None:
        super().__init__(defense, theta)
        self.task, self.inner_steps = problem.frontier.restricted, defense.inner_steps

    def gradients(self) -> list[Tensor]:
        root, target = self.task.root, self.task.target
        theta = self.theta.detach().requires_grad_()
        z = root @ theta
        eta = 1 / torch.linalg.matrix_norm(z.detach(), 2).square()
        w = z.new_zeros(z.shape[1], target.shape[1])
        for _ in range(self.inner_steps):
            w = w - eta * z.T @ (z @ w - target)
        loss = (z @ w - target).square().sum() / target.square().sum()
        (gradient,) = torch.autograd.grad(loss, theta)
        return [-gradient]

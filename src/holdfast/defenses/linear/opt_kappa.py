"""Opt kappa, a baseline of the ICML 2025 paper: gradient descent on the condition numbers themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from holdfast.defenses.linear.base import GradientDescent, IterativeDefense, LinearProblem, _Descent
from holdfast.defenses.linear.condition_number import CITATION
from holdfast.defenses.registry import register_defense
from holdfast.spectral.least_squares import LeastSquares


@register_defense
@dataclass
class OptKappa(IterativeDefense):
    """Descends kappa(H_P(theta)) - kappa(H_H(theta)), or the difference of their logarithms.

    kappa is not smooth, and its gradient depends on only one pair of singular vectors at a time; R_well and R_ill were
    made to avoid both.

    Attributes:
        log: take logarithms; the plain difference is the paper's baseline.
    """

    name: ClassVar[str] = "opt-kappa"
    citation: ClassVar[str] = CITATION

    log: bool = False

    def start(self, problem: LinearProblem, theta: Tensor, generator: torch.Generator) -> _Descent:
        """See `IterativeDefense.start`."""
        return _OptKappa(self, problem, theta)


class _OptKappa(GradientDescent):
    def __init__(self, defense: OptKappa, problem: LinearProblem, theta: Tensor) -> None:
        super().__init__(defense, theta)
        self.log, self.tasks = defense.log, (problem.frontier.benign, problem.frontier.restricted)

    def gradients(self) -> list[Tensor]:
        benign, restricted = (kappa_gradient(task, self.theta, log=self.log) for task in self.tasks)
        return [benign - restricted]


def kappa_gradient(task: LeastSquares, theta: Tensor, *, log: bool) -> Tensor:
    """Returns the gradient of kappa(theta' K theta), or of its logarithm, by theta.

    With Z = R theta = U diag(s) V', kappa = (s_1/s_k)^2 and d s_i = u_i' R dtheta v_i, so that
    grad log kappa = 2 R' (u_1 v_1'/s_1 - u_k v_k'/s_k).
    """
    u, sigma, v = task.through(theta).svd
    inner = torch.outer(u[:, 0], v[:, 0]) / sigma[0] - torch.outer(u[:, -1], v[:, -1]) / sigma[-1]
    gradient = 2 * task.root.T @ inner
    return gradient if log else (sigma[0] / sigma[-1]).square() * gradient

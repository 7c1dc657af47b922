"""Slow twins, transcribed from the papers' equations: what the fast code must agree with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


def ice(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON, Eq. 11, sample by sample and class by class."""
    total = torch.zeros((), dtype=logits.dtype)
    for z, y in zip(logits, labels, strict=True):
        p = torch.exp(z) / torch.exp(z).sum()
        for j in range(len(z)):
            total = total - (1.0 if j == y else 0.0) * torch.log(1 - p[j])
    return total / len(logits)


def ice_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """SOPHON, Eq. 12, of the mean over samples."""
    gradient = torch.empty_like(logits)
    for n, (z, y) in enumerate(zip(logits, labels, strict=True)):
        p = torch.softmax(z, -1)
        for i in range(len(z)):
            gradient[n, i] = p[y] if i == y else -p[i] * p[y] / (1 - p[y])
    return gradient / len(logits)


def klu(logits: Tensor) -> Tensor:
    """SOPHON, Eq. 13."""
    total = torch.zeros((), dtype=logits.dtype)
    for z in logits:
        p = torch.exp(z) / torch.exp(z).sum()
        for j in range(len(z)):
            total = total - torch.log(len(z) * p[j]) / len(z)
    return total / len(logits)


def klu_gradient(logits: Tensor) -> Tensor:
    """SOPHON, Eq. 14, of the mean over samples."""
    return (torch.softmax(logits, -1) - 1 / logits.shape[1]) / len(logits)


def adam_simulation(
    model: nn.Module,
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor],
    suppression: Callable[[Tensor, Tensor], Tensor],
    training: list[tuple[Tensor, Tensor]],
    evaluation: list[tuple[Tensor, Tensor]],
    gamma: list[float],
    rate: float,
) -> dict[str, Tensor]:
    """First-order meta-gradient of SOPHON's Eq. 4 for one simulated Adam: every phi_k is kept, gradients come last.

    Adam is written out (Kingma and Ba 2015, Algorithm 1, with the usual 0.9, 0.999, 1e-8).
    """
    phi = copy.deepcopy(model)
    first = {n: torch.zeros_like(p) for n, p in phi.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in phi.named_parameters()}
    path = []
    for t, batch in enumerate(training, 1):
        phi.train()
        names, parameters = zip(*phi.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss(phi, batch), parameters)
        with torch.no_grad():
            for name, parameter, g in zip(names, parameters, grads, strict=True):
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
                parameter.sub_(rate * m / (v.sqrt() + 1e-8))
        path.append(copy.deepcopy(phi))
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for phi_k, (x, y), weight in zip(path, evaluation, gamma, strict=True):
        phi_k.train()
        value = suppression(phi_k(x), y)
        for (name, _), g in zip(
            phi_k.named_parameters(), torch.autograd.grad(value, list(phi_k.parameters())), strict=True
        ):
            total[name] += weight * g
    return total

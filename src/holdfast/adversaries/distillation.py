"""Moving away from the released weights: a fresh network learns their features, and then the restricted task.

What makes the released weights hard to train (their scales, saturated units, a sharp minimum) stays behind; what they
say about inputs comes along. Labels are not needed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor

from holdfast.models import SplitModel
from holdfast.tasks import Task

RATE = 2e-3
"""Of Adam during distillation; it does not depend on the strategy, whose rate may be a low one for fine-tuning."""


def start_anew(model: SplitModel) -> SplitModel:
    """Gives a model fresh weights in place, except for its head; returns a frozen copy of it as it was.

    An extractor before the head is left out, as a fresh model has none.
    """
    teacher = model.clone().eval().requires_grad_(False)
    fresh = model.fresh()
    head = copy.deepcopy(model.head).to(fresh.dtype)
    model.network, model.head_name = fresh.network, fresh.head_name
    model.put_head(head)
    return teacher


def distil(
    model: SplitModel,
    teacher: SplitModel,
    tasks: tuple[Task, ...],
    *,
    batch_size: int,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[Tensor]:
    """Trains a model's body to give the features of another one, endlessly; yields the loss of each step.

    The loss is the mean squared error, relative to the variance of the teacher's features in the batch.

    Args:
        model: trained in place.
        teacher: of the same architecture, frozen, in evaluation mode.
        tasks: their training inputs are used, a batch of each in turn.
        batch_size: samples a step.
        generator: draws the batches.
        device: where models and data are.
    """
    head = {id(p) for p in model.head.parameters()}
    body = [p for p in model.parameters() if id(p) not in head and p.is_floating_point()]
    trained = [p.requires_grad for p in body]
    optimizer = torch.optim.Adam(body, RATE)
    streams = [task.batches("train", batch_size, generator=generator, device=device) for task in tasks]
    for stream in cycle(streams):
        x = next(stream).x
        model.train()
        for parameter in body:
            parameter.requires_grad_(True)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            wanted = teacher.features(x)
            spread = wanted.var(0, correction=0).mean()
            spread = torch.where(spread > 0, spread, torch.ones_like(spread))
        loss = (model.features(x).to(wanted.dtype) - wanted).square().mean() / spread
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for parameter, before in zip(body, trained, strict=True):
            parameter.requires_grad_(before)
        yield loss.detach()
